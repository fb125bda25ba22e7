# SPDX-License-Identifier: Apache-2.0
"""What a network is told of the image: the embedding of its class label, and what training does to it."""

import math

from training.networks.layers import Linear
from training.networks.rows import RowLayer


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
        self.draws = RowLayer()

    def forward(self, labels):
        if self.training and self.dropout:
            labels = labels * self.draws.keep('label', [len(labels), 1], self.dropout, labels.device)
        embedding = super().forward(labels * self.scale)
        return self.perturb(embedding, self.draws) if self.training and self.perturb is not None else embedding


# Condition-embedding perturbation (Chen et al. 2024): c(y) + delta for every image in every step of the training. It comes after the
# dropout decision, and the embedding of "no label" is perturbed like any other: the paper says "every sample" and excepts none.
# draws: a rows.RowLayer, which gives each row of the global batch numbers of its own.


def uniform(embedding, draws, gamma=1.0):
    """CEP-U: adds U(-gamma / sqrt(d), gamma / sqrt(d)) to each of the d coordinates of [N, d]; their variance is gamma^2 / (3d)."""
    reach = _checked(gamma) / math.sqrt(embedding.shape[1])
    return embedding + reach * (2 * draws.uniform('perturbation', embedding) - 1)


def gaussian(embedding, draws, gamma=1.0, literal=False):
    """CEP-G: adds N(0, gamma^2 / d) to each of the d coordinates of [N, d], so that delta is about gamma long whatever d is.

    literal: the variance gamma / sqrt(d) that the paper's formula has, taken by the letter."""
    std = _checked(gamma) / math.sqrt(embedding.shape[1])
    return embedding + (math.sqrt(std) if literal else std) * draws.normal('perturbation', embedding)


def _checked(gamma):
    if not 0 <= gamma < math.inf:
        raise ValueError(f'gamma={gamma} must be 0 or more')
    return gamma


CEP = {'gaussian': gaussian, 'uniform': uniform}
