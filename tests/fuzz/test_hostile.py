# SPDX-License-Identifier: Apache-2.0
"""The harness itself: it sees what it is there to see."""

import json
import os
import sys
import time

import numpy as np
import pytest

from dnnlib import UserError
from tests.support import hostile

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='limits are set and read in the way of Linux')


def deeds(folder):
    """Input k is deed number k, whatever the draws."""
    numbers = iter(range(99))

    def nest(depth):
        return nest(depth + 1)

    def allocate():
        try:
            return np.ones(2 ** 29)  # 4 GiB
        except MemoryError as err:
            raise UserError(f'too large: {err}') from None

    def refuse(message):
        err = UserError('')
        err.message = message  # as no UserError would let it be
        raise err

    def write(path):
        with open(path, 'w') as f:
            f.write('x')

    found = [lambda: None, lambda: refuse('one line'), lambda: write(os.path.join(folder, 'here')), lambda: refuse('two\nlines'),
             lambda: refuse('x' * 9999), lambda: {}['x'], lambda: nest(0), allocate, lambda: exec('1'), lambda: os.kill(os.getpid(), 9),
             lambda: write(os.path.join(folder, '..', 'elsewhere')), lambda: os.mkdir(f'{folder}-beside'),
             lambda: os.rename(os.path.join(folder, 'here'), f'{folder}-there'), lambda: time.sleep(99)]
    return lambda draws: found[next(numbers) + START]


START = 0


def later(folder):
    """The deeds behind the one that kills the process, which begin anew in another process."""
    global START
    START = 10
    return deeds(folder)


@pytest.mark.slow
def test_a_hang_is_seen(tmp_path):
    tally = hostile.run('tests.fuzz.test_hostile:later', 4, 0, tmp_path / 'in', 120)
    assert tally['failed'] == 4 and any(kind.startswith('Hang at ') for kind in tally['failures']), hostile.told(tally)


def test_every_failure_is_seen(tmp_path):
    tally = hostile.run('tests.fuzz.test_hostile:deeds', 10, 0, tmp_path / 'in', 120)
    kinds = ' | '.join(tally['failures'])
    assert (tally['inputs'], tally['read'], tally['refused'], tally['failed']) == (10, 2, 1, 7), hostile.told(tally)
    for word in ('several lines', 'too long', 'KeyError at tests/fuzz/test_hostile.py', 'RecursionError', 'MemoryError told', 'Trespass',
                 'died with -9'):
        assert word in kinds, word
    tally = hostile.run('tests.fuzz.test_hostile:later', 3, 0, tmp_path / 'in', 120)
    assert sorted(tally['failures'].values()) == [1, 1, 1] and 'FileNotFoundError' not in str(tally['failures']), hostile.told(tally)
    assert os.listdir(tmp_path) == ['in']


def test_mutations_repeat_and_leave_the_original():
    value = {'labels': [['a.png', 1], ['b.png', [0.5, 1]]], 'units': {'offset': 0, 'scale': 1}}
    text = json.dumps(value).encode()
    made = [[hostile.mutate_json(value, np.random.default_rng([0, k])), hostile.mutate(text, np.random.default_rng([0, k]))]
            for k in (*range(100), *range(100))]
    assert made[:100] == made[100:] and json.dumps(value).encode() == text
    assert len({one for pair in made for one in pair}) > 150
