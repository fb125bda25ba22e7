# SPDX-License-Identifier: Apache-2.0
"""The sweep of label noise on digits: what it measures on digits as they are, and on digits with wrong classes."""

import functools
import math
import os

import numpy as np
import pytest

from benchmarks import label_noise

pytest.importorskip('sklearn')


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    path = functools.partial(os.path.join, tmp_path_factory.mktemp('digits'))
    label_noise.make_data(path)
    return label_noise.Judge(path), *label_noise.pictures(path('all.zip'))


def test_true_digits_are_judged_as_such(judge):
    """The training digits: their classes are recognised, uniform, and their covariance is that of the held-out ones within noise."""
    found = judge[0].real()
    assert found['accuracy'] > 0.95
    assert found['fid_score'] < 0.4 and found['precision'] > 0.85 and found['recall'] > 0.85
    assert found['marginal'] == pytest.approx(math.log(10), abs=0.01)
    assert abs(found['within']) < 0.5
    assert found['conditional'] < 0.6


def test_wrong_classes_widen_each_class_and_leave_the_marginal(judge):
    """A fifth of the classes replaced by random ones: the digits are the same, the law of each class is wider and farther away."""
    judges, values, classes = judge
    rng = np.random.default_rng(1)
    wrong = np.where(rng.random(len(classes)) < 0.2, rng.integers(0, 10, len(classes)), classes)
    clean, noisy = judges(values, classes), judges(values, wrong)
    assert noisy['marginal'] == clean['marginal'] and noisy['conditional'] == clean['conditional']
    assert noisy['accuracy'] == pytest.approx(0.82 * clean['accuracy'], abs=0.03)
    assert noisy['within'] > clean['within'] + 1
    assert noisy['per_class'] > 1.2 * clean['per_class']


def test_a_table_compares_equal_seeds(capsys):
    one = dict.fromkeys(label_noise.FIGURES, 1.0)
    cells = {'none': {0: one, 1: one | {'fid_score': 2.0}}, 'CEP-G 1': {0: one | {'fid_score': 0.9}, 1: one | {'fid_score': 1.8}}}
    label_noise.print_table('few', cells)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('| CEP-G 1 | 1.35 ± 0.45 |') and '-10.0 ± ' in last
