# SPDX-License-Identifier: Apache-2.0
"""Schedules and steppers: published values, closed forms, order of convergence, the noise that churn adds."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import registry, samplers

DATA = Path(__file__).parent / 'data' / 'samplers'
GOLDEN = load_file(DATA / 'samplers.safetensors')
CASES = {case['name']: case['kwargs'] for case in json.loads((DATA / 'samplers.json').read_text())['cases']}


class Mixture:
    """E[x_0 | x] for a mixture of isotropic Gaussians; notes the levels it is called with."""

    def __init__(self):
        self.weights, self.means, self.stds = (GOLDEN[f'gmm.{name}'] for name in ('weights', 'means', 'stds'))
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
    sigmas = samplers.edm(kwargs.pop('num_steps'), **schedule)
    return samplers.heun(denoise, latents * sigmas[0], sigmas, replay(noise) if noise is not None else never, **kwargs)


def test_mixture_is_the_published_one():
    found = Mixture()(GOLDEN['gmm.check_x'], GOLDEN['gmm.check_sigma'])
    torch.testing.assert_close(found, GOLDEN['gmm.check_D'], rtol=1e-10, atol=0)


@pytest.mark.parametrize('name', CASES)
def test_published_heun(name):
    denoise = Mixture()
    found = sample(CASES[name], denoise, GOLDEN['latents'], GOLDEN['churn_noise'] if 'S_churn' in CASES[name] else None)
    torch.testing.assert_close(found, GOLDEN[f'{name}.out'], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.stack(denoise.levels), GOLDEN[f'{name}.sigma_calls'], rtol=1e-12, atol=0)
    assert len(denoise.levels) == 2 * CASES[name]['num_steps'] - 1


def gaussian_end(num_steps):
    """Where Heun takes x = 80 for data N(0, 0.5^2)."""
    sigmas = samplers.edm(num_steps)
    x = torch.full([1, 1, 1, 1], 80.0, dtype=torch.float64)
    return samplers.heun(lambda x, sigma: x * 0.25 / (sigma ** 2 + 0.25), x, sigmas, never).item()


@pytest.mark.parametrize('num_steps, end', [(18, 0.52762), (40, 0.50488), (256, 0.500095)])
def test_gaussian_ends(num_steps, end):
    assert gaussian_end(num_steps) == pytest.approx(end, rel=2e-5)


def test_heun_converges_with_order_two():
    """On the mixture's smooth part: halving the steps of a uniform rho=7 ramp quarters the error."""
    def end(num_steps):
        sigmas = samplers.edm(num_steps, sigma_min=0.5, sigma_max=5.0)[:-1]  # ends at 0.5, where the last step is a Heun step too
        return samplers.heun(Mixture(), GOLDEN['latents'] * 5, sigmas, never)

    exact = end(1025)
    errors = [(end(n + 1) - exact).abs().max().item() for n in (32, 64, 128)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(1.85 < order < 2.15 for order in orders), orders


def test_edm_levels():
    for num_steps in (2, 18, 256):
        sigmas = samplers.edm(num_steps)
        assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,)
        assert sigmas[0].item() == pytest.approx(80) and sigmas[-2].item() == pytest.approx(0.002) and sigmas[-1] == 0
        assert (sigmas[1:] < sigmas[:-1]).all()


def test_a_single_step_is_the_denoiser():
    """The published ramp divides by zero for one step; here it goes from sigma_max to 0, that is to D."""
    sigmas = samplers.edm(1)
    assert sigmas.tolist() == pytest.approx([80, 0])
    x = GOLDEN['latents'] * 80
    torch.testing.assert_close(samplers.heun(Mixture(), x, sigmas, never), Mixture()(x, 80.0))


@pytest.mark.parametrize('kwargs', [{'num_steps': 0}, {'sigma_min': 0.0}, {'sigma_min': 80.0}, {'sigma_max': math.inf},
                                    {'sigma_min': math.nan}, {'rho': 0.0}])
def test_levels_that_do_not_fall_are_refused(kwargs):
    with pytest.raises(ValueError):
        samplers.edm(**{'num_steps': 18, **kwargs})


def test_churn_factors():
    assert samplers.churn_factor(1.0, 256, 40, 0.05, 50) == 0.15625
    assert samplers.churn_factor(1.0, 18, 1e6) == pytest.approx(0.41421, abs=1e-5)
    assert samplers.churn_factor(0.04, 256, 40, 0.05, 50) == samplers.churn_factor(51, 256, 40, 0.05, 50) == 0


def test_churn_adds_the_missing_variance():
    """A raised x has noise of the raised level: sigma^2 + (s_hat^2 - sigma^2). 20,000 values: std within 2 %, four sigma."""
    seen = []

    def denoise(x, sigma):
        seen.append((x.std().item(), sigma.item()))
        return torch.zeros_like(x)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn([20, 1, 25, 40], generator=generator, dtype=torch.float64)
    randn_like = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)
    samplers.heun(denoise, x * 80, samplers.edm(6), randn_like, S_churn=2.0)
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
    samplers.heun(denoise, GOLDEN['latents'] * 8, sigmas, torch.ones_like, S_churn=0.6)
    assert [level.item() for level in denoise.levels] == [10, 3, 4, 1, 2]


def test_low_precision_denoisers_leave_the_state_in_float64():
    low = lambda x, sigma: Mixture()(x, sigma).to(torch.float32)
    found = sample(CASES['edm_18'], low, GOLDEN['latents'])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, GOLDEN['edm_18.out'], rtol=0, atol=1e-5)


def test_registries():
    schedule = registry.build('edm:rho=3,sigma_min=0.01,sigma_max=20', samplers.SCHEDULES)
    stepper = registry.build('heun:S_churn=4', samplers.STEPPERS)
    assert isinstance(schedule, functools.partial)
    sigmas = schedule(8)
    assert torch.equal(sigmas, samplers.edm(8, rho=3, sigma_min=0.01, sigma_max=20))
    x = GOLDEN['latents'] * sigmas[0]
    expected = samplers.heun(Mixture(), x, sigmas, replay(GOLDEN['churn_noise']), S_churn=4)
    assert torch.equal(stepper(Mixture(), x, sigmas, replay(GOLDEN['churn_noise'])), expected)
