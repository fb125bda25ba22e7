# SPDX-License-Identifier: Apache-2.0
"""Patches of images and their discrete cosine transform, in which white noise of variance v has the variance v in every coefficient."""

from collections.abc import Iterable, Iterator

import numpy as np

CHUNK = 256  # images per batch


def batches(images: np.ndarray | Iterable[np.ndarray], size: int = CHUNK) -> Iterator[np.ndarray]:
    """Parts [n,C,H,W] of an array of images, or the arrays that an iterable gives. Raises ValueError for other shapes."""
    parts = ([images[first:first + size] for first in range(0, len(images), size)] if isinstance(images, np.ndarray) else images)
    for part in parts:
        if part.ndim != 4:
            raise ValueError(f'images must be [N,C,H,W], got the shape {list(part.shape)}')
        yield part


def cosines(side: int) -> np.ndarray:
    """The orthonormal DCT-II of `side` values, float64 [side, side]: a row per frequency."""
    rows = np.cos(np.pi * np.arange(side)[:, None] * (np.arange(side) + 0.5) / side) * np.sqrt(2 / side)
    rows[0] /= np.sqrt(2)
    return rows


def patches(images: np.ndarray, side: int, stride: int) -> np.ndarray:
    """All patches [n, C, P, side, side] of images [n,C,H,W] at distances of `stride`; a view."""
    found = np.lib.stride_tricks.sliding_window_view(images, (side, side), (2, 3))[:, :, ::stride, ::stride]
    return found.reshape(*images.shape[:2], -1, side, side)


def coefficients(images: np.ndarray, side: int, stride: int) -> np.ndarray:
    """The DCT of all patches, float32 [n, C, P, side * side], frequencies in rows (vertical) and columns."""
    found = patches(np.ascontiguousarray(images, np.float32), side, stride)
    transform = np.kron(cosines(side), cosines(side)).astype(np.float32)
    return found.reshape(*found.shape[:3], side * side) @ transform.T


def frequencies(side: int) -> np.ndarray:
    """The sum of vertical and horizontal frequency of each coefficient, int [side * side]: 0 is the mean, small numbers are texture."""
    return np.add.outer(np.arange(side), np.arange(side)).reshape(-1)
