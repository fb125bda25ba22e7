# SPDX-License-Identifier: Apache-2.0
"""Sampling combines a schedule and a stepper: a stepper takes x down a sequence of falling noise levels, by calling a denoiser.

A stepper is called as (denoise, x, sigmas, randn_like, *, stop_sigma, and its own keys) and returns x at sigmas[-1]:
denoise(x, sigma) -> D = E[x_0 | x] in any float dtype, for a 0-dim float64 sigma on the CPU. Where it has them, its methods
round_sigma(sigma), outputs(x, sigma) and begin_step(sigma), at the level where each step starts, are called.
x: [N,C,H,W], float64: x_0 + sigma * noise at sigma = sigmas[0]. sigmas: float64 [T+1] on the CPU, falling, as a rule to 0; or
[T+1,N,1,1,1] beside x, levels of each image's own, which reach 0 at the same step (restore.py). Then sigma has shape [N,1,1,1].
randn_like(x) -> standard normal noise. stop_sigma drops the levels below it (see schedules.truncate). The step to 0 arrives at D,
except in other coordinates of euler and heun.
Keys out of range raise ValueError, and unknown names UserError, before anything is evaluated: check() does only that."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from torch_utils import registry
from training.diffusion import ambient
from training.diffusion.schedules import TIMES, truncate

MAX_CHURN = math.sqrt(2) - 1  # a step at most doubles the variance
VARIANCES = ('auto', 'learned', 'small', 'large')


class Churn(NamedTuple):
    """Noise that a step adds before it goes down (Karras et al. 2022, algorithm 2)."""

    S_churn: float
    S_min: float
    S_max: float
    S_noise: float


def churn_factor(sigma: torch.Tensor | float, num_steps: int, S_churn: float, S_min: float = 0.0,
                 S_max: float = math.inf) -> torch.Tensor:
    """gamma: the relative increase of the noise level before a step goes down (Karras et al. 2022, algorithm 2, line 4)."""
    return min(S_churn / num_steps, MAX_CHURN) * torch.as_tensor((sigma >= S_min) & (sigma <= S_max)).double()


def unscaled(sigma: torch.Tensor) -> tuple:
    """s = 1 and d ln s / d sigma = 0: the state is x itself."""
    return 1.0, 0.0


def variance_preserving(sigma: torch.Tensor) -> tuple:
    """s = 1 / sqrt(1 + sigma^2) and d ln s / d sigma: the state keeps about unit variance."""
    variance = 1 + sigma.square()
    return variance.rsqrt(), -sigma / variance


class Flow:
    """The probability-flow ODE of the state s(t) x at level sigma(t) (Karras et al. 2022, equation 4).

    schedule: a piece of schedules.TIMES, or its name. scaling: a function of SCALINGS, or its name."""

    def __init__(self, denoise: Callable, schedule: str | object, scaling: str | Callable) -> None:
        named = lambda piece, pieces, slot: registry.build(piece, pieces, slot) if isinstance(piece, str) else piece
        self.denoise = denoise
        self.schedule = named(schedule, TIMES, 'schedule')
        self.scaling = named(scaling, SCALINGS, 'scaling')

    def scale(self, sigma: torch.Tensor) -> torch.Tensor | float:
        return self.scaling(sigma)[0]

    def mean(self, state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """D at the state, unscaled."""
        sigma = self.schedule.sigma(t)
        return _mean(self.denoise, state / self.scale(sigma), sigma)

    def slope(self, state: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """d state / dt = sigma' ((state - s D) / sigma + (d ln s / d sigma) state)."""
        sigma = self.schedule.sigma(t)
        s, growth = self.scaling(sigma)
        return self.schedule.rate(t) * ((state - s * self.mean(state, t)) / sigma + growth * state)

    def raised(self, state: torch.Tensor, t: torch.Tensor, gamma: float, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The state with noise added from its level up to (1 + gamma) times that, and the time there."""
        sigma = self.schedule.sigma(t)
        round_sigma = getattr(self.denoise, 'round_sigma', lambda level: level)
        later = self.schedule.time(round_sigma(sigma * (1 + gamma)))
        higher = self.schedule.sigma(later)
        added = (higher ** 2 - sigma ** 2).clamp(min=0).sqrt() * noise
        return self.scale(higher) * (state / self.scale(sigma) + added), later


def euler(denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, randn_like: Callable, *, S_churn: float = 0.0, S_min: float = 0.0,
          S_max: float = math.inf, S_noise: float = 1.0, schedule: str | object = 'linear', scaling: str | Callable = 'none',
          stop_sigma: float = 0.0) -> torch.Tensor:
    """Euler's method on the probability-flow ODE, with optional churn: first order, T evaluations (Karras et al. 2022).

    The keys are those of heun."""
    flow = Flow(denoise, schedule, scaling)
    step = lambda state, t, end, to_zero: state + (end - t) * flow.slope(state, t)
    return _walk(flow, step, x, sigmas, randn_like, Churn(S_churn, S_min, S_max, S_noise), stop_sigma)


def heun(denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, randn_like: Callable, *, S_churn: float = 0.0, S_min: float = 0.0,
         S_max: float = math.inf, S_noise: float = 1.0, alpha: float = 1.0, schedule: str | object = 'linear',
         scaling: str | Callable = 'none', stop_sigma: float = 0.0) -> torch.Tensor:
    """Heun's method on the probability-flow ODE, with optional churn: second order, 2T - 1 evaluations (Karras et al. 2022, algorithms 1 to
    3).

    S_churn, S_min, S_max, S_noise: how much noise is added along the path, between which levels, and its scale.
    alpha: where in a step the second slope is taken; 1 is Heun's method, 2/3 Ralston's and 1/2 the midpoint method.
    schedule, scaling: pieces of schedules.TIMES and SCALINGS or their names: the coordinates in which a step is straight. By
    default dx/dsigma = (x - D) / sigma. In others the step to 0 is an Euler step too, as published, so it does not end exactly at D; with
    stop_sigma it does.
    2T - 1 evaluations where sigmas[-1] is 0: the slope is undefined there, so the last step has no correction."""
    if not 0 < alpha <= 1:
        raise ValueError(f'alpha must be above 0 and at most 1, got {alpha:g}')
    flow = Flow(denoise, schedule, scaling)

    def step(state, t, end, to_zero):
        slope, length = flow.slope(state, t), end - t
        if not to_zero:
            second = flow.slope(state + alpha * length * slope, t.lerp(end, alpha))
            slope = (1 - 0.5 / alpha) * slope + 0.5 / alpha * second
        return state + length * slope

    return _walk(flow, step, x, sigmas, randn_like, Churn(S_churn, S_min, S_max, S_noise), stop_sigma)


def _walk(flow, step, x, sigmas, randn_like, churn, stop_sigma):
    """Integrates x over the levels with step(state, t, next t, whether that is at level 0), in the coordinates of the flow."""
    for name, value in churn._asdict().items():
        if not value >= 0:
            raise ValueError(f'{name} must not be negative, got {value:g}')
    num_steps = len(sigmas) - 1  # of the full range: truncation does not change the churn of the steps that are left
    stops_at_mean = stop_sigma > 0 and stop_sigma >= sigmas[sigmas > 0][-1]
    sigmas = truncate(sigmas, stop_sigma)
    times = flow.schedule.time(sigmas)
    state = flow.scale(sigmas[0]) * x
    for (sigma, _, to_zero), t, end in zip(_steps(flow.denoise, sigmas), times[:-1], times[1:]):
        if churn.S_churn > 0:
            # Drawn even where gamma is 0, so that a seed's noise at one step does not depend on S_min and S_max.
            noise = churn.S_noise * randn_like(x)
            state, t = flow.raised(state, t, churn_factor(sigma, num_steps, churn.S_churn, churn.S_min, churn.S_max), noise)
        state = flow.mean(state, t) if to_zero and stops_at_mean else step(state, t, end, to_zero)
    return state / flow.scale(sigmas[-1])


def dpmpp_2m(denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, randn_like: Callable, *, stop_sigma: float = 0.0) -> torch.Tensor:
    """DPM-Solver++(2M): second-order multistep method that reuses the D of the previous step, T evaluations, deterministic (Lu et al. 2022,
    algorithm 2).

    A step solves d(x / sigma) = D d(1 / sigma) with one D, extrapolated in lambda = -ln sigma to the middle of the step. The first
    step is of first order, and so is the one to 0, where lambda is infinite. Draws no noise."""
    def update(x, target, start, end):
        keep = end / start
        return keep * x + (1 - keep) * target
    return _multistep(denoise, x, truncate(sigmas, stop_sigma), update)


def dpmpp_2m_sde(denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, randn_like: Callable, *,
                 stop_sigma: float = 0.0) -> torch.Tensor:
    """SDE-DPM-Solver++(2M): the reverse-time VE SDE by a second-order multistep method, T evaluations, stochastic (Lu et al. 2022).

    A step is that of the bridge to a D that is extrapolated as in dpmpp_2m. Draws noise T times."""
    return _multistep(denoise, x, truncate(sigmas, stop_sigma),
                      lambda x, target, start, end: ambient.bridge_step(x, target, start, end, randn_like(x)))


def _multistep(denoise, x, sigmas, update):
    """Steps x -> update(x, D extrapolated in lambda = -ln sigma to the middle of the step, level, next level)."""
    before = length_before = None
    for start, end, to_zero in _steps(denoise, sigmas):
        D, length = _mean(denoise, x, start), (start / end).log()
        target = D
        if before is not None and not to_zero:  # the length is 0 in rows whose level did not fall
            target = D + torch.where(length_before > 0, length / (2 * length_before), 0) * (D - before)
        x = update(x, target, start, end)
        before, length_before = D, length
    return x


def sde(denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, randn_like: Callable, *, stop_sigma: float = 0.0) -> torch.Tensor:
    """Euler-Maruyama on the reverse-time VE SDE: stochastic, T evaluations (Song et al. 2021).

    Draws noise T times. The step to 0 goes to D, not to the 2 D - x that the formula would give there."""
    sigmas = truncate(sigmas, stop_sigma)
    for start, end, to_zero in _steps(denoise, sigmas):
        D, noise = _mean(denoise, x, start), randn_like(x)
        x = ambient.reverse_step(x, D, start, end, noise) if not to_zero else D
    return x


def ddim(denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, randn_like: Callable, *, eta: float = 0.0, clip: bool = False,
         stop_sigma: float = 0.0) -> torch.Tensor:
    """DDIM: deterministic for eta=0, with the noise of DDPM for eta=1; T evaluations (Song et al. 2020, equation 12).

    On x = x_vp sqrt(1 + sigma^2) with alpha_bar = 1 / (1 + sigma^2):
    x' = D + sqrt(sigma'^2 - tau^2) (x - D) / sigma + tau noise, with tau = eta sigma' sqrt(1 - sigma'^2 / sigma^2).
    eta: 0 draws no noise and is Euler's method in sigma, which may also go up (encoding); 1 is `ancestral` with the small
    variance. clip: D to [-1,1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f'eta must be between 0 and 1, got {eta:g}')
    sigmas = truncate(sigmas, stop_sigma)
    for start, end, _ in _steps(denoise, sigmas):
        D = _clipped(_mean(denoise, x, start), clip)
        share = eta ** 2 * _fresh(start, end)  # tau^2 / sigma'^2
        x = D + end * (1 - share).sqrt() / start * (x - D)
        if eta > 0:
            x = x + end * share.sqrt() * randn_like(x)
    return x


def ancestral(denoise: Callable, x: torch.Tensor, sigmas: torch.Tensor, randn_like: Callable, *, variance: str = 'auto', clip: bool = False,
              stop_sigma: float = 0.0) -> torch.Tensor:
    """DDPM's ancestral sampler, with fixed or learned variance: stochastic, T evaluations (Ho et al. 2020; Nichol & Dhariwal 2021).

    On x = x_vp sqrt(1 + sigma^2): x' = D + (sigma' / sigma)^2 (x - D) + std noise; draws noise T times.
    variance: small, that of the posterior given x_0 = D ("beta tilde"); large ("beta"); learned, predicted by the network between the two:
    exp(v ln large + (1 - v) ln small), v = (output + 1) / 2 (Nichol & Dhariwal 2021, equation 15), which needs a method
    denoise.outputs(x, sigma) -> (D, output [N,C,H,W]); auto: learned where there is such an output and it was trained to be the variance
    (denoise.gives_variance, True by default), small elsewhere.
    clip: D to [-1,1], as DDPM does for pictures. Raises ValueError for learned where there is no such output."""
    if variance not in VARIANCES:
        raise ValueError(f'variance={variance}: choose from {", ".join(VARIANCES)}')
    sigmas = truncate(sigmas, stop_sigma)
    for start, end, to_zero in _steps(denoise, sigmas):
        D, share = _mean_and_share(denoise, x, start, variance)
        D = _clipped(D, clip)
        small = end.square() * _fresh(start, end)
        large_to_small = (1 + end.square()) / (1 + start.square()) * (start / end).square()
        # A step to 0 adds no noise, whatever its variance.
        std = small.sqrt() * (large_to_small.log() / 2 * share).exp() if not to_zero else 0.0
        x = D + (end / start).square() * (x - D) + std * randn_like(x)
    return x


def _mean_and_share(denoise, x, sigma, variance):
    """D, and v: where the log variance lies between that of small (0) and large (1); 0-dim or [N,C,H,W]."""
    fixed = {'small': 0.0, 'large': 1.0}
    offers = hasattr(denoise, 'outputs') and getattr(denoise, 'gives_variance', True)
    if variance in fixed or variance == 'auto' and not offers:
        return _mean(denoise, x, sigma), fixed.get(variance, 0.0)
    D, output = denoise.outputs(x, sigma) if hasattr(denoise, 'outputs') else (x, x[:, :0])
    if output.shape == x.shape:
        return D.to(x.dtype), (output.to(x.dtype) + 1) / 2
    if variance == 'learned':
        raise ValueError('variance=learned: the network does not predict a variance; choose small or large')
    return D.to(x.dtype), 0.0


def _steps(denoise, sigmas):
    """(level, next level, whether that is 0) of each step, announced to the denoiser.

    Zeros are looked for once, because reading a level of each image's own makes the host wait for the device."""
    begin_step = getattr(denoise, 'begin_step', lambda sigma: None)
    zero = (sigmas.reshape(len(sigmas), -1) == 0).all(1).tolist()
    for start, end, to_zero in zip(sigmas[:-1], sigmas[1:], zero[1:]):
        begin_step(start)
        yield start, end, to_zero


def _fresh(start, end):
    """1 - (end / start)^2 without cancellation: the share of the variance at `end` that a step on the bridge draws anew."""
    return (start - end) / start * ((start + end) / start)


def _mean(denoise, x, sigma):
    return denoise(x, sigma).to(x.dtype)


def _clipped(D, clip):
    return D.clamp(-1, 1) if clip else D


def check(stepper: Callable, sigmas: torch.Tensor) -> None:
    """Raises ValueError or UserError for keys that a stepper refuses on these levels; evaluates nothing."""
    stepper(None, torch.zeros([1, 1, 1, 1], dtype=torch.float64), sigmas[:1], None)


SCALINGS = {'none': unscaled, 'vp': variance_preserving}
STEPPERS = {'ancestral': ancestral, 'ddim': ddim, 'dpmpp_2m': dpmpp_2m, 'dpmpp_2m_sde': dpmpp_2m_sde, 'euler': euler, 'heun': heun,
            'sde': sde}
