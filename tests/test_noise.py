# SPDX-License-Identifier: Apache-2.0
"""Noise-level laws: cdf and inverse cdf agree, draws follow their law, truncation is exact far into the tail."""

import math

import click
import numpy as np
import pytest
import scipy.stats
import torch

from training import registry
from training.noise import NOISE, IDDPMLevels, LogNormal, LogUniform, NoiseDistribution, VPUniform, normal_cdf

CONTINUOUS = [LogNormal(), LogNormal(mean=0.4, std=2.0), LogUniform(),
              VPUniform(), VPUniform(beta_d=10, beta_min=0.2, eps_t=1e-3)]


def generator():
    return torch.Generator().manual_seed(1)


def ks_distance(sample, cdf):
    """Kolmogorov-Smirnov distance between draws and a law given by its cdf."""
    sample = np.sort(np.asarray(sample))
    height = cdf(torch.from_numpy(sample)).numpy()
    steps = np.arange(len(sample) + 1) / len(sample)
    return max((height - steps[:-1]).max(), (steps[1:] - height).max())


@pytest.mark.parametrize('noise', CONTINUOUS)
def test_cdf_and_inverse_are_inverse(noise):
    u = torch.linspace(1e-6, 1 - 1e-6, 10001, dtype=torch.float64)
    torch.testing.assert_close(noise.cdf(noise.icdf(u)), u, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(noise.sf(noise.isf(u)), u, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(noise.isf(u), noise.icdf(1 - u), rtol=1e-9, atol=0)
    assert (noise.icdf(u).diff() > 0).all()


@pytest.mark.parametrize('noise', [*CONTINUOUS, IDDPMLevels()])
def test_a_million_draws_follow_the_law(noise):
    # The KS distance of a million exact draws exceeds 0.0026 once in a million times.
    sample = noise.sample(1_000_000, generator())
    assert sample.dtype == torch.float64
    if isinstance(noise, IDDPMLevels):
        values, counts = sample.unique(return_counts=True)
        torch.testing.assert_close(values, noise.levels, rtol=0, atol=0)
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-6
    else:
        assert ks_distance(sample, noise.cdf) < 0.0026


@pytest.mark.parametrize('noise', [*CONTINUOUS, IDDPMLevels()])
@pytest.mark.parametrize('sigma_n', [0.0, 0.05, 0.2, 0.4, 5.0])
def test_draws_above_are_strictly_above_and_follow_the_truncated_law(noise, sigma_n):
    level = torch.full([300_000], sigma_n, dtype=torch.float64)
    sample = noise.sample_above(level, generator())
    assert (sample > level).all()
    if isinstance(noise, IDDPMLevels):
        values, counts = sample.unique(return_counts=True)
        torch.testing.assert_close(values, noise.levels[noise.levels > sigma_n], rtol=0, atol=0)
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-6
    else:
        below = noise.cdf(level[0])
        assert ks_distance(sample, lambda sigma: (noise.cdf(sigma) - below) / (1 - below)) < 0.005


def test_lognormal_tail_keeps_its_relative_precision():
    """30 standard deviations out, where the cdf has long rounded to 1."""
    noise, z = LogNormal(), torch.tensor([5.0, 8.5, 20.0, 30.0], dtype=torch.float64)
    level = (noise.mean + noise.std * z).exp()
    np.testing.assert_allclose(noise.sf(level), scipy.stats.norm.sf(z), rtol=1e-11)
    np.testing.assert_allclose(noise.cdf(level.reciprocal() * math.exp(2 * noise.mean)), scipy.stats.norm.cdf(-z), rtol=1e-11)
    u = torch.tensor([[0.9], [0.5], [1e-3]], dtype=torch.float64)
    truncated = noise.above(level, u)
    assert (truncated > level).all()
    expected = scipy.stats.norm.isf(scipy.stats.norm.sf(z) * u.numpy())
    np.testing.assert_allclose(truncated, np.exp(noise.mean + noise.std * expected), rtol=1e-11)


def test_above_never_returns_the_level_itself():
    """A uniform next to 1 would round to sigma_n, at which an image has no gradient."""
    u = torch.tensor(1 - 2 ** -53, dtype=torch.float64)
    for noise in [*CONTINUOUS, IDDPMLevels()]:
        level = noise.icdf(torch.linspace(0.01, 0.9, 90, dtype=torch.float64))
        assert (noise.above(level, u) > level).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_draws_below_are_below_for_every_uniform_a_normal_can_give(dtype):
    u = normal_cdf(torch.tensor([-6.5, -3.0, 0.0, 3.0, 6.5], dtype=dtype))
    assert (u > 0).all()
    for noise in [*CONTINUOUS, IDDPMLevels()]:
        sigma = noise.icdf(torch.linspace(1e-3, 1 - 1e-3, 999, dtype=dtype))[:, None]
        drawn = noise.below(sigma, u)
        assert drawn.dtype == dtype and (drawn > 0).all() and (drawn <= sigma).all()
        assert (drawn[10:, :4] < sigma[10:]).all()


def test_draws_below_follow_the_truncated_law():
    noise, u = LogNormal(), torch.rand(300_000, generator=generator(), dtype=torch.float64)
    limit = torch.tensor(0.2, dtype=torch.float64)
    assert ks_distance(noise.below(limit, u), lambda sigma: noise.cdf(sigma) / noise.cdf(limit)) < 0.005


def test_normal_cdf_does_not_underflow_in_single_precision():
    z = torch.tensor([-12.0, -6.0, 0.0, 2.0])
    np.testing.assert_allclose(normal_cdf(z), scipy.stats.norm.cdf(z.numpy().astype(float)), rtol=1e-5)


def test_vp_levels_are_the_published_ones():
    noise = VPUniform()
    t = torch.tensor([1e-5, 1e-3, 1.0], dtype=torch.float64)
    sigma = noise.icdf((t - 1e-5) / (1 - 1e-5))
    np.testing.assert_allclose(sigma, [0.00100, 0.01049, 152.167], rtol=1e-3)
    by_definition = [math.sqrt(math.exp(19.9 / 2 * s * s + 0.1 * s) - 1) for s in t.tolist()]
    np.testing.assert_allclose(sigma, by_definition, rtol=1e-9)
    assert noise.cdf(torch.tensor(1e-4)) == 0 and noise.cdf(torch.tensor(200.0)) == 1


def test_loguniform_stays_in_its_bounds():
    noise = LogUniform(min=0.02, max=100)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert noise.icdf(ends).tolist() == [0.02, 100.0]
    assert noise.cdf(torch.tensor([0.0, 0.01, 0.02, 100.0, 300.0])).tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize('steps', [1, 10, 1000])
def test_iddpm_levels_satisfy_their_recursion(steps):
    noise, u = IDDPMLevels(steps=steps), 0.0
    abar = lambda j: math.sin(math.pi / 2 * j / steps / 1.008) ** 2
    for j in range(steps, 0, -1):
        u = math.sqrt((u * u + 1) / max(abar(j - 1) / abar(j), 1e-3) - 1)
        assert noise.levels[steps - j].item() == pytest.approx(u, rel=1e-9)
    if steps == 1000:  # the published ends
        assert noise.levels[-1].item() == pytest.approx(20291.17, abs=0.01)
        assert noise.levels[0].item() == pytest.approx(0.0064254, abs=1e-7)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_iddpm_cdf_is_a_step_function(dtype):
    noise = IDDPMLevels(steps=1000)
    levels = noise.levels.to(dtype)
    torch.testing.assert_close(noise.icdf(noise.cdf(levels)), levels, rtol=0, atol=0)
    torch.testing.assert_close(noise.cdf(levels), torch.arange(1, 1001, dtype=dtype) / 1000, rtol=0, atol=0)
    half_way = (levels[:-1] + levels[1:]) / 2
    torch.testing.assert_close(noise.cdf(half_way), noise.cdf(levels[:-1]), rtol=0, atol=0)
    assert noise.sf(levels[-1]) == 0 and noise.cdf(levels[0] / 2) == 0
    # Strictly above and strictly below a level means its neighbours.
    almost = torch.tensor(1 - 2 ** -20, dtype=dtype)
    torch.testing.assert_close(noise.above(levels[:-1], almost), levels[1:], rtol=0, atol=0)
    torch.testing.assert_close(noise.below(levels[1:], almost), levels[:-1], rtol=0, atol=0)
    assert noise.below(levels[:1], almost) == levels[0]


def test_a_piece_needs_a_cdf_and_its_inverse_only():
    class Exponential(NoiseDistribution):
        def cdf(self, sigma):
            return -(-sigma).expm1()

        def icdf(self, u):
            return -(-u).log1p()

    noise = Exponential()
    assert ks_distance(noise.sample(300_000, generator()), noise.cdf) < 0.005
    above = noise.sample_above(torch.full([300_000], 2.0), generator())
    assert ks_distance(above - 2, noise.cdf) < 0.005  # the exponential has no memory


def test_draws_come_from_the_generator_alone():
    state = torch.get_rng_state()
    first, again = LogNormal().sample(100, generator()), LogNormal().sample(100, generator())
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('spec', [
    'lognormal:std=0', 'lognormal:std=-1', 'lognormal:mean=nan', 'loguniform:min=0', 'loguniform:min=2,max=1',
    'vp_uniform:beta_d=0', 'vp_uniform:beta_min=-1', 'vp_uniform:eps_t=1',
    'iddpm_levels:steps=0', 'iddpm_levels:c1=0', 'iddpm_levels:c2=-1'])
def test_values_out_of_range_are_refused_in_one_line(spec):
    with pytest.raises(click.ClickException, match=f'--noise={spec}: .*must') as err:
        registry.build(spec, NOISE, '--noise')
    assert '\n' not in err.value.message
