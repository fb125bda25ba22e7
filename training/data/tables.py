# SPDX-License-Identifier: Apache-2.0
"""Checks the tables of dataset.json: labels, noise levels, limits, units.

The functions raise ValueError with a message that lacks its subject, such as "must be one number per file": the caller adds it."""

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.estimation import stabilise

MAX_CLASSES = 2 ** 17  # limited because networks take classes as one-hot vectors
MAX_SHOWN = 8  # numbers of a list that are shown
NUMBERS = {int, float, bool}
LARGEST = sys.float_info.max


def distinct(indices: np.ndarray) -> np.ndarray:
    """Sorted distinct values of whole numbers from 0, int64; for a million, 20 times as fast as numpy.unique, and with less memory."""
    return np.flatnonzero(np.bincount(indices))


def by_file(table: list | dict, names: Sequence[str]) -> list:
    """The values of a table in the order of the names. table: [[name, value], ...] or {name: value}. Raises ValueError."""
    found = by_name(pairs_of(table))
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f'misses {len(missing)} of {len(names)} files, such as {missing[0]}; list every file')
    return [found[name] for name in names]


def pairs_of(table: list | dict) -> list:
    """The (name, value) pairs of a table as by_file() takes it, a list. Raises ValueError."""
    pairs = list(table.items()) if isinstance(table, dict) else table
    if not isinstance(pairs, list) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError('must be [file, value] pairs or an object')
    return pairs


def by_name(pairs: Sequence) -> dict[str, Any]:
    """{name with slashes: value} of (name, value) pairs. Raises ValueError where a name has several values."""
    found = {name.replace('\\', '/'): value for name, value in pairs}
    if len(found) < len(pairs):
        told = next((name for name, value in pairs if found[name.replace('\\', '/')] != value), None)
        if told is not None:
            raise ValueError(f'has several values for {told}')
    return found


def numbers(values: Sequence | np.ndarray) -> np.ndarray:
    """A list of numbers from JSON, or an array -> float64 [N]; numbers beyond float64 become infinite. Raises ValueError."""
    if isinstance(values, np.ndarray):
        return values.astype(np.float64)
    kinds = set(map(type, values))
    if not kinds <= NUMBERS:
        raise ValueError('must be one number per file')
    if int in kinds:  # JSON's integers may have any length
        values = [math.inf if value > LARGEST else -math.inf if value < -LARGEST else value for value in values]
    return np.array(values, np.float64)


def labels(values: Sequence | np.ndarray) -> np.ndarray:
    """A list or array of labels, either all classes or all vectors -> int64 [N] or float32 [N, D]. Raises ValueError.

    Classes are whole numbers, possibly written as floats (3.0); a vector is a list, possibly of one number."""
    wrong = ValueError('must be classes 0, 1, ... or finite vectors of one length')
    if isinstance(values, np.ndarray):
        if values.ndim == 2:
            return _vectors(values)
        return _classes(_whole(values) if values.dtype.kind == 'f' else values, wrong)
    kinds = set(map(type, values))
    if values and kinds <= NUMBERS:
        return _classes(values if kinds == {int} else _whole(values), wrong)
    lengths = set(map(len, values)) if kinds == {list} else set()
    if len(lengths) != 1 or lengths == {0}:
        raise wrong
    flat = list(itertools.chain.from_iterable(values))
    try:
        found = numbers(flat).reshape(len(values), -1)
    except ValueError:
        raise wrong from None
    return _vectors(found)


def _vectors(values):
    with np.errstate(over='ignore'):
        found = values.astype(np.float32)
    _check_finite(np.isfinite(found).all(axis=1))
    return found


def _classes(values, wrong):
    """Whole numbers as int64 [N]."""
    low, high = (values.min(), values.max()) if isinstance(values, np.ndarray) else (min(values), max(values))
    if low < 0:
        raise wrong
    if high >= MAX_CLASSES:
        raise ValueError(f'contains class {str(high)[:20]}, but the largest allowed is {MAX_CLASSES - 1}')
    return np.array(values, np.int64)


def _whole(values):
    """Whole numbers, possibly written as floats, as a list of int."""
    found = numbers(values)
    _check_finite(np.isfinite(found))
    broken = np.flatnonzero(found % 1)
    if len(broken):
        told = f'{found[broken[0]]:g}'
        raise ValueError(f'has labels that are not whole numbers for {len(broken)} of {len(found)} images, such as {told}; a vector is '
                         f'[{told}]')
    return list(map(int, found.tolist()))


def _check_finite(finite):
    if not finite.all():
        raise ValueError(f'has {np.count_nonzero(~finite)} of {len(finite)} labels that are not finite (NaN or infinite)')


def levels(values: Sequence | np.ndarray, names: Sequence[str], scale: float = 1.0) -> np.ndarray:
    """Noise levels divided by the scale, float64 [N], all of them finite. Raises ValueError."""
    found = _over(numbers(values), scale)
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        raise ValueError(f'has the level {shown(values[bad[0]])} for {names[bad[0]]}; levels must be 0 or more' + _more(bad, found))
    return found


def limits(values: Sequence | np.ndarray, names: Sequence[str], scale: float = 1.0) -> np.ndarray:
    """Upper limits of levels divided by the scale, float64 [N]; null means no limit and becomes inf. Raises ValueError."""
    try:
        listed = values if isinstance(values, np.ndarray) else [math.inf if value is None else value for value in values]
        found = _over(numbers(listed), scale)
    except ValueError as err:
        raise ValueError(f'{err}, or null') from None
    bad = np.flatnonzero(~(found > 0))
    if len(bad):
        raise ValueError(f'has the limit {shown(values[bad[0]])} for {names[bad[0]]}; limits must be above 0, or null for no limit'
                         + _more(bad, found))
    return found


def lower_limits(values: Sequence | np.ndarray, names: Sequence[str], scale: float = 1.0) -> np.ndarray:
    """Lower limits of levels divided by the scale, float64 [N]; null means no limit and becomes 0; inf: no level is allowed.

    JSON has no infinity: the largest float64 represents it. Raises ValueError."""
    try:
        told = numbers(values if isinstance(values, np.ndarray) else [0.0 if value is None else value for value in values])
    except ValueError as err:
        raise ValueError(f'{err}, or null') from None
    bad = np.flatnonzero(~(told >= 0))
    if len(bad):
        raise ValueError(f'has the limit {shown(values[bad[0]])} for {names[bad[0]]}; lower limits must be 0 or more, or null for no limit')
    return np.where(told < LARGEST, _over(told, scale), math.inf)


def units(value: Any) -> dict:
    """{offset, scale} of float data: floats, or lists of floats with one per channel; both must be valid as float32. With "stabilise" if
    the values are stabilised counts (training.estimation.stabilise).

    Raises ValueError, or KeyError if one is missing or not a number."""
    if not isinstance(value, dict):
        raise KeyError('units')
    found = {key: value[key] for key in ('offset', 'scale')}
    lists = {key: one if isinstance(one, list) and one else [one] for key, one in found.items()}
    if not {type(one) for ones in lists.values() for one in ones} <= {int, float}:
        raise KeyError('numbers')
    told = ', '.join(f'{key}: {shown_all(one)}' for key, one in found.items())
    count = max(map(len, lists.values()))
    if not all(len(ones) in (1, count) for ones in lists.values()):
        raise ValueError(f'units {{{told}}}; give one number each, or one per channel')
    with np.errstate(over='ignore', under='ignore'):
        offset, scale = (numbers(ones * (count // len(ones))) for ones in lists.values())
        usable = np.isfinite(np.float32([offset, scale])).all() and (np.float32(scale) > 0).all()
    if not usable:
        raise ValueError(f'units {{{told}}}; both must be finite, the scale above 0')
    single = not any(isinstance(one, list) for one in found.values())
    stabilised = {} if value.get('stabilise') is None else {'stabilise': stabilise.from_record(value['stabilise']).record()}
    return {'offset': offset.item() if single else offset.tolist(), 'scale': scale.item() if single else scale.tolist(), **stabilised}


def per_channel(values: float | Sequence[float]) -> np.ndarray:
    """An offset or scale of units as float64 [1 or C,1,1]."""
    return np.reshape(np.float64(values), (-1, 1, 1))


def level_scale(units: dict | None) -> float:
    """The divisor that converts levels in dataset.json to network units: the scale of float data (units; None for 8-bit images: 1).

    If channels have different scales, noise that is white in network units is not white in stored units: levels are then given in
    network units, and this is 1."""
    return 1.0 if units is None else common_scale(units) or 1.0


def common_scale(units: dict) -> float | None:
    """The common scale of all channels; None if they differ."""
    scales = np.unique(units['scale'])
    return float(scales[0]) if len(scales) == 1 else None


def shown_all(value: Any) -> str:
    """A number from JSON, or a list of them, as text; of a long list only the first few."""
    if not isinstance(value, list):
        return shown(value)
    more = f', ... ({len(value)} in all)' if len(value) > MAX_SHOWN else ''
    return f'[{", ".join(map(shown, value[:MAX_SHOWN]))}{more}]'


def shown(value: float) -> str:
    """A number from JSON as text; whole numbers beyond float64 are shortened."""
    return f'{value:g}' if isinstance(value, float) or abs(value) <= LARGEST else f'{"-" * (value < 0)}1e308 or more'


def _more(bad, values):
    """How many values are bad, if there are more than the one that the message names."""
    return f' ({len(bad)} of {len(values)} are not)' if len(bad) > 1 else ''


def _over(values, scale):
    with np.errstate(over='ignore', under='ignore'):
        return values / scale


# By the key of dataset.json: (values, names, scale of levels) -> the table as an array.
CHECKS = {'labels': lambda values, names, scale=1.0: labels(values), 'sigmas': levels, 'sigma_min': lower_limits, 'sigma_max': limits}
