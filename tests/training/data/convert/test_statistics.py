# SPDX-License-Identifier: Apache-2.0
"""The table of a data set: one pass gives what numpy gives of all values at once; converting and `stats` say the same."""

import math

import numpy as np
import pytest

from tests.test_dataset_tool import convert, picture_folder, pictures, refusal, run
from training.data.convert.statistics import Facts, Summary, facts_of, lines, measure


@pytest.mark.parametrize('images', [
    np.random.default_rng(0).integers(0, 256, (23, 3, 5, 7), np.uint8),
    np.random.default_rng(0).normal([[[[1e4]], [[-3]]]], 2, (23, 2, 5, 7)).astype(np.float32)])
def test_a_summary_is_that_of_all_values(images):
    whole, parts = Summary(), [Summary() for _ in range(3)]
    for i, image in enumerate(images):
        whole.add(measure(image))
        parts[i // 8].add(measure(image))
    merged = Summary()
    for part in (Summary(), *parts):
        merged.merge(part)
    values = images.astype(np.float64)
    for found in (whole, merged):
        assert found.count == 23 and found.alike() == (0, None)
        np.testing.assert_array_equal([found.low, found.high], [values.min((0, 2, 3)), values.max((0, 2, 3))])
        np.testing.assert_allclose([found.mean, found.std], [values.mean((0, 2, 3)), values.std((0, 2, 3))], rtol=1e-9)


def test_images_that_are_alike_are_counted():
    images = pictures(6, (3, 4, 4))
    found = Summary()
    for number in (0, 1, 2, 1, 3, 1, 0):
        found.add(measure(images[number]))
    assert found.alike() == (3, (0, 6))
    facts = Facts([f'{i}.png' for i in range(7)], (3, 4, 4), False, None, None, 0, np.zeros(7), np.zeros(7), np.full(7, math.inf))
    assert 'duplicates  3 images have the same pixels as another one, such as 6.png and 0.png' in list(lines(found, facts))


def test_units_of_each_channel():
    """Network units are (stored - offset) / scale, whether one pair is given or one a channel."""
    images = np.random.default_rng(0).normal([[[[300]], [[-3]]]], [[[[7]], [[2]]]], (50, 2, 8, 8)).astype(np.float32)
    found, names = Summary(), [f'{i}.npy' for i in range(50)]
    for image in images:
        found.add(measure(image))
    none = np.zeros(50), np.zeros(50), np.full(50, math.inf)
    facts = Facts(names, (2, 8, 8), True, {'offset': [300, -3], 'scale': [14, 4]}, None, 0, *none)
    network = (images.astype(np.float64) - [[[300]], [[-3]]]) / [[[14]], [[4]]]
    text = '\n'.join(lines(found, facts))
    assert f'sigma_data  {network.std():.4f}' in text and '(stored - [300, -3]) / [14, 4]' in text
    assert f'{network.min():.4g} to {network.max():.4g} in network units' in text


def test_levels_and_classes():
    names = [f'{i}.png' for i in range(30)]
    meta = {'labels': [[name, i % 25] for i, name in enumerate(names)], 'sigmas': {name: 0.1 * (i < 3) for i, name in enumerate(names)},
            'sigma_min': [[name, 0.5 if i < 4 else None] for i, name in enumerate(names)],
            'sigma_max': [[name, 0.1 if i < 5 else None] for i, name in enumerate(names)]}
    facts, found = facts_of(meta, names, (1, 2, 2), False, {3: 'dog'}), Summary()
    for image in pictures(30, (1, 2, 2)):
        found.add(measure(image))
    text = '\n'.join(lines(found, facts))
    for part in ('sigmas      3 of 30 images are noisy; min 0, median 0, mean 0.01, max 0.1',
                 'sigma_min   4 of 30 images have a lower limit; min 0.5', 'sigma_max   5 of 30 images have an upper limit; min 0.1',
                 '25 classes, 1 to 2 images each, median 1', 'most  0: 2, 1: 2, 2: 2, 3 dog: 2, 4: 2', 'least 20: 1'):
        assert part in text, text
    assert 'never be used' not in text  # those that are too noisy below their upper limit teach above the lower one


def test_converting_says_what_stats_says(tmp_path):
    folder = picture_folder(tmp_path / 'in', pictures(12), [f'{"cat" if i % 3 else "dog"}/{i:02}.png' for i in range(12)])
    values = np.random.default_rng(0).normal(300, 7, (9, 5, 6, 6)).astype(np.float32)
    np.save(tmp_path / 'f.npy', np.concatenate([values, values[:1]]))
    for source, args in ((folder, ['--sigmas=0.1', '--sigma-max=0.5']), (tmp_path / 'f.npy', ['--sigmas=2'])):
        said = convert(source, tmp_path / 'x.zip', *args)
        for name in ('0 cat', '1 dog'):
            said = said.replace(f'            {name}', f'            {name[0]}')
        for line in run('stats', tmp_path / 'x.zip').output.splitlines():
            assert line in said, line
    assert 'duplicates  1 images have the same pixels as another one' in said


def test_stats_of_eight_bit_images(tmp_path):
    images = pictures(12, (16, 16, 3))
    folder = picture_folder(tmp_path / 'in', images, [f'{"ab"[i % 2]}/{i:02}.png' for i in range(12)])
    convert(folder, tmp_path / 'x.zip')
    result = run('stats', tmp_path / 'x.zip', '--sigma=0.2')
    network = images / 127.5 - 1
    db = 10 * np.log10(network.std() ** 2 / 0.04)
    for text in ('images      12', '3 x 16 x 16', 'uint8', f'sigma_data  {network.std():.4f}',
                 f'mean        {network.mean():.4f}', '2 classes, 6 to 6 images each', '            0  6  ' + 40 * '#', 'duplicates  none',
                 '14.15 dB', f'{db:.2f} dB'):
        assert text in result.output, result.output


def test_stats_of_noisy_floats(tmp_path):
    """sigma_data without the native noise: the signal's 0.5 is recovered from data whose noise has std 0.25."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / 'x.npy', (rng.normal(10, 2, (30, 32, 32)) + rng.normal(0, 1, (30, 32, 32))).astype(np.float32))
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip', '--units=10,4', '--sigmas=1')
    output = run('stats', tmp_path / 'x.zip').output
    signal = float(output.split('without the noise')[0].split()[-1])
    assert abs(signal - 0.5) < 5 * 0.5 / np.sqrt(2 * 30 * 1024) * 1.25
    assert '30 of 30 images are noisy; min 0.25' in output and 'float32' in output


def test_stats_of_nothing(tmp_path):
    assert 'no such zip file or folder' in refusal('stats', tmp_path / 'none.zip')
