# SPDX-License-Identifier: Apache-2.0
"""What data are known by: equal wherever they lie, different in words where something differs."""

import copy
import json
import os
import shutil
import zipfile

import numpy as np
import pytest

from dnnlib import UserError
from dnnlib.archive import Archive
from dnnlib.fingerprint import data_differences, fingerprint
from tests.support import hostile

MEMBERS = {f'{i // 4}/{i}.png': bytes([i]) * (i + 1) for i in range(12)} | {'dataset.json': b'{"labels": null}'}


def zipped(path, members=None, method=zipfile.ZIP_STORED):
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, data in (members or MEMBERS).items():
            archive.writestr(name, data)
    return path


def unpacked(path, members=None):
    for name, data in (members or MEMBERS).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
        os.utime(path / name, ns=(10 ** 18, 10 ** 18 + 12_345))
    return path


def found(path):
    return Archive(path).fingerprint()


def test_the_same_images_are_known_wherever_they_lie(tmp_path, monkeypatch):
    """By another spelling, as a copy, with members in another order, compressed, beside other files: the same."""
    want = found(zipped(tmp_path / 'a.zip'))
    monkeypatch.chdir(tmp_path)
    assert want == json.loads(json.dumps(want)) and want['images'] == 12 and str(tmp_path) not in json.dumps(want)
    other = dict(reversed(MEMBERS.items())) | {'.hidden.png': b'x', 'notes.txt': b'x', '1/.4.png': b'x'}
    (tmp_path / 'link.zip').symlink_to('a.zip')
    for path in ('a.zip', './a.zip', '../' + tmp_path.name + '/a.zip', 'link.zip', zipped(tmp_path / 'b' / 'c.zip'),
                 zipped(tmp_path / 'd.zip', other, zipfile.ZIP_DEFLATED)):
        assert found(path) == want and data_differences(want, found(path)) == []


def test_folders_are_known_by_the_times_of_their_files(tmp_path):
    want = found(unpacked(tmp_path / 'a'))
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')  # keeps times, to the nanosecond
    assert found(tmp_path / 'b') == want
    os.utime(tmp_path / 'b' / '0' / '1.png', ns=(10 ** 18, 10 ** 18 + 12_346))
    [told] = data_differences(want, found(tmp_path / 'b'))
    assert 'cp -a' in told and 'rsync -t' in told
    [told] = data_differences(found(zipped(tmp_path / 'z.zip')), want)
    assert told == 'a folder instead of a zip file, whose contents cannot be compared'
    assert found(tmp_path / 'z.zip')['names'] == want['names']


@pytest.mark.parametrize('change, words', [
    ({'9.png': b'x'}, ['13 images instead of 12']), ({'0/1.png': None}, ['11 images instead of 12']),
    ({'0/1.png': b'xyz'}, ['images with other names or sizes']),
    ({'0/1.png': None, '0/1b.png': bytes([1]) * 2}, ['images with other names or sizes']),
    ({'0/1.png': b'xy'}, ['images of the same names and sizes with other contents']),
    ({'dataset.json': b'{"labels":null}'}, ['another dataset.json']), ({'dataset.json': None}, ['no dataset.json, where there was one']),
    ({'0/1.png': b'xy', 'dataset.json': b'{}'}, ['images of the same names and sizes with other contents', 'another dataset.json'])])
def test_what_differs_is_told(tmp_path, change, words):
    members = {name: data for name, data in {**MEMBERS, **change}.items() if data is not None}
    old, new = found(zipped(tmp_path / 'a.zip')), found(zipped(tmp_path / 'b.zip', members))
    told = data_differences(old, new)
    assert len(told) == len(words) and all(text.startswith(start) for text, start in zip(told, words)), told
    assert len(data_differences(new, old)) == len(words)
    if change == {'dataset.json': None}:
        assert data_differences(new, old) == ['a dataset.json (labels, sigmas), where there was none']


def test_names_and_numbers_do_not_run_together():
    """Nothing that differs has one digest because of where one part ends."""
    told = ((['a', 'b'], [1, 2], [3, 4]), (['ab'], [1], [3]), (['a', 'b'], [2, 1], [3, 4]), (['b', 'a'], [1, 2], [3, 4]),
            (['a', 'b'], [1, 2], [4, 3]))
    prints = [fingerprint('zip', *rest, None) for rest in told]
    assert len({json.dumps(one) for one in prints}) == 5
    assert all(data_differences(one, other) for one in prints for other in prints if one is not other)
    packed = fingerprint('packed', ['0', '1'], [192, 192], [7, 2 ** 62], 'x')  # a kind that is not there yet
    assert data_differences(prints[0], packed)[0] == 'images with other names or sizes'
    assert 'packed instead of a zip file' in data_differences({**packed, 'kind': 'zip'}, packed)[0]


def test_nothing_is_decompressed_and_the_file_is_opened_once(tmp_path, monkeypatch):
    path = zipped(tmp_path / 'a.zip', method=zipfile.ZIP_DEFLATED)
    opened, read, begin, read_one = [], [], zipfile.ZipFile.__init__, zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, '__init__', lambda self, file, *args: (opened.append(file), begin(self, file, *args))[1])
    monkeypatch.setattr(zipfile.ZipFile, 'open', lambda self, info, *args: (read.append(info.filename), read_one(self, info, *args))[1])
    archive = Archive(path)
    archive.read_json()
    first = archive.fingerprint()
    assert first == archive.fingerprint() and len(opened) == 1 and read == ['dataset.json']


def test_fingerprints_that_are_none():
    """A state may hold anything in their place; what is not equal differs in words."""
    good = fingerprint('zip', ['a.png'], [1], [2], None)
    draws = np.random.default_rng(0)
    for value in (None, 3, 'x', [], [good], {}, {'kind': []}, {**good, 'more': 1}, {**good, 'kind': {}}, {**good, 'images': '1\n'}):
        for pair in ((good, value), (value, good)):
            told = data_differences(*pair)
            assert told and all(isinstance(text, str) for text in told), value
    for _ in range(200):
        value = copy.deepcopy(good)
        value[hostile.pick([*good, 'more'], draws)] = hostile.pick(hostile.VALUES, draws)
        assert bool(data_differences(good, value)) == (value != good), value


def test_unreadable_labels_are_one_line(tmp_path):
    archive = Archive(unpacked(tmp_path / 'a'))
    (tmp_path / 'a' / 'dataset.json').unlink()
    with pytest.raises(UserError, match='dataset.json cannot be read'):
        archive.fingerprint()
    archive = Archive(unpacked(tmp_path / 'a'))
    (tmp_path / 'a' / '0' / '1.png').unlink()
    with pytest.raises(UserError, match='cannot be read'):
        archive.fingerprint()
