# SPDX-License-Identifier: Apache-2.0
"""The consistency term: published terms reproduced, bias at exact denoisers, who is taught, and the faults of the published code."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import consistency_bias
from dnnlib import EasyDict, UserError
from tests.support import GOLDEN
from tests.support.denoisers import Linear, Mixture, make_batch, unit
from torch_utils import misc, registry
from training.diffusion import ambient
from training.diffusion.noise import LogNormal, NoiseDistribution
from training.objective import weighting
from training.objective.consistency import CHAINS, Bridge, Euler, _levels, consistency_error, mean_square, u_statistic
from training.objective.loss import AmbientLoss, Objective
from training.run.published import consistency as consistency_spec

DATA = GOLDEN / 'losses'
AMBIENT, CDM = load_file(DATA / 'ambient_losses.safetensors'), load_file(DATA / 'cdm_martingale.safetensors')
KWARGS = {case['name']: case.get('kwargs', {}) for case in json.loads((DATA / 'ambient_losses.json').read_text())}


def make_term(batch=8, law=None, chain=Euler, **options):
    options = dict(estimator='mean', coeff=1.0, steps=2, samples=2, stop='no', grad=True, batch_size=0) | options
    return chain(law or LogNormal(), weighting.edm, batch, **options)


def value_of(batch=None, net=None, step=0, **options):
    """[N] of a term with these options on a batch of 8."""
    batch = batch or make_batch()
    return make_term(len(batch.images), **options)(net or Linear(), batch, misc.Draws(0, step))['consistency']


# ---- published terms


@pytest.mark.parametrize('case', ['consist0', 'consist1'])
def test_recorded_chains_give_the_published_consistency_loss(case):
    kwargs, net = KWARGS[case], Mixture(AMBIENT)
    rows, samples = kwargs['consistency_batch_size_per_gpu'], kwargs['num_primes']
    D, sigma = AMBIENT[f'{case}.x0_pred'], AMBIENT[f'{case}.sigma'].reshape(-1, 1, 1, 1)
    sigma_n = AMBIENT['current_sigma'].reshape(-1, 1, 1, 1)
    x = AMBIENT['images'] + (sigma ** 2 - sigma_n ** 2).clamp(min=0).sqrt() * AMBIENT['noise']
    chain_noise = [noise.unflatten(0, (rows, samples)) for noise in AMBIENT[f'{case}.sampler_noise']]
    error = consistency_error(net, x[:rows], sigma[:rows], AMBIENT[f'{case}.new_sigma'][::samples], D[:rows], chain_noise)
    weight = weighting.edm(sigma[:rows]) if kwargs['with_weight'] else 1
    added = kwargs['consistency_coeff'] * mean_square(error) * weight
    r = (sigma_n / sigma) ** 2
    loss = (weighting.edm(sigma) * ((1 - r) * D + r * x - AMBIENT['images']) ** 2).flatten(1).sum(1)
    loss[:rows] += added.flatten(1).sum(1)
    torch.testing.assert_close(loss, AMBIENT[f'{case}.loss'].flatten(1).sum(1), rtol=1e-10, atol=1e-11)
    assert added.abs().sum() > 0.1  # the records do contain chains of some length


def test_the_product_of_two_is_the_published_martingale_loss():
    """Daras et al. 2023: EDM's loss, and twice the product of two errors, sigma' at most 0.05 below sigma."""
    net, sigma = Mixture(CDM), CDM['sigma'].reshape(-1, 1, 1, 1)
    x = CDM['images'] + sigma * CDM['noise']
    sigma_prime = (sigma - 0.05 * CDM['epsilon_uniform']).clamp(min=0.002)
    chain_noise = [noise.unflatten(0, (2, 4)).transpose(0, 1) for noise in CDM['sampler_noise']]  # first all of the first chains
    D = net(x, sigma)
    product = u_statistic(consistency_error(net, x, sigma, sigma_prime, D, chain_noise))
    loss = weighting.edm(sigma) * (D - CDM['images']) ** 2 + 2 * product
    torch.testing.assert_close(loss, CDM['loss'], rtol=1e-10, atol=1e-12)
    assert product.abs().max() > 1e-4 and product.min() < 0


def test_chain_levels_are_the_published_ones():
    first, last = AMBIENT['sde.sigma_max'], AMBIENT['sde.sigma_min']
    levels = _levels(first, last, steps=5)
    torch.testing.assert_close(torch.stack(levels[:-1]).flatten(1), AMBIENT['sde.sigma_calls'], rtol=1e-12, atol=0)
    assert levels[0] is first and levels[-1] is last


def test_chain_equals_the_published_sampler():
    """The error of a denoiser that returns its input at the last level is the end of the chain, less D."""
    last, mixture = AMBIENT['sde.sigma_min'], Mixture(AMBIENT)
    x, noise = AMBIENT['sde.x'], [step[:, None] for step in AMBIENT['sde.noise']]
    walk = lambda x, sigma, **labels: mixture(x, sigma)
    end = consistency_error(lambda x, sigma, **labels: x, x, AMBIENT['sde.sigma_max'], last, torch.zeros_like(x), noise, guide=walk)[:, 0]
    moving = AMBIENT['sde.sigma_max'].flatten() != last.flatten()
    torch.testing.assert_close(end[moving], AMBIENT['sde.out'][moving], rtol=1e-10, atol=1e-12)
    # Where both levels are the same the published chain moves by its rounding error, ours not at all.
    assert torch.equal(end[~moving], x[~moving])
    torch.testing.assert_close(end[~moving], AMBIENT['sde.out'][~moving], rtol=0, atol=1e-7)


# ---- estimators and chains


@pytest.mark.parametrize('count', [2, 3, 8])
def test_the_u_statistic_is_the_mean_square_less_its_variance_term(count):
    error = unit(5, count, 2, 4, 4) + 1
    torch.testing.assert_close(u_statistic(error), mean_square(error) - error.var(1) / count)
    pairs = [error[:, i] * error[:, j] for i in range(count) for j in range(count) if i != j]
    torch.testing.assert_close(u_statistic(error), torch.stack(pairs).mean(0))


def test_the_u_statistic_is_unbiased_and_the_mean_square_is_not():
    """Errors of mean 0.1 and std 1, K = 4: expectations 0.01 and 0.26; 400,000 of each are known to 0.0007."""
    error = 0.1 + unit(400_000, 4, 1, 1, 1)
    assert u_statistic(error).mean().item() == pytest.approx(0.01, abs=0.003)
    assert mean_square(error).mean().item() == pytest.approx(0.26, abs=0.003)


def test_bridge_steps_compose_and_end_at_the_denoiser():
    """With D held fixed two steps have the law of one, and a step to level 0 returns D."""
    x, D = 2 * unit(1, 1, 4, 4), unit(1, 1, 4, 4, seed=1)
    assert torch.equal(ambient.bridge_step(x, D, 0.5, 0.0, unit(1, 1, 4, 4)), D)
    assert torch.equal(ambient.bridge_step(x, D, 0.5, 0.5, unit(1, 1, 4, 4)), D + (x - D))
    n = 200_000
    many = lambda seed: unit(n, 1, 1, 1, seed=seed)
    start, target = torch.full([n, 1, 1, 1], 0.7).double(), torch.full([n, 1, 1, 1], -0.2).double()
    once = ambient.bridge_step(start, target, 0.5, 0.1, many(2))
    twice = ambient.bridge_step(ambient.bridge_step(start, target, 0.5, 0.3, many(3)), target, 0.3, 0.1, many(4))
    expected, std = -0.2 + 0.04 * 0.9, 0.1 * math.sqrt(1 - 0.04)
    for end in (once, twice):  # five standard errors each
        assert end.mean().item() == pytest.approx(expected, abs=5 * std / n ** 0.5)
        assert end.std().item() == pytest.approx(std, abs=5 * std / (2 * n) ** 0.5)


def test_one_bridge_step_is_unbiased_on_gaussian_data_and_one_euler_step_is_not():
    gaussian = consistency_bias.DATA['gaussian']
    for pair in consistency_bias.PAIRS:
        u, error, _ = consistency_bias.measure(gaussian, Bridge.step, 1, pair, 1.0, points=2000, samples=32)
        assert abs(u) < 5 * error and error < 1e-4
        u, error, _ = consistency_bias.measure(gaussian, Euler.step, 1, pair, 1.0, points=2000, samples=32)
        assert u > 0.005 and u > 10 * error


@pytest.mark.parametrize('pair', consistency_bias.PAIRS)
@pytest.mark.parametrize('data', ['gaussian', 'mixture'])
def test_the_default_scores_the_truth_below_wrong_denoisers(data, pair):
    """|U| at the exact D against U at 0.9 D and 1.1 D, on the same points and noises: apart by four standard errors.

    The smallest differences, 1.2e-4 and 1.1e-4 (mixture, 0.9 D), are five to six standard errors of 3,000 points x 128 chains."""
    term, law = Bridge(LogNormal(), weighting.edm, 64), consistency_bias.DATA[data]
    find = lambda factor: consistency_bias.values(law, term.step, term.steps, pair, factor, points=3000, samples=128)[0]
    truth = find(1.0)
    for factor in (0.9, 1.1):
        apart = find(factor) - truth * truth.mean().sign()
        assert term.estimate is u_statistic and apart.mean() > 4 * apart.std() / len(apart) ** 0.5


# ---- rows, levels, labels


class Below(NoiseDistribution):
    """sigma' = sigma / 2, always."""

    def below(self, sigma, u):
        return sigma / 2


def level_net(x, sigma, **labels):
    """D = sigma everywhere, so that the consistency error of (sigma, sigma') is sigma' - sigma."""
    return misc.batched(sigma).expand_as(x)


@pytest.mark.parametrize('n', [1, 3, 8, 50])
@pytest.mark.parametrize('count', [16, 64, 256])
def test_2a5_the_coefficient_does_not_depend_on_the_size_of_a_micro_batch(n, count):
    """The published code takes its rows from every accumulation round; here each round's term is its share of the batch."""
    term, fraction = make_term(256, Below(), coeff=3.0, batch_size=count), count / 256
    batch = make_batch(n)._replace(sigma=torch.ones(n, 1, 1, 1, dtype=torch.float64))
    value = term(level_net, batch, misc.Draws(0, 0))['consistency']
    assert value.sum().item() == pytest.approx(3.0 * fraction * n * 0.25 * 32)
    active = value.nonzero().flatten()
    assert len(active) == max(1, round(fraction * n)) and active[0] == 0
    assert len(active) < 2 or active.diff().max() - active.diff().min() <= 1  # evenly spread


def levels_of(batch, **options):
    """(sigma, sigma') of every row."""
    net = Linear()
    value_of(batch, net, steps=1, samples=1, **options)
    return (torch.tensor(net.calls[i][1]).double() for i in (0, -1))


def test_2a4_the_second_level_has_a_draw_of_its_own():
    """The published code reuses the first draw: sigma' = sigma for most rows, at full cost and with no signal."""
    sigma, sigma_prime = levels_of(make_batch(64))
    assert (sigma_prime > 0).all() and (sigma_prime < sigma).all()
    # Uniform below sigma in the measure p: 64 draws of cdf(sigma') / cdf(sigma) average to 1/2 within five standard errors.
    share = LogNormal().cdf(sigma_prime) / LogNormal().cdf(sigma)
    assert share.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * 64))
    assert (sigma_prime > 0.2).any()


def test_the_second_level_may_be_kept_below_sigma_n():
    batch = make_batch(64)
    mixed = batch._replace(sigma_n=batch.sigma_n * (torch.arange(64) % 2).reshape(-1, 1, 1, 1))
    sigma, sigma_prime = levels_of(mixed, below='sigma_n')
    assert (sigma_prime[1::2] < 0.2).all() and (sigma_prime > 0).all() and (sigma_prime < sigma).all()
    assert (sigma_prime[::2] > 0.2).any()  # clean images have no such level


def test_2a5_labels_go_to_every_call():
    """The published chain leaves the augment labels out, and so compares two different conditionals."""
    for teacher in ('net', 'ema'):
        net, guide, batch = Linear(), Linear(), make_batch(4, labels=True)
        term = make_term(4, batch_size=2, steps=3, teacher=teacher)
        term.set_teacher(guide)
        term(net, batch, misc.Draws(0, 0))
        walk = guide.calls if teacher == 'ema' else net.calls[1:]
        chain = walk[1:] + net.calls[1:] if teacher == 'ema' else walk
        assert [call[0] for call in chain] == [4, 4, 4, 4]  # 2 images x 2 samples, three steps and the end
        for _, _, class_labels, augment_labels in chain:
            assert torch.equal(class_labels, batch.class_labels[[0, 0, 2, 2]])
            assert torch.equal(augment_labels, batch.augment_labels[[0, 0, 2, 2]])


def test_labels_may_be_absent_and_one_image_is_enough():
    value = make_term(64, batch_size=1, steps=1, samples=1)(Linear(), make_batch(1), misc.Draws(0, 0))['consistency']
    assert value.shape == (1,) and value.item() > 0


def test_two_ranks_draw_what_one_does():
    """Rows, levels and noises of the term depend on the row of the global batch, not on who holds it."""
    term, batch = make_term(32, batch_size=8), make_batch(32)
    whole = term(Linear(), batch, misc.Draws(5, 7))['consistency']
    cut = lambda rows: type(batch)(*(None if t is None else t[rows] for t in batch))
    halves = [term(Linear(), cut(slice(row, row + 16)), misc.Draws(5, 7, first_row=row))['consistency'] for row in (0, 16)]
    assert (whole > 0).sum() == 8
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-12, atol=0)


# ---- factor, weight, gradients


def test_weight_and_coefficient_multiply_the_term():
    torch.testing.assert_close(value_of(coeff=4.0), 4 * value_of())
    torch.testing.assert_close(value_of(weighted=True), weighting.edm(make_batch().sigma).flatten() * value_of())


def test_the_rampup_is_in_thousand_images_and_starts_at_zero():
    ramp = lambda step: value_of(step=step, rampup=0.08).sum() / value_of(step=step).sum()  # 80 images are 10 steps of 8
    assert [round(ramp(step).item(), 9) for step in (0, 1, 5, 10, 50)] == [0, 0.1, 0.5, 1, 1]


def test_every_third_step_carries_three_steps():
    net, batch = Linear(), make_batch()
    objective = Objective([AmbientLoss(weighting.edm), make_term(every=3)])
    values = [objective(net, batch, misc.Draws(0, step))['consistency'].sum() for step in range(6)]
    assert [value > 0 for value in values] == [True, False, False, True, False, False]
    assert len(net.calls) == 6 + 2 * 3  # the shared evaluations and the chains: a skipped step costs nothing
    torch.testing.assert_close(values[3], 3 * value_of(step=3).sum())


def slope(**options):
    net = Linear(0.5)
    term = make_term(law=Below(), **options)
    teacher = Linear(0.5)
    term.set_teacher(teacher)
    value = term(net, make_batch(), misc.Draws(0, 0))['consistency']
    value.sum().backward()
    assert teacher.a.grad is None
    return value.detach(), net.a.grad.item()


def test_grad_and_stop_decide_what_is_differentiated():
    """Same values; the slope is that of 2 (mean D(x') - D) d(...)/da by hand, with or without the upper part."""
    results = {(grad, stop): slope(grad=grad, stop=stop, steps=1, estimator='u')
               for grad in (False, True) for stop in ('no', 'upper')}
    values = [value for value, _ in results.values()]
    assert all(torch.equal(value, values[0]) for value in values)
    batch, draws = make_batch(), misc.Draws(0, 0)
    x = ambient.add_noise(batch.images, batch.sigma_n, batch.sigma, batch.noise)
    noise = draws('consistency_noise_0', [8, 2, 2, 4, 4]).double()
    for (grad, stop), (_, found) in results.items():
        a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        upper, walker = (a.detach() if stop == 'upper' else a), (a if grad else a.detach())
        ends = [a * ambient.reverse_step(x, walker * x, batch.sigma, batch.sigma / 2, noise[:, k]) - upper * x for k in range(2)]
        (by_hand,) = torch.autograd.grad((ends[0] * ends[1]).sum(), a)
        assert found == pytest.approx(by_hand.item(), rel=1e-9)
    assert len({round(found, 6) for _, found in results.values()}) == 4


def test_an_ema_teacher_walks_and_predicts_and_learns_nothing():
    value, found = slope(teacher='ema')
    plain, stopped = slope(stop='upper', grad=False)
    assert torch.equal(value, plain) and found == pytest.approx(stopped)  # the teacher equals the network here


def test_the_teacher_is_no_part_of_the_term():
    term = make_term(teacher='ema')
    term.set_teacher(Linear())
    assert not list(term.parameters()) and not term.state_dict() and [*term.modules()] == [term]
    with torch.no_grad():  # validation must not build a graph
        assert not term(Linear(), make_batch(), misc.Draws(0, 0))['consistency'].requires_grad


def test_the_term_teaches_a_wrong_denoiser_below_sigma_n():
    """Gaussian data of std 0.5, noisy at 0.5. D = a(sigma) x, exact above 0.5 and held; below it starts 30 % too small.

    Without the term there is no gradient below; with the default it moves to the truth."""
    net = TwoSlopes()
    optimizer = torch.optim.Adam([net.factor], lr=0.01)
    term = Bridge(LogNormal(), weighting.edm, 64, batch_size=0, below='sigma_n')
    for step in range(150):
        sigma = 0.5 + 0.5 * unit(64, 1, 1, 1, seed=step).abs()
        batch = make_batch(64)._replace(images=math.sqrt(0.5) * unit(64, 2, 4, 4, seed=1000 + step), sigma=sigma,
                                        sigma_n=torch.full_like(sigma, 0.5), noise=unit(64, 2, 4, 4, seed=2000 + step))
        optimizer.zero_grad()
        term(net, batch, misc.Draws(0, step))['consistency'].mean().backward()
        optimizer.step()
    assert net.factor.item() == pytest.approx(1, abs=0.03)
    untaught = AmbientLoss(weighting.edm)(net, batch)['denoise'].sum()
    assert torch.autograd.grad(untaught, net.factor, allow_unused=True)[0] in (None, 0)


class TwoSlopes(torch.nn.Module):
    """The exact denoiser of Gaussian data of std 0.5 above level 0.5, times a factor below."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x, sigma, **labels):
        sigma = misc.batched(sigma)
        return torch.where(sigma < 0.5, self.factor, 1.0) * 0.25 / (0.25 + sigma ** 2) * x


# ---- the command line


@pytest.mark.parametrize('options', [{'coeff': -1}, {'coeff': math.inf}, {'coeff': math.nan}, {'steps': 0}, {'samples': 0}, {'every': 0},
                                     {'rampup': -1}, {'batch_size': -1}, {'estimator': 'median'}, {'stop': 'lower'},
                                     {'teacher': 'other'}, {'below': 'here'}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}=.* must be'):
        Euler(LogNormal(), weighting.edm, 64, **options)


def test_impossible_combinations_are_refused():
    with pytest.raises(ValueError, match='estimator=u needs samples=2'):
        make_term(chain=Bridge, estimator='u', samples=1)
    with pytest.raises(ValueError, match='batch_size=16 is larger than --batch=8'):
        make_term(8, batch_size=16)


def build(spec, batch=512):
    return registry.build(spec, CHAINS, '--consistency', noise=LogNormal(), weight=weighting.edm, batch=batch)


def settings(term):
    """The class of a term and all that its constructor was told, in its own words."""
    return type(term), {key: value for key, value in vars(term).items() if not key.startswith('_') and key != 'noise'}


def test_one_option_names_chain_and_all_the_rest():
    term = build('bridge:estimator=mean,steps=3,samples=4,coeff=0.5,teacher=ema,batch_size=64', batch=256)
    assert (type(term), term.estimate, term.steps, term.coeff, term.step) == (Bridge, mean_square, 3, 0.5, ambient.bridge_step)
    assert term.needs_teacher and term.evaluations == pytest.approx(64 / 256 * (4 * 4 + 1))
    with pytest.raises(UserError, match='unknown name "heun"; choose from bridge, euler'):
        build('heun')


def spec(**given):
    names = ['consistency', 'consistency_coeff', 'consistency_batch_size', 'num_consistency_steps', 'num_primes', 'with_weight',
             'with_grad']
    return consistency_spec(EasyDict(dict.fromkeys(names) | {'batch': 512} | given))


def test_the_published_options_map_to_it():
    told = lambda **options: settings(Euler(LogNormal(), weighting.edm, 512, estimator='mean', stop='no', **options))
    term = build(spec(consistency_coeff=8.0))
    assert settings(term) == told(steps=5, samples=6, coeff=8.0, batch_size=32, grad=True, weighted=False)
    term = build(spec(consistency_coeff=1, num_consistency_steps=3, num_primes=4, with_weight=True, with_grad=False,
                      consistency_batch_size=64))
    assert settings(term) == told(steps=2, samples=4, coeff=1, batch_size=64, grad=False, weighted=True)
    assert spec() is None and spec(consistency_coeff=0.0) is None and spec(num_primes=4) is None
    assert spec(consistency='bridge') == 'bridge'


@pytest.mark.parametrize('extra', [{'consistency_coeff': 1.0}, {'num_primes': 6}, {'with_grad': False}])
def test_both_forms_at_once_are_refused(extra):
    with pytest.raises(UserError, match='exclude each other') as caught:
        spec(consistency='bridge', **extra)
    assert '\n' not in caught.value.message
