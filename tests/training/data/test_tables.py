# SPDX-License-Identifier: Apache-2.0
"""What dataset.json says of each image: read as it is meant, or refused, whatever stands in its places."""

import math

import numpy as np
import pytest

from tests.support.hostile import VALUES
from training.data import tables

NAMES = ['a.png', 'b.png']
FAR = 10 ** 400  # no float64 is as large


def test_values_follow_the_names():
    for table in ({'b.png': 2, 'a.png': 1, 'c.png': 3}, [['b.png', 2], ['a.png', 1]], [['a.png', 1], ['b.png', 2], ['a.png', 1]]):
        assert tables.by_file(table, NAMES) == [1, 2]
    assert tables.by_file({'x\\a.png': 1}, ['x/a.png']) == [1]
    with pytest.raises(ValueError, match='has several values for a.png'):
        tables.by_file([['a.png', 0], ['b.png', 2], ['a.png', 1]], NAMES)
    with pytest.raises(ValueError, match='misses 1 of 2 files, such as b.png'):
        tables.by_file({'a.png': 1}, NAMES)


@pytest.mark.parametrize('table', [3, 'text', True, [1, 2], ['ab', 'cd'], [['a.png']], [['a.png', 1, 2]], [[1, 2]], [[None, 2]],
                                   [[['a.png'], 1]]])
def test_tables_that_are_none(table):
    with pytest.raises(ValueError, match='pairs or an object'):
        tables.by_file(table, NAMES)


def test_labels():
    assert tables.labels([2, 0, 5]).dtype == np.int64 and tables.labels([2, 0, 5]).tolist() == [2, 0, 5]
    for values, want in (([[1, 0.5], [0, 2]], [[1, 0.5], [0, 2]]), ([[1], [2]], [[1], [2]])):
        assert tables.labels(values).dtype == np.float32 and tables.labels(values).tolist() == want
    for values in ([3.0, 0, 1], [3.0, 0.0, 1.0], [3, False, True]):
        assert tables.labels(values).dtype == np.int64 and tables.labels(values).tolist() == [3, 0, 1]
    assert tables.labels([0, tables.MAX_CLASSES - 1]).max() == tables.MAX_CLASSES - 1
    with pytest.raises(ValueError, match='contains class 131072, but the largest allowed is 131071'):
        tables.labels([0, tables.MAX_CLASSES])


@pytest.mark.parametrize('values', [[-1, 0], [1.5, 2], [0.0, math.nan], [-1.0, 0], [],
                                    [1, None], [[1], [1, 2]], [[1], 2], [[[1]], [[2]]], ['1', '2'], [{}, {}], [[], []],
                                    [[math.nan]], [[1e39]], [math.inf, 1.0], [FAR], [[FAR], [0]], [-FAR, 0], [2 ** 63, 0],
                                    [[2 ** 64], [1e308]]])
def test_labels_that_are_none(values):
    with pytest.raises(ValueError) as error:
        tables.labels(values)
    assert len(str(error.value)) < 100


def test_levels_and_limits():
    assert tables.levels([0, 1, 0.5], 'abc', scale=2).tolist() == [0, 0.5, 0.25]
    assert tables.limits([None, 1, math.inf, FAR], 'abcd', scale=2).tolist() == [math.inf, 0.5, math.inf, math.inf]
    for bad, told in ((-1, '-1'), (math.nan, 'nan'), (math.inf, 'inf'), (FAR, '1e308 or more'), (-FAR, '-1e308 or more')):
        with pytest.raises(ValueError, match=f'has the level {told} for b.png; levels must be 0 or more'):
            tables.levels([0, bad], NAMES)
    for bad in (0, -1, math.nan, -FAR):
        with pytest.raises(ValueError, match='has the limit .* for b.png; limits must be above 0'):
            tables.limits([None, bad], NAMES)
    with pytest.raises(ValueError, match='level'):  # finite in its own units, infinite in those of the network
        tables.levels([0, 1e300], NAMES, scale=1e-20)
    with pytest.raises(ValueError, match='limit'):
        tables.limits([1, 1e-320], NAMES, scale=1e20)


def test_lower_limits():
    most = 1.7976931348623157e308  # stands for infinity, which JSON has not
    assert tables.lower_limits([None, 0, 1, math.inf, FAR, most], 'abcdef', scale=2).tolist() == [0, 0, 0.5] + 3 * [math.inf]
    assert tables.lower_limits([most, 1.0], 'ab', scale=1e10).tolist() == [math.inf, 1e-10]
    for bad in (-1, math.nan, -FAR):
        with pytest.raises(ValueError, match='has the limit .* for b.png; lower limits must be 0 or more, or null'):
            tables.lower_limits([None, bad], NAMES)
    with pytest.raises(ValueError, match='one number per file, or null'):
        tables.lower_limits([1, 'x'], NAMES)


def test_units():
    assert tables.units({'offset': 1, 'scale': 2.5, 'more': 'text'}) == {'offset': 1.0, 'scale': 2.5}
    for value in (None, 3, [], 'x', {}, {'offset': 0}, {'offset': '0', 'scale': 1}, {'offset': [[0]], 'scale': 1},
                  {'offset': None, 'scale': 1}):
        with pytest.raises(KeyError):
            tables.units(value)
    for offset, scale in ((0, 0), (0, -1), (math.nan, 1), (0, math.inf), (FAR, 1), (0, FAR), (0, 1e-60), (1e39, 1)):
        with pytest.raises(ValueError, match='both must be finite, the scale above 0') as error:
            tables.units({'offset': offset, 'scale': scale})
        assert len(str(error.value)) < 120


def test_nothing_else_comes_of_any_value():
    for first in VALUES:
        for second in (0, 1.5, None, [1], first):
            for check in (tables.labels, lambda values: tables.levels(values, NAMES), lambda values: tables.limits(values, NAMES),
                          lambda values: tables.lower_limits(values, NAMES)):
                try:
                    found = check([first, second])
                except ValueError as err:
                    assert len(str(err)) < 200
                else:
                    assert len(found) == 2 and not np.isnan(found).any()


def test_units_of_channels():
    assert tables.units({'offset': [1, 2], 'scale': [3, 4.5]}) == {'offset': [1.0, 2.0], 'scale': [3.0, 4.5]}
    assert tables.units({'offset': 1, 'scale': [3, 4]}) == {'offset': [1.0, 1.0], 'scale': [3.0, 4.0]}
    assert tables.units({'offset': [1, 2], 'scale': 3}) == {'offset': [1.0, 2.0], 'scale': [3.0, 3.0]}
    assert tables.units({'offset': [1], 'scale': [3]}) == {'offset': [1.0], 'scale': [3.0]}
    for offset, scale in (([], 1), (0, []), ([[1]], 1), (['1'], 1), ([True], 1), ([None], 1), ({}, 1)):
        with pytest.raises(KeyError):
            tables.units({'offset': offset, 'scale': scale})
    for offset, scale, text in (([1, 2], [1, 2, 3], 'one per channel'), ([0, 0], [1, 0], 'scale above 0'), ([0, math.nan], 1, 'finite'),
                                ([FAR, 0], 1, '1e308 or more'), (0, [1, 1e-60], 'scale above 0')):
        with pytest.raises(ValueError, match=text):
            tables.units({'offset': offset, 'scale': scale})


def test_what_levels_are_divided_by():
    for units, want in ((None, 1), ({'offset': 0.0, 'scale': 4.0}, 4), ({'offset': [0.0, 1.0], 'scale': [4.0, 4.0]}, 4),
                        ({'offset': [0.0, 0.0], 'scale': [4.0, 5.0]}, 1)):
        assert tables.level_scale(units) == want
