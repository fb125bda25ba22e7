# SPDX-License-Identifier: Apache-2.0
"""Images in a data set of an HDF5 file, read a few rows at a time."""

import contextlib
import os

import numpy as np

from dnnlib import UserError
from dnnlib.archive import MAX_DEFLATE, MAX_MEMBER
from training.data.convert.readers.arrays import LAYOUTS, find_layout
from training.data.convert.readers.formats import Opened, guarded, head, needs, physical, sized
from training.data.convert.readers.source import Kind, Source

MAGIC = b'\x89HDF\r\n\x1a\n'
LABELS = ('labels', 'label', 'y', 'targets', 'target', 'classes')  # names of data sets beside the images, if none is given
LEVELS = {'sigmas': ('sigmas', 'sigma'), 'sigma_min': ('sigma_min',), 'sigma_max': ('sigma_max',)}
BLOCK = 2 ** 26  # bytes, at most, that are read and kept at a time
ROWS = 16  # rows read at a time if the file has no chunks
MAX_NOTES = 2 ** 28  # bytes of labels
MOST_OBJECTS = 100_000  # groups and data sets examined to find the images


class Hdf5Source(Source):
    """A data set of three or four dimensions in an HDF5 file; `key` chooses if there are several.

    key, label_key: paths of images and labels in the file; by default the only images, or those called "images", and what lies beside
    them as "labels", "label" or "y"; "sigmas", "sigma_min" and "sigma_max" beside them are levels. layout: as for arrays."""

    what = 'HDF5'

    def __init__(self, path: str, key: str | None = None, label_key: str | None = None, layout: str | None = None):
        needs('h5py', path)
        if layout not in (None, *LAYOUTS):
            raise UserError(f'--source={path}: layout={layout} is unknown; choose from {", ".join(LAYOUTS)}')
        with guarded():
            file = _open(path)
            with contextlib.closing(file):
                key = _images(file, key)
                images = _whole(file, key)
                self._layout = find_layout(images, layout, path)
                shape = [images.shape[axis] for axis in LAYOUTS[self._layout]]
                self._kind = sized(*([1, *shape[1:]] if self._layout == 'nhw' else shape[1:]), images.dtype)
                self.names = [str(i) for i in range(shape[0])]
                self.labels = _labels(file, key, label_key, shape[0])
                for name, choices in LEVELS.items():
                    found = _beside(file, key, choices)
                    setattr(self, name, found and _numbers(file, found, shape[0]))
        self._rows = Opened(_Rows, path, key)

    @staticmethod
    def matches(path: str) -> bool:
        """By the ending of the name, or the first bytes."""
        return os.path.isfile(path) and (path.lower().endswith(('.h5', '.hdf5', '.hdf', '.he5')) or head(path, 8) == MAGIC)

    def kind(self, index: int) -> Kind:
        """The Kind that all images share."""
        return Kind(*self._kind)

    def read(self, index: int) -> np.ndarray:
        """An image, [C,H,W]: uint8 where it is stored so, else float32."""
        with guarded():
            row = self._rows().row(index)
        axes = LAYOUTS[self._layout]
        return physical(row[None] if self._layout == 'nhw' else row.transpose([axis - 1 for axis in axes[1:]]))


class _Rows:
    """The rows of a data set: those that share chunks are read, and kept, together."""

    def __init__(self, path, key):
        self._file = _open(path)
        self.close = self._file.close
        self._images = self._file[key]
        size = max(self._images.dtype.itemsize * int(np.prod(self._images.shape[1:], dtype=np.int64)), 1)
        rows = self._images.chunks[0] if self._images.chunks else ROWS
        self._count, self._first, self._block = max(1, min(rows, BLOCK // size)), 0, ()

    def row(self, index):
        if not self._first <= index < self._first + len(self._block):
            self._first = index // self._count * self._count
            self._block = self._images[self._first:self._first + self._count]
        return self._block[index - self._first]


def _open(path):
    import h5py
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401 (compressions that HDF5 alone does not know)
    return h5py.File(path, 'r', locking='best-effort')


def _images(file, key):
    """The path of the images in a file."""
    key = None if key is None else str(key).strip('/')
    if key and key in file and hasattr(file[key], 'shape'):
        return key
    found = {name: f'{name} {item.dtype} {list(item.shape)}' for name, item in sorted(_data_sets(file), key=lambda pair: pair[0])
             if item.ndim in (3, 4) and item.dtype.kind in 'uif' and item.size}
    if key is not None:
        raise ValueError(f'no data set "{key}"; it has {", ".join(list(found.values())[:20]) or "none of three or four dimensions"}')
    named = [name for name in found if name.split('/')[-1] == 'images']
    if len(found) != 1 and len(named) != 1:
        told = '; '.join(list(found.values())[:20])
        raise ValueError(f'several data sets may be the images: {told}; give key= one of them' if found else
                         'no data set of numbers with three or four dimensions in it')
    return named[0] if len(named) == 1 else next(iter(found))


def _data_sets(file):
    """(path, data set) of the data sets in this file. HDF5's own traversal does not end for some damaged files."""
    import h5py
    groups, seen = [('', file)], set()
    while groups:
        above, group = groups.pop()
        for name in group:
            if len(seen) > MOST_OBJECTS:
                raise ValueError(f'it has more than {MOST_OBJECTS} groups and data sets; give the path of the images with key=')
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item = group[name]
            place = h5py.h5o.get_info(item.id).addr
            if place not in seen:
                seen.add(place)
                if isinstance(item, h5py.Group):
                    groups.append((f'{above}{name}/', item))
                elif isinstance(item, h5py.Dataset):
                    yield above + name, item


def _whole(file, key):
    """A data set whose values are all stored in this file. Raises ValueError."""
    item = file[key]
    if item.file.filename != file.filename or item.is_virtual or item.external:
        raise ValueError(f'{key} is stored in another file; copy both into one')
    chunk = int(np.prod(item.chunks or [0], dtype=object)) * item.dtype.itemsize
    if chunk > MAX_MEMBER:
        raise ValueError(f'{key} has chunks of {chunk} bytes, more than the limit of {MAX_MEMBER}; make them smaller (h5repack)')
    size = int(np.prod(item.shape, dtype=object)) * item.dtype.itemsize
    stored = item.id.get_storage_size()
    if size > stored * (MAX_DEFLATE if item.chunks else 1) or size and stored > os.path.getsize(file.filename):
        raise ValueError(f'{key} claims {size} bytes of values, but only {stored} are stored')
    return item


def _beside(file, key, choices):
    """The path of the first of these names in the group of the images, or None."""
    above = key.rpartition('/')[0]
    names = [f'{above}/{name}'.lstrip('/') for name in choices]
    return next((name for name in names if name in file and hasattr(file[name], 'shape')), None)


def _labels(file, key, label_key, count):
    """Classes, names of them, or vectors of the images; None without."""
    found = _beside(file, key, LABELS) if label_key is None else str(label_key).strip('/')
    if found is None:
        return None
    if found not in file or not hasattr(file[found], 'shape'):
        raise ValueError(f'no data set "{found}"')
    return _numbers(file, found, count)


def _numbers(file, key, count):
    """A data set with one value, or vector, per image as a list."""
    import h5py
    item = _whole(file, key) if file[key].dtype.kind != 'O' else file[key]
    if item.shape[:1] != (count,):
        raise ValueError(f'{count} images, but {key} is of shape {list(item.shape)}')
    if item.size * item.dtype.itemsize > MAX_NOTES:
        raise ValueError(f'{key} has {item.size} values, more than the limit')
    text = h5py.check_string_dtype(item.dtype) is not None
    values = (item.asstr() if text else item)[()]
    values = values.reshape([side for k, side in enumerate(values.shape) if k == 0 or side > 1])
    return values.tolist()
