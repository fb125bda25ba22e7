# SPDX-License-Identifier: Apache-2.0
"""What one step looks at, and the denoiser's answer to it: shared by every term of an objective."""

from typing import NamedTuple

import torch

from training import ambient


class Batch(NamedTuple):
    """What one step looks at; levels are noise stds in network units, sigma >= sigma_n."""

    images: torch.Tensor  # [N,C,H,W], each already at level sigma_n
    sigma_n: torch.Tensor  # [N,1,1,1], 0 for clean images
    sigma: torch.Tensor  # [N,1,1,1], the level to denoise from; pairs.py chose it
    noise: torch.Tensor  # [N,C,H,W], unit normal, fresh in every step
    class_labels: torch.Tensor | None = None  # [N,label_dim]
    augment_labels: torch.Tensor | None = None  # [N,augment_dim]
    raw_idx: torch.Tensor | None = None  # [N] int64, which images these are
    factor: torch.Tensor | None = None  # [N], importance weights, where the levels come from timesteps.py


class Evaluation(NamedTuple):
    """The images at level sigma, and the denoiser's answer; shared by the terms of an objective."""

    x: torch.Tensor  # [N,C,H,W]
    D: torch.Tensor  # [N,C,H,W], estimates E[x_0 | x]
    rest: torch.Tensor | None = None  # [N,K,H,W], what else the network gives, where it was asked for it


def evaluate(net, batch, outputs=False):
    """Takes the images up from sigma_n to sigma and calls the denoiser, once. outputs: for all that it gives, see Precond.outputs()."""
    x = ambient.add_noise(batch.images, batch.sigma_n, batch.sigma, batch.noise)
    labels = dict(class_labels=batch.class_labels, augment_labels=batch.augment_labels)
    return Evaluation(x, *net.outputs(x, batch.sigma, **labels)) if outputs else Evaluation(x, net(x, batch.sigma, **labels))
