# SPDX-License-Identifier: Apache-2.0
"""The one reader of archives: members in order, every kind of picture as [C,H,W], damage told in one line, in threads and forks."""

import io
import multiprocessing
import os
import pickle
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from dnnlib import UserError, archive
from dnnlib.archive import (
    DAMAGE,
    IMAGES,
    JSON_BASE,
    JSON_PER_MEMBER,
    MAX_PIXELS,
    RARER_IMAGES,
    Archive,
    damage,
    decode_image,
    directory_digest,
)
from dnnlib.files import MAX_JSON
from training.data.convert.writers import encode_png


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


def test_what_other_programs_left_behind_is_no_image(tmp_path):
    """Folders of macOS, editors and version control; what begins with a dot, wherever it lies. The fingerprint does not know it."""
    data, prints = coded(np.zeros([4, 4, 3], np.uint8), 'RGB'), []
    left = ('__MACOSX/a/b.png', 'a/__MACOSX/c.png', '.cache/d.png', 'a/.e/f/g.png', 'a/.h.png')
    for names in (('a/x.png', '_a/y.png'), ('a/x.png', '_a/y.png', *left)):
        with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
            for name in names:
                archive.writestr(name, data)
        archive = Archive(tmp_path / 'z.zip')
        assert archive.images() == ['_a/y.png', 'a/x.png']
        prints.append(archive.fingerprint())
    assert prints[0] == prints[1]


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
    with pytest.raises(ValueError, match=r'\[4\] is not an image'):
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


# ----------------------------------------------------------------------------------------------------
# Archives that others made


def refused(archive, name, *args):
    """What reading a member is refused with."""
    with pytest.raises(DAMAGE) as error:
        archive.read(name, *args)
    return damage(error.value)


def zipped(path, members, method=zipfile.ZIP_DEFLATED, change=None):
    """A zip; change(place of the last entry of its directory, data): what is done to its bytes afterwards."""
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    if change:
        data = bytearray(path.read_bytes())
        change(data.rindex(b'PK\1\2'), data)
        path.write_bytes(data)
    return Archive(path)


def put(code, offset, value):
    return lambda place, data: struct.pack_into(code, data, place + offset, value)


def test_members_that_are_not_what_the_directory_says(tmp_path):
    members = [('a.png', bytes(100_000)), ('b.png', bytes(100_000))]
    assert 'encrypted' in refused(zipped(tmp_path / 'a.zip', members, change=put('<H', 8, 1)), 'b.png')
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        assert 'with deflate, or without compression' in refused(zipped(tmp_path / 'a.zip', members, method), 'b.png')
    assert 'cannot expand to the 1000000 that' in refused(zipped(tmp_path / 'a.zip', members, change=put('<I', 24, 10 ** 6)), 'b.png')
    assert 'more than the limit of 536870912' in refused(zipped(tmp_path / 'a.zip', members, change=put('<I', 24, 2 ** 29 + 1)), 'b.png')
    assert 'CRC' in refused(zipped(tmp_path / 'a.zip', members, change=put('<I', 24, 10)), 'b.png')
    whole = zipped(tmp_path / 'a.zip', members)
    assert whole.read('b.png') == whole.read('b.png', 100_000) == bytes(100_000)
    assert 'more than the limit of 99999' in refused(whole, 'b.png', 99_999)


def test_what_a_small_member_claims_is_not_decompressed(tmp_path, monkeypatch):
    """100 bytes in the directory, 64 MiB in the stream: no more than zipfile's least piece is made of it."""
    made, whole = [], zlib.decompressobj

    class Watched:
        def __init__(self, *args):
            self.own = whole(*args)

        def decompress(self, data, most):
            made.append(most)
            return self.own.decompress(data, most)

        def __getattr__(self, name):
            return getattr(self.own, name)

    archive = zipped(tmp_path / 'a.zip', [('a.png', bytes(2 ** 26))], change=put('<I', 24, 100))
    monkeypatch.setattr(zipfile.zlib, 'decompressobj', Watched)
    assert 'CRC' in refused(archive, 'a.png') and 0 < max(made) <= 4096


def test_members_that_share_bytes_or_a_name(tmp_path):
    members = [('a.png', b'a' * 500), ('b.png', b'b' * 500)]
    with pytest.raises(UserError, match='its members overlap'):
        zipped(tmp_path / 'a.zip', members, change=put('<I', 42, 0))
    with pytest.warns(UserWarning, match='Duplicate'):
        twice = zipped(tmp_path / 'b.zip', [*members, ('a.png', b'c')])
    with pytest.raises(UserError, match='holds a.png twice'):
        twice.images()
    with pytest.warns(UserWarning, match='Duplicate'):  # as "zip -u" and ZipFile(..., "a") leave it: the last one counts
        again = zipped(tmp_path / 'c.zip', [*members, ('dataset.json', b'{"a": 1}'), ('dataset.json', b'{"a": 2}')])
    assert again.read_json() == {'a': 2} and again.images() == ['a.png', 'b.png']


def test_json_members_have_a_size_that_their_images_need(tmp_path, monkeypatch):
    monkeypatch.setattr('dnnlib.archive.JSON_BASE', 1000)
    monkeypatch.setattr('dnnlib.archive.JSON_PER_MEMBER', 100)
    few, many = ([(f'{i}.png', b'') for i in range(count)] for count in (10, 100))
    text = ('dataset.json', b'{"a":' + b' ' * 5000 + b'1}')
    with pytest.raises(UserError, match='dataset.json cannot be read .it has 5007 bytes, more than the limit of 2100'):
        zipped(tmp_path / 'a.zip', [*few, text]).read_json()
    assert zipped(tmp_path / 'b.zip', [*many, text]).read_json() == {'a': 1}
    fifteen_million = MAX_JSON // 36  # of [["00000/img00000000.png", 999], ...]
    assert fifteen_million > 15e6 and JSON_BASE + 15_000_000 * JSON_PER_MEMBER > MAX_JSON


def test_pictures_of_more_pixels_than_are_decoded(monkeypatch):
    """Told from their headers, before Pillow warns of them, or decodes them."""
    def header(width, height, body=b''):
        parts = [(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(body)), (b'IEND', b'')]
        return b'\x89PNG\r\n\x1a\n' + b''.join(struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in parts)

    monkeypatch.setattr(PIL.ImageFile.ImageFile, 'load', lambda self: pytest.fail('decoded'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', category=PIL.Image.DecompressionBombWarning)  # as dnnlib.archive does
        for size in ((100_000, 100_000), (11_586, 11_586), (MAX_PIXELS, 2)):
            with pytest.raises(DAMAGE, match='pixels'):
                decode_image('x.png', header(*size))
        with pytest.raises(ValueError, match='8 x 9 pixels, more than the limit of 64'):
            decode_image('x.png', header(8, 9), most=64)
    assert MAX_PIXELS >= 10_000 ** 2


def test_a_jpeg_of_endless_scans():
    image = PIL.Image.fromarray(np.zeros([512, 512, 3], np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', progressive=True)
    data = buffer.getvalue()
    scan = data[data.rindex(b'\xff\xda'):-2]
    assert decode_image('x.jpg', data[:-2] + scan * 50 + data[-2:]).shape == (3, 512, 512)
    with pytest.raises(ValueError, match='scans of 262144 pixels'):
        decode_image('x.jpg', data[:-2] + scan * 9000 + data[-2:])


def test_formats_that_run_programs_are_no_images():
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    with pytest.raises(DAMAGE) as error:
        decode_image('x.png', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n')
    assert damage(error.value) == 'not an image'


def test_names_of_any_kind_stay_in_one_line(tmp_path):
    for name in ('a\nb\x1b[31m.png', 'x' * 60_000 + '.png', 'a\u202eb.png'):
        with pytest.warns(UserWarning, match='Duplicate'):
            archive = zipped(tmp_path / 'a.zip', [(name, b'x'), (name, b'x')])
        with pytest.raises(UserError) as error:
            archive.images()
        assert error.value.message.isprintable() and len(error.value.message) < 4100
    folder = tmp_path / 'f'
    folder.mkdir()
    (folder / os.fsdecode(b'\xff.png')).write_bytes(b'x')
    assert len(Archive(folder).fingerprint()['names']) == 32  # no text encodes such a name


# ----------------------------------------------------------------------------------------------------
# What is read faster than by zipfile and Pillow


def zip_of(path, members, comment=b'', force_zip64=False, prefix=b'', kind=zipfile.ZIP_STORED):
    with open(path, 'wb') as file:
        file.write(prefix)
        with zipfile.ZipFile(file, 'w', kind) as archive:
            archive.comment = comment
            for name, data in members.items():
                with archive.open(zipfile.ZipInfo(name), 'w', force_zip64=force_zip64) as member:
                    member.write(data)
    return str(path)


@pytest.mark.parametrize('options', [{}, {'comment': b'hello PK' * 99}, {'force_zip64': True}, {'prefix': b'#!/bin/sh\n'}])
def test_directory_of_a_zip_has_a_digest(tmp_path, options):
    """It changes with names, order and contents, as the CRC-32 are in it, and not with where the file lies."""
    members = {f'{i}.npy': str(i).encode() for i in range(300)}
    first = directory_digest(zip_of(tmp_path / 'a.zip', members, **options))
    assert first and first == directory_digest(zip_of(tmp_path / 'b.zip', members, **options))
    others = [{**members, '7.npy': b'other'}, {**members, 'x.npy': b''}, dict(list(members.items())[::-1])]
    assert len({first, *(directory_digest(zip_of(tmp_path / 'c.zip', other, **options)) for other in others)}) == 4
    assert Archive(str(tmp_path / 'a.zip')).read('7.npy') == b'7'


def test_no_directory_no_digest(tmp_path):
    for content in (b'', b'PK', bytes(1000), b'PK\5\6' + bytes(18), b'PK\5\6' + b'\xff' * 18):
        (tmp_path / 'a.zip').write_bytes(content)
        assert directory_digest(tmp_path / 'a.zip') is None


def test_more_than_65535_members(tmp_path):
    """A directory whose end is told of in zip64's own records."""
    members = {f'{i}.npy': b'' for i in range(2 ** 16 + 1)}
    first = directory_digest(zip_of(tmp_path / 'a.zip', members))
    assert first != directory_digest(zip_of(tmp_path / 'a.zip', {**members, '0.npy': b'x'}))
    assert (tmp_path / 'a.zip').read_bytes().count(b'PK\6\6') == 1


@pytest.mark.parametrize('force_zip64', [False, True])
@pytest.mark.parametrize('name', ['a.npy', 'ä/ö.npy', 'x' * 300 + '.npy'])
def test_stored_members_are_read_in_one_piece(tmp_path, name, force_zip64):
    data = np.random.default_rng(0).bytes(1000)
    assert Archive(zip_of(tmp_path / 'a.zip', {name: data, 'b.npy': b''}, force_zip64=force_zip64)).read(name) == data
    assert Archive(str(tmp_path / 'a.zip')).read('b.npy') == b''


def test_damaged_stored_members_are_refused(tmp_path):
    path = zip_of(tmp_path / 'a.zip', {'a.npy': b'0123456789', 'b.npy': b'0123456789'})
    whole = bytearray((tmp_path / 'a.zip').read_bytes())
    for place, words in ((whole.index(b'0123456789') + 3, 'checksum'), (0, 'header')):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / 'a.zip').write_bytes(changed)
        with pytest.raises(ValueError, match=words):
            Archive(path).read('a.npy')
        assert Archive(path).read('b.npy') == b'0123456789'


@pytest.mark.parametrize('shape', [(1, 1, 1), (3, 32, 32), (4, 7, 5), (2, 3, 9), (3, 300, 200)])
def test_own_pictures_need_no_decoder(shape, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = encode_png(image)
    slow = np.array(PIL.Image.open(io.BytesIO(data))).reshape(*shape[1:], shape[0]).transpose(2, 0, 1)
    np.testing.assert_array_equal(slow, image)
    monkeypatch.setattr(archive, 'open_picture', None)
    found = decode_image('a.png', data)
    np.testing.assert_array_equal(found, image)
    assert found.flags.c_contiguous


def test_other_pictures_go_to_the_decoder():
    """Compressed or filtered ones, and such as are damaged or cut off: what is wrong with them is said there."""
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    whole = encode_png(image)
    saved = io.BytesIO()
    PIL.Image.fromarray(image.transpose(1, 2, 0)).save(saved, 'png')
    np.testing.assert_array_equal(decode_image('a.png', saved.getvalue()), image)
    assert archive._plain_png(saved.getvalue(), 2 ** 20) is None
    for place in (20, 30, 60, 41, 43, len(whole) - 14):  # height, interlace, pixels, the stream's head, a block's length, its checksum
        changed = bytearray(whole)
        changed[place] ^= 1
        assert archive._plain_png(bytes(changed), 2 ** 20) is None
    assert archive._plain_png(whole[:-20], 2 ** 20) is None and archive._plain_png(whole, 63) is None
