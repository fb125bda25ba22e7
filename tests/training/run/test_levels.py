# SPDX-License-Identifier: Apache-2.0
"""The check of stated noise levels at the start of a run."""

import numpy as np
import pytest

from tests.support.fields import smooth
from training.data.convert.rewrite import replace_levels
from training.data.convert.writers import ArchiveWriter, encode_png
from training.data.dataset import ImageDataset
from training.run.levels import warning


@pytest.fixture
def data(tmp_path):
    """128 pictures with noise of 0.2, of half that on every second one, and the function that states levels for them."""
    level = np.where(np.arange(128) % 2, 0.2, 0.1)
    images = smooth(128) + level[:, None, None, None] * np.random.default_rng(0).standard_normal((128, 3, 32, 32))
    with ArchiveWriter(tmp_path / 'a.zip') as out:
        for index, image in enumerate(images):
            out.write(f'{index:04}.png', encode_png(np.rint((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8)))
        out.write_json('dataset.json', {'labels': None})

    def state(levels):
        path = str(tmp_path / 'a.zip')
        replace_levels(path, path, {'sigmas': [float(one) for one in levels]}, [f'{index:04}.png' for index in range(128)])
        return warning(ImageDataset(tmp_path / 'a.zip'))
    return level, state


def test_right_levels_are_silent(data):
    level, state = data
    assert state(level) is None
    assert state(np.where(level > 0.15, level, 0)) is None  # the others count as clean, and are not looked at
    assert state(1.05 * level) is None
    assert state(0 * level) is None


@pytest.mark.parametrize('factor', [0.5, 0.8, 1.2])
def test_wrong_levels_are_told(data, factor):
    level, state = data
    assert 'may be wrong' in state(factor * level)
    told = state(np.where(level > 0.15, factor * level, 0))
    assert f'states {0.2 * factor:.3g} ' in told and 'docs/noise.md' in told


def test_clean_images_that_are_said_to_be_noisy(tmp_path):
    with ArchiveWriter(tmp_path / 'a.zip') as out:
        for index, image in enumerate(smooth(80)):
            out.write(f'{index:04}.png', encode_png(np.rint((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8)))
        out.write_json('dataset.json', {'sigmas': [[f'{index:04}.png', 0.2] for index in range(80)]})
    assert 'look clean' in warning(ImageDataset(tmp_path / 'a.zip'))


def test_low_levels_and_few_images_are_not_checked(data):
    level, state = data
    assert state(np.full(128, 0.01)) is None
    few = np.where(np.arange(128) < 20, 0.5, 0)
    assert state(few) is None
