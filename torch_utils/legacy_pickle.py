# SPDX-License-Identifier: Apache-2.0
"""Reads the pickles in which EDM, EDM2 and ambient-laws published networks (*.pkl) without executing anything in them.

The source code that such files contain is skipped: only names, constructor arguments, tensors and what describes an encoder are read."""

import math
import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import numpy_pickle
from torch_utils.pickle_machine import MAX_NAME, Global, Limits, Machine, Refused, dict_or_record, is_record

MAX_DEPTH = 64  # of modules within modules, and of lists within arguments
MAX_DIMS, MAX_SIDE = 8, 2 ** 40  # of a tensor

# Every global that such files contain -> its name here; among NumPy's are the dicts, plain and EDM2's.
WORDS = numpy_pickle.WORDS | {
    ('torch_utils.persistence', '_reconstruct_persistent_obj'): 'object',
    ('torch._utils', '_rebuild_parameter'): 'parameter',
    ('torch._utils', '_rebuild_tensor_v2'): 'tensor',
    ('torch.storage', '_load_from_bytes'): 'storage',
    ('torch.nn.modules.container', 'ModuleDict'): 'modules',
}
STORAGES = {('torch', 'DoubleStorage'): '<f8', ('torch', 'FloatStorage'): '<f4', ('torch', 'HalfStorage'): '<f2',
            ('torch', 'LongStorage'): '<i8'}
STORAGE_MAGIC, STORAGE_VERSION = 0x1950a86a20f9469cfc6c, 1001


class Snapshot(NamedTuple):
    """What a file holds: the class name, constructor arguments and state dict of its network, and what describes its encoder.

    arguments: JSON types, and may be infinite. state: tensors on the CPU, with the names, values and types of state_dict(). encoder, of
    EDM2's files: {"class_name": ..., its public attributes: JSON types}, else None."""

    class_name: str
    arguments: dict
    state: dict[str, torch.Tensor]
    encoder: dict | None


def read_network(path: str | os.PathLike) -> tuple[str, dict, dict[str, torch.Tensor]]:
    """(class name, constructor arguments, state dict) of the network `ema` in a snapshot, as read_snapshot returns them."""
    return read_snapshot(path)[:3]


def read_snapshot(path: str | os.PathLike) -> Snapshot:
    """The network `ema` and the encoder in a snapshot; nothing is executed.

    Raises UserError, in one line, for globals, opcodes, versions and types that such files do not contain, for truncated
    files, and for sizes larger than the file."""
    try:
        data, limits = map_file(path), Limits()
        snapshot = Machine(data, 0, WORDS, limits, record).run()
        if not isinstance(snapshot, dict) or not is_record(snapshot.get('ema'), 'object'):
            raise Refused('holds no network under the name "ema"')
        reader = Reader(len(data), limits)
        return Snapshot(*reader.network(snapshot['ema']), reader.description(snapshot.get('encoder')))
    except Refused as err:
        raise UserError(f'{path}: {err}; expected a network snapshot (.pkl) of EDM, EDM2 or ambient-laws') from None


def map_file(path: str | os.PathLike) -> memoryview:
    """The bytes of a file as a view, whatever its size."""
    with open(path, 'rb') as f:
        try:
            return memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:
            raise Refused('is empty') from None


def record(word: str, args: tuple) -> Any:
    """The value that represents a call in such files: an empty dict for OrderedDict(), otherwise a Record that is checked later."""
    if word == 'object':
        check_meta(args)
    return dict_or_record(word, args)


def check_meta(args):
    """The single argument of an object: a dict with its type, version, class name and state; its source code is skipped."""
    meta = args[0] if len(args) == 1 else None
    if not isinstance(meta, dict) or not isinstance(meta.get('state'), dict) or not isinstance(meta.get('class_name'), str):
        raise Refused('is damaged (an object without class name and state)')
    for key, expected in (('type', 'class'), ('version', 6)):
        found = meta.get(key)
        if type(found) is not type(expected) or found != expected:
            shown = ascii(found)[:50] if isinstance(found, str | int | None) else 'another kind'
            raise Refused(f'holds an object of {key} {shown} where {expected!r} is read')


class Reader:
    """Converts the machine's result to arguments and tensors, whose total size never exceeds that of the file, file_bytes."""

    def __init__(self, file_bytes, limits):
        self.left, self.limits = file_bytes, limits
        self.storages = {}  # id of a Record (the Records stay alive meanwhile) -> NumPy array

    def network(self, node):
        """As read_network."""
        meta = node.args[0]
        arguments = self.plain(meta['state'].get('_init_kwargs'))
        if meta['state'].get('_init_args'):
            raise Refused('holds a network with constructor arguments that are not named')
        if not isinstance(arguments, dict):
            raise Refused('holds a network without constructor arguments')
        tensors = {}
        self.collect(node, '', 0, tensors)
        return meta['class_name'][:MAX_NAME], arguments, tensors

    def description(self, node):
        """{"class_name": ..., public attributes} of an encoder; None where there is none."""
        if node is None:
            return None
        if not is_record(node, 'object'):
            raise Refused('holds an encoder of an unknown form')
        meta = node.args[0]
        public = {key: value for key, value in meta['state'].items() if not key.startswith('_')}
        return {**self.plain(public), 'class_name': meta['class_name'][:MAX_NAME]}

    def collect(self, node, prefix, depth, tensors):
        """Adds the tensors of a module and its sub-modules, in the order of state_dict()."""
        check_depth(depth)
        state = node.state if is_record(node, 'modules') else node.args[0]['state'] if is_record(node, 'object') else None
        own, buffers, modules = (entries(state, key) for key in ('_parameters', '_buffers', '_modules'))
        transient = state.get('_non_persistent_buffers_set')
        transient = {name for name in transient if isinstance(name, str)} if isinstance(transient, list) else ()
        kept = {name: value for name, value in buffers.items() if name not in transient}
        for name, value in {**own, **kept}.items():
            if value is not None:
                tensors[self.join(prefix, name)] = self.tensor(value)
        for name, module in modules.items():
            if module is not None:
                self.collect(module, self.join(prefix, name) + '.', depth + 1, tensors)

    def join(self, prefix, name):
        # Counted at every visit: modules that refer to one another could expand to far more names than the file has bytes.
        self.limits.step()
        self.limits.read_text(len(prefix) + len(name))
        return prefix + name

    def tensor(self, value):
        """A contiguous tensor with its own memory, copied from its storage in the file."""
        if is_record(value, 'parameter') and value.args:
            value = value.args[0]
        if not is_record(value, 'tensor') or len(value.args) < 4 or not is_record(value.args[0], 'storage'):
            raise Refused('holds something other than tensors among the weights')
        storage, offset, size, stride = value.args[:4]
        check_shape(offset, size, stride)
        values, count = self.storage(storage), math.prod(size)
        if offset + count > len(values):
            raise Refused(f'holds a tensor of {count} values over a storage of {len(values)}')
        self.left -= count * values.itemsize
        if self.left < 0:
            raise Refused('holds tensors that are larger than the file')
        return torch.from_numpy(values[offset:offset + count].reshape(size).copy())

    def storage(self, call):
        """The values of a storage, 1-D, as a view of the file."""
        if id(call) not in self.storages:
            if len(call.args) != 1 or not isinstance(call.args[0], memoryview):
                raise Refused('is damaged (a storage without bytes)')
            self.storages[id(call)] = self.read_storage(call.args[0])
        return self.storages[id(call)]

    def read_storage(self, stream):
        """The values in PyTorch's stream of a storage: five pickles (magic, version, system, storage, keys), then count and values."""
        position, parts = 0, []
        for _ in range(5):
            machine = Machine(stream, position, STORAGES, self.limits, persistent=True)
            parts.append(machine.run())
            position = machine.position
        magic, version, system, storage, _ = parts
        if magic != STORAGE_MAGIC or version != STORAGE_VERSION:
            raise Refused('holds a storage of an unknown form')
        if not isinstance(system, dict) or system.get('little_endian') is not True:
            raise Refused('was written on a big-endian machine')
        fields = storage.args if is_record(storage, 'persistent') and isinstance(storage.args, tuple) else ()
        if len(fields) != 6 or not isinstance(fields[1], Global):
            raise Refused('holds a storage of an unknown form')
        kind, count = np.dtype(fields[1].word), machine.number(8)
        values = stream[machine.position:]
        if type(fields[4]) is not int or fields[4] != count or len(values) != count * kind.itemsize:
            raise Refused('is cut off, or claims more bytes than it has')
        return np.frombuffer(values, kind)

    def plain(self, value, depth=0):
        """Arguments and attributes in JSON types: tuples and NumPy arrays become lists, NumPy numbers become floats."""
        check_depth(depth)
        self.limits.step()
        if isinstance(value, str):
            self.limits.read_text(len(value))
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, list | tuple):
            return [self.plain(item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {self.join('', key): self.plain(item, depth + 1) for key, item in value.items()}
        array = numpy_pickle.as_array(value)
        if array is None:
            return scalar(value)
        self.limits.step(array.size)
        return array.tolist()


def check_depth(depth):
    if depth > MAX_DEPTH:
        raise Refused(f'is nested more than {MAX_DEPTH} levels deep')


def entries(state, key):
    """The dict of that name in a module's state."""
    found = state.get(key) if isinstance(state, dict) else None
    if not isinstance(found, dict):
        raise Refused(f'holds a module without {key}')
    return found


def check_shape(offset, size, stride):
    """Refuses anything but whole numbers, and strides other than those of a contiguous tensor."""
    whole = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DIMS
    if not whole or not all(type(n) is int and 0 <= n < MAX_SIDE for n in (offset, *size, *stride)) or 0 in size:
        raise Refused('is damaged (a tensor without a shape)')
    step = 1
    for n, found in zip(reversed(size), reversed(stride)):
        if n != 1 and found != step:
            raise Refused('holds a tensor that is not contiguous')
        step *= n


def scalar(value):
    """The float in a NumPy scalar; only float64 is accepted."""
    dtype, raw = value.args if is_record(value, 'scalar') and len(value.args) == 2 else (None, None)
    if not is_record(dtype, 'dtype') or dtype.args[:1] != ('f8',) or not isinstance(raw, memoryview) or len(raw) != 8:
        raise Refused('holds an argument or attribute that is not a plain value')
    return struct.unpack('<d', raw)[0]
