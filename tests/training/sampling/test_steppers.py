# SPDX-License-Identifier: Apache-2.0
"""Steppers: published values, closed forms, order of convergence, the noise that each draws, truncation."""

import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dnnlib import UserError
from tests.support import GOLDEN
from torch_utils import registry
from training.diffusion import ambient, schedules
from training.sampling import steppers

DATA = GOLDEN
PUBLISHED = load_file(DATA / 'samplers' / 'samplers.safetensors')
IDDPM = load_file(DATA / 'samplers' / 'iddpm.safetensors')
RECORDS = {case['name']: case for case in json.loads((DATA / 'samplers' / 'samplers.json').read_text())['cases']}
CASES = {name: case['kwargs'] for name, case in RECORDS.items() if case['function'] == 'edm_sampler'}
ABLATION = [name for name, case in RECORDS.items() if case['function'] == 'ablation_sampler']
# A stepper with the keys that make it do something of its own, one entry for every code path.
VARIANTS = {'ancestral_large': ('ancestral', {'variance': 'large'}), 'ancestral_small': ('ancestral', {'variance': 'small'}),
            'ddim': ('ddim', {}), 'ddim_eta': ('ddim', {'eta': 0.5}), 'dpmpp_2m': ('dpmpp_2m', {}),
            'dpmpp_2m_sde': ('dpmpp_2m_sde', {}), 'euler': ('euler', {}), 'euler_ve': ('euler', {'schedule': 've'}),
            'heun': ('heun', {}), 'heun_churn': ('heun', {'S_churn': 2.0}),
            'heun_vp': ('heun', {'schedule': 'vp', 'scaling': 'vp'}), 'sde': ('sde', {})}


class Mixture:
    """E[x_0 | x] for a mixture of isotropic Gaussians; notes the levels it is called with."""

    def __init__(self, golden=PUBLISHED):
        self.weights, self.means, self.stds = (golden[f'gmm.{name}'] for name in ('weights', 'means', 'stds'))
        self.levels = []

    def __call__(self, x, sigma):
        self.levels.append(torch.as_tensor(sigma, dtype=torch.float64))
        variance = (self.stds ** 2 + self.levels[-1].reshape(-1, 1) ** 2)  # [1 or N, K]
        offset = x[:, None] - self.means  # [N,K,C,H,W]
        dims = offset[0, 0].numel()
        logits = self.weights.log() - dims / 2 * variance.log() - offset.square().sum([2, 3, 4]) / (2 * variance)
        shrunk = self.means + (self.stds ** 2 / variance)[..., None, None, None] * offset
        return (logits.softmax(1)[..., None, None, None] * shrunk).sum(1)


def replay(noise):
    """A randn_like that hands out noise[0], noise[1], ... and counts."""
    def randn_like(x):
        randn_like.calls += 1
        return noise[randn_like.calls - 1].to(x)
    randn_like.calls = 0
    return randn_like


def never(x):
    raise AssertionError('a deterministic sampler draws no noise')


def sample(kwargs, denoise, latents, noise=None):
    """The published call, split into schedule and stepper."""
    kwargs = dict(kwargs)
    schedule = {key: kwargs.pop(key) for key in ('sigma_min', 'sigma_max', 'rho') if key in kwargs}
    sigmas = schedules.edm(kwargs.pop('num_steps'), **schedule)
    return steppers.heun(denoise, latents * sigmas[0], sigmas, replay(noise) if noise is not None else never, **kwargs)


def test_mixture_is_the_published_one():
    found = Mixture()(PUBLISHED['gmm.check_x'], PUBLISHED['gmm.check_sigma'])
    torch.testing.assert_close(found, PUBLISHED['gmm.check_D'], rtol=1e-10, atol=0)


@pytest.mark.parametrize('name', CASES)
def test_published_heun(name):
    denoise = Mixture()
    found = sample(CASES[name], denoise, PUBLISHED['latents'], PUBLISHED['churn_noise'] if 'S_churn' in CASES[name] else None)
    torch.testing.assert_close(found, PUBLISHED[f'{name}.out'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(denoise.levels), PUBLISHED[f'{name}.sigma_calls'], rtol=1e-12, atol=0)
    assert len(denoise.levels) == RECORDS[name]['n_denoiser_calls'] == 2 * CASES[name]['num_steps'] - 1


def gaussian_end(num_steps):
    """Where Heun takes x = 80 for data N(0, 0.5^2)."""
    sigmas = schedules.edm(num_steps)
    x = torch.full([1, 1, 1, 1], 80.0, dtype=torch.float64)
    return steppers.heun(lambda x, sigma: x * 0.25 / (sigma ** 2 + 0.25), x, sigmas, never).item()


@pytest.mark.parametrize('num_steps, end', [(18, 0.52762), (40, 0.50488), (256, 0.500095)])
def test_gaussian_ends(num_steps, end):
    assert gaussian_end(num_steps) == pytest.approx(end, rel=2e-5)


def test_churn_factors():
    assert steppers.churn_factor(1.0, 256, 40, 0.05, 50) == 0.15625
    assert steppers.churn_factor(1.0, 18, 1e6) == pytest.approx(0.41421, abs=1e-5)
    assert steppers.churn_factor(0.04, 256, 40, 0.05, 50) == steppers.churn_factor(51, 256, 40, 0.05, 50) == 0


def test_churn_adds_the_missing_variance():
    """A raised x has noise of the raised level: sigma^2 + (s_hat^2 - sigma^2). 20,000 values: std within 2 %, four sigma."""
    seen = []

    def denoise(x, sigma):
        seen.append((x.std().item(), sigma.item()))
        return torch.zeros_like(x)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn([20, 1, 25, 40], generator=generator, dtype=torch.float64)
    randn_like = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)
    steppers.heun(denoise, x * 80, schedules.edm(6), randn_like, S_churn=2.0)
    raised = seen[::2]
    assert raised[0][1] == pytest.approx(80 * (1 + 2 / 6))
    # With D = 0 every step scales x with its level, so that the std stays equal to it.
    for std, sigma in raised:
        assert std == pytest.approx(sigma, rel=0.02)


def test_raised_levels_are_rounded_to_the_networks():
    class Discrete(Mixture):
        def round_sigma(self, sigma):
            return torch.ceil(sigma)

    denoise = Discrete()
    sigmas = torch.tensor([8.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    steppers.heun(denoise, PUBLISHED['latents'] * 8, sigmas, torch.ones_like, S_churn=0.6)
    assert [level.item() for level in denoise.levels] == [10, 3, 4, 1, 2]


def test_low_precision_denoisers_leave_the_state_in_float64():
    low = lambda x, sigma: Mixture()(x, sigma).to(torch.float32)
    found = sample(CASES['edm_18'], low, PUBLISHED['latents'])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, PUBLISHED['edm_18.out'], rtol=0, atol=1e-5)


def published_levels(name):
    """The levels that the published ablation sampler walked: of its calls, those that begin a step."""
    calls = PUBLISHED[f'{name}.sigma_calls']
    return torch.cat([calls if RECORDS[name]['kwargs']['solver'] == 'euler' else calls[::2], torch.zeros(1, dtype=torch.float64)])


def our_levels(name):
    kwargs = RECORDS[name]['kwargs']
    schedule = schedules.SCHEDULES[kwargs['discretization']]
    return schedule(kwargs['num_steps'], **{key: kwargs[key] for key in registry.parameters(schedule) if key in kwargs})


def ablation(name, sigmas):
    """A published call of the ablation sampler on such levels -> the sample and the levels of the denoiser's calls."""
    kwargs = RECORDS[name]['kwargs']
    ends = {**registry.parameters(schedules.SCHEDULES[kwargs['discretization']]), **kwargs}
    time = registry.build(kwargs['schedule'], schedules.TIMES, sigma_min=ends['sigma_min'], sigma_max=ends['sigma_max'])
    keys = {key: value for key, value in kwargs.items() if key.startswith('S_') or key == 'alpha'}
    denoise, randn_like = Mixture(), replay(PUBLISHED['churn_noise']) if 'S_churn' in keys else never
    stepper = steppers.STEPPERS[kwargs['solver']]
    found = stepper(denoise, PUBLISHED['latents'] * sigmas[0], sigmas, randn_like, schedule=time, scaling=kwargs['scaling'], **keys)
    assert len(denoise.levels) == RECORDS[name]['n_denoiser_calls']
    # Without churn no noise is drawn, as nothing would use it.
    assert randn_like is never or randn_like.calls == RECORDS[name]['n_randn_like_calls']
    return found, torch.stack(denoise.levels)


@pytest.mark.parametrize('name', [name for name in ABLATION if 'churn' not in name and name != 'abl_vp_eps'])
def test_published_ablation_on_the_published_levels(name):
    found, levels = ablation(name, published_levels(name))
    torch.testing.assert_close(found, PUBLISHED[f'{name}.out'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(levels, PUBLISHED[f'{name}.sigma_calls'], rtol=1e-10, atol=0)


@pytest.mark.parametrize('name', [name for name in ABLATION if 'iddpm' not in name and name != 'abl_vp_eps'])
def test_published_ablation_through_our_schedules(name):
    """The iddpm levels differ, because the published ones were rounded to float32: see test_schedules.py."""
    found, levels = ablation(name, our_levels(name))
    torch.testing.assert_close(found, PUBLISHED[f'{name}.out'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(levels, PUBLISHED[f'{name}.sigma_calls'], rtol=1e-9, atol=0)


def test_published_vp_that_ends_elsewhere():
    """There epsilon_s moves the end along the standard curve; here the end is named."""
    low = schedules.VP().sigma(torch.tensor(0.01, dtype=torch.float64)).item()
    keys = {'sigma_min': low, 'epsilon_s': 0.01}
    sigmas = schedules.vp(8, **keys)
    found = steppers.euler(Mixture(), PUBLISHED['latents'] * sigmas[0], sigmas, never, schedule=schedules.VP(**keys), scaling='vp')
    torch.testing.assert_close(found, PUBLISHED['abl_vp_eps.out'], rtol=1e-9, atol=1e-12)


def test_published_reverse_sde():
    """Three images, each between levels of its own: each is walked alone."""
    golden = load_file(DATA / 'losses' / 'ambient_losses.safetensors')
    mixture = Mixture(golden)
    for row in range(3):
        sigmas = torch.cat([golden['sde.sigma_calls'][:, row], golden['sde.sigma_min'][row].flatten()])
        randn_like = replay(golden['sde.noise'][:, row:row + 1])
        found = steppers.sde(mixture, golden['sde.x'][row:row + 1], sigmas, randn_like)
        # The second goes from 0.9 to 0.9: the steps are rounding errors, and their noise is the square root of that.
        torch.testing.assert_close(found, golden['sde.out'][row:row + 1], rtol=1e-9, atol=1e-7 if row == 1 else 1e-12)
        assert randn_like.calls == 5


class Epsilon:
    """The record's network, which predicts the noise and a variance at x_vp, as a denoiser of x = x_vp sqrt(1 + sigma^2)."""

    def __init__(self, sigmas, timesteps):
        self.sigmas, self.timesteps = sigmas, timesteps  # of each level
        self.A, self.B, self.b, self.d = (IDDPM[f'model.{name}'] for name in 'ABbd')

    def outputs(self, x, sigma):
        u = self.timesteps[(self.sigmas - sigma).abs().argmin()].double() / 1000
        mix = lambda matrix, image: torch.einsum('ij,njhw->nihw', matrix, image)
        x_vp = x / (1 + sigma ** 2).sqrt()
        column = lambda vector: vector[:, None, None]
        eps = x_vp + (1 - u) * (mix(self.A, x_vp) - x_vp + 0.1 * x_vp) + u * (1 - u) * column(self.b)
        return x - sigma * eps, torch.tanh(mix(self.B, x_vp) + column(self.d) - u / 2)

    def __call__(self, x, sigma):
        return self.outputs(x, sigma)[0]


def iddpm_record(tag):
    """(denoise, levels from the last timestep to 0, x at the first, recorded noise) of IDDPM's goldens."""
    kept = torch.tensor([0, 143, 285, 428, 571, 714, 856, 999] if tag == 'p8' else range(0, 1000, 111))
    if tag == 'p8':  # cosine
        f = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)[kept]
    # Respacing as published, through new betas: at the noisiest level of the cosine it costs seven digits, which count here.
    respaced = 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    alpha_bar = (1 - respaced).cumprod(0).flip(0)
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    x = IDDPM[f'sample.{tag}.init'] * (1 + sigmas[0] ** 2).sqrt()
    return Epsilon(sigmas, kept.flip(0)), torch.cat([sigmas, sigmas.new_zeros(1)]), x, IDDPM[f'sample.{tag}.noise']


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('variance, law', [('learned', 'LEARNED_RANGE'), ('auto', 'LEARNED_RANGE'), ('large', 'FIXED_LARGE')])
@pytest.mark.parametrize('tag', ['p8', 'p10'])
def test_published_ancestral(tag, variance, law, clip):
    denoise, sigmas, x, noise = iddpm_record(tag)
    randn_like = replay(noise)
    found = steppers.ancestral(denoise, x, sigmas, randn_like, variance=variance, clip=clip)
    torch.testing.assert_close(found, IDDPM[f'sample.{tag}.{law}.clip{clip:d}.p_sample_loop.f64'], rtol=1e-9, atol=1e-10)
    assert randn_like.calls == len(noise)


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('tag', ['p8', 'p10'])
def test_published_ddim(tag, eta, clip):
    denoise, sigmas, x, noise = iddpm_record(tag)
    found = steppers.ddim(denoise, x, sigmas, replay(noise) if eta else never, eta=eta, clip=clip)
    torch.testing.assert_close(found, IDDPM[f'sample.{tag}.LEARNED_RANGE.clip{clip:d}.ddim_eta{eta}.f64'], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('tag', ['p8', 'p10'])
def test_published_ddim_encoding(tag, clip):
    """DDIM walked up from an image. The published one ends at alpha_bar = 0, where only the predicted noise is left."""
    denoise, sigmas, _, _ = iddpm_record(tag)
    rising = sigmas[:-1].flip(0)
    x = steppers.ddim(denoise, IDDPM['x_start'] * (1 + rising[0] ** 2).sqrt(), rising, never, clip=clip)
    D = denoise(x, rising[-1])
    found = (x - (D.clamp(-1, 1) if clip else D)) / rising[-1]
    golden = IDDPM[f'sample.{tag}.LEARNED_RANGE.clip{clip:d}.ddim_reverse_from_x_start.f64']
    torch.testing.assert_close(found, golden, rtol=1e-9, atol=1e-10)


def path_noise(shape, count, seed=0):
    return torch.randn([count, *shape], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ddim_without_noise_is_euler():
    sigmas, x = schedules.edm(12), PUBLISHED['latents'] * 80
    found = steppers.ddim(Mixture(), x, sigmas, never)
    torch.testing.assert_close(found, steppers.euler(Mixture(), x, sigmas, never), rtol=1e-12, atol=1e-12)


def test_ddim_with_all_noise_is_ancestral():
    """And both are the bridge between x and D."""
    sigmas, x, noise = schedules.edm(12), PUBLISHED['latents'] * 80, path_noise(PUBLISHED['latents'].shape, 12)
    found = steppers.ddim(Mixture(), x, sigmas, replay(noise), eta=1.0)
    torch.testing.assert_close(found, steppers.ancestral(Mixture(), x, sigmas, replay(noise)), rtol=1e-12, atol=1e-12)
    mixture = Mixture()
    for start, end, z in zip(sigmas, sigmas[1:], noise):
        x = ambient.bridge_step(x, mixture(x, start), start, end, z)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


def end_at_half(name, num_steps, **keys):
    """The mixture's ODE from 5 down to 0.5, where the solution is smooth."""
    sigmas = schedules.edm(num_steps + 1, sigma_min=0.5, sigma_max=5.0)[:-1]
    return steppers.STEPPERS[name](Mixture(), PUBLISHED['latents'] * 5, sigmas, never, **keys)


@functools.cache
def exact_end():
    return end_at_half('heun', 2048)


@pytest.mark.parametrize('name, keys, order', [
    ('euler', {}, 1), ('euler', {'schedule': 'vp', 'scaling': 'vp'}, 1), ('ddim', {}, 1), ('heun', {}, 2), ('heun', {'alpha': 0.5}, 2),
    ('heun', {'schedule': 've'}, 2), ('heun', {'schedule': 'vp', 'scaling': 'vp'}, 2), ('dpmpp_2m', {}, 2)])
def test_order_of_convergence(name, keys, order):
    """Halving the steps divides the error by 2^order. The reference, Heun's with 2048 steps, is wrong by a 250th of the least."""
    errors = [(end_at_half(name, n, **keys) - exact_end()).abs().max().item() for n in (32, 64, 128)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(abs(found - order) < 0.15 for found in orders), orders


def gaussian_variance(name, sigmas, sd=0.5, **keys):
    """The exact variance of what a stepper makes of data N(0, sd^2), for which D is linear.

    x is the vector of its own coefficients in the latent and in every draw, which are unit vectors: its length is the std."""
    state = torch.zeros([1, 1, 1, 2 * len(sigmas)], dtype=torch.float64)
    state[..., 0] = sigmas[0]
    draws = iter(torch.eye(state.numel(), dtype=torch.float64)[1:])
    denoise = lambda x, sigma: x * sd ** 2 / (sd ** 2 + sigma ** 2)
    found = steppers.STEPPERS[name](denoise, state, sigmas, lambda x: next(draws).reshape(x.shape), **keys)
    return found.square().sum().item()


@pytest.mark.parametrize('stop_sigma', [0.0, 0.3])
@pytest.mark.parametrize('name', VARIANTS)
def test_gaussian_data_keep_their_variance(name, stop_sigma):
    """In the limit of fine steps sd^2; truncated at sn, D = x sd^2 / (sd^2 + sn^2) of x that has variance sd^2 + sn^2.

    No statistics: the variance is exact for each number of steps. Twice the steps at least halve its error, and the limit of a
    first-order method is extrapolated from the two, wrong by the square of the error. (Data at level 80 has 0.004 % more variance
    than the latent.)"""
    stepper, keys = VARIANTS[name]
    expected = 0.25 if stop_sigma == 0 else 0.25 ** 2 / (0.25 + 0.3 ** 2)
    levels = (schedules.explicit(None, sigmas=geometric(num_steps)) for num_steps in (256, 512))
    coarse, fine = (gaussian_variance(stepper, sigmas, stop_sigma=stop_sigma, **keys) / expected - 1 for sigmas in levels)
    assert abs(fine) < max(0.57 * abs(coarse), 1e-4)
    if abs(fine) > 0.3 * abs(coarse):
        assert abs(2 * fine - coarse) < 1e-3 + 1.5 * fine ** 2
    assert abs(fine) < (0.12 if name == 'euler_ve' else 0.02)


def geometric(num_steps):
    """Levels from 80 down to 0.003 of which one is 0.3."""
    upper = torch.logspace(math.log10(80), math.log10(0.3), num_steps // 2, dtype=torch.float64)
    lower = torch.logspace(math.log10(0.3), math.log10(0.003), num_steps - num_steps // 2 + 1, dtype=torch.float64)[1:]
    return [*upper.tolist()[:-1], 0.3, *lower.tolist()]


class Recorder(Mixture):
    """The mixture, with its last D."""

    def __call__(self, x, sigma):
        self.last = super().__call__(x, sigma)
        return self.last


@pytest.mark.parametrize('name', VARIANTS)
def test_truncated_samples_are_posterior_means(name):
    """The last step gives D of the last level that is not cut, in every coordinates."""
    stepper, keys = VARIANTS[name]
    sigmas, denoise = schedules.explicit(None, sigmas='80|10|1|0.2|0.1'), Recorder()
    noise = path_noise(PUBLISHED['latents'].shape, 5)
    found = steppers.STEPPERS[stepper](denoise, PUBLISHED['latents'] * 80, sigmas, replay(noise), stop_sigma=0.2, **keys)
    torch.testing.assert_close(found, denoise.last, rtol=1e-12, atol=1e-14)
    assert denoise.levels[-1] == pytest.approx(0.2 * (1.4 if name == 'heun_churn' else 1))


@pytest.mark.parametrize('name', VARIANTS)
def test_a_stop_below_every_level_changes_nothing(name):
    stepper, keys = VARIANTS[name]
    run = lambda **more: steppers.STEPPERS[stepper](Mixture(), PUBLISHED['latents'] * 80, schedules.edm(6),
                                                    replay(path_noise(PUBLISHED['latents'].shape, 6)), **keys, **more)
    assert torch.equal(run(), run(stop_sigma=0.0019))
    assert not torch.equal(run(), run(stop_sigma=0.1))


def test_truncation_keeps_the_churn_of_each_step():
    """gamma divides S_churn by the steps of the full range, as published: the steps that are left are the same."""
    sigmas = schedules.explicit(None, sigmas='80|10|1|0.2|0.1')
    full, cut = Mixture(), Mixture()
    for denoise, stop_sigma in ((full, 0.0), (cut, 0.2)):
        steppers.euler(denoise, PUBLISHED['latents'] * 80, sigmas, torch.ones_like, S_churn=1.0, stop_sigma=stop_sigma)
    assert cut.levels == full.levels[:4] and cut.levels[0] == pytest.approx(80 * 1.2)


@pytest.mark.parametrize('name', VARIANTS)
def test_a_single_step_is_the_denoiser(name):
    """From sigma_max to 0, that is to D, and not a division by zero. (A VE time goes half the way: the published formula.)"""
    stepper, keys = VARIANTS[name]
    if 'schedule' in keys or 'S_churn' in keys:
        keys = {**keys, 'stop_sigma': 80.0}
    sigmas, denoise = schedules.edm(1), Recorder()
    found = steppers.STEPPERS[stepper](denoise, PUBLISHED['latents'] * sigmas[0], sigmas, torch.ones_like, **keys)
    torch.testing.assert_close(found, denoise.last, rtol=1e-12, atol=1e-12)
    assert len(denoise.levels) == 1


@pytest.mark.parametrize('name', VARIANTS)
def test_evaluations_and_draws(name):
    stepper, keys = VARIANTS[name]
    noise = path_noise(PUBLISHED['latents'].shape, 7)
    denoise, randn_like = Mixture(), replay(noise)
    steppers.STEPPERS[stepper](denoise, PUBLISHED['latents'] * 80, schedules.edm(7), randn_like, **keys)
    assert len(denoise.levels) == (13 if stepper == 'heun' else 7)
    assert randn_like.calls == (7 if stepper in ('ancestral', 'dpmpp_2m_sde', 'sde') or 'eta' in keys or 'S_churn' in keys else 0)


@pytest.mark.parametrize('name', VARIANTS)
def test_the_denoiser_hears_where_a_step_starts(name):
    """Before its evaluations, and before churn raises the level."""
    class Listener(Mixture):
        def begin_step(self, sigma):
            self.levels.append(('from', sigma.item()))

    stepper, keys = VARIANTS[name]
    denoise, sigmas = Listener(), schedules.edm(4)
    noise = path_noise(PUBLISHED['latents'].shape, 4)
    steppers.STEPPERS[stepper](denoise, PUBLISHED['latents'] * 80, sigmas, replay(noise), **keys)
    starts = [i for i, level in enumerate(denoise.levels) if isinstance(level, tuple)]
    assert [denoise.levels[i][1] for i in starts] == sigmas[:-1].tolist()
    assert starts == ([0, 3, 6, 9] if stepper == 'heun' else [0, 2, 4, 6])


@pytest.mark.parametrize('name', VARIANTS)
def test_equal_levels_are_steps_of_no_length(name):
    """A network with few levels rounds two neighbours of a schedule to one."""
    stepper, keys = VARIANTS[name]
    sigmas = torch.tensor([80.0, 5.0, 5.0, 5.0, 0.3, 0.0], dtype=torch.float64)
    run = lambda levels: steppers.STEPPERS[stepper](Mixture(), PUBLISHED['latents'] * 80, levels, torch.zeros_like, **keys)
    found = run(sigmas)
    assert found.isfinite().all()
    if 'S_churn' not in keys and not stepper.startswith('dpmpp_2m'):  # which go on from one step to another
        torch.testing.assert_close(found, run(sigmas[[0, 1, 4, 5]]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', VARIANTS)
def test_the_state_stays_in_float64(name):
    stepper, keys = VARIANTS[name]
    low = lambda x, sigma: Mixture()(x, sigma).to(torch.float32)
    run = lambda denoise: steppers.STEPPERS[stepper](denoise, PUBLISHED['latents'] * 80, schedules.edm(18),
                                                     replay(path_noise(PUBLISHED['latents'].shape, 18)), **keys)
    found = run(low)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, run(Mixture()), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', VARIANTS)
def test_no_step_waits_for_the_device(name):
    """Levels are on the CPU, and nothing reads the state back: it may be on the meta device, which has no values to read."""
    stepper, keys = VARIANTS[name]
    x = torch.empty([2, 1, 4, 4], dtype=torch.float64, device='meta')

    def denoise(x, sigma):
        assert sigma.device.type == 'cpu' and sigma.shape == () and sigma.dtype == torch.float64
        return x.float()

    found = steppers.STEPPERS[stepper](denoise, x, schedules.edm(5), torch.empty_like, **keys)
    assert found.device.type == 'meta' and found.dtype == torch.float64


class Offering(Mixture):
    """The mixture with `channels` more outputs, all of one value."""

    def __init__(self, channels, value=0.0):
        super().__init__()
        self.channels, self.value = channels, value

    def outputs(self, x, sigma):
        return self(x, sigma), torch.full_like(x[:, :1], self.value).repeat(1, self.channels, 1, 1)


def test_learned_variances_lie_between_the_fixed_ones():
    """An output of -1 is the small variance and 1 the large one, of any network; auto reads it only where it is there."""
    sigmas, x, noise = schedules.edm(5), PUBLISHED['latents'] * 80, path_noise(PUBLISHED['latents'].shape, 5)
    run = lambda denoise, variance: steppers.ancestral(denoise, x, sigmas, replay(noise), variance=variance)
    small, large = run(Mixture(), 'small'), run(Mixture(), 'large')
    assert not torch.allclose(small, large)
    torch.testing.assert_close(run(Offering(1, -1.0), 'learned'), small)
    torch.testing.assert_close(run(Offering(1, 1.0), 'auto'), large)
    assert torch.equal(run(Mixture(), 'auto'), small) and torch.equal(run(Offering(0), 'auto'), small)
    for denoise in (Mixture(), Offering(0)):
        with pytest.raises(ValueError, match='the network does not predict a variance; choose small or large'):
            run(denoise, 'learned')


def test_clipped_predictions():
    """Only where asked for: data of other ranges would be cut."""
    far = lambda x, sigma: torch.full_like(x, 3.0)
    for stepper in (steppers.ddim, steppers.ancestral):
        run = lambda **keys: stepper(far, PUBLISHED['latents'] * 80, schedules.edm(4), torch.ones_like, **keys)  # noqa: B023
        assert (run() == 3).all() and (run(clip=True) == 1).all()


@pytest.mark.parametrize('spec, words', [
    ('heun:alpha=0', 'alpha must be above 0'), ('heun:alpha=1.5', 'at most 1, got 1.5'),
    ('heun:schedule=foo', 'choose from linear, ve, vp'), ('euler:scaling=foo', 'choose from none, vp'),
    ('ddim:eta=-0.1', 'eta must be between 0 and 1, got -0.1'), ('ddim:eta=1.1', 'got 1.1'), ('ddim:eta=nan', 'got nan'),
    ('heun:S_churn=-1', 'S_churn must not be negative, got -1'),
    ('euler:S_noise=nan', 'S_noise must not be negative, got nan'), ('ancestral:variance=big', 'choose from auto, learned, small, large'),
    ('sde:stop_sigma=90', 'stop_sigma=90 must be between 0 and the highest level, 80'), ('dpmpp_2m:stop_sigma=-1', 'stop_sigma=-1')])
def test_keys_out_of_range_are_refused(spec, words):
    stepper = registry.build(spec, steppers.STEPPERS)
    with pytest.raises((ValueError, UserError)) as err:
        steppers.check(stepper, schedules.edm(18))
    assert words in str(err.value) and '\n' not in str(err.value)


@pytest.mark.parametrize('name', steppers.STEPPERS)
def test_defaults_pass_the_check(name):
    steppers.check(steppers.STEPPERS[name], schedules.edm(18))


def test_names_stand_for_pieces():
    sigmas, x = schedules.edm(8), PUBLISHED['latents'] * 80
    found = registry.build('heun:schedule=vp,scaling=vp', steppers.STEPPERS)(Mixture(), x, sigmas, never)
    expected = steppers.heun(Mixture(), x, sigmas, never, schedule=schedules.VP(), scaling=steppers.variance_preserving)
    assert torch.equal(found, expected)


def test_registries():
    schedule = registry.build('edm:rho=3,sigma_min=0.01,sigma_max=20', schedules.SCHEDULES)
    stepper = registry.build('heun:S_churn=4', steppers.STEPPERS)
    assert isinstance(schedule, functools.partial)
    sigmas = schedule(8)
    assert torch.equal(sigmas, schedules.edm(8, rho=3, sigma_min=0.01, sigma_max=20))
    x = PUBLISHED['latents'] * sigmas[0]
    expected = steppers.heun(Mixture(), x, sigmas, replay(PUBLISHED['churn_noise']), S_churn=4)
    assert torch.equal(stepper(Mixture(), x, sigmas, replay(PUBLISHED['churn_noise'])), expected)
