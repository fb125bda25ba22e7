# SPDX-License-Identifier: Apache-2.0
"""A pickle as data: a machine for the few opcodes of published networks and statistics, which imports and calls nothing.

Python's own unpickler is not used. A global becomes a word from a list, a call becomes a Record of what would have been called, and
the lengths and counts that a file claims are checked against its size before memory is allocated."""

import pickle  # for the names of its opcodes
import pickletools
import struct
from collections.abc import Callable
from typing import Any

MAX_STEPS = 1_000_000  # opcodes and visits; a network of 300 million parameters takes about 100,000
MAX_TEXT = 16 << 20    # bytes of text in all, most of it the source code that such files contain
MAX_NAME = 1000        # characters of a global's or a tensor's name, or of a word among the arguments


class Refused(Exception):
    """A file was refused; the message says what is wrong with it."""


class Limits:
    """The remaining budget for reading one file. steps: opcodes and visits; text: bytes."""

    def __init__(self, steps: int = MAX_STEPS, text: int = MAX_TEXT):
        self.most = self.steps = steps
        self.most_text = self.text = text

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise Refused(f'takes more than {self.most} steps to read')

    def read_text(self, size: int) -> None:
        self.text -= size
        if self.text < 0:
            raise Refused(f'holds more than {self.most_text >> 20} MiB of text')


class Global:
    """A reference to a global of some module; word: its name in the list of those that are allowed."""

    __slots__ = ('word',)

    def __init__(self, word: str):
        self.word = word


class Record:
    """A call that was not made: the word of its global, its arguments, and the state that would have been set on the result."""

    __slots__ = ('args', 'state', 'word')

    def __init__(self, word: str, args: tuple):
        self.word, self.args, self.state = word, args, None


def dict_or_record(word: str, args: tuple) -> Any:
    """The value that represents a call: an empty dict, or a Record."""
    if word == 'dict':
        if args:
            raise Refused('is damaged (unexpected arguments)')
        return {}
    return Record(word, args)


def is_record(value: Any, word: str) -> bool:
    """Whether a value represents a call of this word."""
    return isinstance(value, Record) and value.word == word


class Machine:
    """The stack machine of one pickle, data[position:]; run() returns its value as Records and plain values.

    data: a memoryview; bytes are returned as views of it. words: {(module, name): word} of the globals that are allowed.
    record(word, args): the value that represents a call. persistent: whether persistent ids are allowed, as for PyTorch's storages.
    keys: allowed types of dict keys (text, whole numbers), so that nothing else is hashed or compared. Every value is counted in
    `limits`. Sets become lists."""

    def __init__(self, data: memoryview, position: int, words: dict[tuple[str, str], str], limits: Limits, record: Callable = Record,
                 persistent: bool = False, keys: tuple[type, ...] = (str,)):
        self.data, self.position, self.words, self.limits = data, position, words, limits
        self.record, self.is_persistent, self.keys = record, persistent, keys
        self.stack, self.marks, self.memo = [], [], {}

    def run(self) -> Any:
        """The value of the pickle; `position` is then behind its end. Raises Refused."""
        while True:
            self.limits.step()
            code = bytes(self.take(1))
            if code == pickle.STOP:
                return self.pop()
            if code not in OPCODES:
                known = pickletools.code2op.get(code.decode('latin-1'))
                raise Refused(f'uses the opcode {known.name}, which such files never contain' if known else 'is damaged (unknown opcode)')
            OPCODES[code](self)

    # Bytes of the file

    def take(self, size):
        """The next bytes, as a view: no memory is allocated, however large the claimed length."""
        part = self.data[self.position:self.position + size]
        if len(part) != size:
            raise Refused('is cut off, or claims more bytes than it has')
        self.position += size
        return part

    def number(self, size):
        return int.from_bytes(self.take(size), 'little')

    def text(self, size):
        self.limits.read_text(size)
        try:
            return str(self.take(size), 'utf-8', 'surrogatepass')
        except UnicodeDecodeError:
            raise Refused('is damaged (text that is not UTF-8)') from None

    def line(self):
        """Text up to the end of the line, as protocols below 4 write names."""
        size = bytes(self.data[self.position:self.position + MAX_NAME]).find(b'\n')
        if size < 0:
            raise Refused('is damaged (a name without an end)')
        return self.text(size + 1)[:-1]

    # The stack

    def push(self, value):
        self.stack.append(value)

    def pop(self):
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused('is damaged (a value is missing)')
        return self.stack.pop()

    def pop_kind(self, kind):
        value = self.pop()
        if not isinstance(value, kind):
            raise Refused('is damaged (a value of the wrong type)')
        return value

    def top(self, kind):
        """The last value, which must be of this type; it stays on the stack."""
        self.push(self.pop_kind(kind))
        return self.stack[-1]

    def pop_mark(self):
        """The values since the last mark."""
        if not self.marks:
            raise Refused('is damaged (a mark is missing)')
        first = self.marks.pop()
        values = self.stack[first:]
        del self.stack[first:]
        return values

    # Opcodes of more than one line

    def protocol(self):
        if self.number(1) > 5:
            raise Refused('is a pickle of a newer protocol than 5')

    def frame(self):
        if self.number(8) > len(self.data) - self.position:
            raise Refused('is cut off, or claims more bytes than it has')

    def get(self, key):
        if key not in self.memo:
            raise Refused('is damaged (a value is missing)')
        self.push(self.memo[key])

    def put(self, key):
        self.memo[key] = self.top(object)

    def tuple(self, size):
        values = [self.pop() for _ in range(size)]
        self.push(tuple(reversed(values)))

    def extend(self, values):
        self.top(list).extend(values)

    def set_items(self, flat):
        if len(flat) % 2 or not all(type(key) in self.keys for key in flat[::2]):
            raise Refused('is damaged (a dict with keys of the wrong type)')
        self.top(dict).update(zip(flat[::2], flat[1::2]))

    def global_on_stack(self):
        name, module = self.pop_kind(str), self.pop_kind(str)
        self.name_global(module, name)

    def name_global(self, module, name):
        if (module, name) not in self.words:
            raise Refused(f'asks for {ascii(f"{module}.{name}"[:200])[1:-1]}, which is not allowed')
        self.push(Global(self.words[module, name]))

    def reduce(self):
        args, what = self.pop_kind(tuple), self.pop_kind(Global)
        self.push(self.record(what.word, args))

    def build(self):
        state = self.pop()
        if not isinstance(self.top(Record | dict), dict):  # attributes of a dict, which state dicts have, are ignored
            self.stack[-1].state = state

    def persistent(self):
        if not self.is_persistent:
            raise Refused('uses the opcode BINPERSID, which such files never contain')
        self.push(Record('persistent', self.pop()))


# The variants of an opcode differ in the number of bytes of a length or key.
OPCODES = {
    pickle.PROTO: Machine.protocol,
    pickle.FRAME: Machine.frame,
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.BINPUT: lambda m: m.put(m.number(1)),
    pickle.LONG_BINPUT: lambda m: m.put(m.number(4)),
    pickle.BINGET: lambda m: m.get(m.number(1)),
    pickle.LONG_BINGET: lambda m: m.get(m.number(4)),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(struct.unpack('<i', m.take(4))[0]),
    pickle.BININT1: lambda m: m.push(m.number(1)),
    pickle.BININT2: lambda m: m.push(m.number(2)),
    pickle.LONG1: lambda m: m.push(int.from_bytes(m.take(m.number(1)), 'little', signed=True)),
    pickle.BINFLOAT: lambda m: m.push(struct.unpack('>d', m.take(8))[0]),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.text(m.number(1))),
    pickle.BINUNICODE: lambda m: m.push(m.text(m.number(4))),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(1))),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
    pickle.BINBYTES8: lambda m: m.push(m.take(m.number(8))),
    pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number(8))),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_SET: lambda m: m.push([]),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.TUPLE1: lambda m: m.tuple(1),
    pickle.TUPLE2: lambda m: m.tuple(2),
    pickle.TUPLE3: lambda m: m.tuple(3),
    pickle.APPEND: lambda m: m.extend([m.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
    pickle.ADDITEMS: lambda m: m.extend(m.pop_mark()),
    pickle.SETITEM: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.GLOBAL: lambda m: m.name_global(m.line(), m.line()),
    pickle.STACK_GLOBAL: Machine.global_on_stack,
    pickle.REDUCE: Machine.reduce,
    pickle.NEWOBJ: Machine.reduce,
    pickle.BUILD: Machine.build,
    pickle.BINPERSID: Machine.persistent,
}
