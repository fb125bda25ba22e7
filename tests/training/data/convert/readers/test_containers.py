# SPDX-License-Identifier: Apache-2.0
"""LMDB, WebDataset and Hugging Face's files, made with their own libraries, give back their images and what is said of them."""

import io
import json
import multiprocessing
import os
import pickle
import random
import sys
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import dataset_tool
from dnnlib import UserError
from training.data.convert.readers import containers
from training.data.convert.readers.btree import Tree
from training.data.convert.readers.formats import Bytes
from training.data.convert.sources import SOURCES, find, open_source
from training.data.dataset import ImageDataset

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 8, 12, 3), np.uint8)
CLASSES = [3, 1, 4, 1, 5, 0, 2]


def encoded(image, kind='PNG'):
    file = io.BytesIO()
    if kind == 'npy':
        np.save(file, image)
    else:
        Image.fromarray(image).save(file, kind, **({'lossless': True} if kind == 'WEBP' else {}))
    return file.getvalue()


def same(source, images=IMAGES, labels=CLASSES):
    """That the source gives these images [N,H,W,C], also where it came as a pickle, and its kinds tell of them."""
    assert len(source.names) == len(set(source.names)) == len(images) and source.labels == labels
    for one in (source, pickle.loads(pickle.dumps(source))):
        for k in (*range(len(images)), 0):
            read = one.read(k)
            np.testing.assert_array_equal(read.transpose(1, 2, 0), images[k])
            assert read.shape == one.kind(k)[:3] and (read.dtype == np.uint8) == one.kind(k).is_8bit


def read_there(source, index):
    return source.read(index)


def same_in_a_fork(source):
    """That a process that forked while the source was open reads it too, and that this one still does."""
    source.read(0)
    with multiprocessing.get_context('fork').Pool(2) as pool:
        found = pool.starmap(read_there, [(source, k % len(IMAGES)) for k in range(20)])
    assert all((image.transpose(1, 2, 0) == IMAGES[k % len(IMAGES)]).all() for k, image in enumerate(found))
    assert (source.read(1).transpose(1, 2, 0) == IMAGES[1]).all()


def convert(source, dest, *args, labels=True):
    result = CliRunner().invoke(dataset_tool.main, [f'--source={source}', f'--dest={dest}', '--workers=2', *args])
    assert result.exit_code == 0, result.output
    return ImageDataset(str(dest), use_labels=labels)


def refusal(source, **options):
    with pytest.raises(UserError) as caught:
        open_source(str(source), **options)
    assert '\n' not in caught.value.message
    return caught.value.message


# ----------------------------------------------------------------------------------------------------
# LMDB


def database(path, entries, **options):
    lmdb = pytest.importorskip('lmdb')
    with lmdb.open(str(path), map_size=2 ** 26, **options) as env, env.begin(write=True) as made:
        for key, value in entries:
            made.put(key, value)
    return path


def test_lmdb_folder_and_file(tmp_path):
    values = [encoded(image, ['PNG', 'npy', 'WEBP', 'BMP'][k % 4]) for k, image in enumerate(IMAGES)]
    values[1] = encoded(IMAGES[1].transpose(2, 0, 1), 'npy')
    values[5] = encoded(IMAGES[5].transpose(2, 0, 1), 'npy')
    entries = [(b'%06d' % k, value) for k, value in enumerate(values)] + [(b'num-samples', b'7'), (b'__len__', pickle.dumps(7))]
    database(tmp_path / 'set', reversed(entries))
    database(tmp_path / 'x.lmdb', entries, subdir=False)
    for path in (tmp_path / 'set', tmp_path / 'x.lmdb', tmp_path / 'set' / 'data.mdb'):
        source = open_source(str(path))
        assert find(str(path)) == 'lmdb' and source.names == [f'{k:06}' for k in range(7)]
        same(source, labels=None)
    same_in_a_fork(source)
    dataset = convert(tmp_path / 'set', tmp_path / 'x.zip', labels=False)
    assert len(dataset) == 7 and (dataset.decode(3).transpose(1, 2, 0) == IMAGES[3]).all()


@pytest.mark.parametrize('count, size', [(0, 9), (1, 9), (2000, 20), (500, 2000), (40, 40_000)])
def test_trees_of_every_depth_are_walked_as_the_library_does(tmp_path, count, size):
    """Values inside pages and on pages of their own; after deletions and another transaction."""
    lmdb, draws = pytest.importorskip('lmdb'), random.Random(0)
    held = {draws.randbytes(draws.randint(1, 60)): draws.randbytes(draws.randint(0, size)) for _ in range(count)}
    with lmdb.open(str(tmp_path), map_size=2 ** 26) as env:
        with env.begin(write=True) as made:
            for key, value in held.items():
                made.put(key, value)
        with env.begin(write=True) as made:
            for key in list(held)[::3]:
                made.delete(key)
                del held[key]
    file = Bytes(tmp_path / 'data.mdb')
    tree = Tree(file)
    assert tree.keys == sorted(held)
    assert all(file.read(offset, size) == held[key] for key, offset, size in zip(tree.keys, tree.offsets, tree.sizes))


def test_lmdb_with_named_databases(tmp_path):
    lmdb = pytest.importorskip('lmdb')
    with lmdb.open(str(tmp_path / 'set'), map_size=2 ** 26, max_dbs=4) as env:
        images, whole = env.open_db(b'images'), env.open_db(b'whole', integerkey=True)
        twice = env.open_db(b'twice', dupsort=True)
        with env.begin(write=True) as made:
            for k, image in enumerate(IMAGES):
                made.put(b'%d' % k, encoded(image), db=images)
                made.put(int(k + 5).to_bytes(8, 'little'), encoded(image), db=whole)
                made.put(b'x', b'%d' % k, db=twice)
    same(open_source(f'{tmp_path}/set:key=images'), labels=None)
    source = open_source(f'{tmp_path}/set:key=whole')
    assert source.names == [str(k) for k in range(5, 12)]
    assert 'give key= one of images, twice, whole' in refusal(tmp_path / 'set')
    assert 'it has no database "other"' in refusal(f'{tmp_path}/set:key=other')
    assert 'several values' in refusal(f'{tmp_path}/set:key=twice')


def test_damaged_lmdb_is_refused(tmp_path):
    data = (database(tmp_path / 'set', [(b'%04d' % k, b'x' * 3000) for k in range(200)]) / 'data.mdb').read_bytes()
    for damaged, text in ((b'', 'cut off'), (data[:100], 'cut off'), (data[:8192], 'beyond its end'), (data[:-5000], 'cut off'),
                          (b'x' * len(data), 'not an LMDB data file'),
                          (data.replace(b'\xde\xc0\xef\xbe\1', b'\xde\xc0\xef\xbe\2'), 'version 2')):
        (tmp_path / 'x.lmdb').write_bytes(damaged)
        assert text in refusal(tmp_path / 'x.lmdb')


def test_values_that_are_no_images_are_told_of_by_key(tmp_path):
    source = open_source(str(database(tmp_path / 'x.lmdb', [(b'a', encoded(IMAGES[0])), (b'b', b'junk')])))
    assert source.kind(0).width == 12
    with pytest.raises(OSError):
        source.read(1)


# ----------------------------------------------------------------------------------------------------
# WebDataset


def shards(pattern, labels='cls', levels=False):
    webdataset = pytest.importorskip('webdataset')
    with webdataset.ShardWriter(str(pattern), maxcount=3, verbose=0) as made:
        for k, image in enumerate(IMAGES):
            note = {'json': {'label': CLASSES[k], 'sigma': k / 8, 'sigma_max': None if k % 2 else 2.0}} if levels else {}
            made.write({'__key__': f'{k:06}', 'png': encoded(image), 'txt': 'a caption', **note, **({'cls': CLASSES[k]} if labels else {})})
    return pattern


def test_webdataset_shards(tmp_path):
    shards(tmp_path / 'train-%03d.tar')
    for path in (tmp_path / 'train-{000..002}.tar', tmp_path / 'train-*.tar', tmp_path, tmp_path / 'train-{000,001,002}.tar'):
        source = open_source(str(path))
        assert find(str(path)) == 'webdataset' and source.names[3] == 'train-001.tar/000003'
        same(source)
    same_in_a_fork(source)
    same(open_source(str(tmp_path / 'train-001.tar')), IMAGES[3:6], CLASSES[3:6])
    dataset = convert(tmp_path / 'train-{000..002}.tar', tmp_path / 'x.zip')
    assert dataset.classes.tolist() == CLASSES and (dataset.decode(6).transpose(1, 2, 0) == IMAGES[6]).all()


def test_webdataset_labels_and_levels_in_json(tmp_path):
    source = open_source(str(shards(tmp_path / '%d.tar', None, True)).replace('%d', '{0..2}'))
    same(source)
    assert source.sigmas == [k / 8 for k in range(7)] and source.sigma_max == [2.0, None] * 3 + [2.0] and source.sigma_min is None
    assert open_source(f'{tmp_path}/0.tar:label_key=sigma').labels == [0.0, 0.125, 0.25]


def tar(path, members, mode='w'):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_tars_of_samples_are_told_from_cifars(tmp_path):
    picture = encoded(IMAGES[0])
    for name, members, want in (('cifar-10-python.tar', [('a.png', b'')], 'webdataset'),
                                ('a.tar', [('cifar-10-batches-py/data_batch_4', b'x')], 'cifar'),
                                ('b.tar', [('cifar-10-batches-py/readme.html', b'x'), ('cifar-10-batches-py/data_batch_1', b'x')], 'cifar'),
                                ('c.tar', [('n01/1.JPEG', picture)], 'webdataset'),
                                ('d.tar', [('000.cls', b'1'), ('000.png', picture)], 'webdataset')):
        assert find(str(tar(tmp_path / name, members))) == want, name
    assert find(str(tar(tmp_path / 'e.tar.gz', [('data_batch_1', b'x')], 'w:gz'))) == 'cifar'


def test_webdataset_that_is_refused(tmp_path):
    picture, path = encoded(IMAGES[0]), tmp_path / 'x.tar'
    for members, text in (([('1.txt', b'x')], 'no sample in it has an image'),
                          ([('1.png', picture), ('1.jpg', picture)], 'several images: png, jpg'),
                          ([('1.png', picture), ('1.cls', b'1'), ('2.png', picture)], '2 has no label'),
                          ([('1.png', picture), ('1.png', picture)], '1.png occurs twice'),
                          ([('1.png', picture), ('1.json', b'[]')], 'holds no object'),
                          ([('1.png', picture), ('1.json', b'{')], 'cannot be read')):
        assert text in refusal(tar(path, members)), members
    assert 'gunzip' in refusal(tar(tmp_path / 'x.tar.gz', [('1.png', picture)], 'w:gz'))
    assert 'x-2.tar is not there' in refusal(tmp_path / 'x-{2..3}.tar')
    assert 'no files of this pattern' in refusal(tmp_path / 'y*.tar')
    tar(path, [('1.seg.png', picture), ('1.png', encoded(IMAGES[1]))])
    same(open_source(str(path)), IMAGES[1:2], None)
    same(open_source(f'{path}:key=seg.png'), IMAGES[:1], None)
    path.write_bytes(path.read_bytes()[:1600])
    assert 'cannot be read' in refusal(path)


# ----------------------------------------------------------------------------------------------------
# Hugging Face


def hugging_face(**columns):
    datasets = pytest.importorskip('datasets')
    features = datasets.Features({'image': datasets.Image(), 'fine': datasets.ClassLabel(names=list('fedcba')),
                                  **{name: datasets.Value('float32') for name in columns}})
    found = datasets.Dataset.from_dict({'image': [{'bytes': encoded(image), 'path': None} for image in IMAGES], 'fine': CLASSES, **columns})
    return found.cast(features)


def test_parquet_of_datasets(tmp_path):
    """Images and classes are found by their types; a folder's splits by the names of its files."""
    found = hugging_face(sigma=[k / 4 for k in range(7)], sigma_min=[0.5] * 7)
    (tmp_path / 'data').mkdir()
    for k, rows in enumerate((range(4), range(4, 7))):
        found.select(rows).to_parquet(tmp_path / 'data' / f'train-0000{k}-of-00002.parquet', batch_size=3)
    found.select([5]).to_parquet(tmp_path / 'data' / 'test-00000-of-00001.parquet')
    for path in (tmp_path, f'{tmp_path}:split=train'):
        source = open_source(str(path))
        same(source)
        assert source.sigmas == [k / 4 for k in range(7)] and source.sigma_min == [0.5] * 7 and source.sigma_max is None
    same_in_a_fork(source)
    same(open_source(f'{tmp_path}:split=test'), IMAGES[5:6], [0])
    same(open_source(f'{tmp_path}/data/train-00001-of-00002.parquet'), IMAGES[4:], CLASSES[4:])
    assert 'split=valid: it has the splits test, train' in refusal(f'{tmp_path}:split=valid').replace('train, test', 'test, train')
    dataset = convert(tmp_path, tmp_path / 'x.zip')
    assert dataset.classes.tolist() == CLASSES and dataset.native_sigma.tolist() == [k / 4 for k in range(7)]


def test_plain_parquet_without_datasets(tmp_path, monkeypatch):
    """Of binary columns, or of structs with bytes in them; rows in any order, over groups of rows; names as classes."""
    pytest.importorskip('pyarrow')
    import pyarrow.parquet
    monkeypatch.setitem(sys.modules, 'datasets', None)
    images = np.random.default_rng(1).integers(0, 256, (100, 8, 8), np.uint8)
    names = [f'class {k % 3}' for k in range(100)]
    values = [encoded(image) for image in images]
    for column in (values, [{'bytes': value, 'path': 'x.png'} for value in values]):
        pyarrow.parquet.write_table(pyarrow.table({'img': column, 'label': names}), tmp_path / 'x.parquet', row_group_size=33)
        source = open_source(str(tmp_path / 'x.parquet'))
        assert source.labels == names
        for k in (0, 99, 50, 49, 33, 32, 34, 98, 1, 2, 66, 65):
            assert (source.read(k)[0] == images[k]).all()
    assert 'hf:a/b needs datasets: pip install datasets' in refusal('hf:a/b')
    assert 'no column "x"; it has img, label' in refusal(f'{tmp_path}/x.parquet:key=x')
    pyarrow.parquet.write_table(pyarrow.table({'a': values, 'b': values}), tmp_path / 'x.parquet')
    assert 'several columns of images: a, b; give key= one of them' in refusal(tmp_path / 'x.parquet')
    same(open_source(f'{tmp_path}/x.parquet:key=b'), images[..., None], None)
    pyarrow.parquet.write_table(pyarrow.table({'a': [{'bytes': None, 'path': '/etc/passwd'}]}, pyarrow.schema([(
        'a', pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())]))])), tmp_path / 'x.parquet')
    with pytest.raises(ValueError, match='the path of a picture'):
        open_source(str(tmp_path / 'x.parquet')).read(0)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    assert 'needs pyarrow: pip install pyarrow' in refusal(tmp_path / 'x.parquet')


def test_folders_of_save_to_disk(tmp_path):
    datasets = pytest.importorskip('datasets')
    found = hugging_face()
    found.save_to_disk(tmp_path / 'one')
    datasets.DatasetDict({'train': found, 'test': found.select([2])}).save_to_disk(tmp_path / 'two')
    same(open_source(str(tmp_path / 'one')))
    same(open_source(str(tmp_path / 'two')))
    same(open_source(f'{tmp_path}/two:split=test'), IMAGES[2:3], [4])
    source = open_source(f'{tmp_path}/two/train')
    same_in_a_fork(source)
    assert 'give split= one of them' in refusal(f'{tmp_path}/two:split=valid')


def test_names_on_the_hub(tmp_path, monkeypatch):
    """What is asked of datasets, and no more: nothing that would allow a data set's own code."""
    datasets = pytest.importorskip('datasets')
    found, asked = hugging_face(), []

    def load(*args, **options):
        asked.append((args, options))
        if 'missing' in args[0]:
            raise FileNotFoundError("Dataset 'owner/missing' doesn't exist on the Hub\nor cannot be accessed")
        return datasets.DatasetDict({'train': found, 'test': found.select([2])})

    monkeypatch.setattr(datasets, 'load_dataset', load)
    same(open_source('hf:owner/name:config=plain'))
    same(open_source('hf:owner/name:split=test'), IMAGES[2:3], [4])
    assert {args for args, _ in asked} == {('owner/name', 'plain'), ('owner/name', None)} and not any(options for _, options in asked)
    assert 'doesn\'t exist on the Hub' in refusal('hf:owner/missing')


def test_whatever_is_there_nothing_raises(tmp_path):
    """Every entry is asked of every path, so that none may fail for what it does not know."""
    (tmp_path / 'junk.tar').write_bytes(b'junk' * 200)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'loop').symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / 'junk.tar', tmp_path / 'empty', tmp_path / 'none', 'digits', '', 'x' * 9999,
                 'hf:', '{', '[*', '/dev/null', 'x\0y'):
        for piece in SOURCES.values():
            assert piece.matches(str(path)) in (True, False)
    assert containers._braces('a{08..11}{x,y}') == [f'a{k}{c}' for k in ('08', '09', '10', '11') for c in 'xy']
    assert json.dumps(os.listdir(tmp_path / 'empty')) == '[]'
