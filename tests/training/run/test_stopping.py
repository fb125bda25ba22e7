# SPDX-License-Identifier: Apache-2.0
"""A run that is asked to end writes its state, wherever it is asked, and goes on to the numbers of a run that was not."""

import json
import os
import signal
import time
from pathlib import Path

import click
import psutil
import pytest

import eval_fid
from dnnlib import UserError
from tests.support import tiny
from torch_utils import checkpoint
from training.run import stopping, training_loop
from training.run.metrics import PeriodicMetrics
from training.run.stopping import STOPPED, Requests, Signals, Stop
from training.run.validation import Validation
from training.sampling import generate

STEPS_20 = '--duration=0.00032'
FULL = ['--augment=0.5', '--dropout=0.2', '--val=0.2', '--seed=5', '--expr-id=x', '--tick=0.08', '--snap=2', '--dump=4', '--samples=2',
        '--metrics-every=2', '--metrics-num=8', '--metrics-detector=pixels', '--threads=1', '--resume=latest']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    tiny.make_zip(folder / 'data.zip')
    eval_fid.main(['ref', f'--data={folder / "data.zip"}', f'--dest={folder / "ref.npz"}', '--detector=pixels'], standalone_mode=False)
    return folder


def flags(data, outdir):
    return [f'--outdir={outdir}', f'--data={data / "data.zip"}', *tiny.FLAGS, *FULL, f'--metrics-ref={data / "ref.npz"}', STEPS_20]


@pytest.fixture(scope='module')
def straight(tmp_path_factory, data):
    """Digests of 20 steps that nobody stopped."""
    outdir = tmp_path_factory.mktemp('straight')
    tiny.call(*flags(data, outdir))
    return tiny.digests(tiny.only_folder(outdir), tiny.STEP_20)


def ask(number=signal.SIGTERM):
    """This process gets a signal, and has heard it when this returns."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


def after(calls, function, number=signal.SIGTERM):
    """A function that asks the run to end at its n-th call."""
    left = [calls]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            ask(number)
        return function(*args, **kwargs)
    return counted


# (what is called, at which call), and what of the tick is left to do
PLACES = {'first step': ((training_loop.Run, 'step'), 1, []), 'step': ((training_loop.Run, 'step'), 7, []),
          'last step of a tick': ((training_loop.Run, 'step'), 4, []),
          'last step': ((training_loop.Run, 'step'), 20, ['validate', 'snapshot', 'measure', 'state']),
          'end of a tick': ((training_loop.Run, 'report'), 2, ['validate', 'snapshot', 'measure']),
          'validation': ((Validation, '_judge'), 1, ['validate', 'snapshot', 'measure']),
          'snapshot': ((training_loop, 'save_network'), 1, ['snapshot', 'measure']),
          'samples': ((training_loop, 'sample_grid'), 2, ['snapshot', 'measure', 'state']),
          'metrics': ((PeriodicMetrics, '__call__'), 1, ['measure']),
          'state': ((training_loop.StateWriter, 'write'), 1, [])}


@pytest.mark.parametrize('place', PLACES)
def test_stopped_and_continued_equals_straight(tmp_path, data, straight, monkeypatch, capsys, place):
    (owner, name), calls, pending = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(generate, 'GRID_BATCH', 1)
        patch.setattr(owner, name, after(calls, getattr(owner, name)))
        code = tiny.call(*flags(data, tmp_path))
    folder = tiny.only_folder(tmp_path)
    output = capsys.readouterr().out
    if place == 'state':  # of the last tick: there is nothing left to stop
        assert code is None and 'Done: ' in output
    else:
        assert code == STOPPED and 'Stopped: SIGTERM; the state is saved' in output
        assert 'Stopped: SIGTERM' in (folder / 'log.txt').read_text()
        assert tiny.read_state(checkpoint.states(folder)[0])['progress']['pending'] == pending
    assert tiny.call(*flags(data, tmp_path)) is None
    assert tiny.digests(folder, tiny.STEP_20) == straight
    assert not [name for name in os.listdir(folder) if name.startswith('.')]


@pytest.mark.parametrize('number', [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_and_the_end_of_the_hours(tmp_path, data, monkeypatch, capsys, number):
    with monkeypatch.context() as patch:
        patch.setattr(training_loop.Run, 'step', after(3, training_loop.Run.step, number))
        assert tiny.call(*flags(data, tmp_path)) == STOPPED
    assert f'Stopped: {number.name}; ' in capsys.readouterr().out
    assert tiny.call(*flags(data, tmp_path), '--max-hours=1e-6') == STOPPED
    assert 'Stopped: --max-hours=1e-06 reached; ' in capsys.readouterr().out
    states = checkpoint.states(tiny.only_folder(tmp_path))
    assert [tiny.read_state(path)['progress']['step'] for path in states] == [6, 4]  # it is agreed on one step later


def test_handlers_are_put_back(tmp_path, data):
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    tiny.call(*flags(data, tmp_path))
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


@pytest.mark.parametrize('error, told', [
    (RuntimeError('all broken'), ['Traceback (most recent call last)', 'RuntimeError: all broken']),
    (UserError('runs/x: cannot be used'), ['Error: runs/x: cannot be used']), (KeyboardInterrupt(), ['KeyboardInterrupt'])])
def test_the_log_tells_what_a_run_died_of(tmp_path, data, monkeypatch, error, told):
    step = training_loop.Run.step

    def broken(run):
        if run.progress.step == 7:
            raise error
        step(run)
    monkeypatch.setattr(training_loop.Run, 'step', broken)
    with pytest.raises((type(error), click.exceptions.Abort)):
        tiny.call(*flags(data, tmp_path))
    log = (tiny.only_folder(tmp_path) / 'log.txt').read_text()
    assert all(text in log.split('tick 1 ')[1] for text in told), log


# --- as processes: exit codes, second signals, ranks


SLOW_STEP = """
import time, train
from training.run import training_loop
step = training_loop.Run.step
def slow(run):
    step(run)
    if run.progress.step == 7:
        print('waiting', flush=True)
        time.sleep({seconds})
training_loop.Run.step = slow
train.main()
"""


READING = """
import train
from torch_utils import distributed, tensor_file
read = tensor_file.read
def told(path, *args, **kwargs):
    print(f'rank {distributed.rank()} reads {path}', flush=True)
    return read(path, *args, **kwargs)
tensor_file.read = told
train.main()
"""


def start_slow(tmp_path, data, seconds, ranks=1):
    (tmp_path / 'slow.py').write_text(SLOW_STEP.format(seconds=seconds))
    log = tmp_path / 'log'
    process = tiny.start(flags(data, tmp_path / 'runs'), log, ranks, tmp_path / 'slow.py')
    end = time.time() + 60
    while log.read_text().count('waiting') < ranks:
        assert process.poll() is None and time.time() < end, log.read_text()
        time.sleep(0.01)
    return process, log


def test_a_second_signal_ends_at_once(tmp_path, data):
    """Though the main thread sleeps; it says that something is lost, and the folder can be continued."""
    process, log = start_slow(tmp_path, data, 600)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    start = time.time()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM and time.time() - start < 2
    folder = tiny.only_folder(tmp_path / 'runs')
    for text in (log.read_text(), (folder / 'log.txt').read_text()):
        assert 'a second signal, SIGTERM: stopped at once' in text
    tiny.finish(flags(data, tmp_path / 'runs'), log)


def test_one_rank_is_asked_and_all_end(tmp_path, data):
    """Only the second one hears it; the state is of a step that both have made."""
    process, log = start_slow(tmp_path, data, 1, ranks=2)
    second = psutil.Process(process.pid).children()[1]
    second.send_signal(signal.SIGTERM)
    process.wait(60)
    output = log.read_text()
    assert output.count('Stopped: SIGTERM') == 1, output
    folder = tiny.only_folder(tmp_path / 'runs')
    assert tiny.read_state(checkpoint.states(folder)[0])['progress']['step'] in (8, 9)
    script = tmp_path / 'reading.py'
    script.write_text(READING)
    output = tiny.finish(flags(data, tmp_path / 'runs'), log, ranks=2, script=script)
    assert 'rank 0 reads' in output and 'rank 1 reads' not in output  # the state, which is shared
    assert [line['nimg'] for line in tiny.read_log(folder) if 'Progress/tick' in line] == [80, 160, 240, 320]


def test_before_the_first_step_the_first_signal_is_enough(tmp_path, data):
    """There is nothing to save while the data are read; the same command finds the folder again."""
    script, log = tmp_path / 'reading.py', tmp_path / 'log'
    script.write_text("import time, train\nfrom training.run import training_loop\n"
                      "training_loop.load_data = lambda *args: print('reading', flush=True) or time.sleep(600)\ntrain.main()\n")
    process = tiny.start(flags(data, tmp_path / 'runs'), log, script=script)
    while 'reading' not in log.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(10) == STOPPED
    folder = tiny.only_folder(tmp_path / 'runs')
    assert 'SIGINT before the first step: stopped' in (folder / 'log.txt').read_text()
    tiny.finish(flags(data, tmp_path / 'runs'), log)
    assert tiny.only_folder(tmp_path / 'runs') == folder


# --- the pieces


def test_two_signals_at_once_are_one_request():
    """timeout(1) signals a process, and then its group."""
    with Signals() as signals:
        signals.patient = True
        ask()
        ask()
        assert signals.name == 'SIGTERM'


def test_requests(monkeypatch):
    signals = Signals()
    requests = Requests(signals, max_hours=1, state_minutes=1)
    requests.begin()
    assert [requests.after_step() for _ in range(3)] == [False] * 3 and not requests.now()
    requests.state_at -= 60
    assert not requests.after_step() and requests.after_step() and requests.now()
    requests.state_at, requests.retry_at = time.time(), time.time()
    assert requests.now()
    requests.start -= 3600
    assert requests.asked()
    with pytest.raises(Stop, match='--max-hours=1 reached'):
        requests.now()
    signals.name = 'SIGUSR1'
    with pytest.raises(Stop, match='SIGUSR1'):
        requests.now()


def test_states_by_the_clock_change_nothing(tmp_path, data, straight):
    """In the middle of ticks: at each step, here. The newest three are kept, whose options alone differ."""
    tiny.call(*flags(data, tmp_path), '--dump-minutes=1e-9', '--duration=0.00028')
    folder = tiny.only_folder(tmp_path)
    steps = sorted(tiny.read_state(path)['progress']['step'] for path in checkpoint.states(folder))
    assert steps == [16, 17, 18]
    for path in checkpoint.states(folder)[:2]:
        Path(path).unlink()
    tiny.call(*flags(data, tmp_path), '--dump=4')
    found = tiny.digests(folder, tiny.STEP_20)
    assert found == straight and json.loads((folder / 'options.json').read_text())['run']['keep_states'] == 3
