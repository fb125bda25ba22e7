# SPDX-License-Identifier: Apache-2.0
"""Latents from pictures to a measured network, by command line: encode, train, resume, generate, decode, evaluate."""

import json
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image

import dataset_tool
import eval_fid
import eval_nll
import generate
from dnnlib import UserError
from tests.support import tiny
from tests.support.autoencoders import TINY, Tiny, save_tiny_kl
from training.checkpoints.load import load_network
from training.data.convert.writers import encode_png, open_writer

TRAIN = ['--cond=1', '--cbase=16', '--cres=1', '--blocks=1', '--attn=0', '--batch=16', '--tick=0.08', '--dump=1', '--snap=1', '--samples=4',
         '--lr-rampup=0', '--seed=5', '--xflip=1']


def call(script, *args):
    """Runs a script in this process; what it refuses is a UserError."""
    try:
        script.main([str(arg) for arg in args], standalone_mode=False)
    except click.ClickException as err:
        raise UserError(err.message) from None


def pictures(path, count=40):
    """A zip of pictures of one colour each, in two classes."""
    rng = np.random.default_rng(0)
    with open_writer(path, False) as writer:
        for i in range(count):
            image = np.broadcast_to(rng.integers(40, 216, (3, 1, 1)), (3, 8, 8)).astype(np.uint8)
            writer.write(f'{i:03}.png', encode_png(image))
        writer.write_json('dataset.json', {'labels': [[f'{i:03}.png', i % 2] for i in range(count)]})


def encode(folder, vae, *args):
    call(dataset_tool, 'encode', f'--source={folder / "data.zip"}', f'--vae={vae}', f'--dest={folder / "latents"}', '--device=cpu', *args)


def whole_way(folder, vae):
    """Encodes, trains with metrics, generates and evaluates; returns the run's folder."""
    pictures(folder / 'data.zip')
    encode(folder, vae, '--xflip')
    call(eval_fid, 'ref', f'--data={folder / "data.zip"}', f'--dest={folder / "ref.npz"}', '--detector=pixels')
    tiny.call(f'--outdir={folder / "runs"}', f'--data={folder / "latents"}', *TRAIN, '--duration=0.00008', '--metrics-every=1',
              '--metrics-num=8', f'--metrics-ref={folder / "ref.npz"}', '--metrics-detector=pixels')
    run = tiny.only_folder(folder / 'runs')
    network = run / 'network-snapshot-000000.080'
    call(generate, f'--network={network}', f'--outdir={folder / "out"}', '--seeds=0-11', '--steps=3', '--grid', '--device=cpu')
    call(eval_fid, f'--gen-path={folder / "out"}', f'--ref-stats={folder / "ref.npz"}', '--num=12', '--detector=pixels', '--metrics=fid')
    call(eval_fid, f'--network={network}', f'--ref-stats={folder / "ref.npz"}', '--seeds=0-11', '--num=12', '--steps=3',
         '--detector=pixels', '--metrics=fid', f'--out-path={folder / "own.json"}')
    return run


def read(path):
    return json.loads(Path(path).read_text())


def check_results(folder, run, described):
    """The autoencoder stands in every file, the pictures have their size, and both ways to evaluate agree."""
    network = run / 'network-snapshot-000000.080'
    record, result, own = read(folder / 'out.json'), read(folder / 'out.fid.json'), read(folder / 'own.json')
    assert read(folder / 'latents' / 'dataset.json')['latents']['autoencoder'] == read(network / 'config.json')['autoencoder'] == described
    assert record['autoencoder'] == result['generated']['record']['autoencoder'] == own['generated']['autoencoder'] == described
    assert record['image_shape'] == own['image_shape'] == [3, 8, 8] and record['decoded']
    assert result['fid_score'] == pytest.approx(own['fid_score'], rel=1e-9)
    assert described['sha256'][:12] in (network / 'README.md').read_text()
    assert any('Metrics/fid8' in line for line in tiny.read_log(run))
    for name in (folder / 'out' / '000000.png', run / 'samples-000000.080.png', folder / 'out-grid.png'):
        assert Image.open(name).mode == 'RGB'
    assert np.array(Image.open(folder / 'out' / '000003.png')).shape == (8, 8, 3)


def test_the_whole_way(tmp_path, capsys):
    run = whole_way(tmp_path, TINY)
    check_results(tmp_path, run, {'ref': TINY, 'range': '-1..1', 'sha256': Tiny('one').sha256})
    assert 'they are not augmented' in capsys.readouterr().out
    network, record = run / 'network-snapshot-000000.080', read(tmp_path / 'out.json')
    # Latents instead, and the same pictures from a damaged folder.
    (tmp_path / 'out' / '000004.png').unlink()
    call(generate, f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0-11', '--steps=3', '--skip-existing', '--grid')
    assert read(tmp_path / 'out.json')['image_shape'] == record['image_shape']
    call(generate, f'--network={network}', f'--outdir={tmp_path / "raw"}', '--seeds=0-11', '--steps=3', '--decode=none')
    raw, net = np.load(tmp_path / 'raw' / '000004.npy'), load_network(network)
    assert raw.shape == (4, 4, 4) and read(tmp_path / 'raw.json')['units'] == net.units
    again = Tiny('one').reconstruct(torch.from_numpy(raw)[None]).mul(127.5).add(128).clamp(0, 255).to(torch.uint8)[0].numpy()
    assert np.abs(again.transpose(1, 2, 0).astype(int) - np.array(Image.open(tmp_path / 'out' / '000004.png'))).max() <= 1
    with pytest.raises(UserError, match='--decode'):  # pictures and latents are not mixed
        call(generate, f'--network={network}', f'--outdir={tmp_path / "out"}', '--seeds=0-5', '--steps=3', '--decode=none', '--format=npz')
    with pytest.raises(UserError, match='does not generate 8-bit grey or RGB images, which detectors need; leave --decode=none out'):
        call(eval_fid, f'--network={network}', f'--ref-stats={tmp_path / "ref.npz"}', '--seeds=0-11', '--num=12', '--detector=pixels',
             '--metrics=fid', '--decode=none')


def test_a_resumed_run_draws_the_same_samples(tmp_path):
    pictures(tmp_path / 'data.zip')
    encode(tmp_path, TINY, '--xflip')
    common = [f'--data={tmp_path / "latents"}', *TRAIN[:-4], '--samples=0', '--lr-rampup=0', '--seed=5', '--xflip=1', '--nosubdir',
              '--sigma=0.3', '--corruption-probability=0.5', '--val=0.2']
    tiny.call(f'--outdir={tmp_path / "one"}', *common, '--duration=0.00016')
    tiny.call(f'--outdir={tmp_path / "two"}', *common, '--duration=0.00008')
    tiny.call(f'--outdir={tmp_path / "two"}', *common, '--duration=0.00016', '--resume=latest')
    states = [tiny.read_state(tmp_path / name / 'training-state-000000.160.pt') for name in ('one', 'two')]
    assert tiny.digest(states[0]['net']) == tiny.digest(states[1]['net'])


def test_what_latents_do_not_take(tmp_path, monkeypatch, capsys):
    pictures(tmp_path / 'data.zip')
    encode(tmp_path, TINY, '--sigma-min=0.5')
    data = f'--data={tmp_path / "latents"}'
    with pytest.raises(UserError, match='--augment=0.12: .* holds latents, .*; use --augment=0$'):
        tiny.call(f'--outdir={tmp_path}', data, '--augment=0.12')
    with pytest.raises(UserError, match='--xflip=1: .* holds latents, .*encode them with dataset_tool.py encode --xflip'):
        tiny.call(f'--outdir={tmp_path}', data, '--xflip=1')
    config = tiny.options(tmp_path, data, '--augment=0')
    assert config.data.augment == 0 and 'augment_dim' not in config.network.arguments
    assert '--sigma=0.4 is noise of the latents in network units' in capsys.readouterr().out
    # Without the autoencoder grids show latents; metrics are refused.
    monkeypatch.setattr(Tiny, '__init__', lambda *args: (_ for _ in ()).throw(UserError('tiny: is gone')))
    tiny.call(f'--outdir={tmp_path / "run"}', data, *TRAIN[:-1], '--duration=0.00008', '--nosubdir')
    assert 'Warning: grids of samples show latents, not pictures: --decode=auto: tiny: is gone' in capsys.readouterr().out
    assert Image.open(tmp_path / 'run' / 'samples-000000.080.png').mode == 'L'
    call(eval_fid, 'ref', f'--data={tmp_path / "data.zip"}', f'--dest={tmp_path / "ref.npz"}', '--detector=pixels')
    with pytest.raises(UserError, match='tiny: is gone'):
        tiny.call(f'--outdir={tmp_path / "run2"}', data, *TRAIN[:-1], '--duration=0.00008', '--nosubdir', '--metrics-every=1',
                  f'--metrics-ref={tmp_path / "ref.npz"}', '--metrics-detector=pixels')


def test_held_out_sets_are_of_the_same_autoencoder(tmp_path):
    pictures(tmp_path / 'data.zip')
    encode(tmp_path, TINY)
    for vae, name in ((TINY, 'same'), ('tiny:two', 'other')):
        call(dataset_tool, 'encode', f'--source={tmp_path / "data.zip"}', f'--vae={vae}', f'--dest={tmp_path / name}', '--device=cpu',
             f'--statistics={tmp_path / "latents"}')
    flags = [f'--data={tmp_path / "latents"}', *TRAIN[:-1], '--duration=0.00008']
    tiny.call(f'--outdir={tmp_path / "a"}', *flags, f'--val={tmp_path / "same"}', '--samples=0')
    assert any(line.get('Val/clean') for line in tiny.read_log(tiny.only_folder(tmp_path / 'a')))
    with pytest.raises(UserError, match='its latents are of another autoencoder'):
        tiny.call(f'--outdir={tmp_path / "b"}', *flags, f'--val={tmp_path / "other"}')


def test_the_whole_way_with_an_autoencoderkl(tmp_path):
    save_tiny_kl(tmp_path / 'vae')
    run = whole_way(tmp_path, tmp_path / 'vae')
    check_results(tmp_path, run, read(run / 'network-snapshot-000000.080' / 'config.json')['autoencoder'])
    assert read(tmp_path / 'out.json')['autoencoder']['ref'] == str(tmp_path / 'vae')


def test_likelihoods_are_of_means(tmp_path):
    pictures(tmp_path / 'data.zip')
    encode(tmp_path, TINY)
    tiny.call(f'--outdir={tmp_path / "run"}', f'--data={tmp_path / "latents"}', *TRAIN[:-1], '--duration=0.00008', '--samples=0',
              '--nosubdir')
    with pytest.raises(UserError, match='holds distributions of latents, .* encode --form=mean'):
        call(eval_nll, f'--network={tmp_path / "run" / "network-snapshot-000000.080"}', f'--data={tmp_path / "latents"}', '--num=2')


def test_configurations_name_the_autoencoder(tmp_path):
    """A run's options hold it, so that a continued run and --config find it again."""
    pictures(tmp_path / 'data.zip')
    encode(tmp_path, TINY)
    assert tiny.options(tmp_path, f'--data={tmp_path / "latents"}').network.arguments['autoencoder']['ref'] == TINY
