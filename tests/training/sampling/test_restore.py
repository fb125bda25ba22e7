# SPDX-License-Identifier: Apache-2.0
"""Restoration on Gaussian data, whose denoiser, posterior and probability flow are known in closed form."""

import math

import pytest
import torch

from tests.support.denoisers import unit
from training.sampling import steppers
from training.sampling.restore import posterior_mean, restore, row_levels

V = 0.25  # variance of the data


class Gaussian:
    """E[x_0 | x] of N(0, V)."""

    sigma_min, label_dim = 0.002, 0

    def __call__(self, x, sigma, class_labels=None):
        return V / (V + sigma.double() ** 2) * x


def noisy(count, *levels):
    """(x_0, y, sigma_n): images of one value, in turn of each level."""
    x_0, sigma_n = math.sqrt(V) * unit(count, 1, 1, 1), torch.tensor(levels, dtype=torch.float64).repeat(count // len(levels))
    return x_0, x_0 + sigma_n.reshape(-1, 1, 1, 1) * unit(count, 1, 1, 1, seed=1), sigma_n


def draws(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def test_levels_fall_in_each_row_from_its_own():
    levels = row_levels(Gaussian(), torch.tensor([0.1, 0.5, 0.001]), num_steps=5)
    assert levels.shape == (6, 3, 1, 1, 1) and levels.dtype == torch.float64
    torch.testing.assert_close(levels[0].flatten().float(), torch.tensor([0.1, 0.5, 0.001]))
    torch.testing.assert_close(levels[-2].flatten(), torch.tensor([0.002, 0.002, 0.001], dtype=torch.float64), rtol=1e-6, atol=0)
    assert not levels[-1].any() and (levels.diff(dim=0)[:, :2] < 0).all()
    stopped = row_levels(Gaussian(), torch.tensor([0.1, 0.5]), torch.tensor([0.05, 0.1]), num_steps=5)
    torch.testing.assert_close(stopped[-1].flatten().float(), torch.tensor([0.05, 0.1]))
    assert (stopped.diff(dim=0) < 0).all()


@pytest.mark.parametrize(('sigma_n', 'end'), [([0.2, 0.0], 0.0), ([0.2, 0.4], 0.3), ([0.2, 0.4], torch.tensor([0.0, 0.1])),
                                              ([0.2, math.inf], 0.0), ([0.2, math.nan], 0.0)])
def test_levels_that_do_not_fall_are_refused(sigma_n, end):
    with pytest.raises(ValueError):
        row_levels(Gaussian(), torch.tensor(sigma_n), end)


def test_posterior_mean_in_one_evaluation():
    x_0, y, sigma_n = noisy(6, 0.2, 0.4, 0.0)
    expected = V / (V + sigma_n.reshape(-1, 1, 1, 1) ** 2) * y
    torch.testing.assert_close(posterior_mean(Gaussian(), y, sigma_n), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('end', [0.0, 0.1])
def test_ode_follows_the_probability_flow(end):
    """x_end = x sqrt((V + end^2) / (V + sigma_n^2)), in each row from its own level."""
    _, y, sigma_n = noisy(8, 0.2, 0.4)
    expected = y * ((V + end ** 2) / (V + sigma_n.reshape(-1, 1, 1, 1) ** 2)).sqrt()
    torch.testing.assert_close(restore(Gaussian(), y, sigma_n, end, num_steps=40), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize('end', [0.0, 0.1])
def test_sde_draws_from_the_posterior(end):
    """x_end given y is N(a y, a (sigma_n^2 - end^2)), a = (V + end^2) / (V + sigma_n^2). 40,000 draws: s.e. of a ratio of stds 0.35 %."""
    _, y, sigma_n = noisy(80000, 0.2, 0.4)
    found = restore(Gaussian(), y, sigma_n, end, num_steps=18, stepper=steppers.dpmpp_2m_sde, randn_like=draws(), rows=len(y))
    for level in (0.2, 0.4):
        mine = sigma_n == level
        a = (V + end ** 2) / (V + level ** 2)
        gain = (found[mine] * y[mine]).mean() / y[mine].square().mean()
        spread = (found[mine] - a * y[mine]).std()
        assert gain == pytest.approx(a, rel=0.02)
        assert spread == pytest.approx(math.sqrt(a * (level ** 2 - end ** 2)), rel=0.02)


@pytest.mark.parametrize('stepper', ['heun', 'euler', 'dpmpp_2m', 'ddim', 'sde', 'ancestral', 'dpmpp_2m_sde'])
def test_rows_do_not_depend_on_the_others(stepper):
    """Levels of each row's own give what one common level gives."""
    _, y, sigma_n = noisy(10, 0.2, 0.4)
    zeros = lambda x: torch.zeros_like(x)
    together = restore(Gaussian(), y, sigma_n, stepper=steppers.STEPPERS[stepper], num_steps=5, randn_like=zeros)
    for level in (0.2, 0.4):
        mine = sigma_n == level
        alone = restore(Gaussian(), y[mine], sigma_n[mine], stepper=steppers.STEPPERS[stepper], num_steps=5, randn_like=zeros)
        torch.testing.assert_close(together[mine], alone, rtol=0, atol=0)


def test_networks_without_a_lower_limit():
    """EDM's networks say sigma_min = 0, where ln sigma is not finite."""
    class Unlimited(Gaussian):
        sigma_min = 0.0

    levels = row_levels(Unlimited(), torch.tensor([0.4, 0.001]))
    assert levels[-2].flatten().tolist() == pytest.approx([0.002, 0.001])


def test_a_row_whose_level_does_not_fall_leaves_the_others_alone():
    """At most LOWEST, all levels of a row are the same; the other rows keep their second order."""
    y = unit(2, 1, 1, 1)
    zeros = lambda x: torch.zeros_like(x)
    options = dict(stepper=steppers.dpmpp_2m_sde, num_steps=5, randn_like=zeros)
    together = restore(Gaussian(), y, torch.tensor([0.4, 0.001]), **options)
    torch.testing.assert_close(together[:1], restore(Gaussian(), y[:1], torch.tensor([0.4]), **options), rtol=0, atol=0)
    assert together.isfinite().all()
