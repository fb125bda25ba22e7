# SPDX-License-Identifier: Apache-2.0
"""Reads pickled dicts of NumPy arrays, such as EDM2's reference statistics (*.pkl), without executing anything in them.

Without NumPy's own unpickler: an array is a view of bytes in the file. Supported are the forms of NumPy 1 and 2 under
protocols 2 to 5: `_reconstruct` with a state, `_frombuffer` with the bytes in the file (protocol 5), and bytes written as text (protocol
2)."""

import math
import re
from typing import Any

import numpy as np

from torch_utils.pickle_machine import MAX_TEXT, Limits, Machine, Refused, dict_or_record, is_record

MAX_DIMS = 8
NUMBERS = re.compile(r'[fiu][1248]')  # types of numbers, without byte order

# Every global that such files contain -> its name here. EasyDict is the dict in which NVIDIA's programs store results.
WORDS = {
    ('numpy', 'ndarray'): 'ndarray',
    ('numpy', 'dtype'): 'dtype',
    ('_codecs', 'encode'): 'encode',
    ('collections', 'OrderedDict'): 'dict',
    ('dnnlib.util', 'EasyDict'): 'dict',
    **{(f'numpy.{core}.multiarray', name): name for core in ('core', '_core') for name in ('_reconstruct', 'scalar')},
    **{(f'numpy.{core}.numeric', '_frombuffer'): '_frombuffer' for core in ('core', '_core')},
}


def read_dict(data: memoryview) -> dict:
    """The dict in a pickle, data a memoryview. Its values are plain values, dicts, lists, and Records for as_array(). Raises Refused."""
    found = Machine(data, 0, WORDS, Limits(text=MAX_TEXT + len(data)), dict_or_record).run()  # in protocol 2 arrays are stored as text
    if not isinstance(found, dict):
        raise Refused('holds no dict')
    return found


def as_array(value: Any) -> np.ndarray | None:
    """The array that a value of read_dict() represents, a read-only view of the file; None if it is not an array. Raises Refused."""
    if is_record(value, '_reconstruct'):
        state = value.state
        if not isinstance(state, tuple) or len(state) != 5 or type(state[3]) is not bool:
            raise Refused('is damaged (an array without its values)')
        _, shape, dtype, fortran, values = state
    elif is_record(value, '_frombuffer'):
        if len(value.args) not in (4, 5) or value.args[3] not in ('C', 'F') or value.args[4:] not in ((), (None,)):
            raise Refused('is damaged (an array without its values)')
        values, dtype, shape, order = value.args[:4]
        fortran = order == 'F'
    else:
        return None
    dtype, values = _dtype(dtype), _values(values)
    whole = isinstance(shape, tuple) and len(shape) <= MAX_DIMS and all(type(side) is int and side > 0 for side in shape)
    if not whole or math.prod(shape) * dtype.itemsize != len(values):
        raise Refused('is damaged (an array whose shape does not match its values)')
    return np.frombuffer(values, dtype).reshape(shape, order='F' if fortran else 'C')


def _dtype(value):
    """A NumPy type of numbers: dtype('f8', ...) with the state (version, byte order, ...)."""
    text = value.args[0] if is_record(value, 'dtype') and value.args else None
    if not isinstance(text, str) or not NUMBERS.fullmatch(text) or text == 'f1':
        raise Refused('holds an array of something other than numbers')
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else '<'
    if order not in ('<', '>', '|', '='):
        raise Refused('is damaged (an array without a byte order)')
    return np.dtype((order if order in '<>' else '<') + text)


def _values(value):
    """The bytes of an array: a view of the file, or in protocol 2 encode(text, 'latin1')."""
    if isinstance(value, memoryview):
        return value
    if is_record(value, 'encode') and len(value.args) == 2 and isinstance(value.args[0], str) and value.args[1] in ('latin1', 'latin-1'):
        try:
            return value.args[0].encode('latin-1')
        except UnicodeEncodeError:
            pass
    raise Refused('is damaged (an array without its values)')
