# SPDX-License-Identifier: Apache-2.0
"""sigma_first by tables gives the pairs that looking at one place after another gives, and the sequences are those of version 0.2.0."""

import hashlib
import math

import numpy as np
import pytest
import torch

from training.data.pairs import BLOCK, PairStream
from training.data.walks import GROUPS, Walks
from training.diffusion.noise import TINY, Levels, LogNormal

P = LogNormal()


def drawn_levels(stream, count):
    """The levels of the first pairs, as they were drawn when an image's levels were one interval each."""
    u = torch.cat([stream.uniforms('sigma_first', number) for number in range(-(-count // BLOCK))])[:count]
    limits = stream.limits
    if limits.top is None:
        return P.above(limits.bar.min(), u)
    low, high = limits.ranges()
    chance = P.mass(low, high)
    low, high, chance = (column[chance > 0] for column in (low, high, chance))
    ends = chance.cumsum(0)
    place = u * ends[-1]
    k = torch.searchsorted(ends, place).clamp(max=len(ends) - 1)
    return P.between(low[k], high[k], ((ends[k] - place) / chance[k]).clamp(TINY, 1))


def first_fit(stream, levels, sigma_n, lower, upper):
    """(index, places passed): each level takes the first image at or behind the cursor that it may be seen with."""
    cursor, found, images, fine = 0, [], None, None
    for sigma in levels.tolist():
        while True:
            number, offset = divmod(cursor, BLOCK)
            images = stream.images(number) if images is None or offset == 0 else images
            k = images[offset]
            cursor += 1
            fine = lower[k] == 0 and upper[k] == math.inf or 0 < lower[k] < sigma or sigma <= upper[k] < math.inf
            if sigma > sigma_n[k] and fine:
                break
        found.append(k)
    return np.array(found), cursor


def mixes():
    source, n = np.random.default_rng(0), 3000
    zeros, none, clean = np.zeros(n), np.full(n, math.inf), source.random(n) < 0.2
    half, other = source.random([2, n]) < 0.5
    spread = np.where(clean, 0, source.lognormal(-1.5, 0.7, n))
    high, low = source.lognormal(0, 0.4, n), source.lognormal(-1.5, 0.4, n)
    yield 'clean', zeros, zeros, none
    yield 'one level', np.where(clean, 0, 0.2), zeros, none
    yield 'continuous levels', spread, zeros, none
    yield 'upper limits', spread, zeros, np.where(clean, math.inf, low * 4)
    yield 'lower limits', zeros, np.where(clean, 0, high), none
    yield 'lower limits, one', spread, np.where(clean, 0, 0.8), none
    yield 'all', np.where(clean, 0.1, spread) * half, np.where(half, 0, high), np.where(other, math.inf, low)
    yield 'few of all', np.where(clean, 0.1, 0), np.where(half, 0, 0.7), np.where(other, math.inf, 0.3)
    yield 'never', np.where(clean, 0, 0.2), np.where(half, math.inf, 0), none
    yield 'nothing in common', low, zeros, low * 1.0001


@pytest.mark.parametrize('mix', list(mixes()), ids=lambda mix: mix[0])
def test_sigma_first_finds_what_a_plain_walk_finds(mix):
    _, sigma_n, lower, upper = mix
    stream = PairStream(sigma_n, P, 'sigma_first', batch=500, seed=3, lower=lower, upper=upper)
    batches = [stream.next() for _ in range(1 if mix[0] == 'nothing in common' else 9)]
    levels = drawn_levels(stream, 500 * len(batches))
    index, cursor = first_fit(stream, levels, sigma_n, lower, upper)
    assert np.array_equal(np.concatenate([sigma for _, sigma in batches]), levels.numpy())
    assert np.array_equal(np.concatenate([index for index, _ in batches]), index)
    assert stream.cursor == cursor


def test_many_limits_are_grouped_such_that_few_places_are_looked_at_in_vain():
    sigma_n = np.random.default_rng(1).lognormal(-1.5, 0.7, 20_000)
    sigma_n[::10] = 0
    walks = Walks(PairStream(sigma_n, P, 'sigma_first', batch=4).limits)
    assert not walks.exact and 4 < len(walks.edges) <= GROUPS
    edges = np.append(walks.edges.numpy(), math.inf)
    for low, high in zip(edges, edges[1:]):  # how many may be seen at some level of a group, and at its lowest
        assert (sigma_n < high).sum() <= 1.25 * (sigma_n <= low).sum() + 1
    assert Walks(PairStream(np.tile([0, 0.1, 0.2], 50), P, 'sigma_first', batch=4).limits).exact


# Of index and sigma of 10,000 pairs that version 0.2.0 gave; the law is a list of levels, so that no logarithm's last bit matters.
DIGESTS = {
    ('skip', False): '22247c9a58045502', ('truncate', False): '2fc98419100679ec', ('sigma_first', False): 'e2799d0ee018b6bd',
    ('clamp', False): '1c84f99a9467a18b', ('skip', True): '3a222968d2c7fc04', ('truncate', True): 'd92e5b519334caa5',
    ('sigma_first', True): '0cbdd1c8c9260553',
}
LEVELS, UPPER = np.tile([0.0, 0.1, 0.4, 0.2, 0.0], 200), np.tile([math.inf, 0.3, 1.0, math.inf, 0.05], 200)


@pytest.mark.parametrize('policy, limited', DIGESTS)
def test_sequences_without_sigma_min_are_those_of_version_0_2_0(policy, limited):
    stream = PairStream(LEVELS, Levels('0.03|0.15|0.25|0.5|2'), policy, batch=2500, seed=5, upper=UPPER if limited else None)
    index, sigma = (np.concatenate(part) for part in zip(*[stream.next() for _ in range(4)]))
    assert hashlib.sha256(index.tobytes() + sigma.tobytes()).hexdigest()[:16] == DIGESTS[policy, limited]
