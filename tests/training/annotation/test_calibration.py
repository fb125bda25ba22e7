# SPDX-License-Identifier: Apache-2.0
"""Scores to probabilities: known laws are recovered, overconfidence is taken back, and the area is that of its definition."""

import numpy as np
import pytest
import scipy.special

from training.annotation import calibration


def scores(kl, clean, data, factor=1.0, seed=0):
    """Log-likelihood ratios of two Gaussians times `factor`, [N, L] and [M, L, 1]; kl: [L]."""
    rng, kl = np.random.default_rng(seed), np.asarray(kl)
    draw = lambda sign, count: factor * (sign * kl + np.sqrt(2 * kl) * rng.standard_normal([count, len(kl)]))
    return draw(1, clean), draw(-1, data)[..., None]


def test_overconfident_scores_become_probabilities_whatever_the_numbers_of_images():
    kl = [0.1, 0.5, 2.0]
    clean, data = scores(kl, 3000, 20000, factor=4)
    fitted = calibration.calibrate(clean, data)
    assert np.allclose(fitted[0], 0.25, rtol=0.15) and np.allclose(fitted[1], 0, atol=0.1)
    found = calibration.probabilities(data, fitted)
    assert np.allclose(found.mean(0), [scipy.special.expit(scores(kl, 1, 100_000)[1][..., 0]).mean(0)], atol=0.01)
    of_clean = calibration.probabilities(clean[..., None], fitted)
    raw = calibration.calibration_error(scipy.special.expit(clean), scipy.special.expit(data[..., 0]))
    assert calibration.calibration_error(of_clean, found) < 0.01 < 0.1 < raw


def test_scores_that_say_nothing_become_one_half():
    rng = np.random.default_rng(0)
    clean, data = 10 + rng.standard_normal([200, 4]), 10 + rng.standard_normal([900, 4, 2])
    found = calibration.probabilities(data, calibration.calibrate(clean, data))
    assert np.allclose(found.mean(0), 0.5, atol=0.02)


def test_separable_scores_stay_finite():
    fitted = calibration.calibrate(np.full([50, 1], 3.0), np.full([60, 1, 1], -3.0))
    assert np.isfinite(fitted).all() and calibration.probabilities(np.full([1, 1, 1], -3.0), fitted)[0, 0] < 0.05


def test_the_area_counts_pairs():
    rng = np.random.default_rng(0)
    clean, data = rng.integers(0, 5, [30, 3]).astype(float), rng.integers(0, 4, [20, 3]).astype(float)
    wins = (clean[:, None] > data[None]) + 0.5 * (clean[:, None] == data[None])
    assert np.allclose(calibration.area(clean, data), wins.mean((0, 1)))
    assert calibration.area(np.ones([5, 1]), np.zeros([7, 1])) == pytest.approx(1)
