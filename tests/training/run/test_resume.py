# SPDX-License-Identifier: Apache-2.0
"""A run that was killed and continued equals the one that was not, bit for bit; what cannot be continued is refused in one line."""

import contextlib
import json
import math
import os
import shutil
import struct
import time
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

import train
from dnnlib import UserError
from tests.support import launch, tiny
from torch_utils import checkpoint, tensor_file
from training.run.build import transfer_weights

FULL = ['--augment=0.5', '--dropout=0.2', '--xflip=1', '--val=0.2', '--workers=2', '--threads=1', '--seed=5', '--expr-id=x']
FORTY = '--duration=0.00064'  # 40 steps

# train.py, but for a step that never ends: whoever kills it knows where it stands.
STALLED = """
import time, train
from training.run import training_loop
step = training_loop.Run.step
training_loop.Run.step = lambda run: step(run) if run.progress.step < 27 else time.sleep(600)
train.main()
"""


def wait_for(condition, process, log, seconds=120):
    """Waits until a condition holds, while a process runs."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, Path(log).read_text()
        time.sleep(0.002)


def states(outdir):
    return sorted(path.name for path in Path(outdir).glob('*/training-state-*.pt'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return tiny.make_zip(tmp_path_factory.mktemp('data') / 'tiny.zip')


@pytest.fixture(scope='module')
def straight(tmp_path_factory, data):
    """straight(ranks): folder of 40 uninterrupted steps, made once."""
    made = {}

    def make(ranks):
        if ranks not in made:
            outdir = tmp_path_factory.mktemp(f'straight{ranks}')
            tiny.finish([f'--outdir={outdir}', f'--data={data}', *tiny.FLAGS, *FULL, FORTY], outdir / 'log', ranks)
            made[ranks] = tiny.only_folder(outdir)
        return made[ranks]

    return make


def continue_and_compare(args, outdir, log, ranks, straight):
    """Continues the one run under outdir to step 40; its digests must be those of the uninterrupted run."""
    assert states(outdir) == [tiny.STEP_20]
    output = tiny.finish([*args, '--resume=latest'], log, ranks)
    folder = tiny.only_folder(outdir)
    assert f'Restored network, EMA, optimizer, objective and data position from {folder / tiny.STEP_20} (0.32 kimg)' in output
    assert tiny.digests(folder) == tiny.digests(straight(ranks))
    assert sum('Progress/kimg' in line for line in tiny.read_log(folder)) == 8


@pytest.mark.parametrize('ranks', [1, 2])
def test_killed_and_continued_equals_straight(tmp_path, data, straight, ranks):
    """20 steps + SIGKILL of the whole tree at step 27, when the log is ahead of the state + 20 steps = 40 steps."""
    outdir, script = tmp_path / 'runs', tmp_path / 'stalled.py'
    script.write_text(STALLED)
    args = [f'--outdir={outdir}', f'--data={data}', *tiny.FLAGS, *FULL, FORTY]
    process = tiny.start(args, tmp_path / 'log', ranks, script)
    wait_for(lambda: 'tick 5 ' in (tmp_path / 'log').read_text(), process, tmp_path / 'log')
    launch.kill_tree(process)
    assert [line['nimg'] for line in tiny.read_log(tiny.only_folder(outdir))] == [80, 160, 240, 320, 320, 400]  # once by --val
    continue_and_compare(args, outdir, tmp_path / 'log2', ranks, straight)


def kill_at_first_state(args, outdir, log, ranks):
    """Kills a run of train.py as soon as its first state appears; again where it had come to the next one by then."""
    for _ in range(5):
        tiny.clear(outdir)
        process = tiny.start(args, log, ranks)
        wait_for(lambda: states(outdir), process, log)
        launch.kill_tree(process)
        if states(outdir) == [tiny.STEP_20]:
            return
    pytest.fail('the run was never killed in time')


@pytest.mark.parametrize('ranks', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_at_the_moment_of_the_state(tmp_path, data, straight, ranks):
    """train.py itself, at full speed, killed wherever it may be."""
    outdir = tmp_path / 'runs'
    args = [f'--outdir={outdir}', f'--data={data}', *tiny.FLAGS, *FULL, FORTY]
    kill_at_first_state(args, outdir, tmp_path / 'log', ranks)
    continue_and_compare(args, outdir, tmp_path / 'log2', ranks, straight)


def test_workers_of_a_dead_launcher_stop(tmp_path, data):
    """SIGKILL of torchrun alone: its workers end, and write nothing more into the folder."""
    outdir, log = tmp_path / 'runs', tmp_path / 'log'
    args = [f'--outdir={outdir}', f'--data={data}', *tiny.FLAGS, '--threads=1', '--dump=1', '--snap=0', '--duration=1']
    process = tiny.start(args, log, ranks=2, torchrun=True)
    wait_for(lambda: 'tick 2 ' in log.read_text(), process, log)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if any('train.py' in part for part in p.cmdline())]
    assert len(workers) == 2
    process.kill()
    process.wait()
    folder = tiny.only_folder(outdir)
    lines = len(tiny.read_log(folder))
    try:
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    assert len(tiny.read_log(folder)) <= lines + 1  # one may have been in the writing
    assert 'the launcher of this worker is gone' in log.read_text()
    assert len(tiny.read_state(max(folder.glob('*.pt')))['net'])  # whole
    assert not [name for name in os.listdir(folder) if name.startswith('.')]


# --- what may change, and what may not: train.py in this process


@pytest.fixture(scope='module')
def five_steps(tmp_path_factory, data):
    """Folder of a run of five steps without --seed, and the flags that made it."""
    outdir = tmp_path_factory.mktemp('five')
    args = [f'--data={data}', *tiny.FLAGS, '--dump=1', '--snap=0', '--duration=0.00008']
    tiny.call(f'--outdir={outdir}', *args)
    return tiny.only_folder(outdir), args


@pytest.fixture
def copied(tmp_path, five_steps):
    """(outdir, run folder, flags): a copy of five_steps for one test."""
    folder, args = five_steps
    shutil.copytree(folder, tmp_path / 'runs' / folder.name)
    return tmp_path / 'runs', tmp_path / 'runs' / folder.name, args


def refused(*args):
    """The one line that train.py ends with."""
    result = CliRunner().invoke(train.main, [str(arg) for arg in args])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    errors = [line for line in result.output.splitlines() if line.startswith('Error: ')]
    assert len(errors) == 1 and result.output.rstrip().endswith(errors[0])
    return errors[0]


STATE_5 = 'training-state-000000.080.pt'


def test_file_continues_in_its_folder_with_its_seed(copied, tmp_path):
    _, folder, args = copied
    seed = json.loads((folder / 'options.json').read_text())['run']['seed']
    tiny.call(f'--outdir={tmp_path / "other"}', *args, f'--resume={folder / STATE_5}', '--duration=0.00016')
    assert not (tmp_path / 'other').exists()
    state = tiny.read_state(folder / 'training-state-000000.160.pt')
    assert state['options'] == json.loads((folder / 'options.json').read_text()) and state['options']['run']['seed'] == seed
    assert state['progress']['step'] == 10
    assert [line['nimg'] for line in tiny.read_log(folder)] == [80, 160]


def test_the_printed_seed_is_the_one_that_is_used(copied, capsys):
    outdir, folder, args = copied
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00008')
    assert f'seed {json.loads((folder / "options.json").read_text())["run"]["seed"]}\n' in capsys.readouterr().out


def test_what_may_change(copied):
    outdir, folder, args = copied
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00024', '--tick=0.04', '--snap=3', '--dump=2', '--workers=0',
              '--batch-gpu=4', '--precision=bf16', '--samples=1', '--bench=0', '--cache-gib=0')
    assert tiny.only_folder(outdir) == folder
    assert json.loads((folder / 'options.json').read_text())['run']['precision'] == 'bf16'
    assert tiny.read_state(folder / 'training-state-000000.240.pt')['progress']['step'] == 15


@pytest.mark.parametrize('flag, named', [
    ('--lr=2e-3', 'optimizer.lr: 0.001 -> 0.002'), ('--batch=32', 'run.batch: 16 -> 32'), ('--sigma=0.5', 'corruption.sigma: 0.4 -> 0.5'),
    ('--seed=1', 'run.seed: '), ('--expr-id=y', 'run.expr_id: None -> y'), ('--pairing=truncate', 'objective.pairing: skip -> truncate'),
    ('--weight=uniform', 'objective.weight: edm -> uniform'), ('--val=0.2', "data.validation: None -> {'share': 0.2, 'path': None"),
    ('--power-ema=0.1', 'optimizer.power_ema: '), ('--clip=1', 'optimizer.clip: 0.0 -> 1.0'),
    ('--cbase=32', 'network.arguments.model_channels: 16 -> 32'), ('--arch=ncsnpp', 'network.arguments.encoder_type: ')])
def test_another_option_is_refused_by_name(five_steps, tmp_path, flag, named):
    folder, args = five_steps
    line = refused(f'--outdir={tmp_path / "out"}', *args, f'--resume={folder / STATE_5}', '--snap=4', flag)
    assert named in line and STATE_5 in line
    assert not (tmp_path / 'out').exists()


def test_another_length_of_a_cosine_is_another_run(tmp_path, data):
    """Its length is that of --duration, and part of the configuration; told by itself it holds, whatever --duration says."""
    args = [f'--data={data}', *tiny.FLAGS, '--dump=1', '--snap=0', '--lr-schedule=cosine:least=0.1', '--duration=0.00008']
    tiny.call(f'--outdir={tmp_path / "runs"}', *args)
    folder = tiny.only_folder(tmp_path / 'runs')
    line = refused(f'--outdir={tmp_path / "out"}', *args, f'--resume={folder / STATE_5}', '--duration=0.00016')
    assert 'optimizer.schedule: cosine:least=0.1,kimg=0.08 -> cosine:least=0.1,kimg=0.16' in line
    tiny.call(f'--outdir={tmp_path / "out"}', *args, f'--resume={folder / STATE_5}', '--duration=0.00016',
              '--lr-schedule=cosine:least=0.1,kimg=0.08')
    first, second = (entry['Optimizer/lr'] for entry in tiny.read_log(folder))
    assert first == pytest.approx(1e-3 * (0.1 + 0.9 * (1 + math.cos(0.8 * math.pi)) / 2)) and second == pytest.approx(1e-4)


def test_files_that_are_no_states(five_steps, tmp_path):
    folder, args = five_steps
    whole = (folder / STATE_5).read_bytes()
    cut, text, other, code = (tmp_path / name for name in ('cut.pt', 'text.pt', 'other.pt', 'code.pt'))
    cut.write_bytes(whole[:len(whole) // 2])
    text.write_text('no state')
    torch.save({'net': {}}, other)
    torch.save({'net': print}, code)
    for path, reason in [(cut, 'cannot be read as a training state'), (text, 'cannot be read as a training state'),
                         (other, 'not a training state (lacks options, progress, ema, optimizer, objective)'),
                         (code, 'it holds more than tensors and plain values'), (tmp_path / 'none.pt', 'no such file'),
                         (tmp_path, 'cannot be read as a training state')]:
        line = refused(f'--outdir={tmp_path / "out"}', *args, f'--resume={path}')
        assert str(path) in line and reason in line, line


def test_latest_without_a_state_starts_fresh(tmp_path, data, copied):
    outdir, folder, args = copied
    tiny.call(f'--outdir={tmp_path / "none"}', *args, '--resume=latest', '--duration=0.00008')
    assert states(tmp_path / 'none') == [STATE_5]
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00008', '--arch=ncsnpp')  # a run of another name
    assert sorted(os.listdir(outdir)) == [folder.name, folder.name.replace('00000', '00001').replace('ddpmpp', 'ncsnpp')]


@pytest.mark.parametrize('named', [[], ['--expr-id=mine']])
def test_latest_refuses_where_only_other_runs_of_that_name_are(tmp_path, data, named):
    """A changed option is a mistake, or another run: neither is for the program to guess."""
    args = [f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, *named, '--dump=0', '--snap=0', '--duration=0.00008']
    tiny.call(*args)
    name = tiny.only_folder(tmp_path / 'runs')
    line = refused(*args, '--resume=latest', '--lr=5e-4')
    assert f'{name} was trained with other options (optimizer.lr: 0.001 -> 0.0005)' in line and '--expr-id' in line
    assert tiny.only_folder(tmp_path / 'runs') == name
    tiny.call(*args, '--lr=5e-4')
    assert len(os.listdir(tmp_path / 'runs')) == 2


def test_latest_goes_on_in_the_folder_of_a_run_without_a_state(tmp_path, data):
    """It ended before its first state: it starts again in its folder, with its seed."""
    args = [f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, '--dump=0', '--snap=0', '--duration=0.00008']
    tiny.call(*args)
    folder = tiny.only_folder(tmp_path / 'runs')
    lines = tiny.read_log(folder)
    tiny.call(*args, '--resume=latest')
    assert tiny.only_folder(tmp_path / 'runs') == folder and tiny.read_log(folder) == lines


def test_latest_takes_the_folder_of_a_run_that_was_killed_at_once(tmp_path, data):
    """There is nothing in it yet, but for the lock and a file that was begun."""
    blank = tmp_path / 'runs' / '00000-x'
    blank.mkdir(parents=True)
    for name in ('.lock', '.options.json.4711'):
        (blank / name).touch()
    tiny.call(f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, '--snap=0', '--dump=1', '--duration=0.00008', '--expr-id=x',
              '--resume=latest')
    assert tiny.only_folder(tmp_path / 'runs') == blank and sorted(os.listdir(blank)) == ['log.txt', 'options.json', 'stats.jsonl', STATE_5]


def test_options_are_looked_at_before_states(copied, monkeypatch):
    """The states of other runs are not opened at all."""
    outdir, folder, args = copied
    other = outdir / '00001-other'
    shutil.copytree(folder, other)
    options = json.loads((other / 'options.json').read_text())
    options['optimizer']['lr'] = 1.0
    (other / 'options.json').write_text(json.dumps(options))
    opened, read = [], tensor_file.read
    monkeypatch.setattr(tensor_file, 'read', lambda path, *rest, **more: opened.append(Path(path)) or read(path, *rest, **more))
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    assert {path.parent for path in opened} == {folder}


def test_latest_goes_by_progress_not_by_time(copied, capsys):
    """A copied folder has the times of the copying: the state that has come farthest is taken, and the log kept to it."""
    outdir, folder, args = copied
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    os.utime(folder / STATE_5, (2e9, 2e9))
    os.rename(folder / STATE_5, folder / 'training-state-000009.000.pt')  # nor by its name
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00024')
    assert [line['nimg'] for line in tiny.read_log(folder)] == [80, 160, 240]
    assert f'position from {folder / "training-state-000000.160.pt"} (0.16 kimg)' in capsys.readouterr().out
    assert tiny.read_state(folder / 'training-state-000000.240.pt')['progress']['step'] == 15


def inside_a_tensor(path, share):
    """Offset of a byte in the middle of a record of the file: the one so far into the list of those with tensors."""
    with zipfile.ZipFile(path) as archive:
        records = [info for info in archive.infolist() if '/data/' in info.filename and info.file_size > 64]
    info = records[int(share * len(records))]
    with open(path, 'rb') as f:
        f.seek(info.header_offset + 26)
        name, extra = struct.unpack('<HH', f.read(4))
    return info.header_offset + 30 + name + extra + info.file_size // 2


@pytest.mark.parametrize('where', [0.0, 0.5, 0.99])
def test_a_damaged_state_is_passed_over(copied, capsys, where):
    """One flipped bit in the tensors, which PyTorch reads without a word."""
    outdir, folder, args = copied
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    path = folder / 'training-state-000000.160.pt'
    content = bytearray(path.read_bytes())
    content[inside_a_tensor(path, where)] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    capsys.readouterr()
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    output = capsys.readouterr().out
    assert f'skips: {path}: cannot be read as a training state (it is damaged: its record ' in output and 'wrong checksum' in output
    assert f'position from {folder / STATE_5}' in output
    assert 'wrong checksum' not in output.split('Restored')[1] and checkpoint.load(path)
    path.write_bytes(content)
    (folder / STATE_5).unlink()
    line = refused(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    assert 'no state in' in line and str(path) in line
    assert 'wrong checksum' in refused(f'--outdir={outdir}', *args, f'--resume={path}', '--duration=0.00016')


def test_latest_passes_over_a_truncated_state(copied, capsys):
    outdir, folder, args = copied
    newer = folder / 'training-state-000000.160.pt'
    newer.write_bytes((folder / STATE_5).read_bytes()[:50000])
    (folder / '.training-state-000000.240.pt.123').write_bytes(b'')  # what a kill in the middle of a write leaves
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    output = capsys.readouterr().out
    assert f'--resume=latest skips: {newer}: cannot be read' in output and f'position from {folder / STATE_5}' in output
    assert tiny.read_state(newer)['progress']['step'] == 10


def test_latest_takes_the_newest_of_equal_runs(copied):
    outdir, folder, args = copied
    second = outdir / folder.name.replace('00000', '00001')
    shutil.copytree(folder, second)
    os.utime(second / STATE_5, (0, 0))
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    assert len(checkpoint.states(folder)) == 1 and len(checkpoint.states(second)) == 2


def test_the_same_data_elsewhere_are_the_same(copied, data, tmp_path, monkeypatch):
    """Another spelling of the path, a copy on another disk, a link: it is the images that count."""
    outdir, folder, args = copied
    rest = [arg for arg in args if not arg.startswith('--data=')]
    there = shutil.copy(data, tmp_path / 'other.zip')
    (tmp_path / 'link.zip').symlink_to(data)
    monkeypatch.chdir(os.path.dirname(data))
    for i, path in enumerate(['./tiny.zip', f'../{Path(data).parent.name}/tiny.zip', there, tmp_path / 'link.zip']):
        tiny.call(f'--outdir={outdir}', f'--data={path}', *rest, '--resume=latest', f'--duration={(i + 2) * 80 / 1e6}')
        assert tiny.only_folder(outdir) == folder and len(tiny.read_log(folder)) == i + 2
    assert json.loads((folder / 'options.json').read_text())['data']['path'] == str(tmp_path / 'link.zip')


def test_other_data_under_the_same_path_are_refused(tmp_path):
    """Held-out images could become training images without a word."""
    path = tiny.make_zip(tmp_path / 'data.zip')
    held = tiny.make_zip(tmp_path / 'held.zip', count=8, seed=1)
    args = [f'--outdir={tmp_path / "runs"}', f'--data={path}', f'--val={held}', *tiny.FLAGS, '--dump=1', '--duration=0.00008']
    tiny.call(*args)
    state = tiny.only_folder(tmp_path / 'runs') / STATE_5
    tiny.make_zip(path, seed=1)
    for resume in ('latest', state):
        line = refused(*args, f'--resume={resume}')
        assert f'--data={path}: images ' in line and ('with other contents' in line or 'with other names or sizes' in line), line
    tiny.make_zip(path, count=65)
    assert f'--data={path}: 65 images instead of 64' in refused(*args, '--resume=latest')
    tiny.make_zip(path)
    tiny.make_zip(held, count=9, seed=1)
    assert f'--val={held}: 9 images instead of 8' in refused(*args, '--resume=latest')
    tiny.make_zip(held, count=8, seed=1)
    tiny.call(*args, '--resume=latest')


def test_states_without_a_fingerprint_go_by_the_path(copied, data, tmp_path):
    """Those of version 0.2.0."""
    outdir, folder, args = copied
    state = tiny.read_state(folder / STATE_5)
    state['options']['data'].pop('fingerprint')
    checkpoint.save(folder / STATE_5, state)
    (folder / 'options.json').write_text(json.dumps(state['options']))
    there = shutil.copy(data, tmp_path / 'other.zip')
    rest = [arg for arg in args if not arg.startswith('--data=')]
    line = refused(f'--outdir={outdir}', *rest, f'--data={there}', f'--resume={folder / STATE_5}', '--duration=0.00016')
    assert f'--data: {data} -> {there}, and the older state does not say whether their data are equal' in line
    tiny.call(f'--outdir={outdir}', *args, '--resume=latest', '--duration=0.00016')
    assert json.loads((folder / 'options.json').read_text())['data']['fingerprint']['images'] == 64


def test_nosubdir_is_continued_and_never_overwritten(tmp_path, data):
    args = [f'--outdir={tmp_path / "run"}', f'--data={data}', *tiny.FLAGS, '--dump=1', '--snap=0', '--nosubdir', '--seed=5']
    tiny.call(*args, '--duration=0.00008', '--dump=0')  # no state: as if killed before the first
    assert 'already holds a run' in refused(*args, '--duration=0.00008')
    tiny.call(*args, '--duration=0.00008', '--resume=latest')
    assert [line['nimg'] for line in tiny.read_log(tmp_path / 'run')] == [80]
    tiny.call(*args, '--duration=0.00016', '--resume=latest')
    assert [line['nimg'] for line in tiny.read_log(tmp_path / 'run')] == [80, 160]
    assert 'was trained with other options (optimizer.lr: ' in refused(*args, '--resume=latest', '--lr=5e-4')


def test_resume_and_transfer_exclude_each_other(five_steps, tmp_path):
    folder, args = five_steps
    line = refused(f'--outdir={tmp_path / "out"}', *args, f'--resume={folder / STATE_5}', f'--transfer={folder / STATE_5}')
    assert '--resume=FILE and --transfer exclude each other' in line and not (tmp_path / 'out').exists()


def test_latest_goes_on_with_a_transferred_run(five_steps, tmp_path, capsys):
    """The same command line starts from the other network, and continues without fetching it again."""
    folder, args = five_steps
    flags = [f'--outdir={tmp_path / "out"}', *args, '--resume=latest', f'--transfer={folder / STATE_5}']
    tiny.call(*flags)
    assert 'Transferred ' in capsys.readouterr().out
    tiny.call(*flags, '--duration=0.00016')
    output = capsys.readouterr().out
    assert 'Transferred ' not in output and 'Restored ' in output and len(states(tmp_path / 'out')) == 2


def test_transfer_copies_what_fits(five_steps, tmp_path, capsys):
    """A class-conditional network takes all but the layer that an unconditional one lacks."""
    folder, _ = five_steps
    run = tiny.make_run(tmp_path, f'--transfer={folder / STATE_5}', '--cond=1')
    source = tiny.read_state(folder / STATE_5)['ema']['halflife']
    own = run.net.state_dict()
    left = set(own) - set(source)
    assert left == {'model.map_label.weight', 'model.map_label.bias'} and all(torch.equal(own[name], source[name]) for name in source)
    assert f'Transferred {len(source)} of {len(own)} tensors' in capsys.readouterr().out
    assert tiny.digest(run.ema.module.state_dict()) == tiny.digest(own)  # the average starts there, too
    with pytest.raises(UserError, match='none of its tensors fits'):
        transfer_weights(folder / STATE_5, torch.nn.Linear(2, 2))


def test_restored_run_equals_the_saved_one(tmp_path):
    """Every tensor and counter that a step reads is in the state: two runs go on alike, one from the other's file."""
    first = tiny.make_run(tmp_path, '--dropout=0.2', '--augment=0.5')
    for _ in range(3):
        first.step()
    first.save_state()
    first.finish_states()
    state = checkpoint.load(checkpoint.states(tmp_path)[0])
    second = tiny.make_run(tmp_path, '--dropout=0.2', '--augment=0.5')
    second.restore(state, 'file')
    for run in (first, second):
        for _ in range(3):
            run.step()
    for part in ('net', 'optimizer', 'objective'):
        assert tiny.digest(getattr(first, part).state_dict()) == tiny.digest(getattr(second, part).state_dict())
    assert tiny.digest(first.ema.state_dict()) == tiny.digest(second.ema.state_dict())
    own = dict(seconds=0, loss_scale=None)
    assert {**first.progress, **own} == {**second.progress, **own}
    assert tiny.digest(first.stats.state()) == tiny.digest(second.stats.state())  # also of the tick that is under way
