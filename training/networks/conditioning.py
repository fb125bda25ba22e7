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
    """CEP-U (Chen et al. 2024): adds U(-gamma / sqrt(d), gamma / sqrt(d)), of variance gamma^2 / (3d), to each of the d coordinates of the
    label embedding [N, d]."""
    reach = _checked(gamma) / math.sqrt(embedding.shape[1])
    return embedding + reach * (2 * draws.uniform('perturbation', embedding) - 1)


def gaussian(embedding, draws, gamma=1.0, literal=False):
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
