# SPDX-License-Identifier: Apache-2.0
"""HDF5, FITS, DICOM and NIfTI, written with their own libraries, come back as physical numbers, bit by bit; what is not so is refused."""

import multiprocessing
import pickle
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import dataset_tool
from dnnlib import UserError
from training.data.convert.sources import find, open_source
from training.data.dataset import ImageDataset

DRAWS = np.random.default_rng(0)
BYTES, DEEP = DRAWS.integers(0, 256, (6, 8, 12), np.uint8), DRAWS.integers(0, 65536, (6, 8, 12)).astype(np.uint16)
FLOATS, SIGNED = DRAWS.normal(300, 70, (6, 8, 12)).astype(np.float32), DRAWS.integers(-1000, 3000, (6, 8, 12)).astype(np.int16)


def same(source, images, labels=None, kind=None):
    """That the source gives these images [N,(C,)H,W] in their values, also where it came as a pickle, and its kinds tell of them."""
    images = images[:, None] if images.ndim == 3 else images
    assert len(source.names) == len(set(source.names)) == len(images) and source.labels == labels
    for one in (source, pickle.loads(pickle.dumps(source))):
        for k in (*range(len(images)), 0):
            read = one.read(k)
            np.testing.assert_array_equal(read, images[k])
            assert read.shape == one.kind(k)[:3] and read.dtype == (np.uint8 if one.kind(k).is_8bit else np.float32)
            assert read.dtype == (np.uint8 if images.dtype == np.uint8 else np.float32)


def read_there(source, index):
    return source.read(index)


def same_in_a_fork(source, images):
    source.read(0)
    with multiprocessing.get_context('fork').Pool(2) as pool:
        found = pool.starmap(read_there, [(source, k % len(images)) for k in range(20)])
    assert all((image == images[k % len(images)]).all() for k, image in enumerate(found))
    assert (source.read(1) == images[1]).all()


def converted(source, dest):
    result = CliRunner().invoke(dataset_tool.main, [f'--source={source}', f'--dest={dest}', '--workers=2'])
    assert result.exit_code == 0, result.output
    return ImageDataset(str(dest))


def refusal(source):
    with pytest.raises(UserError) as caught:
        open_source(str(source))
    assert '\n' not in caught.value.message
    return caught.value.message


def bad(source, index=0):
    """What a source says of an image that it does not read."""
    with pytest.raises((ValueError, OSError, KeyError)) as caught:
        source.read(index)
    return str(caught.value)


@pytest.mark.parametrize('name, module, package', [('x.h5', 'h5py', 'h5py'), ('x.tif', 'tifffile', 'tifffile'),
                                                   ('x.dcm', 'pydicom', 'pydicom'),
                                                   ('x.fits', 'astropy.io.fits', 'astropy'), ('x.nii.gz', 'nibabel', 'nibabel')])
def test_packages_that_are_missing_are_named(tmp_path, monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b'x')
    assert refusal(tmp_path / name) == f'--source={tmp_path / name} needs {package}: pip install {package}'


# ----------------------------------------------------------------------------------------------------
# HDF5


@pytest.mark.parametrize('images, layout, chunks', [(BYTES, 'nhw', None), (DEEP, 'nhw', 4), (np.stack([BYTES] * 3, -1), 'nhwc', 1),
                                                    (np.stack([FLOATS] * 5, 1), 'nchw', 4)])
def test_hdf5(tmp_path, images, layout, chunks):
    h5py = pytest.importorskip('h5py')
    packed = {} if chunks is None else dict(chunks=(chunks, *images.shape[1:]), compression='gzip')
    with h5py.File(tmp_path / 'x.h5', 'w') as file:
        file.create_dataset('data/x', data=images, **packed)
        file['data/y'], file['data/sigma'], file['data/sigma_min'] = np.arange(6)[:, None], np.arange(6) / 4, np.ones(6)
        file['notes'] = np.zeros([6, 2])
    want = images[:, None] if layout == 'nhw' else images.transpose(0, 3, 1, 2) if layout == 'nhwc' else images
    source = open_source(str(tmp_path / 'x.h5'))
    same(source, want, list(range(6)))
    assert source.sigmas == [k / 4 for k in range(6)] and source.sigma_min == [1.0] * 6 and source.sigma_max is None
    if chunks == 4:
        same_in_a_fork(source, want)
        dataset = converted(tmp_path / 'x.h5', tmp_path / 'x.zip')
        assert all((dataset.decode(k) == want[k]).all() for k in range(6))
    assert (open_source(f'{tmp_path}/x.h5:layout={layout}').read(5) == want[5]).all()


def test_hdf5_of_several_data_sets(tmp_path):
    h5py = pytest.importorskip('h5py')
    with h5py.File(tmp_path / 'x.h5', 'w') as file:
        file['train/x'], file['train/labels'], file['test/x'] = BYTES, ['b', 'a', 'b', 'b', 'a', 'b'], FLOATS[:3]
        file['test/onehot'], file['test/wrong'] = np.eye(3, dtype=np.float32), np.arange(4)
    assert 'test/x float32 [3, 8, 12]; train/x uint8 [6, 8, 12]; give key= one of them' in refusal(tmp_path / 'x.h5')
    same(open_source(f'{tmp_path}/x.h5:key=train/x'), BYTES, list('babbab'))
    same(open_source(f'{tmp_path}/x.h5:key=test/x,label_key=test/onehot'), FLOATS[:3], np.eye(3).tolist())
    assert '3 images, but test/wrong is of shape [4]' in refusal(f'{tmp_path}/x.h5:key=test/x,label_key=test/wrong')
    assert 'no data set "valid/x"' in refusal(f'{tmp_path}/x.h5:key=valid/x')
    assert 'int64 of shape [4]; expected numbers' in refusal(f'{tmp_path}/x.h5:key=test/wrong')
    assert 'layout=hwc is unknown; choose from' in refusal(f'{tmp_path}/x.h5:key=test/x,layout=hwc')
    with h5py.File(tmp_path / 'y', 'w') as file:
        file['images'], file['masks'] = BYTES, BYTES
    assert find(str(tmp_path / 'y')) == 'hdf5'
    same(open_source(str(tmp_path / 'y')), BYTES)


def test_hdf5_that_is_refused(tmp_path):
    """Values that are not there, or not in the file, or not finite."""
    h5py, path = pytest.importorskip('h5py'), tmp_path / 'x.h5'
    for make, text in (
            (lambda file: file.create_dataset('x', (10 ** 9, 64, 64), 'u1', chunks=(1, 64, 64)), 'bytes of values, but only 0 are stored'),
            (lambda file: file.create_dataset('x', (2, 40_000, 40_000), 'u1', chunks=(1, 40_000, 40_000)),
             'has chunks of 1600000000 bytes'),
            (lambda file: file.create_dataset('x', (1, 8, 8), 'u1', external=[('/etc/passwd', 0, 64)]), 'is stored in another file'),
            (lambda file: file.create_dataset('x', (0, 8, 8), 'u1'), 'no data set of numbers'),
            (lambda file: file.create_dataset('x', data=np.zeros([3, 8, 8], bool)), 'no data set of numbers'),
            (lambda file: file.create_dataset('x', data=np.zeros([2, 3, 8, 3])), 'give --layout=nhwc or --layout=nchw')):
        with h5py.File(path, 'w') as file:
            make(file)
        assert text in refusal(path)
    path.write_bytes(path.read_bytes()[:900])
    assert 'cannot be read' in refusal(path)
    images = FLOATS.copy()
    images[2, 3, :5], images[2, 4, 0] = np.nan, np.inf
    with h5py.File(path, 'w') as file:
        file['x'] = images
    source = open_source(str(path))
    assert '6 of its 96 values are not finite' in bad(source, 2) and (source.read(3)[0] == images[3]).all()
    result = CliRunner().invoke(dataset_tool.main, [f'--source={path}', f'--dest={tmp_path}/x.zip', '--workers=1'])
    assert result.exit_code == 1 and '2: cannot be read (6 of its 96 values are not finite' in result.output


# ----------------------------------------------------------------------------------------------------
# FITS


@pytest.mark.parametrize('images, name', [(BYTES, 'x.fits'), (DEEP, 'x.fits'), (FLOATS, 'x.fit'), (SIGNED, 'x.fits.gz'),
                                          (FLOATS.astype('f8'), 'x.fts')])
def test_fits(tmp_path, images, name):
    fits = pytest.importorskip('astropy.io.fits')
    fits.PrimaryHDU(images).writeto(tmp_path / name)
    source = open_source(str(tmp_path / name))
    assert source.names[5] == f'{name}[5]'
    same(source, images)
    same(open_source(f'{tmp_path}/{name}:axis=channels'), images[None])
    if name == 'x.fits.gz':
        same_in_a_fork(source, images[:, None])
        assert converted(tmp_path / name, tmp_path / 'x.zip').image_shape == (1, 8, 12)


def test_fits_scale_and_blanks(tmp_path):
    """BSCALE and BZERO are applied; blank and missing values are counted, and refused."""
    fits = pytest.importorskip('astropy.io.fits')
    for image, blank in ((SIGNED[0], None), (SIGNED[1], int(SIGNED[1, 2, 3]))):
        hdu = fits.PrimaryHDU(image)
        hdu.writeto(tmp_path / 'x.fits', overwrite=True)
        with fits.open(tmp_path / 'x.fits', mode='update', do_not_scale_image_data=True) as file:
            file[0].header['BSCALE'], file[0].header['BZERO'] = 0.5, 10.0
            if blank is not None:
                file[0].header['BLANK'] = blank
        source = open_source(str(tmp_path / 'x.fits'))
        assert source.names == ['x.fits'] and not source.kind(0).is_8bit
        if blank is None:
            np.testing.assert_array_equal(source.read(0)[0], image * 0.5 + 10)
        else:
            assert f'{np.sum(image == blank)} of its 96 values are not finite' in bad(source)


def test_fits_of_several_hdus(tmp_path):
    fits = pytest.importorskip('astropy.io.fits')
    table = fits.BinTableHDU.from_columns([fits.Column('x', 'J', array=[1, 2])])
    hdus = fits.ImageHDU(FLOATS[0], name='SCI'), fits.ImageHDU(SIGNED[1], name='DQ')
    fits.HDUList([fits.PrimaryHDU(), *hdus, table]).writeto(tmp_path / 'x.fits')
    assert '1 SCI [8, 12], 2 DQ [8, 12]; give hdu= one of them' in refusal(tmp_path / 'x.fits')
    same(open_source(f'{tmp_path}/x.fits:hdu=SCI'), FLOATS[:1])
    same(open_source(f'{tmp_path}/x.fits:hdu=2'), SIGNED[1:2])
    assert 'hdu=9: it has 0 PRIMARY, 1 SCI, 2 DQ, 3' in refusal(f'{tmp_path}/x.fits:hdu=9')
    assert 'hdu=3 holds no image' in refusal(f'{tmp_path}/x.fits:hdu=3')
    fits.CompImageHDU(SIGNED[0]).writeto(tmp_path / 'y.fits.fz')
    same(open_source(str(tmp_path / 'y.fits.fz')), SIGNED[:1])


def test_folders_of_fits_files(tmp_path):
    """Top folders are classes; a damaged file is one bad image among the others, and told of by its name."""
    fits = pytest.importorskip('astropy.io.fits')
    for k, name in enumerate(('spiral/a.fits', 'spiral/b.fits', 'elliptic/a.fits')):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        fits.PrimaryHDU(DEEP[k]).writeto(tmp_path / 'in' / name)
    (tmp_path / 'in' / 'readme.txt').write_text('x')
    source = open_source(str(tmp_path / 'in'))
    assert find(str(tmp_path / 'in')) == 'fits' and source.names == ['elliptic/a.fits', 'spiral/a.fits', 'spiral/b.fits']
    same(source, DEEP[[2, 0, 1]], ['elliptic', 'spiral', 'spiral'])
    whole = (tmp_path / 'in' / 'spiral' / 'a.fits').read_bytes()
    for data in (whole[:2900], b'junk', b''):
        (tmp_path / 'in' / 'spiral' / 'a.fits').write_bytes(data)
        args = f'--source={tmp_path}/in', f'--dest={tmp_path}/x{len(data)}.zip', '--workers=1', '--on-bad=skip'
        result = CliRunner().invoke(dataset_tool.main, args)
        assert result.exit_code == 0 and 'spiral/a.fits: cannot be read (' in result.output and 'Left out 1 of 3' in result.output
        assert 'cannot be read' in refusal(tmp_path / 'in' / 'spiral' / 'a.fits')
    assert 'none of its 3 files; elliptic/a.fits: hdu=SCI: it has 0 PRIMARY' in refusal(f'{tmp_path}/in:hdu=SCI')


# ----------------------------------------------------------------------------------------------------
# DICOM


def dicom(path, pixels, **tags):
    """Writes pixels [H,W], [F,H,W] or, with SamplesPerPixel=3, [H,W,3]."""
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import FileDataset, FileMetaDataset
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    made = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, 'MONOCHROME2'
    colours = tags.get('SamplesPerPixel', 1) > 1
    made.Rows, made.Columns = pixels.shape[-3:-1] if colours else pixels.shape[-2:]
    made.BitsAllocated = made.BitsStored = 8 * pixels.itemsize
    made.PixelRepresentation = int(pixels.dtype.kind == 'i')
    if pixels.ndim == 3 and not colours:
        made.NumberOfFrames = len(pixels)
    for key, value in tags.items():
        setattr(made, key, value)
    made.HighBit = made.BitsStored - 1
    made.PixelData = pixels.tobytes()
    made.save_as(path, enforce_file_format=True)
    return path


def test_dicom(tmp_path):
    """8, 12 and 16 bits, with and without signs, frames, colours; rescaled, and white first."""
    for pixels, tags, want in (
            (BYTES[0], {}, BYTES[:1]), (DEEP[0], {}, DEEP[:1]), (SIGNED[0], {}, SIGNED[:1]), (BYTES, {}, BYTES), (DEEP, {}, DEEP),
            (DEEP[0] >> 4, {'BitsStored': 12}, DEEP[:1] >> 4),
            (DEEP[0] >> 4, {'BitsStored': 12, 'RescaleSlope': '2', 'RescaleIntercept': '-1024'}, (DEEP[:1] >> 4) * 2.0 - 1024),
            (BYTES[0], {'RescaleSlope': '1', 'RescaleIntercept': '0'}, BYTES[:1]),
            (BYTES[0], {'PhotometricInterpretation': 'MONOCHROME1'}, 255 - BYTES[:1]),
            (DEEP[0] >> 4, {'BitsStored': 12, 'PhotometricInterpretation': 'MONOCHROME1'}, 4095 - (DEEP[:1] >> 4)),
            (np.stack([BYTES[0]] * 3, -1) + np.arange(3, dtype=np.uint8),
             {'SamplesPerPixel': 3, 'PlanarConfiguration': 0, 'PhotometricInterpretation': 'RGB'},
             (BYTES[0] + np.arange(3, dtype=np.uint8)[:, None, None])[None])):
        source = open_source(str(dicom(tmp_path / 'x.dcm', pixels, **tags)))
        same(source, np.asarray(want))
    same_in_a_fork(open_source(str(dicom(tmp_path / 'x', BYTES))), BYTES[:, None])


def test_dicom_scales_of_frames(tmp_path):
    pytest.importorskip('pydicom')
    from pydicom.dataset import Dataset
    groups = []
    for k in range(6):
        scale, group = Dataset(), Dataset()
        scale.RescaleSlope, scale.RescaleIntercept = str(k + 1), str(-k)
        group.PixelValueTransformationSequence = [scale]
        groups.append(group)
    source = open_source(str(dicom(tmp_path / 'x.dcm', SIGNED, PerFrameFunctionalGroupsSequence=groups)))
    same(source, np.stack([SIGNED[k] * (k + 1.0) - k for k in range(6)]))


def test_dicom_folders_and_refusals(tmp_path):
    pydicom = pytest.importorskip('pydicom')
    for name, k in (('b/2', 1), ('b/10', 0), ('a/x.dcm', 2)):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        dicom(tmp_path / 'in' / name, DEEP[k])
    source = open_source(str(tmp_path / 'in'))
    assert find(str(tmp_path / 'in')) == 'dicom' and source.names == ['a/x.dcm', 'b/10', 'b/2']
    same(source, DEEP[[2, 0, 1]], ['a', 'b', 'b'])
    path = tmp_path / 'x.dcm'
    for tags, text in (({'PhotometricInterpretation': 'PALETTE COLOR'}, 'PALETTE COLOR; save it in grey or RGB'),
                       ({'PhotometricInterpretation': 'MONOCHROME1', 'RescaleSlope': '2', 'RescaleIntercept': '0'}, 'which way they go'),
                       ({'ModalityLUTSequence': [pydicom.Dataset()]}, 'go through a table')):
        assert text in bad(open_source(str(dicom(path, DEEP[0], **tags))))
    assert 'it claims 1 frames and 2000000 bytes' in refusal(dicom(path, DEEP[0], Rows=1000, Columns=1000))
    assert 'it claims 99999' in refusal(dicom(path, DEEP[0], NumberOfFrames=99999))
    path.write_bytes(b'x' * 500)
    assert 'cannot be read' in refusal(path)
    made = pydicom.dcmread(dicom(path, BYTES[0]))
    made.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    made.PixelData = pydicom.encaps.encapsulate([b'\xff\xd8junk'])
    made['PixelData'].is_undefined_length = True
    made.save_as(path)
    assert 'needs a decoder: pip install "pylibjpeg[all]"' in bad(open_source(str(path)))


# ----------------------------------------------------------------------------------------------------
# NIfTI


@pytest.mark.parametrize('name', ['x.nii', 'x.nii.gz'])
def test_nifti(tmp_path, name):
    """Slices along each axis; scl_slope and scl_inter applied; 8 bits stay what they are."""
    nibabel = pytest.importorskip('nibabel')
    for volume in (BYTES, DEEP, SIGNED, FLOATS):
        image = nibabel.Nifti1Image(volume, np.eye(4))
        image.to_filename(tmp_path / name)
        for axis in range(3):
            source = open_source(f'{tmp_path / name}:axis={axis}')
            same(source, np.moveaxis(volume, axis, 0))
        same(open_source(str(tmp_path / name)), np.moveaxis(volume, 2, 0))
    same_in_a_fork(source, np.moveaxis(volume, 2, 0)[:, None])
    image = nibabel.Nifti1Image(SIGNED, np.eye(4))
    image.header.set_slope_inter(0.5, 7)
    nibabel.save(image, tmp_path / name)
    stored = np.asanyarray(nibabel.load(tmp_path / name).dataobj.get_unscaled())
    same(open_source(f'{tmp_path / name}:axis=0'), stored * 0.5 + 7.0)


def test_nifti_volumes_and_refusals(tmp_path):
    nibabel = pytest.importorskip('nibabel')
    path = tmp_path / 'x.nii.gz'
    nibabel.Nifti1Image(np.stack([SIGNED, SIGNED + 1], -1), np.eye(4)).to_filename(path)
    assert 'it has 2 volumes along its fourth axis; give volume=0 or another up to 1' in refusal(path)
    same(open_source(f'{path}:volume=1,axis=0'), SIGNED + 1)
    nibabel.Nifti1Image(SIGNED[..., None], np.eye(4)).to_filename(path)
    same(open_source(f'{path}:axis=0'), SIGNED)
    assert 'axis=3; choose 0, 1 or 2' in refusal(f'{path}:axis=3')
    volume = FLOATS.copy()
    volume[1, 2, 3] = np.nan
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / 'y.nii')
    source = open_source(f'{tmp_path}/y.nii:axis=0')
    assert '1 of its 96 values are not finite' in bad(source, 1) and (source.read(0)[0] == volume[0]).all()
    data = (tmp_path / 'y.nii').read_bytes()
    for damaged in (data[:1000], data[:200], b'', data[:46] + b'\0\0' + data[48:],
                    data[:40] + b'\x03\0\xff\x7f\xff\x7f\xff\x7f' + data[48:]):
        (tmp_path / 'z.nii').write_bytes(damaged)
        assert 'cannot be read' in refusal(tmp_path / 'z.nii')
    (tmp_path / 'in').mkdir()
    for k in range(2):
        nibabel.Nifti1Image(BYTES[:3] + np.uint8(k), np.eye(4)).to_filename(tmp_path / 'in' / f'{k}.nii.gz')
    source = open_source(f'{tmp_path}/in:axis=0')
    assert find(str(tmp_path / 'in')) == 'nifti' and source.names[4] == '1.nii.gz[1]'
    same(source, np.concatenate([BYTES[:3], BYTES[:3] + np.uint8(1)]))
