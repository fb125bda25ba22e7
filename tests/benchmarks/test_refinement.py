# SPDX-License-Identifier: Apache-2.0
"""The paired tables of benchmarks/refinement.py."""

import importlib.util

import pytest

from tests.support import ROOT


@pytest.fixture(scope='module')
def refinement():
    spec = importlib.util.spec_from_file_location('benchmarks.refinement', ROOT / 'benchmarks' / 'refinement.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(arm, seed, last, chosen=None):
    told = {'base': 5.0 + seed, 'last': last, **({} if chosen is None else {'chosen': chosen})}
    return {'start': 'noisy', 'arm': arm, 'seed': seed, 'distances': {key: {'full': {'pixels': value}, 'truncated': {'pixels': value + 1}}
                                                                      for key, value in told.items()}}


def test_differences_are_paired_by_seed(refinement):
    """Seeds differ by 1, and arms by 0.5 on each of them: the difference has no error, though the means have."""
    text = refinement.summarise([result('continued', 0, 3.0), result('continued', 1, 4.0), result('ode', 0, 2.5, 2.0),
                                 result('ode', 1, 3.5, 3.0)])
    assert '| continued | 2 | 5.500 +- 0.500 | 3.500 +- 0.500 |  |  |  |' in text
    assert '| ode | 2 | 5.500 +- 0.500 | 3.000 +- 0.500 | 2.500 +- 0.500 | -0.500 +- 0.000 | -1.000 +- 0.000 |' in text
    assert text.count('sampling, pixels') == 2


def test_seeds_without_their_partner_are_left_out_of_differences(refinement):
    text = refinement.summarise([result('continued', 0, 3.0), result('ode', 0, 2.0, 2.0), result('ode', 1, 9.0, 9.0)])
    assert '| -1.000 | -1.000 |' in text
