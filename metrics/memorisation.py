# SPDX-License-Identifier: Apache-2.0
"""Memorisation: distances of generated images to training images, compared with those of unseen real images."""

import dataclasses
import math

import numpy as np
import scipy.stats
import torch

from metrics.distances import nearest

QUANTILES = (0.01, 0.05, 0.5)


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """For each of n images: the distances to the two nearest training images, float64 [n] each, and the index of the nearest [n]."""

    first: np.ndarray
    second: np.ndarray
    index: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """first / second, [n] in [0, 1]: near 0 for a copy, near 1 for an image in no particular neighbourhood; 1 for 0 / 0."""
        return np.divide(self.first, self.second, out=np.ones_like(self.first), where=self.second > 0)


def neighbours(images: torch.Tensor | np.ndarray, train: torch.Tensor | np.ndarray, device: torch.device | str | None = None) -> Neighbours:
    """The Neighbours of images [n,D] among train [N,D], features of one detector. Raises ValueError for fewer than two training images."""
    d2, index = nearest(images, train, k=2, device=device)
    distance = d2.sqrt().numpy()
    return Neighbours(distance[:, 0], distance[:, 1], index[:, 0].numpy())


def report(generated: Neighbours, held_out: Neighbours | None = None) -> dict[str, float]:
    """{name: number} about the Neighbours of generated images, and of held-out real images if there are any.

    Distances at QUANTILES, the share of d1/d2 below a third, and compared with held-out images: the ratio of the median distances, the
    share of generated images that are closer than all but 1 % of held-out ones (0.01 if nothing is copied), and copying_z, the
    standardised Mann-Whitney statistic of Meehan et al. 2020 (section 4.1): below -3 generated images are closer to the training
    set than unseen real ones."""
    found = {f'nn_distance_q{100 * q:g}': float(np.quantile(generated.first, q)) for q in QUANTILES}
    found['nn_ratio_median'] = float(np.median(generated.ratio))
    found['nn_ratio_below_third'] = float(np.mean(generated.ratio < 1 / 3))
    if held_out is None:
        return found
    found |= {f'held_out_nn_distance_q{100 * q:g}': float(np.quantile(held_out.first, q)) for q in QUANTILES}
    middle = float(np.median(held_out.first))
    found['nn_distance_over_held_out'] = float(np.median(generated.first)) / middle if middle else math.nan
    found['closer_than_1pct_of_held_out'] = float(np.mean(generated.first < np.quantile(held_out.first, 0.01)))
    found['copying_z'] = mann_whitney_z(generated.first, held_out.first)
    return found


def mann_whitney_z(a: np.ndarray, b: np.ndarray) -> float:
    """Standardised Mann-Whitney U of two samples [n], [m]: standard normal for equal distributions, negative if a tends to be smaller.

    U = #{a > b} + #{a = b} / 2; its variance is corrected for ties."""
    n, m = len(a), len(b)
    ranks = scipy.stats.rankdata(np.concatenate([a, b]))
    u = ranks[:n].sum() - n * (n + 1) / 2
    ties = np.unique(ranks, return_counts=True)[1].astype(float)
    total = n + m
    variance = n * m / 12 * (total + 1 - (ties ** 3 - ties).sum() / (total * max(total - 1, 1)))
    return float((u - n * m / 2) / math.sqrt(variance)) if variance > 0 else 0.0


def closest_pairs(found: Neighbours, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices of generated images, indices of their nearest training images): the `count` smallest ratios d1/d2, smallest first."""
    order = np.argsort(found.ratio, kind='stable')[:count]
    return order, found.index[order]
