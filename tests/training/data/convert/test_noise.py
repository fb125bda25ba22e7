# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py noise and --sigmas=auto, on small sets whose noise is known."""

import hashlib
import json
import zipfile

import numpy as np
import pytest

from dnnlib import UserError
from tests.support.fields import smooth
from training.data.convert.conversion import convert
from training.data.convert.noise import noise
from training.data.convert.writers import ArchiveWriter, PackedWriter, encode_npy, encode_png
from training.data.dataset import ImageDataset

OPTIONS = {'law': 'gaussian', 'method': 'auto', 'group': 'set',
           **dict.fromkeys(('clean', 'pairs', 'dark', 'plot', 'json', 'write', 'overwrite'))}
CONVERT = {**dict.fromkeys(('split', 'layout', 'max_images', 'part', 'resolution', 'transform', 'tile', 'channels', 'units', 'labels',
                            'captions', 'sigma_min', 'sigma_max', 'stabilise')),
           'sample': 'first', 'on_bad': 'fail', 'overlap': 0, 'packed': False, 'sheet': 'none', 'workers': 1, 'sigmas': 'auto'}
COUNT = 80


def drawn(level, seed=0, count=COUNT, shape=(3, 16, 16)):
    rng = np.random.default_rng(seed)
    return smooth(count, shape) + np.reshape(level, (-1, 1, 1, 1)) * rng.standard_normal((count, *shape))


def put(path, images, meta=None, as_float=False, writer=ArchiveWriter):
    """Writes images in [-1, 1]: 8-bit, or as floats with offset 100 and scale 50."""
    stored = (100 + 50 * images).astype(np.float32) if as_float else np.rint((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    with writer(path) as out:
        for index, image in enumerate(stored):
            out.write(f'{index:04}.' + ('npy' if as_float else 'png'), encode_npy(image) if as_float else encode_png(image))
        out.write_json('dataset.json', {**(meta or {}), **({'units': {'offset': 100.0, 'scale': 50.0}} if as_float else {})})
    return str(path)


def run(path, **options):
    return json.loads(noise({**OPTIONS, 'data': path, 'json': True, **options})[0])


def test_a_level_of_all(tmp_path):
    told = run(put(tmp_path / 'a.zip', drawn(0.2)))
    group, = told['groups']
    assert group['sigma'] == pytest.approx(0.2, rel=0.03) and not group['clean'] and group['correction'] > 1
    assert told['method'] == 'pooled' and told['noisy'] == COUNT and not told['warnings']


def test_groups(tmp_path):
    level = np.where(np.arange(COUNT) % 2, 0.1, 0.3)
    labels = [[f'{i:04}.png', i % 2] for i in range(COUNT)]
    path = put(tmp_path / 'a.zip', drawn(level), {'labels': labels})
    told = run(path, group='class')
    assert [one['group'] for one in told['groups']] == ['class 0', 'class 1']
    assert [one['sigma'] for one in told['groups']] == pytest.approx([0.3, 0.1], rel=0.04)
    table = tmp_path / 'groups.csv'
    table.write_text('file,group\n' + ''.join(f'{i:04}.png,{"even" if i % 2 == 0 else "odd"}\n' for i in range(COUNT)))
    assert [one['group'] for one in run(path, group=str(table))['groups']] == ['even', 'odd']
    assert 'it is not of one level' in run(path)['warnings'][0]
    single = run(path, group='image')
    assert single['method'] == 'immerkaer' and [one['sigma'] for one in single['sigmas']] == pytest.approx(level, rel=0.35)


@pytest.mark.parametrize('writer, name, as_float', [(ArchiveWriter, 'a.zip', False), (ArchiveWriter, 'a.zip', True),
                                                    (ArchiveWriter, 'a', False), (PackedWriter, 'a.npz', True), (PackedWriter, 'a', False)])
def test_write(tmp_path, writer, name, as_float):
    end = 'npy' if as_float else 'png'
    path = put(tmp_path / name, drawn(0.2), {'labels': [[f'{i:04}.{end}', 1] for i in range(COUNT)]}, as_float, writer)
    before = ImageDataset(path)
    images = [before.decode(index) for index in range(COUNT)]
    members = digests(path)
    noise({**OPTIONS, 'data': path, 'write': True})
    after = ImageDataset(path, use_labels=True)
    assert after.native_sigma == pytest.approx(np.full(COUNT, 0.2), rel=0.03)
    assert after.classes.tolist() == [1] * COUNT
    assert all((after.decode(index) == image).all() for index, image in enumerate(images))
    assert {key: value for key, value in digests(path).items() if key != 'dataset.json'} == members
    with pytest.raises(UserError, match='--write: .* has levels already.*--overwrite'):
        noise({**OPTIONS, 'data': path, 'write': True})
    noise({**OPTIONS, 'data': path, 'write': True, 'overwrite': True})
    assert run(path, group='sigmas')['groups'][0]['group'].startswith('stated 0.')


def digests(path):
    """{member: digest} of a zip, without dataset.json and tables."""
    if not path.endswith('.zip'):
        return {}
    with zipfile.ZipFile(path) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist() if name != 'dataset.json'}


def test_the_record_says_how(tmp_path):
    path = put(tmp_path / 'a.zip', drawn(0.2, shape=(1, 32, 32)))
    noise({**OPTIONS, 'data': path, 'write': True})
    record = json.loads(zipfile.ZipFile(path).read('dataset.json'))['noise']
    assert record['method'] == 'pooled' and 0 < record['groups'][0]['uncertainty'] < 0.01


def test_references(tmp_path):
    path = put(tmp_path / 'a.zip', drawn(0.1))
    pairs = run(path, pairs=put(tmp_path / 'b.zip', drawn(0.1, seed=5)))
    assert pairs['method'] == 'pairs' and pairs['groups'][0]['sigma'] == pytest.approx(0.1, rel=0.02) and pairs['spectrum']['white']
    clean = run(path, clean=put(tmp_path / 'c.zip', drawn(0.0, seed=5)))
    assert clean['method'] == 'spectral' and clean['groups'][0]['sigma'] == pytest.approx(0.1, rel=0.05)
    rng = np.random.default_rng(1)
    frames = -0.4 + 0.05 * rng.standard_normal((3, 16, 16)) + 0.1 * rng.standard_normal((30, 3, 16, 16))  # with a fixed pattern
    dark = run(path, dark=put(tmp_path / 'd.zip', frames))
    assert dark['method'] == 'dark' and dark['groups'][0]['sigma'] == pytest.approx(0.1, rel=0.02)


def test_coloured_noise_is_named_and_not_written(tmp_path):
    white = np.random.default_rng(0).standard_normal((2, 200, 1, 32, 32))
    soft = 0.7 * white + 0.15 * (np.roll(white, 1, -1) + np.roll(white, -1, -1))
    path, other = (put(tmp_path / name, 0.5 * smooth(200, (1, 32, 32)) + 0.3 * part, as_float=True) for name, part in
                   zip(('a.zip', 'b.zip'), soft))
    for told in (run(path), run(path, pairs=other)):
        assert not told['spectrum']['white'] and any('not white' in text for text in told['warnings'])
    with pytest.raises(UserError, match='--write: the noise of .* is not white'):
        noise({**OPTIONS, 'data': path, 'pairs': other, 'write': True})


def test_intensity(tmp_path):
    clean = np.broadcast_to(np.linspace(0.05, 1, COUNT)[:, None, None, None], (COUNT, 1, 32, 32))
    counts = np.random.default_rng(0).poisson(40 * clean) / 50 - 2  # stored: 100 + 50 of it, the counts
    told = run(put(tmp_path / 'a.zip', counts, as_float=True))
    assert told['intensity']['depends'] and told['intensity']['stored']['a'] == pytest.approx(1, rel=0.05)
    assert any('--stabilise' in text for text in told['warnings'])


@pytest.mark.slow
def test_plot(tmp_path):
    pytest.importorskip('matplotlib')
    noise({**OPTIONS, 'data': put(tmp_path / 'a.zip', drawn(0.2)), 'plot': str(tmp_path / 'a.png')})
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('options, message', [
    ({'group': 'class'}, '--group=class: .* has no classes'), ({'group': 'sigmas'}, '--group=sigmas: .* has no levels'),
    ({'group': 'nothing'}, '--group=nothing: choose from set, class, image, sigmas, or name a'),
    ({'method': 'pairs'}, '--method=pairs needs --pairs=SET'), ({'method': 'pooled', 'group': 'image'}, 'for groups of images'),
    ({'clean': 'nowhere.zip'}, '--clean=nowhere.zip: no such zip'), ({'plot': 'a.pdf'}, 'must end in .png'),
    ({'clean': 'x', 'pairs': 'y'}, 'different ways to measure')])
def test_refused(tmp_path, options, message):
    path = put(tmp_path / 'a.zip', drawn(0.2, count=20))
    with pytest.raises(UserError, match=message):
        noise({**OPTIONS, 'data': path, **options})


def test_sets_that_cannot_be_measured(tmp_path):
    with pytest.raises(UserError, match='3 images of 16x16 pixels are too few'):
        run(put(tmp_path / 'few.zip', drawn(0.2, count=3)))
    with pytest.raises(UserError, match='constant'):
        run(put(tmp_path / 'constant.zip', np.zeros((60, 1, 16, 16))))
    with pytest.raises(UserError, match='all images are constant'):
        run(put(tmp_path / 'constant2.zip', np.zeros((60, 1, 16, 16))), group='image')
    with pytest.raises(UserError, match='has 20 images, .* 80'):
        run(put(tmp_path / 'a.zip', drawn(0.2)), pairs=put(tmp_path / 'b.zip', drawn(0.2, count=20)))
    with pytest.raises(UserError, match='its images are 1 x 16 x 16'):
        run(str(tmp_path / 'a.zip'), clean=put(tmp_path / 'grey.zip', drawn(0, shape=(1, 16, 16))))


def automatic(path, dest, **options):
    return convert({**CONVERT, 'source': [path], 'dest': str(dest), **options})


@pytest.mark.parametrize('as_float', [False, True])
def test_sigmas_auto(tmp_path, as_float):
    path = put(tmp_path / 'a.zip', drawn(0.2), as_float=as_float)
    told = automatic(path, tmp_path / 'b.zip')
    assert told[0].startswith('--sigmas=auto: ')
    assert ImageDataset(tmp_path / 'b.zip').native_sigma == pytest.approx(np.full(COUNT, 0.2), rel=0.03)


def test_sigmas_auto_before_a_resize(tmp_path):
    path = put(tmp_path / 'a.zip', drawn(0.2, shape=(3, 32, 32)))
    with pytest.raises(UserError, match='--resolution would make the noise of these images, of the level 0.2'):
        automatic(path, tmp_path / 'b.zip', resolution=(16, 16))
    clean = put(tmp_path / 'c.zip', drawn(0, shape=(3, 32, 32)))
    assert 'no sigmas' in automatic(clean, tmp_path / 'd.zip', resolution=(16, 16))[0]
    assert not ImageDataset(tmp_path / 'd.zip').native_sigma.any()
    with pytest.raises(UserError, match='too few'):
        automatic(put(tmp_path / 'few.zip', drawn(0.2, count=3)), tmp_path / 'e.zip')


def test_sigmas_auto_of_jpeg_warns(tmp_path, capsys):
    from PIL import Image
    (tmp_path / 'jpeg').mkdir()
    for index, image in enumerate(drawn(0)):
        Image.fromarray(np.rint((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)).save(tmp_path / f'jpeg/{index}.jpg')
    automatic(str(tmp_path / 'jpeg'), tmp_path / 'b.zip')
    assert f'{COUNT} images are JPEG' in capsys.readouterr().err


def test_magnitude_images_are_measured_in_their_background(tmp_path):
    rng, places = np.random.default_rng(0), np.mgrid[:48, :48] / 24 - 1
    amplitude = np.where((places ** 2).sum(0) < 0.5, 80.0, 0.0)
    images = np.hypot(amplitude + 4 * rng.standard_normal((12, 1, 48, 48)), 4 * rng.standard_normal((12, 1, 48, 48)))
    path = put(tmp_path / 'a.zip', images / 50 - 2, as_float=True)  # stored as they are
    told = run(path, law='rician')
    assert told['sigma'] == pytest.approx(4, rel=0.03) and told['images'] == 12
    assert 'sigma       ' in noise({**OPTIONS, 'data': path, 'law': 'rician'})[0]
    with pytest.raises(UserError, match='--law=rician measures one sigma .* no use for --group; leave it out'):
        run(path, law='rician', group='class')
    with pytest.raises(UserError, match='has values below 0, down to -'):
        run(put(tmp_path / 'b.zip', images / 50 - 3, as_float=True), law='rician')
