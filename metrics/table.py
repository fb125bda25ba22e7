# SPDX-License-Identifier: Apache-2.0
"""Many results as one table, from their JSON files alone: a row a result, with all that a number is quoted with."""

import csv
import io
import os

from dnnlib import UserError
from metrics.report import number
from metrics.results import origin, values

COLUMNS = ('network', 'weights', 'sampler', 'evaluations', 'guidance', 'images', 'detector', 'reference')
NONE = '-'


def quoted(result):
    """{column: text} of COLUMNS; "-" for what a result does not tell."""
    made, reference = origin(result), result.get('reference') or {}
    path = (result.get('generated') or {}).get('path')
    repeats = len(result.get('repeats') or ())
    sampler, _, keys = str(made.get('sampler') or '').partition(':')
    split, sha256 = reference.get('split'), reference.get('sha256')
    found = {
        'network': _short(made['network']) if made.get('network') else f'{_short(path)} (images)' if path else None,
        'weights': made.get('weights'),
        'sampler': sampler and f'{sampler}{made.get("steps") or ""}{keys and f":{keys}"}',
        'evaluations': made.get('evaluations'), 'guidance': guidance_words(made, _short(made.get('gnet') or '')),
        'images': f'{repeats} x {result["num_images"]}' if repeats > 1 else result.get('num_images'),
        'detector': (result.get('detector') or {}).get('name'),
        'reference': ', '.join(filter(None, [split, sha256 and sha256[:8] or _short(reference.get('path') or '')]))}
    return {column: NONE if value is None or value == '' else str(value) for column, value in found.items()}


def guidance_words(made, gnet):
    """Weight, interval where there is one, and what the guiding network is to be called; None where nothing is told."""
    weight, interval = made.get('guidance'), made.get('guidance_interval')
    if weight is None or weight == 1:
        return None if weight is None else '1'
    if isinstance(interval, list) and len(interval) == 2:  # open above: null in JSON
        interval = f'({interval[0]}, {"inf" if interval[1] is None else interval[1]}]'
    return ' '.join(filter(None, [f'{weight:g}', interval and f'at {interval}', gnet and f'from {gnet}']))


def _short(path):
    return os.path.basename(str(path).rstrip('/')) or str(path)


def lay_out(results, sort=None):
    """(names of the columns, [[cell of a column, ...]]): texts, and numbers or None under the metrics that any result has.

    sort: the metric in whose order the rows stand, those without it last; by default they stand as given. Raises UserError."""
    names = [*dict.fromkeys(name for result in results for name in values(result))]
    if sort is not None and sort not in names:
        raise UserError(f'--sort={sort}: none of the results has it; choose from {", ".join(names)}')
    if sort:
        results = sorted(results, key=lambda result: (values(result).get(sort) is None, values(result).get(sort) or 0.0))
    return [*COLUMNS, *names], [[*quoted(result).values(), *(values(result).get(name) for name in names)] for result in results]


def markdown(columns, rows):
    """A table of Markdown; numbers as on the console."""
    shown = [[number(cell) if not isinstance(cell, str) else escaped(cell) for cell in row] for row in rows]
    lines = [map(escaped, columns), ['---'] * len(COLUMNS) + ['---:'] * (len(columns) - len(COLUMNS)), *shown]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def escaped(text):
    """Text as one cell of a table of Markdown."""
    return ' '.join(text.split()).replace('|', r'\|')


def comma_separated(columns, rows):
    """CSV; numbers with all their digits, and nothing where there is none."""
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows([columns, *rows])
    return out.getvalue()


FORMATS = {'markdown': markdown, 'csv': comma_separated}
