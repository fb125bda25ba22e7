# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py writes the same set packed as in pictures."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

import dataset_tool
from metrics.image_files import ImageFiles
from training.data.convert.readers.packed import PackedSource
from training.data.dataset import ImageDataset
from training.data.packed import Packed


def run(*args):
    result = CliRunner().invoke(dataset_tool.main, [str(arg) for arg in args])
    return result.exit_code, result.output


@pytest.fixture(params=[np.uint8, np.float32])
def source(tmp_path, request):
    """An .npy and tables of labels and levels."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(request.param)
    np.save(tmp_path / 'images.npy', images)
    for name, values in (('labels', (np.arange(12) % 3).tolist()), ('sigmas', np.linspace(0, 1, 12).tolist()), ('min', [0, 0.5] * 6),
                         ('max', [None, 0.7] * 6)):
        (tmp_path / f'{name}.json').write_text(json.dumps(values))
    return [f'--source={tmp_path}/images.npy', '--workers=1', *(f'--{option}={tmp_path}/{name}.json' for option, name in (
        ('labels', 'labels'), ('sigmas', 'sigmas'), ('sigma-min', 'min'), ('sigma-max', 'max')))]


@pytest.mark.parametrize('dest, flags', [('packed', ['--packed']), ('packed.npz', [])])
def test_packed_and_pictures_are_one_set(tmp_path, source, dest, flags):
    assert run(*source, f'--dest={tmp_path}/a.zip')[0] == 0
    code, said = run(*source, f'--dest={tmp_path}/{dest}', *flags)
    assert code == 0 and f'{dest}: 12 images' in said
    a, b = (ImageDataset(str(tmp_path / name), use_labels=True) for name in ('a.zip', dest))
    assert isinstance(b.contents, Packed) and a.form == b.form and a.is_float == b.is_float
    np.testing.assert_array_equal(np.stack([a.decode(i) for i in range(12)]), np.stack([b.decode(i) for i in range(12)]))
    for key in ('classes', 'native_sigma', 'sigma_min', 'sigma_max'):
        np.testing.assert_array_equal(getattr(a, key), getattr(b, key))
    assert run('stats', tmp_path / dest)[1].replace(dest, '') == run('stats', tmp_path / 'a.zip')[1].replace('a.zip', '')
    assert run('check', tmp_path / dest)[0] == 0


@pytest.mark.parametrize('dest, flags', [('packed', ['--packed']), ('packed.npz', [])])
def test_packed_sets_are_sources(tmp_path, source, dest, flags):
    """With all that they say: levels that went by the way would make noisy images count as clean."""
    assert run(*source, f'--dest={tmp_path}/a.zip')[0] == 0 and run(*source, f'--dest={tmp_path}/{dest}', *flags)[0] == 0
    code, said = run(f'--source={tmp_path}/{dest}', f'--dest={tmp_path}/b.zip', '--workers=2')
    assert code == 0, said
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()
    again = pickle.loads(pickle.dumps(PackedSource(str(tmp_path / dest))))
    np.testing.assert_array_equal(again.read(3), PackedSource(str(tmp_path / dest)).read(3))


@pytest.mark.parametrize('dest', ['packed', 'packed.npz'])
def test_metrics_read_packed_pictures(tmp_path, dest):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.save(tmp_path / 'images.npy', images)
    assert run(f'--source={tmp_path}/images.npy', f'--dest={tmp_path}/{dest}', '--packed', '--workers=1', '--sheet=none')[0] == 0
    found = ImageFiles(tmp_path / dest, '--gen-path')
    np.testing.assert_array_equal(np.stack([found[i] for i in range(12)]), images.transpose(0, 3, 1, 2))


def test_refusals(tmp_path, source):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').touch()
    (tmp_path / 'd.npz').mkdir()
    for dest, words in (('x.zip', 'packed data go into an .npz'), ('full', 'the folder is not empty'),
                        ('d.npz', 'is a folder; name a file')):
        code, said = run(*source, f'--dest={tmp_path}/{dest}', '--packed')
        assert code != 0 and words in said.splitlines()[-1]
    for name, shape in (('a', (4, 4)), ('b', (5, 4))):
        with zipfile.ZipFile(tmp_path / 'mixed.zip', 'a') as archive, archive.open(f'{name}.npy', 'w') as member:
            np.save(member, np.zeros(shape, np.float32))
    assert run(f'--source={tmp_path}/mixed.zip', f'--dest={tmp_path}/new.npz', '--on-bad=skip')[0] == 0
    assert Packed(str(tmp_path / 'new.npz')).count == 1
