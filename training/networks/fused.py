# SPDX-License-Identifier: Apache-2.0
"""Normalisation written for a compiler that joins elementwise operations: x [N,C,H,W] is read once for its statistics and once for the
result, in both directions, and nothing of its size is kept beside it.

The gradients are written out because the compiler would otherwise keep results of the forward pass that cost less to compute again."""

from typing import Any

import torch


def packed(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same tensors as parts of one, which the compiler keeps in memory, as that of their gradients, because it has several uses; small
    tensors would otherwise be computed again for every element that they are used for."""
    held = torch.stack(tensors)
    return tuple(held[index] for index in range(len(tensors)))


def pixels(value: torch.Tensor) -> torch.Tensor:
    """[N,C] -> [N,C,1,1]."""
    return value[:, :, None, None]


class ChannelStatistics(torch.autograd.Function):
    """x [N,C,H,W] -> variance and mean of each channel, [N,C]. Sums over pixels alone read channels-last memory in order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        variance, mean = torch.var_mean(x, (2, 3), correction=0)
        ctx.save_for_backward(x, mean)
        return variance, mean

    @staticmethod
    def backward(ctx: Any, of_variance: torch.Tensor, of_mean: torch.Tensor) -> torch.Tensor:
        x, mean = ctx.saved_tensors
        count = x.shape[2] * x.shape[3]
        slope = of_variance * (2 / count)
        slope, term = packed(slope, of_mean / count - slope * mean)
        return pixels(slope) * x + pixels(term)


class Affine(torch.autograd.Function):
    """x factor + term, for factor and term [N,C]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, factor)
        return x * pixels(factor) + pixels(term)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, factor = ctx.saved_tensors
        return gradient * pixels(factor), (gradient * x).sum((2, 3)), gradient.sum((2, 3))


class AffineSiLU(torch.autograd.Function):
    """SiLU of Affine: z / (1 + exp(-z)) of z = x factor + term."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, factor, term)
        z = x * pixels(factor) + pixels(term)
        return z * z.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, factor, term = ctx.saved_tensors
        # In another order than above, so that the compiler does not take it for the same, and keep that.
        z = pixels(term) + pixels(factor) * x
        share = z.sigmoid()
        gradient = gradient * (share * (1 + z * (1 - share)))
        return gradient * pixels(factor), (gradient * x).sum((2, 3)), gradient.sum((2, 3))
