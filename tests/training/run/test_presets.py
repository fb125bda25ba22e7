# SPDX-License-Identifier: Apache-2.0
"""--preset and --config: what they stand for, what they give way to, what they refuse."""

import json
import math
import zipfile

import pytest
import torch
from click.testing import CliRunner

import train
from dnnlib import EasyDict
from tests.support import tiny
from torch_utils import registry
from training.data.convert.writers import encode_png
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network
from training.run import presets
from training.run.config import from_json, to_json
from training.run.configure import configure

FIELDS = {'reproduces', 'source', 'figure', 'mimg', 'gpu_hours', 'cost', 'unconfirmed', 'image_shape', 'classes', 'parameters', 'options'}


def make_data(path, shape, classes):
    """Black images [C,H,W], one of each class."""
    count, png = max(classes, 4), encode_png(torch.zeros(shape, dtype=torch.uint8).numpy())
    names = [f'00000/img{i:08d}.png' for i in range(count)]
    with zipfile.ZipFile(path, 'w') as archive:
        for name in names:
            archive.writestr(name, png)
        archive.writestr('dataset.json', json.dumps({'labels': [[name, i] for i, name in enumerate(names)] if classes else None}))
    return str(path)


def configured(*args):
    """(Config, click context) of a command line of train.py."""
    ctx = train.main.make_context('train', [str(arg) for arg in args])
    return configure(EasyDict(ctx.params, command=presets.given(ctx))), ctx


@pytest.mark.parametrize('name', presets.names())
def test_presets(tmp_path, monkeypatch, name):
    """Each gives its network the published number of parameters, and its options reach the configuration."""
    tiny.pretend_gpu(monkeypatch, (7, 0))  # fp16 is refused without
    found = presets.read(name)
    assert found.keys() <= FIELDS and FIELDS - found.keys() <= {'unconfirmed'}
    data = make_data(tmp_path / 'data.zip', found['image_shape'], found['classes'])
    config, _ = configured(f'--preset={name}', f'--data={data}', '--outdir=runs', '--seed=1')
    with torch.device('meta'):
        params = sum(p.numel() for p in build_network(config.network.arguments).parameters())
    assert params == found['parameters'] or found['parameters'] is None and (found.get('unconfirmed') or not found['classes'])
    plain = {**found['options'], 'seed': 1}
    by_hand, _ = configured(*(f'--{key}={value}' for key, value in plain.items()), f'--data={data}', '--outdir=runs')
    skip = {'command': {}}
    same = lambda config: {**to_json(config), 'run': {**to_json(config)['run'], **skip}}
    assert same(config) == same(by_hand)
    if found['mimg']:
        assert config.run.duration_kimg == found['mimg'] * 1e3


def test_published_settings():
    """Facts of the papers' tables, as the options of the presets have them."""
    facts = lambda name, *keys: [presets.read(name)['options'].get(key) for key in keys]
    assert facts('edm-imagenet64', 'duration', 'batch', 'lr', 'ema', 'dropout', 'augment', 'ls') == [2500, 4096, 1e-4, 50, 0.1, 0, 100]
    assert facts('edm-ffhq64', 'batch', 'cres', 'lr', 'dropout', 'augment') == [256, '1,2,2,2', 2e-4, 0.05, 0.15]
    assert facts('ambient-cifar10', 'sigma', 'corruption_probability') == [0.2, 0.9]
    # 500,000 steps of 128 images; an average with the factor 0.9999 a step halves in ln 2 / 1e-4 steps.
    assert facts('iddpm-cifar10-vlb', 'duration', 'ema', 'objective') == [64, 0.887, 'vlb']
    for name in ('min-snr-imagenet64', 'min-snr-imagenet256'):
        assert registry.parse(presets.read(name)['options']['weight']) == ('min_snr', {'gamma': 5})
    # 7 M steps of 256 images; 1 M of 256, and 800,000 of 1024; 500,000 of 128 and of 1024.
    steps = {'dit-imagenet256': 7e6, 'min-snr-imagenet256': 1e6, 'min-snr-imagenet64': 8e5, 'uvit-cifar10': 5e5, 'uvit-imagenet256': 5e5}
    for name, count in steps.items():
        duration, batch, ema = facts(name, 'duration', 'batch', 'ema')
        assert duration * 1e6 == count * batch and ema * 1e6 / batch == pytest.approx(math.log(2) / 1e-4, rel=1e-3)
    assert presets.read('dit-imagenet256')['parameters'] == 674834720  # without the table of positions, which is not trained


@pytest.mark.parametrize('name, channels, lr, ref, dropout, mebi, mean, std, mparams', [
    ('img512-xs', 128, 0.0120, 70000, 0, 2048, -0.4, 1.0, 124.7), ('img512-s', 192, 0.0100, 70000, 0, 2048, -0.4, 1.0, 280.2),
    ('img512-m', 256, 0.0090, 70000, 0.1, 2048, -0.4, 1.0, 497.8), ('img512-l', 320, 0.0080, 70000, 0.1, 1792, -0.4, 1.0, 777.5),
    ('img512-xl', 384, 0.0070, 70000, 0.1, 1280, -0.4, 1.0, 1119.3), ('img512-xxl', 448, 0.0065, 70000, 0.1, 896, -0.4, 1.0, 1523.2),
    ('img64-xs', 128, 0.0120, 35000, 0, 1024, -0.8, 1.6, 124.7), ('img64-s', 192, 0.0100, 35000, 0, 1024, -0.8, 1.6, 280.2),
    ('img64-m', 256, 0.0090, 35000, 0.1, 2048, -0.8, 1.6, 497.8), ('img64-l', 320, 0.0080, 35000, 0.1, 1024, -0.8, 1.6, 777.5),
    ('img64-xl', 384, 0.0070, 35000, 0.1, 640, -0.8, 1.6, 1119.3)])
def test_settings_of_edm2(name, channels, lr, ref, dropout, mebi, mean, std, mparams):
    """Table 6 of Karras et al. 2024, in which lengths are in 2^20 images."""
    found = presets.read(f'edm2-{name}')
    options = found['options']
    assert registry.build(options['arch'], ARCHS)()['model_channels'] == channels
    assert [options[key] for key in ('lr', 'dropout', 'batch', 'lr_rampup', 'power_ema', 'optimizer', 'weight', 'augment')] == [
        lr, dropout, 2048, 10, '0.05,0.10', 'adam:beta2=0.99', 'edm2', 0]
    assert registry.parse(options['noise']) == ('lognormal', {'mean': mean, 'std': std})
    assert registry.parse(options['lr_schedule']) == ('inverse_sqrt', {'ref': ref})
    assert options['duration'] * 1e6 == mebi * 2 ** 20 and options['tick'] * options['snap'] * 1e3 == 8 * 2 ** 20
    assert round(found['parameters'] / 1e6, 1) == mparams
    assert found['image_shape'] == ([4, 64, 64] if 'img512' in name else [3, 64, 64])


def test_dry_run_prints_the_settings_and_what_has_changed(tmp_path):
    data = make_data(tmp_path / 'data.zip', [3, 32, 32], 10)
    args = ['--preset=edm-cifar10-cond', f'--data={data}', f'--outdir={tmp_path}/runs', '--arch=ncsnpp', '-n']
    result = CliRunner().invoke(train.main, args)
    assert result.exit_code == 0, result.output
    assert result.output.startswith('--preset=edm-cifar10-cond: EDM, class-conditional CIFAR-10 32x32; --arch=ncsnpp instead of ddpmpp\n')
    assert '"encoder_type": "residual"' in result.output and not (tmp_path / 'runs').exists()


def test_dry_run_of_a_half_precision_preset_needs_no_gpu(tmp_path):
    args = ['--preset=edm-imagenet64', f'--data={make_data(tmp_path / "data.zip", [3, 64, 64], 1000)}', f'--outdir={tmp_path}/runs']
    if not torch.cuda.is_available():
        assert 'needs a GPU' in CliRunner().invoke(train.main, args).output
    shown = CliRunner().invoke(train.main, [*args, '--dry-run'])
    assert shown.exit_code == 0 and '"precision": "fp16"' in shown.output and not (tmp_path / 'runs').exists()


def test_help_lists_every_preset():
    result = CliRunner().invoke(train.main, ['--preset=help'])
    assert result.exit_code == 0
    for name in presets.names():
        found = presets.read(name)
        assert name in result.output and found['figure'] in result.output and found['source'] in result.output
    assert '384 GPU hours (8 V100, about 2 days)' in result.output and 'GPU hours not published' in result.output


@pytest.mark.parametrize('args, words', [
    (['--preset=edm'], ['--preset=edm', 'edm-cifar10-cond']),
    (['--preset=edm-ffhq64', '--config=RUN'], ['--preset=edm-ffhq64', '--config', 'exclude']),
    (['--preset=ambient-cifar10', '--objective=hybrid'], ['--objective=hybrid', '--precond=edm']),
    (['--preset=iddpm-cifar10-vlb', '--noise=cosine'], ['--noise=cosine']),
    (['--config=nowhere.json'], ['nowhere.json', 'No such file']),
    (['--config=FOREIGN'], ['holds no options']),
    (['--config=OTHER'], ['unknown option "frobnicate"']),
])
def test_refusals(tmp_path, args, words):
    files = {'RUN': {'run': {'command': {'lr': '0.1'}, 'seed': 1}}, 'FOREIGN': {'a': 1}, 'OTHER': {'run': {'command': {'frobnicate': 1}}}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    args = [f'--config={tmp_path / arg[9:]}' if arg[9:] in files else arg for arg in args]
    data = tiny.make_zip(tmp_path / 'data.zip')
    result = CliRunner().invoke(train.main, [f'--data={data}', f'--outdir={tmp_path}/runs', *args])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    line = result.output.strip().splitlines()[-1]
    assert line.startswith('Error: ') and all(word in line for word in words), line
    assert not (tmp_path / 'runs').exists()


def test_config_repeats_a_run(tmp_path):
    """Every option in its own form, the seed that was drawn included; what is given besides wins."""
    data = tiny.make_zip(tmp_path / 'data.zip')
    flags = [f'--data={data}', f'--outdir={tmp_path}/runs', '--cond=1', '--cres=1,2', '--cbase=8', '--attn=4', '--power-ema=0.05,0.10',
             '--term=bridge:coeff=0.2', '--label-corruption=0.1', '--label-corruption-groups=0,1/2', '--weight=min_snr:gamma=5',
             '--batch=16', '--gns=1', '--batch-gpu=8', '--desc=first', '--metrics=fid,kid']
    first, ctx = configured(*flags)
    (tmp_path / 'options.json').write_text(json.dumps(to_json(first)))
    again, ctx = configured(f'--config={tmp_path}/options.json', '--outdir=runs')
    assert to_json(again) == {**to_json(first), 'run': {**to_json(first)['run'], 'command': to_json(again)['run']['command']}}
    assert to_json(from_json(to_json(again))) == to_json(again)
    other, ctx = configured(f'--config={tmp_path}/options.json', '--outdir=runs', '--lr=0.5', '--batch-gpu=4')
    assert (other.optimizer.lr, other.run.batch_gpu, other.run.seed) == (0.5, 4, first.run.seed)
    assert '--batch-gpu=4 instead of 8' in presets.told(ctx) and '--lr' not in presets.told(ctx)
    third = configured(f'--config={tmp_path}/options.json', '--outdir=runs', '--seed=3')[0]
    (tmp_path / 'third.json').write_text(json.dumps(to_json(third)))
    assert configured(f'--config={tmp_path}/third.json', '--outdir=runs')[0].run.seed == 3
