# SPDX-License-Identifier: Apache-2.0
"""Reads the files in which various programs store reference statistics and features; nothing in them is executed.

| file | made by | holds |
| --- | --- | --- |
| .npz | this program, EDM, ADM, clean-fid | `mu`, `sigma`, and here what they were made with |
| .npz | clean-fid, for KID (*_kid.npz) | `feats` [N,D] |
| .pkl | EDM2 | for each metric ("fid", "fd_dinov2") a dict of `mu` and `sigma` |
| .pt | torch-fidelity's cache | a dict of `mu` and `sigma` (*-stat-fid-*), or a tensor of features [N,D] (*-features-*) |

The kind of a file is recognised by its bytes, not by its name."""

import math
import mmap
import os
import re
import tokenize
import zipfile

import numpy as np
import torch

from dnnlib import UserError, one_line
from dnnlib.archive import DAMAGE
from torch_utils import numpy_pickle, tensor_file
from torch_utils.pickle_machine import Refused

MOST_DEFLATED = 100  # largest compression ratio of a large member; for real statistics it is less than 2
ENTRIES = {'inception': 'fid', 'dinov2': 'fd_dinov2'}  # detector -> its name in EDM2's files
MODES = {  # modes of clean-fid, as in the names of its files -> how they differ from the published FID
    'clean': 'resizes images to 299 x 299 with Pillow\'s bicubic filter: its distances differ from those of the published FID',
    'legacy_pytorch': 'uses another network and resize: its distances differ from those of the published FID',
    'legacy_tensorflow': 'uses the network and resize of the published FID',
}
MODE = re.compile(r'_(clean|legacy_pytorch|legacy_tensorflow)_')
CACHE = re.compile(r'-(inception-v3-compat|vgg16|clip-[\w-]+?|dinov2-[\w-]+?)-(?:stat-fid|features)-([^-]+)\.pt$')  # of torch-fidelity


def read_arrays(path: str | os.PathLike, name: str, keys: set[str], detector: str) -> tuple[dict[str, np.ndarray], str | None]:
    """({key: array} of mu, sigma, features and any further `keys` that the file has, the detector if the file names one).

    name: the file's name in errors. detector: the base of its name ("dinov2"), which selects the entry of a file with several.
    Raises UserError."""
    if not os.path.isfile(path):
        raise UserError(f'{name}: no such file')
    with open(path, 'rb') as f:
        head = f.read(2)
        try:
            if head == b'\x80\x02' or head[:1] == b'\x80' and head[1:] in b'\x03\x04\x05':
                return _read_pickle(f, name, detector)
            if head == b'PK' and _is_torch_file(f):
                return _read_torch_file(f), None
        except Refused as err:
            raise UserError(f'{name}: not readable statistics (it {err}); expected mu and sigma as EDM (.npz), EDM2 (.pkl), clean-fid '
                            '(.npz) or torch-fidelity (.pt) write them') from None
    return _read_npz(path, name, {'mu', 'sigma', *keys}), None


def unknown_detector(name: str) -> str:
    """The note in a result about statistics that do not say which detector made them; name: the file as the user gave it."""
    text = 'the file does not say which detector made it'
    base = re.split(r'[/\\=]', name.partition('#')[0])[-1]
    if mode := MODE.search(base.lower()):
        return f'{text}; by its name it is from clean-fid, mode "{mode[1]}", which {MODES[mode[1]]}'
    if cache := CACHE.search(base):
        return f'{text}; by its name it is from a cache of torch-fidelity, extractor "{cache[1]}", features "{cache[2]}"'
    return text


# ----------------------------------------------------------------------------------------------------
# .pkl and .pt


def _read_pickle(f, name, detector):
    """(arrays, detector) of a pickled dict: its own mu and sigma, or those of the entry that belongs to the detector."""
    f.seek(0)
    found = numpy_pickle.read_dict(memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)))
    if 'mu' in found and 'sigma' in found:
        return _arrays(found), None
    entries = {key: value for key, value in found.items() if isinstance(value, dict) and 'mu' in value and 'sigma' in value}
    if not entries:
        raise Refused('holds no mu and sigma')
    wanted = ENTRIES.get(detector)
    if wanted not in entries:
        told = ', '.join(f'"{key[:50]}"' + (f' (--detector={who})' if who else '') for key, who in
                         ((key, next((who for who, entry in ENTRIES.items() if entry == key), '')) for key in list(entries)[:10]))
        raise UserError(f'{name}: has no statistics of --detector={detector}; it holds {told}')
    return _arrays(entries[wanted]), detector


def _arrays(entry):
    found = {key: numpy_pickle.as_array(entry[key]) for key in ('mu', 'sigma')}
    for key, value in found.items():
        if value is None:
            raise Refused(f'holds no array "{key}"')
    return {key: value.copy() for key, value in found.items()}  # copies, which do not change if the file is overwritten


def _is_torch_file(f):
    """Whether a zip file was written by torch.save."""
    try:
        with zipfile.ZipFile(f) as archive:
            return any(name.endswith('/data.pkl') for name in archive.namelist())
    except (*DAMAGE, OverflowError, RuntimeError):
        return False  # the reader of .npz will report what is wrong with it


def _read_torch_file(f):
    """A tensor [N,D] of features, or a dict of mu and sigma, tensors or NumPy arrays."""
    reader = tensor_file.Reader(f, mapped=False, checksums=True)
    try:
        found = reader.tree()
    except Refused as err:
        if 'numpy' not in str(err) and '_codecs' not in str(err):
            raise
        return _arrays(_flat(numpy_pickle.read_dict(reader.record('data.pkl'))))
    if isinstance(found, torch.Tensor):
        if found.ndim != 2:
            raise Refused(f'holds a tensor {list(found.shape)} instead of features [N,D]')
        return {'features': found.float().numpy()}
    found = _flat(found)
    if not all(isinstance(found[key], torch.Tensor) for key in ('mu', 'sigma')):
        raise Refused('holds no arrays mu and sigma')
    return {key: found[key].double().numpy() for key in ('mu', 'sigma')}


def _flat(found):
    if not isinstance(found, dict) or not {'mu', 'sigma'} <= found.keys():
        raise Refused('holds no mu and sigma')
    return found


# ----------------------------------------------------------------------------------------------------
# .npz


def _read_npz(path, name, keys):
    """{key: array} for those of the keys that the file has; published files may hold others."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix('.npy'): info for info in archive.infolist() if info.filename.endswith('.npy')}
            found = {key: _read_array(archive, info) for key, info in members.items() if key in keys}
            if not found and 'feats' in members:  # a file of clean-fid for KID
                found['features'] = _read_array(archive, members['feats'])
            return found
    except (*DAMAGE, TypeError, AttributeError, LookupError, OverflowError, RecursionError, RuntimeError, tokenize.TokenError) as err:
        raise UserError(f'{name}: not a readable .npz of statistics ({one_line(err)})') from None


def _read_array(archive, info):
    """The array of a member. Raises ValueError, before memory is allocated, if it claims more than its file can hold."""
    if info.file_size > MOST_DEFLATED * info.compress_size + 2 ** 26:
        raise ValueError(f'{info.filename} claims to be {info.file_size} bytes, packed in {info.compress_size}')
    with archive.open(info) as f:
        version = np.lib.format.read_magic(f)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(f)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=1) < 0 or size != info.file_size - f.tell():
            raise ValueError(f'{info.filename} claims {dtype} {list(shape)} and has {info.file_size - f.tell()} bytes')
        values = np.frombuffer(f.read(), dtype).copy()  # writable
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)
