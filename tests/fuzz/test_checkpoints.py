# SPDX-License-Identifier: Apache-2.0
"""Damaged states, networks, averages and statistics load or are refused in one line: thousands of them, within time and memory."""

import json
import sys

import pytest

from tests.fuzz import checkpoints
from tests.support import hostile, launch

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='limits are set and read in the way of Linux')


def attack(kind, count, folder, seconds, module='checkpoints'):
    tally = hostile.run(f'tests.fuzz.{module}:{kind}', count, 0, folder / 'in', seconds)
    assert not tally['failed'], hostile.told(tally)
    return tally


def test_some_of_each_kind(tmp_path):
    """In a fork of a process that has imported everything."""
    args = ('tests.fuzz.checkpoints:SomeOfAll', '120', '0', str(tmp_path / 'in'))
    process = launch.CONTEXT.Process(target=checkpoints.judge, args=(tmp_path / 'log', *args))
    process.start()
    process.join(120)
    process.kill()
    found = [json.loads(line) for line in (tmp_path / 'log').read_text().splitlines()]
    assert not [line for line in found if line[0] not in ('read', 'refused')]
    assert len(found) == 120 and 5 < sum(line[0] == 'read' for line in found) < 60  # flipped weights and text do no harm


@pytest.mark.slow
@pytest.mark.parametrize('kind, count', [('State', 10_000), ('DiscreteState', 10_000), ('StateAsNetwork', 3000), ('OldWeights', 3000),
                                         ('Snapshot', 5000), ('FromHub', 5000), ('SingleFile', 3000), ('Pickle', 3000),
                                         ('Diffusers', 3000), ('Options', 3000), ('Averages', 3000), ('StatisticsFile', 5000),
                                         ('PickledStatistics', 5000)])
def test_thousands_of_a_kind(tmp_path, kind, count):
    assert kind in {found.__name__ for found in checkpoints.ALL}
    attack(kind, count, tmp_path, 3600)


@pytest.mark.slow
@pytest.mark.parametrize('kind, count', [('EDM2Pickle', 3000), ('PublishedAverages', 1000)])
def test_thousands_of_published_files(tmp_path, kind, count):
    attack(kind, count, tmp_path, 3600, 'published')
