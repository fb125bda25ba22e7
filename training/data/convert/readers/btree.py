# SPDX-License-Identifier: Apache-2.0
"""Finds the values in an LMDB data file by walking its tree of pages, all of whose entries are checked.

The LMDB library follows any offset in a page without a check, so that a damaged file crashes the process that reads it; and it can open
a file only once per process. The format (0.9, of 64-bit little-endian machines) is that of the symas/mdb sources:
page = number (8 bytes), pad (2), flags (2), lower (2), upper (2) or pages (4), then the places of its nodes (2 each);
node = low and high half of a size or page number (2, 2), flags or its top (2), size of the key (2), key, data."""

import struct
from array import array

MAGIC, VERSION = 0xBEEFC0DE, 1
HEAD = 16  # bytes of a page's head
BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8  # flags of pages
FAR, SUBTREE, SEVERAL = 1, 2, 4  # flags of nodes: the value has its own pages, is a database, is a list of values
SEVERAL_VALUES, INTEGER_KEYS = 4, 8  # flags of databases
NO_PAGE = 2 ** 64 - 1
DEEPEST = 32


class Tree:
    """The entries of a database in the order of its keys: keys (bytes), offsets and sizes of the values in the file.

    file: has size and read(offset, size). name: of a database within it, else the main one. Raises ValueError."""

    def __init__(self, file, name=None):
        self._file = file
        self.keys, self.offsets, self.sizes, self.databases = [], array('q'), array('q'), {}
        record, self._page_size = _newest(file)
        self._seen = bytearray(file.size // self._page_size + 1)
        self._read(record)
        if name is not None:
            found = self.databases.get(name.encode())
            if found is None:
                raise ValueError(f'it has no database "{name}"; it has {self._names() or "none with a name"}')
            self.keys, self.offsets, self.sizes, self.databases = [], array('q'), array('q'), {}
            self._read(found)

    def _names(self):
        return ', '.join(name.decode(errors='replace') for name in self.databases)

    def _read(self, record):
        """Takes the entries of the database that a record of 48 bytes describes."""
        _, flags, depth, _, _, _, entries, root = struct.unpack('<IHHQQQQQ', record)
        if flags & SEVERAL_VALUES:
            raise ValueError('its keys have several values each (MDB_DUPSORT)')
        if depth > DEEPEST:
            raise ValueError(f'its tree is {depth} pages deep')
        self.integer_keys = bool(flags & INTEGER_KEYS)
        stack = [] if root == NO_PAGE else [(root, 1)]
        while stack:
            number, level = stack.pop()
            page = self._page(number)
            kind = struct.unpack_from('<H', page, 10)[0] & (BRANCH | LEAF | OVERFLOW | META)
            if kind == LEAF and level == depth:
                for place in self._nodes(page):
                    self._take(number, page, place)
            elif kind == BRANCH and level < depth:
                below = [struct.unpack_from('<IH', page, place) for place in self._nodes(page)]
                stack += [(low | top << 32, level + 1) for low, top in reversed(below)]
            else:
                raise ValueError(f'page {number} is not a page of its tree')
        if len(self.keys) + len(self.databases) != entries:
            raise ValueError(f'{len(self.keys) + len(self.databases)} entries, but its header claims {entries}')

    def _page(self, number):
        """A page of the tree, which may occur in it only once."""
        if not number < len(self._seen) or self._seen[number]:
            raise ValueError(f'page {number} is beyond its end, or occurs in its tree twice')
        self._seen[number] = 1
        page = self._file.read(number * self._page_size, self._page_size)
        if struct.unpack_from('<Q', page)[0] != number:
            raise ValueError(f'page {number} has the number of another page')
        return page

    def _nodes(self, page):
        """The places of a page's nodes."""
        lower, = struct.unpack_from('<H', page, 12)
        if not HEAD <= lower <= len(page) or lower % 2:
            raise ValueError('a page with an invalid header')
        places = struct.unpack_from(f'<{(lower - HEAD) // 2}H', page, HEAD)
        if places and not lower <= min(places) <= max(places) <= len(page) - 8:
            raise ValueError('a page whose nodes lie outside of it')
        return places

    def _take(self, number, page, place):
        low, high, flags, length = struct.unpack_from('<HHHH', page, place)
        size, start = low | high << 16, place + 8 + length
        inside = 8 if flags & FAR else size
        if start + inside > len(page):
            raise ValueError('an entry that does not fit its page')
        key = page[place + 8:start]
        if flags & (SUBTREE | SEVERAL):
            if flags & SEVERAL or size != 48:
                raise ValueError('an entry with several values')
            self.databases[key] = page[start:start + size]
            return
        offset = number * self._page_size + start
        if flags & FAR:
            offset = struct.unpack_from('<Q', page, start)[0] * self._page_size + HEAD
            if offset + size > self._file.size:
                raise ValueError(f'cut off: a value of {size} bytes begins at {offset} of {self._file.size}')
        self.keys.append(key)
        self.offsets.append(offset)
        self.sizes.append(size)


def _newest(file):
    """(record of the main database, bytes of a page) by that of the two first pages which was written last."""
    size, found = None, []
    for number in range(2):
        meta = file.read(number * (size or 0), 152)
        flags, = struct.unpack_from('<H', meta, 10)
        magic, version = struct.unpack_from('<II', meta, HEAD)
        if not flags & META or magic != MAGIC:
            raise ValueError('not an LMDB data file of a 64-bit little-endian machine')
        if version != VERSION:
            raise ValueError(f'LMDB data of version {version}; version {VERSION} is read: copy it with the mdb_copy of LMDB 0.9')
        told, = struct.unpack_from('<I', meta, HEAD + 24)
        if told not in [2 ** k for k in range(9, 17)] or size not in (None, told):
            raise ValueError(f'pages of {told} bytes')
        size = told
        found.append((struct.unpack_from('<Q', meta, HEAD + 128)[0], meta[HEAD + 72:HEAD + 120]))
    return max(found)[1], size
