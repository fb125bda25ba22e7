# SPDX-License-Identifier: Apache-2.0
"""MNIST's files: two zero bytes, the type, the number of dimensions, their sizes as big-endian 32 bits, then the data."""

import gzip
import math
import os
import re

import numpy as np

from dnnlib.archive import MAX_DEFLATE
from training.data.convert.arrays import ArraySource


class MnistSource(ArraySource):
    """...images-idx3-ubyte(.gz), with the labels of ...labels-idx1-ubyte(.gz) beside it."""

    what = 'MNIST\'s ...idx3-ubyte(.gz)'

    def __init__(self, path):
        images = read_idx(path)
        folder, name = os.path.split(path)
        partner = os.path.join(folder, name.replace('images', 'labels').replace('idx3', 'idx1'))
        labels = read_idx(partner).tolist() if os.path.exists(partner) and partner != path else None
        if labels is not None and len(labels) != len(images):
            raise ValueError(f'{len(images)} images, but {len(labels)} labels in {partner}')
        self.hold(images[:, None], labels)

    @staticmethod
    def matches(path):
        """By the ending of the name."""
        return bool(re.search(r'idx3-ubyte(\.gz)?$', path.lower()))


def read_idx(path):
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
