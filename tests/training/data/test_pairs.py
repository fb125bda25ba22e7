# SPDX-License-Identifier: Apache-2.0
"""Pairing policies: each follows its law over a million draws, the stream is one sequence however it is read."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from dnnlib import UserError
from training.data.batches import Batch
from training.data.pairs import BLOCK, INVERSE_BUFFER, PAIRINGS, PairStream, with_inverse_weight
from training.diffusion.noise import NOISE, IDDPMLevels, Levels, LogNormal, LogUniform
from training.objective import weighting
from training.objective.loss import AmbientLoss

P = LogNormal()
LEVELS = np.tile([0.0, 0.1, 0.4, 0.2, 0.0], 200)  # 1,000 images
GROUPS = (0.0, 0.1, 0.2, 0.4)
MILLION = 1_000_000


def million(policy, levels=LEVELS, noise=P, count=MILLION):
    """(stream, index, sigma) of that many pairs."""
    stream = PairStream(levels, noise, policy, batch=count, seed=1)
    return stream, *stream.next()


def sf(sigma):
    return P.sf(torch.as_tensor(sigma, dtype=torch.float64)).numpy()


def ks_distance(sample, cdf):
    sample = np.sort(sample)
    height, steps = cdf(sample), np.arange(len(sample) + 1) / len(sample)
    return max((height - steps[:-1]).max(), (steps[1:] - height).max())


def above(bar):
    """cdf of p(sigma | sigma > bar)."""
    return lambda sigma: 1 - sf(sigma) / sf(bar)


# ---- laws, a million draws each


@pytest.mark.parametrize('buffer', [1.0, 1.1547])
def test_skip_follows_the_joint_law_of_image_and_level_above_its_bar(buffer):
    stream, index, sigma = million(f'skip:buffer={buffer}')
    level = LEVELS[index]
    assert (sigma > buffer * level).all()
    chance = sf(buffer * LEVELS) / sf(buffer * LEVELS).sum()
    counts = np.bincount(index, minlength=len(LEVELS))
    # The list holds each image once an epoch, so counts vary less than a multinomial's: the test errs on the safe side.
    assert scipy.stats.chisquare(counts, chance * MILLION).pvalue > 1e-6
    for group in GROUPS:
        assert ks_distance(sigma[level == group], above(buffer * group)) < 0.005
    mixture = lambda s: sum(above(buffer * g)(np.maximum(s, buffer * g)) * chance[g == LEVELS].sum() for g in GROUPS)
    assert ks_distance(sigma, mixture) < 0.005
    assert stream.used / stream.passed == pytest.approx(stream.acceptance(), abs=0.003)


@pytest.mark.parametrize('buffer', [1.0, 1.5])
def test_truncate_follows_the_truncated_law_and_keeps_visit_counts(buffer):
    stream, index, sigma = million(f'truncate:buffer={buffer}')
    assert (np.bincount(index) == MILLION // len(LEVELS)).all() and stream.passed == MILLION
    for group in GROUPS:
        drawn = sigma[LEVELS[index] == group]
        assert (drawn > buffer * group).all() and ks_distance(drawn, above(buffer * group)) < 0.005


def test_sigma_first_keeps_the_law_of_the_levels():
    stream, index, sigma = million('sigma_first')
    level = LEVELS[index]
    assert (sigma > level).all() and ks_distance(sigma, above(0.0)) < 0.005
    # Any eligible image is as likely as another: at levels between two bars the groups stand as they do in the data.
    for low, high in zip(GROUPS, (*GROUPS[1:], np.inf)):
        seen = np.bincount(index[(sigma > low) & (sigma <= high)], minlength=len(LEVELS))
        assert (seen[low < LEVELS] == 0).all()
        share = [seen[g == LEVELS].sum() / seen.sum() for g in GROUPS if g <= low]
        expected = [(g == LEVELS).sum() / (low >= LEVELS).sum() for g in GROUPS if g <= low]
        np.testing.assert_allclose(share, expected, atol=0.01)
    assert stream.used / stream.passed == pytest.approx(stream.acceptance(), rel=0.02)


def test_sigma_first_without_clean_images_draws_above_the_smallest_bar():
    levels = np.array([0.2, 0.4, 0.4, 0.4])
    _, index, sigma = million('sigma_first:buffer=1.2', levels, count=200_000)
    assert ks_distance(sigma, above(0.24)) < 0.005 and (sigma > 1.2 * levels[index]).all()


def test_clamp_follows_the_law_with_its_atom(capsys):
    _, index, sigma = million('clamp')
    assert (np.bincount(index) == MILLION // len(LEVELS)).all()
    for group in GROUPS:
        drawn = sigma[LEVELS[index] == group]
        assert (drawn >= group).all()
        assert (drawn == group).mean() == pytest.approx(1 - sf(group), abs=0.005)
        assert ks_distance(drawn[drawn > group], above(group)) < 0.005
    assert '--pairing=clamp: ' in capsys.readouterr().out


def test_discrete_levels_are_strictly_above_sigma_n():
    noise = IDDPMLevels(steps=50)
    levels = noise.levels[[0, 10, 30]].numpy()
    for policy in ('skip', 'truncate', 'sigma_first'):
        _, index, sigma = million(policy, levels, noise, count=60_000)
        assert (sigma > levels[index]).all() and np.isin(sigma, noise.levels.numpy()).all()
    counts = np.unique(sigma, return_counts=True)[1]  # sigma_first: uniform over the 49 levels above the smallest
    assert len(counts) == 49 and scipy.stats.chisquare(counts).pvalue > 1e-6


# ---- upper limits

UPPER = np.tile([np.inf, 0.3, 1.0, np.inf, 0.05], 200)
LIMITS = tuple(zip(LEVELS[:5], UPPER[:5]))


def within(low, high):
    """cdf of p(sigma | low < sigma <= high)."""
    return lambda sigma: (sf(low) - sf(np.clip(sigma, low, high))) / (sf(low) - sf(high))


def million_within(policy, buffer=1.0):
    stream = PairStream(LEVELS, P, f'{policy}:buffer={buffer}', batch=MILLION, seed=1, upper=UPPER)
    index, sigma = stream.next()
    assert (sigma > buffer * LEVELS[index]).all() and (sigma <= UPPER[index]).all()
    return stream, index, sigma


@pytest.mark.parametrize('buffer', [1.0, 1.1547])
def test_skip_follows_the_joint_law_within_both_limits(buffer):
    stream, index, sigma = million_within('skip', buffer)
    chance = sf(buffer * LEVELS) - sf(UPPER)
    counts = np.bincount(index, minlength=len(LEVELS))
    assert scipy.stats.chisquare(counts, chance / chance.sum() * MILLION).pvalue > 1e-6
    for k, (low, high) in enumerate(LIMITS):  # 2 % of the pairs, at least: the bound is six standard errors of the smallest group
        drawn = sigma[index % 5 == k]
        assert ks_distance(drawn, within(buffer * low, high)) < max(0.005, 3 / np.sqrt(len(drawn)))
    assert stream.used / stream.passed == pytest.approx(stream.acceptance(), abs=0.003)


@pytest.mark.parametrize('buffer', [1.0, 1.5])
def test_truncate_follows_the_law_between_both_limits_and_keeps_visit_counts(buffer):
    stream, index, sigma = million_within('truncate', buffer)
    assert (np.bincount(index) == MILLION // len(LEVELS)).all() and stream.passed == MILLION and stream.acceptance() == 1
    for k, (low, high) in enumerate(LIMITS):
        assert ks_distance(sigma[index % 5 == k], within(buffer * low, high)) < 0.005


def test_sigma_first_keeps_the_law_of_the_levels_with_upper_limits():
    stream, index, sigma = million_within('sigma_first')
    assert ks_distance(sigma, above(0.0)) < 0.005
    edges = np.unique([edge for pair in LIMITS for edge in pair])
    for low, high in zip(edges, edges[1:]):
        seen = np.bincount(index[(sigma > low) & (sigma <= high)] % 5, minlength=5)
        allowed = np.array([bar <= low and top >= high for bar, top in LIMITS])
        np.testing.assert_allclose(seen / seen.sum(), allowed / allowed.sum(), atol=0.01)
    assert stream.used / stream.passed == pytest.approx(stream.acceptance(), rel=0.02)


def test_sigma_first_keeps_the_law_where_clean_images_are_few():
    """Methods: the levels drawn follow the log-normal law when a few clean images exist, whatever the others allow."""
    levels, upper = np.full(1000, 1.0), np.full(1000, 1.5)
    levels[::100], upper[::100] = 0, np.inf
    stream = PairStream(levels, P, 'sigma_first', batch=MILLION // 10, upper=upper)
    index, sigma = stream.next()
    assert ks_distance(sigma, above(0.0)) < 0.008  # 2.5 standard errors and more: P < 1e-4
    assert (index[(sigma <= 1) | (sigma > 1.5)] % 100 == 0).all()
    assert stream.used / stream.passed == pytest.approx(stream.acceptance(), rel=0.02)


def test_sigma_first_leaves_out_what_no_image_allows(capsys):
    """Two intervals and a hole: p between the limits, nothing in the hole, and the hole is said."""
    levels, upper = [0.0, 0.0, 0.5, 0.6], [0.05, 0.02, 0.6, np.inf]
    index, sigma = PairStream(levels, P, 'sigma_first', batch=MILLION // 5, seed=2, upper=upper).next()
    mass = np.array([1 - sf(0.05), sf(0.5)])
    law = lambda s: np.where(s <= 0.05, 1 - sf(np.minimum(s, 0.05)), mass[0] + sf(0.5) - sf(np.maximum(s, 0.5))) / mass.sum()
    assert ks_distance(sigma, law) < 0.006 and not ((sigma > 0.05) & (sigma <= 0.5)).any()
    assert set(index[sigma > 0.6]) == {3} and set(index[(sigma > 0.5) & (sigma <= 0.6)]) == {2}
    unseen = (sf(0.05) - sf(0.5)) * 100
    assert f'no image may be used at {unseen:.1f}% of the levels' in capsys.readouterr().out


@pytest.mark.parametrize('low, high', [(0, 1e-7), (1e-7, 3e-7), (0.05, 0.0500001), (500.0, 501.0), (2000.0, np.inf), (0, np.inf)])
def test_truncate_is_exact_far_out_in_the_tails(low, high):
    """Intervals of mass 1e-40 or of width 1e-7: the uniforms come back through the logarithm of the normal cdf."""
    if low == 0 and high < 1:
        low = 1e-9
    sigma = np.sort(PairStream([low], P, 'truncate', batch=20_000, upper=[high]).next()[1])
    assert (sigma > low).all() and (sigma <= high).all()
    z, ends = (np.log(sigma) + 1.2) / 1.2, (np.log([max(low, 1e-300), high]) + 1.2) / 1.2
    sign = 1 if ends[1] < 0 else -1  # the tail that both lie in
    share = lambda z: np.exp(scipy.stats.norm.logcdf(sign * z) - scipy.stats.norm.logcdf(sign * ends).max())
    u = np.sort((share(z) - share(ends[0])) / (share(ends[1]) - share(ends[0])))
    assert np.abs(u - (np.arange(20_000) + 0.5) / 20_000).max() < 0.02


@pytest.mark.parametrize('name', NOISE)
@pytest.mark.parametrize('policy', ['skip', 'truncate', 'sigma_first'])
def test_every_law_stays_within_the_limits(name, policy):
    noise = NOISE[name](stratified=True)
    edges = noise.icdf(torch.tensor([0.05, 0.3, 0.55, 0.95], dtype=torch.float64)).numpy()
    levels, upper = np.array([0, edges[0], edges[1], edges[2]]), np.array([edges[1], edges[2], edges[3], edges[3]])
    index, sigma = PairStream(levels, noise, policy, batch=20_000, upper=upper).next()
    assert (sigma > levels[index]).all() and (sigma <= upper[index]).all() and len(set(index)) == 4
    if isinstance(noise, Levels):
        assert np.isin(sigma, noise.levels.numpy()).all()
    elif policy == 'sigma_first':
        assert ks_distance(sigma, lambda s: noise.cdf(torch.from_numpy(s)).numpy() / 0.95) < 0.02


@pytest.mark.parametrize('policy', PAIRINGS)
def test_no_limits_are_as_if_they_had_not_been_given(policy):
    plain, unlimited = (PairStream(LEVELS, P, policy, batch=5000, upper=upper).next() for upper in (None, np.full(1000, np.inf)))
    assert all(np.array_equal(a, b) for a, b in zip(plain, unlimited))


@pytest.mark.parametrize('policy', ['skip', 'truncate', 'sigma_first'])
def test_streams_with_limits_do_not_depend_on_the_batch_and_resume(policy):
    levels, upper = np.resize(LEVELS, 37), np.resize(UPPER, 37)
    small, large = (PairStream(levels, P, policy, batch=batch, seed=3, upper=upper) for batch in (64, 4096))
    read = [np.concatenate(part) for part in zip(*[small.next() for _ in range(64)])]
    assert all(np.array_equal(a, b) for a, b in zip(read, large.next())) and small.state() == large.state()
    continued = PairStream(levels, P, policy, batch=64, seed=3, upper=upper)
    continued.restore(small.state())
    assert all(np.array_equal(a, b) for a, b in zip(continued.next(), small.next()))


@pytest.mark.parametrize('policy', ['skip', 'truncate', 'sigma_first'])
def test_a_hole_is_two_entries_of_one_image(policy):
    """Methods' (300, 0.05): seen up to 0.05 as it is, and above 300 with noise: 0.04 is accepted, 0.06 rejected."""
    noise = Levels('0.04|0.06|200|400')
    index, sigma = PairStream([0, 300], noise, policy, batch=1000, upper=[0.05, np.inf]).next()
    assert set(zip(index.tolist(), sigma.tolist())) == {(0, 0.04), (1, 400.0)}


@pytest.mark.parametrize('policy', ['skip', 'truncate', 'sigma_first'])
def test_images_whose_limits_leave_nothing_are_passed_over_and_counted(policy, capsys):
    """An image brought to a level at or above its sigma_max; another whose interval holds no level of the law."""
    stream = PairStream([0.1, 0.2, 0.3, 0.0], LogUniform(), policy, batch=1000, upper=[0.5, 0.2, 0.1, 0.01])
    index, _ = stream.next()
    assert (index == 0).all()
    assert f'Warning: --pairing={policy}: 3 of 4 images are never used' in capsys.readouterr().out
    for levels, upper in ([0.2, 0.3], [0.2, 0.1]), ([0.0], [0.01]):
        with pytest.raises(UserError, match='practically no image can be used: .*raise sigma_max') as err:
            PairStream(levels, LogUniform(), policy, batch=4, upper=upper)
        assert '\n' not in err.value.message


def test_levels_that_no_image_allows_are_said(capsys):
    PairStream([0.0, 0.1], P, 'skip', batch=4, upper=[0.3, 0.5])
    said = capsys.readouterr().out
    assert f'no image may be used at {sf(0.5) * 100:.1f}% of the levels of --noise (above 0.5)' in said
    PairStream([0.0, 0.1], P, 'skip', batch=4, upper=[0.3, np.inf])
    assert capsys.readouterr().out == ''


def test_clamp_with_limits_and_wrong_limits_are_refused():
    with pytest.raises(UserError, match='--pairing=clamp: clamp reproduces .* but 400 of 1000 images') as err:
        PairStream(LEVELS, P, 'clamp', batch=4, upper=np.tile([np.inf, 0.3, np.inf, np.inf, 0.05], 200))
    assert '\n' not in err.value.message
    for upper in ([1.0], [0.0, 1.0], [np.nan, 1.0], [-1.0, 1.0]):
        with pytest.raises(UserError, match='sigma_max must be above 0 for each of the 2 images'):
            PairStream([0.0, 0.0], P, batch=4, upper=upper)


# ---- the inverse ambient weight


def test_inverse_weight_implies_its_buffer():
    for spec in ('skip', 'truncate', 'sigma_first', 'skip:'):
        given = with_inverse_weight(spec)
        assert with_inverse_weight(given) == given and given.startswith(spec.rstrip(':') + ':buffer=1.15470')
        # Methods: for sigma_n = 1 and 1 / (1 - r) <= 4, the level 1.15 is rejected and 1.16 accepted.
        index, sigma = PairStream([1.0], Levels('1.15|1.16'), given, batch=100).next()
        assert (sigma == 1.16).all()
    assert with_inverse_weight('truncate:buffer=1.01') == 'truncate:buffer=1.01'
    assert abs(INVERSE_BUFFER ** -2 - 3 / 4) < 1e-15  # 1 / (1 - r) = 4 at the bar


@pytest.mark.parametrize('spec, text', [('clamp', 'use skip, truncate or sigma_first'), ('skip:buffer=1', 'leave it out for 1.1547'),
                                        ('truncate:buffer=1.0', 'infinite variance'), ('skip:buffer=0.5', 'infinite variance')])
def test_inverse_weight_refuses_what_has_no_variance(spec, text):
    with pytest.raises(UserError, match=text) as err:
        with_inverse_weight(spec)
    assert err.value.message.startswith(f'--ambient-weight=inverse does not go with --pairing={spec}: ') and '\n' not in err.value.message


def test_inverse_weight_makes_the_x0_weight_that_of_clean_images():
    """lambda_amb alpha^2 = 1: the gradient of noisy and clean pairs with the same x_0 error is the same at every eligible level."""
    sigma_n = torch.tensor([0.0, 0.05, 0.2, 1.0, 30.0], dtype=torch.float64).repeat_interleave(50)
    factor = torch.logspace(math.log10(2 / math.sqrt(3)), 4, 50, dtype=torch.float64).repeat(5)
    sigma = torch.where(sigma_n > 0, sigma_n * factor, factor * 1e-3)
    draw = lambda: torch.randn(250, 1, 2, 2, dtype=torch.float64, generator=source)
    source = torch.Generator().manual_seed(0)
    y, e, guess = draw(), draw(), draw().requires_grad_()
    column = lambda t: t.reshape(-1, 1, 1, 1)
    batch = Batch(y, column(sigma_n), column(sigma), e)
    term = AmbientLoss(weighting.edm, inverse=True)
    value = term(lambda x, sigma, **labels: guess, batch)['denoise']
    # The x_0 error against the best linear reading of y and e: D - (y - r x) / (1 - r).
    target = y - column(sigma_n ** 2 / ((sigma - sigma_n) * (sigma + sigma_n)).sqrt()) * e
    clean = (weighting.edm(column(sigma)) * (guess - target).square()).flatten(1).sum(1)
    torch.testing.assert_close(value, clean, rtol=1e-9, atol=0)
    slopes = [torch.autograd.grad(v.sum(), guess, retain_graph=True)[0] for v in (value, clean)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=0)
    plain = AmbientLoss(weighting.edm)(lambda x, sigma, **labels: guess, batch)['denoise']
    assert torch.equal(plain[:50], value[:50]) and (value[50] / plain[50]).item() == pytest.approx(16)


def test_inverse_weight_is_finite_where_a_pair_says_nothing():
    level = torch.full([2, 1, 1, 1], 0.2)
    batch = Batch(torch.ones(2, 1, 2, 2), level, level, torch.ones(2, 1, 2, 2))
    guess = torch.zeros(2, 1, 2, 2, requires_grad=True)
    value = AmbientLoss(weighting.edm, inverse=True)(lambda x, sigma, **labels: guess, batch)['denoise']
    value.sum().backward()
    assert (value == 0).all() and (guess.grad == 0).all()


# ---- what skip is for


@pytest.mark.parametrize('sigma_n, wasted', [(0.05, 0.067), (0.1, 0.179), (0.2, 0.366), (0.4, 0.593)])
def test_2a3_skip_passes_over_the_published_wasted_share(sigma_n, wasted):
    levels = np.full(1000, sigma_n)
    stream, _, sigma = million('skip', levels, count=200_000)
    assert (sigma > sigma_n).all()
    assert 1 - stream.acceptance() == pytest.approx(wasted, abs=5e-4)
    assert 1 - stream.used / stream.passed == pytest.approx(wasted, abs=0.006)  # five standard errors
    assert PairStream(levels, P, 'clamp', batch=1).wasted() == pytest.approx((wasted, wasted), abs=5e-4)


def row_gradients(policy, y, e, levels):
    """Gradients [n, 2] of each pair's loss for EDM's D with F = (a + b / (1 + sigma)) c_in x, its loss [n], the stream."""
    stream, index, sigma = million(policy, levels)
    a, b = (torch.full([MILLION, 1, 1, 1], value, dtype=torch.float64, requires_grad=True) for value in (0.2, 0.1))
    net = lambda x, sigma, **labels: x * (0.25 + 0.5 * sigma * (a + b / (1 + sigma))) / (sigma ** 2 + 0.25)
    column = lambda values: torch.as_tensor(values).reshape(-1, 1, 1, 1)
    loss = AmbientLoss(weighting.edm)(net, Batch(column(y[index]), column(levels[index]), column(sigma), e))['denoise']
    slopes = torch.autograd.grad(loss.sum(), [a, b])
    return torch.stack([s.flatten() for s in slopes], 1), loss.detach(), stream


def test_2a3_skip_has_the_gradient_of_clamp_up_to_its_constant():
    """Acceptance times skip's mean gradient is clamp's, to sampling error, and no pair of skip has zero loss."""
    source = np.random.Generator(np.random.Philox(key=5))
    levels = np.where(source.random(5000) < 0.9, 0.2, 0.0)
    y = 0.5 * source.standard_normal(5000) + levels * source.standard_normal(5000)
    e = torch.from_numpy(source.standard_normal([MILLION, 1, 1, 1]))
    skip, skip_loss, stream = row_gradients('skip', y, e, levels)
    clamp, clamp_loss, _ = row_gradients('clamp', y, e, levels)
    assert (skip_loss > 0).all()
    zero = (clamp_loss == 0).double().mean().item()
    assert zero == pytest.approx(1 - stream.acceptance(), abs=0.003) and zero > 0.3
    difference = stream.acceptance() * skip.mean(0) - clamp.mean(0)
    error = ((stream.acceptance() * skip).var(0) / MILLION + clamp.var(0) / MILLION).sqrt()
    assert (difference.abs() < 5 * error).all()
    assert (error < 0.02 * clamp.mean(0).abs()).all()  # so the agreement says something
    assert ((skip.mean(0) - clamp.mean(0)).abs() > 10 * error).all()  # and the constant is needed


# ---- one sequence


@pytest.mark.parametrize('policy', PAIRINGS)
@pytest.mark.parametrize('images', [1, 37, 5000])
def test_the_stream_does_not_depend_on_the_batch_size(policy, images):
    levels = np.resize(LEVELS, images)
    streams = {batch: PairStream(levels, P, policy, batch=batch, seed=3) for batch in (1, 32, 512)}
    read = {}
    for batch, stream in streams.items():
        read[batch] = [np.concatenate(part) for part in zip(*[stream.next() for _ in range(4096 // batch)])]
    for batch in (1, 32):
        assert np.array_equal(read[batch][0], read[512][0]) and np.array_equal(read[batch][1], read[512][1])
        assert streams[batch].state() == streams[512].state()
    assert streams[512].passed > BLOCK and [part.dtype for part in read[512]] == [np.int64, np.float64]


@pytest.mark.parametrize('policy', PAIRINGS)
def test_a_restored_stream_goes_on_where_it_stood(policy):
    straight = PairStream(LEVELS, P, policy, batch=100, seed=3)
    for _ in range(57):
        straight.next()
    continued = PairStream(LEVELS, P, policy, batch=300, seed=3)
    continued.restore(json.loads(json.dumps(straight.state())))
    expected = [np.concatenate(part) for part in zip(*[straight.next() for _ in range(3)])]
    assert all(np.array_equal(a, b) for a, b in zip(continued.next(), expected))
    assert continued.state() == straight.state() and continued.used == 6000


def test_a_stream_can_be_taken_back():
    stream = PairStream(LEVELS, P, 'skip', batch=500, seed=3)
    first = stream.next()
    for _ in range(20):
        stream.next()
    stream.restore({'cursor': 0, 'used': 0})
    assert all(np.array_equal(a, b) for a, b in zip(stream.next(), first))


@pytest.mark.parametrize('policy', PAIRINGS)
def test_the_seed_decides_and_the_global_random_state_does_not(policy):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    read = [PairStream(LEVELS, P, policy, batch=200, seed=seed).next() for seed in (3, 3, 4)]
    assert all(np.array_equal(a, b) for a, b in zip(read[0], read[1]))
    assert not any(np.array_equal(a, b) for a, b in zip(read[0], read[2]))
    assert torch.equal(torch_state, torch.get_rng_state()) and np.array_equal(numpy_state, np.random.get_state()[1])


def test_every_epoch_is_a_new_permutation():
    stream = PairStream(np.zeros(1000), P, 'skip', batch=1000, seed=0)
    epochs = [stream.next()[0] for _ in range(5)]
    assert all(np.array_equal(np.sort(epoch), np.arange(1000)) for epoch in epochs)
    assert all((a == b).sum() < 10 for a, b in zip(epochs, epochs[1:]))


def test_clean_images_use_every_place():
    for policy in ('skip', 'sigma_first', 'truncate', 'clamp'):
        stream = PairStream(np.zeros(100), P, policy, batch=1000)
        stream.next()
        assert stream.passed == stream.used == 1000 and stream.acceptance() == pytest.approx(1)


def test_rare_eligible_images_are_found():
    """One clean image among 3,000 that need very high levels."""
    levels = np.full(3000, 50.0)
    levels[1234] = 0.0
    stream = PairStream(levels, P, 'sigma_first', batch=50)
    index, sigma = stream.next()
    assert (index[sigma <= 50] == 1234).all() and (sigma <= 50).sum() > 45 and stream.passed > 45 * 2000


# ---- refusals and warnings


@pytest.mark.parametrize('policy', ['skip', 'truncate', 'sigma_first'])
def test_levels_out_of_reach_are_refused(policy):
    with pytest.raises(UserError, match=f'--pairing={policy}: practically no image can be used.*--noise') as err:
        PairStream([200.0, 150.0], LogUniform(), policy, batch=4)
    assert '\n' not in err.value.message


def test_a_share_too_small_to_ever_fill_a_batch_is_refused():
    with pytest.raises(UserError, match='practically no image'):
        PairStream([1000.0], P, 'skip', batch=4)
    assert PairStream([1000.0], P, 'truncate', batch=4).next()[1].min() > 1000  # truncate can


def test_images_out_of_reach_are_left_out():
    for policy in ('skip', 'truncate', 'sigma_first'):
        index, sigma = PairStream([0.1, 150.0], LogUniform(), policy, batch=500).next()
        assert (index == 0).all() and (sigma > 0.1).all()


@pytest.mark.parametrize('spec, text', [
    ('skip:buffer=0.9', 'must be 1 or more'), ('truncate:buffer=0', 'must be 1 or more'),
    ('sigma_first:buffer=nan', 'must be 1 or more'),
    ('clamp:buffer=1.1', 'leave it at 1'), ('skip:buffer=wide', 'must be a number'), ('skip:bufer=2', 'it takes buffer=1.0'),
    ('jump', 'choose from clamp, sigma_first, skip, truncate')])
def test_wrong_policies_are_refused_in_one_line(spec, text):
    with pytest.raises(UserError, match=text) as err:
        PairStream(LEVELS, P, spec, batch=4)
    assert err.value.message.startswith(f'--pairing={spec}: ') and '\n' not in err.value.message


@pytest.mark.parametrize('levels', [[], [0.1, np.nan], [-0.1], [np.inf]])
def test_wrong_levels_are_refused(levels):
    with pytest.raises(UserError, match='sigma_n must be finite'):
        PairStream(levels, P, batch=4)


def test_batch_of_none_is_refused():
    with pytest.raises(UserError, match='--batch=0 must be at least 1'):
        PairStream(LEVELS, P, batch=0)


def test_low_acceptance_and_waste_are_said(capsys):
    PairStream([10.0], P, 'skip', batch=4)
    assert 'Warning: --pairing=skip: only 0.18% of the images' in capsys.readouterr().out
    PairStream(np.repeat([0.0, 0.2], 500), P, 'clamp', batch=4)
    assert 'Warning: --pairing=clamp: 18.3% of all pairs (36.6% of those with a noisy image)' in capsys.readouterr().out
    PairStream(np.zeros(10), P, 'clamp', batch=4)
    PairStream(LEVELS, P, 'skip', batch=4)
    assert capsys.readouterr().out == ''
