# SPDX-License-Identifier: Apache-2.0
"""(image, raw_idx) -> the image at its level sigma_n: which images are noisy, how noisy, and their fixed noise; and which images have
a wrong label.

Each image has a single noisy copy: fresh noise in another epoch, worker, rank or flip would reveal the clean image."""

import collections
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from dnnlib import UserError
from training.data.tables import distinct

PROTOCOLS = ('fixed', 'published')
SIGMA_MIN_AS = ('limit', 'noise')
_MEMBERSHIP = 2 ** 64 - 1  # second key word of the draw of noisy images; no raw_idx is that large
_LABELS = 2 ** 64 - 2      # second key word of the label draws


class Corruption:
    """Which images get noise, and which noise.

    sigma: noise std that chosen images are brought to, in network units ([-1,1] for 8-bit data).
    probability: share of the kept images that is chosen; the count is exact.
    seed: key of the choice and of the noise.
    protocol: 'fixed', or 'published' for exactly the choice and noise of the published ambient-laws code, which has no seed.
    sigma_min_as: how the sigma_min of an image is used, as a 'limit' of the levels to train it at, or as the level to add 'noise' up to.
    Raises UserError for values out of range."""

    def __init__(self, sigma: float = 0.0, probability: float = 0.0, seed: int = 0, protocol: str = 'fixed', sigma_min_as: str = 'limit'):
        if not (math.isfinite(sigma) and sigma >= 0):
            raise UserError(f'--sigma={sigma}: the noise level must be a number that is 0 or more')
        if not 0 <= probability <= 1:
            raise UserError(f'--corruption-probability={probability}: must lie between 0 and 1')
        if not 0 <= seed < 2 ** 64:
            raise UserError(f'--corruption-seed={seed}: must lie between 0 and 2^64 - 1')
        if protocol not in PROTOCOLS:
            raise UserError(f'--corruption-protocol={protocol}: choose from {", ".join(PROTOCOLS)}')
        if protocol == 'published' and seed != 0:
            raise UserError(f'--corruption-seed={seed}: the published protocol has no seed; leave it at 0')
        if sigma_min_as not in SIGMA_MIN_AS:
            raise UserError(f'--sigma-min-as={sigma_min_as}: choose from {", ".join(SIGMA_MIN_AS)}')
        self.sigma, self.probability, self.seed, self.protocol = float(sigma), float(probability), int(seed), protocol
        self.sigma_min_as = sigma_min_as

    @property
    def noise_follows_flip(self) -> bool:
        """True where an image's flip is its noisy copy mirrored; the published code mirrors first and then adds noise."""
        return self.protocol != 'published'

    def levels(self, raw_idx: np.ndarray, native_sigma: np.ndarray, image_shape: Sequence[int]) -> np.ndarray:
        """sigma_n of each item, float64 [N]: max(native, sigma) for the items of chosen images, native for the others.

        raw_idx: int [N], one entry per item; an image and its x-flip are both noisy or both not.
        native_sigma: [N], network units. image_shape: (C, H, W), which only the published choice depends on."""
        raw_idx, native_sigma = np.asarray(raw_idx), np.asarray(native_sigma, np.float64)
        if self.sigma == 0 or self.probability == 0:
            return native_sigma.copy()
        chosen = self._choose(distinct(raw_idx), image_shape)
        return np.where(np.isin(raw_idx, chosen), np.maximum(native_sigma, self.sigma), native_sigma)

    def beyond_sigma_min(self, sigma_n: np.ndarray, sigma_min: np.ndarray, sigma_max: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(sigma_n, sigma_min) as the items are to be trained on, float64 [N] each; sigma_max: [N], inf for none.

        As limits they are unchanged. As noise (Ambient Omni, Daras et al. 2025) sigma_n is raised to sigma_min, which then is no longer
        a limit; an infinite sigma_min is kept, since such an image can never be used. Raises UserError for images with both limits:
        they would be needed without that noise up to their sigma_max."""
        sigma_n, sigma_min = (np.asarray(column, np.float64) for column in (sigma_n, sigma_min))
        if self.sigma_min_as == 'limit':
            return sigma_n, sigma_min
        both = (sigma_min > 0) & np.isfinite(sigma_max)
        if both.any():
            raise UserError(f'--sigma-min-as=noise: {both.sum()} of {len(both)} images also have a sigma_max, up to which they would '
                            'be needed without that noise, but only one copy of an image is kept; use limit')
        finite = np.isfinite(sigma_min)
        return np.maximum(sigma_n, np.where(finite, sigma_min, 0)), np.where(finite, 0, sigma_min)

    def _choose(self, images, image_shape):
        """Those of the distinct raw indices that get noise."""
        if self.protocol == 'published':
            size = math.prod(image_shape)
            # One uniform decides, after C*H*W others that the published code draws for a mask.
            return [i for i in images if np.random.RandomState(i).random_sample(size + 1)[size] <= self.probability]
        # The score of an image does not depend on which others are kept, so a larger probability only adds images.
        score = _generator(self.seed, _MEMBERSHIP).random(images[-1] + 1)[images]
        return images[np.argsort(score, kind='stable')[:round(self.probability * len(images))]]

    def noise(self, raw_idx: int, shape: Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """The unit normal noise [C,H,W] of image raw_idx, a pure function of (seed, raw_idx): float32; published: float64.

        out: float32 [C,H,W] that it may be written to."""
        if self.protocol == 'published':
            source = np.random.RandomState(raw_idx)
            source.random_sample(math.prod(shape) + 1)  # mask and membership
            return source.standard_normal(shape)
        return _generator(self.seed, int(raw_idx)).standard_normal(shape, np.float32, out)

    def apply(self, images: np.ndarray, raw_idx: np.ndarray, native_sigma: np.ndarray, sigma_n: np.ndarray,
              flip: np.ndarray | None = None) -> np.ndarray:
        """Images at level sigma_n, float32 [N,C,H,W]: images + sqrt(sigma_n^2 - native^2) noise; never clipped, never quantised.

        images: [N,C,H,W], network units, at their native level and not flipped; native_sigma, sigma_n: [N].
        flip: bool [N], the items that the caller will mirror afterwards; it changes the noise of the published protocol only."""
        out = np.array(images, np.float32)
        self.add(out, np.arange(len(out)), raw_idx, native_sigma, sigma_n, flip)
        return out

    def add(self, images: np.ndarray, rows: np.ndarray, raw_idx: np.ndarray, native_sigma: np.ndarray, sigma_n: np.ndarray,
            flip: np.ndarray | None = None, mirror: Callable | None = None) -> None:
        """As apply(), in place, for these rows [k] of images float32 [N,C,H,W]; the others stay. The rest: [k], of the rows.

        mirror: bool [k], the items that are mirrored already, whose noise is to be that of the image mirrored."""
        added = np.sqrt(np.square(np.asarray(sigma_n, np.float64)) - np.square(np.asarray(native_sigma, np.float64)))
        mirrored = np.zeros(len(rows), bool) if flip is None or self.noise_follows_flip else np.asarray(flip)
        mirrored = mirrored if mirror is None else mirrored ^ mirror
        held = np.empty(images.shape[1:], np.float32)
        for k in np.flatnonzero(added > 0):
            noise = self.noise(raw_idx[k], held.shape, held)
            noise = noise[..., ::-1] if mirrored[k] else noise
            noise *= noise.dtype.type(added[k])
            images[rows[k]] += noise


class LabelCorruption:
    """Which images carry a wrong label, and which one: fixed per image, of an exact count (Chen et al. 2024).

    rate: share of the images that is relabelled. seed: key of the choice. groups: lists of classes that are confused only with each
    other, such as [[0, 1], [3, 5, 7]]; None: any class with any other. The new class is drawn by its frequency among the images.
    Raises UserError for values out of range."""

    def __init__(self, rate: float = 0.0, seed: int = 0, groups: Sequence[Sequence[int]] | None = None):
        if not 0 <= rate <= 1:
            raise UserError(f'--label-corruption={rate}: must lie between 0 and 1')
        if not 0 <= seed < 2 ** 64:
            raise UserError(f'--corruption-seed={seed}: must lie between 0 and 2^64 - 1')
        listed = [c for group in groups or [] for c in group]
        if len(listed) != len(set(listed)) or min(listed, default=0) < 0:
            raise UserError(f'--label-corruption-groups={groups}: classes are whole numbers from 0, each in at most one group')
        self.rate, self.seed, self.groups = float(rate), int(seed), groups

    def apply(self, classes: np.ndarray, raw_idx: np.ndarray) -> np.ndarray:
        """Class numbers int [N] -> int64 [N], in which exactly round(rate x images) images have another class than before.

        raw_idx: int [N]; an image and its x-flip get the same label. A higher rate only adds relabelled images."""
        classes = np.asarray(classes)
        images, first, inverse = np.unique(np.asarray(raw_idx), return_index=True, return_inverse=True)
        return self._relabel(images, classes[first].astype(np.int64))[inverse.reshape(-1)]

    def partners(self, vectors: np.ndarray, raw_idx: np.ndarray) -> np.ndarray:
        """Vectors [N, D], such as embeddings of captions -> int64 [N], the item whose vector each item is to have instead of its own.

        Pairs of images with different vectors swap them (Chen et al. 2024, for CC3M) until exactly round(rate x images) have another one;
        images that are left without such a partner, and the last of an odd number, copy that of a random image. raw_idx: int [N]; an image
        and its x-flip get the same. A higher rate only adds images. Raises UserError."""
        if self.groups is not None:
            raise UserError(f'--label-corruption-groups={self.groups}: groups are of classes, and the labels of --data are captions, or '
                            'other vectors; leave it out')
        images, first, inverse = np.unique(np.asarray(raw_idx), return_index=True, return_inverse=True)
        count = round(self.rate * len(images))
        kinds = {}
        kind = np.array([kinds.setdefault(hashlib.sha256(row.tobytes()).digest(), len(kinds)) for row in (vectors[i] for i in first)])
        if count and len(kinds) == 1:
            raise UserError(f'--label-corruption={self.rate:g}: all images have the same caption, so that none can get another')
        order = np.argsort(_generator(self.seed, _LABELS).random(images[-1] + 1)[images], kind='stable')
        found = np.arange(len(images))
        for image, partner in itertools.islice(_swaps(order, kind), count):
            found[image] = partner
        return first[found][inverse.reshape(-1)]

    def _relabel(self, images, own):
        prior = np.bincount(own)
        likely = self._alternatives(prior)
        count, can = round(self.rate * len(own)), np.flatnonzero(likely.sum(1)[own])
        if len(can) < count:
            raise UserError(f'--label-corruption={self.rate:g} asks for {count} of {len(own)} images, but only {len(can)} have '
                            'a class that can be confused with another one; lower it, or widen --label-corruption-groups')
        # Two uniforms per image, independent of which others are kept: whether it is relabelled, and as what.
        who, what = _generator(self.seed, _LABELS).random((images[-1] + 1, 2))[images].T
        chosen = can[np.argsort(who[can], kind='stable')[:count]]
        labels = own.copy()
        for c in np.unique(own[chosen]):
            rows = chosen[own[chosen] == c]
            steps = np.cumsum(likely[c])
            labels[rows] = np.searchsorted(steps / steps[-1], what[rows], side='right')
        return labels

    def _alternatives(self, prior):
        """Probability that each class [row] becomes each other one [column]: the frequencies, without itself and other groups."""
        group = np.zeros(len(prior), np.int64)
        if self.groups is not None:
            group = -1 - np.arange(len(prior))  # a class in no group is alone
            for number, members in enumerate(self.groups):
                if max(members, default=0) >= len(prior):
                    raise UserError(f'--label-corruption-groups={self.groups}: the data has the classes 0 to {len(prior) - 1}')
                group[list(members)] = number
        return prior * (group[:, None] == group) * (1 - np.eye(len(prior), dtype=np.int64))


def _swaps(order, kind):
    """Yields (image, the image whose label it gets), of another kind, for all images: pairs that swap first, then the others.

    order: of the images. Those that wait for a partner are all of one kind, since two kinds would be a pair."""
    waiting, paired = collections.deque(), []
    for image in order:
        if waiting and kind[waiting[0]] != kind[image]:
            other = waiting.popleft()
            paired += [other, image]
            yield from ((other, image), (image, other))
        else:
            waiting.append(image)
    others = itertools.cycle([image for image in paired if waiting and kind[image] != kind[waiting[0]]])
    yield from ((image, next(others)) for image in waiting)


def _generator(seed, word):
    """An independent Philox stream for every (seed, word): together they are its 128-bit key, so that no two streams collide."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, word], np.uint64)))
