# SPDX-License-Identifier: Apache-2.0
"""The pixels of a data set: decoded once, made noisy once, then gathered in batches."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.progress import Progress
from torch_utils import distributed

CHUNK = 64  # images that a thread works on before it reports


class ImageStore:
    """The pixels of a dataset: every image decoded once, every noisy one made once with its fixed noise, batches by index.

    dataset: ImageDataset. corruption: Corruption. sigma_n: float64 [N], the level of each item (Corruption.levels).
    cache_gib: bound on the memory of this node's processes together; what does not fit lies in one file that they all map.
    workers: decoding threads of this process; default: its share of the cores. cache_dir: where that file is; default: the
    system's folder for temporary files. It loses its name before anything is written to it, so that nothing is left behind.

    All ranks make their stores at the same point of the program. Attributes: nbytes, mapped, noisy_count (noisy copies)."""

    def __init__(self, dataset, corruption, sigma_n, cache_gib=8.0, workers=None, cache_dir=None):
        self._dataset, self._corruption, self._sigma_n = dataset, corruption, np.asarray(sigma_n, np.float64)
        images, slot = np.unique(dataset.raw_idx, return_inverse=True)  # slot [N]: an image and its flip share one
        noisy = np.flatnonzero(self._sigma_n > dataset.native_sigma)
        # The published protocol gives an image's flip a noisy copy of its own; otherwise the two share one.
        copy = slot if corruption.noise_follows_flip else slot + len(images) * dataset.flip
        _, first, noisy_slot = np.unique(copy[noisy], return_index=True, return_inverse=True)
        self._sources = noisy[first]  # the item that each noisy copy is made from
        self.noisy_count = len(self._sources)
        self._slot = torch.from_numpy(slot)
        self._noisy_slot = torch.full([len(dataset)], -1, dtype=torch.int64)
        self._noisy_slot[noisy] = torch.from_numpy(noisy_slot)
        self._flip = torch.from_numpy(dataset.flip)
        self._allocate(len(images), cache_gib, cache_dir)
        self._fill(images, workers or max(1, (os.cpu_count() or 1) // distributed.local_size()))

    def gather(self, indices):
        """Items in network units at level sigma_n: float32 [n,C,H,W]; flips come last, so that noise is mirrored as well."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        noisy_slot = self._noisy_slot[indices]
        is_noisy = noisy_slot >= 0
        if bool(is_noisy.all()):
            images = self._noisy.index_select(0, noisy_slot)
        else:
            images = self._dataset.to_network(self._clean.index_select(0, self._slot[indices]))
            rows = is_noisy.nonzero().squeeze(1)
            images.index_copy_(0, rows, self._noisy.index_select(0, noisy_slot[rows]))
        return self._mirrored(images, indices)

    def raw(self, indices):
        """Items as stored, without added noise: uint8 or float32 [n,C,H,W], flips applied."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return self._mirrored(self._clean.index_select(0, self._slot[indices]), indices)

    def _mirrored(self, images, indices):
        rows = self._flip[indices].nonzero().squeeze(1)
        if len(rows):
            images.index_copy_(0, rows, images.index_select(0, rows).flip(3))
        return images

    def _allocate(self, count, cache_gib, cache_dir):
        """Makes room for clean [count,C,H,W], as stored, and noisy [noisy_count,C,H,W], float32: in memory or a mapped file."""
        shape, dtype = self._dataset.image_shape, np.dtype(np.float32 if self._dataset.is_float else np.uint8)
        noisy_bytes = self.noisy_count * int(np.prod(shape)) * 4
        self.nbytes = noisy_bytes + count * int(np.prod(shape)) * dtype.itemsize
        self.mapped = self.nbytes > cache_gib * 2 ** 30 / distributed.local_size()
        buffer = _shared_buffer(self.nbytes, cache_dir) if self.mapped else np.empty(self.nbytes, np.uint8)
        # float32 first: both parts are aligned then
        self._noisy = torch.from_numpy(buffer[:noisy_bytes].view(np.float32).reshape(self.noisy_count, *shape))
        self._clean = torch.from_numpy(buffer[noisy_bytes:].view(dtype).reshape(count, *shape))

    def _fill(self, images, workers):
        """Decodes, then adds the noise. Ranks that share a file share the work; otherwise each does all of it."""
        self._run('Decoding', len(images), workers, lambda rows: self._decode(rows, images))
        self._run('Adding noise', self.noisy_count, workers, self._corrupt)

    def _decode(self, rows, images):
        clean = self._clean.numpy()
        for slot in range(*rows):
            clean[slot] = self._dataset.decode(images[slot])

    def _corrupt(self, rows):
        items, data = self._sources[slice(*rows)], self._dataset
        clean = data.to_network(self._clean[self._slot[items]]).numpy()
        self._noisy.numpy()[slice(*rows)] = self._corruption.apply(
            clean, data.raw_idx[items], data.native_sigma[items], self._sigma_n[items], data.flip[items])

    def _run(self, title, count, workers, work):
        """work((first, last)) on chunks of the rows below count, in threads (decoders and generators leave Python's lock)."""
        chunks = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        ranks = distributed.local_size() if self.mapped else 1
        mine = chunks[distributed.local_rank()::ranks] if self.mapped else chunks
        with Progress(count, title, show=distributed.rank() == 0, unit_scale=True) as bar, ThreadPoolExecutor(workers) as pool:
            for chunk, _ in zip(mine, pool.map(work, mine)):
                bar.update((chunk[1] - chunk[0]) * ranks)
        if self.mapped:
            distributed.barrier()


def _shared_buffer(nbytes, cache_dir):
    """uint8 [nbytes] in a file that the processes of this node map together, and that has no name any more when this returns."""
    leader, folder, path = distributed.local_rank() == 0, cache_dir or tempfile.gettempdir(), None
    try:
        if leader:
            handle, path = tempfile.mkstemp(prefix='.images-', dir=folder)
            os.truncate(handle, nbytes)
        # A node's ranks are consecutive, its local rank 0 the first of them.
        path = distributed.all_values(path)[distributed.rank() - distributed.local_rank()]
        buffer = np.memmap(path, np.uint8, 'r+', shape=(nbytes,))
        distributed.barrier()
        if leader:
            os.unlink(path)
            _reserve(handle, nbytes)
            os.close(handle)
    except OSError as err:
        if leader and path and os.path.exists(path):
            os.unlink(path)
        raise UserError(f'{folder}: cannot hold the {nbytes / 2 ** 30:.1f} GiB of decoded images ({err.strerror}); '
                        'raise --cache-gib, or point --cache-dir to a larger disk') from None
    distributed.barrier()
    return np.asarray(buffer)


def _reserve(handle, nbytes):
    """Claims the disk space now: running out of it later would kill the process without a word."""
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(handle, 0, nbytes)
