# SPDX-License-Identifier: Apache-2.0
"""Members of an archive as bytes, and a zip or folder that appears only when it is whole."""

import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib

import numpy as np

from dnnlib import UserError

PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type: grey, grey + alpha, RGB, RGB + alpha


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


class ArchiveWriter:
    """A stored zip, or a folder, under a temporary name beside `dest` that takes its name when the context ends well."""

    def __init__(self, dest):
        self.dest = dest = os.path.abspath(dest)
        extension = os.path.splitext(dest)[1]
        self._as_zip = extension.lower() == '.zip'
        if extension and not self._as_zip:
            raise UserError(f'--dest={dest}: must end in .zip, or be a folder name without an extension')
        if not self._as_zip and os.path.exists(dest) and (not os.path.isdir(dest) or os.listdir(dest)):
            raise UserError(f'--dest={dest}: the folder is not empty; remove it or name another')
        if self._as_zip and os.path.isdir(dest):
            raise UserError(f'--dest={dest}: is a folder; name a file')

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
