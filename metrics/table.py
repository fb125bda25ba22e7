# SPDX-License-Identifier: Apache-2.0
"""A table of results, made from their JSON files alone: one row per result, with everything that is quoted with its numbers."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dnnlib import UserError
from metrics.report import number
from metrics.results import origin, values

COLUMNS = ('network', 'weights', 'sampler', 'evaluations', 'guidance', 'images', 'detector', 'reference')
NONE = '-'
SETTINGS, GIVEN = 'settings', 'given'  # values of --sort that are not metrics
HIGHER = ('inception_score', 'inception_score_mean', 'precision', 'recall', 'density', 'coverage')


def quoted(result: dict) -> dict[str, str]:
    """{column: text} for COLUMNS; "-" for what is missing from the result."""
    made, reference = origin(result), result.get('reference') or {}
    path = (result.get('generated') or {}).get('path')
    repeats = len(result.get('repeats') or ())
    sampler, _, keys = str(made.get('sampler') or '').partition(':')
    split, sha256 = reference.get('split'), reference.get('sha256')
    found = {
        'network': short(made['network']) if made.get('network') else f'{short(path)} (images)' if path else None,
        'weights': made.get('weights'),
        'sampler': sampler and f'{sampler}{made.get("steps") or ""}{keys and f":{keys}"}',
        'evaluations': made.get('evaluations'), 'guidance': guidance_words(made, short(made.get('gnet') or '')),
        'images': f'{repeats} x {result["num_images"]}' if repeats > 1 else result.get('num_images'),
        'detector': (result.get('detector') or {}).get('name'),
        'reference': ', '.join(filter(None, [split, sha256 and sha256[:8] or short(reference.get('path') or '')]))}
    return {column: NONE if value is None or value == '' else str(value) for column, value in found.items()}


def guidance_words(made: dict, gnet: str) -> str | None:
    """Guidance weight, interval, channels and guiding network in words; None where the record `made` has no weight.

    gnet: the name to show for the guiding network, '' for none."""
    weight, interval, channels = (made.get(f'guidance{name}') for name in ('', '_interval', '_channels'))
    if weight is None or weight == 1:
        return None if weight is None else '1'
    if isinstance(interval, list) and len(interval) == 2:  # open above: null in JSON
        interval = f'({interval[0]}, {"inf" if interval[1] is None else interval[1]}]'
    words = [f'{weight:g}', interval and f'at {interval}', channels and f'in {channels} channels', gnet and f'from {gnet}']
    return ' '.join(filter(None, words))


def short(path: str | os.PathLike) -> str:
    """The last part of a path or name."""
    return os.path.basename(str(path).rstrip('/')) or str(path)


def in_order(results: Iterable[dict]) -> list[dict]:
    """The results sorted by network, weights, sampler, guidance and steps, whatever order they are given in."""
    def key(result):
        made = origin(result)
        names = ('network', 'weights', 'sampler', 'gnet', 'guidance_interval', 'guidance_channels')
        text = '\0'.join(str(made.get(name) or '') for name in names)
        names = [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'(\d+)', text) if part]
        return not made, names, made.get('guidance') or 0, made.get('steps') or 0, json.dumps(result, sort_keys=True)
    return sorted(results, key=key)


def better(name: str) -> Callable | None:
    """min or max: which value of a metric is best; None for standard deviations."""
    return None if name.endswith('_std') else max if name in HIGHER else min


def lay_out(results: Sequence[dict], sort: str = SETTINGS) -> tuple[list[str], list[list[Any]]]:
    """(column names, rows of cells): texts for COLUMNS, then a number or None for each metric that any result has.

    sort: "settings" (see in_order), "given" (unchanged), or a metric, lowest first and rows without it last. Raises UserError."""
    if sort != GIVEN:
        results = in_order(results)
    names = [*dict.fromkeys(name for result in results for name in values(result))]
    if sort not in (SETTINGS, GIVEN, *names):
        raise UserError(f'--sort={sort}: none of the results has it; choose from {", ".join([*names, SETTINGS, GIVEN])}')
    if sort in names:
        results = sorted(results, key=lambda result: (values(result).get(sort) is None, values(result).get(sort) or 0.0))
    return [*COLUMNS, *names], [[*quoted(result).values(), *(values(result).get(name) for name in names)] for result in results]


def best(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[int, float]:
    """{index of a metric's column: best value}; empty unless all rows have the same number of images, detector and reference."""
    told = [dict(zip(columns, row)) for row in rows]
    same = {(str(each['images']).split()[-1], each['detector'], each['reference']) for each in told}
    found = {}
    for place, name in enumerate(columns[len(COLUMNS):], len(COLUMNS)):
        known = [row[place] for row in rows if row[place] is not None and math.isfinite(row[place])]
        if len(same) == 1 and len(known) > 1 and better(name):
            found[place] = better(name)(known)
    return found


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with rounded numbers, and the best value of each metric in bold where the rows are comparable."""
    marked = best(columns, rows)
    shown = [[escaped(cell) if isinstance(cell, str) else f'**{number(cell)}**' if cell is not None and cell == marked.get(place)
              else number(cell) for place, cell in enumerate(row)] for row in rows]
    lines = [map(escaped, columns), ['---'] * len(COLUMNS) + ['---:'] * (len(columns) - len(COLUMNS)), *shown]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def escaped(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return ' '.join(text.split()).replace('|', r'\|')


def comma_separated(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV with all digits of the numbers; missing numbers are empty."""
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows([columns, *rows])
    return out.getvalue()


FORMATS = {'markdown': markdown, 'csv': comma_separated}
