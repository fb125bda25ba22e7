# SPDX-License-Identifier: Apache-2.0
"""Float pictures in the units of 8-bit ones: noisy or restored photographs, whose networks are networks of pictures."""

import json
import zipfile

import numpy as np
import pytest

from training.data.convert.writers import encode_npy
from training.data.dataset import UNITS_8BIT, ImageDataset

PLAIN = {'offset': 0.0, 'scale': 1.0}


def dataset(path, channels, units):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.npy', encode_npy(np.full((channels, 2, 2), 255.0)))
        archive.writestr('dataset.json', json.dumps({'units': units, 'sigmas': {'a.npy': 51.0}}))
    return ImageDataset(path)


@pytest.mark.parametrize(('channels', 'units', 'expected'), [
    (1, UNITS_8BIT, None), (3, UNITS_8BIT, None), (4, UNITS_8BIT, UNITS_8BIT), (3, PLAIN, PLAIN)])
def test_form_that_networks_get(tmp_path, channels, units, expected):
    assert dataset(tmp_path / 'data.zip', channels, units).form.units == expected


def test_their_values_and_levels_are_in_their_own_units(tmp_path):
    found = dataset(tmp_path / 'data.zip', 3, UNITS_8BIT)
    assert found.units == UNITS_8BIT and found.native_sigma == pytest.approx([0.4])
    assert (found.to_network(found.decode(0)) == 1).all()
