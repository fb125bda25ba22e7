# SPDX-License-Identifier: Apache-2.0
"""Noisy samples of mixtures: estimators are consistent, errors fall at the stated rates, and a noisy sample costs what is stated."""

import math

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import wasserstein_distance

from benchmarks import mixture_theory as theory


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_bins_hold_the_samples_of_the_mixture(rng):
    """Mean, variance and fourth cumulant of N(+-1/2, 1.5^2) in equal parts: 0, 1/4 + 9/4 (and that of the bin), -2 / 16."""
    centres, counts, sigma = theory.draw([-0.5, 0.5], [0.5, 0.5], 1.5, 10 ** 9, 1, rng)
    assert counts.sum() == 10 ** 9
    mean, square, fourth = (float(counts[0] @ centres ** p / 1e9) for p in (1, 2, 4))
    assert abs(mean) < 5 * math.sqrt(2.5 / 1e9)
    assert square == pytest.approx(2.5 + (theory.BIN * 1.5) ** 2 / 12, abs=5e-4)
    assert fourth - 3 * square ** 2 == pytest.approx(-1 / 8, abs=5e-3)


def test_moments_are_unbiased_and_weighted_by_their_information(rng):
    """Groups of two levels, a thousand data sets; atoms so near 0 that j! s^(2j) is the variance."""
    atoms, weights = np.array([-0.1, 0.3]), np.array([0.7, 0.3])
    groups = [theory.draw(atoms, weights, sigma, n, 1000, rng) for sigma, n in ((1.0, 500), (2.0, 20000))]
    found, spread = theory.moments(groups, 5)
    for j in range(1, 6):
        information = 500 + 20000 * 2.0 ** (-2 * j)
        assert spread[j - 1] == pytest.approx(math.sqrt(math.factorial(j) / information), rel=0.02)
        assert abs(found[:, j - 1].mean() - weights @ atoms ** j) < 4.5 * found[:, j - 1].std() / math.sqrt(1000)
        assert found[:, j - 1].std() == pytest.approx(spread[j - 1], rel=0.25)


def test_quadrature_gives_the_atoms_and_says_where_there_are_none():
    atoms, weights = np.array([-1.2, 0.1, 0.9]), np.array([0.2, 0.5, 0.3])
    m = np.array([weights @ atoms ** j for j in range(1, 6)])
    impossible = m.copy()
    impossible[1] = m[0] ** 2 - 0.1  # a negative variance
    outside = np.array([weights @ (3 * atoms) ** j for j in range(1, 6)])  # atoms beyond the interval
    found, shares, exists = theory.quadrature(np.stack([m, impossible, outside]))
    assert exists.tolist() == [True, False, False]
    np.testing.assert_allclose(found[0], atoms, atol=1e-9)
    np.testing.assert_allclose(shares[0], weights, atol=1e-9)


def test_the_likelihoods_gradient_is_that_of_finite_differences(rng):
    seen = [(g.centres, g.counts[0], g.sigma) for g in (theory.draw([-1, 1], [0.3, 0.7], s, 1000, 1, rng) for s in (1.0, 1.7))]
    x = np.array([-0.8, 0.4, -0.2, 0.5])
    slope = theory._cost(x, seen, 2)[1]
    for i, step in enumerate(1e-5 * np.eye(4)):
        assert slope[i] == pytest.approx((theory._cost(x + step, seen, 2)[0] - theory._cost(x - step, seen, 2)[0]) / 2e-5, abs=1e-7)


@pytest.mark.parametrize('estimator', [theory.denoised_moments, theory.likelihood])
@pytest.mark.parametrize('k', [2, 3])
def test_estimators_are_consistent(k, estimator, rng):
    """Atoms 1.2 apart in groups of two levels, where each estimator's error is known to fall as n^(-1/2)."""
    few, many = (theory.line_errors(k, 0.6 * (k - 1), [(1.0, n), (1.5, n)], 4, rng, estimator).mean() for n in (10 ** 5, 10 ** 9))
    assert many < 0.01 < 10 * few
    assert few > 10 * many


@pytest.mark.parametrize('k', [2, 3])
def test_the_worst_instance_falls_as_stated_and_a_fixed_one_as_the_square_root(k, rng):
    counts, sizes = ([10 ** 4, 10 ** 6, 10 ** 8], np.geomspace(0.03, 0.7, 12)) if k == 2 else ([10 ** 6, 10 ** 9, 10 ** 12],
                                                                                                np.geomspace(0.1, 1.2, 10))
    found = theory.slope(counts, theory.worst(theory.line_cells(k, counts, sizes, 40, rng)))
    assert found == pytest.approx(-1 / (4 * k - 2), abs=0.025)
    fixed = theory.line_cells(k, [10 ** 7, 10 ** 9], [0.75 * (k - 1)], 40, rng)
    assert theory.slope([10 ** 7, 10 ** 9], theory.worst(fixed)) == pytest.approx(-0.5, abs=0.08)


@pytest.mark.parametrize('what', ['line, k = 2', 'subspace, d = 64'])
def test_a_clean_sample_is_worth_s_to_the_stated_power(what, rng):
    """As many noisy samples as stated have the error of the clean ones; a quarter of them has more."""
    power, clean, errors, share = theory.TARGETS[what]
    R = int(400 * max(share, 0.1))
    groups = (1.0, clean), (2.0, clean * 2 ** power), (2.0, clean * 2 ** power // 4)
    alone, same, fewer = (errors([group], R, rng).mean() for group in groups)
    assert same == pytest.approx(alone, rel=0.15)
    assert fewer > 1.25 * alone


def test_a_scatter_matrix_has_the_moments_of_samples(rng):
    """Given the first coordinates: E = diag(|t|^2, n s^2, ...); Var of an entry of the first row s^2 |t|^2, of others n s^4, 2 n s^4."""
    n, sigma, square = 40, 1.5, 25.0
    found = np.array([theory.scatter(square, n, sigma, 4, rng) for _ in range(4000)])
    np.testing.assert_array_equal(found[:, 0, 0], square)
    np.testing.assert_array_equal(found, found.transpose(0, 2, 1))
    expected = np.diag([square] + [n * sigma ** 2] * 3)
    assert (np.abs(found.mean(0) - expected) <= 5 * found.std(0) / math.sqrt(4000)).all()
    spread = np.full((4, 4), n * sigma ** 4)
    spread[0], spread[:, 0] = sigma ** 2 * square, sigma ** 2 * square
    spread[np.arange(4), np.arange(4)] = 2 * n * sigma ** 4
    spread[0, 0] = 0
    np.testing.assert_allclose(found.var(0), spread, rtol=0.12, atol=1e-9)


def test_the_covariance_is_unbiased_and_its_error_goes_as_the_root_of_d_over_n(rng):
    """Eigenvalues of noise alone lie within 2 sqrt(d / n) for n much larger than d."""
    mean = np.mean([theory.covariance(3, 1.0, [(1.0, 500), (2.0, 4000)], 6, rng) for _ in range(600)], 0)
    np.testing.assert_allclose(mean, np.diag([0.5, 0, 0, 0, 0, 0]), atol=0.02)
    errors = {(n, d): theory.subspace_errors(0.02, [(1.0, n)], d, 6, rng)[:, 1].mean()
              for n, d in ((10 ** 4, 32), (10 ** 6, 32), (10 ** 6, 128))}
    assert errors[10 ** 6, 128] == pytest.approx(2 * math.sqrt(128 / 1e6), rel=0.1)
    assert errors[10 ** 4, 32] / errors[10 ** 6, 32] == pytest.approx(10, rel=0.2)
    assert errors[10 ** 6, 128] / errors[10 ** 6, 32] == pytest.approx(2, rel=0.2)


def test_transport_between_lines():
    a, v, b, w = np.array([-1.0, 0.4]), np.array([0.3, 0.7]), np.array([-0.2, 0.5, 2.0]), np.array([0.5, 0.25, 0.25])
    assert theory.transport(a, v, b, w, 1.0) == pytest.approx(wasserstein_distance(a, b, v, w))
    one = np.ones(1)
    assert theory.transport(3 * one, one, 4 * one, one, 0.0) == pytest.approx(5)


def test_slopes_crossings_and_intervals(rng):
    x = np.array([1.0, 3.0, 10.0])
    assert theory.slope(x, 5 * x ** -0.3) == pytest.approx(-0.3)
    assert theory.crossing(x, 5 * x ** -0.3, 5 * 2 ** -0.3) == pytest.approx(2)
    cell = rng.standard_normal((3, 400))
    value, low, high = theory.with_interval(lambda arrays: arrays[0][0].mean(), [cell], rng)
    assert value == cell[0].mean()
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)


@pytest.mark.parametrize('part, first', [('price', '| line, k = 2 |'), ('mixed', '| line, k = 2, p = 6 |')])
def test_a_part_prints_its_table(part, first, tmp_path, monkeypatch):
    for name, value in {'AROUND': (0.5, 1, 2), 'LEVELS': (1.5, 2), 'FEW': (0, 600), 'DIM': 20, 'NOISY': 2000,
                        'TARGETS': {'line, k = 2': theory.TARGETS['line, k = 2']}}.items():
        monkeypatch.setattr(theory, name, value)
    result = CliRunner().invoke(theory.main, [part, '--repetitions=2', f'--json={tmp_path / "a.json"}'], catch_exceptions=False)
    assert first in result.output and (tmp_path / 'a.json').exists()
