# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10's tar file of pickles, read as data: plain containers and arrays of bytes are made, and nothing else is looked up."""

import io
import lzma
import os
import pickle
import pickletools
import tarfile
import zlib

import numpy as np

from training.data.convert.arrays import ArraySource

MAX_BATCH = 2 ** 28  # bytes of a batch; CIFAR-10's have 3.1e7
MAX_MEMBERS = 10_000
FIRST_MEMBERS = 8  # that are looked at to tell whose tar file it is


class CifarSource(ArraySource):
    """The training batches of cifar-10-python.tar.gz."""

    what = 'cifar-10-python.tar.gz'

    def __init__(self, path):
        self.hold(*read(path))

    @staticmethod
    def matches(path):
        """A tar file whose name, or one of whose first members, is CIFAR's; and one that cannot be read, so that this is told."""
        name = os.path.basename(path).lower()
        if not name.endswith(('.tar', '.tar.gz', '.tgz')) or not os.path.isfile(path):
            return False
        return 'cifar' in name or _looks_like(path)


def _looks_like(path):
    try:
        with tarfile.open(path) as archive:
            for _, member in zip(range(FIRST_MEMBERS), archive):
                if os.path.basename(member.name).startswith('data_batch'):
                    return True
                if member.size > MAX_BATCH:
                    return False
    except (OSError, EOFError, ValueError, tarfile.TarError, lzma.LZMAError, zlib.error):
        return True
    return False


def read(path):
    """(images uint8 [N,3,32,32], classes) of the training batches, pickles of {data: uint8 [n, 3*32*32], labels: [n]}.

    Raises ValueError, OSError, EOFError and errors of tarfile, zlib and lzma."""
    images, labels = [], []
    with tarfile.open(path) as archive:
        for member in sorted(_members(archive), key=lambda m: m.name):
            batch = _load(archive.extractfile(member).read())
            images.append(np.asarray(batch[0], np.uint8).reshape(-1, 3, 32, 32))
            labels.extend(batch[1])
    if not images:
        raise ValueError('no data_batch files in it')
    found = np.concatenate(images)
    if len(found) != len(labels):
        raise ValueError(f'{len(found)} images, but {len(labels)} labels')
    return found, labels


def _members(archive):
    """The batches among the members of a tar file."""
    for count, member in enumerate(archive):
        if count >= MAX_MEMBERS:
            raise ValueError(f'it has more than {MAX_MEMBERS} members')
        if os.path.basename(member.name).startswith('data_batch') and member.isfile():
            if member.size > MAX_BATCH:
                raise ValueError(f'{member.name} has {member.size} bytes, more than the {MAX_BATCH} that are read')
            yield member


def _load(data):
    """(array, list of whole numbers) of a batch."""
    try:
        for count, (op, arg, _) in enumerate(pickletools.genops(data)):
            if 'PUT' in op.name and arg is not None and not 0 <= arg <= count:  # the unpickler makes room for any number
                raise ValueError(f'{op.name} {arg} counts more values than there are')
        batch = _Unpickler(io.BytesIO(data), encoding='latin1').load()
        return batch['data'].array(), [int(label) for label in batch['labels']]
    except Exception as err:  # what a damaged pickle comes to may be of any type
        raise ValueError(f'a batch is damaged, or none ({type(err).__name__}: {err})') from err


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
            raise pickle.UnpicklingError(f'it refers to {module}.{name}, which image data has no use for')
        return self.ALLOWED[module, name]
