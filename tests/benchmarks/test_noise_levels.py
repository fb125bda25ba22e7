# SPDX-License-Identifier: Apache-2.0
"""What a wrong noise level does, by formula and fitted; the tables of the benchmark."""

import pytest
from click.testing import CliRunner

from benchmarks import noise_levels
from training.estimation import wrong_level


@pytest.mark.parametrize('stated, expected', [(0.18, 0.7411), (0.2, 0.7353), (0.22, 0.7286)])
def test_a_wrong_level_shifts_the_gain(stated, expected):
    """The closed form, and the minimiser of the ambient loss on 2e6 draws: Gaussian images of variance 0.25, noise of 0.2, sigma 0.3."""
    assert wrong_level.gain(0.3, 0.2, stated, 0.25) == pytest.approx(expected, abs=5e-5)
    assert noise_levels.fitted(0.3, 0.2, stated, 0.25, 2_000_000) == pytest.approx(expected, abs=2e-3)


def test_speed_prints_a_row_for_each_size():
    output = CliRunner().invoke(noise_levels.main, ['speed', '--images=400'], catch_exceptions=False).output
    rows = [line for line in output.splitlines() if line.startswith(('| 100 |', '| 400 |'))]
    assert len(rows) == 2 and all('| 0.1' in row or '| 0.09' in row for row in rows)
