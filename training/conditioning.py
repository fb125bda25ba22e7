# SPDX-License-Identifier: Apache-2.0
"""What a network is told besides the image: embeddings of the noise level, of the class labels and of other label vectors."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def initial(shape, mode, fan_in, fan_out, gain=1.0):
    """A parameter of the shape, drawn by one of the published initialisers (the caller sets the random state).

    xavier_uniform: variance 2 / (fan_in + fan_out); kaiming_uniform, kaiming_normal: variance 1 / fan_in; each times gain^2."""
    variance = 2 / (fan_in + fan_out) if mode == 'xavier_uniform' else 1 / fan_in
    values = torch.randn(shape) if mode == 'kaiming_normal' else math.sqrt(3) * (2 * torch.rand(shape) - 1)
    return nn.Parameter(values * (gain * math.sqrt(variance)))


class Linear(nn.Module):
    """x [..., in_features] -> [..., out_features], computed in x.dtype.

    init_mode, init_weight, init_bias: the initialiser's name, and gains for weight and bias."""

    def __init__(self, in_features, out_features, bias=True, init_mode='kaiming_normal', init_weight=1, init_bias=0):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        fans = {'mode': init_mode, 'fan_in': in_features, 'fan_out': out_features}
        self.weight = initial([out_features, in_features], gain=init_weight, **fans)
        self.bias = initial([out_features], gain=init_bias, **fans) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class PositionalEmbedding(nn.Module):
    """Noise labels [N] -> [N, num_channels]: cos, then sin, of label (1 / max_positions)^(i / (K - endpoint)).

    K = num_channels / 2 and i = 0 ... K - 1."""

    def __init__(self, num_channels, max_positions=10000, endpoint=False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x):
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=x.dtype, device=x.device) / (half - self.endpoint)
        return _circle(x, (1 / self.max_positions) ** exponent)


class FourierEmbedding(nn.Module):
    """Noise labels [N] -> [N, num_channels]: cos, then sin, of 2 pi label times fixed random frequencies of std `scale`."""

    def __init__(self, num_channels, scale=16):
        super().__init__()
        self.register_buffer('freqs', torch.randn(num_channels // 2) * scale)

    def forward(self, x):
        return _circle(x, 2 * math.pi * self.freqs.to(x.dtype))


def _circle(x, frequencies):
    angles = torch.outer(x, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedding(Linear):
    """Class labels [N, label_dim], one-hot, an all-zero row meaning "no label" -> condition embedding [N, channels].

    dropout: in training, the share of rows that are replaced by "no label" (for classifier-free guidance).
    scale: factor on the labels, sqrt(label_dim) where a one-hot vector should have unit variance.
    Attribute perturb: None, or a piece of CEP that training applies to the embedding. It is set from outside, and neither in the
    state dict nor in the network's configuration, so that a network which was trained with it is sampled like any other."""

    def __init__(self, label_dim, channels, dropout=0, scale=1, **init):
        super().__init__(label_dim, channels, **init)
        self.dropout, self.scale = dropout, scale
        self.perturb = None

    def forward(self, labels):
        if self.training and self.dropout:
            labels = labels * (torch.rand([len(labels), 1], device=labels.device) >= self.dropout)
        embedding = super().forward(labels * self.scale)
        return self.perturb(embedding) if self.training and self.perturb is not None else embedding


# Condition-embedding perturbation (Chen et al. 2024): c(y) + delta for every image in every step of the training. It comes after the
# dropout decision, and the embedding of "no label" is perturbed like any other: the paper says "every sample" and excepts none.


def uniform(embedding, gamma=1.0):
    """CEP-U: adds U(-gamma / sqrt(d), gamma / sqrt(d)) to each of the d coordinates of [N, d]; their variance is gamma^2 / (3d)."""
    reach = _checked(gamma) / math.sqrt(embedding.shape[1])
    return embedding + reach * (2 * torch.rand_like(embedding) - 1)


def gaussian(embedding, gamma=1.0, literal=False):
    """CEP-G: adds N(0, gamma^2 / d) to each of the d coordinates of [N, d], so that delta is about gamma long whatever d is.

    literal: the variance gamma / sqrt(d) that the paper's formula has, taken by the letter."""
    std = _checked(gamma) / math.sqrt(embedding.shape[1])
    return embedding + (math.sqrt(std) if literal else std) * torch.randn_like(embedding)


def _checked(gamma):
    if not 0 <= gamma < math.inf:
        raise ValueError(f'gamma={gamma} must be 0 or more')
    return gamma


CEP = {'gaussian': gaussian, 'uniform': uniform}
