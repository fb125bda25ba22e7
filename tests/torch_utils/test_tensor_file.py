# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save read as data: what torch.load would give, or one line; never more than the file holds, and nothing executed."""

import argparse
import copy
import io
import os
import pickle
import time
import zipfile

import pytest
import torch

from dnnlib import UserError
from tests.fuzz import mutators
from tests.support import GOLDEN, edm_pickle
from torch_utils import misc, tensor_file

X = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
TREE = {'net': {'turned': X.transpose(0, 2), 'part': X[1:], 'whole': X, 'none': torch.zeros(0, 3), 'one': torch.tensor(3),
                'rows last': misc.batched(X[0, 0]).to(memory_format=torch.channels_last), 'parameter': torch.nn.Parameter(X + 1)},
        'state': {0: {'step': torch.tensor(1.0)}, 7: None}, 'groups': [{'betas': (0.9, 0.999), 'lr': 1e-3}, [], True, 2 ** 70, -1, 'é']}
TYPES = ('float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool')


def saved(tree, **options):
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


def same(a, b):
    """Whether two trees are equal, tensors with their types and strides."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def refused(tmp_path):
    """The one line that bytes are refused with."""
    def refused(data):
        path = tmp_path / 'a.pt'
        path.write_bytes(data)
        with pytest.raises(UserError, match='a.pt: cannot be read as weights') as error:
            tensor_file.read(path, 'weights')
        assert error.value.message.isprintable() and len(error.value.message) < 400
        return error.value.message
    return refused


def with_pickle(data, change):
    """The file with its pickle changed, and a right CRC-32."""
    return mutators.pack([(name, change(part) if name.endswith('/data.pkl') else part) for name, part in mutators.members(data)])


# --- what is read

@pytest.mark.parametrize('mapped', [False, True])
@pytest.mark.parametrize('zipped', [True, False])
def test_it_is_what_torch_load_gives(tmp_path, mapped, zipped):
    """Also in the format before PyTorch 1.6, where numbers lie at any byte."""
    tree = {**TREE, 'types': {name: (X % 2).to(getattr(torch, name)) for name in TYPES}}
    torch.save(tree, tmp_path / 'a.pt', _use_new_zipfile_serialization=zipped)
    found, expected = tensor_file.read(tmp_path / 'a.pt', mapped=mapped), torch.load(tmp_path / 'a.pt', weights_only=True)
    assert same(found, expected)
    found['net']['whole'][1, 0, 0] = 99
    assert found['net']['part'][0, 0, 0] == found['net']['turned'][0, 0, 1] == 99  # one storage, as before
    assert tensor_file.read(tmp_path / 'a.pt')['net']['whole'][1, 0, 0] == 12  # and the file stays as it is


@pytest.mark.parametrize('path', [*sorted(GOLDEN.glob('version_0.1.0/*/*.pt')), GOLDEN / 'hub' / 'old_client' / 'pytorch_model.bin'],
                         ids=lambda path: path.parent.name)
def test_files_of_other_programs(path):
    assert same(tensor_file.read(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize('zipped', [True, False])
def test_only_what_is_selected_is_read(tmp_path, zipped):
    """A namespace, which is no plain value, may stand beside it, with tensors of its own; and is refused where it is asked for."""
    tree = {'ema': {'x': X}, 'args': argparse.Namespace(a=1, b=X + 1), 'model': {'x': X + 2}}
    torch.save(tree, tmp_path / 'a.pt', _use_new_zipfile_serialization=zipped)
    assert same(tensor_file.read(tmp_path / 'a.pt', select=lambda root: {'ema': root['ema']}), {'ema': {'x': X}})
    for select in (None, lambda root: root['args']):
        with pytest.raises(UserError, match='holds more than tensors and plain values'):
            tensor_file.read(tmp_path / 'a.pt', select=select)


def test_memory_of_their_own_outlives_the_file(tmp_path):
    torch.save({'x': X}, tmp_path / 'a.pt')
    found = tensor_file.read(tmp_path / 'a.pt')['x']
    with open(tmp_path / 'a.pt', 'r+b') as f:
        f.write(bytes(os.path.getsize(tmp_path / 'a.pt')))
    assert torch.equal(found, X)


# --- what is refused

def test_a_wrong_bit_is_found(refused, tmp_path):
    data = saved({'x': X})
    place = data.index(X.numpy().tobytes()) + 17
    assert "its record 'data/0' has a wrong checksum" in refused(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
    assert tensor_file.read(tmp_path / 'a.pt', mapped=True, checksums=False)['x'].shape == X.shape  # for a look at the values alone
    place = data.index(b'FloatStorage')
    assert "its record 'data.pkl' has a wrong checksum" in refused(data[:place] + b'H' + data[place + 1:])


def test_a_file_cut_at_any_place(refused):
    data = saved({'x': X})
    for size in range(0, len(data), 61):
        refused(data[:size])


def test_the_older_format_cut_at_any_place(refused):
    data = saved({'x': X, 'y': X.half()}, _use_new_zipfile_serialization=False)
    for size in range(0, len(data), 31):
        refused(data[:size])


@pytest.mark.parametrize('old, new, words', [
    (b'\x80\x02M\xe9\x03.', b'\x80\x02M\xea\x03.', 'unknown version'),
    (b'little_endianq\x02\x88', b'little_endianq\x02\x89', 'big-endian'), (b'little_endian', b'Little_endian', 'big-endian'),
    (b'FloatStorage', b'HalfStorage', 'bytes behind its last storage'),
    (b'FloatStorage', b'UntypedStorage', 'asks for torch.UntypedStorage'),
    (b'_rebuild_tensor_v2', b'_rebuild_qtensor', 'asks for torch._utils._rebuild_qtensor'),
    (b'K\x18N', b'K\x19N', 'storage that is not where it should be'),
    (b'K\x18N', b'\x8a\x06' + (10 ** 12).to_bytes(6, 'little') + b'N', 'storage that is not where it should be'),
    (b'K\x18N', b'J\xff\xff\xff\xffN', 'storage of an unknown form'), (b'K\x18N', b'K\x18K\x01', 'two forms'),
    ((24).to_bytes(8, 'little'), (25).to_bytes(8, 'little'), 'storage that is not where it should be'),
    (b'K\x02K\x03K\x04\x87', b'K\x02K\x03K\x05\x87', 'larger than its storage')])
def test_lies_in_the_older_format(refused, old, new, words):
    data = saved({'x': X}, _use_new_zipfile_serialization=False)
    assert data.count(old) == 1
    assert words in refused(data.replace(old, new))


@pytest.mark.parametrize('kind, old, new, words', [
    ('count', b'K\x18', b'K\x19', 'not as large as its record'),
    ('count', b'K\x18', b'\x8a\x06' + (10 ** 12).to_bytes(6, 'little'), 'not as large as its record'),
    ('type', b'FloatStorage', b'HalfStorage', 'not as large as its record'),
    ('shape', b'K\x02K\x03K\x04\x87', b'K\x02K\x03K\x05\x87', 'larger than its storage'),
    ('shape', b'K\x02K\x03K\x04\x87', b'K\x02K\x03\x8a\x06' + (10 ** 12).to_bytes(6, 'little') + b'\x87', 'larger than its storage'),
    ('stride', b'K\x0cK\x04K\x01\x87', b'K\x0dK\x04K\x01\x87', 'larger than its storage'),
    ('stride', b'K\x0cK\x04K\x01\x87', b'K\x0cK\x04J\xff\xff\xff\xff\x87', 'without a shape'),
    ('offset', b'QK\x00', b'QK\x01', 'larger than its storage'),
    ('offset', b'QK\x00', b'QN', 'without a shape'),
    ('name', b'X\x01\x00\x00\x000', b'X\x01\x00\x00\x001', "lacks the record 'data/1'"),
    ('function', b'_rebuild_tensor_v2', b'_rebuild_sparse_tensor', 'asks for torch._utils._rebuild_sparse_tensor, which is not allowed'),
    ('type', b'FloatStorage', b'UntypedStorage', 'asks for torch.UntypedStorage'),
])
def test_lies_about_a_tensor(refused, kind, old, new, words):
    data = saved({'x': X})
    without_memo = lambda part: b''.join(token for token in mutators.tokens(part) if token[:1] not in (pickle.BINPUT, pickle.LONG_BINPUT))
    assert without_memo(dict(mutators.members(data))['archive/data.pkl']).count(old) == 1
    assert words in refused(with_pickle(data, lambda part: without_memo(part).replace(old, new)))


def test_a_value_is_not_repeated(refused):
    """An expanded tensor costs its file nothing, and could cost its reader anything."""
    assert 'larger than its storage' in refused(saved({'x': torch.zeros(1).expand(10 ** 6, 10 ** 6)}))


def test_one_record_cannot_be_read_again_and_again(refused):
    """Names in a zip file may stand for the same bytes; as many tensors are read as the file is large, and no more."""
    parts = dict(mutators.members(saved({str(i): torch.ones(1000) for i in range(50)})))
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name in ('archive/data.pkl', 'archive/data/0'):
            archive.writestr(name, parts[name])
        for i in range(1, 50):
            info = copy.copy(archive.infolist()[1])
            info.filename = f'archive/data/{i}'
            archive.filelist.append(info)
    assert 'larger than the file' in refused(file.getvalue())


def test_payloads_are_not_executed(refused, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    assert 'asks for posix.mkdir, which is not allowed' in refused(saved({'x': Payload()}))
    assert not (tmp_path / 'executed').exists()


BOMBS = {name: data for name, data in edm_pickle.bombs().items() if name != 'memo'}  # which is None here, at no cost


@pytest.mark.parametrize('name', [pytest.param(name, marks=pytest.mark.slow if len(data) > 10_000 else ()) for name, data in BOMBS.items()])
def test_bombs(refused, name):
    start = time.monotonic()
    refused(mutators.pack([('archive/data.pkl', BOMBS[name])]))
    assert time.monotonic() - start < 10


def test_trees_that_grow_are_refused(refused):
    doubled, deep = [1], [1]
    for _ in range(40):
        doubled = {'a': doubled, 'b': doubled}
    for _ in range(70):
        deep = [deep]
    assert 'steps' in refused(saved(doubled)) and 'levels deep' in refused(saved(deep))


def test_other_files(refused):
    data = saved({'x': X})
    parts = mutators.members(data)
    assert 'is empty' in refused(b'')
    assert 'not a complete zip file' in refused(data + b'behind the end')
    assert 'not one that torch.save wrote' in refused(mutators.pack([('a.txt', b'x')]))
    assert 'not one that torch.save wrote' in refused(mutators.pack([*parts, ('other/data.pkl', b'.')]))
    with pytest.warns(UserWarning, match='Duplicate name'):
        twice = mutators.pack([*parts, parts[-1]])
    assert 'not one that torch.save wrote' in refused(twice)
    assert 'compressed' in refused(mutators.pack(parts, compressed={'archive/data.pkl'}))
    assert 'big-endian' in refused(mutators.pack([(name, b'big' if name.endswith('byteorder') else part) for name, part in parts]))
    assert 'more than tensors and plain values' in refused(saved({'x': b'bytes'}))
    assert 'not a complete zip file' in refused(data[:-10] + (2 ** 31).to_bytes(4, 'little') + data[-6:])  # the directory's size


def test_the_error_says_who_named_the_file(tmp_path):
    with pytest.raises(UserError, match='^--weights=.*none.pt: no such file$'):
        tensor_file.read(tmp_path / 'none.pt', 'weights', option='--weights=')
    with pytest.raises(UserError, match='cannot be read as a state .Is a directory.; remedy$'):
        tensor_file.read(tmp_path, 'a state', '; remedy')
