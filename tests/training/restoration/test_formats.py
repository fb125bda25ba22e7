# SPDX-License-Identifier: Apache-2.0
"""Restored images in the formats that they came in: what is read from a file, and written again, is the same."""

import io

import numpy as np
import PIL.Image
import pytest

from tests.support.denoisers import unit
from training.data.convert.readers.files import FileSource
from training.restoration.formats import Form, Forms, encode, float_form, member_form, quantised

RNG = np.random.default_rng(0)
GREY, RGB, DEEP = (RNG.integers(0, top, shape).astype(dtype) for top, shape, dtype in (
    (256, (7, 5), np.uint8), (256, (7, 5, 3), np.uint8), (2 ** 16, (7, 5), np.uint16)))
FLOAT = unit(7, 5).numpy()


def written(form, image):
    buffer = io.BytesIO()
    form(buffer, image)
    return buffer.getvalue()


def pillow(kind):
    return lambda buffer, image: PIL.Image.fromarray(image).save(buffer, kind)


def npy(buffer, image):
    np.save(buffer, image)


def portable(top):
    def write(buffer, image):
        buffer.write(f'P5 5 7 {top}\n'.encode() + image.astype('>u2').tobytes())
    return write


CASES = {'grey.png': (pillow('PNG'), GREY), 'rgb.png': (pillow('PNG'), RGB), 'alpha.png': (pillow('PNG'), np.dstack([RGB, GREY])),
         'deep.png': (pillow('PNG'), DEEP), 'grey.bmp': (pillow('BMP'), GREY), 'rgb.bmp': (pillow('BMP'), RGB),
         'grey.tif': (pillow('TIFF'), GREY), 'rgb.tiff': (pillow('TIFF'), RGB), 'deep.tif': (pillow('TIFF'), DEEP),
         'float.TIF': (pillow('TIFF'), FLOAT.astype(np.float32)), 'whole.tif': (pillow('TIFF'), DEEP.astype(np.int32) - 7),
         'grey.pgm': (pillow('PPM'), GREY), 'rgb.ppm': (pillow('PPM'), RGB), '12 bits.pgm': (portable(4095), DEEP % 4096),
         'float.npy': (npy, FLOAT.astype(np.float32)), 'double.npy': (npy, FLOAT), 'half.npy': (npy, FLOAT.astype(np.float16)),
         'bands.npy': (npy, np.stack([DEEP] * 5)), 'signed.npy': (npy, DEEP.astype('>i2'))}
BY_TIFFFILE = {'rgb16.tif': np.dstack([DEEP] * 3), 'pages.tif': np.stack([DEEP, DEEP // 2]), 'float pages.tif': np.float32([FLOAT, -FLOAT]),
               'signed.tif': DEEP.astype(np.int16), 'unsigned.tif': DEEP.astype(np.uint32) * 70000}


def round_trip(folder, name, data):
    """(image as read, Form, image as read again)."""
    (folder / name).write_bytes(data)
    source = FileSource(str(folder))
    index = source.names.index(name)
    image = source.read(index)
    form = Forms(source, str(folder))(index, image)
    values, beyond = quantised(np.float64(image), form.dtype, form.top)
    assert not beyond
    (folder / form.name).write_bytes(encode(form, values))
    return image, form, FileSource(str(folder)).read(index)


@pytest.mark.parametrize('name', CASES)
def test_round_trip(name, tmp_path):
    image, form, again = round_trip(tmp_path, name, written(*CASES[name]))
    assert form.name == name and again.dtype == image.dtype.newbyteorder('=') and np.array_equal(again, image)
    if name.endswith('.npy'):
        assert np.load(tmp_path / name).shape == CASES[name][1].shape  # [H,W] stays [H,W]
    if name == '12 bits.pgm':
        assert (tmp_path / name).read_bytes().split()[3] == b'4095'


@pytest.mark.parametrize('name', BY_TIFFFILE)
def test_round_trip_of_tiff_files_beyond_pillow(name, tmp_path):
    tifffile = pytest.importorskip('tifffile')
    array = BY_TIFFFILE[name]
    tifffile.imwrite(tmp_path / name, array, photometric='rgb' if array.shape[-1] == 3 else 'minisblack')
    image, form, again = round_trip(tmp_path, name, (tmp_path / name).read_bytes())
    assert form.dtype == array.dtype and np.array_equal(again, image)
    assert tifffile.imread(tmp_path / name).dtype == array.dtype


@pytest.mark.parametrize('name', ['photo.jpg', 'photo.webp'])
def test_lossy_files_become_png(name, tmp_path):
    (tmp_path / name).write_bytes(written(pillow('JPEG' if name.endswith('jpg') else 'WEBP'), RGB))
    source = FileSource(str(tmp_path))
    forms = Forms(source, str(tmp_path))
    assert forms(0, source.read(0)).name == 'photo.png' and forms.renamed == {name: 'photo.png'}
    (tmp_path / 'photo.png').write_bytes(written(pillow('PNG'), RGB))
    source = FileSource(str(tmp_path))
    index = source.names.index(name)
    assert Forms(source, str(tmp_path))(index, source.read(index)).name == f'{name}.png'  # the other name is taken


def test_values_beyond_the_range_are_counted():
    image = np.float64([[[-3.0, -0.4, 0.5, 255.4, 255.6, 300]]])
    values, beyond = quantised(image, np.uint8)
    assert values.tolist() == [[[0, 0, 0, 255, 255, 255]]] and beyond == 3
    assert quantised(np.float64([[[4095.2, 4096]]]), np.uint16, 4095)[1] == 1
    assert quantised(np.float64([[[1e5]]]), np.float16)[1] == 1 and quantised(np.float64([[[1e39]]]), np.float32)[1] == 1
    assert quantised(np.float64([[[-1e30, 1e30]]]), np.int64)[0].tolist() == [[[-2 ** 63, 2 ** 63 - 1024]]]


def test_images_that_are_no_files():
    assert member_form('7', GREY[None]) == Form('00000007.png', np.dtype(np.uint8))
    assert member_form('scan.fits[3]', np.float64(FLOAT[None])) == Form('scan.fits[3].npy', np.dtype(np.float32))
    assert member_form('a/b', DEEP[None]).dtype == np.uint16
    assert float_form(Form('a/b.png', np.dtype(np.uint8))) == Form('a/b.npy', np.dtype(np.float32))
