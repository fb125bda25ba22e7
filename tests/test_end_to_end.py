# SPDX-License-Identifier: Apache-2.0
"""The main job on small data, as a user runs it: convert, train in every variant, resume, generate, evaluate."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import dataset_tool
import eval_fid
import generate
import train
from tests.support import launch, tiny
from training.checkpoints.load import load_network
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.store import ImageStore
from training.sampling.generate import generate_images

COUNT, STEPS, BATCH = 48, 3, 8
NET = ['--cbase=8', '--cres=1,2', '--blocks=1', '--attn=4', '--samples=4', '--seed=1']
LENGTH = [f'--batch={BATCH}', f'--duration={STEPS * BATCH / 1e6}', f'--tick={BATCH / 1e3}', '--snap=3', '--dump=3', '--lr-rampup=0']
NOISY = ['--sigma=0.2', '--corruption_probability=0.9']
ISSUE = [*NOISY, '--dataset_keep_percentage=1.0', '--expr_id=x']


def call(command, *args):
    """Runs a script's command in this process; returns what it prints."""
    result = CliRunner().invoke(command, [str(arg) for arg in args])
    assert result.exit_code == 0, (result.output, result.exc_info)
    return result.output


def convert(folder, name, array, *args):
    np.save(folder / f'{name}.npy', array)
    call(dataset_tool.main, f'--source={folder / name}.npy', f'--dest={folder / name}.zip', '--workers=1', *args)
    return folder / f'{name}.zip'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Zips by name: rgb (three classes), grey, float (48x80, five channels, in physical units), sigmas (a noise level a file)."""
    folder = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    smooth = lambda n, h, w, c: (rng.normal(0, 1, (n, 1, 1, c)) + np.zeros((n, h, w, c))
                                 + rng.normal(0, 1, (n, 1, 1, 1)) * np.linspace(-1, 1, w)[:, None])
    to_8bit = lambda x: np.clip(x * 40 + 128, 0, 255).astype(np.uint8)
    np.save(folder / 'labels.npy', np.arange(COUNT) % 3)
    np.save(folder / 'levels.npy', np.where(np.arange(COUNT) % 2, np.linspace(0.1, 0.6, COUNT), 0))
    # Kelvin, say: far from zero, and with a scale of its own in the set as a whole.
    float_images = (smooth(16, 48, 80, 5) * 12 + 280).astype(np.float32)
    return {
        'rgb': convert(folder, 'rgb', to_8bit(smooth(COUNT, 8, 8, 3)), f'--labels={folder / "labels.npy"}'),
        'grey': convert(folder, 'grey', to_8bit(smooth(COUNT, 8, 8, 1))),
        'float': convert(folder, 'float', float_images, '--layout=nhwc'),
        'sigmas': convert(folder, 'sigmas', to_8bit(smooth(COUNT, 8, 8, 3)), f'--sigmas={folder / "levels.npy"}'),
        'float_images': float_images}


def check_run(outdir, steps=STEPS, batch=BATCH):
    """What every run must leave behind; returns its folder and the lines of stats.jsonl."""
    folder = tiny.only_folder(outdir)
    kimg = f'{steps * batch / 1e3:010.3f}'
    assert {'options.json', 'log.txt', 'stats.jsonl', f'network-snapshot-{kimg}', f'training-state-{kimg}.pt',
            f'samples-{kimg}.png'} <= set(os.listdir(folder))
    assert not list(Path(outdir).rglob('.*')), 'no temporary file stays'
    lines = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
    ticks = [line for line in lines if 'Progress/tick' in line]
    assert [line['nimg'] for line in ticks] == [batch * (k + 1) for k in range(steps)]
    assert all(math.isfinite(line['Loss/denoise']) and math.isfinite(line['Grad/norm']) for line in ticks)
    assert all(line['Grad/skipped'] == 0 and line['Grad/norm'] > 0 for line in ticks)
    net = load_network(folder / f'network-snapshot-{kimg}')
    state = tiny.read_state(folder / f'training-state-{kimg}.pt')
    assert state['progress']['nimg'] == steps * batch and state['progress']['step'] == steps
    for name, tensor in net.state_dict().items():
        assert tensor.isfinite().all() and torch.equal(tensor, state['ema']['halflife'][name])
    return folder, ticks, net


VARIANTS = {
    'issue': ('rgb', ISSUE),
    'classes': ('rgb', [*NOISY, '--cond=1']),
    'ncsnpp': ('rgb', [*NOISY, '--arch=ncsnpp']),
    'adm': ('rgb', [*NOISY, '--arch=adm', '--cond=1']),
    'vp': ('rgb', [*NOISY, '--precond=vp']),
    've': ('rgb', [*NOISY, '--precond=ve']),
    'iddpm': ('rgb', [*NOISY, '--precond=iddpm']),
    'consistency': ('rgb', [*NOISY, '--consistency_coeff=1', '--consistency_batch_size=4', '--num_consistency_steps=3', '--num_primes=2']),
    'grey': ('grey', NOISY),
    'float': ('float', [*NOISY, '--cres=1,2,2', '--attn=12']),
    'sigmas': ('sigmas', []),
    'bf16': ('rgb', [*NOISY, '--precision=bf16']),
    'xflip': ('rgb', [*NOISY, '--xflip=1', '--dataset_keep_percentage=0.5']),
    'published': ('rgb', [*NOISY, '--xflip=1', '--corruption-protocol=published']),
    'truncate': ('rgb', [*NOISY, '--pairing=truncate:buffer=1.1', '--weight=snr', '--noise=loguniform']),
    'sigma_first': ('sigmas', ['--pairing=sigma_first']),
    'clamp': ('rgb', [*NOISY, '--pairing=clamp']),
    'accumulate': ('rgb', [*NOISY, '--batch-gpu=2', '--ls=100', '--workers=0', '--cache=0', '--augment=0', '--dropout=0']),
    'val': ('rgb', [*NOISY, '--cond=1', '--val=0.25', '--weight_decay=0.01']),
    'tensorboard': ('rgb', [*NOISY, '--tensorboard']),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_variants(data, tmp_path, name):
    """Each trains a few steps, and its snapshot makes finite pictures."""
    which, args = VARIANTS[name]
    output = call(train.main, f'--outdir={tmp_path}', f'--data={data[which]}', *LENGTH, *NET, *args)
    folder, ticks, net = check_run(tmp_path)
    assert 'Done: ' in output and f'tick {STEPS}  kimg' in output
    channels, height, width = ImageDataset(data[which]).image_shape
    x = torch.randn([2, channels, height, width], generator=torch.Generator().manual_seed(0))
    labels = torch.eye(3)[:2] if net.label_dim else None
    assert net(x, torch.tensor([0.5, 2.0]), labels).isfinite().all()
    with Image.open(next(folder.glob('samples-*.png'))) as grid:
        assert grid.mode == ('RGB' if which in ('rgb', 'sigmas') else 'L') and min(grid.size) >= 2 * min(height, width)
    check_variant(name, folder, ticks, net, output)


def check_variant(name, folder, ticks, net, output):
    """What shows that the option reached the run."""
    last = ticks[-1]
    log = (folder / 'log.txt').read_text()
    if name == 'issue':
        assert folder.name == '00000-x' and '43 noisy (89.58%)' in log and '5 clean' in log
        assert 0 < last['Pairs/accepted'] < 1 and last['Loss/denoise/noisy'] > 0
    elif name in ('classes', 'adm'):
        assert net.label_dim == 3 and 'cond' in folder.name
    elif name in ('vp', 've', 'iddpm'):
        assert type(net).__name__.lower() == f'{name}precond'
    elif name == 'consistency':
        assert all(line['Loss/consistency'] > 0 for line in ticks)
    elif name == 'float':
        assert net.img_resolution == [48, 80] and net.units == ImageDataset(folder_data(folder)).units
    elif name == 'sigmas':
        assert '24 noisy (50.00%)' in log
    elif name == 'xflip':
        assert '48 training images' in log and '44 noisy' in log  # 22 of the 24 that are kept, and their mirror images
    elif name == 'clamp':
        assert last['Pairs/accepted'] == 1
    elif name == 'accumulate':
        assert 'noisy images recomputed at each use' in log
    elif name == 'val':
        lines = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
        held_out = [line for line in lines if 'Val/noisy' in line]
        assert held_out and all(math.isfinite(value) for value in held_out[-1].values() if value is not None)
        assert '36 training images' in log
    elif name == 'tensorboard':
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(folder)).Reload()
        assert [event.value for event in events.Scalars('Loss/denoise')] == pytest.approx([line['Loss/denoise'] for line in ticks])


def folder_data(folder):
    return json.loads((folder / 'options.json').read_text())['data']['path']


def test_bf16_computes_in_bf16(data, tmp_path):
    """The same run in two precisions: close, and not equal."""
    losses = {}
    for precision in ('fp32', 'bf16'):
        call(train.main, f'--outdir={tmp_path / precision}', f'--data={data["rgb"]}', *LENGTH, *NET, *NOISY, f'--precision={precision}')
        losses[precision] = [line['Loss/denoise'] for line in check_run(tmp_path / precision)[1]]
    assert losses['bf16'] != losses['fp32'] and losses['bf16'] == pytest.approx(losses['fp32'], rel=0.03)


@pytest.mark.slow
def test_compiled_network_trains_alike(data, tmp_path):
    losses = {}
    for compiled in (0, 1):
        call(train.main, f'--outdir={tmp_path / str(compiled)}', f'--data={data["grey"]}', *LENGTH, *NET, f'--compile={compiled}',
             '--dropout=0')
        losses[compiled] = [line['Loss/denoise'] for line in check_run(tmp_path / str(compiled))[1]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_two_ranks_by_torchrun(data, tmp_path):
    """The published command line on two CPU ranks: the losses are those of one rank, where nothing depends on the rank."""
    args = [f'--data={data["rgb"]}', *ISSUE, *LENGTH, *NET, '--dropout=0']
    call(train.main, f'--outdir={tmp_path / "one"}', *args)
    command = launch.command(tiny.ROOT / 'train.py', [f'--outdir={tmp_path / "two"}', *args], ranks=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    one, two = (check_run(tmp_path / name)[1] for name in ('one', 'two'))
    assert [line['Loss/denoise'] for line in two] == pytest.approx([line['Loss/denoise'] for line in one], rel=1e-4)
    assert done.stdout.count('Done: ') == 1 and done.stdout.count(f'tick {STEPS} ') == 1


def test_wandb_receives_the_lines_of_stats_jsonl(data, tmp_path, monkeypatch):
    """With a stand-in for the package, which is not needed otherwise."""
    sent = []

    class Project:
        define_metric = finish = lambda self, *args, **options: None

        def log(self, fields, step):
            sent.append(fields)

    stand_in = type(sys)('wandb')
    stand_in.__spec__ = object()
    stand_in.init = lambda **options: sent.append(options) or Project()
    monkeypatch.setitem(sys.modules, 'wandb', stand_in)
    call(train.main, f'--outdir={tmp_path}', f'--data={data["grey"]}', *LENGTH, *NET, '--wandb=mine')
    folder, ticks, _ = check_run(tmp_path)
    assert sent[0]['project'] == 'mine' and sent[0]['name'] == folder.name and sent[0]['config']['run']['batch'] == BATCH
    losses = [line['Loss/denoise'] for line in sent[1:] if 'Loss/denoise' in line]
    assert losses == pytest.approx([line['Loss/denoise'] for line in ticks])


# --- whole journeys

def test_journey_of_pictures(data, tmp_path):
    """Convert (as the fixture did), train, resume, generate from snapshot and state, evaluate."""
    start = [f'--outdir={tmp_path / "runs"}', f'--data={data["rgb"]}', *LENGTH, *NET, *ISSUE, '--cond=1']
    call(train.main, *start)
    first = check_run(tmp_path / 'runs')[0]
    output = call(train.main, *start, f'--duration={2 * STEPS * BATCH / 1e6}', '--resume=latest')
    folder, _, _ = check_run(tmp_path / 'runs', 2 * STEPS)
    assert folder == first and 'Restored' in output

    kimg = f'{2 * STEPS * BATCH / 1e3:010.3f}'
    common = ['--seeds=0-19', '--steps=4']
    call(generate.main, f'--network={folder / f"network-snapshot-{kimg}"}', f'--outdir={tmp_path / "a"}', *common, '--grid')
    call(generate.main, f'--network={folder / f"training-state-{kimg}.pt"}', f'--outdir={tmp_path / "b"}', *common, '--batch=7')
    names = [f'{seed:06d}.png' for seed in range(20)]
    assert sorted(os.listdir(tmp_path / 'a')) == sorted(os.listdir(tmp_path / 'b')) == names
    for name in names:
        pixels = np.asarray(Image.open(tmp_path / 'a' / name))
        assert pixels.shape == (8, 8, 3) and np.array_equal(pixels, np.asarray(Image.open(tmp_path / 'b' / name)))
    assert Image.open(tmp_path / 'a-grid.png').size[0] >= 32

    pixels = '--detector=pixels'
    call(eval_fid.main, 'ref', f'--data={data["rgb"]}', f'--dest={tmp_path / "ref.npz"}', pixels)
    call(eval_fid.main, f'--gen_path={tmp_path / "a"}', f'--ref_stats={tmp_path / "ref.npz"}', '--num=20', pixels,
         f'--out_path={tmp_path / "fid.json"}')
    result = json.loads((tmp_path / 'fid.json').read_text())
    assert math.isfinite(result['fid_score']) and result['fid_score'] > 0
    assert result['num_images'] == 20 and result['reference']['num_images'] == COUNT


def test_journey_of_measurements(data, tmp_path):
    """Five float channels of 48x80: the samples come back as float32 in the units of the source."""
    call(train.main, f'--outdir={tmp_path / "runs"}', f'--data={data["float"]}', *LENGTH, *NET, *NOISY, '--cres=1,2,2', '--attn=12',
         '--sigma-data=0.5')
    folder, _, net = check_run(tmp_path / 'runs')
    call(generate.main, f'--network={next(folder.glob("network-snapshot-*"))}', f'--outdir={tmp_path / "out"}', '--seeds=0-3', '--steps=4')
    found = np.stack([np.load(tmp_path / 'out' / f'{seed:06d}.npy') for seed in range(4)])
    images = data['float_images'].transpose(0, 3, 1, 2)
    assert found.shape == (4, 5, 48, 80) and found.dtype == np.float32 and np.isfinite(found).all()
    assert abs(found.mean() - images.mean()) < images.std(), 'about 280 K: hardly trained, but not in network units'
    in_network_units = torch.cat([part.images for part in generate_images(net, range(4), num_steps=4)])
    assert np.allclose(found, in_network_units * net.units['scale'] + net.units['offset'], atol=1e-3)
    stored = np.stack([ImageDataset(data['float']).decode(i) for i in range(len(images))])
    assert np.array_equal(stored, images), 'the archive holds the very values of the source'
    assert np.allclose((images - net.units['offset']) / net.units['scale'], ImageDataset(data['float']).to_network(stored), atol=1e-5)


def test_journey_of_channels_with_units_of_their_own(tmp_path):
    """Temperature and pressure, say: each channel of the samples comes back in its own units, though hardly trained."""
    units = {'offset': [280.0, 1e5], 'scale': [24.0, 2e3]}
    by_channel = {key: np.reshape(value, [2, 1, 1]) for key, value in units.items()}
    images = np.random.default_rng(0).normal(0, 0.5, (16, 2, 8, 8)) * by_channel['scale'] + by_channel['offset']
    path = convert(tmp_path, 'x', images.astype(np.float32), '--units=280,24/1e5,2e3', '--layout=nchw')
    call(train.main, f'--outdir={tmp_path / "runs"}', f'--data={path}', *LENGTH, *NET, *NOISY)
    folder, _, net = check_run(tmp_path / 'runs')
    assert net.units == units
    call(generate.main, f'--network={next(folder.glob("network-snapshot-*"))}', f'--outdir={tmp_path / "out"}', '--seeds=0-3', '--steps=4')
    found = np.stack([np.load(tmp_path / 'out' / f'{seed:06d}.npy') for seed in range(4)])
    in_network_units = torch.cat([part.images for part in generate_images(net, range(4), num_steps=4)]).numpy()
    np.testing.assert_allclose((found - by_channel['offset']) / by_channel['scale'], in_network_units, atol=1e-3)
    assert abs(in_network_units).max() < 20, 'so that the units are what tells the channels apart'


def test_training_learns(data, tmp_path):
    """Smooth pictures, nine tenths of them noisy: the loss falls, and clean pictures are found again better than by doing nothing,
    and better than by the best single factor, which uses no structure."""
    steps = 120
    call(train.main, f'--outdir={tmp_path}', f'--data={data["grey"]}', *NET, *NOISY, '--cbase=16', '--batch=32', '--lr=3e-3',
         '--lr-rampup=0', f'--duration={steps * 32 / 1e6}', '--tick=0.32', '--snap=12', '--dump=0', '--ema=0.0005', '--dropout=0',
         '--augment=0', '--samples=0')
    folder = tiny.only_folder(tmp_path)
    loss = [json.loads(line)['Loss/denoise'] for line in (folder / 'stats.jsonl').read_text().splitlines()]
    assert len(loss) == 12 and np.mean(loss[-3:]) < 0.75 * loss[0]

    net = load_network(next(folder.glob('network-snapshot-*')))
    clean = store_of(data['grey'])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    for sigma in (0.3, 0.6, 1.2):
        error = (net(clean + sigma * noise, torch.tensor(sigma)) - clean).square().mean().item()
        power = clean.square().mean().item()
        assert error < 0.6 * sigma ** 2 and error < 0.8 * power * sigma ** 2 / (power + sigma ** 2), sigma


def store_of(path):
    """All images of a set in network units."""
    dataset = ImageDataset(path)
    return ImageStore(dataset, Corruption(), dataset.native_sigma).gather(np.arange(len(dataset)))
