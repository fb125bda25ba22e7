# SPDX-License-Identifier: Apache-2.0
"""benchmarks/pairing.py: equal useful pairs in every batch, evaluations to a loss read from curves, and a small experiment."""

import json
import math

import pytest
from click.testing import CliRunner

from benchmarks import pairing


def test_batches_hold_as_many_useful_pairs():
    """Half of EDM's levels lie below sigma = exp(-1.2), so that of 80 % noisy images 40 % of the pairs are useless."""
    sigma = math.exp(-1.2)
    assert pairing.useful(sigma, 0.8) == pytest.approx(0.6) and pairing.useful(sigma, 0.0) == 1
    assert [pairing.batch_of(arm, sigma, 0.8) for arm in pairing.ARMS] == [107, 64, 107]


def test_evaluations_to_a_loss():
    """Half of the way from one loss to the next is at the geometric mean of the evaluations."""
    curve = [(10, 5.0), (20, 3.0), (30, 3.5), (40, 1.0)]
    assert pairing.reached(curve, 4.0) == pytest.approx(200 ** 0.5) and pairing.reached(curve, 3.0) == 20
    assert pairing.reached(curve, 6.0) == 10 and pairing.reached(curve, 2.25) == pytest.approx(1200 ** 0.5)
    assert math.isnan(pairing.reached(curve, 0.5)) and pairing.told((0.5, math.nan)) == 'not reached by 1 of 2'


def test_ratios_are_those_of_the_evaluations():
    """A run that is twice as fast has the same losses after half of the evaluations, of clean and of noisy images."""
    clamp = [(k, 100 / k, 50 / k) for k in range(1, 101)]
    fast = [(k, 100 / (2 * k), 50 / (2 * k)) for k in range(1, 101)]
    for part in pairing.PARTS:
        assert pairing.ratios(clamp, fast, part) == pytest.approx([0.5, 0.5], rel=0.02)
        assert pairing.ratios(clamp, clamp, part) == pytest.approx([1, 1])
    lines = pairing.table({'clamp': [clamp] * 2, 'skip': [fast, clamp], 'skip, larger batch': [clamp] * 2}, 0.2, 0.9)
    assert lines[2].startswith('| skip | 64 | 0.75 (0.50 to 1.00)') and lines[2].count('0.75') == 6


@pytest.mark.slow
def test_a_small_experiment(tmp_path):
    pytest.importorskip('sklearn')
    arguments = [f'--out={tmp_path}', '--seeds=1', '--kimg=1.6']
    found = CliRunner().invoke(pairing.main, arguments, catch_exceptions=False)
    assert found.exit_code == 0 and 'evaluations' in found.output
    curves = json.loads((tmp_path / 'results.json').read_text())['curves']
    assert curves.keys() == set(pairing.ARMS) and all(len(curve[0]) >= 8 for curve in curves.values())
    times = [path.stat().st_mtime_ns for path in tmp_path.glob('runs/*/done')]
    CliRunner().invoke(pairing.main, arguments, catch_exceptions=False)
    assert len(times) == 3 and [path.stat().st_mtime_ns for path in tmp_path.glob('runs/*/done')] == times
