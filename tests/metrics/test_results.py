# SPDX-License-Identifier: Apache-2.0
"""Names of results, and tables of many: rows, order, results of earlier versions, files that are none."""

import csv
import json

import pytest
from click.testing import CliRunner

import eval_fid
from metrics.results import tag

FACTS = {'network': 'runs/00000-mix/network-snapshot-200000', 'sha256': 'ab' * 32, 'weights': 'ema', 'sampler': 'heun', 'levels': 'edm',
         'steps': 18, 'evaluations': 35, 'guidance': 1.0, 'precision': 'fp32', 'compile': False}
RESULT = {'fid_score': 2.125, 'inception_score': None, 'num_images': 50000, 'detector': {'name': 'inception', 'sha256': None},
          'reference': {'path': 'ref.npz', 'sha256': '12' * 32, 'split': 'train', 'num_images': 50000}, 'metrics': {'names': ['fid']}}


def table(*args, code=0):
    result = CliRunner().invoke(eval_fid.main, ['table', *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def write(path, **parts):
    path.write_text(json.dumps({**RESULT, **parts}))
    return path


@pytest.mark.parametrize('changed, options, expected', [
    ({}, {}, 'heun18'),
    ({'steps': 6, 'guidance': 1.5, 'weights': 'ema:0.05'}, {'count': 2000}, 'heun6-guidance1.5-ema0.05-2k'),
    ({'sampler': 'ddim', 'weights': 'raw'}, {'detector': 'dinov2', 'count': 1234}, 'ddim18-raw-dinov2-1234'),
    ({}, {'repeats': 3}, 'heun18-3x50k'), ({'labels': {'source': 'uniform'}}, {'seeds': None}, 'heun18')])
def test_names_hold_what_differs(changed, options, expected):
    assert tag({**FACTS, **changed}, **{'count': 50000, **options}) == expected


def test_all_else_stands_in_six_digits():
    others = [({}, {'seeds': '5-9'}), ({}, {'detector': 'inception:compile=true'}), *(({key: value}, {}) for key, value in {
        'sampler': 'heun:S_churn=5', 'levels': 'edm:rho=5', 'labels': {'source': 'class', 'class': 1}, 'stop_sigma': 0.1,
        'precision': 'bf16', 'compile': True, 'guidance_interval': [0, 1], 'guidance_channels': 3, 'gnet_sha256': 'cd' * 32}.items())]
    tags = [tag({**FACTS, **changed}, 50000, **options) for changed, options in others]
    assert len({*tags}) == len(tags) and all(len(each) == len('heun18-123456') and each.startswith('heun18-') for each in tags)
    moved = [tag({**FACTS, 'labels': {'source': 'file', 'path': path, 'sha256': 'x'}}, 50000) for path in 'ab']
    assert moved[0] == moved[1]


def test_a_table_in_the_order_given_of_settings_or_of_a_metric(tmp_path):
    a = write(tmp_path / 'a.json', generated={'path': 'out', 'sha256': '34' * 32, 'record': {**FACTS, 'sampler': 'heun:S_churn=5'}})
    b = write(tmp_path / 'b.json', generated={**FACTS, 'steps': 6, 'evaluations': 22, 'guidance': 1.5, 'guidance_interval': [0.5, None],
                                           'guidance_channels': 3},
              fid_score=1.5, kid=0.00123, num_images=2000, repeats=[{'seeds': '0-1999'}, {'seeds': '2000-3999'}])
    c = write(tmp_path / 'c.json', generated={'path': 'pictures|x', 'sha256': None}, fid_score=3.0,
              reference={'path': '/data/ref.npz', 'sha256': None})
    assert table(a, b, c, '--sort=given') == (
        '| network | weights | sampler | evaluations | guidance | images | detector | reference | fid_score | inception_score | kid |\n'
        '| --- | --- | --- | --- | --- | --- | --- | --- | ---: | ---: | ---: |\n'
        '| network-snapshot-200000 | ema | heun18:S_churn=5 | 35 | 1 | 50000 | inception | train, 12121212 | 2.1250 | - | - |\n'
        '| network-snapshot-200000 | ema | heun6 | 22 | 1.5 at (0.5, inf] in 3 channels | 2 x 2000 | inception | train, 12121212 | 1.5000 '
        '| - | 0.00123 |\n'
        '| pictures\\|x (images) | - | - | - | - | 50000 | inception | ref.npz | 3.0000 | - | - |\n')
    output = table(c, a, b, '--format=csv', '--sort=fid_score', f'--out-path={tmp_path / "new" / "table.csv"}')
    assert output == f'3 results in {tmp_path / "new" / "table.csv"}\n'
    rows = list(csv.DictReader((tmp_path / 'new' / 'table.csv').open()))
    assert [row['fid_score'] for row in rows] == ['1.5', '2.125', '3.0'] and [row['kid'] for row in rows] == ['0.00123', '', '']
    rows = table(a, b, c, '--sort=given').splitlines()
    for given in ((a, b, c), (c, a, b), (b, c, a)):
        assert table(*given).splitlines() == [*rows[:2], rows[3], rows[2], rows[4]]
    assert [line.split(' | ')[0] for line in table(a, b, c, '--sort=kid').splitlines()[2:]] == [
        '| network-snapshot-200000', '| network-snapshot-200000', '| pictures\\|x (images)']


def test_results_of_earlier_versions_are_told_as_far_as_they_tell(tmp_path):
    old = write(tmp_path / 'old.json', generated={'network': 'net', 'sha256': 'ab' * 32, 'guidance': 2, 'guidance_interval': '0.1,20',
                                                  'weights': 'ema', 'gnet_weights': 'ema', 'sampler': 'heun', 'levels': 'edm', 'steps': 18,
                                                  'compile': False, 'sigmas': [80.0, 0.0]})
    assert '| net | ema | heun18 | - | 2 at 0.1,20 | 50000 | inception | train, 12121212 | 2.1250 | - |' in table(old)


@pytest.mark.parametrize('text, words', [
    ('{', 'not a JSON file'), ('[]', 'expected a JSON object'), ('{"a": 1}', 'not a result of eval_fid.py'),
    ('{"closest_pairs": [], "num_images": 3}', 'a result of eval_fid.py nearest'),
    ('{"bits_per_dim": 3.5, "num_images": 3}', 'a result of eval_nll.py'),
    (json.dumps({**RESULT, 'generated': 5}), '"generated" must be an object, got int'),
    (json.dumps({**RESULT, 'generated': {'network': 'n', 'guidance': '1'}}), '"generated.guidance" must be'),
    (json.dumps({**RESULT, 'num_images': 'many'}), '"num_images" must be a whole number, got str')])
def test_what_is_no_result_is_named(tmp_path, text, words):
    good, bad = write(tmp_path / 'good.json'), tmp_path / 'bad.json'
    bad.write_text(text)
    (line,) = table(good, bad, code=1).splitlines()
    assert line.startswith(f'Error: {bad}: ') and words in line
    assert '--sort=kid: none of the results has it; choose from fid_score' in table(good, '--sort=kid', code=1)
