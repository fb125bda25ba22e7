# SPDX-License-Identifier: Apache-2.0
"""Where each round of the refinement loop stops: the levels s_k of its images, from their own sigma_n.

A schedule is called as (sigma_n [N], k) -> s_k [N] for round k = 1, 2, ..., float64 network units; images that are not above their s_k
stay as they are. Numbers out of range raise ValueError."""

import numpy as np


def sfbd(sigma_n: np.ndarray, k: int) -> np.ndarray:
    """s_k = 0: every round takes the images all the way to clean ones (SFBD, Lu, Wu and Yu 2025)."""
    return np.zeros_like(sigma_n)


def dataloops(sigma_n: np.ndarray, k: int, rho: float = 8.0) -> np.ndarray:
    """s_k = sigma_n / rho^k: each round trusts the model a little further (Dataloops, 2026)."""
    if not rho > 1:
        raise ValueError(f'rho must be above 1, got {rho:g}')
    return sigma_n / float(rho) ** k


def explicit(sigma_n: np.ndarray, k: int, levels: list[float] = (0.0,)) -> np.ndarray:
    """s_k listed one by one, such as explicit:levels=0.1|0.05|0; the last one also for all later rounds."""
    if min(levels) < 0 or not np.isfinite(levels).all() or list(levels) != sorted(levels, reverse=True):
        raise ValueError(f'levels must be 0 or more, and must not rise, got {"|".join(map(str, levels))}')
    return np.full_like(sigma_n, levels[min(k, len(levels)) - 1])


SCHEDULES = {'dataloops': dataloops, 'explicit': explicit, 'sfbd': sfbd}
