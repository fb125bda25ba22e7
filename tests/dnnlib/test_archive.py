# SPDX-License-Identifier: Apache-2.0
"""The one reader of archives: members in order, every kind of picture as [C,H,W], damage told in one line, in threads and forks."""

import io
import multiprocessing
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from dnnlib import UserError
from dnnlib.archive import DAMAGE, IMAGES, RARER_IMAGES, Archive, damage, decode_image


def coded(array, mode, kind='PNG'):
    buffer = io.BytesIO()
    PIL.Image.fromarray(array).convert(mode).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def places(tmp_path):
    """One set of members as a folder and as a zip."""
    members = {'b/1.PNG': b'one', 'a/2.jpg': b'two', 'a/.2.jpg': b'notes', 'scan.tif': b'three', 'dataset.json': b'{"labels": null}'}
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
        archive.writestr('a/', b'')
        for name, data in members.items():
            archive.writestr(name, data)
            (tmp_path / 'f' / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / 'f' / name).write_bytes(data)
    return tmp_path / 'z.zip', tmp_path / 'f', members


def test_zips_and_folders_are_alike(places):
    for path in places[:2]:
        archive = Archive(path)
        assert archive.names == sorted(places[2])
        assert archive.images() == ['a/2.jpg', 'b/1.PNG'] and archive.images((*IMAGES, *RARER_IMAGES))[-1] == 'scan.tif'
        assert all(archive.read(name) == data for name, data in places[2].items())
        assert archive.read_json() == {'labels': None} and archive.read_json('none.json') == {}


def test_suffixes_are_named_once():
    assert len({*IMAGES, *RARER_IMAGES}) == len(IMAGES) + len(RARER_IMAGES)


def read(archive, name):
    return archive.read(name)


def test_threads_forks_and_pickles_read_alike(tmp_path):
    want = {f'{i}.npy': np.random.default_rng(i).bytes(20_000) for i in range(40)}
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in want.items():
            archive.writestr(name, data)
    archive = Archive(tmp_path / 'z.zip')
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(archive.read, want)) == list(want.values())
    with multiprocessing.get_context('fork').Pool(2) as pool:
        assert pool.starmap(read, [(archive, name) for name in want], 1) == list(want.values())
    assert pickle.loads(pickle.dumps(archive)).read('7.npy') == want['7.npy']


def test_pictures_of_every_mode():
    rgb = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    grey = rgb[..., 0]
    for array, mode, kind, shape in ((grey, 'L', 'PNG', (1, 5, 6)), (rgb, 'RGB', 'BMP', (3, 5, 6)), (rgb, 'RGBA', 'PNG', (4, 5, 6)),
                                     (grey, 'LA', 'PNG', (2, 5, 6)), (rgb, 'P', 'PNG', (3, 5, 6)), (rgb, 'CMYK', 'JPEG', (3, 5, 6)),
                                     (grey, '1', 'PNG', (1, 5, 6))):
        data = coded(array, mode, kind)
        found = decode_image('x.png', data)
        assert found.shape == shape and found.dtype == np.uint8 and found.flags.c_contiguous, mode
        if mode in ('P', 'CMYK', '1'):
            plain = np.asarray(PIL.Image.open(io.BytesIO(data)).convert('L' if mode == '1' else 'RGB'))
            assert (found == (plain[None] if plain.ndim == 2 else plain.transpose(2, 0, 1))).all(), mode
    deep = decode_image('x.png', coded(grey.astype(np.uint16) * 257, 'I;16'))
    assert deep.shape == (1, 5, 6) and deep.max() > 255
    with pytest.raises(ValueError, match='mode RGBA, expected 8-bit grey or RGB'):
        decode_image('x.png', coded(rgb, 'RGBA'), modes=('L', 'RGB'))


def test_arrays_are_as_they_lie_there():
    def stored(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    assert decode_image('x.NPY', stored(np.zeros([4, 5], np.float32))).shape == (1, 4, 5)
    assert decode_image('x.npy', stored(np.zeros([7, 4, 5]))).dtype == np.float64
    with pytest.raises(ValueError, match=r'\[4\] is no image'):
        decode_image('x.npy', stored(np.zeros(4)))


def test_damage_is_one_line(tmp_path):
    good = coded(np.zeros([64, 64, 3], np.uint8), 'RGB')
    for name, data in (('a.png', b''), ('a.png', b'\x89PNG'), ('a.png', good[:60]), ('a.jpg', b'text'), ('a.npy', b''),
                       ('a.npy', b'PK\3\4')):
        with pytest.raises(DAMAGE) as error:
            decode_image(name, data)
        assert damage(error.value) and '\n' not in damage(error.value) and '0x' not in damage(error.value), name


@pytest.mark.parametrize('name, content, message', [
    ('none', None, 'no such zip file or folder'), ('z.zip', b'PK\3\4abc', 'not a whole zip file'), ('empty', 'folder', 'no images in it')])
def test_archives_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    if content == 'folder':
        path.mkdir()
    elif content:
        path.write_bytes(content)
    for where, start in ((None, f'{path}: '), (f'--source={path}', f'--source={path}: ')):
        with pytest.raises(UserError, match=message) as error:
            Archive(path, where).images()
        assert error.value.message.startswith(start) and '\n' not in error.value.message
