# SPDX-License-Identifier: Apache-2.0
"""How near images are to clean references (PSNR, SSIM), and whether stated intervals hold; all in network units."""

import math

import numpy as np
import scipy.ndimage
import scipy.stats

RANGE = 2.0   # from black to white in network units, the peak of PSNR and SSIM: for 8-bit images as with 255 grey levels
LEVEL = 0.9   # of the intervals
WINDOW_STD, WINDOW_RADIUS = 1.5, 5  # of SSIM: Gaussian weights on 11x11 pixels
K1, K2 = 0.01, 0.03


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """10 log10(RANGE^2 / mean squared error), in dB; infinite for equal images."""
    error = float(np.square(np.float64(image) - reference).mean())
    return 10 * math.log10(RANGE ** 2 / error) if error else math.inf


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two images [C,H,W], mean over channels (Wang et al. 2004, equation 13, with its Gaussian window).

    Pixels whose window reaches beyond the image are left out, unless no others are there."""
    a, b = np.float64(image), np.float64(reference)
    mean = lambda x: scipy.ndimage.gaussian_filter(x, (0, WINDOW_STD, WINDOW_STD), radius=(0, WINDOW_RADIUS, WINDOW_RADIUS))
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a ** 2 + mean(b * b) - mean_b ** 2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    found = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (variances + c2))
    inside = found[:, WINDOW_RADIUS:-WINDOW_RADIUS, WINDOW_RADIUS:-WINDOW_RADIUS]
    return float((inside if inside.size else found).mean())


def interval_factor(samples: int) -> float:
    """Half the width of the interval in units of the stated std: t sqrt(1 + 1/K) with Student's t of K - 1 degrees of freedom.

    For Gaussian posteriors it covers x_0 with probability LEVEL for every K: x_0 and the K samples are then independent draws from
    one normal law."""
    return float(scipy.stats.t.ppf((1 + LEVEL) / 2, samples - 1)) * math.sqrt(1 + 1 / samples)


def coverage(mean: np.ndarray, std: np.ndarray, reference: np.ndarray, samples: int) -> float:
    """The share of an image's values [C,H,W] that lie within mean +- interval_factor * std."""
    return float((np.abs(np.float64(reference) - mean) <= interval_factor(samples) * np.float64(std)).mean())
