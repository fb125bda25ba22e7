# SPDX-License-Identifier: Apache-2.0
"""Magnitude-preserving layers against published numbers, and what their name promises."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from torch_utils import misc
from torch_utils.magnitude import EPS, MPConv, MPFourier, force_unit_rows, normalize

PUBLISHED = {name.removeprefix('f.'): value for name, value in load_file(GOLDEN / 'edm2' / 'functions.safetensors').items()}
TYPES = [(torch.float32, '', 2e-6), (torch.float64, '.f64', 1e-10)]


def draw(*shape, key='draw'):
    return torch.randn(shape, generator=misc.generator(key, *shape))


@pytest.mark.parametrize('dtype, suffix, atol', TYPES)
def test_published_numbers(dtype, suffix, atol):
    read = lambda name: PUBLISHED[name].to(dtype)
    same = lambda found, name: torch.testing.assert_close(found, PUBLISHED[name + suffix], rtol=0, atol=atol)
    same(normalize(read('a')), 'normalize_default')
    same(normalize(read('a'), 1), 'normalize_dim1')
    same(MPFourier(read('fourier_freqs'), read('fourier_phases'))(read('fourier_in')), 'fourier_out')


@pytest.mark.parametrize('dtype, suffix, atol', TYPES)
@pytest.mark.parametrize('kind', ['linear', 'conv1', 'conv3'])
def test_published_convolutions(kind, dtype, suffix, atol):
    """Rows of very different size, and one of zeros; in training the weight itself is normalised first."""
    name = f'mpconv_{kind}'
    layer = MPConv(PUBLISHED[f'{name}_weight'].to(dtype, copy=True))
    x, gain = PUBLISHED[f'{name}_in'].to(dtype), 0.8
    same = lambda found, part: torch.testing.assert_close(found.detach(), PUBLISHED[f'{name}_{part}{suffix}'], rtol=0, atol=atol)
    same(layer(x, gain), 'eval')
    force_unit_rows([layer.weight])
    same(layer.weight, 'post_weight')
    same(layer(x, gain), 'train')
    assert layer.weight.requires_grad and layer.weight.is_leaf and not layer.weight.flatten(1).any(1).all()


@pytest.mark.parametrize('layer, x', [
    (MPConv(7 * draw(64, 48)), draw(500, 48)), (MPConv(0.01 * draw(64, 16, 1, 1)), draw(20, 16, 6, 6)),
    (MPFourier(2 * math.pi * draw(4000), 2 * math.pi * torch.rand(4000, generator=misc.generator('phases'))), draw(100))])
def test_unit_variance_in_unit_variance_out(layer, x):
    out = layer(x).detach()
    assert out.mean().abs() < 0.02 and float(out.square().mean()) == pytest.approx(1, abs=0.02)


def test_a_convolution_keeps_the_variance_inside_the_image():
    """Zero padding takes from the border only."""
    out = MPConv(3 * draw(64, 16, 3, 3))(draw(40, 16, 8, 8)).detach()
    assert out[:, :, 1:-1, 1:-1].square().mean() == pytest.approx(1, abs=0.02)
    assert out[:, :, 0].square().mean() == pytest.approx(2 / 3 * (6 + 2 * 2 / 3) / 8, abs=0.03)


def test_the_size_of_a_weight_changes_nothing_but_its_gradient():
    """Gradients are orthogonal to the rows, and inversely proportional to their size."""
    weight, x = draw(5, 7), draw(9, 7)
    found = []
    for size in (1.0, 100.0):
        layer = MPConv(size * weight)
        out = layer(x)
        out.square().sum().backward()
        assert ((layer.weight.grad * layer.weight).sum(1).abs() < 2e-3 * layer.weight.grad.norm() * layer.weight.norm()).all()
        found.append((out.detach(), size * layer.weight.grad))
    for small, large in zip(*found):
        torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-3)


def test_float16_parameters_round_the_gain_over_the_root_of_the_inputs():
    """As published: the quotient has the gain's type, everything else float32."""
    weight, gain, x = draw(5, 30).half(), torch.tensor(0.777).half(), draw(9, 30)
    exact = torch.nn.functional.linear(x, normalize(weight.float()) * (gain / math.sqrt(30)).float())
    torch.testing.assert_close(MPConv(weight)(x, gain), exact, rtol=0, atol=1e-6)
    rounding = abs(float(MPConv(weight)(x, gain).norm() / MPConv(weight)(x, gain.float()).norm()) - 1)
    assert 1e-5 < rounding < 2 ** -11


def test_half_precision_inside_is_close_to_float32():
    layer, x = MPConv(draw(8, 4, 3, 3)), draw(2, 4, 5, 5)
    rough = layer(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), layer(x), rtol=0, atol=0.03)
    large = torch.full([1, 4096], 300.0, dtype=torch.float16)  # whose sum of squares float16 cannot hold
    torch.testing.assert_close(normalize(large), torch.ones_like(large))


def test_normalising_again_moves_a_weight_by_eps():
    once = normalize(draw(3, 50).double())
    assert float((normalize(once) / once).mean()) == pytest.approx(1 / (float(once.square().mean().sqrt()) + EPS), rel=1e-6)
    assert not normalize(torch.zeros(2, 3)).any() and normalize(torch.zeros(2, 3)).isfinite().all()
