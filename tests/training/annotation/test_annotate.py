# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py annotate: what it writes, keeps, prints and refuses."""

import json
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import dataset_tool
from tests.training.annotation import fields
from training.annotation import report
from training.data.dataset import ImageDataset
from training.data.pairs import PairStream
from training.diffusion.noise import LogNormal

TINY = ['--method=classifier', '--arch=half_unet:cbase=8,cres=1,blocks=1,attn=0,dropout=0', '--kimg=0.2', '--batch=32', '--levels=8']


def run(*args):
    return CliRunner().invoke(dataset_tool.main, [str(arg) for arg in args])


def annotate(*args):
    found = run('annotate', '--sheet=none', *args)
    assert found.exit_code == 0, found.output
    return found.output


def refusal(*args):
    found = run('annotate', *args)
    assert found.exit_code != 0 and isinstance(found.exception, SystemExit), found.output
    return found.output.strip().split('\n')[-1]


def convert(folder, name, images, *args, labels=None):
    np.savez(folder / f'{name}-source.npz', images=images, **({} if labels is None else {'labels': labels}))
    made = run(f'--source={folder / name}-source.npz', f'--dest={folder / name}', '--sheet=none', '--workers=1', *args)
    assert made.exit_code == 0, made.output


def pictures(count, seed=0, cut=None):
    """8-bit Gaussian fields [count,8,8], without the details beyond `cut`."""
    p, f = fields.power(8)
    found = fields.fields(count, p if cut is None else p * np.exp(-np.square(f / cut)), seed)
    return np.uint8(np.rint(found.numpy()[:, 0].clip(-1, 1) * 127.5 + 127.5))


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """clean.zip and blurred.zip, with two classes, of which the second one is blurred more; and smaller ones for the classifier."""
    folder = tmp_path_factory.mktemp('annotate')
    labels = np.arange(400) % 2
    convert(folder, 'clean.zip', pictures(400), labels=labels)
    data = np.where(labels[:, None, None] == 0, pictures(400, 1, cut=6), pictures(400, 2, cut=2))
    convert(folder, 'blurred.zip', data, '--sigma-max=7', labels=labels)
    for name, seed, cut in (('few.zip', 3, None), ('few-blurred.zip', 4, 2)):
        convert(folder, name, pictures(64, seed, cut), labels=np.arange(64) % 2)
    return folder


def test_a_copy_has_the_limits_and_everything_else(sets, tmp_path):
    before = (sets / 'blurred.zip').read_bytes()
    said = annotate(f'--clean={sets}/clean.zip', f'--data={sets}/blurred.zip', f'--dest={tmp_path}/out.zip')
    assert (sets / 'blurred.zip').read_bytes() == before
    found, source = ImageDataset(str(tmp_path / 'out.zip'), use_labels=True), ImageDataset(str(sets / 'blurred.zip'), use_labels=True)
    assert 0.3 < found.sigma_min[0] < 5 and (found.sigma_min == found.sigma_min[0]).all()
    assert (found.sigma_max == 7).all() and np.array_equal(found.classes, source.classes)
    with zipfile.ZipFile(sets / 'blurred.zip') as old, zipfile.ZipFile(tmp_path / 'out.zip') as new:
        assert old.namelist() == new.namelist()
        assert all(old.read(name) == new.read(name) for name in old.namelist() if name != 'dataset.json')
    result = json.loads((tmp_path / 'out-annotation.json').read_text())
    assert result['found']['limited'] == 400 and result['groups'][0]['limit'] == pytest.approx(found.sigma_min[0], rel=1e-3)
    assert len(result['usable']) == 4 and result['usable'] == sorted(result['usable'])
    assert 'sigma_min   400 of 400 images' in said and 'usable' in said


def test_pictures_of_the_result(sets, tmp_path):
    pytest.importorskip('matplotlib')
    result = run('annotate', f'--clean={sets}/few.zip', f'--data={sets}/few-blurred.zip', f'--dest={tmp_path}/out.zip', '--report=none',
                 f'--plot={tmp_path}/plot.png')
    assert result.exit_code == 0, result.output
    sheet, plot = (np.asarray(Image.open(tmp_path / name)) for name in ('out-annotation.png', 'plot.png'))
    assert sheet.shape[1] > 900 and np.ptp(sheet) == 255 and plot.shape[0] > 300 and np.ptp(plot) > 200


def test_limits_of_classes(sets, tmp_path):
    said = annotate(f'--clean={sets}/clean.zip', f'--data={sets}/blurred.zip', f'--dest={tmp_path}/out.zip', '--per=class', '--report=none')
    found = ImageDataset(str(tmp_path / 'out.zip'), use_labels=True)
    weak, strong = (np.unique(found.sigma_min[found.classes == one]) for one in (0, 1))
    assert len(weak) == len(strong) == 1 and 1.5 * weak < strong
    assert f'median by class: 0: {weak[0]:.4g}, 1: {strong[0]:.4g}' in said
    assert not (tmp_path / 'out-annotation.json').exists()


@pytest.mark.parametrize('name, options', [('folder', []), ('packed', ['--packed']), ('packed.npz', [])])
def test_sets_of_all_kinds_are_changed_in_place(sets, tmp_path, name, options):
    convert(tmp_path, name, pictures(60, 1, cut=3), *options)
    path = str(tmp_path / name)
    images = [ImageDataset(path).decode(k) for k in range(60)]
    annotate(f'--clean={sets}/clean.zip', f'--data={path}', f'--report={tmp_path}/r.json')
    found = ImageDataset(path)
    assert (found.sigma_min > 0.3).all() and all(np.array_equal(image, found.decode(k)) for k, image in enumerate(images))
    annotate(f'--clean={sets}/clean.zip', f'--data={path}', '--report=none', '--threshold=0.3')  # again, with another threshold
    assert (ImageDataset(path).sigma_min < found.sigma_min).all()


def test_float_data_have_limits_in_their_own_units(sets, tmp_path):
    p, f = fields.power(8)
    for name, q, seed in (('clean.npz', p, 0), ('data.npz', p * np.exp(-np.square(f / 3)), 1)):
        convert(tmp_path, name, 10 * fields.fields(1000, q, seed).numpy()[:, 0] + 3, '--units=3,10')
    annotate(f'--clean={tmp_path}/clean.npz', f'--data={tmp_path}/data.npz', '--report=none')
    stored = np.load(tmp_path / 'data.npz')['sigma_min'][0]
    found = ImageDataset(str(tmp_path / 'data.npz')).sigma_min[0]
    assert stored == pytest.approx(10 * found) and found == pytest.approx(fields.theory(p, p * np.exp(-np.square(f / 3))), rel=0.1)


def test_white_noise_is_written_as_noise(tmp_path):
    p, _ = fields.power(8)
    noisy = fields.fields(800, p, 1).numpy() + 0.2 * np.random.default_rng(0).standard_normal([800, 1, 8, 8])
    convert(tmp_path, 'clean.npz', fields.fields(800, p).numpy()[:, 0], '--units=0,1')
    convert(tmp_path, 'noisy.npz', np.float32(noisy)[:, 0], '--units=0,1')
    said = annotate(f'--clean={tmp_path}/clean.npz', f'--data={tmp_path}/noisy.npz', f'--dest={tmp_path}/out.npz', '--report=none')
    found = ImageDataset(str(tmp_path / 'out.npz'))
    assert (np.abs(found.native_sigma - 0.2) < 0.04).all() and not found.sigma_min.any() and 'white noise of std' in said
    annotate(f'--clean={tmp_path}/clean.npz', f'--data={tmp_path}/noisy.npz', f'--dest={tmp_path}/plain.npz', '--report=none',
             '--white-noise=ignore')
    plain = ImageDataset(str(tmp_path / 'plain.npz'))
    assert (plain.sigma_min > 0.3).all() and not plain.native_sigma.any()


def test_images_that_are_never_alike_are_left_out_of_training(sets, tmp_path):
    convert(tmp_path, 'other.zip', 255 - pictures(200, 1) // 8, '--channels=1')
    said = annotate(f'--clean={sets}/clean.zip', f'--data={tmp_path}/other.zip', '--report=none', '--threshold=0.499')
    assert '200 are told from clean images at all levels and left out of training' in said
    found = run(f'--source={sets}/clean.zip:label=none', f'--source={tmp_path}/other.zip', f'--dest={tmp_path}/both.zip', '--sheet=none',
                '--workers=1')
    assert found.exit_code == 0, found.output
    both = ImageDataset(str(tmp_path / 'both.zip'))
    assert np.isinf(both.sigma_min).sum() == 200
    stream = PairStream(both.native_sigma, LogNormal(), batch=64, lower=both.sigma_min, upper=both.sigma_max)
    assert (both.sigma_min[stream.next()[0]] == 0).all()


@pytest.mark.slow  # the fast one is of labels, in test_classifier.py
def test_equal_seeds_give_equal_bytes_at_any_batch_size(sets, tmp_path):
    outputs = []
    for name, batch in (('a', 1), ('b', 4096)):
        annotate(f'--clean={sets}/few.zip', f'--data={sets}/few-blurred.zip', f'--dest={tmp_path}/{name}.zip', *TINY, '--per=image',
                 f'--batch-gpu={batch}', '--white-noise=ignore')
        outputs.append(((tmp_path / f'{name}.zip').read_bytes(), json.loads((tmp_path / f'{name}-annotation.json').read_text())['groups']))
    assert outputs[0] == outputs[1]


def test_the_classifier_reports_what_it_is_worth(sets, tmp_path):
    said = annotate(f'--clean={sets}/few.zip', f'--data={sets}/few-blurred.zip', f'--dest={tmp_path}/o.zip', *TINY, '--per=class')
    assert 'held out    area under the ROC curve' in said and 'calibration mean error of P(clean) on held-out images' in said
    groups = json.loads((tmp_path / 'o-annotation.json').read_text())['groups']
    assert [group['name'] for group in groups] == ['all', 'class 0', 'class 1']
    assert all(len(group[key]) == 8 for group in groups for key in ('levels', 'probability', 'area'))


@pytest.mark.slow
def test_images_that_are_right_in_their_details(tmp_path):
    """Tiles of the clean law, each from another image: small patches are alike, large ones are not."""
    p, _ = fields.power(12, slope=2.0)
    quantised = lambda images: np.uint8(np.rint(images.clip(-1, 1) * 127.5 + 127.5))
    convert(tmp_path, 'clean.npz', quantised(fields.fields(400, p).numpy()[:, 0]))
    found = {}
    for tile in (4, 6, 12):
        images = fields.fields(400, p, tile).numpy()[:, 0]
        order = np.tile(np.arange(400), (12 // tile, 12 // tile, 1))
        source = np.random.default_rng(0).permuted(order, axis=2).repeat(tile, 0).repeat(tile, 1)
        y, x = np.mgrid[:12, :12]
        mixed = np.moveaxis(images[source, y[..., None], x[..., None]], 2, 0)
        convert(tmp_path, f'{tile}.npz', quantised(mixed), '--sigma-min=6')
        said = annotate(f'--clean={tmp_path}/clean.npz', f'--data={tmp_path}/{tile}.npz', '--limit=sigma_max', '--report=none')
        dataset = ImageDataset(str(tmp_path / f'{tile}.npz'))
        found[tile] = dataset.sigma_max[0]
        assert (dataset.sigma_max == found[tile]).all() and (dataset.sigma_min == 6).all() and 'sigma_max' in said
    assert found[4] <= found[6] < 0.2 and found[6] > 0.02 and found[12] == np.inf
    convert(tmp_path, 'other.npz', 255 - pictures_of(12))
    annotate(f'--clean={tmp_path}/clean.npz', f'--data={tmp_path}/other.npz', '--limit=sigma_max', '--report=none')
    other = ImageDataset(str(tmp_path / 'other.npz'))
    assert np.isinf(other.sigma_min).all() and np.isinf(other.sigma_max).all()


def pictures_of(side):
    return np.random.default_rng(0).integers(0, 256, [100, side, side], dtype=np.uint8)


def test_shares_of_quartiles():
    """An image from the median of p(sigma) on, a noisy one from its third quartile on, one that is never used, and one without a limit."""
    noise = LogNormal()
    second, third = np.exp(-1.2), np.exp(-1.2 + 1.2 * 0.67449)
    shares = report.usable_shares(noise, np.array([0, third, 0, 0]), np.array([second, 0, np.inf, 0]), np.full(4, np.inf))
    assert shares == pytest.approx([0.25, 0.25, 0.5, 0.75])


@pytest.mark.parametrize('change, words', [
    (['--data={tmp}/grey.zip'], 'its images are 1x16x16, those of'),
    (['--data={tmp}/few.zip'], 'holds 4 images; sets are compared by 20 of each or more'),
    (['--clean={tmp}/noisy.zip'], 'of its images have sigmas, and so are not clean'),
    (['--data={tmp}/plain.zip', '--per=class'], '--per=class: needs classes in both sets'),
    (['--limit=sigma_max', '--method=classifier'], '--limit=sigma_max: patches are compared by their covariances'),
    (['--per=image'], '--per=image: --method=spectral compares sets, not single images'),
    (['--dest={tmp}/out'], 'must be of the same kind as --data='),
    (['--dest={tmp}/noisy.zip'], 'exists; name another'),
    (['--threshold=0.5'], 'is not a number that is above 0 and 0.499 or less'),
    (['--report={tmp}/r.txt'], 'expected the name of a file that ends in .json'),
    (['--method=classifier', '--folds=100', '--data={tmp}/plain.zip'], '--folds=100: there are 400 clean images and 24 others'),
    (['--method=classifier', '--arch=half_unet:cres=1|2|2|2|2'], 'cannot be halved 4 times')])
def test_refused_in_one_line_with_nothing_written(sets, tmp_path, change, words):
    convert(tmp_path, 'grey.zip', np.zeros([24, 16, 16], np.uint8))
    convert(tmp_path, 'few.zip', pictures(4))
    convert(tmp_path, 'noisy.zip', pictures(24), '--sigmas=0.1')
    convert(tmp_path, 'plain.zip', pictures(24))
    before = sorted(path.name for path in tmp_path.iterdir())
    options = {'--clean': f'{sets}/clean.zip', '--data': f'{sets}/blurred.zip', '--dest': f'{tmp_path}/new.zip', '--white-noise': 'ignore'}
    options |= dict(one.format(tmp=tmp_path).split('=', 1) for one in change)
    assert words in refusal(*(f'{key}={value}' for key, value in options.items()))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
