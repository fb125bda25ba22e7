# SPDX-License-Identifier: Apache-2.0
"""The members of a zip file or folder, and images among them as arrays: the one reader of archives."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.util import UserError


class Archive:
    """The members of a zip file or folder: `names` (relative, with slashes, sorted) and read(name) -> bytes.

    Safe in threads, in forked processes and in spawned ones."""

    def __init__(self, path):
        self.path, self._opened = str(path), (None, None)
        self._is_folder = os.path.isdir(self.path)
        if self._is_folder:
            root = Path(self.path)
            self.names = sorted(p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file())
        elif os.path.isfile(self.path):
            try:
                self.names = sorted(name for name in self._zip().namelist() if not name.endswith('/'))
            except (zipfile.BadZipFile, OSError) as err:
                raise UserError(f'{self.path}: not a whole zip file ({err}); make it again') from None
        else:
            raise UserError(f'{self.path}: no such zip file or folder')

    def __getstate__(self):
        return {**self.__dict__, '_opened': (None, None)}

    def _zip(self):
        """The open zip file, one for each process: a file position that two processes share would mix their reads."""
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]

    def read(self, name):
        """The bytes of a member."""
        return (Path(self.path) / name).read_bytes() if self._is_folder else self._zip().read(name)

    def read_json(self, name='dataset.json'):
        """The object in a JSON member, {} where there is none."""
        if name not in self.names:
            return {}
        try:
            found = json.loads(self.read(name))
        except (ValueError, zipfile.BadZipFile) as err:
            raise UserError(f'{self.path}: {name} is not valid JSON ({err})') from None
        if not isinstance(found, dict):
            raise UserError(f'{self.path}: {name} must hold an object with "labels", got a {type(found).__name__}')
        return found


def decode_image(name, data):
    """Bytes of a member -> array [C,H,W]: uint8, or whatever an .npy member holds ([H,W] counts as one channel)."""
    if name.lower().endswith('.npy'):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return array[None] if array.ndim == 2 else array
    image = Image.open(io.BytesIO(data))
    if image.mode in ('P', '1'):  # palette indices and bits are no intensities
        image = image.convert('RGB' if image.mode == 'P' else 'L')
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))
