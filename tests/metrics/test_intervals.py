# SPDX-License-Identifier: Apache-2.0
"""Intervals: their formulas against direct computation, and how often they hold what they are of."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks import intervals as simulation
from dnnlib import UserError
from metrics import evaluate, intervals, kernel
from metrics.frechet import frechet_distance, half_factor
from metrics.statistics import Statistics
from tests.metrics.test_evaluate import Lookup
from tests.metrics.test_metrics import features_of

ALPHA = 1e-4  # of each of the quick tests of coverage: intervals that hold in 92 to 98 % of draws fail them this seldom


def distance(x, mu, cov):
    return frechet_distance(x.mean(0), np.cov(x, rowvar=False), mu, cov)


def reference(dim):
    factor = np.random.default_rng(3).standard_normal((dim, 2 * dim))
    return np.linspace(0, 1, dim), factor @ factor.T / (2 * dim)


@pytest.mark.parametrize('count', [5, 60], ids=['fewer images than features', 'more'])
def test_influence_is_the_derivative_in_the_weights(count):
    """Weighted moments, with weight 1 + e on one image and normalised: (d/de) N FD = the influence at it."""
    x, (mu, cov) = features_of(count, 8), reference(8)

    def at(i, e):
        w = np.ones(count)
        w[i] += e
        w /= w.sum()
        mean = w @ x
        return frechet_distance(mean, ((x - mean).T * w) @ (x - mean) * count / (count - 1), mu, cov)

    value, influence = intervals.frechet_influence(torch.from_numpy(x), torch.from_numpy(mu), torch.from_numpy(half_factor(cov)))
    influence = influence - influence.mean()
    assert value == pytest.approx(distance(x, mu, cov), rel=1e-9)
    numeric = np.array([count * (at(i, 1e-4) - at(i, -1e-4)) / 2e-4 for i in range(count)])
    # The images' own mean stands in the covariance with N - 1 in place of N: the same for all of them, up to 1 / N.
    np.testing.assert_allclose(influence, numeric - numeric.mean(), rtol=0.3 if count == 5 else 0.03, atol=1e-3 * np.abs(numeric).max())


def test_influence_in_blocks(monkeypatch):
    x, (mu, cov) = torch.from_numpy(features_of(50, 6)), reference(6)
    args = torch.from_numpy(mu), torch.from_numpy(half_factor(cov))
    whole = intervals.frechet_influence(x, *args)
    monkeypatch.setattr(intervals, 'ROWS', 7)
    parts = intervals.frechet_influence(x, *args)
    assert parts[0] == pytest.approx(whole[0], rel=1e-10)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-8, atol=1e-8)


def test_halves_and_bounds():
    """The halves are those of the seed; the corrected variance lies between half of the plain one and that."""
    x, (mu, cov) = features_of(40, 4), reference(4)
    spread = intervals.frechet_spread(x, mu, cov, seed=5)
    order = np.random.RandomState(5).permutation(40)
    assert spread.halves == pytest.approx((distance(x[order[::2]], mu, cov) + distance(x[order[1::2]], mu, cov)) / 2, rel=1e-9)
    assert spread.first / 2 <= spread.variance <= spread.first
    assert intervals.extrapolated(3.0, spread) == 6 - spread.halves
    low, high = intervals.frechet_bounds(3.0, spread)
    assert low < 3 < high and low * high == pytest.approx(9) and math.log(high / 3) == pytest.approx(
        intervals.Z * math.sqrt(spread.variance) / 3)
    with pytest.raises(ValueError, match='4 are needed'):
        intervals.frechet_spread(x[:3], mu, cov)


def test_the_second_order_is_not_counted_twice():
    """Of equal laws, where it is all there is, the influence function says twice the variance, the corrected estimate once."""
    rng, mu, cov = np.random.default_rng(0), np.zeros(12), np.eye(12)
    draws = [rng.standard_normal((120, 12)) for _ in range(200)]
    true = np.var([distance(x, mu, cov) for x in draws])
    spreads = [intervals.frechet_spread(x, mu, cov) for x in draws]
    assert np.mean([spread.first for spread in spreads]) > 1.5 * true
    assert 0.7 * true < np.mean([spread.variance for spread in spreads]) < 1.45 * true


def test_variance_of_the_kernel_distance_is_unbiased():
    """Its mean over draws is the variance of the estimate over them, at equal laws and away; five standard errors."""
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.7):
        values, estimates = [], []
        for _ in range(800):
            x, y = (torch.from_numpy(rng.standard_normal((n, 4)) * 0.7 + by) for n, by in ((12, shift), (9, 0)))
            values.append(kernel.squared_mmd(x, y))
            estimates.append(sum(intervals.mmd_orders(x, y)[:2]))
        values, estimates = np.array(values), np.array(estimates)
        error = math.hypot(np.square(values - values.mean()).std() / 800 ** 0.5, estimates.std() / 800 ** 0.5)
        assert abs(estimates.mean() - values.var(ddof=1)) < 5 * error


def test_bias_of_the_v_statistic():
    x, y = (torch.from_numpy(features_of(n, 3, seed)) / 10 for n, seed in ((20, 0), (30, 1)))
    cubic = lambda a, b: (a @ b.T / 3 + 1) ** 3
    biased = float(cubic(x, x).mean() + cubic(y, y).mean() - 2 * cubic(x, y).mean())
    assert kernel.squared_mmd(x, y) + intervals.mmd_variance(x, y)[1] == pytest.approx(biased, rel=1e-9)


def binomial_range(repetitions):
    """Counts that a true coverage of 92 % falls below, and one of 98 % exceeds, with probability ALPHA each."""
    return scipy.stats.binom.ppf(ALPHA, repetitions, 0.92), scipy.stats.binom.isf(ALPHA, repetitions, 0.98)


@pytest.mark.parametrize('case', [(16, 256, 'half-normal', 0, 1), (16, 256, 'normal', 0.2, 1.1)])
def test_coverage_of_frechet_distances(case, repetitions=250):
    """With 250 draws a coverage of 81 % fails nine times in ten."""
    low, high = binomial_range(repetitions)
    fid, infinite, _, _ = simulation.frechet_case(*case, repetitions)
    assert low <= fid * repetitions <= high and low <= infinite * repetitions <= high


@pytest.mark.parametrize('case', [(64, 250, 250, 250, 'half-normal', 0), (64, 250, 250, 250, 'half-normal', 0.3)])
def test_coverage_of_kernel_distances(case, repetitions=100):
    low, high = binomial_range(repetitions)
    assert low <= simulation.kernel_case(*case, repetitions)[0] * repetitions <= high


@pytest.mark.slow
@pytest.mark.parametrize('case', simulation.FRECHET)
def test_full_coverage_of_frechet_distances(case):
    """92 to 98 % in 2,000 draws (whose own error is 0.5 %), wherever an interval is given."""
    dim, count = case[:2]
    fid, infinite, _, _ = simulation.frechet_case(*case, 2000)
    if count >= max(intervals.FEWEST, intervals.FEWEST_PER_DIM * dim):
        assert 0.92 <= fid <= 0.98
    if count >= max(intervals.FEWEST, intervals.EXTRAPOLATED_PER_DIM * dim):
        assert 0.915 <= infinite <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize('case', [case for case in simulation.KERNEL if case[0] >= intervals.FEWEST_FEATURES])
def test_full_coverage_of_kernel_distances(case):
    assert 0.915 <= simulation.kernel_case(*case, 2000)[0] <= 0.98


# In results


def measured(count, dim, metrics=('fid', 'fid_inf', 'kid'), **settings):
    features = torch.from_numpy(features_of(2 * count, dim)).float()
    pixels = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    theirs = features[count:].numpy()
    against = Statistics(theirs.mean(0), np.cov(theirs, rowvar=False), features=theirs)
    settings = evaluate.Settings(kid_subset_size=min(count, 100), kid_subsets=30, intervals=True, **settings)
    return evaluate.evaluate_batches(np.split(pixels, [50]), Lookup(features[:count]), against, metrics, settings)


def test_intervals_in_results():
    found = measured(255, 3)
    assert found['intervals']['kid']['method'] == 'none: 3 features, 32 are needed'
    told = {name: found['intervals'][name] for name in ('fid_score', 'fid_inf')}
    wide = measured(255, 40, metrics=('kid',))
    found['kid'], told['kid'] = wide['kid'], wide['intervals']['kid']
    for name, interval in told.items():
        assert interval['low'] < found[name] < interval['high'] and interval['level'] == 0.95 and 'reference' in interval['method']
    assert measured(255, 3)['intervals'] == found['intervals']  # nothing is random
    assert measured(255, 3, seed=1)['fid_inf'] != found['fid_inf'] and 'is' not in found


def test_no_interval_from_too_few_images():
    found = measured(60, 3)['intervals']
    assert all(each['low'] is each['high'] is None for each in found.values())
    assert found['fid_score']['method'] == 'none: 60 images of 3 features, 250 images are needed'
    found = measured(255, 40, metrics=('fid', 'fid_inf'))['intervals']
    assert found['fid_score']['low'] is not None and found['fid_inf']['method'].endswith('320 images are needed')


def test_fid_inf_needs_four_images():
    with pytest.raises(UserError, match='--metrics=fid_inf: 3 images cannot be split into halves with a covariance; at least 4'):
        measured(3, 2, metrics=('fid_inf',))
