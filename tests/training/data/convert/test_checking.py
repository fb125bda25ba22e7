# SPDX-License-Identifier: Apache-2.0
"""`dataset_tool.py check` finds whatever training would stumble over, all of it, and says where."""

import io
import json
import shutil
import zipfile

import numpy as np
import pytest

from tests.test_dataset_tool import convert, picture_folder, pictures, refusal, run
from training.data.packed import new_packed


def rewritten(path, change=None, meta=None, drop=(), add=()):
    """A zip again, with bytes of members changed ({name: function}), its dataset.json changed by a function, members left out or added."""
    with zipfile.ZipFile(path) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    told = json.loads(found['dataset.json'])
    if meta:
        meta(told)
    found['dataset.json'] = json.dumps(told).encode()
    for name, function in (change or {}).items():
        found[name] = function(found[name])
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in [*found.items(), *add]:
            if name not in drop:
                archive.writestr(name, data)


@pytest.fixture
def archive(tmp_path):
    folder = picture_folder(tmp_path / 'in', pictures(6), [f'{"ab"[i % 2]}/{i}.png' for i in range(6)])
    convert(folder, tmp_path / 'x.zip', '--sigmas=0.1', '--sigma-max=0.7', '--sheet=none')
    return tmp_path / 'x.zip'


def names(*numbers):
    return [f'00000/img{number:08}.png' for number in numbers]


def check(path):
    result = run('check', path)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_whole_archive(archive, tmp_path):
    code, said = check(archive)
    assert code == 0 and said.endswith('x.zip: nothing wrong with its 6 images\n') and 'sigma_data' in said and 'duplicates  none' in said
    with zipfile.ZipFile(archive) as found:
        found.extractall(tmp_path / 'folder')
    assert check(tmp_path / 'folder')[0] == 0


def test_every_damaged_member_is_told_of(archive):
    first, second, third = names(0, 2, 5)
    rewritten(archive, {second: lambda data: data[:60], third: lambda data: b'text'})
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as found:
        place = found.getinfo(first).header_offset + 30 + len(first) + 70
    data[place] ^= 1
    archive.write_bytes(data)
    code, said = check(archive)
    assert code == 1 and 'x.zip: 3 problems' in said
    told = {line.split(': ')[0]: line for line in said.splitlines()}
    assert 'CRC' in told[first] and 'cannot be read' in told[second] and 'cannot be read (not an image)' in told[third], said


def test_members_that_are_unlike_the_others(archive, tmp_path):
    other = picture_folder(tmp_path / 'other', [*pictures(1, (8, 12, 3)), *pictures(1, (8, 8))])
    wide, grey = ((other / f'{i:02}.png').read_bytes() for i in range(2))
    first, second = names(0, 3)
    rewritten(archive, {first: lambda _: wide, second: lambda _: grey})
    code, said = check(archive)
    assert code == 1 and f'{first}: uint8 3 x 8 x 12, where most are uint8 3 x 8 x 8' in said
    assert f'{second}: uint8 1 x 8 x 8, where most' in said and '2 problems' in said


def test_tables_that_miss_images_or_name_others(archive):
    def change(meta):
        meta['labels'] = meta['labels'][1:] + [['gone.png', 3]]
        meta['sigmas'][2][1] = -1
        meta['sigma_max'][4] = meta['sigma_max'][3]
    rewritten(archive, meta=change, drop=names(5))
    code, said = check(archive)
    for text in (f'{names(0)[0]}: not in "labels" of dataset.json', 'gone.png: in "labels" of dataset.json, but not in the archive',
                 f'{names(5)[0]}: in "labels" of dataset.json, but not', f'{names(5)[0]}: in "sigmas" of dataset.json, but not',
                 f'{names(4)[0]}: not in "sigma_max" of dataset.json',
                 f'dataset.json: "sigmas" has the level -1 for {names(2)[0]}; levels must be 0 or more'):
        assert text in said, said
    assert code == 1


@pytest.mark.parametrize('change, text', [
    (lambda meta: meta.update(labels=[['a', 1, 2]]), '"labels" must be [file, value] pairs'),
    (lambda meta: meta['labels'].append([names(0)[0], 5]), f'"labels" has several values for {names(0)[0]}'),
    (lambda meta: [pair.__setitem__(1, 0.5) for pair in meta['labels']],
     '"labels" has labels that are not whole numbers for 6 of 6 images'),
    (lambda meta: meta.update(sigma_max=dict.fromkeys(names(*range(6)), 0)), '"sigma_max" has the limit'),
    (lambda meta: meta.update(sigma_min=dict.fromkeys(names(*range(6)), -1)), '"sigma_min" has the limit'),
    (lambda meta: meta.update(sigmas=7), '"sigmas" must be')])
def test_tables_that_are_not_valid(archive, change, text):
    rewritten(archive, meta=change)
    code, said = check(archive)
    assert code == 1 and f'dataset.json: {text}' in said, said


def test_float_data(tmp_path):
    np.save(tmp_path / 'x.npy', np.random.default_rng(0).normal(size=(4, 5, 6, 6)).astype(np.float32))
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip', '--sheet=none')
    assert check(tmp_path / 'x.zip')[0] == 0
    broken = np.zeros([5, 6, 6], np.float32)
    broken[0, 0, :3] = np.nan, np.inf, np.nan
    buffer = io.BytesIO()
    np.save(buffer, broken)
    name = '00000/img00000001.npy'
    rewritten(tmp_path / 'x.zip', {name: lambda _: buffer.getvalue()}, lambda meta: meta.pop('units'))
    code, said = check(tmp_path / 'x.zip')
    assert code == 1 and f'{name}: 3 of 180 values are not finite (2 NaN)' in said and 'dataset.json: float images need "units"' in said


def test_many_problems_of_one_kind_are_cut_short(archive):
    rewritten(archive, meta=lambda meta: meta.update(labels=meta['labels'] + [[f'{i}.png', 0] for i in range(500)]))
    code, said = check(archive)
    assert code == 1 and said.count('but not in the archive') < 102 and '400 more' in said and 'x.zip: 500 problems' in said


def test_what_training_reads_nothing_of(archive, tmp_path):
    """Other files are no problem, and are told of; without images there is nothing to check."""
    rewritten(archive, add=[('notes.txt', b'x'), ('a.tif', b'x'), ('__MACOSX/._a.png', b'x')])
    code, said = check(archive)
    assert code == 0 and '3 other files, such as __MACOSX/._a.png' in said
    assert 'no such zip file or folder' in refusal('check', tmp_path / 'none.zip')
    shutil.rmtree(tmp_path / 'in')
    (tmp_path / 'in').mkdir()
    assert 'no images' in refusal('check', tmp_path / 'in')
    (tmp_path / 'bad.zip').write_bytes(b'x' * 100)
    assert 'not a whole zip file' in refusal('check', tmp_path / 'bad.zip')
    rewritten(archive, {'dataset.json': lambda data: data[:-1]})
    assert 'not a JSON file' in refusal('check', archive) or 'JSON' in check(archive)[1]


def packed(dest, images, units=None, **tables):
    with new_packed(dest, images.shape[1:], images.dtype) as folder:
        for image in images:
            folder.append(image.tobytes())
        folder.finish(tables, units=units)
    return dest


@pytest.mark.parametrize('name', ['packed', 'x.npz'])
def test_packed_data(tmp_path, name):
    images = np.random.default_rng(0).normal(size=(6, 2, 4, 4)).astype(np.float32)
    dest = packed(tmp_path / name, images, {'offset': 0, 'scale': 2}, labels=np.arange(6), sigmas=np.full(6, 0.5))
    code, said = check(dest)
    assert code == 0 and 'nothing wrong with its 6 images' in said and '6 classes' in said and 'max 0.25' in said
    images[3, 0, 0] = np.nan
    for other in ('packed-2', 'y.npz'):
        code, said = check(packed(tmp_path / other, images, None, labels=-np.arange(6), sigmas=np.full(6, np.nan)))
        assert code == 1 and '4 problems' in said
        for text in ('image 3: 4 of 32 values are not finite (4 NaN)', 'float images need "units"', 'labels.npy must be classes',
                     'sigmas.npy has the level nan for image 0; levels must be 0 or more (6 of 6 are not)'):
            assert text in said, said
    assert check(packed(tmp_path / 'two.npz', images[:2], {'offset': [0] * 3, 'scale': [1] * 3}))[0] == 1


def test_a_packed_array_with_a_changed_byte(tmp_path):
    dest = packed(tmp_path / 'x.npz', pictures(5, (3, 8, 8)))
    data = bytearray(dest.read_bytes())
    data[len(data) // 3] ^= 1
    dest.write_bytes(data)
    code, said = check(dest)
    assert code == 1 and 'images.npy: cannot be read (Bad CRC-32' in said
