# SPDX-License-Identifier: Apache-2.0
"""Files of other programs' formats that are damaged are read, or refused in one line: no traceback, no hang, no more than 2 GiB."""

import sys

import pytest

from tests.fuzz.formats import ATTACKS, NEEDS
from tests.support import hostile

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='limits are set and read in the way of Linux')]
COUNT = 3000


@pytest.mark.parametrize('name', [*ATTACKS, 'table_folder'])
def test_damaged_files(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    tally = hostile.run(f'tests.fuzz.formats:{name}_files', COUNT, 0, tmp_path / 'in', 3600)
    print(hostile.told(tally))
    assert not tally['failed'] and tally['inputs'] == COUNT and tally['read'] and tally['refused'], hostile.told(tally)
