# SPDX-License-Identifier: Apache-2.0
"""EDM2's sampler: Heun's method with guidance by an unconditional network, and with noise, against reference outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support import edm2
from training.diffusion.schedules import SCHEDULES
from training.sampling.generate import guided
from training.sampling.guidance import Guidance
from training.sampling.steppers import heun

ABOUT = json.loads((edm2.DATA / 'sampler.json').read_text())
PUBLISHED = load_file(edm2.DATA / 'sampler.safetensors')
CHURN = dict(S_churn=40.0, S_min=0.05, S_max=50.0, S_noise=1.003)


@pytest.fixture(scope='module')
def net():
    return edm2.case(ABOUT['net_case'])[0].requires_grad_(False)


@pytest.mark.parametrize('name, weight, churn', [('plain', 1, {}), ('guided', ABOUT['guidance'], {}), ('churn', ABOUT['guidance'], CHURN)])
def test_samples_are_the_published_ones(net, name, weight, churn):
    """In float64, where the published state and time steps are in float32: within 2e-5 of the largest value."""
    sigmas = SCHEDULES['edm'](ABOUT['num_steps'], sigma_min=0.002, sigma_max=80)
    draws = iter(PUBLISHED['churn_noise'])
    # Noise is drawn in every step here, and in the published code only in those at which it is added.
    noise = [next(draws) if CHURN['S_min'] <= sigma <= CHURN['S_max'] else torch.zeros([]) for sigma in sigmas[:-1]]
    assert sum(value.ndim > 0 for value in noise) == ABOUT['churn_draws_used']
    noise = iter(noise)
    denoise = guided(net, PUBLISHED['labels'], Guidance(weight, net=edm2.guide()))
    found = heun(denoise, PUBLISHED['noise'].double() * sigmas[0], sigmas, lambda x: next(noise).to(x), **churn)
    largest = float(PUBLISHED[f'sample.{name}'].abs().max())
    torch.testing.assert_close(found.float(), PUBLISHED[f'sample.{name}'], rtol=0, atol=2e-5 * largest)
    if f'sample.{name}.dtype64' in PUBLISHED:
        torch.testing.assert_close(found, PUBLISHED[f'sample.{name}.dtype64'], rtol=0, atol=1e-5 * largest)
