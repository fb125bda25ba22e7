# SPDX-License-Identifier: Apache-2.0
"""MNIST's four files, by folder or one by one, and the split that is asked for."""

import gzip
import struct

import numpy as np
import pytest

from dnnlib import UserError
from training.data.convert.readers.mnist import MnistSource
from training.data.convert.sources import open_source

RNG = np.random.default_rng(0)
PARTS = {'train': (RNG.integers(0, 256, (5, 6, 4), np.uint8), np.arange(5, dtype=np.uint8)),
         't10k': (RNG.integers(0, 256, (3, 6, 4), np.uint8), np.arange(7, 10, dtype=np.uint8))}


def idx(array):
    return struct.pack('>HBB', 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


@pytest.fixture(params=[('-', ''), ('-', '.gz'), ('.', '')])
def folder(request, tmp_path):
    """Under a folder whose own name has the words that tell images from labels."""
    mark, packed = request.param
    place = tmp_path / 'images-idx3'
    place.mkdir()
    for part, (images, labels) in PARTS.items():
        for name, array in ((f'images{mark}idx3', images), (f'labels{mark}idx1', labels)):
            (place / f'{part}-{name}-ubyte{packed}').write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return place


def same(source, part):
    images, labels = PARTS[part]
    assert source.labels == labels.tolist() and len(source.names) == len(images)
    assert all((source.read(i)[0] == images[i]).all() for i in range(len(images)))


def test_splits_of_a_folder_and_of_its_files(folder):
    same(open_source(str(folder)), 'train')
    same(open_source(f'{folder}:split=train'), 'train')
    same(open_source(str(folder), split='test'), 't10k')
    for part, split in (('train', 'train'), ('t10k', 'test')):
        path = next(path for path in folder.iterdir() if path.name.startswith(f'{part}-images'))
        same(open_source(str(path)), part)
        same(open_source(f'{path}:split={split}'), part)
        other = {'train': 'test', 'test': 'train'}[split]
        with pytest.raises(UserError, match=f'split={other}: the file of this split has .* in its name; give that file'):
            open_source(f'{path}:split={other}')
    for path in folder.glob('t10k*'):
        path.unlink()
    with pytest.raises(UserError, match='no t10k-images-idx3-ubyte'):
        open_source(f'{folder}:split=test')


def test_what_is_refused(tmp_path):
    path = tmp_path / 'x-images-idx3-ubyte'
    for array, text in ((np.zeros([0, 4, 4]), 'no images'), (np.zeros([4]), r'shape \[4\], expected images')):
        path.write_bytes(idx(array.astype(np.uint8)))
        with pytest.raises(UserError, match=text):
            open_source(str(path))
    with pytest.raises(UserError, match='split=val is unknown; choose from train, test'):
        open_source(f'{path}:split=val')
    assert not MnistSource.matches(str(tmp_path))
