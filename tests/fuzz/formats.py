# SPDX-License-Identifier: Apache-2.0
"""Attacks on the sources of other programs' formats: files that their own libraries made, changed at random, and converted."""

import contextlib
import io
import os
import shutil
import tarfile
import tempfile

import numpy as np
import PIL.Image

from dnnlib import UserError
from tests.fuzz.archives import convert, npy, pixels, png, put
from tests.support import hostile
from tests.support.hostile import pick


def lmdb(folder):
    import lmdb
    with lmdb.open(folder, map_size=2 ** 22) as env, env.begin(write=True) as made:
        for k in range(24):
            made.put(b'%04d' % k, [png(pixels(k)), npy(pixels(k, (3, 8, 8))), png(pixels(k, (64, 64, 3)))][k % 3])
    with open(os.path.join(folder, 'data.mdb'), 'rb') as f:
        return 'x.lmdb', f.read()


def webdataset(folder):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode='w', format=tarfile.PAX_FORMAT) as archive:
        for k in range(5):
            for name, data in ((f'{k}.png', png(pixels(k))), (f'{k}.cls', b'%d' % k), (f'{k}.json', b'{"sigma": 0.5}')):
                info = tarfile.TarInfo(name)
                info.size, info.pax_headers = len(data), {'comment': 'text'} if k % 2 else {}
                archive.addfile(info, io.BytesIO(data))
    return 'x.tar', made.getvalue()


def parquet(folder):
    import pyarrow
    import pyarrow.parquet
    path = os.path.join(folder, 'x.parquet')
    table = pyarrow.table({'image': [{'bytes': png(pixels(k)), 'path': None} for k in range(20)], 'label': [k % 3 for k in range(20)],
                           'sigma': [0.5] * 20})
    pyarrow.parquet.write_table(table, path, row_group_size=8, compression='snappy')
    return _bytes_of(path)


def hdf5(folder):
    import h5py
    path = os.path.join(folder, 'x.h5')
    with h5py.File(path, 'w') as file:
        file.create_dataset('images', data=pixels(0, (6, 3, 8, 8)), chunks=(2, 3, 8, 8), compression='gzip')
        file['labels'], file['sigma'] = np.arange(6), np.full(6, 0.5)
    return _bytes_of(path)


def tiff(folder, shape=(4, 8, 8), **options):
    import tifffile
    path = os.path.join(folder, 'x.tif')
    tifffile.imwrite(path, pixels(0, shape).astype(np.uint16), **{'photometric': 'minisblack', **options})
    return _bytes_of(path)


def packed_tiff(folder):
    return tiff(folder, compression='zlib')


def colour_tiff(folder):
    return tiff(folder, (3, 8, 8, 3), photometric='rgb', metadata=None)


def fits(folder):
    from astropy.io import fits
    path = os.path.join(folder, 'x.fits')
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(pixels(0, (4, 8, 8)).astype(np.uint16))]).writeto(path)
    return _bytes_of(path)


def dicom(folder):
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = '1.2.3'
    made = FileDataset('x', {}, file_meta=meta, preamble=bytes(128))
    made.SamplesPerPixel, made.PhotometricInterpretation, made.Rows, made.Columns, made.NumberOfFrames = 1, 'MONOCHROME2', 8, 8, 3
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.RescaleSlope, made.RescaleIntercept = '2', '-1024'
    made.PixelData = pixels(0, (3, 8, 8)).astype(np.uint16).tobytes()
    made.save_as(os.path.join(folder, 'x.dcm'), enforce_file_format=True)
    return _bytes_of(os.path.join(folder, 'x.dcm'))


def nifti(folder):
    return _nifti(folder, 'x.nii')


def packed_nifti(folder):
    return _nifti(folder, 'x.nii.gz')


def _nifti(folder, name):
    import nibabel
    image = nibabel.Nifti1Image(pixels(0, (8, 8, 4)).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, os.path.join(folder, name))
    return _bytes_of(os.path.join(folder, name))


def _bytes_of(path):
    with open(path, 'rb') as f:
        return os.path.basename(path), f.read()


def attack(make):
    """An attack on files of a format. make(folder) -> (name, bytes) of a good one."""
    def begin(folder):
        PIL.Image.init()
        with tempfile.TemporaryDirectory() as other:
            name, data = make(other)
        for seed in range(6):  # with each of the flags
            with contextlib.suppress(UserError):
                convert(put(data, hostile.scratch(folder), name), _Turn(seed))

        def one(draws):
            shutil.rmtree(folder)
            os.makedirs(folder)
            size = len(data) if draws.integers(2) else min(len(data), 2048)  # heads are short, and say most
            path = put(hostile.mutate(data[:size], draws) + data[size:], folder, name)
            return lambda: convert(path, draws)
        return one
    return begin


class _Turn:
    """Draws that take each choice in turn."""

    def __init__(self, number):
        self._number = number

    def integers(self, most):
        return self._number % most


def table_folder(folder):
    """An attack on folders of datasets' save_to_disk."""
    import datasets
    table = {'image': [{'bytes': png(pixels(k)), 'path': None} for k in range(6)], 'label': list(range(6))}
    good = os.path.join(tempfile.mkdtemp(dir=folder), 'good')
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(table).cast_column('image', datasets.Image()).save_to_disk(good)
    members = {name: _bytes_of(os.path.join(good, name))[1] for name in os.listdir(good)}
    for seed in range(6):
        with contextlib.suppress(UserError):
            convert(good, _Turn(seed))
        shutil.rmtree(os.path.join(os.path.dirname(good), 'out'), ignore_errors=True)

    def one(draws):
        shutil.rmtree(folder)
        path = os.path.join(folder, 'data')
        os.makedirs(path)
        wanted = pick(sorted(members), draws)
        for name, data in members.items():
            put(hostile.mutate(data, draws) if name == wanted else data, path, name)
        return lambda: convert(path, draws)
    return one


# Without tile-compressed FITS (.fz): the decompressor that astropy has writes beyond its memory for some that are damaged.
ATTACKS = {'lmdb': lmdb, 'webdataset': webdataset, 'parquet': parquet, 'hdf5': hdf5, 'tiff': tiff, 'packed_tiff': packed_tiff,
           'colour_tiff': colour_tiff, 'fits': fits, 'dicom': dicom, 'nifti': nifti, 'packed_nifti': packed_nifti}
NEEDS = {'lmdb': 'lmdb', 'parquet': 'pyarrow', 'hdf5': 'h5py', 'tiff': 'tifffile', 'packed_tiff': 'tifffile', 'colour_tiff': 'tifffile',
         'fits': 'astropy', 'dicom': 'pydicom', 'nifti': 'nibabel', 'packed_nifti': 'nibabel', 'table_folder': 'datasets'}
globals().update({f'{name}_files': attack(make) for name, make in ATTACKS.items()})
table_folder_files = table_folder
