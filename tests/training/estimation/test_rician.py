# SPDX-License-Identifier: Apache-2.0
"""Rician noise: its moments, sigma from a background that is known or found, and from which level on it is nearly normal."""

import numpy as np
import pytest

from training.estimation import rician

SIGMA = 5.0


def magnitudes(amplitude, seed=0, coils=1):
    rng = np.random.default_rng(seed)
    parts = [np.square(amplitude + SIGMA * rng.normal(size=amplitude.shape)) + np.square(SIGMA * rng.normal(size=amplitude.shape))
             for _ in range(coils)]
    return np.sqrt(sum(parts))


def scans(share, count=4, side=64):
    """Round objects of varying brightness, whose background is a share of the area."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    inside = x ** 2 + y ** 2 < (1 - share) / np.pi
    return np.broadcast_to(np.where(inside, 40 + 60 * np.sin(6 * x) ** 2, 0), (count, 1, side, side))


@pytest.mark.parametrize('ratio', [0, 0.5, 1, 3, 10])
def test_moments(ratio):
    drawn = magnitudes(np.full(400_000, ratio * SIGMA))
    mean, variance = rician.moments(np.array([ratio * SIGMA]), SIGMA)
    assert drawn.mean() == pytest.approx(mean[0], rel=3e-3) and drawn.var() == pytest.approx(variance[0], rel=1e-2)


def test_nearly_gaussian_from_three_sigma_on():
    """There the mean is sqrt(A^2 + sigma^2) within .4 %, the variance sigma^2 within 7 %, the skewness small; without signal not at all."""
    amplitude = SIGMA * np.linspace(rician.NEARLY_GAUSSIAN, 20, 100)
    mean, variance = rician.moments(amplitude, SIGMA)
    assert abs(mean / np.hypot(amplitude, SIGMA) - 1).max() < 0.004 and abs(variance / SIGMA ** 2 - 1).max() < 0.07
    np.testing.assert_allclose(rician.amplitude_of(mean, SIGMA), amplitude, rtol=0.004)
    drawn = magnitudes(np.full(200_000, 3 * SIGMA))
    assert abs(((drawn - drawn.mean()) ** 3).mean() / drawn.std() ** 3) < 0.1
    mean, variance = rician.moments(np.zeros(1), SIGMA)
    assert mean[0] == pytest.approx(1.2533 * SIGMA, rel=1e-4) and variance[0] == pytest.approx(0.4292 * SIGMA ** 2, rel=1e-3)


@pytest.mark.parametrize('coils', [1, 4])
def test_sigma_of_a_known_background(coils):
    drawn = magnitudes(np.zeros(40_000), coils=coils)
    assert rician.sigma_of_background(drawn, coils) == pytest.approx(SIGMA, rel=4 / (2 * np.sqrt(coils * 40_000)))


@pytest.mark.parametrize('share, coils', [(0.9, 1), (0.5, 1), (0.3, 1), (0.22, 1), (0.5, 4)])
def test_background_is_found(share, coils):
    found = rician.background(magnitudes(scans(share), coils=coils), coils)
    assert abs(found.sigma / SIGMA - 1) < max(4 * found.error, 0.02) and share - 0.12 < found.share < share + 0.02


def test_two_kinds_of_tissue_are_not_taken_for_background():
    """A weak signal of 1.6 sigma beside the background."""
    amplitude = np.zeros((4, 1, 64, 64))
    amplitude[..., 32:, :], amplitude[..., :16, :32] = 8, 60
    assert rician.background(magnitudes(amplitude)).sigma == pytest.approx(SIGMA, rel=0.05)


def test_images_without_background_are_told_apart():
    rng = np.random.default_rng(0)
    bright = magnitudes(np.full((4, 1, 64, 64), 60.0))
    masked = magnitudes(scans(0.5))
    masked[masked < 15] = 0
    textured = magnitudes(50 * rng.uniform(size=(4, 1, 64, 64)))
    for images in (bright, masked, textured, np.zeros((2, 1, 8, 8)), np.ones((1, 1, 3, 3))):
        assert rician.background(images) is None
    assert 'no background' in rician.lines(bright)[0]


def test_what_the_user_is_told():
    first, second, third = rician.lines(magnitudes(scans(0.5)))
    assert first.startswith('sigma       ') and 'E[M^2] = 2 sigma^2' in first
    assert 'A/sigma = 3, in 5' in second and '--sigmas=' in third
    assert rician.share_gaussian(magnitudes(scans(0.5)), SIGMA) == pytest.approx(0.5, abs=0.03)
