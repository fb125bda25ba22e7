# SPDX-License-Identifier: Apache-2.0
"""Snapshots say in which precision they were trained, and sampling uses it where the device computes in it natively."""

import copy
import json

import pytest
import torch

from dnnlib import EasyDict, UserError
from tests.support import tiny
from torch_utils import numerics
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.networks.preconditioning import build_network
from training.run import training_loop
from training.run.folder import RunFolder
from training.sampling import pieces, record
from training.sampling.generate import ConditionedDenoiser

SMALL = dict(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=16, channel_mult=[1], num_blocks=1,
             attn_resolutions=[])


@pytest.fixture
def capability(monkeypatch):
    """A function that makes the CPU pass for a GPU of a compute capability."""
    return lambda found: monkeypatch.setattr(
        numerics, 'is_native', lambda precision, device: found >= numerics.CAPABILITY[precision])


def trained(folder, precision, **more):
    net = build_network(SMALL | more).eval()
    net.precision = precision
    save_network(net, folder)
    return str(folder)


@pytest.mark.parametrize('precision, on_a100, on_v100, here', [
    (None, 'fp32', 'fp32', 'fp32'), ('tf32', 'fp32', 'fp32', 'fp32'), ('bf16', 'bf16', 'fp32', 'fp32'), ('fp16', 'fp16', 'fp16', 'fp32')])
def test_sampling_follows_the_training(precision, on_a100, on_v100, here, tmp_path, capability):
    ref = trained(tmp_path / 'net', precision)
    written = json.loads((tmp_path / 'net' / 'config.json').read_text())
    assert written == SMALL | ({'precision': precision} if precision else {})
    opened = lambda asked='auto': record.precision(pieces.open_network(ref, 'ema', 'cpu', asked, False))
    assert opened() == opened(None) == here and opened('bf16') == 'bf16'
    capability((8, 0))
    assert opened() == on_a100 and opened('fp32') == 'fp32'
    capability((7, 0))
    assert opened() == on_v100


def test_published_half_precision_is_kept(tmp_path, capability):
    """use_fp16 of EDM's networks, which say nothing of their training."""
    ref = trained(tmp_path / 'net', None, use_fp16=True)
    assert record.precision(pieces.open_network(ref, 'ema', 'cpu', 'auto', False)) == 'fp32'
    capability((8, 0))
    assert record.precision(pieces.open_network(ref, 'ema', 'cpu', 'auto', False)) == 'fp16'


def test_a_run_writes_it(tmp_path):
    """Into its snapshots, not into its own configuration, which may be continued in another precision; and its states tell it too."""
    tiny.make_zip(tmp_path / 'data.zip')
    tiny.call(f'--outdir={tmp_path}/runs', f'--data={tmp_path}/data.zip', '--precision=bf16', *tiny.FLAGS, '--duration=0.000032',
              '--tick=0.032', '--snap=1', '--dump=1')
    run = tiny.only_folder(tmp_path / 'runs')
    (snapshot,), (state,) = run.glob('network-snapshot-*'), run.glob('*.pt')
    assert json.loads((snapshot / 'config.json').read_text())['precision'] == 'bf16'
    assert 'precision' not in json.loads((run / 'options.json').read_text())['network']['arguments']
    for ref in (snapshot, state):
        net = load_network(ref)
        assert net.precision == 'bf16' and 'precision' not in net.config and net.compute_dtype == torch.float32
    save_network(load_network(state), tmp_path / 'copy')
    assert load_network(tmp_path / 'copy').precision == 'bf16'


def test_unknown_precision_is_refused(tmp_path):
    ref = trained(tmp_path / 'net', 'fp8')
    with pytest.raises(UserError, match='unknown precision "fp8"; choose from fp32, tf32, bf16, fp16'):
        load_network(ref)


# --- compilation


def compiled(module):
    return getattr(module, '_compiled_call_impl', None) is not None


def test_the_average_is_compiled_where_training_is(tmp_path):
    """A copy of a compiled network is not; and grids, validation, metrics and teacher=ema evaluate the average."""
    run = lambda flag: training_loop.Run(tiny.options(tmp_path, flag), RunFolder(str(tmp_path), fractional=True), torch.device('cpu'))
    net = build_network(SMALL)
    net.model.compile()
    assert compiled(net.model) and not compiled(copy.deepcopy(net).model)
    assert compiled(run('--compile=1').ema.module.model) and not compiled(run('--compile=0').ema.module.model)


@pytest.mark.parametrize('kind, batch, expected', [('cuda', 64, True), ('cuda', 10 ** 6, False), ('cuda', None, False), ('cpu', 64, False)])
def test_small_batches_are_replayed_as_a_graph_on_a_gpu(kind, batch, expected, monkeypatch):
    asked = []
    net = build_network(SMALL)
    net.model.compile = lambda **options: asked.append(options)
    pieces.prepare_network(net, torch.device(kind), 'fp32', True, batch)
    (options,) = asked
    assert options['dynamic'] is False and ('triton.cudagraphs' in options['options']) is expected is net.replays
    assert net.model.channels_last is (kind == 'cuda')


def test_replayed_results_are_copied():
    """A replayed graph writes its next results into the same memory; and every call has the same number of rows."""
    memory, rows = torch.zeros(4, 1, 8, 8), []

    class Replaying:
        replays = True

        def __call__(self, x, sigma, labels):
            rows.append(len(x))
            return memory.copy_(2 * x)

    x = torch.arange(6.0).reshape(6, 1, 1, 1).expand(-1, 1, 8, 8)
    assert ConditionedDenoiser(Replaying(), rows=4)(x, torch.tensor(1.0)).equal(2 * x)
    assert rows == [4, 4]


def test_batch_reaches_the_network(tmp_path, monkeypatch):
    """generate.py calls it --batch, eval_fid.py --batch-size."""
    ref, found = trained(tmp_path / 'net', None), []
    monkeypatch.setattr(pieces, 'prepare_network', lambda net, device, precision, compile, batch: found.append(batch) or net)
    for name in ('batch', 'batch_size'):
        pieces.Networks().open(EasyDict(network=ref, weights='ema', gnet=None, device='cpu', precision='auto', compile=True, **{name: 32}))
    assert found == [32, 32]
