# SPDX-License-Identifier: Apache-2.0
"""Draws the curves of a run from its stats.jsonl, without a display.

python plot_run.py runs/00000-mix"""

import json
import os
import re

import click

from dnnlib import UserError
from dnnlib.figures import figure
from torch_utils.command_line import Command, version_option

PICTURES = {  # file -> (title, pattern of the names in it); one panel for what stands before the last "/" that splits a family
    'loss.png': ('Training loss, sum over an image', r'Loss/(?P<panel>[^/]+)(?P<curve>(/(clean|noisy))?)'),
    'loss-by-level.png': ('Training loss by quartile of p(sigma)', r'Loss/(?P<panel>[^/]+/(clean|noisy))/(?P<curve>q\d)'),
    'held-out.png': ('Held-out loss of the EMA', r'Val/(?P<panel>clean|noisy)(?P<curve>(/sigma=.+)?)'),
    'run.png': ('The run', r'(?P<panel>Timing/img_per_sec|Grad/.+|GNS/.+|Pairs/accepted|Optimizer/lr|Resources/.+)(?P<curve>)'),
    'metrics.png': ('Metrics', r'Metrics/(?P<panel>[^/]+)(?P<curve>)'),
    'samples.png': ('Samples of the EMA', r'(?P<panel>Samples/(mean|std)|Copies/share)(?P<curve>(_\d+|_real)?)'),
}

COUNTS = {'held-out.png': 'Val/num_images', 'samples.png': 'Samples/num_images'}  # how many images a picture is of


def read_stats(folder):
    """{name: [(nimg, value), ...]} of a run's folder. A last line cut off by a crash is left out."""
    path = os.path.join(folder, 'stats.jsonl')
    if not os.path.isfile(path):
        raise UserError(f'{folder}: no stats.jsonl in it; give the folder of a run, such as runs/00000-name')
    curves = {}
    with open(path, encoding='utf-8') as f:
        lines = f.read().split('\n')
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line) if line.strip() else {}
        except ValueError:
            if number < len(lines):
                raise UserError(f'{path}: line {number} is not JSON') from None
            continue
        for name, value in fields.items():
            if isinstance(value, (int, float)):
                curves.setdefault(name, []).append((fields['nimg'], value))
    return curves


def families(curves, pattern):
    """{panel: {curve: points}} of the names that match, both in sorted order."""
    found = {}
    for name in sorted(curves):
        match = re.fullmatch(pattern, name)
        if match:
            found.setdefault(match['panel'], {})[match['curve'].strip('/_') or 'all'] = curves[name]
    return found


def draw(title, panels, path):
    """One picture: a panel for each family, kimg to the right; a logarithmic axis where all values are positive and far apart."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with figure(path, 'plot_run.py', rows, columns, (5.2 * columns, 3.6 * rows)) as (made, axes):
        made.suptitle(title)
        for axis in axes.flat[len(panels):]:
            axis.remove()
        for axis, (panel, group) in zip(axes.flat, panels.items()):
            draw_panel(axis, panel, group)


def draw_panel(axis, panel, group):
    """The curves of one family."""
    values = [value for points in group.values() for _, value in points]
    for curve, points in group.items():
        nimg, value = zip(*points)
        axis.plot([n / 1e3 for n in nimg], value, label=curve, linewidth=1.2, marker='.' if len(points) < 40 else None)
    if min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale('log')
    axis.set(title=panel, xlabel='kimg')
    axis.grid(alpha=0.3)
    if len(group) > 1:
        axis.legend(fontsize=7)


@click.command(cls=Command)
@click.argument('run', metavar='RUN', type=click.Path(exists=True, file_okay=False))
@click.option('--dest', metavar='DIR', help='Where the pictures go  [default: RUN/plots]')
@version_option
def main(run, dest):
    """Draw the curves of a run: losses by term, level and cleanness, held-out losses, speed."""
    curves = read_stats(run)
    if not any(families(curves, pattern) for _, pattern in PICTURES.values()):
        raise UserError(f'{run}: its stats.jsonl has no curves yet; the first come with the first tick')
    dest = dest or os.path.join(run, 'plots')
    os.makedirs(dest, exist_ok=True)
    for file, (title, pattern) in PICTURES.items():
        panels = families(curves, pattern)
        if panels:
            count = curves.get(COUNTS.get(file), [])[-1:]
            title += f', {count[0][1]:,} images' if count else ''
            draw(f'{title}: {os.path.basename(os.path.normpath(run))}', panels, os.path.join(dest, file))
            click.echo(os.path.join(dest, file))


if __name__ == '__main__':
    main()
