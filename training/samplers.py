# SPDX-License-Identifier: Apache-2.0
"""Sampling is a schedule times a stepper: noise levels [T+1] that end in 0, and a solver that walks down any such levels."""

import math

import torch

MAX_CHURN = math.sqrt(2) - 1  # a step never adds more than it takes to double the variance


def edm(num_steps, *, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """EDM's noise levels: sigma^(1/rho) falls linearly from sigma_max to sigma_min, then 0. Karras et al. 2022, equation 5.

    num_steps: T >= 1; a single step goes from sigma_max straight to 0. Returns float64 [T+1] on the CPU.
    Raises ValueError for values that give no falling levels."""
    if num_steps < 1:
        raise ValueError(f'the number of steps must be 1 or more, got {num_steps}')
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f'0 < sigma_min < sigma_max is needed, got sigma_min={sigma_min:g}, sigma_max={sigma_max:g}')
    if not 0 < rho < math.inf:
        raise ValueError(f'rho must be positive, got {rho:g}')
    ramp = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (first + ramp * (last - first)) ** rho
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def churn_factor(sigma, num_steps, S_churn, S_min=0.0, S_max=math.inf):
    """gamma: by which share a step raises its level before it goes down. EDM, Algorithm 2, line 4."""
    return min(S_churn / num_steps, MAX_CHURN) if S_min <= sigma <= S_max else 0.0


def heun(denoise, x, sigmas, randn_like, *, S_churn=0.0, S_min=0.0, S_max=math.inf, S_noise=1.0):
    """Heun's second-order steps of dx/dsigma = (x - D(x; sigma)) / sigma, with optional churn. EDM, Algorithm 2.

    denoise(x, sigma) -> D in any float dtype; where it has a method round_sigma, raised levels go through it, and where it has
    a method begin_step, it is told the level at which each step starts.
    x: [N,C,H,W], float64, at level sigmas[0]. sigmas: float64 [T+1] on the CPU, falling. randn_like(x) -> unit normal noise.
    Returns x at sigmas[-1], after 2T - 1 evaluations where that is 0: the slope has no value there, so no correction."""
    num_steps = len(sigmas) - 1
    begin_step = getattr(denoise, 'begin_step', lambda level: None)
    for start, end in zip(sigmas[:-1], sigmas[1:]):
        begin_step(start)
        sigma = start
        if S_churn > 0:
            # Drawn even where gamma is 0, so that a seed's noise at one step does not depend on S_min and S_max.
            noise = randn_like(x)
            x, sigma = _raise_level(denoise, x, start, churn_factor(start, num_steps, S_churn, S_min, S_max), S_noise * noise)
        slope = _slope(denoise, x, sigma)
        step = end - sigma
        if end > 0:
            slope = (slope + _slope(denoise, x + step * slope, end)) / 2
        x = x + step * slope
    return x


def _raise_level(denoise, x, sigma, gamma, noise):
    """x with noise added from level sigma up to (1 + gamma) sigma, and the new level."""
    round_sigma = getattr(denoise, 'round_sigma', lambda level: level)
    raised = round_sigma(sigma * (1 + gamma))
    return x + (raised ** 2 - sigma ** 2).clamp(min=0).sqrt() * noise, raised


def _slope(denoise, x, sigma):
    return (x - denoise(x, sigma).to(x.dtype)) / sigma


SCHEDULES = {'edm': edm}
STEPPERS = {'heun': heun}
