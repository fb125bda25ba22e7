# SPDX-License-Identifier: Apache-2.0
"""Layers with the published initialisers, and embeddings of noise levels; parameters are cast where they are used."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from torch_utils.magnitude import at_least_float32
from training.networks import fused

HALF = (torch.bfloat16, torch.float16)
THREAD_NUMBERS = 2 ** 15  # PyTorch gives another thread a part of an elementwise operation for each so many numbers


def initial(shape: list[int], mode: str, fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Parameter:
    """A parameter of the given shape, drawn by one of the published initialisers (the caller sets the random state).

    xavier_uniform: variance 2 / (fan_in + fan_out); kaiming_uniform, kaiming_normal: variance 1 / fan_in; each times gain^2."""
    variance = 2 / (fan_in + fan_out) if mode == 'xavier_uniform' else 1 / fan_in
    values = torch.randn(shape) if mode == 'kaiming_normal' else math.sqrt(3) * (2 * torch.rand(shape) - 1)
    return nn.Parameter(values * (gain * math.sqrt(variance)))


class Castable(nn.Module):
    """A layer that uses its parameters in the type of its input.

    In evaluation a half-precision copy of them can be held, so that they are not cast in every call: see hold(). The copies are buffers
    that belong neither to the state dict nor to a layer in training."""

    HELD = ('weight', 'bias')

    def __init__(self) -> None:
        super().__init__()
        for name in self.HELD:
            self.register_buffer(f'held_{name}', None, persistent=False)

    def hold(self, dtype: torch.dtype | None) -> None:
        """Keeps a copy of the parameters in this type for evaluation; None: no copy, as at first. Parameters that change later, other
        than by training, need another call."""
        for name in self.HELD:
            value = getattr(self, name, None)
            wanted = dtype is not None and value is not None and value.dtype != dtype
            setattr(self, f'held_{name}', value.detach().to(dtype) if wanted else None)

    def cast(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """The parameter in this type; None where there is none."""
        held = getattr(self, f'held_{name}')
        if held is not None and held.dtype == dtype and not self.training:
            return held
        value = getattr(self, name)
        return None if value is None else value.to(dtype)


class Linear(Castable):
    """x [..., in_features] -> [..., out_features], computed in x.dtype.

    init_mode, init_weight, init_bias: the initialiser's name, and gains for weight and bias."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init_mode: str = 'kaiming_normal', init_weight: float = 1,
                 init_bias: float = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        fans = {'mode': init_mode, 'fan_in': in_features, 'fan_out': out_features}
        self.weight = initial([out_features, in_features], gain=init_weight, **fans)
        self.bias = initial([out_features], gain=init_bias, **fans) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.cast('weight', x.dtype), self.cast('bias', x.dtype))


class PositionalEmbedding(nn.Module):
    """Noise labels [N] -> [N, num_channels]: cos, then sin, of label (1 / max_positions)^(i / (K - endpoint)).

    K = num_channels / 2 and i = 0 ... K - 1."""

    def __init__(self, num_channels: int, max_positions: int = 10000, endpoint: bool = False) -> None:
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=x.dtype, device=x.device) / (half - self.endpoint)
        return _circle(x, (1 / self.max_positions) ** exponent)


class FourierEmbedding(nn.Module):
    """Noise labels [N] -> [N, num_channels]: cos, then sin, of 2 pi label times fixed random frequencies of std `scale`."""

    def __init__(self, num_channels: int, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer('freqs', torch.randn(num_channels // 2) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _circle(x, 2 * math.pi * self.freqs.to(x.dtype))


def _circle(x, frequencies):
    angles = torch.outer(x, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Conv2d(Castable):
    """Convolution with zero padding that may double (up) or halve (down) the resolution; kernel=0 only resamples.

    resample_filter: 1-D taps of the separable resampling filter. fused_resample: filter after the convolution when going down,
    and do not crop between filter and convolution when going up. Computes in x.dtype."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, bias: bool = True, up: bool = False, down: bool = False,
                 resample_filter: Sequence[float] = (1, 1), fused_resample: bool = False, init_mode: str = 'kaiming_normal',
                 init_weight: float = 1, init_bias: float = 0) -> None:
        super().__init__()
        assert not (up and down), 'a convolution goes up or down, not both'
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.up, self.down, self.fused_resample = up, down, fused_resample
        fans = {'mode': init_mode, 'fan_in': in_channels * kernel ** 2, 'fan_out': out_channels * kernel ** 2}
        self.weight = initial([out_channels, in_channels, kernel, kernel], gain=init_weight, **fans) if kernel else None
        self.bias = initial([out_channels], gain=init_bias, **fans) if kernel and bias else None
        taps = torch.tensor(list(resample_filter), dtype=torch.float32)
        self.register_buffer('resample_filter', torch.outer(taps, taps)[None, None] / taps.sum() ** 2 if up or down else None)
        self.is_box = len(taps) == 2 and resample_filter[0] == resample_filter[1]
        self.margin = (len(taps) - 1) // 2  # how far the filter extends beyond the edge of the image

    def forward(self, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
        """add_bias: False where the caller adds the bias itself (not for fused_resample, which filters it)."""
        bias = self.cast('bias', x.dtype) if add_bias else None
        if not self.kernel:
            return self._enlarge(x, self.margin) if self.up else self._shrink(x, self.margin) if self.down else x
        edge = self.kernel // 2
        if self.up:
            return self._forward_up(x, edge, bias)
        if self.down and self.fused_resample:
            return self._shrink(self._convolve(x, edge + self.margin, bias), 0)
        return self._convolve(self._shrink(x, self.margin) if self.down else x, edge, bias)

    def _forward_up(self, x, edge, bias):
        if self.is_box and self.kernel == 1:
            return self._enlarge(self._convolve(x, 0, bias), 0)  # a 1x1 convolution commutes with repetition, at a quarter of the work
        shared = min(edge, self.margin) if self.fused_resample else 0
        return self._convolve(self._enlarge(x, self.margin - shared), edge - shared, bias)

    def _convolve(self, x, padding, bias):
        return F.conv2d(x, self.cast('weight', x.dtype), bias, padding=padding)

    def _enlarge(self, x, crop):
        if self.is_box:
            return repeat_pixels(x)
        # The factor 4 compensates for the zeros between the pixels.
        kernel = (4 * self.resample_filter).to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, kernel, stride=2, padding=crop, groups=x.shape[1])

    def _shrink(self, x, padding):
        if self.is_box:
            return F.avg_pool2d(x, 2)
        kernel = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])


class GroupNorm(nn.Module):
    """Group normalisation of [N,C,H,W], times weight, plus bias, with statistics in float32 whatever x.dtype is.

    offset [N or 1, C] is added to x before; scale and shift [N or 1, C] give result (1 + scale) + shift; activate: SiLU of that.
    Where is_fused(x) it is written out, because the decomposition of torch's operator copies channels-last input, and so that the compiler
    joins it with what comes before and after it."""

    def __init__(self, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = min(num_groups, num_channels // min_channels_per_group), eps
        if not self.num_groups or num_channels % self.num_groups:
            raise ValueError(f'a layer of {num_channels} channels cannot be normalised in {self.num_groups} groups; choose model_channels '
                             '(--cbase) and channel_mult (--cres) that give multiples of 32, or fewer than 128 channels in multiples of 4')
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor, offset: torch.Tensor | None = None, scale: torch.Tensor | None = None,
                shift: torch.Tensor | None = None, activate: bool = False) -> torch.Tensor:
        if is_fused(x):
            return self._written_out(x, offset, scale, shift, activate)
        pixels = lambda value: value[:, :, None, None].to(x.dtype)
        # The kernels accumulate in float32. The CPU's takes parameters of float32 beside half-precision input; CUDA's does not.
        dtype = x.dtype if x.is_cuda else at_least_float32(x.dtype)
        x = F.group_norm(x if offset is None else x + pixels(offset), self.num_groups, self.weight.to(dtype), self.bias.to(dtype), self.eps)
        x = x if scale is None else torch.addcmul(pixels(shift), x, 1 + pixels(scale))
        return silu(x, self.training) if activate else x

    def _written_out(self, x, offset, scale, shift, activate):
        # All but the two passes over x is done with numbers of channels. The variance of a group is the mean of its channels' variances
        # plus the variance of their means.
        wide = x.to(at_least_float32(x.dtype))
        variance, mean = fused.packed(*fused.ChannelStatistics.apply(wide))  # [N,C]
        mean = mean if offset is None else mean + offset.to(wide.dtype)
        groups = (self.num_groups, -1)
        spread, centre = torch.var_mean(mean.unflatten(1, groups), 2, correction=0, keepdim=True)  # [N, groups, 1]
        factor = (variance.unflatten(1, groups).mean(2, keepdim=True) + spread + self.eps).rsqrt()
        factor, centre = (value.expand_as(mean.unflatten(1, groups)).flatten(1) for value in (factor, centre))
        factor = factor * self.weight.to(wide.dtype)
        term = self.bias.to(wide.dtype) + factor * ((0 if offset is None else offset.to(wide.dtype)) - centre)
        if scale is not None:
            factor, term = factor * (1 + scale), term * (1 + scale) + shift
        factor, term = fused.packed(factor, term)
        return (fused.AffineSiLU if activate else fused.Affine).apply(wide, factor, term).to(x.dtype)


def is_fused(x: torch.Tensor) -> bool:
    """Whether operations on x [N,C,H,W] are written for a compiler that joins them: in compiled code, in half precision or channels-last.

    Elsewhere they are those of the published networks, bit for bit."""
    return torch.compiler.is_compiling() and (x.dtype in HALF or is_channels_last(x))


def repeat_pixels(x: torch.Tensor) -> torch.Tensor:
    """[N,C,H,W] -> [N,C,2H,2W], each pixel four times.

    Compiled it is the copy of a view, whose gradient is a sum; that of F.interpolate would be added up in no certain order."""
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2, mode='nearest')
    n, c, h, w = x.shape
    if is_channels_last(x):
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        return pixels.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)
    return x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(n, c, 2 * h, 2 * w)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether [N,C,H,W] lies in memory as [N,H,W,C], and not also as [N,C,H,W]."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def by_row(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, training: bool) -> torch.Tensor:
    """An elementwise function of [N,...]; in evaluation on the CPU row by row where the result of a row would else depend on its place.

    The threads split a tensor into equal parts, and the elements of a part beyond whole vectors are computed by another exp."""
    if training or not x.is_cpu or torch.compiler.is_compiling() or _in_whole_vectors(x):
        return function(x)
    return torch.stack([function(row) for row in x])


def _in_whole_vectors(x):
    """Whether each thread's part of an elementwise operation is a multiple of 64 numbers, the most that a step of its loop takes."""
    threads = torch.get_num_threads()
    parts = {1, threads, min(threads, -(-x.numel() // THREAD_NUMBERS) or 1)}  # it takes one thread, all, or as many as the size is worth
    return (x.is_contiguous() or is_channels_last(x)) and all(x.numel() % (64 * count) == 0 for count in parts)


def silu(x: torch.Tensor, training: bool) -> torch.Tensor:
    """SiLU of [N,...], by_row()."""
    return by_row(F.silu, x, training)
