# SPDX-License-Identifier: Apache-2.0
"""Pickles of CIFAR-10 and CIFAR-100 read as data, as Python 2 wrote them; what would cost memory is told before any is taken."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest

from dnnlib import UserError
from training.data.convert.readers import cifar
from training.data.convert.readers.cifar import CifarSource
from training.data.convert.sources import open_source

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


def cifar_100(path):
    """A tar file like CIFAR-100's: train, test and meta, with fine and coarse labels, in the order of the published one."""
    with tarfile.open(path, 'w:gz') as archive:
        for name, images, first in (('file.txt~', None, 0), ('train', IMAGES, 0), ('test', IMAGES[:2], 50), ('meta', None, 0)):
            found = {'data': images, 'fine_labels': list(range(first, first + len(images))), 'coarse_labels': [9] * len(images),
                     'filenames': ['x.png'] * len(images), 'batch_label': name} if images is not None else {'fine_label_names': ['apple']}
            data = pickle.dumps(found, 2)
            info = tarfile.TarInfo(f'cifar-100-python/{name}')
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize('name', ['cifar-100-python.tar.gz', 'renamed.tgz'])
def test_splits_and_labels_of_cifar_100(tmp_path, name):
    path = cifar_100(tmp_path / name)
    for spec, count, labels in (('', 3, [0, 1, 2]), (':split=test', 2, [50, 51]), (':split=test,labels=coarse', 2, [9, 9])):
        source = open_source(f'{path}{spec}')
        assert source.labels == labels and all((source.read(i).ravel() == IMAGES[i]).all() for i in range(count))


def test_splits_of_cifar_10(tmp_path):
    with tarfile.open(tmp_path / 'cifar.tar', 'w') as archive:
        for name, labels in (('data_batch_2', [3, 4, 5]), ('test_batch', [6, 7, 8]), ('data_batch_1', [0, 1, 2])):
            data = batch(labels)
            info = tarfile.TarInfo(f'cifar-10-batches-py/{name}')
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert open_source(f'{tmp_path}/cifar.tar').labels == list(range(6))
    assert open_source(f'{tmp_path}/cifar.tar:split=test').labels == open_source(f'{tmp_path}/cifar.tar', split='test').labels == [6, 7, 8]
    for spec, text in (('split=val', 'split=val is unknown; choose from train, test'), ('labels=coarse', 'has no coarse_labels'),
                       ('labels=rough', 'labels=rough is unknown; choose from fine, coarse')):
        with pytest.raises(UserError, match=text):
            open_source(f'{tmp_path}/cifar.tar:{spec}')


def test_tar_files_of_others_are_not_taken(tmp_path):
    tar(tmp_path / 'shard.tar', b'x', '0001.png')
    (tmp_path / 'broken.tar').write_bytes(b'x')
    assert not CifarSource.matches(str(tmp_path / 'shard.tar')) and CifarSource.matches(str(tmp_path / 'broken.tar'))


def test_tars_that_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='no data_batch files'):
        cifar.read(tar(tmp_path / 'cifar.tar.gz', b'x', 'readme'))
    monkeypatch.setattr(cifar, 'MAX_BATCH', 1000)
    with pytest.raises(ValueError, match='data_batch_1 has .* bytes, more than the 1000 that are read'):
        cifar.read(tar(tmp_path / 'cifar.tar.gz', batch()))
    monkeypatch.setattr(cifar, 'MAX_MEMBERS', 0)
    with pytest.raises(ValueError, match='more than 0 members'):
        cifar.read(tar(tmp_path / 'cifar.tar.gz', b'x'))
