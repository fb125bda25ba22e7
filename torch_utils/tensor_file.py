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
from typing import Any, BinaryIO

import torch

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from torch_utils.pickle_machine import Global, Limits, Machine, Refused, dict_or_record, is_record

MAX_STEPS = 2_000_000    # opcodes, which take seconds; a state of 1,000 tensors in 6 parts takes 250,000
MAX_DEPTH = 64           # of dicts and lists within each other
MAX_DIMS = 16            # of a tensor
MAX_DIRECTORY = 2 ** 26  # bytes of a zip file's directory, which zipfile reads whole: a million records
LOCAL_HEADER = 30        # bytes of a zip member's own header, without name and extra field

WORDS = {('collections', 'OrderedDict'): 'dict', ('torch._utils', '_rebuild_tensor_v2'): 'tensor',
         ('torch._utils', '_rebuild_parameter'): 'parameter'}
STORAGES = {'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
            'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32, 'ShortStorage': torch.int16,
            'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool}


def read(path: str | os.PathLike, what: str = 'a file of tensors', hint: str = '', option: str = '', mapped: bool = False,
         checksums: bool = True) -> Any:
    """The content of a torch.save file, tensors on the CPU: dicts (keys are text or whole numbers), lists, tuples and plain values.

    what, hint, option: for errors: what the file should be, what to do, and the option that names it, such as "--weights=". mapped: the
    tensors are mapped from the file, read only when they are used, and valid only while the file is unchanged; otherwise they have
    memory of their own. Tensors that shared memory share it again. checksums: whether to verify the CRC-32 of the tensors; that of the
    values is always verified. Raises UserError, in one line, for other kinds of files, for truncated or damaged files, and for tensors
    larger than the file."""
    try:
        with open(path, 'rb') as f:
            return Reader(f, mapped, checksums).tree()
    except FileNotFoundError:
        raise UserError(f'{option}{path}: no such file') from None
    except Refused as err:
        raise UserError(f'{option}{path}: cannot be read as {what} (it {err}){hint}') from None
    except OSError as err:
        raise UserError(f'{option}{path}: cannot be read as {what} ({err.strerror or err}){hint}') from None


class Reader:
    """Reads one file. The total size of what it allocates never exceeds that of the file."""

    def __init__(self, file: BinaryIO, mapped: Any, checksums: Any):
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

    def tree(self) -> Any:
        """What the file holds."""
        if self.prefix + 'byteorder' in self.members and self.record('byteorder') != b'little':
            raise Refused('was written on a big-endian machine')
        words = WORDS | {('torch', name): name for name in STORAGES}
        data = self.record('data.pkl')
        try:
            root = Machine(data, 0, words, self.limits, dict_or_record, persistent=True, keys=(str, int)).run()
        except Refused as err:
            raise Refused(f'holds more than tensors and plain values, or is damaged: it {err}') from None
        done = MAX_STEPS - self.limits.steps
        self.limits.steps = min(self.limits.steps, 2 * done + 1000)  # shared parts that are visited again and again would take for ever
        return self.plain(root)

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
        if not isinstance(fields, tuple) or len(fields) != 5 or not isinstance(fields[1], Global) or type(fields[2]) is not str:
            raise Refused('is damaged (a storage of an unknown form)')
        dtype, name, count = STORAGES.get(fields[1].word), fields[2], fields[4]
        if dtype is None or type(count) is not int:
            raise Refused('is damaged (a storage of an unknown form)')
        if name not in self.storages:
            found = self.record(f'data/{name}', self.checksums)
            self.left -= len(found)
            if self.left < 0:
                raise Refused('holds tensors that are larger than the file')
            self.storages[name] = self._values(found, dtype)
        values = self.storages[name]
        if values.dtype != dtype or len(values) != count:
            raise Refused('is damaged (a storage that is not as large as its record)')
        return values

    def _values(self, found, dtype):
        if not len(found) or len(found) % dtype.itemsize:
            return torch.empty(0, dtype=dtype)
        if dtype == torch.bool:
            found = found if max(found) <= 1 else bytearray(value != 0 for value in found)
        if self.mapped:
            return torch.frombuffer(found, dtype=dtype)
        return torch.frombuffer(found, dtype=torch.uint8).clone().view(dtype)  # the bytes need not be aligned
