# SPDX-License-Identifier: Apache-2.0
"""What the commands of README.md and docs/ read: a few small images in every format and under every name that the pages give them."""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (6, 36, 40, 3), np.uint8)
BATCHES = [*(f'data_batch_{k}' for k in range(1, 6)), 'test_batch']
FOLDERS = ('clean', 'noisy', 'images', 'blurred', 'crops', 'scans', 'imagenet/train/n01', 'imagenet/train/n02',
           'out', 'digits')


def png(image):
    held = io.BytesIO()
    Image.fromarray(image).save(held, 'png')
    return held.getvalue()


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def pictures(folder, photos=('photos',)):
    """Folders of photographs; one of a size that is cut into tiles. photos: those of README are in folders of classes."""
    for name in (*photos, *FOLDERS):
        (folder / name).mkdir(parents=True)
        for k in range(4):
            (folder / name / f'{k}.png').write_bytes(png(PICTURES[k, ..., 0] if name == 'digits' else PICTURES[k]))
    (folder / 'slides').mkdir()
    (folder / 'slides' / '0.png').write_bytes(png(RNG.integers(0, 256, (600, 600, 3), np.uint8)))
    for k in range(4):
        (folder / 'out' / f'{k}.png').unlink()
    for seed in range(8):
        (folder / 'out' / f'{seed:06d}.png').write_bytes(png(RNG.integers(0, 256, (16, 16, 3), np.uint8)))


def published_sets(folder):
    """CIFAR-10, CIFAR-100, MNIST and MedMNIST as published, with 8 images per file."""
    data = RNG.integers(0, 256, (8, 3072), np.uint8)
    batch = pickle.dumps({'data': data, 'labels': list(range(8))}, 2)
    with tarfile.open(folder / 'cifar-10-python.tar.gz', 'w:gz') as archive:
        for name in BATCHES:
            add(archive, f'cifar-10-batches-py/{name}', batch)
    with tarfile.open(folder / 'cifar-100-python.tar.gz', 'w:gz') as archive:
        for name in ('train', 'test'):
            labels = {'fine_labels': list(range(8)), 'coarse_labels': list(range(8))}
            add(archive, f'cifar-100-python/{name}', pickle.dumps({'data': data, **labels}, 2))
    (folder / 'mnist').mkdir()
    for part in ('train', 't10k'):
        for name, array in (('images-idx3', data[:, :784].reshape(8, 28, 28)), ('labels-idx1', np.arange(8, dtype=np.uint8))):
            head = struct.pack('>HBB', 0, 8, array.ndim) + struct.pack(f'>{array.ndim}I', *array.shape)
            (folder / 'mnist' / f'{part}-{name}-ubyte.gz').write_bytes(gzip.compress(head + array.tobytes()))
    parts = {f'{part}_{kind}': array for part in ('train', 'val', 'test')
             for kind, array in (('images', data[:, :784].reshape(8, 28, 28)), ('labels', np.arange(8)[:, None]))}
    np.savez(folder / 'pathmnist.npz', **parts)


def containers(folder):
    """LMDB, shards of WebDataset, HDF5, Parquet."""
    import h5py
    import lmdb
    import pyarrow
    import pyarrow.parquet
    with lmdb.open(str(folder / 'bedroom_train_lmdb'), map_size=2 ** 24) as env, env.begin(write=True) as made:
        for k, picture in enumerate(np.tile(PICTURES, (1, 2, 2, 1))):
            made.put(b'%06d' % k, png(picture))
    (folder / 'shards').mkdir()
    for k in range(147):
        with tarfile.open(folder / 'shards' / f'train-{k:03d}.tar', 'w') as archive:
            add(archive, f'{k:06d}.png', png(PICTURES[k % 6]))
            add(archive, f'{k:06d}.cls', b'%d' % (k % 3))
    with h5py.File(folder / 'patches.h5', 'w') as file:
        file['train/x'] = RNG.integers(0, 256, (6, 16, 16, 3), np.uint8)
    (folder / 'downloads' / 'cifar10').mkdir(parents=True)
    for part in ('train', 'test'):
        column = [{'bytes': png(picture), 'path': None} for picture in PICTURES]
        kind = pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())])
        table = pyarrow.table({'img': pyarrow.array(column, kind), 'label': list(range(6))})
        pyarrow.parquet.write_table(table, folder / 'downloads' / 'cifar10' / f'{part}-00000-of-00001.parquet')


def scientific(folder):
    """A stack of TIFF, FITS, DICOM, NIfTI, and fields of two channels, with values such as those sources have."""
    import nibabel
    import pydicom
    import tifffile
    from astropy.io import fits
    stack = RNG.integers(0, 256, (4, 16, 16), np.uint8)
    tifffile.imwrite(folder / 'stack.ome.tif', stack, photometric='minisblack', metadata={'axes': 'ZYX'})
    for name in ('galaxies', 'ct', 'brains'):
        (folder / name).mkdir()
    sky = fits.ImageHDU(RNG.uniform(0, 100, (16, 16)).astype(np.float32), name='SCI')
    fits.HDUList([fits.PrimaryHDU(), sky]).writeto(folder / 'galaxies' / 'a.fits')
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID, image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, '1.2.3'
    image.SOPClassUID, image.SOPInstanceUID = pydicom.uid.CTImageStorage, '1.2.3'
    image.Rows, image.Columns, image.SamplesPerPixel, image.PhotometricInterpretation = 16, 16, 1, 'MONOCHROME2'
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.RescaleSlope, image.RescaleIntercept = 1, -1000
    image.PixelData = RNG.integers(0, 2000, (16, 16)).astype(np.int16).tobytes()
    image.save_as(folder / 'ct' / 'a.dcm', enforce_file_format=True)
    volume = RNG.normal(0, 1, (16, 8, 16)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / 'brains' / 'a.nii.gz')
    fields = RNG.normal(0, 1, (6, 2, 16, 16)).astype(np.float32)
    np.save(folder / 'weather.npy', fields * np.float32([24, 2e3])[:, None, None] + np.float32([280, 1e5])[:, None, None])


def write_zip(path, height, width, channels=3, count=16):
    """A converted data set with three classes."""
    names = [f'00000/img{k:08d}.png' for k in range(count)]
    with zipfile.ZipFile(path, 'w') as archive:
        for name in names:
            archive.writestr(name, png(np.squeeze(RNG.integers(0, 256, (height, width, channels), np.uint8))))
        archive.writestr('dataset.json', json.dumps({'labels': [[name, k % 3] for k, name in enumerate(names)]}))


def converted(folder):
    """Data sets that another page, or the reader, has made."""
    (folder / 'docs' / 'figures').mkdir(parents=True)
    for name in ('cifar', 'cifar-test', 'data'):
        write_zip(folder / f'{name}.zip', 16, 16)
    write_zip(folder / 'dogs.zip', 36, 40)
    write_zip(folder / 'digits.zip', 8, 8, channels=1)
    write_zip(folder / 'imagenet64.zip', 64, 64, count=4)
    for name in ('clean', 'blurred'):
        write_zip(folder / f'{name}.zip', 8, 8, count=30)
