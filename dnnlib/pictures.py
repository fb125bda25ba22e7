# SPDX-License-Identifier: Apache-2.0
"""Pictures opened by Pillow -> arrays, complete and correctly oriented; files that Pillow would read in part or wrongly are refused.

Functions take a picture whose header has been read, and the bytes of its file. They raise ValueError, and any error of Pillow."""

import re
import warnings

import numpy as np
import PIL.Image
import PIL.ImageMode

# Pillow's modes whose values are not intensities, or are multiplied by alpha.
CONVERTED = {'P': 'RGB', 'PA': 'RGBA', 'CMYK': 'RGB', 'YCbCr': 'RGB', '1': 'L', 'La': 'LA', 'RGBa': 'RGBA'}
MODES = ('L', 'LA', 'RGB', 'RGBA', 'I', 'I;16', 'I;16B', 'I;16L', 'F')  # modes that are kept
SEVERAL = ('TIFF', 'GIF', 'PNG', 'WEBP')  # formats that may hold several equal pictures; a JPEG's second one is a preview
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, SAMPLES, FORMAT = 258, 262, 274, 277, 339  # tags of TIFF, and of EXIF
WHITE_IS_ZERO = 0
PNM_HEADER = re.compile(rb'P([2356])' + 3 * rb'(?:\s|#[^\r\n]*[\r\n])+(\d+)')  # kind, width, height, largest value
NOTES = (b'eXIf', b'iTXt', b'zTXt', b'tEXt')  # chunks of a PNG that may hold EXIF; a PNG without them is not searched for it

# EXIF orientation -> function that turns [H,W,...] upright
TURNS = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
         6: lambda x: x.swapaxes(0, 1)[:, ::-1], 7: lambda x: x.swapaxes(0, 1)[::-1, ::-1], 8: lambda x: x.swapaxes(0, 1)[::-1]}

warnings.filterwarnings('ignore', category=UserWarning, module='PIL.TiffImagePlugin')  # about damaged EXIF, which is ignored


def check(picture: PIL.Image.Image, data: bytes) -> None:
    """Raises ValueError for a picture that would not be read completely."""
    remedy = 'save it as .npy' + ', or install tifffile, which lets dataset_tool.py read it' * (picture.format == 'TIFF')
    if picture.format in SEVERAL and getattr(picture, 'is_animated', False):
        raise ValueError(f'several pages (pictures) in one {picture.format}, of which only one would be read; save each as a separate file')
    mode = CONVERTED.get(picture.mode, picture.mode)
    if mode not in MODES:
        raise ValueError(f'mode {picture.mode} is not supported; save it as 8-bit RGB, or as .npy')
    bits = _bits(picture, data)
    if bits > 8 and not mode.startswith(('I', 'F')):
        raise ValueError(f'{bits} bits in several channels, of which only 8 would be read; {remedy}')
    if picture.format == 'TIFF':
        samples, bands = _tag(picture, SAMPLES), len(PIL.ImageMode.getmode(picture.mode).bands)
        if samples > bands:
            raise ValueError(f'{samples} values per pixel, of which only {bands} would be read; {remedy}')
        if bits > 8 and _tag(picture, PHOTOMETRIC) == WHITE_IS_ZERO:
            raise ValueError(f'{bits} bits with white at 0, which would be read as black; {remedy}')


def header(picture: PIL.Image.Image, data: bytes) -> tuple[int, int, int, bool]:
    """(channels, height, width, is_8bit) of the array that pixels() returns."""
    height, width = picture.height, picture.width
    if orientation(picture, data) >= 5:
        height, width = width, height
    bands = PIL.ImageMode.getmode(CONVERTED.get(picture.mode, picture.mode)).bands
    return len(bands), height, width, not picture.mode.startswith(('I', 'F'))


def pixels(picture: PIL.Image.Image, data: bytes) -> np.ndarray:
    """The pixels [C,H,W]: uint8, or the deeper type that they are stored in."""
    turn = TURNS.get(orientation(picture, data))  # read before the file is closed
    largest = _largest(picture, data)
    unsigned = picture.format == 'TIFF' and picture.mode == 'I' and _tag(picture, BITS_PER_SAMPLE) == 32 and _tag(picture, FORMAT) == 1
    if picture.mode in CONVERTED:
        picture = picture.convert(CONVERTED[picture.mode])
    array = np.array(picture)
    if unsigned:
        array = array.view(np.uint32)  # Pillow returns signed values
    if largest > 255 and array.dtype != np.uint8:
        array = np.rint(array * (largest / 65535)).astype(np.uint16)  # undoes Pillow's scaling
    array = turn(array) if turn else array
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def orientation(picture: PIL.Image.Image, data: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 if there is none, and for TIFF, which Pillow turns by itself."""
    if picture.format == 'TIFF' or picture.format == 'PNG' and not any(name in NOTES for name in _chunks(data)):
        return 1
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to refuse a picture
        return 1
    return found if found in TURNS else 1


def _chunks(data):
    """The names of a PNG's chunks."""
    place = 8
    while name := data[place + 4:place + 8]:
        yield name
        place += 12 + int.from_bytes(data[place:place + 4], 'big')


def _bits(picture, data):
    """Bits of the deepest channel, as far as needed to tell whether there are more than 8."""
    if picture.format == 'PNG':
        return data[24]
    if picture.format == 'TIFF':
        return _tag(picture, BITS_PER_SAMPLE)
    return _largest(picture, data).bit_length()


def _tag(picture, number):
    """The value of a TIFF's tag: the largest if there are several, 1 if the tag is missing."""
    found = picture.tag_v2.get(number, 1)
    return max(found) if isinstance(found, tuple) else found


def _largest(picture, data):
    """The largest value that a PPM or PGM may hold; 0 for other formats."""
    match = PNM_HEADER.match(data) if picture.format == 'PPM' else None
    return int(match[4]) if match else 0
