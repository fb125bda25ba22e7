# SPDX-License-Identifier: Apache-2.0
"""Schedules: falling noise levels that end in 0, float64 [T+1] on the CPU; and curves sigma(t), in whose time t a solver may step.

A schedule is called as (num_steps, *, sigma_min, sigma_max, and its own keys); T = 1 goes from its highest level directly to 0."""

import math

import torch

from torch_utils import misc
from training.diffusion.discrete import build_diffusion, kept_steps
from training.diffusion.noise import IDDPMLevels

SLACK = 1e-5  # relative: a network's levels are float32 numbers, and published ones were computed in float32
EPSILON_S = 1e-3  # the time at which VP sampling reaches its lowest level
VP_MIN, VP_MAX = (math.sqrt(math.expm1(19.9 / 2 * t ** 2 + 0.1 * t)) for t in (EPSILON_S, 1))  # beta_d = 19.9, beta_min = 0.1


class Linear:
    """sigma(t) = t, as in EDM."""

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The level at time t; tensors of any shape, as in rate() and time()."""
        return t

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        """d sigma / d t at t > 0."""
        return torch.ones_like(t)

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The t with sigma(t) = sigma >= 0."""
        return sigma


class VE:
    """sigma(t) = sqrt(t), variance-exploding."""

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t.sqrt()

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        return 0.5 / t.sqrt()

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma.square()


class VP:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), variance-preserving.

    beta_d and beta_min follow from sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max; by default they are 19.9 and 0.1.
    Raises ValueError for ranges without such a rising curve (Karras et al. 2022, appendix C.1)."""

    def __init__(self, sigma_min: float = VP_MIN, sigma_max: float = VP_MAX, epsilon_s: float = EPSILON_S) -> None:
        check_range(sigma_min, sigma_max)
        misc.require(0 < epsilon_s < 1, f'epsilon_s must be between 0 and 1, got {epsilon_s:g}')
        low, high = math.log1p(sigma_min ** 2), math.log1p(sigma_max ** 2)
        self.beta_d = 2 * (high - low / epsilon_s) / (1 - epsilon_s)
        self.beta_min = high - self.beta_d / 2
        misc.require(self.beta_d + self.beta_min > 0, f'no VP schedule rises from sigma_min={sigma_min:g} at t={epsilon_s:g} to '
                     f'sigma_max={sigma_max:g} at t=1; lower sigma_min or raise sigma_max')

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return (t * (self.beta_d / 2 * t + self.beta_min)).expm1().sqrt()

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) * (sigma + 1 / sigma) / 2

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        height = sigma.square().log1p()
        root = (self.beta_min ** 2 + 2 * self.beta_d * height).sqrt()
        # A fitted beta_min may be negative; the curve is then 0 at two times, of which t = 0 is meant.
        return torch.where(sigma > 0, 2 * height / (self.beta_min + root), 0.0)


def edm(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """EDM's levels: sigma^(1/rho) falls linearly from sigma_max^(1/rho) to sigma_min^(1/rho) (Karras et al. 2022, equation 5).

    num_steps: T >= 1. Returns float64 [T+1]. Raises ValueError for values that give no falling levels."""
    check_range(sigma_min, sigma_max)
    misc.require(0 < rho < math.inf, f'rho must be positive, got {rho:g}')
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _ending_in_zero((first + _ramp(num_steps) * (last - first)) ** rho)


def log_linear(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> torch.Tensor:
    """Levels in geometric progression: ln sigma falls linearly, and every step divides sigma by the same factor."""
    check_range(sigma_min, sigma_max)
    return _ending_in_zero(sigma_max * (sigma_min / sigma_max) ** _ramp(num_steps))


def ve(num_steps: int, *, sigma_min: float = 0.02, sigma_max: float = 100.0) -> torch.Tensor:
    """The levels of VE sampling: log_linear over the range of the VE models (Song et al. 2021; Karras et al. 2022, table 1)."""
    return log_linear(num_steps, sigma_min=sigma_min, sigma_max=sigma_max)


def vp(num_steps: int, *, sigma_min: float = VP_MIN, sigma_max: float = VP_MAX, epsilon_s: float = EPSILON_S) -> torch.Tensor:
    """The levels of VP sampling: sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), with t falling linearly from 1 to epsilon_s
    (Karras et al. 2022, table 1)."""
    return _ending_in_zero(VP(sigma_min, sigma_max, epsilon_s).sigma(1 + _ramp(num_steps) * (epsilon_s - 1)))


def cosine(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> torch.Tensor:
    """The cosine schedule alpha = cos(pi t / 2) in continuous time: sigma = tan(pi t / 2), with t falling linearly (Salimans & Ho 2022)."""
    check_range(sigma_min, sigma_max)
    first, last = math.atan(sigma_max), math.atan(sigma_min)
    return _ending_in_zero((first + _ramp(num_steps) * (last - first)).tan())


def iddpm(num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 81.0, C_1: float = 0.001, C_2: float = 0.008,
          M: int = 1000) -> torch.Tensor:
    """Evenly spaced levels among those of IDDPM's M levels that lie between sigma_max and sigma_min (Karras et al. 2022, appendix C.3.4).

    Also raises ValueError where fewer than num_steps of them lie in that range."""
    check_range(sigma_min, sigma_max)
    levels = IDDPMLevels(M, C_1, C_2).levels.flip(0)
    levels = levels[_within(levels, sigma_min, sigma_max)]
    misc.require(num_steps <= len(levels), f'{len(levels)} of the {M} levels of iddpm lie between sigma_min={sigma_min:g} and '
                 f'sigma_max={sigma_max:g}, which is not enough for {num_steps} steps')
    places = (len(levels) - 1) / max(num_steps - 1, 1) * _count(num_steps)
    return _ending_in_zero(levels[places.round().long()])


def respaced(num_steps: int, *, diffusion: str = 'cosine:steps=1000', spacing: str = 'even', sigma_min: float = 0.0,
             sigma_max: float = math.inf) -> torch.Tensor:
    """A subset of the timesteps of a discrete diffusion: evenly spaced (Nichol & Dhariwal 2021), or with spacing=ddim every k-th one (Song
    et al. 2020).

    Only timesteps whose level lies between sigma_min and sigma_max count. diffusion: a piece of discrete.DIFFUSIONS, with | in place of
    commas. spacing: even, from the first to the last, or ddim, with a constant whole stride from the first; see discrete.kept_steps."""
    misc.require(spacing in ('even', 'ddim'), f'spacing={spacing}: choose from even, ddim')
    levels = build_diffusion(diffusion.replace('|', ','), 'diffusion').levels
    levels = levels[_within(levels, sigma_min, sigma_max)]
    misc.require(num_steps >= 1, f'the number of steps must be 1 or more, got {num_steps}')
    misc.require(len(levels) > 0, f'no level of {diffusion} lies between sigma_min={sigma_min:g} and sigma_max={sigma_max:g}')
    if num_steps == 1:
        return _ending_in_zero(levels[-1:])  # the highest level, whereas published lists of one step keep the lowest
    kept = kept_steps(len(levels), f'{"ddim" if spacing == "ddim" else ""}{num_steps}')
    return _ending_in_zero(levels[kept].flip(0))


def explicit(num_steps: int | None, *, sigmas: str | float | list | tuple | None = None, sigma_min: float = 0.0,
             sigma_max: float = math.inf) -> torch.Tensor:
    """Levels listed one by one, such as sigmas=80|10|1|0.1, with the final 0 left out.

    sigmas: text as on the command line, or numbers. num_steps: None or their count. Raises ValueError where they do not fall or leave the
    range [sigma_min, sigma_max]."""
    items = sigmas.split('|') if isinstance(sigmas, str) else sigmas if isinstance(sigmas, (list, tuple)) else [sigmas]
    try:
        levels = torch.tensor([float(item) for item in items], dtype=torch.float64)
    except (TypeError, ValueError):
        levels = torch.zeros(0, dtype=torch.float64)
    falling = len(levels) > 0 and bool((levels[1:] < levels[:-1]).all()) and 0 < levels[-1] <= levels[0] < math.inf
    misc.require(falling, f'sigmas={sigmas} must be positive, falling numbers separated by |, such as 80|10|1|0.1')
    misc.require(bool(_within(levels, sigma_min, sigma_max).all()),
                 f'sigmas={sigmas} must lie between sigma_min={sigma_min:g} and sigma_max={sigma_max:g}')
    misc.require(num_steps in (None, len(levels)), f'sigmas={sigmas} are {len(levels)} steps, but {num_steps} are asked for')
    return _ending_in_zero(levels)


def truncate(sigmas: torch.Tensor, stop_sigma: float) -> torch.Tensor:
    """Truncated sampling: the levels from stop_sigma up, followed by 0, so that a sampler ends with D at the last of them.

    The published --stop_variance is stop_sigma^2. Where no level is below stop_sigma, except 0 itself, the result is `sigmas`.
    Raises ValueError where every level is below stop_sigma."""
    if stop_sigma == 0:
        return sigmas
    misc.require(0 < stop_sigma <= sigmas[0], f'stop_sigma={stop_sigma:g} must be between 0 and the highest level, {sigmas[0]:g}')
    kept = sigmas[sigmas >= stop_sigma]
    return sigmas if len(kept) == len(sigmas) else _ending_in_zero(kept)


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError where the levels cannot fall from sigma_max to sigma_min."""
    misc.require(0 < sigma_min < sigma_max < math.inf, f'0 < sigma_min < sigma_max is needed, got sigma_min={sigma_min:g}, '
                 f'sigma_max={sigma_max:g}')


def _within(levels, sigma_min, sigma_max):
    """Which levels lie in the range, up to rounding."""
    return (levels >= sigma_min * (1 - SLACK)) & (levels <= sigma_max * (1 + SLACK))


def _count(num_steps):
    misc.require(num_steps >= 1, f'the number of steps must be 1 or more, got {num_steps}')
    return torch.arange(num_steps, dtype=torch.float64)


def _ramp(num_steps):
    """T evenly spaced numbers from 0 to 1; for T = 1 just 0."""
    return _count(num_steps) / max(num_steps - 1, 1)


def _ending_in_zero(levels):
    return torch.cat([levels, levels.new_zeros(1)])


SCHEDULES = {'cosine': cosine, 'edm': edm, 'explicit': explicit, 'iddpm': iddpm, 'log_linear': log_linear,
             'respaced': respaced, 've': ve, 'vp': vp}
TIMES = {'linear': Linear, 've': VE, 'vp': VP}
