# SPDX-License-Identifier: Apache-2.0
"""Up to which noise level images that are right in their details only may be used: crops, magnified images, another domain.

A denoiser of little noise needs few pixels around the one that it predicts: images whose patches of side k are like those of clean images
may be used up to the level at which k pixels are enough. Ambient Omni (Daras et al. 2025, arXiv 2506.10038) measured these levels with
networks for photographs, and tells patches apart by classifiers; here they are told apart by their means and covariances."""

from typing import NamedTuple

import numpy as np
import torch

from torch_utils import misc
from training.annotation import spectral
from training.annotation.sets import in_chunks
from training.data.dataset import ImageDataset

SIDES = (2, 3, 4, 6, 8, 10, 12, 16, 20, 22)
PATCHES = 8   # of each size from each image
# The level up to which patches of a side are enough, of photographs (published with Ambient Omni's code).
ENOUGH = {1: 0.01, 4: 0.05, 8: 0.15, 16: 0.2, 24: 0.35, 32: 0.55, 48: 0.7, 64: 1.0}


class Details(NamedTuple):
    """limit: the level up to which images are used: inf: all, 0: none. sides: of the patches that were compared; curves: of each."""

    limit: float
    sides: list[int]
    curves: list[spectral.Curve]


def enough(side: int) -> float:
    """The level up to which patches of this side are enough, interpolated in the logarithms of both."""
    return float(np.exp(np.interp(np.log(side), np.log(list(ENOUGH)), np.log(list(ENOUGH.values())))))


def sides_of(shape: tuple[int, int, int]) -> list[int]:
    """The sides of patches of images [C,H,W] whose covariances are compared; the last is that of whole square images, if they are small."""
    channels, least = shape[0], min(shape[1:])
    found = [side for side in SIDES if side < least and channels * side ** 2 <= spectral.FULL]
    return [*found, least] if channels * least ** 2 <= spectral.FULL else found


def cut(images: torch.Tensor, side: int, seed: int, first: int) -> torch.Tensor:
    """PATCHES patches of each image [N,C,H,W], at places keyed by seed, side and first: [N PATCHES, C, side, side]."""
    source = misc.generator(seed, 'annotate', 'patches', side, first)
    places = [torch.randint(size - side + 1, [len(images), PATCHES], generator=source) for size in images.shape[2:]]
    rows, columns = (place.reshape(-1, 1) + torch.arange(side) for place in places)
    which = torch.arange(len(images)).repeat_interleave(PATCHES)
    return images[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def moments_of(dataset: ImageDataset, rows: np.ndarray, sides: list[int], seed: int, title: str) -> list[spectral.Moments]:
    """The Moments of patches of each side; patches of one image are in one group of the jackknife."""
    found = [spectral.Moments(spectral.Basis(), dataset.image_shape[0] * side ** 2) for side in sides]
    done = 0
    for _, images in in_chunks(dataset, rows, title):
        for side, moments in zip(sides, found):
            moments.add(cut(images, side, seed, done), done, PATCHES)
        done += len(images)
    return found


def details(clean: list[spectral.Moments], data: list[spectral.Moments], shape: tuple[int, int, int], levels: np.ndarray, threshold: float,
            noise: float = 0.0) -> Details:
    """The Details of two sets of images [C,H,W] by the Moments of their patches, of sides_of(shape); noise: std that the data carry.

    The largest patches count that are alike at all levels, with all smaller ones; whole images without a limit."""
    sides = sides_of(shape)
    curves = [spectral.curve([spectral.Comparison(*pair)], levels, threshold, noise) for pair in zip(clean, data)]
    different = [side for side, found in zip(sides, curves) if found.limit > 0]
    fine = [side for side in sides if not different or side < different[0]]
    whole = bool(fine) and fine[-1] == shape[1] == shape[2]
    return Details(np.inf if whole else enough(fine[-1]) if fine else 0.0, sides, curves)
