# SPDX-License-Identifier: Apache-2.0
"""Reads torch.save files of tensors and plain values without executing anything in them.

PyTorch's own reader is not used: its weights_only allows dozens of types, some of which are allocated at whatever size the file claims,
its older formats do the same, and parts of it are C++ that trusts the file. Here a tensor is a view of bytes in the file, whose CRC-32
has been verified."""

import math
import mmap
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from torch_utils.pickle_machine import Global, Limits, Machine, Record, Refused, dict_or_record, is_record

MAX_STEPS = 2_000_000    # opcodes, which take seconds; a state of 1,000 tensors in 6 parts takes 250,000
MAX_DEPTH = 64           # of dicts and lists within each other
MAX_DIMS = 16            # of a tensor
MAX_DIRECTORY = 2 ** 26  # bytes of a zip file's directory, which zipfile reads whole: a million records
LOCAL_HEADER = 30        # bytes of a zip member's own header, without name and extra field

# The start of the format before PyTorch 1.6: a pickle of this number, then pickles of a version, the machine, the value and the keys of
# its storages, then the storages.
LEGACY_NUMBER, LEGACY_VERSION = 0x1950a86a20f9469cfc6c, 1001
LEGACY = b'\x80\x02\x8a\n' + LEGACY_NUMBER.to_bytes(10, 'little') + b'.'

WORDS = {('collections', 'OrderedDict'): 'dict', ('torch._utils', '_rebuild_tensor_v2'): 'tensor',
         ('torch._utils', '_rebuild_parameter'): 'parameter', ('argparse', 'Namespace'): 'namespace'}  # a namespace is never returned
STORAGES = {'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
            'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ShortStorage': torch.int16,
            'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool}


def read(path: str | os.PathLike, what: str = 'a file of tensors', hint: str = '', option: str = '', mapped: bool = False,
         checksums: bool = True, select: Callable[[Any], Any] | None = None) -> Any:
    """The content of a torch.save file, tensors on the CPU: dicts (keys are text or whole numbers), lists, tuples and plain values.

    what, hint, option: for errors: what the file should be, what to do, and the option that names it, such as "--weights=". mapped: the
    tensors are mapped from the file, read only when they are used, and valid only while the file is unchanged; otherwise they have
    memory of their own. Tensors that shared memory share it again. checksums: whether to verify the CRC-32 of the tensors; that of the
    values is always verified, except in files of PyTorch before 1.6, which have none. select(value): which part of the value to read, by
    the keys of its dicts; other values in it mean nothing yet, and what is not selected may hold more than tensors and plain values if
    it is an argparse.Namespace. Raises UserError, in one line, for other kinds of files, for truncated or damaged files, and for tensors
    larger than the file."""
    try:
        with open(path, 'rb') as f:
            legacy = f.read(len(LEGACY)) == LEGACY
            return (LegacyReader if legacy else Reader)(f, mapped, checksums).tree(select)
    except FileNotFoundError:
        raise UserError(f'{option}{path}: no such file') from None
    except Refused as err:
        raise UserError(f'{option}{path}: cannot be read as {what} (it {err}){hint}') from None
    except OSError as err:
        raise UserError(f'{option}{path}: cannot be read as {what} ({err.strerror or err}){hint}') from None


class Reader:
    """Reads one file. The total size of what it allocates never exceeds that of the file."""

    FIELDS = 5  # of a storage in the pickle

    def __init__(self, file: BinaryIO, mapped: Any, checksums: bool) -> None:
        self.mapped, self.checksums, self.limits = mapped, checksums, Limits(MAX_STEPS)
        self.left = os.fstat(file.fileno()).st_size  # bytes of tensors that may still be read
        self.storages = {}  # name of the record -> 1-D tensor
        if not self.left:
            raise Refused('is empty')
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable, because PyTorch warns about read-only memory
        self.data = memoryview(self.map)
        self.members, self.prefix = self._directory(file)

    def _directory(self, file):
        """({name: ZipInfo}, prefix of the record names)."""
        self._check_directory()
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
        except (*DAMAGE, OverflowError):
            raise Refused('is not a complete zip file, as torch.save writes') from None
        members = {info.filename: info for info in infos}
        found = [name for name in members if name.endswith('/data.pkl') and name.count('/') == 1]
        if len(found) != 1 or len(members) != len(infos):
            raise Refused('is a zip file, but not one that torch.save wrote')
        return members, found[0].removesuffix('data.pkl')

    def _check_directory(self):
        """Checks the end of the file, which torch.save writes without a comment."""
        end, wide = bytes(self.data[-22:]), bytes(self.data[-98:-42])  # the latter in files of 4 GiB and more
        size = int.from_bytes(end[12:16], 'little')
        if size == 2 ** 32 - 1 and wide[:4] == b'PK\x06\x06':
            size = int.from_bytes(wide[40:48], 'little')
        if end[:4] != b'PK\x05\x06' or size > MAX_DIRECTORY:
            raise Refused('is not a complete zip file, as torch.save writes')

    def record(self, name: str, checksum: bool = True) -> memoryview:
        """The bytes of a record, as a view of the file."""
        info = self.members.get(self.prefix + name)
        if info is None:
            raise Refused(f'lacks the record {ascii(name[:50])}')
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused('is compressed or encrypted, which torch.save does not do')
        start = info.header_offset
        header = self.data[start:start + LOCAL_HEADER]
        if len(header) < LOCAL_HEADER or header[:4] != b'PK\x03\x04':
            raise Refused('is damaged (a record without a header)')
        start += LOCAL_HEADER + int.from_bytes(header[26:28], 'little') + int.from_bytes(header[28:30], 'little')
        found = self.data[start:start + info.file_size]
        if len(found) != info.file_size:
            raise Refused('is cut off, or claims more bytes than it has')
        if checksum and zlib.crc32(found) != info.CRC:
            raise Refused(f'is damaged: its record {ascii(name[:50])} has a wrong checksum')
        return found

    def tree(self, select: Callable[[Any], Any] | None = None) -> Any:
        """What the file holds, or the selected part of it."""
        root = self.root()
        done = MAX_STEPS - self.limits.steps
        self.limits.steps = min(self.limits.steps, 2 * done + 1000)  # shared parts that are visited again and again would take for ever
        return self.plain(select(root) if select else root)

    def root(self) -> Any:
        """The value of the file's pickle, of Records and plain values."""
        if self.prefix + 'byteorder' in self.members and self.record('byteorder') != b'little':
            raise Refused('was written on a big-endian machine')
        return self.run(self.machine(self.record('data.pkl')))

    def machine(self, data: memoryview) -> Machine:
        words = WORDS | {('torch', name): name for name in STORAGES}
        return Machine(data, 0, words, self.limits, dict_or_record, persistent=True, keys=(str, int))

    def run(self, machine: Machine) -> Any:
        try:
            return machine.run()
        except Refused as err:
            raise Refused(f'holds more than tensors and plain values, or is damaged: it {err}') from None

    def plain(self, value: Any, depth: int = 0) -> Any:
        """A copy of a value as a tree; shared parts are copied, and counted in the limits, each time they are visited."""
        self.limits.step()
        if depth > MAX_DEPTH:
            raise Refused(f'is nested more than {MAX_DEPTH} levels deep')
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, dict):
            return {key: self.plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.plain(item, depth + 1) for item in value)
        if is_record(value, 'parameter') and value.args:
            value = value.args[0]
        if is_record(value, 'tensor'):
            return self.tensor(value.args)
        raise Refused('holds more than tensors and plain values')

    def tensor(self, args: tuple) -> torch.Tensor:
        """A tensor that views a storage of the file; args: (storage, offset, size, stride, ...)."""
        if len(args) < 4 or not is_record(args[0], 'persistent'):
            raise Refused('is damaged (a tensor without a storage)')
        offset, size, stride = args[1:4]
        whole = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= MAX_DIMS
        if not whole or not all(type(n) is int and 0 <= n < 2 ** 62 for n in (offset, *size, *stride)):
            raise Refused('is damaged (a tensor without a shape)')
        storage, count = self.storage(args[0].args), math.prod(size)
        if not count:
            return storage.new_empty(size) if math.prod(n or 1 for n in size) < 2 ** 62 else self._too_large()
        if count > len(storage) or offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(storage):
            self._too_large()
        return storage.as_strided(size, stride, offset)

    def _too_large(self):
        raise Refused('is damaged (a tensor that is larger than its storage)')

    def storage(self, fields: tuple) -> torch.Tensor:
        """The values of a storage, 1-D: ("storage", type, name of the record, device, number of values)."""
        name, dtype, count = self.described(fields)
        if name not in self.storages:
            found = self.bytes_of(name)
            self.left -= len(found)
            if self.left < 0:
                raise Refused('holds tensors that are larger than the file')
            self.storages[name] = self._values(found, dtype)
        values = self.storages[name]
        if values.dtype != dtype or len(values) != count:
            raise Refused('is damaged (a storage that is not as large as its record)')
        return values

    def described(self, fields: tuple) -> tuple[str, torch.dtype, int]:
        """(name of the record, type, number of values) of a storage."""
        if not isinstance(fields, tuple) or len(fields) != self.FIELDS or not isinstance(fields[1], Global) or type(fields[2]) is not str:
            raise Refused('is damaged (a storage of an unknown form)')
        dtype, name, count = STORAGES.get(fields[1].word), fields[2], fields[4]
        if dtype is None or type(count) is not int or not 0 <= count < 2 ** 62:
            raise Refused('is damaged (a storage of an unknown form)')
        return name, dtype, count

    def bytes_of(self, name: str) -> memoryview:
        """The bytes of a storage, as a view of the file."""
        return self.record(f'data/{name}', self.checksums)

    def _values(self, found, dtype):
        if not len(found) or len(found) % dtype.itemsize:
            return torch.empty(0, dtype=dtype)
        if dtype == torch.bool:
            found = found if max(found) <= 1 else bytearray(value != 0 for value in found)
        if self.mapped:
            return torch.frombuffer(found, dtype=dtype)
        return torch.frombuffer(found, dtype=torch.uint8).clone().view(dtype)  # the bytes need not be aligned


class LegacyReader(Reader):
    """Reads a file in the format before PyTorch 1.6, whose storages have no names, directory or checksums: they lie one after the other in
    the order of a list of keys, each behind its number of values, and their types stand in the pickle."""

    FIELDS = 6  # the last is None, except for views of storages, which PyTorch before 0.4 wrote

    def _directory(self, file):
        return {}, ''

    def root(self) -> Any:
        """As Reader.root; notes where each storage lies."""
        self.mapped = False  # numbers lie at any byte here, and PyTorch needs them aligned
        machine = self.machine(self.data)
        start = [self.run(machine) for _ in range(3)]
        if start[:2] != [LEGACY_NUMBER, LEGACY_VERSION] or not isinstance(start[2], dict) or start[2].get('little_endian') is not True:
            raise Refused('is damaged, of an unknown version, or was written on a big-endian machine')
        root, keys = self.run(machine), self.run(machine)
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise Refused('is damaged (a list of storages of an unknown form)')
        types, self.places, place = self._types(root, {}), {}, machine.position
        for key in keys:
            dtype, count = types.get(key, (None, -1))
            size = count * dtype.itemsize if dtype else 0
            if dtype is None or int.from_bytes(self.data[place:place + 8], 'little') != count or place + 8 + size > len(self.data):
                raise Refused('is cut off or damaged (a storage that is not where it should be)')
            self.places[key] = place + 8, size
            place += 8 + size
        if place != len(self.data):
            raise Refused('is damaged (bytes behind its last storage)')
        return root

    def _types(self, value, found, depth=0):
        """Adds {key: (type, number of values)} of all storages in a value."""
        self.limits.step()
        if depth > 2 * MAX_DEPTH:
            raise Refused(f'is nested more than {MAX_DEPTH} levels deep')
        if is_record(value, 'persistent'):
            key, *described = self.described(value.args)
            if value.args[5] is not None or found.setdefault(key, tuple(described)) != tuple(described):
                raise Refused('is damaged (a storage of two forms)')
        parts = [value.args, value.state] if isinstance(value, Record) else value.values() if isinstance(value, dict) else value
        for part in parts if isinstance(value, Record | dict | list | tuple) else ():
            self._types(part, found, depth + 1)
        return found

    def bytes_of(self, name: str) -> memoryview:
        """As Reader.bytes_of."""
        if name not in self.places:
            raise Refused('is damaged (a storage that is not in its list)')
        place, size = self.places[name]
        return self.data[place:place + size]
