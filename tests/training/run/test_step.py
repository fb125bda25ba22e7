# SPDX-License-Identifier: Apache-2.0
"""The training step as one compiled graph: no breaks, no symbolic shapes, no recompilation, the numbers of the step without a compiler."""

import json
import re

import pytest
import torch

from tests.support import ROOT, tiny
from training.networks.unet import UNetBlock
from training.objective.loss import AmbientLoss
from training.run import step as step_module

SMALL = ['--cbase=4', '--cres=1', '--blocks=1', '--attn=0']
PENALISED = ['--penalty=pseudo_huber', '--pairing=truncate', '--power-ema=0.1', '--clip=1']
# flags, and how many choices of terms there are
CASES = {
    'plain': (['--augment=0.5', '--dropout=0.2', '--checkpointing=1', *PENALISED], 1),
    'consistency': (['--consistency=bridge:batch_size=8,steps=2,samples=3', '--batch-gpu=8'], 1),
    'published consistency': (['--consistency_coeff=1', '--num_consistency_steps=2', '--num_primes=2', '--consistency_batch_size=16'], 1),
    'consistency by the average': (['--consistency=euler:batch_size=8,steps=2,samples=2,teacher=ema,below=sigma_n,weighted=true,every=2',
                                    '--weight=learned', '--noise=levels:sigmas=0.5|1|2|4'], 2),
    'hybrid': (['--precond=iddpm', '--objective=hybrid', '--timesteps=second_moment:history=1', '--corruption-probability=0.3',
                '--batch-gpu=8'], 1),
    'labels': (['--cond=1', '--label-dropout=0.2', '--cep=gaussian', '--augment=0.1', '--precision=bf16'], 1),
    'edm2': (['--arch=edm2:cbase=8,cres=1|1,blocks=1,attn=4,channels_per_head=8,dropout=0.1', '--weight=edm2', '--gns=1',
              '--batch-gpu=4'], 1)}


class Graphs(list):
    """The names of the symbolic inputs of each graph that is compiled, in order. backend: what compiles it; None: nothing does."""

    backend = None

    def __call__(self, graph, inputs):
        inputs_of = [node for node in graph.graph.nodes if node.op == 'placeholder']
        values = {node.name: node.meta['example_value'] for node in inputs_of}
        self.append([name for name, value in values.items()
                     if any(isinstance(size, torch.SymInt) for size in getattr(value, 'shape', [value]))])
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs) if self.backend else graph.forward


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that are compiled from here on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, compiled = Graphs(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, options, **more: compiled(self, backend=found, **more))
    with torch._dynamo.config.patch(optimize_ddp=True, recompile_limit=8):
        yield found
    torch._dynamo.reset()


def gradients(run):
    return torch.cat([p.grad.flatten() for p in run.params if p.grad is not None])


def compare(folder, flags, graphs, choices, tolerance, steps=4):
    """A compiled run beside one that is not."""
    plain, compiled = tiny.make_run(folder, *flags), tiny.make_run(folder, *flags, '--compile=1')
    for _ in range(steps):
        plain.step()
        compiled.step()
        difference = (gradients(plain) - gradients(compiled)).norm() / gradients(plain).norm()
        assert difference <= tolerance, float(difference)
        assert graphs == [[]] * choices and not torch._dynamo.utils.counters['graph_break']
    found, expected = ({name: [found[key] or 0.0 for key in ('num', 'mean', 'std')] for name, found in run.stats.flush().items()}
                       for run in (compiled, plain))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=max(tolerance, 1e-9), abs=tolerance), name


def test_step_is_one_graph(tmp_path, graphs, capsys):
    """With everything in it that draws, and an accumulated gradient; the line about it has the time and the number of graphs."""
    compare(tmp_path, [*SMALL, '--augment=0.5', '--dropout=0.2', '--cond=1', '--label-dropout=0.2', '--cep=uniform', '--weight=learned',
                       '--batch-gpu=8'], graphs, 1, 0, steps=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'ompil' in line]
    assert len(lines) == 1 and re.fullmatch(r'Compiling the training step \.\.\. done in \d+ s \(1 graph\)', lines[0])


@pytest.mark.slow
def test_each_choice_of_terms_is_one_graph(tmp_path, graphs, capsys):
    """The chains of a ramp with every=2 are due in steps 2, 4, ...; both graphs are compiled before step 0, and a number that depends on
    the step is no constant of them."""
    chains = '--consistency=bridge:batch_size=8,steps=1,samples=3,rampup=0.06,every=2'
    compare(tmp_path, [*SMALL, '--augment=0', chains], graphs, 2, 0, steps=5)
    assert '(2 graphs)' in (out := capsys.readouterr().out) and 'Warning' not in out


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_gradients_of_the_compiled_step(name, tmp_path, graphs):
    """The graphs of forward and backward pass, before they are turned into code: the same numbers but for the order of sums."""
    graphs.backend = 'aot_eager'
    flags, choices = CASES[name]
    compare(tmp_path, flags, graphs, choices, 2e-2 if '--precision=bf16' in flags else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['consistency', 'hybrid'])
def test_gradients_of_the_code_that_is_made(name, tmp_path, graphs):
    graphs.backend = 'inductor'
    compare(tmp_path, CASES[name][0], graphs, CASES[name][1], 1e-4)


# --- what is compiled when


class Clock:
    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now


@pytest.fixture
def parts():
    """A TrainStep of two choices, micro-batches of 4, 4 and 2 rows, and what was rehearsed."""
    class Step(torch.nn.Module):
        images = 10

        def forward(self, batch, draws, scale, due):
            assert not torch.is_grad_enabled()
            rehearsed.append(('eager', len(batch.images), due))

        def choices(self, step):
            return [('a',), ('a', 'b')] if step < 1000 else [('b',)]

    class Batch:
        def __init__(self, count):
            self.images = torch.zeros(count)

    rehearsed = []
    return Step(), lambda: [(Batch(count), None) for count in (4, 4, 2)], rehearsed


def test_sizes_and_choices_are_compiled_once(parts, monkeypatch, capsys):
    step, batches, rehearsed = parts
    monkeypatch.setattr(step, 'compile', lambda **options: None)
    clock = Clock()
    monkeypatch.setattr(step_module, 'time', clock)

    def backward(batch, draws, due):
        rehearsed.append((len(batch.images), due))
        clock.now += 10

    compiled = step_module.CompiledStep(step, 4)
    prepare = lambda at: compiled.prepare(at, batches, backward, torch.ones([]))
    assert prepare(0) == 40 and prepare(1) == 0
    assert [each for each in rehearsed if each[0] != 'eager'] == [(2, ('a',)), (4, ('a',)), (2, ('a', 'b')), (4, ('a', 'b'))]
    assert len(rehearsed) == 8
    assert prepare(1000) == 20 and len(rehearsed) == 12
    told = [line.split(' ... ')[1] for line in capsys.readouterr().out.splitlines()]
    assert told == ['done in 40 s (0 graphs)', 'done in 20 s (0 graphs)']


def test_time_of_compilation_is_not_in_the_rate(tmp_path, monkeypatch):
    run = tiny.make_run(tmp_path, *SMALL, '--compile=1')
    monkeypatch.setattr(run.compiled, 'prepare', lambda *args: 3600.0)
    run.compiled.step._compiled_call_impl = None
    run.clock -= 3600
    run.step()
    assert run.rate() > 16 / 60 and run.seconds() > 3600
    run.report()
    (line,) = [json.loads(line) for line in (tmp_path / 'stats.jsonl').read_text().splitlines()]
    assert line['Timing/img_per_sec'] > 16 / 60 and line['Timing/seconds'] > 3600


@pytest.mark.slow
def test_compiling_again_is_told_once(tmp_path, graphs, monkeypatch, capsys):
    """A term that reads the step itself is a constant of its graph."""
    forward = AmbientLoss.forward

    def stepping(self, net, batch, randn=None, seen=None):
        return {name: values * (1 + randn.step) for name, values in forward(self, net, batch, randn, seen).items()}

    monkeypatch.setattr(AmbientLoss, 'forward', stepping)
    run = tiny.make_run(tmp_path, *SMALL, '--augment=0', '--compile=1')
    for _ in range(3):
        run.step()
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(',')[0] for line in lines if line.startswith('Warning')]
    assert told == ['Warning: the training step was compiled again at step 1']
    assert len(graphs) == 3


@pytest.mark.slow
def test_a_network_that_breaks_the_graph_is_compiled_in_parts(tmp_path, graphs, monkeypatch, capsys):
    forward = UNetBlock.forward

    def asking(self, x, emb):
        return forward(self, x, emb) if float(x.detach().sum()) < 1e9 else x

    plain = tiny.make_run(tmp_path, *SMALL, '--augment=0')
    plain.step()
    monkeypatch.setattr(UNetBlock, 'forward', asking)
    run = tiny.make_run(tmp_path, *SMALL, '--augment=0', '--compile=1')
    run.step()
    assert torch.equal(gradients(run), gradients(plain)) and len(graphs) > 1
    assert 'Warning: the training step cannot be compiled as one graph, and is compiled in parts: ' in capsys.readouterr().out


# --- several ranks

RANKS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tests.support import ROOT, tiny
from tests.training.run.test_step import SMALL, Graphs, gradients
from torch_utils import distributed
graphs, compiled = Graphs(), torch.nn.Module.compile
graphs.backend = 'aot_eager'
torch.nn.Module.compile = lambda self, options, **more: compiled(self, backend=graphs, **more)
folder = Path(sys.argv[2])
torch.set_num_threads(1)
distributed.init()
flags = [*SMALL, '--gns=1', '--batch-gpu=4', '--augment=0.2', '--dropout=0.1', '--weight=learned']
runs = [tiny.make_run(folder, *flags), tiny.make_run(folder, *flags, '--compile=1')]
found = []
for _ in range(3):
    for run in runs:
        run.step()
    found.append([gradients(run) for run in runs])
views = [p.grad._is_view() for p in runs[0].params]
stats = [{name: each['mean'] for name, each in run.stats.flush().items() if name.startswith('GNS/')} for run in runs]
torch.save(dict(found=found, graphs=list(graphs), views=views, stats=stats), folder / f'rank{distributed.rank()}.pt')
distributed.shutdown()
"""


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """One graph on each rank, though DistributedDataParallel would cut it; gradients are views of its buckets, equal on both ranks."""
    tiny.options(tmp_path)
    (tmp_path / 'ranks.py').write_text(RANKS)
    tiny.finish([ROOT, tmp_path], tmp_path / 'log', 2, tmp_path / 'ranks.py')
    ranks = [torch.load(tmp_path / f'rank{k}.pt') for k in range(2)]
    for rank in ranks:
        assert rank['graphs'] == [[]] and all(rank['views'])
        for plain, compiled in rank['found']:
            torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5 * float(plain.norm()))
        assert rank['stats'][1] == pytest.approx(rank['stats'][0], rel=1e-3) and set(rank['stats'][0]) == {'GNS/signal', 'GNS/spread'}
    for mine, other in zip(ranks[0]['found'], ranks[1]['found'], strict=True):
        assert all(torch.equal(*pair) for pair in zip(mine, other, strict=True))
