# SPDX-License-Identifier: Apache-2.0
"""The std of white noise in single images. Texture adds to what they read, the more the less noise there is: clean photographs of 32x32
pixels read .02 to .03, and levels below three times that come out high (docs/noise.md). Images that share a level are better pooled
(pooled.py).

Each function takes images [N,C,H,W] and gives (level, standard error) of each, float64 [N]; channels are averaged. The standard error is
that of white noise alone. Raises ValueError for images that are too small."""

import functools

import numpy as np
from scipy import stats

from training.estimation.patches import batches, patches

# Standard error of one image over its level, times the square root of its number of pixels: measured on white noise of 32x32 and 64x64.
SPREAD = {'immerkaer': 1.5, 'mad': 2.4, 'weak': 1.4}
DB2 = np.array([1 + 3 ** 0.5, 3 + 3 ** 0.5, 3 - 3 ** 0.5, 1 - 3 ** 0.5]) / 32 ** 0.5  # Daubechies' low pass of 4 taps
HIGH = DB2 * [-1, 1, -1, 1]
CONFIDENCE, ROUNDS = 0.99, 3  # of the weak patches


def errors(levels: np.ndarray, shape: tuple[int, ...], method: str) -> np.ndarray:
    """Standard errors [N] of levels [N] of images of this shape (C,H,W)."""
    return levels * (SPREAD[method] / np.prod(shape) ** 0.5)


def immerkaer(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """J. Immerkaer, "Fast noise variance estimation" (1996): the mean of |I * [1 -2 1; -2 4 -2; 1 -2 1]|, times sqrt(pi / 2) / 6."""
    _check(images, 3)
    found = [np.sqrt(np.pi / 2) / 6 * np.abs(_second(_second(part.astype(np.float32), 2), 3)).mean((1, 2, 3), dtype=np.float64)
             for part in batches(images)]
    levels = np.concatenate(found)
    return levels, errors(levels, images.shape[1:], 'immerkaer')


def _second(x, axis):
    """Second differences along an axis."""
    return np.diff(x, 2, axis)


def mad(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """D. Donoho, I. Johnstone, "Ideal spatial adaptation by wavelet shrinkage" (1994): the median of |HH|, the finest diagonal details of
    the wavelet db2, over 0.6745. Details that are exactly 0 are left out, and borders are mirrored, as in scikit-image's estimate_sigma."""
    _check(images, 4)
    found = []
    for part in batches(images):
        details = np.abs(_details(_details(part.astype(np.float32), 3), 2)).reshape(*part.shape[:2], -1)
        medians = np.median(details, -1).astype(np.float64)
        for place in np.argwhere((details == 0).any(-1)):
            rest = details[tuple(place)]
            rest = rest[rest > 0]
            medians[tuple(place)] = np.median(rest) if len(rest) else 0.0
        found.append(medians.mean(1) / stats.norm.ppf(0.75))
    levels = np.concatenate(found)
    return levels, errors(levels, images.shape[1:], 'mad')


def _details(x, axis):
    """Details of db2 along an axis of length n: the (n + 3) // 2 sums of HIGH[j] x[2 i + 1 - j], x mirrored beyond its ends."""
    x = np.moveaxis(x, axis, -1)
    padded = np.concatenate([x[..., 2::-1], x, x[..., :-4:-1]], -1)  # x[k] is padded[k + 3]
    count = (x.shape[-1] + 3) // 2
    found = sum(np.float32(tap) * padded[..., 4 - j:4 - j + 2 * count - 1:2] for j, tap in enumerate(HIGH))
    return np.moveaxis(found, -1, axis)


def weak(images: np.ndarray, side: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """X. Liu, M. Tanaka, M. Okutomi, "Single-image noise level estimation for blind denoising" (2013): the least eigenvalue of the
    covariance of those patches whose gradients are as weak as noise of the level found makes them. side: of a patch; 7 in the paper, for
    large images.

    The least eigenvalue of few patches is too small even in white noise, in an image of 32x32 by half: it is divided by what white noise
    gives with as many patches."""
    _check(images, side - 1 + -(-int(2 ** 0.5 * 100 * side) // 100))  # so that there are twice as many patches as they have pixels
    gradient = _gradient(side)
    # The gradients' energy in white noise of variance 1 is nearly gamma distributed, with this mean.
    limit = stats.gamma.ppf(CONFIDENCE, side ** 2 / 2, scale=2 / side ** 2 * np.trace(gradient))
    counts, shares = _shares(side, *images.shape[2:])
    levels = []
    for part in batches(images, 64):
        found = np.ascontiguousarray(patches(part.astype(np.float32), side, 1))
        found = found.reshape(-1, found.shape[2], side ** 2)  # [n C, P, side^2]
        texture = np.einsum('npi,npi->np', found @ gradient.astype(np.float32), found)
        chosen = np.ones(texture.shape, np.float32)
        for _ in range(1 + ROUNDS):
            variance = _least(found, chosen) / np.interp(chosen.sum(1), counts, shares)
            enough = texture < (variance * limit)[:, None]
            chosen = np.where(enough.sum(1, keepdims=True) >= counts[0], enough, chosen > 0).astype(np.float32)
        levels.append(np.sqrt(variance).reshape(len(part), -1).mean(1))
    levels = np.concatenate(levels)
    return levels, errors(levels, images.shape[1:], 'weak')


def _gradient(side):
    """Dh'Dh + Dv'Dv of central differences within a patch [side^2, side^2]."""
    difference = (np.eye(side, k=1) - np.eye(side, k=-1))[1:-1] / 2
    square = difference.T @ difference
    return np.kron(np.eye(side), square) + np.kron(square, np.eye(side))


def _least(found, chosen):
    """The least eigenvalue of the covariance of the chosen ones [n, P] of patches [n, P, d], float64 [n]."""
    count = np.maximum(chosen.sum(1), 2)[:, None]
    mean = np.matmul(chosen[:, None], found)[:, 0] / count
    second = np.matmul((found * chosen[..., None]).transpose(0, 2, 1), found) / count[..., None]
    covariance = (second - mean[:, :, None] * mean[:, None]) * (count / (count - 1))[..., None]
    return np.maximum(np.linalg.eigvalsh(covariance.astype(np.float64))[:, 0], 0)


@functools.lru_cache(maxsize=8)
def _shares(side, height, width):
    """(numbers of patches, least eigenvalues of as many patches of white noise of variance 1), from 48 images."""
    generator = np.random.Generator(np.random.Philox(key=side))
    found = np.ascontiguousarray(patches(generator.standard_normal((48, 1, height, width)).astype(np.float32), side, 1))
    found = found.reshape(48, found.shape[2], side ** 2)
    total = found.shape[1]
    counts = np.unique(np.geomspace(min(2 * side ** 2, total), total, 6).astype(int))
    order = generator.random((48, total)).argsort(1)
    return counts, np.array([_least(found, (order < count).astype(np.float32)).mean() for count in counts])


def _check(images, least):
    if images.ndim != 4 or min(images.shape[2:]) < least:
        raise ValueError(f'images must be [N,C,H,W] of {least}x{least} pixels or more, got the shape {list(images.shape)}')


SINGLE = {'immerkaer': immerkaer, 'mad': mad, 'weak': weak}
DEFAULT = 'immerkaer'
