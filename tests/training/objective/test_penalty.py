# SPDX-License-Identifier: Apache-2.0
"""Penalties: published numbers, limits, bounds, schedules, and what the robust ones aim at."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from torch_utils import registry
from training.data.batches import Batch
from training.objective import penalty
from training.objective.loss import AmbientLoss
from training.objective.penalty import PENALTIES
from training.objective.weighting import WEIGHTS

HUBER = load_file(GOLDEN / 'weights' / 'huber.safetensors')
ROBUST = [name for name in PENALTIES if name != 'squared']
SCHEDULES = ['constant', 'exponential', 'snr']
FAR = torch.tensor(1e9, dtype=torch.float64)  # where c_out is sigma_data


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmas(n):
    return torch.logspace(-4, 4, n, dtype=torch.float64).reshape(-1, 1, 1, 1)


def test_squared_penalty_is_the_square():
    error = torch.tensor([[-2.0, 0.0, 3.0]])
    assert PENALTIES['squared'](error, sigma=None).tolist() == [[4.0, 0.0, 9.0]]


# ---- published numbers


@pytest.mark.parametrize('script, piece, factor', [
    ('diffusers.text_to_image.huber', penalty.pseudo_huber, 1), ('diffusers.dreambooth.huber', penalty.pseudo_huber, 1),
    ('sphl.dreambooth.huber', penalty.pseudo_huber, 0.5), ('sphl.dreambooth.huber_scheduled', penalty.pseudo_huber, 0.5),
    ('diffusers.text_to_image.smooth_l1', penalty.smooth, 1), ('diffusers.dreambooth_lora.smooth_l1', penalty.smooth, 1)])
def test_published_huber_values(script, piece, factor):
    """On residuals of a scale of 1; SPHL writes half of it, so that small errors cost e^2 / 2."""
    for c, expected in zip(HUBER['c'].tolist(), HUBER[script]):
        ours = piece(HUBER['d'], FAR, c=c, schedule='constant', sigma_data=1.0)
        # The published form cancels for small errors: its own rounding, 1e-16 c^2, is all that is allowed.
        torch.testing.assert_close(factor * ours, expected, rtol=1e-12, atol=1e-15 * max(c, c ** 2))


@pytest.mark.parametrize('alphas', ['ddpm_linear', 'sd_scaled_linear'])
def test_published_schedules(alphas):
    t, abar = HUBER['t'].double(), HUBER[f'alphas_cumprod.{alphas}'].double()
    sigma = ((1 - abar) / abar).sqrt()
    in_cosine_time = (math.pi / 2 * t / 1000).tan()  # the sigma at which the cosine schedule has this time
    for c in HUBER['c'].tolist():
        found = {name: HUBER[f'schedule.{name}.{alphas}.c{c:g}' if c < 1 else f'schedule.{name}.{alphas}.c{c}'] for name in SCHEDULES}
        torch.testing.assert_close(penalty.threshold(sigma, c, 'snr'), found['snr'], rtol=1e-5, atol=0)  # recorded in single precision
        torch.testing.assert_close(penalty.threshold(in_cosine_time, c, 'exponential'), found['exponential'], rtol=1e-10, atol=0)
        torch.testing.assert_close(penalty.threshold(sigma, c, 'constant'), found['constant'], rtol=0, atol=0)


@pytest.mark.parametrize('c', [1e-3, 0.1, 2.0])
def test_schedules_go_from_one_to_c(c):
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    for schedule in ('snr', 'exponential'):
        assert penalty.threshold(ends, c, schedule).tolist() == pytest.approx([1, c], rel=1e-12)
        between = penalty.threshold(sigmas(50), c, schedule).flatten()
        assert (between.diff() * (c - 1) > 0).all()
    assert penalty.threshold(torch.ones(1, dtype=torch.float64), c, 'exponential').item() == pytest.approx(math.sqrt(c))
    assert (penalty.threshold(sigmas(5), c, 'constant') == c).all()


# ---- definition, limits, bounds


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_c_is_in_units_of_the_residual_of_the_network(schedule):
    """rho = s^2 H_c(e / s), s = c_out, from its definition; the norm form has H of the length of the image, and c per element."""
    sigma, d = sigmas(17), 0.7
    s = sigma * d / (sigma ** 2 + d ** 2).sqrt()
    error, c = s * randn(17, 2, 3, 4), 0.3
    knee = penalty.threshold(sigma, c, schedule)
    H = lambda e, c: 2 * c * ((e ** 2 + c ** 2).sqrt() - c)
    options = {'c': c, 'schedule': schedule, 'sigma_data': d}
    torch.testing.assert_close(penalty.pseudo_huber(error, sigma, **options), s ** 2 * H(error / s, knee), rtol=1e-9, atol=0)
    torch.testing.assert_close(penalty.smooth(error, sigma, **options), s ** 2 * H(error / s, knee) / knee, rtol=1e-9, atol=0)
    length = error.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    norm = penalty.pseudo_huber_norm(error, sigma, **options)
    assert norm.shape == (17, 1, 1, 1)
    torch.testing.assert_close(norm, s ** 2 * H(length / s, knee * math.sqrt(24)), rtol=1e-9, atol=0)


def test_norm_form_is_the_one_of_improved_consistency_training_times_2c():
    """Theirs is sqrt(||x||^2 + c^2) - c with c = 0.00054 sqrt(dimensions): 0.0299 for CIFAR-10."""
    error = randn(4, 3, 32, 32)
    c = 0.00054 * math.sqrt(3 * 32 * 32)
    assert c == pytest.approx(0.0299, abs=5e-5)
    published = (error.square().flatten(1).sum(1) + c ** 2).sqrt() - c
    ours = penalty.pseudo_huber_norm(error, FAR.reshape(1, 1, 1, 1).expand(4, 1, 1, 1), sigma_data=1.0).flatten()
    torch.testing.assert_close(ours, 2 * c * published, rtol=1e-10, atol=0)


@pytest.mark.parametrize('name', ['pseudo_huber', 'pseudo_huber_norm'])
def test_a_large_c_is_the_squared_error(name):
    """Residuals below 1 in size, c = 1000: to 1e-6 of a residual's unit squared, and 1e-5 of the whole loss."""
    sigma = sigmas(33)
    s = penalty.residual_scale(sigma, 0.5)
    error = s * (2 * torch.rand(33, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1)
    rho = PENALTIES[name](error, sigma, c=1e3, schedule='constant')
    if name == 'pseudo_huber':
        assert ((rho - error ** 2).abs() / s ** 2).max() < 1e-6
    torch.testing.assert_close(rho.flatten(1).sum(1), (error ** 2).flatten(1).sum(1), rtol=1e-5, atol=0)


def test_a_small_c_is_the_absolute_error():
    sigma, error = sigmas(9), randn(9, 1, 4, 4)
    s = penalty.residual_scale(sigma, 0.5)
    torch.testing.assert_close(penalty.pseudo_huber(error, sigma, c=1e-9, schedule='constant'), 2e-9 * s * error.abs(), rtol=1e-4, atol=0)
    torch.testing.assert_close(penalty.smooth(error, sigma, c=1e-9, schedule='constant'), 2 * s * error.abs(), rtol=1e-4, atol=0)


def gradient(name, error, sigma, **options):
    error = error.clone().requires_grad_()
    return torch.autograd.grad(PENALTIES[name](error, sigma, **options).sum(), error)[0]


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('c', [1e-3, 0.1, 3.0])
def test_the_pull_of_an_outlier_is_bounded(schedule, c):
    """|d rho / d e| <= 2c in residual units for every error however large; of an image in the norm form, its length."""
    sigma = sigmas(21)
    s, options = penalty.residual_scale(sigma, 0.5), {'c': c, 'schedule': schedule}
    error = s * randn(21, 3, 4, 4) * torch.logspace(-3, 4, 48, dtype=torch.float64).reshape(3, 4, 4)
    knee = penalty.threshold(sigma, c, schedule)
    pull = gradient('pseudo_huber', error, sigma, **options) / s
    assert (pull.abs() <= 2 * knee * (1 + 1e-12)).all() and (pull.abs() / knee).max() > 1.9
    assert (gradient('smooth', error, sigma, **options).abs() <= 2 * s * (1 + 1e-12)).all()
    whole = gradient('pseudo_huber_norm', error, sigma, **options).flatten(1).norm(dim=1) / s.flatten()
    assert (whole <= 2 * knee.flatten() * math.sqrt(48) * (1 + 1e-12)).all()


@pytest.mark.parametrize('name', ROBUST)
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_a_mixed_batch_is_its_images_one_by_one(name, schedule):
    """Never one level for a batch: each image has the c of its own sigma."""
    sigma = sigmas(9)
    error = 0.3 * penalty.residual_scale(sigma, 0.5) * randn(9, 2, 3, 3)
    together = PENALTIES[name](error, sigma, schedule=schedule)
    alone = torch.cat([PENALTIES[name](error[i:i + 1], sigma[i:i + 1], schedule=schedule) for i in range(9)])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)
    if schedule != 'constant':
        own = registry.parameters(PENALTIES[name])['c']
        as_one = penalty.threshold(sigma, own, schedule)[4].item()
        one_level = PENALTIES[name](error, sigma, c=as_one, schedule='constant')
        assert torch.allclose(together[4], one_level[4], rtol=1e-12, atol=0)
        assert not torch.isclose(together, one_level, rtol=1e-3, atol=0).flatten(1).all(1)[[0, -1]].any()


@pytest.mark.parametrize('name', PENALTIES)
@pytest.mark.parametrize('weight', WEIGHTS)
@pytest.mark.parametrize('who', ['none', 'half', 'all'])
def test_every_weight_and_penalty_gives_finite_loss_and_gradient(name, weight, who):
    """In single precision, sigma from 1e-4 to 1e4, clean, mixed and noisy batches; a perfect prediction is no exception."""
    sigma = sigmas(16).float()
    noisy = {'none': torch.zeros(16), 'half': torch.arange(16) % 2, 'all': torch.ones(16)}[who]
    own = 0.5 * sigma * noisy.reshape(-1, 1, 1, 1)
    images, noise = randn(16, 2, 4, 4).float(), randn(16, 2, 4, 4, seed=1).float()
    term = AmbientLoss(registry.build(weight, WEIGHTS, sigma_data=0.5), registry.build(name, PENALTIES, sigma_data=0.5))
    for scale in (0.9, 0.0):
        gain = torch.full([], scale, requires_grad=True)
        c_out = penalty.residual_scale(sigma, 0.5)
        net = lambda x, s, gain=gain, c_out=c_out, **labels: images + gain * c_out * x / (1 + s)
        values = term(net, Batch(images, own, sigma, noise))['denoise']
        slope, = torch.autograd.grad(values.sum(), gain)
        assert values.shape == (16,) and values.isfinite().all() and slope.isfinite()


# ---- what the minimiser is


def least(c, scale):
    """The constant of least expected penalty for X = scale with probability 0.1, and 0 otherwise, found by bisection."""
    sigma_data, low, high = scale, 0.0, scale
    at = FAR.reshape(1, 1, 1, 1)
    for _ in range(60):
        middle = (low + high) / 2
        slope = sum(p * gradient('pseudo_huber', torch.full([1, 1, 1, 1], middle - x, dtype=torch.float64), at, c=c, schedule='constant',
                                 sigma_data=sigma_data).item() for p, x in [(0.9, 0.0), (0.1, scale)])
        low, high = (low, middle) if slope > 0 else (middle, high)
    return middle / scale


@pytest.mark.parametrize('c, expected', [(10, 0.0996), (3, 0.0962), (1, 0.0756), (0.5, 0.0494), (0.1, 0.0111), (0.01, 0.0011)])
def test_the_minimiser_lies_between_mean_and_median(c, expected):
    """A skewed law of two points, mean 0.1 and median 0: the bias that noisy images get. It scales with the residual, and so does c."""
    found = least(c, scale=1.0)
    assert found == pytest.approx(expected, abs=6e-5)
    assert least(c, scale=0.05) == pytest.approx(found, rel=1e-9)
    if c >= 3:  # to first order in 1 / c^2: minus the third central moment, 0.072, over 2 c^2
        assert found == pytest.approx(0.1 - 0.072 / (2 * c ** 2), abs=3e-4)


# ---- refusals


@pytest.mark.parametrize('name', ROBUST)
@pytest.mark.parametrize('options, said', [
    ('c=0', 'c=0 must be positive'), ('c=-1', 'c=-1 must be'), ('c=inf', 'c=inf must be'), ('schedule=cubic', 'constant, exponential, snr'),
    ('sigma_data=0', 'sigma_data=0 must be')])
def test_values_out_of_range_are_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        registry.build(f'{name}:{options}', PENALTIES, '--penalty')(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
