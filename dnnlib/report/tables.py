# SPDX-License-Identifier: Apache-2.0
"""Numbers and options of several runs side by side, as rows of text."""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from dnnlib.report.runs import Run
from dnnlib.util import format_time

LONGEST = 200  # characters of an option's value that are shown
NONE = '–'
LEVEL = re.compile(r'Val/(clean|noisy)/sigma=(.+)')
METRIC = re.compile(r'Metrics/(.+?)(\d+k?)?')  # name, and number of images
# Metrics for which lower, or higher, is better.
LOWER, HIGHER = ('fid', 'kid'), ('inception_score', 'inception_score_mean', 'precision', 'recall', 'density', 'coverage')
SCALES = ('data.path', 'corruption.', 'objective.', 'network.arguments.sigma_data')  # options that change what a loss means


def options(runs: Sequence[Run]) -> tuple[list[tuple], list[tuple]]:
    """([(name, value of each run), ...] that differ between the runs, [(name, value), ...] that are equal in all); values as text."""
    differ, alike = [], []
    known = sorted(set().union(*(run.options for run in runs)))
    for name in known:
        values = [shown(run.options[name]) if name in run.options else NONE for run in runs]
        if len({json.dumps(run.options.get(name, NONE), sort_keys=True) for run in runs}) > 1:
            differ.append((name, *values))
        else:
            alike.append((name, values[0]))
    return differ, alike


def shown(value: Any) -> str:
    """The value of an option as text: words unchanged, everything else as JSON."""
    found = value if isinstance(value, str) else json.dumps(value)
    return found if len(found) <= LONGEST else f'{found[:LONGEST]}...'


def scale_options(differ: Iterable[tuple]) -> list[str]:
    """Names of the differing options that put the losses of the runs on different scales."""
    return [name for name, *_ in differ if name.startswith(SCALES)]


def overview(runs: Sequence[Run]) -> tuple[list[str], list[tuple]]:
    """(head, rows): progress and last losses, one row per run."""
    head = ['run', 'kimg', 'of kimg', 'time', 'training loss', 'held out, clean', 'held out, noisy', 'img/s']
    rows = []
    for run in runs:
        terms = [name for name in sorted(run.curves) if re.fullmatch(r'Loss/[^/]+', name)]
        first = 'Loss/denoise' if 'Loss/denoise' in terms else next(iter(terms), '')
        rows.append((run.name, number(run.nimg / 1e3, 6), number(run.options.get('run.duration_kimg'), 6), duration(run), last(run, first),
                     last(run, 'Val/clean'), last(run, 'Val/noisy'), rate(run)))
    return head, rows


def levels(runs: Sequence[Run]) -> list[dict[str, list[tuple[float, float]]]]:
    """[{"clean" | "noisy": [(sigma, held-out loss), ...]} for each Run], from the run's last evaluation, in order of sigma."""
    found = []
    for run in runs:
        evaluated = max((points[-1][0] for name, points in run.curves.items() if LEVEL.fullmatch(name)), default=None)
        kinds = {}
        for name, points in run.curves.items():
            match = LEVEL.fullmatch(name)
            sigma = _as_float(match[2]) if match else None
            if sigma and points[-1][0] == evaluated:
                kinds.setdefault(match[1], []).append((sigma, points[-1][1]))
        found.append({kind: sorted(points) for kind, points in sorted(kinds.items())})
    return found


def level_rows(runs: Sequence[Run]) -> tuple[list[str], list[tuple]]:
    """(head, rows) of levels(): one row per sigma, one column per run and kind of images that has values."""
    found = levels(runs)
    columns = [(run.name, kind, dict(points)) for run, kinds in zip(runs, found) for kind, points in kinds.items()]
    sigmas = sorted(set().union(*(points for _, _, points in columns)))
    return (['sigma', *(f'{name}, {kind} images' for name, kind, _ in columns)],
            [(number(sigma), *(number(points.get(sigma)) for _, _, points in columns)) for sigma in sigmas])


def metrics(runs: Sequence[Run]) -> tuple[list[str], list[tuple]]:
    """(head, rows): for each metric the number of images, and for each run its last value and, where an order is known, its best."""
    names = sorted({name for run in runs for name in run.curves if METRIC.fullmatch(name)})
    rows = [(METRIC.fullmatch(name)[1], METRIC.fullmatch(name)[2] or NONE, *(_metric(run, name) for run in runs)) for name in names]
    for title, key in (('detector', 'run.metrics.detector'), ('reference', 'run.metrics.ref')):
        if rows and any(run.options.get(key) for run in runs):
            rows.append((title, '', *(shown(run.options.get(key) or NONE) for run in runs)))
    return ['metric', 'images', *(run.name for run in runs)], rows


def _metric(run, name):
    """"1.26 at 40 kimg (best 1.2 at 32)"."""
    points, short = run.curves.get(name), METRIC.fullmatch(name)[1]
    if not points:
        return NONE
    nimg, value = points[-1]
    said = f'{number(value)} at {number(nimg / 1e3, 6)} kimg'
    if short in LOWER + HIGHER:
        nimg, best = (min if short in LOWER else max)(points, key=lambda point: point[1])
        said += f' (best {number(best)} at {number(nimg / 1e3, 6)})' if best != value else ' (its best)'
    return said


def speed(runs: Sequence[Run]) -> tuple[list[str], list[tuple]]:
    """(head, rows): images per second, memory, and the options that affect them."""
    lines = [('img/s, median of the ticks', rate), ('img/s, last tick', lambda run: last(run, 'Timing/img_per_sec')), ('time', duration),
             ('peak memory of the process, GiB', lambda run: number(max(run.values('Resources/cpu_gib'), default=None))),
             ('peak GPU memory, GiB', lambda run: number(max(run.values('Resources/gpu_peak_gib'), default=None)))]
    lines += [(title, lambda run, key=key: shown(run.options.get(key, NONE))) for title, key in
              [('ranks', 'run.ranks'), ('batch', 'run.batch'), ('batch per GPU', 'run.batch_gpu'), ('precision', 'run.precision'),
               ('compiled', 'run.compile')]]
    return ['', *(run.name for run in runs)], [(title, *map(value, runs)) for title, value in lines]


def versions(runs: Sequence[Run]) -> tuple[list[str], list[tuple]]:
    """(head, rows): the versions that each run was made with."""
    names = list(dict.fromkeys(name for run in runs for name in run.versions))
    return ['', *(run.name for run in runs)], [(name, *(shown(run.versions.get(name, NONE)) for run in runs)) for name in names]


def duration(run: Run) -> str:
    """Training time of a run as text."""
    seconds = run.last('Timing/seconds')
    return NONE if seconds is None else format_time(seconds)


def rate(run: Run) -> str:
    """Median of the images per second; the first tick, which includes the warm-up, counts only if there is no other."""
    found = run.values('Timing/img_per_sec')
    return number(statistics.median(found[1:] or found) if found else None)


def last(run: Run, name: str) -> str:
    """The last value of a curve as text."""
    return number(run.last(name))


def number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits; any other value is shown as missing."""
    return f'{value:.{digits}g}' if isinstance(value, (int, float)) else NONE


def _as_float(word):
    try:
        return float(word)
    except ValueError:
        return None
