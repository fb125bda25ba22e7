# SPDX-License-Identifier: Apache-2.0
"""Keyed draws, statistics over ranks, state files, command lines, and where a process stands among others."""

import os
import re

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from torch_utils import checkpoint, command_line, distributed, misc, training_stats

# --- misc


@pytest.mark.parametrize('parameters, size, rows', [(10 ** 6, 8, 64), (10 ** 6, 16, 32), (10 ** 6, [16, 32], 16), (10 ** 6, 32, 8),
                                                    (10 ** 8, 10, 8), (10 ** 9, 64, 8)])
def test_rows_of_a_call_on_a_cpu_follow_from_the_network_and_the_size_alone(parameters, size, rows):
    net = torch.nn.Linear(parameters, 1, bias=False, device='meta')
    assert [misc.rows_per_call(net, size, 'cpu', batch) for batch in (1, 100)] == [rows, rows]
    assert misc.rows_per_call(net, size, 'cuda', 100) == 100


def test_denoisers_without_parameters_take_the_most_rows():
    assert misc.rows_per_call(lambda x, sigma: x, 32, 'cpu', 5) == 64


def test_chunks_are_of_one_size_and_padded_with_the_last_row():
    found = [(rows.tolist(), count) for rows, count in misc.chunks(5, 'cpu', 3)]
    assert found == [([0, 1, 2], 3), ([3, 4, 4], 2)]


def test_rows_of_a_draw_do_not_depend_on_how_they_are_shared_out():
    whole = misc.Draws(1, 2)('noise', [100, 3, 2])
    for first, last in [(0, 1), (15, 17), (16, 32), (5, 90), (99, 100)]:
        assert torch.equal(misc.Draws(1, 2, first)('noise', [last - first, 3, 2]), whole[first:last])


def test_draws_are_keyed_by_seed_step_name_and_row():
    draws = [misc.Draws(seed, step)(name, [40, 50]) for seed in (1, 2) for step in (0, 1) for name in ('a', 'b')]
    assert torch.equal(draws[0], misc.Draws(1, 0)('a', [40, 50]))
    rows = torch.cat(draws)  # [320, 50]
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 6 / 50**0.5  # 51,000 pairs of independent rows: 6 standard deviations
    assert abs(rows.mean()) < 5 / rows.numel() ** 0.5 and abs(rows.var() - 1) < 5 * (2 / rows.numel()) ** 0.5


def test_keys_do_not_run_together():
    assert misc.seed_of(1, 23) != misc.seed_of(12, 3) and misc.seed_of('a', 'b') != misc.seed_of('b', 'a')
    seeds = {misc.seed_of(step, name) for step in range(5000) for name in ('a', 'b')}
    assert len(seeds) == 10000 and all(0 <= seed < 2**63 for seed in seeds)


def test_seeded_leaves_the_outside_as_it_was():
    before = torch.get_rng_state()
    with misc.seeded('key', 1):
        first = torch.rand(5)
    with pytest.raises(KeyError), misc.seeded('key', 1):
        assert torch.equal(torch.rand(5), first)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
    with misc.seeded('key', 2):
        assert not torch.equal(torch.rand(5), first)


def test_as_float_gives_json_numbers():
    assert misc.as_float(1) == 1.0 and misc.as_float(torch.tensor(0.5)) == 0.5
    assert [misc.as_float(float(x)) for x in ('nan', 'inf', '-inf')] == [None] * 3


def test_versions_name_what_decides_numbers():
    found = misc.versions()
    assert set(found) == {'version', 'commit', 'python', 'torch', 'cuda'} and all(type(value) is str for value in found.values())
    assert re.fullmatch(r'[0-9a-f]{12}\+?|unknown', found['commit'])


# --- training_stats

def test_moments_against_numpy():
    source = np.random.default_rng(0)
    parts = [source.normal(3, 2, size) for size in ([50], [7, 3], [])]
    stats = training_stats.Collector()
    for part in parts:
        stats.report('x', torch.tensor(part))
    values = np.concatenate([np.ravel(part) for part in parts])
    found = stats.flush()
    assert list(found) == ['x'] and found['x'] == {'num': 72, 'mean': pytest.approx(values.mean()), 'std': pytest.approx(values.std())}
    assert stats.flush() == {}
    stats.report('x', 5)
    assert stats.flush() == {'x': {'num': 1, 'mean': 5.0, 'std': 0.0}}


def test_masks_and_values_that_are_not_finite():
    stats = training_stats.Collector()
    values = torch.tensor([1.0, float('nan'), 3.0, float('inf'), 100.0])
    stats.report('x', values, mask=torch.tensor([True, True, True, False, False]))
    stats.report('empty', values, mask=torch.zeros(5, dtype=torch.bool))
    stats.report('all bad', values[1])
    found = stats.flush()
    assert found['x'] == {'num': 2, 'mean': 2.0, 'std': 1.0}
    assert found['x/nonfinite'] == {'num': 3, 'mean': pytest.approx(1 / 3), 'std': 0.0}
    assert found['empty'] == {'num': 0, 'mean': None, 'std': None} and 'empty/nonfinite' not in found
    assert found['all bad']['mean'] is None and found['all bad/nonfinite']['mean'] == 1


def test_statistics_of_ranks_add_up(monkeypatch):
    """The table that goes over the ranks has one row per name, in an order that does not depend on the order of reporting."""
    monkeypatch.setattr(distributed, 'all_sum', lambda table: table * 2)  # another rank with the same values
    stats = training_stats.Collector()
    stats.report('b', torch.tensor([1.0, 3.0]))
    stats.report('a', 5)
    assert stats.flush() == {'a': {'num': 2, 'mean': 5.0, 'std': 0.0}, 'b': {'num': 4, 'mean': 2.0, 'std': 1.0}}


# --- checkpoint

STATE = {key: {} for key in checkpoint.KEYS}


def test_state_files_hold_tensors_and_plain_values(tmp_path):
    path = tmp_path / 'a.pt'
    checkpoint.save(path, {**STATE, 'net': {'w': torch.arange(3)}, 'options': {'a': [1, None, 'x', 0.5, True]}})
    found = checkpoint.load(path)
    assert torch.equal(found['net']['w'], torch.arange(3)) and found['options'] == {'a': [1, None, 'x', 0.5, True]}


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'a.pt'
    checkpoint.save(path, {**STATE, 'options': {'old': 1}})

    def fail(state, f):
        f.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        checkpoint.save(path, STATE)
    monkeypatch.undo()
    assert checkpoint.load(path)['options'] == {'old': 1} and os.listdir(tmp_path) == ['a.pt']


@pytest.mark.parametrize('content', [b'', b'text', b'\x80\x02.', b'PK\x03\x04 cut off', b'\x00' * 1000])
def test_foreign_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / 'a.pt').write_bytes(content)
    with pytest.raises(UserError, match='a.pt: cannot be read as a training state') as error:
        checkpoint.load(tmp_path / 'a.pt')
    assert '\n' not in error.value.message


def test_a_state_cut_at_any_place_is_refused(tmp_path):
    path = tmp_path / 'a.pt'
    checkpoint.save(path, {**STATE, 'net': {'w': torch.randn(100, generator=misc.generator(0))}})
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as error:
            checkpoint.load(path)
        assert '\n' not in error.value.message


def test_differences_by_name():
    old = {'a': 1, 'b': {'c': [1, 2], 'd': None, 'e': {'f': 0.5}}, 'gone': 3}
    new = {'a': 1.0, 'b': {'c': [1, 3], 'd': {'x': 1}, 'e': {'f': 0.25}}, 'new': 4}
    assert checkpoint.differences(old, old) == []
    assert checkpoint.differences(old, new) == ['b.c: [1, 2] -> [1, 3]', "b.d: None -> {'x': 1}", 'b.e.f: 0.5 -> 0.25',
                                                'gone: 3 -> None', 'new: None -> 4']
    assert checkpoint.differences(old, new, ignore=('b', 'gone')) == ['new: None -> 4']
    assert checkpoint.differences(old, new, ignore=('b.e.f', 'b.c', 'new', 'gone')) == ["b.d: None -> {'x': 1}"]


# --- command_line

@click.command(cls=command_line.Command)
@click.option('--batch-size', type=int)
@click.option('--seeds', type=command_line.IntList())
@click.option('--fail')
@command_line.version_option
def script(batch_size, seeds, fail):
    if fail:
        with open(fail):
            pass
    click.echo(f'{batch_size} {seeds}')


def invoke(*args):
    return CliRunner().invoke(script, args)


def test_underscores_are_hyphens_in_names_alone():
    assert invoke('--batch_size=4').output == invoke('--batch-size', '4').output == '4 None\n'
    assert command_line.hyphens(['--a_b=c_d', 'e_f', '--g_h', '-x_y']) == ['--a-b=c_d', 'e_f', '--g-h', '-x_y']


@pytest.mark.parametrize('text, numbers', [('3', [3]), ('0-3', [0, 1, 2, 3]), ('1,2,5-7', [1, 2, 5, 6, 7]), ('4-4', [4]),
                                           ('2, 1', [2, 1])])
def test_lists_of_numbers(text, numbers):
    assert invoke(f'--seeds={text}').output == f'None {numbers}\n'


@pytest.mark.parametrize('numbers, text', [([3, 1, 2, 9], '1-3,9'), ([5], '5'), (range(50), '0-49'), ([0, 2, 4], '0,2,4')])
def test_lists_in_few_words(numbers, text):
    assert command_line.ranges(numbers) == text
    assert command_line.IntList().convert(text, None, None) == sorted(numbers)


@pytest.mark.parametrize('text', ['3-0', 'a-b', '', '1,,2', '-1', '1-', '1.5'])
def test_lists_that_are_none(text):
    result = invoke(f'--seeds={text}')
    assert result.exit_code != 0 and 'Error: ' in result.output and 'Traceback' not in result.output


@pytest.mark.parametrize('path, reason', [('/nowhere/file', 'No such file or directory'), ('/', 'Is a directory')])
def test_file_system_errors_are_one_line(path, reason):
    result = invoke(f'--fail={path}')
    assert result.exit_code == 1 and result.output == f'Error: {path}: {reason}\n'


def test_version():
    output = invoke('--version').output
    assert all(word in output for word in (misc.VERSION, 'commit', 'python', f'torch {torch.__version__}', 'cuda'))
    assert output.count('\n') == 1


# --- distributed

def test_one_process_needs_no_group():
    distributed.init()
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.size(), distributed.local_rank(), distributed.local_size()) == (0, 1, 0, 1)
    assert distributed.broadcast({'a': 1}) == {'a': 1} and distributed.all_values(3) == [3]
    assert torch.equal(distributed.all_sum(torch.ones(2)), torch.ones(2)) and not distributed.is_orphan()


def test_only_rank_0_prints(monkeypatch, capsys):
    distributed.print0('first')
    monkeypatch.setenv('RANK', '1')
    distributed.print0('second')
    assert capsys.readouterr().out == 'first\n'
