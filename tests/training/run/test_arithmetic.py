# SPDX-License-Identifier: Apache-2.0
"""Precision, compilation and loss scale as train.py chooses them: on this CPU, on GPUs of several kinds, and in a run that is continued."""

import functools
import json

import pytest
import torch

import train
from dnnlib import EasyDict, UserError
from tests.support import tiny
from torch_utils import distributed, misc
from training.data.batches import Batch
from training.networks.preconditioning import build_network
from training.objective.loss import AmbientLoss
from training.run import launch
from training.run.config import from_json, to_json
from training.run.configure import FP16_SCALE


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes train.py see a GPU of this compute capability, with a compiler or without."""
    return functools.partial(tiny.pretend_gpu, monkeypatch)


def chosen(tmp_path, *flags):
    """(precision, compile, loss scale) of the configuration."""
    config = tiny.options(tmp_path, *flags)
    return config.run.precision, config.run.compile, config.optimizer.loss_scale


def test_on_a_cpu_nothing_changes(tmp_path):
    assert chosen(tmp_path) == ('fp32', False, 1.0)
    plain = '--precision=fp32', '--compile=0', '--ls=1', '--checkpoint=none'
    same = [to_json(tiny.options(tmp_path, *flags)) for flags in ((), plain)]
    for values in same:
        values['run'].pop('command')
    assert same[0] == same[1]


@pytest.mark.parametrize('capability, compiler, flags, expected', [
    ((9, 0), True, [], ('bf16', True, 1.0)), ((8, 0), False, [], ('bf16', False, 1.0)), ((7, 5), True, [], ('fp32', True, 1.0)),
    ((9, 0), True, ['--precision=fp32', '--compile=0'], ('fp32', False, 1.0)), ((9, 0), True, ['--compile=0'], ('bf16', False, 1.0)),
    ((9, 0), True, ['--precision=fp16'], ('fp16', True, FP16_SCALE)), ((9, 0), True, ['--fp16=1', '--ls=100'], ('fp16', True, 100.0))])
def test_on_a_gpu(gpu, tmp_path, capability, compiler, flags, expected):
    gpu(capability, compiler)
    assert chosen(tmp_path, *flags) == expected


def test_all_ranks_decide_alike(gpu, tmp_path, monkeypatch):
    """The others have older GPUs: none uses bf16."""
    gpu((9, 0))
    options = tiny.options(tmp_path)
    assert options.run.precision == 'bf16'
    monkeypatch.setattr(distributed, 'all_values', lambda value, what='': [value, not value] if isinstance(value, bool) else [value] * 2)
    assert chosen(tmp_path)[:2] == ('fp32', False)


@pytest.mark.parametrize('capability, flags, line', [
    ((9, 0), [], 'Precision bf16, compiled, channels-last (chosen by --precision=auto and --compile=auto; '
     '--precision=fp32 --compile=0 gives the exact published arithmetic)'),
    ((9, 0), ['--precision=fp32', '--compile=0'], 'Precision fp32'),
    (None, [], 'Precision fp32 (chosen by --precision=auto and --compile=auto)')])
def test_it_is_said_in_one_line(gpu, tmp_path, capsys, capability, flags, line):
    tiny.make_zip(tmp_path / 'data.zip')
    if capability:
        gpu(capability)
    tiny.call(f'--outdir={tmp_path}', f'--data={tmp_path}/data.zip', *tiny.FLAGS, *flags, '--dry-run')
    out = capsys.readouterr().out
    assert line in out.splitlines()
    found = json.JSONDecoder().raw_decode(out)[0]['run']
    assert found['precision'] in line and found['compile'] == ('compiled' in line)


def test_checkpointing_keeps_its_old_name(tmp_path):
    config = [tiny.options(tmp_path, *flags).run.checkpointing for flags in (
        [], ['--checkpoint=none'], ['--checkpointing=0'], ['--checkpoint=blocks'], ['--checkpointing=1'],
        ['--checkpoint=blocks', '--checkpointing=1'])]
    assert config == [False, False, False, True, True, True]
    with pytest.raises(UserError, match='--checkpointing=0 and --checkpoint=blocks exclude each other'):
        tiny.options(tmp_path, '--checkpoint=blocks', '--checkpointing=0')
    values = to_json(tiny.options(tmp_path, '--checkpoint=blocks'))
    assert values['run']['checkpointing'] is True and from_json(values).run.checkpointing  # as earlier versions wrote it


def test_a_continued_run_may_have_another_default_scale(tmp_path, gpu):
    """States of an earlier version in fp16 began at scale 1, and are continued; a scale that was given must be the same."""
    gpu((7, 5))
    tiny.make_zip(tmp_path / 'data.zip')
    flags = ['--precision=fp16', '--compile=0', '--expr-id=x']
    config, given = tiny.options(tmp_path, *flags), [f'--outdir={tmp_path}', f'--data={tmp_path}/data.zip', *tiny.FLAGS, *flags]
    run = tmp_path / '00000-x'
    run.mkdir()
    values = to_json(config)
    values['optimizer']['loss_scale'] = 1.0
    (run / 'options.json').write_text(json.dumps(values))
    o = EasyDict(train.main.make_context('train', [*given, '--resume=latest']).params)
    assert launch.find_run(config, o)[1] == ('latest', str(run))
    with pytest.raises(UserError, match='loss_scale'):
        launch.find_run(tiny.options(tmp_path, *flags, '--ls=7'), EasyDict(o, ls=7.0))


def activation_gradients(net, batch):
    """Gradients of a batch of 512 with respect to the outputs of all layers, those that are not 0, and the parameters' in .grad."""
    found = []
    layers = [module for module in net.model.modules() if not list(module.children())]

    def hook(module, args, out):
        if out.requires_grad:
            out.register_hook(lambda grad: found.append(grad.flatten()))

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    weight = lambda sigma: (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2
    (AmbientLoss(weight)(net, batch)['denoise'].sum() / 512).backward()
    for each in hooks:
        each.remove()
    found = torch.cat(found)
    return found[found != 0]


def test_why_fp16_needs_a_large_first_scale():
    """At scale 1 most gradients of activations of a fresh network round to 0 in float16, and many still do after the first update; at the
    default scale, none of the latter, and nothing overflows."""
    lost = lambda grads, scale: float(((grads * scale).half() == 0).float().mean())
    with misc.seeded('fp16'):
        net = build_network(dict(img_resolution=8, img_channels=3, model_type='SongUNet', model_channels=32, channel_mult=[1, 2],
                                 num_blocks=1, attn_resolutions=[4])).train()
    draw = lambda *shape: torch.randn(8, *shape, generator=generator)
    generator = misc.generator('fp16')
    images, sigma = 0.5 * draw(3, 8, 8), (1.2 * draw(1, 1, 1) - 1.2).exp()
    batch = Batch(images, 0 * sigma, sigma, draw(3, 8, 8))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    fresh = activation_gradients(net, batch)
    assert lost(fresh, 1) > 0.8 > lost(fresh, FP16_SCALE)
    optimizer.step()
    later = activation_gradients(net, batch)
    assert lost(later, 1) > 0.15 and lost(later, FP16_SCALE) < 1e-3
    assert (FP16_SCALE * torch.cat([fresh, later])).half().isfinite().all()
