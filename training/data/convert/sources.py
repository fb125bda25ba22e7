# SPDX-License-Identifier: Apache-2.0
"""What dataset_tool.py can read: folders, zips, CIFAR-10's tar file, MNIST's idx files, arrays, scikit-learn's digits.

A source has `names` (one an image), `labels`, `sigmas`, `sigma_max` (one an image, or None), `units` ({offset, scale} or None),
kind(i) -> Kind, cheaply, and read(i) -> array [C,H,W] of kind(i)'s shape and type."""

import gzip
import lzma
import math
import os
import re
import tarfile
from typing import NamedTuple

import numpy as np

from dnnlib import UserError, arrays, pictures
from dnnlib.archive import DAMAGE, IMAGES, MAX_DEFLATE, RARER_IMAGES, Archive, damage, decode_image, open_picture
from training.data import tables
from training.data.convert import cifar

LAYOUTS = {'nhw': (0, 1, 2), 'nhwc': (0, 3, 1, 2), 'nchw': (0, 1, 2, 3)}  # axes in the order N, (C,) H, W


class Kind(NamedTuple):
    """What an image is before anything is done to it."""

    channels: int
    height: int
    width: int
    is_8bit: bool
    mode: str

    def __str__(self):
        return f'{self.width}x{self.height} {self.mode}'


def open_source(path, layout=None):
    """The source at a path, told by its name. layout: nhw, nhwc or nchw, for arrays. Raises UserError."""
    name = os.path.basename(str(path)).lower()
    if str(path) == 'digits':
        return _digits()
    if not os.path.exists(path):
        raise UserError(f'--source={path}: no such file or folder (nor is it the word "digits")')
    if os.path.isdir(path) or name.endswith('.zip'):
        return FileSource(path)
    for pattern, opener in ((r'\.(tar\.gz|tgz|tar)$', _cifar), (r'idx3-ubyte(\.gz)?$', _idx), (r'\.np[yz]$', _array)):
        if re.search(pattern, name):
            try:
                return opener(path, layout)
            except (*DAMAGE, tarfile.TarError, lzma.LZMAError) as err:
                raise UserError(f'--source={path}: cannot be read ({damage(err)})') from None
    raise UserError(f'--source={path}: not a folder, .zip, cifar-10-python.tar.gz, ...idx3-ubyte(.gz), .npy, .npz or '
                    '"digits"')


class FileSource:
    """Image files of a folder or zip. A dataset.json gives labels, levels and units; else the top folders are the classes."""

    def __init__(self, path):
        self._archive = Archive(path, f'--source={path}')
        self.names = self._archive.images((*IMAGES, *RARER_IMAGES))
        meta = self._archive.read_json()
        self.units = _units(meta.get('units'), path)
        self.labels, self.sigmas, self.sigma_max = (match(meta[key], self.names, f'"{key}" in {path}') if meta.get(key) else None
                                                    for key in ('labels', 'sigmas', 'sigma_max'))
        if 'labels' not in meta:
            self.labels = _folder_classes(self.names)

    def kind(self, index):
        """The Kind of an image, from the header of its file."""
        name = self.names[index]
        if name.lower().endswith('.npy'):
            array = self.read(index)
            return Kind(*array.shape, array.dtype == np.uint8, str(array.dtype))
        data = self._archive.read(name)
        image = open_picture(data)
        return Kind(*pictures.header(image, data), image.mode)

    def read(self, index):
        """The image, [C,H,W], as decode_image gives it."""
        name = self.names[index]
        return decode_image(name, self._archive.read(name))


def _units(told, path):
    try:
        return None if told is None else tables.units(told)
    except (KeyError, ValueError):
        raise UserError(f'--source={path}: "units" in its dataset.json must be {{"offset": ..., "scale": ...}}, two finite numbers, the '
                        'scale above 0') from None


class ArraySource:
    """Images that lie in one array [N,C,H,W]."""

    sigmas = sigma_max = units = None

    def __init__(self, images, labels=None):
        self._images, self.labels = images, labels
        self.names = [str(i) for i in range(len(images))]

    def kind(self, index):
        """The Kind that all images share."""
        return Kind(*self._images.shape[1:], self._images.dtype == np.uint8, str(self._images.dtype))

    def read(self, index):
        """An image, [C,H,W]."""
        return np.asarray(self._images[index])


def _folder_classes(names):
    """Class numbers by sorted top folder, or None where there are fewer than two of them (as published)."""
    tops = [name.split('/')[0] if '/' in name else '' for name in names]
    numbers = {top: number for number, top in enumerate(sorted(set(tops)))}
    return [numbers[top] for top in tops] if len(numbers) > 1 else None


def _digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('--source=digits needs scikit-learn: pip install scikit-learn') from None
    found = load_digits()
    images = np.round(found.images * 255 / 16).astype(np.uint8)  # 17 grey levels, 0 to 16
    return ArraySource(images[:, None], found.target.tolist())


def _cifar(path, layout):
    """The training batches of cifar-10-python.tar.gz."""
    return ArraySource(*cifar.read(path))


def _idx(path, layout):
    """MNIST's format: two zero bytes, type, number of dimensions, their sizes as big-endian 32 bits, then the data."""
    images = _read_idx(path)
    partner = str(path).replace('images', 'labels').replace('idx3', 'idx1')
    labels = _read_idx(partner).tolist() if os.path.exists(partner) and partner != str(path) else None
    if labels is not None and len(labels) != len(images):
        raise ValueError(f'{len(images)} images, but {len(labels)} labels in {partner}')
    return ArraySource(images[:, None], labels)


def _read_idx(path):
    packed = str(path).endswith('.gz')
    most = os.path.getsize(path) * (MAX_DEFLATE if packed else 1)
    with (gzip.open if packed else open)(path, 'rb') as file:
        head = file.read(4)
        sizes = file.read(4 * head[3]) if head[:3] == b'\0\0\x08' and len(head) == 4 else b''
        if not sizes or len(sizes) < 4 * head[3]:
            raise ValueError('not an idx file of unsigned bytes')
        shape = np.frombuffer(sizes, '>u4').tolist()
        count = math.prod(shape)
        data = file.read(count + 1) if count <= most else b''  # one more than there should be
    if len(data) != count:
        raise ValueError(f'not of the length that the shape {shape} in its header needs')
    return np.frombuffer(data, np.uint8).reshape(shape)


def _array(path, layout):
    if str(path).lower().endswith('.npy'):
        return ArraySource(_as_nchw(arrays.open_npy(path), layout, path))
    found = {name.removesuffix('.npy'): array for name, array in _npz(path)}
    keys = [key for key, array in found.items() if array.ndim in (3, 4)]
    images = 'images' if 'images' in keys else keys[0] if len(keys) == 1 else None
    if images is None:
        raise ValueError(f'needs an array "images", or one of three or four dimensions; it has {", ".join(found)}')
    source = ArraySource(_as_nchw(found[images], layout, path), found['labels'].tolist() if 'labels' in found else None)
    if source.labels is not None and not (isinstance(source.labels, list) and len(source.labels) == len(source.names)):
        raise ValueError(f'{len(source.names)} images, but {np.size(source.labels)} labels')
    return source


def _npz(path):
    """(name, array) of the arrays in an .npz, which is a zip file of .npy files."""
    archive = Archive(path, f'--source={path}')
    for name in archive.names:
        if name.endswith('.npy'):
            yield name, arrays.from_bytes(archive.read(name, most=None))


def _as_nchw(images, layout, path):
    """Any layout as [N,C,H,W]. Without a word on it, the channels are the one axis that is smaller than the other two."""
    if images.ndim not in (3, 4) or images.dtype.kind not in 'uif' or images.size == 0:
        raise UserError(f'--source={path}: {images.dtype} of shape {list(images.shape)}; expected numbers '
                        '[N,H,W], [N,H,W,C] or [N,C,H,W]')
    if layout is None and images.ndim == 4:
        smallest = lambda axis: images.shape[axis] < min(np.delete(images.shape[1:], axis - 1))
        fits = [name for name, axis in (('nchw', 1), ('nhwc', 3)) if smallest(axis)]
        if len(fits) != 1:
            raise UserError(f'--source={path}: shape {list(images.shape)} may be [N,H,W,C] or [N,C,H,W]; '
                            'say --layout=nhwc or --layout=nchw')
        layout = fits[0]
    layout = layout or 'nhw'
    if len(layout) != images.ndim:
        raise UserError(f'--layout={layout}: the array in {path} has shape {list(images.shape)}')
    images = images.transpose(LAYOUTS[layout])
    return images[:, None] if layout == 'nhw' else images


def match(table, names, where):
    """The values of a table in the order of the names. table: [[name, value], ...], {name: value}, or values in order.

    Names may be given without their folders. Raises UserError where a file is missed or the count differs."""
    if not isinstance(table, (list, tuple, dict)):
        raise UserError(f'{where}: expected a list or an object, got {type(table).__name__}')
    pairs = list(table.items()) if isinstance(table, dict) else list(table)
    by_name = all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
    if not by_name:
        if len(pairs) != len(names):
            raise UserError(f'{where}: {len(pairs)} values for {len(names)} images; give one an image, in their order')
        return pairs
    found = {name.replace('\\', '/'): value for name, value in pairs}
    keys = [name if name in found else os.path.basename(name) for name in names]
    missing = [name for name, key in zip(names, keys) if key not in found]
    if missing:
        raise UserError(f'{where}: misses {len(missing)} of {len(names)} images, such as {missing[0]}')
    return [found[key] for key in keys]
