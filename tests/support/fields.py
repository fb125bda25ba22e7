# SPDX-License-Identifier: Apache-2.0
"""Random pictures without texture."""

import numpy as np


def smooth(count, shape=(3, 32, 32), seed=0, power=3):
    """Random pictures with a spectrum that falls like those of photographs on a small scale, float32 in about [-1, 1]."""
    rng = np.random.default_rng(seed)
    wave = 1 / (0.03 + np.hypot(*np.meshgrid(np.fft.rfftfreq(shape[2]), np.fft.fftfreq(shape[1])))) ** power
    found = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((count, *shape))) * wave, shape[1:])
    return (0.4 * found / found.std()).astype(np.float32)
