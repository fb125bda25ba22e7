# SPDX-License-Identifier: Apache-2.0
"""Pictures are read whole and as they are seen, or refused in a line that says why: pages, deep colours, other maxima, EXIF's turns."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from dnnlib.archive import decode_image, open_picture
from training.data.convert import sources

RGB = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(samples, photometric=1, sample_format=1, extra=()):
    """The bytes of a TIFF with one strip of [H,W] or [H,W,C], little-endian."""
    height, width, count = *samples.shape[:2], samples[0, 0].size
    bits = struct.pack(f'<{count}H', *[8 * samples.itemsize] * count)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, count, bits), (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, 8),
               (277, 3, 1, count), (278, 4, 1, height), (279, 4, 1, samples.nbytes)]
    entries += [(338, 3, len(extra), struct.pack(f'<{len(extra)}H', *extra))] if extra else []
    entries += [(339, 3, count, struct.pack(f'<{count}H', *[sample_format] * count))]
    start = 8 + samples.nbytes
    after, tail = start + 2 + 12 * len(entries) + 4, b''
    table = struct.pack('<H', len(entries))
    for tag, kind, number, value in entries:
        if isinstance(value, bytes) and len(value) > 4:
            value, tail = after + len(tail), tail + value + b'\0' * (len(value) % 2)
        table += struct.pack('<HHI', tag, kind, number) + (value.ljust(4, b'\0') if isinstance(value, bytes) else struct.pack('<I', value))
    return b'II*\0' + struct.pack('<I', start) + samples.astype(samples.dtype.newbyteorder('<')).tobytes() + table + b'\0' * 4 + tail


def kind_of(tmp_path, name, data):
    """What a source tells of a picture without reading it all: (channels, height, width)."""
    (tmp_path / name).write_bytes(data)
    return tuple(sources.open_source(str(tmp_path)).kind(0)[:3])


# ----------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize('kind', ['TIFF', 'GIF', 'PNG', 'WEBP'])
def test_pages_beyond_the_first_are_not_dropped_in_silence(kind):
    pages = [PIL.Image.fromarray(RGB), PIL.Image.fromarray(255 - RGB)]
    with pytest.raises(ValueError, match=f'several (pages|pictures).*{kind}.*separate file'):
        decode_image('x.png', encoded(pages[0], kind, save_all=True, append_images=pages[1:]))
    single = decode_image('x.png', encoded(pages[0], kind, **({'lossless': True} if kind == 'WEBP' else {})))
    assert single.shape == (3, 5, 8) and (kind == 'GIF' or (single == RGB.transpose(2, 0, 1)).all())


def test_a_photograph_with_a_preview_behind_it_is_one_picture():
    """Cameras write such files; the first picture is the photograph."""
    photo = PIL.Image.fromarray(RGB)
    data = encoded(photo, 'MPO', save_all=True, append_images=[photo.resize((4, 2))])
    assert (decode_image('x.jpg', data) == decode_image('x.jpg', encoded(photo, 'JPEG'))).all()


# ----------------------------------------------------------------------------------------------------
# Depth


def test_sixteen_bit_colours_are_refused():
    """Pillow cuts them to 8 bits, or scales them."""
    deep = RGB.astype(np.uint16) * 257 - 3
    alpha = np.concatenate([deep, deep[..., :1]], 2)
    plain = 'P3 8 5 4095\n' + ' '.join(map(str, (deep // 16).flatten()))
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in deep)
    chunks = ((b'IHDR', struct.pack('>IIBBBBB', 8, 5, 16, 2, 0, 0, 0)), (b'IDAT', zlib.compress(rows)), (b'IEND', b''))
    png = b'\x89PNG\r\n\x1a\n' + b''.join(struct.pack('>I', len(d)) + k + d + struct.pack('>I', zlib.crc32(k + d)) for k, d in chunks)
    for data in (png, tiff(deep, 2), tiff(alpha, 2, extra=(2,)), tiff(alpha, 5), plain.encode(),
                 b'P6 # a remark\n8 5\n65535\n' + deep.astype('>u2').tobytes()):
        with pytest.raises(ValueError, match=r'1[26] bits in several channels, of which only 8 would be read; save it as \.npy'):
            decode_image('x.png', data)


@pytest.mark.parametrize('maximum', [4095, 300, 65535])
def test_grey_maps_of_any_maximum_come_as_they_lie_there(maximum):
    """Pillow scales them to 65535."""
    grey = np.random.default_rng(0).integers(0, maximum + 1, (5, 8)).astype(np.uint16)
    grey[0, :2] = 0, maximum
    raw = b'P5\n# 12 bits\n8 5 %d\n' % maximum + grey.astype('>u2').tobytes()
    plain = f'P2\n8\n5\n{maximum}\n{" ".join(map(str, grey.flatten()))}\n'.encode()
    for data in (raw, plain):
        found = decode_image('x.pgm', data)
        assert found.shape == (1, 5, 8) and (found[0] == grey).all()


def test_grey_tiffs_are_whole_or_refused():
    grey = np.random.default_rng(0).integers(0, 65536, (5, 8)).astype(np.uint16)
    assert (decode_image('x.tif', tiff(grey))[0] == grey).all()
    counts = grey.astype(np.uint32) * 65537
    assert (decode_image('x.tif', tiff(counts))[0] == counts).all(), 'numbers above 2^31 must not become negative'
    signed = grey.astype(np.int32) - 30000
    assert (decode_image('x.tif', tiff(signed, sample_format=2))[0] == signed).all()
    values = grey.astype(np.float32) / 7
    assert (decode_image('x.tif', tiff(values, sample_format=3))[0] == values).all()
    with pytest.raises(ValueError, match='white at 0'):
        decode_image('x.tif', tiff(grey, photometric=0))
    assert (decode_image('x.tif', tiff(RGB[..., 0], photometric=0))[0] == 255 - RGB[..., 0]).all()


def test_bands_that_would_be_dropped_are_refused():
    """A fourth band of satellite images, say, which Pillow leaves out."""
    five = np.concatenate([RGB, RGB[..., :2]], 2)
    for samples, extra in ((five, (0, 0)), (five[..., :4], (0,))):
        with pytest.raises(ValueError, match=rf'{samples.shape[2]} values per pixel, of which only 3 would be read; save it as \.npy'):
            decode_image('x.tif', tiff(np.ascontiguousarray(samples), 2, extra=extra))
    assert (decode_image('x.tif', tiff(np.ascontiguousarray(five[..., :4]), 2, extra=(2,))) == five[..., :4].transpose(2, 0, 1)).all()


def test_colours_that_are_no_red_green_and_blue():
    with pytest.raises(ValueError, match='mode LAB'):
        decode_image('x.tif', tiff(RGB, 8))
    found = decode_image('x.tif', tiff(RGB, 6))
    assert (found == np.asarray(PIL.Image.fromarray(RGB, 'YCbCr').convert('RGB')).transpose(2, 0, 1)).all()


# ----------------------------------------------------------------------------------------------------
# Turns


def turned(image, orientation):
    """What EXIF's orientation means, of [C,H,W]: the sides at which its first row and first column are to be seen."""
    turn = {1: lambda x: x, 2: lambda x: x[..., ::-1], 3: lambda x: x[..., ::-1, ::-1], 4: lambda x: x[..., ::-1, :],
            5: lambda x: x.swapaxes(1, 2), 6: lambda x: x.swapaxes(1, 2)[..., ::-1],
            7: lambda x: x.swapaxes(1, 2)[..., ::-1, ::-1], 8: lambda x: x.swapaxes(1, 2)[..., ::-1, :]}
    return turn[orientation](image)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path, kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {'lossless': True} if kind == 'WEBP' else {'quality': 95, 'subsampling': 0} if kind == 'JPEG' else {}
    plain = decode_image('x.png', encoded(PIL.Image.fromarray(RGB), kind, **options))
    data = encoded(PIL.Image.fromarray(RGB), kind, exif=exif, **options)
    found = decode_image('x.png', data)
    assert found.flags.c_contiguous and (found == turned(plain, orientation)).all()
    assert kind_of(tmp_path, 'x.png', data) == found.shape


@pytest.mark.filterwarnings('ignore::UserWarning')  # pytest puts the program's own filters aside
def test_exif_that_is_damaged_turns_nothing():
    plain = decode_image('x.jpg', encoded(PIL.Image.fromarray(RGB), 'JPEG'))
    for exif in (b'Exif\0\0', b'Exif\0\0II*\0\x08\0\0\0\x01', b'Exif\0\0' + b'\xff' * 40,
                 b'Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\xff\xff\xff\x7f\xff\xff\xff\x7f'):
        assert (decode_image('x.jpg', encoded(PIL.Image.fromarray(RGB), 'JPEG', exif=exif)) == plain).all()
    exif = PIL.Image.Exif()
    exif[0x0112] = 9
    assert (decode_image('x.jpg', encoded(PIL.Image.fromarray(RGB), 'JPEG', exif=exif)) == plain).all()


def test_opening_reads_no_pixels():
    data = encoded(PIL.Image.fromarray(RGB), 'PNG')
    assert open_picture(data[:45]).size == (8, 5)
