# SPDX-License-Identifier: Apache-2.0
"""plot_run.py: what it reads from stats.jsonl, which curves go together, and that the pictures are drawn without a display."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from PIL import Image

import plot_run
from dnnlib.report.runs import read_runs
from tests.support import tiny

DRAWS = pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='drawing needs the package matplotlib')


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / 'stats.jsonl').write_text(text)
    return folder


def refused(*args):
    result = CliRunner().invoke(plot_run.main, [str(arg) for arg in args])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    return result.output.strip()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Ten steps with everything that has a curve."""
    folder = tmp_path_factory.mktemp('plot')
    data = tiny.make_zip(folder / 'data.zip')
    tiny.call(f'--outdir={folder / "run"}', f'--data={data}', *tiny.FLAGS, '--nosubdir', '--snap=1', '--val=0.25', '--gns=1',
              '--batch-gpu=8', '--duration=0.00016', '--seed=5')
    return folder / 'run'


def test_curves_of_a_run(run):
    """Every value of stats.jsonl, in its order, under its name."""
    curves = plot_run.read_stats(run)
    lines = [json.loads(line) for line in (run / 'stats.jsonl').read_text().splitlines()]
    assert [nimg for nimg, _ in curves['Loss/denoise']] == [nimg for nimg, _ in curves['Val/clean']] == [80, 160]
    for name, points in curves.items():
        assert points == [(line['nimg'], line[name]) for line in lines if line.get(name) is not None]


def test_what_alarms_measure_is_drawn_together(tmp_path):
    """Channels of the samples in one panel, copies beside those among real images, and no count as a curve."""
    fields = {'nimg': 80, 'Samples/num_images': 64, 'Samples/mean_0': 0.1, 'Samples/mean_1': 0.2, 'Samples/std_0': 0.5,
              'Copies/num_images': 64, 'Copies/share': 0.25, 'Copies/share_real': 0.0}
    curves = plot_run.read_stats(write(tmp_path / 'run', json.dumps(fields) + '\n'))
    found = plot_run.families(curves, plot_run.PICTURES['samples.png'][1])
    assert {panel: list(group) for panel, group in found.items()} == {
        'Copies/share': ['all', 'real'], 'Samples/mean': ['0', '1'], 'Samples/std': ['0']}


def test_families(run):
    """Each picture has the panels that its title says, and nothing is drawn twice or left out of the losses."""
    curves = plot_run.read_stats(run)
    found = {file: plot_run.families(curves, pattern) for file, (_, pattern) in plot_run.PICTURES.items()}
    assert {panel: list(group) for panel, group in found['loss.png'].items()} == {'denoise': ['all', 'clean', 'noisy']}
    by_level = found['loss-by-level.png']
    assert list(by_level) == ['denoise/clean', 'denoise/noisy'] and set().union(*by_level.values()) <= {'q1', 'q2', 'q3', 'q4'}
    assert len(found['held-out.png']['clean']) == 9
    assert {'Grad/norm', 'GNS/batch', 'Timing/img_per_sec', 'Optimizer/lr'} <= set(found['run.png'])
    assert not found['metrics.png']
    drawn = sum(len(group) for file in ('loss.png', 'loss-by-level.png') for group in found[file].values())
    assert drawn == sum(name.startswith('Loss/') for name in curves)


@DRAWS
def test_pictures_without_a_display(run, tmp_path):
    """As a command of its own, with no display in its environment: PNGs of some size, with ink in them."""
    environment = {key: value for key, value in os.environ.items() if key not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')}
    result = subprocess.run([sys.executable, tiny.ROOT / 'plot_run.py', run], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = ['loss.png', 'loss-by-level.png', 'held-out.png', 'run.png']
    assert result.stdout.splitlines() == [str(run / 'plots' / name) for name in names]
    assert sorted(os.listdir(run / 'plots')) == sorted(names)
    for name in names:
        with Image.open(run / 'plots' / name) as image:
            assert image.format == 'PNG' and min(image.size) > 200 and image.convert('L').getextrema() == (0, 255)


def two_runs(folder):
    """Two runs with a curve each has alone, and one that both have."""
    first = write(folder / '00000-a', '{"nimg": 80, "Loss/denoise": 3.0, "Loss/denoise/clean": 2.0, "Metrics/fid64": 9.0}\n')
    second = write(folder / '00001-b', '{"nimg": 80, "Loss/denoise": 4.0}\n'
                                       '{"nimg": 160, "Loss/denoise": 2.0, "Val/clean/sigma=0.1": 2.0}\n')
    return first, second


def test_runs_are_overlaid(tmp_path):
    """Of several runs, every curve is a panel in which all of them stand; of one run, the families stand together as before."""
    runs = read_runs(two_runs(tmp_path))
    found = {file: plot_run.overlaid(runs, pattern) for file, (_, pattern) in plot_run.PICTURES.items()}
    assert found['loss.png'] == {'denoise': {'00000-a': [(80, 3.0)], '00001-b': [(80, 4.0), (160, 2.0)]},
                                 'denoise/clean': {'00000-a': [(80, 2.0)]}}
    assert found['held-out.png'] == {'clean/sigma=0.1': {'00001-b': [(160, 2.0)]}}
    assert plot_run.overlaid(runs[:1], plot_run.PICTURES['loss.png'][1]) == {'denoise': {'all': [(80, 3.0)], 'clean': [(80, 2.0)]}}


@DRAWS
def test_pictures_of_two_runs(tmp_path, monkeypatch):
    """Into the folder `plots` of the working folder, where --dest names no other; the runs' folders stay as they are."""
    folders = two_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(plot_run.main, [str(folder) for folder in folders])
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir('plots')) == ['held-out.png', 'loss.png', 'metrics.png']
    assert all(os.listdir(folder) == ['stats.jsonl'] for folder in folders)


def test_page(run, tmp_path, monkeypatch):
    """One file and nothing else, without matplotlib, of runs that may be going on; it names both runs."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    other, _ = two_runs(tmp_path)
    path = tmp_path / 'out' / 'page.html'
    before = sorted(os.listdir(run))
    result = CliRunner().invoke(plot_run.main, [str(run), str(other), f'--html={path}'])
    assert result.exit_code == 0 and result.output.strip() == str(path) and os.listdir(path.parent) == ['page.html'], result.output
    made = path.read_text()
    assert '>run</' in made and '00000-a' in made and '<td>3</td>' in made and 'No options.json: 00000-a.' in made
    assert sorted(os.listdir(run)) == before and 'corruption.sigma' in made and made.rstrip().endswith('</html>')


def test_page_of_a_run_whose_description_is_markup(tmp_path):
    """--desc comes into the name of the run's folder and into its options, and is text in the page."""
    data, evil = tiny.make_zip(tmp_path / 'data.zip'), '<script>alert(1)<'
    tiny.call(f'--outdir={tmp_path / "runs"}', f'--data={data}', *tiny.FLAGS, f'--desc={evil}', '--duration=0.00008', '--seed=5')
    folder = tiny.only_folder(tmp_path / 'runs')
    assert evil in folder.name
    result = CliRunner().invoke(plot_run.main, [str(folder), f'--html={tmp_path / "page.html"}'])
    made = (tmp_path / 'page.html').read_text()
    assert result.exit_code == 0 and made.count('&lt;script&gt;alert(1)&lt;') >= 3 and evil not in made


@DRAWS
def test_names_that_matplotlib_reads_otherwise(tmp_path):
    """Dollars are no formulas, and a run whose name begins with "_" stands in the legend."""
    text = '{"nimg": 80, "Loss/$\\\\frac{$": 3.0}\n'
    folders = [write(tmp_path / name, text) for name in ('_a', 'b$\\frac{$')]
    result = CliRunner().invoke(plot_run.main, [*map(str, folders), f'--dest={tmp_path / "pictures"}'])
    assert result.exit_code == 0 and os.listdir(tmp_path / 'pictures') == ['loss.png'], result.output
    assert plot_run.literal('_a') == ' _a' and plot_run.literal('$') == r'\$'


@DRAWS
def test_dest_and_a_line_cut_off(tmp_path):
    """The last line of a run that was killed in the middle of writing counts for nothing; the others are drawn."""
    folder = write(tmp_path / 'run', '{"nimg": 80, "Loss/denoise": 3.0}\n{"nimg": 160, "Loss/denoise": null}\n{"nimg": 240, "Loss/den')
    assert plot_run.read_stats(folder)['Loss/denoise'] == [(80, 3.0)]
    result = CliRunner().invoke(plot_run.main, [str(folder), f'--dest={tmp_path / "pictures"}'])
    assert result.exit_code == 0 and os.listdir(tmp_path / 'pictures') == ['loss.png'] and not (folder / 'plots').exists()


def test_refusals(tmp_path):
    assert 'no stats.jsonl in it' in refused(tmp_path)
    assert 'nowhere' in refused(tmp_path / 'nowhere')
    assert 'RUN' in refused()
    broken = write(tmp_path / 'broken', '{"nimg": 80}\n{"nimg": 1\n{"nimg": 160}\n')
    assert f'{broken / "stats.jsonl"}: line 2 is not JSON' in refused(broken)
    for text in ('', '{"nimg": 80, "Progress/kimg": 0.08}\n'):
        empty = write(tmp_path / 'empty', text)
        assert 'has no curves yet' in refused(empty) and os.listdir(empty) == ['stats.jsonl']


def test_refusals_of_several_runs_and_of_pages(tmp_path):
    """The run that is at fault is named, and nothing is written."""
    good, _ = two_runs(tmp_path)
    html = tmp_path / 'page.html'
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    assert f'{foreign}: no stats.jsonl in it' in refused(good, foreign, f'--html={html}')
    (good / 'options.json').write_text('{"run": ')
    assert 'options.json: not a JSON file' in refused(good, f'--html={html}')
    (good / 'options.json').unlink()
    assert f'--html={tmp_path}' in refused(good, f'--html={tmp_path}')
    assert 'ends in .html' in refused(good, f'--html={tmp_path / "page.png"}')
    assert not html.exists() and not (tmp_path / 'page.png').exists() and os.listdir(good) == ['stats.jsonl']


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'pip install matplotlib' in refused(write(tmp_path / 'run', '{"nimg": 80, "Loss/denoise": 3.0}\n'))
