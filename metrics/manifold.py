# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, density and coverage: which images lie within the other set's neighbourhoods, in feature space."""

import numpy as np
import torch

from metrics.distances import blocks, nearest

PR_K, DC_K = 3, 5


def precision_recall(real: torch.Tensor | np.ndarray, fake: torch.Tensor | np.ndarray, k: int = PR_K) -> tuple[float, float]:
    """(precision, recall): the share of fake images within some real image's ball, and of real images within some fake image's.

    real [N,D], fake [M,D]: features, tensors or arrays. A ball reaches to the k-th nearest neighbour among the other images of its
    own set, and includes its boundary. Kynkäänniemi et al. 2019, equations 1 to 3. Raises ValueError for k >= N or k >= M."""
    found = manifold_metrics(real, fake, pr_k=k, dc_k=None)
    return found['precision'], found['recall']


def density_coverage(real: torch.Tensor | np.ndarray, fake: torch.Tensor | np.ndarray, k: int = DC_K) -> tuple[float, float]:
    """(density, coverage): the mean number of real balls that contain a fake image, over k; the share of real balls that contain one.

    Arguments as above; these balls exclude their boundaries. Naeem et al. 2020, equations 3 and 4."""
    found = manifold_metrics(real, fake, pr_k=None, dc_k=k)
    return found['density'], found['coverage']


def manifold_metrics(real: torch.Tensor | np.ndarray, fake: torch.Tensor | np.ndarray, pr_k: int | None = PR_K, dc_k: int | None = DC_K,
                     device: torch.device | str | None = None) -> dict[str, float]:
    """{'precision', 'recall', 'density', 'coverage'} in one pass over the pairs; a k of None leaves out its two.

    Works in blocks: apart from the features, memory grows with N + M and not with N M. device: where to compute."""
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    radii = nearest(real, real, max(pr_k or 0, dc_k or 0), exclude_self=True, device=device)[0]  # [N,k], squared
    counts = {'precision': torch.zeros(len(fake), dtype=torch.long), 'recall': torch.zeros(len(real), dtype=torch.long),
              'density': torch.zeros(len(fake), dtype=torch.long), 'coverage': torch.zeros(len(real), dtype=torch.long)}
    fake_radii = nearest(fake, fake, pr_k, exclude_self=True, device=device)[0] if pr_k else None
    for block in blocks(real, fake, device):
        if pr_k:
            inside = block.d2 - block.slack <= radii[block.i, pr_k - 1:pr_k].to(block.d2)
            counts['precision'][block.j] += inside.sum(0).cpu()
            inside = block.d2 - block.slack <= fake_radii[block.j, pr_k - 1].to(block.d2)
            counts['recall'][block.i] += inside.sum(1).cpu()
        if dc_k:
            inside = block.d2 + block.slack < radii[block.i, dc_k - 1:dc_k].to(block.d2)
            counts['density'][block.j] += inside.sum(0).cpu()
            counts['coverage'][block.i] += inside.sum(1).cpu()
    share = lambda name: float((counts[name] > 0).double().mean())
    found = {'precision': share('precision'), 'recall': share('recall')} if pr_k else {}
    return found | ({'density': float(counts['density'].double().mean()) / dc_k, 'coverage': share('coverage')} if dc_k else {})
