# SPDX-License-Identifier: Apache-2.0
"""Reads TIFF files completely, all pages and all bits, by tifffile. Pillow reads the first page, and 8 of 16 bits of colour images."""

import contextlib
import io
import itertools
import os

import numpy as np
import PIL.Image

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from training.data.convert.readers.formats import StackSource, guarded, needs, physical, sized
from training.data.convert.readers.source import Kind

MAGIC = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # also of BigTIFF
MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6  # how values are meant (PhotometricInterpretation)
JPEG = (6, 7)  # compressions whose decoder turns YCbCr to RGB
ORIENTATION, GDAL_NODATA = 274, 42113  # tags
UNSPECIFIED = 0  # what a band beyond colours and alpha is, in ExtraSamples
COLOUR = 'S'  # tifffile's letter of the axis within a page


class TiffSource(StackSource):
    """A TIFF file, each page of which is an image. A folder of them is one of pictures, but with kind=tiff.

    axis: "channels": all pages of a file are the channels of one image; "images": each is an image, also those that the file calls
    channels (C); or a letter of the file's axes, such as z: images along it, and channels along the others but for rows and columns.
    series: which one, of a file that holds several of different shapes, counted from 0."""

    what = 'TIFF'

    def __init__(self, path, axis=None, series=None):
        needs('tifffile', path)
        self.opens = TiffFile
        self.hold(path, axis=axis, series=series)

    @classmethod
    def fits(cls, path: str) -> bool:
        """By the ending."""
        return path.lower().endswith(('.tif', '.tiff', '.btf', '.lsm'))

    @classmethod
    def matches(cls, path: str) -> bool:
        """A file; folders of TIFF files are folders of pictures."""
        return os.path.isfile(path) and cls.fits(path)


class TiffFile:
    """The images in a TIFF file. source: a path, or a file object. Raises ValueError and any error of tifffile: see guarded()."""

    def __init__(self, source, axis=None, series=None):
        import tifffile
        self._file = tifffile.TiffFile(source, _multifile=False)  # other files that OME names are not looked for
        self.close = self._file.close
        try:
            self._stacks = _stacks(self._file, axis, series)
        except BaseException:
            self.close()
            raise
        self.colour_pages = max(stack.pages if COLOUR in stack.page.axes else 1 for stack in self._stacks)
        self._first = list(itertools.accumulate((len(stack) for stack in self._stacks), initial=0))

    def __len__(self):
        return self._first[-1]

    def _find(self, k):
        number = next(n for n, first in enumerate(self._first[1:]) if k < first)
        return self._stacks[number], k - self._first[number]

    def kind(self, k: int) -> Kind:
        """The Kind of an image."""
        stack, _ = self._find(k)
        return stack.kind()

    def read(self, k: int) -> np.ndarray:
        """An image, [C,H,W], in the type that it has in the file; bits and palettes as uint8."""
        stack, k = self._find(k)
        return stack.read(k)


class _Stack:
    """Pages of one shape. lead: (letter, length) of the axes that run over pages. along: the letters of those that images run along."""

    def __init__(self, file, pages, lead, along, array=None):
        self._file, self._pages, self._array = file, pages, array
        self._lead = [length for _, length in lead]
        self.pages = int(np.prod(self._lead, dtype=np.int64))
        self._along = [k for k, (letter, _) in enumerate(lead) if letter in along]
        self._across = [k for k in range(len(lead)) if k not in self._along]
        self.page = pages[0]

    def __len__(self):
        return int(np.prod([self._lead[k] for k in self._along], dtype=np.int64))

    def _numbers(self, k):
        """The numbers of the pages that make an image."""
        index = [0] * len(self._lead)
        for axis, place in zip(self._along, np.unravel_index(k, [self._lead[axis] for axis in self._along])):
            index[axis] = int(place)
        for places in itertools.product(*(range(self._lead[axis]) for axis in self._across)):
            for axis, place in zip(self._across, places):
                index[axis] = place
            yield int(np.ravel_multi_index(index, self._lead)) if index else 0

    def kind(self):
        """The Kind of each image."""
        page = self.page
        _check(page)
        sides = dict(zip(page.axes, page.shape))
        colours = 3 if page.photometric == PALETTE else sides.get(COLOUR, 1)
        channels = colours * int(np.prod([self._lead[axis] for axis in self._across], dtype=np.int64))
        shape = sides['Y'], sides['X']
        dtype = np.uint8 if page.dtype.kind == 'b' or page.photometric == PALETTE else page.dtype
        dtype = np.uint16 if dtype == np.uint8 and 1 < page.bitspersample < 8 else dtype  # few levels, not those of 8 bits
        return sized(channels, *(shape[::-1] if _orientation(page) > 4 else shape), dtype)

    def read(self, k):
        """An image, [C,H,W]."""
        bands = [_bands(self.page, self._page(number)) for number in self._numbers(k)]
        return np.concatenate(bands)

    def _page(self, number):
        if self._array is not None:
            return self._array[np.unravel_index(number, self._lead)] if self._lead else self._array
        page = self._pages[number]
        try:
            return page.asarray()
        except ValueError as err:
            if 'imagecodecs' not in str(err):
                raise
            found = _by_pillow(self._file, page)
            if found is None:
                raise ValueError(f'{err}: pip install imagecodecs') from None
            return found


def _by_pillow(file, page):
    """A page in one of the compressions that tifffile needs another package for, and Pillow none; None where it would not be right."""
    if page.photometric == MIN_IS_WHITE or page.photometric == PALETTE or _orientation(page) > 1 or not isinstance(page.index, int):
        return None
    if not file.filehandle.is_file:
        file.filehandle.seek(0)
    source = file.filehandle.path if file.filehandle.is_file else io.BytesIO(file.filehandle.read(file.filehandle.size))
    with PIL.Image.open(source, formats=('TIFF',)) as picture:
        picture.seek(page.index)
        found = np.array(picture)
    right = page.dtype.newbyteorder('=') if len(page.shape) == 2 else np.uint8  # of 16 bits in colours, it reads 8
    return found if found.shape == page.shape and found.dtype.newbyteorder('=') == right == page.dtype.newbyteorder('=') else None


def _stacks(file, axis, number):
    """The [_Stack] of a file."""
    len(file.pages)  # which sees a chain of pages that runs in a circle; file.series does not
    series = [one for one in file.series if not getattr(one.keyframe, 'is_reduced', False)] or list(file.series)
    if not series:
        raise ValueError('no pages in it')
    told = (file.imagej_metadata or {}).get('images', 1) if file.is_imagej else 1
    held = sum(int(np.prod(one.shape, dtype=np.int64)) // max(one.keyframe.size, 1) for one in series)
    if isinstance(told, int) and told > held:  # tifffile then reads the first
        raise ValueError(f'cut off: it claims {told} images, but has {held}')
    if number is not None:
        if not isinstance(number, int) or not 0 <= number < len(series):
            raise ValueError(f'series={number}: it has series 0 to {len(series) - 1}')
        series = series[number:number + 1]
    if len(series) == 1:
        return [_of_series(file, series[0], axis)]
    if any(len(one.pages) > 1 for one in series):
        told = ', '.join(f'{k}: {one.axes} {list(one.shape)}' for k, one in enumerate(series[:20]))
        raise ValueError(f'it holds several series of images ({told}); say series= one of them')
    pages = [one.pages[0] for one in series]
    alike = len({(page.shape, page.axes, page.dtype, page.photometric) for page in pages}) == 1
    if alike:
        lead = [('I', len(pages))]
        return [_Stack(file, pages, lead, _along(lead, axis))]
    if axis not in (None, 'images'):
        raise ValueError(f'axis={axis}: its {len(pages)} pages differ in shape or type')
    return [_Stack(file, [page], [], '') for page in pages]


def _of_series(file, series, axis):
    page = series.keyframe
    inner = [letter for letter in series.axes if letter in page.axes]
    lead = [(letter, length) for letter, length in zip(series.axes, series.shape) if letter not in 'YXS']
    if [letter for letter in page.axes if letter not in 'YXS'] or not {'Y', 'X'} <= set(inner):
        raise ValueError(f'its pages have the axes {page.axes}; expected rows and columns (YX), and maybe colours (S)')
    count = int(np.prod([length for _, length in lead], dtype=np.int64))
    if len(series.pages) == count and series.pages[0] is not None and all(one is not None for one in series.pages):
        return _Stack(file, series.pages, lead, _along(lead, axis))
    # ImageJ's files beyond 4 GiB describe only the first page; the others follow it.
    size = file.filehandle.size
    if series.dataoffset is None or series.dataoffset + series.nbytes > size:
        raise ValueError(f'it has {len(series.pages)} pages, but it claims {count}')
    array = series.asarray(out='memmap') if file.filehandle.is_file else series.asarray()
    return _Stack(file, [page], lead, _along(lead, axis), array)


def _along(lead, axis):
    """The letters of the axes that images run along."""
    letters = [letter for letter, _ in lead]
    if axis is None:
        return [letter for letter in letters if letter != 'C']
    if axis in ('channels', 'images'):
        return letters if axis == 'images' else []
    if not isinstance(axis, str) or axis.upper() not in letters:
        found = ', '.join(letter.lower() for letter in letters)
        raise ValueError(f'axis={axis}: choose channels or images' + (f', or one of its axes {found}' if found else ''))
    return [axis.upper()]


def _check(page):
    """Refuses what its values are not known to mean."""
    known = page.photometric in (MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE) or page.photometric == YCBCR and page.compression in JPEG
    if not known:
        raise ValueError(f'colours of the kind {getattr(page.photometric, "name", page.photometric)}; save it in grey or RGB')
    if page.photometric == PALETTE and (page.dtype != np.uint8 or page.colormap is None or 'S' in page.axes):
        raise ValueError('a palette that is not of 8 bits; save it in grey or RGB')
    if page.photometric == MIN_IS_WHITE and page.dtype.kind not in 'ub':
        raise ValueError(f'white at the least value, of the type {page.dtype}')
    if 'Y' not in page.axes or 'X' not in page.axes:
        raise ValueError(f'a page with the axes {page.axes}')


def _orientation(page):
    """How the rows and columns are to be turned, 1 to 8 (1: they are as they should be)."""
    tag = page.keyframe.tags.get(ORIENTATION)
    return tag.value if tag is not None and tag.value in range(1, 9) else 1


def _bands(page, array):
    """The array of a page -> [C,H,W], with its meaning: palette, white first, turned."""
    if page.photometric == PALETTE:
        array = (page.colormap >> 8).astype(np.uint8)[:, array]
    elif COLOUR in page.axes:
        array = np.moveaxis(array, page.axes.index(COLOUR), 0)
    else:
        array = array[None]
    tag = page.keyframe.tags.get(GDAL_NODATA)
    if tag is not None and (blank := np.count_nonzero(array == page.nodata)):
        raise ValueError(f'{blank} of its {array.size} values are blank (GDAL_NODATA {page.nodata}); fill them in')
    if page.photometric == MIN_IS_WHITE:
        array = ~array if array.dtype.kind == 'b' else np.asarray(2 ** page.bitspersample - 1, array.dtype) - array
    if array.dtype.kind == 'b':
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint8 and page.bitspersample < 8:
        array = array.astype(np.uint16)
    turn = _orientation(page)
    array = array.swapaxes(1, 2) if turn > 4 else array
    return array[:, ::-1 if turn in (3, 4, 7, 8) else 1, ::-1 if turn in (2, 3, 6, 7) else 1]


def decode_tiff(data: bytes) -> np.ndarray:
    """The bytes of a TIFF file that is one image -> [C,H,W], uint8 or float32: all its bits, and grey pages as channels.

    Raises errors of DAMAGE, also where tifffile is missing."""
    with _whole(data) as file:
        file.kind(0)  # its size is within limits
        return physical(file.read(0))


def tiff_kind(data: bytes) -> Kind:
    """The Kind of what decode_tiff() gives, without decoding it."""
    with _whole(data) as file:
        return file.kind(0)


def beyond_pillow(data):
    """Whether bytes are a TIFF file of which Pillow would read a part, or blanks as values, and tifffile is there to do better."""
    if data[:4] not in MAGIC:
        return False
    try:
        tifffile = needs('tifffile', '')
        with guarded(), tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:
            page = file.pages[0]
            deep = page.bitspersample > 8 and (page.samplesperpixel > 1 or page.photometric == MIN_IS_WHITE)
            # Bands that Pillow leaves out, and blank values that it takes for numbers.
            return deep or len(file.pages) > 1 or UNSPECIFIED in page.extrasamples or GDAL_NODATA in page.tags
    except (UserError, *DAMAGE):  # Pillow will report the error
        return False


@contextlib.contextmanager
def _whole(data):
    """The TiffFile of bytes that are one image."""
    try:
        needs('tifffile', '')
    except UserError:
        raise ValueError('a TIFF file that needs tifffile: pip install tifffile') from None
    with guarded(), contextlib.closing(TiffFile(io.BytesIO(data), 'channels')) as file:
        if file.colour_pages > 1:
            raise ValueError(f'{file.colour_pages} pages in colour; convert the file by itself, so that each page is an image')
        yield file
