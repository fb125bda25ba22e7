# SPDX-License-Identifier: Apache-2.0
"""Noise whose variance depends on the intensity: variance against intensity from flat patches, and the fit variance = a intensity + b.

A. Foi, M. Trimeche, V. Katkovnik, K. Egiazarian, "Practical Poissonian-Gaussian noise modeling and fitting for single-image raw-data"
(2008) give the model; here variance and intensity come from patches of 4x4. Of a patch's 16 orthonormal cosine coefficients the first is
its mean, the nine of the lowest frequencies say whether it is flat, and the mean square of the other six is the variance: in white noise
the three are uncorrelated, so that choosing flat patches does not change what their variance is. Patches are sorted into bins by the mean
of their neighbour, whose noise is independent of theirs: sorted by their own mean, noise in it would make the slope too small."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats

from training.estimation.patches import batches, coefficients, frequencies

SIDE = 4
MOST = 2 ** 20   # patches; more do not make the fit better
BINS, IN_BIN = 24, 2048  # of intensity, with equal numbers of patches: fewer bins (4) where they would have fewer than IN_BIN
FEWEST = 32      # flat patches in a bin
START = 0.05     # share of the patches of a bin that are flat at first
ROUNDS = 4
ALL = 0.45       # share of the patches below the median of noise from which on all count as flat
LOW = 3          # frequencies up to this one tell flat patches


class Curve(NamedTuple):
    """Variance of the noise against intensity."""

    means: np.ndarray      # [B], of the flat patches of each bin
    variances: np.ndarray  # [B]
    errors: np.ndarray     # [B], standard errors of the variances


class PoissonGaussian(NamedTuple):
    """variance = a intensity + b."""

    a: float
    b: float
    uncertainties: tuple[float, float]  # standard errors of a and b
    p: float        # of the hypothesis a = 0
    change: float   # the std at the brightest of the intensities over that at the darkest
    curve: Curve

    @property
    def depends(self) -> bool:
        """Whether the noise depends on the signal: a = 0 is rejected at the level 0.001, and the std changes by more than a tenth."""
        return self.p < 1e-3 and not 1 / 1.1 < self.change < 1.1


def variance_curve(images: np.ndarray | Iterable[np.ndarray], ends: tuple[float, float] | None = None) -> Curve:
    """The Curve of images [N,C,H,W], an array or arrays of such. ends: values at which images are clipped; bins within 2.5 std of one are
    left out. Raises ValueError for too few patches."""
    mean, beside, low, high = _facts(images)
    edges = np.unique(np.quantile(beside, np.linspace(0, 1, max(4, min(BINS, len(beside) // IN_BIN)) + 1)[1:-1]))
    number = np.searchsorted(edges, beside, side='right')
    rows = [_bin(mean[chosen], low[chosen], high[chosen]) for chosen in (number == k for k in range(len(edges) + 1))]
    rows = [row for row in rows if row]
    if ends is not None:
        rows = [row for row in rows if min(row[0] - ends[0], ends[1] - row[0]) > 2.5 * row[1] ** 0.5]
    if len(rows) < 3:
        raise ValueError(f'variance against intensity needs {3 * FEWEST} flat patches of {SIDE}x{SIDE} pixels or more, at three '
                         f'intensities or more; {len(rows)} intensities have that many')
    return Curve(*np.array(rows).T)


def _facts(images):
    """Mean, that of the neighbour, mean square of the low frequencies and of the high ones of patches, float32 [n] each, n <= MOST."""
    low = (frequencies(SIDE) <= LOW) & (frequencies(SIDE) > 0)
    high = frequencies(SIDE) > LOW
    found, count, step = [], 0, 1
    for part in batches(images):
        if min(part.shape[2:]) < SIDE:
            raise ValueError(f'images of {part.shape[3]}x{part.shape[2]} pixels are smaller than a patch of {SIDE}x{SIDE}')
        dct = coefficients(part, SIDE, SIDE)
        columns = part.shape[3] // SIDE
        pairs = np.minimum(np.arange(columns) ^ 1, max(columns - 1, 0))
        pairs = np.where(pairs == np.arange(columns), np.arange(columns) - (columns > 1), pairs)  # the last of an odd number
        mean = dct[..., 0].reshape(-1, columns) / SIDE
        dct = dct.reshape(-1, SIDE * SIDE)
        rows = [mean.reshape(-1), mean[:, pairs].reshape(-1), np.square(dct[:, low]).mean(1), np.square(dct[:, high]).mean(1)]
        found.append(np.stack(rows)[:, ::step])
        count += found[-1].shape[1]
        if count > MOST:  # keep every second one, and take half as many from now on
            found, step = [np.concatenate(found, 1)[:, ::2]], 2 * step
            count = found[0].shape[1]
    if not found:
        raise ValueError('there are no images')
    return np.concatenate(found, 1)


def _bin(mean, low, high):
    """(mean, variance, standard error) of the flat patches of a bin; None for too few.

    At first the flattest twentieth, then those whose low frequencies have less than the median of what noise of the variance found has.
    Where nearly half of the patches have less, there is no texture, and all count: the variance of counts, whose fourth cumulant is not
    0, is a little less where the low frequencies are weak."""
    if len(mean) < FEWEST:
        return None
    flat = low <= np.quantile(low, START)
    count = int(np.count_nonzero((frequencies(SIDE) <= LOW) & (frequencies(SIDE) > 0)))
    for _ in range(ROUNDS):
        variance = high[flat].mean(dtype=np.float64)
        flat = low <= variance * stats.chi2.median(count) / count
        if np.count_nonzero(flat) < FEWEST:
            return None
    if np.count_nonzero(flat) > ALL * len(low):  # there is no texture
        flat = low <= high[flat].mean(dtype=np.float64) * stats.chi2.isf(1e-6, count) / count
    values = high[flat].astype(np.float64)
    if values.mean() == 0:
        return None
    return mean[flat].mean(dtype=np.float64), values.mean(), values.std(ddof=1) / np.sqrt(len(values))


def fit_poisson_gaussian(images: np.ndarray | Iterable[np.ndarray], ends: tuple[float, float] | None = None) -> PoissonGaussian:
    """variance = a intensity + b of images [N,C,H,W] in any units, an array or arrays of such; counts of Poisson give a = 1, b = 0.

    Least squares over bins of intensity, each with the standard error of its variance; where the bins scatter more than their errors
    explain, as texture makes them, the uncertainties grow with it. ends: as for variance_curve(). Raises ValueError for too few patches."""
    curve = variance_curve(images, ends)
    # The error of a variance is proportional to it: the fitted one instead, so that bins that came out low do not get more weight.
    relative, fitted = curve.errors / curve.variances, curve.variances
    design = np.stack([curve.means, np.ones(len(curve.means))], 1)
    for _ in range(5):
        weight = 1 / np.square(relative * np.maximum(fitted, 1e-3 * curve.variances.mean()))
        covariance = np.linalg.pinv((design * weight[:, None]).T @ design)
        a, b = covariance @ (design * weight[:, None]).T @ curve.variances
        fitted = design @ (a, b)
    excess = max(1.0, float(np.sum(weight * np.square(curve.variances - fitted))) / (len(fitted) - 2))
    errors = np.sqrt(np.maximum(np.diag(covariance), 0) * excess)
    p = float(2 * stats.t.sf(abs(a) / errors[0], len(fitted) - 2)) if errors[0] > 0 else 1.0
    first, last = np.maximum(a * np.array([curve.means.min(), curve.means.max()]) + b, 1e-6 * curve.variances.mean())
    return PoissonGaussian(float(a), float(b), (float(errors[0]), float(errors[1])), p, float(np.sqrt(last / first)), curve)
