# SPDX-License-Identifier: Apache-2.0
"""eval_fid.py sweep: cells equal plain calls, what is done is not done again, what does not compare is refused, tables of files alone."""

import importlib.util
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import eval_fid
from tests.support import ROOT, launch
from tests.support.unets import tiny
from training.checkpoints.save import save_network
from training.evaluation import comparison
from training.evaluation import sweep as sweep_module
from training.sampling import pieces as sampling

DRAWS = pytest.mark.skipif(importlib.util.find_spec('matplotlib') is None, reason='drawing needs the package matplotlib')
COMMON = ['--ref-stats=ref.npz', '--detector=pixels', '--metrics=fid,kid', '--kid-subset-size=4', '--kid-subsets=3', '--seeds=0-7']
GRID = ['--network=net', '--guidance=1,1.5', '--steps=2,3']
CELLS = [f'net.heun{steps}{guidance}-pixels-8' for guidance in ('', '-guidance1.5') for steps in (2, 3)]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Networks with three classes, net, other and state.pt, one without any, and statistics of digits' size."""
    root = tmp_path_factory.mktemp('files')
    for name in ('net', 'other'):
        save_network(conditional(name), root / name)
    save_network(tiny(key='plain'), root / 'plain')
    states = [conditional(f'state {i}') for i in range(3)]
    weights = [net.state_dict() for net in states]
    torch.save({'options': {'network': states[0].config}, 'progress': {}, 'net': weights[0], 'optimizer': {}, 'objective': {},
                'ema': {'halflife': weights[1], 'power_0.050': weights[2]}}, root / 'state.pt')
    np.save(root / 'ref.npy', np.random.default_rng(5).integers(0, 256, (30, 8, 8), dtype=np.uint8))
    call('ref', f'--data={root / "ref.npy"}', f'--dest={root / "ref.npz"}', '--keep-features', '--detector=pixels')
    return root


def conditional(key):
    """A network of three classes that make a difference."""
    net = tiny(key=key, label_dim=3, label_dropout=0.1)
    for name, p in net.named_parameters():
        p.data *= 30 if 'map_label' in name else 1
    return net


@pytest.fixture
def work(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in files.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, path.name)
    return tmp_path


@pytest.fixture(scope='module')
def whole(files, tmp_path_factory):
    """The folder of a sweep that nothing interrupted; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('whole'))
        for path in files.iterdir():
            Path(path.name).symlink_to(path)
        call('sweep', *GRID, *COMMON, '--outdir=out')
        return Path('out').resolve()


def call(*args, code=0):
    result = CliRunner().invoke(eval_fid.main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def sweep(*args, outdir='out', grid=GRID, code=0):
    return call('sweep', *grid, *COMMON, f'--outdir={outdir}', *args, code=code)


def refused(*args, **options):
    (line,) = [line for line in sweep(*args, code=1, **options).splitlines() if line.startswith('Error: ')]
    return line


def read(path):
    return json.loads(Path(path).read_text())


def results(folder='out'):
    return {path.name.removesuffix('.fid.json'): path for path in Path(folder).glob('*.json')}


def contents(folder):
    """Contents of a folder, without the options in results that depend on its path."""
    return {path.name: read(path) if path.suffix == '.json' else path.read_bytes() for path in Path(folder).iterdir()}


# --- cells

def test_a_cell_is_what_the_plain_command_makes(work, whole):
    """Every value and every fact; of the options, how many images there are is told by their seeds."""
    assert sorted(results(whole)) == sorted(CELLS) and len([*whole.glob('*')]) == len(CELLS) + 2 + (whole / 'plot.png').exists()
    for name, options in ((CELLS[0], ['--steps=2', '--guidance=1']), (CELLS[3], ['--steps=3', '--guidance=1.5'])):
        call('--network=net', *COMMON, '--num=8', *options)
        plain, cell = read(f'{name}.fid.json'), read(whole / f'{name}.fid.json')
        before, now = plain.pop('options'), cell.pop('options')
        assert plain == cell and {**now, 'num': 8} == {**before, 'outdir': 'out'}


def test_networks_and_detector_are_loaded_once(work, monkeypatch):
    loaded, made = [], []
    load, make = sampling.load_network, comparison.make_detector
    monkeypatch.setattr(sampling, 'load_network', lambda ref, **o: (loaded.append((ref, o['weights'])), load(ref, **o))[1])
    monkeypatch.setattr(comparison, 'make_detector', lambda o: (made.append(1), make(o))[1])
    sweep('--gnet=other')
    assert loaded == [('net', 'ema'), ('other', 'ema')] and len(made) == 1
    plain, guided = read(results()[CELLS[0]])['generated'], [path for name, path in results().items() if 'guidance1.5' in name]
    assert 'gnet' not in plain and all(read(path)['generated']['gnet'] == 'other' for path in guided)
    assert all(read(path)['options'].get('gnet') == read(path)['generated'].get('gnet') for path in results().values())


def test_weights_samplers_and_intervals(work):
    """A change of weights loads anew; cells of weight 1 have no interval, and there is one of each."""
    grid = ['--network=state.pt', '--weights=ema', '--weights=ema:0.05', '--sampler=heun', '--sampler=dpmpp_2m', '--guidance=1,2',
            '--guidance-interval=0,inf', '--guidance-interval=0.3,5', '--steps=2']
    output = sweep(grid=grid)
    made = [read(path)['generated'] for path in results().values()]
    assert len(made) == 12 and '12 cells' in output
    assert len({each['sha256'] for each in made}) == 2 and {each['weights'] for each in made} == {'ema', 'ema:0.05'}
    assert [each.get('guidance_interval') for each in made if each['guidance'] == 1] == [None] * 4
    assert sorted(each.get('guidance_interval', []) for each in made if each['guidance'] == 2) == [[]] * 4 + [[0.3, 5.0]] * 4
    name = 'state.pt.dpmpp_2m2-guidance2-ema0.05-pixels-8'
    call('--network=state.pt', '--weights=ema:0.05', '--sampler=dpmpp_2m', '--guidance=2', '--steps=2', '--num=8', *COMMON)
    assert read(f'{name}.fid.json')['fid_score'] == read(results()[name])['fid_score']


def test_lines_of_progress(work):
    lines = sweep().splitlines()
    assert lines[0] == '4 cells in out: 0 done, 4 to do'
    assert [line.split(':')[0] for line in lines[1:5]] == [f'cell {i} of 4, {name}' for i, name in enumerate(CELLS, 1)]
    assert all('fid_score' in line for line in lines[1:5]) and ['ETA' in line for line in lines[1:5]] == [True] * 3 + [False]
    best = min((read(path)['fid_score'], name) for name, path in results().items())
    assert any(line.startswith(f'best fid_score: {best[0]:.4f} (weights ema, sampler heun') for line in lines)


# --- resuming

def test_a_sweep_that_fails_is_gone_on_with(work, whole, monkeypatch):
    """After two cells: what is done stays as it is, and the rest, table and picture are those of a sweep that nothing interrupted."""
    measure, calls = comparison.measure, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError('power cut')
        return measure(*args)

    monkeypatch.setattr(comparison, 'measure', breaks)
    assert isinstance(CliRunner().invoke(eval_fid.main, ['sweep', *GRID, *COMMON, '--outdir=out']).exception, RuntimeError)
    before = {path: path.stat() for path in results().values()}
    assert sorted(results()) == sorted(CELLS[:2]) and not [*Path('out').glob('table*')]
    assert '4 cells in out: 2 done, 2 to do' in sweep() and len(calls) == 5
    assert all((path.stat().st_mtime_ns, path.stat().st_ino) == (old.st_mtime_ns, old.st_ino) for path, old in before.items())
    assert contents('out') == contents(whole)
    assert '4 cells in out: 4 done, 0 to do' in sweep() and len(calls) == 5 and contents('out') == contents(whole)


def test_a_killed_sweep_is_gone_on_with(work, whole):
    process = launch.start(ROOT / 'eval_fid.py', ['sweep', *GRID, *COMMON, '--outdir=out'], work / 'log')
    end = time.monotonic() + 60
    while not results() and time.monotonic() < end:
        time.sleep(0.005)
    launch.signal_ranks(process, signal.SIGKILL)
    process.wait(30)
    done = {path: path.stat().st_mtime_ns for path in results().values()}
    assert 1 <= len(done) < 4, (work / 'log').read_text()
    sweep()
    assert all(path.stat().st_mtime_ns == before for path, before in done.items())
    numbers = lambda folder: {name: read(path)['fid_score'] for name, path in results(folder).items()}
    assert numbers('out') == pytest.approx(numbers(whole), rel=1e-6) and Path('out/table.md').exists()


def test_all_that_is_done_needs_no_features_of_a_reference(work, monkeypatch):
    args = ['sweep', *GRID, *COMMON[1:], '--ref-path=ref.npy', '--split=test', '--outdir=out']
    call(*args)
    assert read(results()[CELLS[0]])['reference']['split'] == 'test'
    monkeypatch.setattr(comparison.references, 'statistics_of', None)
    assert '4 done, 0 to do' in call(*args)


def test_more_steps_and_more_metrics_join(work, whole):
    """Cells that lack a metric are evaluated again, and keep the others; those of earlier commands are in the same table."""
    shutil.copytree(whole, 'out')
    output = sweep('--metrics=fid,pr', grid=['--network=net', '--guidance=1', '--steps=3,4'])
    assert '2 cells in out: 0 done, 2 to do' in output and 'kept from the earlier result: kid, kid_std' in output
    assert len(results()) == 5 and {'kid', 'precision', 'fid_score'} <= read(results()[CELLS[1]]).keys()
    assert read(results()[CELLS[1]])['kid'] == read(whole / f'{CELLS[1]}.fid.json')['kid']
    assert len(Path('out/table.csv').read_text().splitlines()) == 6


@pytest.mark.slow
def test_two_ranks(work, whole):
    done = launch.run(ROOT / 'eval_fid.py', ['sweep', *GRID, *COMMON, '--outdir=out'], ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('cell 1 of 4') == done.stdout.count('table.md') == 1
    for name, path in results().items():
        one, two = (read(Path(folder) / path.name) for folder in (whole, 'out'))
        assert two['ranks'] == 2 and [two[key] for key in ('fid_score', 'kid')] == pytest.approx(
            [one[key] for key in ('fid_score', 'kid')], rel=1e-6), name
    results()[CELLS[2]].unlink()
    again = launch.run(ROOT / 'eval_fid.py', ['sweep', *GRID, *COMMON, '--outdir=out'], ranks=2)
    assert again.returncode == 0 and '4 cells in out: 3 done, 1 to do' in again.stdout and len(results()) == 4


# --- tables and pictures

def test_tables_are_made_of_the_files_alone(work, whole):
    """In whatever order they are given."""
    paths = sorted(map(str, results(whole).values()))
    for order in (paths, paths[::-1]):
        call('table', *order, '--out-path=table.md')
        call('table', *order, '--format=csv', '--out-path=table.csv')
        assert all(Path(name).read_bytes() == (whole / name).read_bytes() for name in ('table.md', 'table.csv'))
    rows = Path('table.md').read_text().splitlines()[2:]
    assert [row.split(' | ')[2] for row in rows] == ['heun2', 'heun3'] * 2
    best = min(read(path)['fid_score'] for path in paths)
    assert len({row.split(' | ')[8] for row in rows}) == 4 and [f'**{best:.4f}**' in row for row in rows].count(True) == 1


@DRAWS
def test_pictures_are_made_of_the_files_alone(work, whole):
    paths = map(str, results(whole).values())
    assert call('table', *paths, '--plot=new/plot.png').startswith('| network')
    assert Path('new/plot.png').read_bytes() == (whole / 'plot.png').read_bytes()


def test_without_matplotlib_there_are_tables(work, whole, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'matplotlib', None)
    shutil.copytree(whole, 'out', ignore=lambda *_: ['table.md', 'table.csv', 'plot.png'])
    output = sweep()
    assert 'no plot: plot.png needs the package matplotlib: pip install matplotlib' in output
    assert (Path('out/table.md')).read_bytes() == (whole / 'table.md').read_bytes() and not Path('out/plot.png').exists()
    assert 'Error: --plot needs the package matplotlib' in call('table', *results().values(), '--plot=a.png', code=1)


# --- refusals

@pytest.mark.parametrize('args, line', [
    (['--network=plain'], '--guidance=1.5: the network is unconditional'),
    (['--network=plain'], '(in the cell --guidance=1.5 --steps=2)'),
    (['--guidance=1,-2'], '--guidance=-2: the weight must be 0 or more'),
    (['--guidance=1', '--guidance-interval=0,1'], '--guidance-interval has no effect'),
    (['--sampler=heun', '--sampler=dpmpp_2m', '--S-churn=4'], '--S-churn=4.0 is not a key of --sampler=dpmpp_2m'),
    (['--steps=0,4'], '--steps=0: must be 1 or more'),
    (['--weights=ema', '--weights=ema:0.05'], 'training-state'),
    (['--guidance=1.5,1.5000001'], 'have the same file name'),
    (['--ref-path=ref.npy'], 'pass one of --ref-stats'),
    (['--detector=inception:compile=true', '--detector-weights=nowhere.pth'], 'nowhere.pth'),
    (['--outdir=net/config.json/x'], 'config.json'),
])
def test_what_a_cell_refuses_is_found_before_the_first(work, args, line):
    assert line in refused(*args) and not results()


def test_lists_of_weights(work):
    assert '"1,x" is not a list of numbers such as 1,1.5,2' in sweep('--guidance=1,x', code=2)
    assert '"inf" is not a list of numbers' in sweep('--guidance=inf', code=2)


@pytest.mark.parametrize('change, args, words', [
    (lambda: swap('net', 'other'), [], f'{CELLS[1]}.fid.json: made with other options (--network: net'),
    (lambda: swap('net', 'other'), ['--steps=4'], 'of the network net with other weights'),
    (lambda: write_reference(), [], 'against another reference; the results of a sweep must be comparable: choose another --outdir'),
    (lambda: None, ['--kid-subsets=2'], 'with kid_subsets 3, now 2'),
    (lambda: None, ['--seeds=0-8'], 'of 8 images, now 9'),
    (lambda: None, ['--repeats=2', '--steps=4'], None),
    (lambda: edit(generated={**read(f'out/{CELLS[1]}.fid.json')['generated'], 'steps': 5}), [], '--steps: 5, now 3'),
    (lambda: edit(repeats=[{'seeds': '1-8'}]), [], '--seeds: 1-8, now 0-7'),
    (lambda: edit(versions={}), ['--metrics=fid,pr', '--steps=3'], 'without pr, and computed with other versions'),
    (lambda: Path(f'out/{CELLS[1]}.fid.json').write_text('{"fid'), [], f'{CELLS[1]}.fid.json: not a JSON file'),
    (lambda: Path('out/notes.json').write_text('{}'), [], 'notes.json: not a result of eval_fid.py'),
])
def test_what_does_not_compare_is_refused_by_name(work, whole, change, args, words):
    """Nothing is moved or written then."""
    Path('out').mkdir()
    shutil.copy(whole / f'{CELLS[1]}.fid.json', 'out')
    change()
    before = contents_of_files('out')
    if words is None:  # repeats compare with single evaluations
        sweep(*args)
        return
    assert words in refused(*args) and contents_of_files('out') == before


def contents_of_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def swap(name, other):
    shutil.rmtree(name)
    shutil.copytree(other, name)


def write_reference():
    np.save('ref.npy', np.zeros((30, 8, 8), np.uint8) + np.arange(30, dtype=np.uint8)[:, None, None])
    call('ref', '--data=ref.npy', '--dest=ref.npz', '--keep-features', '--detector=pixels')


def edit(**parts):
    path = Path(f'out/{CELLS[1]}.fid.json')
    path.write_text(json.dumps({**read(path), **parts}))


def test_weights_that_change_while_a_sweep_runs(work, monkeypatch):
    """They are loaded again for their cells, and must be what was looked at first."""
    begin = sweep_module.Sweep.run

    def run(self, *args):
        state = torch.load('state.pt', weights_only=True)
        torch.save({**state, 'ema': {**state['ema'], 'halflife': state['net']}}, 'state.pt')
        return begin(self, *args)

    monkeypatch.setattr(sweep_module.Sweep, 'run', run)
    line = refused(grid=['--network=state.pt', '--weights=ema', '--weights=raw', '--steps=2'])
    assert '--network=state.pt: has other weights than when this began' in line and '0 of 2 are done' in line and not results()
