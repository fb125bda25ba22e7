# SPDX-License-Identifier: Apache-2.0
"""Noise-level laws: cdf and inverse cdf agree, draws follow their law, truncation is exact far into the tail."""

import math
import re

import numpy as np
import pytest
import scipy.stats
import torch

from dnnlib import UserError
from torch_utils import registry
from training.data.pairs import BLOCK, PAIRINGS, PairStream
from training.diffusion.noise import (
    NOISE,
    Cosine,
    IDDPMLevels,
    Levels,
    LogitNormal,
    LogNormal,
    LogUniform,
    NoiseDistribution,
    VPUniform,
    normal_cdf,
    stratify,
)

CONTINUOUS = [LogNormal(), LogNormal(mean=0.4, std=2.0), LogUniform(), LogitNormal(), VPUniform(),
              VPUniform(beta_d=10, beta_min=0.2, eps_t=1e-3), Cosine(), Cosine(min=0, max=math.inf), Cosine(min=0.0125, max=80)]
DISCRETE = [IDDPMLevels(), Levels('0.5|0.1|0.2|7|9')]


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


@pytest.mark.parametrize('noise', [*CONTINUOUS, *DISCRETE])
def test_a_million_draws_follow_the_law(noise):
    # The KS distance of a million exact draws exceeds 0.0026 once in a million times.
    sample = noise.sample(1_000_000, generator())
    assert sample.dtype == torch.float64
    if isinstance(noise, Levels):
        values, counts = sample.unique(return_counts=True)
        torch.testing.assert_close(values, noise.levels, rtol=0, atol=0)
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-6
    else:
        assert ks_distance(sample, noise.cdf) < 0.0026


@pytest.mark.parametrize('noise', [*CONTINUOUS, *DISCRETE])
@pytest.mark.parametrize('sigma_n', [0.0, 0.05, 0.2, 0.4, 5.0])
def test_draws_above_are_strictly_above_and_follow_the_truncated_law(noise, sigma_n):
    level = torch.full([300_000], sigma_n, dtype=torch.float64)
    sample = noise.sample_above(level, generator())
    assert (sample > level).all()
    if isinstance(noise, Levels):
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
    'iddpm_levels:steps=0', 'iddpm_levels:c1=0', 'iddpm_levels:c2=-1', 'cosine:min=2,max=1', 'cosine:min=-1', 'cosine:max=nan',
    'logit_normal:std=0', 'levels:sigmas=0', 'levels:sigmas=0.1|x', 'levels:sigmas=0.1||0.2', 'levels:sigmas=0.1|inf',
    'lognormal:stratified=1'])
def test_values_out_of_range_are_refused_in_one_line(spec):
    with pytest.raises(UserError, match=f'--noise={re.escape(spec)}: .*must') as err:
        registry.build(spec, NOISE, '--noise')
    assert '\n' not in err.value.message


# ---- the laws of other papers


def test_cosine_is_sech_in_the_logarithm():
    """d cdf / d ln sigma = sech(ln sigma) / pi, whose integral over the line is 1."""
    noise, x, step = Cosine(min=0, max=math.inf), torch.linspace(-6, 6, 121, dtype=torch.float64), 1e-4
    density = (noise.cdf((x + step).exp()) - noise.cdf((x - step).exp())) / (2 * step)
    torch.testing.assert_close(density, 1 / (math.pi * x.cosh()), rtol=1e-6, atol=1e-10)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(noise.icdf(t), (math.pi / 2 * t).sin() / (math.pi / 2 * t).cos(), rtol=1e-12, atol=0)


def test_cosine_tails_keep_their_relative_precision():
    noise, far = Cosine(min=0, max=math.inf), torch.tensor([1e3, 1e8, 1e15], dtype=torch.float64)
    torch.testing.assert_close(noise.sf(far), 2 / (math.pi * far), rtol=1e-6, atol=0)
    torch.testing.assert_close(noise.isf(noise.sf(far)), far, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise.icdf(noise.cdf(1 / far)), 1 / far, rtol=1e-12, atol=0)
    torch.testing.assert_close(noise.cdf(1 / far), noise.sf(far), rtol=1e-12, atol=0)
    assert noise.sf(torch.tensor(0.0)) == 1 and noise.cdf(torch.tensor(0.0)) == 0


def test_cosine_between_limits_is_the_conditional_law():
    whole, part = Cosine(min=0, max=math.inf), Cosine(min=0.05, max=20)
    sigma = torch.logspace(-3, 3, 61, dtype=torch.float64)
    low, high = whole.cdf(torch.tensor([0.05, 20], dtype=torch.float64))
    torch.testing.assert_close(part.cdf(sigma), ((whole.cdf(sigma) - low) / (high - low)).clamp(0, 1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(part.sf(sigma), 1 - part.cdf(sigma), rtol=0, atol=1e-14)
    ends = part.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [0.05, 20]
    left_out = 1 - Cosine().cdf(torch.tensor(1e4, dtype=torch.float64)) + 2 * whole.cdf(torch.tensor(1e-4, dtype=torch.float64))
    assert left_out.item() == pytest.approx(2 * 6.4e-5, rel=0.01)


def test_cosine_with_the_offset_of_iddpm_gives_its_levels():
    s, steps = 0.008, 1000
    noise = Cosine(min=math.tan(math.pi / 2 * s / (1 + s)), max=math.inf)
    t = torch.arange(1, steps, dtype=torch.float64) / steps
    abar = (math.pi / 2 * (t + s) / (1 + s)).cos().square()
    torch.testing.assert_close(noise.icdf(t), ((1 - abar) / abar).sqrt(), rtol=1e-9, atol=0)


def test_logit_normal_time_is_a_log_normal_level():
    """In rectified flow sigma = t / (1 - t), so that the logit of t is ln sigma."""
    u = torch.linspace(1e-6, 1 - 1e-6, 1001, dtype=torch.float64)
    sigma = LogitNormal(mean=0.3, std=0.8).icdf(u)
    t = sigma / (1 + sigma)
    np.testing.assert_allclose(t.logit(), scipy.stats.norm.ppf(u, 0.3, 0.8), rtol=1e-9, atol=1e-9)
    assert torch.equal(LogitNormal().icdf(u), LogNormal(mean=0, std=1).icdf(u))


@pytest.mark.parametrize('spec, levels', [
    ('levels:sigmas=0.5|0.1|0.2', [0.1, 0.2, 0.5]), ('levels:sigmas=0.3', [0.3]), ('levels:sigmas=2', [2.0]),
    ('levels:sigmas=1|2|2', [1.0, 2.0, 2.0]), ('levels', np.geomspace(0.01, 1, 10))])
def test_levels_are_read_from_the_command_line(spec, levels):
    noise = registry.build(spec, NOISE, '--noise')
    np.testing.assert_allclose(noise.levels, levels, rtol=1e-14)
    distinct, counts = np.unique(noise.levels, return_counts=True)
    np.testing.assert_allclose(noise.cdf(torch.from_numpy(distinct)), np.cumsum(counts) / len(levels), rtol=1e-14)
    found, drawn = noise.sample(100_000, generator()).unique(return_counts=True)
    np.testing.assert_array_equal(found, distinct)
    if len(counts) > 1:
        assert scipy.stats.chisquare(drawn, 100_000 * counts / counts.sum()).pvalue > 1e-6


# ---- stratified draws


def uniforms(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize('run', [1, 2, 8, 64, 512, 2048])
def test_every_aligned_run_has_one_draw_in_each_stratum(run):
    u = stratify(uniforms(2048))
    strata = (u.reshape(-1, run) * run).long().sort(dim=1).values
    assert (strata == torch.arange(run)).all()


def test_any_run_is_spread_evenly():
    """Batches need be no power of two, and images may be passed over: still far from the 1.63 / sqrt(n) of independent draws."""
    u = stratify(uniforms(2048))
    for start, length in [(3, 100), (500, 300), (1000, 777)]:
        assert ks_distance(u[start:start + length], lambda x: x) < 6 / length


def test_each_draw_alone_stays_uniform():
    """Over 20,000 blocks; the KS distance of exact draws exceeds 0.0184 once in a million times."""
    made = torch.stack([stratify(u) for u in uniforms(20_000, 16)])
    for place in range(16):
        assert ks_distance(made[:, place], lambda x: x) < 0.0184
    # Where the draws lie within their finest strata is independent.
    correlation = np.corrcoef((made * 16).frac().T)
    assert np.abs(correlation - np.eye(16)).max() < 5.5 / math.sqrt(20_000)


def test_the_mean_over_a_stratified_batch_is_unbiased_and_has_a_fraction_of_the_variance():
    """ln sigma of EDM's law, batches of 256 out of 400 blocks: unbiased to five standard errors of independent draws."""
    noise = LogNormal()
    plain, even = (torch.stack([noise.icdf(f(u)).log().reshape(-1, 256).mean(1) for u in uniforms(400, 2048)]).flatten()
                   for f in (lambda u: u, stratify))
    assert abs(even.mean() - noise.mean) < 5 * noise.std / math.sqrt(400 * 2048)
    assert even.var() < plain.var() / 30  # measured: 1/62


@pytest.mark.parametrize('name', NOISE)
def test_stratified_is_an_option_of_every_law(name):
    assert registry.build(name, NOISE).stratified is False
    noise = registry.build(f'{name}:stratified=true', NOISE)
    assert noise.stratified is True
    # One draw in each of 64 shares of the law, up to the ties of discrete levels.
    height = noise.cdf(noise.icdf(stratify(uniforms(64)))).sort().values
    assert (height >= torch.arange(64) / 64 - 1e-9).all()


class StratifiedStream(PairStream):
    def uniforms(self, name, number):
        return stratify(super().uniforms(name, number))


@pytest.mark.parametrize('policy', PAIRINGS)
@pytest.mark.parametrize('noise', [LogNormal(), Cosine(), Levels('0.05|0.3|2')])
def test_every_policy_keeps_its_law_under_stratified_draws(policy, noise):
    """Pairs of a mixed set, per level of the images: the same law as from independent draws, at least as evenly covered."""
    levels = np.tile([0.0, 0.2, 0.0, 0.1], 50)
    batches = {}
    for kind in (PairStream, StratifiedStream):
        stream = kind(levels, noise, policy, batch=BLOCK, seed=3)
        index, sigma = (np.concatenate(part) for part in zip(*(stream.next() for _ in range(40))))
        assert (sigma >= levels[index]).all()
        batches[kind] = levels[index], sigma
    for level in np.unique(levels):
        plain, even = (sigma[own == level] for own, sigma in batches.values())
        assert len(even) == pytest.approx(len(plain), rel=0.05)
        assert scipy.stats.ks_2samp(plain, even).statistic < 0.03  # 20,000 draws each: exceeded once in a million times or less


def test_stratified_levels_of_a_batch_cover_the_law():
    """sigma_first numbers its draws by the pairs: each batch of 256 has one level in each 256th of the law."""
    stream = StratifiedStream(np.zeros(100), LogNormal(), 'sigma_first', batch=256, seed=5)
    for _ in range(20):
        _, sigma = stream.next()
        strata = np.sort((256 * LogNormal().cdf(torch.from_numpy(sigma)).numpy()).astype(int))
        np.testing.assert_array_equal(strata, np.arange(256))
