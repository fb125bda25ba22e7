# SPDX-License-Identifier: Apache-2.0
"""Decodes pictures once into a packed folder, which all processes of a node, and all later runs on the same data, map into memory.

Its name is `.NAME-KEY.decoded`: KEY is a digest of a zip's directory, or of the names, sizes and times of a folder's files. It lies
beside the data, or else in the cache of downloads; or in the folder given by the option --cache-dir."""

import glob
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from dnnlib import UserError
from dnnlib.archive import directory_digest
from dnnlib.cpus import cpu_count
from dnnlib.download import cache_dir as user_cache
from dnnlib.files import new_folder
from dnnlib.fingerprint import digest
from dnnlib.progress import Progress
from torch_utils import distributed
from training.data import tables
from training.data.contents import Names, Pictures, text_of
from training.data.packed import EMPTY, VERSION, Packed, PackedFolder, is_packed

SMALL = 2 ** 26  # bytes: smaller data sets are decoded by every process into its own memory
CHUNK = 64  # images decoded by a thread at a time


def open_contents(path: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Any:
    """The contents of a data set (contents.py): of the decoded copy of exactly these data, if there is one."""
    if is_packed(path):
        return Packed(path)
    if not os.path.isfile(path):  # the key of a folder depends on its files, which have to be listed
        pictures = Pictures(path)
        return _copy(pictures.path, _key(pictures), cache_dir) or pictures
    return _copy(path, _key_of_zip(path), cache_dir) or Pictures(path)


def decode(path: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> str | None:
    """Makes sure that there is a decoded copy of data that are not small; returns its path, or None for small data.

    Also None if no folder has enough space and --cache-dir was not given. Raises UserError."""
    contents = open_contents(path, cache_dir)
    if isinstance(contents, Packed):
        return contents.path
    nbytes = contents.count * math.prod(contents.image_shape) * (4 if contents.is_float else 1)
    if nbytes < SMALL:
        return None
    gib = nbytes / 2 ** 30
    for place in _places(path, _key_of_zip(path) if os.path.isfile(path) else _key(contents), cache_dir):
        try:
            if _made(place, contents):
                distributed.print0(f'Decoded images ({gib:.2f} GiB) are kept in {place}: all runs on these data use them')
            return place
        except OSError as err:
            if cache_dir:
                raise UserError(f'--cache-dir={cache_dir}: cannot hold {gib:.2f} GiB of decoded images ({err.strerror or err}); name a '
                                'folder on a larger disk') from None
    distributed.print0(f'Warning: not enough space for {gib:.2f} GiB of decoded images beside {path} or in {user_cache()}: each process '
                       'decodes them into its own memory at each start; name a folder on a larger disk with --cache-dir')
    return None


def _made(place, pictures):
    """Makes the decoded copy unless it exists; returns whether this call made it. Raises OSError."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    with filelock.FileLock(f'{place}.lock') as lock:  # another run, or node, may be making it
        try:
            if os.path.isdir(place):
                return False
            _remove_leftovers(place)
            _write(pictures, place)
            return True
        finally:
            os.unlink(lock.lock_file)  # processes that wait for the lock find the folder


def _places(path, key, cache_dir):
    """The possible paths of the decoded copy, in order of preference."""
    own = os.path.abspath(path)
    name = f'.{Path(own).stem}-{key[:16]}.decoded'
    return [os.path.join(folder, name) for folder in ([cache_dir] if cache_dir else [os.path.dirname(own), user_cache()])]


def _copy(path, key, cache_dir):
    """The contents of the decoded copy, or None if there is none."""
    found = [place for place in _places(path, key, cache_dir) if is_packed(place)] if key else []
    return Packed(found[0], where=str(path)) if found else None


def _key_of_zip(path):
    found = directory_digest(path)
    return found and digest(found.encode(), bytes([VERSION]))


def _key(pictures):
    return digest(repr(sorted(pictures.fingerprint().items())).encode(), bytes([VERSION]))


def _remove_leftovers(place):
    """Removes unfinished files of a process that was killed while writing here; the lock guarantees that none is writing now."""
    folder, name = os.path.split(place)
    for left in glob.glob(glob.escape(os.path.join(folder, f'.{name}-part-')) + '*'):
        shutil.rmtree(left, ignore_errors=True)


def _write(pictures, place):
    values = {key: pictures.values(key) for key in tables.CHECKS if pictures.has(key)}
    found = {}
    for key, listed in values.items():
        try:
            found[key] = tables.CHECKS[key](listed, Names(pictures))
        except ValueError as err:
            raise UserError(f'{pictures.where}: {pictures.called(key)} {err}') from None
    text, empty = text_of(pictures)
    with new_folder(place) as part:
        folder = PackedFolder(part, pictures.image_shape, np.float32 if pictures.is_float else np.uint8)
        decode_into(folder.allocate(pictures.count), pictures, np.arange(pictures.count))
        told = {name: record for name, record in (('latents', pictures.latents), ('text', text)) if record is not None}
        folder.finish(found | ({} if text is None else {EMPTY: empty[None]}), units=pictures.units, source=pictures.fingerprint(), **told)


def decode_into(images: np.ndarray, contents: Any, indices: Sequence[int]) -> None:
    """Fills images [n,C,H,W] with the images of these indices, in threads: decoders release Python's global lock."""
    def work(first):
        for row in range(first, min(first + CHUNK, len(indices))):
            images[row] = contents.decode(indices[row])

    starts = range(0, len(indices), CHUNK)
    with Progress(len(indices), 'Decoding', show=distributed.rank() == 0, unit_scale=True) as bar, ThreadPoolExecutor(cpu_count()) as pool:
        for first, _ in zip(starts, pool.map(work, starts)):
            bar.update(min(CHUNK, len(indices) - first))
