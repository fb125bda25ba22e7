# SPDX-License-Identifier: Apache-2.0
"""Results as a table on the console, with mean and deviation over repeats."""

from collections.abc import Sequence

import numpy as np

PER_IMAGE_SET = ('inception_score', 'inception_score_mean', 'inception_score_std')  # metrics without a reference


def summary(repeats: Sequence[dict]) -> dict[str, dict]:
    """{name: {'mean', 'std', 'min'}} of a list of {name: value}; std with n - 1, None for a single repeat and for missing values.

    Intervals, which belong to a single evaluation, are left out."""
    found = {}
    for name in repeats[0]:
        if name == 'intervals':
            continue
        values = [each[name] for each in repeats]
        if None in values:
            found[name] = dict.fromkeys(['mean', 'std', 'min'])
            continue
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found[name] = {'mean': float(np.mean(values)), 'std': std, 'min': float(np.min(values))}
    return found


def print_table(values: Sequence[dict], result: dict) -> None:
    """Prints the results with the facts to quote. values: a list of {name: value}, one per repeat; result: the content of the JSON."""
    reference = result['reference']
    against = ', '.join(str(part) for part in (reference['path'], reference['split'] and f'split {reference["split"]}',
                                               reference['num_images'] and f'{reference["num_images"]} images') if part)
    many = len(values) > 1
    images = f'{len(values)} x {result["num_images"]}' if many else str(result['num_images'])
    rows = [('metric', *(['mean', 'std', 'min'] if many else ['value']), 'images', 'detector', 'against')]
    for name, found in summary(values).items():
        cells = [number(found[key]) for key in (('mean', 'std', 'min') if many else ('mean',))]
        if not many:
            cells = [cells[0] + shown_interval(values[0].get('intervals', {}).get(name))]
        rows.append((name, *cells, images, result['detector']['name'], '-' if name in PER_IMAGE_SET else against))
    print_columns(rows)
    for each in values:
        for name, found in each.get('intervals', {}).items():
            if found['low'] is None:
                print(f'{name}: interval: {found["method"]}')


def shown_interval(interval: dict | None) -> str:
    """" [low, high]" to print after a value; '' if there is no interval."""
    return f' [{number(interval["low"])}, {number(interval["high"])}]' if interval and interval['low'] is not None else ''


def number(value: float | None) -> str:
    """Four decimals, or four significant digits for values below 0.01; never "-0.0000"."""
    if value is None:
        return '-'
    return f'{value:.4g}' if 1e-8 < abs(value) < 0.01 else f'{round(value, 4) + 0.0:.4f}'


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of words in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
