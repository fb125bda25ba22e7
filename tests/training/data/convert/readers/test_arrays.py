# SPDX-License-Identifier: Apache-2.0
"""Splits of .npz files, and arrays that go to other processes."""

import pickle

import numpy as np
import pytest

from dnnlib import UserError
from training.data.convert.sources import open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (9, 6, 5), np.uint8)


@pytest.mark.parametrize('image_name, label_name, column', [('{}_images', '{}_labels', True), ('x_{}', 'y_{}', False)])
def test_splits_of_an_npz(tmp_path, image_name, label_name, column):
    """As MedMNIST and Keras lay them out."""
    splits = {'train': slice(0, 6), 'test': slice(6, 9)}
    labels = np.arange(9)[:, None] if column else np.arange(9)
    found = {image_name: IMAGES, label_name: labels}
    np.savez(tmp_path / 'x.npz', **{name.format(split): array[rows] for split, rows in splits.items() for name, array in found.items()})
    for split, rows in splits.items():
        source = open_source(f'{tmp_path}/x.npz:split={split}')
        assert source.labels == np.arange(9)[rows].tolist()
        assert all((source.read(i)[0] == image).all() for i, image in enumerate(IMAGES[rows]))
    for spec, text in (('', 'or split= to choose by'), (':split=val', 'needs an array val_images or x_val for split=val')):
        with pytest.raises(UserError, match=text):
            open_source(f'{tmp_path}/x.npz{spec}')


def test_a_mapped_array_is_mapped_again_in_another_process(tmp_path):
    np.save(tmp_path / 'x.npy', np.repeat(IMAGES, 50, axis=0))
    source = open_source(f'{tmp_path}/x.npy:sigma=0.5')
    data = pickle.dumps(source)
    assert len(data) < 2 * len(pickle.dumps((source.names, source.sigmas))) < IMAGES.nbytes * 50
    other = pickle.loads(data)
    assert other.sigmas == source.sigmas and (other.read(449) == IMAGES[8]).all()
    with pytest.raises(UserError, match='an .npy file is one array'):
        open_source(f'{tmp_path}/x.npy:split=test')
