# SPDX-License-Identifier: Apache-2.0
"""Optimizers against PyTorch's own, learning-rate schedules against their formulas, and both in a run."""

import math

import pytest
import torch

from dnnlib import UserError
from tests.support import tiny
from torch_utils import registry
from training.run.build import build_optimizer
from training.run.config import OptimizerConfig
from training.run.optimizer import LR_SCHEDULES, OPTIMIZERS, LearningRate

BATCH = 64


def trajectory(make):
    """Weights after each of five steps on gradients that are the same for every optimizer; make: params -> optimizer."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer, found = make([weight]), []
    for step in range(5):
        weight.grad = torch.randn(6, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        found.append(weight.detach().clone())
    return torch.stack(found)


# ---- optimizers


@pytest.mark.parametrize('spec, cls, options', [
    ('adam', torch.optim.Adam, {}),
    ('adam:weight_decay=0.1', torch.optim.Adam, dict(weight_decay=0.1)),
    ('adam:beta1=0.5,beta2=0.99,eps=1e-4', torch.optim.Adam, dict(betas=(0.5, 0.99), eps=1e-4)),
    ('adam:beta1=0', torch.optim.Adam, dict(betas=(0.0, 0.999))),
    ('adamw', torch.optim.AdamW, dict(weight_decay=0.01)),
    ('adamw:weight_decay=0.3,beta2=0.95', torch.optim.AdamW, dict(weight_decay=0.3, betas=(0.9, 0.95)))])
def test_steps_are_those_of_pytorch(spec, cls, options):
    found = trajectory(lambda params: build_optimizer(OptimizerConfig(kind=spec, lr=0.02), params))
    assert torch.equal(found, trajectory(lambda params: cls(params, lr=0.02, fused=True, **options)))
    torch.testing.assert_close(found, trajectory(lambda params: cls(params, lr=0.02, **options)))


def test_decay_of_adamw_does_not_depend_on_the_gradient():
    """Where the gradient is zero a weight shrinks by lr weight_decay a step; adam's penalty goes through the moments instead."""
    def after(spec, steps=3):
        weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        optimizer = build_optimizer(OptimizerConfig(kind=spec, lr=0.1), [weight])
        for _ in range(steps):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        return weight.item()

    assert after('adamw:weight_decay=0.2') == pytest.approx(2 * (1 - 0.1 * 0.2) ** 3)
    assert after('adam:weight_decay=0.2') == pytest.approx(2 - 3 * 0.1, rel=1e-3)  # a step of lr each, as for any constant sign
    assert after('adam') == after('adamw:weight_decay=0') == 2


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_found_inf_skips_the_update(name):
    """What the step relies on, for whatever optimizer: weights, moments and the step count stay."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(OptimizerConfig(kind=name, lr=0.1), [weight])
    for value, bad in [(1.0, 0.0), (float('nan'), 1.0)]:
        before = tiny.digest([weight, optimizer.state_dict()['state']])
        weight.grad = torch.full([3], value)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(bad)
        optimizer.step()
        assert (tiny.digest([weight, optimizer.state_dict()['state']]) == before) == bool(bad)
    assert weight.isfinite().all()


@pytest.mark.parametrize('spec, said', [
    ('adam:beta1=1', 'beta1=1 must be 0 or more and below 1'), ('adamw:beta2=-0.1', 'beta2=-0.1 must be'),
    ('adam:eps=-1', 'epsilon'), ('adam:weight_decay=-1', 'weight_decay'), ('adam:lr=1', '"adam" has no key "lr"'),
    ('sgd', 'choose from adam, adamw')])
def test_values_out_of_range_are_refused(spec, said):
    with pytest.raises(UserError, match=f'--optimizer={spec}: .*{said}'):
        build_optimizer(OptimizerConfig(kind=spec), [torch.nn.Parameter(torch.zeros(1))])


# ---- schedules


def rate(schedule, nimg, rampup_kimg=0.0, lr=2e-3):
    return LearningRate(OptimizerConfig(lr=lr, schedule=schedule, rampup_kimg=rampup_kimg))(nimg, BATCH)


def test_constant_is_constant():
    assert [rate('constant', nimg) for nimg in (BATCH, 10**5, 10**9)] == [2e-3] * 3


@pytest.mark.parametrize('ref', [1, 100, 70000])
def test_inverse_sqrt_is_the_published_formula(ref):
    """Karras et al. 2024, equation 67: lr / sqrt(max(t / t_ref, 1)), t in steps; 1 until t_ref."""
    for t in (1, ref // 2, ref - 1, ref, ref + 1, 2 * ref, 4 * ref, 1000 * ref):
        found = rate(f'inverse_sqrt:ref={ref}', t * BATCH)
        assert found == pytest.approx(2e-3 / math.sqrt(max(t / ref, 1)) if t else 0, rel=1e-12)
        assert t > ref or found in (0, 2e-3)
    assert rate(f'inverse_sqrt:ref={ref}', 4 * ref * BATCH) == pytest.approx(1e-3)
    assert rate('inverse_sqrt:ref=0', 10**12) == 2e-3  # never falls


def test_cosine_goes_from_one_to_least():
    at = lambda nimg, spec='cosine:kimg=10,least=0.1': rate(spec, nimg) / 2e-3
    assert at(1e-3) == pytest.approx(1) and at(5000) == pytest.approx(0.55) and at(10_000) == at(10**8) == pytest.approx(0.1)
    assert at(2500) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    values = [at(nimg) for nimg in range(1, 10_000, 100)]
    assert all(a > b for a, b in zip(values, values[1:]))
    assert at(10_000, 'cosine:kimg=10') == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize('schedule', ['constant', 'inverse_sqrt:ref=2', 'cosine:kimg=1,least=0.2'])
def test_the_rampup_multiplies_each(schedule):
    for nimg in (0, 16, 64, 128, 400, 900, 5000):
        assert rate(schedule, nimg, rampup_kimg=0.5) == pytest.approx(rate(schedule, max(nimg, 1e-9)) * min(nimg / 500, 1), rel=1e-12)
    assert rate(schedule, 0, rampup_kimg=0.5) == 0


@pytest.mark.parametrize('spec, said', [
    ('inverse_sqrt:ref=-1', 'ref=-1 must be'), ('cosine:kimg=-1', 'kimg=-1 must be above 0'), ('cosine', 'kimg=0.0 must be above 0'),
    ('cosine:kimg=1,least=1.5', 'least=1.5 from 0 to 1')])
def test_schedules_out_of_range_are_refused(spec, said):
    with pytest.raises(ValueError, match=said):
        registry.build(spec, LR_SCHEDULES)(1, BATCH)


# ---- in a run


@pytest.mark.parametrize('given, kept', [
    ('cosine', 'cosine:kimg=0.32'), ('cosine:least=0.1', 'cosine:least=0.1,kimg=0.32'), ('cosine:kimg=0', 'cosine:kimg=0.32'),
    ('cosine:kimg=7', 'cosine:kimg=7'), ('inverse_sqrt:ref=5', 'inverse_sqrt:ref=5'), ('constant', 'constant')])
def test_the_length_of_a_cosine_goes_into_the_configuration(tmp_path, given, kept):
    config = tiny.options(tmp_path, '--duration=0.00032', f'--lr-schedule={given}')
    assert registry.parse(config.optimizer.schedule) == registry.parse(kept)


def test_a_run_steps_at_the_rates_of_its_schedule(tmp_path):
    """Batches of 16: nimg counts the images before the step."""
    run = tiny.make_run(tmp_path, '--optimizer=adamw:weight_decay=0.05', '--lr-schedule=inverse_sqrt:ref=2', '--lr=2e-3')
    assert isinstance(run.optimizer, torch.optim.AdamW) and run.optimizer.param_groups[0]['weight_decay'] == 0.05
    rates = []
    for _ in range(6):
        run.step()
        rates.append(run.optimizer.param_groups[0]['lr'])
    assert rates == pytest.approx([0, 2e-3, 2e-3, 2e-3 / math.sqrt(1.5), 2e-3 / math.sqrt(2), 2e-3 / math.sqrt(2.5)])
    assert all(p.isfinite().all() for p in run.params)
