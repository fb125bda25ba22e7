# SPDX-License-Identifier: Apache-2.0
"""The members of a zip file or folder, and images among them as arrays: the one reader of archives."""

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image

from dnnlib.files import json_object
from dnnlib.util import UserError, one_line

LOSSY = ('.jpg', '.jpeg', '.webp')
IMAGES = ('.png', '.bmp', *LOSSY, '.npy')  # members that are images, wherever images are read
RARER_IMAGES = ('.tif', '.tiff', '.pgm', '.ppm')  # and where they are converted
CONVERTED = {'P': 'RGB', 'CMYK': 'RGB', '1': 'L'}  # Pillow's modes whose values are no intensities

# What Pillow, numpy and zipfile raise for files that are damaged or are something else.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError,
          PIL.Image.DecompressionBombError)


class Archive:
    """The members of a zip file or folder: `names` (relative, with slashes, sorted) and read(name) -> bytes.

    where: what errors call it, by default its path. Safe in threads, in forked processes and in spawned ones."""

    def __init__(self, path, where=None):
        self.path, self.where, self._opened = str(path), where or str(path), (None, None)
        self._is_folder = os.path.isdir(self.path)
        if self._is_folder:
            root = Path(self.path)
            self.names = sorted(p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file())
        elif os.path.isfile(self.path):
            try:
                self.names = sorted(name for name in self._zip().namelist() if not name.endswith('/'))
            except DAMAGE as err:
                raise UserError(f'{self.where}: cannot be read: not a whole zip file ({damage(err)}); make it again') from None
        else:
            raise UserError(f'{self.where}: no such zip file or folder')

    def __getstate__(self):
        return {**self.__dict__, '_opened': (None, None)}

    def _zip(self):
        """The open zip file, one for each process: a file position that two processes share would mix their reads."""
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]

    def images(self, suffixes=IMAGES):
        """The names of images. Those that begin with a dot are other programs' notes. Raises UserError where there are none."""
        found = [name for name in self.names if name.lower().endswith(suffixes) and not os.path.basename(name).startswith('.')]
        if not found:
            raise UserError(f'{self.where}: no images in it (looked for {", ".join(suffixes)})')
        return found

    def read(self, name):
        """The bytes of a member. Raises errors of DAMAGE."""
        return (Path(self.path) / name).read_bytes() if self._is_folder else self._zip().read(name)

    def read_json(self, name='dataset.json'):
        """The object in a JSON member, {} where there is none."""
        if name not in self.names:
            return {}
        try:
            data = self.read(name)
        except DAMAGE as err:
            raise UserError(f'{self.where}: {name} cannot be read ({damage(err)})') from None
        return json_object(data, f'{self.where}: {name}')


def open_picture(data):
    """The bytes of a picture -> Pillow's image, of which only the header has been read. Raises errors of DAMAGE."""
    picture = PIL.Image.open(io.BytesIO(data))
    if data[:4] == b'\x89PNG' and data[24] == 16 and not picture.mode.startswith('I'):
        raise ValueError('16 bits in several channels, of which Pillow reads 8; save it as .npy')
    return picture


def decode_image(name, data, modes=None):
    """The bytes of a member -> array [C,H,W]: 8-bit pictures as uint8, deeper ones and .npy as they lie there; [H,W] is one channel.

    Palettes and CMYK become RGB, bits grey. modes: Pillow's modes that are allowed after that, by default all.
    Raises errors of DAMAGE."""
    if name.lower().endswith('.npy'):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.ndim not in (2, 3):
            raise ValueError(f'an array of shape {list(array.shape)} is no image [C,H,W] or [H,W]')
        return array[None] if array.ndim == 2 else array
    with open_picture(data) as picture:
        if picture.mode in CONVERTED:
            picture = picture.convert(CONVERTED[picture.mode])
        if modes and picture.mode not in modes:
            raise ValueError(f'mode {picture.mode}, expected 8-bit grey or RGB; convert it with dataset_tool.py')
        array = np.array(picture)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def damage(err):
    """What an error of DAMAGE says of a file, in one line."""
    return 'not an image' if isinstance(err, PIL.UnidentifiedImageError) else one_line(err)
