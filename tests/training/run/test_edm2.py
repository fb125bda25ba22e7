# SPDX-License-Identifier: Apache-2.0
"""EDM2's training: loss, u(sigma), learning rate and three steps against reference outputs; forced weight normalisation in a run."""

import json

import pytest
import torch

from tests.support import edm2, tiny
from torch_utils import checkpoint
from torch_utils.magnitude import MPConv, normalize
from training.data.batches import Batch
from training.networks.edm2 import EDM2UNet
from training.objective.loss import AmbientLoss, Objective
from training.objective.weighting import EDM2Weight
from training.run.build import build_optimizer
from training.run.config import OptimizerConfig
from training.run.optimizer import LearningRate

FLAGS = ['--arch=edm2:channels_per_head=16', '--weight=edm2', '--optimizer=adam:beta2=0.99', '--lr=0.01',
         '--lr-schedule=inverse_sqrt:ref=2', '--power-ema=0.05,0.10', '--dropout=0.1']


@pytest.fixture
def golden():
    """(net, its objective, tensors, case.json)."""
    net, weight, io, about = edm2.case('edm2_latent_cond')
    return net, Objective([AmbientLoss(weight)]), io, about


def batch_of(io, about, step):
    law = about['loss_kwargs']
    sigma = (io['loss.rnd_normal'][step] * law['P_std'] + law['P_mean']).exp()
    return Batch(images=io['loss.images'], sigma_n=torch.zeros_like(sigma), sigma=sigma, noise=io['loss.noise'][step],
                 class_labels=io['loss.labels'], raw_idx=torch.arange(len(sigma)))


def loss_of(objective, net, batch):
    """[N], summed over C, H, W."""
    never = type('Never', (), {'step': 0})()
    return sum(objective(net, batch, never).values())


def norms(net, weight):
    named = [(f'unet.{name}', p) for name, p in net.model.named_parameters()] + list(weight.named_parameters())
    return {name: float(p.grad.double().norm()) for name, p in named}


def begin_step(*modules):
    for module in (inner for outer in modules for inner in outer.modules()):
        if hasattr(module, 'begin_step'):
            module.begin_step()


# ---- reference outputs


def test_the_loss_is_the_published_one(golden):
    net, objective, io, about = golden
    loss = loss_of(objective, net, batch_of(io, about, 0))
    torch.testing.assert_close(loss.double(), io['loss.eval_loss.f64'].sum([1, 2, 3]), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, io['loss.eval_loss'].sum([1, 2, 3]), rtol=1e-5, atol=0)
    loss.mean().backward()
    assert norms(net, objective.first.weight) == pytest.approx(about['training']['loss_eval_grad_norms'], rel=2e-4)


def test_three_steps_are_the_published_ones(golden):
    """Forced weight normalisation, objective, learning rate and Adam together."""
    net, objective, io, about = golden
    net.train()
    law, published = about['lr_kwargs'], about['training']
    config = OptimizerConfig(kind='adam:beta2=0.99', lr=law['ref_lr'], schedule=f'inverse_sqrt:ref={law["ref_batches"]:.0f}',
                             rampup_kimg=law['rampup_Mimg'] * 1e3)
    rate, optimizer = LearningRate(config), build_optimizer(config, [*net.parameters(), *objective.parameters()])
    for step, known in enumerate(published['adam_steps']):
        assert known['cur_nimg'] == about['start_nimg'] + step * about['batch_size']
        optimizer.param_groups[0]['lr'] = rate(known['cur_nimg'], about['batch_size'])
        assert optimizer.param_groups[0]['lr'] == pytest.approx(known['lr'], rel=1e-12)
        optimizer.zero_grad()
        begin_step(net, objective)
        loss = loss_of(objective, net, batch_of(io, about, step))
        if not step:
            torch.testing.assert_close(loss, io['loss.train_loss_step0'].sum([1, 2, 3]), rtol=1e-5, atol=0)
        assert float(loss.mean()) / io['loss.images'][0].numel() == pytest.approx(known['loss_mean'], rel=1e-4)
        loss.mean().backward()
        found = norms(net, objective.first.weight)
        assert sum(value ** 2 for value in found.values()) ** 0.5 == pytest.approx(known['grad_norm'], rel=1e-4)
        optimizer.step()
    state = {f'unet.{name}': p for name, p in net.model.named_parameters()} | dict(objective.first.weight.named_parameters())
    for name, stats in published['adam_final_params'].items():
        value = state[name].detach().double()
        assert value.flatten()[:4].tolist() == pytest.approx(stats['first4'], rel=1e-4, abs=1e-4)
        assert float(value.square().sum()) == pytest.approx(stats['sumsq'], rel=1e-4)
    D = net.eval()(io['in.x'], io['in.sigma'], io['in.class_labels'])
    torch.testing.assert_close(D, io['loss.D_after_steps'], rtol=0, atol=1e-4 * float(io['loss.D_after_steps'].abs().max()))


def test_learning_rates_are_the_published_ones():
    table = json.loads((edm2.DATA / 'lr_schedule.json').read_text())
    for row in table:
        config = OptimizerConfig(lr=row['ref_lr'], schedule=f'inverse_sqrt:ref={row["ref_batches"]}',
                                 rampup_kimg=row['rampup_Mimg'] * 1e3)
        expected = row['lr'] if row['cur_nimg'] else 0  # also without a ramp-up, as EDM does, where EDM2 begins with the full rate
        assert LearningRate(config)(row['cur_nimg'], row['batch_size']) == pytest.approx(expected, rel=1e-12, abs=0), row
    assert len(table) > 30 and {row['lr'] for row in table if row['rampup_Mimg'] and not row['cur_nimg']} == {0}


# ---- in a run


def unit(weight):
    return float((weight - normalize(weight)).detach().abs().max()) < 2e-3  # normalising again moves it by 1e-4 of its size


def make_run(folder, *flags):
    """A run whose gains are not 0, so that every parameter has a gradient in the first step."""
    run = tiny.make_run(folder, *FLAGS, *flags)
    for p in run.net.parameters():
        if not p.ndim:
            p.data.fill_(0.5)
    return run


def test_weights_are_normalised_once_a_step_whatever_it_evaluates(tmp_path, monkeypatch):
    """With two micro-batches and several evaluations of the network in each, as if there were one; averages are left alone."""
    calls, seen = [], []
    for kind in (EDM2UNet, EDM2Weight):
        monkeypatch.setattr(kind, 'begin_step', lambda self, kind=kind, original=kind.begin_step: (calls.append(kind), original(self)))
    flags = ['--consistency-coeff=1', '--consistency-batch-size=4', '--num-consistency-steps=2', '--num-primes=2']
    run = make_run(tmp_path, *flags, '--batch-gpu=8')
    average = []
    run.net.register_forward_hook(lambda module, inputs, out: seen.append([p.detach().clone() for p in module.parameters()]))
    run.optimizer.register_step_pre_hook(lambda *of: average.append(tiny.digest(run.ema.state_dict())))
    for _ in range(2):
        calls.clear(), seen.clear()
        before = tiny.digest(run.ema.state_dict())
        run.step()
        assert sorted(map(str, calls)) == sorted(map(str, [EDM2UNet, EDM2Weight])) and average.pop() == before
        assert len(seen) > 4 and all(torch.equal(a, b) for other in seen for a, b in zip(seen[0], other))
        assert all(unit(p) for p in seen[0] if p.ndim)
    run.data.feed.close()
    assert not any(torch.equal(p, before) for p, before in zip(run.net.parameters(), seen[0]))  # Adam has moved them since


def test_micro_batches_and_recomputation_change_nothing(tmp_path):
    """Gradients of the second step; dropout is keyed by the rows."""
    found = {}
    for name, flags in {'whole': [], 'parts': ['--batch-gpu=8'], 'recomputed': ['--checkpointing=1']}.items():
        run = make_run(tmp_path, '--lr=1e-4', *flags)
        for _ in range(2):
            run.step()
        run.data.feed.close()
        found[name] = torch.cat([p.grad.flatten() for p in run.params])
    assert all(p.grad.any() for p in run.params)
    assert (found['whole'] - found['parts']).norm() < 1e-4 * found['whole'].norm()
    assert torch.equal(found['whole'], found['recomputed'])


def test_the_first_step_only_normalises(tmp_path):
    """Its learning rate is 0 with a ramp-up, as in the published runs."""
    run = tiny.make_run(tmp_path, *FLAGS, '--lr-rampup=10')
    before = [p.detach().clone() for p in run.params]
    run.step()
    assert run.optimizer.param_groups[0]['lr'] == 0
    for old, new in zip(before, run.params):
        torch.testing.assert_close(new, normalize(old) if new.ndim else old, rtol=0, atol=1e-6)
    run.step()
    assert not torch.equal(run.net.model.out_gain, before[0])
    run.data.feed.close()


def test_resume_is_exact_and_the_averages_are_stored(tmp_path):
    """Also where the weights stand between a step of Adam and their next normalisation."""
    first, second = (make_run(tmp_path, '--cond=1', '--label-dropout=0.1', '--cep=gaussian') for _ in range(2))
    for _ in range(3):
        first.step()
    first.save_state()
    first.finish_states()
    second.restore(checkpoint.load(checkpoint.states(tmp_path)[0]), 'file')
    assert sorted(second.averages) == ['halflife', 'power_0.050', 'power_0.100']
    for run in (first, second):
        for _ in range(2):
            run.step()
        run.data.feed.close()
    for part in ('net', 'optimizer', 'objective'):
        assert tiny.digest(getattr(first, part).state_dict()) == tiny.digest(getattr(second, part).state_dict())
    for name, average in first.averages.items():
        assert tiny.digest(average.state_dict()) == tiny.digest(second.averages[name].state_dict())


def test_the_published_weight_learns_the_mean_loss():
    """u tends to the logarithm of the mean cost, from O(1) noise; its linear map keeps the norm 1."""
    weight, sigma = EDM2Weight(), torch.logspace(-1.5, 1.5, 48).reshape(-1, 1, 1, 1)
    start = weight.offset(sigma).detach()
    assert 0.2 < float(start.std()) < 3
    cost = 0.05 + 0.4 / (1 + (sigma.log() + 1).square())  # lambda times the squared error
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.02, betas=(0.9, 0.99))
    for step in range(400):
        optimizer.param_groups[0]['lr'] = 0.02 * min(1, 4 * (1 - step / 400))
        optimizer.zero_grad()
        weight.begin_step()
        ((-weight.offset(sigma)).exp() * cost + weight.offset(sigma)).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weight.offset(sigma), cost.log(), rtol=0, atol=0.05)
    assert isinstance(weight.logvar_linear, MPConv) and list(weight.state_dict()) == [
        'logvar_fourier.freqs', 'logvar_fourier.phases', 'logvar_linear.weight']
    assert tiny.digest(EDM2Weight().state_dict()) == tiny.digest(EDM2Weight().state_dict())
