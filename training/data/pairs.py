# SPDX-License-Identifier: Apache-2.0
"""Draws the (image, sigma) pairs of the training steps: an endless shuffled list of images, and a policy that assigns levels to them.

Every draw is a pure function of the seed and of a position in the list, so that the cursor is the only state of the data."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import distributed, misc, registry
from training.data.limits import Limits, usable_levels
from training.data.walks import Walks
from training.diffusion.noise import TINY, NoiseDistribution, stratify

# Positions of the list that are processed together, whatever the batch size: as many as PyTorch processes without its worker threads,
# which the training step needs.
BLOCK = 2048
RARE, IDLE = 1e-2, 1e-6  # shares of usable positions below which a policy causes a warning, or is refused
INVERSE_BUFFER = 2 / math.sqrt(3)  # keeps (1 - r)^-2 up to 16, as Ambient Omni (Daras et al. 2025) does


class Judged(NamedTuple):
    """The positions of one block that yield a pair."""

    place: np.ndarray  # int64 [n], ascending, 0 <= place < BLOCK
    index: np.ndarray  # int64 [n]
    sigma: np.ndarray  # float64 [n]


class Pairing:
    """Base class of the policies: an image is used at levels within its Limits, which begin at buffer * sigma_n."""

    def __init__(self, buffer: float = 1.0):
        if not 1 <= buffer < math.inf:
            raise ValueError(f'buffer={buffer} must be 1 or more: below sigma_n an image gives no gradient')
        self.buffer = buffer


class Skip(Pairing):
    """Draws sigma ~ p for each image in turn, and skips the image if it may not be used at that level.

    At levels up to sigma_n the gradient is zero, so this keeps the published objective up to a constant, without wasted network
    evaluations."""

    def judge(self, limits: Limits, u: torch.Tensor, noise: NoiseDistribution) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigma, usable) for images with these Limits and uniforms u: tensors [n]."""
        sigma = noise.icdf(u)
        return sigma, limits.usable(sigma)

    def share(self, limits: Limits, noise: NoiseDistribution) -> float:
        """Expected share of the positions in the list that yield a pair."""
        return limits.chance(noise).mean().item()

    def take(self, stream: 'PairStream', count: int) -> tuple[np.ndarray, np.ndarray]:
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
        sigma, usable = self.judge(stream.limits.of(index), stream.uniforms('level', number), stream.noise)
        place = usable.numpy().nonzero()[0]
        return Judged(place, index[place], sigma.numpy()[place])


class Truncate(Skip):
    """Draws sigma ~ p for each image in turn, limited to levels at which the image may be used: all images are used equally often."""

    def judge(self, limits: Limits, u: torch.Tensor, noise: NoiseDistribution) -> tuple[torch.Tensor, torch.Tensor]:
        return limits.draw(noise, u), limits.chance(noise) > 0

    def share(self, limits: Limits, noise: NoiseDistribution) -> float:
        return (limits.chance(noise) > 0).double().mean().item()


class Clamp(Skip):
    """Draws sigma ~ p for each image in turn, and raises it to sigma_n where it is lower, as in the published code: pairs at sigma_n have
    no gradient, but cost as much as others."""

    def __init__(self, buffer: float = 1.0):
        super().__init__(buffer)
        if buffer != 1:
            raise ValueError(f'buffer={buffer}: clamp reproduces the published code, which has no buffer; leave it at 1')

    def judge(self, limits: Limits, u: torch.Tensor, noise: NoiseDistribution) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.maximum(noise.icdf(u), limits.bar), torch.ones_like(u, dtype=torch.bool)

    def share(self, limits: Limits, noise: NoiseDistribution) -> float:
        return 1.0


class SigmaFirst(Pairing):
    """Draws sigma ~ p first, then takes the next image in the list that may be used at that level: keeps the distribution p(sigma)."""

    def share(self, limits: Limits, noise: NoiseDistribution) -> float:
        """Expected share of the positions in the list that yield a pair."""
        # A level between two neighbouring limits passes 1 / (share of the images that allow it) positions on average.
        low, high, count = limits.coverage()
        chance = noise.mass(low, high)
        walk = (chance * len(limits.bar) / count).sum() / chance.sum()
        return 1 / walk.item() if chance.sum() > 0 else 0.0

    def take(self, stream: 'PairStream', count: int) -> tuple[np.ndarray, np.ndarray]:
        """Like Skip.take; the levels are numbered by the pairs used, not by the positions."""
        first = stream.used // BLOCK
        numbers = range(first, -(-(stream.used + count) // BLOCK))
        levels = np.concatenate([stream.cached(self._levels, number) for number in numbers])
        sigma = levels[stream.used - first * BLOCK:][:count]
        sought = stream.cached(self._walks, 0).groups(sigma).tolist(), sigma.tolist()
        index = np.empty(count, np.int64)
        done = 0
        while done < count:
            number, offset = divmod(stream.cursor, BLOCK)
            block = stream.cached(self._block, number)
            place = block.walk(offset, *(column[done:done + BLOCK - offset] for column in sought))
            index[done:done + len(place)] = block.images[place]
            done += len(place)
            stream.cursor = number * BLOCK + (int(place[-1]) + 1 if done == count else BLOCK)
        return index, sigma

    def _levels(self, stream, number):
        u = stream.uniforms('sigma_first', number)
        low, high, chance = stream.cached(self._covered, 0)
        if stream.limits.top is None:
            return stream.noise.above(low[0], u).numpy()
        ends = chance.cumsum(0)
        place = u * ends[-1]
        k = torch.searchsorted(ends, place).clamp(max=len(ends) - 1)
        return stream.noise.between(low[k], high[k], ((ends[k] - place) / chance[k]).clamp(TINY, 1)).numpy()

    def _covered(self, stream, number):
        """The intervals of levels at which some image may be used: (low, high, their probability), each [k]."""
        low, high = stream.limits.ranges()
        chance = stream.noise.mass(low, high)
        return [column[chance > 0] for column in (low, high, chance)]

    def _walks(self, stream, number):
        return Walks(stream.limits)

    def _block(self, stream, number):
        return stream.cached(self._walks, 0).block(stream.images(number))


def with_inverse_weight(spec: str) -> str:
    """The pairing policy for --ambient-weight=inverse: `spec` with the buffer that the weight implies, if none is given.

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
    "truncate:buffer=1.1". batch: pairs of one global batch; the sequence of pairs does not depend on it. lower, upper: sigma_min and
    sigma_max of each image, [n], above and up to which it may be used (see limits.py); 0 and inf, or None for all: no such limit.
    Attributes: levels [n]; limits, the images' Limits; limited, how many have a sigma_min or sigma_max; cursor (positions of
    the list passed), used (pairs drawn). Refuses limits under which no image can be used; warns if few can, and of levels that no image
    covers."""

    def __init__(self, levels: Sequence[float] | np.ndarray | torch.Tensor, noise: NoiseDistribution, policy: str = 'skip', *, batch: int,
                 seed: int = 0, lower: np.ndarray | None = None, upper: np.ndarray | None = None):
        self.levels = np.asarray(levels, np.float64).reshape(-1)
        if batch < 1:
            raise UserError(f'--batch={batch} must be at least 1')
        self.noise, self.batch, self.seed, self.spec = noise, batch, seed, policy
        self.policy = registry.build(policy, PAIRINGS, '--pairing')
        self.limits = usable_levels(self.levels, self.policy.buffer, lower, upper)
        self.limited = _count_limited(len(self.levels), lower, upper)
        self.cursor = self.used = 0
        self._rounds = -(-BLOCK // len(self.levels))  # epochs drawn together, because short ones would each need a generator
        self._cache = {}
        self._check()

    @property
    def passed(self) -> int:
        """Positions of the list passed so far, used or not."""
        return self.cursor

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """The next batch: (index int64 [batch], sigma float64 [batch]), NumPy arrays."""
        index, sigma = self.policy.take(self, self.batch)
        self.used += self.batch
        return index, sigma

    def state(self) -> dict:
        """The state of the stream, as JSON."""
        return {'cursor': self.cursor, 'used': self.used}

    def restore(self, state: dict) -> None:
        """Restores the state of a stream with the same levels, noise, policy and seed."""
        self.cursor, self.used = int(state['cursor']), int(state['used'])

    def acceptance(self) -> float:
        """Expected share of the passed images that are used."""
        return self.policy.share(self.limits, self.noise)

    def wasted(self) -> tuple[float, float]:
        """Expected shares of clamped draws, which have no gradient: (of all pairs, of the pairs with a noisy image)."""
        bar = self.limits.bar
        lost = self.noise.cdf(bar) * (bar > 0)
        return lost.mean().item(), (lost.sum() / (bar > 0).sum().clamp(min=1)).item()

    def images(self, number: int) -> np.ndarray:
        """Image indices at the BLOCK positions of block `number` of the list, int64."""
        part, offset = divmod(number * BLOCK, self._rounds * len(self.levels))
        epochs = self.cached(PairStream._epochs, part)
        if offset + BLOCK > len(epochs):
            epochs = np.concatenate([epochs, self.cached(PairStream._epochs, part + 1)])
        return epochs[offset:offset + BLOCK]

    def uniforms(self, name: str, number: int) -> torch.Tensor:
        """BLOCK uniforms in (0, 1), float64."""
        source = torch.from_numpy(self._generator(name, number).random(BLOCK))
        return (stratify(source) if self.noise.stratified else source).clamp(min=TINY)

    def cached(self, make: Callable, number: int) -> Any:
        """make(self, number), cached for the last number: consecutive batches need the same block."""
        held = self._cache.get(make.__name__)
        if held is None or held[0] != number:
            held = self._cache[make.__name__] = number, make(self, number)
        return held[1]

    def _epochs(self, number):
        """The images of `_rounds` epochs, each shuffled separately."""
        in_order = np.tile(np.arange(len(self.levels)), (self._rounds, 1))
        return self._generator('epochs', number).permuted(in_order, axis=1).reshape(-1)

    def _generator(self, *key):
        return np.random.Generator(np.random.Philox(key=misc.seed_of(self.seed, 'pairs', *key)))

    def _check(self):
        """Refuses settings that could never fill a batch, and warns of those that use few images or waste pairs."""
        where = f'--pairing={self.spec}'
        if isinstance(self.policy, Clamp) and self.limited:
            raise UserError(f'{where}: clamp reproduces the published code, which has no limits, but {self.limited} of '
                            f'{len(self.levels)} images have a sigma_min or sigma_max; use skip, truncate or sigma_first')
        share = self.acceptance()
        if share < IDLE:
            raise UserError(f'{where}: practically no image can be used: ' + self._out_of_reach())
        if share < RARE:
            distributed.print0(f'Warning: {where}: only {share:.2%} of the images passed can be used at the level '
                               'drawn for them; truncate uses all')
        if self.limited:
            self._check_limits(where)
        if isinstance(self.policy, Clamp) and self.wasted()[0]:
            everywhere, noisy = self.wasted()
            distributed.print0(f'Warning: {where}: {everywhere:.1%} of all pairs ({noisy:.1%} of those with a noisy '
                               'image) have zero gradient; skip trains the same objective without them')

    def _out_of_reach(self):
        least = self.limits.bar.min()
        if not self.limited:
            return (f'the smallest sigma_n * buffer is {least:g}, and --noise is above that with probability '
                    f'{self.noise.sf(least):.1e}; lower --sigma or raise the levels of --noise')
        empty = int(self.limits.empty().sum())
        return (f'{empty} of {len(self.levels)} have no level that is above sigma_n * buffer and within their sigma_min and sigma_max, '
                'and --noise is hardly ever within the limits of the others; lower --sigma or sigma_min, raise sigma_max, or change '
                '--noise')

    def _check_limits(self, where):
        """Warns of images that are never used, and of the part of p(sigma) that no image covers, if images have limits."""
        idle = int((self.limits.chance(self.noise) == 0).sum())
        if idle:
            distributed.print0(f'Warning: {where}: {idle} of {len(self.levels)} images are never used: no level of --noise is above their '
                               'sigma_n * buffer, and above their sigma_min or up to their sigma_max')
        low, high = self.limits.ranges()
        # Levels below all images' own noise are not a matter of their limits.
        least = torch.tensor([self.levels.min() * self.policy.buffer])
        low, high = torch.cat([least, high]), torch.cat([low, torch.full_like(least, math.inf)])
        share = self.noise.mass(low, high)
        if share.sum() > RARE:
            holes = [f'between {a:g} and {b:g}' if b < math.inf else f'above {a:g}' for a, b, m in zip(low, high, share) if m > 0]
            gaps = ' and '.join(holes[:4] + ['others'] * (len(holes) > 4))
            distributed.print0(f'Warning: {where}: no image may be used at {share.sum():.1%} of the levels of --noise ({gaps}): the '
                               'network does not learn these levels, which sampling may need')


def _count_limited(count, lower, upper):
    """How many of the images have a sigma_min or a sigma_max."""
    limited = np.zeros(count, bool)
    if lower is not None:
        limited |= np.asarray(lower, np.float64).reshape(-1) > 0
    if upper is not None:
        limited |= np.asarray(upper, np.float64).reshape(-1) < math.inf
    return int(limited.sum())


PAIRINGS = {'clamp': Clamp, 'sigma_first': SigmaFirst, 'skip': Skip, 'truncate': Truncate}
