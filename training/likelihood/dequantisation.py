# SPDX-License-Identifier: Apache-2.0
"""Dequantisation, from the density of the flow to the probability of 8-bit values: uniform noise, or Gaussian noise and a decoder."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from training.diffusion.discrete import Diffusion, mean_bits
from training.likelihood.bound import step_terms
from training.likelihood.flow import log_likelihood

GREY = 127.5  # grey levels per unit of [-1,1]


def uniform(x0: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Grey levels k / 127.5 - 1 spread uniformly over [k - 1/2, k + 1/2], the interval that rounds to k; u in [0,1), of x0's shape."""
    return x0 + (u - 0.5) / GREY


class GreyLevels(NamedTuple):
    """The result of grey_levels for each image, [N] each, bits per dimension in float64: total = flow + decoder - noise."""

    total: torch.Tensor        # upper bound of -log2 P(x_0)
    flow: torch.Tensor         # -log2 p_ode(x_1; sigma_1)
    decoder: torch.Tensor      # -log2 P_dec(x_0 | x_1): the variational bound's term of the first step
    noise: torch.Tensor        # -log2 q(x_1 | x_0), on average the entropy log2(2 pi e sigma_1^2) / 2
    evaluations: torch.Tensor  # int64, calls of the denoiser by the flow


def grey_levels(net: Callable, diffusion: Diffusion, x0: torch.Tensor, noise: torch.Tensor, *, class_labels: torch.Tensor | None = None,
                variance: str = 'large', **flow: Any) -> GreyLevels:
    """Upper bound on the bits of grey levels: the probability flow above the level sigma_1, and the first step of the variational bound
    below it.

    The model is that of the bound, P(x_0) = int p(x_1) P_dec(x_0 | x_1) dx_1, except that p(x_1) is the density of the
    probability flow instead of the chain of reverse steps. With q(x_1 | x_0) = N(x_0, sigma_1^2), Jensen's inequality gives
    (variational dequantisation, Ho et al. 2019, equation 13)

        -log P(x_0) <= E_q[-log p_ode(x_1; sigma_1) - log P_dec(x_0 | x_1) + log q(x_1 | x_0)],

    whose last term has the mean -H(q) = -(D/2) log(2 pi e sigma_1^2). The drawn value is used instead: |noise|^2 / 2 also occurs in
    -log P_dec where the data vary by more than sigma_1, and in -log p_ode where they vary by less, so that most of it cancels.

    diffusion: a Diffusion, of which sigma_1 is the lowest level and P_dec the first step, with the `variance` of variational_bound.
    x0: [N,C,H,W] grey levels k / 127.5 - 1. noise: standard normal like x0. flow: probes, sigma_max and the other options of
    log_likelihood, except sigma_min. Returns GreyLevels; raises ValueError as log_likelihood does."""
    sigma = float(diffusion.levels[0])
    x0, noise = x0.double(), noise.to(x0).double()
    x1 = x0 + sigma * noise
    decoder = step_terms(net, diffusion, x0, x1, 0, class_labels, variance)[0]
    found = log_likelihood(net, x1, class_labels=class_labels, sigma_min=sigma, **flow)
    of_flow = -found.log_p / (x0[0].numel() * math.log(2))
    of_noise = mean_bits(noise.square() / 2) + math.log2(2 * math.pi * sigma ** 2) / 2
    return GreyLevels(of_flow + decoder - of_noise, of_flow, decoder, of_noise, found.evaluations)
