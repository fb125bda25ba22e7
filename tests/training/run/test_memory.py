# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step: counted as it is taken, what fits, and errors about a lack of it."""

import dataclasses
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dnnlib import UserError
from tests.support import tiny
from torch_utils import distributed, misc
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network
from training.networks.rows import attach_row_draws
from training.run import config, memory, presets
from training.run.build import build_net, build_objective

GIB = 2 ** 30
H200 = 139 * GIB


def kept_by_allocator(function):
    """Bytes that PyTorch's allocator gave out in function() and has not got back while its result exists."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), result


@pytest.mark.parametrize('checkpointing', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activations_are_what_the_allocator_keeps(checkpointing):
    """Counted without content, and taken in a real forward pass of the same network."""
    def make():
        net = build_network(dict(img_resolution=16, img_channels=3, model_type='SongUNet', model_channels=32, channel_mult=[1, 2],
                                 num_blocks=1, attn_resolutions=[8])).train()
        net.model.checkpointing = checkpointing
        return net

    net = make()
    taken, _ = kept_by_allocator(lambda: net(torch.zeros(16, 3, 16, 16), torch.ones(16)).sum())
    with torch.device('meta'):
        net = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        memory.without_content(net)
        with memory.LiveBytes([*net.parameters(), *net.buffers()]) as live:
            loss = net(torch.zeros(16, 3, 16, 16), torch.ones(16)).sum()
    assert fake.is_our_fake(loss) and taken > 2 ** 20
    assert abs(live.live - taken) < 0.02 * taken
    assert live.peak > live.live


@pytest.mark.parametrize('flags', [[], ['--checkpoint=blocks'], *(pytest.param(flags, marks=pytest.mark.slow) for flags in (
    ['--consistency=bridge:teacher=ema,steps=2,batch_size=8'], ['--precond=iddpm', '--objective=hybrid'],
    ['--arch=adm:cbase=32,cres=1|2,blocks=1', '--weight=learned', '--precision=bf16']))], ids=' '.join)
def test_a_step_takes_what_was_counted(flags, tmp_path):
    """The same step with content, tensor by tensor."""
    found = tiny.options(tmp_path, *flags)
    net = build_net(found.network, precision=found.run.precision)
    net.model.checkpointing = found.run.checkpointing
    draws, _ = attach_row_draws(net), misc.seeded('memory')
    _, objective = build_objective(found.objective, net, 16)
    objective.set_teacher(build_net(found.network, precision=found.run.precision).eval().requires_grad_(False))
    key = misc.Draws(0, 10 ** 9)
    draws.begin(key, 16)
    with memory.LiveBytes([*net.parameters(), *net.buffers(), *objective.parameters()]) as live:
        sum(term.sum() for term in objective(net, memory.blank_batch(net, 16), key).values()).backward()
    counted = memory.count(found, 16, found.run.checkpointing)
    assert abs(counted.step - live.peak) < 0.03 * live.peak
    params = sum(p.numel() for p in (*net.parameters(), *objective.parameters()))
    buffers = sum(b.nbytes for b in net.buffers())
    assert abs(counted.weights - 4 * params - buffers) < 5e4  # a table of levels may be counted with the objective
    assert 12 * params <= counted.state + 1e4 and counted.gradients == 0


def test_what_else_is_counted(tmp_path):
    plain, more = (tiny.options(tmp_path, *flags) for flags in ([], ['--power-ema=0.05,0.10', '--optimizer=adam', '--batch-gpu=4']))
    one, other = memory.count(plain, 4, False), memory.count(more, 4, False)
    assert other.state - one.state == 2 * one.weights
    assert one.gradients == other.gradients > 0.95 * one.weights, 'kept while batches accumulate'
    assert plain.run.batch_gpu == 16 and sum(one) == one.total


@pytest.mark.parametrize('limit', [1000, 730, 729, 400, 250, 249, 99, 25, 24])
def test_largest_divisor(limit):
    """Of 48 images that take 10 + 15 n bytes, counted at most twice."""
    calls = []
    found = memory.largest(48, limit, lambda rows: calls.append(rows) or 10 + 15 * rows)
    assert found == max((n for n in range(1, 49) if 48 % n == 0 and 10 + 15 * n <= limit), default=None)
    assert calls in ([48], [48, 1])


@pytest.fixture
def simple(monkeypatch):
    """A step that takes 1000 bytes and 100 an image, or 20 if blocks are recomputed; returns a function that sets the available bytes."""
    monkeypatch.setattr(memory, 'count', lambda config, rows, again, device: memory.Peak(600, 400, rows * (20 if again else 100), 0))
    return lambda limit: monkeypatch.setattr(memory, 'available', lambda device: limit)


@pytest.mark.parametrize('limit, flags, expected', [
    (2600, ['--batch-gpu=auto', '--checkpoint=auto'], (16, False)), (2599, ['--batch-gpu=auto', '--checkpoint=auto'], (8, False)),
    (1799, ['--batch-gpu=auto', '--checkpoint=auto'], (16, True)), (2599, ['--checkpoint=auto'], (16, True)),
    (2600, ['--checkpoint=auto'], (16, False)), (1400, ['--batch-gpu=auto'], (4, False)), (1100, ['--batch-gpu=auto'], (1, False)),
    (1100, ['--batch-gpu=auto', '--checkpoint=blocks'], (4, True)), (1100, ['--batch-gpu=auto', '--checkpoint=auto'], (4, True))])
def test_what_is_chosen(limit, flags, expected, tmp_path, simple, capsys):
    simple(limit)
    found = tiny.options(tmp_path, *flags)
    assert (found.run.batch_gpu, found.run.checkpointing) == expected
    words = capsys.readouterr().out
    assert f'Memory: {expected[0]} images per forward pass and rank' in words and 'predicted peak' in words
    assert ('blocks computed again' in words) == expected[1]


@pytest.mark.parametrize('flags, words', [
    (['--batch-gpu=auto'], r'--batch-gpu=auto: one image takes .* may be used; add --checkpoint=blocks'),
    (['--checkpoint=auto'], r'--checkpoint=auto: --batch-gpu=16 takes .* use --batch-gpu=auto')])
def test_too_little_memory(flags, words, tmp_path, simple):
    simple(1000)
    with pytest.raises(UserError, match=words):
        tiny.options(tmp_path, *flags)


def test_the_rank_with_least_memory_decides(tmp_path, monkeypatch, simple):
    simple(9999)
    monkeypatch.setattr(distributed, 'all_values', lambda value, what='': [value, 1800] if what == 'counting memory' else [value])
    assert tiny.options(tmp_path, '--batch-gpu=auto').run.batch_gpu == 8


def test_a_trial_halves_what_does_not_fit(tmp_path, monkeypatch):
    found = tiny.options(tmp_path)
    tried = []

    def step(config, device):
        tried.append(config.run.batch_gpu)
        if tried[-1] > 4:
            raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(memory, '_step', step)
    fits = lambda config: memory.trial(config, torch.device('cpu'))
    assert memory.verified(found, True, fits).run.batch_gpu == 4 and tried == [16, 8, 4]
    with pytest.raises(UserError, match='out of memory with --batch-gpu=16 and --checkpoint=none; use a --batch-gpu below 16'):
        memory.verified(found, False, fits)


def test_a_trial_is_a_whole_step(tmp_path):
    """Forward, backward, update, on this CPU."""
    assert memory.trial(tiny.options(tmp_path, '--batch-gpu=8'), torch.device('cpu'))


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB\nmore'), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")])
def test_running_out_of_memory_is_one_line(error, tmp_path):
    found = tiny.options(tmp_path, '--checkpoint=blocks')
    with pytest.raises(UserError) as caught, memory.explained(found):
        raise error
    words = caught.value.message
    assert '\n' not in words and '--batch-gpu=16' in words and '--checkpoint=blocks' in words and 'use a --batch-gpu below 16' in words
    with pytest.raises(RuntimeError, match='another'), memory.explained(found):
        raise RuntimeError('another')


def test_a_run_ends_in_that_line(tmp_path, monkeypatch):
    tiny.make_zip(tmp_path / 'data.zip')

    def fail(self):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(tiny.training_loop.Run, 'step', fail)
    with pytest.raises(UserError, match='out of memory with --batch-gpu=16'):
        tiny.call(f'--outdir={tmp_path}/runs', f'--data={tmp_path}/data.zip', *tiny.FLAGS, '--duration=0.001')


def adm64(batch):
    """The Config of --preset=edm-imagenet64 in bf16 with this batch on one rank."""
    preset = presets.read('edm-imagenet64')
    height = preset['image_shape'][1]
    network = ARCHS['adm'](dropout=preset['options']['dropout']) | dict(img_resolution=height, img_channels=3, label_dim=preset['classes'])
    return config.Config(
        config.DataConfig('none'), config.CorruptionConfig(), config.NetworkConfig(json.loads(json.dumps(network))),
        config.ObjectiveConfig('lognormal', 'edm'), config.OptimizerConfig(),
        config.RunConfig(seed=0, batch=batch, batch_gpu=batch, duration_kimg=1, precision='bf16'))


@pytest.mark.slow
def test_adm_64_at_batch_512_fits_on_one_gpu():
    """In bf16 with recomputed blocks; without them, at most a quarter of that batch does."""
    found = adm64(512)
    blocks, whole, part = (memory.count(found, rows, again, 'cuda') for rows, again in ((512, True), (512, False), (256, False)))
    print([round(peak.total / GIB, 1) for peak in (blocks, whole, part)])
    assert blocks.weights > 4 * presets.read('edm-imagenet64')['parameters']
    assert blocks.total < 0.9 * H200 / 2 and part.total < 0.9 * H200 < whole.total
    run, peak = memory._choose(dataclasses.replace(found), False, True, 0.9 * H200, 'cuda')
    assert run.checkpointing and peak == blocks
