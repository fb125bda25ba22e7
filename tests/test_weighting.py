# SPDX-License-Identifier: Apache-2.0
"""Weights on the squared x_0 error against their definitions, and penalties."""

import pytest
import torch

from training import penalty, registry, weighting
from training.weighting import WEIGHTS

SIGMA = torch.logspace(-4, 4, 33, dtype=torch.float64).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize('sigma_data', [0.5, 0.6, 1.3])
def test_edm_weight_is_one_over_c_out_squared(sigma_data):
    c_out = SIGMA * sigma_data / (SIGMA ** 2 + sigma_data ** 2).sqrt()
    torch.testing.assert_close(weighting.edm(SIGMA, sigma_data) * c_out ** 2, torch.ones_like(SIGMA), rtol=1e-12, atol=0)


def test_snr_is_signal_power_over_noise_power():
    torch.testing.assert_close(weighting.snr(SIGMA), 1 / SIGMA ** 2, rtol=1e-13, atol=0)
    torch.testing.assert_close(weighting.snr(SIGMA, signal=0.5), 0.25 / SIGMA ** 2, rtol=1e-13, atol=0)


def test_uniform_weight_is_one():
    assert (weighting.uniform(SIGMA) == 1).all()


@pytest.mark.parametrize('name', WEIGHTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_weights_are_finite_positive_and_keep_dtype_and_shape(name, dtype):
    weight = registry.build(name, WEIGHTS)(SIGMA.to(dtype))
    assert weight.dtype == dtype and weight.shape == SIGMA.shape
    assert weight.isfinite().all() and (weight > 0).all()
    torch.testing.assert_close(weight.double(), registry.build(name, WEIGHTS)(SIGMA), rtol=1e-6, atol=0)


def test_sigma_data_comes_from_the_network_unless_given():
    """One source of truth: the caller's sigma_data reaches the weight, an explicit one wins."""
    from_network = registry.build('edm', WEIGHTS, sigma_data=1.3)
    explicit = registry.build('edm:sigma_data=0.7', WEIGHTS, sigma_data=1.3)
    assert torch.equal(from_network(SIGMA), weighting.edm(SIGMA, 1.3)) and torch.equal(explicit(SIGMA), weighting.edm(SIGMA, 0.7))


@pytest.mark.parametrize('spec', ['edm:sigma_data=0', 'snr:signal=-1'])
def test_values_out_of_range_are_refused(spec):
    with pytest.raises(ValueError, match='must be positive'):
        registry.build(spec, WEIGHTS)(SIGMA)


def test_squared_penalty_is_the_square():
    error = torch.tensor([[-2.0, 0.0, 3.0]])
    assert penalty.PENALTIES['squared'](error, sigma=None).tolist() == [[4.0, 0.0, 9.0]]
