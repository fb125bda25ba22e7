# SPDX-License-Identifier: Apache-2.0
"""The refine.py command: what a round's set holds, resuming at every point, ranks, and what is refused."""

import functools
import json
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import refine
from tests.support import ROOT, commands, launch, tiny
from training.checkpoints.load import load_network
from training.data.convert.writers import encode_npy
from training.data.dataset import ImageDataset
from training.refinement import loop, restoring
from training.refinement.noisy import NoisySet, options_of
from training.sampling.generate import generate_images

run, refused = (functools.partial(call, refine.main) for call in (commands.run, commands.refused))
NAME, QUICK = 'network-snapshot-000000.320', ['--steps=3', '--threads=1']
LOOP = ['--rounds=2', '--duration=0.00008', '--sampler=dpmpp_2m_sde', '--schedule=dataloops', '--detector=pixels', '--sample-steps=2',
        *QUICK]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """The snapshot of a run on 64 images, 45 of them noisy."""
    folder = tmp_path_factory.mktemp('base')
    tiny.make_zip(folder / 'data.zip')
    tiny.call(f'--outdir={folder}', f'--data={folder / "data.zip"}', *tiny.FLAGS, '--seed=5', '--duration=0.00032', '--threads=1',
              '--expr-id=run')
    return folder / '00000-run' / NAME


def here(command):
    """train.py in this process, in place of loop.call."""
    assert command[1].endswith('train.py'), command
    tiny.call(*command[2:])
    return 0


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(loop, 'call', here)


def files(folder):
    """What a loop's folder must hold the same however often it was interrupted: sets, and rounds.json with digests of all weights."""
    folder = Path(folder)
    return {name: (folder / name).read_bytes() for name in ('rounds.json', 'round-01-data.npz', 'round-02-data.npz')}


@pytest.fixture(scope='module')
def straight(base, tmp_path_factory):
    """The folder of a loop of two rounds that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp('straight') / 'loop'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'call', here)
        patch.setattr(restoring, 'PART', 16)
        return folder, run(f'--network={base}', f'--outdir={folder}', *LOOP)


# ----------------------------------------------------------------------------------------------------
# A round's set


def test_set_of_a_round(base, straight):
    """Noisy images carry s_k, clean ones are untouched, and names' order, labels and shape are those of the data."""
    noisy = NoisySet(options_of(str(base))[1])
    made = ImageDataset(straight[0] / 'round-01-data.npz', use_labels=True)
    old = ImageDataset(base.parent.parent / 'data.zip', use_labels=True)
    assert len(noisy.items) == 45 and made.image_shape == (1, 8, 8) and np.array_equal(made.classes, old.classes)
    expected = np.zeros(64)
    expected[noisy.items] = 0.4 / 8
    assert np.allclose(made.native_sigma, expected, rtol=1e-12, atol=0)
    clean = np.setdiff1d(np.arange(64), noisy.items)
    for i in clean:
        assert np.array_equal(made.decode(i), old.decode(i).astype(np.float32))
    y = noisy.images(noisy.items)
    moved = made.to_network(np.stack([made.decode(i) for i in noisy.items])) - y
    assert moved.flatten(1).abs().amax(1).min() > 0.01


def test_refined_networks_generate_pictures(straight):
    """They are trained on float images in the units of pictures, and stay networks of pictures."""
    entries = json.loads((straight[0] / 'rounds.json').read_text())['rounds']
    net = load_network(straight[0] / entries[2]['network'])
    assert net.units is None
    assert next(generate_images(net, [0], num_steps=2)).images.shape == (1, 1, 8, 8)


def test_always_from_the_originals(base, straight, tmp_path):
    """Round 2 by the network of round 1, from the noisy images themselves: the set of `restore` with that network."""
    entries = json.loads((straight[0] / 'rounds.json').read_text())['rounds']
    dest = tmp_path / 'second.npz'
    run('restore', f'--network={straight[0] / entries[1]["network"]}', f'--config={base.parent / "options.json"}', '--round=2',
        f'--dest={dest}', '--sampler=dpmpp_2m_sde', '--schedule=dataloops', *QUICK)
    assert dest.read_bytes() == (straight[0] / 'round-02-data.npz').read_bytes()


def test_what_is_printed_and_chosen(straight):
    found = json.loads((straight[0] / 'rounds.json').read_text())
    values = [entry['proximal']['fid_score'] for entry in found['rounds']]
    assert len(values) == 3 and found['chosen'] == int(np.argmin(values))
    assert f'Chosen: round {found["chosen"]} (lowest proximal distance)' in straight[1]
    assert [entry.get('ends') for entry in found['rounds']] == [None, [0.4 / 8] * 2, [0.4 / 64] * 2]


def test_batch_and_ranks_do_not_change_the_set(base, straight, tmp_path):
    common = ['restore', f'--network={base}', '--sampler=dpmpp_2m_sde', '--schedule=dataloops', *QUICK]
    run(*common, f'--dest={tmp_path / "one.npz"}', '--batch=5')
    result = launch.run(ROOT / 'refine.py', [*common, f'--dest={tmp_path / "two.npz"}'], ranks=2)
    assert result.returncode == 0, result
    expected = (straight[0] / 'round-01-data.npz').read_bytes()
    assert (tmp_path / 'one.npz').read_bytes() == expected and (tmp_path / 'two.npz').read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ['one.npz', 'two.npz']


def test_images_that_the_run_did_not_keep(base, tmp_path):
    """They keep their places, so that a training with the same --dataset-keep-percentage has the same images, labels and held-out ones."""
    told = json.loads((base.parent / 'options.json').read_text())
    told['data']['keep'] = 0.5
    (tmp_path / 'half.json').write_text(json.dumps(told))
    run('restore', f'--network={base}', f'--config={tmp_path / "half.json"}', f'--dest={tmp_path / "set.npz"}',
        '--schedule=explicit:levels=0.1', *QUICK)
    noisy = NoisySet(options_of(str(base), str(tmp_path / 'half.json'))[1])
    made = ImageDataset(tmp_path / 'set.npz')
    half = ImageDataset(tmp_path / 'set.npz', keep=0.5)
    assert len(made) == 64 and np.array_equal(half.raw_idx, noisy.dataset.raw_idx)
    assert np.array_equal(np.flatnonzero(made.native_sigma), noisy.dataset.raw_idx[noisy.items]) and len(noisy.items) == 22


def test_levels_of_dataset_json(tmp_path):
    """A float set whose images bring their own levels, in its own units; of those at their end already nothing changes."""
    rng = np.random.default_rng(0)
    names = [f'{i:03d}.npy' for i in range(64)]
    sigmas = [0.0, 1.0, 2.0, 4.0] * 16
    with zipfile.ZipFile(tmp_path / 'data.zip', 'w') as archive:
        for name in names:
            archive.writestr(name, encode_npy(rng.normal(10, 5, (1, 8, 8))))
        archive.writestr('dataset.json', json.dumps({'sigmas': [*zip(names, sigmas)], 'units': {'offset': 10.0, 'scale': 10.0}}))
    tiny.call(f'--outdir={tmp_path}', f'--data={tmp_path / "data.zip"}', *tiny.UNET, '--batch=16', '--samples=0', '--duration=0.00008',
              '--tick=0.08', '--snap=1', '--augment=0', '--expr-id=run')
    network = tmp_path / '00000-run' / 'network-snapshot-000000.080'
    run('restore', f'--network={network}', f'--dest={tmp_path / "made.npz"}', '--schedule=explicit:levels=0.1', *QUICK)
    made, old = (ImageDataset(tmp_path / name) for name in ('made.npz', 'data.zip'))
    assert made.units == old.units and np.allclose(made.native_sigma, [0, 0.1, 0.1, 0.1] * 16)
    same = [np.array_equal(made.decode(i), old.decode(i)) for i in range(4)]
    assert same == [True, False, False, False] and np.allclose(made.decode(1), old.decode(1), rtol=1e-5)
    assert np.abs(made.decode(2) - old.decode(2)).max() > 0.01


# ----------------------------------------------------------------------------------------------------
# Resuming


class Killed(BaseException):
    """The process ends here."""


def nth(function, number, after=False):
    """The function, which ends the process at its call `number` (from 1), before its work or after it."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            raise Killed
        found = function(*args, **kwargs)
        if len(calls) == number:
            raise Killed
        return found

    return wrapped


def half(command):
    """Training that is killed in the middle."""
    here([part.replace('--duration=0.00008', '--duration=0.00008') for part in command])
    raise Killed


PLACES = {'restoring': (restoring.Restoring, '_write_part', 2, True), 'set': (restoring.Restoring, '_assemble', 1, False),
          'set written': (restoring.Restoring, '_assemble', 1, True), 'second round': (restoring.Restoring, '_write_part', 5, True),
          'train': (loop, 'call', 1, False), 'trained': (loop, 'call', 2, True), 'rounds': (loop.Loop, '_save', 3, False),
          'chosen': (loop, 'proximal', 2, False)}




@pytest.mark.parametrize('place', ['training', *(pytest.param(place, marks=pytest.mark.slow) for place in PLACES)])
def test_interrupted_and_resumed(base, straight, place, tmp_path, monkeypatch, in_process):
    monkeypatch.setattr(restoring, 'PART', 16)
    args = f'--network={base}', f'--outdir={tmp_path / "loop"}', *LOOP
    with monkeypatch.context() as patch:
        if place == 'training':
            patch.setattr(loop, 'call', half)
        else:
            owner, name, number, after = PLACES[place]
            patch.setattr(owner, name, nth(getattr(owner, name), number, after))
        with pytest.raises(Killed):
            run(*args)
    if place == 'restoring':
        assert not (tmp_path / 'loop' / 'round-01-data.npz').exists()
    (tmp_path / 'loop' / '.round-02-data.npz-left0ver').mkdir()  # of a set that was being written
    run(*args)
    assert files(tmp_path / 'loop') == files(straight[0])
    assert not [path.name for path in (tmp_path / 'loop').iterdir() if path.name.startswith('.')]


def test_finished_parts_are_not_restored_again(base, tmp_path, monkeypatch):
    monkeypatch.setattr(restoring, 'PART', 16)
    args = 'restore', f'--network={base}', f'--dest={tmp_path / "set.npz"}', *QUICK
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(restoring.Restoring, '_write_part', nth(restoring.Restoring._write_part, 2, after=True))
        run(*args)
    written, write = [], restoring.Restoring._write_part
    monkeypatch.setattr(restoring.Restoring, '_write_part', lambda self, number, *rest: written.append(number) or write(self, number,
                                                                                                                    *rest))
    run(*args)
    assert written == [2]


def test_a_finished_loop_gets_more_rounds(base, straight, tmp_path, in_process):
    shutil.copytree(straight[0], tmp_path / 'loop')
    args = [f'--network={base}', f'--outdir={tmp_path / "loop"}', *LOOP]
    before = files(tmp_path / 'loop')
    run(*args)
    assert files(tmp_path / 'loop') == before
    output = run(*[arg.replace('--rounds=2', '--rounds=3') for arg in args])
    assert len(json.loads((tmp_path / 'loop' / 'rounds.json').read_text())['rounds']) == 4 and 'round 3 of 3' in output


def test_other_options_are_refused(base, straight, tmp_path, in_process):
    shutil.copytree(straight[0], tmp_path / 'loop')
    common = f'--network={base}', f'--outdir={tmp_path / "loop"}', *LOOP
    assert '--schedule: dataloops, now sfbd' in refused(*common, '--schedule=sfbd')
    assert 'options of train.py' in refused(*common, '--', '--lr=1e-4')
    (tmp_path / 'loop' / 'rounds.json').write_text('{}')
    assert 'does not hold the rounds' in refused(*common)


@pytest.mark.slow
def test_killed_processes_on_two_ranks(base, tmp_path):
    """Real processes, by torchrun: SIGKILL in the training of round 1; and SIGTERM, with which the training saves its state."""
    args = [f'--network={base}', f'--outdir={tmp_path / "loop"}', *LOOP, '--gpus=2']
    alone = [f'--network={base}', f'--outdir={tmp_path / "straight"}', *LOOP, '--gpus=2']
    assert launch.run(ROOT / 'refine.py', alone).returncode == 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = launch.start(ROOT / 'refine.py', args, tmp_path / 'log')
        end = time.monotonic() + 200
        while 'Training for' not in (tmp_path / 'log').read_text() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        if number == signal.SIGKILL:
            launch.kill_tree(process)
        else:
            launch.signal_ranks(process, number)
            process.wait(100)
        time.sleep(2)
    result = launch.run(ROOT / 'refine.py', args)
    assert result.returncode == 0, result
    assert files(tmp_path / 'loop') == files(tmp_path / 'straight')


def test_exit_code_of_a_failed_training(base, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, 'call', lambda command: 75)
    output = run(f'--network={base}', f'--outdir={tmp_path / "loop"}', *LOOP, code=75)
    assert 'round 1: training: stopped; the same command continues it' in output


def test_call_gives_the_exit_code():
    assert loop.call([sys.executable, '-c', 'raise SystemExit(7)']) == 7
    assert loop.call([sys.executable, '-c', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)']) == 128 + 9


# ----------------------------------------------------------------------------------------------------
# Refusals, and the other commands


def test_proximal_of_several_networks(base, straight, tmp_path):
    entries = json.loads((straight[0] / 'rounds.json').read_text())['rounds']
    refined = straight[0] / entries[1]['network']
    output = run('proximal', f'--network={base}', f'--network={refined}', f'--out-path={tmp_path / "found.json"}', '--detector=pixels',
                 '--sample-steps=2', '--threads=1', '--batch=7')
    found = json.loads((tmp_path / 'found.json').read_text())['networks']
    assert len(output.splitlines()) == 2
    for one, entry in zip(found, entries):
        assert one['proximal']['fid_score'] == pytest.approx(entry['proximal']['fid_score'], rel=1e-9)


def test_without_proximal_the_last_round_is_chosen(base, tmp_path, in_process):
    output = run(f'--network={base}', f'--outdir={tmp_path / "loop"}', *LOOP, '--rounds=1', '--num=0')
    assert 'Chosen: round 1 (the last, since none was measured)' in output


def test_refusals(base, tmp_path):
    common = ['restore', f'--dest={tmp_path / "set.npz"}', '--steps=2']
    shutil.copytree(base, tmp_path / 'alone')
    assert 'no options.json' in refused(*common, f'--network={tmp_path / "alone"}')
    common.append(f'--network={base}')
    assert 'no such file' in refused(*common, '--config=nowhere.json')
    moved = json.loads((base.parent / 'options.json').read_text())
    moved['data']['path'] = 'nowhere.zip'
    (tmp_path / 'moved.json').write_text(json.dumps(moved))
    assert 'name them with --data' in refused(*common, f'--config={tmp_path / "moved.json"}')
    assert 'no image has a higher level' in refused(*common, '--schedule=explicit:levels=0.5')
    assert 'leave stop_sigma out' in refused(*common, '--sampler=heun:stop_sigma=0.1')
    assert 'alpha' in refused(*common, '--sampler=heun:alpha=2')
    assert 'rho must be above 1' in refused(*common, '--schedule=dataloops:rho=0.5')
    clean = json.loads((base.parent / 'options.json').read_text())
    clean['corruption']['probability'] = 0.0
    (tmp_path / 'clean.json').write_text(json.dumps(clean))
    assert 'none of its 64 images is noisy' in refused(*common, f'--config={tmp_path / "clean.json"}')
    (tmp_path / 'set.npz').write_bytes(b'')
    assert 'exists' in refused(*common)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


def test_images_that_are_not_finite(base, tmp_path, monkeypatch):
    monkeypatch.setattr(restoring, 'restored', lambda net, y, *rest, **options: torch.full_like(y, torch.nan))
    line = refused('restore', f'--network={base}', f'--dest={tmp_path / "set.npz"}', *QUICK)
    assert 'not finite' in line and '00000/img' in line and not (tmp_path / 'set.npz').exists()


def test_data_of_another_shape(base, tmp_path):
    with zipfile.ZipFile(tmp_path / 'other.zip', 'w') as archive:
        archive.writestr('a.npy', encode_npy(np.zeros((1, 4, 4))))
        archive.writestr('dataset.json', json.dumps({'units': {'offset': 0, 'scale': 1}}))
    line = refused('restore', f'--network={base}', f'--data={tmp_path / "other.zip"}', f'--dest={tmp_path / "set.npz"}')
    assert '[1, 4, 4]' in line and '[1, 8, 8]' in line
