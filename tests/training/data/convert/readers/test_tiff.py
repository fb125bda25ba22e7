# SPDX-License-Identifier: Apache-2.0
"""TIFF files are read whole: all pages, and all bits."""

import io
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps

import dataset_tool
from dnnlib import UserError
from training.data.convert.readers.formats import Opened
from training.data.convert.readers.tiff import decode_tiff, tiff_kind
from training.data.convert.sources import find, open_source
from training.data.dataset import ImageDataset

tifffile = pytest.importorskip('tifffile')
DRAWS = np.random.default_rng(0)
BYTES, DEEP = DRAWS.integers(0, 256, (6, 8, 12), np.uint8), DRAWS.integers(0, 65536, (6, 8, 12)).astype(np.uint16)
FLOATS, COLOURS = DRAWS.normal(300, 70, (6, 8, 12)).astype(np.float32), DRAWS.integers(0, 65536, (6, 8, 12, 3)).astype(np.uint16)


def tiff(path, array, **options):
    options = {'photometric': 'rgb' if array.shape[-1] == 3 else 'minisblack', **options}
    tifffile.imwrite(path, array, **options)
    return path


def same(source, images):
    """That the source gives these images, [N,H,W] or [N,C,H,W], in their values."""
    images = images[:, None] if images.ndim == 3 else images
    assert len(source.names) == len(set(source.names)) == len(images)
    for one in (source, pickle.loads(pickle.dumps(source))):
        for k in (*range(len(images)), 0):
            read = one.read(k)
            np.testing.assert_array_equal(read, images[k])
            assert read.shape == one.kind(k)[:3] and read.dtype == (np.uint8 if one.kind(k).is_8bit else np.float32)


def refusal(source):
    with pytest.raises(UserError) as caught:
        open_source(str(source))
    assert '\n' not in caught.value.message
    return caught.value.message


def failure(source, index):
    with pytest.raises(ValueError) as caught:
        source.read(index)
    return caught.value


def read_there(source, index):
    return source.read(index)


@pytest.mark.parametrize('options', [{}, {'compression': 'zlib'}, {'compression': 'zlib', 'predictor': True},
                                     {'bigtiff': True, 'byteorder': '>'}, {'tile': (16, 16)}, {'rowsperstrip': 3}, {'metadata': None}])
def test_stacks_of_pages(tmp_path, options):
    """Each page is an image; with axis=channels, all of them are one."""
    for images in (BYTES, DEEP) if 'predictor' in options else (BYTES, DEEP, FLOATS):  # floats so need imagecodecs
        source = open_source(str(tiff(tmp_path / 'x.tif', images, **options)))
        assert source.names[5] == 'x.tif[5]' and source.kind(0).is_8bit == (images is BYTES)
        same(source, images)
        same(open_source(f'{tmp_path}/x.tif:axis=channels'), images[None])
        np.testing.assert_array_equal(decode_tiff((tmp_path / 'x.tif').read_bytes()), images)
    if 'tile' not in options:
        return
    with multiprocessing.get_context('fork').Pool(2) as pool:
        found = pool.starmap(read_there, [(source, k % 6) for k in range(20)])
    assert all((image == images[k % 6]).all() for k, image in enumerate(found))


def test_sixteen_bit_colours_are_kept(tmp_path):
    """Pillow reads such files as 8-bit RGB, and the first page alone."""
    planar = COLOURS.transpose(0, 3, 1, 2)
    same(open_source(str(tiff(tmp_path / 'x.tif', COLOURS))), planar)
    same(open_source(str(tiff(tmp_path / 'y.tiff', COLOURS[0]))), planar[:1])
    same(open_source(str(tiff(tmp_path / 'z.tif', planar[0], photometric='rgb', planarconfig='separate'))), planar[:1])
    for name in ('y.tiff', 'z.tif'):
        data = (tmp_path / name).read_bytes()
        assert Image.open(io.BytesIO(data)).mode == 'RGB'
        np.testing.assert_array_equal(decode_tiff(data), planar[0])
        assert tiff_kind(data)[:4] == (3, 8, 12, False)
    with pytest.raises(ValueError, match='6 pages in colour; convert the file by itself'):
        decode_tiff((tmp_path / 'x.tif').read_bytes())
    result = CliRunner().invoke(dataset_tool.main, [f'--source={tmp_path}/x.tif', f'--dest={tmp_path}/x.zip', '--workers=2'])
    assert result.exit_code == 0, result.output
    dataset = ImageDataset(str(tmp_path / 'x.zip'))
    assert len(dataset) == 6 and all((dataset.decode(k) == planar[k]).all() for k in range(6))


def test_pages_of_their_own_and_of_different_shapes(tmp_path):
    with tifffile.TiffWriter(tmp_path / 'x.tif') as file:
        for page in DEEP:
            file.write(page, contiguous=False)
    same(open_source(f'{tmp_path}/x.tif'), DEEP)
    same(open_source(f'{tmp_path}/x.tif:axis=channels'), DEEP[None])
    with tifffile.TiffWriter(tmp_path / 'y.tif') as file:
        file.write(DEEP[0], contiguous=False)
        file.write(FLOATS[1, :4], contiguous=False)
    source = open_source(f'{tmp_path}/y.tif')
    assert (source.read(0)[0] == DEEP[0]).all() and (source.read(1)[0] == FLOATS[1, :4]).all() and source.kind(1).height == 4
    assert 'its 2 pages differ' in refusal(f'{tmp_path}/y.tif:axis=channels')
    with tifffile.TiffWriter(tmp_path / 'z.tif') as file:
        file.write(DEEP, photometric='minisblack')
        file.write(FLOATS[:2, :4], photometric='minisblack', contiguous=False)
    assert 'several series of images (0: QYX [6, 8, 12], 1: QYX [2, 4, 12]); say series= one of them' in refusal(tmp_path / 'z.tif')
    same(open_source(f'{tmp_path}/z.tif:series=1'), FLOATS[:2, :4])


@pytest.mark.parametrize('name, options', [('x.tif', {'imagej': True}), ('x.ome.tif', {'ome': True})])
def test_axes_that_a_file_names(tmp_path, name, options):
    """Channels are channels, slices images; axis= turns them round."""
    stack = np.stack([DEEP, DEEP[::-1], DEEP + 1], 1)  # Z, C, Y, X
    tiff(tmp_path / name, stack, metadata={'axes': 'ZCYX'}, **options)
    same(open_source(f'{tmp_path}/{name}'), stack)
    same(open_source(f'{tmp_path}/{name}:axis=z'), stack)
    same(open_source(f'{tmp_path}/{name}:axis=c'), stack.transpose(1, 0, 2, 3))
    same(open_source(f'{tmp_path}/{name}:axis=images'), stack.reshape(18, 8, 12))
    same(open_source(f'{tmp_path}/{name}:axis=channels'), stack.reshape(1, 18, 8, 12))
    assert 'axis=t: choose channels or images, or one of its axes z, c' in refusal(f'{tmp_path}/{name}:axis=t')


def test_imagej_files_whose_first_page_stands_for_all(tmp_path):
    """As ImageJ writes what is larger than 4 GiB; here a smaller one, whose chain of pages is cut behind the first."""
    data = bytearray(tiff(tmp_path / 'x.tif', DEEP, imagej=True, metadata={'axes': 'ZYX'}).read_bytes())
    order = '<' if data[:2] == b'II' else '>'
    start = int.from_bytes(data[4:8], 'little' if order == '<' else 'big')
    count = int.from_bytes(data[start:start + 2], 'little' if order == '<' else 'big')
    data[start + 2 + 12 * count:start + 6 + 12 * count] = bytes(4)
    (tmp_path / 'x.tif').write_bytes(data)
    same(open_source(f'{tmp_path}/x.tif'), DEEP)
    (tmp_path / 'x.tif').write_bytes(data[:data.index(DEEP[5].tobytes()) + 100])
    assert 'cut off: it claims 6 images, but has 1' in refusal(tmp_path / 'x.tif')


def test_what_values_mean(tmp_path):
    """Bits, palettes, white first, turned pages: as Pillow has them, where it has."""
    grey, colour = Image.fromarray(BYTES[0]), Image.fromarray((COLOURS[0] >> 8).astype(np.uint8))
    for picture, options in ((grey.convert('1'), {}), (colour.convert('P'), {}), (colour.convert('RGBA'), {}),
                             (grey, {'compression': 'packbits'}),
                             (grey.convert('1'), {'compression': 'packbits'}), (grey.convert('LA'), {}),
                             (colour, {'compression': 'tiff_lzw'}), (colour, {'compression': 'jpeg'}),
                             (Image.fromarray(DEEP[0]), {'compression': 'tiff_lzw'})):
        picture.save(tmp_path / 'x.tif', **options)
        whole = picture if 'jpeg' not in options.values() else Image.open(tmp_path / 'x.tif')
        want = np.asarray(whole.convert({'P': 'RGB', '1': 'L'}.get(whole.mode, whole.mode)))
        read = open_source(f'{tmp_path}/x.tif').read(0)
        np.testing.assert_array_equal(read, want[None] if want.ndim == 2 else want.transpose(2, 0, 1))
    for images, most in ((BYTES, 255), (DEEP, 65535)):
        tiff(tmp_path / 'x.tif', images, photometric='miniswhite')
        same(open_source(f'{tmp_path}/x.tif'), most - images)
    for turn in range(1, 9):
        tiff(tmp_path / 'x.tif', BYTES[0], extratags=[(274, 3, 1, turn, True)])
        exif = Image.Exif()
        exif[274] = turn
        picture = Image.fromarray(BYTES[0])
        picture.info['exif'] = exif.tobytes()
        picture._exif = None
        want = np.asarray(ImageOps.exif_transpose(picture))
        same(open_source(f'{tmp_path}/x.tif'), want[None])


def test_tiff_that_is_refused(tmp_path):
    path = tmp_path / 'x.tif'
    floats = FLOATS[0].copy()
    floats[2, 3:5] = np.nan
    for array, options, text in (
            (floats, {}, '2 of its 96 values are not finite'),
            (BYTES.transpose(1, 2, 0)[..., :4], {'photometric': 'separated'}, 'SEPARATED'),
            (DEEP[0], {'extratags': [(42113, 2, 0, str(DEEP[0, 0, 0]), True)]}, '1 of its 96 values are blank'),
            (COLOURS[0].astype(np.int32), {'photometric': 'cielab'}, 'CIELAB'),
            (BYTES[0].astype(np.complex64), {}, 'values of type complex64')):
        source = open_source(str(tiff(path, array, **options)))
        with pytest.raises(ValueError, match=text):
            source.read(0)
        with pytest.raises(ValueError, match=text):
            decode_tiff(path.read_bytes())
    data = tiff(path, DEEP).read_bytes()
    for damaged in (b'', b'II*\0', data[:100], b'junk' * 100):
        path.write_bytes(damaged)
        assert 'cannot be read' in refusal(path)
    Image.fromarray(DEEP[0]).save(path, compression='tiff_lzw')
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        places = [(tags[name].valueoffset, 4) for name in ('ImageWidth', 'ImageLength')]
    data = bytearray(path.read_bytes())
    for place, size in places:
        data[place:place + size] = (60_000).to_bytes(size, 'little')
    path.write_bytes(data)
    with pytest.raises(ValueError, match='60000 x 60000 pixels in 1 channels, more than the limit'):
        open_source(str(path)).read(0)


@pytest.mark.parametrize('packed', [False, True])
def test_folders_and_zips_of_what_pillow_reads_in_part(tmp_path, packed):
    """Sixteen bits in colours, and pages as channels; what Pillow reads whole it goes on reading."""
    planar = COLOURS.transpose(0, 3, 1, 2)
    for name, arrays, want in (('deep', COLOURS[:3], planar), ('pages', [DEEP[:3], DEEP[3:]], [DEEP[:3], DEEP[3:]]),
                               ('white', BYTES[:2], BYTES[:, None]), ('grey', DEEP[:2], DEEP[:, None])):
        (tmp_path / name).mkdir()
        for k, array in enumerate(arrays):
            tiff(tmp_path / name / f'{k}.tif', array, metadata=None)
        place = tmp_path / name
        if packed:
            place = shutil.make_archive(str(tmp_path / name), 'zip', tmp_path / name)
        source = open_source(str(place))
        assert find(str(place)) == 'files'
        for k in range(len(arrays)):
            np.testing.assert_array_equal(source.read(k), want[k])
            assert source.kind(k)[:3] == source.read(k).shape
    tiff(tmp_path / 'deep' / '9.tif', COLOURS)
    tiff(tmp_path / 'deep' / '8.tif', DEEP[0], extratags=[(42113, 2, 0, str(DEEP[0, 0, 0]), True)])
    args = f'--source={tmp_path}/deep', f'--dest={tmp_path}/x.zip', '--workers=1', '--on-bad=skip'
    result = CliRunner().invoke(dataset_tool.main, args)
    assert result.exit_code == 0 and '9.tif: cannot be read (6 pages in colour' in result.output
    assert '1 of its 96 values are blank' in str(failure(open_source(f'{tmp_path}/deep'), 3))
    assert (ImageDataset(str(tmp_path / 'x.zip')).decode(2) == planar[2]).all()


def test_a_folder_is_one_of_pictures_but_when_told(tmp_path):
    (tmp_path / 'in').mkdir()
    for k in range(2):
        tiff(tmp_path / 'in' / f'{k}.tif', DEEP[3 * k:3 * k + 3])
    assert find(f'{tmp_path}/in') == 'files'
    same(open_source(f'{tmp_path}/in:kind=tiff'), DEEP)


def test_handles_are_closed_before_a_fork_and_opened_anew(tmp_path):
    (tmp_path / 'x').write_bytes(b'x')
    opened = Opened(open, tmp_path / 'x')
    first = opened()
    assert opened() is first
    with multiprocessing.get_context('fork').Pool(1) as pool:
        assert first.closed and pool.apply(len, ('xy',)) == 2
    assert not opened().closed and pickle.loads(pickle.dumps(opened)).args == (tmp_path / 'x',)
