# SPDX-License-Identifier: Apache-2.0
"""How much noise loses by being cut off at the ends of the range, as in 8-bit images, and the level before that.

Where a pixel of clean value m carries noise of std s, its clipped value y in [-1,1] has a variance V(m; s) < s^2. The law of m is not
known, but only the mean of V over it is needed, and that is a mean over the values that are seen: there is a function g of them with
E[g(y) | m] = V(m; s) for all m, the solution of a linear system over the 256 values, regularised. It holds to 0.2 % of s^2, and is at
most 1.25 s^2, so that it adds next to no uncertainty."""

import functools

import numpy as np
from scipy.special import ndtr

VALUES = np.arange(256) / 127.5 - 1  # those of 8-bit images
LEVELS = np.geomspace(0.005, 2.0, 48)
RIDGE = 1e-4
SHARE = 1e-3  # of the pixels that lie at an end of the range, from which on images count as clipped
MOST = 0.1    # least share of the variance that is left, for levels that are beyond what can be corrected


def histogram(images: np.ndarray) -> np.ndarray:
    """Shares of the 256 values of 8-bit images among images [N,C,H,W] in [-1,1], float64 [N, 256]; values beyond count as the ends."""
    bins = np.clip(np.rint((images.reshape(len(images), -1) + 1) * 127.5), 0, 255).astype(np.int64)
    counts = np.bincount((bins + 256 * np.arange(len(bins))[:, None]).reshape(-1), minlength=256 * len(bins))
    return counts.reshape(-1, 256) / bins.shape[1]


def share(images: np.ndarray) -> float:
    """The share of the pixels of images that lie at an end of [-1,1]; 0 if any lies beyond: these are not clipped."""
    largest = np.abs(images).max()
    return 0.0 if largest > 1 + 1e-5 else float((np.abs(images) >= 1 - 1e-5).mean())


@functools.lru_cache(maxsize=1)
def table() -> np.ndarray:
    """g of the module's docstring, float64 [256, levels], for each of LEVELS."""
    return np.stack([_function(level) for level in LEVELS], 1)


def _function(level):
    limits = (VALUES[1:] + VALUES[:-1]) / 2
    below = ndtr((limits - VALUES[:, None]) / level)
    law = np.diff(np.pad(below, ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1))))  # [clean value, value seen]
    variance = law @ VALUES ** 2 - (law @ VALUES) ** 2
    return np.linalg.solve(law.T @ law + RIDGE * np.eye(256), law.T @ variance)


def left(shares: np.ndarray, level: float) -> np.ndarray:
    """The share of the variance of noise of a level that clipping leaves, [...], for histograms [..., 256]."""
    variances = shares @ table()
    found = np.interp(np.log(level), np.log(LEVELS), np.arange(len(LEVELS)))
    first = min(int(found), len(LEVELS) - 2)
    parts = variances[..., first:first + 2] / LEVELS[first:first + 2] ** 2
    return np.clip(parts[..., 0] + (found - first) * (parts[..., 1] - parts[..., 0]), MOST, 1.0)


def corrected(levels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Levels [N] before clipping, of levels measured on images with histograms [N, 256]."""
    seen = np.sqrt(np.maximum(np.maximum.accumulate(np.clip(shares @ table(), MOST * LEVELS ** 2, LEVELS ** 2), -1), 1e-12))
    found = [np.exp(np.interp(np.log(max(level, 1e-9)), np.log(row), np.log(LEVELS))) for level, row in zip(levels, seen)]
    return np.where(levels < LEVELS[0], levels, np.reshape(found, np.shape(levels)))
