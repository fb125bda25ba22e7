# SPDX-License-Identifier: Apache-2.0
"""Penalties rho(e) of an error [N,C,H,W], before the weight and the sum over an image; sigma [N,1,1,1] is its noise level.

Only `squared` has its minimum at the conditional mean. The others are robust: their minimum lies between mean and median.

Their c is in units of the network's residual: rho = s^2 H_c(e / s), s = c_out(sigma) of EDM, which equals H_{cs}(e) because
H_c(e) = 2c (sqrt(e^2 + c^2) - c) is homogeneous of degree 2 in (e, c). H_c is e^2 for |e| << c and about 2c|e| for |e| >> c; its slope
stays below 2c."""

import math

import torch


def squared(error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Squared error e^2, whose minimiser is the conditional mean.

    error: [N,C,H,W]; sigma: [N,1,1,1], which this penalty does not need."""
    return error.square()


def pseudo_huber(error: torch.Tensor, sigma: torch.Tensor, c: float = 0.1, schedule: str = 'snr', sigma_data: float = 0.5) -> torch.Tensor:
    """Pseudo-Huber penalty of each value: s^2 H_c(e / s), H_c(e) = 2c (sqrt(e^2 + c^2) - c), which limits the pull of outlying pixels to
    2c s (Khrapov et al. 2024, scaled to e^2 for small e).

    s = c_out(sigma). c, schedule: see threshold()."""
    knee = threshold(sigma, c, schedule) * residual_scale(sigma, sigma_data)
    return _huber(error.square(), knee)


def smooth(error: torch.Tensor, sigma: torch.Tensor, c: float = 0.1, schedule: str = 'snr', sigma_data: float = 0.5) -> torch.Tensor:
    """Smooth L1 penalty of each value, the "smooth" loss of diffusers: s^2 H_c(e / s) / c, which is e^2 / c for small and about 2s|e| for
    large errors.

    A schedule of c also changes the weights of the noise levels, because small errors cost e^2 / c; pseudo_huber avoids that."""
    bend = threshold(sigma, c, schedule)
    return _huber(error.square(), bend * residual_scale(sigma, sigma_data)) / bend


def pseudo_huber_norm(error: torch.Tensor, sigma: torch.Tensor, c: float = 0.00054, schedule: str = 'constant',
                      sigma_data: float = 0.5) -> torch.Tensor:
    """Pseudo-Huber penalty of the norm of each image's error: s^2 H_C(||e|| / s) with C = c sqrt(C H W), for outlying images rather than
    pixels (Song & Dhariwal 2024).

    Returns [N,1,1,1]. Improved consistency training uses this c, and H without its factor 2c, to which an optimizer such as Adam is
    invariant; with the factor the penalty tends to the squared error, and a schedule of c leaves the weights of the levels as they are."""
    size = math.prod(error.shape[1:])
    knee = threshold(sigma, c, schedule) * math.sqrt(size) * residual_scale(sigma, sigma_data)
    return _huber(error.square().flatten(1).sum(1).reshape(knee.shape), knee)


def _huber(squares, knee):
    """2c (sqrt(e^2 + c^2) - c) from e^2, in a form without cancellation."""
    return 2 * knee * squares / ((squares + knee.square()).sqrt() + knee)


def residual_scale(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """s = c_out(sigma) = sigma sigma_data / sqrt(sigma^2 + sigma_data^2): the x_0 error for an error of 1 of EDM's network."""
    if not 0 < sigma_data < math.inf:
        raise ValueError(f'sigma_data={sigma_data} must be positive')
    return sigma * (sigma_data / (sigma.square() + sigma_data ** 2).sqrt())


def threshold(sigma: torch.Tensor, c: float, schedule: str) -> torch.Tensor:
    """c at each level, of the shape of sigma. constant: c. The others go from 1 at sigma = 0, nearly a squared error, to c at infinity.

    snr: (1 - c) / (1 + sigma)^2 + c. exponential: c^t, where t = (2 / pi) atan(sigma) is the time of the cosine schedule."""
    if not 0 < c < math.inf:
        raise ValueError(f'c={c} must be positive')
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule={schedule} must be one of {", ".join(SCHEDULES)}')
    return SCHEDULES[schedule](sigma, c)


SCHEDULES = {'constant': lambda sigma, c: torch.full_like(sigma, c),
             'exponential': lambda sigma, c: c ** (sigma.atan() / (math.pi / 2)),
             'snr': lambda sigma, c: (1 - c) * (1 + sigma) ** -2 + c}
PENALTIES = {'pseudo_huber': pseudo_huber, 'pseudo_huber_norm': pseudo_huber_norm, 'smooth': smooth, 'squared': squared}
