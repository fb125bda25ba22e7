# SPDX-License-Identifier: Apache-2.0
"""Reads the folder of a run: the curves of stats.jsonl, options.json, and the grids of samples."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dnnlib.files import json_object, read_json
from dnnlib.util import UserError

SAMPLES = re.compile(r'samples-(\d+(?:\.\d+)?)\.png')


@dataclass
class Run:
    """One run. name: short, and unique among the runs shown. options: {dotted name: value}, without the versions.

    curves: {name: [(nimg, value), ...]}. versions: {program: version}. samples: [(kimg, path of a picture), ...], in order of kimg."""

    path: str
    name: str
    curves: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    samples: list = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """The values of a curve, in their order."""
        return [value for _, value in self.curves.get(name, [])]

    def last(self, name: str) -> float | None:
        """The last value of a curve, None if there is no such curve."""
        return self.curves[name][-1][1] if name in self.curves else None

    @property
    def nimg(self) -> float:
        """Images trained on, according to stats.jsonl."""
        return max((points[-1][0] for points in self.curves.values()), default=0)


def read_stats(folder: str | os.PathLike) -> dict[str, list[tuple[float, float]]]:
    """{name: [(nimg, value), ...]} of a run's folder, without non-finite values and without a last line cut off by a crash."""
    path = os.path.join(folder, 'stats.jsonl')
    if not os.path.isfile(path):
        raise UserError(f'{folder}: no stats.jsonl in it; give the folder of a run, such as runs/00000-name')
    curves = {}
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = f.read().split('\n')
    for number, line in enumerate(lines, 1):
        for name, point in _points(line, f'{path}: line {number}', cut_off=number == len(lines)):
            curves.setdefault(name, []).append(point)
    return curves


def _points(line, where, cut_off):
    """[(name, (nimg, value)), ...] of a line. cut_off: whether the line may be unfinished, and is then ignored."""
    if not line.strip():
        return []
    try:
        fields = json_object(line, where)
    except UserError as err:
        if cut_off:
            return []
        raise UserError(f'{where} is not JSON' if 'not a JSON file' in err.message else err.message) from None
    if not _is_number(fields.get('nimg')):
        raise UserError(f'{where}: it has no number "nimg", as lines of a run\'s stats.jsonl have')
    return [(name, (fields['nimg'], value)) for name, value in fields.items() if _is_number(value)]


def _is_number(value):
    """True for finite numbers that fit into a float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def read_run(folder: str | os.PathLike, name: str | None = None) -> Run:
    """The Run in a folder. Raises UserError if it has no stats.jsonl, or one of its files is damaged.

    Runs without options.json have no options."""
    run = Run(folder, name or os.path.basename(os.path.abspath(folder)), read_stats(folder))
    path = os.path.join(folder, 'options.json')
    if os.path.isfile(path):
        run.options = flatten(read_json(path))
        for key in [key for key in run.options if key.startswith('run.command')]:
            del run.options[key]  # the same again, as it was typed
        prefix = 'run.versions.'
        run.versions = {key.removeprefix(prefix): run.options.pop(key) for key in list(run.options) if key.startswith(prefix)}
    found = [(float(match[1]), os.path.join(folder, file)) for file in os.listdir(folder) if (match := SAMPLES.fullmatch(file))]
    run.samples = sorted(found)
    return run


def read_runs(folders: Iterable[str | os.PathLike]) -> list[Run]:
    """[Run, ...] of different folders, in their order; a folder that is given twice counts once."""
    known = {}
    for folder in folders:
        known.setdefault(os.path.realpath(folder), folder)
    folders = list(known.values())
    return [read_run(folder, name) for folder, name in zip(folders, names(folders))]


def names(folders: Sequence[str | os.PathLike]) -> list[str]:
    """The shortest endings of the paths that differ from all others: ["a/x", "b/x", "y"] -> ["a/x", "b/x", "y"]."""
    parts = [os.path.realpath(folder).split(os.sep) for folder in folders]
    found = []
    for own in parts:
        depth = 1
        while depth < len(own) and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        found.append('/'.join(own[-depth:]))
    return found


def flatten(values: dict, prefix: str = '') -> dict[str, Any]:
    """Nested dicts as one, with dotted names; lists stay values, and so do empty dicts."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f'{prefix}{key}.')
        else:
            found[f'{prefix}{key}'] = value
    return found


def families(curves: dict[str, list], pattern: str) -> dict[str, dict[str, list]]:
    """{panel: {curve: points}} of the names that match a pattern with the groups "panel" and "curve", both in sorted order."""
    found = {}
    for name in sorted(curves):
        match = re.fullmatch(pattern, name)
        if match:
            found.setdefault(match['panel'], {})[match['curve'].strip('/_') or 'all'] = curves[name]
    return found
