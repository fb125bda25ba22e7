# SPDX-License-Identifier: Apache-2.0
"""The threshold on P(clean) against its meaning for Gaussians, the isotonic fit against its definition, and crossings."""

import math

import numpy as np
import pytest
import scipy.special

from training.annotation import thresholds


def test_the_mean_probability_is_that_of_a_gaussian_log_likelihood_ratio():
    rng = np.random.default_rng(0)
    for kl in (0.05, 0.22, 1.0, 5.0):
        ratio = -kl + math.sqrt(2 * kl) * rng.standard_normal(400_000)
        assert abs(thresholds.mean_probability(kl) - scipy.special.expit(ratio).mean()) < 2e-3
    assert thresholds.mean_probability(0) == pytest.approx(0.5) and thresholds.mean_probability(1e9) < 1e-6


def test_the_published_threshold_is_0_22_nats_and_an_area_of_0_68():
    kl = thresholds.kl_of_threshold(0.45)
    assert abs(kl - 0.22) < 0.002 and thresholds.mean_probability(kl) == pytest.approx(0.45)
    assert thresholds.area_under_curve(kl) == pytest.approx(0.68, abs=0.002)


def test_the_isotonic_fit_is_the_nearest_non_decreasing_sequence():
    rng = np.random.default_rng(1)
    values = rng.standard_normal([300, 12])
    fitted = thresholds.isotonic(values)
    assert (np.diff(fitted) >= -1e-12).all()
    # The conditions for the minimum (Barlow et al.): the mean is kept, and each level set has the mean of its values.
    assert np.allclose(fitted.mean(1), values.mean(1))
    for row, fit in zip(values[:50], fitted):
        assert all(level == pytest.approx(row[np.isclose(fit, level)].mean()) for level in fit)
    others = np.sort(rng.standard_normal([300, 12]), axis=1)
    assert (np.square(fitted - values).sum(1) <= np.square(others - values).sum(1)).all()


def test_crossings_are_interpolated_in_the_logarithm_of_sigma():
    levels = np.geomspace(0.1, 10, 3)
    values = np.array([[0.1, 0.3, 0.5], [0.46, 0.47, 0.5], [0.0, 0.1, 0.2], [0.1, 0.45, 0.5]])
    found = thresholds.crossing(levels, values, 0.45)
    assert found[0] == pytest.approx(10 ** 0.75) and found[1] == 0 and found[2] == math.inf and found[3] == pytest.approx(1)
