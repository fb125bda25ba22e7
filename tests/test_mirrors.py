# SPDX-License-Identifier: Apache-2.0
"""TensorBoard and Weights & Biases show one curve of a continued run, and its samples; whatever they raise, the training goes on."""

import json
import os
import re
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dnnlib import EasyDict
from tests.support import tiny
from tests.support.full_disk import small_disk
from training.run.mirrors import Mirrors

WANDB = """
import json, pathlib
calls = pathlib.Path({calls!r})
starting_step, refusal = {starting_step}, {refusal!r}

def tell(*call):
    with calls.open('a') as f:
        f.write(json.dumps(call) + '\\n')

class Image:
    def __init__(self, path):
        self.path = path

class Run:
    def __init__(self):
        self.starting_step = starting_step

    def define_metric(self, name, step_metric=None):
        tell('define_metric', name, step_metric)

    def log(self, fields, step):
        tell('log', step, {{name: ['Image', value.path] if isinstance(value, Image) else value for name, value in fields.items()}})
        if refusal:
            raise RuntimeError(refusal)

    def finish(self):
        tell('finish')

def init(**options):
    tell('init', {{**options, 'config': type(options['config']).__name__}})
    if refusal == 'login':
        raise ConnectionError('https://key-1234@host.example refuses')
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Makes the stand-in importable, with the first step that its server takes, and what it raises; returns what it was told since."""
    calls = tmp_path / 'calls'

    def install(starting_step=0, refusal=''):
        (tmp_path / 'wandb.py').write_text(WANDB.format(calls=str(calls), starting_step=starting_step, refusal=refusal))
        sys.modules.pop('wandb', None)
        calls.write_text('')
        return lambda name: [call[1:] for call in map(json.loads, calls.read_text().splitlines()) if call[0] == name]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)  # or the one of the same second and size would be taken for the next
    yield install
    sys.modules.pop('wandb', None)


def opened(folder, nimg=0, **options):
    """The mirrors of a run in the folder, which stands at nimg."""
    folder.mkdir(exist_ok=True)
    return train.open_mirrors(EasyDict({'tensorboard': False, 'wandb': None, **options}), str(folder), tiny.options(folder.parent), nimg)


def picture(path, value, mode='L'):
    Image.fromarray(np.full([6, 8] if mode == 'L' else [6, 8, 3], value, np.uint8)).save(path)
    return path


def curve(folder, name='Loss/a'):
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0, 'images': 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def age(folder):
    """Event files are read in the order of the second in their names."""
    for number, path in enumerate(sorted(folder.glob('events.out.tfevents.*'))):
        path.rename(path.with_name(f'events.out.tfevents.{number:010d}.old'))


# --- TensorBoard

def test_tensorboard_shows_one_curve(tmp_path, capsys):
    """Of a process that came farther than the state, and of the one that goes on from there."""
    run = tmp_path / 'run'
    first = opened(run, tensorboard=True)
    for nimg in (16, 32, 48, 64):
        first.scalars({'nimg': nimg, 'Loss/a': nimg / 2, 'GNS/batch': None, 'Val/b': float('nan')}, nimg)
        first.scalars({'Val/clean': nimg / 4}, nimg)
    first.picture(picture(tmp_path / 'a.png', 50), 32)
    first.picture(picture(tmp_path / 'a.png', 60), 64)  # the process is killed here: no close()
    age(run)
    second = opened(run, 32, tensorboard=True)
    for nimg in (48, 64, 80):
        second.scalars({'Loss/a': nimg * 2}, nimg)
    second.picture(picture(tmp_path / 'b.png', 99, 'RGB'), 64)
    second.close()
    assert curve(run) == [(16, 8), (32, 16), (48, 96), (64, 128), (80, 160)] and curve(run, 'Val/clean') == [(16, 4), (32, 8)]
    events = EventAccumulator(str(run), size_guidance={'images': 0}).Reload()
    assert set(events.Tags()['scalars']) == {'Loss/a', 'Val/clean'}
    assert [(image.step, image.width, image.height) for image in events.Images('samples')] == [(32, 8, 6), (64, 8, 6)]
    assert capsys.readouterr().out == ''


def test_a_line_that_was_left_to_do_belongs_to_the_curve(tmp_path):
    """A state may be of a tick whose held-out loss is not there yet: it comes at the very nimg of the state."""
    run = tmp_path / 'run'
    first = opened(run, tensorboard=True)
    first.scalars({'Loss/a': 1.0}, 16)
    first.close()
    age(run)
    second = opened(run, 16, tensorboard=True)
    second.scalars({'Val/clean': 2.0}, 16)
    second.close()
    assert curve(run) == [(16, 1.0)] and curve(run, 'Val/clean') == [(16, 2.0)]


def test_nothing_is_opened_before_the_first_line(tmp_path, wandb):
    """A run that is refused for its data leaves its folder as it was, and no empty run on the server."""
    told = wandb()
    opened(tmp_path / 'run', tensorboard=True, wandb='project').close()
    assert os.listdir(tmp_path / 'run') == [] and told('init') == told('finish') == []


def test_a_continued_run_of_train(tmp_path):
    """Two ticks; the state of the first, and on from there."""
    data = tiny.make_zip(tmp_path / 'data.zip')
    flags = [f'--outdir={tmp_path / "run"}', f'--data={data}', '--seed=5', *tiny.FLAGS, '--cbase=4', '--cres=1', '--nosubdir',
             '--tensorboard', '--dump=1', '--snap=0', '--duration=0.00016', '--threads=1']
    tiny.call(*flags)
    (tmp_path / 'run' / 'training-state-000000.160.pt').unlink()
    before = curve(tmp_path / 'run', 'Loss/denoise')
    age(tmp_path / 'run')
    tiny.call(*flags, '--resume=latest')
    assert curve(tmp_path / 'run', 'Loss/denoise') == before and [step for step, _ in before] == [80, 160]
    assert len(list((tmp_path / 'run').glob('events.out.tfevents.*'))) == 2


def test_tensorboard_on_a_full_disk(tmp_path, capfd):
    """One line, no traceback of its threads, and the curve goes on when there is room."""
    with small_disk(tmp_path / 'disk', 1) as disk:
        run = disk.path / 'run'
        mirrors = opened(run, tensorboard=True)
        mirrors.scalars({'Loss/a': 1.0}, 16)
        disk.fill()
        for nimg in (32, 48):
            mirrors.scalars({f'Loss/{i}': 2.0 for i in range(2000)}, nimg)
        mirrors.picture(picture(tmp_path / 'a.png', 50), 48)
        disk.free()
        age(run)
        mirrors.scalars({'Loss/a': 3.0}, 64)
        mirrors.picture(picture(tmp_path / 'a.png', 50), 64)
        mirrors.close()
        out, err = capfd.readouterr()
        assert out == ('Warning: --tensorboard fails (No space left on device); the training continues, and stats.jsonl has all numbers\n')
        assert err == '' and curve(run) == [(16, 1.0), (64, 3.0)]


def test_other_threads_still_tell_of_their_errors(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, 'excepthook', threading.__excepthook__)
    for _ in range(2):
        train.hush_tensorboard()
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert capfd.readouterr().err.count('ZeroDivisionError') == 1


# --- Weights & Biases

def test_wandb_continues_its_run(tmp_path, wandb):
    run, told = tmp_path / 'run', wandb()
    first = opened(run, wandb='mine')
    for nimg in (16, 32, 48):
        first.scalars({'nimg': nimg, 'Loss/a': nimg / 2, 'x': None}, nimg)
    first.scalars({'Val/clean': 1.0}, 48)
    first.picture(tmp_path / 'a.png', 48)
    (options,), = told('init')
    assert (options['project'], options['resume'], options['name'], options['dir']) == ('mine', 'allow', 'run', str(run))
    assert told('define_metric') == [['nimg', None], ['*', 'nimg']]
    assert [step for step, _ in told('log')] == [16, 32, 48, 48, 48]
    assert [fields for _, fields in told('log')][2:] == [
        {'Loss/a': 24, 'nimg': 48}, {'Val/clean': 1.0, 'nimg': 48}, {'samples': ['Image', str(tmp_path / 'a.png')], 'nimg': 48}]
    assert json.loads((run / 'wandb.json').read_text()) == {'id': options['id']} and len(options['id']) == 32

    told = wandb(starting_step=49)  # the server has seen 48, and takes no step before 49
    second = opened(run, 16, wandb='mine')
    second.scalars({'Val/clean': 2.0}, 16)  # left to do of the state's own tick
    for nimg in (32, 48, 64):
        second.scalars({'Loss/a': nimg / 2}, nimg)
    second.close()
    second.close()
    assert told('init')[0][0]['id'] == options['id']
    assert told('log') == [[49, {'Val/clean': 2.0, 'nimg': 16}], [64, {'Loss/a': 32, 'nimg': 64}]]
    assert told('finish') == [[]]


def test_a_server_that_cannot_be_reached_is_asked_once(tmp_path, wandb, capsys):
    told = wandb(refusal='login')
    mirrors = opened(tmp_path / 'run', wandb='mine')
    for nimg in (16, 32):
        mirrors.scalars({'Loss/a': 1.0}, nimg)
        mirrors.picture(tmp_path / 'a.png', nimg)
    mirrors.close()
    out = capsys.readouterr().out
    assert re.fullmatch(r'Warning: --wandb fails \(ConnectionError, wandb.py:\d+\); the training continues, and stats.jsonl .*\n', out)
    assert len(told('init')) == 1 and told('log') == told('finish') == []


def test_a_line_that_fails_is_told_of_once_and_without_what_it_says(tmp_path, wandb, capsys):
    told = wandb(refusal='token 1234 of host.example')
    mirrors = opened(tmp_path / 'run', wandb='mine', tensorboard=True)
    for nimg in (16, 32):
        mirrors.scalars({'Loss/a': 1.0}, nimg)
    mirrors.close()
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and '(RuntimeError, ' in out and '1234' not in out and 'host' not in out
    assert len(told('log')) == 2 and told('finish') == [[]]
    assert curve(tmp_path / 'run') == [(16, 1.0), (32, 1.0)]  # the other one is none the worse


@pytest.mark.parametrize('content', ['', '{}', '{"id": 5}', '{"id": "../x"}', '[]'])
def test_an_id_that_is_none(tmp_path, wandb, capsys, content):
    told = wandb()
    mirrors = opened(tmp_path / 'run', wandb='mine')
    (tmp_path / 'run' / 'wandb.json').write_text(content)
    mirrors.scalars({'Loss/a': 1.0}, 16)
    mirrors.close()
    out = capsys.readouterr().out
    assert out.startswith('Warning: --wandb fails (') and 'wandb.json' in out and told('init') == []


def test_no_mirrors():
    mirrors = Mirrors()
    mirrors.scalars({'a': 1}, 1)
    mirrors.picture('nowhere.png', 1)
    mirrors.close()
