# SPDX-License-Identifier: Apache-2.0
"""PSNR, SSIM, and intervals that cover what they state."""

import math

import numpy as np
import pytest
import scipy.ndimage

from training.restoration import quality


def test_psnr():
    zero = np.zeros([1, 4, 4])
    assert quality.psnr(zero + 0.2, zero) == pytest.approx(20) and quality.psnr(zero, zero) == math.inf
    levels = np.arange(16).reshape(1, 4, 4)  # 8-bit grey levels one apart: 20 log10(255)
    assert quality.psnr((levels + 1) / 127.5 - 1, levels / 127.5 - 1) == pytest.approx(20 * math.log10(255))


def test_ssim():
    rng = np.random.default_rng(0)
    image = scipy.ndimage.gaussian_filter(rng.normal(size=(1, 32, 32)), (0, 2, 2)) * 2
    values = [quality.ssim(image + noise * rng.normal(size=image.shape), image) for noise in (0.0, 0.05, 0.5)]
    assert values[0] == 1 and values[0] > values[1] > values[2] > 0
    assert quality.ssim(np.full([1, 16, 16], 0.5), np.full([1, 16, 16], 0.1)) == pytest.approx((2 * 0.05 + 4e-4) / (0.26 + 4e-4))
    assert -1 < quality.ssim(rng.normal(size=(1, 8, 8)), rng.normal(size=(1, 8, 8))) < 0.9  # smaller than the window


@pytest.mark.parametrize('shape', [(1, 32, 32), (3, 40, 17), (2, 11, 11)])
def test_ssim_is_scikit_images(shape):
    metrics = pytest.importorskip('skimage.metrics')
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, *shape))
    expected = metrics.structural_similarity(a, b, data_range=2, channel_axis=0, gaussian_weights=True, sigma=1.5,
                                             use_sample_covariance=False)
    assert quality.ssim(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('samples', [2, 3, 16])
def test_intervals_cover_what_they_state(samples):
    """Truth and samples from one normal law, 100,000 times: standard error 0.1 %."""
    draws = np.random.default_rng(samples).normal(3.0, 2.0, size=(samples + 1, 1, 1, 100_000))
    found = quality.coverage(draws[1:].mean(0), draws[1:].std(0, ddof=1), draws[0], samples)
    assert found == pytest.approx(0.9, abs=0.005)
