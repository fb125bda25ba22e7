# SPDX-License-Identifier: Apache-2.0
"""The noise levels at which an image may be used: sigma > buffer * sigma_n, and (sigma > sigma_min or sigma <= sigma_max).

An image without sigma_min has no lower limit of this kind, one without sigma_max no upper limit; with both, their union is allowed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from training.diffusion.noise import TINY, NoiseDistribution


class Limits(NamedTuple):
    """Usable levels of n images, as two intervals each: bar < sigma <= top, or sigma > floor. Tensors float64 [n].

    top, floor: None if no image has such a limit, which keeps the plain case fast; inf for an image without one. The lower interval is
    empty if top <= bar; no image has floor below its top."""

    bar: torch.Tensor
    top: torch.Tensor | None = None
    floor: torch.Tensor | None = None

    def of(self, index: torch.Tensor) -> 'Limits':
        """The Limits of the images `index`, int64 [k]."""
        return Limits(*(None if limit is None else limit[index] for limit in self))

    def empty(self) -> torch.Tensor:
        """bool [n]: which images cannot be used at any level."""
        return self.bar >= (torch.full_like(self.bar, math.inf) if self.top is None else self.top)

    def usable(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """bool [n]: whether each image may be used at its entry of sigma, [n] or one number."""
        if self.top is None:
            return sigma > self.bar
        fine = (sigma > self.bar) & (sigma <= self.top)
        return fine if self.floor is None else fine | (sigma > self.floor)

    def chance(self, noise: NoiseDistribution) -> torch.Tensor:
        """P(sigma is usable) of each image under the distribution p, [n]."""
        if self.top is None:
            return noise.sf(self.bar)
        chance = noise.mass(self.bar, self.top)
        return chance if self.floor is None else chance + noise.sf(self.floor)

    def draw(self, noise: NoiseDistribution, u: torch.Tensor) -> torch.Tensor:
        """p(sigma | sigma is usable) by inverse cdf, for uniforms u in (0, 1): [n], decreasing in u. Undefined where chance() is 0."""
        if self.top is None:
            return noise.above(self.bar, u)
        if self.floor is None:
            return noise.between(self.bar, self.top, u)
        beyond, within = noise.sf(self.floor), noise.mass(self.bar, self.top)
        place = u * (beyond + within)
        upper = noise.above(self.floor, (place / beyond).clamp(TINY, 1))
        # Without an upper part u itself is used: a product followed by a quotient would not reproduce it bit by bit.
        lower = noise.between(self.bar, self.top, torch.where(beyond > 0, ((place - beyond) / within).clamp(TINY, 1), u))
        return torch.where((beyond > 0) & (place <= beyond), upper, lower)

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high] of all images' intervals, concatenated, without empty ones: [m] each."""
        low, high = self.bar, torch.full_like(self.bar, math.inf) if self.top is None else self.top
        if self.floor is not None:
            low, high = torch.cat([low, self.floor]), torch.cat([high, torch.full_like(self.floor, math.inf)])
        return low[low < high], high[low < high]

    def coverage(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The intervals between neighbouring limits in which some image may be used: (low, high, number of such images), [k], ascending."""
        low, high = (limit.sort().values for limit in self.intervals())
        edges = torch.cat([low, high]).unique()
        count = torch.searchsorted(low, edges[:-1], right=True) - torch.searchsorted(high, edges[:-1], right=True)
        return edges[:-1][count > 0], edges[1:][count > 0], count[count > 0]

    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The union of the intervals of coverage(), as intervals (low, high] that do not touch: (low, high), each [k], ascending."""
        low, high, _ = self.coverage()
        apart = low[1:] != high[:-1]
        edge = apart.new_ones(1)
        return low[torch.cat([edge, apart])[:len(low)]], high[torch.cat([apart, edge])[:len(high)]]


def usable_levels(levels: Sequence[float] | np.ndarray | torch.Tensor, buffer: float = 1.0,
                  lower: Sequence[float] | np.ndarray | torch.Tensor | None = None,
                  upper: Sequence[float] | np.ndarray | torch.Tensor | None = None) -> Limits:
    """The Limits of images with these sigma_n, sigma_min (`lower`; 0: none) and sigma_max (`upper`; inf: none), array-likes [n].

    sigma_min = inf without a sigma_max: never usable. Raises UserError for invalid values."""
    levels = _column(levels)
    if not (len(levels) and levels.isfinite().all() and (levels >= 0).all()):
        raise UserError('sigma_n must be finite and 0 or more for each image, and there must be at least one image')
    top = _column(np.full(len(levels), math.inf) if upper is None else upper)
    if not (len(top) == len(levels) and (top > 0).all()):
        raise UserError(f'sigma_max must be above 0 for each of the {len(levels)} images (inf for no limit)')
    least = _column(np.zeros(len(levels)) if lower is None else lower)
    if not (len(least) == len(levels) and (least >= 0).all()):
        raise UserError(f'sigma_min must be 0 or more for each of the {len(levels)} images (0 for no limit)')
    bar, infinite = levels * buffer, torch.full_like(levels, math.inf)
    floor = torch.maximum(bar, least)
    # There is one interval if no sigma_max is given, if the two limits together allow all levels, or if bar >= sigma_max.
    single = (least > 0) & (top.isinf() | (top <= bar))
    whole = (least > 0) & ~single & (least <= top)
    bar, top = torch.where(single, floor, bar), torch.where(single | whole, infinite, top)
    floor = torch.where((least > 0) & ~single & ~whole, floor, infinite)
    if top.isinf().all():  # then there is no floor left either
        return Limits(bar)
    return Limits(bar, top, None if floor.isinf().all() else floor)


def _column(values):
    return torch.as_tensor(np.array(values, np.float64)).reshape(-1)
