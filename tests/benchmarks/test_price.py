# SPDX-License-Identifier: Apache-2.0
"""benchmarks/price.py: prices and their intervals on data whose price is known, the grid's bookkeeping with a stub for the trainer, and a
tiny grid from end to end."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks import price, price_fit, price_report
from dnnlib import UserError
from training.data.dataset import ImageDataset
from training.run.build import build_corruption
from training.run.config import CorruptionConfig

COUNTS = np.array([45, 90, 180, 450, 900])
TRUE = price_fit.Curve(0.3, 40.0, 0.9)

# ---- fits


@pytest.mark.parametrize('curve', [TRUE, price_fit.Curve(0.0, 12.0, 0.5), price_fit.Curve(1.0, 900.0, 1.7)])
def test_a_curve_without_noise_is_found(curve):
    found = price_fit.fit_curve(COUNTS, curve(COUNTS))
    n = np.geomspace(45, 900, 20)
    assert np.allclose(found(n), curve(n), rtol=0.01)
    assert found.c == pytest.approx(curve.c, rel=0.05)
    assert np.allclose(found.count(found(n)), n)
    step = 1e-3 * n
    assert np.allclose(found.slope(n), (found(n + step) - found(n - step)) / (2 * step), rtol=1e-4)
    assert found.count(found.a) == np.inf


def test_many_curves_are_fitted_as_each_alone():
    rng = np.random.default_rng(0)
    distances = TRUE(COUNTS) * np.exp(0.1 * rng.normal(size=(4, len(COUNTS))))
    together, alone = price_fit.fit_curve(COUNTS, distances), [price_fit.fit_curve(COUNTS, row) for row in distances]
    for key in 'abc':
        assert np.allclose(getattr(together, key), [getattr(one, key) for one in alone])
    assert (together.a >= 0).all() and (together.b >= 0).all()


def test_a_curve_needs_three_counts():
    with pytest.raises(ValueError, match='at least 3'):
        price_fit.fit_curve([10, 10, 20], [3.0, 3.1, 2.0])


@pytest.mark.parametrize('kappa', [1.0, 1.6, 12.0, 300.0])
def test_a_price_without_noise_is_found(kappa):
    clean, noisy = np.array([90, 270]), np.array([810, 630])
    assert price_fit.fit_value(TRUE, clean, noisy, TRUE(clean + noisy / kappa)) == pytest.approx(1 / kappa, rel=0.02)


def test_noisy_images_that_do_harm_have_no_price():
    clean, noisy = np.array([90, 270]), np.array([810, 630])
    assert price_fit.inverse(price_fit.fit_value(TRUE, clean, noisy, 1.3 * TRUE(clean))) == np.inf


def test_the_known_price_of_gaussian_data_is_that_of_the_estimate():
    """The mean distance of ML estimates from m noisy values is that of m / kappa clean ones, v / (2 n) a coordinate to first order."""
    rng = np.random.default_rng(1)
    sigma, m, dim = 0.4, 4000, 4000
    noisy = rng.normal(0, (price_fit.VARIANCE + sigma ** 2) ** 0.5, (m, dim))
    found = price_fit.likeliest_variance(np.zeros([0, dim]), noisy, sigma)
    distance = np.square(np.sqrt(found) - price_fit.VARIANCE ** 0.5).mean()
    assert distance == pytest.approx(price_fit.VARIANCE / (2 * m / price_fit.gaussian_price(sigma)), rel=0.08)


def test_intervals_hold_the_known_price_about_as_often_as_they_say():
    """30 simulated experiments of 3 seeds at 4 levels; with half the width they would hold it in 67 % of the cases."""
    found = price_fit.coverage(30, draws=200)
    assert 0.85 < np.mean([covered for covered, _, _ in found.values()]) <= 1
    for sigma, (_, value, ratio) in found.items():
        assert value == pytest.approx(price_fit.gaussian_price(sigma), rel=0.15)
        assert ratio < 4  # and they are of use


def test_the_price_of_gaussian_modes_is_the_closed_form_where_all_are_equal():
    """One variance v: means pay 1 + s^2 / v and covariances its square, so that the price lies between and nearer to the square."""
    v, sigma = 0.25, 0.4
    for price_now in price_report.gaussian_prices(np.full(50, v), sigma):
        assert 1 + sigma ** 2 / v < price_now < (1 + sigma ** 2 / v) ** 2
    assert price_report.gaussian_prices(np.full(400, v), sigma) == pytest.approx(((1 + sigma ** 2 / v) ** 2,) * 2, rel=0.01)
    first, all_noisy = price_report.gaussian_prices(np.array([1.0, 0.01]), sigma)
    assert first < all_noisy  # beside clean images a noisy one is used for what it shows well


# ---- the grid


def stub(log):
    """A stand-in for price.call, which notes the commands and writes what they would."""

    def call(*commands, device=None):
        for script, arguments in commands:
            options = dict(argument.removeprefix('--').split('=', 1) for argument in arguments if '=' in argument)
            log.append((script, options, device))
            if script == 'train':
                Path(options['outdir'], 'network-snapshot-000001').mkdir(parents=True)
            elif script == 'generate':
                Path(options['outdir']).mkdir()
            elif script == 'eval_fid' and 'gen-path' in options:
                assert Path(options['gen-path']).exists()
                Path(options['out-path']).write_text(json.dumps({'fid_score': 2.0 + len(log), 'fid_inf': 1.0, 'num_images': 20}))
            elif script == 'dataset_tool':
                pictures(options['dest'], 20 if options['part'] == '0/2' else 10)
            else:
                Path(options['dest']).touch()
        return ''

    return call


def pictures(dest, count):
    """A zip of `count` 4x4 grey pictures, all different, with labels."""
    with zipfile.ZipFile(dest, 'w') as archive:
        for k in range(count):
            held = io.BytesIO()
            Image.fromarray(np.full((4, 4), k, np.uint8)).save(held, 'png')
            archive.writestr(f'00000/img{k:08d}.png', held.getvalue())
        archive.writestr('dataset.json', json.dumps({'labels': [[f'00000/img{k:08d}.png', k % 10] for k in range(count)]}))


SMALL = dataclasses.replace(price.SCALES['digits'], sigmas=(0.2, 0.4), mixed=(0.1,), alone=(0.1, 0.5), seeds=2)


@pytest.fixture
def grid(tmp_path):
    log = []
    made = price.Grid(tmp_path / 'grid', SMALL, call=stub(log))
    made.prepare()
    made.log = log
    return made


def trained(log):
    return [Path(options['outdir']).name for script, options, _ in log if script == 'train']


def test_the_first_cells_are_those_that_others_start_from():
    names = [cell.name for cell in price.cells_of(SMALL)]
    assert names[:6] == ['clean-s0', 'clean-s1', 'noisy-0.4-s0', 'noisy-0.4-s1', 'noisy-0.2-s0', 'noisy-0.2-s1']
    kinds = ('alone-0.1', 'alone-0.5', 'mix-0.2-0.1', 'mix-0.4-0.1')
    assert sorted(names[6:]) == sorted(f'{kind}-s{seed}' for kind in kinds for seed in (0, 1))
    for scale in price.SCALES.values():
        every = [cell.name for cell in price.cells_of(scale)]
        assert len(set(every)) == len(every)


def test_a_finished_cell_is_not_trained_again_and_an_interrupted_one_continues(grid):
    cells = price.cells_of(SMALL)[:4]
    found = price.run_all(grid, cells[:2], 2, [])
    assert sorted(trained(grid.log)) == ['clean-s0', 'clean-s1']
    assert [options['resume'] for script, options, _ in grid.log if script == 'train'] == ['latest'] * 2
    before = len(grid.log)
    assert price.run_all(grid, cells[:2], 1, []) == found and len(grid.log) == before
    Path(grid.path('runs', 'noisy-0.4-s0', 'network-snapshot-000001')).mkdir(parents=True)  # trained, then killed before its evaluation
    price.run_all(grid, cells[2:3], 1, [])
    assert len(trained(grid.log)) == 2
    assert len([1 for script, options, _ in grid.log[before:] if script == 'generate']) == 2  # in full, and truncated


def test_the_first_error_ends_the_grid_and_leaves_the_cell_to_be_done(grid):
    failing = price.Grid(grid.out, SMALL, call=lambda *commands, device=None: (_ for _ in ()).throw(UserError('train.py: stopped')))
    with pytest.raises(UserError, match='stopped'):
        price.run_all(failing, price.cells_of(SMALL), 1, [])
    assert not list(Path(grid.out).glob('runs/*/cell.json'))


def test_commands_of_each_kind_of_cell(grid):
    wanted = {cell.name: cell for cell in price.cells_of(SMALL)}
    for name in ('clean-s1', 'mix-0.2-0.1-s1', 'noisy-0.4-s1', 'alone-0.1-s1'):
        grid.run(wanted[name])
    clean, mix, noisy, alone = [options for script, options, _ in grid.log if script == 'train']
    assert 'sigma' not in clean and 'sigma' not in alone and clean['data'] == grid.path('train.zip')
    assert (mix['sigma'], mix['corruption-probability'], mix['corruption-seed'], mix['seed']) == ('0.2', '0.9', '1', '1')
    assert (noisy['sigma'], noisy['corruption-probability']) == ('0.4', '1')
    assert alone['data'] == grid.path('clean-0.1-s1.zip') and alone['seed'] == '1'
    stops = [options.get('stop-sigma') for script, options, _ in grid.log if script == 'generate']
    assert stops == [None, None, None, '0.4', None]
    assert not list(Path(grid.out).glob('runs/*/samples-*'))
    counts = {name: json.loads(Path(grid.path('runs', name, 'cell.json')).read_text()) for name in ('mix-0.2-0.1-s1', 'alone-0.1-s1')}
    assert [(cell['clean'], cell['noisy']) for cell in counts.values()] == [(2, 18), (2, 0)]


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('share', [0.1, 0.5])
def test_the_clean_images_alone_are_those_of_the_mixture(grid, share, seed):
    """By train.py's own choice of noisy images: pictures are constant, so that their value tells which one it is."""
    subset = ImageDataset(grid.subset(price.Cell('alone', seed, share=share)), use_labels=True)
    whole = ImageDataset(grid.path('train.zip'))
    corruption = build_corruption(CorruptionConfig(sigma=0.2, probability=1 - share, seed=seed))
    clean = np.flatnonzero(corruption.levels(whole.raw_idx, whole.native_sigma, whole.image_shape) == 0)
    assert [int(subset.decode(row).max()) for row in subset.raw_idx] == list(clean)
    assert list(np.argmax(subset.labels(np.arange(len(subset))), 1)) == [row % 10 for row in clean]
    assert len(clean) == round(share * 20)


def test_each_gpu_gets_one_training_at_a_time(grid):
    price.run_all(grid, price.cells_of(SMALL), 2, ['0', '1'])
    devices = [device for script, _, device in grid.log if script == 'train']
    assert set(devices) == {'0', '1'} and len(devices) == 14


def test_a_folder_of_other_settings_is_refused(grid):
    with pytest.raises(UserError, match='kimg=64'):
        price.Grid(grid.out, dataclasses.replace(SMALL, kimg=1), call=stub([])).prepare()
    price.Grid(grid.out, dataclasses.replace(SMALL, seeds=5, sigmas=(0.1,)), call=stub([])).prepare()


@pytest.mark.parametrize('arguments, message', [(['--scale=cifar8'], '--data'), (['--scale=cifar8', '--data=nowhere.zip'], 'nowhere.zip'),
                                                (['--report-only'], 'no cell is finished')])
def test_mistakes_are_one_line(tmp_path, arguments, message):
    result = CliRunner().invoke(price.main, [f'--out={tmp_path}', *arguments])
    assert result.exit_code != 0 and message in result.output and 'Traceback' not in result.output


# ---- the report


def cell(kind, seed, value, sigma=0.0, share=1.0, clean=900, noisy=0):
    entry = {'full': {'pixels': {'fid_score': value, 'fid_inf': value - 0.1}}}
    entry |= {'truncated': entry['full']} if kind == 'noisy' else {}
    return {'kind': kind, 'seed': seed, 'sigma': sigma, 'share': share, 'clean': clean, 'noisy': noisy, 'distances': entry}


def test_rows_have_means_errors_and_ratios():
    rows = price_report.rows_of([cell('mix', seed, value, 0.2, 0.1, 90, 810) for seed, value in enumerate([2.0, 4.0])] +
                                [cell('clean', seed, value) for seed, value in enumerate([1.0, 2.0])] +
                                [cell('noisy', 0, 6.0, 0.2, 0.0, 0, 900)])
    assert [row['kind'] for row in rows] == ['clean', 'mix', 'noisy', 'noisy'] and rows[3]['sampling'] == 'truncated'
    clean, mix, noisy, _ = (row['distances']['pixels']['fid_score'] for row in rows)
    assert (clean['mean'], clean['error'], clean['ratio'], clean['ratio_error']) == (1.5, pytest.approx(0.5), 1, 0)
    assert (mix['mean'], mix['error'], mix['ratio'], mix['ratio_error']) == (3, 1, 2, pytest.approx(0))  # twice as far for either seed
    assert noisy['ratio'] == 6 and np.isnan(noisy['error'])


def test_the_report_finds_the_prices_of_made_up_cells(tmp_path):
    rng = np.random.default_rng(2)
    near = lambda value: float(value * np.exp(0.02 * rng.normal()))
    cells = [cell('alone' if n < 900 else 'clean', seed, near(TRUE(n)), share=n / 900, clean=int(n)) for n in COUNTS for seed in range(3)]
    true = {(0.2, 0.1): 1.5, (0.2, 0.3): 1.5, (0.8, 0.1): 9.0}
    for (sigma, share), kappa in true.items():
        clean = round(share * 900)
        cells += [cell('mix', seed, near(TRUE(clean + (900 - clean) / kappa)), sigma, share, clean, 900 - clean) for seed in range(3)]
    for k, each in enumerate(cells):
        folder = tmp_path / 'runs' / str(k)
        folder.mkdir(parents=True)
        (folder / 'cell.json').write_text(json.dumps(each))
    (tmp_path / 'settings.json').write_text('{}')
    result = price_report.write(tmp_path, draws=300)
    found = {(each['sigma'], each['share']): each for each in result['prices']['pixels']['kappa']}
    assert set(found) == {*true, (0.2, None), (0.8, None)}
    for key, kappa in {**true, (0.2, None): 1.5, (0.8, None): 9.0}.items():
        assert found[key]['low'] <= kappa <= found[key]['high'] and found[key]['value'] == pytest.approx(kappa, rel=0.15)
    text = (tmp_path / 'table.md').read_text(encoding='utf-8')
    assert f'| 0.2 | all | {found[0.2, None]["value"]:.3g} [' in text and '| mixture | 0.8 | 90 | 810 | full |' in text
    pytest.importorskip('matplotlib')
    assert (tmp_path / 'distances.png').stat().st_size > 10_000 and (tmp_path / 'price.png').stat().st_size > 10_000


def test_there_is_no_price_where_more_images_do_not_help(tmp_path):
    """As in docs/price.md with the small detector: the distance rises with the number of clean images."""
    cells = [cell('alone' if n < 900 else 'clean', seed, 0.5 + n / 900, share=n / 900, clean=int(n)) for n in COUNTS for seed in range(3)]
    cells += [cell('mix', seed, 1.3, 0.2, 0.1, 90, 810) for seed in range(3)]
    assert price_report.prices_of(cells, 'pixels', draws=20) is None
    assert price_report.prices_of(cells[:6] + cells[-3:], 'pixels', draws=20) is None  # and none with two counts


# ---- from end to end


@pytest.mark.slow
def test_a_tiny_grid_of_digits(tmp_path):
    pytest.importorskip('sklearn')
    arguments = ['--scale=digits', f'--out={tmp_path}', '--kimg=1', '--samples=300', '--seeds=2', '--sigmas=0.4', '--mixed=0.1',
                 '--alone=0.1,0.4', '--jobs=2']
    first = CliRunner().invoke(price.main, arguments, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob('runs/*/cell.json')}
    assert len(times) == 10
    results = json.loads((tmp_path / 'results.json').read_text())
    assert {row['kind'] for row in results['rows']} == set(price_report.KINDS) and len(results['detector_sha256']) == 64
    assert all(row['distances'].keys() == {'pixels', 'small'} for row in results['rows'])
    # So short a training need not gain by more clean images; then there is no price.
    assert all(name in ('pixels', 'small') and found['curve']['b'] > 0 for name, found in results['prices'].items())
    again = CliRunner().invoke(price.main, arguments, catch_exceptions=False)
    assert again.exit_code == 0 and {path: path.stat().st_mtime_ns for path in times} == times
