# SPDX-License-Identifier: Apache-2.0
"""Kernel distances: KID, the unbiased squared maximum mean discrepancy under a cubic kernel; CMMD, the biased one under a Gaussian."""

import numpy as np
import torch

from metrics.distances import blocks

BLOCK = 4096  # rows and columns of the kernel matrix in memory at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # as published


def kernel_distance(features_a: torch.Tensor | np.ndarray, features_b: torch.Tensor | np.ndarray, subsets: int = 100,
                    subset_size: int = 1000, seed: int = 0, device: torch.device | str | None = None) -> tuple[float, float]:
    """(mean, standard deviation over subsets) of squared_mmd between random subsets, each drawn without repetition.

    features: [N,D] and [M,D], tensors or arrays. Both sets' subsets are drawn alternately from one generator seeded with `seed`.
    device: where to compute. Bińkowski et al. 2018, section 4. Raises ValueError if a set is smaller than a subset."""
    sets = [torch.as_tensor(features) for features in (features_a, features_b)]
    fewest = min(len(features) for features in sets)
    if fewest < subset_size:
        raise ValueError(f'subsets of {subset_size} images requested, but a set has only {fewest}')
    rng = np.random.RandomState(seed)
    draw = lambda features: features[torch.from_numpy(rng.choice(len(features), subset_size, replace=False))]
    values = [squared_mmd(draw(sets[0]), draw(sets[1]), device) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray, device: torch.device | str | None = None) -> float:
    """Unbiased estimate of the squared MMD between the laws of a [N,D] and b [M,D]; it may be negative. Float.

    E k(a,a') + E k(b,b') - 2 E k(a,b), k(x,y) = (x.y / D + 1)^3, without pairs of an image with itself; in float64.
    Gretton et al. 2012, equation 3; Bińkowski et al. 2018. Raises ValueError for sets of fewer than two images."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f'features of shapes {list(a.shape)} and {list(b.shape)}, expected two or more rows of one length')
    within = [(_kernel_sum(x, x, device) - _diagonal_sum(x, device)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return within[0] + within[1] - 2 * _kernel_sum(a, b, device) / (len(a) * len(b))


def _kernel(products, dim):
    return (products / dim + 1) ** 3


def _kernel_sum(a, b, device):
    """Sum of k over all pairs."""
    total = 0.0
    for x in a.split(BLOCK):
        x = x.to(device or a.device, torch.float64)
        for y in b.split(BLOCK):
            total += float(_kernel(x @ y.to(x).T, a.shape[1]).sum())
    return total


def _diagonal_sum(a, device):
    """Sum of k(x, x)."""
    return sum(float(_kernel(x.to(device or a.device, torch.float64).square().sum(1), a.shape[1]).sum()) for x in a.split(BLOCK))


def gaussian_distance(a: torch.Tensor | np.ndarray, b: torch.Tensor | np.ndarray, sigma: float = CMMD_SIGMA, scale: float = CMMD_SCALE,
                      device: torch.device | str | None = None) -> float:
    """CMMD: the squared MMD of a [N,D] and b [M,D] under k(x,y) = exp(-|x - y|^2 / (2 sigma^2)), times `scale`. Float.

    The biased estimate as published: all pairs count, including an image with itself, so that it is never negative and falls as N and M
    grow. The features are expected to be CLIP embeddings of norm 1. Jayasumana et al. 2024, equation 4. In float64."""
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if min(len(a), len(b)) < 1 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f'features of shapes {list(a.shape)} and {list(b.shape)}, expected rows of one length')
    # Sums of 1 - k, which is small for large sigma, keep the digits that a difference of means near 1 would lose.
    mean = lambda x, y: _expm1_sum(x, y, sigma, device) / (len(x) * len(y))
    return scale * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def _expm1_sum(a, b, sigma, device):
    """Sum of k - 1 over all pairs."""
    return sum(float(torch.expm1(-block.d2 / (2 * sigma ** 2)).sum()) for block in blocks(a, b, device))
