# SPDX-License-Identifier: Apache-2.0
"""Packed data sets hold what the pictures held, are mapped where they lie, and are refused in one line where they are none."""

import os
from pathlib import Path

import numpy as np
import pytest

from dnnlib import UserError
from dnnlib.fingerprint import data_differences
from training.data.dataset import ImageDataset
from training.data.packed import ALIGN, Packed, is_packed, new_packed

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 6), dtype=np.uint8)
LABELS, SIGMAS = np.arange(20) % 7, np.linspace(0, 1, 20)


def write(dest, images=IMAGES, **tables):
    with new_packed(dest, images.shape[1:], images.dtype) as folder:
        for image in images:
            folder.append(image.tobytes())
        folder.finish(tables, units={'offset': 1, 'scale': 2} if images.dtype == np.float32 else None)
    return str(dest)


@pytest.mark.parametrize('name', ['packed', 'packed.npz'])
@pytest.mark.parametrize('images', [IMAGES, IMAGES.astype(np.float32)])
def test_round_trip(tmp_path, name, images):
    path = write(tmp_path / name, images, labels=LABELS, sigmas=SIGMAS, sigma_max=np.where(SIGMAS < 0.5, np.inf, SIGMAS))
    assert os.listdir(tmp_path) == [name] and is_packed(path)
    data = ImageDataset(path, use_labels=True)
    scale = 2 if images.dtype == np.float32 else 1
    assert data.image_shape == (3, 4, 6) and data.is_float == (scale == 2) and data.label_dim == 7 and len(data) == 20
    np.testing.assert_array_equal(np.stack([data.decode(i) for i in range(20)]), images)
    np.testing.assert_array_equal(data.classes, LABELS)
    np.testing.assert_allclose(data.native_sigma, SIGMAS / scale)
    assert np.isinf(data.sigma_max[SIGMAS < 0.5]).all() and data.sigma_max[-1] == 1 / scale
    assert isinstance(data.contents.images, np.memmap)
    assert not data.contents.images.flags.writeable


def test_an_npz_is_numpys_own(tmp_path):
    """It opens with np.load, its arrays can be mapped, and the same images give the same bytes."""
    path = write(tmp_path / 'a.npz', IMAGES, labels=LABELS)
    with np.load(path) as found:
        np.testing.assert_array_equal(found['images'], IMAGES)
        np.testing.assert_array_equal(found['labels'], LABELS)
    assert all(member.offset % ALIGN == 0 for member in Packed(path)._members.values())
    write(tmp_path / 'b.npz', IMAGES, labels=LABELS)
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()


def test_vectors_as_labels(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    data = ImageDataset(write(tmp_path / 'a', labels=vectors), use_labels=True)
    assert data.label_dim == 3 and data.classes is None
    np.testing.assert_array_equal(data.labels([3, 5]), vectors[[3, 5]])


@pytest.mark.parametrize('name', ['packed', 'packed.npz'])
def test_fingerprints_tell_what_differs(tmp_path, name):
    def told(place, **options):
        (tmp_path / place).mkdir()
        return ImageDataset(write(tmp_path / place / name, **options)).fingerprint()

    first = told('a', labels=LABELS)
    if name.endswith('npz'):
        assert first == told('b', labels=LABELS)
        assert data_differences(first, told('c', images=255 - IMAGES, labels=LABELS)) == [
            'images of the same names and sizes with other contents']
    assert data_differences(first, told('d', labels=LABELS[::-1]))[-1] == 'another dataset.json (labels, sigmas)'
    assert data_differences(first, told('e', images=IMAGES[:5], labels=LABELS[:5]))[0] == '5 images instead of 20'
    assert 'images with other names or sizes' in data_differences(first, told('f', images=IMAGES[..., :3].copy(), labels=LABELS))[0]


def test_nothing_half_written(tmp_path):
    for name in ('a', 'a.npz'):
        with pytest.raises(KeyboardInterrupt), new_packed(tmp_path / name, (3, 4, 6), np.uint8) as folder:
            folder.append(IMAGES[0].tobytes())
            raise KeyboardInterrupt
    assert not os.listdir(tmp_path)


def damaged(folder, change):
    path = write(folder / 'a', labels=LABELS)
    change(folder / 'a')
    with pytest.raises(UserError) as error:
        ImageDataset(path, use_labels=True)
    assert '\n' not in error.value.message
    return error.value.message


@pytest.mark.parametrize('change, words', [
    (lambda p: (p / 'dataset.json').write_text('{'), 'not a JSON file'),
    (lambda p: (p / 'dataset.json').write_text('{"packed": 7}'), '"packed": 7, and this version supports 1'),
    (lambda p: (p / 'dataset.json').write_bytes(b'{"packed": 1' + b' ' * 2 ** 21), 'more than the'),
    (lambda p: (p / 'images.npy').write_bytes(b'x'), 'cannot read images.npy (not an .npy file)'),
    (lambda p: os.truncate(p / 'images.npy', 1000), 'more numbers than it holds'),
    (lambda p: np.save(p / 'images.npy', IMAGES[0]), 'expected uint8 or float32 [N,C,H,W]'),
    (lambda p: np.save(p / 'images.npy', IMAGES.astype(np.int32)), 'expected uint8 or float32 [N,C,H,W]'),
    (lambda p: np.save(p / 'images.npy', np.asfortranarray(IMAGES)), 'expected uint8 or float32 [N,C,H,W]'),
    (lambda p: np.save(p / 'labels.npy', LABELS[:5]), 'one row for each of 20 images'),
    (lambda p: np.save(p / 'labels.npy', -LABELS), 'labels.npy must be classes'),
    (lambda p: np.save(p / 'labels.npy', LABELS.astype(object)), 'not plain numbers'),
    (lambda p: np.save(p / 'sigmas.npy', SIGMAS * np.nan), 'sigmas.npy has the level nan for image 0'),
    (lambda p: np.save(p / 'sigma_max.npy', SIGMAS), 'sigma_max.npy has the limit 0 for image 0')])
def test_damage_is_told_in_one_line(tmp_path, change, words):
    assert words in damaged(tmp_path, change)


def test_npz_of_other_programs(tmp_path):
    np.savez_compressed(tmp_path / 'a.npz', images=IMAGES)
    np.savez(tmp_path / 'b.npz', images=IMAGES)
    (tmp_path / 'c.npz').write_bytes(b'PK')
    for name, words in (('a', 'compressed'), ('b', 'has no dataset.json'), ('c', 'not a zip file')):
        with pytest.raises(UserError, match=words) as error:
            ImageDataset(str(tmp_path / f'{name}.npz'))
        assert 'dataset_tool.py' in error.value.message


@pytest.mark.parametrize('name', ['a', 'a.npz'])
def test_changed_bytes_are_read_or_refused(tmp_path, name):
    """400 data sets, each with some bytes of its heads changed, cut out or added: one line, or what the bytes say."""
    path = Path(write(tmp_path / name, labels=LABELS, sigmas=SIGMAS, sigma_max=1 + SIGMAS))
    files = {file: file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())}
    rng, refused = np.random.default_rng(0), 0
    for _ in range(400):
        file = list(files)[rng.integers(len(files))]
        data = bytearray(files[file])
        heads = [data.find(mark) for mark in (b'\x93NUMPY', b'PK\3\4', b'PK\1\2', b'PK\5\6', b'packed') if mark in data]
        for _ in range(rng.integers(1, 4)):
            place = min(heads[rng.integers(len(heads))] + int(rng.integers(130)), len(data) - 1)
            kind = rng.integers(3)
            data[place:place + (kind != 1)] = b'' if kind == 0 else bytes([rng.integers(256)])
        file.write_bytes(data)
        try:
            dataset = ImageDataset(str(path), use_labels=True)
            assert dataset.decode(0).shape == dataset.image_shape and len(dataset.classes) == len(dataset)
            dataset.fingerprint()
        except UserError as error:
            assert '\n' not in error.message
            refused += 1
        file.write_bytes(files[file])
    assert 100 < refused < 400 and len(ImageDataset(str(path))) == 20
