# SPDX-License-Identifier: Apache-2.0
"""MNIST's files: two zero bytes, the type, the number of dimensions, their sizes as big-endian 32 bits, then the data."""

import gzip
import math
import os
import re

import numpy as np

from dnnlib import UserError
from dnnlib.archive import MAX_DEFLATE
from training.data.convert.readers.arrays import ArraySource

SPLITS = {'train': 'train', 'test': 't10k'}  # what their files' names have


class MnistSource(ArraySource):
    """...images-idx3-ubyte(.gz), with the labels of ...labels-idx1-ubyte(.gz) beside it; or the folder of MNIST's four files.

    split: train or test (t10k), by default that of the file, or train."""

    what = 'MNIST\'s ...images-idx3-ubyte(.gz) or their folder'

    def __init__(self, path: str, split: str | None = None):
        if split not in (None, *SPLITS):
            raise UserError(f'--source={path}: split={split} is unknown; choose from {", ".join(SPLITS)}')
        folder, name = os.path.split(path)
        if os.path.isdir(path):
            folder, name = path, next(iter(_files(path, split or 'train')), None)
            if name is None:
                raise ValueError(f'no {SPLITS[split or "train"]}-images-idx3-ubyte(.gz) in it')
        elif split and SPLITS[split] not in name.lower():
            raise UserError(f'--source={path}: split={split}: the file of this split has {SPLITS[split]} in its name; give that file, '
                            'or the folder of all files')
        images = read_idx(os.path.join(folder, name))
        if images.ndim != 3:
            raise ValueError(f'an array of shape {list(images.shape)}, expected images [N,H,W]')
        partner = name.replace('images', 'labels').replace('idx3', 'idx1')
        beside = partner != name and os.path.exists(os.path.join(folder, partner))
        labels = read_idx(os.path.join(folder, partner)).tolist() if beside else None
        if labels is not None and len(labels) != len(images):
            raise ValueError(f'{len(images)} images, but {len(labels)} labels in {partner}')
        self.hold(images[:, None], labels)

    @staticmethod
    def matches(path: str) -> bool:
        """By the ending of the name; of folders, by the names of MNIST's files in them."""
        if os.path.isdir(path):
            return any(_files(path, split) for split in SPLITS)
        return bool(re.search(r'idx3-ubyte(\.gz)?$', path.lower()))


def _files(folder, split):
    """The files of a split's images in a folder, by the names that MNIST's have."""
    names = [f'{SPLITS[split]}-images{mark}idx3-ubyte{packed}' for mark in '-.' for packed in ('', '.gz')]
    return [name for name in names if os.path.isfile(os.path.join(folder, name))]


def read_idx(path: str) -> np.ndarray:
    """The array in an idx file of unsigned bytes, uint8. Raises ValueError and errors of gzip."""
    packed = path.endswith('.gz')
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
