# SPDX-License-Identifier: Apache-2.0
"""Noise of magnitude images: the length of a complex value with normal noise of std sigma in both parts, as in magnetic resonance.

M = |A + sigma (e1 + i e2)| has E[M^2] = A^2 + 2 sigma^2, so that a background with A = 0 gives sigma. Where A is several sigma, M is nearly
normal with std sigma around sqrt(A^2 + sigma^2) (Gudbjartsson and Patz 1995), and the program's white noise fits; below, it is neither
symmetric nor of one level. With the root of the sum of squares of several coils, E[M^2] = A^2 + 2 coils sigma^2."""

from typing import NamedTuple

import numpy as np
import scipy.special

# A / sigma above which M is nearly normal: its mean within 0.4 % of sqrt(A^2 + sigma^2), its variance 7 % below sigma^2.
NEARLY_GAUSSIAN = 3.0
SIDE = 4               # background() judges squares of this side
UPPER = 0.99           # share of the background's squares that it keeps
SPREAD = 0.02          # tolerance of its fixed point, relative
ITERATIONS = 100
LEAST_SHARE = 0.02     # of squares that must be background
RATIO = 0.06           # by which E[M^4] / E[M^2]^2 may differ from that of background, 1 + 1 / coils


class Background(NamedTuple):
    """What background() found."""

    sigma: float
    share: float    # of the area that is background
    error: float    # standard error of sigma, relative


def sigma_of_background(magnitudes: np.ndarray, coils: int = 1) -> float:
    """sigma of pixels without signal, of any shape: sqrt(mean M^2 / (2 coils)). Its relative error is 1 / (2 sqrt(coils n))."""
    return float(np.sqrt(np.square(magnitudes, dtype=np.float64).mean() / (2 * coils)))


def background(images: np.ndarray, coils: int = 1) -> Background | None:
    """sigma from the part of images [N,C,H,W] that has no signal, which is found: the darkest squares of pixels whose squared sums have the
    gamma law of background. None where no such part is found, as in images that are cropped to the object or masked with zeros.

    In squares of n pixels, sum M^2 / (2 sigma^2) has the gamma law of shape n coils. The estimate is the fixed point of: sigma^2 from the
    median of the sums below the law's quantile UPPER, from the darkest squares on."""
    images = np.float64(images)
    if min(images.shape[-2:]) < SIDE:
        return None
    height, width = (side // SIDE * SIDE for side in images.shape[-2:])
    squares = images[..., :height, :width].reshape(-1, height // SIDE, SIDE, width // SIDE, SIDE)
    sums = np.square(squares).sum((2, 4)).ravel() / 2
    order = np.argsort(sums)
    sums, fourth = sums[order], (squares ** 4).mean((2, 4)).ravel()[order]
    shape = SIDE * SIDE * coils
    least = int(LEAST_SHARE * len(sums))
    if least < 2 or not sums[least] > 0:
        return None
    quantile = lambda p: scipy.special.gammaincinv(shape, p)
    variance = sums[least // 2] / quantile(0.5)
    for _ in range(ITERATIONS):
        kept = np.searchsorted(sums, variance * quantile(UPPER))
        new = np.median(sums[:kept]) / quantile(UPPER / 2)
        if abs(new / variance - 1) < SPREAD / 100:
            break
        variance = new
    ratio = fourth[:kept].mean() / np.square(sums[:kept].mean() * 2 / SIDE ** 2)
    return _checked(sums, variance, kept, shape, quantile) if abs(ratio * coils / (coils + 1) - 1) < RATIO else None


def _checked(sums, variance, kept, shape, quantile):
    """The Background, if the sums that were kept have its law: their quartiles apart as they must be."""
    low, high = np.quantile(sums[:kept], [0.25, 0.75]) / variance
    wanted = quantile(UPPER * 0.75) - quantile(UPPER * 0.25)
    if kept < max(LEAST_SHARE * len(sums), 2) or not 0.7 < (high - low) / wanted < 1.4:
        return None
    return Background(float(np.sqrt(variance)), float(min(kept / UPPER / len(sums), 1.0)), float(1.25 / np.sqrt(4 * shape * kept)))


def moments(amplitude: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """(mean, variance) of M for amplitudes A (one coil), by the Laguerre polynomial L_1/2."""
    half = np.square(np.float64(amplitude) / sigma) / 4
    # L_1/2(-2h) = exp(-h) ((1 + 2h) I0(h) + 2h I1(h)); ive is exp(-h) I
    mean = sigma * np.sqrt(np.pi / 2) * ((1 + 2 * half) * scipy.special.ive(0, half) + 2 * half * scipy.special.ive(1, half))
    return mean, np.square(amplitude) + 2 * sigma ** 2 - np.square(mean)


def amplitude_of(mean: np.ndarray, sigma: float) -> np.ndarray:
    """A of a denoised value, that is of the mean of M where this is nearly normal: sqrt(mean^2 - sigma^2), 0 below."""
    return np.sqrt(np.clip(np.square(np.float64(mean)) - sigma ** 2, 0, None))


def share_gaussian(images: np.ndarray, sigma: float) -> float:
    """Share of pixels whose noise is nearly normal, judged by their values: M > sqrt(NEARLY_GAUSSIAN^2 + 1) sigma."""
    return float((np.asarray(images) > np.sqrt(NEARLY_GAUSSIAN ** 2 + 1) * sigma).mean())


def lines(images: np.ndarray, coils: int = 1) -> list[str]:
    """What a user has to know about the magnitude images [N,C,H,W], as lines of text."""
    found = background(images, coils)
    if found is None:
        return ['Rician noise: no background without signal was found (at least 2 % of the area, not masked); measure sigma in a scan '
                'without signal, sqrt(mean M^2 / 2)']
    share = share_gaussian(images, found.sigma)
    return [f'sigma       {found.sigma:.4g} +- {found.error * found.sigma:.2g} in stored units, from a background of {found.share:.0%} of '
            'the area, by E[M^2] = 2 sigma^2' + f' of {coils} coils' * (coils > 1),
            f'            nearly Gaussian above A/sigma = {NEARLY_GAUSSIAN:g}, in {share:.0%} of the pixels: there M has std sigma around '
            'sqrt(A^2 + sigma^2)',
            '            below, values are biased upwards (1.25 sigma without signal, where the std is .66 sigma): '
            f'--sigmas={found.sigma:.4g} overstates the noise there']
