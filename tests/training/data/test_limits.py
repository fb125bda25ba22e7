# SPDX-License-Identifier: Apache-2.0
"""Usable levels: the union of sigma_min and sigma_max above the bar, and that each pairing follows its law over a million draws."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from dnnlib import UserError
from training.data.batches import Batch
from training.data.corruption import Corruption
from training.data.limits import usable_levels
from training.data.pairs import PairStream
from training.diffusion.noise import NOISE, Levels, LogNormal, LogUniform
from training.objective import weighting
from training.objective.loss import AmbientLoss

P = LogNormal()
INF = math.inf
MILLION = 1_000_000
# sigma_n, sigma_min, sigma_max, and the intervals (low, high] that they leave without a buffer.
KINDS = [
    (0.0, 0.0, INF, [(0.0, INF)]),
    (0.2, 0.0, INF, [(0.2, INF)]),
    (0.0, 0.8, INF, [(0.8, INF)]),
    (0.3, 0.1, INF, [(0.3, INF)]),
    (0.1, 0.0, 0.3, [(0.1, 0.3)]),
    (0.1, 0.8, 0.3, [(0.1, 0.3), (0.8, INF)]),
    (0.2, 0.5, 0.15, [(0.5, INF)]),
    (0.05, 0.2, 0.4, [(0.05, INF)]),
    (0.0, INF, 0.3, [(0.0, 0.3)]),
    (0.0, INF, INF, []),
]
SIGMA_N, LOWER, UPPER = (np.tile([kind[k] for kind in KINDS], 100) for k in range(3))  # 1,000 images


def sf(sigma):
    return P.sf(torch.as_tensor(sigma, dtype=torch.float64)).numpy()


def mass(intervals, below=INF):
    """p of what lies in the intervals and up to `below`."""
    return sum(sf(low) - sf(np.clip(below, low, high)) for low, high in intervals)


def law(intervals):
    """cdf of p(sigma | sigma in the intervals)."""
    return lambda sigma: mass(intervals, sigma) / mass(intervals)


def ks_distance(sample, cdf):
    """At evenly spaced positions of the sorted draws, which leaves out 1e-4 at most."""
    places = np.arange(0, len(sample), max(1, len(sample) // 10_000))
    height = cdf(np.sort(sample)[places])
    return max((height - places / len(sample)).max(), ((places + 1) / len(sample) - height).max()) + 1e-4


def million(policy):
    stream = PairStream(SIGMA_N, P, policy, batch=MILLION, seed=1, lower=LOWER, upper=UPPER)
    index, sigma = stream.next()
    for k, (_, _, _, intervals) in enumerate(KINDS):
        drawn = sigma[index % len(KINDS) == k]
        within = np.zeros(len(drawn), bool)
        for low, high in intervals:
            within |= (drawn > low) & (drawn <= high)
            assert len(drawn) and ((drawn > low) & (drawn <= high)).any()
        assert within.all()
    return stream, index % len(KINDS), sigma


def assert_each_kind_follows_its_law(kind, sigma):
    for k, (_, _, _, intervals) in enumerate(KINDS[:-1]):
        drawn = sigma[kind == k]
        distance = ks_distance(drawn, law(intervals))
        assert distance < max(0.005, 2.5 / np.sqrt(len(drawn))), k  # P < 1e-5 each


def test_a_million_draws_of_skip():
    stream, kind, sigma = million('skip')
    chance = np.array([mass(intervals) for *_, intervals in KINDS])
    counts = np.bincount(kind, minlength=len(KINDS))
    assert counts[-1] == 0 and scipy.stats.chisquare(counts[:-1], chance[:-1] / chance.sum() * MILLION).pvalue > 1e-6
    assert ks_distance(sigma, lambda s: sum(mass(intervals, s) for *_, intervals in KINDS) / chance.sum()) < 0.005
    assert_each_kind_follows_its_law(kind, sigma)
    assert stream.acceptance() == pytest.approx(chance.mean()) and stream.used / stream.passed == pytest.approx(chance.mean(), abs=0.003)


def test_a_million_draws_of_truncate():
    stream, kind, sigma = million('truncate')
    assert ks_distance(sigma, lambda s: np.mean([law(intervals)(s) for *_, intervals in KINDS[:-1]], 0)) < 0.005
    assert_each_kind_follows_its_law(kind, sigma)
    counts = np.bincount(kind, minlength=len(KINDS))
    assert counts[-1] == 0 and counts[:-1].max() - counts[:-1].min() <= 100 and stream.acceptance() == 0.9


def test_a_million_draws_of_sigma_first():
    stream, kind, sigma = million('sigma_first')
    assert ks_distance(sigma, lambda s: 1 - sf(s)) < 0.005
    edges = np.unique([0, INF, *(edge for *_, intervals in KINDS for pair in intervals for edge in pair)])
    for low, high in zip(edges, edges[1:]):
        seen = np.bincount(kind[(sigma > low) & (sigma <= high)], minlength=len(KINDS))
        fine = np.array([any(a <= low and high <= b for a, b in intervals) for *_, intervals in KINDS])
        np.testing.assert_allclose(seen / seen.sum(), fine / fine.sum(), atol=0.01)
    assert stream.used / stream.passed == pytest.approx(stream.acceptance(), rel=0.02)


def test_sigma_first_keeps_p_over_the_union_of_what_any_image_covers(capsys):
    levels, lower, upper = [0.0, 0.0, 0.1], [2.0, 0.5, 0.0], [0.05, INF, 0.2]
    covered = [(0.0, 0.05), (0.1, 0.2), (0.5, INF)]
    index, sigma = PairStream(levels, P, 'sigma_first', batch=MILLION // 4, lower=lower, upper=upper).next()
    assert ks_distance(sigma, law(covered)) < 0.005
    assert set(index[sigma <= 0.05]) == {0} and set(index[(sigma > 0.05) & (sigma <= 0.2)]) == {2}
    assert set(index[(sigma > 0.5) & (sigma <= 2)]) == {1} and set(index[sigma > 2]) == {0, 1}
    said = capsys.readouterr().out
    assert f'{(1 - mass(covered)) * 100:.1f}% of the levels of --noise (between 0.05 and 0.1 and between 0.2 and 0.5)' in said


@pytest.mark.parametrize('name', NOISE)
@pytest.mark.parametrize('policy', ['skip', 'truncate', 'sigma_first'])
def test_every_law_stays_within_the_union(name, policy):
    """Both parts of a union are met, by laws with densities and by lists of levels, in proportion to their shares of p."""
    noise = NOISE[name](stratified=True)
    bar, top, floor, low = noise.icdf(torch.tensor([0.05, 0.3, 0.55, 0.65], dtype=torch.float64)).tolist()
    index, sigma = PairStream([bar, 0.0], noise, policy, batch=20_000, lower=[floor, low], upper=[top, INF]).next()
    first = sigma[index == 0]
    assert (((first > bar) & (first <= top)) | (first > floor)).all() and (sigma[index == 1] > low).all()
    shares = noise.mass(*torch.tensor([[bar, floor], [top, INF]], dtype=torch.float64))
    if policy != 'sigma_first':
        assert (first > floor).mean() == pytest.approx(float(shares[1] / shares.sum()), abs=0.02)


def test_usable_is_the_union_as_it_is_defined():
    source = np.random.default_rng(0)
    values = np.array([0.0, 0.1, 0.2, 0.4, 0.8])
    levels, lower, upper = source.choice(values, 2000), source.choice([*values, INF], 2000), source.choice([*values[1:], INF], 2000)
    limits = usable_levels(levels, 1.5, lower, upper)
    ever = np.zeros(2000, bool)
    for sigma in (0.05, 0.1, 0.12, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 5.0):
        free, above, below = (lower == 0) & (upper == INF), (lower > 0) & (sigma > lower), (upper < INF) & (sigma <= upper)
        expected = (sigma > 1.5 * levels) & (free | above | below)
        assert np.array_equal(limits.usable(sigma).numpy(), expected), sigma
        assert torch.equal(limits.usable(torch.full([2000], sigma, dtype=torch.float64)), limits.usable(sigma))
        ever |= expected
    assert np.array_equal(limits.empty().numpy(), ~ever) and 0 < ever.sum() < 2000
    some = np.array([5, 700, 3])
    assert torch.equal(limits.of(some).usable(0.3), limits.usable(0.3)[some])


def test_limits_that_allow_all_are_no_limits():
    """sigma_min at or below sigma_max leaves no hole: the plain case, in its fast form and with its sequence."""
    assert usable_levels([0.1, 0.2], lower=[0.3, 0.0], upper=[0.3, INF])[1:] == (None, None)
    assert usable_levels([0.1, 0.2], lower=[0.3, 0.0])[1:] == (None, None)  # sigma_min alone is a higher bar
    for policy in ('skip', 'truncate', 'sigma_first'):
        plain, same = (PairStream([0.1, 0.2, 0.0], P, policy, batch=3000, **kwargs).next()
                       for kwargs in ({}, {'lower': [0.3, 0.0, 0.1], 'upper': [0.4, INF, 0.2]}))
        assert all(np.array_equal(a, b) for a, b in zip(plain, same))


@pytest.mark.parametrize('policy', ['skip', 'truncate', 'sigma_first'])
def test_images_that_can_never_be_used_are_counted(policy, capsys):
    """sigma_min = inf is what annotation says of images that are never taken for clean ones."""
    index, _ = PairStream([0.0, 0.1, 0.0, 0.0], LogUniform(), policy, batch=500, lower=[INF, INF, 200.0, 0.0]).next()
    assert (index == 3).all()
    assert f'Warning: --pairing={policy}: 3 of 4 images are never used' in capsys.readouterr().out
    for lower in ([INF, INF], [200.0, INF]):
        with pytest.raises(UserError, match='practically no image can be used: .*sigma_min') as err:
            PairStream([0.0, 0.1], LogUniform(), policy, batch=4, lower=lower)
        assert '\n' not in err.value.message and f'{lower.count(INF)} of 2 have no level' in err.value.message


def test_levels_below_every_sigma_min_are_said(capsys):
    PairStream([0.0, 0.0], P, batch=4, lower=[0.5, 0.3])
    assert f'no image may be used at {(1 - sf(0.3)) * 100:.1f}% of the levels of --noise (between 0 and 0.3)' in capsys.readouterr().out
    PairStream([0.0, 0.0], P, batch=4, lower=[0.5, 0.0])
    assert capsys.readouterr().out == ''


def test_wrong_limits_are_refused():
    for lower in ([1.0], [-0.1, 1.0], [math.nan, 1.0]):
        with pytest.raises(UserError, match='sigma_min must be 0 or more for each of the 2 images'):
            PairStream([0.0, 0.0], P, batch=4, lower=lower)
    with pytest.raises(UserError, match='--pairing=clamp: clamp reproduces .* 1 of 2 images have a sigma_min or sigma_max'):
        PairStream([0.0, 0.0], P, 'clamp', batch=4, lower=[0.2, 0.0])


def test_an_exact_level_at_a_limit_is_within_sigma_max_and_outside_sigma_min():
    for policy in ('skip', 'truncate', 'sigma_first'):
        index, sigma = PairStream([0.1], Levels('0.1|0.2|0.3|0.4'), policy, batch=300, lower=[0.3], upper=[0.2]).next()
        assert set(sigma) == {0.2, 0.4}


# ---- blurred Gaussian data, whose best denoiser is known: a gain P / (P + sigma^2) for each of four frequencies

POWER, KEPT = np.array([0.5, 0.05, 0.006, 0.002]), np.array([1.0, 0.97, 0.6, 0.2])  # of the clean images; share that the blur leaves
CLEAN, BLURRED, BLURRED_FROM = 4000, 36_000, 0.6  # the last one: sigma_min of the blurred images
BELOW, ABOVE = [0.05, 0.2], [0.8, 1.5, 3.0]


def whitened(source, rows, columns):
    """Normal draws whose second moments are exactly those of the unit normal law."""
    draws = source.standard_normal([rows, columns])
    return draws @ np.linalg.inv(np.linalg.cholesky(draws.T @ draws / rows)).T


def learned_gains(sigma_n=0.0, lower=0.0, pairs=500_000):
    """{level: (gains [4] that minimise the ambient loss over the pairs of the stream, share of blurred images)}.

    sigma_n, lower: of the blurred images, which come after the clean ones; that much noise is on them."""
    source = np.random.default_rng(0)
    clean, both = whitened(source, CLEAN, 4), whitened(source, BLURRED, 8)
    images = np.concatenate([clean * POWER ** 0.5, both[:, :4] * (KEPT * POWER) ** 0.5 + sigma_n * both[:, 4:]])
    of_blurred = lambda value: np.repeat([0.0, value], [CLEAN, BLURRED])
    levels = '|'.join(map(str, BELOW + ABOVE))
    stream = PairStream(of_blurred(sigma_n), Levels(levels), 'sigma_first', batch=pairs, seed=2, lower=of_blurred(lower))
    index, sigma = stream.next()
    found = {}
    for level in BELOW + ABOVE:
        rows = np.tile(index[sigma == level], 2)
        noise = whitened(source, len(rows) // 2, 4)
        column = lambda values: torch.from_numpy(values).reshape(-1, 1, 1, 1)
        pixels = lambda values: torch.from_numpy(values).reshape(-1, 1, 1, 4)
        batch = Batch(pixels(images[rows]), column(of_blurred(sigma_n)[rows]), column(np.full(len(rows), level)),
                      pixels(np.concatenate([noise, -noise])))
        at_0, at_1 = slope(0.0, batch), slope(1.0, batch)  # the loss is quadratic in the gains: its slope is a straight line
        found[level] = (at_0 / (at_0 - at_1)).numpy(), (rows >= CLEAN).mean()
    return found


def slope(value, batch):
    """Gradient [4] of the summed ambient loss in the gains, where all of these are `value`."""
    gain = torch.full([4], value, dtype=torch.float64, requires_grad=True)
    loss = AmbientLoss(weighting.WEIGHTS['uniform'])(lambda x, sigma, **labels: gain * x, batch)['denoise']
    return torch.autograd.grad(loss.sum(), gain)[0]


def errors(gains, level):
    """(largest error of a gain, error of the denoised image in shares of that image)."""
    best = POWER / (POWER + level ** 2)
    power = POWER + level ** 2  # of the noisy image
    return np.abs(gains - best).max(), (((gains - best) ** 2 * power).sum() / (best ** 2 * power).sum()) ** 0.5


def test_blurred_images_with_sigma_min_teach_the_clean_denoiser():
    """Within 1 % above sigma_min, where they are seen; below it clean images alone are, and without the limit they spoil it."""
    limited, free = learned_gains(lower=BLURRED_FROM), learned_gains(pairs=100_000)
    for level in BELOW + ABOVE:
        gains, share = limited[level]
        assert max(errors(gains, level)) < 0.01, (level, errors(gains, level))
        assert share == (0 if level in BELOW else pytest.approx(0.9, abs=0.01))
    for level in BELOW:
        assert errors(free[level][0], level)[0] > 0.03 and free[level][1] == pytest.approx(0.9, abs=0.01)
    mixed = (0.1 + 0.9 * KEPT) * POWER  # what the gains of all images together are, in closed form
    np.testing.assert_allclose(free[0.05][0], mixed / (mixed + 0.05 ** 2), atol=0.01)


def test_noise_up_to_sigma_min_teaches_the_clean_denoiser_above_it():
    """Ambient Omni's way: the blurred images carry fixed noise, and the ambient loss takes it off again.

    The bound is wider, since the second moments of signal and noise, 0.86, are sampled where the signal's alone, 0.5, are sought."""
    sigma_n, lower = Corruption(sigma_min_as='noise').beyond_sigma_min([0.0], [BLURRED_FROM], [INF])
    found = learned_gains(sigma_n=float(sigma_n[0]), lower=float(lower[0]))
    for level in BELOW + ABOVE:
        gains, share = found[level]
        assert max(errors(gains, level)) < 0.016, (level, errors(gains, level))
        assert share == (0 if level in BELOW else pytest.approx(0.9, abs=0.01))
