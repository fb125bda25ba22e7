# SPDX-License-Identifier: Apache-2.0
"""Stored power-function averages of a real short run, and what checkpoint_tool.py makes of them."""

import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import checkpoint_tool
import train
from tests.support import tiny
from torch_utils import checkpoint
from training.checkpoints import posthoc
from training.checkpoints.load import load_network
from training.networks import ema
from training.run import training_loop

FLAGS = ['--power-ema=0.10,0.05', '--tick=0.08', '--snap=1', '--seed=5', '--nosubdir', '--lr=1e-2', '--dropout=0', '--augment=0']
STEPS, WIDTH = 80, 0.075


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(folder, directly tracked average of length WIDTH, final weights) of 80 steps with a snapshot every 5."""
    folder = tmp_path_factory.mktemp('posthoc')
    made = []
    with pytest.MonkeyPatch.context() as patch:
        original = training_loop.Run.step

        def step(run):
            if not made:
                made.append(ema.PowerFunctionEMA(run.net, WIDTH))
            nimg = run.progress.nimg
            original(run)
            made[0].update(run.net, nimg, run.config.run.batch)
            made[1:] = [{name: value.clone() for name, value in run.net.state_dict().items()}]

        patch.setattr(training_loop.Run, 'step', step)
        tiny.call(f'--outdir={folder / "run"}', f'--data={tiny.make_zip(folder / "data.zip")}', *tiny.FLAGS, *FLAGS,
                  f'--duration={STEPS * 16e-6:.9f}', '--dump=8')
    return folder / 'run', made[0].module, made[1]


def flat(state):
    return torch.cat([value.double().flatten() for _, value in sorted(state.items())])


def distance(state, other, weights):
    """Norm of the difference, in units of how far the average is from the last weights."""
    return float((flat(state) - flat(other)).norm() / (flat(weights) - flat(other)).norm())


def tool(*args):
    return CliRunner().invoke(checkpoint_tool.main, ['ema', *map(str, args)])


def refused(*args):
    result = tool(*args)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    return result.output.strip()


def test_files_of_a_run(run):
    """A file for each length and snapshot, float32, whose header says what it is; options.json holds the lengths in order."""
    folder, _, _ = run
    stored = posthoc.stored_averages(folder)
    assert [item[1:] for item in stored] == [(80 * k, width) for k in range(1, 17) for width in (0.05, 0.1)]
    assert os.path.basename(stored[0][0]) == 'ema-snapshot-000000.080-0.050.safetensors'
    net = load_network(folder / 'network-snapshot-000001.280')
    assert set(safetensors.torch.load_file(stored[0][0])) == set(net.state_dict())
    state = tiny.read_state(folder / 'training-state-000001.280.pt')
    assert list(state['ema']) == ['halflife', 'power_0.050', 'power_0.100'] and state['options']['optimizer']['power_ema'] == [0.05, 0.1]
    assert tiny.digest(state['ema']['power_0.050']) == tiny.digest(safetensors.torch.load_file(stored[-2][0]))
    assert not [name for name in os.listdir(folder) if name.startswith('.')]


def test_reconstruction_matches_the_tracked_average(run):
    """Another length, at the end of the run, to 1 % of how far the average is from the last weights; and of its own norm far below."""
    folder, tracked, last = run
    net, used, error = posthoc.reconstruct(folder, WIDTH)
    assert distance(net.state_dict(), tracked.state_dict(), last) < 0.01
    assert float((flat(net.state_dict()) - flat(tracked.state_dict())).norm() / flat(tracked.state_dict()).norm()) < 0.01
    assert error < 0.01 and len(used) > 4 and sum(factor for _, factor in used) == pytest.approx(1)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    # The measure tells lengths apart: the stored neighbours are far from the tracked one.
    for width in (0.05, 0.1):
        assert distance(posthoc.reconstruct(folder, width)[0].state_dict(), tracked.state_dict(), last) > 0.05


@pytest.mark.parametrize('width, nimg', [(0.05, None), (0.1, None), (0.05, 640), (0.1, 80)])
def test_stored_length_is_its_file(run, width, nimg):
    """One-hot to rounding, and the tensors of the file to float32 rounding."""
    folder, _, _ = run
    net, used, error = posthoc.reconstruct(folder, width, nimg)
    name = f'ema-snapshot-{(nimg or 1280) / 1e3:010.3f}-{width:.3f}.safetensors'
    factors = dict(used)
    assert factors.pop(name) == pytest.approx(1, abs=1e-8) and all(abs(factor) < 1e-8 for factor in factors.values())
    assert error < 1e-6
    stored = safetensors.torch.load_file(folder / name)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, stored[key], rtol=1e-6, atol=1e-7)


def test_command(run, tmp_path):
    """The network of --dest is that of reconstruct(), in the layout of a snapshot; earlier times by --kimg."""
    folder, _, _ = run
    for flags, nimg in [([], None), (['--kimg=0.64'], 640)]:
        dest = tmp_path / f'net{len(flags)}'
        result = tool(folder, f'--length={WIDTH}', f'--dest={dest}', *flags)
        assert result.exit_code == 0, result.output
        expected, used, error = posthoc.reconstruct(folder, WIDTH, nimg)
        net = load_network(dest)
        assert tiny.digest(net.state_dict()) == tiny.digest(expected.state_dict()) and net.config == expected.config
        lines = result.output.splitlines()
        assert all(name in line for (name, _), line in zip(used, lines, strict=False))
        expected = f'{dest}: EMA of length 0.075 from {len(used)} stored averages, with a profile error of {error:.2%}'
        assert lines[len(used):] == [expected]


def test_command_warns_of_a_bad_profile(run, tmp_path):
    """One snapshot cannot make a much shorter average: it says by how much."""
    folder, _, _ = run
    one = tmp_path / 'one'
    one.mkdir()
    shutil.copytree(folder / 'network-snapshot-000000.080', one / 'network-snapshot-000000.080')
    shutil.copy(folder / 'ema-snapshot-000000.080-0.100.safetensors', one)
    result = tool(one, '--length=0.02', f'--dest={tmp_path / "net"}')
    assert result.exit_code == 0 and 'Warning: ' in result.output.splitlines()[-1]
    off = float(result.output.split('profile error of ')[1].split('%')[0]) / 100
    assert off == pytest.approx(ema.profile_error([(80, 0.1)], (80, 0.02), np.ones(1)), abs=1e-4) and off > 0.5


def test_command_refusals(run, tmp_path):
    folder, _, _ = run
    dest = f'--dest={tmp_path / "net"}'
    bare = tmp_path / 'bare'
    bare.mkdir()
    assert '--power-ema=0.05,0.10' in refused(bare, '--length=0.1', dest)
    assert f'--dest={bare} exists' in refused(folder, '--length=0.1', f'--dest={bare}')
    for length in ('0.3', '0', '-0.1', 'nan'):
        assert 'must lie above 0 and at most at 0.2887' in refused(folder, f'--length={length}', dest)
    assert 'stored at 0.65 kimg; the nearest are at 0.64' in refused(folder, '--length=0.1', '--kimg=0.65', dest)
    assert 'stored at 0 kimg; the nearest are at 0.08' in refused(folder, '--length=0.1', '--kimg=0', dest)
    assert '--kimg' in refused(folder, '--length=0.1', '--kimg=nan', dest)
    assert 'nowhere' in refused(tmp_path / 'nowhere', '--length=0.1', dest)
    shutil.copy(folder / 'ema-snapshot-000000.080-0.100.safetensors', bare)
    assert 'network-snapshot' in refused(bare, '--length=0.1', dest)
    (bare / 'ema-snapshot-000000.080-0.100.safetensors').write_bytes(b'cut off')
    assert 'not an average written by train.py' in refused(bare, '--length=0.1', dest)
    safetensors.torch.save_file({'x': torch.ones(1)}, bare / 'ema-snapshot-000000.080-0.100.safetensors')
    assert 'not an average written by train.py' in refused(bare, '--length=0.1', dest)
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize('value, word', [('0.05,0.3', '0.3'), ('0.05,', '"0.05,"'), ('0', 'above 0'), ('nan', 'nan'), ('a', 'a'),
                                         ('0.0501', 'three decimals')])
def test_lengths_that_train_refuses(tmp_path, value, word):
    data = tiny.make_zip(tmp_path / 'data.zip')
    result = CliRunner().invoke(train.main, [f'--outdir={tmp_path / "run"}', f'--data={data}', *tiny.FLAGS, f'--power-ema={value}'])
    assert result.exit_code == 2 and len(result.output.splitlines()) == 1 and '--power-ema' in result.output and word in result.output


def test_averages_without_snapshots_are_refused(tmp_path):
    data = tiny.make_zip(tmp_path / 'data.zip')
    result = CliRunner().invoke(train.main, [f'--outdir={tmp_path / "run"}', f'--data={data}', *tiny.FLAGS, '--power-ema=0.1', '--snap=0'])
    assert result.exit_code == 1 and result.output.startswith('Error: --power-ema') and not (tmp_path / 'run').exists()


def test_resumed_run_equals_straight(run, tmp_path):
    """From the state in the middle (step 40): every later file is the same, bit for bit."""
    folder, _, _ = run
    again = tmp_path / 'run'
    shutil.copytree(folder, again)
    for name in os.listdir(again):
        if name.startswith(('training-state-000001', 'ema-snapshot-000001', 'ema-snapshot-000000.9')):
            os.unlink(again / name)
    assert [os.path.basename(path) for path in checkpoint.states(again)] == ['training-state-000000.640.pt']
    tiny.call(f'--outdir={again}', f'--data={folder.parent / "data.zip"}', *tiny.FLAGS, *FLAGS,
              f'--duration={STEPS * 16e-6:.9f}', '--dump=8', '--resume=latest')
    for path, _, _ in posthoc.stored_averages(folder):
        name = os.path.basename(path)
        assert tiny.digest(safetensors.torch.load_file(again / name)) == tiny.digest(safetensors.torch.load_file(path)), name
    states = [tiny.read_state(where / 'training-state-000001.280.pt') for where in (folder, again)]
    assert tiny.digest(states[0]['ema']) == tiny.digest(states[1]['ema'])
