# SPDX-License-Identifier: Apache-2.0
"""The embedding of class labels, and its dropout and perturbation in training."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from training.networks.layers import Linear, initial
from training.networks.rows import RowLayer


class Conditioning(nn.Module):
    """What embeddings of class labels [N, label_dim] have in common; an all-zero row means "no label".

    Labels that are embeddings of captions have a label that stands for "no label", that of the empty caption: the buffer null_label
    [label_dim], which replaces all-zero rows. It is None, and not in the state dict, until hold_null_label() is called.
    dropout: in training, the probability that a row is replaced by "no label" (for classifier-free guidance).
    Attribute perturb: None, or a piece of CEP that is applied to the embedding in training. It is set from outside, and is neither in
    the state dict nor in the network's configuration, so that a network trained with it is sampled like any other."""

    def __init__(self, dropout: float = 0) -> None:
        super().__init__()
        self.dropout, self.perturb = dropout, None
        self.draws = RowLayer()
        self.register_buffer('null_label', None)

    def hold_null_label(self, label_dim: int) -> None:
        """Makes the buffer null_label, of zeros, which change nothing until it is filled."""
        self.register_buffer('null_label', torch.zeros(label_dim))

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [N, label_dim] -> embedding [N, channels], without dropout and perturbation."""
        raise NotImplementedError

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        if self.training and self.dropout:
            labels = labels * self.draws.keep('label', [len(labels), 1], self.dropout, labels.device)
        if self.null_label is not None:
            labels = torch.where((labels == 0).all(1, keepdim=True), self.null_label.to(labels.dtype), labels)
        embedding = self.embed(labels)
        return self.perturb(embedding, self.draws) if self.training and self.perturb is not None else embedding


class LabelEmbedding(Conditioning):
    """Linear map of class labels [N, label_dim] -> condition embedding [N, channels]; "no label" gives the bias.

    scale: factor of the labels, sqrt(label_dim) where a one-hot vector should have unit variance. init: of layers.Linear."""

    def __init__(self, label_dim: int, channels: int, dropout: float = 0, scale: float = 1, bias: bool = True,
                 init_mode: str = 'kaiming_normal', init_weight: float = 1, init_bias: float = 0) -> None:
        super().__init__(dropout)
        self.scale = scale
        linear = Linear(label_dim, channels, bias, init_mode, init_weight, init_bias)
        self.weight, self.bias = linear.weight, linear.bias  # the published names have no further level

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """As Conditioning.embed."""
        labels = labels * self.scale
        return F.linear(labels, self.weight.to(labels.dtype), None if self.bias is None else self.bias.to(labels.dtype))


class LabelTable(Conditioning):
    """Table of class embeddings, whose last row stands for "no label": labels [N, label_dim] -> [N, channels].

    One-hot labels select their rows of `weight` [label_dim + null, channels]; labels of any other kind weight them. null=False: no such
    row, and the embedding of "no label" is 0. std: of the initial values, which are normal."""

    def __init__(self, label_dim: int, channels: int, dropout: float = 0, null: bool = True, std: float = 1) -> None:
        super().__init__(dropout)
        self.label_dim, self.null = label_dim, null
        self.weight = initial([label_dim + null, channels], 'kaiming_normal', fan_in=1, fan_out=1, gain=std)

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """As Conditioning.embed."""
        if self.null:
            labels = torch.cat([labels, (labels == 0).all(1, keepdim=True).to(labels.dtype)], dim=1)
        return labels @ self.weight.to(labels.dtype)


# Condition-embedding perturbation (Chen et al. 2024): c(y) + delta for every image in every training step. It is applied after label
# dropout, also to the embedding of "no label": the paper says "every sample" without exception.
# draws: a rows.RowLayer, which gives each row of the global batch its own random numbers.


def uniform(embedding: torch.Tensor, draws: RowLayer, gamma: float = 1.0) -> torch.Tensor:
    """CEP-U (Chen et al. 2024): adds U(-gamma / sqrt(d), gamma / sqrt(d)), of variance gamma^2 / (3d), to each of the d coordinates of the
    label embedding [N, d], or of each of its tokens [N, T, d]."""
    reach = _checked(gamma) / math.sqrt(embedding.shape[-1])
    return embedding + reach * (2 * draws.uniform('perturbation', embedding) - 1)


def gaussian(embedding: torch.Tensor, draws: RowLayer, gamma: float = 1.0, literal: bool = False) -> torch.Tensor:
    """CEP-G (Chen et al. 2024): adds N(0, gamma^2 / d) to each of the d coordinates of the label embedding [N, d], a perturbation of
    norm about gamma for every d.

    literal: use the variance gamma / sqrt(d), which is what the formula in the paper says when it is read literally."""
    std = _checked(gamma) / math.sqrt(embedding.shape[-1])
    return embedding + (math.sqrt(std) if literal else std) * draws.normal('perturbation', embedding)


def _checked(gamma):
    if not 0 <= gamma < math.inf:
        raise ValueError(f'gamma={gamma} must be 0 or more')
    return gamma


CEP = {'gaussian': gaussian, 'uniform': uniform}
