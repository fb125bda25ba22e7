# SPDX-License-Identifier: Apache-2.0
"""Image files -> uint8 batches: folders, zips and arrays, decoded by threads; all unusable images are reported by name."""

import collections
import concurrent.futures
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.archive import DAMAGE, LOSSY, Archive, damage, decode_image, packed_images
from dnnlib.cpus import cpu_count
from torch_utils import distributed

NAMED = 20  # number of bad files that an error names; the others are counted
UNREADABLE = 'cannot be read as an image ({})'


class BadImages(UserError):
    """Images that cannot be used. bad: [(name, reason)]; total: number of images checked."""

    def __init__(self, where: str, bad: Sequence[tuple[str, str]], total: int):
        self.where, self.bad, self.total = where, sorted(bad), total
        named = '; '.join(f'{name} {why}' for name, why in self.bad[:NAMED])
        more = f'; and {len(bad) - NAMED} more' if len(bad) > NAMED else ''
        super().__init__(f'{where}: {len(bad)} of {total} images cannot be used: {named}{more}')


class ImageFiles:
    """The images of a folder (with sub-folders), a zip, an .npz or an .npy, in sorted order, all uint8 and of one shape.

    len() is their number, `shape` (C, H, W). option: the name of the source in errors, such as "--gen-path"."""

    def __init__(self, path: str | os.PathLike, option: str):
        self.path, self._where = str(path), f'{option}={path}'
        self._names, self._load = _open_source(self.path, self._where)
        if not len(self._names):
            raise UserError(f'{self._where}: contains no images')
        self._files = _state_of_files(self.path)
        lossy = sum(str(name).lower().endswith(LOSSY) for name in self._names)
        if lossy:
            distributed.print0(f'Warning: {self._where}: {lossy} of {len(self)} files are JPEG or WebP, whose compression changes the '
                               'distance; use PNG', file=sys.stderr)
        self._first, self.shape = self._first_readable()

    def __len__(self):
        return len(self._names)

    def __getitem__(self, index):
        """Image [C,H,W] uint8. Raises BadImages."""
        image, why = self._read(index)
        if why:
            raise BadImages(self._where, [(self.name(index), why)], 1)
        return image

    def name(self, index: int) -> str:
        """The name of an image within its folder or archive; its number in an array."""
        return str(self._names[index])

    def batches(self, batch_size: int, count: int | None = None) -> Iterator[torch.Tensor]:
        """uint8 tensors [n,C,H,W]: this rank's share of the first `count` images, decoded by threads one batch ahead.

        Images that cannot be used are left out, and reported by BadImages when all others have been read."""
        mine = range(distributed.rank(), len(self) if count is None else count, distributed.size())
        ahead, bad = collections.deque(), []
        with concurrent.futures.ThreadPoolExecutor(min(8, cpu_count())) as pool:
            try:
                for start in range(0, len(mine), batch_size):
                    ahead.append([(i, pool.submit(self._read, i)) for i in mine[start:start + batch_size]])
                    if len(ahead) > 1:
                        yield from self._stack(ahead.popleft(), bad)
                while ahead:
                    yield from self._stack(ahead.popleft(), bad)
            finally:
                pool.shutdown(cancel_futures=True)
        if bad:
            raise BadImages(self._where, bad, len(mine))

    def check_unchanged(self) -> None:
        """Refuses a source whose files were added, removed or changed since it was opened, on any rank. Every rank calls it after
        reading."""
        now = _state_of_files(self.path)
        changed = sorted(name for name in self._files.keys() | now.keys() if self._files.get(name) != now.get(name))
        listings = distributed.all_values((len(self._names), changed))
        changed = next((found for _, found in listings if found), [])
        if changed or len({count for count, _ in listings}) > 1:
            example = f' ({len(changed)} files, such as {changed[0]})' if changed else ''
            raise UserError(f'{self._where}: changed while it was being read{example}; evaluate it when nothing writes to it')

    def _first_readable(self):
        """(name, shape) of the first image that can be decoded, with which the others are compared."""
        bad = []
        for name in self._names:
            try:
                return name, self._load(name).shape
            except DAMAGE as err:
                bad.append((str(name), UNREADABLE.format(damage(err))))
        raise BadImages(self._where, bad, len(self))

    def _read(self, index):
        """(image [C,H,W] uint8, None), or (None, reason why it cannot be used)."""
        try:
            image = self._load(self._names[index])
        except DAMAGE as err:
            return None, UNREADABLE.format(damage(err))
        if image.shape != self.shape:
            return None, f'is {list(image.shape)}, {self._first} is {list(self.shape)} [C,H,W], and all must be of one size and mode'
        return image, None

    def _stack(self, futures, bad):
        """Yields the usable images of one batch, if there are any; the others are added to `bad`."""
        found = [(i, *future.result()) for i, future in futures]
        bad.extend((self.name(i), why) for i, _, why in found if why)
        good = [image for _, image, why in found if not why]
        if good:
            yield torch.from_numpy(np.stack(good))


def _state_of_files(path):
    """{name: (size, time of the last change)} of a file, or of the images in a folder."""
    names = Archive(path).images() if os.path.isdir(path) else ['']
    state = {}
    for name in names:
        try:
            stat = os.stat(os.path.join(path, name) if name else path)
            state[name or os.path.basename(path)] = stat.st_size, stat.st_mtime_ns
        except FileNotFoundError:  # gone since the folder was listed
            continue
    return state


def _open_source(path, where):
    """(names, function from a name to its image) for a folder, zip or array file."""
    path = os.path.isdir(path) and packed_images(path) or path
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path) or suffix == '.zip' and os.path.isfile(path):
        archive = Archive(path, where)
        return archive.images(), lambda name: _decode(name, archive.read(name))
    if not os.path.isfile(path):
        raise UserError(f'{where}: no such folder or file')
    if suffix not in ('.npy', '.npz'):
        raise UserError(f'{where}: not a folder, .zip, .npz or .npy of images')
    try:
        array, channel_axis = _image_array(path)
    except (*DAMAGE, RuntimeError) as err:  # zipfile raises RuntimeError for encrypted members
        raise UserError(f'{where}: cannot be read ({damage(err)})') from None
    return range(len(array)), lambda i: np.ascontiguousarray(np.moveaxis(array[i], channel_axis, 0))


def _decode(name, data):
    """The bytes of a member -> uint8 [C,H,W]."""
    image = decode_image(name, data, modes=('L', 'RGB'))
    if image.dtype != np.uint8:
        raise ValueError(f'{image.dtype} {list(image.shape)}, expected uint8 [C,H,W]')
    return image


def _image_array(path):
    """(uint8 array of four axes, the channel axis of one image) in an .npy or .npz; other arrays are ignored."""
    data = np.load(path, mmap_mode='r', allow_pickle=False)
    if isinstance(data, np.ndarray):
        arrays = [data]
    else:
        with data:
            arrays = [array for array in (data[key] for key in data.files) if isinstance(array, np.ndarray)]  # others are bytes
    images = [a[..., None] if a.ndim == 3 else a for a in arrays if a.dtype == np.uint8 and a.ndim in (3, 4)]
    if len(images) != 1:
        raise ValueError(f'expected one uint8 array [N,H,W], [N,H,W,C] or [N,C,H,W], found {len(images)}')
    channels_last, channels_first = (images[0].shape[axis] in (1, 3) for axis in (3, 1))
    if not channels_last and not channels_first:
        raise ValueError(f'neither the last nor the second axis of {list(images[0].shape)} is 1 or 3 channels')
    return images[0], 2 if channels_last else 0
