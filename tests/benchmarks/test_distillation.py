# SPDX-License-Identifier: Apache-2.0
"""benchmarks/distillation.py: its table is of differences within seeds, and a finished distillation is not trained again."""

import pytest

from benchmarks import distillation

FOUND = {0: {'full': {'pixels': 3.0}, 'truncated': {'pixels': 2.5}, 'clean': {'pixels': 1.0}, 'rsd': {'pixels': 2.0}},
         1: {'full': {'pixels': 5.0}, 'truncated': {'pixels': 3.5}, 'clean': {'pixels': 2.0}, 'rsd': {'pixels': 4.5}},
         2: {'full': {'pixels': 9.0}, 'truncated': {'pixels': 9.5}}}


def test_differences_are_paired():
    """Seeds that lack an arm do not count; the standard error is that of the differences."""
    assert distillation.paired(FOUND, 'pixels', 'rsd', 'full') == (pytest.approx(-0.75), pytest.approx(0.25), 2)
    text = distillation.table(FOUND, ['rsd'])
    assert '| rsd | 2.000 | 4.500 |  | 3.250 | 2.17 | -0.750 +- 0.250 | +0.250 +- 0.750 |' in text
    assert text.count('\n| ') == 4


def test_folders_of_arms():
    assert distillation.arm_name('rsd:alpha=1.0,sigma_max=5') == 'rsd-alpha1.0-sigma_max5'


def test_a_finished_distillation_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, 'call', lambda *commands: pytest.fail('nothing is left to do'))
    (tmp_path / 'network-snapshot-000032').mkdir()
    distillation.train('no teacher', str(tmp_path), 'rsd', [], 0, 32)
