# SPDX-License-Identifier: Apache-2.0
"""Pickled dicts of arrays, of NumPy 1 and 2 in every protocol, are read without being executed; anything else is refused."""

import collections
import json
import pickle

import numpy as np
import pytest

from tests.support import GOLDEN, edm_pickle
from torch_utils import numpy_pickle
from torch_utils.pickle_machine import Refused

NUMPY1 = json.loads((GOLDEN / 'metrics' / 'pickles_numpy1.json').read_text())  # of NumPy 1.26: statistics of 9 vectors


def read(data):
    return numpy_pickle.read_dict(memoryview(data))


@pytest.fixture
def no_unpickling(monkeypatch):
    """Python's own unpickler is out of order."""
    def refuse(*args, **kwargs):
        raise AssertionError('unpickled')
    for name in ('load', 'loads', 'Unpickler', '_Unpickler'):
        monkeypatch.setattr(pickle, name, refuse)


def statistics():
    x = np.random.default_rng(0).integers(0, 256, (9, 3)) / 8
    return {'fid': {'mu': x.mean(0), 'sigma': np.cov(x, rowvar=False)}, 'num_images': 9, 'seconds': np.float64(1.5)}


@pytest.mark.filterwarnings('ignore:numpy.core')
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_numpy_1(protocol):
    data = bytes.fromhex(NUMPY1[str(protocol)])
    expected = pickle.loads(data)
    for entry in ('fid', 'fd_dinov2'):
        for key in ('mu', 'sigma'):
            found = numpy_pickle.as_array(read(data)[entry][key])
            np.testing.assert_array_equal(found, expected[entry][key])
            assert found.dtype.itemsize == expected[entry][key].dtype.itemsize
    assert b'numpy.core' in data and read(data)['num_images'] == 9


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
@pytest.mark.parametrize('change', [np.ascontiguousarray, np.asfortranarray, np.float16, lambda x: x.astype('>f8'), lambda x: x[::2, ::-1],
                                    np.uint8, lambda x: x[:1, :1], lambda x: np.tile(x, (60, 60))])
def test_this_numpy(protocol, change, no_unpickling):
    array = change(statistics()['fid']['sigma'])
    data = pickle.dumps({'a': array, 'again': array}, protocol)
    for key in ('a', 'again'):
        np.testing.assert_array_equal(numpy_pickle.as_array(read(data)[key]), array)


def test_dicts_of_other_programs(no_unpickling, monkeypatch):
    """EasyDict, as NVIDIA's programs have it, and OrderedDict are dicts."""
    kind = type('EasyDict', (dict,), {'__module__': 'dnnlib.util'})
    monkeypatch.setattr('dnnlib.util.EasyDict', kind)
    data = pickle.dumps({'fid': kind(statistics()['fid']), 'other': collections.OrderedDict(a=1)}, 4)
    assert numpy_pickle.as_array(read(data)['fid']['mu']).shape == (3,) and read(data)['other'] == {'a': 1}
    assert numpy_pickle.as_array(read(data)['other']) is None


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('module, name', [('os', 'system'), ('builtins', 'eval'), ('numpy', 'load'), ('numpy.core.multiarray', 'fromfile')])
def test_globals_are_refused_by_name(protocol, module, name, no_unpickling):
    with pytest.raises(Refused, match=f'asks for {module}.{name}, which is not allowed'):
        read(edm_pickle.ask_for(module, name, protocol))


def patched(old, new, protocol=3):
    """A pickled array, its bytes changed."""
    data = pickle.dumps({'a': np.arange(6.0).reshape(2, 3)}, protocol)
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize('data, message', [
    (pickle.dumps([1], 4), 'holds no dict'),
    (pickle.dumps({'a': np.array([None, {}])}, 4), 'something other than numbers'),
    (pickle.dumps({'a': np.array(['x'])}, 4), 'something other than numbers'),
    (pickle.dumps({'a': np.zeros(2, complex)}, 4), 'something other than numbers'),
    (pickle.dumps({'a': np.zeros([0, 3])}, 4), 'does not match'),
    (pickle.dumps({'a': np.zeros(3)}, 4)[:-30], 'cut off'),
    (patched(b'K\x02K\x03\x86', b'K\x02K\x04\x86'), 'does not match'),
    (patched(b'K\x02K\x03\x86', b'J\xff\xff\xff\xff'), 'without its values|wrong type|does not match'),
    (patched(b'C0', b'C\x2f'), 'cut off|unknown opcode|opcode|does not match'),
    (patched(b'\x96\x30\0\0\0\0\0\0\0', b'\x96' + b'\xff' * 7 + b'\x7f', 5), 'claims more bytes'),
    (b'\x80\x06}.', 'newer protocol than 5'),
    (pickle.dumps({'a': 1}, 0), 'opcode|damaged'),
    (b'\x80\x04', 'cut off'),
])
def test_what_is_no_dict_of_arrays(data, message, no_unpickling):
    with pytest.raises(Refused, match=message):
        numpy_pickle.as_array(read(data)['a'])


def test_arrays_in_another_file_are_refused():
    data = pickle.dumps({'a': np.arange(6.0)}, 5, buffer_callback=[].append)
    with pytest.raises(Refused, match='NEXT_BUFFER'):
        read(data)
