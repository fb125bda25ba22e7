# SPDX-License-Identifier: Apache-2.0
"""Reads the tar files of pickles of CIFAR-10 and CIFAR-100 safely: only containers and arrays of bytes are created from them."""

import io
import lzma
import os
import pickle
import pickletools
import tarfile
import zlib

import numpy as np

from dnnlib import UserError
from training.data.convert.readers.arrays import ArraySource

MAX_BATCH = 2 ** 28  # bytes of a batch; CIFAR-10's have 3.1e7
MAX_MEMBERS = 10_000
SPLITS = {'train': ('data_batch',), 'test': ('test_batch',)}  # how their files' names begin; those of CIFAR-100 are train and test
LABELS = {'fine': ('labels', 'fine_labels'), 'coarse': ('coarse_labels',)}
FIRST_MEMBERS = 8  # that are examined to recognise a tar file of CIFAR


class CifarSource(ArraySource):
    """cifar-10-python.tar.gz or cifar-100-python.tar.gz. split: train or test. labels: fine, or coarse, which CIFAR-100 has as well."""

    what = 'cifar-10-python.tar.gz, cifar-100-python.tar.gz'

    def __init__(self, path: str, split: str = 'train', labels: str = 'fine'):
        for key, value, choices in (('split', split, SPLITS), ('labels', labels, LABELS)):
            if value not in choices:
                raise UserError(f'--source={path}: {key}={value} is unknown; choose from {", ".join(choices)}')
        self.hold(*read(path, split, labels))

    @staticmethod
    def matches(path: str) -> bool:
        """True for a tar file with CIFAR's name, or with one of CIFAR's files among its first members; and for an unreadable one, so that
        the error is reported."""
        name = os.path.basename(path).lower()
        if not name.endswith(('.tar', '.tar.gz', '.tgz')) or not os.path.isfile(path):
            return False
        return 'cifar' in name or _looks_like(path)


def _looks_like(path):
    try:
        with tarfile.open(path) as archive:
            for _, member in zip(range(FIRST_MEMBERS), archive):
                if member.name.startswith('cifar-') or os.path.basename(member.name).startswith(SPLITS['train'] + SPLITS['test']):
                    return True
                if member.size > MAX_BATCH:
                    return False
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error):
        return True
    return False


def read(path: str, split: str = 'train', labels: str = 'fine') -> tuple[np.ndarray, list[int]]:
    """(images uint8 [N,3,32,32], classes) of a split's batches, pickles of {data: uint8 [n, 3*32*32], labels: [n]}.

    Raises ValueError, OSError, EOFError and errors of tarfile, zlib and lzma."""
    images, classes = [], []
    with tarfile.open(path) as archive:
        for member in sorted(_members(archive, split), key=lambda m: m.name):
            batch = _load(archive.extractfile(member).read(), LABELS[labels])
            images.append(np.asarray(batch[0], np.uint8).reshape(-1, 3, 32, 32))
            classes.extend(batch[1])
    if not images:
        raise ValueError(f'no {SPLITS[split][0]} files in it, nor one called {split}')
    found = np.concatenate(images)
    if len(found) != len(classes):
        raise ValueError(f'{len(found)} images, but {len(classes)} labels')
    return found, classes


def _members(archive, split):
    """The batches of a split among the members of a tar file."""
    for count, member in enumerate(archive):
        if count >= MAX_MEMBERS:
            raise ValueError(f'it has more than {MAX_MEMBERS} members')
        name = os.path.basename(member.name)
        if (name.startswith(SPLITS[split]) or name == split) and member.isfile():
            if member.size > MAX_BATCH:
                raise ValueError(f'{member.name} has {member.size} bytes, more than the {MAX_BATCH} that are read')
            yield member


def _load(data, keys):
    """(array, list of whole numbers) of a batch, the numbers under the first of the keys that it has."""
    try:
        for count, (op, arg, _) in enumerate(pickletools.genops(data)):
            if 'PUT' in op.name and arg is not None and not 0 <= arg <= count:  # the unpickler makes room for any number
                raise ValueError(f'{op.name} {arg} counts more values than there are')
        batch = _Unpickler(io.BytesIO(data), encoding='latin1').load()
        told = next((batch[key] for key in keys if key in batch), None)
        if told is None:
            raise ValueError(f'it has no {" or ".join(keys)}')
        return batch['data'].array(), [int(label) for label in told]
    except Exception as err:  # what a damaged pickle comes to may be of any type
        raise ValueError(f'a batch is damaged, or not a batch ({type(err).__name__}: {err})') from err


class _Dtype:
    """A type of numbers, of which bytes alone are known."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass  # byte order, which bytes do not have


class _Array:
    """An array of bytes: what NumPy sets its own with is kept, and looked at later."""

    def __setstate__(self, state):
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self):
        """uint8, of the shape that was told. Raises ValueError."""
        if getattr(self.dtype, 'code', None) != 'u1':
            raise ValueError('its images are not bytes')
        data = self.data.encode('latin1') if isinstance(self.data, str) else self.data
        return np.frombuffer(data, np.uint8).reshape(self.shape, order='F' if self.fortran else 'C')


class _Unpickler(pickle.Unpickler):
    """Opens pickles of plain containers and arrays of bytes; any other global in them is refused before it is looked up."""

    ALLOWED = {('numpy', 'ndarray'): _Array, ('numpy', 'dtype'): _Dtype, ('numpy.core.multiarray', '_reconstruct'): lambda *_: _Array(),
               ('numpy._core.multiarray', '_reconstruct'): lambda *_: _Array(),
               ('_codecs', 'encode'): lambda text, encoding: text.encode('latin1')}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f'it refers to {module}.{name}, which image data never contain')
        return self.ALLOWED[module, name]
