# SPDX-License-Identifier: Apache-2.0
"""Weights w(sigma) on the squared x_0 error; sigma [N,1,1,1] is the noise std in network units, the result has its shape."""

import torch


def edm(sigma, sigma_data=0.5):
    """EDM's weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2 (Karras et al. 2022, table 1)."""
    # Written as a sum of two inverse squares, which neither overflows nor cancels.
    return sigma ** -2 + _positive('sigma_data', sigma_data) ** -2


def snr(sigma, signal=1.0):
    """The signal-to-noise ratio signal^2 / sigma^2: signal=1 is the weight of the published VP and VE losses."""
    return (_positive('signal', signal) / sigma).square()


def uniform(sigma):
    """1 at every level."""
    return torch.ones_like(sigma)


def _positive(name, value):
    if not value > 0:
        raise ValueError(f'{name}={value} must be positive')
    return value


WEIGHTS = {'edm': edm, 'snr': snr, 'uniform': uniform}
