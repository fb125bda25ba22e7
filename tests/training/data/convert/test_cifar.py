# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10's pickles read as data, as Python 2 wrote them; what would cost memory is told before any is taken."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest

from training.data.convert import cifar

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3072), np.uint8)
MEMO = b'q\x09'  # BINPUT 9


def batch(labels=(3, 1, 2), shape=b'K\3M\0\x0c\x86', put=MEMO, dtype=b'U\2u1'):
    """A batch as Python 2 pickled it, with text that is bytes."""
    data = IMAGES.tobytes()
    array = (b'cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1' + shape + b'cnumpy\ndtype\n' + dtype
             + b'K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T' + struct.pack('<I', len(data)) + data + b'tb')
    return b'\x80\2}(U\4data' + array + put + b'U\6labels](' + b''.join(b'K' + bytes([label]) for label in labels) + b'eu.'


def tar(path, data, name='cifar-10-batches-py/data_batch_1'):
    with tarfile.open(path, 'w:gz') as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return path


def test_batches_of_python_2_and_3(tmp_path):
    for data in (batch(), pickle.dumps({'data': IMAGES, 'labels': [3, 1, 2]}, 2), pickle.dumps({'labels': [3, 1, 2], 'data': IMAGES}, 4)):
        images, labels = cifar.read(tar(tmp_path / 'cifar.tar.gz', data))
        assert labels == [3, 1, 2] and images.dtype == np.uint8 and (images.reshape(3, 3072) == IMAGES).all()


@pytest.mark.parametrize('data, message', [
    (batch(put=b'r\xff\xff\xff\x7f'), 'LONG_BINPUT 2147483647 counts more values than there are'),
    (batch(put=b'p99999999999\n'), 'PUT 9999'),
    (batch(shape=b'K\3J\xff\xff\xff\x7f\x86'), 'cannot reshape'), (batch(dtype=b'U\2f4'), 'not bytes'),
    (batch(labels=[1, 2]), '3 images, but 2 labels'),
    (b'\x80\x04\x8e' + b'\xff' * 7 + b'\x7f.', 'a batch is damaged'), (pickle.dumps(3), 'a batch is damaged'), (b'', 'a batch is damaged'),
    (b'cos\nsystem\n(U\4truetR.', 'refers to os.system')])
def test_batches_that_are_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        cifar.read(tar(tmp_path / 'cifar.tar.gz', data))


def test_tars_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='no data_batch files'):
        cifar.read(tar(tmp_path / 'cifar.tar.gz', b'x', 'readme'))
    monkeypatch.setattr(cifar, 'MAX_BATCH', 1000)
    with pytest.raises(ValueError, match='data_batch_1 has .* bytes, more than the 1000 that are read'):
        cifar.read(tar(tmp_path / 'cifar.tar.gz', batch()))
    monkeypatch.setattr(cifar, 'MAX_MEMBERS', 0)
    with pytest.raises(ValueError, match='more than 0 members'):
        cifar.read(tar(tmp_path / 'cifar.tar.gz', b'x'))
