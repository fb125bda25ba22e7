# SPDX-License-Identifier: Apache-2.0
"""Image files -> uint8 batches: folders, zips and arrays, decoded by threads; what cannot be used is named, all of it."""

import collections
import concurrent.futures
import io
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from dnnlib import UserError
from dnnlib.files import file_digest
from torch_utils import distributed

LOSSY = ('.jpg', '.jpeg', '.webp')
PICTURES = ('.png', '.bmp', *LOSSY)
ARRAYS = ('.npy', '.npz')
NAMED = 20  # how many bad files an error names; it counts the others


class BadImages(UserError):
    """Images that cannot be used. bad: [(name, why)]; total: how many were looked at."""

    def __init__(self, where, bad, total):
        self.where, self.bad, self.total = where, sorted(bad), total
        named = '; '.join(f'{name} {why}' for name, why in self.bad[:NAMED])
        more = f'; and {len(bad) - NAMED} more' if len(bad) > NAMED else ''
        super().__init__(f'{where}: {len(bad)} of {total} images cannot be used: {named}{more}')


class ImageFiles:
    """The images of a folder (with sub-folders), a zip, an .npz or an .npy, in sorted order, all uint8 and of one shape.

    len() is their number, `shape` (C, H, W). option: what errors call the source, such as "--gen-path"."""

    def __init__(self, path, option):
        self.path, self._where = str(path), f'{option}={path}'
        self._names, self._load = _open_source(self.path, self._where)
        if not len(self._names):
            raise UserError(f'{self._where}: holds no images ({", ".join(PICTURES)} or uint8 .npy)')
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

    def name(self, index):
        """What the image is called, within its folder or archive; its number in an array."""
        return str(self._names[index])

    def batches(self, batch_size, count=None):
        """uint8 tensors [n,C,H,W]: this rank's share of the first `count` images, decoded by threads a batch ahead.

        Images that cannot be used are left out, and raised as BadImages when all others have been read."""
        mine = range(distributed.rank(), len(self) if count is None else count, distributed.size())
        ahead, bad = collections.deque(), []
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
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

    def check_unchanged(self):
        """Refuses a source whose files came, went or changed since it was opened, on any rank. Every rank calls it, after reading."""
        now = _state_of_files(self.path)
        changed = sorted(name for name in self._files.keys() | now.keys() if self._files.get(name) != now.get(name))
        listings = distributed.all_values((len(self._names), changed))
        changed = next((found for _, found in listings if found), [])
        if changed or len({count for count, _ in listings}) > 1:
            example = f' ({len(changed)} files, such as {changed[0]})' if changed else ''
            raise UserError(f'{self._where}: changed while it was read{example}; evaluate it when nothing writes to it')

    def _first_readable(self):
        """(name, shape) of the first image that can be decoded: what the others are compared with."""
        bad = []
        for name in self._names:
            try:
                return name, self._load(name).shape
            except DAMAGE as err:
                bad.append((str(name), _unreadable(err)))
        raise BadImages(self._where, bad, len(self))

    def _read(self, index):
        """(image [C,H,W] uint8, None), or (None, why it cannot be used)."""
        try:
            image = self._load(self._names[index])
        except DAMAGE as err:
            return None, _unreadable(err)
        if image.shape != self.shape:
            return None, f'is {list(image.shape)}, {self._first} is {list(self.shape)} [C,H,W], and all must be of one size and mode'
        return image, None

    def _stack(self, futures, bad):
        """Yields the good images of one batch, if there are any; the others join `bad`."""
        found = [(i, *future.result()) for i, future in futures]
        bad.extend((self.name(i), why) for i, _, why in found if why)
        good = [image for _, image, why in found if not why]
        if good:
            yield torch.from_numpy(np.stack(good))


def _unreadable(err):
    return f'cannot be read as an image ({(str(err) or type(err).__name__).splitlines()[0]})'


def _state_of_files(path):
    """{name: (size, time of the last change)} of a file, or of the images in a folder."""
    names = _image_names(_files_in(path)) if os.path.isdir(path) else ['']
    state = {}
    for name in names:
        try:
            stat = os.stat(os.path.join(path, name) if name else path)
            state[name or os.path.basename(path)] = stat.st_size, stat.st_mtime_ns
        except FileNotFoundError:  # gone since the folder was listed
            continue
    return state


def _files_in(folder):
    return (p.relative_to(folder).as_posix() for p in Path(folder).rglob('*') if p.is_file())


def _open_source(path, where):
    """(names, function from a name to its image) for a folder, zip or array file."""
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        return _image_names(_files_in(path)), lambda name: _decode(Path(path, name).read_bytes(), name)
    if not os.path.isfile(path):
        raise UserError(f'{where}: no such folder or file')
    try:
        if suffix == '.zip':
            archive = zipfile.ZipFile(path)
            return _image_names(archive.namelist()), lambda name: _decode(archive.read(name), name)
        if suffix in ARRAYS:
            array, channel_axis = _image_array(path)
            return range(len(array)), lambda i: np.ascontiguousarray(np.moveaxis(array[i], channel_axis, 0))
    except DAMAGE as err:
        reason = (str(err) or type(err).__name__).splitlines()[0]
        raise UserError(f'{where}: cannot be read ({reason})') from None
    raise UserError(f'{where}: not a folder, .zip, .npz or .npy of images')


def _image_names(files):
    """Sorted; names that begin with a dot are other programs' notes."""
    kinds = (*PICTURES, '.npy')
    return sorted(name for name in files if name.lower().endswith(kinds) and not os.path.basename(name).startswith('.'))


def _image_array(path):
    """(uint8 array of four axes, the channel axis of one image) in an .npy or .npz, whose other arrays are let be."""
    data = np.load(path, mmap_mode='r', allow_pickle=False)
    if isinstance(data, np.ndarray):
        arrays = [data]
    else:
        with data:
            arrays = [data[key] for key in data.files]
    images = [a[..., None] if a.ndim == 3 else a for a in arrays if a.dtype == np.uint8 and a.ndim in (3, 4)]
    if len(images) != 1:
        raise ValueError(f'expected one uint8 array [N,H,W], [N,H,W,C] or [N,C,H,W], found {len(images)}')
    channels_last, channels_first = (images[0].shape[axis] in (1, 3) for axis in (3, 1))
    if not channels_last and not channels_first:
        raise ValueError(f'neither the last nor the second axis of {list(images[0].shape)} is 1 or 3 channels')
    return images[0], 2 if channels_last else 0


def _decode(data, name):
    """File contents -> uint8 [C,H,W]: grey stays one channel, palettes become RGB."""
    if name.lower().endswith('.npy'):
        image = np.load(io.BytesIO(data), allow_pickle=False)
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f'{image.dtype} {list(image.shape)}, expected uint8 [C,H,W]')
        return image
    with PIL.Image.open(io.BytesIO(data)) as picture:
        if picture.mode not in ('L', 'RGB', 'P', '1'):
            raise ValueError(f'mode {picture.mode}, expected 8-bit grey or RGB; convert it with dataset_tool.py')
        picture = picture.convert({'P': 'RGB', '1': 'L'}.get(picture.mode, picture.mode))
        image = np.array(picture)
    return image[None] if image.ndim == 2 else np.ascontiguousarray(image.transpose(2, 0, 1))


# What Pillow, numpy and zipfile raise for files that are damaged or are something else.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError,
          PIL.Image.DecompressionBombError)
PROTOCOL_NUM = 50000  # the count of generated images behind published distances, which fall as it grows


class FileImages:
    """--gen-path, and how many of its images are evaluated."""

    def __init__(self, o):
        self._o, self._files = o, ImageFiles(o.gen_path, '--gen-path')
        self.shape, self.found = self._files.shape, len(self._files)
        self.count = choose_count(o, self.found, f'--gen-path={o.gen_path}: found {self.found} images')
        self.check_unchanged = self._files.check_unchanged
        self.facts = {'path': o.gen_path, 'sha256': digest_of(o.gen_path)}
        self.labels = [{}]
        if self.count < self.found:
            distributed.print0(f'evaluating the first {self.count} of {self.found} images, in sorted order')

    def repeats(self):
        """Yields this rank's batches, once."""
        yield self._files.batches(self._o.batch_size, self.count)


def digest_of(path):
    """SHA-256 of a file; None of a folder, whose files have a digest each and together none that others would find."""
    return file_digest(path) if os.path.isfile(path) else None


def ranges(numbers):
    """Whole numbers as IntList reads them: [0, 1, 2, 5] -> "0-2,5"."""
    numbers = sorted(set(numbers))
    starts = [n for i, n in enumerate(numbers) if not i or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ','.join(str(first) if first == last else f'{first}-{last}' for first, last in zip(starts, ends))


def choose_count(o, found, what):
    """How many generated images are evaluated; published distances need the published number unless told otherwise."""
    option = '--num-images' if 'TORCHELASTIC_RUN_ID' in os.environ else '--num'  # torchrun takes --num for its own --numa-binding
    if o.num is None and found != PROTOCOL_NUM:
        raise UserError(f'{what}, expected {PROTOCOL_NUM}; pass {option}={found} to evaluate these')
    count = o.num or found
    if count > found:
        raise UserError(f'{option}={count}: {what} only; pass {option}={found} or less')
    return count
