# SPDX-License-Identifier: Apache-2.0
"""What is read of a run's folder."""

import json

import pytest

from dnnlib import UserError
from dnnlib.report import runs


def write(folder, text='{"nimg": 1000, "Loss/denoise": 3.0}\n', options=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'stats.jsonl').write_text(text)
    if options is not None:
        (folder / 'options.json').write_text(json.dumps(options))
    return str(folder)


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    text = '{"nimg": 1, "a": NaN, "b": Infinity, "c": true, "d": "x", "e": [1], "f": null, "g": 2, "h": 1' + '0' * 400 + '}\n'
    assert runs.read_stats(write(tmp_path / 'run', text)) == {'nimg': [(1, 1)], 'g': [(1, 2)]}


@pytest.mark.parametrize('line, said', [('[1]', 'expected a JSON object'), ('{"a": 1}', 'no number "nimg"'),
                                        ('{"nimg": "1"}', 'no number "nimg"'), ('{"nimg": 1', 'not JSON'),
                                        ('[' * 100_000, 'nested too deeply'), ('\0', 'not JSON')])
def test_broken_lines(tmp_path, line, said):
    with pytest.raises(UserError) as err:
        runs.read_stats(write(tmp_path / 'run', f'{{"nimg": 1}}\n{line}\n{{"nimg": 2}}\n'))
    assert 'stats.jsonl: line 2' in err.value.message and said in err.value.message and '\n' not in err.value.message


def test_bytes_that_are_not_utf8(tmp_path):
    folder = write(tmp_path / 'run')
    (tmp_path / 'run' / 'stats.jsonl').write_bytes(b'{"nimg": 1, "a\xff": 2}\n{"nimg": 2, "\xff')
    assert runs.read_stats(folder)['a\ufffd'] == [(1, 2)]


def test_options_versions_and_samples(tmp_path):
    run = {'seed': 1, 'versions': {'torch': '2.13'}, 'command': {'seed': '1'}}
    folder = write(tmp_path / 'run', options={'run': run, 'data': {'fingerprint': {}}})
    for name in ('samples-000500.png', 'samples-001000.png', 'samples-000000.064.png', 'samples-x.png', 'other.png'):
        (tmp_path / 'run' / name).write_bytes(b'')
    run = runs.read_run(folder)
    assert run.name == 'run' and run.options == {'run.seed': 1, 'data.fingerprint': {}} and run.versions == {'torch': '2.13'}
    assert [kimg for kimg, _ in run.samples] == [0.064, 500, 1000] and run.nimg == 1000 and run.last('Loss/denoise') == 3


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / name) for name in ('a/00000-x', 'b/00000-x', 'b/00001-y')]
    assert runs.names(folders) == ['a/00000-x', 'b/00000-x', '00001-y']
    assert [run.name for run in runs.read_runs([*folders, f'{folders[0]}/'])] == ['a/00000-x', 'b/00000-x', '00001-y']


def test_runs_without_options_or_with_broken_ones(tmp_path):
    folder = write(tmp_path / 'run')
    assert runs.read_run(folder).options == {}
    for text in ('{', '[]'):
        (tmp_path / 'run' / 'options.json').write_text(text)
        with pytest.raises(UserError, match='options.json'):
            runs.read_run(folder)
