# SPDX-License-Identifier: Apache-2.0
"""Weight averages: published factors, what they forget, buffers, saving, and averages that are made after a run."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from training.networks import ema as averages
from training.networks.ema import HalfLifeEMA, PowerFunctionEMA, combine, exponent, reconstruction, width

PHEMA = json.loads((GOLDEN / 'ema' / 'phema.json').read_text())
ARRAYS = load_file(GOLDEN / 'ema' / 'phema.safetensors')
TRAJECTORY = PHEMA['trajectory']
RECORDS = json.loads((GOLDEN / 'ema' / 'edm_ema_beta.json').read_text())


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


# ---- power functions


@pytest.mark.parametrize('sigma_rel, gamma', PHEMA['std_to_exp'].items())
def test_exponents_are_the_published_ones(sigma_rel, gamma):
    assert exponent(float(sigma_rel)) == pytest.approx(gamma, rel=1e-9)
    assert width(gamma) == pytest.approx(float(sigma_rel), rel=1e-12)


def test_exponent_inverts_width():
    for gamma in [0.0, 1e-3, 0.5, 1.0, 7.0, 96.0, 1e4]:
        assert exponent(width(gamma)) == pytest.approx(gamma, rel=1e-7, abs=1e-7)
    # ... which is the standard deviation of the density (gamma + 1) tau^gamma on [0, 1]
    tau = (np.arange(100_000) + 0.5) / 100_000
    density = 4.5 * tau ** 3.5 / 100_000
    assert width(3.5) == pytest.approx(np.sqrt((density * tau ** 2).sum() - (density * tau).sum() ** 2), rel=1e-6)


@pytest.mark.parametrize('record', PHEMA['beta'])
def test_power_function_factors_are_the_published_ones(record):
    ema = PowerFunctionEMA(make_net(), record['std'])
    nimg, batch = record['t_next'] - record['t_delta'], record['t_delta']
    assert ema.beta(nimg, batch) == pytest.approx(record['beta'], rel=1e-9, abs=0)


class Point(torch.nn.Module):
    """A network whose one parameter is put where the test wants it."""

    def __init__(self, start):
        super().__init__()
        self.place = torch.nn.Parameter(torch.as_tensor(start, dtype=torch.float64).clone())

    def move(self, place):
        with torch.no_grad():
            self.place.copy_(place)
        return self


def follow(path, sigma_rels, batch):
    """Averages of a path [T, ...] at every step: {(nimg, sigma_rel): place}."""
    net = Point(torch.zeros_like(path[0]))
    emas, seen = {s: PowerFunctionEMA(net, s) for s in sigma_rels}, {}
    for step, place in enumerate(path):
        net.move(place)
        for sigma_rel, ema in emas.items():
            ema.update(net, nimg=step * batch, batch=batch)
            seen[(step + 1) * batch, sigma_rel] = ema.module.place.clone()
    return seen


def test_published_trajectory():
    """Several averages at once along a recorded path, and what is reconstructed from their snapshots."""
    batch, targets = TRAJECTORY['batch_size'], TRAJECTORY['targets']
    stored = [(int(t), s) for t, s in TRAJECTORY['snapshots_at']]
    seen = follow(ARRAYS['traj'], [0.05, 0.1], batch)
    torch.testing.assert_close(torch.stack([seen[key] for key in stored]), ARRAYS['phema_snapshots'], rtol=1e-9, atol=1e-12)
    for k, sigma_rel in enumerate(targets):
        factors = reconstruction(stored, (stored[-1][0], sigma_rel))
        np.testing.assert_allclose(factors, ARRAYS['posthoc_e2e.coefs'][:, k], rtol=1e-6, atol=1e-12)
        made = combine(({'place': seen[key]} for key in stored), factors)
        torch.testing.assert_close(made['place'], ARRAYS['posthoc_e2e.reconstructed'][k], rtol=1e-8, atol=1e-9)


def test_published_factors_of_a_reconstruction():
    record = PHEMA['posthoc0']
    stored = list(zip(record['in_ofs'], record['in_std']))
    for k, target in enumerate(zip(record['out_ofs'], record['out_std'])):
        factors = reconstruction(stored, target)
        np.testing.assert_allclose(factors, ARRAYS['posthoc0.coefs'][:, k], rtol=1e-6, atol=1e-12)
        assert factors.dtype == np.float64 and factors.sum() == pytest.approx(1, abs=1e-12)
        assert (factors[np.array(record['in_ofs']) > target[0]] == 0).all()


def test_published_inner_products():
    t, sigma_rel = np.array(PHEMA['correlation_pairs']).T
    gamma = np.array([exponent(s) for s in sigma_rel])
    products = averages.inner_product(t[:, None], gamma[:, None], t, gamma)
    np.testing.assert_allclose(products, ARRAYS['correlation'], rtol=1e-9)
    tau = (np.arange(200_000) + 0.5) / 200_000 * 1000  # by quadrature, for profiles that end at 1000 and at 3000
    profile = lambda k: (gamma[k] + 1) * tau ** gamma[k] / t[k] ** (gamma[k] + 1)
    assert products[0, 3] == pytest.approx((profile(0) * profile(3)).sum() * 1000 / 200_000, rel=1e-6)
    assert np.isfinite(averages.inner_product(1.0, 1e4, 2e9, 1e4))


STORED = [(1_000_000 * k, s) for k in range(1, 17) for s in (0.05, 0.10)]


@pytest.mark.parametrize('place', [0, 1, 10, 21, 31])
def test_the_reconstruction_of_a_stored_average_is_that_average(place):
    np.testing.assert_allclose(reconstruction(STORED, STORED[place]), np.eye(len(STORED))[place], rtol=0, atol=1e-8)


def test_dense_snapshots_are_no_trouble():
    """400 snapshots of two widths: nearly parallel profiles, whose matrix spans ten orders of magnitude."""
    stored = [(100_000 * k, s) for k in range(1, 201) for s in (0.05, 0.10)]
    factors = reconstruction(stored, (20_000_000, 0.05))
    np.testing.assert_allclose(factors, np.eye(400)[398], rtol=0, atol=1e-6)
    assert averages.profile_error(stored, (20_000_000, 0.05), factors) < 1e-6
    target = (19_900_000, 0.08)
    factors = reconstruction(stored, target)
    assert factors.sum() == pytest.approx(1, abs=1e-12) and averages.profile_error(stored, target, factors) < 1e-4


def test_the_error_of_the_profile_is_what_quadrature_gives():
    tau = (np.arange(400_000) + 0.5) / 400_000 * 16e6
    profile = lambda t, s: np.where(tau < t, (exponent(s) + 1) * (tau / t) ** exponent(s) / t, 0)
    for sigma_rel, measured in [(0.075, 0.0035), (0.12, 0.0035), (0.25, 0.0793)]:
        target = 16_000_000, sigma_rel
        factors = reconstruction(STORED, target)
        wanted = profile(*target)
        made = sum(f * profile(*key) for f, key in zip(factors, STORED))
        by_hand = np.sqrt(((made - wanted) ** 2).sum() / (wanted ** 2).sum())
        found = averages.profile_error(STORED, target, factors)
        assert found == pytest.approx(by_hand, rel=0.01) and found == pytest.approx(measured, abs=1e-4)
        # The least that is possible, but for the normalisation: moving a factor makes it worse.
        for k in (25, 30, 31):
            assert averages.profile_error(STORED, target, factors + 0.05 * np.eye(32)[k]) > found


@pytest.mark.parametrize('sigma_rel', [0.03, 0.075, 0.12])
@pytest.mark.parametrize('nimg', [16_000_000, 9_000_000])
def test_constants_and_straight_lines_are_kept(sigma_rel, nimg):
    """theta = const is averaged to itself; theta = tau to (gamma + 1) / (gamma + 2) t, which the reconstruction meets closely."""
    factors = reconstruction(STORED, (nimg, sigma_rel))
    mean = lambda t, s: (exponent(s) + 1) / (exponent(s) + 2) * t
    made = combine([{'a': torch.tensor(3.0), 'b': torch.tensor(mean(t, s), dtype=torch.float64)} for t, s in STORED], factors)
    assert made['a'].item() == pytest.approx(3, rel=1e-6)
    assert made['b'].item() == pytest.approx(mean(nimg, sigma_rel), rel=0.003)


def test_the_first_update_copies_and_a_line_is_averaged_as_the_integral_says():
    batch, steps = 64, 4000
    path = torch.arange(1, steps + 1, dtype=torch.float64) * batch
    seen = follow(path, [0.1], batch)
    assert seen[batch, 0.1] == batch
    gamma = exponent(0.1)
    assert seen[steps * batch, 0.1].item() == pytest.approx((gamma + 1) / (gamma + 2) * steps * batch, rel=2 / steps)


@pytest.mark.parametrize('sigma_rel', [0.04, 0.075, 0.15])
def test_a_reconstruction_beats_the_nearest_stored_average_on_random_walks(sigma_rel):
    """200 walks of 800 steps, 8 snapshots of two averages: the error against the average that was tracked."""
    path = torch.randn(800, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    seen = follow(path, [0.05, 0.1, sigma_rel], batch=16)
    stored = [(1600 * k, s) for k in range(1, 9) for s in (0.05, 0.1)]
    factors = reconstruction(stored, (12_800, sigma_rel))
    made = combine([{'x': seen[key]} for key in stored], factors)['x']
    truth = seen[12_800, sigma_rel]
    nearest = min((made - truth).square().mean() for made in (seen[12_800, 0.05], seen[12_800, 0.1]))
    assert (made - truth).square().mean() < nearest / 10


def test_on_a_trained_network_the_reconstruction_meets_the_tracked_average():
    """A small network trained for 480 steps; 0.075 from snapshots of 0.05 and 0.10, in single precision, to 1 %."""
    source = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.5, generator=source)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    emas, saved = {s: PowerFunctionEMA(net, s) for s in (0.05, 0.1, 0.075)}, {}
    for step in range(480):
        x = torch.randn(32, 4, generator=source)
        optimizer.zero_grad()
        (net(x) - x.prod(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        for sigma_rel, ema in emas.items():
            ema.update(net, nimg=32 * step, batch=32)
            if (step + 1) % 60 == 0:
                saved[32 * (step + 1), sigma_rel] = {k: v.clone() for k, v in ema.state_dict().items()}
    stored = [key for key in saved if key[1] != 0.075]
    def far(a, b):
        return sum((a[k] - b[k]).square().sum() for k in b).sqrt() / sum(t.square().sum() for t in b.values()).sqrt()

    for nimg in (32 * 480, 32 * 360):
        made, truth = combine([saved[key] for key in stored], reconstruction(stored, (nimg, 0.075))), saved[nimg, 0.075]
        assert far(made, truth) < 0.01
        assert far(made, truth) < 0.5 * far(saved[nimg, 0.05], truth)


def test_combined_states_keep_their_dtypes_and_whole_numbers():
    states = [{'w': torch.full([2], value, dtype=torch.float16), 'steps': torch.tensor(count)} for value, count in [(1.0, 3), (2.0, 9)]]
    made = combine(iter(states), [0.25, 0.75])
    assert made['w'].dtype == torch.float16 and made['w'].tolist() == [1.75, 1.75] and made['steps'].item() == 9


@pytest.mark.parametrize('target, said', [
    ((17_000_000, 0.1), r'must be the time of a stored average, the nearest of which is \[16000000\]'),
    ((9_600_000, 0.1), r'the nearest of which is \[10000000\]'), ((0, 0.1), 'must be above 0'), ((1_000_000, 0.0), 'sigma_rel=0.0 must'),
    ((1_000_000, 0.5), 'sigma_rel=0.5 must'), ((1_000_000, float('nan')), 'sigma_rel=nan must')])
def test_averages_that_cannot_be_made_are_refused(target, said):
    with pytest.raises(ValueError, match=said):
        reconstruction(STORED, target)
    with pytest.raises(ValueError, match='must be the time of a stored average'):
        reconstruction([], (1, 0.1))


@pytest.mark.parametrize('sigma_rel', [0, -0.1, 0.3, float('nan')])
def test_widths_out_of_range_are_refused(sigma_rel):
    with pytest.raises(ValueError, match=f'sigma_rel={sigma_rel} must'):
        PowerFunctionEMA(make_net(), sigma_rel)
