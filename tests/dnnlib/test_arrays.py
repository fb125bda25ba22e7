# SPDX-License-Identifier: Apache-2.0
"""NumPy's files of numbers read as NumPy reads them; headers that tell of anything else are refused, at no cost."""

import io
import re
import struct

import numpy as np
import pytest

from dnnlib import arrays


def stored(array, version=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), version, allow_pickle=True)
    return buffer.getvalue()


def with_header(text, rest=b'', version=1, size=None):
    size = len(text) if size is None else size
    return b'\x93NUMPY' + bytes([version, 0]) + struct.pack('<H' if version == 1 else '<I', size) + text.encode('latin1') + rest


@pytest.mark.parametrize('version', [(1, 0), (2, 0), None])
@pytest.mark.parametrize('dtype', ['u1', '<f4', '>f4', 'f8', 'f2', 'i8', '?', 'c8', '>u2'])
@pytest.mark.parametrize('shape', [(), (5,), (3, 4), (2, 3, 4), (2, 0, 4)])
def test_arrays_are_what_numpy_reads(tmp_path, dtype, shape, version):
    array = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    for one in (array, np.asfortranarray(array)):
        data = stored(one, version)
        (tmp_path / 'x.npy').write_bytes(data)
        for found in (arrays.from_bytes(data), arrays.open_npy(tmp_path / 'x.npy')):
            assert found.dtype == array.dtype and found.shape == one.shape and np.array_equal(found, one)
    arrays.from_bytes(stored(array))[...] = 0  # a copy


def test_headers_of_other_writers():
    for text in ('{"shape": (2, 3,), "fortran_order": False, "descr": "<f4"}\n', "{'fortran_order':False,'descr':'<f4','shape':(2L, 3L)}"):
        assert arrays.from_bytes(with_header(text, bytes(24))).shape == (2, 3)


HEAD = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}\n"


@pytest.mark.parametrize('descr, shape', [
    ("'<f4'", '(1000000000000,)'), ("'<f4'", '(9223372036854775807, 9223372036854775807)'), ("'<f4'", '(-1, 2)'), ("'<f4'", '(1.5,)'),
    ("'|O'", '(1,)'), ("'<U99999999'", '(1,)'), ("'|V0'", '(99999999999,)'), ("'|V8'", '(1,)'), ("[('a', '<f4')]", '(1,)'),
    ("'f4,f4'", '(1,)'), ("'<f3'", '(1,)'), ("'<M8[s]'", '(1,)'), ("'<f4'", '(1,' + '1,' * 70 + ')'), ("'<f4'", '(' * 1000),
    ("__import__('os')", '(1,)'), ("'<i32'", '(1,)'), ("'<f4'", '9' * 5000), ("'<f4'", '(' + '9' * 5000 + ',)')])
@pytest.mark.parametrize('version', [1, 2, 3])
def test_headers_that_are_refused(tmp_path, descr, shape, version):
    data = with_header(HEAD.format(descr, shape), bytes(64), version)
    (tmp_path / 'x.npy').write_bytes(data)
    for read, given in ((arrays.from_bytes, data), (arrays.open_npy, tmp_path / 'x.npy')):
        with pytest.raises(ValueError):
            read(given)


def test_cut_anywhere():
    data = stored(np.arange(6, dtype=np.float32).reshape(2, 3))
    for size in range(len(data)):
        with pytest.raises(ValueError):
            arrays.from_bytes(data[:size])
    for version, size in ((1, 5000), (2, 2 ** 31), (3, 2 ** 32 - 1), (2, arrays.MAX_HEADER + 1)):
        with pytest.raises(ValueError, match='its header is cut off'):
            arrays.from_bytes(with_header(HEAD.format("'<f4'", '(1,)'), bytes(4000 if version == 1 else 100_000), version, size))
    assert arrays.from_bytes(data + b'more').shape == (2, 3)


def test_refusals_are_short():
    with pytest.raises(ValueError) as error:
        arrays.from_bytes(with_header(HEAD.format("'" + 'x' * 9000 + "'", '(1,)')))
    assert len(str(error.value)) < 100 and re.search('not plain numbers', str(error.value))
