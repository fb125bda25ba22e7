# SPDX-License-Identifier: Apache-2.0
"""Bits of grey levels by the flow: against exact probabilities, against the variational bound, and what is fed to which."""

import math

import pytest
import torch

from tests.support.denoisers import unit
from tests.training.likelihood.test_bound import LearnedGaussian
from tests.training.networks.test_preconditioning import small
from torch_utils import misc
from training.diffusion.discrete import Cosine
from training.likelihood.bound import variational_bound
from training.likelihood.dequantisation import grey_levels, uniform

STD = 0.2


def digitised(*shape):
    """(grey levels of N(0, STD^2) in [-1,1], their exact bits a dimension)."""
    k = ((STD * unit(*shape).double() + 1) * 127.5).round()
    cdf = lambda offset: torch.special.ndtr(((k + offset) / 127.5 - 1) / STD)
    return k / 127.5 - 1, float(-(cdf(0.5) - cdf(-0.5)).log2().mean())


def test_flow_and_bound_agree_on_digitised_gaussian_data():
    """With the exact denoiser and decoder both are within 0.01 bits of the exact probabilities; draws of 131,072 numbers cost 0.003."""
    shape = 32, 1, 64, 64
    (x0, exact), diffusion = digitised(*shape), Cosine(100)
    net = LearnedGaussian(diffusion, STD)
    flow = grey_levels(net, diffusion, x0, unit(*shape, seed=1), variance='learned', sigma_data=STD, rtol=1e-3, atol=1e-3,
                       probes=torch.ones(len(x0), 1, *shape[1:]))  # D is c x: any probe gives its trace exactly
    bound = variational_bound(net, diffusion, x0, lambda t: unit(*shape, seed=t + 1), variance='learned')
    assert abs(float(flow.total.mean()) - exact) < 0.005
    assert abs(float(bound.total.mean()) - exact) < 0.01
    assert torch.equal(flow.decoder, bound.vb[:, 0])  # of the same noise
    torch.testing.assert_close(flow.total, flow.flow + flow.decoder - flow.noise)


def test_the_decoders_and_the_denoisers_errors_only_cost():
    """Another decoder, and a denoiser of narrower data than these, stay above the exact bits: what is reported is an upper bound."""
    shape = 8, 1, 32, 32
    (x0, exact), diffusion = digitised(*shape), Cosine(100)
    bits = lambda std, variance: float(grey_levels(LearnedGaussian(diffusion, std), diffusion, x0, unit(*shape, seed=1), variance=variance,
                                                   sigma_data=std, rtol=1e-3, atol=1e-3, probes=torch.ones(8, 1, *shape[1:])).total.mean())
    assert bits(STD, 'large') > exact + 0.02 and bits(0.15, 'learned') > exact + 0.02


def test_the_noise_term_is_the_entropy_on_average():
    diffusion = Cosine(100)
    x0 = torch.zeros(4, 1, 32, 32)
    found = grey_levels(LearnedGaussian(diffusion, STD), diffusion, x0, unit(4, 1, 32, 32), sigma_data=STD, rtol=1e-2, atol=1e-2,
                        probes=torch.ones(4, 1, 1, 32, 32))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * float(diffusion.levels[0]) ** 2)
    assert float(found.noise.mean()) == pytest.approx(entropy, abs=4 / math.log(2) / math.sqrt(2 * x0.numel()))


def test_an_image_does_not_depend_on_those_beside_it(monkeypatch):
    monkeypatch.setattr(misc, 'CPU_ROWS', (8, 8))  # so that the images need several calls
    net, diffusion = small('iddpm', label_dim=3, M=10, diffusion='cosine:steps=10'), Cosine(10)
    x0, labels, noise = (0.5 * unit(9, 2, 8, 8)).clamp(-1, 1), torch.eye(3)[torch.arange(9) % 3], unit(9, 2, 8, 8, seed=1)
    run = lambda rows: grey_levels(net, diffusion, x0[rows], noise[rows], class_labels=labels[rows], variance='learned', sigma_max=5,
                                   rtol=1e-1, atol=1e-1, probes=torch.ones(len(rows), 1, 2, 8, 8))
    together = run(torch.arange(9))
    for name, values in run(torch.tensor([8, 0]))._asdict().items():
        assert torch.equal(values, getattr(together, name)[[8, 0]]), name
    other = grey_levels(net, diffusion, x0[:1], noise[:1], class_labels=labels[1:2], variance='learned', sigma_max=5, rtol=1e-1, atol=1e-1,
                        probes=torch.ones(1, 1, 2, 8, 8))
    assert other.flow[0] != together.flow[0] and other.decoder[0] != together.decoder[0]


def test_uniform_noise_fills_a_grey_level():
    x0 = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    low, high = uniform(x0, torch.zeros(3)), uniform(x0, torch.ones(3))
    torch.testing.assert_close(high - low, torch.full_like(x0, 1 / 127.5))
    torch.testing.assert_close((high + low) / 2, x0)
