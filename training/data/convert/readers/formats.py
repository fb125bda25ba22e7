# SPDX-License-Identifier: Apache-2.0
"""Shared code of the readers of other programs' formats: optional packages, file handles per process, values as physical numbers."""

import contextlib
import importlib
import io
import itertools
import logging
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError, arrays, pictures
from dnnlib.archive import DAMAGE, IMAGES, MAX_MEMBER, MAX_PIXELS, RARER_IMAGES, damage, decode_image, open_picture
from dnnlib.util import one_line
from training.data.convert.readers.source import Kind, Source, folder_classes

LOOKED_AT = 1000  # files of a folder that are examined to recognise its content
PACKAGES = {'astropy.io.fits': 'astropy', 'pyarrow.parquet': 'pyarrow'}  # of modules that are not called like their package


def needs(module, path):
    """Imports a module of an optional package. Raises UserError."""
    package = PACKAGES.get(module, module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            found = importlib.import_module(module)
    except ImportError:
        raise UserError(f'--source={path} needs {package}: pip install {package}') from None
    logging.getLogger(package).setLevel(logging.CRITICAL)  # about damaged files, its error is reported in one line instead of its log
    return found


@contextlib.contextmanager
def guarded():
    """Turns any error of a package into one of DAMAGE: damaged bytes make packages raise errors of all kinds."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            yield
        except (UserError, *DAMAGE):
            raise
        except Exception as err:
            raise ValueError(f'{type(err).__name__}: {one_line(err)}') from err


class Opened:
    """opener(*args), called when it is first wanted in a process: handles are closed before a fork, and are no part of a pickle."""

    _all = weakref.WeakSet()

    def __init__(self, opener, *args):
        self.args, self._opener, self._held = args, opener, None
        self._all.add(self)

    def __call__(self):
        if self._held is None:
            self._held = self._opener(*self.args)
        return self._held

    def close(self):
        """Closes the file; the next call opens it again."""
        held, self._held = self._held, None
        if hasattr(held, 'close'):
            with contextlib.suppress(Exception):
                held.close()

    def __getstate__(self):
        return {**self.__dict__, '_held': None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._all.add(self)

    @classmethod
    def close_all(cls):
        """Closes what this process holds open."""
        for one in list(cls._all):
            one.close()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(before=Opened.close_all)


class Bytes:
    """A file whose bytes are read by their place; one position is not shared by threads."""

    def __init__(self, path: str):
        self._file = open(path, 'rb')  # noqa: SIM115 (closed by Opened)
        self.size = os.fstat(self._file.fileno()).st_size
        self.close = self._file.close

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises ValueError if the file ends earlier."""
        if not 0 <= offset <= offset + size <= self.size:
            raise ValueError(f'cut off: {size} bytes at {offset} of {self.size}')
        return os.pread(self._file.fileno(), size, offset)


class Capped(io.BufferedReader):
    """A file for packages that read as many bytes as a header claims: read() allocates no more than the file has."""

    def __init__(self, path: str):
        super().__init__(open(path, 'rb', buffering=0))  # noqa: SIM115 (closed with this)
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or fewer at the end of the file."""
        return super().read(size if size is None or size < 0 else min(size, max(self._size - self.tell(), 0)))


# ----------------------------------------------------------------------------------------------------
# Images


def sized(channels: int, height: int, width: int, dtype: Any) -> Kind:
    """The Kind of an image of this size and type, if it is within the limits. Raises ValueError."""
    dtype, sides = np.dtype(dtype), [int(channels), int(height), int(width)]
    if dtype.kind not in 'uif':
        raise ValueError(f'values of type {dtype}; expected plain real numbers')
    if min(sides) < 1:
        raise ValueError(f'an image of {width} x {height} pixels and {channels} channels')
    if sides[1] * sides[2] > MAX_PIXELS or np.prod(sides, dtype=object) * dtype.itemsize > MAX_MEMBER:
        raise ValueError(f'{width} x {height} pixels in {channels} channels, more than the limit')
    return Kind(*sides, dtype == np.uint8, str(dtype.newbyteorder('=')))


def physical(array: np.ndarray) -> np.ndarray:
    """Numbers as uint8 if they have this type, otherwise as native float32. Raises ValueError if some are not finite."""
    if array.dtype.kind not in 'uif':
        raise ValueError(f'values of type {array.dtype}; expected plain real numbers')
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    with np.errstate(all='ignore'):
        found = np.ascontiguousarray(array, np.float32)
    bad = found.size - np.count_nonzero(np.isfinite(found))
    if bad:
        raise ValueError(f'{bad} of its {found.size} values are not finite (NaN, blank or infinite); fill them in')
    return found


def encoded_kind(data: bytes) -> Kind:
    """The Kind of a picture or .npy file, from its header. Raises the errors in DAMAGE."""
    if data[:6] == b'\x93NUMPY':
        found = arrays.read_header(data, len(data))
        return sized(*(1, *found.shape)[-3:], found.dtype) if len(found.shape) in (2, 3) else decode_image('.npy', data)
    picture = open_picture(data)
    return Kind(*pictures.header(picture, data), picture.mode)


def decode(data: bytes) -> np.ndarray:
    """A picture or .npy file, recognised by its content, as [C,H,W]. Raises the errors in DAMAGE."""
    if data[:6] == b'\x93NUMPY':
        return physical(decode_image('.npy', data))
    return decode_image('', data)


# ----------------------------------------------------------------------------------------------------
# Files that hold one image or several


def files_below(path: str, fits: Callable[[str], bool]) -> list[str]:
    """The files below a folder whose names fit, relative to it, sorted. fits: a function of a name."""
    root = Path(path)
    found = (p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file() and not p.name.startswith('.') and fits(str(p)))
    return sorted(found)


def first_files(path):
    """The paths of the first LOOKED_AT files below a folder."""
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return itertools.islice(found, LOOKED_AT)


def holds(path: str, fits: Callable[[str], bool]) -> bool:
    """Whether a folder holds files that fit, and no pictures."""
    found = False
    for file in first_files(path):
        if file.lower().endswith((*IMAGES, *RARER_IMAGES)):
            return False
        found = found or not os.path.basename(file).startswith('.') and fits(file)
    return found


class StackSource(Source):
    """A file with one image or several, or all such files below a folder, whose top folders are then the classes.

    A subclass has `opens`, a class: opens(path, **options) with len(), kind(k), read(k) and close(); and fits(path)."""

    opens = None
    _last = None  # the file that was read last

    def hold(self, path, **options):
        """Finds the files and counts their images. options: those of `opens`."""
        self._path, self._options = path, options
        is_folder = os.path.isdir(path)
        files = files_below(path, self.fits) if is_folder else [os.path.basename(path)]
        if not files:
            raise ValueError(f'no files in it that hold {self.what}')
        self._root = path if is_folder else os.path.dirname(path)
        self.names, self._places, problems = [], [], []
        for file in files:
            try:
                count = len(self._file(file))
                if not count:
                    raise ValueError('no images in it')
            except DAMAGE as err:
                if not is_folder:
                    raise
                problems.append(f'{file}: {damage(err)}')
                count = 1  # read() will raise its error
            self.names += [f'{file}[{k}]' for k in range(count)] if count > 1 else [file]
            self._places += [(file, k) for k in range(count)]
        if len(problems) == len(files):
            raise ValueError(f'none of its {len(files)} files; {problems[0]}')
        self.labels = folder_classes([file for file, _ in self._places])

    def __getstate__(self):
        return {**self.__dict__, '_last': None}

    @classmethod
    def fits(cls, path: str) -> bool:
        """Whether a file has this format, by its name or first bytes."""
        raise NotImplementedError

    @classmethod
    def matches(cls, path: str) -> bool:
        """A file that fits, or a folder that holds such and no pictures."""
        with contextlib.suppress(OSError):
            return holds(path, cls.fits) if os.path.isdir(path) else os.path.isfile(path) and cls.fits(path)
        return False

    def _file(self, file):
        if self._last is None or self._last.args != (file,):
            if self._last is not None:
                self._last.close()
            self._last = Opened(self._open, file)
        with guarded():
            return self._last()

    def _open(self, file):
        return self.opens(os.path.join(self._root, file), **self._options)

    def kind(self, index: int) -> Kind:
        """The Kind of an image, from headers."""
        file, k = self._places[index]
        opened = self._file(file)
        with guarded():
            return opened.kind(k)

    def read(self, index: int) -> np.ndarray:
        """The image, [C,H,W]: uint8 where it is stored so, else float32."""
        file, k = self._places[index]
        opened = self._file(file)
        with guarded():
            opened.kind(k)  # checks that its size is within limits
            return physical(opened.read(k))


def head(path: str, size: int) -> bytes:
    """The first bytes of a file; b'' where it cannot be read."""
    try:
        with open(path, 'rb') as f:
            return f.read(size)
    except OSError:
        return b''
