# SPDX-License-Identifier: Apache-2.0
"""What training with a wrong noise level does, in closed form: s is the std of the noise that images carry, `stated` what they are said to.

Double Tweedie with a stated level has the minimiser h(x, sigma) = x + (sigma / tau)^2 (D(x, tau) - x), tau^2 = sigma^2 + s^2 - stated^2,
where D is the true denoiser of the clean law: its score at a shifted level. Because tau dtau = sigma dsigma, the probability-flow ODE
stays exact in tau, and truncated at sigma = stated it ends on the noisy law; only the rest of the way is wrong."""

import numpy as np


def shifted(sigma: float | np.ndarray, s: float, stated: float) -> np.ndarray:
    """tau, the level at which the true denoiser is used instead of at sigma >= stated."""
    return np.sqrt(np.square(sigma) + s ** 2 - stated ** 2)


def gain(sigma: float | np.ndarray, s: float, stated: float, variance: float) -> np.ndarray:
    """h(x, sigma) / x for Gaussian images of a variance: v' / (v' + sigma^2), v' = variance + s^2 - stated^2."""
    seen = variance + s ** 2 - stated ** 2
    return seen / (seen + np.square(sigma))


def remaining(s: float, stated: float) -> float:
    """The std of the noise that samples keep of an understated level: an exact model learns the clean law with this noise. 0 otherwise."""
    return float(np.sqrt(max(s ** 2 - stated ** 2, 0.0)))
