# SPDX-License-Identifier: Apache-2.0
"""Metrics during training: they are those of the snapshots, by any number of ranks, and training does not notice them."""

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import eval_fid
import train
from tests.support import tiny
from training.run.metrics import PeriodicMetrics, short
from training.sampling.outputs import Plain

PIXELS = '--metrics-detector=pixels'
ALL = ['--metrics-every=1', '--metrics-num=24', PIXELS, '--metrics=fid,kid,pr,dc']
NAMES = {'fid_score': 'fid', **{name: name for name in ('kid', 'kid_std', 'precision', 'recall', 'density', 'coverage')}}
STATE = 'training-state-000000.320.pt'


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """data.zip, its statistics with and without features, and statistics that do not fit."""
    folder = tmp_path_factory.mktemp('periodic')
    tiny.make_zip(folder / 'data.zip')
    rng = np.random.default_rng(1)
    np.save(folder / 'wide.npy', rng.integers(0, 256, (9, 1, 4, 4), np.uint8))
    np.save(folder / 'few.npy', rng.integers(0, 256, (5, 1, 8, 8), np.uint8))
    for data, dest, *more in [('data.zip', 'ref.npz', '--keep-features'), ('data.zip', 'plain.npz'), ('wide.npy', 'wide.npz'),
                              ('few.npy', 'few.npz', '--keep-features')]:
        eval_fid.main(['ref', f'--data={folder / data}', f'--dest={folder / dest}', '--detector=pixels', *more], standalone_mode=False)
    return folder


def flags(inputs, outdir, *more):
    return [f'--outdir={outdir}', '--nosubdir', f'--data={inputs / "data.zip"}', '--seed=5', *tiny.FLAGS, *more]


def measured(outdir):
    """{nimg: {name: value}} of the log's metrics."""
    lines = tiny.read_log(outdir)
    return {line['nimg']: line for line in lines if any(name.startswith('Metrics/') for name in line)}


def of_snapshot(inputs, outdir, nimg, num):
    """What eval_fid.py says of a snapshot, on one rank."""
    result = outdir / f'{nimg}.json'
    snapshot = outdir / f'network-snapshot-{nimg / 1e3:010.3f}'
    eval_fid.main([f'--network={snapshot}', f'--seeds=0-{num - 1}', f'--num={num}', f'--ref-stats={inputs / "ref.npz"}',
                   '--detector=pixels', '--metrics=fid,kid,pr,dc', f'--kid-subset-size={num}', f'--out-path={result}'],
                  standalone_mode=False)
    return json.loads(result.read_text())


def check_against_snapshots(inputs, outdir, ticks, num=24):
    found = measured(outdir)
    assert list(found) == ticks
    for nimg in ticks:
        snapshot = of_snapshot(inputs, outdir, nimg, num)
        assert found[nimg] == {'nimg': nimg, **{f'Metrics/{short}{num}': pytest.approx(snapshot[name], rel=1e-6, abs=1e-12)
                                                for name, short in NAMES.items()}}
    assert len({line[f'Metrics/fid{num}'] for line in found.values()}) == len(ticks)


@pytest.mark.parametrize('cond', [0, 1])
def test_values_are_those_of_the_snapshots(inputs, tmp_path, capsys, cond):
    """Every tick, and at the end of the run; labels are drawn as eval_fid.py draws them."""
    tiny.call(*flags(inputs, tmp_path, *ALL, f'--metrics-ref={inputs / "ref.npz"}', '--snap=1', '--duration=0.0002', f'--cond={cond}'))
    console = capsys.readouterr().out
    check_against_snapshots(inputs, tmp_path, [80, 160, 208])
    shown = [line for line in console.splitlines() if line.startswith('    metrics: fid24 ')]
    assert len(shown) == 3 and 'coverage24' in shown[0]


def test_two_ranks(inputs, tmp_path):
    """13 seeds for one rank and 12 for the other: what two ranks log, one rank finds of their snapshot."""
    log = tmp_path / 'log'
    tiny.finish(flags(inputs, tmp_path, *ALL, '--metrics-every=2', f'--metrics-ref={inputs / "ref.npz"}', '--metrics-num=25', '--snap=2',
                      '--duration=0.00016', '--threads=1'), log, ranks=2)
    check_against_snapshots(inputs, tmp_path, [160], 25)
    assert log.read_text().count('metrics: fid25') == 1


def test_training_does_not_notice(inputs, tmp_path):
    """Networks, optimizer and data position are equal to the bit: without metrics, and continued with metrics from a state without."""
    common = ['--dump=2', '--snap=0', '--dropout=0.2', '--augment=0.5']
    tiny.call(*flags(inputs, tmp_path / 'a', *common, '--duration=0.00032'))
    tiny.call(*flags(inputs, tmp_path / 'b', *common, '--duration=0.00016'))
    tiny.call(*flags(inputs, tmp_path / 'b', *common, '--duration=0.00032', *ALL, f'--metrics-ref={inputs / "plain.npz"}', '--metrics=fid',
                     '--metrics-num=2', '--resume=latest'))
    assert list(measured(tmp_path / 'a')) == [] and list(measured(tmp_path / 'b')) == [240, 320]
    states = [tiny.read_state(tmp_path / name / STATE) for name in 'ab']
    for state in states:
        del state['options'], state['progress']['seconds'], state['progress']['log_bytes']
    assert tiny.digest(states[0]) == tiny.digest(states[1])
    # Options of the metrics may change again; log lines after the state are not doubled.
    (tmp_path / 'b' / STATE).unlink()
    tiny.call(*flags(inputs, tmp_path / 'b', *common, '--duration=0.00032', '--resume=latest'))
    assert not measured(tmp_path / 'b') and json.loads((tmp_path / 'b' / 'options.json').read_text())['run']['metrics'] is None
    assert tiny.digest(tiny.read_state(tmp_path / 'b' / STATE)['net']) == tiny.digest(states[0]['net'])


def make(inputs, num=8, names=('fid',), ref='ref.npz'):
    return PeriodicMetrics(num, str(inputs / ref), names, 'pixels', Plain(Constant(0)), torch.device('cpu'))


class Constant(torch.nn.Module):
    """A denoiser that knows one image."""

    img_channels, img_resolution, label_dim, units, sigma_min, sigma_max = 1, 8, 0, None, 0.0, float('inf')

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, sigma, labels=None):
        return torch.full_like(x, self.value)


def test_closed_form(inputs):
    """Equal images have a covariance of zero: FID = |mu - m|^2 + tr C."""
    reference = np.load(inputs / 'ref.npz')
    found = make(inputs)(Constant(1.0).eval())
    expected = np.square(reference['mu'] - 1).sum() + np.trace(reference['sigma'])  # 1 is 255 in 8 bits, and 255 / 127.5 - 1
    assert found == {'Metrics/fid8': pytest.approx(expected, rel=1e-9)}


def test_images_that_are_not_finite_end_no_run(inputs, capsys):
    assert make(inputs)(Constant(float('nan')).eval()) == {}
    assert 'Warning: no metrics this time: the weight average: the image of seed 0 is not finite' in capsys.readouterr().out


def test_the_name_says_how_many():
    assert [short(num) for num in (2, 512, 1000, 2000, 2500, 50000)] == ['2', '512', '1k', '2k', '2500', '50k']


def test_torch_random_state_is_untouched(inputs):
    before = torch.get_rng_state()
    make(inputs, names=('fid', 'kid'))(Constant(0.5).eval())
    assert torch.equal(before, torch.get_rng_state())


def refused(inputs, outdir, *args):
    """The one line of a refusal; nothing is left behind."""
    result = CliRunner().invoke(train.main, flags(inputs, outdir, '--duration=0.00008', *args))
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    lines = result.output.strip().splitlines()
    assert [line for line in lines if line.startswith('Error: ')] == lines[-1:], result.output
    assert not any(line.startswith('Training for') for line in lines)
    assert not os.path.exists(outdir) or not list(Path(outdir).iterdir())
    return lines[-1]


@pytest.mark.parametrize('args, words', [
    (['--metrics-every=1'], ['--metrics-every=1', '--metrics-ref=NPZ']),
    (['--metrics-ref=ref.npz'], ['--metrics-ref=ref.npz', '--metrics-every=TICKS']),
    (['--metrics-every=-1'], ['--metrics-every']),
    (['--metrics-every=1', '--metrics-ref=nowhere.npz', PIXELS], ['nowhere.npz', 'no such']),
    (['--metrics-every=1', '--metrics-ref=data.zip', PIXELS], ['--metrics-ref=data.zip', 'eval_fid.py ref']),
    (['--metrics-every=1', '--metrics-ref=wide.npz', PIXELS], ['--metrics-ref=wide.npz', '16 dimensions', '64', '--metrics-detector']),
    (['--metrics-every=1', '--metrics-ref=ref.npz', '--metrics-num=1'], ['--metrics-num', '1']),
    (['--metrics-every=1', '--metrics-ref=ref.npz', '--metrics=fid,kit'], ['--metrics', 'kit', 'kid']),
    (['--metrics-every=1', '--metrics-ref=ref.npz', '--metrics-detector=vgg'], ['--metrics-detector', 'vgg', 'pixels']),
    (['--metrics-every=1', '--metrics-ref=plain.npz', '--metrics=kid', PIXELS], ['--metrics-ref=plain.npz', 'kid', '--keep-features']),
    (['--metrics-every=1', '--metrics-ref=ref.npz', '--metrics=fid,is', PIXELS], ['--metrics=fid,is', 'logits', 'pixels']),
    (['--metrics-every=1', '--metrics-ref=ref.npz', '--metrics=pr', '--metrics-num=3', PIXELS], ['--metrics-num=3', 'more than 3']),
    (['--metrics-every=1', '--metrics-ref=ref.npz', '--metrics=fid_inf', '--metrics-num=3', PIXELS], ['--metrics-num=3', '4 images']),
    (['--metrics-every=1', '--metrics-ref=ref.npz', '--metrics=fid,sfid', PIXELS], ['sfid needs --metrics-detector=inception']),
    (['--metrics-every=1', '--metrics-ref=few.npz', '--metrics=dc', PIXELS], ['--metrics-ref=few.npz', 'more than 5', '5']),
])
def test_refusals(inputs, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(inputs)
    line = refused(inputs, tmp_path / 'runs', *args)
    for word in words:
        assert word in line, line


def test_missing_weights_without_network(inputs, tmp_path, monkeypatch):
    """URL, cache path and the option that names them in train.py."""
    monkeypatch.setenv('AMBIENT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('urllib.request.urlopen', lambda *a, **k: (_ for _ in ()).throw(OSError('network is unreachable')))
    line = refused(inputs, tmp_path / 'runs', '--metrics-every=1', f'--metrics-ref={inputs / "ref.npz"}')
    assert 'https://' in line and str(tmp_path / 'cache') in line and '--metrics-detector=inception:weights=PATH' in line


def test_a_refused_continuation_leaves_its_run_alone(inputs, tmp_path):
    tiny.call(*flags(inputs, tmp_path, '--duration=0.00008', '--dump=1', '--snap=0'))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != 'log.txt'}
    result = CliRunner().invoke(train.main, flags(inputs, tmp_path, '--dump=1', '--snap=0', '--duration=0.00016', '--resume=latest', *ALL,
                                                  f'--metrics-ref={inputs / "plain.npz"}'))
    assert result.exit_code == 1 and 'hold no features' in result.output
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != 'log.txt'}


def test_data_that_is_no_picture(tmp_path):
    """Two channels."""
    with zipfile.ZipFile(tmp_path / 'two.zip', 'w') as archive, archive.open('a.npy', 'w') as f:
        np.save(f, np.zeros([2, 8, 8], np.uint8))
    args = [f'--outdir={tmp_path}', '--metrics-every=1', '--metrics-ref=ref.npz', *tiny.FLAGS, f'--data={tmp_path / "two.zip"}']
    result = CliRunner().invoke(train.main, args)
    assert result.exit_code == 1 and 'compares 8-bit grey or RGB images' in result.output and os.listdir(tmp_path) == ['two.zip']


def test_options_as_they_are_kept(inputs):
    assert tiny.options(inputs).run.metrics is None
    assert dataclasses.asdict(tiny.options(inputs, '--metrics_every=3', '--metrics-ref=r.npz').run.metrics) == dict(
        every=3, num=2000, ref='r.npz', names=['fid'], detector='inception')
