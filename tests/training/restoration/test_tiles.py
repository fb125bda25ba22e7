# SPDX-License-Identifier: Apache-2.0
"""Tiles: no seams where the network looks no further than their margin, and one noise for all."""

import numpy as np
import pytest
import torch

from tests.support.denoisers import unit
from tests.support.gaussian import Blur, GaussianNet
from training.data.convert.tiles import starts
from training.restoration.posterior import Method, Noisy, estimates
from training.restoration.tiles import TiledDenoiser, profile

SIGMA = torch.tensor(0.4)


@pytest.mark.parametrize(('side', 'tile', 'overlap'), [
    (16, 16, 8), (17, 16, 8), (100, 16, 8), (100, 16, 15), (40, 8, 1), (40, 8, 0), (23, 8, 3)])
def test_every_pixel_has_weight_and_inner_borders_have_none(side, tile, overlap):
    total = torch.zeros(side, dtype=torch.float64)
    for start in starts(side, tile, overlap):
        weights = profile(start, tile, side, overlap)
        total[start:start + tile] += weights
        margin = overlap // 4
        assert not weights[:margin].any() or start == 0
        assert not weights[tile - margin:].any() or start + tile == side
        assert (weights[0] == 1 or start > 0 or not margin) and (weights >= 0).all()
    assert (total > 0).all()


@pytest.mark.parametrize('shape', [(2, 24, 24), (2, 33, 57), (2, 16, 90), (2, 16, 16)])
def test_a_denoiser_that_looks_no_further_than_the_margin_has_no_seams(shape):
    """In tiles of 16 with an overlap of 8, of which 2 pixels are margin."""
    x, whole = unit(1, *shape), Blur(shape, radius=2)
    tiled = TiledDenoiser(Blur((2, 16, 16), radius=2), overlap=8, rows=3)
    torch.testing.assert_close(tiled(x, SIGMA), whole(x, SIGMA), rtol=0, atol=1e-12)


def test_the_seams_that_no_overlap_leaves():
    x = unit(1, 1, 32, 32)
    away = TiledDenoiser(Blur((1, 16, 16), radius=2), 0, 8)(x, SIGMA) - Blur((1, 32, 32), radius=2)(x, SIGMA)
    rows = away[0, 0].abs().amax(1)
    assert rows[15] > 0.1 and rows[5] > 0.1 and away[0, 0, :13, :13].abs().max() < 1e-12


def test_rows_have_their_own_levels_and_labels():
    class Labelled(GaussianNet):
        def forward(self, x, sigma, class_labels=None):
            return super().forward(x, sigma) + class_labels[:, 1].reshape(-1, 1, 1, 1)

    x, sigma, labels = unit(2, 1, 12, 12), torch.tensor([0.2, 0.9]).reshape(2, 1, 1, 1), torch.eye(2)
    found = TiledDenoiser(Labelled((1, 8, 8), label_dim=2), 4, 8)(x, sigma, labels)
    expected = 0.25 / (0.25 + sigma.double() ** 2) * x + torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('samples', [0, 3])
def test_images_in_tiles_are_those_of_the_whole(samples):
    """Of a network that treats each pixel alone: tiles see the same noise, and blending does not lower the spread."""
    image = Noisy(3, unit(1, 30, 21), 0.4, None)
    method = Method(samples=samples, steps=5, overlap=4, keep=bool(samples))
    tiled, whole = (next(estimates(GaussianNet(shape), [image], method)) for shape in ((1, 8, 8), (1, 30, 21)))
    for a, b in zip(tiled, whole):
        assert a is None and b is None or np.allclose(a, b, rtol=1e-5, atol=1e-6)
