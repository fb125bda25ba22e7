# SPDX-License-Identifier: Apache-2.0
"""Units of each channel: given, proposed, kept, told by stats, and what levels mean under them."""

import json
import zipfile

import numpy as np
import pytest

from tests.test_dataset_tool import convert, refusal, run
from training.data.dataset import ImageDataset

RNG = np.random.default_rng(0)
OFFSET, SCALE = np.array([280.0, -0.4, 1e5]), np.array([24.0, 0.02, 2e3])  # temperature, humidity, pressure, say
IMAGES = (RNG.normal(0, 0.5, (20, 3, 9, 8)) * SCALE[:, None, None] + OFFSET[:, None, None]).astype(np.float32)
GIVEN = '--units=' + '/'.join(f'{offset},{scale}' for offset, scale in zip(OFFSET, SCALE))


def meta_of(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read('dataset.json'))


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / 'x.npy', IMAGES)
    return tmp_path / 'x.npy'


def test_proposed_for_each_channel(tmp_path, source):
    """Mean 0 and std 0.5 in network units in every channel; the common proposal is that of the largest one."""
    convert(source, tmp_path / 'x.zip', '--units=channel', '--layout=nchw')
    dataset = ImageDataset(str(tmp_path / 'x.zip'))
    values = IMAGES.astype(np.float64)
    np.testing.assert_allclose(dataset.units['offset'], values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(dataset.units['scale'], 2 * values.std((0, 2, 3)), rtol=1e-6)
    network = np.stack([dataset.to_network(dataset.decode(i)) for i in range(20)])
    assert abs(network.mean((0, 2, 3))).max() < 1e-3 and abs(network.std((0, 2, 3)) - 0.5).max() < 1e-3
    said = run('stats', tmp_path / 'x.zip').output
    assert 'sigma_data  0.5000' in said and '[280' in said and f'{IMAGES.min():g} to {IMAGES.max():g} stored' in said
    network_range = f'{network.min():.4g} to {network.max():.4g} in network units'
    assert network_range in said and all((dataset.decode(i) == IMAGES[i]).all() for i in range(20))


def test_given_for_each_channel_and_kept(tmp_path, source):
    convert(source, tmp_path / 'x.zip', GIVEN, '--sigmas=0.2', '--layout=nchw')
    assert meta_of(tmp_path / 'x.zip')['units'] == {'offset': OFFSET.tolist(), 'scale': SCALE.tolist()}
    assert ImageDataset(str(tmp_path / 'x.zip')).native_sigma.tolist() == [0.2] * 20  # white in network units alone
    convert(tmp_path / 'x.zip', tmp_path / 'again.zip', '--max-images=2')
    again = meta_of(tmp_path / 'again.zip')
    assert again['units'] == meta_of(tmp_path / 'x.zip')['units'] and [value for _, value in again['sigmas']] == [0.2, 0.2]
    for spec in (f'{source}:sigma=0.1,layout=nchw', f'{tmp_path}/again.zip'):  # levels in the units of the whole set
        convert(spec, tmp_path / 'two.zip', f'--source={tmp_path}/x.zip', GIVEN)
        assert ImageDataset(str(tmp_path / 'two.zip')).native_sigma[-20:].tolist() == [0.2] * 20


def test_eight_bit_channels_may_have_proposed_units(tmp_path):
    images = RNG.integers(0, 256, (4, 5, 8, 8), np.uint8)
    np.save(tmp_path / 'x.npy', images)
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip', '--units=channel')
    np.testing.assert_allclose(meta_of(tmp_path / 'x.zip')['units']['offset'], images.mean((0, 2, 3)))


def test_what_is_refused(tmp_path, source):
    convert(source, tmp_path / 'own.zip', GIVEN, '--sigmas=0.2', '--layout=nchw')
    convert(source, tmp_path / 'common.zip', '--units=0,5', '--sigmas=0.2', '--layout=nchw')
    for args, texts in [
            ([f'--source={source}', '--units=channel', '--sigmas=1'], ['--units=channel', 'network units', '--units=0,1/10,2']),
            ([f'--source={source}', '--units=0,1/0,2'], ['are for 2 channels', 'the images have 3']),
            ([f'--source={tmp_path}/own.zip', '--channels=1', '--sigmas=0'], ['are for 3 channels', 'the images have 1']),
            ([f'--source={source}', '--units=0,1/0'], ['0,1/0', 'OFFSET,SCALE']),
            ([f'--source={source}', '--units=channels'], ['"channel"']),
            ([f'--source={source}', '--units=0,1/0,0/0,1'], ['more than 0']),
            ([f'--source={tmp_path}/own.zip', '--units=0,1'], ['"sigmas" of the source', '--sigmas']),
            ([f'--source={tmp_path}/common.zip', GIVEN], ['"sigmas" of the source', '--sigmas']),
            ([f'--source={tmp_path}/common.zip', f'--source={tmp_path}/own.zip'], ['units differ']),
            ([f'--source={tmp_path}/common.zip', f'--source={tmp_path}/own.zip', '--units=0,1'], ['own.zip has channels of different'])]:
        line = refusal(*args, f'--dest={tmp_path}/no.zip', '--workers=1', *(['--layout=nchw'] if str(source) in args[0] else []))
        assert all(text in line for text in texts), line
    assert not (tmp_path / 'no.zip').exists()
    convert(tmp_path / 'own.zip', tmp_path / 'yes.zip', '--units=0,5', '--sigmas=1')  # levels anew are in these units
    assert ImageDataset(str(tmp_path / 'yes.zip')).native_sigma.tolist() == [0.2] * 20
