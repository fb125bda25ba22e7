# SPDX-License-Identifier: Apache-2.0
"""Limits by means and covariances: against theory on Gaussian fields, and on digits that are blurred, compressed, noisy or clean."""

import math

import numpy as np
import pytest
import torch

from tests.training.annotation import fields
from training.annotation import spectral

CLEAN = 90  # a tenth of the first half of the digits


@pytest.mark.parametrize('side, seed', [(8, 0), (24, 0)])  # 64 numbers: whole covariances; 576: cosines alone
@pytest.mark.parametrize('cut', [2.0, 5.0])
def test_gaussian_fields_have_the_limit_of_theory(side, seed, cut):
    p, f = fields.power(side)
    q = p * np.exp(-np.square(f / (cut * side / 8)))
    found = fields.limit(fields.fields(4000, p, 2 * seed), fields.fields(4000, q, 2 * seed + 1))
    assert found == pytest.approx(fields.theory(p, q), rel=0.03)


def test_a_colour_cast_and_a_difference_of_means_are_seen():
    """d' (P + sigma^2)^-1 d / 2 nats, d the difference of the means: of one grey value more in every pixel, sqrt(3) * 8 * 0.3 along DC."""
    p, _ = fields.power(8)
    clean, data = (torch.cat([fields.fields(3000, p, 10 * seed + k) for k in range(3)], 1) for seed in (0, 1))
    power = p[0, 0]
    expected = math.sqrt(3 * 64 * 0.3 ** 2 / (2 * spectral.thresholds.kl_of_threshold(0.45)) - power)
    assert fields.limit(clean, data + 0.3) == pytest.approx(expected, rel=0.05)
    assert fields.limit(clean, data * torch.tensor([1.3, 1.0, 0.8])[:, None, None]) > 0.2
    assert fields.limit(clean, data) == 0


@pytest.mark.parametrize('clean, tolerance', [pytest.param(898, 0.07, marks=pytest.mark.slow), (CLEAN, 0.3)])
def test_digits_are_monotone_in_the_blur_also_from_few_clean_ones(clean, tolerance):
    images = fields.digits()
    data = images[898:] if clean == 898 else images[CLEAN:898]
    found = [fields.limit(fields.network(images[:clean]), fields.network(fields.blurred(data, std))) for std in (0.4, 0.6, 0.8, 1.0)]
    assert found == sorted(found)
    assert np.allclose(found, [0.47, 1.65, 2.23, 2.66], rtol=tolerance)  # by the covariances of all digits, of the blur itself


def test_few_images_are_not_told_apart_by_chance():
    """Without the correction for few images, 90 and 808 clean digits differ by more than the threshold."""
    images = fields.network(fields.digits())
    for clean, rest in ((CLEAN, 898), (898, 1797)):
        compared = fields.compared(images[:clean], images[clean:rest])
        assert spectral.curve(compared, fields.LEVELS, 0.45).limit == 0
        assert spectral.only_noise(compared, fields.LEVELS, 0.45) is None
    plain = fields.compared(images[:CLEAN], images[CLEAN:898])[-1]._spectra[0][0].kl(fields.LEVELS)
    assert plain[fields.LEVELS > 0.5][0] > 0.22


@pytest.mark.parametrize('clean', [898, 180])
def test_white_noise_alone_is_recognised_with_its_std(clean):
    images = fields.network(fields.digits())
    noise = 0.2 * np.random.default_rng(0).standard_normal(images[898:].shape)
    compared = fields.compared(images[:clean], images[898:] + torch.from_numpy(np.float32(noise)))
    found = spectral.only_noise(compared, fields.LEVELS, 0.45)
    assert 0.16 <= found.noise <= 0.24 and found.limit == 0
    # As a lower limit it would be far above: the noise adds 0.04 to the variance of every direction.
    assert spectral.curve(compared, fields.LEVELS, 0.45).limit > 0.35


def test_noise_that_the_images_are_known_to_carry_is_counted():
    p, f = fields.power(8)
    q = p * np.exp(-np.square(f / 3))
    clean, data = fields.fields(4000, p), fields.fields(4000, q, 1)
    noisy = data + 0.3 * torch.from_numpy(np.random.default_rng(0).standard_normal(data.shape)).float()
    levels = fields.LEVELS[fields.LEVELS >= 0.3]
    found = spectral.curve(fields.compared(clean, noisy), levels, 0.45, noise=0.3)
    assert found.limit == pytest.approx(fields.theory(p, q), rel=0.05)


def test_blur_is_not_taken_for_noise():
    images = fields.digits()
    for data in (fields.blurred(images[898:], 0.6), fields.jpeg(images[898:], 18), 255 - images[898:]):
        assert spectral.only_noise(fields.compared(fields.network(images[:898]), fields.network(data)), fields.LEVELS, 0.45) is None


def test_stronger_compression_has_a_higher_limit():
    images = fields.digits(side=16)
    clean = fields.network(images[:898])
    found = [fields.limit(clean, fields.network(fields.jpeg(images[898:], quality))) for quality in (18, 50, 90)]
    assert found[0] > 1.3 * found[1] > 1.3 ** 2 * found[2] > 0


def test_sets_that_differ_everywhere_are_never_confused():
    p, _ = fields.power(8)
    assert fields.limit(fields.fields(500, p), fields.fields(500, p, 1) + 10) == math.inf


def test_the_order_of_adding_does_not_matter():
    p, _ = fields.power(8)
    images = fields.fields(101, p)
    whole, parts = (spectral.Moments(spectral.Basis(), 64) for _ in range(2))
    whole.add(images)
    for first, last in ((0, 7), (7, 50), (50, 101)):
        parts.add(images[first:last], first)
    for one, other in zip(whole.of(np.arange(10) != 3), parts.of(np.arange(10) != 3)):
        assert np.allclose(one, other)
    mean, covariance = whole.of(np.ones(10, bool))
    flat = images.numpy().reshape(101, -1)
    assert np.allclose(mean, flat.mean(0)) and np.allclose(covariance, np.cov(flat.T), atol=1e-6)
