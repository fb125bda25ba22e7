# SPDX-License-Identifier: Apache-2.0
"""The training step against its definition: gradients, accumulation, ranks, skipped updates, learning rate, EMA, what is written."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.support import ROOT, tiny
from torch_utils import checkpoint
from training.checkpoints.load import load_network
from training.objective.loss import AmbientLoss
from training.run import training_loop

PLAIN = ['--dropout=0', '--augment=0', '--weight-decay=0']


def rank(monkeypatch, number, size):
    """From here on this process takes itself for one rank of several; there is no process group."""
    monkeypatch.setenv('RANK', str(number))
    monkeypatch.setenv('WORLD_SIZE', str(size))


def steps(run, count):
    for _ in range(count):
        run.step()
    return run


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.net.parameters()]).clone()


def gradients(run):
    return torch.cat([p.grad.flatten() for p in run.params if p.grad is not None])


def poisoned(monkeypatch, at):
    """The denoising loss is nan in the forward passes whose numbers are in `at`."""
    count = iter(range(10**9))
    forward = AmbientLoss.forward

    def poison(self, *args, **kwargs):
        values = forward(self, *args, **kwargs)
        return {'denoise': values['denoise'] * float('nan')} if next(count) in at else values

    monkeypatch.setattr(AmbientLoss, 'forward', poison)


# --- one step

def test_first_steps_against_adam_by_hand(tmp_path):
    """The update is Adam's on the mean of the summed losses over the batch, from the batch and noise of the step."""
    run = tiny.make_run(tmp_path, *PLAIN)
    twin = tiny.make_run(tmp_path, *PLAIN)
    assert torch.equal(weights(run), weights(twin))
    adam = torch.optim.Adam(twin.net.parameters(), lr=1e-3)
    for step in range(3):
        run.step()
        host = twin.data.feed.next()
        batch, draws = next(training_loop.micro_batches(host, 16, twin.device, lambda row, k=step: training_loop.misc.Draws(5, k, row)))
        x = batch.images + (batch.sigma**2 - batch.sigma_n**2).sqrt() * draws('noise', batch.images.shape)
        r = batch.sigma_n**2 / batch.sigma**2
        error = (1 - r) * twin.net(x, batch.sigma) + r * x - batch.images
        weight = (batch.sigma**2 + 0.25) / (batch.sigma * 0.5)**2
        adam.zero_grad()
        ((weight * error**2).sum() / 16).backward()
        if step:  # the ramp starts at zero
            adam.step()
        else:
            adam.param_groups[0]['lr'] = 0
            adam.step()
            adam.param_groups[0]['lr'] = 1e-3
    torch.testing.assert_close(weights(run), weights(twin), atol=2e-5, rtol=0)


@pytest.mark.parametrize('flags, tolerance', [
    (['--augment=0'], 1e-6), (['--augment=0.5'], 1e-6),
    (['--consistency-coeff=1', '--consistency-batch-size=16', '--num-consistency-steps=2', '--num-primes=2'], 1e-5)])  # a longer sum
def test_accumulated_gradient_is_that_of_the_whole_batch(tmp_path, flags, tolerance):
    """--batch-gpu only splits the work."""
    whole, parts = (steps(tiny.make_run(tmp_path, '--dropout=0', *flags, f'--batch-gpu={size}'), 1) for size in (16, 4))
    difference = (gradients(whole) - gradients(parts)).norm() / gradients(whole).norm()
    assert gradients(whole).norm() > 0 and difference < tolerance


@pytest.mark.parametrize('augment', [0, 0.5])
def test_ranks_see_the_same_pairs_noise_and_augmentation(tmp_path, monkeypatch, augment):
    """Rows of two and of four ranks, put together, are those of one to the bit: (image, sigma, noise hash), step by step.

    Resampled images are products of matrices, whose last bits depend on the number of rows."""
    def seen(number, size):
        rank(monkeypatch, number, size)
        run = tiny.make_run(tmp_path, f'--augment={augment}', '--workers=2', '--batch=32', '--xflip=1')
        record = tiny.recorded(run)
        steps(run, 4)
        return [batch for batch, _ in record]

    whole = seen(0, 1)
    for size in (2, 4):
        ranks = [seen(number, size) for number in range(size)]
        for step, batch in enumerate(whole):
            for name, value in batch._asdict().items():
                if value is not None:
                    together = torch.cat([getattr(found[step], name) for found in ranks])
                    if augment and name in ('images', 'augment_labels'):
                        torch.testing.assert_close(together, value, atol=1e-5, rtol=0)
                    else:
                        assert tiny.digest(together) == tiny.digest(value), (size, step, name)
    noise = torch.cat([batch.noise for batch in whole])
    assert len({tiny.digest(row) for row in noise}) == len(noise) == 128  # no row is drawn twice


def test_global_random_state_is_left_alone(tmp_path):
    """No generator that user code shares is read or seeded (the published code seeds two of them with image indices)."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    run = steps(tiny.make_run(tmp_path, '--dropout=0.3', '--augment=0.5', '--val=0.2'), 3)
    run.validate()
    run.snapshot()
    run.save_state()
    run.finish_states()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    after = np.random.get_state()
    assert after[2:] == before[1][2:] and np.array_equal(after[1], before[1][1])


def test_seed_reaches_weights_pairs_noise_and_dropout(tmp_path, monkeypatch):
    def run(*flags):
        return tiny.make_run(tmp_path, '--augment=0', *flags)

    first, same, other = run(), run(), run('--seed=6')
    assert torch.equal(weights(first), weights(same)) and not torch.equal(weights(first), weights(other))
    assert torch.equal(first.data.feed.next().sigma, same.data.feed.next().sigma)
    assert not torch.equal(first.data.feed.next().sigma, other.data.feed.next().sigma)
    with_dropout = [steps(run('--dropout=0.5'), 1) for _ in range(2)]
    assert torch.equal(gradients(with_dropout[0]), gradients(with_dropout[1]))
    assert not torch.equal(gradients(with_dropout[0]), gradients(steps(run('--dropout=0'), 1)))
    monkeypatch.setattr(training_loop.distributed, 'rank', lambda: 1)  # the rows of the global batch count, not who computes them
    moved = [run('--dropout=0.5') for _ in range(2)]
    for each, first_row in zip(moved, (0, 16)):
        each.first_row, each.data.feed.rows = 0, slice(0, 16)
        shifted = training_loop.misc.Draws(5, 0, first_row)
        each.row_draws.begin = lambda _, count, begin=each.row_draws.begin, draws=shifted: begin(draws, count)
    assert torch.equal(gradients(steps(moved[0], 1)), gradients(with_dropout[0]))
    assert not torch.equal(gradients(steps(moved[1], 1)), gradients(with_dropout[0]))


def test_learning_rate_ramp(tmp_path):
    """lr * min(images before the step / ramp, 1): nothing moves in step 0, and the ramp ends after --lr-rampup million images."""
    run = tiny.make_run(tmp_path, '--lr-rampup=0.000064', '--lr=2e-3')
    start = weights(run)
    rates = []
    for step in range(6):
        run.step()
        rates.append(run.optimizer.param_groups[0]['lr'])
        assert torch.equal(weights(run), start) == (step == 0)
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])


def test_loss_scale_does_not_change_the_update(tmp_path):
    plain, scaled = (steps(tiny.make_run(tmp_path, *PLAIN, f'--ls={scale}'), 4) for scale in (1, 1024))
    torch.testing.assert_close(weights(plain), weights(scaled), atol=1e-6, rtol=0)
    torch.testing.assert_close(plain.stats.flush()['Grad/norm']['mean'], scaled.stats.flush()['Grad/norm']['mean'], rtol=1e-5, atol=0)


# --- gradients that are not finite

def test_fused_adam_heeds_found_inf_on_this_device():
    """What the step relies on: found_inf skips weights, moments and the step count, also in the very first step."""
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight], lr=0.1, fused=True)
    for value, found in [(float('nan'), 1.0), (1.0, 0.0), (float('inf'), 1.0)]:
        weight.grad = torch.full([3], value)
        before = tiny.digest([weight, adam.state_dict()['state']])
        adam.grad_scale, adam.found_inf = None, torch.tensor(found)
        adam.step()
        state = adam.state_dict()['state'][0]
        assert weight.isfinite().all() and state['exp_avg'].isfinite().all() and state['exp_avg_sq'].isfinite().all()
        if adam.found_inf and state['step']:
            assert tiny.digest([weight, adam.state_dict()['state']]) == before
    assert state['step'] == 1


def test_bad_gradient_leaves_weights_and_optimizer(tmp_path, monkeypatch):
    poisoned(monkeypatch, at=[3])
    run = steps(tiny.make_run(tmp_path), 3)
    before = tiny.digest(run.net.state_dict()), tiny.digest(run.optimizer.state_dict()['state'])
    run.step()
    assert not torch.isfinite(gradients(run)).all()
    assert (tiny.digest(run.net.state_dict()), tiny.digest(run.optimizer.state_dict()['state'])) == before
    assert float(run.guard.in_row) == 1
    run.step()
    assert float(run.guard.in_row) == 0 and tiny.digest(run.net.state_dict()) != before[0]
    assert all(value.isfinite().all() for value in run.ema.module.state_dict().values())


def test_skipped_updates_are_counted_and_reported(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, at=[6, 8])
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    tiny.call(f'--outdir={tmp_path}', f'--data={data}', *tiny.FLAGS, '--duration=0.00016', '--nosubdir')
    lines = [json.loads(line) for line in (tmp_path / 'stats.jsonl').read_text().splitlines()]
    assert [line['Grad/skipped'] for line in lines] == [0, pytest.approx(2 / 5)]
    assert lines[1]['Loss/denoise'] > 0 and lines[1]['Loss/denoise/nonfinite'] == pytest.approx(2 / 5)
    assert 'Loss/denoise/nonfinite' not in lines[0] and lines[1]['Grad/norm/nonfinite'] == pytest.approx(2 / 5)
    ticks = [line for line in capsys.readouterr().out.splitlines() if line.startswith('tick')]
    assert 'SKIPPED' not in ticks[0] and 'SKIPPED 2 updates (non-finite gradients)' in ticks[1]


def test_endless_bad_gradients_stop_the_run(tmp_path, monkeypatch):
    """A state is written at once; its weights are those from before."""
    monkeypatch.setattr(training_loop.gradients, 'MAX_SKIPPED', 4)
    poisoned(monkeypatch, at=range(7, 100))
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    message = '4 updates in a row were skipped because of non-finite gradients, up to step 11; .* lower --lr'
    with pytest.raises(UserError, match=message) as error:
        tiny.call(f'--outdir={tmp_path}', f'--data={data}', *tiny.FLAGS, '--duration=0.001', '--nosubdir', '--dump=1')
    assert '\n' not in error.value.message
    names = [Path(path).name for path in checkpoint.states(tmp_path)]
    assert names == [f'training-state-000000.{nimg}.pt' for nimg in ('176', '160', '080')]
    assert tiny.digest(tiny.read_state(tmp_path / names[0])['net']) == tiny.digest(tiny.read_state(tmp_path / names[1])['net'])


# --- what is written

def test_heartbeat(tmp_path, monkeypatch, capsys):
    """A line between ticks when a while has passed without one."""
    monkeypatch.setattr(training_loop, 'HEARTBEAT_SEC', 0)
    config = tiny.options(tmp_path, '--duration=0.00008')
    training_loop.training_loop(config, str(tmp_path), torch.device('cpu'))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('    step')]
    assert [line.split()[1] for line in lines] == ['1', '2', '3', '4', '5'] and all('img/s' in line and 'eta' in line for line in lines)


def test_duration_is_not_a_step_too_long(tmp_path):
    """0.24 * 1e3 is 240.00000000000003 where --duration=0.00024 was asked for."""
    for duration, count in [('0.00024', 15), ('0.00008', 5), ('0.0001', 7)]:
        config = tiny.options(tmp_path, f'--duration={duration}', '--dump=0', '--snap=0')
        assert training_loop.training_loop(config, str(tmp_path), torch.device('cpu')).progress.step == count


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Folder of ten steps with snapshots, grids and states at each tick, and held-out loss."""
    outdir = tmp_path_factory.mktemp('finished')
    data = tiny.make_zip(outdir / 'tiny.zip')
    tiny.call(f'--outdir={outdir}', f'--data={data}', *tiny.FLAGS, '--duration=0.00016', '--samples=2', '--snap=1', '--dump=1',
              '--val=0.25')
    return tiny.only_folder(outdir)


def test_snapshot_is_the_average_of_the_state(finished):
    state = tiny.read_state(finished / 'training-state-000000.160.pt')
    net = load_network(finished / 'network-snapshot-000000.160')
    average = next(iter(state['ema'].values()))
    assert tiny.digest(net.state_dict()) == tiny.digest(average) != tiny.digest(state['net'])
    assert net.config == state['options']['network']['arguments'] and not net.training
    assert tiny.digest(load_network(finished / 'training-state-000000.160.pt').state_dict()) == tiny.digest(average)


def test_state_and_folder(finished):
    """Tensors and plain values alone; whole names; the same options in both places."""
    state = torch.load(finished / 'training-state-000000.160.pt', weights_only=True)
    assert list(state) == list(checkpoint.KEYS)
    assert state['options'] == json.loads((finished / 'options.json').read_text()) == json.loads(json.dumps(state['options']))
    assert state['progress']['nimg'] == 160 and state['progress']['stream']['used'] == 160
    assert sorted(path.name for path in finished.iterdir()) == [
        'log.txt', 'network-snapshot-000000.080', 'network-snapshot-000000.160', 'options.json', 'samples-000000.080.png',
        'samples-000000.160.png', 'stats.jsonl', 'training-state-000000.080.pt', 'training-state-000000.160.pt']


def test_average_follows_edm(tmp_path):
    """beta = 0.5^(batch / min(half-life, 0.05 images so far)), recomputed in float64 over the weights of each step."""
    run = tiny.make_run(tmp_path, '--ema=0.000002')
    average = weights(run).double()
    for step in range(5):
        run.step()
        halflife = min(2, 0.05 * 16 * step)
        beta = 0.5 ** (16 / halflife) if halflife else 0
        average = beta * average + (1 - beta) * weights(run).double()
    mine = torch.cat([p.flatten() for p in run.ema.module.parameters()]).double()
    torch.testing.assert_close(mine, average, atol=1e-7, rtol=0)


def test_log_and_console(finished):
    """Every number has its name: terms apart, clean and noisy apart, progress, pairs, held-out loss by level."""
    lines = tiny.read_log(finished)
    ticks, held_out = [line for line in lines if 'Progress/kimg' in line], [line for line in lines if 'Val/clean' in line]
    assert [line['nimg'] for line in ticks] == [line['nimg'] for line in held_out] == [80, 160]
    assert {'Loss/denoise', 'Loss/denoise/clean', 'Loss/denoise/noisy', 'Grad/norm', 'Grad/skipped', 'Optimizer/lr',
            'Pairs/passed', 'Pairs/accepted', 'Progress/step', 'Progress/tick'} <= set(ticks[0])
    assert sum(name.startswith('Val/clean/sigma=') for name in held_out[0]) == 8
    log = (finished / 'log.txt').read_text()
    assert 'held out: Val/clean' in log and 'img/s' in log and 'eta' in log and f'Done: {finished}' in log


def test_losses_of_clean_and_noisy_rows_add_up(tmp_path):
    run = steps(tiny.make_run(tmp_path), 3)
    stats = run.stats.flush()
    both, clean, noisy = (stats[f'Loss/denoise{name}'] for name in ('', '/clean', '/noisy'))
    assert both['num'] == clean['num'] + noisy['num'] == 48 and clean['num'] and noisy['num']
    assert both['mean'] * 48 == pytest.approx(clean['mean'] * clean['num'] + noisy['mean'] * noisy['num'])


# --- two ranks

WORKER = """
import json, os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tests.training.run import test_training_loop as tests
from tests.support import tiny
from torch_utils import distributed
from training.objective.loss import AmbientLoss
folder = Path(sys.argv[2])
torch.set_num_threads(1)
distributed.init()
result = tests.several_steps(folder)
forward = AmbientLoss.forward
if distributed.rank() == 1:  # a bad gradient on one rank
    AmbientLoss.forward = lambda self, *args, **kwargs: {k: v * float('inf') for k, v in forward(self, *args, **kwargs).items()}
run = tests.steps(tiny.make_run(folder), 1)
result['skipped'] = [float(run.guard.in_row)] * 2
torch.save(result, folder / f'rank{distributed.rank()}of{distributed.size()}.pt')
distributed.shutdown()
"""


def several_steps(folder):
    """Losses, gradients, weights and held-out losses of ten steps without dropout, on as many ranks as there are."""
    run = tiny.make_run(folder, '--dropout=0', '--augment=0.5', '--val=0.3', '--batch-gpu=4')
    result = {'losses': [], 'gradients': []}
    for _ in range(10):
        run.step()
        result['gradients'].append(gradients(run))
        stats = run.stats.flush()
        result['losses'].append([stats[name]['mean'] for name in ('Loss/denoise', 'Loss/denoise/clean', 'Loss/denoise/noisy')])
    result['held_out'] = run.data.validation(run.ema.module, run.objective.terms['denoise'], run.device)
    return result


def test_two_ranks_equal_one(tmp_path):
    """Gradients, losses to 1e-5, held-out losses; a bad gradient on one rank skips the update on both."""
    tiny.options(tmp_path)  # makes the data before the ranks look for them
    (tmp_path / 'worker.py').write_text(WORKER)
    tiny.finish([ROOT, tmp_path], tmp_path / 'log', 2, tmp_path / 'worker.py')
    first, second = (torch.load(tmp_path / f'rank{k}of2.pt') for k in range(2))
    one = several_steps(tmp_path)
    assert tiny.digest(first) == tiny.digest(second) and first['skipped'] == [1, 1]
    assert 'FutureWarning' not in (tmp_path / 'log').read_text()
    torch.testing.assert_close(first['losses'], one['losses'], rtol=1e-5, atol=0)
    for mine, whole in zip(first['gradients'][:2], one['gradients'][:2]):
        assert (mine - whole).norm() < 1e-5 * whole.norm()
    assert first['held_out'].keys() == one['held_out'].keys()
    torch.testing.assert_close(first['held_out'], one['held_out'], rtol=1e-4, atol=0)
