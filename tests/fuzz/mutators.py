# SPDX-License-Identifier: Apache-2.0
"""Seeded damage to zip files, pickles, trees of values, safetensors and .npz files; that to bytes and JSON is in tests/support/hostile.py.

Every function takes a NumPy generator and returns something new; the same state of the generator gives the same damage."""

import io
import json
import pickle
import pickletools
import struct
import zipfile

import numpy as np
import torch

from tests.support import edm_pickle
from tests.support.hostile import mutate, mutate_json, pick

EXTREMES = [0, 1, 2, 255, 2 ** 15, 2 ** 16 - 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 40, 2 ** 62, 2 ** 63 - 1, 2 ** 64 - 1]

# ---- zip files


def members(data):
    """[(name, bytes)] of a zip file."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def pack(parts, alignment=64, compressed=()):
    """A zip file of [(name, bytes)], whose stored members begin at multiples of `alignment`, as PyTorch has them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, content in parts:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            gap = -(file.tell() + 30 + len(name.encode()) + 4) % alignment
            info.extra = struct.pack('<HH', 0x4246, gap) + bytes(gap)
            archive.writestr(info, content)
    return file.getvalue()


HEADERS = {b'PK\x03\x04': 30, b'PK\x01\x02': 46, b'PK\x05\x06': 22, b'PK\x06\x06': 56, b'PK\x06\x07': 20, b'PK\x07\x08': 16}


def damage_zip_headers(data, draws):
    """Fields of local headers, of the directory and of its end, overwritten by other numbers."""
    data = bytearray(data)
    kinds = [pick(list(HEADERS), draws) for _ in range(int(draws.integers(1, 3)))]
    for kind in kinds:
        places = _find(data, kind)
        if not places:
            continue
        place, width = pick(places, draws), pick([1, 2, 2, 4, 4], draws)
        place += int(draws.integers(4, HEADERS[kind]))
        value = pick(EXTREMES, draws) if draws.random() < 0.7 else int(draws.integers(256 ** width))
        data[place:place + width] = (value % 256 ** width).to_bytes(width, 'little')
    return bytes(data)


def _find(data, kind):
    places, place = [], data.find(kind)
    while place >= 0:
        places.append(place)
        place = data.find(kind, place + 1)
    return places


def damage_zip_members(parts, draws):
    """Members missing, twice, renamed, exchanged, cut, lengthened or damaged inside, in a zip file whose directory and CRCs are right."""
    parts = list(parts)
    for _ in range(int(draws.integers(1, 3))):
        i, j, kind = int(draws.integers(len(parts))), int(draws.integers(len(parts))), int(draws.integers(8))
        name, content = parts[i]
        if kind == 0 and len(parts) > 1:
            del parts[i]
        elif kind == 1:
            parts.append((name, parts[j][1]))
        elif kind == 2:
            names = ['../x', 'archive/data.pkl', name + '\x00', name.upper(), 'a' * 5000, '/etc/x', parts[j][0], '']
            parts[i] = pick(names, draws), content
        elif kind == 3:
            parts[i], parts[j] = (name, parts[j][1]), (parts[j][0], content)
        elif kind == 4:
            parts[i] = name, content[:int(draws.integers(len(content) + 1))]
        elif kind == 5:
            parts[i] = name, content + draws.bytes(int(draws.integers(1, 100)))
        elif kind == 6:
            parts[i] = name, mutate(content, draws)
        else:
            parts[i] = name, b''
    return parts


def bomb_members(parts, draws):
    """One member is up to 32 MiB of zeros, deflated to little; returns the parts and the set of names to deflate."""
    i = int(draws.integers(len(parts)))
    parts = [*parts[:i], (parts[i][0], bytes(pick([2 ** 16, 2 ** 22, 2 ** 25], draws))), *parts[i + 1:]]
    return parts, {parts[i][0]}


# ---- pickles

GLOBALS = [('os', 'system'), ('builtins', 'eval'), ('torch', 'load'), ('collections', 'OrderedDict'), ('torch', 'FloatStorage'),
           ('torch._utils', '_rebuild_tensor_v2'), ('torch._utils', '_rebuild_sparse_tensor'), ('torch._utils', '_rebuild_qtensor'),
           ('torch._utils', '_rebuild_meta_tensor_no_storage'), ('torch', 'DoubleStorage'), ('torch', 'BFloat16Storage'),
           ('torch.storage', 'UntypedStorage'), ('torch', 'Size'), ('torch', 'float32'), ('torch._utils', '_rebuild_parameter'),
           ('builtins', 'bytearray'), ('_codecs', 'encode'), ('collections', 'Counter'), ('torch', 'device'), ('torch', 'Tensor'),
           ('torch._tensor', '_rebuild_from_type_v2'), ('torch.storage', '_load_from_bytes'), ('torch', 'HalfStorage'),
           ('dnnlib.util', 'EasyDict'), ('torch_utils.persistence', '_reconstruct_persistent_obj'), ('numpy', 'ndarray'),
           ('numpy', 'dtype'), ('numpy.core.multiarray', '_reconstruct'), ('numpy._core.multiarray', 'scalar'),
           ('numpy._core.numeric', '_frombuffer')]
NAMES = [name.encode() for pair in GLOBALS for name in pair]


def tokens(data):
    """[bytes] of the opcodes of a pickle, each with its argument."""
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    return [data[first:last] for first, last in zip(places, places[1:])]


def damage_pickle(parts, draws, evil=()):
    """The tokens of a pickle as bytes, with opcodes taken out, doubled, exchanged, put in; numbers, texts and globals replaced.

    evil: whole pickles to put in."""
    parts = list(parts)
    for _ in range(int(draws.integers(1, 4))):
        i, j, kind = int(draws.integers(len(parts))), int(draws.integers(len(parts))), int(draws.integers(8))
        if kind == 0 and len(parts) > 1:
            del parts[i]
        elif kind == 1:
            parts.insert(i, parts[j])
        elif kind == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif kind in (3, 4):
            _replace_number(parts, draws)
        elif kind == 5:
            _replace_text(parts, draws)
        elif kind == 6:
            _replace_global(parts, draws)
        else:
            other = pick([pickle.EMPTY_LIST, pickle.MARK, pickle.DUP, pickle.POP, pickle.NONE, pickle.TUPLE1, pickle.REDUCE,
                                   pickle.BUILD, pickle.BINPERSID, pickle.APPEND, pickle.SETITEM, pickle.STOP,
                          pickle.NEWTRUE, *evil], draws)
            parts.insert(i, other)
    return b''.join(parts)


def _replace_number(parts, draws):
    widths = {pickle.BININT1: 1, pickle.BININT2: 2, pickle.BININT: 4, pickle.BINGET: 1, pickle.LONG_BINGET: 4}
    places = [i for i, part in enumerate(parts) if part[:1] in widths]
    if not places:
        return
    i = pick(places, draws)
    value = pick(EXTREMES, draws)
    if parts[i][:1] in (pickle.BINGET, pickle.LONG_BINGET):
        parts[i] = pickle.LONG_BINGET + int(draws.integers(10 ** int(draws.integers(1, 6)))).to_bytes(4, 'little')
    elif draws.random() < 0.3:
        parts[i] = pick([pickle.NONE, pickle.BINFLOAT + struct.pack('>d', 0.5), pickle.EMPTY_TUPLE, pickle.EMPTY_LIST,
                                  pickle.BINFLOAT + struct.pack('>d', float('nan')), pickle.BININT + struct.pack('<i', -1)], draws)
    else:
        parts[i] = pickle.LONG1 + bytes([9]) + value.to_bytes(9, 'little')


def _replace_text(parts, draws):
    places = [i for i, part in enumerate(parts) if part[:1] in (pickle.BINUNICODE, pickle.SHORT_BINUNICODE)]
    if places:
        strange = [b'', b'0', b'x' * 100_000, b'\x1b[31m', 'é\u2028'.encode(), b'\xff', b'../../x', pick(NAMES, draws)]
        i, text = pick(places, draws), pick(strange, draws)
        parts[i] = parts[pick(places, draws)] if draws.random() < 0.5 else edm_pickle.text(text)


def _replace_global(parts, draws):
    places = [i for i, part in enumerate(parts) if part[:1] == pickle.GLOBAL]
    if places:
        parts[pick(places, draws)] = pickle.GLOBAL + '{}\n{}\n'.format(*pick(GLOBALS, draws)).encode()


# ---- trees of values

DEEP = 3000  # levels of nesting, beyond what Python's stack takes


def strange(old, draws=None):
    """A value of another kind or size than the old one."""
    number = old if isinstance(old, (int, float)) and not isinstance(old, bool) else 1
    return pick([
        None, True, False, 0, -1, 1, 2, 7, 0.5, -0.5, 10 ** 6, 10 ** 9, 10 ** 12, 2 ** 63, 10 ** 30, -10 ** 12, 10 ** 400, 1e308, 1e-320,
        float('nan'), float('inf'), -float('inf'), number + 1, -number, number * 2, float(number) if abs(number) < 2 ** 60 else 0.0,
        '', 'x', '0', '1', 'nan', 'cosine:steps=1000000000', 'x' * 200_000, '\x1b[31mred\n\u2028', '\ud800', 'True', [], {}, [1], [None],
        [1] * 1000, [[1, 2], [3]], {'a': 1}, {'': None}, [0] * 3, [-1, 1], [10 ** 9, 1], [old], {'x': old}, str(old)[:1000]], draws)


def nested(depth, draws):
    """Lists in lists, or dicts in dicts."""
    value, is_list = 1, draws.random() < 0.5
    for _ in range(depth):
        value = [value] if is_list else {'a': value}
    return value


def strange_tensor(old, draws):
    """A tensor of another shape, type, layout or content than the old one."""
    kind = int(draws.integers(12))
    flat = old.flatten()
    choices = [
        lambda: old.double(), lambda: old.half(), lambda: old.to(torch.int64), lambda: old[None], lambda: flat, lambda: flat[:1],
        lambda: torch.zeros(0), lambda: torch.full_like(old, float('nan')) if old.is_floating_point() else old + 1,
        lambda: torch.zeros([1]).expand(1000, 1000), lambda: old.bool(), lambda: old.t() if old.ndim == 2 else old.reshape(-1, 1),
        lambda: torch.zeros([]),
    ]
    return choices[kind]().clone() if kind != 8 else choices[8]()


def paths(value, prefix=()):
    """The paths (keys and indices) of everything inside a tree of dicts, lists and tuples."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield (*prefix, key)
        yield from paths(item, (*prefix, key))


def damage_tree(tree, draws, count=None, deep=True, below=()):
    """Values replaced by strange ones, keys missing, renamed and added, parts exchanged, in a copy; tuples become lists.

    deep: whether nesting beyond Python's stack is among the damage. below: a path; only what lies in it is damaged."""
    tree = _lists(tree)
    rounds = count or int(draws.integers(1, 3))
    for number in range(rounds):
        places = [path for path in paths(tree) if path[:len(below)] == below]
        if not places:
            return tree
        path = places[int(draws.integers(len(places)))]
        if draws.random() < 0.5:  # what lies high up is rare among the leaves, and matters most
            path = path[:int(draws.integers(min(len(below) + 1, len(path)), len(path) + 1))]
        holder = tree
        for key in path[:-1]:
            holder = holder[key]
        _damage_item(holder, path[-1], draws, deep and number == rounds - 1)
    return tree


def _damage_item(holder, key, draws, deep):
    old, kind = holder[key], int(draws.integers(10))
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[pick(['extra', '', 'x' * 100_000, '\x1b[31m\n', f'{key}'[:50] + '_', '__class__'], draws)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        holder[pick(['extra', 0, 10 ** 20, 'nimg', '\x00'], draws)] = strange(1, draws)
    elif kind == 3:
        other = holder[pick(list(holder) if isinstance(holder, dict) else range(len(holder)), draws)]
        holder[key] = _lists(other)
    elif kind == 4 and deep and draws.random() < 0.3:
        holder[key] = nested(pick([70, 900, DEEP], draws), draws)
    elif isinstance(old, torch.Tensor):
        holder[key] = strange_tensor(old, draws) if draws.random() < 0.7 else strange(None, draws)
    else:
        holder[key] = strange(old, draws) if not isinstance(old, (dict, list)) else strange(None, draws)


def _lists(value):
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- safetensors


def damage_safetensors(data, draws):
    """A safetensors file with lies in its header, or damaged as bytes."""
    if draws.random() < 0.3:
        return mutate(data, draws)
    size = struct.unpack('<Q', data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    kind = int(draws.integers(5))
    if kind == 0:
        return struct.pack('<Q', pick([*EXTREMES, size + 1, size - 1, len(data), 100_000_000], draws)) + data[8:]
    if kind == 1:
        text = mutate_json(header, draws)
    else:
        entry = header[pick([key for key in header if key != '__metadata__'], draws)]
        key = pick(list(entry), draws)
        entry[key] = _lie(key, entry[key], draws)
        text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + (body if draws.random() < 0.8 else mutate(body, draws))


def _lie(key, old, draws):
    if key == 'dtype':
        return pick(['F64', 'F16', 'BF16', 'I64', 'BOOL', 'U8', 'F8_E5M2', 'F4', 'C64', 'X', '', None, 3, 'U16', 'U64'], draws)
    if key == 'shape':
        return pick([[], [0], [10 ** 12], [2 ** 63], [-1], [2 ** 32, 2 ** 32], [*old, 1], old[::-1], [1] * 100, None, 'x', [1.5],
                              [2 ** 64], [2 ** 31] * 4], draws)
    first, last = old
    return pick([[last, first], [0, last], [first, 2 ** 63], [first, last + 4], [first - 4, last - 4], [-1, last], [first], None,
                          [first, last, last], [0, 0], [2 ** 64 - 1, 2 ** 64], 'x', [first / 2, last / 2]], draws)


# ---- .npz


def damage_npz(data, draws):
    """A zip of .npy files with lies in their headers, or damaged as a zip file."""
    parts, kind = members(data), draws.random()
    if kind < 0.2:
        return mutate(data, draws)
    if kind < 0.35:
        return damage_zip_headers(data, draws)
    if kind < 0.5:
        return pack(damage_zip_members(parts, draws), 1)
    if kind < 0.6:
        parts, names = bomb_members(parts, draws)
        return pack(parts, 1, names)
    i = int(draws.integers(len(parts)))
    name, content = parts[i]
    if kind < 0.7:
        parts[i] = name, npy(strange_array(draws))
        return pack(parts, 1)
    size = struct.unpack('<H', content[8:10])[0]
    header = content[10:10 + size].decode()
    old = pick([header[header.index("'descr': ") + 9:header.index(', ')], 'False', header[header.index('('):header.index(')') + 1]],
               draws)
    new = pick(["'<f8'", "'O'", "'<U1000000'", "'>f8'", "'<c16'", "'V8'", "[('a', '<f8')]", 'True', '()', '(10000000000,)', '(-1,)',
                         '(1000000, 1000000)', '(99999999999999999999,)', 'None', '(' * 500 + ')' * 500, "'<M8[ns]'",
                "'|S1000000'", '1' * 5000], draws)
    text = header.replace(old, new, 1).encode()
    parts[i] = name, content[:8] + struct.pack('<H', min(len(text), 65535)) + text + content[10 + size:]
    return pack(parts, 1, {name} if draws.random() < 0.2 else ())


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def strange_array(draws):
    """An array of a kind that statistics do not have."""
    return pick([np.array(None), np.array('x'), np.array([['a', 'b']]), np.zeros([0]), np.zeros([3, 0]), np.array(1j), np.array([1, 2]),
                          np.array({'a': 1}), np.array([None, 'x'], object), np.array(5), np.array(True), np.zeros([2, 2, 2]),
                          np.array('2020-01-01', 'M8[D]'), np.array([(1, 2.0)], 'i4,f8'), np.full([4, 4], np.nan), np.zeros(8, 'f2'),
                          np.array(b'x'), np.array('\x1b[31m\n'), np.array(10 ** 18)], draws)

