# SPDX-License-Identifier: Apache-2.0
"""Pairs -> batches: draws the pairs of the global batch, prefetches this rank's rows, and puts micro-batches on the device."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from training.data.dataset import as_vectors
from training.data.latents import sample


class Batch(NamedTuple):
    """The data of one training step; levels are noise stds in network units, sigma >= sigma_n."""

    images: torch.Tensor  # [N,C,H,W], each already at level sigma_n
    sigma_n: torch.Tensor  # [N,1,1,1], 0 for clean images
    sigma: torch.Tensor  # [N,1,1,1], the level to denoise from, chosen by pairs.py
    noise: torch.Tensor  # [N,C,H,W], unit normal, fresh in every step
    class_labels: torch.Tensor | None = None  # [N,label_dim]
    augment_labels: torch.Tensor | None = None  # [N,augment_dim]
    raw_idx: torch.Tensor | None = None  # [N] int64, indices of the images in the data set
    factor: torch.Tensor | None = None  # [N], importance weights, if the levels come from timesteps.py


AHEAD = 2  # global batches prepared in the background while one is in use


class HostBatch(NamedTuple):
    """This rank's rows of one global batch, in host memory, and the state of the pair stream after them."""

    images: torch.Tensor        # float32 [n,C,H,W] at level sigma_n, or distributions of latents [n,2C,H,W]
    sigma_n: torch.Tensor       # float32 [n]
    sigma: torch.Tensor         # float32 [n]
    class_labels: torch.Tensor | None  # classes int32 [n], or vectors float32 [n,label_dim]
    raw_idx: torch.Tensor       # int64 [n]
    stream_state: dict


class Feed:
    """Batches of a run, in the order of its pair stream.

    stream: a PairStream over positions of `items`. store: ImageStore. items: int64 [M], those of the store that may be used.
    sigma_n [N], raw_idx [N], labels (classes int32 [N], vectors float32 [N,label_dim] or None): of every item of the store.
    rows: slice of the global batch that is this rank's.
    workers: 0 prepares each batch when it is needed; more prepare in the background.
    The batches do not depend on the number of ranks or workers: every rank draws all pairs and gathers its own rows."""

    def __init__(self, stream: Any, store: Any, items: np.ndarray, *, sigma_n: np.ndarray, raw_idx: np.ndarray, labels: torch.Tensor | None,
                 rows: slice, device: torch.device | str, workers: int):
        self.stream, self.store, self.items, self.rows, self.device = stream, store, items, rows, torch.device(device)
        self._sigma_n, self._raw_idx = torch.as_tensor(sigma_n, dtype=torch.float32), torch.as_tensor(raw_idx)
        self._labels = labels
        self._pool = concurrent.futures.ThreadPoolExecutor(1) if workers else None  # one thread: the stream is drawn in order
        self._ahead = collections.deque()

    def next(self) -> HostBatch:
        """The next HostBatch."""
        if self._pool is None:
            return self._prepare()
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._pool.submit(self._prepare))
        return self._ahead.popleft().result()

    def close(self) -> None:
        """Stops the background thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _prepare(self):
        positions, sigma = self.stream.next()
        where = torch.from_numpy(self.items[positions[self.rows]])
        labels = None if self._labels is None else self._labels[where]
        batch = HostBatch(self.store.gather(where), self._sigma_n[where], torch.from_numpy(sigma[self.rows]).float(),
                          labels, self._raw_idx[where], self.stream.state())
        if self.device.type != 'cuda':
            return batch
        return HostBatch(*[x.pin_memory() if torch.is_tensor(x) and not x.is_cuda else x for x in batch])


def micro_batches(host: HostBatch, size: int, device: torch.device | str, draws_of: Callable,
                  label_dim: int = 0, channels: int | None = None) -> Iterator[tuple[Batch, Callable]]:
    """Splits a HostBatch into Batches of `size` rows on the device, each with its keyed draws: yields (Batch, draws).

    label_dim: the network's; classes become one-hot vectors of this length on the device. channels: the network's; of images with twice
    as many, which are distributions of latents, a fresh sample is drawn.
    draws_of(first local row) -> randn(name, shape). The noise of a row is the same however the batch is split."""
    for first in range(0, len(host.images), size):
        part = [x[first:first + size].to(device, non_blocking=True) if torch.is_tensor(x) else x for x in host[:-1]]
        images, sigma_n, sigma, labels, raw_idx = part
        draws = draws_of(first)
        labels = None if labels is None else as_vectors(labels, label_dim)
        if channels and images.shape[1] == 2 * channels:
            images = sample(images, draws('latents', [len(images), channels, *images.shape[2:]]))
        yield Batch(images=images, sigma_n=sigma_n.reshape(-1, 1, 1, 1), sigma=sigma.reshape(-1, 1, 1, 1),
                    noise=draws('noise', images.shape), class_labels=labels, augment_labels=None, raw_idx=raw_idx), draws
