# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py encode: forms, statistics, labels and limits, equal bytes, what is refused; and such sets in stats, check and convert."""

import json

import click
import numpy as np
import pytest
import torch

import dataset_tool
from dnnlib import UserError
from tests.support import words
from tests.support.autoencoders import TINY, Tiny, save_tiny_kl
from tests.support.tiny import files_digest
from training.data.convert.encode import CONSTANTS, encode
from training.data.convert.writers import encode_png, open_writer
from training.data.dataset import ImageDataset
from training.networks.autoencoder import open_coder

OPTIONS = dict(vae=TINY, form='distribution', statistics='measured', range=None, xflip=False, sigma_min=None, sigma_max=None, device='cpu')


def make(path, count=70, side=8, channels=3, **tables):
    """A zip of pictures in three classes, whose tables are functions of the index."""
    images = np.random.default_rng(0).integers(0, 256, (count, channels, side, side), np.uint8)
    names = [f'img{i:08d}.png' for i in range(count)]
    with open_writer(path, False) as writer:
        for name, image in zip(names, images):
            writer.write(name, encode_png(image))
        tables = {'labels': lambda i: i % 3, **tables}
        writer.write_json('dataset.json', {key: [[name, value(i)] for i, name in enumerate(names)] for key, value in tables.items()})
    return images


def run(tmp_path, dest='latents', source='data.zip', **options):
    told = encode({**OPTIONS, 'source': str(tmp_path / source), 'dest': str(tmp_path / dest), **options}, open_coder)
    return '\n'.join(told)


def expected(images, range='-1..1'):
    mean, std = open_coder({'ref': TINY, 'range': range}).encode(torch.from_numpy(images))
    return np.concatenate([mean, std], axis=1)


def test_distribution_with_mirrored_pictures(tmp_path):
    images = make(tmp_path / 'data.zip')
    text = run(tmp_path, xflip=True)
    assert 'latents of 70 pictures, and of each mirrored' in text and 'of tiny:one' in text and 'img/s' in text
    dataset = ImageDataset(tmp_path / 'latents', use_labels=True, xflip=True)
    assert dataset.image_shape == (4, 4, 4) and len(dataset) == 140
    assert np.array_equal(dataset.contents.images[:70], expected(images))
    mirrored = expected(np.ascontiguousarray(images[..., ::-1]))
    assert np.array_equal(dataset.contents.images[70:], mirrored)
    assert not np.allclose(mirrored, expected(images)[..., ::-1], atol=0.1)  # of this autoencoder, whose latents know left from right
    assert dataset.classes.tolist() == [i % 3 for i in range(70)] * 2
    assert dataset.latents == (dict(ref=TINY, range='-1..1', sha256=Tiny('one').sha256), 'distribution', True, [3, 8, 8])


def test_measured_statistics_are_those_of_samples(tmp_path):
    images = make(tmp_path / 'data.zip')
    run(tmp_path)
    units, (mean, std) = ImageDataset(tmp_path / 'latents').units, np.split(expected(images).astype(np.float64), 2, axis=1)
    assert np.allclose(units['offset'], mean.mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(units['scale'], 2 * np.sqrt(mean.var((0, 2, 3)) + np.square(std).mean((0, 2, 3))), rtol=1e-6)
    run(tmp_path, 'means', form='mean')
    found = ImageDataset(tmp_path / 'means')
    assert found.image_shape == found.stored_shape == (4, 4, 4)
    assert np.allclose(found.units['scale'], 2 * mean.std((0, 2, 3)), rtol=1e-6)


def test_constants_and_the_units_of_another_set(tmp_path):
    make(tmp_path / 'data.zip', count=5)
    run(tmp_path, 'sd', statistics='sd')
    found = ImageDataset(tmp_path / 'sd')
    assert found.units == {'offset': 0.0, 'scale': 1 / 0.18215} and found.latents.autoencoder['range'] == '-1..1'
    run(tmp_path, 'edm2', statistics='edm2')
    found = ImageDataset(tmp_path / 'edm2')
    assert found.units == CONSTANTS['edm2'][1] and found.latents.autoencoder['range'] == '0..1'
    run(tmp_path, 'again.npz', statistics=str(tmp_path / 'edm2'))
    again = ImageDataset(tmp_path / 'again.npz')
    assert (again.units, again.latents) == (found.units, found.latents)
    make(tmp_path / 'few.zip', count=2)
    for name in ('sd', 'edm2', str(tmp_path / 'sd')):
        with pytest.raises(UserError, match='leave --range out'):
            run(tmp_path, 'x', statistics=name, range='-1..1' if name == 'edm2' else '0..1')
    with pytest.raises(UserError, match='--statistics=.*data.zip: holds no latents'):
        run(tmp_path, 'x', statistics=str(tmp_path / 'data.zip'))
    with pytest.raises(UserError, match='--statistics=nowhere: expected measured, sd, edm2, or the path'):
        run(tmp_path, 'x', statistics='nowhere')


def test_a_second_encode_gives_the_same_bytes(tmp_path):
    make(tmp_path / 'data.zip')
    for name in ('one', 'two'):
        run(tmp_path, name, xflip=True)
        run(tmp_path, f'{name}.npz', xflip=True)
    assert files_digest(tmp_path / 'one') == files_digest(tmp_path / 'two')
    assert (tmp_path / 'one.npz').read_bytes() == (tmp_path / 'two.npz').read_bytes()


def test_a_kl_gives_the_same_bytes_and_its_own_reconstruction(tmp_path):
    images = make(tmp_path / 'data.zip', count=12)
    vae = save_tiny_kl(tmp_path / 'vae')
    for name in ('one', 'two'):
        run(tmp_path, name, vae=str(tmp_path / 'vae'), form='mean')
    assert files_digest(tmp_path / 'one') == files_digest(tmp_path / 'two')
    dataset = ImageDataset(tmp_path / 'one')
    coder = open_coder(dataset.latents.autoencoder)
    found = coder.as_uint8(coder.decode(torch.from_numpy(np.array(dataset.contents.images))))
    with torch.no_grad():
        whole = torch.cat([vae.decode(vae.encode(part / 127.5 - 1).latent_dist.mean).sample for part in
                           (torch.from_numpy(images[:8]).float(), torch.from_numpy(images[4:]).float())])[[*range(8), *range(12, 16)]]
    own = (whole / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert torch.equal(found, own)


# ---- noise and limits


def test_white_noise_is_refused_and_a_limit_offered(tmp_path):
    make(tmp_path / 'data.zip', count=6, sigmas=lambda i: 0.2 * (i < 2))
    with pytest.raises(UserError, match='its images carry white noise .*or give --sigma-min') as caught:
        run(tmp_path)
    assert '\n' not in caught.value.message and not (tmp_path / 'latents').exists()
    (tmp_path / 'limits.json').write_text(json.dumps({f'img{i:08d}.png': 0.5 if i < 2 else None for i in range(6)}))
    for statistics in ('sd', 'measured'):
        text = run(tmp_path, statistics, sigma_min=str(tmp_path / 'limits.json'), statistics=statistics, xflip=True)
        assert '2 of 6 pictures carry white noise; as latents they are used above --sigma-min' in text
        dataset = ImageDataset(tmp_path / statistics, xflip=True)
        assert np.allclose(dataset.sigma_min, [0.5, 0.5, 0, 0, 0, 0] * 2) and not dataset.native_sigma.any()


def test_limits_of_pixels_are_not_those_of_latents(tmp_path):
    make(tmp_path / 'data.zip', count=4, sigma_min=lambda i: 0.5, sigma_max=lambda i: 0.1)
    with pytest.raises(UserError, match='has sigma_min in units of pixels'):
        run(tmp_path)
    run(tmp_path, sigma_min='1.5', sigma_max='0.25')
    dataset = ImageDataset(tmp_path / 'latents')
    assert dataset.sigma_min.tolist() == [1.5] * 4 and dataset.sigma_max.tolist() == [0.25] * 4
    with pytest.raises(UserError, match='--sigma-max=-1: has the limit'):
        run(tmp_path, 'x', sigma_min='1.5', sigma_max='-1')


# ---- what is refused


def test_refusals_leave_nothing(tmp_path, monkeypatch):
    make(tmp_path / 'grey.zip', count=2, channels=1)
    make(tmp_path / 'odd.zip', count=2, side=9)
    make(tmp_path / 'data.zip', count=2)
    np.save(tmp_path / 'floats.npy', np.random.default_rng(0).random((2, 8, 8)).astype(np.float32))
    call('convert', f'--source={tmp_path / "floats.npy"}', f'--dest={tmp_path / "floats.zip"}', '--sheet=none')
    run(tmp_path, 'done')
    for options, match in [
            (dict(source='grey.zip'), 'its pictures have 1 channels, and --vae=tiny:one takes 3; convert them'),
            (dict(source='odd.zip'), 'have 9x9 pixels, and the sides must be multiples of 2'),
            (dict(source='floats.zip'), 'holds float data'), (dict(source='done'), 'holds latents already'),
            (dict(source='nowhere.zip'), 'nowhere'), (dict(dest='x.zip'), 'packed data go into an .npz'),
            (dict(dest='done'), 'the folder is not empty')]:
        with pytest.raises(UserError, match=match):
            run(tmp_path, **{'dest': 'x', **options})
    monkeypatch.setattr(Tiny, 'moments', lambda self, x: (x.new_full([len(x), 4, 4, 4], np.nan),) * 2)
    with pytest.raises(UserError, match='--vae=tiny:one: the latents of .* are not finite'):
        run(tmp_path, 'x')
    assert not [path for path in tmp_path.iterdir() if path.name.lstrip('.').startswith('x')]


def call(*args):
    """Runs dataset_tool.py in this process."""
    try:
        dataset_tool.main([str(arg) for arg in args], standalone_mode=False)
    except click.ClickException as err:
        raise UserError(err.message) from None
    except SystemExit as err:
        return err.code
    return None


def test_by_command_line_and_what_the_other_commands_say(tmp_path, capsys):
    make(tmp_path / 'data.zip', count=8)
    call('encode', f'--source={tmp_path / "data.zip"}', f'--vae={TINY}', f'--dest={tmp_path / "latents"}', '--device=cpu')
    capsys.readouterr()
    call('stats', tmp_path / 'latents')
    text = capsys.readouterr().out
    assert 'shape       4 x 4 x 4' in text and 'latents     of tiny:one' in text and 'sigma_data  0.5000' in text
    assert call('check', tmp_path / 'latents') is None and 'nothing wrong with its 8 images' in capsys.readouterr().out
    with pytest.raises(UserError, match='holds latents, not pictures'):
        call('convert', f'--source={tmp_path / "latents"}', f'--dest={tmp_path / "again.zip"}')
    meta = json.loads((tmp_path / 'latents' / 'dataset.json').read_text())
    (tmp_path / 'latents' / 'dataset.json').write_text(json.dumps({**meta, 'latents': {**meta['latents'], 'form': 'other'}}))
    assert call('check', tmp_path / 'latents') == 1 and 'has "latents" whose form is not' in capsys.readouterr().out


def test_captions_and_their_labels_are_kept(tmp_path, monkeypatch):
    """With the record of their text encoder, and the label of the empty caption; of mirrored pictures as well."""
    words.register(monkeypatch)
    make(tmp_path / 'data.zip', count=6, captions=lambda i: f'a {"red" if i % 2 else "blue"} square')
    call('captions', f'--source={tmp_path / "data.zip"}', f'--dest={tmp_path / "text.zip"}', '--text-encoder=words:x')
    before = ImageDataset(str(tmp_path / 'text.zip'), use_labels=True)
    run(tmp_path, source='text.zip', xflip=True)
    made = ImageDataset(str(tmp_path / 'latents'), use_labels=True, xflip=True)
    assert made.text == before.text and made.latents is not None and np.array_equal(made.empty, before.empty)
    assert np.array_equal(made.labels(range(12)), np.concatenate([before.labels(range(6))] * 2))
    assert list(made.contents.captions()) == list(before.contents.captions()) * 2


def test_files_of_latents_are_checked_too(tmp_path, capsys):
    make(tmp_path / 'data.zip', count=3)
    run(tmp_path, labels=None)
    meta = json.loads((tmp_path / 'latents' / 'dataset.json').read_text())
    (tmp_path / 'files').mkdir()
    for i, image in enumerate(np.load(tmp_path / 'latents' / 'images.npy')):
        np.save(tmp_path / 'files' / f'{i}.npy', image)
    (tmp_path / 'files' / 'dataset.json').write_text(json.dumps({key: meta[key] for key in ('units', 'latents')}))
    assert call('check', tmp_path / 'files') is None and 'latents     of tiny:one' in capsys.readouterr().out
    with pytest.raises(UserError, match='holds latents, not pictures'):
        call('convert', f'--source={tmp_path / "files"}', f'--dest={tmp_path / "again.zip"}')
