# SPDX-License-Identifier: Apache-2.0
"""Discrete-time objectives in training: published losses from the program's terms, frozen means, noisy images, resampled timesteps."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dnnlib import UserError
from tests.support import tiny
from tests.training.diffusion.test_discrete import FACTS, G, close, model
from torch_utils import misc
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.data.batches import Batch
from training.diffusion import discrete
from training.networks.preconditioning import build_network
from training.objective.timesteps import SecondMoment
from training.objective.variational import Bound, terms_of
from training.run.build import build_objective, transfer_weights
from training.run.config import ObjectiveConfig

IDDPM = ['--precond=iddpm', '--augment=0']
DIGIT = dict(img_resolution=8, img_channels=1, precond='iddpm', model_type='SongUNet', model_channels=16, channel_mult=[1], num_blocks=1,
             attn_resolutions=[])


class Recorded(torch.nn.Module):
    """The network of the recorded numbers as a denoiser: x = x_t / sqrt(abar), D = x - u eps."""

    sigma_data = 0.5

    def __init__(self, diffusion, tmax=1000):
        super().__init__()
        self.diffusion, self.tmax = diffusion, tmax
        self.shift = torch.nn.Parameter(torch.zeros([], dtype=torch.float64))  # of D
        self.lean = torch.nn.Parameter(torch.zeros([], dtype=torch.float64))  # of the channels for the variance

    def own_diffusion(self):
        return self.diffusion

    def outputs(self, x, sigma, class_labels=None, augment_labels=None):
        t = self.diffusion.timestep(sigma.flatten())
        eps, rest = model(self.diffusion.at('alpha_bar', t, x).sqrt() * x, t, self.tmax)
        return x - sigma * eps + self.shift, rest + self.lean

    def forward(self, x, sigma, **labels):
        return self.outputs(x, sigma)[0]


def build(kind, net, **changes):
    """The Objective that a run with --objective=KIND has."""
    config = ObjectiveConfig(**dict(noise=None, weight='snr', terms=terms_of(kind)) | changes)
    return build_objective(config, net, batch=6)[1]


def recorded(schedule, kind, **changes):
    """(network, objective, batch) of the recorded losses."""
    d = discrete.build_diffusion(schedule)
    net = Recorded(d)
    objective = build(kind, net, **changes)
    sigma = d.at('levels', G[f'{schedule}.t'], G['x_start'])
    batch = Batch(images=G['x_start'], sigma_n=torch.zeros_like(sigma), sigma=sigma, noise=G['noise'], raw_idx=torch.arange(6))
    return net, objective, batch


# ---- the losses


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
@pytest.mark.parametrize('kind, loss', [('hybrid', 'RESCALED_MSE'), ('vlb', 'RESCALED_KL'), ('hybrid:coeff=0.001', 'RESCALED_MSE')])
def test_losses_of_a_run_equal_the_published_ones(schedule, kind, loss):
    """Sums over C, H, W instead of means, and nothing else is different."""
    net, objective, batch = recorded(schedule, kind)
    terms = objective(net, batch, misc.Draws(0, 0))
    size = batch.images[0].numel()
    close(sum(terms.values()) / size, G[f'loss.{schedule}.EPSILON.LEARNED_RANGE.{loss}.loss.f64'], rtol=1e-8)
    if 'denoise' in terms:
        close(terms['denoise'] / size, G[f'loss.{schedule}.EPSILON.LEARNED_RANGE.{loss}.mse.f64'], rtol=1e-8)
        close(terms['bound'] / size, G[f'loss.{schedule}.EPSILON.LEARNED_RANGE.{loss}.vb.f64'], rtol=1e-8)


def test_coeff_one_over_t_is_the_form_without_rescaling():
    net, objective, batch = recorded('cosine', f'hybrid:coeff={1 / FACTS["cosine.T"]}')
    terms = objective(net, batch, misc.Draws(0, 0))
    close(sum(terms.values()) / batch.images[0].numel(), G['loss.cosine.EPSILON.LEARNED_RANGE.MSE.loss.f64'], rtol=1e-8)


def test_simple_is_the_denoising_term_alone():
    net, objective, batch = recorded('linear', 'simple')
    terms = objective(net, batch, misc.Draws(0, 0))
    assert list(terms) == ['denoise']
    close(terms['denoise'] / batch.images[0].numel(), G['loss.linear.EPSILON.FIXED_LARGE.MSE.mse.f64'], rtol=1e-8)


def test_bound_of_hybrid_has_no_gradient_at_the_mean():
    """L_simple alone teaches D, the bound alone the variance; in vlb the bound teaches both."""
    net, objective, batch = recorded('cosine', 'hybrid')
    terms = objective(net, batch, misc.Draws(0, 0))
    both = [net.shift, net.lean]
    shift, lean = torch.autograd.grad(terms['bound'].sum(), both, retain_graph=True, allow_unused=True)
    assert shift is None and lean != 0
    shift, lean = torch.autograd.grad(terms['denoise'].sum(), both, allow_unused=True)
    assert shift != 0 and lean is None
    net, objective, batch = recorded('cosine', 'vlb')
    shift, lean = torch.autograd.grad(objective(net, batch, misc.Draws(0, 0))['bound'].sum(), [net.shift, net.lean])
    assert shift != 0 and lean != 0


@pytest.mark.parametrize('changes', [{'weight': 'min_snr'}, {'penalty': 'pseudo_huber:c=0.1'}, {'weight': 'learned'}])
def test_weights_and_penalties_are_those_of_the_simple_part(changes):
    net, plain, batch = recorded('cosine', 'hybrid')
    _, changed, _ = recorded('cosine', 'hybrid', **changes)
    _, without, _ = recorded('cosine', 'simple', **changes)
    found, before, alone = (objective(net, batch, misc.Draws(0, 0)) for objective in (plain, changed, without))
    assert torch.equal(found['bound'], before['bound']) and torch.equal(before['denoise'], alone['denoise'])
    assert not torch.equal(found['denoise'], before['denoise'])


# ---- noisy images


def test_noisy_images_have_no_bound_and_keep_their_denoising_loss():
    net, objective, batch = recorded('cosine', 'hybrid')
    sigma_n = torch.where(torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.bool).reshape(-1, 1, 1, 1), batch.sigma / 2, 0)
    terms = objective(net, batch._replace(sigma_n=sigma_n), misc.Draws(0, 0))
    clean = sigma_n.flatten() == 0
    assert (terms['bound'][~clean] == 0).all() and (terms['bound'][clean] != 0).all() and (terms['denoise'] > 0).all()
    whole = objective(net, batch, misc.Draws(0, 0))
    assert torch.equal(whole['bound'][clean], terms['bound'][clean])


def test_bound_alone_weighs_errors_of_noisy_images_as_those_of_x0():
    """As sigma_n goes to 0 the gradient at D becomes that of clean images; the variance learns nothing from noisy ones."""
    net, objective, batch = recorded('cosine', 'vlb')
    rows = slice(2, 5)  # t = 2, 500, 998: steps with a divergence
    batch = Batch(*[None if column is None else column[rows] for column in batch])
    noisy = batch._replace(sigma_n=1e-7 * batch.sigma)
    gradient = lambda b: torch.autograd.grad(objective(net, b, misc.Draws(0, 0))['bound'].sum(), [net.shift, net.lean], allow_unused=True)
    (shift, _), (shift_n, lean_n) = gradient(batch), gradient(noisy)
    torch.testing.assert_close(shift_n, shift, rtol=1e-5, atol=0)
    assert lean_n is None or lean_n == 0


@pytest.mark.parametrize('kind', ['hybrid', 'vlb'])
def test_the_exact_denoiser_is_a_stationary_point_on_noisy_images(kind):
    """Gaussian data, noisy at 0.5, D = a x: over many images the gradient at the true a is zero, to its standard error."""
    d = discrete.build_diffusion('cosine:steps=50')
    n, spread, sigma_n = 40000, 0.5, 0.5
    draws = misc.Draws(3, 0)
    images = (spread ** 2 + sigma_n ** 2) ** 0.5 * draws('images', [n, 1, 1, 1]).double()
    t = torch.arange(n) % 12 + 30  # levels above sigma_n
    sigma = d.at('levels', t, images)
    assert sigma.min() > sigma_n

    class Linear(torch.nn.Module):
        sigma_data = 0.5

        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones([n, 1, 1, 1], dtype=torch.float64))  # one an image, for its own gradient

        def own_diffusion(self):
            return d

        def outputs(self, x, sigma, **labels):
            return self.a * spread ** 2 / (spread ** 2 + sigma ** 2) * x, torch.zeros_like(x)

    net = Linear()
    objective = build(kind, net)
    batch = Batch(images, torch.full_like(sigma, sigma_n), sigma, draws('noise', images.shape).double())
    (gradient,) = torch.autograd.grad(sum(term.sum() for term in objective(net, batch, draws).values()), net.a)
    scaled = gradient.flatten() * sigma.flatten() ** 2  # about equal at all levels
    assert abs(scaled.mean()) < 4 * scaled.std() / n ** 0.5


# ---- resampled timesteps


def test_levels_of_clean_images_are_drawn_by_their_losses():
    """Few timesteps of large loss take most draws; noisy images keep theirs; weighted means stay those over uniform timesteps."""
    d, n = discrete.build_diffusion('cosine:steps=20'), 6000
    resampler = SecondMoment(history=2).over(d.levels)
    size = torch.linspace(1, 20, 20) ** -2.0
    resampler.note(torch.arange(40) % 20, size.repeat(2), torch.ones(40, dtype=torch.bool))
    resampler.update()
    noisy = torch.arange(n).reshape(-1, 1, 1, 1) % 2 == 1
    batch = Batch(torch.zeros(n, 1, 1, 1), noisy * 0.1, torch.full([n, 1, 1, 1], 5.0), torch.zeros(n, 1, 1, 1))
    drawn = resampler.redraw(batch, misc.Draws(1, 0))
    assert (drawn.sigma[noisy] == 5).all() and (drawn.factor[noisy.flatten()] == 1).all()
    t = d.timestep(drawn.sigma.flatten())[::2]
    share = torch.bincount(t, minlength=20) / len(t)
    expected = resampler.probabilities().float()
    assert (share - expected).abs().max() < 5 * (expected.max() / len(t)).sqrt()
    losses = size[t]
    weighted = (drawn.factor[::2] * losses)
    assert abs(weighted.mean() - size.mean()) < 5 * max(weighted.std() / len(t) ** 0.5, 1e-4)


def test_terms_are_weighed_and_losses_noted_without_weights():
    d = discrete.build_diffusion('cosine:steps=20')
    resampler = SecondMoment(history=1).over(d.levels)
    t = torch.tensor([3, 7, 9])
    batch = Batch(torch.zeros(3, 1, 1, 1), torch.tensor([0, 0, 0.1]).reshape(-1, 1, 1, 1), d.levels[t].float().reshape(-1, 1, 1, 1),
                  torch.zeros(3, 1, 1, 1), factor=torch.tensor([0.5, 2, 1]))
    terms, found = resampler.weigh({'a': torch.tensor([1.0, 2, 3]), 'b': torch.tensor([10.0, 20, 30])}, batch)
    assert terms['a'].tolist() == [0.5, 4, 3] and terms['b'].tolist() == [5, 40, 30]
    resampler.note(*found)
    resampler.update()
    assert resampler.counts.nonzero().flatten().tolist() == [3, 7]
    assert resampler.losses[3].item() == 11 and resampler.losses[7].item() == 22


def test_micro_batches_draw_the_same_timesteps(tmp_path):
    """A batch in one part or in four: the same levels, and after some steps the same history but for rounding."""
    flags = [*IDDPM, '--objective=hybrid', '--diffusion=cosine:steps=8', '--timesteps=second_moment:history=1', '--dropout=0']
    runs = [tiny.make_run(tmp_path, *flags, f'--batch-gpu={size}') for size in (16, 4)]
    for run in runs:
        for _ in range(8):
            run.step()
    first, second = (run.objective.timesteps for run in runs)
    assert (first.counts >= 1).all() and torch.equal(first.counts, second.counts)  # so the last draws were by losses
    torch.testing.assert_close(first.losses, second.losses, rtol=1e-3, atol=1e-3)


def test_state_holds_the_history(tmp_path):
    flags = [*IDDPM, '--objective=vlb', '--diffusion=cosine:steps=30', '--timesteps=second_moment', '--sigma=0']
    run = tiny.make_run(tmp_path, *flags)
    for _ in range(5):
        run.step()
    state = {name: value.clone() for name, value in run.objective.state_dict().items()}
    assert state['timesteps.counts'].sum() == 80
    other = tiny.make_run(tmp_path, *flags)
    other.objective.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.objective.state_dict().items())


RESUMED = [*IDDPM, '--objective=hybrid', '--diffusion=linear:steps=25', '--timesteps=second_moment:history=2', '--dropout=0.2', '--xflip=1',
           '--val=0.2', '--workers=2', '--threads=1', '--seed=5', '--expr-id=x', '--cond=1']


@pytest.mark.parametrize('ranks', [1, 2])
def test_continued_equals_straight(tmp_path, ranks):
    """20 steps and 20 more after a stop equal 40 at once, bit for bit, with a history that decides the draws."""
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    folders = []
    for name, durations in (('straight', [0.00064]), ('continued', [0.00032, 0.00064])):
        outdir = tmp_path / name
        outdir.mkdir()
        for duration in durations:
            tiny.finish([f'--outdir={outdir}', f'--data={data}', *tiny.FLAGS, *RESUMED, f'--duration={duration}', '--resume=latest'],
                        tmp_path / 'log', ranks)
        folders.append(tiny.only_folder(outdir))
    straight, continued = (tiny.digests(folder) for folder in folders)
    # The log of the stopped run has a snapshot's line of its own at step 20 and the options its length: all else is equal.
    assert all(straight[key] == continued[key] for key in ('net', 'ema', 'optimizer', 'objective', 'progress'))
    state = tiny.read_state(folders[0] / tiny.STEP_40)
    assert (state['objective']['timesteps.counts'] >= 2).all()


# ---- the network


@pytest.mark.parametrize('spec, steps', [('cosine:steps=4000', 4000), ('linear:steps=100', 100)])
def test_network_knows_the_levels_and_is_told_t_1000_over_T(spec, steps):
    net = build_network(DIGIT | {'diffusion': spec})
    d = discrete.build_diffusion(spec)
    t = torch.tensor([0, 1, steps // 2, steps - 1])
    sigma = d.levels[t].float().reshape(-1, 1, 1, 1)
    *_, c_noise = net.coefficients(sigma)
    torch.testing.assert_close(c_noise.flatten(), d.network_time(t).float(), rtol=1e-6, atol=0)
    assert torch.equal(net.round_sigma(sigma), sigma)
    assert (net.sigma_min, net.sigma_max) == pytest.approx((d.levels[0].item(), d.levels[-1].item()))
    assert torch.equal(net.own_diffusion().levels, d.levels)
    assert 'u' not in net.state_dict()  # follows from the configuration


def test_published_networks_keep_their_own_timesteps():
    net = build_network(DIGIT)
    *_, c_noise = net.coefficients(net.u[[0, 10, 999]].reshape(-1, 1, 1, 1))
    assert c_noise.flatten().tolist() == [999, 989, 0] and 'u' in net.state_dict() and not net.gives_variance
    torch.testing.assert_close(net.own_diffusion().levels.flip(0).float(), net.u[:-1], rtol=1e-5, atol=0)


def test_variance_channels_follow_the_objective(tmp_path):
    for objective, channels in (('simple', 1), ('hybrid', 2), ('vlb', 2)):
        found = tiny.options(tmp_path, *IDDPM, f'--objective={objective}').network.arguments
        assert found['diffusion'] == 'cosine:steps=4000'
        net = build_network(found)
        D, rest = net.outputs(torch.zeros(2, 1, 8, 8), torch.tensor(1.0))
        assert D.shape == (2, 1, 8, 8) and rest.shape[1] == channels - 1 and net.gives_variance == (channels == 2)


def test_snapshot_carries_the_variance(tmp_path):
    net = build_network(DIGIT | {'diffusion': 'cosine:steps=50'}).eval()
    save_network(net, tmp_path / 'net')
    config = json.loads((tmp_path / 'net' / 'config.json').read_text())
    assert config['diffusion'] == 'cosine:steps=50' and 'learned_variance' not in config
    again = load_network(tmp_path / 'net')
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net.outputs(x, torch.tensor(1.0)), again.outputs(x, torch.tensor(1.0)), strict=True))
    assert again.gives_variance and set(load_file(tmp_path / 'net' / 'model.safetensors')) == set(net.state_dict())


def test_unknown_diffusion_in_a_config_is_refused():
    with pytest.raises(UserError, match='network configuration: diffusion=square'):
        build_network(DIGIT | {'diffusion': 'square'})


# ---- the command line


@pytest.mark.parametrize('flags, text', [
    (['--objective=hybrid', '--precond=edm'], 'use --precond=iddpm'),
    (['--objective=hybrid', '--precond=iddpm', '--noise=lognormal'], '--noise=lognormal cannot be combined with --objective=hybrid'),
    (['--diffusion=linear', '--precond=iddpm'], 'such as --objective=hybrid'),
    (['--timesteps=second_moment'], 'such as --objective=hybrid'),
    (['--objective=vlb', '--precond=iddpm', '--weight=min_snr'], '--weight=min_snr cannot be combined with --objective=vlb'),
    (['--objective=vlb', '--precond=iddpm', '--penalty=pseudo_huber'], '--penalty=pseudo_huber cannot be combined with --objective=vlb'),
    (['--objective=vlb', '--precond=iddpm', '--ambient-weight=inverse'], '--ambient-weight=inverse cannot be combined')])
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, flags, text):
    with pytest.raises(UserError) as err:
        tiny.options(tmp_path, *flags)
    assert text in err.value.message and '\n' not in err.value.message


@pytest.mark.parametrize('flags, text', [
    (['--corruption-probability=1'], 'all images are noisy'), (['--pairing=sigma_first'], 'chooses images by their level')])
def test_resampling_needs_clean_images_of_any_level(tmp_path, flags, text):
    with pytest.raises(UserError, match=text):
        tiny.make_run(tmp_path, *IDDPM, '--objective=hybrid', '--timesteps=second_moment', *flags)


def test_coeff_out_of_range_is_refused(tmp_path):
    with pytest.raises(UserError, match='--objective=hybrid:coeff=0: coeff=0 must be positive'):
        tiny.options(tmp_path, *IDDPM, '--objective=hybrid:coeff=0')


@pytest.mark.parametrize('kind', ['simple', 'hybrid', 'vlb'])
@pytest.mark.parametrize('flags', [
    ['--cond=1', '--label-dropout=0.2', '--cep=uniform', '--timesteps=second_moment', '--pairing=truncate'],
    ['--consistency=euler:steps=1,samples=2,batch_size=4', '--pairing=sigma_first', '--gns=1', '--batch-gpu=8', '--val=0.2']])
def test_combinations_make_steps(tmp_path, kind, flags):
    """With noisy images, conditions, consistency and resampling: finite losses, and levels that the network knows."""
    run = tiny.make_run(tmp_path, *IDDPM, f'--objective={kind}', '--diffusion=linear:steps=60', *flags)
    before = [p.clone() for p in run.params]
    for _ in range(3):
        run.step()
    assert not int(run.guard.in_row) and any((p != b).any() for p, b in zip(run.params, before, strict=True))
    found = run.stats.flush()
    main = 'Loss/bound' if kind == 'vlb' else 'Loss/denoise'
    assert found[main]['mean'] > 0 and found['Grad/skipped']['mean'] == 0
    if run.data.validation is not None:
        assert run.data.validation(run.ema.module, run.objective.first, 'cpu')['Val/clean'] > 0


def test_pairs_of_noisy_images_lie_above_their_level(tmp_path):
    run = tiny.make_run(tmp_path, *IDDPM, '--objective=hybrid', '--diffusion=cosine:steps=100')
    levels = run.net.own_diffusion().levels.float()
    for _ in range(20):
        host = run.data.feed.next()
        assert (host.sigma > host.sigma_n).all() and torch.isin(host.sigma, levels).all()


def test_bound_teaches_the_variance_of_the_step():
    """Gaussian data under the exact D: the best log variance is that of btilde + from_x0^2 Var(x_0 | x), and the bound is least there."""
    d, n, spread = discrete.build_diffusion('cosine:steps=30'), 60000, 0.4
    t = torch.arange(n) % 29 + 1
    draws = misc.Draws(5, 0)
    images = spread * draws('images', [n, 1, 1, 1]).double()
    sigma = d.at('levels', t, images)
    gain = spread ** 2 / (spread ** 2 + sigma ** 2)
    small, large = (d.at(name, t, images) for name in ('posterior_log_variance', 'beta_log'))
    best = (small.exp() + d.at('from_x0', t, images) ** 2 * gain * sigma ** 2).log()

    class Exact(torch.nn.Module):
        def outputs(self, x, sigma, **labels):
            return gain * x, 2 * (best + shift - small) / (large - small) - 1

    batch = Batch(images, torch.zeros_like(sigma), sigma, draws('noise', images.shape).double())
    values = {}
    for shift in (-0.2, 0.0, 0.2):
        values[shift] = Bound(d, 1 / d.steps, frozen=True)(Exact(), batch)['bound']
    for shift in (-0.2, 0.2):
        worse = values[shift] - values[0.0]
        assert worse.mean() > 4 * worse.std() / n ** 0.5


def test_transfer_between_diffusions_leaves_the_levels_alone(tmp_path):
    save_network(build_network(DIGIT), tmp_path / 'published')
    net = build_network(DIGIT | {'diffusion': 'linear'})
    before = net.u.clone()
    transfer_weights(str(tmp_path / 'published'), net)
    assert torch.equal(net.u, before)


def test_bound_term_stands_alone():
    """Without an Objective around it, it asks the network itself."""
    net, objective, batch = recorded('linear', 'vlb')
    alone = Bound(net.diffusion, frozen=False)(net, batch)
    assert torch.equal(alone['bound'], objective(net, batch, misc.Draws(0, 0))['bound'])
