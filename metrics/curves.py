# SPDX-License-Identifier: Apache-2.0
"""Pictures of many results, from their JSON files alone: metrics against what a sweep varies, a panel a metric.

To the right is what has most values: steps, guidance weights, or lengths of averages. A curve is all results that are alike in everything
else. Where there are several samplers, steps are told as network evaluations, in which they compare."""

import math
import textwrap
from typing import NamedTuple

from dnnlib import UserError
from dnnlib.figures import figure
from metrics.report import number
from metrics.results import origin, values
from metrics.table import COLUMNS, NONE, best, better, guidance_words, in_order, lay_out, quoted, short

STEPS, EVALUATIONS, GUIDANCE, LENGTH = 'sampling steps', 'network evaluations per image', 'guidance weight', 'relative EMA length'
SPARE = ('inception_score_mean',)  # the same as the whole, in splits
FAR = {'x': 4, 'y': 8}  # the ratios of values from which on axes are logarithmic
PANEL, LETTERS = (4.8, 3.6), 13  # inches; letters of the title in one of them
MARKERS, DASHES = 'osD^vPX', ('-', '--', ':', '-.')


class Curve(NamedTuple):
    """results: in the order of the axis. label: what they have in common and other curves have not; shade, style: of what it is drawn."""

    label: str
    shade: int
    style: int
    results: list


def draw(results, path, who):
    """Writes the picture as a PNG. who: what draws it, in errors. Raises UserError where there is nothing to draw."""
    placed = [result for result in in_order(results) if all(map(_finite, map(origin(result).get, ('steps', 'guidance'))))]
    names = [name for name in dict.fromkeys(name for result in placed for name in values(result)) if better(name) and name not in SPARE
             and any(_finite(values(result).get(name)) for result in placed)]
    if not names:
        raise UserError(f'{path}: nothing to draw: of {len(results)} results {len(placed)} tell the steps and guidance of their images, '
                        'and none of these has a number')
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


def choose_axis(results):
    """Which of the four is to the right."""
    made = [origin(result) for result in results]
    several = len({str(each.get('sampler')) for each in made}) > 1 and all(each.get('evaluations') for each in made)
    lengths = {_length(each.get('weights')) for each in made}
    counts = {EVALUATIONS if several else STEPS: len({each['steps'] for each in made}), GUIDANCE: len({each['guidance'] for each in made}),
              LENGTH: 0 if None in lengths else len(lengths)}
    return max(counts, key=counts.get)


def _length(weights):
    """0.05 of "ema:0.05"; None for other weights."""
    try:
        return float(str(weights).removeprefix('ema:'))
    except ValueError:
        return None


def place(result, across):
    """Where a result is on the axis."""
    made = origin(result)
    return {STEPS: made['steps'], EVALUATIONS: made.get('evaluations'), GUIDANCE: made['guidance'],
            LENGTH: _length(made.get('weights'))}[across]


def group(results, across):
    """The Curves. Where guidance is to the right, a result of weight 1 belongs to every curve that is else like it, however guided."""
    found, plain = {}, {}
    for result in results:
        unguided = across == GUIDANCE and origin(result)['guidance'] == 1
        (plain if unguided else found).setdefault(_parts(result, across), []).append(result)
    for parts, rest in plain.items():
        for key in [key for key in found if key[1:] == parts[1:]] or [parts]:
            found.setdefault(key, []).extend(rest)
    keys = [*found]
    leading = next((i for i in range(len(keys[0])) if len({key[i] for key in keys}) > 1), 0)  # that which has the colour
    others = [key[:leading] + key[leading + 1:] for key in keys]
    shades, styles = [*dict.fromkeys(key[leading] for key in keys)], [*dict.fromkeys(others)]
    return [Curve(label, shades.index(key[leading]), styles.index(other), sorted(found[key], key=lambda result: place(result, across)))
            for label, key, other in zip(_labels(keys), keys, others)]


def _parts(result, across):
    """What makes up a curve, in words, that of the axis left out: guidance, steps, sampler, weights, network, all else."""
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
    """Of each key the parts that tell it from the others: a part is told where those before it leave two of them alike."""
    told, count = [], 1
    for i in range(len(keys[0])):
        found = len({tuple(key[j] for j in [*told, i]) for key in keys})
        if found > count:
            told, count = [*told, i], found
    return [', '.join(key[i] for i in told) for key in keys]


def title(results):
    """What all results have in common, of what they are quoted with."""
    told = [quoted(result) for result in results]
    for each, result in zip(told, results) if len({each['sampler'] for each in told}) > 1 else ():
        each['sampler'] = str(origin(result).get('sampler'))  # without steps
    same = {column: told[0][column] for column in COLUMNS if len({each[column] for each in told}) == 1 and told[0][column] != NONE}
    words = {'evaluations': '{} evaluations', 'guidance': 'guidance {}', 'images': '{} images', 'reference': 'against {}'}
    return ', '.join(words.get(column, '{}').format(value) for column, value in same.items())


def draw_panel(axis, name, curves, across, mark):
    """The curves of one metric; bars where results have intervals or repeats. mark: the best value."""
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


def error_bar(result, name):
    """(how far down, how far up, what this is) of a result; zeros and None where it has neither interval nor repeats."""
    value = values(result)[name]
    found = (result.get('intervals') or {}).get(name)
    if isinstance(found, dict) and all(isinstance(found.get(key), (int, float)) for key in ('low', 'high', 'level')):
        return max(value - found['low'], 0.0), max(found['high'] - value, 0.0), f'{found["level"]:.0%} interval'
    found = (result.get('summary') or {}).get(name)
    if isinstance(found, dict) and isinstance(found.get('std'), (int, float)):
        return found['std'], found['std'], f'standard deviation of {len(result.get("repeats") or ())} repeats'
    return 0.0, 0.0, None


def draw_mark(axis, name, curves, across, mark):
    """A ring around the best of all results."""
    result = next(result for curve in curves for result in curve.results if values(result).get(name) == mark)
    axis.plot(place(result, across), mark, linestyle='', marker='o', markersize=11, markerfacecolor='none', markeredgecolor='crimson',
              label='best')


def scale(axes, which, found, named=False):
    """Ticks in plain numbers, and a logarithmic axis "x" or "y" where positive values are far apart. named: ticks at the values."""
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


def apart(places, curve, least=0.06):
    """Of rising values those whose places on the axis, curve(value), are a share of its length apart: their names do not overlap."""
    length, kept = curve(places[-1]) - curve(places[0]), places[:1]
    for value in places[1:]:
        if curve(value) - curve(kept[-1]) >= least * length:
            kept.append(value)
    return kept
