# SPDX-License-Identifier: Apache-2.0
"""Checks of the samples at every snapshot: wrong colours, copies of training images, broken weights.

They do not influence the training: a warning is a line on the console, and its numbers are in stats.jsonl."""

from collections.abc import Sequence

import numpy as np
import torch

from metrics.distances import nearest
from torch_utils import misc
from training.checkpoints.load import non_finite
from training.data.dataset import ImageDataset
from training.data.store import ImageStore
from training.run.validation import Validation
from training.sampling.channels import Channels, moments, statistics

MOST_IMAGES, MOST_VALUES = 10_000, 2 ** 25  # upper limits of the training data that are used; 2 ** 25: 10,922 images of 3x32x32
ENOUGH_CLEAN = 1000  # with this many clean images, noisy ones are not needed
CHUNK, QUERY_VALUES = 256, 2 ** 21  # images, and numbers, processed at a time
FEWEST = 16          # images needed for statistics, and for a search for copies
REAL = 128           # real images that samples are compared with
RATIO = 1 / 3        # a sample with d1 / d2 below this is a copy, as in metrics/memorisation.py
LIMIT = 0.1          # share of copies that is tolerated, beyond that among real images


def pick(items: np.ndarray, shape: Sequence[int], seed: int, name: str) -> np.ndarray:
    """A random subset of the items within MOST_IMAGES and MOST_VALUES, int64, ascending; depends on the seed only."""
    most = min(MOST_IMAGES, MOST_VALUES // int(np.prod(shape)))
    generator = np.random.Generator(np.random.Philox(key=misc.seed_of(seed, name)))
    return np.sort(generator.permutation(items)[:most])


def data_statistics(store: ImageStore, dataset: ImageDataset, sigma_n: np.ndarray, items: np.ndarray, seed: int) -> dict | None:
    """Statistics (sampling/channels.py) of the training items, or None for fewer than FEWEST.

    Of distributions of latents, those of their samples. Only clean images where there are ENOUGH_CLEAN of them, otherwise noisy ones too:
    their noise does not change the mean, and adds sigma_n^2 to the mean square. Images with a sigma_max resemble the data in their details
    only, and are left out."""
    items = items[~dataset.flip[items] & np.isinf(dataset.sigma_max[items])]
    clean = items[sigma_n[items] == 0]
    items = pick(clean if len(clean) >= ENOUGH_CLEAN else items, dataset.image_shape, seed, 'data statistics')
    if len(items) < FEWEST:
        return None
    chunks = (store.gather(items[first:first + CHUNK]) for first in range(0, len(items), CHUNK))
    means, squares = (torch.cat(parts) for parts in zip(*(_moments(images, dataset.image_shape[0]) for images in chunks)))
    squares = squares - torch.from_numpy(np.square(sigma_n[items], dtype=np.float64))[:, None]
    classes = dataset.classes
    return statistics(means, squares, None if classes is None else torch.from_numpy(classes[items]))


def _moments(images, channels):
    """moments() of images, or of samples of distributions of latents."""
    means, squares = moments(images[:, :channels])
    return means, squares if images.shape[1] == channels else squares + images[:, channels:].double().square().mean(dim=(2, 3))


class Copies:
    """Counts samples that are copies of a training image: the distance d1 to the nearest one is less than a third of d2, that to the
    second nearest.

    Euclidean distance of pixels; with xflip the nearer of an image and its mirror image. Only clean training images are searched, because a
    copy of a noisy image without its noise is as far from it as any other image. Real images show what share is to be expected: held-out
    ones, or else training images, each compared with the others. Near-duplicates in the training set make d2 as small as d1, so that their
    copies are not found. Of distributions of latents the means are searched. Costs 2 (samples + REAL) queries among at most MOST_IMAGES
    images with MOST_VALUES numbers in all."""

    def __init__(self, store: ImageStore, train: np.ndarray, held_out: tuple | None, xflip: bool, channels: int | None = None) -> None:
        """store: an ImageStore. train: clean items; held_out: (store, items), or None. channels: that are compared, by default all."""
        self.store, self.train, self.xflip, self.channels = store, train, xflip, channels
        self.real = held_out
        self._real_share = None

    def __call__(self, images: torch.Tensor) -> tuple[float, float, np.ndarray]:
        """(share of copies among images [n,C,H,W], that among real images, index of the nearest item of each [n])."""
        points = self._gather(self.store, self.train)
        if self._real_share is None:
            self._real_share = self._of_real(points)
        ratio, index = self._ratios(images.float().cpu(), points)
        return float((ratio < RATIO).double().mean()), self._real_share, self.train[index.numpy()]

    def _of_real(self, points):
        if self.real is not None:
            store, items = self.real
            ratio, _ = self._ratios(self._gather(store, items[:REAL]), points)
        else:
            own = torch.arange(len(points))[::-(-len(points) // REAL)]
            ratio, _ = self._ratios(points[own], points, own)
        return float((ratio < RATIO).double().mean())

    def _gather(self, store, items):
        return torch.cat([store.gather(items[first:first + CHUNK])[:, :self.channels] for first in range(0, len(items), CHUNK)])

    def _ratios(self, images, points, own=None):
        """(d1 / d2 [n], 1 for 0 / 0; index of the nearest point [n]); own [n]: points that are the images themselves."""
        k, points, parts = 2 if own is None else 3, points.flatten(1), max(1, QUERY_VALUES // points[0].numel())
        search = lambda queries: [torch.cat(one) for one in zip(*(nearest(part, points, k=k) for part in queries.flatten(1).split(parts)))]
        found = [search(queries) for queries in ([images, images.flip(3)] if self.xflip else [images])]
        d2, index = (torch.cat(parts, dim=1) for parts in zip(*found))
        if own is not None:
            d2 = d2.masked_fill(index == own[:, None], float('inf'))
        first, place = d2.min(dim=1)
        index_1 = index.gather(1, place[:, None])
        second = d2.masked_fill(index == index_1, float('inf')).min(dim=1).values
        return torch.where(second > 0, first / second, 1.0).sqrt(), index_1[:, 0]


class Alarms:
    """Checks the sample grid of each snapshot, on rank 0.

    found: Inspection of the training data. net: the weight average that is sampled; gets the statistics, for its snapshots."""

    def __init__(self, found: 'Inspection', net: torch.nn.Module) -> None:
        self.net, self.copies = net, found.copies
        net.data_statistics = found.statistics

    def look(self, images: torch.Tensor, fields: dict) -> None:
        """Adds what is measured on sampled images [n,C,H,W] to `fields`, {name: number}, and prints warnings."""
        found, warnings = self.judge(images)
        fields |= found
        for warning in warnings:
            print(f'Warning: {warning}', flush=True)

    def judge(self, images: torch.Tensor) -> tuple[dict, list[str]]:
        """({name: number}, [warnings]) of sampled images [n,C,H,W]."""
        bad = int((~images.isfinite().flatten(1).all(1)).sum())
        if bad:
            return {'Samples/num_images': len(images)}, [f'{bad} of {len(images)} samples are not finite']
        channels = Channels(self.net)
        channels.take(images)
        fields, warnings = channels.fields(), [channels.warning()]
        if self.copies is not None:
            share, real, _ = self.copies(images if self.net.units is not None else images.clamp(-1, 1))
            fields |= {'Copies/num_images': len(images), 'Copies/share': share, 'Copies/share_real': real}
            where = 'pixels' if getattr(self.net, 'autoencoder', None) is None else 'latents'
            if share > real + LIMIT and share * len(images) > 2:
                warnings.append(f'{share:.0%} of {len(images)} samples are copies of training images (d1/d2 < 1/3 in {where}, against '
                                f'{real:.0%} of real images): the network memorises')
        return fields, [warning for warning in warnings if warning]


class Inspection:
    """What the checks need of the training data: statistics or None, and copies, a Copies or None. Both are None except on rank 0."""

    def __init__(self, statistics: dict | None = None, copies: Copies | None = None) -> None:
        self.statistics, self.copies = statistics, copies


def inspect(store: ImageStore, dataset: ImageDataset, sigma_n: np.ndarray, train: np.ndarray, validation: Validation | None,
            seed: int) -> Inspection:
    """The Inspection of the training items; validation: a Validation with held-out items, or None.

    Copies are searched for where there are at least FEWEST clean images, and all of them are within MOST_IMAGES and MOST_VALUES."""
    statistics = data_statistics(store, dataset, sigma_n, train, seed)
    clean = train[(sigma_n[train] == 0) & ~dataset.flip[train]]
    if not FEWEST <= len(clean) <= min(MOST_IMAGES, MOST_VALUES // int(np.prod(dataset.image_shape))):
        return Inspection(statistics)
    held_out = None
    if validation is not None:
        items = validation.items[validation.sigma_n.numpy()[validation.items] == 0]
        held_out = (validation.store, items) if len(items) >= FEWEST else None
    mirrors = bool(dataset.flip.any()) and dataset.latents is None  # a mirrored latent is none of a mirrored picture
    return Inspection(statistics, Copies(store, clean, held_out, mirrors, dataset.image_shape[0]))


def broken(averages: dict) -> dict[str, str]:
    """Which of {name: weight average} are not finite: {name: description}."""
    found = {name: non_finite(average.module) for name, average in averages.items()}
    return {name: words for name, words in found.items() if words}
