# SPDX-License-Identifier: Apache-2.0
"""The timestep resampler against published numbers, a plain loop, and what importance sampling promises."""

import json

import numpy as np
import pytest
import torch

from tests.support import GOLDEN
from torch_utils.registry import build
from training.objective.timesteps import TIMESTEPS, SecondMoment

PUBLISHED = json.loads((GOLDEN / 'iddpm' / 'bound.json').read_text())['loss_second_moment']


def note(sampler, t, losses, counts=None):
    t = torch.as_tensor(t)
    sampler.note(t, torch.as_tensor(losses, dtype=torch.float64), torch.ones_like(t, dtype=torch.bool) if counts is None else counts)
    sampler.update()


def published():
    return SecondMoment(PUBLISHED['history_per_term'], PUBLISHED['uniform_prob']).over(torch.arange(PUBLISHED['num_timesteps']))


def lasts(sampler, t):
    """The remembered losses of t, oldest first."""
    seen = int(sampler.counts[t])
    ring = sampler.losses[t].tolist()
    return [ring[i % sampler.history] for i in range(max(seen - sampler.history, 0), seen)]


def test_history_and_weights_equal_the_published_ones():
    sampler = published()
    for t, losses, after in zip(PUBLISHED['ts'], PUBLISHED['losses'], PUBLISHED['weights_after_each_update'], strict=True):
        note(sampler, t, losses)
        weights = torch.tensor(after['weights'], dtype=torch.float64)
        torch.testing.assert_close(sampler.probabilities(), weights / weights.sum(), rtol=1e-12, atol=0)
        assert bool((sampler.counts >= sampler.history).all()) == after['warmed']
    assert [lasts(sampler, t) for t in range(5)] == PUBLISHED['loss_history']


def test_draws_and_importance_weights_equal_the_published_ones():
    sampler = published()
    for t, losses in zip(PUBLISHED['ts'], PUBLISHED['losses'], strict=True):
        note(sampler, t, losses)
    drawn = PUBLISHED['sample_after_np_random_seed_7']
    u = torch.from_numpy(np.random.RandomState(7).random_sample(drawn['batch']))
    t, weight = sampler.draw(u)
    assert t.tolist() == drawn['indices']
    torch.testing.assert_close(weight, torch.tensor(drawn['weights'], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize('batch', [1, 7, 64])
def test_rings_hold_the_last_losses_as_a_plain_loop_would(batch):
    """With one t many times in a batch, more often than the history is long, too."""
    rng = np.random.default_rng(batch)
    sampler, loop = SecondMoment(history=3).over(torch.arange(6)), {t: [] for t in range(6)}
    for _ in range(30):
        t, losses = rng.integers(0, 6, batch) ** 2 % 6, rng.random(batch)
        for key, value in zip(t, losses, strict=True):
            loop[key].append(value)
        note(sampler, t, losses)
        assert [lasts(sampler, key) for key in range(6)] == [loop[key][-3:] for key in range(6)]


def test_micro_batches_and_ranks_do_not_matter():
    """Noted in parts or at once: the state is the same, for it moves once a step."""
    whole, parts = SecondMoment(history=2).over(torch.arange(4)), SecondMoment(history=2).over(torch.arange(4))
    t, losses = torch.tensor([3, 1, 3, 0, 3, 2, 1, 0]), torch.arange(8.0)
    note(whole, t, losses)
    for rows in (slice(0, 3), slice(3, 8)):
        before = parts.probabilities()
        parts.note(t[rows], losses[rows], torch.ones(len(t[rows]), dtype=torch.bool))
        assert torch.equal(parts.probabilities(), before)
    parts.update()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))


def test_uniform_until_every_timestep_has_its_history():
    sampler = SecondMoment(history=2).over(torch.arange(3))
    note(sampler, [0, 0, 1, 1, 2], [9.0, 9, 1, 1, 1])
    assert torch.equal(sampler.probabilities(), torch.full([3], 1 / 3, dtype=torch.float64))
    assert torch.equal(sampler.draw(torch.tensor([0.1, 0.5, 0.9]).double())[1], torch.ones(3, dtype=torch.float64))
    note(sampler, [2], [1.0])
    torch.testing.assert_close(sampler.probabilities(), 0.999 * torch.tensor([9, 1, 1.0]).double() / 11 + 0.001 / 3)


def test_rows_that_do_not_count_and_broken_losses_leave_no_trace():
    sampler = SecondMoment(history=2).over(torch.arange(2))
    note(sampler, [0, 0, 1, 1], [1.0, float('nan'), float('inf'), 5], torch.tensor([True, True, True, False]))
    assert sampler.counts.tolist() == [1, 0] and sampler.losses.tolist() == [[1, 0], [0, 0]]


def test_all_losses_zero_is_uniform():
    sampler = SecondMoment(history=1).over(torch.arange(2))
    note(sampler, [0, 1], [0.0, 0.0])
    assert sampler.probabilities().tolist() == [0.5, 0.5]


def test_weighted_mean_is_unbiased_and_has_less_variance():
    """E_q[w L] is the plain mean over t; for steady L_t the estimate hardly varies, where plain draws do."""
    steps = 50
    losses = torch.logspace(0, -3, steps, dtype=torch.float64)
    sampler = SecondMoment(history=4).over(torch.arange(steps))
    note(sampler, torch.arange(steps).repeat(4), losses.repeat(4))
    u = torch.from_numpy(np.random.default_rng(0).random(20000))
    t, weight = sampler.draw(u)
    assert (sampler.probabilities() * (1 / (steps * sampler.probabilities()))).sum().item() == pytest.approx(1)
    estimate, plain = weight * losses[t], losses[(u * steps).long()]
    assert abs(estimate.mean() - losses.mean()) < 4 * estimate.std() / len(u) ** 0.5
    assert estimate.std() < 0.1 * plain.std()


def test_ends_of_the_unit_interval_are_timesteps():
    sampler = SecondMoment(history=1).over(torch.arange(5))
    note(sampler, range(5), [0.0, 1, 2, 3, 0])
    t, _ = sampler.draw(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert t.min() >= 0 and t.max() <= 4


def test_state_restores_to_the_bit():
    sampler, other = SecondMoment(history=3).over(torch.arange(4)), SecondMoment(history=3).over(torch.arange(4))
    note(sampler, [0, 1, 2, 3] * 4, range(16))
    other.load_state_dict(sampler.state_dict())
    for each in (sampler, other):
        note(each, [2, 2, 0], [7.0, 8, 9])
    assert torch.equal(sampler.losses, other.losses) and torch.equal(sampler.counts, other.counts)


@pytest.mark.parametrize('spec', ['second_moment:history=0', 'second_moment:uniform=0', 'second_moment:uniform=2'])
def test_values_out_of_range_are_refused(spec):
    with pytest.raises(Exception, match='must be'):
        build(spec, TIMESTEPS, '--timesteps')
