# SPDX-License-Identifier: Apache-2.0
"""Whether noise is white: its power against frequency, the same everywhere up to what chance explains, and independent channels.

Of coloured noise of spectrum S(f), more noise of the spectrum max S - S(f) makes white noise of the level sqrt(max S)."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats

from training.estimation.patches import batches, coefficients, frequencies

SIGNIFICANCE = 1e-3
TOLERANCE = 1.1        # ratio of the largest power to the least that counts as white, whatever the significance
FLAT_TOLERANCE = 1.35  # the same for spectra of flat patches, in which some texture is left
CORRELATION = 0.05     # of two channels
SIDE, TEXTURE, FEWEST = 8, 5, 200  # of flat patches: their side, the highest frequencies that tell them, their number
MOST = 2 ** 16         # patches


class Whiteness(NamedTuple):
    """A spectrum of noise, and the test of its flatness. Frequencies in cycles per pixel, from 0 to 0.5."""

    frequencies: np.ndarray  # [B, 2], vertical and horizontal, of each band
    power: np.ndarray        # [B]: variance, as white noise of that power would have it
    errors: np.ndarray       # [B], standard errors
    p: float                 # of a flat spectrum
    tolerance: float
    correlation: float = 0.0  # of the two channels that are correlated most
    correlation_p: float = 1.0

    @property
    def ratio(self) -> float:
        """The largest power over the least."""
        return float(self.power.max() / max(self.power.min(), 1e-3 * self.power.max(), 1e-30))

    @property
    def coloured(self) -> bool:
        """Whether the power depends on the frequency, at the level SIGNIFICANCE."""
        return self.p < SIGNIFICANCE and self.ratio > self.tolerance

    @property
    def correlated(self) -> bool:
        """Whether the noise of the channels is correlated, at the same level."""
        return self.correlation_p < SIGNIFICANCE and abs(self.correlation) > CORRELATION

    @property
    def white(self) -> bool:
        """Neither."""
        return not (self.coloured or self.correlated)

    @property
    def largest(self) -> float:
        """sqrt(max S), the level that noise of the spectrum `missing` makes of it."""
        return float(np.sqrt(max(self.power.max(), 0)))

    @property
    def missing(self) -> np.ndarray:
        """max S - S(f), the spectrum of the noise that would have to be added, [B]."""
        return self.power.max() - self.power


def test(frequency: np.ndarray, power: np.ndarray, errors: np.ndarray, tolerance: float = TOLERANCE, correlation: float = 0.0,
         samples: float = 0.0, pairs: int = 0) -> Whiteness:
    """The Whiteness of power [B] with standard errors [B]: chi-squared of its differences from their weighted mean.

    correlation: the largest of `pairs` of channels, each from so many samples; by Fisher's transform, times the number of pairs."""
    weights = 1 / np.square(np.maximum(errors, 1e-12 * np.abs(power).max() + 1e-30))
    mean = np.sum(weights * power) / weights.sum()
    p = float(stats.chi2.sf(np.sum(weights * np.square(power - mean)), len(power) - 1)) if len(power) > 1 else 1.0
    correlation_p = 1.0
    if pairs and samples > 4:
        normal = abs(np.arctanh(np.clip(correlation, -0.999, 0.999))) * np.sqrt(samples - 3)
        correlation_p = min(1.0, 2 * pairs * float(stats.norm.sf(normal)))
    return Whiteness(frequency, power, errors, p, tolerance, correlation, correlation_p)


def of_flat_patches(images: np.ndarray | Iterable[np.ndarray], ends: tuple[float, float] | None = None) -> Whiteness | None:
    """The Whiteness of the noise of images [N,C,H,W], an array or arrays of such, in the upper part of the frequencies: from flat
    patches, those with little power in the lower part. None where there are too few patches. ends: values at which images are clipped;
    patches within 2.5 std of one are left out.

    What it cannot see: noise whose spectrum is flat in the upper part, and colours that texture could make."""
    total = frequencies(SIDE)
    low, high = (total > 0) & (total <= TEXTURE), total > TEXTURE
    found, count = [], 0
    for part in batches(images):
        if min(part.shape[2:]) < SIDE:
            return None
        found.append(coefficients(part, SIDE, SIDE).reshape(-1, SIDE ** 2))
        count += len(found[-1])
        if count > MOST:
            break
    dct = np.concatenate(found) if found else np.zeros([0, SIDE ** 2])
    means, dct = dct[:, 0] / SIDE, np.square(dct)
    if ends is not None:
        dct = dct[np.minimum(means - ends[0], ends[1] - means) > 2.5 * np.sqrt(dct[:, high].mean(1))]
    if len(dct) < FEWEST:
        return None
    texture, rest = dct[:, low].mean(1), dct[:, high].mean(1)
    flat = texture <= np.quantile(texture, 0.1)
    for _ in range(4):
        flat = texture <= max(rest[flat].mean() * stats.chi2.median(low.sum()) / low.sum(), np.partition(texture, FEWEST - 1)[FEWEST - 1])
    chosen = dct[flat][:, high].astype(np.float64)
    chosen /= np.maximum(chosen.mean(1, keepdims=True), 1e-30) / max(chosen.mean(), 1e-30)  # levels may differ
    if not chosen.mean() > 0:
        return None
    groups, where = np.unique(total[high], return_inverse=True)
    # Bands along the diagonal, and for each whether the vertical frequency is higher than the horizontal one.
    vertical, horizontal = (part[high] for part in np.divmod(np.arange(SIDE ** 2), SIDE))
    band = 2 * where.reshape(-1) + (vertical > horizontal)
    bands = [band == number for number in np.unique(band)]
    power = np.array([chosen[:, members].mean() for members in bands])
    errors = np.array([chosen[:, members].mean(1).std(ddof=1) for members in bands]) / np.sqrt(len(chosen))
    centres = np.array([[vertical[members].mean(), horizontal[members].mean()] for members in bands]) / (2 * SIDE)
    return test(centres, power, errors, FLAT_TOLERANCE)
