# SPDX-License-Identifier: Apache-2.0
"""A disk that is full in the middle of a run: the run says so, keeps what it has, goes on and tries again."""

import json
import os

import pytest

from tests.support import tiny
from tests.support.full_disk import small_disk
from torch_utils import checkpoint
from training.checkpoints.load import load_network
from training.run import training_loop

ARGS = ['--seed=5', '--expr-id=x', '--tick=0.08', '--snap=1', '--dump=1', '--samples=2', '--val=0.2', '--threads=1', '--keep-states=0',
        '--power-ema=0.1']


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / 'disk', 64) as found:
        yield found


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny.make_zip(tmp_path_factory.mktemp('data') / 'data.zip')


def whole(folder):
    """Everything under a final name in a run's folder can be read: states, networks, averages, pictures, JSON."""
    for name in os.listdir(folder):
        assert not name.startswith('.') or name == '.lock', name
        if name.startswith('training-state'):
            checkpoint.load(folder / name)
        elif name.startswith(('network-snapshot', 'ema-snapshot')):
            load_network(str(folder / name)) if name.startswith('network') else None
        elif name == 'stats.jsonl':
            assert [json.loads(line) for line in (folder / name).read_text().splitlines()]
        elif name.endswith('.json'):
            json.loads((folder / name).read_text())


def test_full_for_a_while(disk, data, monkeypatch, capsys):
    """From step 7 to step 17: the tick at 10 and 15 writes nothing, the next ones everything, and no line of the log is lost."""
    step, seen = training_loop.Run.step, []
    monkeypatch.setattr(training_loop, 'RETRY_SEC', 0)

    def watched(run):
        if run.progress.step == 7:
            disk.fill()
        if run.progress.step == 17:
            seen.append(sorted(os.listdir(run.folder.path)))
            whole(tiny.only_folder(disk.path / 'runs'))
            disk.free()
        step(run)
    monkeypatch.setattr(training_loop.Run, 'step', watched)
    args = [f'--outdir={disk.path / "runs"}', f'--data={data}', *tiny.FLAGS, *ARGS]
    assert tiny.call(*args, '--duration=0.0004') is None
    output, folder = capsys.readouterr().out, tiny.only_folder(disk.path / 'runs')
    for name in ('training-state-000000.160.pt', 'network-snapshot-000000.160', 'stats.jsonl'):
        assert f'Warning: {folder / name} could not be written (No space left on device); the training continues, ' in output, name
    assert [name for name in seen[0] if '.160' in name or '.240' in name] == []
    assert [line['nimg'] for line in tiny.read_log(folder) if 'Progress/tick' in line] == [80, 160, 240, 320, 400]
    assert [line['nimg'] for line in tiny.read_log(folder) if 'Val/clean' in line] == [80, 160, 240, 320, 400]
    whole(folder)
    assert {'training-state-000000.080.pt', 'training-state-000000.400.pt', 'network-snapshot-000000.320',
            'ema-snapshot-000000.320-0.100.safetensors', 'samples-000000.320.png'} <= set(os.listdir(folder))
    assert any(name.startswith('training-state-000000.2') for name in os.listdir(folder))  # tried again before the next tick


def test_full_to_the_end(disk, data, monkeypatch, capsys):
    """The run ends in an error that names the file; the last state before is whole, and leads to the same numbers."""
    step = training_loop.Run.step
    monkeypatch.setattr(training_loop.Run, 'step', lambda run: (disk.fill() if run.progress.step == 7 else None, step(run)))
    args = [f'--outdir={disk.path / "runs"}', f'--data={data}', *tiny.FLAGS, *ARGS, '--resume=latest']
    with pytest.raises(Exception, match=r'training-state-000000.160.pt could not be written \(No space left on device\); free disk space'):
        tiny.call(*args, '--duration=0.00016')
    monkeypatch.undo()
    folder = tiny.only_folder(disk.path / 'runs')
    whole(folder)
    assert [os.path.basename(path) for path in checkpoint.states(folder)] == ['training-state-000000.080.pt']
    disk.free()
    tiny.call(*args, '--duration=0.00016')
    straight = [f'--outdir={disk.path / "straight"}', *args[1:], '--duration=0.00016']
    tiny.call(*straight)
    name = 'training-state-000000.160.pt'
    assert tiny.digests(folder, name) == tiny.digests(tiny.only_folder(disk.path / 'straight'), name)
