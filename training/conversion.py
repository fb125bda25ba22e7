# SPDX-License-Identifier: Apache-2.0
"""An image of a source -> the bytes of a member, and members -> a zip or folder that appears only when it is whole."""

import io
import json
import math
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from typing import NamedTuple

import click
import numpy as np
from PIL import Image

from training import sources

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's conversion to grey
TRANSFORMS = ('center-crop', 'center-crop-wide')
SIGMA_DATA = 0.5  # std that float data gets in network units
PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type: grey, grey + alpha, RGB, RGB + alpha


class Member(NamedTuple):
    """A converted image; or what is wrong with it; or neither, where it is too small for its crop."""

    data: bytes | None = None
    problem: str | None = None
    shape: tuple = ()
    total: float = 0.0  # sum of the values, and of their squares: mean and std of float data
    squares: float = 0.0


class Job(NamedTuple):
    """How the images of a source are converted.

    traits: (is_8bit, channels, (height, width)) that every image must have, None where it may differ.
    size: (width, height) or None. as_png: 8-bit members; otherwise float32 .npy."""

    traits: tuple
    transform: str | None = None
    size: tuple | None = None
    channels: int | None = None
    as_png: bool = True

    def convert(self, source, index):
        """Image number `index` of a source as a Member. Never raises for a bad image."""
        try:
            image = source.read(index)
            traits = image.dtype == np.uint8, len(image), image.shape[1:]
            if any(want not in (None, got) for want, got in zip(self.traits, traits)):
                return Member(problem=f'{source.kind(index)}, unlike most others')
            if not self.as_png:
                image = image.astype(np.float32)
                if not np.isfinite(image).all():
                    return Member(problem=f'{source.kind(index)}, with values that are not finite')
            image = self._resized(to_channels(image, self.channels))
        except sources.BAD_FILE as err:
            return Member(problem=sources.unreadable(err))
        if image is None:
            return Member()
        if self.as_png:
            return Member(encode_png(image), shape=image.shape)
        values = image.astype(np.float64)
        return Member(encode_npy(image), None, image.shape, values.sum(), np.square(values).sum())

    def _resized(self, image):
        if self.transform == 'center-crop':
            return resize(center_crop(image), *self.size)
        if self.transform == 'center-crop-wide':
            return center_crop_wide(image, *self.size)
        return resize(image, *self.size) if self.size else image


def to_channels(image, channels):
    """[C,H,W] with the wanted number of channels (None: as it is): grey repeated, RGB to luma, alpha dropped."""
    count = len(image)
    if channels is None or count == channels:
        return image
    if channels not in (1, 3) or count > 4:
        raise ValueError(f'{count} channels cannot become {channels}')
    if count in (2, 4):
        image = image[:count - 1]
    if len(image) == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=0)
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).convert('L'))[None]
    return np.tensordot(LUMA, image, 1)[None].astype(image.dtype)


def center_crop(image):
    """The largest centred square of [C,H,W]."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top:top + side, left:left + side]


def center_crop_wide(image, width, height):
    """The centre at width x height between black bars that make it a square, [C,width,width]; None if the image is too small.

    As published: of H rows, the middle H * width / W are kept, and stretched to the height that is asked for."""
    rows = round(width * image.shape[1] / image.shape[2])
    if image.shape[2] < width or rows < height:
        return None
    top = (image.shape[1] - rows) // 2
    view = resize(image[:, top:top + rows], width, height)
    canvas = np.zeros([len(image), width, width], image.dtype)
    bar = (width - height) // 2
    canvas[:, bar:bar + height] = view
    return canvas


def resize(image, width, height):
    """[C,H,W] -> [C,height,width] by Lanczos; 8-bit values are rounded, floats are not clipped."""
    if image.shape[1:] == (height, width):
        return image
    if image.dtype == np.uint8 and len(image) == 3:
        whole = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        return np.asarray(whole.resize((width, height), Image.LANCZOS)).transpose(2, 0, 1)
    # Channel by channel: Pillow would multiply colours by a channel that it takes for alpha.
    bands = [Image.fromarray(np.ascontiguousarray(band)).resize((width, height), Image.LANCZOS) for band in image]
    return np.stack([np.asarray(band) for band in bands])


def encode_png(image):
    """uint8 [C,H,W], 1 to 4 channels -> PNG, not compressed (as published).

    On 32x32 photographs that is 2 to 3 times faster to read and 9 to 18 times to write, for 1.5 times the size."""
    channels, height, width = image.shape
    rows = np.zeros([height, 1 + width * channels], np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = image.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack('>IIBBBBB', width, height, 8, PNG_COLOURS[channels], 0, 0, 0)
    parts = ((b'IHDR', header), (b'IDAT', zlib.compress(rows.tobytes(), 0)), (b'IEND', b''))
    chunks = [struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in parts]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def encode_npy(image):
    """float32 [C,H,W] -> the bytes of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(image, np.float32), allow_pickle=False)
    return buffer.getvalue()


def propose_units(total, squares, count):
    """{offset, scale} that give data with these sums mean 0 and std SIGMA_DATA in network units."""
    mean = total / count
    std = math.sqrt(max(squares / count - mean * mean, 0.0))
    return {'offset': mean, 'scale': std / SIGMA_DATA if std > 0 else 1.0}


class ArchiveWriter:
    """A stored zip, or a folder, under a temporary name beside `dest` that takes its name when the context ends well."""

    def __init__(self, dest):
        self.dest = dest = os.path.abspath(dest)
        extension = os.path.splitext(dest)[1]
        self._as_zip = extension.lower() == '.zip'
        if extension and not self._as_zip:
            raise click.ClickException(f'--dest={dest}: must end in .zip, or be a folder name without an extension')
        if not self._as_zip and os.path.exists(dest) and (not os.path.isdir(dest) or os.listdir(dest)):
            raise click.ClickException(f'--dest={dest}: the folder is not empty; remove it or name another')
        if self._as_zip and os.path.isdir(dest):
            raise click.ClickException(f'--dest={dest}: is a folder; name a file')

    def __enter__(self):
        folder, name = os.path.split(self.dest)
        os.makedirs(folder, exist_ok=True)
        self._part = tempfile.mkdtemp(prefix=f'.{name}-', dir=folder)
        if self._as_zip:
            self._zip = zipfile.ZipFile(os.path.join(self._part, 'whole.zip'), 'w', zipfile.ZIP_STORED)
        return self

    def write(self, name, data):
        """Adds a member (bytes)."""
        if self._as_zip:
            # One date for all: the same images give the same file, byte by byte.
            self._zip.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
            return
        path = os.path.join(self._part, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as file:
            file.write(data)

    def write_json(self, name, value):
        """Adds a member of JSON."""
        self.write(name, json.dumps(value).encode())

    def __exit__(self, kind, *rest):
        try:
            if self._as_zip:
                self._zip.close()
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._part, ignore_errors=True)

    def _publish(self):
        if self._as_zip:
            os.replace(os.path.join(self._part, 'whole.zip'), self.dest)
            return
        os.chmod(self._part, 0o777 & ~_umask())  # temporary folders are private
        if os.path.isdir(self.dest):
            os.rmdir(self.dest)
        os.rename(self._part, self.dest)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
