# SPDX-License-Identifier: Apache-2.0
"""Magnitude-preserving layers (Karras et al. 2024, appendix B): for inputs of unit variance their outputs have unit variance.

Initial values are given by the caller, so that this file draws nothing."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-4  # added to each norm, so that a row of zeros stays one


def normalize(x: torch.Tensor, dims: int | list[int] | None = None) -> torch.Tensor:
    """x / (EPS + sqrt(mean of x^2 over dims)), by default over all dimensions but the first.

    The mean is taken in float32, or in float64 for float64. Because of EPS a normalised vector has a size slightly below 1, and
    normalising twice differs from once by about 1e-4."""
    return x / _size(x, dims)


def _size(x, dims=None):
    """What normalize divides by, with dimensions of 1 in place of dims."""
    dims = list(range(1, x.ndim)) if dims is None else dims
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=at_least_float32(x.dtype))
    return (norm * math.sqrt(norm.numel() / x.numel()) + EPS).to(x.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def unit_rows(weight: torch.Tensor, dtype: torch.dtype, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
    """gain / sqrt(inputs) times normalize(weight) [out,in,...], of the dtype: maps inputs of unit variance to outputs of variance gain^2
    (equation 47).

    Computed in float32 at least. gain: a number or a 0-dim tensor; its quotient is rounded to its own dtype, as published networks with
    float16 parameters were evaluated."""
    rows = weight.to(at_least_float32(dtype))
    # One factor for each row, so that no further tensor of the weight's size is kept for the backward pass.
    return (rows * (gain / math.sqrt(rows[0].numel()) / _size(rows))).to(dtype)


def force_unit_rows(weights: Iterable[torch.Tensor]) -> None:
    """Forced weight normalisation (equation 66): replaces each weight by normalize(weight), in place and without gradients.

    Done once before each training step, it makes the relative size of the optimizer's steps depend on the learning rate alone."""
    with torch.no_grad():
        for weight in weights:
            weight.div_(_size(weight))


class MPConv(nn.Module):
    """Convolution of [N,in,H,W] (weight [out,in,k,k], odd k, zero padding) or linear map of [...,in] (weight [out,in]) by unit_rows of its
    weight, without bias, in x.dtype. gain: see there."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer('held_rows', None, persistent=False)

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keeps unit_rows of the weight in this type, to be used in evaluation with gain 1 in place of computing them in every call;
        None: not."""
        self.held_rows = None if dtype is None else unit_rows(self.weight.detach(), dtype)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0) -> torch.Tensor:
        held = self.held_rows is not None and self.held_rows.dtype == x.dtype and not self.training and isinstance(gain, float)
        rows = self.held_rows if held else unit_rows(self.weight, x.dtype, gain)
        return F.linear(x, rows) if rows.ndim == 2 else F.conv2d(x, rows, padding=rows.shape[-1] // 2)


class MPFourier(nn.Module):
    """Noise labels [N] -> [N,K]: sqrt(2) cos(label freqs + phases), of unit variance for random phases (equation 75).

    freqs, phases: [K], fixed. Part of the state dict, because a network cannot be had again without them."""

    def __init__(self, freqs: torch.Tensor, phases: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer('freqs', freqs)
        self.register_buffer('phases', phases)

    def forward(self, noise_labels: torch.Tensor) -> torch.Tensor:
        angles = noise_labels.to(at_least_float32(noise_labels.dtype))
        angles = torch.outer(angles, self.freqs.to(angles.dtype)) + self.phases.to(angles.dtype)
        return (math.sqrt(2) * angles.cos()).to(noise_labels.dtype)
