# SPDX-License-Identifier: Apache-2.0
"""The scripts that show what a run survives, in short: see kill_matrix.py and soak.py."""

import signal

import pytest

from tests import kill_matrix, soak
from tests.support.archs import TINY


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_runs_that_are_killed_or_asked_to_end(tmp_path, ranks, number):
    sent, runs, other = kill_matrix.main(6, ranks, number, 1, tmp_path)
    assert sent == 6 and runs >= 1 and other == 0


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [1, 2])
@pytest.mark.parametrize('arch', TINY)
def test_killed_runs_of_each_architecture(tmp_path, arch, ranks):
    sent, runs, other = kill_matrix.main(3, ranks, signal.SIGKILL, 2, tmp_path, arch=arch)
    assert sent == 3 and runs >= 1 and other == 0


@pytest.mark.slow
def test_soak(tmp_path):
    """Two minutes, which show what is lost in every step or at every tick."""
    assert not soak.main(2, 1, tmp_path)
