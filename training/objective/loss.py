# SPDX-License-Identifier: Apache-2.0
"""Objectives: a batch of images, each at its own noise level sigma_n, and a denoiser -> named loss terms, one number an image.

Terms are sums over C, H, W; whoever calls takes the mean over the batch. Everything runs in the dtype of the images."""

from typing import NamedTuple

import torch

from training.diffusion import ambient
from training.objective import penalty
from training.objective.timesteps import Uniform


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


class AmbientLoss(torch.nn.Module):
    """Denoising score matching against the image as it is, at its own level sigma_n (Daras et al. 2024, 2025).

    weight: (sigma) -> w; penalty: (error, sigma) -> rho. With sigma_n = 0 this is the plain EDM, VP or VE loss.
    inverse: multiply by (1 - r)^-2, r = sigma_n^2 / sigma^2, so that w weighs the squared x_0 error of noisy images as it does that of
    clean ones (Ambient Omni, Daras et al. 2025). It is without bound near sigma_n: pairs.with_inverse_weight keeps a distance."""

    def __init__(self, weight, penalty=penalty.squared, inverse=False):
        super().__init__()
        self.weight, self.penalty, self.inverse = weight, penalty, inverse

    def forward(self, net, batch, randn=None, seen=None):
        """{'denoise': [N]}, and 'log_weight' where the weight is learned.

        seen: the Evaluation, where the caller has it already. This term draws nothing from randn."""
        x, D, _ = seen or evaluate(net, batch)
        y_hat = ambient.predict_at(D, x, batch.sigma, level=batch.sigma_n)  # E[y | x]
        sigma = ambient.column(batch.sigma, x)
        loss = self.weight(sigma) * self.penalty(y_hat - batch.images, sigma)
        if self.inverse:
            signal = ambient.predict_at(1, 0 * sigma, sigma, level=batch.sigma_n)  # 1 - r
            loss = loss * torch.where(signal > 0, signal.square().reciprocal(), 0)  # a pair at sigma_n says nothing of x_0
        terms = {'denoise': loss.flatten(1).sum(1)}
        if hasattr(self.weight, 'offset'):  # a learned weight lambda / exp(u) comes with a term u, once for every cost in the sum
            terms['log_weight'] = self.weight.offset(sigma).expand_as(loss).flatten(1).sum(1)
        return terms


class Objective(torch.nn.Module):
    """Named terms that share one evaluation of the denoiser; parameters of the terms are parameters of the objective.

    The first term is what the run trains on clean images, and is judged by. timesteps: a piece of timesteps.TIMESTEPS over its levels;
    whoever calls lets it redraw() a batch before, and update() after the last micro-batch of a step."""

    def __init__(self, terms, timesteps=None):
        super().__init__()
        self.terms, self.timesteps = torch.nn.ModuleDict(terms), timesteps or Uniform()

    def forward(self, net, batch, randn):
        """{term name: [N]} of all terms; nothing is summed here, so that each can be reported by itself."""
        seen = evaluate(net, batch, outputs='bound' in self.terms)
        values = {}
        for term in self.terms.values():
            values |= term(net, batch, randn, seen)
        return self.timesteps.weigh(values, batch)
