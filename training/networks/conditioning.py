# SPDX-License-Identifier: Apache-2.0
"""The embedding of class labels, and its dropout and perturbation in training."""

import math

import torch

from training.networks.layers import Linear
from training.networks.rows import RowLayer


class LabelEmbedding(Linear):
    """Class labels [N, label_dim], one-hot, an all-zero row meaning "no label" -> condition embedding [N, channels].

    dropout: in training, the probability that a row is replaced by "no label" (for classifier-free guidance).
    scale: factor of the labels, sqrt(label_dim) where a one-hot vector should have unit variance.
    Attribute perturb: None, or a piece of CEP that is applied to the embedding in training. It is set from outside, and is neither in
    the state dict nor in the network's configuration, so that a network trained with it is sampled like any other."""

    def __init__(self, label_dim: int, channels: int, dropout: float = 0, scale: float = 1, **init) -> None:
        super().__init__(label_dim, channels, **init)
        self.dropout, self.scale = dropout, scale
        self.perturb = None
        self.draws = RowLayer()

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout:
            labels = labels * self.draws.keep('label', [len(labels), 1], self.dropout, labels.device)
        embedding = super().forward(labels * self.scale)
        return self.perturb(embedding, self.draws) if self.training and self.perturb is not None else embedding


# Condition-embedding perturbation (Chen et al. 2024): c(y) + delta for every image in every training step. It is applied after label
# dropout, also to the embedding of "no label": the paper says "every sample" without exception.
# draws: a rows.RowLayer, which gives each row of the global batch its own random numbers.


def uniform(embedding: torch.Tensor, draws: RowLayer, gamma: float = 1.0) -> torch.Tensor:
    """CEP-U (Chen et al. 2024): adds U(-gamma / sqrt(d), gamma / sqrt(d)), of variance gamma^2 / (3d), to each of the d coordinates of the
    label embedding [N, d]."""
    reach = _checked(gamma) / math.sqrt(embedding.shape[1])
    return embedding + reach * (2 * draws.uniform('perturbation', embedding) - 1)


def gaussian(embedding: torch.Tensor, draws: RowLayer, gamma: float = 1.0, literal: bool = False) -> torch.Tensor:
    """CEP-G (Chen et al. 2024): adds N(0, gamma^2 / d) to each of the d coordinates of the label embedding [N, d], a perturbation of
    norm about gamma for every d.

    literal: use the variance gamma / sqrt(d), which is what the formula in the paper says when it is read literally."""
    std = _checked(gamma) / math.sqrt(embedding.shape[1])
    return embedding + (math.sqrt(std) if literal else std) * draws.normal('perturbation', embedding)


def _checked(gamma):
    if not 0 <= gamma < math.inf:
        raise ValueError(f'gamma={gamma} must be 0 or more')
    return gamma


CEP = {'gaussian': gaussian, 'uniform': uniform}
