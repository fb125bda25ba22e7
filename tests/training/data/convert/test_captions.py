# SPDX-License-Identifier: Apache-2.0
"""Captions: where they are read from, how they become the labels of a data set of any kind, and what is refused."""

import functools
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataset_tool
from dnnlib import UserError
from tests.support import commands, words
from training.data import cache, text
from training.data.convert.annotations import read_captions
from training.data.convert.sources import open_sources
from training.data.dataset import ImageDataset

TEXTS = ['a red square', 'a blue square', '', 'a red square', 'big, and blue', 'small']
NAMES = [f'{i}.png' for i in range(6)]
run, refused = (functools.partial(call, dataset_tool.main) for call in (commands.run, commands.refused))
ENCODER = '--text-encoder=words:x'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of six pictures, and c.csv with their captions beside it."""
    words.register(monkeypatch)
    (tmp_path / 'img').mkdir()
    for i, name in enumerate(NAMES):
        Image.fromarray(np.full([8, 8, 3], 40 * i, np.uint8)).save(tmp_path / 'img' / name)
    rows = ['file,caption', *(f'{name},"{caption}"' for name, caption in zip(NAMES, TEXTS))]
    (tmp_path / 'c.csv').write_text('\n'.join(rows))
    return tmp_path


def converted(folder, dest, *more):
    """The data set of the folder's pictures, converted with their captions."""
    run(f'--source={folder / "img"}', f'--dest={folder / dest}', f'--captions={folder / "c.csv"}', '--sheet=none', '--workers=1', *more)
    return folder / dest


def tree_digest(path):
    files = sorted(path.rglob('*')) if path.is_dir() else [path]
    return hashlib.sha256(b''.join(file.read_bytes() for file in files if file.is_file())).hexdigest()


# --- reading captions


@pytest.mark.parametrize('name, content', [
    ('c.txt', '\n'.join(TEXTS)), ('c.json', json.dumps(dict(zip(NAMES, TEXTS)))), ('c.json', json.dumps(TEXTS)),
    ('c.json', json.dumps({'captions': [[name, caption] for name, caption in zip(reversed(NAMES), reversed(TEXTS))]})),
    ('c.csv', '\n'.join(f'{name},"{caption}"' for name, caption in zip(NAMES, TEXTS))),
    ('c.csv', 'Name,text\n' + '\n'.join(f'{name},"{caption}"' for name, caption in zip(NAMES, TEXTS))),
    ('c.json', json.dumps([' a  red\nsquare ', *TEXTS[1:]]))])
def test_captions_of_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_captions(str(tmp_path / name), NAMES) == TEXTS


@pytest.mark.parametrize('name, content, words', [
    ('c.txt', 'one\ntwo', '2 values for 6 images'), ('c.csv', '0.png,a, b', 'a row has 3 columns, 0.png,a, b; give file and caption'),
    ('c.csv', '0.png,a', 'misses 5 of 6 images, such as 1.png'), ('c.json', '[1, 2, 3, 4, 5, 6]', 'the caption of 0.png must be one text'),
    ('c.json', '7', 'expected a list or an object'), ('c.json', '{', 'not a JSON file'),
    ('c.csv', '0.png,a\n0.png,b', 'has several values for 0.png'), ('c.txt', b'\xff\xfe\x00', 'cannot be read')])
def test_broken_tables_are_refused_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f'^--captions={tmp_path / name}: ') as caught:
        read_captions(str(tmp_path / name), NAMES)
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_a_caption_of_a_number_stays_a_text(tmp_path):
    (tmp_path / 'c.csv').write_text('\n'.join(f'{name},7' for name in NAMES))
    assert read_captions(str(tmp_path / 'c.csv'), NAMES) == ['7'] * 6


def test_captions_of_webdataset(tmp_path, folder):
    with tarfile.open(tmp_path / 'a.tar', 'w') as archive:
        def add(name, data):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for i, name in enumerate(NAMES[:3]):
            add(name, (folder / 'img' / name).read_bytes())
            if i == 0:
                add('0.txt', b'of the text\n')
            add(f'{i}.json', json.dumps({'caption': 'of the object'} if i < 2 else {}).encode())
    assert open_sources(str(tmp_path / 'a.tar')).captions == ['of the text', 'of the object', '']


# --- the labels


@pytest.mark.parametrize('dest, more', [('set.zip', ()), ('set', ()), ('packed', ('--packed',)), ('set.npz', ())])
def test_labels_of_every_kind_of_set_in_place_and_in_a_copy(folder, dest, more):
    path = converted(folder, dest, *more)
    before = ImageDataset(path)
    images = [before.decode(i).tobytes() for i in range(6)]
    copy = folder / f'copy{path.suffix}'
    out = run('captions', f'--source={path}', f'--dest={copy}', ENCODER)
    assert '5 different captions, and 1 images without one' in out and f'{copy}: labels of {words.DIM} numbers for 6 images' in out
    assert not ImageDataset(path).has_labels
    run('captions', f'--source={path}', ENCODER)
    made = text.open_captions('words:x')
    for place in (path, copy):
        data = ImageDataset(place, use_labels=True)
        assert (data.labels(range(6)) == made(TEXTS)).all() and (data.empty == made.empty).all()
        assert data.text == data.form.text == made.record and data.label_dim == words.DIM
        assert [data.decode(i).tobytes() for i in range(6)] == images
        assert data.contents.captions() == TEXTS
        assert 'of captions by words:x' in run('check', place)
    first = tree_digest(path)
    run('captions', f'--source={path}', ENCODER)
    assert tree_digest(path) == first  # the same bytes again
    assert not [name for name in folder.iterdir() if name.name.startswith('.')]


def test_another_encoder_replaces_the_labels_of_the_first(folder):
    path = converted(folder, 'packed', '--packed')
    images = (path / 'images.npy').stat().st_ino
    run('captions', f'--source={path}', ENCODER)
    first = ImageDataset(path, use_labels=True).fingerprint()
    run('captions', f'--source={path}', '--text-encoder=words:y', '--tokens=3')
    data = ImageDataset(path, use_labels=True)
    assert data.text['encoder'] == 'words:y' and data.label_dim == 3 * words.DIM and data.fingerprint() != first
    assert (path / 'images.npy').stat().st_ino == images  # the pixels are not copied


def test_captions_from_a_table_when_embedding(folder):
    run(f'--source={folder / "img"}', f'--dest={folder / "s.zip"}', '--sheet=none', '--workers=1')
    assert 'has no captions; give --captions=FILE' in refused('captions', f'--source={folder / "s.zip"}', ENCODER)
    (folder / 'c.txt').write_text('\n'.join(TEXTS))
    run('captions', f'--source={folder / "s.zip"}', ENCODER, f'--captions={folder / "c.txt"}')
    assert ImageDataset(folder / 's.zip').contents.captions() == TEXTS


def test_labels_that_would_be_lost_need_a_copy(folder):
    path = converted(folder, 's.zip', f'--labels={write(folder / "l.json", [0, 1, 0, 1, 0, 1])}')
    before = path.read_bytes()
    assert 'has labels, which those of the captions would replace; give --dest' in refused('captions', f'--source={path}', ENCODER)
    assert 'must be of the same kind' in refused('captions', f'--source={path}', f'--dest={folder / "copy.npz"}', ENCODER)
    assert path.read_bytes() == before
    run('captions', f'--source={path}', f'--dest={folder / "copy.zip"}', ENCODER)
    assert 'exists; name another' in refused('captions', f'--source={path}', f'--dest={folder / "copy.zip"}', ENCODER)


def test_an_error_leaves_the_set_as_it_was(folder, monkeypatch):
    path = converted(folder, 'set.npz')
    before = path.read_bytes()
    calls = []

    def broken(self, captions, tokens):
        calls.append(captions)
        if len(calls) > 1:
            raise UserError('it broke')
        return words.torch.ones(len(captions), 3)

    monkeypatch.setattr(words.Words, '__call__', broken)
    assert refused('captions', f'--source={path}', ENCODER) == 'Error: it broke'
    assert path.read_bytes() == before and sorted(p.name for p in folder.iterdir()) == ['c.csv', 'img', 'set.npz']


def test_labels_too_large_for_json_are_refused_before_the_work(folder, monkeypatch):
    path = converted(folder, 's.zip')
    monkeypatch.setattr('training.data.convert.captions.JSON_BASE', 0)
    monkeypatch.setattr('training.data.convert.captions.JSON_PER_MEMBER', 100)
    assert 'are too large for its dataset.json; pack it first' in refused('captions', f'--source={path}', ENCODER)


# --- converting sets that have them


def test_converting_keeps_captions_and_their_labels(folder):
    path = converted(folder, 's.zip')
    run('captions', f'--source={path}', ENCODER)
    first = ImageDataset(path, use_labels=True)
    for number, (source, dest) in enumerate([(path, 'a.npz'), (folder / 'a.npz', 'b'), (folder / 'b', 'c.zip')]):
        run(f'--source={source}', f'--dest={folder / dest}', '--sheet=none', '--workers=1', '--max-images=5')
        data = ImageDataset(folder / dest, use_labels=True)
        assert data.text == first.text and (data.empty == first.empty).all() and len(data) == 5, number
        assert (data.labels(range(5)) == first.labels(range(5))).all() and data.contents.captions() == TEXTS[:5]
    (folder / 'l.json').write_text('[0, 1, 0, 1, 0, 1]')
    run(f'--source={path}', f'--dest={folder / "d.zip"}', '--sheet=none', '--workers=1', f'--labels={folder / "l.json"}')
    data = ImageDataset(folder / 'd.zip', use_labels=True)
    assert data.text is None and data.label_dim == 2 and data.contents.captions() == TEXTS


def test_several_sources(folder):
    path = converted(folder, 's.zip')
    shutil.copytree(folder / 'img', folder / 'img2')
    joined = open_sources([str(path), str(folder / 'img2')], False)
    assert joined.captions == TEXTS + [''] * 6  # no caption is the empty one
    run('captions', f'--source={path}', ENCODER)
    shutil.copy(path, folder / 't.zip')
    run('captions', f'--source={folder / "t.zip"}', '--text-encoder=words:y')
    assert open_sources([str(path), f'{path}']).text['sha256'] == words.Words('x', None).sha256
    with pytest.raises(UserError, match='are not of the same text encoder'):
        open_sources([str(path), str(folder / 't.zip')])


def test_decoded_copies_have_them(folder, monkeypatch):
    path = converted(folder, 's.zip')
    run('captions', f'--source={path}', ENCODER)
    monkeypatch.setattr(cache, 'SMALL', 0)
    copy = cache.decode(path, str(folder))
    data, own = ImageDataset(path, use_labels=True, copy=copy), ImageDataset(path, use_labels=True, cache_dir=str(folder / 'none'))
    assert data.text == own.text and (data.empty == own.empty).all() and (data.labels(range(6)) == own.labels(range(6))).all()


def write(path, value):
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize('change, words', [
    (lambda meta: meta['text'].pop('sha256'), '"text" in dataset.json lacks "sha256"'),
    (lambda meta: meta['text'].pop('empty'), '"text" in dataset.json: the label of the empty caption, "empty", must be a finite vector'),
    (lambda meta: meta['text'].update(empty=[1.0]), 'describes labels of 12 numbers, and that of the empty caption has 1'),
    (lambda meta: meta.update(labels=[[name, i] for i, (name, _) in enumerate(meta['labels'])]), 'its labels differ'),
    (lambda meta: meta.update(text=[1]), '"text" in dataset.json must be an object')])
def test_damaged_records_are_refused(folder, change, words):
    path = converted(folder, 'set')
    run('captions', f'--source={path}', ENCODER)
    meta = json.loads((path / 'dataset.json').read_text())
    change(meta)
    write(path / 'dataset.json', meta)
    with pytest.raises(UserError) as caught:
        ImageDataset(path, use_labels=True)
    assert words in str(caught.value) and '\n' not in str(caught.value)
    out = run('check', path, code=1)
    assert words in out and out.strip().endswith('1 problems')
    assert ImageDataset(path).text is None  # without labels, they do not matter


def test_damaged_captions_of_a_packed_set_are_refused(folder):
    path = converted(folder, 'packed', '--packed')
    for content in ('[1]', '["a"]', '{', '{"a": "b"}'):
        Path(path / 'captions.json').write_text(content)
        assert 'captions.json' in refused('captions', f'--source={path}', ENCODER)
        assert 'captions.json' in run('check', path, code=1)


def test_the_zip_holds_each_member_once(folder):
    path = converted(folder, 's.zip')
    run('captions', f'--source={path}', ENCODER)
    run('captions', f'--source={path}', ENCODER)
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == len(set(archive.namelist())) == 7
