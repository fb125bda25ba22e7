# SPDX-License-Identifier: Apache-2.0
"""Closed forms of ambient diffusion: published conversions, double Tweedie on Gaussian data, the reverse step."""

import functools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from training.diffusion import ambient

DATA = GOLDEN / 'losses'
PUBLISHED = load_file(DATA / 'ambient_losses.safetensors')


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_predict_at_equals_the_published_conversion():
    D, x, sigma, level = (PUBLISHED[f'conv.{name}'] for name in ('x0_pred', 'noisy_input', 'current_sigma', 'desired_sigma'))
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-13)
    close(ambient.predict_at(D, x, sigma, level), PUBLISHED['conv.ve_to_ve'])
    four = [t.reshape(-1, 1, 1, 1) for t in (sigma, level)]
    close(ambient.predict_at(D, x, *four), PUBLISHED['conv.ve_to_ve_4d_sigma_from_loss'])


def test_2a2_sigma_of_four_dimensions_cannot_pair_every_level_with_every_image():
    """The published helper turned [N,1,1,1] into [N,1,1,1,1,1,1], and D into [N,1,1,N,C,H,W], without an error."""
    D, x, noise = draw(5, 2, 4, 4), draw(5, 2, 4, 4, seed=1), draw(5, 2, 4, 4, seed=2)
    low, high = torch.linspace(0.1, 0.5, 5, dtype=torch.float64), torch.linspace(0.6, 3.0, 5, dtype=torch.float64)
    forms = [lambda i, low, high: ambient.predict_at(D[i], x[i], high, low),
             lambda i, low, high: ambient.add_noise(x[i], low, high, noise[i]),
             lambda i, low, high: ambient.reverse_step(x[i], D[i], high, low, noise[i])]
    for form in forms:
        four = form(slice(None), low.reshape(5, 1, 1, 1), high.reshape(5, 1, 1, 1))
        one_by_one = torch.cat([form(slice(i, i + 1), low[i], high[i]) for i in range(5)])
        assert four.shape == (5, 2, 4, 4) and torch.equal(four, form(slice(None), low, high)) and torch.equal(four, one_by_one)


def test_levels_may_be_numbers():
    D, x = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1)
    same = ambient.predict_at(D, x, torch.full([3], 0.5, dtype=torch.float64), torch.full([3], 0.2, dtype=torch.float64))
    assert torch.equal(ambient.predict_at(D, x, 0.5, 0.2), same)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_ends_are_exact(dtype):
    """level = 0 gives D, level = sigma gives x, and no noise is added from sigma to sigma: all to the bit."""
    D, x, noise = (draw(9, 1, 4, 4, seed=s).to(dtype) for s in range(3))
    sigma = torch.logspace(-3, 3, 9, dtype=dtype)
    assert torch.equal(ambient.predict_at(D, x, sigma, 0 * sigma), D)
    assert torch.equal(ambient.predict_at(D, x, sigma, sigma), x)
    assert torch.equal(ambient.add_noise(x, sigma, sigma, noise), x)
    assert torch.equal(ambient.add_noise(x, 0 * sigma, sigma, noise), x + sigma.reshape(-1, 1, 1, 1) * noise)
    assert torch.equal(ambient.reverse_step(x, D, sigma, sigma, noise), x)


@pytest.mark.parametrize('gap', [1e-2, 1e-4, 1e-6])
def test_nothing_cancels_near_sigma_n(gap):
    """Single precision, sigma a hair above sigma_n: 1 - r and the added noise keep their relative precision."""
    level = torch.tensor(0.2)
    sigma = level * (1 + gap)
    exact = (sigma.double() - level.double()) * (sigma.double() + level.double())
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    assert ambient.predict_at(one, zero, sigma, level).item() == pytest.approx((exact / sigma.double() ** 2).item(), rel=1e-6)
    assert ambient.add_noise(zero, level, sigma, one).item() == pytest.approx(exact.sqrt().item(), rel=1e-6)


def test_add_noise_reaches_the_level():
    y = 0.2 * draw(400_000, 1, 1, 1)
    std = ambient.add_noise(y, 0.2, 0.5, draw(400_000, 1, 1, 1, seed=1)).std().item()
    assert std == pytest.approx(0.5, rel=5 / math.sqrt(2 * 400_000))  # five standard errors


def test_double_tweedie_on_gaussian_data():
    """For x_0 ~ N(0, s^2) both conditional means are linear in x; one is the other's image under predict_at."""
    x, s = draw(6, 1, 3, 3), 0.5
    sigma, level = torch.linspace(0.3, 2.0, 6, dtype=torch.float64), torch.linspace(0.0, 0.3, 6, dtype=torch.float64)
    mean_of = lambda variance: variance.reshape(-1, 1, 1, 1) / (s ** 2 + sigma ** 2).reshape(-1, 1, 1, 1) * x
    D = mean_of(torch.full([6], s ** 2, dtype=torch.float64))
    torch.testing.assert_close(ambient.predict_at(D, x, sigma, level), mean_of(s ** 2 + level ** 2), rtol=1e-12, atol=1e-14)


def test_reverse_step_takes_gaussian_data_down_to_the_next_level():
    """Many small steps with the exact denoiser end in the law of the data at the last level."""
    s, levels = 0.5, torch.linspace(2.0, 0.1, 400).tolist()
    x = math.hypot(s, levels[0]) * draw(20_000, 1, 1, 1)
    for i, (now, then) in enumerate(zip(levels[:-1], levels[1:])):
        D = s ** 2 / (s ** 2 + now ** 2) * x
        x = ambient.reverse_step(x, D, now, then, draw(20_000, 1, 1, 1, seed=i + 1))
    # Four standard errors of a std over 20,000 draws are 2 %; the error of the discretisation is below 1 % here.
    assert x.std().item() == pytest.approx(math.hypot(s, 0.1), rel=0.03)


def test_snr_in_decibels():
    """The papers quote 14.15 dB at sigma = 0.2."""
    assert ambient.snr_db(0.2) == pytest.approx(14.1497, abs=1e-4)
    assert ambient.snr_db(0.1) == pytest.approx(20.04, abs=0.005) and ambient.snr_db(0.05) == pytest.approx(26.03, abs=0.005)
    assert ambient.snr_db(0.2, sigma_data=0.5) == pytest.approx(20 * math.log10(2.5))
    assert ambient.snr_db(0) == math.inf


def test_the_recorded_broadcast_fault_is_not_ours():
    """2a.2 once more, by its record: the shape the loss took, and the shape it should have."""
    record = next(case for case in json.loads((DATA / 'ambient_losses.json').read_text()) if 'expected' in case)
    images = PUBLISHED['images']
    sigma = PUBLISHED['noconsist0.sigma'].reshape(-1, 1, 1, 1)
    shape = list(ambient.predict_at(images, images, sigma, PUBLISHED['current_sigma'].reshape(-1, 1, 1, 1)).shape)
    assert shape == record['expected'] != record['loss_shape']
