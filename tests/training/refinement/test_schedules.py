# SPDX-License-Identifier: Apache-2.0
"""Levels at which the rounds stop."""

import numpy as np
import pytest

from dnnlib import UserError
from torch_utils import registry
from training.refinement.schedules import SCHEDULES

LEVELS = np.array([0.4, 0.2, 0.0])


@pytest.mark.parametrize(('spec', 'k', 'expected'), [
    ('sfbd', 3, [0, 0, 0]), ('dataloops', 1, [0.05, 0.025, 0]), ('dataloops:rho=2', 3, [0.05, 0.025, 0]),
    ('explicit:levels=0.1|0.05', 1, [0.1] * 3), ('explicit:levels=0.1|0.05', 2, [0.05] * 3), ('explicit:levels=0.1|0.05', 5, [0.05] * 3)])
def test_levels(spec, k, expected):
    assert np.allclose(registry.build(spec, SCHEDULES)(LEVELS, k), expected, atol=0)


@pytest.mark.parametrize('spec', ['dataloops:rho=1', 'dataloops:rho=nan', 'explicit:levels=0.1|0.2', 'explicit:levels=-1',
                                  'explicit:levels=nan'])
def test_numbers_out_of_range(spec):
    with pytest.raises(ValueError):
        registry.build(spec, SCHEDULES)(LEVELS, 1)


def test_unknown_names():
    with pytest.raises(UserError, match='sfbd'):
        registry.check('sfdb', SCHEDULES, '--schedule')
