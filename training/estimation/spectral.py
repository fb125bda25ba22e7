# SPDX-License-Identifier: Apache-2.0
"""Noise levels and spectra from references: clean images of the same law, pairs of exposures of the same scenes, dark frames."""

import numpy as np
import scipy.fft

from training.estimation import whiteness
from training.estimation.estimate import Estimate
from training.estimation.whiteness import Whiteness

BANDS = 5     # of vertical and of horizontal frequencies
FEWEST = 8    # images
BLOCKS = 20   # of images that are left out in turn, for the standard error
BELOW = 0.3   # power of clean images over that of the noise, up to which a band is tested for whiteness


class Spectra:
    """The power of images [n,C,H,W] of a shape (C,H,W) in BANDS x BANDS bands of frequencies, without that of their means.

    Attributes: power, of each image, float32 [N, B]; frequency [B, 2]; size [B], the number of frequencies in each band."""

    def __init__(self, shape: tuple[int, ...]):
        height, width = shape[1:]
        if min(height, width) < 4:
            raise ValueError(f'images of {width}x{height} pixels are too small for a spectrum; 4x4 or more are needed')
        self.shape, rows = tuple(shape), [np.abs(scipy.fft.fftfreq(side)) for side in (height, width)]
        where = [np.minimum((row * 2 * BANDS).astype(int), BANDS - 1) for row in rows]
        band = np.add.outer(where[0] * BANDS, where[1])
        band[0, 0] = -1
        numbers = np.unique(band[band >= 0])
        members = np.stack([(band == number).reshape(-1) for number in numbers], 1)
        self.size = members.sum(0)
        self._mean = (members / self.size).astype(np.float32)
        grids = np.meshgrid(*rows, indexing='ij')
        self.frequency = np.stack([grid.reshape(-1) @ self._mean for grid in grids], 1)
        self._parts, self._cross, self.images = [], np.zeros((shape[0], shape[0])), 0

    def add(self, images: np.ndarray) -> None:
        """Adds images, in network units."""
        waves = scipy.fft.fft2(np.ascontiguousarray(images, np.float32), norm='ortho')
        waves[..., 0, 0] = 0
        waves = waves.reshape(*waves.shape[:2], -1)
        self._parts.append((np.square(waves.real) + np.square(waves.imag)).mean(1) @ self._mean)
        self._cross += np.einsum('ncf,ndf->cd', waves.real, waves.real) + np.einsum('ncf,ndf->cd', waves.imag, waves.imag)
        self.images += len(images)

    @property
    def power(self) -> np.ndarray:
        if self.images < FEWEST:
            raise ValueError(f'{self.images} images are too few for a spectrum; {FEWEST} or more are needed')
        self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    @property
    def correlation(self) -> float:
        """That of the two channels that are correlated most."""
        scale = np.sqrt(np.maximum(np.diag(self._cross), 1e-30))
        found = self._cross / np.outer(scale, scale) - np.eye(len(scale))
        return float(found.flat[np.abs(found).argmax()])


def of_noise(spectra: Spectra, method: str, floor: float = 0.0) -> tuple[Estimate, Whiteness]:
    """(Estimate, Whiteness) of Spectra of noise itself: of (a - b) / sqrt(2) of pairs of exposures, or of dark frames without their mean.

    Each image's spectrum is taken relative to its own level, so that levels that differ are not mistaken for colour."""
    power, channels = spectra.power.astype(np.float64), spectra.shape[0]
    count, values = len(power), spectra.size.sum()
    own = power @ spectra.size / values
    variance = own.mean()
    if not variance > 0:
        raise ValueError('all of it is constant')
    relative = (power / np.maximum(own, 1e-30)[:, None]).mean(0)
    errors = np.sqrt(2 / (count * channels * spectra.size))
    white = whiteness.test(spectra.frequency, relative * variance, errors * variance, correlation=spectra.correlation,
                           samples=count * values, pairs=channels * (channels - 1) // 2)
    error = max(own.std(ddof=1) / np.sqrt(count), variance * np.sqrt(2 / (count * channels * values)))
    return Estimate(float(np.sqrt(variance)), float(error / (2 * np.sqrt(variance))), method, count, floor), white


def against_clean(noisy: Spectra, clean: Spectra) -> tuple[Estimate, Whiteness | None]:
    """(Estimate, Whiteness) of the noise of images, given clean ones of the same law: sigma^2 = sum w (P_noisy - P_clean) / sum w over
    frequencies, w = P_noisy^-2. The floor is what differences of that accuracy give by chance, at three standard errors."""
    first, second = noisy.power.astype(np.float64), clean.power.astype(np.float64)
    weights = noisy.size / np.square(np.maximum(first.mean(0), 1e-15))
    weights /= weights.sum()
    variance = (first.mean(0) - second.mean(0)) @ weights
    error = float(np.hypot(_jackknife(first @ weights), _jackknife(second @ weights)))
    sigma = float(np.sqrt(max(variance, 0)))
    # Near 0 the level's own error is that of its square root.
    uncertainty = error / (2 * sigma) if variance > error else np.sqrt(error)
    estimate = Estimate(sigma, float(uncertainty), 'spectral', len(first), float(np.sqrt(3 * error)))
    tested = second.mean(0) < BELOW * max(variance, 0)
    if estimate.clean or tested.sum() < 3:
        return estimate, None
    errors = np.hypot(_errors(first), _errors(second))
    # The errors of texture are common to many bands; only those of the noise are independent.
    difference = first.mean(0) - second.mean(0)
    return estimate, whiteness.test(noisy.frequency[tested], difference[tested], errors[tested] + 0.05 * second.mean(0)[tested],
                                    whiteness.TOLERANCE)


def _errors(power):
    return power.std(0, ddof=1) / np.sqrt(len(power))


def _jackknife(values):
    """Standard error of the mean of values [N], from blocks that are left out in turn."""
    blocks = [part.mean() for part in np.array_split(values, min(BLOCKS, len(values)))]
    return float(np.std(blocks, ddof=1) / np.sqrt(len(blocks)))
