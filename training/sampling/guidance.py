# SPDX-License-Identifier: Apache-2.0
"""Guidance: a denoiser extrapolated away from a worse one, D_0 + w (D_1 - D_0), at all noise levels or those of an interval, in all
channels or the first ones."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from torch_utils import misc

LEVELS = 1000  # indices t of IDDPM's cosine schedule, in which an interval may be given
OFFSET = 0.008  # s of that schedule


class Guidance(NamedTuple):
    """The guidance of generate_images; the default is none."""

    weight: float = 1.0  # w; 1 is the conditional network alone
    interval: tuple = (0.0, math.inf)  # (lo, hi]: the levels sigma at which it acts
    net: object = None  # D_0 of autoguidance, with the same labels if it takes any; None: D_0 is D_1's network without labels
    channels: int | None = None  # only the first so many channels of D are guided, the others are those of D_1; None: all are


class Guided:
    """(x, sigma) -> D_0 + w (D_1 - D_0) inside the interval, and D_1 from a single call outside of it.

    denoise, guide: (x, sigma) -> D_1, D_0. D_0 is the unconditional prediction in Ho & Salimans 2022, with w = 1 + their w, and a worse
    network in Karras et al. 2024a. interval: (lo, hi] in sigma, Kynkäänniemi et al. 2024. Where a stepper announces with begin_step the
    level at which its step starts, that level decides for all evaluations of the step; otherwise that of each call does. With w = 1 the
    guide is not called. channels: the others are those of D_1, as DiT is sampled in Peebles & Xie 2023, with 3 of 4 (per channel D is
    linear in the predicted noise, so guiding one is guiding the other)."""

    def __init__(self, denoise: Callable, guide: Callable, weight: float, interval: tuple[float, float] = (0.0, math.inf),
                 channels: int | None = None) -> None:
        self.denoise, self.guide, self.weight, self.interval, self.channels = denoise, guide, weight, interval, channels
        self._start = None

    def begin_step(self, sigma: torch.Tensor) -> None:
        """The level, before churn, at which the next calls' step starts."""
        self._start = sigma

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self._led(x, sigma, self.denoise(x, sigma))

    def outputs(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple:
        """(the guided D, what else D_1's network gives)."""
        D_1, rest = self.denoise.outputs(x, sigma)
        return self._led(x, sigma, D_1), rest

    @property
    def gives_variance(self) -> bool:
        """Whether D_1's network gives the variance of a sampling step."""
        return self.denoise.gives_variance

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """D_1's nearest level."""
        return self.denoise.round_sigma(sigma)

    def _led(self, x, sigma, D_1):
        low, high = self.interval
        if self.weight == 1 or not low < (sigma if self._start is None else self._start) <= high:
            return D_1
        D_1, D_0 = D_1.to(x.dtype), self.guide(x, sigma).to(x.dtype)
        led = D_0 + self.weight * (D_1 - D_0)
        return led if self.channels is None else torch.cat([led[:, :self.channels], D_1[:, self.channels:]], dim=1)


def check(net: Callable, guidance: Guidance) -> None:
    """Raises ValueError where a network cannot be guided in this way."""
    weight, guide = guidance.weight, guidance.net
    if not 0 <= weight < math.inf:
        raise ValueError(f'the weight must be 0 or more, got {weight:g}')
    if guidance.channels is not None and not 1 <= guidance.channels <= net.img_channels:
        raise ValueError(f'--guidance-channels={guidance.channels} must be between 1 and the {net.img_channels} of the network')
    if guide is None:
        if weight != 1 and not net.label_dim:
            raise ValueError('the network is unconditional, so it has no label to drop; guide with a worse network instead (--gnet)')
        return
    for what, of in (('images', _shape), ('label_dim', lambda net: net.label_dim), ('units', lambda net: getattr(net, 'units', None))):
        unconditional = what == 'label_dim' and not guide.label_dim  # it guides a conditional network in Karras et al. 2024
        if of(guide) != of(net) and not unconditional:
            raise ValueError(f'the guiding network has {what} {of(guide)}, and the network has {of(net)}; they must be equal')


def _shape(net):
    return [net.img_channels, *misc.height_width(net.img_resolution)]


def interval(text: str) -> tuple[float, float]:
    """"lo,hi" in sigma, or "t:lo,hi" in indices 0 to 999, as (lo, hi) in sigma. Raises ValueError for anything else.

    t counts the levels of IDDPM's cosine schedule with T = 1000, from the lowest noise up; a level is in t:lo,hi where its nearest
    index is one of lo ... hi. So t:0,999 is every level."""
    kind, _, bounds = text.rpartition(':')
    try:
        low, high = (float(bound) for bound in bounds.split(','))
    except ValueError:
        low = high = math.nan
    if kind == '' and 0 <= low < high:
        return low, high
    if kind == 't' and 0 <= low <= high < LEVELS and low.is_integer() and high.is_integer():
        return (level_at(low - 0.5) if low > 0 else 0.0), (level_at(high + 0.5) if high < LEVELS - 1 else math.inf)
    raise ValueError(f'give lo,hi with 0 <= lo < hi in sigma, or t:lo,hi with whole numbers 0 <= lo <= hi <= {LEVELS - 1}')


def level_at(t: float) -> float:
    """sigma at the index t (fractions too): alpha_bar = cos^2(pi/2 (u + s) / (1 + s)) over its value at u = 0, u = (t + 1) / T."""
    share = _angle_cosine((t + 1) / LEVELS) / _angle_cosine(0.0)  # sqrt(alpha_bar)
    return math.sqrt(max(1 / share ** 2 - 1, 0.0))


def index_at(sigma: float) -> int:
    """The index t of 0 ... 999 whose level is nearest to sigma, along the schedule."""
    angle = math.acos(_angle_cosine(0.0) / math.sqrt(1 + sigma ** 2)) if sigma < math.inf else math.pi / 2
    t = ((1 + OFFSET) * angle * 2 / math.pi - OFFSET) * LEVELS - 1
    return min(max(round(t), 0), LEVELS - 1)


def _angle_cosine(u):
    return math.cos(math.pi / 2 * (u + OFFSET) / (1 + OFFSET))


def describe(guidance: Guidance) -> str:
    """One line: the weight, the interval in sigma and in t, and the channels where not all are guided."""
    low, high = guidance.interval
    where = 'at all levels' if (low, high) == (0, math.inf) else (
        f'where {low:.4g} < sigma <= {high:.4g} (t = {index_at(low)} to {index_at(high)} of 0 to {LEVELS - 1})')
    count = guidance.channels
    channels = '' if count is None else f', in the first {count} channels' if count > 1 else ', in the first channel'
    return f'guidance {guidance.weight:g} {where}{channels}'
