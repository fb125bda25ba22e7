# SPDX-License-Identifier: Apache-2.0
"""Inception score: how confident the classifier is about each image, and how evenly the images spread over its classes."""

import numpy as np
import torch


def inception_score(logits: torch.Tensor | np.ndarray, splits: int = 10, seed: int | None = 0) -> tuple[float, float]:
    """(mean, standard deviation over splits) of exp(E KL(p(y|x) || p(y))), p = softmax(logits).

    logits: [N,K], tensor or array. The images are shuffled (seed None: not) and cut into `splits` parts, each with its own p(y).
    Salimans et al. 2016, section 4. Raises ValueError for more splits than images."""
    sums = split_sums(logits, split_of(len(logits), splits, seed), splits)
    values = scores(sums)
    return float(values.mean()), float(values.std(unbiased=False))


def split_of(count: int, splits: int, seed: int | None = 0) -> torch.Tensor:
    """The split that each of `count` images falls into, int64 [count]."""
    if not 1 <= splits <= count:
        raise ValueError(f'{splits} splits requested, but there are only {count} images')
    order = np.arange(count) if seed is None else np.random.RandomState(seed).permutation(count)
    found = np.empty(count, np.int64)
    for i in range(splits):
        found[order[i * count // splits:(i + 1) * count // splits]] = i
    return torch.from_numpy(found)


def split_sums(logits: torch.Tensor | np.ndarray, where: torch.Tensor, splits: int) -> torch.Tensor:
    """The sums that a score is computed from, float64 [splits, K+2]: over a split's images of p(y|x), of sum p log p, and of one.

    logits [n,K] and where [n] (the split of each): of all images, or of a part of them; the sums of parts add up."""
    logits = torch.as_tensor(logits)
    sums = torch.zeros(splits, logits.shape[1] + 2, dtype=torch.float64)
    for rows, split in zip(logits.split(1024), where.split(1024)):
        p = rows.double().softmax(dim=1)
        entropy = torch.special.entr(p).sum(1, keepdim=True)  # - p log p, 0 at p = 0
        sums.index_add_(0, split, torch.cat([p, -entropy, torch.ones_like(entropy)], dim=1).to(sums))
    return sums


def scores(sums: torch.Tensor) -> torch.Tensor:
    """The score of each split, float64 [splits]: E sum p log p(y|x) - sum p(y) log p(y), exponentiated."""
    count = sums[:, -1]
    return (sums[:, -2] / count + torch.special.entr(sums[:, :-2] / count[:, None]).sum(1)).exp()
