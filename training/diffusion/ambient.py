# SPDX-License-Identifier: Apache-2.0
"""Closed-form expressions for diffusion of images that already have noise of level sigma_n (Daras et al. 2024); x = x_0 + sigma * noise.

Levels are noise stds in network units: numbers, [N] or [N,1,1,1]; results have the dtype of the images."""

import math

import torch

from torch_utils import misc


def column(level: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A level as [N,1,1,1] (or [1,1,1,1]) with the images' dtype and device, so that each level scales its own image only."""
    return misc.batched(level_on(like.device, level, like.dtype))


def level_on(device: torch.device, level: torch.Tensor | float, dtype: torch.dtype) -> torch.Tensor:
    """A level as a tensor on a device. A number of the host is written there by a kernel, because a copy would make the host wait."""
    on_host = not torch.is_tensor(level) or not level.ndim and level.is_cpu
    if on_host and device.type != 'cpu':
        return torch.full([], float(level), dtype=dtype, device=device)
    return torch.as_tensor(level, dtype=dtype, device=device)


def add_noise(y: torch.Tensor, sigma_n: torch.Tensor | float, sigma: torch.Tensor | float, noise: torch.Tensor) -> torch.Tensor:
    """Adds noise to images, from level sigma_n up to sigma: y + sqrt(sigma^2 - sigma_n^2) noise.

    y, noise: [N,C,H,W]; sigma >= sigma_n. The difference of squares is factored, to avoid cancellation near sigma_n."""
    sigma_n, sigma = column(sigma_n, y), column(sigma, y)
    return y + ((sigma - sigma_n) * (sigma + sigma_n)).sqrt() * noise


def predict_at(D: torch.Tensor | float, x: torch.Tensor, sigma: torch.Tensor | float, level: torch.Tensor | float) -> torch.Tensor:
    """E[x_level | x_sigma] from D = E[x_0 | x_sigma]: (1 - r) D + r x with r = level^2 / sigma^2 (double Tweedie).

    D, x: [N,C,H,W]; 0 <= level <= sigma, sigma > 0. level = 0 returns D and level = sigma returns x, to the bit."""
    sigma, level = column(sigma, x), column(level, x)
    signal = ((sigma - level) / sigma) * ((sigma + level) / sigma)  # 1 - r without cancellation
    return signal * D + (level / sigma).square() * x


def reverse_step(x: torch.Tensor, D: torch.Tensor, sigma: torch.Tensor | float, sigma_next: torch.Tensor | float,
                 noise: torch.Tensor) -> torch.Tensor:
    """One Euler-Maruyama step of the reverse-time VE diffusion from sigma down to sigma_next.

    x' = x + 2 (sigma_next - sigma) (x - D) / sigma + sqrt(2 (sigma - sigma_next) sigma) noise; x, D, noise: [N,C,H,W]."""
    sigma, sigma_next = column(sigma, x), column(sigma_next, x)
    descent = 2 * (sigma - sigma_next).clamp(min=0)  # a step of no length may round below zero
    return x - descent / sigma * (x - D) + (descent * sigma).sqrt() * noise


def bridge_step(x: torch.Tensor, D: torch.Tensor, sigma: torch.Tensor | float, sigma_next: torch.Tensor | float,
                noise: torch.Tensor) -> torch.Tensor:
    """One step from sigma down to sigma_next on the Brownian bridge between x and D, as if x_0 were equal to D.

    x' = D + (sigma_next / sigma)^2 (x - D) + sigma_next sqrt(1 - (sigma_next / sigma)^2) noise; x, D, noise: [N,C,H,W].
    Its mean is that of the reverse process for every step length; its variance lacks that of x_0 given x."""
    sigma, sigma_next = column(sigma, x), column(sigma_next, x)
    keep = sigma_next / sigma
    fresh = (((sigma - sigma_next) / sigma) * ((sigma + sigma_next) / sigma)).clamp(min=0)  # 1 - keep^2 without cancellation
    return D + keep.square() * (x - D) + sigma_next * fresh.sqrt() * noise


def snr_db(sigma: float, sigma_data: float | None = None) -> float:
    """Signal-to-noise ratio of level sigma in decibels, as a float.

    By default the papers' 10 log10(1 + 1 / sigma^2), 14.15 dB at 0.2; with sigma_data 10 log10(sigma_data^2 / sigma^2)."""
    if sigma == 0:
        return math.inf
    return 10 * math.log10(1 + sigma ** -2 if sigma_data is None else (sigma_data / sigma) ** 2)
