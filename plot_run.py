# SPDX-License-Identifier: Apache-2.0
"""Draws the curves of runs from their stats.jsonl, without a display, or writes them into one HTML page.

python plot_run.py runs/00000-mix
python plot_run.py runs/00000-mix runs/00001-edm --html=compare.html"""

import os
from collections.abc import Sequence
from typing import Any

import click

from dnnlib import UserError, replacing
from dnnlib.figures import figure
from dnnlib.files import prepare_output
from dnnlib.report.page import page
from dnnlib.report.runs import Run, families, read_runs, read_stats
from dnnlib.util import printable
from dnnlib.versions import VERSION, git_commit
from torch_utils.command_line import Command, version_option

__all__ = ['PICTURES', 'families', 'main', 'read_stats']

PICTURES = {  # file -> (title, pattern of curve names); each value of the group "panel" gets one panel
    'loss.png': ('Training loss, sum over an image', r'Loss/(?P<panel>[^/]+)(?P<curve>(/(clean|noisy))?)'),
    'loss-by-level.png': ('Training loss by quartile of p(sigma)', r'Loss/(?P<panel>[^/]+/(clean|noisy))/(?P<curve>q\d)'),
    'held-out.png': ('Held-out loss of the EMA', r'Val/(?P<panel>clean|noisy)(?P<curve>(/sigma=.+)?)'),
    'run.png': ('The run', r'(?P<panel>Timing/img_per_sec|Grad/.+|GNS/.+|Pairs/accepted|Optimizer/lr|Resources/.+)(?P<curve>)'),
    'metrics.png': ('Metrics', r'Metrics/(?P<panel>[^/]+)(?P<curve>)'),
    'samples.png': ('Samples of the EMA', r'(?P<panel>Samples/(mean|std)|Copies/share)(?P<curve>(_\d+|_real)?)'),
}
COLOURS = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9']  # of Okabe and Ito: colour-blind people can distinguish them
LINES = ['-', '--', ':']  # the next style once the colours are used up

COUNTS = {'held-out.png': 'Val/num_images', 'samples.png': 'Samples/num_images'}  # curve with the number of images behind a picture


def overlaid(runs: Sequence[Run], pattern: str) -> dict[str, dict[str, list]]:
    """{panel: {curve: points}}: for one run as families() gives them; for several, one panel per curve with all runs in it."""
    if len(runs) == 1:
        return families(runs[0].curves, pattern)
    found = {}
    for run in runs:
        for panel, group in families(run.curves, pattern).items():
            for curve, points in group.items():
                found.setdefault(panel if curve == 'all' else f'{panel}/{curve}', {})[run.name] = points
    return dict(sorted(found.items()))


def literal(text: str) -> str:
    """Text as matplotlib shows it unchanged: dollars would begin a formula, and a legend leaves out names that begin with "_"."""
    text = printable(text).replace('$', r'\$')
    return f' {text}' if text.startswith('_') else text


def draw(title: str, panels: dict[str, dict[str, list]], path: str, styles: dict[str, tuple] | None = None) -> None:
    """One picture: one panel per family against kimg; the vertical axis is logarithmic where all values are positive and far apart.

    styles: {curve: (colour, line)}, so that a run looks alike in all panels; matplotlib's own without it."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with figure(path, 'plot_run.py', rows, columns, (5.2 * columns, 3.6 * rows)) as (made, axes):
        made.suptitle(literal(title))
        for axis in axes.flat[len(panels):]:
            axis.remove()
        for axis, (panel, group) in zip(axes.flat, panels.items()):
            draw_panel(axis, panel, group, styles or {})


def draw_panel(axis: Any, panel: str, group: dict[str, list], styles: dict[str, tuple] | None) -> None:
    """The curves of one family."""
    values = [value for points in group.values() for _, value in points]
    for curve, points in group.items():
        nimg, value = zip(*points)
        color, line = styles.get(curve, (None, '-'))
        axis.plot([n / 1e3 for n in nimg], value, label=literal(curve), linewidth=1.2, marker='.' if len(points) < 40 else None,
                  color=color, linestyle=line)
    if min(values) > 0 and max(values) > 20 * min(values):
        axis.set_yscale('log')
    axis.set(title=literal(panel), xlabel='kimg')
    axis.grid(alpha=0.3)
    if len(group) > 1 or styles:
        axis.legend(fontsize=7)


def draw_pictures(runs: Sequence[Run], dest: str) -> None:
    """Writes the PICTURES that have curves into the folder `dest`, and prints their paths."""
    styles = {run.name: (COLOURS[k % len(COLOURS)], LINES[k // len(COLOURS) % len(LINES)]) for k, run in enumerate(runs)}
    os.makedirs(dest, exist_ok=True)
    for file, (title, pattern) in PICTURES.items():
        panels = overlaid(runs, pattern)
        if panels:
            counts = {run.curves[COUNTS[file]][-1][1] for run in runs if run.curves.get(COUNTS.get(file))}
            title += f', {counts.pop():,} images' if len(counts) == 1 else ''
            named = f'{title}: {runs[0].name}' if len(runs) == 1 else title
            draw(named, panels, os.path.join(dest, file), styles if len(runs) > 1 else None)
            click.echo(os.path.join(dest, file))


def write_page(runs: Sequence[Run], path: str) -> None:
    """Writes the HTML page of the runs, and prints its path."""
    made_by = f'plot_run.py {VERSION} (commit {git_commit()})'
    text = page(runs, made_by)
    with replacing(path) as part, open(part, 'w', encoding='utf-8', newline='\n') as f:
        f.write(text)
    click.echo(path)


@click.command(cls=Command)
@click.argument('runs', metavar='RUN...', nargs=-1, required=True, type=click.Path(exists=True, file_okay=False))
@click.option('--dest', metavar='DIR', help='Folder for the pictures  [default: RUN/plots; plots for several runs; none with --html]')
@click.option('--html', metavar='FILE.html', help='Write one self-contained page, to open in a browser or to send to somebody')
@version_option
def main(runs, dest, html):
    """Draw the curves of runs: losses by term, noise level and clean/noisy images, held-out losses, metrics, speed."""
    if html is not None:
        prepare_output(html, '--html', '.html')
    found = read_runs(runs)
    for run in found:
        if not any(families(run.curves, pattern) for _, pattern in PICTURES.values()):
            raise UserError(f'{run.path}: its stats.jsonl has no curves yet; the first ones are written with the first tick')
    if html is not None:
        write_page(found, html)
    if dest is not None or html is None:
        draw_pictures(found, dest or (os.path.join(found[0].path, 'plots') if len(found) == 1 else 'plots'))


if __name__ == '__main__':
    main()
