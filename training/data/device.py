# SPDX-License-Identifier: Apache-2.0
"""The pixels of a data set in GPU memory, so that only indices are transferred."""

import math

import numpy as np
import torch

from dnnlib import UserError
from training.data.store import ImageStore
from training.data.tables import distinct

PLACES = ('auto', 'host', 'device')
SHARE = 0.25  # largest share of the device's free memory that "auto" takes; the network needs the rest


class DeviceStore:
    """An ImageStore on a device, with bit-identical results: clean images as stored, noisy ones kept from their first use on.

    store: ImageStore, on the host. Raises torch.OutOfMemoryError."""

    def __init__(self, store: ImageStore, device: torch.device | str):
        self._store, self._device = store, torch.device(device)
        clean = distinct(store.dataset.row[~store.noisy.numpy()])
        self._place = torch.where(store.noisy, store.copy.long(), torch.from_numpy(np.searchsorted(clean, store.dataset.row)))
        shape, is_float = store.dataset.stored_shape, store.dataset.is_float
        # A division on the device may differ in the last bit: 8-bit values are looked up, others are divided on the host.
        grey = torch.arange(256, dtype=torch.uint8)
        self._table = None if is_float else store.dataset.to_network(grey.reshape(-1, 1, 1, 1).expand(-1, shape[0], 1, 1)).to(self._device)
        self._clean = torch.empty([len(clean), *shape], dtype=torch.float32 if is_float else torch.uint8, device=self._device)
        for first in range(0, len(clean), 1024):
            part = store.stored(clean[first:first + 1024])
            self._clean[first:first + 1024] = (store.dataset.to_network(part) if is_float else part).to(self._device)
        self._noisy = torch.empty([store.noisy_count, *shape], device=self._device)
        self._have = torch.zeros(store.noisy_count, dtype=torch.bool)

    def words(self) -> str:
        """Where the images are, and how much memory they take, as text."""
        return f'{needed(self._store) / 2 ** 30:.2f} GiB in the memory of {self._device}'

    def gather(self, indices: np.ndarray | torch.Tensor) -> torch.Tensor:
        """As ImageStore.gather, on the device."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        images = torch.empty([len(indices), *self._store.dataset.stored_shape], device=self._device)
        is_noisy, place = self._store.noisy[indices], self._place[indices]
        rows = (~is_noisy).nonzero().squeeze(1)
        images.index_copy_(0, self._up(rows), self._to_network(self._clean.index_select(0, self._up(place[rows]))))
        new = (is_noisy & ~self._have[torch.where(is_noisy, place, 0)]).nonzero().squeeze(1) if len(self._have) else rows[:0]
        if len(new):
            self._noisy.index_copy_(0, self._up(place[new]), self._store.made(indices[new]).to(self._device))
            self._have[place[new]] = True
        rows = is_noisy.nonzero().squeeze(1)
        images.index_copy_(0, self._up(rows), self._noisy.index_select(0, self._up(place[rows])))
        rows = self._up(self._store.flip[indices].nonzero().squeeze(1))
        images.index_copy_(0, rows, images.index_select(0, rows).flip(3))
        return images

    def _up(self, indices):
        return indices.to(self._device)

    def _to_network(self, images):
        if self._table is None:
            return images
        channels = torch.arange(images.shape[1], device=self._device)[:, None, None]
        return self._table[images.long(), channels, 0, 0]


def needed(store: ImageStore) -> int:
    """Bytes of device memory that the images of an ImageStore take."""
    data = store.dataset
    clean = len(distinct(data.row[~store.noisy.numpy()]))
    return math.prod(data.stored_shape) * (4 * store.noisy_count + (4 if data.is_float else 1) * clean)


def on_device(store: ImageStore, where: str, device: torch.device | str, free: int | None = None) -> ImageStore | DeviceStore:
    """The ImageStore, or its DeviceStore if `where` asks for it ("auto": if it fits). where: one of PLACES. free: bytes, for tests."""
    if where == 'host' or torch.device(device).type != 'cuda' and free is None:
        return store
    free, nbytes = torch.cuda.mem_get_info(device)[0] if free is None else free, needed(store)
    if where == 'auto' and nbytes > SHARE * free:
        return store
    if nbytes > free:
        raise UserError(f'--data-on=device: the images take {nbytes / 2 ** 30:.1f} GiB, and {device} has {free / 2 ** 30:.1f} GiB free; '
                        'use --data-on=host')
    return DeviceStore(store, device)
