# SPDX-License-Identifier: Apache-2.0
"""Archives written as published, any source read, float data never clipped, bad input refused in one line."""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import dataset_tool
from tests.support import GOLDEN, ROOT
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.store import ImageStore

DATA = GOLDEN / 'dataset'
FACTS = json.loads((DATA / 'dataset_facts.json').read_text())


def run(*args):
    return CliRunner().invoke(dataset_tool.main, [str(arg) for arg in args])


def convert(source, dest, *args):
    """A conversion that must succeed, in one process; returns what was said."""
    result = run(f'--source={source}', f'--dest={dest}', '--workers=1', *args)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*args):
    """The last line of a call that must fail, and without a traceback."""
    result = run(*args)
    assert result.exit_code != 0 and (result.exception is None or isinstance(result.exception, SystemExit)), result.output
    return result.output.strip().split('\n')[-1]


def pictures(count, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def picture_folder(path, images, names=None):
    for i, image in enumerate(images):
        file = path / (names[i] if names else f'{i:02}.png')
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return path


def members(path):
    """(names in their order in the file, {name: (mode, pixels)}, dataset.json)."""
    with zipfile.ZipFile(path) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        names = archive.namelist()
        images = [Image.open(io.BytesIO(archive.read(name))) for name in names if name.endswith('.png')]
        pixels = {name: (image.mode, np.asarray(image)) for name, image in zip(names, images)}
        return names, pixels, archive.read('dataset.json')


def same_as_golden(path, name):
    names, pixels, meta = members(path)
    golden_names, golden_pixels, golden_meta = members(DATA / f'{name}.zip')
    assert names == golden_names == FACTS[name]['member_order']
    assert meta == golden_meta
    for key, (mode, array) in golden_pixels.items():
        assert pixels[key][0] == mode
        np.testing.assert_array_equal(pixels[key][1], array)


# ----------------------------------------------------------------------------------------------------
# As published


def test_published_archive_of_class_folders(tmp_path):
    _, golden, _ = members(DATA / 'A_subfolders.zip')
    names = FACTS['A_subfolders']['member_to_source']
    picture_folder(tmp_path / 'in', [golden[key][1] for key in names], list(names.values()))
    convert(tmp_path / 'in', tmp_path / 'a.zip')
    same_as_golden(tmp_path / 'a.zip', 'A_subfolders')


def test_published_archive_of_grey_images_with_a_label_file(tmp_path):
    _, golden, _ = members(DATA / 'B_datasetjson_gray.zip')
    picture_folder(tmp_path / 'in', [image for _, image in golden.values()])
    (tmp_path / 'in' / 'dataset.json').write_text(json.dumps({'labels': FACTS['B_datasetjson_gray']['source_labels']}))
    convert(tmp_path / 'in', tmp_path / 'b.zip')
    same_as_golden(tmp_path / 'b.zip', 'B_datasetjson_gray')


@pytest.mark.parametrize('name, args', [
    ('C_center_crop', ['--transform=center-crop', '--resolution=8x8']),
    ('C_center_crop_wide', ['--transform=center-crop-wide', '--resolution=16x12']), ('C_scale', ['--resolution=16x16'])])
def test_published_transforms(tmp_path, name, args):
    convert(DATA / 'C_transform_sources', tmp_path / 'c.zip', *args)
    same_as_golden(tmp_path / 'c.zip', name)


def test_published_archive_of_one_folder_has_no_labels(tmp_path):
    _, golden, _ = members(DATA / 'D_single_dir.zip')
    picture_folder(tmp_path / 'in' / 'one', [image for _, image in golden.values()])
    convert(tmp_path / 'in', tmp_path / 'd.zip')
    same_as_golden(tmp_path / 'd.zip', 'D_single_dir')


def test_zip_source_and_folder_dest_are_the_same_data(tmp_path):
    convert(DATA / 'A_subfolders.zip', tmp_path / 'out')
    convert(tmp_path / 'out', tmp_path / 'back.zip')
    same_as_golden(tmp_path / 'back.zip', 'A_subfolders')
    assert sorted(os.listdir(tmp_path / 'out')) == ['00000', 'dataset.json']


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    picture_folder(tmp_path / 'in', pictures(100))
    for workers in (1, 3):
        run(f'--source={tmp_path / "in"}', f'--dest={tmp_path}/{workers}.zip', f'--workers={workers}')
    assert (tmp_path / '1.zip').read_bytes() == (tmp_path / '3.zip').read_bytes()


# ----------------------------------------------------------------------------------------------------
# Sources


def cifar_file(path, extra=None):
    """A tar file like CIFAR-10's: five training batches of 2 and one of tests, protocol-2 pickles."""
    images, labels = pictures(10, (3072,)), list(range(10))
    with tarfile.open(path, 'w:gz') as archive:
        for name, rows in [(f'data_batch_{i + 1}', slice(2 * i, 2 * i + 2)) for i in range(5)] + [('test_batch', slice(0, 2))]:
            data = pickle.dumps({'data': images[rows], 'labels': labels[rows], **(extra or {})}, protocol=2)
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return images.reshape(10, 3, 32, 32)


def test_cifar(tmp_path):
    images = cifar_file(tmp_path / 'cifar-10-python.tar.gz')
    convert(tmp_path / 'cifar-10-python.tar.gz', tmp_path / 'x.zip')
    dataset = ImageDataset(str(tmp_path / 'x.zip'), use_labels=True)
    assert len(dataset) == 10 and dataset.classes.tolist() == list(range(10))
    assert all((dataset.decode(i) == images[i]).all() for i in range(10))
    for args in (['cifar-10-python.tar.gz', '--split=test'], ['cifar-10-python.tar.gz:split=test']):
        convert(tmp_path / args[0], tmp_path / 'cifar-test.zip', *args[1:])
        dataset = ImageDataset(str(tmp_path / 'cifar-test.zip'), use_labels=True)
        assert dataset.classes.tolist() == [0, 1] and (dataset.decode(1) == images[1]).all()


class Evil:
    def __reduce__(self):
        return os.system, ('touch evil-was-here',)


def test_pickled_code_in_a_tar_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar_file(tmp_path / 'cifar-10-python.tar.gz', {'evil': Evil()})
    line = refusal('--source=cifar-10-python.tar.gz', '--dest=x.zip')
    assert 'posix.system' in line and not (tmp_path / 'evil-was-here').exists() and not (tmp_path / 'x.zip').exists()


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_mnist(tmp_path, suffix):
    images, labels = pictures(7, (28, 28)), np.array([3, 1, 4, 1, 5, 9, 2], np.uint8)
    opener = gzip.open if suffix else open
    for name, array in (('train-images-idx3-ubyte', images), ('train-labels-idx1-ubyte', labels)):
        with opener(tmp_path / (name + suffix), 'wb') as file:
            file.write(struct.pack('>HBB', 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes())
    convert(tmp_path / f'train-images-idx3-ubyte{suffix}', tmp_path / 'x.zip')
    dataset = ImageDataset(str(tmp_path / 'x.zip'), use_labels=True)
    assert dataset.image_shape == (1, 28, 28) and dataset.classes.tolist() == labels.tolist()
    assert all((dataset.decode(i)[0] == images[i]).all() for i in range(7))


def test_digits(tmp_path):
    pytest.importorskip('sklearn')
    from sklearn.datasets import load_digits
    found = load_digits()
    for part in (0, 1):
        convert('digits', tmp_path / f'{part}.zip', f'--part={part}/2', '--max-images=898')
        dataset = ImageDataset(str(tmp_path / f'{part}.zip'), use_labels=True)
        assert len(dataset) == 898 and dataset.image_shape == (1, 8, 8)
        assert dataset.classes.tolist() == found.target[part::2][:898].tolist()
        want = np.round(found.images[part::2][:898] * 255 / 16)
        assert all((dataset.decode(i)[0] == want[i]).all() for i in range(898))


@pytest.mark.parametrize('layout, shape', [('nhw', (6, 8, 12)), ('nhwc', (6, 8, 12, 3)), ('nchw', (6, 3, 8, 12))])
@pytest.mark.parametrize('tell', [False, True])
def test_arrays_of_every_layout(tmp_path, layout, shape, tell):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / 'x.npz', images=images, labels=np.arange(6))
    convert(tmp_path / 'x.npz', tmp_path / 'x.zip', *([f'--layout={layout}'] if tell else []))
    dataset = ImageDataset(str(tmp_path / 'x.zip'), use_labels=True)
    want = images[:, None] if layout == 'nhw' else images.transpose(0, 3, 1, 2) if layout == 'nhwc' else images
    assert dataset.classes.tolist() == list(range(6))
    assert all((dataset.decode(i) == want[i]).all() for i in range(6))


def test_ambiguous_layout_is_asked_for(tmp_path):
    np.save(tmp_path / 'x.npy', np.zeros([2, 3, 8, 3], np.uint8))
    line = refusal(f'--source={tmp_path}/x.npy', f'--dest={tmp_path}/x.zip')
    assert '--layout=nhwc or --layout=nchw' in line
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip', '--layout=nhwc')
    assert ImageDataset(str(tmp_path / 'x.zip')).image_shape == (3, 3, 8)


# ----------------------------------------------------------------------------------------------------
# Float data


def test_five_channel_float_rectangles_round_trip(tmp_path):
    """Values come back bit by bit; units are mean and 2 std, so that network units have mean 0 and std 0.5."""
    images = np.random.default_rng(0).normal(300, 7, (20, 5, 48, 80)).astype(np.float32)
    np.save(tmp_path / 'x.npy', images)
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip')
    dataset = ImageDataset(str(tmp_path / 'x.zip'))
    assert all((dataset.decode(i) == images[i]).all() for i in range(20))
    np.testing.assert_allclose([dataset.units['offset'], dataset.units['scale']], [images.mean(), images.std() / 0.5], rtol=1e-4)
    network = ImageStore(dataset, Corruption(), dataset.native_sigma).gather(range(20))
    assert abs(network.mean()) < 1e-3 and abs(network.std() - 0.5) < 1e-3


def test_sixteen_bits_are_kept(tmp_path):
    """uint16 arrays and 16-bit grey PNG and TIFF are not cut to 8 bits; --units are used as given."""
    images = np.random.default_rng(0).integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    np.save(tmp_path / 'x.npy', images)
    for suffix in ('png', 'tif'):
        picture_folder(tmp_path / suffix, images, [f'{i}.{suffix}' for i in range(4)])
    for source in (tmp_path / 'x.npy', tmp_path / 'png', tmp_path / 'tif'):
        convert(source, tmp_path / 'x.zip', '--units=32768,65536')
        dataset = ImageDataset(str(tmp_path / 'x.zip'))
        assert dataset.is_float and dataset.units == {'offset': 32768, 'scale': 65536}
        assert all((dataset.decode(i)[0] == images[i]).all() for i in range(4))


def test_sixteen_bit_colour_png_is_refused_not_rounded(tmp_path):
    """Pillow opens such a file as 8-bit RGB; the low bytes would be lost in silence."""
    rows = b''.join(b'\0' + bytes(8 * 6) for _ in range(8))
    parts = ((b'IHDR', struct.pack('>IIBBBBB', 8, 8, 16, 2, 0, 0, 0)), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'deep.png').write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in parts))
    assert 'none of its 1 images can be read' in refusal(f'--source={tmp_path}/in', f'--dest={tmp_path}/x.zip')


def test_noise_on_stored_images_stays_gaussian(tmp_path):
    """A natively noisy float set: tails are not clipped, and sigmas, in stored units, are scaled on reading."""
    rng, sigmas = np.random.default_rng(0), [0.0, 10.0, 20.0]
    images = np.stack([rng.normal(0, 40, (1, 64, 64)) + s * rng.normal(size=(1, 64, 64)) for s in sigmas]).astype(np.float32)
    np.save(tmp_path / 'x.npy', images)
    np.save(tmp_path / 's.npy', sigmas)
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip', f'--sigmas={tmp_path}/s.npy', '--units=0,80', '--layout=nchw')
    dataset = ImageDataset(str(tmp_path / 'x.zip'))
    np.testing.assert_allclose(dataset.native_sigma, [0, 0.125, 0.25])
    assert all((dataset.decode(i) == images[i]).all() for i in range(3))
    convert(tmp_path / 'x.zip', tmp_path / 'again.zip')  # units and sigmas travel on
    again = ImageDataset(str(tmp_path / 'again.zip'))
    assert again.units == dataset.units and again.native_sigma.tolist() == dataset.native_sigma.tolist()
    assert 'would make the noise' in refusal(f'--source={tmp_path}/x.zip', f'--dest={tmp_path}/y.zip', '--resolution=32x32')


def test_upper_limits_are_written_and_travel_on(tmp_path):
    picture_folder(tmp_path / 'in', pictures(3))
    (tmp_path / 'm.csv').write_text('file,limit\n00.png,inf\n01.png,0.1\n02.png,0.3\n')
    (tmp_path / 'm.json').write_text(json.dumps({'sigma_max': {'00.png': None, '01.png': 0.1, '02.png': 0.3}}))
    for table in ('m.csv', 'm.json'):
        convert(tmp_path / 'in', tmp_path / 'x.zip', f'--sigma_max={tmp_path / table}', '--sigmas=0.1')
        dataset = ImageDataset(str(tmp_path / 'x.zip'))
        assert dataset.sigma_max.tolist() == [np.inf, 0.1, 0.3] and dataset.native_sigma.tolist() == [0.1] * 3
    meta = members(tmp_path / 'x.zip')[2]
    assert b'Infinity' not in meta and json.loads(meta)['sigma_max'][0][1] is None
    convert(tmp_path / 'x.zip', tmp_path / 'again.zip', '--part=1/2')
    assert ImageDataset(str(tmp_path / 'again.zip')).sigma_max.tolist() == [0.1]
    said = run('stats', tmp_path / 'x.zip').output
    assert 'sigma_max   2 of 3 images have an upper limit; min 0.1, median 0.2, mean 0.2, max 0.3' in said
    assert '1 of them can never be used' in said
    convert(tmp_path / 'in', tmp_path / 'y.zip', '--sigma-max=0.5')
    assert (ImageDataset(str(tmp_path / 'y.zip')).sigma_max == 0.5).all()
    convert(tmp_path / 'in', tmp_path / 'z.zip')
    assert b'sigma_max' not in members(tmp_path / 'z.zip')[2] and 'sigma_max' not in run('stats', tmp_path / 'z.zip').output


def test_lower_limits_are_written_and_travel_on(tmp_path):
    picture_folder(tmp_path / 'in', pictures(4))
    (tmp_path / 'm.csv').write_text('file,limit\n00.png,0\n01.png,0.1\n02.png,0.3\n03.png,inf\n')
    convert(tmp_path / 'in', tmp_path / 'x.zip', f'--sigma-min={tmp_path / "m.csv"}')
    assert ImageDataset(str(tmp_path / 'x.zip')).sigma_min.tolist() == [0, 0.1, 0.3, np.inf]
    meta = members(tmp_path / 'x.zip')[2]
    assert b'Infinity' not in meta and json.loads(meta)['sigma_min'][0][1] is None
    convert(tmp_path / 'x.zip', tmp_path / 'again.zip', '--part=1/2')
    assert ImageDataset(str(tmp_path / 'again.zip')).sigma_min.tolist() == [0.1, np.inf]
    said = run('stats', tmp_path / 'x.zip').output
    assert 'sigma_min   3 of 4 images have a lower limit; min 0.1, median 0.3' in said and '1 of them can never be used' in said
    assert 'has the limit -1 for 00' in refusal(f'--source={tmp_path}/in', f'--dest={tmp_path}/y.zip', '--sigma-min=-1').replace('.png', '')


def test_eight_bit_images_with_sigmas(tmp_path):
    picture_folder(tmp_path / 'in', pictures(3))
    (tmp_path / 's.csv').write_text('file,sigma\n00.png,0\n01.png,0.1\n02.png,0.3\n')
    convert(tmp_path / 'in', tmp_path / 'x.zip', f'--sigmas={tmp_path}/s.csv')
    np.testing.assert_allclose(ImageDataset(str(tmp_path / 'x.zip')).native_sigma, [0, 0.1, 0.3])


def test_eight_bit_values_without_a_png_form_keep_their_scale(tmp_path):
    images = pictures(3, (5, 8, 8))
    np.save(tmp_path / 'x.npy', images)
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip')
    dataset = ImageDataset(str(tmp_path / 'x.zip'))
    assert dataset.units == {'offset': 127.5, 'scale': 127.5} and (dataset.decode(1) == images[1]).all()


def test_floats_are_resized_without_clipping(tmp_path):
    image = np.full([1, 1, 8, 8], -5.0, np.float32)
    image[..., 4:] = 300.0
    np.save(tmp_path / 'x.npy', image)
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip', '--resolution=16x16')
    stored = ImageDataset(str(tmp_path / 'x.zip')).decode(0)
    assert stored.shape == (1, 16, 16) and stored.max() > 300 and stored.min() < -5  # Lanczos overshoots at the edge


# ----------------------------------------------------------------------------------------------------
# Labels and choice


def labels_of(path):
    with zipfile.ZipFile(path) as archive:
        return [label for _, label in json.loads(archive.read('dataset.json'))['labels']]


@pytest.mark.parametrize('name, text, want', [
    ('l.csv', 'file,label\n00.png,2\n02.png,0\n01.png,1\n', [2, 1, 0]), ('l.csv', '2\n1\n0\n', [2, 1, 0]),
    ('l.csv', '00.png,dog\n01.png,cat\n02.png,dog\n', [1, 0, 1]),
    ('l.csv', '00.png,0.5,1\n01.png,1,2\n02.png,0,0\n', [[0.5, 1], [1, 2], [0, 0]]),
    ('l.json', '{"labels": [["00.png", 2], ["01.png", 1], ["02.png", 0]]}', [2, 1, 0]),
    ('l.json', '{"00.png": 2, "01.png": 1, "02.png": 0}', [2, 1, 0]),
    ('l.json', '[2, 1, 0]', [2, 1, 0])])
def test_label_files(tmp_path, name, text, want):
    picture_folder(tmp_path / 'in', pictures(3))
    (tmp_path / name).write_text(text)
    convert(tmp_path / 'in', tmp_path / 'x.zip', f'--labels={tmp_path / name}')
    assert labels_of(tmp_path / 'x.zip') == want


def test_labels_from_npy(tmp_path):
    picture_folder(tmp_path / 'in', pictures(3))
    np.save(tmp_path / 'l.npy', [4, 0, 2])
    convert(tmp_path / 'in', tmp_path / 'x.zip', f'--labels={tmp_path}/l.npy')
    assert labels_of(tmp_path / 'x.zip') == [4, 0, 2]


def test_max_images_and_what_they_lose(tmp_path):
    folder = picture_folder(tmp_path / 'in', pictures(9), [f'{c}/{i}.png' for c in 'abc' for i in range(3)])
    assert 'keeps 2 of 3 classes' in convert(folder, tmp_path / 'first.zip', '--max-images=4')
    assert labels_of(tmp_path / 'first.zip') == [0, 0, 0, 1]
    assert 'Warning' not in convert(folder, tmp_path / 'spread.zip', '--max-images=4', '--sample=spread')
    assert labels_of(tmp_path / 'spread.zip') == [0, 0, 1, 2]
    convert(folder, tmp_path / 'part.zip', '--part=1/3', '--max-images=2')
    np.testing.assert_array_equal(ImageDataset(str(tmp_path / 'part.zip')).decode(1), pictures(9)[4].transpose(2, 0, 1))
    (folder / 'dataset.json').write_text('{"labels": null}')
    convert(folder, tmp_path / 'none.zip', '--max-images=3', '--sample=spread')
    dataset = ImageDataset(str(tmp_path / 'none.zip'))  # dataset.json wins: no labels; spread evenly: 0, 3, 6
    assert not dataset.has_labels and (dataset.decode(2) == pictures(9)[6].transpose(2, 0, 1)).all()


# ----------------------------------------------------------------------------------------------------
# Bad images


def mixed_folder(path):
    """Seven good RGB images, one of another size, one of 16 bits, one cut short, one that is no image."""
    picture_folder(path, pictures(7))
    Image.fromarray(pictures(1, (8, 12, 3))[0]).save(path / 'wide.png')
    Image.fromarray(pictures(1, (8, 8))[0].astype(np.uint16)).save(path / 'deep.png')
    (path / 'short.png').write_bytes((path / '00.png').read_bytes()[:90])
    (path / 'junk.jpg').write_bytes(b'junk')
    return path


def test_all_offenders_are_listed_and_nothing_is_written(tmp_path):
    folder = mixed_folder(tmp_path / 'in')
    result = run(f'--source={folder}', f'--dest={tmp_path}/x.zip', '--workers=1')
    assert result.exit_code == 1
    for text in ('wide.png: 12x8 RGB', 'deep.png: 8x8 I;16', 'short.png: cannot be read', 'junk.jpg: cannot be read',
                 '4 of 11 images cannot be used'):
        assert text in result.output
    assert os.listdir(tmp_path) == ['in']


def test_bad_images_are_left_out_when_asked(tmp_path):
    folder = mixed_folder(tmp_path / 'in')
    assert 'Left out 4 of 11' in convert(folder, tmp_path / 'x.zip', '--on-bad=skip')
    assert len(ImageDataset(str(tmp_path / 'x.zip'))) == 7
    assert 'Left out 3 of 11' in convert(folder, tmp_path / 'y.zip', '--on-bad=skip', '--channels=1', '--resolution=8x8')
    dataset = ImageDataset(str(tmp_path / 'y.zip'))
    assert len(dataset) == 8 and dataset.image_shape == (1, 8, 8)


def test_channels(tmp_path):
    image = Image.fromarray(pictures(1)[0])
    (tmp_path / 'in').mkdir()
    for mode in ('RGB', 'RGBA', 'L', 'LA'):
        image.convert(mode).save(tmp_path / 'in' / f'{mode}.png')
    for channels, mode in ((1, 'L'), (3, 'RGB')):
        convert(tmp_path / 'in', tmp_path / 'x.zip', f'--channels={channels}')
        dataset = ImageDataset(str(tmp_path / 'x.zip'))
        for i, source in enumerate(('L', 'LA', 'RGB', 'RGBA')):
            want = np.asarray(image.convert(source).convert(mode)).reshape(8, 8, channels).transpose(2, 0, 1)
            np.testing.assert_array_equal(dataset.decode(i), want)


def test_values_that_are_not_finite_are_bad(tmp_path):
    images = np.zeros([3, 4, 4], np.float32)
    images[1, 0, 0] = np.nan
    np.save(tmp_path / 'x.npy', images)
    result = run(f'--source={tmp_path}/x.npy', f'--dest={tmp_path}/x.zip', '--workers=1')
    assert result.exit_code == 1 and '1: 4x4 float32, with values that are not finite' in result.output


# ----------------------------------------------------------------------------------------------------
# Refusals, one line each


def test_refused_options(tmp_path):
    source = f'--source={picture_folder(tmp_path / "in", pictures(3))}'
    dest = f'--dest={tmp_path}/x.zip'
    (tmp_path / 'l.csv').write_text('00.png,1\n01.png,1\n')
    (tmp_path / 'bad.json').write_text('{')
    for args, text in [
            (('--source=none', dest), 'no such file'), ((source, '--dest=x.tar'), 'must end in .zip'),
            ((source, f'--dest={tmp_path}/in'), 'not empty'), ((source, dest, '--transform=center-crop'), 'needs --resolution'),
            ((source, dest, '--transform=center-crop', '--resolution=8x4'), 'crops a square'),
            ((source, dest, '--transform=center-crop-wide', '--resolution=8x16'), 'width above the height'),
            ((source, dest, '--resolution=0x8'), 'WIDTHxHEIGHT'), ((source, dest, '--part=2/2'), 'K < N'),
            ((source, dest, '--sample=spread'), 'needs --max-images'), ((source, dest, '--units=0,1'), '--units is for float'),
            ((source, dest, '--units=0,0'), 'more than 0'),
            ((source, dest, f'--labels={tmp_path}/l.csv'), 'misses 1 of 3 images, such as 02.png'),
            ((source, dest, f'--labels={tmp_path}/bad.json'), 'bad.json: not a JSON file'),
            ((source, dest, '--sigmas=-1'), 'levels must be 0 or more'),
            ((source, dest, '--sigma-max=0'), 'limits must be above 0'),
            ((source, dest, '--sigma-max=x'), '--sigma-max=x: neither a number'),
            ((source, dest, '--sigmas=x'), 'neither a number nor a file'), ((dest,), "Missing option '--source'")]:
        assert text in refusal(*args), args
    assert sorted(os.listdir(tmp_path)) == ['bad.json', 'in', 'l.csv']


def test_broken_sources(tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'x.txt').write_text('x')
    (tmp_path / 'object.npy').write_bytes(b'')
    np.save(tmp_path / 'flat.npy', np.zeros(3))
    for name in ('a.zip', 'a.tar.gz', 'train-images-idx3-ubyte.gz', 'train-images-idx3-ubyte', 'a.npz'):
        (tmp_path / name).write_bytes(b'not what it says')
    for name, text in [('empty', 'no images'), ('x.txt', 'not a folder'), ('object.npy', 'cannot be read'),
                       ('flat.npy', 'expected numbers'), ('a.zip', 'not a whole zip'), ('a.tar.gz', 'cannot be read'),
                       ('a.npz', 'cannot be read'),
                       ('train-images-idx3-ubyte.gz', 'cannot be read'), ('train-images-idx3-ubyte', 'not an idx file')]:
        assert text in refusal(f'--source={tmp_path / name}', f'--dest={tmp_path}/out.zip'), name


def test_dest_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('x')
    line = refusal(f'--source={DATA / "A_subfolders.zip"}', f'--dest={tmp_path}/file/x.zip', '--workers=1')
    assert line.startswith(f'Error: {tmp_path}/file')


def test_as_a_program(tmp_path):
    """The published call with underscores, from another folder; a failure is one line on stderr, without a traceback."""
    program = [sys.executable, str(ROOT / 'dataset_tool.py')]
    good = subprocess.run([*program, f'--source={DATA / "A_subfolders.zip"}', '--dest=x.zip', '--max_images=5'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert good.returncode == 0 and good.stdout.endswith('x-sheet.png: contact sheet with 5 of them\nx.zip: 5 images\n'), good.stderr
    bad = subprocess.run([*program, '--source=none', '--dest=x.zip'], cwd=tmp_path, capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith('Error: ') and bad.stderr.count('\n') == 1
    assert sorted(os.listdir(tmp_path)) == ['x-sheet.png', 'x.zip']
