# SPDX-License-Identifier: Apache-2.0
"""Plots of many results, made from their JSON files alone: one panel per metric, against what a sweep varies.

The horizontal axis shows the setting with the most values: steps, guidance weights, or lengths of averages. A curve joins the results
that agree in everything else. With several samplers, steps are shown as network evaluations, which are comparable between samplers."""

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dnnlib import UserError
from dnnlib.figures import figure
from metrics.report import number
from metrics.results import origin, values
from metrics.table import COLUMNS, NONE, best, better, guidance_words, in_order, lay_out, quoted, short

STEPS, EVALUATIONS, GUIDANCE, LENGTH = 'sampling steps', 'network evaluations per image', 'guidance weight', 'relative EMA length'
SPARE = ('inception_score_mean',)  # not drawn: nearly the same as inception_score
FAR = {'x': 4, 'y': 8}  # an axis is logarithmic if largest / smallest value is at least this
PANEL, LETTERS = (4.8, 3.6), 13  # width and height of a panel in inches; letters of the title per inch
MARKERS, DASHES = 'osD^vPX', ('-', '--', ':', '-.')


class Curve(NamedTuple):
    """results: in the order of the axis. label: what distinguishes them from others. shade, style: indices of colour and line style."""

    label: str
    shade: int
    style: int
    results: list


def draw(results: Sequence[dict], path: str | os.PathLike, who: str) -> None:
    """Writes the plot as a PNG. who: the option or file that errors name. Raises UserError if there is nothing to draw."""
    placed = [result for result in in_order(results) if all(map(_finite, map(origin(result).get, ('steps', 'guidance'))))]
    names = [name for name in dict.fromkeys(name for result in placed for name in values(result)) if better(name) and name not in SPARE
             and any(_finite(values(result).get(name)) for result in placed)]
    if not names:
        raise UserError(f'{path}: nothing to draw: of {len(results)} results {len(placed)} have the steps and guidance of their images, '
                        'and none of these has a finite value')
    across = choose_axis(placed)
    curves = group(placed, across)
    columns, table = min(len(names), 3), lay_out(placed)
    rows, marked = -(-len(names) // columns), best(*table)
    with figure(path, who, rows, columns, (PANEL[0] * columns, PANEL[1] * rows + 0.8 + 0.2 * len(curves) / columns)) as (made, axes):
        made.suptitle(textwrap.fill(title(placed), int(PANEL[0] * columns * LETTERS)), fontsize=9)
        for axis in axes.flat[len(names):]:
            axis.remove()
        for axis, name in zip(axes.flat, names):
            draw_panel(axis, name, curves, across, marked.get(table[0].index(name)))
        found = {label: handle for axis in axes.flat[:len(names)] for handle, label in zip(*axis.get_legend_handles_labels())}
        found |= {'best': found.pop('best')} if 'best' in found else {}  # at the end
        made.legend(found.values(), found, loc='outside lower center', ncols=2 * columns, fontsize=8, frameon=False)


def _finite(value):
    return value is not None and math.isfinite(value)


def choose_axis(results: Sequence[dict]) -> str:
    """The label of the horizontal axis: STEPS, EVALUATIONS, GUIDANCE or LENGTH."""
    made = [origin(result) for result in results]
    several = len({str(each.get('sampler')) for each in made}) > 1 and all(each.get('evaluations') for each in made)
    lengths = {_length(each.get('weights')) for each in made}
    counts = {EVALUATIONS if several else STEPS: len({each['steps'] for each in made}), GUIDANCE: len({each['guidance'] for each in made}),
              LENGTH: 0 if None in lengths else len(lengths)}
    return max(counts, key=counts.get)


def _length(weights):
    """0.05 for "ema:0.05"; None for other weights."""
    try:
        return float(str(weights).removeprefix('ema:'))
    except ValueError:
        return None


def place(result: dict, across: str) -> float | None:
    """The position of a result on the horizontal axis."""
    made = origin(result)
    return {STEPS: made['steps'], EVALUATIONS: made.get('evaluations'), GUIDANCE: made['guidance'],
            LENGTH: _length(made.get('weights'))}[across]


def group(results: Sequence[dict], across: str) -> list[Curve]:
    """The Curves. On a guidance axis, a result with weight 1 is part of every curve that agrees with it in all but the guidance."""
    found, plain = {}, {}
    for result in results:
        unguided = across == GUIDANCE and origin(result)['guidance'] == 1
        (plain if unguided else found).setdefault(_parts(result, across), []).append(result)
    for parts, rest in plain.items():
        for key in [key for key in found if key[1:] == parts[1:]] or [parts]:
            found.setdefault(key, []).extend(rest)
    keys = [*found]
    leading = next((i for i in range(len(keys[0])) if len({key[i] for key in keys}) > 1), 0)  # the part that colours show
    others = [key[:leading] + key[leading + 1:] for key in keys]
    shades, styles = [*dict.fromkeys(key[leading] for key in keys)], [*dict.fromkeys(others)]
    return [Curve(label, shades.index(key[leading]), styles.index(other), sorted(found[key], key=lambda result: place(result, across)))
            for label, key, other in zip(_labels(keys), keys, others)]


def _parts(result, across):
    """The settings of a result in words, without that of the axis: guidance, steps, sampler, weights, network, others."""
    made = origin(result)
    guidance = guidance_words(made, short(made.get('gnet') or ''))
    guidance = f'guided {guidance.partition(" ")[2] or "at all levels"}' if across == GUIDANCE else f'guidance {guidance}'
    labels = made.get('labels')
    labels = {key: value for key, value in labels.items() if key != 'path'} if isinstance(labels, dict) else None
    digest = '' if across == LENGTH else str(made.get('sha256'))[:8]
    return (guidance, '' if across in (STEPS, EVALUATIONS) else f'{made["steps"]} steps', str(made.get('sampler')),
            '' if across == LENGTH else str(made.get('weights')), short(made.get('network') or ''), f'{result["num_images"]} images',
            f'labels {labels}', *(f'{key} {made.get(key)}' for key in ('levels', 'stop_sigma', 'precision', 'compile')), digest)


def _labels(keys):
    """For each key the parts that distinguish it from the others; a part is left out if those before it already do."""
    told, count = [], 1
    for i in range(len(keys[0])):
        found = len({tuple(key[j] for j in [*told, i]) for key in keys})
        if found > count:
            told, count = [*told, i], found
    return [', '.join(key[i] for i in told) for key in keys]


def title(results: Sequence[dict]) -> str:
    """The settings that all results have in common, in words."""
    told = [quoted(result) for result in results]
    for each, result in zip(told, results) if len({each['sampler'] for each in told}) > 1 else ():
        each['sampler'] = str(origin(result).get('sampler'))  # without steps
    same = {column: told[0][column] for column in COLUMNS if len({each[column] for each in told}) == 1 and told[0][column] != NONE}
    words = {'evaluations': '{} evaluations', 'guidance': 'guidance {}', 'images': '{} images', 'reference': 'against {}'}
    return ', '.join(words.get(column, '{}').format(value) for column, value in same.items())


def draw_panel(axis: Any, name: str, curves: Sequence[Curve], across: str, mark: float | None) -> None:
    """Draws the curves of one metric, with error bars where results have intervals or repeats. mark: the best value."""
    from matplotlib import colormaps

    shades = max(curve.shade for curve in curves) + 1
    kinds = set()
    for curve in curves:
        known = [result for result in curve.results if _finite(values(result).get(name))]
        if not known:
            continue
        bars = [error_bar(result, name) for result in known]
        kinds |= {kind for _, _, kind in bars if kind}
        color = colormaps['viridis'](0.88 * curve.shade / max(shades - 1, 1))
        axis.errorbar([place(result, across) for result in known], [values(result)[name] for result in known],
                      [[low for low, _, _ in bars], [high for _, high, _ in bars]] if any(kind for *_, kind in bars) else None,
                      label=curve.label or None, color=color, linestyle=DASHES[curve.style % len(DASHES)], capsize=3, elinewidth=0.8,
                      marker=MARKERS[curve.style % len(MARKERS)], markersize=4.5, linewidth=1.3)
    if mark is not None:
        draw_mark(axis, name, curves, across, mark)
    shown = [result for curve in curves for result in curve.results]
    scale(axis, 'x', [place(result, across) for result in shown], named=True)
    scale(axis, 'y', [value for result in shown if _finite(value := values(result).get(name))])
    told = [f'best {number(mark)}' if mark is not None else '', f'bars: {" and ".join(sorted(kinds))}' if kinds else '']
    axis.set_title('; '.join(filter(None, told)), fontsize=8)
    axis.set_xlabel(across)
    axis.set_ylabel(f'{name} ({"lower" if better(name) is min else "higher"} is better)')
    axis.grid(alpha=0.3)


def error_bar(result: dict, name: str) -> tuple[float, float, str | None]:
    """(length below, length above, description) of the error bar; (0, 0, None) if the result has neither interval nor repeats."""
    value = values(result)[name]
    found = (result.get('intervals') or {}).get(name)
    if isinstance(found, dict) and all(isinstance(found.get(key), (int, float)) for key in ('low', 'high', 'level')):
        return max(value - found['low'], 0.0), max(found['high'] - value, 0.0), f'{found["level"]:.0%} interval'
    found = (result.get('summary') or {}).get(name)
    if isinstance(found, dict) and isinstance(found.get('std'), (int, float)):
        return found['std'], found['std'], f'standard deviation of {len(result.get("repeats") or ())} repeats'
    return 0.0, 0.0, None


def draw_mark(axis: Any, name: str, curves: Sequence[Curve], across: str, mark: float) -> None:
    """Draws a ring around the best of all results."""
    result = next(result for curve in curves for result in curve.results if values(result).get(name) == mark)
    axis.plot(place(result, across), mark, linestyle='', marker='o', markersize=11, markerfacecolor='none', markeredgecolor='crimson',
              label='best')


def scale(axes: Any, which: str, found: Sequence[float], named: bool = False) -> None:
    """Plain numbers at the ticks of the axis "x" or "y", which is logarithmic if positive values are far apart. named: ticks at the
    values."""
    from matplotlib import ticker

    axis, places = getattr(axes, f'{which}axis'), sorted(set(found))
    far = places[0] > 0 and places[-1] >= FAR[which] * places[0]
    if far:
        getattr(axes, f'set_{which}scale')('log')
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(ticker.NullLocator())
    if named:
        axis.set_major_locator(ticker.FixedLocator(apart(places, math.log if far else float)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:.6g}'))


def apart(places: Sequence[float], curve: Callable[[float], float], least: float = 0.06) -> list[float]:
    """The increasing values without those so close to the one before that the numbers at their ticks would overlap.

    curve(value): position on the axis. least: smallest distance, as a share of the length of the axis."""
    length, kept = curve(places[-1]) - curve(places[0]), places[:1]
    for value in places[1:]:
        if curve(value) - curve(kept[-1]) >= least * length:
            kept.append(value)
    return kept
