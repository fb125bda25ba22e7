# SPDX-License-Identifier: Apache-2.0
"""Folders, zips and arrays of images as evaluation reads them: equal contents, and every kind of damage named."""

import io
import os
import zipfile

import numpy as np
import PIL.Image
import pytest

from dnnlib import UserError
from metrics import image_files
from tests.support.formula_weights import batch_of


def write_images(folder, images, suffix='.png'):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        picture = PIL.Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture.save(folder / f'{i:06d}{suffix}')


def all_of(path, **kwargs):
    source = image_files.ImageFiles(path, '--gen-path')
    return source, np.concatenate([batch.numpy() for batch in source.batches(4, **kwargs)])


@pytest.mark.parametrize('channels', [1, 3])
def test_every_container_gives_the_same_images(tmp_path, channels):
    images = batch_of(11, (channels, 5, 6))
    write_images(tmp_path / 'flat', images)
    for i in range(11):  # sub-folders, as dataset_tool.py and generate.py --subdirs make them
        (tmp_path / 'deep' / f'{i // 4:05d}').mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / 'flat' / f'{i:06d}.png', tmp_path / 'deep' / f'{i // 4:05d}' / f'{i:06d}.png')
    (tmp_path / 'deep' / 'dataset.json').write_text('{}')
    (tmp_path / 'deep' / '.hidden.png').write_text('')
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
        for i in reversed(range(11)):
            archive.write(tmp_path / 'flat' / f'{i:06d}.png', f'00000/img{i:08d}.png')
        archive.writestr('dataset.json', '{}')
    np.save(tmp_path / 'a.npy', images)
    np.savez(tmp_path / 'b.npz', images=images.transpose(0, 2, 3, 1), labels=np.arange(11))
    (tmp_path / 'raw').mkdir()
    for i, image in enumerate(images):
        np.save(tmp_path / 'raw' / f'{i:06d}.npy', image)
    for name in ('flat', 'deep', 'z.zip', 'a.npy', 'b.npz', 'raw'):
        source, found = all_of(tmp_path / name)
        assert len(source) == 11 and source.shape == (channels, 5, 6), name
        assert (found == images).all(), name
    assert (all_of(tmp_path / 'flat', count=6)[1] == images[:6]).all()


def test_palettes_and_bitmaps_are_read_as_rgb_and_grey(tmp_path):
    PIL.Image.new('P', (4, 4)).save(tmp_path / 'p.png')
    assert image_files.ImageFiles(tmp_path, '--gen-path').shape == (3, 4, 4)
    PIL.Image.new('1', (4, 4), 1).save(tmp_path / 'p.png')
    source, found = all_of(tmp_path)
    assert source.shape == (1, 4, 4) and (found == 255).all()


def test_jpeg_is_warned_of(tmp_path, capsys):
    write_images(tmp_path / 'j', batch_of(2, (3, 8, 8)), '.jpg')
    image_files.ImageFiles(tmp_path / 'j', '--gen-path')
    assert '2 of 2 files are JPEG' in capsys.readouterr().err


@pytest.mark.parametrize('spoil, message', [
    (lambda f: (f / '000002.png').write_bytes((f / '000002.png').read_bytes()[:60]), '000002.png cannot be read'),
    (lambda f: (f / '000002.png').write_bytes(b'not a picture'), '000002.png cannot be read'),
    (lambda f: PIL.Image.new('RGB', (9, 4)).save(f / '000002.png'), r'000002.png is \[3, 4, 9\], 000000.png is \[3, 4, 4\]'),
    (lambda f: PIL.Image.new('L', (4, 4)).save(f / '000002.png'), r'000002.png is \[1, 4, 4\]'),
    (lambda f: PIL.Image.new('RGBA', (4, 4)).save(f / '000002.png'), '000002.png cannot be read.*RGBA'),
    (lambda f: np.save(f / 'x.npy', np.zeros((3, 4, 4), np.float32)), 'x.npy cannot be read.*float32'),
])
def test_bad_images_are_named(tmp_path, spoil, message):
    write_images(tmp_path / 'g', batch_of(5))
    spoil(tmp_path / 'g')
    with pytest.raises(UserError, match=message) as caught:
        all_of(tmp_path / 'g')
    assert '\n' not in caught.value.message


@pytest.mark.parametrize('name, content, message', [
    ('none.zip', None, 'no such folder or file'),
    ('cut.zip', b'PK\3\4abc', 'cannot be read'),
    ('text.txt', b'abc', 'not a folder, .zip'),
    ('cut.npz', b'PK\3\4abc', 'cannot be read'),
    ('floats.npy', np.zeros((3, 4, 4, 3)), 'found 0'),
    ('five.npy', np.zeros((3, 5, 8, 8), np.uint8), 'neither'),
    ('empty.npy', np.zeros((0, 8, 8, 3), np.uint8), 'contains no images'),
])
def test_bad_containers(tmp_path, name, content, message):
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        image_files.ImageFiles(tmp_path / name, '--gen-path')
    assert caught.value.message.startswith(f'--gen-path={tmp_path / name}') and '\n' not in caught.value.message


def test_damaged_zip_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
        for i in range(3):
            buffer = io.BytesIO()
            PIL.Image.fromarray(batch_of(1, (4, 4), seed=i)[0]).save(buffer, 'PNG')
            archive.writestr(f'{i}.png', buffer.getvalue())
        offset = archive.getinfo('1.png').header_offset
    data = bytearray((tmp_path / 'z.zip').read_bytes())
    data[offset + 80] ^= 255
    (tmp_path / 'z.zip').write_bytes(data)
    with pytest.raises(UserError, match=r'1\.png cannot be read'):
        all_of(tmp_path / 'z.zip')


def test_encrypted_arrays_are_refused(tmp_path):
    np.savez(tmp_path / 'a.npz', images=batch_of(2))
    data = bytearray((tmp_path / 'a.npz').read_bytes())
    for header, place in ((b'PK\3\4', 6), (b'PK\1\2', 8)):
        data[data.index(header) + place] |= 1
    (tmp_path / 'a.npz').write_bytes(data)
    with pytest.raises(UserError, match='cannot be read .*encrypted'):
        all_of(tmp_path / 'a.npz')


def test_all_bad_images_are_named_and_counted(tmp_path):
    """Not the first alone; and where the first of all is bad, another one says what the size should be."""
    write_images(tmp_path / 'g', batch_of(30))
    for i in (0, 7, 21):
        (tmp_path / 'g' / f'{i:06d}.png').write_bytes(b'\x89PNG')
    PIL.Image.new('L', (4, 4)).save(tmp_path / 'g' / '000011.png')
    with pytest.raises(image_files.BadImages) as caught:
        all_of(tmp_path / 'g')
    message = caught.value.message
    assert message.startswith(f'--gen-path={tmp_path / "g"}: 4 of 30 images cannot be used: 000000.png cannot be read')
    assert all(name in message for name in ('000007.png', '000011.png is [1, 4, 4], 000001.png is [3, 4, 4]', '000021.png'))
    assert '\n' not in message


def test_very_many_bad_images_are_counted(tmp_path):
    write_images(tmp_path / 'g', batch_of(2))
    for i in range(25):
        (tmp_path / 'g' / f'bad{i:02d}.png').write_bytes(b'')
    with pytest.raises(UserError, match=r'25 of 27 images.*bad19\.png[^;]*; and 5 more$'):
        all_of(tmp_path / 'g')


def test_no_readable_image_at_all(tmp_path):
    for name in ('a.png', 'b.png'):
        (tmp_path / name).write_bytes(b'abc')
    with pytest.raises(UserError, match=r'2 of 2 images cannot be used: a\.png .*b\.png'):
        image_files.ImageFiles(tmp_path, '--gen-path')


@pytest.mark.parametrize('change, example', [
    (lambda g: PIL.Image.new('RGB', (4, 4)).save(g / 'new.png'), 'new.png'),
    (lambda g: (g / '000001.png').unlink(), '000001.png'),
    (lambda g: PIL.Image.new('RGB', (4, 4), 7).save(g / '000002.png'), '000002.png')])
def test_a_folder_that_changes_while_it_is_read(tmp_path, change, example):
    """Files that come, go or are written again."""
    write_images(tmp_path / 'g', batch_of(4))
    source, _ = all_of(tmp_path / 'g')
    source.check_unchanged()
    change(tmp_path / 'g')
    with pytest.raises(UserError, match=f'changed while it was being read .1 files, such as {example}') as caught:
        source.check_unchanged()
    assert '\n' not in caught.value.message


def test_an_archive_that_changes_while_it_is_read(tmp_path):
    np.save(tmp_path / 'a.npy', batch_of(4))
    source, _ = all_of(tmp_path / 'a.npy')
    source.check_unchanged()
    with open(tmp_path / 'a.npy', 'ab') as f:
        f.write(b'more')
    with pytest.raises(UserError, match='changed while it was being read'):
        source.check_unchanged()


def test_single_images_by_index(tmp_path):
    images = batch_of(3)
    write_images(tmp_path / 'g', images)
    source = image_files.ImageFiles(tmp_path / 'g', '--gen-path')
    assert (source[1] == images[1]).all() and source.name(1) == '000001.png'
    (tmp_path / 'g' / '000002.png').unlink()
    with pytest.raises(image_files.BadImages, match='000002.png cannot be read'):
        source[2]
