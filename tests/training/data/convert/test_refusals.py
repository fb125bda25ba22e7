# SPDX-License-Identifier: Apache-2.0
"""Converting does what was meant, or refuses it in one line: labels, names, levels, channels, files that hold something else."""

import json
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.test_dataset_tool import convert, labels_of, picture_folder, pictures, refusal, run
from training.data.dataset import ImageDataset

# ----------------------------------------------------------------------------------------------------
# Labels and names


@pytest.mark.parametrize('name, text', [
    ('l.csv', 'file,label\n00.png,3.0\n01.png,0.0\n02.png,1.0\n'), ('l.csv', '3.0\n0\n1.0\n'), ('l.json', '[3.0, 0, 1.0]'),
    ('l.json', '{"00.png": 3.0, "01.png": 0.0, "02.png": 1}')])
def test_whole_numbers_with_a_point_are_classes(tmp_path, name, text):
    """As spreadsheets write them; they were taken for vectors of one number."""
    picture_folder(tmp_path / 'in', pictures(3))
    (tmp_path / name).write_text(text)
    convert(tmp_path / 'in', tmp_path / 'x.zip', f'--labels={tmp_path / name}')
    dataset = ImageDataset(str(tmp_path / 'x.zip'), use_labels=True)
    assert dataset.label_dim == 4 and dataset.classes.tolist() == [3, 0, 1]
    assert labels_of(tmp_path / 'x.zip') == [3, 0, 1] and '3.0' not in zipfile.ZipFile(tmp_path / 'x.zip').read('dataset.json').decode()


def test_labels_that_are_no_classes(tmp_path):
    folder, dest = picture_folder(tmp_path / 'in', pictures(3)), f'--dest={tmp_path}/x.zip'
    for values, text in (([0, 3.5, 1.5], 'labels that are not whole numbers for 2 of 3 images, such as 3.5'),
                         ([0, float('nan'), float('nan')], '2 of 3 labels that are not finite (NaN or infinite)'),
                         ([[0, 1], [float('nan'), 1], [2, 3]], '1 of 3 labels that are not finite (NaN or infinite)')):
        np.save(tmp_path / 'l.npy', values)
        assert text in refusal(f'--source={folder}', dest, f'--labels={tmp_path}/l.npy')
        for key, option in (('sigmas', '--sigmas'), ('sigma_max', '--sigma-max')):
            if np.isnan(np.ravel(values)).any() and np.ndim(values) == 1:
                assert ' of 3 are not)' in refusal(f'--source={folder}', dest, f'{option}={tmp_path}/l.npy'), key
    assert not (tmp_path / 'x.zip').exists()


def test_a_name_that_may_mean_two_images_is_refused(tmp_path):
    """A table by file names without folders, where two folders hold files of one name: both images got the one value."""
    folder = picture_folder(tmp_path / 'in', pictures(3), ['a/1.png', 'b/1.png', 'b/2.png'])
    for text in ('1.png,5\n2.png,6\n', 'a/1.png,5\n1.png,7\n2.png,6\n'):
        (tmp_path / 't.csv').write_text(text)
        for option in ('--labels', '--sigmas', '--sigma-max'):
            line = refusal(f'--source={folder}', f'--dest={tmp_path}/x.zip', f'{option}={tmp_path}/t.csv')
            assert 't.csv: "1.png" may be a/1.png or b/1.png; give names with their folders' in line
    (tmp_path / 't.csv').write_text('a/1.png,5\nb/1.png,7\n2.png,6\n')
    convert(folder, tmp_path / 'x.zip', f'--labels={tmp_path}/t.csv')
    assert labels_of(tmp_path / 'x.zip') == [5, 7, 6]


def test_a_file_that_is_given_two_values_is_refused(tmp_path):
    folder = picture_folder(tmp_path / 'in', pictures(2))
    (tmp_path / 't.csv').write_text('00.png,5\n01.png,6\n00.png,7\n')
    assert 't.csv: has several values for 00.png' in refusal(f'--source={folder}', f'--dest={tmp_path}/x.zip', f'--labels={tmp_path}/t.csv')
    (tmp_path / 't.csv').write_text('00.png,5\n01.png,6\n00.png,5\n')
    convert(folder, tmp_path / 'x.zip', f'--labels={tmp_path}/t.csv')
    (folder / 'dataset.json').write_text(json.dumps({'labels': [['00.png', 1], ['01.png', 0], ['00.png', 0]]}))
    with pytest.raises(Exception, match='has several values for 00.png'):
        ImageDataset(str(folder), use_labels=True)


def test_mnist_in_a_folder_called_images(tmp_path):
    """The labels lie beside the images, whatever the folders are called."""
    folder = tmp_path / 'my-images' / 'idx3'
    folder.mkdir(parents=True)
    for name, array in (('train-images-idx3-ubyte', pictures(3, (28, 28))), ('train-labels-idx1-ubyte', np.array([3, 1, 4], np.uint8))):
        (folder / name).write_bytes(struct.pack('>HBB', 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes())
    convert(folder / 'train-images-idx3-ubyte', tmp_path / 'x.zip')
    assert ImageDataset(str(tmp_path / 'x.zip'), use_labels=True).classes.tolist() == [3, 1, 4]


def test_folders_of_other_programs_are_no_classes(tmp_path):
    names = ['cat/1.png', 'dog/2.png', '__MACOSX/cat/1.png', '.ipynb_checkpoints/2.png']
    convert(picture_folder(tmp_path / 'in', pictures(4), names), tmp_path / 'x.zip')
    assert labels_of(tmp_path / 'x.zip') == [0, 1]


# ----------------------------------------------------------------------------------------------------
# Levels and channels


def levels_of(path):
    return ImageDataset(str(path)).native_sigma


def noisy_pictures(sigma, shape=(96, 96, 3), seed=0):
    """A grey plane with white noise of std sigma in network units, as 8-bit [H,W,C]."""
    noise = np.random.default_rng(seed).normal(0, sigma, shape)
    return np.round(127.5 * (1 + np.clip(noise, -1, 1))).astype(np.uint8)


def test_grey_from_colours_has_less_noise(tmp_path):
    """The luma of independent noise: std times sqrt(.299^2 + .587^2 + .114^2). What was grey keeps its level."""
    images = [noisy_pictures(0.2, seed=1), noisy_pictures(0.2, seed=2)[..., 0], noisy_pictures(0.2, seed=3),
              np.dstack([noisy_pictures(0.2, seed=4), np.full([96, 96], 255, np.uint8)])]
    folder = picture_folder(tmp_path / 'in', images)
    convert(folder, tmp_path / 'x.zip', '--channels=1', '--sigmas=0.2')
    dataset = ImageDataset(str(tmp_path / 'x.zip'))
    measured = [float((dataset.decode(i) / 127.5 - 1).std()) for i in range(4)]
    np.testing.assert_allclose(dataset.native_sigma, measured, rtol=5 / np.sqrt(2 * 96 * 96))
    np.testing.assert_allclose(dataset.native_sigma, [0.2 * 0.6685, 0.2, 0.2 * 0.6685, 0.2 * 0.6685], rtol=1e-4)
    values = np.stack([image[..., :3] for image in images if image.ndim == 3]).astype(np.float32)
    np.save(tmp_path / 'f.npy', values)
    convert(tmp_path / 'f.npy', tmp_path / 'f.zip', '--channels=1', '--sigmas=25.5', '--units=127.5,127.5', '--layout=nhwc')
    dataset = ImageDataset(str(tmp_path / 'f.zip'))
    np.testing.assert_allclose(dataset.native_sigma, [dataset.to_network(dataset.decode(i)).std() for i in range(3)], rtol=0.04)
    convert(folder, tmp_path / 'rgb.zip', '--channels=3', '--sigmas=0.2', '--part=2/4')  # no channel changes
    assert levels_of(tmp_path / 'rgb.zip').tolist() == [0.2]


def test_dropping_alpha_keeps_the_level(tmp_path):
    images = [np.dstack([noisy_pictures(0.2), np.full([96, 96], 255, np.uint8)]), noisy_pictures(0.2)]
    convert(picture_folder(tmp_path / 'in', images), tmp_path / 'x.zip', '--channels=3', '--sigmas=0.2')
    assert levels_of(tmp_path / 'x.zip').tolist() == [0.2, 0.2]


def test_noise_is_not_repeated_in_three_channels(tmp_path):
    """Three equal channels of noise are not white noise; images without noise may be repeated."""
    folder = picture_folder(tmp_path / 'in', [noisy_pictures(0.2), noisy_pictures(0.2)[..., 0], noisy_pictures(0)[..., 0]])
    (tmp_path / 's.csv').write_text('00.png,0.2\n01.png,0.2\n02.png,0\n')
    args = f'--source={folder}', f'--dest={tmp_path}/x.zip', '--workers=1', f'--sigmas={tmp_path}/s.csv'
    for channels in ((), ('--channels=3',)):  # most are grey, or all are to be RGB
        result = run(*args, *channels, *(() if channels else ('--part=0/1',)))
        assert result.exit_code == 1 and not (tmp_path / 'x.zip').exists(), result.output
    assert '01.png: grey with noise of level 0.2, which would be repeated in three channels' in result.output
    assert '02.png' not in result.output
    convert(folder, tmp_path / 'x.zip', '--channels=3', '--on-bad=skip', f'--sigmas={tmp_path}/s.csv')
    assert levels_of(tmp_path / 'x.zip').tolist() == [0.2, 0]


def test_levels_of_eight_bit_values_with_many_channels(tmp_path):
    """Such values are stored as floats with units 127.5; their levels are told in network units, as for any 8-bit image."""
    values = noisy_pictures(0.2, (2, 5, 64, 64))
    np.save(tmp_path / 'x.npy', values)
    convert(tmp_path / 'x.npy', tmp_path / 'x.zip', '--sigmas=0.2', '--sigma-max=0.7')
    dataset = ImageDataset(str(tmp_path / 'x.zip'))
    np.testing.assert_allclose(dataset.native_sigma, 0.2)
    np.testing.assert_allclose(dataset.sigma_max, 0.7)
    np.testing.assert_allclose(dataset.to_network(dataset.decode(0)).std(), 0.2, rtol=0.03)
    convert(tmp_path / 'x.zip', tmp_path / 'again.zip')  # float data now, whose levels travel in stored units
    np.testing.assert_allclose(levels_of(tmp_path / 'again.zip'), 0.2)


# ----------------------------------------------------------------------------------------------------
# Unlike images


def imagenet(path, count=40, odd=()):
    """A folder like ImageNet's: JPEGs of any size, most of them RGB, some grey or CMYK; odd: names and images beside them."""
    rng = np.random.default_rng(0)
    for i in range(count):
        mode = {3: 'L', 17: 'L', 21: 'CMYK'}.get(i, 'RGB')
        file = path / f'n{i % 4}' / f'{i:02}.JPEG.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)).convert(mode).save(file)
    for name, image in odd:
        image.save(path / name)
    return path


def test_the_published_imagenet_command(tmp_path):
    """Grey photographs among colours become RGB, and a line says how many."""
    said = convert(imagenet(tmp_path / 'in'), tmp_path / 'x.zip', '--transform=center-crop', '--resolution=64x64')
    assert 'Converted to RGB, like most images: 2 grey, of 40 images' in said
    dataset = ImageDataset(str(tmp_path / 'x.zip'), use_labels=True)
    assert len(dataset) == 40 and dataset.image_shape == (3, 64, 64) and dataset.label_dim == 4
    grey = dataset.decode(30)  # n3/03
    assert 'Converted to RGB' not in convert(tmp_path / 'in', tmp_path / 'y.zip', '--channels=3', '--resolution=64x64',
                                             '--transform=center-crop')
    assert (tmp_path / 'x.zip').read_bytes() == (tmp_path / 'y.zip').read_bytes()
    assert (grey[0] == grey[1]).all() and (grey[1] == grey[2]).all()


def test_colours_among_grey_images_are_refused(tmp_path):
    """Grey would lose what they hold; RGB would repeat what the others hold: the user says which."""
    folder = picture_folder(tmp_path / 'in', [*pictures(3, (8, 8)), *pictures(1)])
    result = run(f'--source={folder}', f'--dest={tmp_path}/x.zip', '--workers=1')
    assert result.exit_code == 1 and '03.png: 8x8 RGB, unlike most others' in result.output and '--channels' in result.output


def test_what_headers_tell_is_refused_before_a_long_conversion(tmp_path, monkeypatch):
    from training.data.convert import conversion
    monkeypatch.setattr(conversion, 'SAMPLE', 20)
    folder = imagenet(tmp_path / 'in', odd=[('n0/04.png', Image.fromarray(np.zeros([70, 70], np.uint16)))])
    (folder / 'n0' / '-.jpg').write_bytes(b'junk')
    monkeypatch.setattr(conversion, 'write', lambda *_: pytest.fail('converted'))
    result = run(f'--source={folder}', f'--dest={tmp_path}/x.zip', '--workers=1', '--resolution=8x8')
    assert result.exit_code == 1 and 'n0/-.jpg: cannot be read (not an image)' in result.output
    assert 'n0/04.png: 70x70 I;16, unlike most others' in result.output
    assert '2 of the 14 images (of 42) that were examined first cannot be used' in result.output


def test_values_that_are_not_finite_are_counted(tmp_path):
    images = np.zeros([3, 4, 4], np.float32)
    images[1, 0, :3] = np.nan, np.inf, -np.inf
    np.save(tmp_path / 'x.npy', images)
    result = run(f'--source={tmp_path}/x.npy', f'--dest={tmp_path}/x.zip', '--workers=1')
    assert result.exit_code == 1 and '1: 4x4 float32, with values that are not finite (3 of 16)' in result.output
    (tmp_path / 'in').mkdir()
    for i in range(3):
        np.save(tmp_path / 'in' / f'{i}.npy', images[i][None])
    (tmp_path / 'in' / 'dataset.json').write_text('{"units": {"offset": 0, "scale": 1}}')
    dataset = ImageDataset(str(tmp_path / 'in'))
    with pytest.raises(Exception, match='1.npy has values that are not finite .3 of 16.'):
        dataset.decode(1)


def test_numbers_that_float32_does_not_hold(tmp_path):
    """Complex numbers lost their imaginary part, whole numbers above 2^24 their last digits."""
    (tmp_path / 'in').mkdir()
    np.save(tmp_path / 'in' / 'a.npy', np.ones([1, 4, 4], np.complex64))
    assert 'cannot be read (complex64, expected real numbers)' in run(f'--source={tmp_path}/in', f'--dest={tmp_path}/x.zip').output
    np.save(tmp_path / 'in' / 'a.npy', np.full([1, 4, 4], 2 ** 24 + 1))
    result = run(f'--source={tmp_path}/in', f'--dest={tmp_path}/x.zip', '--workers=1')
    assert 'a.npy: 4x4 int64, with numbers that float32 cannot represent' in result.output and result.exit_code == 1
    np.save(tmp_path / 'in' / 'a.npy', np.full([1, 4, 4], 2 ** 30))
    convert(tmp_path / 'in', tmp_path / 'x.zip')


def test_why_no_image_can_be_read_is_told(tmp_path):
    (tmp_path / 'in').mkdir()
    for name in 'ab':
        (tmp_path / 'in' / f'{name}.png').write_bytes(b'junk')
    line = refusal(f'--source={tmp_path}/in', f'--dest={tmp_path}/x.zip')
    assert 'none of its 2 images can be read; the first, a.png: cannot be read (not an image)' in line


def test_tables_that_begin_with_a_byte_order_mark(tmp_path):
    """As Excel writes CSV; the mark was taken for part of the heading, or of the first name."""
    folder = picture_folder(tmp_path / 'in', pictures(2))
    for text in ('file,label\n00.png,1\n01.png,0\n', '00.png,1\n01.png,0\n'):
        (tmp_path / 't.csv').write_text(text, encoding='utf-8-sig')
        convert(folder, tmp_path / 'x.zip', f'--labels={tmp_path}/t.csv')
        assert labels_of(tmp_path / 'x.zip') == [1, 0]


def test_bands_of_satellite_images_are_read_whole(tmp_path):
    """Red, green, blue and near infrared in a TIFF: Pillow leaves the fourth band out."""
    pytest.importorskip('tifffile')
    from tests.dnnlib.test_pictures import tiff
    (tmp_path / 'in').mkdir()
    image = pictures(1, (5, 8, 5))[0]
    for count, extra in ((4, (0,)), (5, (0, 0))):
        (tmp_path / 'in' / 'a.tif').write_bytes(tiff(np.ascontiguousarray(image[..., :count]), 2, extra=extra))
        convert(tmp_path / 'in', tmp_path / 'x.zip')
        assert (ImageDataset(str(tmp_path / 'x.zip')).decode(0) == image[..., :count].transpose(2, 0, 1)).all()
