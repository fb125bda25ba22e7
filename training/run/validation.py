# SPDX-License-Identifier: Apache-2.0
"""Reproducible held-out loss: fixed noise and fixed levels, with clean and noisy images reported separately."""

from collections.abc import Callable

import numpy as np
import torch

from dnnlib import UserError, text_record
from torch_utils import distributed, misc, registry, training_stats
from training.data import cache, tables
from training.data.batches import Batch
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset, as_vectors
from training.data.identity import check_same
from training.data.latents import sample
from training.data.limits import Limits, usable_levels
from training.data.pairs import PAIRINGS
from training.data.store import ImageStore
from training.diffusion.noise import NoiseDistribution
from training.run.config import Config

LEVELS = 8  # number of levels: the medians of equally probable bins of the run's noise distribution


def split(raw_idx: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training items, held-out items), int64: round(share * images) images are held out, each together with its x-flip."""
    if not share:
        return np.arange(len(raw_idx)), np.arange(0)
    images = tables.distinct(raw_idx)
    chosen = np.random.Generator(np.random.Philox(key=misc.seed_of(seed, 'held out'))).permutation(images)[:round(share * len(images))]
    if not 0 < len(chosen) < len(images):
        raise UserError(f'--val={share}: holds out {len(chosen)} of {len(images)} images; '
                        'choose a fraction that leaves some images for training and for validation')
    held_out = np.isin(raw_idx, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def build(config: Config, noise: NoiseDistribution, store: ImageStore, dataset: ImageDataset, held_out: np.ndarray, sigma_n: np.ndarray,
          sigma_min: np.ndarray, labels: torch.Tensor | None) -> 'Validation':
    """The Validation that a run's Config asks for: a share of the training data (`held_out`), or a separate data set.

    sigma_n, sigma_min, labels: of every item of the training data. A separate data set is corrupted like it, with another seed."""
    data, corrupt = config.data, config.corruption
    if data.validation.path:
        corruption = Corruption(corrupt.sigma, corrupt.probability, corrupt.seed + (corrupt.protocol == 'fixed'), corrupt.protocol,
                                corrupt.sigma_min_as)
        copy = distributed.from_node(cache.decode, data.validation.path, data.cache_dir)
        own = ImageDataset(data.validation.path, use_labels=data.use_labels, copy=copy)
        dataset = check_alike(dataset, check_same(f'--val={data.validation.path}', data.validation.fingerprint, own))
        sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
        sigma_n, sigma_min = corruption.beyond_sigma_min(sigma_n, dataset.sigma_min, dataset.sigma_max)
        store = ImageStore(dataset, corruption, sigma_n, data.cache_gib - store.kept_bytes / 2 ** 30, data.workers)
        labels = torch.from_numpy(dataset.label_table) if data.use_labels else None
        held_out = np.arange(len(dataset))
    else:
        held_out = held_out[~dataset.flip[held_out]]  # each image once
    middles = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    limits = usable_levels(sigma_n, registry.build(config.objective.pairing, PAIRINGS, '--pairing').buffer, sigma_min, dataset.sigma_max)
    return Validation(store, held_out, sigma_n, labels, noise.icdf(middles).tolist(), config.run.batch_gpu, config.run.seed, limits)


def check_alike(training: ImageDataset, held_out: ImageDataset) -> ImageDataset:
    """Returns the held-out ImageDataset. Refuses one whose images differ in form from the training data, or that has more classes."""
    for name in ('image_shape', 'label_dim', 'units'):
        expected, found = getattr(training.form, name), getattr(held_out.form, name)
        classes = name == 'label_dim' and expected and found and training.classes is not None and held_out.classes is not None
        if classes and found > expected:
            raise UserError(f'--val={held_out.path}: it has {found} classes, and the training data has {expected}, which are all that the '
                            'network learns; leave the others out')
        if found != expected and not classes:
            raise UserError(f'--val={held_out.path}: its {name} is {found}, that of the training data is {expected}; '
                            'convert both in the same way with dataset_tool.py')
    digests = [data.latents and data.latents.autoencoder.get('sha256') for data in (training, held_out)]
    if digests[0] != digests[1]:
        raise UserError(f'--val={held_out.path}: its latents are of another autoencoder than those of the training data; encode both '
                        'with the same')
    if told := text_record.difference(training.text, held_out.text):
        raise UserError(f'--val={held_out.path}: its labels differ from those of the training data: {told}')
    return held_out


class Validation:
    """validation(net, term, device) -> {"Val/clean": ..., "Val/noisy": ..., "Val/clean/sigma=0.0478": ..., ..., "Val/num_images"}.

    Every held-out image is evaluated at every level at which it could be trained, with the run's own loss term. limits:
    Limits of the levels of all items of the store, by default those above sigma_n. The noise is a function of the seed, the level
    and the image's index, so that the result does not depend on ranks or batch size."""

    def __init__(self, store: ImageStore, items: np.ndarray, sigma_n: np.ndarray | torch.Tensor, labels: torch.Tensor | None,
                 levels: list[float], batch: int, seed: int, limits: Limits | None = None) -> None:
        self.store, self.labels, self.levels, self.batch, self.seed = store, labels, levels, batch, seed
        self.items, self.sigma_n = np.asarray(items), torch.as_tensor(sigma_n, dtype=torch.float32)
        self.limits = usable_levels(sigma_n) if limits is None else limits

    @torch.no_grad()
    def __call__(self, net: torch.nn.Module, term: torch.nn.Module, device: torch.device,
                 stop: Callable[[], bool] = lambda: False) -> dict[str, float | None]:
        """stop(): whether this rank should stop early; the result then covers only a part of the images, and is to be discarded."""
        stats = training_stats.Collector(device)
        rows = np.array_split(np.arange(len(self.items)), distributed.size())[distributed.rank()]
        for first in range(0, len(self.items), self.batch):  # the same number of rounds on every rank, so that all report the same names
            part = rows[first:first + self.batch]
            if len(part) and not stop():
                self._judge(net, term, device, part, stats)
        self._fill(stats)
        return {**{f'Val/{name}': found['mean'] for name, found in stats.flush().items()}, 'Val/num_images': len(self.items)}

    def _judge(self, net, term, device, rows, stats):
        where = torch.from_numpy(self.items[rows])
        images, sigma_n = self.store.gather(where).to(device), self.sigma_n[where].to(device)
        if images.shape[1] == 2 * getattr(net, 'img_channels', 0):
            draws = misc.Draws(self.seed, 0, first_row=int(rows[0]), device=device)
            images = sample(images, draws('held-out latents', [len(images), net.img_channels, *images.shape[2:]]))
        labels = None if self.labels is None else as_vectors(self.labels[where].to(device), net.label_dim)
        limits = self.limits.of(where)
        for k, sigma in enumerate(self.levels):
            level = torch.full_like(sigma_n, sigma)
            draws = misc.Draws(self.seed, k, first_row=int(rows[0]), device=device)
            # Rows whose own level is above this one are evaluated at their own, where the loss is zero, and not counted.
            batch = Batch(images, misc.batched(sigma_n), misc.batched(torch.maximum(level, sigma_n)),
                          draws('held out', images.shape), class_labels=labels)
            values = next(iter(term(net, batch).values()))
            usable = limits.usable(sigma).to(device)
            for name, mask in [('clean', usable & (sigma_n == 0)), ('noisy', usable & (sigma_n > 0))]:
                stats.report(name, values, mask=mask)
                stats.report(f'{name}/sigma={sigma:.4g}', values, mask=mask)

    def _fill(self, stats):
        """Reports all names without a value, so that every rank sums the same table."""
        none = torch.zeros(0)
        for name in ('clean', 'noisy'):
            for sigma in (None, *self.levels):
                stats.report(name if sigma is None else f'{name}/sigma={sigma:.4g}', none, mask=none.bool())
