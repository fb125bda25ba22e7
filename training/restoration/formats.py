# SPDX-License-Identifier: Apache-2.0
"""Restored images as files of the formats that they came in: values of the same type, counted where the type cannot hold them.

PNG (8-bit, or 16-bit grey), BMP, TIFF (8 and 16 bits, whole numbers, float), PGM and PPM, and .npy of any type are written as they were
read. JPEG and WebP, which would lose what was gained, become PNG; images of all other sources PNG if they are 8-bit, else float32 .npy."""

import io
import os
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from dnnlib import UserError, arrays, pictures
from dnnlib.archive import LOSSY, Archive
from training.data.convert.readers.files import FileSource
from training.data.convert.readers.formats import needs
from training.data.convert.writers import PNG_COLOURS


class Form(NamedTuple):
    """How an image is written. name: of the member. dtype: of its values. top: their largest, if it is not that of the dtype. flat: whether
    an .npy is [H,W]."""

    name: str
    dtype: np.dtype
    top: int | None = None
    flat: bool = False

    @property
    def ending(self) -> str:
        return os.path.splitext(self.name)[1].lower()


class Forms:
    """The Form of each image of a source, by index. path: of the source. floats: whether whole numbers become float32, as restored counts
    do, which are means."""

    def __init__(self, source: Any, path: str, floats: bool = False) -> None:
        self.source, self.floats = source, floats
        self.archive = Archive(path) if isinstance(source, FileSource) else None
        self.renamed = {}  # names of files whose format changes -> their new names

    def original(self, index: int) -> bytes | None:
        """The bytes of the image's own file; None for images that are no files."""
        return self.archive.read(self.source.names[index]) if self.archive else None

    def __call__(self, index: int, image: np.ndarray) -> Form:
        """The Form of an image; image: as stored, [C,H,W]."""
        form = self._own(index, image)
        if not self.floats or form.dtype.kind == 'f':
            return form
        if form.ending in ('.npy', '.tif', '.tiff'):
            return form._replace(dtype=np.dtype(np.float32), top=None)
        name = self.source.names[index]
        wanted = f'{os.path.splitext(name)[0]}.npy'
        self.renamed[name] = f'{name}.npy' if wanted in self.source.names else wanted
        return Form(self.renamed[name], np.dtype(np.float32))

    def _own(self, index, image):
        """The Form with the type of the values in the image's file."""
        name = self.source.names[index]
        if self.archive is None:
            return member_form(name, image)
        stem, ending = os.path.splitext(name)
        ending, data = ending.lower(), self.original(index)
        if ending in LOSSY:
            self.renamed[name] = name = unused(f'{stem}.png', name, self.source.names)
            ending = '.png'
        if ending == '.npy':
            found = arrays.read_header(data, len(data))
            return Form(name, found.dtype.newbyteorder('='), flat=len(found.shape) == 2)
        if ending in ('.tif', '.tiff'):
            return Form(name, tiff_dtype(data, image))
        if ending in ('.pgm', '.ppm'):
            return Form(name, *((image.dtype, 255) if image.dtype == np.uint8 else (np.dtype(np.uint16), pnm_top(data))))
        return Form(name, np.dtype(np.uint8 if image.dtype == np.uint8 else np.uint16))


def unused(wanted: str, name: str, names: list[str]) -> str:
    """The wanted name of a file, or NAME.png where another image has it."""
    return f'{name}.png' if wanted in names else wanted


def member_form(name: str, image: np.ndarray) -> Form:
    """The Form of an image of a source that does not consist of files: PNG of 8 bits, or .npy, named 00000012 if the source counts them."""
    name = f'{int(name):08}' if name.isdecimal() else name
    ending = '.png' if image.dtype == np.uint8 and len(image) in PNG_COLOURS else '.npy'
    whole = image.dtype.kind in 'ui' and image.itemsize <= 2
    return Form(name if name.endswith(ending) else name + ending, image.dtype if whole else np.dtype(np.float32))


def float_form(form: Form) -> Form:
    """The Form of what belongs to an image and is no image, such as its uncertainty: float32 .npy."""
    return Form(f'{os.path.splitext(form.name)[0]}.npy', np.dtype(np.float32), flat=form.flat)


def tiff_dtype(data: bytes, image: np.ndarray) -> np.dtype:
    """The type of a TIFF file's values. image: as read; by Pillow, which has no 16-bit signed values, or as float32 by tifffile."""
    if image.dtype in (np.uint8, np.uint16):
        return image.dtype
    try:
        tifffile = needs('tifffile', '')
    except UserError:  # what Pillow reads is written in its own types
        return image.dtype
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return np.dtype(file.pages[0].dtype).newbyteorder('=')


def pnm_top(data: bytes) -> int:
    """The largest value that the header of a PGM or PPM file states."""
    return int(pictures.PNM_HEADER.match(data)[4])


def quantised(image: np.ndarray, dtype: np.dtype, top: int | None = None) -> tuple[np.ndarray, int]:
    """(values as the type, rounded to whole numbers for those; how many were beyond its range, and set to its ends).

    image: float64, finite. top: the largest value, by default that of the type."""
    dtype = np.dtype(dtype)
    limits = np.iinfo(dtype) if dtype.kind in 'ui' else np.finfo(dtype)
    low, high = float(limits.min), float(limits.max if top is None else top)
    values = np.rint(image) if dtype.kind in 'ui' else image
    beyond = int(np.count_nonzero((values < low) | (values > high)))
    if dtype.kind in 'ui' and dtype.itemsize == 8:  # float64 has no largest int64
        high = float(np.nextafter(high, 0))
    return values.clip(low, high).astype(dtype), beyond


def encode(form: Form, image: np.ndarray) -> bytes:
    """The bytes of a file. image: [C,H,W] of the form's dtype."""
    buffer = io.BytesIO()
    if form.ending == '.npy':
        np.save(buffer, np.ascontiguousarray(image[0] if form.flat else image), allow_pickle=False)
    elif form.ending in ('.pgm', '.ppm'):
        channels, height, width = image.shape
        buffer.write(f'P{5 if channels == 1 else 6}\n{width} {height}\n{form.top}\n'.encode())
        buffer.write(np.ascontiguousarray(image.transpose(1, 2, 0)).astype(image.dtype.newbyteorder('>')).tobytes())
    elif form.ending in ('.tif', '.tiff') and not (image.dtype == np.uint8 and len(image) in PNG_COLOURS):
        _write_tiff(buffer, image)
    else:
        rows = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        PIL.Image.fromarray(rows).save(buffer, {'.png': 'PNG', '.bmp': 'BMP'}.get(form.ending, 'TIFF'))
    return buffer.getvalue()


def _write_tiff(buffer, image):
    """A TIFF file of any type: grey, RGB, or grey pages as channels. Grey of 16 bits and of float32 need no package."""
    if len(image) == 1 and image.dtype in (np.uint16, np.int32, np.float32):
        PIL.Image.fromarray(image[0]).save(buffer, 'TIFF')
        return
    colours = len(image) == 3 and image.dtype in (np.uint8, np.uint16)
    array, kind = (image.transpose(1, 2, 0), 'rgb') if colours else (image, 'minisblack')
    needs('tifffile', 'a TIFF file of several channels').imwrite(buffer, np.ascontiguousarray(array), photometric=kind)
