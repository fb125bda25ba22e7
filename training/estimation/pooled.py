# SPDX-License-Identifier: Apache-2.0
"""The std of the white noise that all images of a group carry, from the eigenvalues of the covariance of their patches.

G. Chen, F. Zhu, P. A. Heng, "An efficient statistical method for image noise level estimation" (2015), over a group instead of an image:
drop the largest eigenvalues until as many of the rest lie above their mean as below; that mean is the variance. With few patches it may
come out low, because the least eigenvalues of a sample are too small. The variance of other patches along the eigenvectors of the lower
half of these comes out high, because texture leaks into the directions: half of the difference belongs to the uncertainty. Images are added
in batches, and only covariances are kept.

No direction and no position has less variance than the noise. So the level is at most that of the least ones, chosen on other patches, and
SURE standard errors: in small images whose border hardly varies the eigenvalues alone come out high."""

from typing import NamedTuple

import numpy as np

from training.estimation import clipping
from training.estimation.estimate import Estimate
from training.estimation.patches import batches, patches

SIDES, STRIDE = (8, 7, 6, 5, 4), 3
PER_DIMENSION = 20  # patches per number of one, at least: smaller patches are used where there are fewer
FOLDS = 8
ROUNDS = 6          # of the correction for clipping, at most
MOST = 2 ** 23      # patches; of more, fewer are taken per image
HISTOGRAM = 2 ** 16  # patches whose values are counted
SLACK, EXCESS, FEWEST = 0.9, 1.15, 4  # in the choice of the eigenvalues that are noise: of the lowest quarter, the largest, their number
SURE = 2.0          # standard errors added to the variance of the least directions, which bounds the level
UNEVEN = 0.9        # lowest quarter of the eigenvalues over all, as levels, below which there is no common level
FLOOR = 0.01        # what clean photographs of 32x32 read, at most (docs/noise.md)


class Spread(NamedTuple):
    """The two variances of the module's docstring, the number of directions, and the least quarter's share."""

    chen: float
    crossed: float
    directions: int
    even: float


class PatchCovariances:
    """Adds up the covariances of patches [C, side, side], by fold, for images in network units, of a shape (C,H,W).

    count: of the images that will come, by which the size of a patch is chosen. clipped: whether values at the ends of [-1,1] may have been
    clipped, which is corrected then. Raises ValueError where there are too few images."""

    def __init__(self, shape: tuple[int, ...], count: int, clipped: bool = True):
        self.side, self.stride = choose(shape, count)
        while self._per_image(shape) * count > MOST and self.stride < min(shape[1:]):
            self.stride += 1
        self.size = shape[0] * self.side ** 2
        self.images, self._pixels, self._ends = 0, shape[0] * shape[1] * shape[2], 0.0
        self._counts, self._sums = np.zeros(FOLDS), np.zeros((FOLDS, self.size))
        self._squares = np.zeros((FOLDS, self.size, self.size))
        self._values, self._valued, self._beyond = np.zeros((self.size, 256)), 0, not clipped
        self._every = max(1, -(-count * self._per_image(shape) // HISTOGRAM))

    def _per_image(self, shape):
        return len(range(0, shape[1] - self.side + 1, self.stride)) * len(range(0, shape[2] - self.side + 1, self.stride))

    def add(self, images: np.ndarray) -> None:
        """Adds images [n,C,H,W]; image k of all belongs to fold k % FOLDS."""
        for part in batches(images, 128):
            part = part.astype(np.float32)
            folds = (self.images + np.arange(len(part))) % FOLDS
            for fold in range(FOLDS):
                chosen = part[folds == fold]
                if len(chosen):
                    self._add(fold, chosen)
            self._beyond |= bool(np.abs(part).max() > 1 + 1e-5)
            self._ends += float((np.abs(part) >= 1 - 1e-5).mean()) * len(part)
            self.images += len(part)

    def _add(self, fold, images):
        found = patches(images, self.side, self.stride)
        rows = np.ascontiguousarray(found.transpose(0, 2, 1, 3, 4)).reshape(-1, self.size)
        self._counts[fold] += len(rows)
        self._sums[fold] += rows.sum(0, dtype=np.float64)
        self._squares[fold] += rows.T @ rows
        rows = rows[self._valued % self._every::self._every]
        self._valued += len(rows)
        values = np.clip(np.rint((rows + 1) * 127.5), 0, 255).astype(np.int64) + 256 * np.arange(self.size)
        self._values += np.bincount(values.reshape(-1), minlength=256 * self.size).reshape(self.size, 256)

    def estimate(self) -> Estimate:
        """The Estimate of the images added. Raises ValueError for too few of them, and for constant ones."""
        if self.images < FOLDS or self._counts.sum() < 2 * self.size:
            raise ValueError(f'{self.images} images of these are too few to be pooled; {FOLDS} or more are needed')
        mean = self._sums.sum(0) / self._counts.sum()
        means = self._sums / self._counts[:, None]
        across = np.einsum('fi,j->fij', means, mean)
        covariances = self._squares / self._counts[:, None, None] - across - across.transpose(0, 2, 1) + np.outer(mean, mean)
        if np.trace(covariances.mean(0)) <= 1e-12:
            raise ValueError('all images are constant')
        clipped = 0.0 if self._beyond else self._ends / self.images
        spread = self._spread(covariances)
        raw = sigma = _level(spread)
        if clipped > clipping.SHARE and sigma > clipping.LEVELS[0]:
            shares = self._values / self._values.sum(1, keepdims=True)
            for _ in range(ROUNDS):
                weights = 1 / np.sqrt(clipping.left(shares, sigma))
                spread = self._spread(covariances * np.outer(weights, weights))
                before, sigma = sigma, _level(spread)
                if abs(sigma - before) < 1e-3 * sigma:
                    break
        own = np.sqrt(self.size / (2 * self.images * self._pixels * spread.directions))
        apart = abs(np.sqrt(spread.crossed) - np.sqrt(spread.chen)) / 2
        return Estimate(float(sigma), float(np.hypot(own * sigma, apart)), 'pooled', self.images, FLOOR, clipped,
                        float(sigma / raw) if raw else 1.0, spread.even < UNEVEN)

    def _spread(self, covariances):
        """The Spread of covariances [FOLDS, d, d]."""
        total = np.tensordot(self._counts, covariances, 1)
        everything = self._counts.sum()
        chen, directions = balanced(np.linalg.eigvalsh(total / everything), everything)
        crossed, even, least = [], [], []
        for count, one in zip(self._counts, covariances):
            others = (total - count * one) / (everything - count)
            values, vectors = np.linalg.eigh(others)
            number = balanced(values, everything - count)[1]
            along = np.einsum('ik,ik->k', vectors, one @ vectors)
            least.append((along, one.diagonal()[np.argsort(others.diagonal())]))
            along = along[:number]
            crossed.append(along[:-(-number // 2)].mean())
            even.append((along[:-(-number // 4)].mean(), along.mean()))
        number = np.arange(1, self.size + 1)
        most = np.cumsum(np.mean(least, 0), axis=1) / number * (1 + SURE * np.sqrt(2 / (everything * number)))
        quarter, all_of = np.mean(even, 0)
        bound = float(most[:, 1:].min())
        if chen / 2 < bound < chen:  # far below lies another part of the images, such as a border that was added
            chen = bound
        return Spread(max(chen, 0.0), max(float(np.mean(crossed)), 0.0), directions,
                      float(np.sqrt(max(quarter, 0) / max(all_of, 1e-12))))


def _level(spread):
    return float(np.sqrt(spread.chen))


def balanced(values: np.ndarray, samples: int) -> tuple[float, int]:
    """(mean, number) of the ascending eigenvalues that are left when the largest are dropped until as many lie above the mean as below.

    That can happen by chance while texture is left: then more are dropped, but no more than down to a quarter, until the rest is as near to
    its mean as in noise, where d eigenvalues of n samples lie between (1 - sqrt(d / n))^2 and (1 + sqrt(d / n))^2."""
    means, first = np.cumsum(values) / np.arange(1, len(values) + 1), None
    for number in range(len(values), 1, -1):
        mean, below = means[number - 1], np.searchsorted(values[:number], means[number - 1])
        if first is not None and number < max(FEWEST, first // 4):
            break
        if number - below >= below:
            first = first or number
            ratio = np.sqrt(number / samples)
            if (means[-(-number // 4) - 1] >= SLACK * (1 - ratio) ** 2 * mean and values[number - 1] <= EXCESS * (1 + ratio) ** 2 * mean):
                return float(mean), number
    first = first or 1
    return float(means[first - 1]), first


def choose(shape: tuple[int, ...], count: int) -> tuple[int, int]:
    """(side, stride) of the largest patches of which `count` images of a shape have enough. Raises ValueError."""
    sides = [side for side in SIDES if side <= min(shape[1:])]
    for side in sides:
        for stride in (STRIDE, 1):
            places = np.prod([len(range(0, length - side + 1, stride)) for length in shape[1:]])
            if count >= FOLDS and count * places >= PER_DIMENSION * shape[0] * side ** 2:
                return side, stride
    least = f'{FOLDS} or more' if not sides or count < FOLDS else f'more than {count}'
    raise ValueError(f'{count} images of {shape[2]}x{shape[1]} pixels are too few to be pooled: {least}, of {SIDES[-1]}x{SIDES[-1]} pixels '
                     'or more, are needed')


def pooled(images: np.ndarray) -> Estimate:
    """The Estimate of an array of images [N,C,H,W]. Raises ValueError."""
    found = PatchCovariances(images.shape[1:], len(images))
    found.add(images)
    return found.estimate()
