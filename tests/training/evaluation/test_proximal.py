# SPDX-License-Identifier: Apache-2.0
"""Proximal FID on Gaussian data, whose value is known: (std of generated and noise - std of noisy images)^2 per pixel."""

import math

import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics.detectors import Detector, pixel_detector
from tests.support.denoisers import unit
from training.evaluation.proximal import Proximal
from training.sampling.generate import generate_images
from training.sampling.steppers import heun

COUNT, SIDE = 4000, 3


class Gaussian:
    """The exact denoiser of N(0, v) for every pixel, as a network."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 1, SIDE, 0, 0.002, 80.0

    def __init__(self, v):
        self.v = v

    def __call__(self, x, sigma, class_labels=None):
        return self.v / (self.v + sigma.double().reshape(-1, 1, 1, 1) ** 2) * x


def side(v, levels, detector=None, batch=500):
    """The noisy side of data of variance v, in turn of each level."""
    levels = np.resize(np.float64(levels), COUNT)
    clean, noise = (unit(COUNT, 1, SIDE, SIDE, seed=seed) for seed in (3, 4))
    y = math.sqrt(v) * clean + torch.from_numpy(levels).reshape(-1, 1, 1, 1) * noise
    return Proximal(lambda rows: y[rows], levels, detector or pixel_detector('cpu'), None, batch)


def distance(v, of, **options):
    return of.distance(Gaussian(v), dict(stepper=heun, num_steps=50), num=COUNT, **options)['fid_score']


def test_value_and_choice():
    """The sampling error of the distance is about 9 pixels x 2 variances / COUNT."""
    noisy = side(0.25, [0.4])
    found = {v: distance(v, noisy) for v in (0.15, 0.25, 0.4)}
    for v, value in found.items():
        assert value == pytest.approx(9 * (math.sqrt(v + 0.16) - math.sqrt(0.25 + 0.16)) ** 2, abs=0.015)
    assert min(found, key=found.get) == 0.25


def test_generated_images_get_the_mixture_of_levels():
    """Noise of one level in place of two, of equal variance on average, would have another spread: here each image has one of them."""
    noisy = side(0.25, [0.2, 0.2, 0.2, 1.5])
    assert distance(0.25, noisy) < 0.06
    assert noisy.distance(Gaussian(0.25), dict(stepper=heun, num_steps=4), num=COUNT)['levels'] == [0.2, 1.5]


def test_each_image_has_its_level_and_noise(monkeypatch):
    """With as many images as noisy ones each level is used as often; the draws do not depend on the batch."""
    taken = []
    noisy = side(0.25, [0.2, 1.5])
    monkeypatch.setattr('training.evaluation.proximal.add_noise', lambda y, low, levels, noise: taken.append((levels, noise)) or y)
    distance(0.25, noisy)
    noisy.batch = 300
    distance(0.25, noisy)
    levels, noise = (torch.cat([pair[i] for pair in taken]) for i in range(2))
    assert (levels[:COUNT] == 0.2).sum() == COUNT // 2
    assert torch.equal(levels[:COUNT], levels[COUNT:]) and torch.equal(noise[:COUNT], noise[COUNT:])
    assert noise[:COUNT].std() == pytest.approx(1, abs=0.01)


def test_values_beyond_pictures_count_for_pixels():
    """Stds 2 and 3, far beyond [-1, 1]: after clipping both to 8 bits the distance would be less than half of this."""
    assert distance(9.0, side(4.0, [0.4])) == pytest.approx(9 * (math.sqrt(9.16) - math.sqrt(4.16)) ** 2, rel=0.05)


def test_other_detectors_get_both_sides_clipped_alike():
    seen = []

    def net(images):
        seen.append(images)
        return images.flatten(1).double() / 127.5 - 1

    noisy = side(1.0, [0.4], Detector('stub', net, 'cpu', rgb=False))
    assert distance(1.0, noisy) < 0.02 < 0.08 < distance(0.4, noisy)
    assert all(images.dtype == torch.uint8 for images in seen)
    assert all(0.1 < ((images == 0) | (images == 255)).double().mean() < 0.5 for images in (seen[1], seen[-1]) if len(images) > 100)


def test_data_that_are_no_pictures_need_pixels():
    detector = Detector('stub', lambda images: images.flatten(1).double(), 'cpu', rgb=False)
    with pytest.raises(UserError, match='pixels'):
        Proximal(lambda rows: torch.zeros([len(rows), 1, 2, 2]), np.ones(3), detector, {'offset': 0.0, 'scale': 2.0})


def test_seeds_are_those_of_generate(monkeypatch):
    """The images before the noise are those of seeds 0 ... num - 1."""
    first, pieces = [], dict(stepper=heun, num_steps=4)
    monkeypatch.setattr('training.evaluation.proximal.add_noise', lambda y, *rest: first.append(y) or y)
    side(0.25, [0.4], batch=3).distance(Gaussian(0.25), pieces, num=8)
    expected = torch.cat([part.images for part in generate_images(Gaussian(0.25), range(8), **pieces)])
    assert torch.equal(torch.cat(first), expected)
