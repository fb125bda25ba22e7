# SPDX-License-Identifier: Apache-2.0
"""Damaged published weights load or are refused in one line."""

import sys

import pytest

from tests.support import hostile


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='limits are set and read in the way of Linux')
def test_thousands(tmp_path):
    tally = hostile.run('tests.fuzz.weights:Weights', 3000, 0, tmp_path / 'in', 3600)
    assert not tally['failed'], hostile.told(tally)
