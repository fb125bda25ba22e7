# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py --stabilise: what is stored, levels and units, clean images, warnings, and what is refused."""

import json
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.test_dataset_tool import convert, picture_folder, pictures, refusal, run
from training.data.convert.stabilising import from_line
from training.data.dataset import ImageDataset
from training.estimation.stabilise import Anscombe, Generalised

RNG = np.random.default_rng(0)
RECORD = {'a': 1.0, 'b': 0.0, 'offset': 0.0}


def counts(mean=20.0, count=6, side=8, dtype=np.uint16):
    return RNG.poisson(mean, (count, side, side)).astype(dtype)


def save(path, array):
    np.save(path, array)
    return path


def stored(path):
    dataset = ImageDataset(path)
    return np.stack([dataset.decode(i) for i in range(len(dataset))]), dataset


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_whole_numbers_and_floats_are_stored_as_square_roots(tmp_path, dtype):
    values = counts(dtype=dtype)
    said = convert(save(tmp_path / 'x.npy', values), tmp_path / 'x.zip', '--stabilise=anscombe', '--sheet=none')
    found, dataset = stored(tmp_path / 'x.zip')
    np.testing.assert_allclose(found[:, 0], 2 * np.sqrt(values + 0.375), rtol=1e-6)
    assert dataset.units['stabilise'] == RECORD and (dataset.native_sigma == 1 / dataset.units['scale']).all()
    assert dataset.units['scale'] == pytest.approx(2 * found.std(), rel=1e-5), 'network units have mean 0 and std 0.5'
    assert 'stabilised  Anscombe, z = 2 sqrt(y + 3/8); noise of std 1' in said and 'Warning' not in said
    assert f'min {1 / dataset.units["scale"]:.4g}' in run('stats', str(tmp_path / 'x.zip')).output
    assert 'stabilised  Anscombe' in run('stats', str(tmp_path / 'x.zip')).output and run('check', str(tmp_path / 'x.zip')).exit_code == 0


def test_variance_in_the_set_is_that_of_theory(tmp_path):
    """.72, .92, .998 and 1.000 at mean counts of 1, 2, 4 and 10, and 1 up to 100."""
    means = (1, 2, 4, 10, 100)
    values = np.stack([RNG.poisson(mean, (256, 256)) for mean in means]).astype(np.uint16)
    convert(save(tmp_path / 'x.npy', values), tmp_path / 'x.npz', '--stabilise=anscombe', '--sheet=none')
    found, _ = stored(tmp_path / 'x.npz')
    np.testing.assert_allclose(found.var((1, 2, 3)), [0.717, 0.924, 0.998, 1, 1], atol=0.02)


def test_read_noise_gain_and_offset(tmp_path):
    """Values of a camera, some below the offset."""
    values = 2.5 * RNG.poisson(40, (4, 64, 64)) + 100 + RNG.normal(0, 3, (4, 64, 64))
    convert(save(tmp_path / 'x.npy', np.rint(values).astype(np.int32)), tmp_path / 'x.zip', '--stabilise=generalised:a=2.5,b=9,offset=100',
            '--sheet=none', '--units=10,5')
    found, dataset = stored(tmp_path / 'x.zip')
    assert dataset.units == {'offset': 10.0, 'scale': 5.0, 'stabilise': {'a': 2.5, 'b': 9.0, 'offset': 100.0}}
    assert (dataset.native_sigma == 0.2).all() and found.var() == pytest.approx(1, abs=0.03)


def test_tiles_and_formats(tmp_path):
    """TIFF, FITS, HDF5 and tiles of them."""
    values = counts(count=2, side=16)
    expected = np.sort(np.float32(2 * np.sqrt(values + 0.375)).ravel())
    Image.fromarray(values[0]).save(tmp_path / 'x.tif', save_all=True, append_images=[Image.fromarray(values[1])])
    sources = {}
    if _has('tifffile'):
        sources['tif'] = tmp_path / 'x.tif'
    if _has('h5py'):
        import h5py
        with h5py.File(tmp_path / 'x.h5', 'w') as file:
            file['images'] = values
        sources['h5'] = tmp_path / 'x.h5'
    if _has('astropy'):
        from astropy.io import fits
        fits.writeto(tmp_path / 'x.fits', values)
        sources['fits'] = tmp_path / 'x.fits'
    sources['npy'] = save(tmp_path / 'x.npy', values)
    for name, source in sources.items():
        convert(source, tmp_path / f'{name}.zip', '--stabilise=anscombe', '--tile=8', '--sheet=none')
        found, dataset = stored(tmp_path / f'{name}.zip')
        assert found.shape == (8, 1, 8, 8) and dataset.units['stabilise'] == RECORD and (dataset.native_sigma > 0).all()
        np.testing.assert_allclose(np.sort(found.ravel()), expected, rtol=1e-6)


def _has(package):
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def test_clean_images_are_stored_as_means(tmp_path):
    """A clean image of intensity y becomes E[z | y], not the transform of y, and has level 0; either order of the sources."""
    clean = np.full((2, 8, 8), 30.0)
    noisy = save(tmp_path / 'noisy.npy', counts(30, count=3, side=64, dtype=np.float64)[:, :8, :8])
    convert(noisy, tmp_path / 'x.zip', f'--source={save(tmp_path / "clean.npy", clean)}:sigma=0', '--stabilise=anscombe', '--sheet=none')
    found, dataset = stored(tmp_path / 'x.zip')
    assert (dataset.native_sigma > 0).tolist() == [True] * 3 + [False] * 2
    np.testing.assert_allclose(found[3:], Anscombe().expected(np.array([30.0]))[0], rtol=1e-6)
    assert abs(found[3, 0, 0, 0] - Anscombe().forward(np.array(30.0))) > 0.02


def test_sets_keep_their_transform(tmp_path):
    """A stabilised set that is converted again, joined, tiled or given other units stays one."""
    for name, rate in (('a', 20), ('b', 40)):
        convert(save(tmp_path / f'{name}.npy', counts(rate)), tmp_path / f'{name}.zip', '--stabilise=anscombe', '--units=10,8',
                '--sheet=none')
    convert(tmp_path / 'a.zip', tmp_path / 'c.npz', '--sheet=none')
    assert ImageDataset(tmp_path / 'c.npz').units == {'offset': 10.0, 'scale': 8.0, 'stabilise': RECORD}
    for units in ((), ('--units=9,4',)):
        convert(tmp_path / 'a.zip', tmp_path / 'd.zip', f'--source={tmp_path / "b.zip"}', '--tile=4', '--sheet=none', *units)
        found = ImageDataset(tmp_path / 'd.zip')
        assert found.units == {'offset': 9.0 if units else 10.0, 'scale': 4.0 if units else 8.0, 'stabilise': RECORD}
        assert (found.native_sigma == 1 / found.units['scale']).all()


def test_low_counts_are_warned_of(tmp_path):
    said = convert(save(tmp_path / 'x.npy', counts(1.5, count=20)), tmp_path / 'x.zip', '--stabilise=anscombe', '--sheet=none')
    assert 'the mean count is below 4 in 100% of the area' in said and '0.72 at 1' in said and '0.92 at 2' in said
    dim = counts(50, count=10)
    dim[:, :, :4] = RNG.poisson(1, (10, 8, 4))
    said = convert(save(tmp_path / 'x.npy', dim), tmp_path / 'x.zip', '--stabilise=anscombe', '--sheet=none')
    assert 'below 4 in 50% of the area' in said, 'a dark half of bright images'
    read = RNG.poisson(1.5, (20, 8, 8)) + RNG.normal(0, 7, (20, 8, 8))
    said = convert(save(tmp_path / 'x.npy', read), tmp_path / 'x.zip', '--stabilise=generalised:a=1,b=49', '--sheet=none')
    assert 'mean count is below' not in said, 'read noise prevails, and has one level anyway'


def test_values_that_are_no_counts_are_warned_of(tmp_path):
    said = convert(save(tmp_path / 'x.npy', 2.5 * counts(50)), tmp_path / 'x.zip', '--stabilise=anscombe', '--sheet=none')
    assert 'are no whole numbers' in said and 'generalised:a=GAIN' in said
    said = convert(save(tmp_path / 'x.npy', counts(50)), tmp_path / 'x.zip', '--stabilise=generalised:a=1,b=1,offset=49', '--sheet=none')
    assert 'so far below the offset' in said


def test_a_fitted_line():
    assert from_line(2.0, 5.0, 'generalised') == Generalised(2.0, 5.0) and from_line(2.0, -5.0, 'generalised') == Generalised(2.0, 0.0, 2.5)
    with pytest.raises(Exception, match='does not grow with their intensity'):
        from_line(-0.1, 5.0, 'generalised')


def test_gain_and_read_noise_are_estimated(tmp_path):
    """A camera with gain 2.5, read noise of std 6 and an offset of 100, on smooth images: the line is var = 2.5 mean + 36 - 250."""
    pytest.importorskip('training.estimation.signal_dependent')
    x, rng = np.linspace(-0.5, 0.5, 64), np.random.default_rng(1)
    clean = 60 + 40 * np.sin(3 * x[:, None] + rng.uniform(0, 6, (24, 1, 1))) * np.cos(2 * x)
    values = 2.5 * rng.poisson(clean) + 100 + rng.normal(0, 6, clean.shape)
    source = save(tmp_path / 'x.npy', np.rint(values).astype(np.int32))
    said = convert(source, tmp_path / 'x.npz', '--stabilise=generalised', '--sheet=none')
    found = ImageDataset(tmp_path / 'x.npz').units['stabilise']
    assert 'Estimated from 24 images: variance = 2.' in said and found['a'] == pytest.approx(2.5, rel=0.12)
    line = found['b'] - found['a'] * found['offset']
    assert line + found['a'] * 250 == pytest.approx(36 - 250 + 2.5 * 250, rel=0.12), 'the variance at the middle intensity'


def test_without_an_estimate_the_gain_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'training.estimation.signal_dependent', None)
    values = save(tmp_path / 'x.npy', counts())
    told = refusal(f'--source={values}', f'--dest={tmp_path / "y.zip"}', '--stabilise=generalised')
    assert told.endswith('give the gain and the variance of the read noise, generalised:a=..,b=..')


def test_refusals_are_one_line(tmp_path):
    values = save(tmp_path / 'x.npy', counts())
    common = [f'--dest={tmp_path / "y.zip"}', '--workers=1', f'--source={values}']
    for more, word in ((['--stabilise=anscombe', '--sigmas=1'], '--sigmas=1: --stabilise sets the levels itself'),
                       (['--stabilise=anscombe', '--channels=3'], '--channels=3'),
                       (['--stabilise=anscombe', '--resolution=4x4'], '--resolution would make the noise'),
                       (['--stabilise=boxcox'], 'choose from anscombe, generalised'),
                       (['--stabilise=generalised:b=3'], 'give the gain a as well'),
                       (['--stabilise=generalised:a=1,b=-3'], 'offset=-b/a'),
                       (['--stabilise=anscombe:a=1'], 'has no key "a"')):
        assert word in refusal(*common, *more), more
    assert not (tmp_path / 'y.zip').exists()


def test_negative_counts_and_pictures_are_refused(tmp_path):
    dest = f'--dest={tmp_path / "y.zip"}'
    negative = save(tmp_path / 'n.npy', counts(dtype=np.int32) - 30)
    result = run(f'--source={negative}', dest, '--workers=1', '--stabilise=anscombe')
    assert result.exit_code and 'n.npy' not in result.output and 'has counts below 0' in result.output and result.output.count('\n') <= 3
    folder = tmp_path / 'jpeg'
    picture_folder(folder, pictures(3), ['0.jpg', '1.jpg', '2.png'])
    assert '0.jpg is an 8-bit picture, whose values are no counts' in refusal(f'--source={folder}', dest, '--stabilise=anscombe')
    assert not (tmp_path / 'y.zip').exists()


def test_stabilised_sources_are_not_mixed_with_others(tmp_path):
    values = save(tmp_path / 'x.npy', counts(dtype=np.float32))
    convert(values, tmp_path / 'x.zip', '--stabilise=anscombe', '--sheet=none')
    convert(values, tmp_path / 'g.zip', '--stabilise=generalised:a=2,b=1', '--sheet=none')
    dest = f'--dest={tmp_path / "y.zip"}'
    assert 'is stabilised already (Anscombe' in refusal(f'--source={tmp_path / "x.zip"}', dest, '--stabilise=anscombe')
    for other in (values, tmp_path / 'g.zip'):
        for units in ((), ('--units=0,1',)):
            assert 'not stabilised alike' in refusal(f'--source={tmp_path / "x.zip"}', f'--source={other}', dest, *units)
    assert 'has limits of levels' in refusal(f'--source={values}:sigma_min=3', dest, '--stabilise=anscombe')
    with_level = refusal(f'--source={values}:sigma=3', dest, '--stabilise=anscombe')
    assert 'has levels above 0' in with_level and 'sigma=0 for clean images' in with_level


def test_damaged_transform_in_a_set_is_refused(tmp_path):
    convert(save(tmp_path / 'x.npy', counts()), tmp_path / 'x.zip', '--stabilise=anscombe', '--sheet=none')
    with zipfile.ZipFile(tmp_path / 'x.zip') as archive, zipfile.ZipFile(tmp_path / 'y.zip', 'w') as copy:
        for name in archive.namelist():
            data = archive.read(name)
            if name == 'dataset.json':
                meta = json.loads(data)
                meta['units']['stabilise'] = {'a': 0}
                data = json.dumps(meta).encode()
            copy.writestr(name, data)
    assert 'units whose "stabilise" is not' in refusal('stats', str(tmp_path / 'y.zip'))
    assert '"stabilise"' in run('check', str(tmp_path / 'y.zip')).output
