# SPDX-License-Identifier: Apache-2.0
"""Pictures are decoded once, and what was decoded is known by the data alone."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from dnnlib import UserError
from tests.support import ROOT
from training.data import cache, contents
from training.data.cache import decode, open_contents
from training.data.contents import Pictures
from training.data.convert.writers import encode_png
from training.data.dataset import ImageDataset
from training.data.packed import Packed


def make_zip(path, count=30, seed=0, **tables):
    images = np.random.default_rng(seed).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8)
    names = [f'{i:03}.png' for i in range(count)]
    with zipfile.ZipFile(path, 'w') as archive:
        for name, image in zip(names, images):
            archive.writestr(zipfile.ZipInfo(name), encode_png(image))
        archive.writestr('dataset.json', json.dumps({key: dict(zip(names, values)) for key, values in tables.items()}))
    return str(path)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Data of any size are decoded into a file; the user's own cache is not touched."""
    monkeypatch.setattr(cache, 'SMALL', 0)
    monkeypatch.setenv('AMBIENT_CACHE', str(tmp_path / 'user'))


@pytest.fixture
def no_decoding(monkeypatch):
    def forbid():
        monkeypatch.setattr(contents, 'decode_image', None)
        monkeypatch.setattr(contents, 'Archive', None)
    return forbid


def copies(folder):
    return sorted(name for name in os.listdir(folder) if name.startswith('.'))


def test_second_start_opens_no_picture(tmp_path, no_decoding, capsys):
    levels = dict(sigmas=np.linspace(0, 1, 30).tolist(), sigma_max=[None, 0.5] * 15)
    path = make_zip(tmp_path / 'a.zip', labels=[i % 5 for i in range(30)], **levels)
    before = ImageDataset(path, use_labels=True)
    images = np.stack([before.decode(i) for i in range(30)])
    place = decode(path)
    assert copies(tmp_path) == [os.path.basename(place)] and f'kept in {place}' in capsys.readouterr().out
    no_decoding()
    assert decode(path) == place
    after = ImageDataset(path, use_labels=True)
    np.testing.assert_array_equal(after.contents.images, images)
    for key in ('raw_idx', 'classes', 'native_sigma', 'sigma_max'):
        np.testing.assert_array_equal(getattr(after, key), getattr(before, key))
    assert after.fingerprint() == before.fingerprint() and after.path == path and after.form == before.form
    shutil.move(path, tmp_path / 'other-name.zip')
    with pytest.raises(TypeError):  # another name beside it is another copy: nothing else is looked through
        open_contents(str(tmp_path / 'other-name.zip'))


def test_other_data_under_the_same_name_have_their_own(tmp_path):
    path = make_zip(tmp_path / 'a.zip')
    first = decode(path)
    make_zip(path, seed=1)
    assert isinstance(open_contents(path), Pictures)
    second = decode(path)
    assert first != second and not np.array_equal(Packed(first).images, Packed(second).images)


def test_folders_too(tmp_path):
    with zipfile.ZipFile(make_zip(tmp_path / 'a.zip')) as archive:
        archive.extractall(tmp_path / 'folder')
    place = decode(str(tmp_path / 'folder'))
    assert os.path.dirname(place) == str(tmp_path) and isinstance(open_contents(str(tmp_path / 'folder')), Packed)
    assert open_contents(str(tmp_path / 'folder')).fingerprint() == Pictures(str(tmp_path / 'folder')).fingerprint()
    os.utime(tmp_path / 'folder' / '003.png', (1, 1))
    assert isinstance(open_contents(str(tmp_path / 'folder')), Pictures)


def test_where_the_copy_lies(tmp_path, monkeypatch, capsys):
    """As asked; else beside the data, in the user's cache, or nowhere."""
    path = make_zip(tmp_path / 'a.zip')
    asked = decode(path, str(tmp_path / 'asked'))
    assert os.path.dirname(asked) == str(tmp_path / 'asked') and isinstance(open_contents(path), Pictures)
    assert isinstance(open_contents(path, str(tmp_path / 'asked')), Packed)
    makedirs = os.makedirs

    def makes(*forbidden):
        def make(folder, *args, **kwargs):
            if str(folder) in forbidden:
                raise OSError(28, 'No space left on device')
            return makedirs(folder, *args, **kwargs)
        monkeypatch.setattr(os, 'makedirs', make)

    makes(str(tmp_path))
    assert os.path.dirname(decode(path)) == str(tmp_path / 'user')
    shutil.rmtree(tmp_path / 'user')
    makes(str(tmp_path), str(tmp_path / 'user'))
    capsys.readouterr()
    assert decode(path) is None and 'Warning: not enough space' in capsys.readouterr().out
    makes(str(tmp_path / 'full'))
    with pytest.raises(UserError, match='^--cache-dir=.*full: cannot hold 0.00 GiB of decoded images .No space left'):
        decode(path, str(tmp_path / 'full'))


def test_damaged_pictures_leave_nothing(tmp_path):
    path = make_zip(tmp_path / 'a.zip')
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr('zzz.png', b'no picture')
    with pytest.raises(UserError, match='cannot read zzz.png'):
        decode(path)
    assert not copies(tmp_path)


def test_what_a_killed_process_left_is_removed(tmp_path):
    """And nothing that lies beside it."""
    path = make_zip(tmp_path / 'a.zip')
    place = decode(path)
    left = tmp_path / f'.{os.path.basename(place)}-part-12345678'
    other = tmp_path / '.other.decoded-part-12345678'
    os.rename(place, left)
    other.mkdir()
    assert decode(path) == place and not left.exists() and other.exists()


def test_two_processes_at_once_decode_once(tmp_path):
    path = make_zip(tmp_path / 'a.zip', 2000)
    code = 'import sys; from training.data import cache; cache.SMALL = 0; cache.decode(sys.argv[1])'
    runs = [subprocess.Popen([sys.executable, '-c', code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum('Decoded images' in output for output in outputs) == 1
    assert copies(tmp_path) == [os.path.basename(decode(path))]


def test_small_data_have_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, 'SMALL', 30 * 3 * 8 * 8 + 1)
    path = make_zip(tmp_path / 'a.zip')
    assert decode(path) is None and not copies(tmp_path)
    monkeypatch.setattr(cache, 'SMALL', 30 * 3 * 8 * 8)
    assert decode(path)
