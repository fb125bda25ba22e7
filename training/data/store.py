# SPDX-License-Identifier: Apache-2.0
"""The pixels of a data set, gathered by index: clean images as stored, noisy ones with their fixed noise."""

import contextlib
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch

from torch_utils import distributed
from training.data.cache import decode_into
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.packed import Packed
from training.data.tables import distinct

AHEAD = 2 ** 23     # bytes of a file per read-ahead request
AHEAD_SHARE = 0.75  # share of the available memory up to which a file is read ahead


class ImageStore:
    """The pixels of a dataset, each at its level sigma_n.

    dataset: ImageDataset. corruption: Corruption. sigma_n: float64 [N], the level of each item (Corruption.levels).
    cache_gib: memory that this node's processes together may use to keep noisy images, each from its first use on. If they do not all
    fit, none is kept and each is recomputed at each use: its noise is a function of the seed and the image's index.
    Distributions of latents are gathered as such, 2C channels, with noise in their means (see latents.sample).
    workers: threads that compute the noisy images of a batch.

    Packed data are mapped from their file; others, which are small (cache.py), are decoded now, into this process's memory.
    All ranks make their stores at the same point of the program. Attributes: nbytes (of the clean images), mapped, noisy bool [N] (items
    that noise is added to), copy int32 [N] (index of the item's noisy image, -1: none), noisy_count (number of these), flip bool [N],
    kept_bytes (0 if noisy images are recomputed)."""

    def __init__(self, dataset: ImageDataset, corruption: Corruption, sigma_n: np.ndarray, cache_gib: float = 8.0, workers: int = 1):
        self.dataset, self._corruption, self._sigma_n = dataset, corruption, np.asarray(sigma_n, np.float64)
        self.mapped = isinstance(dataset.contents, Packed)
        if self.mapped:
            # Copy on write, though nothing is written: PyTorch has no read-only tensors.
            held = dataset.contents.images
            images = np.memmap(held.filename, held.dtype, 'c', held.offset, held.shape)
            if distributed.local_rank() == 0:
                threading.Thread(target=_read_ahead, args=(held.filename,), daemon=True, name='read ahead').start()
        else:
            used = distinct(dataset.row)  # an image and its flip share an entry
            self._used = torch.from_numpy(used)
            images = np.empty([len(used), *dataset.stored_shape], np.float32 if dataset.is_float else np.uint8)
            decode_into(images, dataset.contents, used)
        self._clean, self._row = torch.from_numpy(images), torch.from_numpy(dataset.row)
        # Latents of mirrored pictures are stored; all other items are mirrored here.
        self.nbytes, self.flip = images.nbytes, torch.from_numpy(dataset.flip & (dataset.row == dataset.raw_idx))
        self.noisy = torch.from_numpy(self._sigma_n > dataset.native_sigma)
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None
        self._workers = workers
        self._number_copies()
        self._keep_noisy(cache_gib)

    def words(self) -> str:
        """Where the images are, and how much memory they take, as text."""
        clean = f'{self.nbytes / 2 ** 30:.2f} GiB {"mapped from disk" if self.mapped else "in memory"}'
        if not self.noisy_count:
            return clean
        gib = self._noisy_bytes() / 2 ** 30
        return clean + (f', and up to {gib:.2f} GiB of memory to keep noisy images' if self.kept_bytes else
                        f', noisy images recomputed at each use (keeping them needs --cache-gib={math.ceil(100 * gib) / 100:g})')

    def _noisy_bytes(self):
        return self.noisy_count * math.prod(self.dataset.stored_shape) * 4

    def gather(self, indices: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Items in network units at level sigma_n: float32 [n, *stored_shape]; they are flipped last, so that the noise is mirrored too."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        if not self.kept_bytes:
            return self._mirrored(self.made(indices), indices)
        copy = self.copy[indices].long()
        kept = (copy >= 0) & self._have[copy.clamp(min=0)]
        if bool(kept.all()):
            return self._mirrored(self._kept.index_select(0, copy), indices)
        images = torch.empty([len(indices), *self.dataset.stored_shape])
        held, rest = kept.nonzero().squeeze(1), (~kept).nonzero().squeeze(1)
        images.index_copy_(0, held, self._kept.index_select(0, copy[held]))
        if len(rest):
            made = self.made(indices[rest])
            images.index_copy_(0, rest, made)
            new = (copy[rest] >= 0).nonzero().squeeze(1)
            self._kept.index_copy_(0, copy[rest][new], made[new])
            self._have[copy[rest][new]] = True
        return self._mirrored(images, indices)

    def stored(self, row: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Clean images by their place in the archive, as stored: uint8 or float32 [n, *stored_shape]."""
        row = torch.as_tensor(row)
        return self._clean.index_select(0, row if self.mapped else torch.searchsorted(self._used, row))

    def made(self, indices: torch.Tensor) -> torch.Tensor:
        """Items at level sigma_n, not mirrored yet, from the clean images."""
        images = self.dataset.to_network(self.stored(self._row[indices]))
        rows = self.noisy[indices].nonzero().squeeze(1).numpy()
        if self._pool is None or len(rows) < 2 * self._workers:
            self._add_noise(images, indices, rows)
        else:
            list(self._pool.map(lambda part: self._add_noise(images, indices, part), np.array_split(rows, self._workers)))
        return images

    def _add_noise(self, images, indices, rows):
        if len(rows):
            items, data = indices.numpy()[rows], self.dataset
            here = data.flip[items] & ~self.flip.numpy()[items]  # stored as they are, so that only their noise is mirrored
            self._corruption.add(images.numpy()[:, :data.image_shape[0]], rows, data.raw_idx[items], data.native_sigma[items],
                                 self._sigma_n[items], data.flip[items], mirror=here)

    def _mirrored(self, images, indices):
        rows = self.flip[indices].nonzero().squeeze(1)
        if len(rows):
            images.index_copy_(0, rows, images.index_select(0, rows).flip(3))
        return images

    def _number_copies(self):
        noisy, data = np.flatnonzero(self.noisy.numpy()), self.dataset
        # The published protocol gives an image's flip a noisy copy of its own, and so do latents; otherwise the two share one.
        shared = self._corruption.noise_follows_flip and data.latents is None
        copies = data.raw_idx[noisy] + (0 if shared else data.contents.count * data.flip[noisy])
        copied = distinct(copies)
        number = np.zeros(copied[-1] + 1 if len(copied) else 0, np.int32)
        number[copied] = np.arange(len(copied))
        self.noisy_count = len(copied)
        self.copy = torch.full([len(data)], -1, dtype=torch.int32)
        self.copy[noisy] = torch.from_numpy(number[copies])

    def _keep_noisy(self, cache_gib):
        """Allocates memory to keep the noisy images, float32 [noisy_count,C,H,W], if all of them fit."""
        self.kept_bytes, nbytes = 0, self._noisy_bytes()
        if not 0 < nbytes <= cache_gib * 2 ** 30 or (buffer := _shared_memory(nbytes)) is None:
            return
        self.kept_bytes = nbytes
        self._kept = torch.from_numpy(buffer.view(np.float32).reshape(self.noisy_count, *self.dataset.stored_shape))
        # Each rank tracks only its own writes: all write the same values, so that none has to wait for another.
        self._have = torch.zeros(self.noisy_count, dtype=torch.bool)


def _read_ahead(path):
    """Lets the system read a whole file sequentially ahead of use, if it fits in memory: on slow disks, the random reads of batches take
    many times as long."""
    with contextlib.suppress(OSError), open(path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size
        if hasattr(os, 'posix_fadvise') and size < AHEAD_SHARE * psutil.virtual_memory().available:
            for first in range(0, size, AHEAD):
                os.posix_fadvise(f.fileno(), first, AHEAD, os.POSIX_FADV_WILLNEED)


def _shared_memory(nbytes):
    """uint8 [nbytes] of zeros shared by this node's processes; memory is taken once it is written to. None if that fails."""
    if distributed.local_size() == 1:
        return np.zeros(nbytes, np.uint8)
    handle, path = None, None
    if distributed.local_rank() == 0 and hasattr(os, 'memfd_create'):
        with contextlib.suppress(OSError):
            handle = os.memfd_create('noisy images')
            os.truncate(handle, nbytes)
            path = f'/proc/{os.getpid()}/fd/{handle}'
    # A node's ranks are consecutive, its local rank 0 the first of them.
    path = distributed.all_values(path)[distributed.rank() - distributed.local_rank()]
    buffer = None
    if path:
        with contextlib.suppress(OSError):
            buffer = np.asarray(np.memmap(path, np.uint8, 'r+', shape=(nbytes,)))
    distributed.barrier()
    if handle is not None:
        os.close(handle)
    return buffer
