# SPDX-License-Identifier: Apache-2.0
"""Small denoisers and batches that the tests of objectives share."""

import torch

from torch_utils import misc
from training.data.batches import Batch


class Mixture:
    """E[x_0 | x] of the mixture of isotropic Gaussians that the records were made with."""

    def __init__(self, golden):
        self.weights, self.means, self.stds = (golden[f'gmm.{name}'] for name in ('weights', 'means', 'stds'))

    def __call__(self, x, sigma, class_labels=None, augment_labels=None):
        variance = self.stds ** 2 + misc.batched(sigma)[:, 0, 0] ** 2  # [N,K]
        offset = x[:, None] - self.means  # [N,K,C,H,W]
        log_share = self.weights.log() - x[0].numel() / 2 * variance.log() - offset.square().flatten(2).sum(2) / (2 * variance)
        pull = (log_share.softmax(1), self.stds ** 2 / variance)
        share, shrink = (t[..., None, None, None] for t in pull)
        return (share * (self.means + shrink * offset)).sum(1)


class Linear(torch.nn.Module):
    """D = a x, and a note of every call."""

    def __init__(self, a=0.3):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.calls = []

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        self.calls.append((len(x), misc.batched(sigma).flatten().tolist(), class_labels, augment_labels))
        return self.a.to(x.dtype) * x


def unit(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(n=8, dtype=torch.float64, sigma_n=0.2, labels=False, shape=(2, 4, 4)):
    """A batch whose levels lie between sigma_n and 2."""
    column = lambda t: t.to(dtype).reshape(-1, 1, 1, 1)
    return Batch(images=unit(n, *shape, seed=1).to(dtype), sigma_n=column(torch.full([n], sigma_n)),
                 sigma=column(torch.linspace(0.3, 2.0, n)), noise=unit(n, *shape, seed=2).to(dtype),
                 class_labels=torch.eye(n, 10)[:n] if labels else None, augment_labels=unit(n, 9, seed=3) if labels else None,
                 raw_idx=torch.arange(n))
