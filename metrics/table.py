# SPDX-License-Identifier: Apache-2.0
"""Many results as one table, from their JSON files alone: a row a result, with all that a number is quoted with."""

import csv
import io
import json
import math
import os
import re

from dnnlib import UserError
from metrics.report import number
from metrics.results import origin, values

COLUMNS = ('network', 'weights', 'sampler', 'evaluations', 'guidance', 'images', 'detector', 'reference')
NONE = '-'
SETTINGS, GIVEN = 'settings', 'given'  # orders that are no metric's
HIGHER = ('inception_score', 'inception_score_mean', 'precision', 'recall', 'density', 'coverage')


def quoted(result):
    """{column: text} of COLUMNS; "-" for what a result does not tell."""
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


def guidance_words(made, gnet):
    """Weight, interval and channels where they are told, and what the guiding network is to be called; None where nothing is told."""
    weight, interval, channels = (made.get(f'guidance{name}') for name in ('', '_interval', '_channels'))
    if weight is None or weight == 1:
        return None if weight is None else '1'
    if isinstance(interval, list) and len(interval) == 2:  # open above: null in JSON
        interval = f'({interval[0]}, {"inf" if interval[1] is None else interval[1]}]'
    words = [f'{weight:g}', interval and f'at {interval}', channels and f'in {channels} channels', gnet and f'from {gnet}']
    return ' '.join(filter(None, words))


def short(path):
    """The last part of a path or name."""
    return os.path.basename(str(path).rstrip('/')) or str(path)


def in_order(results):
    """Results by network, weights, sampler, guidance and steps: in one order, whatever that in which they are given."""
    def key(result):
        made = origin(result)
        names = ('network', 'weights', 'sampler', 'gnet', 'guidance_interval', 'guidance_channels')
        text = '\0'.join(str(made.get(name) or '') for name in names)
        names = [(int(part), '') if part.isdigit() else (-1, part) for part in re.split(r'(\d+)', text) if part]
        return not made, names, made.get('guidance') or 0, made.get('steps') or 0, json.dumps(result, sort_keys=True)
    return sorted(results, key=key)


def better(name):
    """min or max, whichever value of a metric is the best; None for deviations."""
    return None if name.endswith('_std') else max if name in HIGHER else min


def lay_out(results, sort=SETTINGS):
    """(names of the columns, [[cell of a column, ...]]): texts, and numbers or None under the metrics that any result has.

    sort: "settings" as in_order() has them, "given", or the metric in whose order the rows stand, those without it last. UserError."""
    if sort != GIVEN:
        results = in_order(results)
    names = [*dict.fromkeys(name for result in results for name in values(result))]
    if sort not in (SETTINGS, GIVEN, *names):
        raise UserError(f'--sort={sort}: none of the results has it; choose from {", ".join([*names, SETTINGS, GIVEN])}')
    if sort in names:
        results = sorted(results, key=lambda result: (values(result).get(sort) is None, values(result).get(sort) or 0.0))
    return [*COLUMNS, *names], [[*quoted(result).values(), *(values(result).get(name) for name in names)] for result in results]


def best(columns, rows):
    """{column of a metric: its best value} of rows that may be compared: of as many images, one detector and one reference."""
    told = [dict(zip(columns, row)) for row in rows]
    same = {(str(each['images']).split()[-1], each['detector'], each['reference']) for each in told}
    found = {}
    for place, name in enumerate(columns[len(COLUMNS):], len(COLUMNS)):
        known = [row[place] for row in rows if row[place] is not None and math.isfinite(row[place])]
        if len(same) == 1 and len(known) > 1 and better(name):
            found[place] = better(name)(known)
    return found


def markdown(columns, rows):
    """A table of Markdown; numbers as on the console, the best of each metric in bold where rows may be compared."""
    marked = best(columns, rows)
    shown = [[escaped(cell) if isinstance(cell, str) else f'**{number(cell)}**' if cell is not None and cell == marked.get(place)
              else number(cell) for place, cell in enumerate(row)] for row in rows]
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
