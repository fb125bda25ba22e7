# SPDX-License-Identifier: Apache-2.0
"""Attacks on whatever reads images: data sets as zips and folders, pictures and arrays as their members, sources of dataset_tool.py."""

import functools
import gzip
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib

import click
import numpy as np
import PIL.features
import PIL.Image

import dataset_tool
from dnnlib import UserError
from metrics.image_files import ImageFiles
from tests.support import hostile
from tests.support.hostile import pick
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.pairs import PairStream
from training.data.store import ImageStore
from training.diffusion.noise import NOISE

PAST_END = 2 ** 40  # bytes of a file that is as good as endless
NAMES = ['../x.png', '../../../../tmp/x.png', '/etc/x.png', 'a/../../x.png', '..\\x.png', 'C:\\x.png', '.png', '.hidden.png', 'a//b.png',
         './a.png', 'x\n\x1b[31m.png', 'x\r.png', '\u202egnp.x.png', 'x' * 60_000 + '.png', 'a/' * 2000 + 'x.png', ' .png', 'é.png',
         '0.npy', '0.tif', 'dataset.json', 'dataset.json/x.png', 'a.png/', 'con.png', '-rf.png', '*.png', '\x7f.png']


# ----------------------------------------------------------------------------------------------------
# What is read


def use(path, draws):
    """Everything that a training run does with its data, up to the first batch."""
    dataset = ImageDataset(path, use_labels=bool(draws.integers(2)), keep=pick([1.0, 0.7], draws), xflip=bool(draws.integers(2)))
    if hasattr(dataset, 'fingerprint'):
        json.dumps(dataset.fingerprint())
    corruption = Corruption(0.2, 0.5)
    sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
    store = ImageStore(dataset, corruption, sigma_n, workers=2)
    items = np.arange(len(dataset))
    dataset.labels(items), store.gather(items[:4])
    PairStream(sigma_n, NOISE['lognormal'](), batch=4, lower=dataset.sigma_min, upper=dataset.sigma_max).next()


def judge(path, draws):
    """What eval_fid.py does with images."""
    for batch in ImageFiles(path, '--gen-path').batches(4):
        assert batch.dtype.itemsize == 1


class SerialPool:
    """multiprocessing.Pool in this process, which is the one that is watched."""

    def __init__(self, processes, begin, args):
        begin(*args)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def imap(self, function, items, size):
        return map(function, items)


def convert(path, draws):
    """dataset_tool.py into a folder or zip that is read again; nothing may appear beside it."""
    here = os.path.dirname(path)
    before, dest = set(os.listdir(here)), os.path.join(here, 'out', pick(['made', 'made.zip'], draws))
    flags = [[], ['--on-bad=skip'], ['--on-bad=skip', '--resolution=8x8', '--transform=center-crop', '--channels=3'],
             ['--max-images=3', '--sample=spread', '--on-bad=skip'], ['--layout=nchw'], ['--channels=1', '--on-bad=skip'],
             ['--tile=8', '--overlap=3', '--on-bad=skip'], ['--units=channel', '--on-bad=skip'], ['--transform=pad', '--on-bad=skip'],
             ['--transform=center-crop-dhariwal', '--resolution=8x8', '--on-bad=skip'], [f'--source={path}:label=a', '--on-bad=skip']]
    multiprocessing.Pool = SerialPool
    try:
        dataset_tool.main(['convert', f'--source={path}', f'--dest={dest}', *pick(flags, draws)], standalone_mode=False)
    except click.ClickException as err:
        raise UserError(err.message) from err
    finally:
        found = [os.path.relpath(os.path.join(root, name), here) for root, *inside in os.walk(here) for name in sum(inside, [])]
        odd = [name for name in found if name.split('/')[0] not in before and not name.startswith('out/made') and name != 'out']
        assert not odd, odd
    ImageDataset(dest).decode(0)


def attack(make):
    """An attack from make(draws, folder) -> (path, function of (path, draws) that reads it)."""
    def begin(folder):
        PIL.Image.init()
        for kind, read in ((0, use), (1, use), (0, judge), (0, convert), (1, convert)):
            read(write(good(kind), hostile.scratch(folder), np.random.default_rng(0)), np.random.default_rng(1))

        def one(draws):
            shutil.rmtree(folder)
            os.makedirs(folder)
            path, read = make(draws, folder)
            return lambda: read(path, draws)
        return one
    return begin


# ----------------------------------------------------------------------------------------------------
# Good data, to begin with


def png(array, mode=None, **options):
    """A picture [H,W] or [H,W,C] in one of Pillow's modes and formats."""
    buffer = io.BytesIO()
    image = PIL.Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, options.pop('format', 'PNG'), **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pixels(seed, shape=(8, 8, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def good(kind=0):
    """({name: bytes}, what dataset.json holds): pictures with classes, or arrays with vectors and units."""
    if kind == 0:
        names = [f'{i // 2}/{i}.png' for i in range(6)]
        return ({name: png(pixels(i)) for i, name in enumerate(names)},
                {'labels': [[name, i % 3] for i, name in enumerate(names)], 'sigmas': {name: 0.1 * i for i, name in enumerate(names)},
                 'sigma_max': [[name, None if i % 2 else 5.0] for i, name in enumerate(names)],
                 'sigma_min': {name: 0.1 * i if i > 2 else None for i, name in enumerate(names)}})
    names = [f'{i}.npy' for i in range(4)]
    return ({name: npy(np.random.default_rng(i).normal(size=(3, 8, 8)).astype(np.float32)) for i, name in enumerate(names)},
            {'labels': {name: [0.5, i] for i, name in enumerate(names)}, 'units': {'offset': 0.5, 'scale': 2},
             'sigmas': [[name, 0.25] for name in names]})


def zipped(members, method=zipfile.ZIP_STORED):
    """The bytes of a zip of (name, bytes) pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', method) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is, whatever the machine thinks of it
            info.compress_type = method
            archive.writestr(info, data)
    return buffer.getvalue()


def put(data, folder, name='data.zip'):
    path = os.path.join(folder, name)
    with open(path, 'wb') as f:
        f.write(data)
    return path


def write(found, folder, draws, meta=None):
    """A data set as a zip or folder; returns its path. meta: the bytes of dataset.json."""
    members, values = found
    members = {**members, 'dataset.json': json.dumps(values).encode() if meta is None else meta}
    kind = draws.integers(3)
    if kind < 2:
        return put(zipped(members.items(), [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][kind]), folder)
    for name, data in members.items():
        os.makedirs(os.path.dirname(os.path.join(folder, 'data', name)), exist_ok=True)
        put(data, os.path.join(folder, 'data'), name)
    return os.path.join(folder, 'data')


# ----------------------------------------------------------------------------------------------------
# Data sets


def data_set(draws, folder):
    kind, found = draws.integers(10), good(int(draws.integers(2)))
    read = pick([use, use, use, use, judge, convert], draws)
    if kind <= 3:
        extra = [dict.fromkeys(found[0], 1), [[name, value] for name, value in zip(found[0], [0, 10 ** 9, 2 ** 62, 7])],
                 [[name, 10 ** 6] for name in found[0]], {name: ['x' * 1000, 'y'][i % 2] for i, name in enumerate(found[0])}]
        path = write(found, folder, draws, hostile.mutate_json(found[1], draws, extra))
    elif kind <= 8:
        members = [*found[0].items(), ('dataset.json', json.dumps(found[1]).encode())]
        if kind == 8:
            members = special_members(members, draws)
        data = zipped(members, pick([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], draws))
        if kind == 7:
            data = lying(data, draws)
        elif kind < 7:
            data = hostile.mutate(data, draws, [data])
        path = put(data, folder)
    else:
        path = special_folder(found, folder, draws)
    return path, read


def special_members(members, draws):
    """Members that no honest archive has."""
    kind, (name, data) = draws.integers(6), pick(members, draws)
    if kind == 0:
        return [*members, (name, data)]
    if kind == 1:
        return [*members, (pick(NAMES, draws), members[0][1])]
    if kind == 2:
        return [(pick(NAMES, draws), data) if own == name else (own, data) for own, data in members]
    if kind == 3:
        return [(own, b' ' * 2 ** 26 if own == name else data) for own, data in members]  # 64 MiB of nothing
    if kind == 4:
        return [*members, (pick(['x.png', 'x.npy', 'x.zip', 'x.jpg'], draws), zipped(members))]
    return [(own, pick([b'', b'{}', b'[]', b'\0', b'null', data * 3], draws) if own == name else data) for own, data in members]


# Where fields of a directory's entry are: version, flags, method, checksum, both sizes, lengths of three texts, disk, offset.
CENTRAL = [(6, 'H'), (8, 'H'), (10, 'H'), (16, 'I'), (20, 'I'), (24, 'I'), (28, 'H'), (30, 'H'), (32, 'H'), (34, 'H'), (42, 'I')]


def lying(data, draws):
    """A zip whose directory, or whose end, says something else than is there; some are zip bombs."""
    kind, data = draws.integers(5), bytearray(data)
    places = [place for place in range(len(data)) if data[place:place + 4] == b'PK\1\2']
    if kind == 0:
        return bomb(draws)
    if kind == 1:  # all members lie where one of them lies
        offset = pick(places, draws) + 42
        for place in places:
            data[place + 42:place + 46] = data[offset:offset + 4]
    elif kind == 2:  # encrypted, here and in the local header
        place = pick(places, draws)
        local = int.from_bytes(data[place + 42:place + 46], 'little')
        data[place + 8] |= 1
        data[local + 6] |= 1
    elif kind == 3:
        place, (offset, code) = pick(places, draws), pick(CENTRAL, draws)
        value = pick([0, 1, 7, 8, 12, 14, 2 ** 16 - 1, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 2, 2 ** 32 - 1], draws)
        struct.pack_into(f'<{code}', data, place + offset, value & (2 ** (8 * struct.calcsize(code)) - 1))
    else:
        end = data.rindex(b'PK\5\6') + int(draws.integers(4, 22))
        value = pick(hostile.EXTREMES, draws)
        data[end:end + len(value)] = value
    return bytes(data)


def bomb(draws):
    """A zip with a member that decompresses to gigabytes."""
    name, fill = pick([('dataset.json', b' '), ('dataset.json', b'['), ('dataset.json', b'[],'), ('0.png', b'\0'), ('5.png', b'\0'),
                       ('0.npy', b'\0')], draws)
    size, declared = int(2 ** draws.integers(22, 34)), pick([None, None, 100, 2 ** 20], draws)
    whole, packed = inflating(fill, size)
    declared = min(whole, 2 ** 32 - 2) if declared is None else declared
    data = bytearray(zipped([(f'{i}.png', png(pixels(i))) for i in range(1, 4)] + [(name, b'x')], zipfile.ZIP_DEFLATED))
    place = data.rindex(b'PK\1\2')
    local = int.from_bytes(data[place + 42:place + 46], 'little')
    start = local + 30 + len(name)
    struct.pack_into('<II', data, place + 20, len(packed), declared)
    struct.pack_into('<II', data, local + 18, len(packed), declared)
    end = data.rindex(b'PK\5\6')
    struct.pack_into('<I', data, end + 16, start + len(packed))
    return bytes(data[:start]) + packed + bytes(data[place:])


@functools.lru_cache(8)
def inflating(fill, size, wrapped=False):
    """(decompressed size, deflate stream) of the fill repeated to about `size` bytes, made without compressing them all."""
    piece = (fill * (2 ** 20 // len(fill)))
    coder = zlib.compressobj(9, zlib.DEFLATED, 15 if wrapped else -15)
    head = coder.compress(piece) + coder.flush(zlib.Z_FULL_FLUSH)
    again = coder.compress(piece) + coder.flush(zlib.Z_FULL_FLUSH)  # depends on nothing before it
    count = max(1, size // len(piece))
    return len(piece) * count, head + again * (count - 1) + coder.flush()


def special_folder(found, folder, draws):
    """Files that are none, endless, or called what no text is called."""
    path, kind = write(found, folder, _Fixed(2)), draws.integers(9)
    target = os.path.join(path, pick([*found[0], 'dataset.json'], draws))
    other = os.fsencode(os.path.join(path, 'x'))
    if kind in (0, 1, 2):
        os.unlink(target)
    if kind == 0:
        os.mkfifo(target)
    elif kind == 1:
        os.symlink(pick(['/dev/zero', '/etc/passwd', 'nowhere', target, '/'], draws), target)
    elif kind == 2:
        os.mkdir(target)
    elif kind == 3:
        os.truncate(target, PAST_END)
    elif kind == 4:
        shutil.copy(target, other + b'\xff\xfe.png')
    elif kind == 5:
        shutil.copy(target, other + b'\n\x1b[31m.png')
    elif kind == 6:
        os.symlink(path, os.path.join(path, 'loop'))
    elif kind == 7:
        os.makedirs(os.path.join(path, *['d' * 20] * 100))
    else:
        with open(target, 'rb') as f:
            data = f.read()
        put(hostile.mutate(data, draws), os.path.dirname(target), os.path.basename(target))
    return path


class _Fixed:
    """Draws that are always the same."""

    def __init__(self, value):
        self.integers = lambda *_: value


# ----------------------------------------------------------------------------------------------------
# Pictures and arrays


@functools.cache
def bases():
    """{kind: [(name, bytes)]} of good pictures and arrays."""
    grey, rgb, alpha = pixels(0, (8, 8)), pixels(1), pixels(2, (8, 8, 4))
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text('key', 'text ' * 50, zip=True)
    info.add_itxt('other', 'text', zip=True)
    pngs = [png(grey), png(rgb), png(alpha), png(rgb, 'P'), png(grey, '1'), png(grey.astype(np.uint16) * 257), png(rgb, pnginfo=info),
            png(rgb, icc_profile=b'profile' * 20), png(rgb, 'P', transparency=3), png(grey, 'LA')]
    others = [('x.jpg', png(rgb, format='JPEG')), ('x.jpg', png(rgb, format='JPEG', progressive=True)),
              ('x.jpg', png(rgb, 'CMYK', format='JPEG')), ('x.bmp', png(rgb, format='BMP')), ('x.bmp', png(rgb, 'P', format='BMP')),
              ('x.png', png(rgb, format='TIFF')), ('x.png', png(rgb, format='GIF')), ('x.ppm', png(rgb, format='PPM')),
              ('x.tif', png(rgb, format='TIFF', compression='tiff_lzw')), ('x.png', png(rgb, format='ICNS')),
              ('x.png', png(rgb, format='TGA')), ('x.png', EPS)]
    if PIL.features.check('webp'):
        others.append(('x.webp', png(rgb, format='WEBP')))
    arrays = [np.zeros([3, 8, 8], np.float32), np.ones([8, 8], np.uint8), np.asfortranarray(np.zeros([3, 8, 8])),
              np.zeros([3, 8, 8], '>f4'), np.zeros([3, 8, 8], bool), np.zeros([3, 8, 8], np.int64), np.zeros([3, 8, 8], np.complex64),
              np.zeros([3, 0, 8], np.float32), np.zeros([3, 8, 8], [('a', 'f4'), ('b', 'f4')]), np.zeros([3, 8, 8], 'S4'),
              np.zeros([3, 8, 8], 'M8[s]'), np.array(1.0)]
    return [('x.png', data) for data in pngs], others, [('x.npy', npy(array)) for array in arrays]


EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\nshowpage\n%%EOF\n'
SHAPES = ['(3, 8, 8)', '()', '(0,)', '(3, 0, 8)', '(1000000000000,)', '(99999, 99999, 99999)', '(9223372036854775807, 9223372036854775807)',
          '(-1, 8, 8)', '(3, 8, -8)', '(1.5, 8)', '(True, 8, 8)', '("a",)', '[3, 8, 8]', '3', 'None', '(' * 300 + ')' * 300,
          '(' + '1,' * 3000 + ')', '(9' + '9' * 4000 + ',)', '(' + '-' * 4000 + '1,)', '(3, 8, 8', '(3L, 8L, 8L)', '(0x3, 8, 8)',
          '(3, 8, 8, 1)', '(8,)', '(192,)', '(1, 192)']
DTYPES = ["'<f4'", "'|O'", "'O'", "'<f8'", "'|u1'", "'<f2'", "'|V1000000000'", "'|S999999999'", "'<U99999999'", "'|V0'", "[('a', '<f4')]",
          "[('a', '|O')]", "'f4,f4'", "('<f4', (1000000,))", "'<f4' * 1000", "'>f4'", "'<M8[ns]'", "'float32'", "''", "None",
          "'(1000000,1000000)f4'", "'<f4', 'x': 1", "'<f128'", "'T'", "{'names': ['a'], 'formats': ['O']}"]
ODD_CHUNKS = [b'zTXt', b'iTXt', b'iCCP', b'IDAT', b'tRNS', b'PLTE', b'acTL', b'fcTL', b'fdAT', b'eXIf', b'cHRM', b'abcd']
SIDES = [0, 1, 8, 9, 255, 4096, 11_000, 65_535, 100_000, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1]


def array_file(draws):
    """An .npy file with a header of its own."""
    order, shape = pick(['False', 'True', '1', 'x'], draws), pick(SHAPES, draws)
    header = f"{{'descr': {pick(DTYPES, draws)}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    if draws.integers(4) == 0:
        header = hostile.mutate(header, draws)
    version, size = pick([1, 1, 2, 3, 9], draws), pick([len(header), len(header), 0, 5, 2 ** 16 - 1], draws)
    return b'\x93NUMPY' + bytes([version, 0]) + struct.pack('<H' if version == 1 else '<I', size % 2 ** 16) + header + bytes(768)


def chunks(data):
    """[(type, bytes)] of a PNG."""
    place, found = 8, []
    while place < len(data):
        size, = struct.unpack_from('>I', data, place)
        found.append((data[place + 4:place + 8], data[place + 8:place + 8 + size]))
        place += size + 12
    return found


def from_chunks(found):
    packed = [struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in found]
    return b'\x89PNG\r\n\x1a\n' + b''.join(packed)


def repacked(data, draws):
    """A PNG with chunks changed, and their checksums right."""
    found = chunks(data)
    for _ in range(draws.integers(1, 4)):
        place, kind = int(draws.integers(len(found))), draws.integers(7)
        if kind <= 1:
            size = struct.pack('>II', pick(SIDES, draws), pick(SIDES, draws))
            rest = bytes(pick([own, own, 0, 1, 3, 16, 255], draws) for own in found[0][1][8:13])
            found[0] = (b'IHDR', size + rest)
        elif kind == 2:
            found[place] = found[place][0], hostile.mutate(found[place][1], draws)
        elif kind == 3:
            found.insert(place, pick(found, draws))
        elif kind == 4 and len(found) > 1:
            del found[place]
        elif kind == 5:
            large = zlib.compress(bytes(2 ** 22))
            fills = [b'', b'k\0\0' + large, b'k\0\1\0\0\0' + large, bytes(26), b'Exif\0\0MM\0*\xff\xff\xff\xff']
            found[place:place] = [(pick(ODD_CHUNKS, draws), pick(fills, draws))]
        else:
            found[0] = b'IHDR', struct.pack('>II', *(int(2 ** draws.uniform(0, 14)) for _ in '12')) + found[0][1][8:]
            found = [found[0], (b'IDAT', inflating(b'\0', int(2 ** draws.integers(10, 31)), True)[1]), *found[-1:]]
    return from_chunks(found)


def member(draws, folder):
    """One hostile picture or array, as the first of a data set's images, the last, or the only one."""
    pngs, others, arrays = bases()
    kind = draws.integers(10)
    if kind <= 6:
        name, data = pick(pngs, draws)
        data = repacked(data, draws) if kind % 2 else hostile.mutate(data, draws, [data])
    elif kind == 7:
        name, data = pick(others, draws)
        data = hostile.mutate(data, draws) if draws.integers(4) else data
    else:
        name, data = pick(arrays, draws)
        data = hostile.mutate(data, draws) if kind == 8 else array_file(draws)
    members, meta = good(int(kind >= 8))
    meta = {'units': meta['units']} if 'units' in meta else {}
    if place := draws.integers(3):
        members = {**members, ('~' if place == 1 else '!') + name: data}
    else:
        members = {name: data}
    return write((members, meta), folder, draws), pick([use, use, use, judge, convert], draws)


# ----------------------------------------------------------------------------------------------------
# Other sources of dataset_tool.py


def source(draws, folder):
    kind, found = draws.integers(5), io.BytesIO()
    images = np.random.default_rng(0).integers(0, 256, (5, 3072), np.uint8)
    if kind == 0:
        name, batch = 'cifar.tar', hostile.mutate(pickle.dumps({'data': images, 'labels': [1, 2, 3, 4, 5]}, 2), draws)
        with tarfile.open(fileobj=found, mode='w') as archive:
            info = tarfile.TarInfo('data_batch_1')
            info.size = len(batch)
            archive.addfile(info, io.BytesIO(batch))
    elif kind == 1:
        name, data = 'x-idx3-ubyte.gz', b'\0\0\x08\3' + struct.pack('>III', 5, 32, 96) + images.tobytes()
        inside = draws.integers(3)
        data = gzip.compress(hostile.mutate(data[:40], draws) + data[40:] if inside else data, 1)
        found.write(data if inside else hostile.mutate(data, draws))
    elif kind == 2:
        name = 'x.npy'
        found.write(array_file(draws) if draws.integers(2) else hostile.mutate(npy(images.reshape(5, 3, 32, 32)), draws))
    elif kind == 3:
        name = 'x.npz'
        found.write(hostile.mutate(zipped([('images.npy', npy(images.reshape(5, 3, 32, 32))), ('labels.npy', npy(np.arange(5)))],
                                          pick([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], draws)), draws))
    else:
        name = 'x.npz'
        found.write(zipped([('images.npy', array_file(draws)), ('labels.npy', pick([npy(np.arange(5)), array_file(draws)], draws))],
                           pick([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], draws)))
    data = found.getvalue()
    return put(hostile.mutate(data, draws) if kind == 0 and draws.integers(3) == 0 else data, folder, name), convert


def anything(draws, folder):
    return pick([data_set, data_set, member, member, source], draws)(draws, folder)


data_sets, members, sources, everything = attack(data_set), attack(member), attack(source), attack(anything)
