# SPDX-License-Identifier: Apache-2.0
"""The half-life EMA: published factors, what it forgets, buffers, saving."""

import json
from pathlib import Path

import pytest
import torch

from training.ema import HalfLifeEMA

RECORDS = json.loads((Path(__file__).parent / 'data' / 'ema' / 'edm_ema_beta.json').read_text())


def make_net(seed=0):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    source = torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=source))
    return net


@pytest.mark.parametrize('record', RECORDS)
def test_factors_are_the_published_ones(record):
    ema = HalfLifeEMA(make_net(), record['ema_halflife_kimg'], record['ema_rampup_ratio'])
    assert ema.beta(record['cur_nimg'], record['batch_size']) == pytest.approx(record['ema_beta'], rel=1e-12, abs=0)


def test_update_follows_the_published_rule():
    net, ema = make_net(), HalfLifeEMA(make_net(1), halflife_kimg=1, rampup_ratio=None)
    expected = {name: torch.lerp(new.detach(), old.detach(), 0.5 ** 0.256) for (name, new), old in
                zip(net.named_parameters(), list(ema.module.parameters()))}
    ema.update(net, nimg=0, batch=256)
    torch.testing.assert_close(dict(ema.module.named_parameters()), expected, rtol=1e-6, atol=1e-7)


def test_first_update_copies_the_network():
    net, ema = make_net(), HalfLifeEMA(make_net(1))
    ema.update(net, nimg=0, batch=64)
    assert all(torch.equal(a, b) for a, b in zip(ema.state_dict().values(), net.state_dict().values()))


def test_half_is_forgotten_after_one_half_life():
    net, ema = make_net(), HalfLifeEMA(make_net(), halflife_kimg=0.64, rampup_ratio=None)
    with torch.no_grad():
        for p in ema.module.parameters():
            p.fill_(1.0)
        for p in net.parameters():
            p.zero_()
    for step in range(10):
        ema.update(net, nimg=step * 64, batch=64)
    for p in ema.module.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.5), rtol=1e-5, atol=0)


def test_2c_buffers_are_copied():
    """The published EMA leaves running statistics at their start."""
    net, ema = make_net(), HalfLifeEMA(make_net(1))
    net[1].running_mean.fill_(7.0)
    net[1].num_batches_tracked.fill_(3)
    ema.update(net, nimg=10_000, batch=64)
    assert (ema.module[1].running_mean == 7).all() and ema.module[1].num_batches_tracked == 3


def test_average_is_a_frozen_network_of_its_own():
    net = make_net().train()
    ema = HalfLifeEMA(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net(torch.ones(2, 3)).sum().backward()
    ema.update(net, nimg=100, batch=2)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_state_takes_up_where_it_stopped():
    net, straight = make_net(), HalfLifeEMA(make_net(1))
    straight.update(net, nimg=640, batch=64)
    continued = HalfLifeEMA(make_net(2))
    continued.load_state_dict(straight.state_dict())
    for ema in (straight, continued):
        ema.update(make_net(3), nimg=704, batch=64)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), continued.state_dict().values()))


@pytest.mark.parametrize('options', [{'halflife_kimg': -1}, {'halflife_kimg': float('nan')}, {'rampup_ratio': 0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}=.* must be'):
        HalfLifeEMA(make_net(), **options)
