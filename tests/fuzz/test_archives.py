# SPDX-License-Identifier: Apache-2.0
"""Whatever is handed in as images is read, or refused in one line: no traceback, no execution, no hang, no more than 2 GiB."""

import sys

import pytest

from tests.support import hostile

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='limits are set and read in the way of Linux')


def check(attack, count, folder, seconds, seed=0):
    """The tally of an attack in which nothing failed, and some inputs were harmless enough to be read."""
    tally = hostile.run(f'tests.fuzz.archives:{attack}', count, seed, folder / 'in', seconds)
    assert not tally['failed'], hostile.told(tally)
    assert tally['inputs'] == count and count / 30 < tally['read'] < count / 2, hostile.told(tally)
    return tally


def test_some_of_everything(tmp_path):
    check('everything', 200, tmp_path, 120)


@pytest.mark.slow
@pytest.mark.parametrize('attack', ['data_sets', 'members', 'sources'])
def test_ten_thousand(attack, tmp_path):
    print(hostile.told(check(attack, 10_000, tmp_path, 3600)))
