# SPDX-License-Identifier: Apache-2.0
"""Between backward and optimizer: the guard against non-finite values, loss scale, clipping, gradient noise; quartiles of the losses."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train
from tests.support import ROOT, tiny
from torch_utils import checkpoint, misc, training_stats
from training.checkpoints.load import load_network
from training.data.batches import Batch, micro_batches
from training.objective.loss import Objective
from training.run import gradients, training_loop

CPU = torch.device('cpu')
PLAIN = ['--dropout=0', '--augment=0']


def poison(monkeypatch, steps, terms=('denoise',), rows=slice(None)):
    """From here on the loss is nan in these steps of any run in this process; the program itself has no such hook."""
    step, values_of = training_loop.Run.step, Objective.values
    now = {}

    def follow(run):
        now['step'] = run.progress.step
        return step(run)

    def spoil(self, net, batch, randn, due):
        values = values_of(self, net, batch, randn, due)
        if now['step'] in steps:
            for name in terms:
                factor = torch.ones_like(values[name])
                factor[rows] = float('nan')
                values[name] = values[name] * factor
        return values

    monkeypatch.setattr(training_loop.Run, 'step', follow)
    monkeypatch.setattr(Objective, 'values', spoil)


def make_batch(n, seed=0, sigma_n=0.0):
    g = torch.Generator().manual_seed(seed)
    return Batch(images=torch.randn([n, 1, 2, 2], generator=g), sigma_n=torch.full([n, 1, 1, 1], sigma_n),
                 sigma=1.0 + torch.arange(n).reshape(n, 1, 1, 1), noise=torch.randn([n, 1, 2, 2], generator=g),
                 raw_idx=100 + torch.arange(n))


# --- LossScale, clip

def test_dynamic_loss_scale(monkeypatch):
    """Halves at each overflow, doubles after GROW_AFTER good updates in a row, and never falls so low that nothing is learned."""
    monkeypatch.setattr(gradients, 'GROW_AFTER', 3)
    scale = gradients.LossScale(8, dynamic=True, device=CPU)
    seen = []
    for bad in [0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]:
        scale.update(torch.tensor(float(bad)))
        seen.append(float(scale.value))
    assert seen == [8, 4, 2, 2, 2, 1, 1, 1, 2, 2, 2, 4]
    for _ in range(60):
        scale.update(torch.tensor(1.0))
    assert float(scale.value) == gradients.SMALLEST


def test_loss_scale_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(gradients, 'GROW_AFTER', 3)
    first, second = (gradients.LossScale(2.0 ** 16, dynamic=True, device=CPU) for _ in range(2))
    for bad in (1, 0, 0):
        first.update(torch.tensor(float(bad)))
    assert first.state() == [2.0 ** 15, 2.0] == json.loads(json.dumps(first.state()))
    second.restore(first.state())
    for scale in (first, second):
        scale.update(torch.tensor(0.0))
    assert first.state() == second.state() == [2.0 ** 16, 0.0]


def test_fixed_loss_scale_stays():
    """Also where the state comes from an fp16 run: the factor would not be taken out of the gradients again."""
    scale = gradients.LossScale(1, dynamic=False, device=CPU)
    scale.update(torch.tensor(1.0))
    scale.restore([65536.0, 7.0])
    assert scale.state() == [1, 0]


@pytest.mark.parametrize('precision, value', [('fp32', 2.0 ** 16), ('fp16', 8.0)])
def test_a_run_continued_in_fp16_goes_on_with_the_scale_of_fp16_only(tmp_path, precision, value):
    """The fixed 1 of a run in another precision would let small gradients underflow."""
    run = tiny.make_run(tmp_path, *PLAIN)
    run.step()
    run.save_state()
    run.finish_states()
    state = checkpoint.load(checkpoint.states(tmp_path)[0])
    state['options']['run']['precision'], state['progress']['loss_scale'] = precision, [8.0, 3.0]
    run.scale = gradients.LossScale(2.0 ** 16, dynamic=True, device=CPU)
    run.restore(state, 'file')
    assert run.scale.state()[0] == value


@pytest.mark.parametrize('limit', [0.5, 5.0, 13.0, 100.0])
def test_clip(limit):
    """min(1, limit / |g|) g, the norm being that of all tensors together."""
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0], [12.0]])]  # |g| = 13
    before = [g.clone() for g in grads]
    gradients.clip(grads, torch.nn.utils.get_total_norm(grads), limit)
    for mine, old in zip(grads, before):
        torch.testing.assert_close(mine, old * min(1, limit / 13), rtol=1e-6, atol=0)


def test_clip_through_the_step(tmp_path):
    """The logged norm is the one before clipping."""
    free, clipped = (tiny.make_run(tmp_path, *PLAIN, f'--clip={limit}') for limit in (0, 0.01))
    for run in (free, clipped):
        run.step()
    grads = [torch.cat([p.grad.flatten() for p in run.params]) for run in (free, clipped)]
    assert float(grads[0].norm()) > 0.1 and float(grads[1].norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(grads[1] / grads[1].norm(), grads[0] / grads[0].norm(), atol=1e-5, rtol=0)
    assert clipped.stats.flush()['Grad/norm']['mean'] == pytest.approx(float(grads[0].norm()), rel=1e-5)


# --- Guard

def test_guard_names_the_last_bad_losses():
    def note(values, step, batch=make_batch(12)):
        for name, found in values.items():
            guard.note(name, gradients.bad_rows(found, batch, torch.tensor(float(step), dtype=torch.float64)))

    guard = gradients.Guard(CPU)
    note({'denoise': torch.ones(12), 'other': torch.ones(12)}, 3)
    assert guard.culprits() == {}
    values = torch.ones(12)
    values[[2, 5]] = torch.tensor([float('nan'), -float('inf')])
    note({'denoise': values, 'other': torch.ones(12)}, 4)
    note({'denoise': torch.ones(12), 'other': torch.ones(12)}, 5)  # a good one does not wipe it out
    found = guard.culprits()
    assert list(found) == ['denoise'] and found['denoise'].startswith('step 4, images ')
    assert {'102 at sigma 3', '105 at sigma 6'} == set(found['denoise'].removeprefix('step 4, images ').split(', '))
    note({'denoise': torch.full([12], float('nan'))}, 6)  # no more than ROWS are named
    assert guard.culprits()['denoise'].count(' at sigma ') == gradients.ROWS
    note({'denoise': torch.full([3], float('nan'))}, 7, make_batch(3))  # a smaller micro-batch
    assert guard.culprits()['denoise'] == 'step 7, images 100 at sigma 1, 101 at sigma 2, 102 at sigma 3'


def test_guard_counts_in_a_row(monkeypatch):
    monkeypatch.setattr(gradients, 'MAX_SKIPPED', 3)
    guard = gradients.Guard(CPU)
    stops = []
    for step, norm in enumerate([1, float('nan'), float('inf'), 2, float('nan'), float('nan'), float('nan')], 1):
        assert float(guard.note_update(torch.tensor(float(norm)))) == (not np.isfinite(norm))
        stops.append(guard.must_stop(step))
    assert stops == [False] * 6 + [True]


def test_lone_bad_loss_skips_one_update(tmp_path, monkeypatch):
    """Weights and moments stay, the next step goes on, and the tick says so."""
    poison(monkeypatch, steps=[2], rows=slice(0, 3))
    run = tiny.make_run(tmp_path, *PLAIN)
    for _ in range(2):
        run.step()
    before = tiny.digest([run.net.state_dict(), run.optimizer.state_dict()['state']])
    run.step()
    run.stop_if_spoiled()
    assert tiny.digest([run.net.state_dict(), run.optimizer.state_dict()['state']]) == before
    run.step()
    run.stop_if_spoiled()
    assert tiny.digest([run.net.state_dict(), run.optimizer.state_dict()['state']]) != before
    run.step()
    run.report()
    line = tiny.read_log(tmp_path)[0]
    assert line['Grad/skipped'] == pytest.approx(1 / 5) and line['Loss/denoise/nonfinite'] == pytest.approx(3 / 80)
    assert line['Grad/norm'] > 0 and line['Loss/denoise'] > 0 and line['Grad/norm/nonfinite'] == pytest.approx(1 / 5)


def run_command(outdir, data, *flags):
    return CliRunner().invoke(train.main, [f'--outdir={outdir}', f'--data={data}', '--seed=5', *tiny.FLAGS, *PLAIN, '--nosubdir', *flags])


def test_nan_from_step_7_on_stops_the_run_and_the_state_resumes(tmp_path, monkeypatch):
    """Within MAX_SKIPPED steps, with one line and the weights from before step 7; from the state the run goes on."""
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    good = tmp_path / 'good'  # the weights after steps 0 ... 6, by a run that ends there
    assert run_command(good, data, f'--duration={7 * 16e-6:.9f}', '--dump=1', '--snap=0').exit_code == 0
    expected = tiny.read_state(checkpoint.states(good)[0])

    outdir = tmp_path / 'bad'
    with monkeypatch.context() as patch:
        poison(patch, steps=range(7, 10 ** 6), rows=slice(0, 2))
        result = run_command(outdir, data, '--duration=0.01', '--dump=0', '--snap=0')
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    line = result.output.strip().splitlines()[-1]
    assert line.startswith(f'Error: {gradients.MAX_SKIPPED} updates in a row were skipped because of non-finite gradients, up to step 57; ')
    assert 'rank 0, term denoise, step 56, images ' in line and line.count(' at sigma ') == 2

    (path,) = checkpoint.states(outdir)
    state = checkpoint.load(path)
    assert state['progress']['step'] == 7 + gradients.MAX_SKIPPED
    for part in (state['net'], *state['ema'].values()):
        assert all(value.isfinite().all() for value in part.values())
    assert tiny.digest(load_network(path).state_dict()) == tiny.digest(state['ema']['halflife'])
    assert tiny.digest(state['net']) == tiny.digest(expected['net'])

    result = run_command(outdir, data, f'--duration={62 * 16e-6:.9f}', '--dump=1', '--snap=0', '--resume=latest')
    assert result.exit_code == 0, result.output
    after = tiny.read_state(checkpoint.states(outdir)[0])
    assert after['progress']['step'] == 62 and tiny.digest(after['net']) != tiny.digest(state['net'])
    assert all(value.isfinite().all() for value in after['net'].values())


def test_bad_gradients_of_finite_losses(tmp_path, monkeypatch):
    """The line says that the losses were finite. With --gns=1 a tick without any finite gradient is reported all the same."""
    monkeypatch.setattr(gradients, 'MAX_SKIPPED', 7)
    backward = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, 'get_total_norm', lambda grads: backward(grads) * float('inf'))
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    result = run_command(tmp_path / 'run', data, '--gns=1', '--batch-gpu=8')
    assert result.exit_code == 1 and 'up to step 7; all losses were finite. ' in result.output.splitlines()[-1]
    (line,) = tiny.read_log(tmp_path / 'run')
    assert line['Grad/skipped'] == 1 and line['GNS/batch'] is None and 'Grad/norm' not in line


SPOILED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import pytest, train
from tests.training.run import test_gradients
from torch_utils import distributed
distributed.init()
if distributed.rank() == 1:
    test_gradients.poison(pytest.MonkeyPatch(), steps=range(7, 10 ** 6), rows=slice(0, 1))
train.main()
"""


def test_two_ranks_stop_together(tmp_path):
    """A nan on rank 1 alone: neither goes on, the line names rank 1, and the state is whole."""
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    (tmp_path / 'spoiled.py').write_text(SPOILED)
    args = [ROOT, f'--outdir={tmp_path / "run"}', f'--data={data}', *tiny.FLAGS, *PLAIN, '--nosubdir', '--snap=0',
            '--duration=0.01', '--threads=1']
    process = tiny.start(args, tmp_path / 'log', 2, tmp_path / 'spoiled.py')
    try:
        assert process.wait(timeout=120) != 0
    finally:
        process.kill()
    output = (tmp_path / 'log').read_text()
    lines = [line for line in output.splitlines() if line.startswith('Error: ')]
    assert len(lines) == 1 and 'rank 1, term denoise, step 56, images ' in lines[0] and 'rank 0, term' not in lines[0], output
    state = checkpoint.load(checkpoint.states(tmp_path / 'run')[0])
    assert state['progress']['step'] == 57 and all(value.isfinite().all() for value in state['net'].values())


# --- NoiseScale

def test_noise_scale_on_known_gradients():
    """g_i = G + N(0, Sigma): |G|^2 and tr(Sigma) are unbiased.

    4000 steps of 8 parts of 4 images in 50 dimensions, |G|^2 = 2, tr(Sigma) = 40: the std of the means is below 0.6 % of the truth."""
    rng = np.random.default_rng(1)
    steps, parts, small, dim = 4000, 8, 4, 50
    stds = np.linspace(0.5, 1.5, dim)
    stds *= np.sqrt(40 / (stds ** 2).sum())
    truth = np.sqrt(2 / dim) * np.ones(dim)
    scale = gradients.NoiseScale(small, small * parts)
    found = np.empty([steps, 2])
    for step in range(steps):
        means = truth + rng.standard_normal([parts, dim]) * stds / np.sqrt(small)
        for mean in torch.from_numpy(means):
            scale.note_part([mean[:20], mean[20:].reshape(5, 6)])
        found[step] = [float(x) for x in scale.estimates(torch.from_numpy(means.mean(0)).norm())]
    error = found.std(0) / np.sqrt(steps)
    assert (error < 0.006 * np.array([2, 40])).all()
    assert (abs(found.mean(0) - [2, 40]) < 4.5 * error).all()  # a false alarm in 70,000 runs each
    assert found.mean(0)[1] / found.mean(0)[0] == pytest.approx(20, rel=0.05)
    assert scale.parts == []


def test_noise_scale_does_not_depend_on_the_loss_scale(tmp_path):
    found = []
    for flag in ('--ls=1', '--ls=1024'):
        run = tiny.make_run(tmp_path, *PLAIN, '--gns=1', '--batch-gpu=4', flag)
        for _ in range(3):
            run.step()
        found.append({k: v['mean'] for k, v in run.stats.flush().items() if k.startswith('GNS/')})
    assert set(found[0]) == {'GNS/signal', 'GNS/spread'}
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_noise_scale_of_accumulated_rounds_by_hand(tmp_path):
    """One rank: the first round's mean gradient against that of the batch, appendix A.1 of 1812.06162 written out."""
    run = tiny.make_run(tmp_path, *PLAIN, '--gns=1', '--batch-gpu=4')
    host = tiny.make_run(tmp_path, *PLAIN).data.feed.next()
    draws_of = lambda row: misc.Draws(5, 0, row)
    squares = []
    for size, count in [(4, 1), (4, 4)]:
        run.net.zero_grad()
        for (batch, draws), _ in zip(micro_batches(host, size, CPU, draws_of), range(count)):
            (run.objective(run.net, batch, draws)['denoise'].sum() / (size * count)).backward()
        squares.append(float(sum(p.grad.square().sum() for p in run.params if p.grad is not None)))
    run.step()
    stats = run.stats.flush()
    assert stats['GNS/signal']['mean'] == pytest.approx((16 * squares[1] - 4 * squares[0]) / 12, rel=1e-4)
    assert stats['GNS/spread']['mean'] == pytest.approx((squares[0] - squares[1]) / (1 / 4 - 1 / 16), rel=1e-4)


HOOKED = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tests.support import tiny
from torch_utils import distributed, misc
from training.data.batches import micro_batches
folder = Path(sys.argv[2])
torch.set_num_threads(1)
distributed.init()
run = tiny.make_run(folder, '--dropout=0', '--augment=0', '--gns=1', '--batch-gpu=4')
host = tiny.make_run(folder, '--dropout=0', '--augment=0').data.feed.next()
for batch, draws in micro_batches(host, 4, run.device, lambda row: misc.Draws(5, 0, run.first_row + row)):
    (run.objective(run.net, batch, draws)['denoise'].sum() / 8).backward()
own = torch.cat([p.grad.flatten() for p in run.params if p.grad is not None])
run.step()
whole = torch.cat([p.grad.flatten() for p in run.params if p.grad is not None])
stats = {k: v['mean'] for k, v in run.stats.flush().items() if k.startswith('GNS/')}
torch.save(dict(own=own, whole=whole, stats=stats), folder / f'rank{distributed.rank()}.pt')
distributed.shutdown()
"""


def test_noise_scale_of_two_ranks_by_hand(tmp_path):
    """The hook sees each rank's own gradient, accumulated over two rounds, and averages as usual."""
    tiny.options(tmp_path)
    (tmp_path / 'hooked.py').write_text(HOOKED)
    tiny.finish([ROOT, tmp_path], tmp_path / 'log', 2, tmp_path / 'hooked.py')
    ranks = [torch.load(tmp_path / f'rank{k}.pt') for k in range(2)]
    whole = (ranks[0]['own'] + ranks[1]['own']) / 2
    for found in ranks:
        torch.testing.assert_close(found['whole'], whole, atol=1e-5 * float(whole.norm()), rtol=0)
        assert found['stats'] == ranks[0]['stats']
    part = float(sum(found['own'].square().sum() for found in ranks)) / 2
    square = float(whole.square().sum())
    assert ranks[0]['stats']['GNS/signal'] == pytest.approx((16 * square - 8 * part) / 8, rel=1e-3)
    assert ranks[0]['stats']['GNS/spread'] == pytest.approx((part - square) / (1 / 8 - 1 / 16), rel=1e-3)


def test_noise_scale_needs_parts(tmp_path):
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    for flags in ([], ['--batch-gpu=16']):
        result = run_command(tmp_path / 'run', data, '--gns=1', *flags)
        assert result.exit_code == 1 and result.output.startswith('Error: --gns=1 compares') and '--batch-gpu' in result.output
        assert len(result.output.splitlines()) == 1 and not (tmp_path / 'run').exists()


# --- losses by group

def test_groups_against_numpy():
    rng = np.random.default_rng(2)
    stats = training_stats.Collector()
    values, group = rng.standard_normal(500), rng.integers(0, 5, 500)
    values[[3, 77, 401]] = np.nan, np.inf, -np.inf
    labels = ['a/x', 'a/y', 'b/x', 'b/y', 'never/x', 'c']
    group[group == 4] = 5
    for part in np.array_split(np.arange(500), 7):
        stats.report_groups('L', torch.from_numpy(values[part]), torch.from_numpy(group[part]), labels)
    found = stats.flush()
    fine = np.isfinite(values)
    members = {'L': [0, 1, 2, 3, 5], 'L/a': [0, 1], 'L/b': [2, 3], 'L/a/x': [0], 'L/a/y': [1], 'L/b/x': [2], 'L/b/y': [3], 'L/c': [5]}
    for name, groups in members.items():
        chosen = values[fine & np.isin(group, groups)]
        assert found[name]['num'] == len(chosen)
        assert (found[name]['mean'], found[name]['std']) == pytest.approx((chosen.mean(), chosen.std()))
    assert found['L/never'] == found['L/never/x'] == dict(num=0, mean=None, std=None)
    assert found['L/nonfinite'] == dict(num=500, mean=3 / 500, std=0)
    assert stats.flush() == {}


def test_quartiles_add_up_and_are_those_of_the_law(tmp_path):
    """Each pair is in the quartile of p(sigma) that its level lies in; the eight groups make up the totals."""
    run = tiny.make_run(tmp_path, *PLAIN, '--consistency-coeff=1', '--consistency-batch-size=16', '--num-primes=1',
                        '--num-consistency-steps=2')
    record = tiny.recorded(run)
    for _ in range(4):
        run.step()
    stats = run.stats.flush()
    sigma = torch.cat([batch.sigma.flatten() for batch, _ in record]).double()
    noisy = torch.cat([batch.sigma_n.flatten() > 0 for batch, _ in record])
    quartile = (run.noise.cdf(sigma) * 4).long().clamp(max=3)
    for term in ('denoise', 'consistency'):
        values = torch.cat([terms[term].detach() for _, terms in record]).double()
        assert stats[f'Loss/{term}']['num'] == 64
        for kind, of_kind in (('clean', ~noisy), ('noisy', noisy)):
            assert stats[f'Loss/{term}/{kind}']['num'] == int(of_kind.sum())
            for q in range(4):
                chosen, found = values[of_kind & (quartile == q)], stats[f'Loss/{term}/{kind}/q{q + 1}']
                assert found['num'] == len(chosen)
                assert found['mean'] is None if not len(chosen) else found['mean'] == pytest.approx(float(chosen.mean()), rel=1e-5)
