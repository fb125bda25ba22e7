# SPDX-License-Identifier: Apache-2.0
"""Restoration: the reverse process from noisy images, each from its own level sigma_n down, and the posterior mean in one evaluation."""

from collections.abc import Callable

import torch

from torch_utils import misc
from training.sampling import steppers
from training.sampling.generate import ConditionedDenoiser

LEVELS_RHO = 7.0  # curvature of EDM's levels
LOWEST = 0.002  # EDM's lowest level above 0, for networks that know no lower limit


def row_levels(net: Callable, sigma_n: torch.Tensor, end: torch.Tensor | float = 0.0, num_steps: int = 18,
               rho: float = LEVELS_RHO) -> torch.Tensor:
    """Levels that fall from sigma_n to `end` in each row: float64 [T+1,N,1,1,1], on the device of sigma_n.

    sigma_n: [N], above 0. end: 0, or [N] or a number above 0 and at most sigma_n. Evenly spaced in sigma^(1/rho), as EDM's; to 0 they go
    through the network's sigma_min, or LOWEST if that is higher. Levels between the two are rounded to those of a network that has
    only some.
    Raises ValueError for levels that do not fall."""
    sigma_n = sigma_n.double()
    end = torch.as_tensor(end, dtype=torch.float64, device=sigma_n.device).expand_as(sigma_n)
    to_zero = not end.any()
    misc.require(num_steps >= 1, f'the number of steps must be 1 or more, got {num_steps}')
    misc.require(bool((sigma_n > 0).all() and sigma_n.isfinite().all()), 'sigma_n must be above 0')
    misc.require(to_zero or bool((end > 0).all() and (end <= sigma_n).all()), 'the last levels must be above 0 and at most sigma_n, or 0')
    low = sigma_n.clamp(max=max(net.sigma_min, LOWEST)) if to_zero else end
    position = torch.linspace(0, 1, num_steps if to_zero else num_steps + 1, dtype=torch.float64, device=sigma_n.device)[:, None]
    levels = ((1 - position) * sigma_n ** (1 / rho) + position * low ** (1 / rho)) ** rho
    levels[0] = sigma_n
    if not to_zero:
        levels[-1] = end
    inner = levels[1:] if to_zero else levels[1:-1]
    inner.copy_(torch.minimum(ConditionedDenoiser(net).round_sigma(inner), sigma_n))
    levels = torch.cat([levels, torch.zeros_like(levels[:1])]) if to_zero else levels
    return levels[:, :, None, None, None]


@torch.no_grad()
def posterior_mean(net: Callable, y: torch.Tensor, sigma_n: torch.Tensor, labels: torch.Tensor | None = None,
                   rows: int | None = None) -> torch.Tensor:
    """E[x_0 | y] in one evaluation, float64 [N,C,H,W]. y: images of level sigma_n [N], in network units; those of level 0 stay as they are.

    labels, rows: as of ConditionedDenoiser."""
    noisy = (sigma_n > 0).reshape(-1, 1, 1, 1)
    level = torch.where(noisy, misc.batched(sigma_n), 1)
    return torch.where(noisy, ConditionedDenoiser(net, labels, rows)(y, level).double(), y.double())


@torch.no_grad()
def restore(net: Callable, y: torch.Tensor, sigma_n: torch.Tensor, end: torch.Tensor | float = 0.0, *, stepper: Callable = steppers.heun,
            num_steps: int = 18, randn_like: Callable | None = None, labels: torch.Tensor | None = None,
            rows: int | None = None) -> torch.Tensor:
    """The reverse process from y at its level sigma_n down to `end`: images of level `end`, float64 [N,C,H,W].

    y: [N,C,H,W] in network units. sigma_n: [N], above 0. end: as of row_levels. stepper: a piece of STEPPERS with its keys bound: heun and
    the like follow the probability-flow ODE, which is one image for each y; dpmpp_2m_sde and sde the reverse SDE, a draw of
    p(x_end | y). randn_like(x): noise of the step, such as SeededDraws(...).randn_like; needed for the latter.
    labels, rows: as of posterior_mean. Raises ValueError for levels that do not fall."""
    levels = row_levels(net, sigma_n, end, num_steps)
    return stepper(ConditionedDenoiser(net, labels, rows), y.double(), levels, randn_like)
