# SPDX-License-Identifier: Apache-2.0
"""The rounds of refinement on Gaussian data, whose models' variances follow recursions in closed form (design of the loop).

Data of variance v with noise of level s; the model of round k is the exact denoiser of variance v_k. A round restores y ~ N(0, v + s^2)."""

import math

import pytest
import torch

from tests.support.denoisers import unit
from training.refinement import restoring
from training.refinement.restoring import restored
from training.sampling.steppers import STEPPERS

S = 2.0  # of v = 0.1 and s = 2 the rounds are those of v = .001 and s = .2


class Gaussian:
    """E[x_0 | x] of N(0, v)."""

    sigma_min, label_dim = 0.01, 0

    def __init__(self, v):
        self.v = v

    def __call__(self, x, sigma, class_labels=None):
        return self.v / (self.v + sigma.double() ** 2) * x


def ode(v_k, v, end=0.0):
    """The flow scales by the ratio of standard deviations; a set of level s_k then has the variance of the model less s_k^2."""
    return (v_k + end ** 2) * (v + S ** 2) / (v_k + S ** 2) - end ** 2


def sde(v_k, v, end=0.0):
    a = (v_k + end ** 2) / (v_k + S ** 2)
    return a ** 2 * (v + S ** 2) + (v_k + end ** 2) * (S ** 2 - end ** 2) / (v_k + S ** 2) - end ** 2


class Impulse:
    """In place of RowDraws: row j has noise 1 in step j - 1 alone, so that every row is one response of a linear process."""

    def __init__(self, key, numbers, device):
        self.step = 0

    def randn_like(self, x):
        self.step += 1
        noise = torch.zeros_like(x)
        noise[self.step] = 1
        return noise


def next_variance(sampler, v_k, v, end, steps, monkeypatch):
    """Variance of the restored images, less that of their level, exactly: responses to y, and to the noise of each step."""
    monkeypatch.setattr(restoring, 'RowDraws', Impulse)
    stochastic = 'sde' in sampler
    y = torch.zeros([1 + steps * stochastic, 1, 1, 1], dtype=torch.float64)
    y[0] = 1
    level = torch.full([len(y)], S, dtype=torch.float64)
    response = restored(Gaussian(v_k), y, level, torch.full_like(level, end), range(len(y)), stepper=STEPPERS[sampler], num_steps=steps,
                        key=(0,), rows=len(y)).flatten()
    return (response[0].square() * (v + S ** 2) + response[1:].square().sum() - end ** 2).item()


@pytest.mark.parametrize(('sampler', 'recursion'), [('heun', ode), ('dpmpp_2m_sde', sde)])
@pytest.mark.parametrize('end', [0.0, 0.5])
@pytest.mark.parametrize('v_k', [8.0, 5.0, 4.0, 2.0])
def test_one_round_follows_the_recursion(sampler, recursion, end, v_k, monkeypatch):
    found = next_variance(sampler, v_k, 4.0, end, 100, monkeypatch)
    assert found == pytest.approx(recursion(v_k, 4.0, end), rel=2e-3)


@pytest.mark.parametrize(('sampler', 'recursion', 'share', 'rounds'), [('heun', ode, 0.1, 30), ('dpmpp_2m_sde', sde, 0.1, 47)])
def test_rounds_to_ten_percent_with_clean_images(sampler, recursion, share, rounds, monkeypatch):
    """A share c of clean images: the next model is of variance c v + (1 - c) v'. Detail, v = s^2 / 40, from v + s^2."""
    v, v_k, count = 0.1, 0.1 + S ** 2, 0
    while v_k > 1.1 * v and count < 60:
        v_k = share * v + (1 - share) * next_variance(sampler, v_k, v, 0.0, 100, monkeypatch)
        count += 1
    assert abs(count - rounds) <= 1


@pytest.mark.parametrize(('recursion', 'share', 'rounds'), [(sde, 0.0, 2572), (ode, 0.0, 97), (sde, 0.1, 47), (ode, 0.1, 30)])
def test_rounds_to_ten_percent_in_closed_form(recursion, share, rounds):
    v, v_k, count = 0.1, 0.1 + S ** 2, 0
    while v_k > 1.1 * v:
        v_k = share * v + (1 - share) * recursion(v_k, v)
        count += 1
    assert count == rounds


@pytest.mark.parametrize(('sampler', 'recursion'), [('heun', ode), ('dpmpp_2m_sde', sde)])
def test_draws_of_the_program_give_that_variance(sampler, recursion):
    """8 images of 128 x 128 independent pixels: standard error of a variance 0.4 %."""
    v, v_k = 4.0, 6.0
    y, level = math.sqrt(v + S ** 2) * unit(8, 1, 128, 128), torch.full([8], S, dtype=torch.float64)
    found = restored(Gaussian(v_k), y, level, 0 * level, range(8), stepper=STEPPERS[sampler], num_steps=30, key=(0,))
    assert found.var() == pytest.approx(recursion(v_k, v), rel=0.02)


def test_rows_have_their_own_levels_and_ends():
    """Rows at their end already stay as they are, and draws depend on the key and raw_idx alone, not on the batch."""
    y = unit(4, 1, 4, 4)
    level, end = (torch.tensor(values, dtype=torch.float64) for values in ([0.2, 0.1, 0.4, 0.05], [0.0, 0.1, 0.1, 0.1]))
    run = lambda rows, key=(7, 'refinement', 1): restored(Gaussian(0.25), y[rows], level[rows], end[rows], [10, 11, 12, 13][rows],
                                                          stepper=STEPPERS['dpmpp_2m_sde'], num_steps=4, key=key)
    whole = run(slice(None))
    assert torch.equal(whole[1], y[1]) and torch.equal(whole[3], y[3]) and not torch.equal(whole[0], y[0])
    assert torch.equal(run(slice(2, 3)), whole[2:3])
    assert not torch.equal(run(slice(2, 3), (7, 'refinement', 2)), whole[2:3])
