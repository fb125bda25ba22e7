# SPDX-License-Identifier: Apache-2.0
"""A data set as one array that all processes of a node map into memory: a folder of .npy files, or the same in an uncompressed .npz.

images.npy [N,C,H,W], uint8 or float32; optionally labels.npy (int64 [N], or float32 [N,D]), and sigmas.npy, sigma_min.npy,
sigma_max.npy (float64 [N], in the units of dataset.json's tables); dataset.json: {"packed": 1, "units": of float images, "latents": of
latents, see latents.py, "text": of labels that were made of captions}, in that case with empty.npy (float32 [1,D]), the label of the empty
caption; captions.json, a list."""

import contextlib
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dnnlib import UserError, arrays
from dnnlib.archive import DAMAGE, PACKED_JSON, damage, packed_images
from dnnlib.files import MAX_JSON, json_object, json_value, new_folder, replacing, write_json
from dnnlib.fingerprint import digest
from training.data import tables
from training.data.contents import checked_captions, checked_empty

VERSION = 1
TABLES = tuple(tables.CHECKS)
CAPTIONS, EMPTY = 'captions.json', 'empty'
FILES = ('images.npy', 'dataset.json', CAPTIONS, *(f'{key}.npy' for key in (*TABLES, EMPTY)))
ALIGN = 64  # bytes: alignment of the arrays in an .npz
MAX_MEMBERS = 64  # limit for an .npz


class Member(NamedTuple):
    """The position of a member's bytes, and a value that changes with them."""

    path: str
    offset: int
    size: int
    content: int  # CRC-32 in an .npz, modification time in a folder


def is_packed(path: str | os.PathLike) -> bool:
    """Whether this is the path of a packed data set, as opposed to one of pictures."""
    if os.path.isdir(path):
        return packed_images(path) is not None
    return str(path).lower().endswith('.npz') and os.path.isfile(path)


class Packed:
    """The images of a packed data set, mapped and never written to, with the interface of contents.py.

    where: its name in errors, by default its path. Attribute images: array [N,C,H,W]. Raises UserError."""

    def __init__(self, path: str | os.PathLike, where: str | None = None):
        self.path, self.where = str(path), where or str(path)
        self._kind = 'packed folder' if os.path.isdir(self.path) else 'npz'
        try:
            self._members = _files(self.path) if self._kind == 'packed folder' else _members(self.path)
            self._json = self._read('dataset.json')
        except DAMAGE as err:
            raise UserError(f'{self.where}: cannot be read ({damage(err)}); make it with dataset_tool.py') from None
        self._meta = json_object(self._json, f'{self.where}: dataset.json')
        if self._meta.get('packed') != VERSION:
            raise UserError(f'{self.where}: dataset.json says "packed": {str(self._meta.get("packed"))[:20]}, and this version supports '
                            f'{VERSION}; make it with dataset_tool.py')
        self.images = found = self._array('images')
        if found.ndim != 4 or not found.size or found.dtype not in (np.uint8, np.float32) or not found.flags.c_contiguous:
            raise UserError(f'{self.where}: images.npy holds {found.dtype} of shape {list(found.shape)}; expected uint8 or float32 '
                            '[N,C,H,W]')
        self.count, self.image_shape = len(found), found.shape[1:]
        self.is_float = found.dtype == np.float32
        self.units, self.latents, self.text = (self._meta.get(key) for key in ('units', 'latents', 'text'))

    def has(self, key: str) -> bool:
        return f'{key}.npy' in self._members

    def values(self, key: str) -> np.ndarray | None:
        if not self.has(key):
            return None
        found = self._array(key)
        if found.shape[:1] != (self.count,) or found.dtype.kind not in 'iuf' or found.ndim > (2 if key == 'labels' else 1):
            raise UserError(f'{self.where}: {key}.npy holds {found.dtype} of shape {list(found.shape)}; expected numbers, one row for each '
                            f'of {self.count} images')
        return np.array(found)

    def called(self, key: str) -> str:
        return f'{key}.npy'

    def captions(self) -> list[str] | None:
        if CAPTIONS not in self._members:
            return None
        try:
            found = checked_captions(json_value(self._read(CAPTIONS, MAX_JSON), f'{self.where}: {CAPTIONS}'), f'{self.where}: {CAPTIONS}')
        except (OSError, ValueError) as err:
            raise UserError(f'{self.where}: cannot read {CAPTIONS} ({damage(err)})') from None
        if found is None or len(found) != self.count:
            raise UserError(f'{self.where}: {CAPTIONS} must be a list of {self.count} texts, one per image')
        return found

    def empty(self) -> np.ndarray | None:
        return checked_empty(np.array(self._array(EMPTY)), f'{self.where}: {EMPTY}.npy')

    def name(self, index: int) -> str:
        return f'image {index}'

    def decode(self, index: int) -> np.ndarray:
        return np.array(self.images[index])

    def fingerprint(self) -> dict:
        """The fingerprint of the data set that this was decoded from, if it is a decoded copy; otherwise its own."""
        if self._meta.get('source'):
            return self._meta['source']
        told = lambda *keys: digest(*(f'{key} {self._members[f"{key}.npy"][2:]}'.encode() for key in keys if self.has(key)))
        form = f'{list(self.images.shape)} {self.images.dtype.str}'.encode()
        return {'kind': self._kind, 'images': self.count, 'names': digest(form), 'content': told('images'),
                'labels': digest(self._json, told(*TABLES, EMPTY).encode())}

    def _read(self, name, most=PACKED_JSON):
        member = self._member(name)
        if member.size > most:
            raise ValueError(f'{name} has {member.size} bytes, more than the limit of {most}')
        with open(member.path, 'rb') as f:
            f.seek(member.offset)
            return f.read(member.size)

    def _array(self, key):
        try:
            member = self._member(f'{key}.npy')
            found = arrays.open_npy(member.path, member.offset, member.size)
            if found.dtype.itemsize > 1 and member.offset % ALIGN:
                raise ValueError(f'it does not begin at a multiple of {ALIGN} bytes: make the .npz with dataset_tool.py')
            return found
        except (OSError, ValueError) as err:
            raise UserError(f'{self.where}: cannot read {key}.npy ({damage(err)})') from None

    def _member(self, name):
        if name not in self._members:
            raise ValueError(f'it has no {name}')
        return self._members[name]


def _files(folder):
    found = {}
    for name in FILES:
        path = os.path.join(folder, name)
        with contextlib.suppress(FileNotFoundError):
            stat = os.stat(path)
            found[name] = Member(path, 0, stat.st_size, stat.st_mtime_ns)
    return found


def _members(path):
    """The members of an .npz, none of which may be compressed."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if len(infos) > MAX_MEMBERS:
            raise ValueError(f'{len(infos)} arrays, where a packed data set has no more than {len(TABLES) + 2}')
        for info in infos:
            head = os.pread(archive.fp.fileno(), 30, info.header_offset)
            if head[:4] != b'PK\3\4' or len(head) < 30:
                raise ValueError(f'the header of {info.filename} is damaged')
            if info.compress_type or info.flag_bits & 1:
                raise ValueError(f'{info.filename} is compressed or encrypted, and cannot be mapped')
            start = info.header_offset + 30 + sum(struct.unpack_from('<HH', head, 26))
            found[info.filename] = Member(str(path), start, info.file_size, info.CRC)
    return found


# ----------------------------------------------------------------------------------------------------
# Writing


class PackedFolder:
    """Writes a packed folder, in any folder: images one after the other, or by index if their number is known.

    shape: (C,H,W). dtype: uint8 or float32."""

    def __init__(self, folder: str | os.PathLike, shape: Sequence[int], dtype: Any):
        self.folder, self.shape, self.dtype, self._count = folder, tuple(shape), np.dtype(dtype), 0
        self._path = os.path.join(folder, 'images.npy')

    def allocate(self, count: int) -> np.ndarray:
        """An array [count,C,H,W] in the file, to be filled by index; the disk space is allocated now. Raises OSError."""
        nbytes, self._count = count * math.prod(self.shape) * self.dtype.itemsize, count
        with open(self._path, 'wb') as f:
            f.write(arrays.header(self.dtype, (count, *self.shape)))
            f.flush()
            if hasattr(os, 'posix_fallocate'):  # running out of space later would kill the process without a message
                os.posix_fallocate(f.fileno(), 0, arrays.HEADER + nbytes)
            else:
                f.truncate(arrays.HEADER + nbytes)
        return np.memmap(self._path, self.dtype, 'r+', arrays.HEADER, (count, *self.shape))

    def append(self, data: bytes, count: int = 1) -> None:
        """Adds one image or several, given as their bytes in C order."""
        if not self._count:
            self._file = open(self._path, 'wb')  # noqa: SIM115 (closed by finish)
            self._file.write(arrays.header(self.dtype, (0, *self.shape)))
        self._file.write(data)
        self._count += count

    def finish(self, columns: dict[str, np.ndarray], captions: list[str] | None = None, **meta: Any) -> None:
        """Writes columns ({key of TABLES, or EMPTY: array}), captions and dataset.json, and flushes everything to the disk."""
        if hasattr(self, '_file'):
            self._file.seek(0)
            self._file.write(arrays.header(self.dtype, (self._count, *self.shape)))
            self._file.close()
        for key, values in columns.items():
            np.save(os.path.join(self.folder, f'{key}.npy'), values, allow_pickle=False)
        if captions is not None:
            write_json(os.path.join(self.folder, CAPTIONS), captions)
        write_json(os.path.join(self.folder, 'dataset.json'), {'packed': VERSION, **meta})
        for name in os.listdir(self.folder):
            with open(os.path.join(self.folder, name), 'rb+') as f:
                os.fsync(f.fileno())


def zip_folder(folder: str | os.PathLike, dest: str | os.PathLike) -> None:
    """Makes the .npz of a packed folder: its files, uncompressed, with the arrays aligned so that they can be mapped."""
    with replacing(dest) as part, zipfile.ZipFile(part, 'w', zipfile.ZIP_STORED) as archive:
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # one date for all: the same images give the same file
            info.file_size = os.path.getsize(path)
            # 20 bytes are zip64's own field, which zipfile adds; then a field of an unknown kind, which readers skip, fills up.
            start = archive.fp.tell() + 30 + len(name) + 20 + 4
            info.extra = struct.pack('<HH', 0xFFFF, -start % ALIGN) + bytes(-start % ALIGN)
            with open(path, 'rb') as source, archive.open(info, 'w', force_zip64=True) as member:
                while piece := source.read(1 << 22):
                    member.write(piece)


@contextlib.contextmanager
def new_packed(dest: str | os.PathLike, shape: Sequence[int], dtype: Any) -> Iterator[PackedFolder]:
    """A PackedFolder that becomes `dest`, a folder or an .npz, when the block ends without an error; the caller calls finish()."""
    if not str(dest).lower().endswith('.npz'):
        with new_folder(dest, over='empty') as part:
            yield PackedFolder(part, shape, dtype)
        return
    head, name = os.path.split(os.path.abspath(dest))
    with tempfile.TemporaryDirectory(prefix=f'.{name}-', dir=head) as part:
        yield PackedFolder(part, shape, dtype)
        zip_folder(part, dest)
