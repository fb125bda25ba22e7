# SPDX-License-Identifier: Apache-2.0
"""Reads .npy files of plain numbers from untrusted sources: nothing is executed, and no memory is taken beyond what the file holds."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_HEADER = 2 ** 16  # bytes; NumPy itself writes fewer than 200
HEADER = 128  # bytes of the headers written here
KEYS = {'descr': r'["\']([^"\']*)["\']', 'fortran_order': r'(True|False)', 'shape': r'\(([\d\sL,]*)\)'}


class Header(NamedTuple):
    """The header of an .npy file."""

    dtype: np.dtype
    shape: tuple
    order: str  # C or F
    offset: int  # bytes before the numbers


def read_header(head: bytes, size: int) -> Header:
    """The Header of an .npy file of `size` bytes whose first bytes are `head`.

    Raises ValueError for other files, for arrays of anything but plain numbers, and for files shorter than the header says."""
    major = head[6] if head[:6] == b'\x93NUMPY' and len(head) >= 12 else 0
    if major not in (1, 2, 3):
        raise ValueError('not an .npy file')
    start = 10 if major == 1 else 12
    offset = start + int.from_bytes(head[8:start], 'little')
    if not offset <= min(len(head), start + MAX_HEADER):
        raise ValueError('its header is cut off or too long')
    text = head[start:offset].decode('latin1')
    found = [re.search(rf'["\']{key}["\']\s*:\s*{value}', text) for key, value in KEYS.items()]
    if not all(found):
        raise ValueError('its header is not that of an array of plain numbers')
    descr, order, shape = (match[1] for match in found)
    if not re.fullmatch(r'[<>=|]?[biufc](1|2|4|8|16|32)', descr):
        raise ValueError(f'it holds {descr[:20]!r}, not plain numbers')
    try:
        dtype = np.dtype(descr)
    except TypeError:
        raise ValueError(f'it holds {descr!r}, which this machine does not support') from None
    shape = tuple(int(side) for side in re.findall(r'\d+', shape))
    if len(shape) > 8 or math.prod(shape) * dtype.itemsize > size - offset:
        raise ValueError(f'its header claims more numbers than it holds: {descr} of shape {list(shape)} in {size} bytes')
    return Header(dtype, shape, 'F' if order == 'True' else 'C', offset)


def from_bytes(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file, writable. Raises ValueError."""
    found = read_header(data, len(data))
    flat = np.frombuffer(data, found.dtype, math.prod(found.shape), found.offset)
    return flat.reshape(found.shape, order=found.order).copy(order='K')


def open_npy(path: str | os.PathLike, start: int = 0, size: int | None = None) -> np.ndarray:
    """The array in an .npy file, mapped from the disk, read-only. Raises ValueError and OSError.

    start, size: in bytes, for an .npy that is part of the file at `path`, such as a member of an uncompressed .npz."""
    with open(path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size - start if size is None else size
        f.seek(start)
        found = read_header(f.read(min(MAX_HEADER + 12, size)), size)
    if not math.prod(found.shape):
        return np.zeros(found.shape, found.dtype)  # nothing to map
    return np.memmap(path, found.dtype, 'r', start + found.offset, found.shape, found.order)


def header(dtype: np.dtype, shape: Sequence[int]) -> bytes:
    """The header of an .npy file of an array in C order: always HEADER bytes, so that it can be written last, once the shape is known."""
    text = repr({'descr': np.dtype(dtype).str, 'fortran_order': False, 'shape': tuple(int(side) for side in shape)})
    return b'\x93NUMPY\1\0' + (HEADER - 10).to_bytes(2, 'little') + text.ljust(HEADER - 11).encode() + b'\n'
