# SPDX-License-Identifier: Apache-2.0
"""White noise passes the test as often as its level of significance says, coloured and correlated noise does not."""

import numpy as np
import pytest

from tests.support.fields import smooth
from training.estimation import spectral, whiteness


def spectrum(noise):
    spectra = spectral.Spectra(noise.shape[1:])
    spectra.add(noise)
    return spectral.of_noise(spectra, 'pairs')


def test_white_noise_gives_uniform_p():
    rng = np.random.default_rng(0)
    ps = np.array([spectrum(rng.standard_normal((20, 2, 16, 16)))[1].p for _ in range(100)])
    assert (ps < 0.05).mean() < 0.12 and 0.35 < (ps < 0.5).mean() < 0.65


def test_levels_that_differ_are_no_colour():
    rng = np.random.default_rng(1)
    _, white = spectrum(rng.uniform(0.05, 0.4, (60, 1, 1, 1)) * rng.standard_normal((60, 1, 32, 32)))
    assert white.white


def blurred(rng, shape):
    """White noise through [1/4, 1/2, 1/4] along rows: the transfer is cos^2(pi f)."""
    white = rng.standard_normal(shape)
    return white / 2 + (np.roll(white, 1, -1) + np.roll(white, -1, -1)) / 4


def test_coloured_noise_and_what_it_lacks():
    found, white = spectrum(blurred(np.random.default_rng(2), (200, 1, 32, 32)))
    assert white.coloured and white.p < 1e-6 and not white.white
    transfer = np.cos(np.pi * white.frequencies[:, 1]) ** 4
    assert white.power == pytest.approx(transfer, abs=0.07)  # bands are wide
    assert white.power + white.missing == pytest.approx(np.full(len(transfer), white.largest ** 2))
    assert white.largest == pytest.approx(1, abs=0.05)


def test_adding_what_is_missing_makes_it_white():
    """In the bands of the test: noise of spectrum max S - S(f), added to the coloured noise, is white, of the level sqrt(max S)."""
    rng = np.random.default_rng(3)
    noise = blurred(rng, (200, 1, 32, 32))
    transfer = np.cos(np.pi * np.fft.fftfreq(32)) ** 4
    more = np.fft.ifft2(np.fft.fft2(rng.standard_normal(noise.shape)) * np.sqrt(1 - transfer)).real
    found, white = spectrum(noise + more)
    assert white.white and found.sigma == pytest.approx(1, rel=0.01)


def test_correlated_channels():
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((50, 3, 16, 16)) + 0.5 * rng.standard_normal((50, 1, 16, 16))
    _, white = spectrum(noise)
    assert white.correlated and white.correlation == pytest.approx(0.2, abs=0.02) and not white.coloured
    assert not spectrum(rng.standard_normal((50, 3, 16, 16)))[1].correlated


def test_flat_patches():
    rng = np.random.default_rng(5)
    clean = smooth(300)
    white = whiteness.of_flat_patches((clean + 0.1 * rng.standard_normal(clean.shape)).astype(np.float32))
    assert white.white and white.power.mean() == pytest.approx(0.01, rel=0.1)
    assert whiteness.of_flat_patches((clean + 0.1 * blurred(rng, clean.shape)).astype(np.float32)).coloured
    assert whiteness.of_flat_patches(clean[:2]) is None
    assert whiteness.of_flat_patches(np.zeros((500, 1, 4, 4), np.float32)) is None
