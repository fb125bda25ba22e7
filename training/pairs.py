# SPDX-License-Identifier: Apache-2.0
"""Which (image, sigma) pairs the next step looks at: an endless shuffled list of images, and a policy that gives them levels.

Every draw is a pure function of the seed and of a place in the list, so that the cursor is the only state of the data."""

import math
from typing import NamedTuple

import click
import numpy as np
import torch

from torch_utils import distributed, misc
from training import registry
from training.noise import TINY, stratify

# Places of the list that are worked on together, whatever the batch size: as many as PyTorch works on without waking its threads,
# which the training step needs itself.
BLOCK = 2048
RARE, IDLE = 1e-2, 1e-6  # shares of usable places below which a policy is warned of, and refused


class Judged(NamedTuple):
    """The places of one block that give a pair."""

    place: np.ndarray  # int64 [n], ascending, 0 <= place < BLOCK
    index: np.ndarray  # int64 [n]
    sigma: np.ndarray  # float64 [n]


class Pairing:
    """What the policies share: an image may be seen at levels above its bar, buffer * sigma_n."""

    def __init__(self, buffer=1.0):
        if not 1 <= buffer < math.inf:
            raise ValueError(f'buffer={buffer} must be 1 or more: below sigma_n an image teaches nothing')
        self.buffer = buffer


class Skip(Pairing):
    """Draws sigma ~ p for each image in turn; where sigma is not above the bar the gradient is zero, so the image is passed over.

    Keeps the published objective up to a constant, at no wasted network evaluation."""

    def judge(self, bar, u, noise):
        """(sigma, usable) for images with these bars and uniforms u: tensors [n]."""
        sigma = noise.icdf(u)
        return sigma, sigma > bar

    def share(self, bar, noise):
        """Expected share of the places in the list that give a pair."""
        return noise.sf(bar).mean().item()

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
        sigma, usable = self.judge(stream.bars[index], stream.uniforms('level', number), stream.noise)
        place = usable.numpy().nonzero()[0]
        return Judged(place, index[place], sigma.numpy()[place])


class Truncate(Skip):
    """Draws sigma ~ p(. | sigma > bar) for each image in turn: keeps every image's visit count."""

    def judge(self, bar, u, noise):
        return noise.above(bar, u), noise.sf(bar) > 0

    def share(self, bar, noise):
        return (noise.sf(bar) > 0).double().mean().item()


class Clamp(Skip):
    """sigma = max(sigma, sigma_n), as the published code does: pairs at sigma_n have no gradient, and cost as much as others."""

    def __init__(self, buffer=1.0):
        super().__init__(buffer)
        if buffer != 1:
            raise ValueError(f'buffer={buffer}: clamp repeats the published code, which has none; leave it at 1')

    def judge(self, bar, u, noise):
        return torch.maximum(noise.icdf(u), bar), torch.ones_like(bar, dtype=torch.bool)

    def share(self, bar, noise):
        return 1.0


class SigmaFirst(Pairing):
    """Draws sigma ~ p (above the smallest bar), then walks the list to the next image whose bar is below it: keeps p(sigma)."""

    def share(self, bar, noise):
        """Expected share of the places in the list that give a pair."""
        # A level between two neighbouring bars walks past 1 / (share of the images below it) places on average.
        bars, counts = bar.unique(return_counts=True)
        above = noise.sf(bars)
        chance = above - torch.cat([above[1:], above.new_zeros(1)])
        walk = (chance * len(bar) / counts.cumsum(0)).sum() / above[0]
        return 1 / walk.item() if above[0] > 0 else 0.0

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
            done, offset = self._walk(*stream.cached(self._bars, number), offset, sigma, index, done)
            stream.cursor = number * BLOCK + offset
        return index, sigma

    def _levels(self, stream, number):
        return stream.noise.above(stream.bars.min(), stream.uniforms('sigma_first', number)).numpy()

    def _walk(self, images, bars, listed, offset, sigma, index, done):
        """Fills index[done:] from one block, until either ends: returns how many are done, and the offset behind the last."""
        for level in sigma[done:].tolist():
            # The next one is near as a rule: a plain loop is the fastest for that. NumPy is for the long walks.
            near = min(offset + 32, BLOCK)
            while listed[offset] >= level and offset < near:
                offset += 1
            if offset == near and offset < BLOCK:
                usable = bars[offset:] < level
                offset += int(usable.argmax()) if usable.any() else len(usable)
            if offset == BLOCK:
                break
            index[done] = images[offset]
            done, offset = done + 1, offset + 1
        return done, offset

    def _bars(self, stream, number):
        index = stream.images(number)
        bars = stream.bars.numpy()[index]
        return index, bars, [*bars.tolist(), -1.0]  # what stands behind the end stops the plain loop


class PairStream:
    """Endless stream of global batches of (image, sigma) pairs.

    levels: sigma_n of each image, [n] in network units. noise: NoiseDistribution p(sigma). policy: of PAIRINGS, such as
    "truncate:buffer=1.1". batch: pairs of one global batch; the sequence of pairs does not depend on it. Attributes: cursor
    (places of the list passed), used (pairs given). Refuses levels of which none can be used; says where few can."""

    def __init__(self, levels, noise, policy='skip', *, batch, seed=0):
        levels = torch.as_tensor(np.asarray(levels, np.float64)).reshape(-1)
        if not (len(levels) and levels.isfinite().all() and (levels >= 0).all()):
            raise click.ClickException('sigma_n must be finite and 0 or more for each image, of which there must be one at least')
        if batch < 1:
            raise click.ClickException(f'--batch={batch} must be at least 1')
        self.noise, self.batch, self.seed, self.spec = noise, batch, seed, policy
        self.policy = registry.build(policy, PAIRINGS, '--pairing')
        self.bars = levels * self.policy.buffer
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
        return self.policy.share(self.bars, self.noise)

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
        where, share = f'--pairing={self.spec}', self.acceptance()
        if share < IDLE:
            raise click.ClickException(
                f'{where}: practically no image can be used: the smallest sigma_n * buffer is {self.bars.min():g}, and --noise '
                f'is above that in a share of {self.noise.sf(self.bars.min()):.1e}; lower --sigma or raise the levels of --noise')
        if share < RARE:
            distributed.print0(f'Warning: {where}: only {share:.2%} of the images passed can be used at the level '
                               'drawn for them; truncate uses all')
        if isinstance(self.policy, Clamp) and self.wasted()[0]:
            everywhere, noisy = self.wasted()
            distributed.print0(f'Warning: {where}: {everywhere:.1%} of all pairs ({noisy:.1%} of those with a noisy '
                               'image) have zero gradient; skip trains the same objective without them')


PAIRINGS = {'clamp': Clamp, 'sigma_first': SigmaFirst, 'skip': Skip, 'truncate': Truncate}
