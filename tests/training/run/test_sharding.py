# SPDX-License-Identifier: Apache-2.0
"""train.py --shard: the same training as without it, a share of the memory on each rank, and states that go from one to the other."""

import json

import pytest
import torch

from dnnlib import UserError
from tests.support import ROOT, archs, launch, tiny
from torch_utils import checkpoint, distributed
from training.checkpoints.load import load_network
from training.networks.preconditioning import build_network
from training.run import sharding

CHAINS = '--consistency=euler:batch_size=4,steps=1,samples=2'
# Everything that calls the network or touches its gradients in another way; EDM2 has parameters without dimensions.
FULL = [f'--arch={archs.TINY["edm2"]}', f'{CHAINS},teacher=ema', '--weight=edm2', '--clip=1', '--batch-gpu=4', '--dropout=0.3',
        '--augment=0.5', '--checkpointing=1', '--cond=1']
SLOW = {'grad': [f'{CHAINS},grad=true,stop=no', '--dropout=0.2', '--val=0.2', '--power-ema=0.1'], 'vp': ['--precond=vp', '--ls=8'],
        'hybrid': ['--precond=iddpm', '--objective=hybrid'], 'learned': ['--weight=learned', '--checkpointing=1', f'{CHAINS},grad=true'],
        'compiled': ['--compile=1', '--checkpointing=1', '--dropout=0.2'], 'ncsnpp': ['--arch=ncsnpp', '--cbase=16', '--cres=1,1'],
        **{name: [f'--arch={archs.TINY[name]}', '--cond=1', '--label-dropout=0.2'] for name in ('dit', 'vit', 'uvit')}}


def run_cases(folder, cases, ranks):
    """What shards.py finds."""
    tiny.make_zip(folder / 'data.zip')
    done = launch.run(ROOT / 'tests' / 'support' / 'shards.py', [folder, json.dumps(cases)], ranks, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / 'found.json').read_text())


def check_case(found, ranks):
    """The same weights at the start; the same losses to 1e-5 with and without --shard, also after a state from without; a share of the
    memory; a bad gradient on one rank skips the update on all."""
    assert found['start'] == 0.0
    plain, divided = found['losses']
    assert len(plain) == len(divided) == 2 and {'Grad/norm', 'Loss/denoise'} <= plain[0].keys()
    for mine, theirs in zip(divided, plain):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert found['weights'] < 1e-3  # Adam's first steps depend on the sign of each gradient, however small
    assert found['whole'] == 0.0
    for values in zip(*found['held out']):
        assert values[0] == values[1]
    straight, of_plain = found['after']
    assert of_plain[0] == pytest.approx(straight[0], rel=1e-5, abs=1e-6)
    assert found['spoiled']
    plain, divided = found['held']
    assert len(set(plain)) == 1 and sum(divided) >= plain[0]
    assert max(divided) < plain[0] / ranks * 1.1  # ranks hold whole rows, and a few parameters whole
    peak, rest, largest = found['peak']
    assert 0 < peak <= rest + 2 * largest  # a block, and the one that is gathered ahead


def test_two_ranks_train_as_without(tmp_path):
    check_case(run_cases(tmp_path, {'full': FULL}, ranks=2)['full'], ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [2, 4])
def test_every_kind_of_run_trains_as_without(tmp_path, ranks):
    cases = SLOW if ranks == 2 else {'full': FULL, 'learned': SLOW['learned']}
    found = run_cases(tmp_path, cases, ranks)
    for name in cases:
        check_case(found[name], ranks)
        assert found[name]['graphs'] == (len(found[name]['blocks']) if name == 'compiled' else 0)


# --- through train.py


def losses(folder):
    names = ('Loss/', 'Val/', 'Grad/norm')
    return [{name: value for name, value in line.items() if name.startswith(names) and value is not None}
            for line in tiny.read_log(folder)]


def same(mine, theirs):
    assert [sorted(line) for line in mine] == [sorted(line) for line in theirs]
    for one, other in zip(mine, theirs):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


TRAIN = ['--augment=0.5', '--dropout=0.2', '--val=0.2', '--threads=1', '--expr-id=x', '--power-ema=0.1', '--snap=2', '--dump=1',
         '--resume=latest', '--keep-states=1', '--seed=5', '--samples=1']


@pytest.mark.slow
def test_a_run_goes_on_with_and_without(tmp_path, capsys):
    """Two ranks with --shard, then one rank, which has nothing to divide; snapshots are those of the average."""
    data = tiny.make_zip(tmp_path / 'data.zip')
    args = lambda name, *more: [f'--outdir={tmp_path / name}', f'--data={data}', *tiny.FLAGS, *TRAIN, *more]
    tiny.call(*args('one', '--duration=0.00024'))
    output = tiny.finish(args('two', '--duration=0.00016', '--shard=1'), tmp_path / 'log', ranks=2)
    assert '--shard: 0.08 M parameters in 10 blocks' in output and '0.04 M on rank 0' in output
    folder = tiny.only_folder(tmp_path / 'two')
    path, = checkpoint.states(folder)
    state, snapshot = tiny.read_state(path), folder / 'network-snapshot-000000.160'
    for net, part in ((load_network(str(snapshot)), state['ema']['halflife']), (load_network(path, weights='raw'), state['net'])):
        assert all(torch.equal(value, part[name]) for name, value in net.state_dict().items())
    assert (folder / 'ema-snapshot-000000.160-0.100.safetensors').exists() and (folder / 'samples-000000.160.png').exists()
    capsys.readouterr()
    tiny.call(*args('two', '--duration=0.00024', '--shard=1'))
    assert '--shard: one rank has nothing to divide' in capsys.readouterr().out
    same(losses(folder), losses(tiny.only_folder(tmp_path / 'one')))
    assert [round(checkpoint.nimg(path)) for path in checkpoint.states(folder)] == [240]


@pytest.mark.slow
def test_four_two_and_one_ranks_go_on_alike(tmp_path):
    data = tiny.make_zip(tmp_path / 'data.zip')
    args = lambda name, *more: [f'--outdir={tmp_path / name}', f'--data={data}', *tiny.FLAGS, *TRAIN, '--snap=1', *more]
    tiny.call(*args('one', '--duration=0.00048'))
    for ranks, duration, shard in ((2, 8, 1), (4, 16, 1), (1, 24, 0), (4, 32, 0), (2, 40, 1), (4, 48, 1)):
        tiny.finish(args('more', f'--duration={duration / 1e5}', f'--shard={shard}'), tmp_path / 'log', ranks)
    same(losses(tiny.only_folder(tmp_path / 'more')), losses(tiny.only_folder(tmp_path / 'one')))


@pytest.mark.parametrize('flags, words', [
    (['--gns=1', '--batch-gpu=4'], '--gns=1 compares the gradients of whole ranks'),
    (['--distill=rsd:teacher=x'], '--shard=True cannot be combined with --distill=rsd:teacher=x')])
def test_refused(tmp_path, flags, words):
    with pytest.raises(UserError) as err:
        tiny.options(tmp_path, '--shard=1', *flags)
    assert words in err.value.message and '\n' not in err.value.message


# --- pieces


@pytest.mark.parametrize('arch', [*archs.TINY, *archs.VARIANTS, 'adm:cbase=32,cres=1|2,blocks=1', 'ncsnpp:cbase=16,cres=1,blocks=1'])
def test_blocks_are_what_run_is_given(arch):
    """The skeleton has no memory, the same tensors as the network, and no block within another."""
    net = archs.network(arch, precond='iddpm' if arch == 'dit' else 'edm')
    bare = sharding.skeleton(net)
    assert all(p.is_meta for p in bare.parameters()) and not any(b.is_meta for b in bare.buffers())
    assert {name: value.shape for name, value in bare.state_dict().items()} == {n: value.shape for n, value in net.state_dict().items()}
    blocks = sharding.blocks_of(bare)
    given = []
    run = type(net.model).run
    net.model.run = lambda block, *inputs: given.append(block) or run(net.model, block, *inputs)
    with torch.no_grad():
        net(torch.zeros(1, net.img_channels, 8, 8), 1.0)
    assert blocks and [net.model.get_submodule(name) for name in blocks] == given
    assert not any(a != b and a.startswith(f'{b}.') for a in blocks for b in blocks)
    assert all(not value.is_meta for value in sharding.tensors(net))  # which is as it was


def test_a_network_that_names_no_blocks(monkeypatch):
    net = build_network(archs.config('dit'))
    monkeypatch.setattr(type(net.model), 'forward', lambda self, x, *rest: x)
    assert sharding.blocks_of(sharding.skeleton(net)) == []


def test_a_network_that_reads_values_is_refused(monkeypatch):
    net = build_network(archs.config('dit'))
    monkeypatch.setattr(type(net.model), 'forward', lambda self, x, *rest: x * float(x.sum()))
    with pytest.raises(UserError, match='^--shard=1: DiT cannot be evaluated on the device "meta"'):
        sharding.blocks_of(sharding.skeleton(net))


@pytest.mark.parametrize('rows, ranks', [(7, 4), (8, 4), (1, 2), (5, 4), (3, 8)])
def test_own_rows_are_those_of_a_chunk(monkeypatch, rows, ranks):
    """As torch.chunk divides, which is how FSDP2 does."""
    value = torch.arange(rows * 2).reshape(rows, 2)
    parts = []
    monkeypatch.setattr(distributed, 'size', lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, 'rank', lambda rank=rank: rank)
        parts.append(sharding.Sharding._own(None, value))
    expected = list(value.chunk(ranks))
    assert all(map(torch.equal, parts, expected)) and not any(map(len, parts[len(expected):]))


def test_parts_are_in_order_and_not_too_large(monkeypatch):
    monkeypatch.setattr(sharding, 'PART_BYTES', 40)
    likes = {name: torch.empty(size, device='meta') for name, size in (('a', 4), ('b', 6), ('c', 1), ('d', 100), ('e', 0), ('f', 3))}
    assert list(sharding.parts(likes)) == [['a', 'b'], ['c'], ['d'], ['e', 'f']]
    assert list(sharding.parts({})) == []
