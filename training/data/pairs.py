# SPDX-License-Identifier: Apache-2.0
"""Which (image, sigma) pairs the next step looks at: an endless shuffled list of images, and a policy that gives them levels.

Every draw is a pure function of the seed and of a place in the list, so that the cursor is the only state of the data."""

import math
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import distributed, misc, registry
from training.diffusion.noise import TINY, stratify

# Places of the list that are worked on together, whatever the batch size: as many as PyTorch works on without waking its threads,
# which the training step needs itself.
BLOCK = 2048
RARE, IDLE = 1e-2, 1e-6  # shares of usable places below which a policy is warned of, and refused
INVERSE_BUFFER = 2 / math.sqrt(3)  # keeps (1 - r)^-2 up to 16, as Ambient Omni (Daras et al. 2025) does


class Judged(NamedTuple):
    """The places of one block that give a pair."""

    place: np.ndarray  # int64 [n], ascending, 0 <= place < BLOCK
    index: np.ndarray  # int64 [n]
    sigma: np.ndarray  # float64 [n]


class Pairing:
    """What the policies share: an image may be seen at levels above its bar, buffer * sigma_n, and up to its top, sigma_max.

    bar, top: float64 [n]; top is None where no image has a limit."""

    def __init__(self, buffer=1.0):
        if not 1 <= buffer < math.inf:
            raise ValueError(f'buffer={buffer} must be 1 or more: below sigma_n an image teaches nothing')
        self.buffer = buffer


class Skip(Pairing):
    """Draws sigma ~ p for each image in turn; where sigma is not above the bar the gradient is zero, so the image is passed over.

    Keeps the published objective up to a constant, at no wasted network evaluation."""

    def judge(self, bar, top, u, noise):
        """(sigma, usable) for images with these bars and tops and uniforms u: tensors [n]."""
        sigma = noise.icdf(u)
        return sigma, sigma > bar if top is None else (sigma > bar) & (sigma <= top)

    def share(self, bar, top, noise):
        """Expected share of the places in the list that give a pair."""
        return chances(bar, top, noise).mean().item()

    def take(self, stream, count):
        """(index int64 [count], sigma float64 [count]) of the next pairs; moves the stream's cursor behind the last of them."""
        parts = []
        while count:
            number, offset = divmod(stream.cursor, BLOCK)
            block = stream.cached(self._judged, number)
            first = np.searchsorted(block.place, offset)
            part = Judged(*(column[first:first + count] for column in block))
            count -= len(part.place)
            stream.cursor = number * BLOCK + (BLOCK if count else int(part.place[-1]) + 1)
            parts.append(part)
        return np.concatenate([part.index for part in parts]), np.concatenate([part.sigma for part in parts])

    def _judged(self, stream, number):
        index = stream.images(number)
        top = None if stream.tops is None else stream.tops[index]
        sigma, usable = self.judge(stream.bars[index], top, stream.uniforms('level', number), stream.noise)
        place = usable.numpy().nonzero()[0]
        return Judged(place, index[place], sigma.numpy()[place])


class Truncate(Skip):
    """Draws sigma ~ p(. | bar < sigma <= top) for each image in turn: keeps every image's visit count."""

    def judge(self, bar, top, u, noise):
        sigma = noise.above(bar, u) if top is None else noise.between(bar, top, u)
        return sigma, chances(bar, top, noise) > 0

    def share(self, bar, top, noise):
        return (chances(bar, top, noise) > 0).double().mean().item()


class Clamp(Skip):
    """sigma = max(sigma, sigma_n), as the published code does: pairs at sigma_n have no gradient, and cost as much as others."""

    def __init__(self, buffer=1.0):
        super().__init__(buffer)
        if buffer != 1:
            raise ValueError(f'buffer={buffer}: clamp repeats the published code, which has none; leave it at 1')

    def judge(self, bar, top, u, noise):
        return torch.maximum(noise.icdf(u), bar), torch.ones_like(bar, dtype=torch.bool)

    def share(self, bar, top, noise):
        return 1.0


class SigmaFirst(Pairing):
    """Draws sigma ~ p (given that some image may be seen at it), then walks the list to the next such image: keeps p(sigma)."""

    def share(self, bar, top, noise):
        """Expected share of the places in the list that give a pair."""
        # A level between two neighbouring limits walks past 1 / (share of the images that allow it) places on average.
        low, high, count = coverage(bar, top)
        chance = noise.mass(low, high)
        walk = (chance * len(bar) / count).sum() / chance.sum()
        return 1 / walk.item() if chance.sum() > 0 else 0.0

    def take(self, stream, count):
        """As Skip.take; the levels are numbered by the pairs used, not by the places."""
        first = stream.used // BLOCK
        numbers = range(first, -(-(stream.used + count) // BLOCK))
        levels = np.concatenate([stream.cached(self._levels, number) for number in numbers])
        sigma = levels[stream.used - first * BLOCK:][:count]
        index = np.empty(count, np.int64)
        done = 0
        while done < count:
            number, offset = divmod(stream.cursor, BLOCK)
            done, offset = self._walk(*stream.cached(self._limits, number), offset, sigma, index, done)
            stream.cursor = number * BLOCK + offset
        return index, sigma

    def _levels(self, stream, number):
        u = stream.uniforms('sigma_first', number)
        if stream.tops is None:
            return stream.noise.above(stream.bars.min(), u).numpy()
        low, high, chance = stream.cached(self._covered, 0)
        ends = chance.cumsum(0)
        place = u * ends[-1]
        k = torch.searchsorted(ends, place).clamp(max=len(ends) - 1)
        return stream.noise.between(low[k], high[k], ((ends[k] - place) / chance[k]).clamp(TINY, 1)).numpy()

    def _covered(self, stream, number):
        """The intervals of levels that some image may be seen at: (low, high, their probability), each [k]."""
        low, high = ranges(stream.bars, stream.tops)
        chance = stream.noise.mass(low, high)
        return [column[chance > 0] for column in (low, high, chance)]

    def _walk(self, images, limits, listed, offset, sigma, index, done):
        """Fills index[done:] from one block, until either ends: returns how many are done, and the offset behind the last."""
        (bars, tops), (bar, top) = limits, listed
        for level in sigma[done:done + BLOCK - offset].tolist():
            # The next one is near as a rule: a plain loop is the fastest for that. NumPy is for the long walks.
            near = min(offset + 32, BLOCK)
            if top is None:
                while bar[offset] >= level and offset < near:
                    offset += 1
            else:
                while not bar[offset] < level <= top[offset] and offset < near:
                    offset += 1
            if offset == near and offset < BLOCK:
                usable = bars[offset:] < level if tops is None else (bars[offset:] < level) & (level <= tops[offset:])
                offset += int(usable.argmax()) if usable.any() else len(usable)
            if offset == BLOCK:
                break
            index[done] = images[offset]
            done, offset = done + 1, offset + 1
        return done, offset

    def _limits(self, stream, number):
        index = stream.images(number)
        bars, tops = (None if limit is None else limit.numpy()[index] for limit in (stream.bars, stream.tops))
        # What stands behind the end stops the plain loop.
        return index, (bars, tops), ([*bars.tolist(), -1.0], None if tops is None else [*tops.tolist(), math.inf])


def chances(bar, top, noise):
    """P(bar < sigma <= top) of each image, [n]."""
    return noise.sf(bar) if top is None else noise.mass(bar, top)


def coverage(bar, top):
    """The levels between neighbouring limits that some image may be seen at: (low, high, number of such images), each [k], ascending."""
    top = torch.full_like(bar, math.inf) if top is None else top
    bar, top = bar[bar < top].sort().values, top[bar < top].sort().values
    limits = torch.cat([bar, top]).unique()
    low, high = limits[:-1], limits[1:]
    count = torch.searchsorted(bar, low, right=True) - torch.searchsorted(top, low, right=True)
    return low[count > 0], high[count > 0], count[count > 0]


def ranges(bar, top):
    """What coverage() covers, as intervals (low, high] that do not touch: (low, high), each [k], ascending."""
    low, high, _ = coverage(bar, top)
    apart = low[1:] != high[:-1]
    edge = apart.new_ones(1)
    return low[torch.cat([edge, apart])[:len(low)]], high[torch.cat([apart, edge])[:len(high)]]


def with_inverse_weight(spec):
    """The pairing policy that goes with --ambient-weight=inverse: `spec` with the buffer that it implies, where none is given.

    The weight (1 - r)^-2 has infinite variance without a buffer. Raises UserError for clamp, and for a buffer of 1 or less."""
    name, options = registry.parse(spec)
    if name == 'clamp':
        raise UserError(f'--ambient-weight=inverse does not go with --pairing={spec}: at sigma = sigma_n, where clamp puts '
                        'pairs, the weight is infinite; use skip, truncate or sigma_first')
    if 'buffer' not in options:
        return f'{spec.rstrip(":")}{"," if options else ":"}buffer={INVERSE_BUFFER}'
    if not options['buffer'] > 1:
        raise UserError(f'--ambient-weight=inverse does not go with --pairing={spec}: the weight has infinite variance unless '
                        f'buffer is above 1; leave it out for {INVERSE_BUFFER:.4f}')
    return spec


class PairStream:
    """Endless stream of global batches of (image, sigma) pairs.

    levels: sigma_n of each image, [n] in network units. noise: NoiseDistribution p(sigma). policy: of PAIRINGS, such as
    "truncate:buffer=1.1". batch: pairs of one global batch; the sequence of pairs does not depend on it. upper: sigma_max of each
    image, [n], the highest level that it may be seen at; inf, or None for all: any. Attributes: cursor (places of the list passed),
    used (pairs given). Refuses limits that leave no image to be used; says where few can be, and which levels are never seen."""

    def __init__(self, levels, noise, policy='skip', *, batch, seed=0, upper=None):
        levels = torch.as_tensor(np.asarray(levels, np.float64)).reshape(-1)
        if not (len(levels) and levels.isfinite().all() and (levels >= 0).all()):
            raise UserError('sigma_n must be finite and 0 or more for each image, of which there must be one at least')
        tops = None if upper is None else torch.as_tensor(np.asarray(upper, np.float64)).reshape(-1)
        if tops is not None and not (len(tops) == len(levels) and (tops > 0).all()):
            raise UserError(f'sigma_max must be above 0 for each of the {len(levels)} images (inf where there is no limit)')
        if batch < 1:
            raise UserError(f'--batch={batch} must be at least 1')
        self.noise, self.batch, self.seed, self.spec = noise, batch, seed, policy
        self.policy = registry.build(policy, PAIRINGS, '--pairing')
        self.bars = levels * self.policy.buffer
        self.tops = None if tops is None or tops.isinf().all() else tops  # None keeps the plain case fast
        self.cursor = self.used = 0
        self._rounds = -(-BLOCK // len(levels))  # epochs drawn together: short ones would each cost a generator
        self._cache = {}
        self._check()

    @property
    def passed(self):
        """Places of the list walked so far, used or not."""
        return self.cursor

    def next(self):
        """The next batch: (index int64 [batch], sigma float64 [batch]), NumPy arrays."""
        index, sigma = self.policy.take(self, self.batch)
        self.used += self.batch
        return index, sigma

    def state(self):
        """Where the stream stands, as JSON."""
        return {'cursor': self.cursor, 'used': self.used}

    def restore(self, state):
        """Goes to where a stream of the same levels, noise, policy and seed stood."""
        self.cursor, self.used = int(state['cursor']), int(state['used'])

    def acceptance(self):
        """Expected share of the passed images that are used."""
        return self.policy.share(self.bars, self.tops, self.noise)

    def wasted(self):
        """Expected shares of clamped draws, which have no gradient: (of all pairs, of the pairs with a noisy image)."""
        lost = self.noise.cdf(self.bars) * (self.bars > 0)
        return lost.mean().item(), (lost.sum() / (self.bars > 0).sum().clamp(min=1)).item()

    def images(self, number):
        """Image indices at the BLOCK places of block `number` of the list, int64."""
        part, offset = divmod(number * BLOCK, self._rounds * len(self.bars))
        epochs = self.cached(PairStream._epochs, part)
        if offset + BLOCK > len(epochs):
            epochs = np.concatenate([epochs, self.cached(PairStream._epochs, part + 1)])
        return epochs[offset:offset + BLOCK]

    def uniforms(self, name, number):
        """BLOCK uniforms in (0, 1), float64."""
        source = torch.from_numpy(self._generator(name, number).random(BLOCK))
        return (stratify(source) if self.noise.stratified else source).clamp(min=TINY)

    def cached(self, make, number):
        """make(self, number), remembered for the number of the last call: blocks are asked for batch after batch."""
        held = self._cache.get(make.__name__)
        if held is None or held[0] != number:
            held = self._cache[make.__name__] = number, make(self, number)
        return held[1]

    def _epochs(self, number):
        """The images of `_rounds` epochs, each in an order of its own."""
        in_order = np.tile(np.arange(len(self.bars)), (self._rounds, 1))
        return self._generator('epochs', number).permuted(in_order, axis=1).reshape(-1)

    def _generator(self, *key):
        return np.random.Generator(np.random.Philox(key=misc.seed_of(self.seed, 'pairs', *key)))

    def _check(self):
        """Refuses what would never give a batch, and says what would give few or waste many."""
        where = f'--pairing={self.spec}'
        if isinstance(self.policy, Clamp) and self.tops is not None:
            raise UserError(f'{where}: clamp repeats the published code, which knows no upper limit, but {self._limited()} of '
                            f'{len(self.bars)} images have a sigma_max; use skip, truncate or sigma_first')
        share = self.acceptance()
        if share < IDLE:
            raise UserError(f'{where}: practically no image can be used: ' + self._out_of_reach())
        if share < RARE:
            distributed.print0(f'Warning: {where}: only {share:.2%} of the images passed can be used at the level '
                               'drawn for them; truncate uses all')
        if self.tops is not None:
            self._check_tops(where)
        if isinstance(self.policy, Clamp) and self.wasted()[0]:
            everywhere, noisy = self.wasted()
            distributed.print0(f'Warning: {where}: {everywhere:.1%} of all pairs ({noisy:.1%} of those with a noisy '
                               'image) have zero gradient; skip trains the same objective without them')

    def _limited(self):
        return int(self.tops.isfinite().sum())

    def _out_of_reach(self):
        if self.tops is None:
            return (f'the smallest sigma_n * buffer is {self.bars.min():g}, and --noise is above that in a share of '
                    f'{self.noise.sf(self.bars.min()):.1e}; lower --sigma or raise the levels of --noise')
        return (f'{int((self.bars >= self.tops).sum())} of {len(self.bars)} have a sigma_max that is not above sigma_n * buffer, and '
                '--noise is hardly ever between the limits of the others; lower --sigma, raise sigma_max, or change --noise')

    def _check_tops(self, where):
        """Says which images are never used, and how much of p(sigma) no image is seen at, where images have upper limits."""
        idle = int((chances(self.bars, self.tops, self.noise) == 0).sum())
        if idle:
            distributed.print0(f'Warning: {where}: {idle} of {len(self.bars)} images are never used: no level of --noise is above their '
                               'sigma_n * buffer and up to their sigma_max')
        low, high = ranges(self.bars, self.tops)
        unseen = (self.noise.sf(self.bars.min()) - self.noise.mass(low, high).sum()).item()
        if unseen > RARE:
            distributed.print0(f'Warning: {where}: no image may be seen at {unseen:.1%} of the levels of --noise (the highest sigma_max '
                               f'is {self.tops.max():g}): the network does not learn those, which sampling may need')


PAIRINGS = {'clamp': Clamp, 'sigma_first': SigmaFirst, 'skip': Skip, 'truncate': Truncate}
