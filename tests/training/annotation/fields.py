# SPDX-License-Identifier: Apache-2.0
"""Gaussian fields of known power, what theory says of them, and digits with known defects."""

import io
import math

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage
import scipy.optimize
import torch
from PIL import Image

from training.annotation import spectral, thresholds

LEVELS = np.geomspace(0.0074, 12.28, 64)


def power(side, slope=3.0, total=0.25):
    """Power of the cosine coefficients of a field [side, side], with variance `total` per pixel, and their frequencies."""
    y, x = np.mgrid[:side, :side]
    f = np.hypot(y, x)
    found = (1 + f) ** -slope
    return found * (total * side ** 2 / found.sum()), f


def fields(count, p, seed=0):
    """Gaussian fields, float32 [count, 1, H, W], whose orthonormal cosine coefficients have the variances p [H, W]."""
    white = np.random.default_rng(seed).standard_normal([count, 1, *p.shape])
    return torch.from_numpy(np.float32(scipy.fft.idctn(white * np.sqrt(p), axes=(2, 3), norm='ortho')))


def theory(p, q, threshold=0.45):
    """The level at which KL(q || p) is that of the threshold: 1/2 sum (rho - 1 - ln rho), rho = (q + sigma^2) / (p + sigma^2)."""
    most = thresholds.kl_of_threshold(threshold)
    return scipy.optimize.brentq(lambda sigma: kl(p, q, sigma) - most, 1e-3, 1e2)


def kl(p, q, sigma):
    rho = (q + sigma ** 2) / (p + sigma ** 2)
    return 0.5 * (rho - 1 - np.log(rho)).sum()


def compared(clean, data):
    """Comparisons of images [N,C,H,W] in all bases."""
    found = []
    for basis in spectral.bases(clean[:500], (len(clean), len(data))):
        moments = [spectral.Moments(basis, clean[0].numel()) for _ in range(2)]
        moments[0].add(clean)
        moments[1].add(data)
        found.append(spectral.Comparison(*moments))
    return found


def limit(clean, data, levels=LEVELS):
    return spectral.curve(compared(clean, data), levels, 0.45).limit


def digits(side=8, seed=0):
    """Scikit-learn's digits, shuffled and enlarged, uint8 [1797, side, side]."""
    images = pytest.importorskip('sklearn.datasets').load_digits().images
    images = images[np.random.default_rng(seed).permutation(len(images))]
    return np.stack([np.asarray(Image.fromarray(np.uint8(np.rint(image * 255 / 16))).resize((side, side), Image.BICUBIC))
                     for image in images])


def blurred(images, std):
    return np.uint8(np.rint(scipy.ndimage.gaussian_filter(np.float64(images), (0, std, std))))


def jpeg(images, quality):
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, 'JPEG', quality=quality)
        found.append(np.asarray(Image.open(file)))
    return np.stack(found)


def network(images):
    """uint8 [N, H, W] -> network units, float32 [N, 1, H, W]."""
    return torch.from_numpy(np.float32(images) / 127.5 - 1)[:, None]


def best_area(p, q, sigma):
    """Area under the ROC curve that no classifier exceeds, for a log-likelihood ratio that is nearly Gaussian."""
    return 0.5 * math.erfc(-math.sqrt(kl(p, q, sigma) / 2))
