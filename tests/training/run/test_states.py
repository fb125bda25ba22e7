# SPDX-License-Identifier: Apache-2.0
"""States are written in the background, kept to a number, and read by one rank; one process at a time writes a run."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from dnnlib import UserError
from tests.support import tiny
from torch_utils import checkpoint
from training.run import folder, states, training_loop
from training.run.states import StateWriter


def state(nimg):
    return {**{key: {} for key in checkpoint.KEYS}, 'progress': {'nimg': nimg}, 'net': {'w': torch.full([4], float(nimg))}}


def kept(path):
    return sorted(nimg for nimg, _ in states.by_progress(path))


def test_the_newest_are_kept(tmp_path):
    writer = StateWriter(keep=3)
    for nimg in (10, 20, 30, 40, 50):
        writer.write(str(tmp_path / f'training-state-{nimg:06}.pt'), state(nimg))
    assert writer.finish() is None and kept(tmp_path) == [30, 40, 50]
    (tmp_path / 'training-state-000060.pt').write_bytes(b'damaged')
    writer.write(str(tmp_path / 'training-state-000035.pt'), state(35))  # a run that was taken back to 30
    writer.finish()
    assert kept(tmp_path) == [-1, 30, 35, 40, 50]  # what lies ahead is not its to remove
    for keep, left in [(1, [30]), (0, [10, 20, 30])]:
        sub = tmp_path / str(keep)
        sub.mkdir()
        writer = StateWriter(keep)
        for nimg in (10, 20, 30):
            writer.write(str(sub / f'training-state-{nimg:06}.pt'), state(nimg))
        writer.finish()
        assert kept(sub) == left


def test_the_old_state_goes_when_the_new_one_is_whole(tmp_path, monkeypatch):
    """At no moment is there less than one whole state; one that fails removes none, and is told once."""
    writer = StateWriter(keep=1)
    writer.write(str(tmp_path / 'training-state-000010.pt'), state(10))
    assert writer.finish() is None
    save = checkpoint.save

    def full(path, content):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'save', full)
    writer.write(str(tmp_path / 'training-state-000020.pt'), state(20))
    path, error = writer.finish()
    assert path.endswith('000020.pt') and error.errno == 28 and writer.finish() is None and kept(tmp_path) == [10]
    monkeypatch.setattr(checkpoint, 'save', lambda path, content: (save(path, content), kept(tmp_path) == [10, 20] or os._exit(1)))
    writer.write(str(tmp_path / 'training-state-000020.pt'), state(20))
    assert writer.finish() is None and kept(tmp_path) == [20]


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """And what is written is the state of the step in which it was asked for, whatever the steps after it do to the tensors."""
    run = tiny.make_run(tmp_path)
    run.step()
    before = tiny.digest(run.net.state_dict()), tiny.digest(run.optimizer.state_dict())
    gate, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, 'save', lambda path, content: (gate.wait(30), save(path, content)))
    run.save_state()
    run.step()
    run.look_at_states()
    assert run.states.busy and not checkpoint.states(tmp_path)
    gate.set()
    run.finish_states()
    found = checkpoint.load(checkpoint.states(tmp_path)[0])
    assert (tiny.digest(found['net']), tiny.digest(found['optimizer'])) == before and found['progress']['step'] == 1
    assert tiny.digest(run.net.state_dict()) != before[0]


def test_a_disk_error_of_pytorchs_writer_keeps_its_name():
    """It says "unexpected pos", and nothing of the disk."""
    try:
        try:
            raise OSError(28, 'No space left on device')
        except OSError:
            raise RuntimeError('unexpected pos 64 vs 0')  # noqa: B904
    except RuntimeError as err:
        assert checkpoint._cause(err).errno == 28
    assert 'strange' in str(checkpoint._cause(RuntimeError('strange')))


def test_nothing_of_the_file_is_held_after_the_restore(tmp_path):
    """Neither its content nor a mapping of it."""
    run = tiny.make_run(tmp_path)
    run.step()
    run.save_state()
    run.finish_states()
    (path,) = checkpoint.states(tmp_path)
    content = checkpoint.load(path)
    mapped = lambda: any(str(path) in line for line in Path('/proc/self/maps').read_text().splitlines())
    assert mapped()
    run.restore(content, path)
    assert content == {} and not mapped()
    run.step()


def test_one_process_at_a_time(tmp_path, monkeypatch):
    """The same command a second time: refused, with the name of the first, which does not notice."""
    data = tiny.make_zip(tmp_path / 'data.zip')
    script, log = tmp_path / 'slow.py', tmp_path / 'log'
    script.write_text('import time, train\nfrom training.run import training_loop\nstep = training_loop.Run.step\n'
                      'training_loop.Run.step = lambda run: (time.sleep(0.05), step(run))\ntrain.main()\n')
    args = [f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, '--dump=1', '--snap=0', '--expr-id=x', '--resume=latest',
            '--duration=0.01']
    process = tiny.start(args, log, script=script)
    while 'tick 2 ' not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    monkeypatch.setattr(folder, 'LOCK_WAIT_SEC', 0)
    with pytest.raises(UserError, match=f'00000-x is in use by process {process.pid} on .*: wait for that run to end, stop it'):
        tiny.call(*args)
    lines = log.read_text().count('tick')
    while log.read_text().count('tick') < lines + 2:
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    process.kill()
    process.wait()
    monkeypatch.setattr(training_loop.Run, 'step', lambda run: (_ for _ in ()).throw(UserError('far enough')))
    with pytest.raises(UserError, match='far enough'):
        tiny.call(*args)  # the dead hold no lock


def test_what_killed_writers_left_is_cleared_away(tmp_path):
    """Unfinished files go; a folder that was about to be replaced has its name back."""
    whole, other = tmp_path / 'network-snapshot-000001', tmp_path / 'network-snapshot-000002'
    for path in (tmp_path / '.network-snapshot-000001-old-0123abcd', tmp_path / '.network-snapshot-000001-part-0123abcd',
                 tmp_path / '.network-snapshot-000002-old-0123abcd', other):
        path.mkdir()
        (path / 'model').write_text(path.name)
    (tmp_path / '.training-state-000001.pt.4711').write_text('half')
    (tmp_path / '.netrc').write_text('not ours')
    folder.clear(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['.netrc', whole.name, other.name]
    assert (whole / 'model').read_text() == '.network-snapshot-000001-old-0123abcd' and (other / 'model').read_text() == other.name
