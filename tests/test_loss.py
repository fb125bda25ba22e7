# SPDX-License-Identifier: Apache-2.0
"""Objectives: published losses reproduced, closed forms on Gaussian data, and the faults of the published consistency term."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torch_utils import misc
from training import weighting
from training.loss import AmbientLoss, Batch, ConsistencyTerm, Objective, _levels, consistency_error
from training.noise import LogNormal, LogUniform, NoiseDistribution, VPUniform

DATA = Path(__file__).parent / 'data' / 'losses'
EDM, AMBIENT = load_file(DATA / 'edm_losses.safetensors'), load_file(DATA / 'ambient_losses.safetensors')
KWARGS = {case['name']: case.get('kwargs', {}) for name in ('edm', 'ambient') for case in
          json.loads((DATA / f'{name}_losses.json').read_text())}


class Mixture:
    """E[x_0 | x] of the mixture of isotropic Gaussians that the records were made with."""

    def __init__(self, golden):
        self.weights, self.means, self.stds = (golden[f'gmm.{name}'] for name in ('weights', 'means', 'stds'))

    def __call__(self, x, sigma, class_labels=None, augment_labels=None):
        variance = self.stds ** 2 + misc.batched(sigma)[:, 0, 0] ** 2  # [N,K]
        offset = x[:, None] - self.means  # [N,K,C,H,W]
        log_share = self.weights.log() - x[0].numel() / 2 * variance.log() - offset.square().flatten(2).sum(2) / (2 * variance)
        pull = (log_share.softmax(1), self.stds ** 2 / variance)
        share, shrink = (t[..., None, None, None] for t in pull)
        return (share * (self.means + shrink * offset)).sum(1)


class Linear(torch.nn.Module):
    """D = a x, and a note of every call."""

    def __init__(self, a=0.3):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.calls = []

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        self.calls.append((len(x), misc.batched(sigma).flatten().tolist(), class_labels, augment_labels))
        return self.a.to(x.dtype) * x


def unit(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(n=8, dtype=torch.float64, sigma_n=0.2, labels=False, shape=(2, 4, 4)):
    """A batch whose levels lie between sigma_n and 2."""
    column = lambda t: t.to(dtype).reshape(-1, 1, 1, 1)
    return Batch(images=unit(n, *shape, seed=1).to(dtype), sigma_n=column(torch.full([n], sigma_n)),
                 sigma=column(torch.linspace(0.3, 2.0, n)), noise=unit(n, *shape, seed=2).to(dtype),
                 class_labels=torch.eye(n, 10)[:n] if labels else None, augment_labels=unit(n, 9, seed=3) if labels else None,
                 raw_idx=torch.arange(n))


def edm_term(**kwargs):
    return AmbientLoss(functools.partial(weighting.edm, **kwargs))


# ---- published losses


@pytest.mark.parametrize('case', ['edm0', 'edm1', 'vp0', 'vp1', 've0', 've1'])
def test_clean_images_give_the_published_edm_vp_and_ve_losses(case):
    kwargs, normal, u = dict(KWARGS[case]), EDM['rnd_normal'], EDM['rnd_uniform']
    if case.startswith('edm'):
        sigma_data = kwargs.pop('sigma_data', 0.5)
        law = LogNormal(**{name.removeprefix('P_'): value for name, value in kwargs.items()})
        sigma, term = law.icdf(torch.special.ndtr(normal)), edm_term(sigma_data=sigma_data)
    else:
        term = AmbientLoss(weighting.snr)
        if case.startswith('vp'):  # the published code counts t down from 1
            sigma = VPUniform(**{name.replace('epsilon', 'eps'): value for name, value in kwargs.items()}).isf(u)
        else:
            sigma = LogUniform(**{name.removeprefix('sigma_'): value for name, value in kwargs.items()}).icdf(u)
    torch.testing.assert_close(sigma.flatten(), EDM[f'{case}.sigma'], rtol=1e-10, atol=0)
    batch = Batch(EDM['images'], torch.zeros_like(sigma), EDM[f'{case}.sigma'].reshape(-1, 1, 1, 1), EDM['noise'])
    loss = term(Mixture(EDM), batch)['denoise']
    torch.testing.assert_close(loss, EDM[f'{case}.loss'].flatten(1).sum(1), rtol=1e-10, atol=0)


def published_batch(case):
    column = lambda name: AMBIENT[name].reshape(-1, 1, 1, 1)
    return Batch(AMBIENT['images'], column('current_sigma'), column(f'{case}.sigma'), AMBIENT['noise'])


@pytest.mark.parametrize('case', ['noconsist0', 'noconsist1'])
def test_noisy_images_give_the_published_ambient_loss(case):
    loss = edm_term(sigma_data=KWARGS[case].get('sigma_data', 0.5))(Mixture(AMBIENT), published_batch(case))['denoise']
    torch.testing.assert_close(loss, AMBIENT[f'{case}.loss'].flatten(1).sum(1), rtol=1e-10, atol=1e-20)


@pytest.mark.parametrize('case', ['consist0', 'consist1'])
def test_recorded_chains_give_the_published_consistency_loss(case):
    kwargs, net, batch = KWARGS[case], Mixture(AMBIENT), published_batch(case)
    rows, samples = kwargs['consistency_batch_size_per_gpu'], kwargs['num_primes']
    D, sigma = AMBIENT[f'{case}.x0_pred'], batch.sigma[:rows]
    x = batch.images + (batch.sigma ** 2 - batch.sigma_n ** 2).clamp(min=0).sqrt() * batch.noise
    chain_noise = [noise.unflatten(0, (rows, samples)) for noise in AMBIENT[f'{case}.sampler_noise']]
    error = consistency_error(net, x[:rows], sigma, AMBIENT[f'{case}.new_sigma'][::samples], D[:rows], chain_noise)
    added = kwargs['consistency_coeff'] * error.square() * (weighting.edm(sigma) if kwargs['with_weight'] else 1)
    loss = edm_term()(net, batch)['denoise']
    loss[:rows] += added.flatten(1).sum(1)
    torch.testing.assert_close(loss, AMBIENT[f'{case}.loss'].flatten(1).sum(1), rtol=1e-10, atol=1e-11)
    assert added.abs().sum() > 0.1  # the records do contain chains of some length


def test_chain_levels_are_the_published_ones():
    first, last = AMBIENT['sde.sigma_max'], AMBIENT['sde.sigma_min']
    levels = _levels(first, last, steps=5)
    torch.testing.assert_close(torch.stack(levels[:-1]).flatten(1), AMBIENT['sde.sigma_calls'], rtol=1e-12, atol=0)
    assert levels[0] is first and levels[-1] is last


def test_chain_equals_the_published_sampler():
    """The error of a denoiser that returns its input at the last level is the end of the chain, less D."""
    last, mixture = AMBIENT['sde.sigma_min'], Mixture(AMBIENT)
    calls = []

    def net(x, sigma, **labels):
        calls.append(sigma)
        return x if len(calls) == 6 else mixture(x, sigma)

    noise = [step[:, None] for step in AMBIENT['sde.noise']]
    x = AMBIENT['sde.x']
    end = consistency_error(net, x, AMBIENT['sde.sigma_max'], last, torch.zeros_like(x), noise)
    moving = AMBIENT['sde.sigma_max'].flatten() != last.flatten()
    torch.testing.assert_close(end[moving], AMBIENT['sde.out'][moving], rtol=1e-10, atol=1e-12)
    # Where both levels are the same the published chain moves by its rounding error, ours not at all.
    assert torch.equal(end[~moving], x[~moving])
    torch.testing.assert_close(end[~moving], AMBIENT['sde.out'][~moving], rtol=0, atol=1e-7)


# ---- the ambient loss


def test_clean_images_reduce_to_edm_bit_for_bit():
    net, batch = Linear(), make_batch(sigma_n=0, dtype=torch.float32)
    D = net(batch.images + batch.sigma * batch.noise, batch.sigma)
    by_hand = weighting.edm(batch.sigma) * (D - batch.images) ** 2
    assert torch.equal(edm_term()(net, batch)['denoise'], by_hand.flatten(1).sum(1))


def test_2a3_clamped_levels_have_neither_loss_nor_gradient():
    net, batch = Linear(), make_batch()
    loss = edm_term()(net, batch._replace(sigma=batch.sigma_n))['denoise']
    assert (loss == 0).all()
    loss.sum().backward()
    assert net.a.grad == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_2a10_everything_runs_in_the_dtype_of_the_images(dtype):
    batch = make_batch(dtype=dtype)._replace(sigma=make_batch().sigma)  # levels in double precision change nothing
    objective = Objective({'denoise': edm_term(), 'consistency': ConsistencyTerm(LogNormal(), weighting.edm, weighted=True)})
    seen = []
    net = lambda x, sigma, **labels: seen.append((x.dtype, misc.batched(sigma).shape[0])) or 0.5 * x
    values = objective(net, batch, misc.Draws(0, 0))
    assert all(value.dtype == dtype and value.shape == (8,) for value in values.values())
    assert {kind for kind, _ in seen} == {dtype}


def test_noisy_images_alone_recover_the_exact_denoiser_of_gaussian_data():
    """Training D = a x on images at level 0.2 gives sd^2 / (sd^2 + s^2) to 1 %; the loss that calls them clean does not."""
    sd, sigma_n, n = 0.5, 0.2, 40_000
    y = sd * unit(n, 1, 4, 4) + sigma_n * unit(n, 1, 4, 4, seed=1)  # 640,000 numbers: a is known to 0.3 %
    net = Linear()

    def best(level, claimed):
        """The minimiser over a: the loss is a parabola in it, so two slopes give it exactly."""
        batch = Batch(y, torch.full([n, 1, 1, 1], claimed), torch.full([n, 1, 1, 1], level), unit(n, 1, 4, 4, seed=2))
        slopes = []
        for a in (0.0, 1.0):
            net.a.data.fill_(a)
            slopes.append(torch.autograd.grad(edm_term()(net, batch)['denoise'].mean(), net.a)[0].item())
        return slopes[0] / (slopes[0] - slopes[1])

    for level in (0.3, 0.5, 1.0):
        exact = sd ** 2 / (sd ** 2 + level ** 2)
        assert best(level, claimed=sigma_n) == pytest.approx(exact, rel=0.01)
        naive = (sd ** 2 + sigma_n ** 2) / (sd ** 2 + sigma_n ** 2 + level ** 2)
        assert best(level, claimed=0.0) == pytest.approx(naive, rel=0.01) and naive > 1.03 * exact


# ---- consistency


class Below(NoiseDistribution):
    """sigma' = sigma / 2, always."""

    def below(self, sigma, u):
        return sigma / 2


def level_net(x, sigma, **labels):
    """D = sigma everywhere, so that the consistency error of (sigma, sigma') is sigma' - sigma."""
    return misc.batched(sigma).expand_as(x)


@pytest.mark.parametrize('n', [1, 3, 8, 50])
@pytest.mark.parametrize('fraction', [1 / 16, 0.25, 1.0])
def test_2a5_the_coefficient_does_not_depend_on_the_size_of_a_micro_batch(n, fraction):
    """The published code takes its rows from every accumulation round; here each round's term is its share of the batch."""
    term = ConsistencyTerm(Below(), weighting.edm, coeff=3.0, batch_fraction=fraction, steps=2, samples=2)
    batch = make_batch(n)._replace(sigma=torch.ones(n, 1, 1, 1, dtype=torch.float64))
    value = term(level_net, batch, misc.Draws(0, 0))['consistency']
    assert value.sum().item() == pytest.approx(3.0 * fraction * n * 0.25 * 32)
    active = value.nonzero().flatten()
    assert len(active) == max(1, round(fraction * n)) and active[0] == 0
    assert len(active) < 2 or active.diff().max() - active.diff().min() <= 1  # evenly spread


def test_2a4_the_second_level_has_a_draw_of_its_own():
    """The published code reuses the first draw: sigma' = sigma for most rows, at full cost and with no signal."""
    term = ConsistencyTerm(LogNormal(), weighting.edm, steps=1, samples=1)
    net, batch = Linear(), make_batch(64)
    term(net, batch, misc.Draws(0, 0))
    sigma, sigma_prime = (torch.tensor(net.calls[i][1]) for i in (0, -1))
    assert (sigma_prime > 0).all() and (sigma_prime < sigma).all()
    # Uniform below sigma in the measure p: 64 draws of cdf(sigma') / cdf(sigma) average to 1/2 within five standard errors.
    law = LogNormal()
    share = law.cdf(sigma_prime.double()) / law.cdf(sigma.double())
    assert share.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * 64))


def test_2a5_labels_go_to_every_call():
    """The published chain leaves the augment labels out, and so compares two different conditionals."""
    net, batch = Linear(), make_batch(4, labels=True)
    ConsistencyTerm(LogNormal(), weighting.edm, batch_fraction=0.5, steps=3, samples=2)(net, batch, misc.Draws(0, 0))
    assert [call[0] for call in net.calls] == [4, 4, 4, 4, 4]  # 4 images once, then 2 images x 2 samples
    repeated = torch.tensor([0, 0, 2, 2])
    for _, _, class_labels, augment_labels in net.calls[1:]:
        assert torch.equal(class_labels, batch.class_labels[repeated])
        assert torch.equal(augment_labels, batch.augment_labels[repeated])


def test_labels_may_be_absent_and_one_image_is_enough():
    values = ConsistencyTerm(LogNormal(), weighting.edm, batch_fraction=1 / 64, steps=1, samples=1)(
        Linear(), make_batch(1), misc.Draws(0, 0))
    assert values['consistency'].shape == (1,) and values['consistency'].item() > 0


def test_the_exact_denoiser_is_consistent_and_a_wrong_one_is_not():
    """Gaussian data, D = s^2 / (s^2 + sigma^2) x: the mean error over 2,000 chains is below a tenth of what 0.8 D has."""
    s, n, samples = 0.5, 16, 2000
    sigma = torch.linspace(0.3, 1.5, n, dtype=torch.float64).reshape(-1, 1, 1, 1)
    x = (s ** 2 + sigma ** 2).sqrt() * unit(n, 1, 2, 2)
    noise = [unit(n, samples, 1, 2, 2, seed=i + 1) for i in range(20)]

    def mean_square(factor):
        net = lambda x, sigma, **labels: factor(sigma) * s ** 2 / (s ** 2 + sigma ** 2) * x
        return consistency_error(net, x, sigma, sigma / 3, net(x, sigma), noise).square().mean().item()

    assert mean_square(lambda sigma: 1) < 0.1 * mean_square(lambda sigma: 0.8 + 0.2 * (sigma > 0.3))


def test_grad_decides_whether_the_chain_is_differentiated():
    batch, values, slopes = make_batch(), [], []
    for grad in (True, False):
        net = Linear(0.5)
        term = ConsistencyTerm(LogNormal(), weighting.edm, grad=grad, steps=3, samples=2)
        value = term(net, batch, misc.Draws(0, 0))['consistency']
        values.append(value.detach())
        slopes.append(torch.autograd.grad(value.sum(), net.a)[0].item())
    assert torch.equal(*values) and abs(slopes[0] - slopes[1]) > 1e-3 * abs(slopes[0]) and slopes[1] != 0
    with torch.no_grad():  # validation must not build a graph
        assert not ConsistencyTerm(LogNormal(), weighting.edm)(Linear(), batch, misc.Draws(0, 0))['consistency'].requires_grad


def test_weight_and_coefficient_multiply_the_term():
    batch = make_batch()
    value = lambda **options: ConsistencyTerm(LogNormal(), weighting.edm, steps=2, samples=2, **options)(
        Linear(), batch, misc.Draws(0, 0))['consistency']
    torch.testing.assert_close(value(coeff=4.0), 4 * value())
    torch.testing.assert_close(value(weighted=True), weighting.edm(batch.sigma).flatten() * value())


def test_two_ranks_draw_what_one_does():
    """Rows, levels and noises of the term depend on the row of the global batch, not on who holds it."""
    term, batch = ConsistencyTerm(LogNormal(), weighting.edm, batch_fraction=0.25, steps=2, samples=2), make_batch(32)
    whole = term(Linear(), batch, misc.Draws(5, 7))['consistency']
    cut = lambda rows: Batch(*(None if t is None else t[rows] for t in batch))
    halves = [term(Linear(), cut(slice(row, row + 16)), misc.Draws(5, 7, first_row=row))['consistency'] for row in (0, 16)]
    assert (whole > 0).sum() == 8
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize('options', [{'coeff': -1}, {'coeff': math.inf}, {'batch_fraction': 0}, {'batch_fraction': 1.5},
                                     {'steps': 0}, {'samples': 0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}=.* must be'):
        ConsistencyTerm(LogNormal(), weighting.edm, **options)


# ---- the objective


def test_terms_share_one_evaluation():
    consistency = ConsistencyTerm(LogNormal(), weighting.edm, batch_fraction=0.5, steps=3, samples=2)
    terms = {'denoise': edm_term(), 'consistency': consistency}
    net, batch = Linear(), make_batch()
    values = Objective(terms)(net, batch, misc.Draws(0, 0))
    assert list(values) == ['denoise', 'consistency']
    assert len(net.calls) == 1 + 3 + 1  # the images, three steps of the chains, the chains' ends
    for name, term in terms.items():  # alone, a term evaluates for itself and gives the same
        assert torch.equal(term(Linear(), batch, misc.Draws(0, 0))[name], values[name])


def test_parameters_of_terms_belong_to_the_objective():
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, sigma):
            return self.scale * torch.ones_like(sigma)

    objective = Objective({'denoise': AmbientLoss(Learned())})
    assert list(objective.state_dict()) == ['terms.denoise.weight.scale']
    value = objective(Linear(), make_batch(), misc.Draws(0, 0))['denoise'].sum()
    value.backward()
    (parameter,) = objective.parameters()
    torch.testing.assert_close(parameter.grad, value.detach() / 2)
