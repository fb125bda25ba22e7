# SPDX-License-Identifier: Apache-2.0
"""Weights w(sigma) on the squared x_0 error; sigma [N,1,1,1] is the noise std in network units, the result has its shape.

The signal-to-noise ratio is signal^2 / sigma^2. signal=1 is the convention of the papers and gives their numbers; signal=sigma_data is
EDM's, under which a threshold on the ratio means the same for data of every std. docs/weights.md has each weight on every prediction."""

import math

import torch

from torch_utils import misc
from torch_utils.magnitude import MPConv, MPFourier, force_unit_rows

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def edm(sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """EDM's weight: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2 (Karras et al. 2022, table 1)."""
    # Written as a sum of two inverse squares, which avoids overflow and cancellation.
    return sigma ** -2 + _positive('sigma_data', sigma_data) ** -2


def snr(sigma: torch.Tensor, signal: float = 1.0) -> torch.Tensor:
    """Signal-to-noise ratio: signal^2 / sigma^2; with signal=1 this is the weight of the published VP and VE losses."""
    return (_positive('signal', signal) / sigma).square()


def min_snr(sigma: torch.Tensor, gamma: float = 5.0, signal: float = 1.0) -> torch.Tensor:
    """Min-SNR: min(snr, gamma) with snr = signal^2 / sigma^2 (Hang et al. 2023, with snr = 1 / sigma^2 and gamma = 5).

    The same threshold in EDM's convention is gamma sigma_data^2, up to a constant factor: gamma=1.25,signal=0.5."""
    return snr(sigma, signal).clamp(max=_positive('gamma', gamma))


def soft_min_snr(sigma: torch.Tensor, gamma: float = 4.0, signal: float = 1.0) -> torch.Tensor:
    """Soft Min-SNR: snr gamma / (snr + gamma) with snr = signal^2 / sigma^2, a smooth version of min_snr (Crowson et al. 2024).

    The paper's gamma = 4 is 1 / sigma_data^2, which makes this 1 / (sigma^2 + sigma_data^2)."""
    return 1 / ((sigma / _positive('signal', signal)).square() + 1 / _positive('gamma', gamma))


def truncated_snr(sigma: torch.Tensor, signal: float = 1.0) -> torch.Tensor:
    """Truncated SNR: max(snr, 1) with snr = signal^2 / sigma^2, so that the weight never falls below 1 (Salimans & Ho 2022)."""
    return snr(sigma, signal).clamp(min=1)


def p2(sigma: torch.Tensor, k: float = 1.0, gamma: float = 1.0, signal: float = 1.0) -> torch.Tensor:
    """P2 weighting: snr / (k + snr)^gamma with snr = signal^2 / sigma^2 (Choi et al. 2022, with k = 1 and gamma = 0.5 or 1)."""
    if not (0 <= gamma < math.inf):
        raise ValueError(f'gamma={gamma} must be 0 or more')
    ratio = snr(sigma, signal)
    return ratio * (_positive('k', k) + ratio) ** -gamma


def uniform(sigma: torch.Tensor) -> torch.Tensor:
    """Uniform weight: 1 at every noise level."""
    return torch.ones_like(sigma)


class Uncertainty(torch.nn.Module):
    """Learned uncertainty weighting: EDM's weight divided by exp(u(sigma)), with u learned together with the network (Karras et al. 2024,
    equations 14 to 16 and 21).

    The loss is lambda / exp(u) cost + u, so that exp(u) tends to the mean of lambda cost and every level contributes equally. forward()
    returns the factor, and offset() the u that the loss must add once for every cost in the sum; a caller that adds no u must detach the
    factor. u is a linear map of `channels` cosines of c_noise = ln(sigma) / 4."""

    def __init__(self, sigma_data: float, channels: int) -> None:
        super().__init__()
        self.sigma_data = _positive('sigma_data', sigma_data)
        if channels < 1:
            raise ValueError(f'channels={channels} must be at least 1')

    def offset(self, sigma: torch.Tensor) -> torch.Tensor:
        """u(sigma), of the shape of sigma."""
        raise NotImplementedError

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        """lambda(sigma) / exp(u(sigma))."""
        return edm(sigma, self.sigma_data) * (-self.offset(sigma)).exp()


class LearnedWeight(Uncertainty):
    """Learned uncertainty weighting: EDM's weight divided by exp(u(sigma)), where u starts at 0 and is not bounded.

    Only the linear map is learned: frequencies (normal quantiles) and phases (multiples of the golden ratio) are fixed, so that no random
    state decides."""

    def __init__(self, sigma_data: float = 0.5, channels: int = 128) -> None:
        super().__init__(sigma_data, channels)
        place = torch.arange(channels, dtype=torch.float64)
        self.register_buffer('frequencies', torch.special.ndtri((place + 0.5) / channels).float(), persistent=False)
        self.register_buffer('phases', (place * GOLDEN_RATIO).frac().float(), persistent=False)
        self.linear = torch.nn.Parameter(torch.zeros(channels))

    def offset(self, sigma: torch.Tensor) -> torch.Tensor:
        """As Uncertainty.offset."""
        c_noise = (sigma.log() / 4).unsqueeze(-1).to(self.linear.dtype)
        waves = (2 * math.pi * (c_noise * self.frequencies + self.phases)).cos()  # [..., channels], variance 1/2
        return (waves @ self.linear * math.sqrt(2 / len(self.linear))).to(sigma.dtype)


class EDM2Weight(Uncertainty):
    """Learned uncertainty weighting as published with EDM2, with its names: EDM's weight divided by exp(u(sigma)), where u is a
    magnitude-preserving linear map of Fourier features.

    The norm of the linear map is 1, so that u starts as noise of variance 1 over sigma and abs(u) <= sqrt(2 channels). The initial values
    are the same in every run, drawn from a generator of their own; frequencies and phases belong to the state."""

    def __init__(self, sigma_data: float = 0.5, channels: int = 128) -> None:
        super().__init__(sigma_data, channels)
        source = misc.generator('weight edm2')
        freqs, phases, weight = (draw([channels], generator=source, device='cpu') for draw in (torch.randn, torch.rand, torch.randn))
        self.logvar_fourier = MPFourier(2 * math.pi * freqs, 2 * math.pi * phases)
        self.logvar_linear = MPConv(weight[None])

    def begin_step(self) -> None:
        """Forced weight normalisation of the linear map. The training loop calls it."""
        force_unit_rows([self.logvar_linear.weight])

    def offset(self, sigma: torch.Tensor) -> torch.Tensor:
        """As Uncertainty.offset."""
        return self.logvar_linear(self.logvar_fourier(sigma.log().flatten() / 4)).reshape(sigma.shape)


def _positive(name, value):
    if not 0 < value < math.inf:
        raise ValueError(f'{name}={value} must be positive')
    return value


WEIGHTS = {'edm': edm, 'edm2': EDM2Weight, 'learned': LearnedWeight, 'min_snr': min_snr, 'p2': p2, 'snr': snr, 'soft_min_snr': soft_min_snr,
           'truncated_snr': truncated_snr, 'uniform': uniform}
