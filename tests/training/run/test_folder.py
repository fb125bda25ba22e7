# SPDX-License-Identifier: Apache-2.0
"""Names, log and options of a run's folder; what an orphaned worker may not do."""

import json
import os
from dataclasses import replace

import pytest

from tests.support import tiny
from torch_utils import checkpoint, distributed
from training.run import folder
from training.run.config import from_json
from training.run.folder import RunFolder


def test_names(tmp_path):
    whole, fractional = RunFolder('run', fractional=False), RunFolder('run', fractional=True)
    assert os.path.basename(whole.numbered('training-state', 1234.5, '.pt')) == 'training-state-001234.pt'
    assert os.path.basename(whole.numbered('network-snapshot', 0)) == 'network-snapshot-000000'
    assert os.path.basename(fractional.numbered('training-state', 0.96, '.pt')) == 'training-state-000000.960.pt'
    assert os.path.basename(fractional.numbered('training-state', 200000, '.pt')) == 'training-state-200000.000.pt'


def test_states_are_found_in_order_of_progress_whatever_their_names_look_like(tmp_path):
    names = ['training-state-000010.pt', 'training-state-000009.500.pt', 'training-state-000000.960.pt']
    others = ['.training-state-000011.pt.77', 'training-state-x.pt', 'training-state-000012.pt.part', 'network-snapshot-000012']
    for name in names + others:
        (tmp_path / name).touch()
    assert [os.path.basename(path) for path in checkpoint.states(tmp_path)] == names


def test_log_and_rewind(tmp_path):
    folder = RunFolder(tmp_path, fractional=False)
    folder.log({'nimg': 1, 'loss': None})
    size = folder.log_bytes
    folder.log({'nimg': 2})
    with open(tmp_path / 'stats.jsonl', 'a') as f:
        f.write('{"nimg": 3, "lo')  # killed in the middle of a line
    other = RunFolder(tmp_path, fractional=False)
    other.rewind_log(size)
    other.log({'nimg': 4})
    lines = (tmp_path / 'stats.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{'nimg': 1, 'loss': None}, {'nimg': 4}]
    with pytest.raises(ValueError):
        other.log({'loss': float('nan')})  # no JSON
    assert len((tmp_path / 'stats.jsonl').read_text().splitlines()) == 2


def test_rewind_never_pads_a_log_that_is_shorter(tmp_path):
    """A state that was copied elsewhere, without its log or with a part of it."""
    folder = RunFolder(tmp_path, fractional=False)
    folder.rewind_log(100)
    assert not (tmp_path / 'stats.jsonl').exists()
    (tmp_path / 'stats.jsonl').write_text('{"nimg": 1}\n')
    folder.rewind_log(100)
    assert (tmp_path / 'stats.jsonl').read_text() == '{"nimg": 1}\n'


def test_options_are_written_whole(tmp_path):
    run, config = tmp_path / 'run', tiny.options(tmp_path)
    run.mkdir()
    RunFolder(run, fractional=False).write_options(config)
    with pytest.raises(ValueError):  # infinity is no JSON
        RunFolder(run, fractional=False).write_options(replace(config, optimizer=replace(config.optimizer, lr=float('inf'))))
    assert os.listdir(run) == ['options.json'] and from_json(json.loads((run / 'options.json').read_text())) == config


def test_numbered_folders(tmp_path):
    out = tmp_path / 'deep' / 'runs'
    assert [os.path.basename(folder.create(out, 'a')) for _ in range(2)] == ['00000-a', '00001-a']
    (out / '00007').mkdir()
    (out / '123456-x').mkdir()
    (out / 'notes').mkdir()
    assert os.path.basename(folder.create(out, 'b')) == '00008-b'


def test_orphan_stops_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, '_launcher_pid', os.getppid() + 1)
    with pytest.raises(SystemExit, match='launcher of this worker is gone'):
        RunFolder(tmp_path, fractional=False).log({})
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(distributed, '_launcher_pid', os.getppid())
    RunFolder(tmp_path, fractional=False).log({})
    assert os.listdir(tmp_path) == ['stats.jsonl']
