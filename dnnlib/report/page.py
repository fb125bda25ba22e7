# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page of several runs: it opens from disk, loads nothing, and shows tables and pictures without JavaScript."""

import base64
import datetime
import hashlib
import os
import re
from collections.abc import Sequence

from dnnlib.report import samples, tables
from dnnlib.report.markup import Html, join, json_script, table, tag
from dnnlib.report.runs import Run

HERE = os.path.dirname(os.path.abspath(__file__))
MAX_POINTS = 1000     # of a curve; longer ones are averaged over neighbouring points
ALL_POINTS = 90_000   # of all curves: about 1.6 MB
COLOURS = 6           # page.css has as many

# (title, pattern of the curves' names, pattern of those that the slider smooths, whether the section is closed at first, remark)
GROUPS = [
    ('Training loss', r'Loss/[^/]+(/(clean|noisy))?', r'.*', False,
     'Each term of the loss, summed over the values of an image: over all images, and separately over clean and noisy ones.'),
    ('Held-out loss', r'Val/(clean|noisy)', '', False,
     'Of the averaged weights (EMA), on images that are not trained on, with fixed noise.'),
    ('Metrics', r'Metrics/(?!.*_std\d*k?$).+', '', False, 'Of images generated with the averaged weights (EMA) during training.'),
    ('Learning rate, gradients, pairs', r'Optimizer/lr|Grad/.+|GNS/.+|Pairs/accepted', r'Grad/norm|GNS/.+|Pairs/.+', False, ''),
    ('Speed and memory', r'Timing/img_per_sec|Resources/.+', r'.*', False, ''),
    ('Training loss by noise level', r'Loss/[^/]+/(clean|noisy)/q\d', r'.*', True,
     'By quartile of p(sigma); q1 has the least noise.'),
]
UNITS = [(r'Loss/.*|Val/.*', 'loss'), (r'Timing/img_per_sec', 'images/s'), (r'Resources/.*_gib', 'GiB'), (r'Pairs/accepted', 'share'),
         (r'Optimizer/lr', 'learning rate'), (r'GNS/batch', 'images'), (r'Grad/norm', 'norm'), (r'Grad/skipped', 'share of updates')]


def page(runs: Sequence[Run], made_by: str) -> str:
    """The page as text. runs: [Run, ...] with different names. made_by: program and version for the header of the page."""
    differ, alike = tables.options(runs)
    title = f'Run {runs[0].name}' if len(runs) == 1 else f'{len(runs)} runs: {", ".join(run.name for run in runs)}'
    style, script = (_read(name) for name in ('page.css', 'page.js'))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag('head', tag('meta', charset='utf-8'), tag('meta', http_equiv='Content-Security-Policy', content=policy),
               tag('meta', name='viewport', content='width=device-width, initial-scale=1'),
               tag('meta', name='color-scheme', content='light dark'), tag('title', title), tag('style', Html(style)))
    headline = f'{len(runs)} runs compared' if len(runs) > 1 else runs[0].name
    now = datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d %H:%M UTC')
    scales = tables.scale_options(differ)
    sections = [tag('header', tag('h1', headline), tag('p', f'Written {now} by {made_by}')), _controls(runs), _overview(runs),
                _options(runs, differ), _samples(runs), *_curves(runs, scales), _levels(runs, scales), _metrics(runs),
                _details('Speed', table(*tables.speed(runs))), _versions(runs), _alike(runs, alike)]
    body = tag('body', tag('main', *filter(None, sections)), tag('dialog', tag('form', tag('button', 'Close'), method='dialog')),
               json_script(chart_data(runs), 'data'), tag('script', Html(script)))
    return f'<!DOCTYPE html>\n{tag("html", head, body, lang="en")}\n'


def _read(name):
    with open(os.path.join(HERE, name), encoding='utf-8') as f:
        return f.read()


# ----------------------------------------------------------------------------------------------------
# Sections


def _section(title, *children, remark=''):
    return tag('section', tag('h2', title), *([tag('p', remark, class_='remark')] if remark else []), *children)


def _details(title, *children, opened=True, remark=''):
    below = [tag('p', remark, class_='remark')] if remark else []
    return tag('details', tag('summary', tag('h2', title)), *below, *children, open=opened)


def _swatch(index):
    return tag('span', class_=f'swatch c{index % COLOURS} d{index // COLOURS % 3}')


def _controls(runs):
    """The legend, whose entries show and hide runs, and the controls for drawing curves; without JavaScript only the legend."""
    legend = [tag('label', tag('input', type='checkbox', checked=True, class_='js', data_run=index), _swatch(index), run.name)
              for index, run in enumerate(runs)]
    choices = [tag('label', tag('input', type='radio', name='scale', value=value, checked=value == 'auto'), value)
               for value in ('auto', 'linear', 'log')]
    slider = tag('label', 'smoothing', tag('input', type='range', id='smoothing', min='0', max='0.98', step='0.02', value='0.5'),
                 tag('output', '0.50', for_='smoothing'))
    return tag('nav', tag('div', *legend, class_='legend', role='group', aria_label='runs'),
               tag('div', tag('fieldset', tag('legend', 'vertical axis'), *choices), slider, class_='js controls'))


def _overview(runs):
    head, rows = tables.overview(runs)
    rows = [(join(_swatch(index), name), *rest) for index, (name, *rest) in enumerate(rows)]
    return _section('Overview', table(head, rows), remark='Losses and held-out losses as last logged; img/s is the median of the ticks.')


def _options(runs, differ):
    if len(runs) == 1:
        return None
    missing = [run.name for run in runs if not run.options]
    remark = f'No options.json: {", ".join(missing)}.' if missing else ''
    if not differ:
        return _section('Options that differ', tag('p', 'None: all options of these runs are equal.'), remark=remark)
    return _section('Options that differ', table(['option', *(run.name for run in runs)], differ), remark=remark)


def _alike(runs, alike):
    if not alike:
        return None
    title = 'Options that are equal' if len(runs) > 1 else 'Options'
    return _details(title, table(['option', 'value'], alike), opened=len(runs) == 1)


def _samples(runs):
    """One strip of pictures over time per run."""
    rows = []
    for index, (run, strip) in enumerate(zip(runs, samples.strips(runs))):
        if strip:
            pictures = [_picture(run, kimg, uri) for kimg, uri in strip]
            rows.append(tag('div', tag('h3', _swatch(index), run.name), tag('div', *pictures, class_='strip'), class_='samples'))
    remark = 'Generated with the averaged weights (EMA), from the same seeds each time. Select a picture to enlarge it.'
    return rows and _section('Samples', *rows, remark=remark)


def _picture(run, kimg, uri):
    name = f'{tables.number(kimg, 6)} kimg'
    shown = tag('img', src=Html(uri), alt=f'samples of {run.name} at {name}') if uri else tag('p', 'cannot be read')
    return tag('figure', tag('button', shown, type='button', disabled=not uri), tag('figcaption', name))


def _curves(runs, scales):
    """One section per group of curves with a placeholder for each chart, which page.js draws."""
    known = sorted(set().union(*(run.curves for run in runs)))
    warning = incomparable(scales)
    for title, pattern, smooth, closed, remark in GROUPS:
        names = [name for name in known if re.fullmatch(pattern, name)]
        if names:
            charts = [_chart(name, data_curve=name, data_unit=unit(name), data_smooth=bool(re.fullmatch(smooth, name))) for name in names]
            values = table(['curve', *(run.name for run in runs)], [(name, *(tables.last(run, name) for run in runs)) for name in names])
            note = tag('noscript', tag('p', 'The curves are drawn by JavaScript, which is turned off. Their last values:'), values)
            remark += warning if 'loss' in title else ''
            yield _details(title, note, tag('div', *charts, class_='charts'), opened=not closed, remark=remark)


def incomparable(scales: Sequence[str]) -> str:
    """A sentence that warns against comparing losses if these options differ; empty if none does."""
    return f' Do not compare runs that differ in {", ".join(scales)}: their losses are on different scales.' if scales else ''


def _chart(title, **data):
    drawing = tag('svg', viewBox='0 0 400 230', role='img', aria_label=title)
    return tag('figure', tag('figcaption', title), drawing, class_='js chart', **data)


def unit(name: str) -> str:
    """The label of a curve's vertical axis."""
    return next((found for pattern, found in UNITS if re.fullmatch(pattern, name)), 'value')


def _levels(runs, scales):
    head, rows = tables.level_rows(runs)
    if not rows:
        return None
    charts = [_chart(f'{kind} images', data_level=kind, data_unit='loss') for kind in ('clean', 'noisy')
              if any(kind in found for found in tables.levels(runs))]
    return _details('Held-out loss by noise level', tag('div', *charts, class_='charts'), table(head, rows),
                    remark='From the last evaluation of each run, at the midpoints of equally probable intervals of its noise distribution.'
                    + incomparable(scales))


def _metrics(runs):
    head, rows = tables.metrics(runs)
    remark = ('"Images" is the number of generated images per value. Values with different numbers of images, detectors or references '
              'cannot be compared with each other or with published ones.')
    return rows and _details('Metrics in numbers', table(head, rows), remark=remark)


def _versions(runs):
    head, rows = tables.versions(runs)
    return rows and _details('Versions', table(head, rows))


# ----------------------------------------------------------------------------------------------------
# Data of the charts


def chart_data(runs: Sequence[Run]) -> list[dict]:
    """[{"name", "curves": {name: [[kimg, ...], [value, ...]]}, "levels": {kind: [[sigma, ...], [value, ...]]}} for each Run].

    Values have six significant digits. Curves too long for the page are averaged over as few neighbouring points as possible."""
    shown = re.compile('|'.join(f'(?:{pattern})' for _, pattern, *_ in GROUPS))
    drawn = [{name: points for name, points in run.curves.items() if shown.fullmatch(name)} for run in runs]
    limit = max(2, min(MAX_POINTS, ALL_POINTS // max(sum(map(len, drawn)), 1)))
    found = []
    for run, curves, kinds in zip(runs, drawn, tables.levels(runs)):
        found.append({'name': run.name, 'levels': {kind: _columns(points) for kind, points in kinds.items()},
                      'curves': {name: _columns([(nimg / 1e3, value) for nimg, value in thinned(points, limit)])
                                 for name, points in sorted(curves.items())}})
    return found


def _columns(points):
    return [[float(f'{value:.{digits}g}') for value in column] for digits, column in zip((9, 6), zip(*points))]


def thinned(points: list[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: means over equally many neighbouring points, placed at the last of them."""
    group = -(-len(points) // limit)
    if group == 1:
        return points
    parts = [points[start:start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(value / len(part) for _, value in part)) for part in parts]
