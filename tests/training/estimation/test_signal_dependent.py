# SPDX-License-Identifier: Apache-2.0
"""Variance against intensity, and the fit variance = a intensity + b, on counts whose law is known."""

import numpy as np
import pytest

from training.estimation.signal_dependent import fit_poisson_gaussian, variance_curve

RAMP = np.broadcast_to(np.linspace(2, 40, 48)[:, None, None, None], (48, 1, 64, 64))


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def textured(rng, count=64):
    """Smooth random fields in [0, 1], float64 [count,1,64,64]."""
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((count, 1, 64, 64))) / (0.001 + np.add.outer(
        np.fft.fftfreq(64) ** 2, np.fft.rfftfreq(64) ** 2)) ** 1.2, (64, 64))
    low, high = field.min((2, 3), keepdims=True), field.max((2, 3), keepdims=True)
    return (field - low) / (high - low)


def test_counts_have_the_slope_1(rng):
    found = fit_poisson_gaussian(rng.poisson(RAMP).astype(np.float32))
    assert abs(found.a - 1) < 4 * found.uncertainties[0] < 0.05
    assert abs(found.b) < 4 * found.uncertainties[1]
    assert found.depends and found.p < 1e-6


def test_gain_and_readout_noise(rng):
    images = 3 * rng.poisson(RAMP) + 7 * rng.standard_normal(RAMP.shape)
    found = fit_poisson_gaussian(images)
    assert abs(found.a - 3) < 4 * found.uncertainties[0] < 0.2
    assert abs(found.b - 49) < 4 * found.uncertainties[1] < 12


def test_texture_does_not_make_noise(rng):
    clean = 100 * textured(rng)
    found = fit_poisson_gaussian([rng.poisson(part).astype(np.float32) for part in (clean[:32], clean[32:])])
    assert found.a == pytest.approx(1, abs=0.05)


def test_white_noise_does_not_depend_on_the_signal(rng):
    found = fit_poisson_gaussian(textured(rng) + 0.1 * rng.standard_normal((64, 1, 64, 64)))
    assert not found.depends
    assert np.sqrt(found.curve.variances) == pytest.approx(0.1, rel=0.05)


def test_false_alarms_are_as_rare_as_stated(rng):
    alarms = [fit_poisson_gaussian(RAMP[::4] / 40 + 0.2 * rng.standard_normal((12, 1, 64, 64))).p < 0.05 for _ in range(60)]
    assert np.mean(alarms) < 0.15


def test_too_few_patches():
    with pytest.raises(ValueError, match='96 flat patches'):
        variance_curve(np.zeros([100, 1, 8, 8], np.float32))
    with pytest.raises(ValueError, match='smaller than a patch of 4x4'):
        variance_curve(np.zeros([100, 1, 2, 2], np.float32))
    with pytest.raises(ValueError, match='no images'):
        variance_curve(iter([]))


def test_bins_near_the_ends_are_left_out(rng):
    clean = np.broadcast_to(np.linspace(-1, 1, 64)[:, None, None, None], (64, 1, 64, 64))
    clipped = np.clip(clean + 0.2 * rng.standard_normal(clean.shape), -1, 1)
    inside = variance_curve(clipped, (-1, 1))
    assert np.sqrt(inside.variances) == pytest.approx(0.2, rel=0.06)
    assert variance_curve(clipped).variances.min() < 0.03
