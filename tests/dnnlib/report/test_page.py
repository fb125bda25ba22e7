# SPDX-License-Identifier: Apache-2.0
"""The page of several runs: what is in it, that it loads nothing, its size, and that no run can put markup into it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from dnnlib.report import page, tables
from dnnlib.report.runs import Run, read_run, read_runs

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


class Elements(html.parser.HTMLParser):
    """[(name, attributes)] of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ''
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def options(**run):
    return {'data': {'path': 'digits.zip', 'keep': 1.0}, 'optimizer': {'lr': 0.001}, 'objective': {'weight': 'edm'},
            'run': {'seed': 1, 'desc': None, 'duration_kimg': 40.0, 'versions': {'torch': '2.13', 'commit': 'abc123'}, **run}}


def write(folder, options, lines=12, side=32, seed=0):
    """A run's folder with curves, held-out losses, metrics and two pictures of noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with open(folder / 'stats.jsonl', 'w') as f:
        for k in range(1, lines + 1):
            tick = {'nimg': 2048 * k, 'Loss/denoise': 100 / k + rng.random(), 'Loss/denoise/clean/q1': rng.random(), 'Optimizer/lr': 1e-3,
                    'Timing/img_per_sec': 270.0, 'Timing/seconds': 7.5 * k, 'Resources/cpu_gib': 0.4}
            held_out = {'nimg': 2048 * k, 'Val/clean': 9 / k, 'Val/clean/sigma=0.05': 5 / k, 'Val/clean/sigma=1.2': 4.0,
                        'Val/noisy/sigma=1.2': 7.0, 'Val/noisy/sigma=0.05': None, 'Metrics/fid256': 3 + (k - 5) ** 2}
            f.write(json.dumps(tick) + '\n' + json.dumps(held_out) + '\n')
    (folder / 'options.json').write_text(json.dumps(options))
    for kimg in (8, 16):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f'samples-{kimg:06d}.png', compress_level=1)
    return folder


@pytest.fixture
def runs(tmp_path):
    base = options(expr_id='a')
    other = options(expr_id='b') | {'objective': {'weight': 'min_snr:gamma=5'}}
    return read_runs([write(tmp_path / '00000-a', base), write(tmp_path / '00001-b', other, lines=9, seed=1)])


def cells(made):
    """[[cell, ...] for each row] of the page's tables, as text."""
    rows = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in re.findall('<tr>(.*?)</tr>', made)]
    return [[re.sub('<.*?>', '', cell) for cell in row] for row in rows]


def test_names_and_options(runs):
    """Options that differ stand with a value for each run, equal ones in a part that is closed, and versions and commit are there."""
    differ, alike = tables.options(runs)
    assert differ == [('objective.weight', 'edm', 'min_snr:gamma=5'), ('run.expr_id', 'a', 'b')]
    assert ('optimizer.lr', '0.001') in alike and ('run.desc', 'null') in alike
    assert not {name for name, *_ in differ} & {name for name, _ in alike}
    made = page.page(runs, 'test')
    rows, (before, folded) = cells(made), made.split('Options that are equal')
    assert all(list(row) in rows for row in differ) and ['torch', '2.13', '2.13'] in rows and ['commit', 'abc123', 'abc123'] in rows
    assert 'optimizer.lr' not in before and 'optimizer.lr' in folded and '<details><summary><h2>Options that are equal' in made
    assert all(run.name in Elements(before).text for run in runs)
    assert 'Do not compare runs that differ in objective.weight' in made


def test_one_run_and_equal_runs(runs):
    made = page.page(runs[:1], 'test')
    assert 'Options that differ' not in made and '<details open><summary><h2>Options</h2>' in made
    assert 'Do not compare' not in made
    twin = Run('', 'twin', runs[0].curves, runs[0].options)
    assert 'all options of these runs are equal' in page.page([runs[0], twin], 'test')


def test_curves_are_those_of_stats_jsonl(runs):
    made = page.page(runs, 'test')
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', made)[1])
    assert [found['name'] for found in data] == ['00000-a', '00001-b']
    for run, found in zip(runs, data):
        assert set(found['curves']) == {'Loss/denoise', 'Loss/denoise/clean/q1', 'Optimizer/lr', 'Timing/img_per_sec', 'Resources/cpu_gib',
                                        'Val/clean', 'Metrics/fid256'}
        for name, (kimg, values) in found['curves'].items():
            points = run.curves[name]
            assert kimg == [nimg / 1e3 for nimg, _ in points] and values == pytest.approx([value for _, value in points], rel=1e-5)
        last = 5 / (len(run.curves['Val/clean']))
        assert found['levels'] == {'clean': [[0.05, 1.2], [pytest.approx(last, rel=1e-5), 4.0]], 'noisy': [[1.2], [7.0]]}
    assert set(re.findall('data-curve="(.*?)"', made)) == set().union(*(found['curves'] for found in data))


def test_tables(runs):
    rows = cells(page.page(runs, 'test'))
    assert ['fid', '256', '52 at 24.576 kimg (best 3 at 10.24)', '19 at 18.432 kimg (best 3 at 10.24)'] in rows
    assert ['0.05', '0.4167', '–', '0.5556', '–'] in rows and ['1.2', '4', '7', '4', '7'] in rows
    assert ['Loss/denoise', *(f'{run.last("Loss/denoise"):.4g}' for run in runs)] in rows  # for readers without JavaScript
    assert ['time', '1m 30s', '1m 08s'] in rows and ['img/s, median of the ticks', '270', '270'] in rows


def test_long_curves_are_thinned(tmp_path):
    points = [(1000 * k, float(k % 2)) for k in range(1, 2502)]
    found = page.thinned(points, 1000)
    assert len(found) == 834 and found[0] == (3000, pytest.approx(2 / 3)) and found[-1][0] == 2_501_000
    assert page.thinned(points, 2501) is points
    many = [Run('', str(k), {f'Loss/{j}': points for j in range(20)}) for k in range(10)]
    assert sum(len(y) for found in page.chart_data(many) for _, y in found['curves'].values()) <= page.ALL_POINTS


def test_it_loads_nothing(runs):
    """No address of any network, all pictures within, no handlers in attributes, and a policy that allows one script by its digest."""
    made = page.page(runs, 'test')
    assert not re.search(r'https?:|//[a-z]|@import|url\(', re.sub(r'data:image/\w+;base64,[^"]+', '', re.sub('// .*', '', made)))
    elements = Elements(made).found
    assert not {name for name, _ in elements} & {'link', 'iframe', 'object', 'base', 'a'}
    sources = [value for _, attributes in elements for key, value in attributes.items() if key in ('src', 'href')]
    assert len(sources) == 4 and all(source.startswith('data:image/png;base64,') for source in sources)
    policy = next(attributes['content'] for _, attributes in elements if attributes.get('http-equiv') == 'Content-Security-Policy')
    assert policy.startswith("default-src 'none'; img-src data:; ") and "script-src 'sha256-" in policy
    assert len([1 for name, _ in elements if name == 'script']) == 2


def test_no_markup_from_runs(tmp_path):
    """Names of folders and curves, options and their names, versions and values: what they say is text."""
    evil = options(desc=EVIL) | {EVIL: {EVIL: EVIL}}
    evil['run']['versions'][EVIL] = EVIL
    folder = write(tmp_path / EVIL.replace('/', ' '), evil)
    with open(folder / 'stats.jsonl', 'a') as f:
        names = (f'Loss/{EVIL.replace("/", " ")}', f'Metrics/{EVIL}', f'Val/clean/sigma={EVIL}')
        f.write(json.dumps({'nimg': 10 ** 5, **dict.fromkeys(names, 1.0)}) + '\n')
    clean = write(tmp_path / 'clean', options())
    made, plain = (page.page([read_run(path) for path in paths], 'test') for paths in ([folder, clean], [clean]))
    assert 'alert(1)' in made and '<script>alert' not in made and '<img src=x' not in made
    elements = Elements(made).found
    assert {name for name, _ in elements} == {name for name, _ in Elements(plain).found}
    assert len([1 for name, _ in elements if name == 'script']) == 2
    assert not any(key.startswith('on') for _, attributes in elements for key in attributes)


def test_size_with_large_pictures(tmp_path):
    """Three runs with 25 large pictures of noise each and long logs stay under 5 MB."""
    runs = [read_run(write(tmp_path / str(k), options(), lines=1100, side=700, seed=k)) for k in range(3)]
    for run in runs:
        run.samples = [(kimg, run.samples[kimg % 2][1]) for kimg in range(25)]
        run.curves |= {f'Loss/denoise/clean/q{q}': run.curves['Loss/denoise'] for q in range(10)}
    made = page.page(runs, 'test')
    assert made.count('src="data:image/') == 24 and 1e6 < len(made.encode()) < 5e6


def test_runs_with_little_in_them(tmp_path):
    """A run that has just begun, without options, pictures or held-out losses; a picture that is broken; a sigma that is no number."""
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'stats.jsonl').write_text('{"nimg": 80, "Loss/denoise": 3.0, "Val/clean/sigma=x": 2.0}\n{"nimg": 160, "Lo')
    (folder / 'samples-000000.png').write_bytes(b'no picture')
    full = write(tmp_path / 'full', options())
    made = page.page(read_runs([folder, full]), 'test')
    assert 'No options.json: run.' in made and 'cannot be read' in made
    assert 'Held-out loss by noise level' not in page.page([read_run(folder)], 'test')


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_in_a_browser(runs, tmp_path):
    """It draws its curves, and its console has no errors. Names of runs are those that try to be markup."""
    runs[0].name = EVIL
    (tmp_path / 'page.html').write_text(page.page(runs, 'test'), encoding='utf-8')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
             '--disable-component-update', '--disable-sync',
             f'--user-data-dir={tmp_path / "profile"}', '--enable-logging=stderr', '--dump-dom']
    result = subprocess.run([CHROMIUM, *flags, f'file://{tmp_path / "page.html"}'], capture_output=True, text=True, timeout=60)
    assert 'CONSOLE' not in result.stderr, [line for line in result.stderr.splitlines() if 'CONSOLE' in line]
    drawn = re.findall(r'<svg [^>]*aria-label="([^"]*)">(.*?)</svg>', result.stdout)
    assert len(drawn) == 9 and all(svg.count('class="curve c') == 2 and 'NaN' not in svg for _, svg in drawn)
    assert all(('>sigma<' if 'images' in name else '>kimg<') in svg for name, svg in drawn)
