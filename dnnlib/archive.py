# SPDX-License-Identifier: Apache-2.0
"""Reads the members of a zip file or folder, and decodes images among them to arrays. All archives, from any program, are read here.

Every size that a header claims is checked against the bytes that are there before memory is allocated for it."""

import contextlib
import functools
import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import PIL.Image

from dnnlib import arrays, pictures
from dnnlib.files import MAX_JSON, json_object
from dnnlib.fingerprint import digest, fingerprint
from dnnlib.util import UserError, one_line

LOSSY = ('.jpg', '.jpeg', '.webp')
IMAGES = ('.png', '.bmp', *LOSSY, '.npy')  # extensions of images, for training and conversion
LEFT_BEHIND = re.compile(r'(^|/)(\.|__MACOSX/)')  # names of hidden files and folders, which are ignored whatever their extension
RARER_IMAGES = ('.tif', '.tiff', '.pgm', '.ppm')  # extensions of further images, for conversion only
# The formats that Pillow may open, whatever a file is called: some of its others, such as EPS, run external programs.
FORMATS = ('PNG', 'JPEG', 'BMP', 'DIB', 'GIF', 'WEBP', 'TIFF', 'PPM')

CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of PNG's colour types: grey, RGB, grey and alpha, RGB and alpha
MAX_PIXELS = 2 ** 27  # of a picture: 11585 x 11585
MAX_MEMBER = 2 ** 29  # bytes of an image file: MAX_PIXELS with 4 channels, uncompressed
MAX_SCANS = 2 ** 31  # pixels times scans of a JPEG: each scan, of a few bytes, takes a pass over all pixels
JSON_BASE, JSON_PER_MEMBER = 2 ** 25, 2 ** 16  # limit on the bytes of dataset.json, at most MAX_JSON
PACKED_JSON = 2 ** 20  # bytes of a packed data set's dataset.json, which has no per-image entries
MAX_TAIL = 2 ** 16 + 100  # bytes at the end of a zip file, including a comment, that say where its directory is
LOCAL_EXTRA = 64  # bytes allowed for a member's extra field, between its name and its data, in the first read
MAX_DEFLATE = 1032  # largest compression ratio of deflate

# What Pillow, numpy and zipfile raise for damaged files and for files of other formats.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError,
          OverflowError, RecursionError, MemoryError, PIL.Image.DecompressionBombError)

warnings.filterwarnings('ignore', category=PIL.Image.DecompressionBombWarning)  # MAX_PIXELS takes its place


class Archive:
    """The members of a zip file or folder: `names` (relative, with slashes, sorted) and read(name) -> bytes.

    where: its name in errors, by default its path. Safe to use from threads and from forked or spawned processes."""

    def __init__(self, path: str | os.PathLike, where: str | None = None):
        self.path, self.where, self._opened = str(path), where or str(path), (None, None)
        self._digests = {}  # name of a JSON member that was read -> digest
        self._is_folder = os.path.isdir(self.path)
        if not self._is_folder and not os.path.isfile(self.path):
            raise UserError(f'{self.where}: no such zip file or folder')
        try:
            self.names = self._files() if self._is_folder else self._members()
        except DAMAGE as err:
            problem = 'its folders cannot be listed' if self._is_folder else 'not a whole zip file'
            raise UserError(f'{self.where}: cannot be read: {problem} ({damage(err)}); make it again') from None

    def __getstate__(self):
        return {**self.__dict__, '_opened': (None, None)}

    def _files(self):
        found, folders = [], ['']
        while folders:
            inside = folders.pop()
            with os.scandir(os.path.join(self.path, inside)) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f'{inside}{entry.name}/')
                    elif entry.is_file():
                        found.append(f'{inside}{entry.name}')
        return sorted(found)

    def _members(self):
        infos = [info for info in self._zip().infolist() if not info.filename.endswith('/')]
        _check_places(infos)
        return sorted(info.filename for info in infos)

    def _zip(self):
        """The open zip file, one per process: processes that shared a file position would disturb each other's reads."""
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]

    def images(self, suffixes: tuple[str, ...] = IMAGES) -> list[str]:
        """The names of images, without hidden files and folders (names that begin with a dot, __MACOSX).

        Raises UserError if there are none."""
        found = [name for name in self.names if name.lower().endswith(suffixes) and not LEFT_BEHIND.search(name)]
        if not found:
            raise UserError(f'{self.where}: no images in it (looked for {", ".join(suffixes)})')
        twice = next((name for name, after in zip(found, found[1:]) if name == after), None)
        if twice:
            raise UserError(f'{self.where}: holds {twice} twice; make it again')
        return found

    def read(self, name: str, most: int | None = MAX_MEMBER) -> bytes:
        """The bytes of a member, at most `most`. Raises the errors in DAMAGE."""
        if self._is_folder:
            with open(os.path.join(self.path, name), 'rb') as f:
                size = os.fstat(f.fileno()).st_size
                _check_size(size, most)
                return f.read(size)
        archive = self._zip()
        info = archive.getinfo(name)
        _check_size(info.file_size, most)
        _check_member(info)
        if info.compress_type == zipfile.ZIP_STORED:
            return _read_stored(archive.fp.fileno(), info)
        with archive.open(info) as f:
            return f.read(info.file_size)

    def read_json(self, name: str = 'dataset.json') -> dict:
        """The object in a JSON member, {} if there is no such member."""
        return json_object(self._json(name), f'{self.where}: {name}') if name in self.names else {}

    def _json(self, name):
        """The bytes of a JSON member; remembers their digest."""
        try:
            data = self.read(name, min(MAX_JSON, JSON_BASE + JSON_PER_MEMBER * len(self.names)))
        except DAMAGE as err:
            raise UserError(f'{self.where}: {name} cannot be read ({damage(err)})') from None
        self._digests[name] = digest(data)
        return data

    def fingerprint(self, suffixes: tuple[str, ...] = IMAGES, labels: str = 'dataset.json') -> dict:
        """The fingerprint of the images in it, from the zip's directory or the files' sizes and times, independent of the path.

        Raises UserError."""
        names = self.images(suffixes)
        if labels in self.names and labels not in self._digests:
            self._json(labels)
        try:
            if self._is_folder:
                found = [os.stat(os.path.join(self.path, name)) for name in names]
                sizes, contents = [stat.st_size for stat in found], [stat.st_mtime_ns for stat in found]
            else:
                found = [self._zip().getinfo(name) for name in names]
                sizes, contents = [info.file_size for info in found], [info.CRC for info in found]
            return fingerprint('folder' if self._is_folder else 'zip', names, sizes, contents, self._digests.get(labels))
        except DAMAGE as err:
            raise UserError(f'{self.where}: cannot be read ({damage(err)})') from None


def packed_images(folder: str | os.PathLike) -> str | None:
    """The path of the array with all images of a packed data set's folder (training/data/packed.py); None for other folders."""
    path, meta = (os.path.join(folder, name) for name in ('images.npy', 'dataset.json'))
    if not (os.path.isfile(path) and os.path.isfile(meta)):
        return None
    with open(meta, 'rb') as f:
        return path if b'"packed"' in f.read(PACKED_JSON) else None


def directory_digest(path: str | os.PathLike) -> str | None:
    """The digest of the raw bytes of a zip file's directory, which any change of its members changes; None if it is not found.

    Much faster than parsing the directory: 0.2 s instead of 12 s for 1.28 million members."""
    with open(path, 'rb') as f:
        size = f.seek(0, os.SEEK_END)
        first = max(0, size - MAX_TAIL)
        f.seek(first)
        tail = f.read()
        end = tail.rfind(b'PK\5\6')
        if end < 0 or len(tail) < end + 22:
            return None
        length, = struct.unpack_from('<12xI', tail, end)
        if tail[max(0, end - 20):end].startswith(b'PK\6\7') and tail[max(0, end - 76):].startswith(b'PK\6\6'):  # zip64
            end -= 76
            length, = struct.unpack_from('<40xQ', tail, end)
        if not 0 < length <= first + end:
            return None
        f.seek(first + end - length)
        return digest(f.read(length))


def _read_stored(handle, info):
    """The bytes of an uncompressed member, in one read: zipfile needs several, under a lock, and takes 5 times as long."""
    slack = 30 + len(info.filename.encode('utf-8', 'surrogateescape')) + LOCAL_EXTRA  # the member's header
    data = os.pread(handle, slack + info.file_size, info.header_offset)
    if data[:4] != b'PK\3\4' or len(data) < 30:
        raise ValueError('its header in the zip file is damaged')
    start = 30 + sum(struct.unpack_from('<HH', data, 26))
    found = data[start:start + info.file_size]
    if len(found) < info.file_size:  # the header is longer than LOCAL_EXTRA allows for
        found = os.pread(handle, info.file_size, info.header_offset + start)
    if len(found) < info.file_size or zlib.crc32(found) != info.CRC:
        raise ValueError('its bytes in the zip file are damaged: their checksum (CRC-32) differs from the one in the directory')
    return found


def _check_size(size, most):
    if most is not None and size > most:
        raise ValueError(f'it has {size} bytes, more than the limit of {most}')


def _check_places(infos):
    """Refuses members that overlap: a small file could then expand to a huge one."""
    starts = np.array([info.header_offset for info in infos], np.float64)
    ends = starts + 30 + np.array([info.compress_size for info in infos], np.float64)  # 30: a header without its name
    order = np.argsort(starts)
    if (starts[order][1:] < ends[order][:-1]).any():
        raise ValueError('its members overlap')


def _check_member(info):
    """Refuses a member of a zip file that cannot be read, or claims an impossible size."""
    if info.flag_bits & 1:
        raise ValueError('it is encrypted; make the zip file without a password')
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'it is compressed by {zipfile.compressor_names.get(info.compress_type, info.compress_type)}; make the zip file '
                         'with deflate, or without compression')
    if info.file_size > info.compress_size * (MAX_DEFLATE if info.compress_type else 1):
        raise ValueError(f'its {info.compress_size} bytes cannot expand to the {info.file_size} that the directory claims')


@functools.cache
def _formats():
    """The FORMATS that this build of Pillow supports."""
    PIL.Image.init()
    return tuple(kind for kind in FORMATS if kind in PIL.Image.OPEN)


@contextlib.contextmanager
def _decoding():
    """Turns any error of a decoder into one of DAMAGE: damaged bytes make decoders raise errors of all kinds."""
    try:
        yield
    except DAMAGE:
        raise
    except Exception as err:
        raise ValueError(f'{type(err).__name__}: {err}') from err


def open_picture(data: bytes, most: int = MAX_PIXELS) -> PIL.Image.Image:
    """The bytes of a picture -> Pillow's image, with only the header read. most: limit in pixels. Raises the errors in DAMAGE."""
    with _decoding():
        picture = PIL.Image.open(io.BytesIO(data), formats=_formats())
    pixels = picture.width * picture.height
    most = min(most, MAX_PIXELS // 2) if picture.format == 'WEBP' else most  # its decoder holds several pictures at once
    if pixels > most:
        raise ValueError(f'{picture.width} x {picture.height} pixels, more than the limit of {most}')
    if data[:2] == b'\xff\xd8' and pixels * data.count(b'\xff\xda') > MAX_SCANS:
        raise ValueError(f'{data.count(bytes([0xff, 0xda]))} scans of {pixels} pixels, more than the limit of {MAX_SCANS} together')
    with _decoding():
        pictures.check(picture, data)
    return picture


def decode_image(name: str, data: bytes, modes: Sequence[str] | None = None, most: int = MAX_PIXELS) -> np.ndarray:
    """The bytes of a member -> array [C,H,W]: 8-bit pictures as uint8, deeper ones and .npy in their own type; [H,W] is one channel.

    Palettes and CMYK become RGB, 1-bit images grey; EXIF's orientation is applied. modes: Pillow's modes that are allowed after that, by
    default all. most: limit in pixels. Raises the errors in DAMAGE."""
    if name.lower().endswith('.npy'):
        array = arrays.from_bytes(data)
        if array.ndim not in (2, 3) or not array.size:
            raise ValueError(f'an array of shape {list(array.shape)} is not an image [C,H,W] or [H,W]')
        return array[None] if array.ndim == 2 else array
    if (plain := _plain_png(data, most)) is not None and not modes:
        return plain
    with open_picture(data, most) as picture, _decoding():
        mode = pictures.CONVERTED.get(picture.mode, picture.mode)
        if modes and mode not in modes:
            raise ValueError(f'mode {mode}, expected 8-bit grey or RGB; convert it with dataset_tool.py')
        return pictures.pixels(picture, data)


def _plain_png(data, most):
    """The image in a PNG as dataset_tool.py writes it (8 bits, no filter, one IDAT, not compressed); None for any other PNG.

    Reading these bytes directly is several times as fast as a general PNG decoder."""
    if data[:16] != b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' or data[37:41] != b'IDAT' or data[41:43] != b'\x78\x01':
        return None
    width, height, depth, colour, *rest = struct.unpack_from('>IIBBBBB', data, 16)
    channels, length = CHANNELS.get(colour, 0), int.from_bytes(data[33:37], 'big')
    size, sums = height * (1 + width * channels), ((12, 29), (37, 41 + length))
    if depth != 8 or not channels or any(rest) or not 0 < width * height <= most:
        return None
    if len(data) != 57 + length or length > size + size // 64 + 64:
        return None
    try:
        flat = zlib.decompress(data[41:41 + length], bufsize=size)
    except zlib.error:
        return None  # the general decoder will report the error
    if len(flat) != size or any(zlib.crc32(data[start:end]) != int.from_bytes(data[end:end + 4], 'big') for start, end in sums):
        return None
    rows = np.frombuffer(flat, np.uint8).reshape(height, -1)
    if rows[:, 0].any():
        return None
    return np.ascontiguousarray(rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1))


def damage(err: BaseException) -> str:
    """The text of an error in DAMAGE, in one line."""
    plain = {PIL.UnidentifiedImageError: 'not an image', MemoryError: 'it needs more memory than there is'}
    return next((text for kind, text in plain.items() if isinstance(err, kind)), None) or one_line(err)
