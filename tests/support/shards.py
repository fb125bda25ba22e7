# SPDX-License-Identifier: Apache-2.0
"""A script for tests/training/run/test_sharding.py, on several ranks: runs with and without --shard, step by step.

shards.py FOLDER CASES, where CASES are JSON {name: flags} -> FOLDER/found.json, {name: what rank 0 found}."""

import functools
import json
import os
import sys

import torch
import torch._dynamo.utils

from tests.support import tiny
from torch_utils import checkpoint, distributed, misc
from training.objective.loss import AmbientLoss
from training.run import sharding

STEPS = 2


def losses(run, steps=STEPS):
    """[{name: mean}] of the next steps of a run."""
    found = []
    for _ in range(steps):
        run.step()
        found.append({name: each['mean'] for name, each in run.stats.flush().items() if each['mean'] is not None})
    return found


def difference(a, b):
    """Largest difference of the tensors in two nested structures, in units of the largest value of each; other values must be equal."""
    if torch.is_tensor(a):
        assert a.shape == b.shape and a.dtype == b.dtype
        return float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-3)) if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return max(map(difference, a, b), default=0.0)
    assert a == b or isinstance(a, float), (a, b)
    return 0.0


def weights(state):
    """What two runs have in common: the parts of a state without what --shard and the clock change."""
    return {name: state[name] for name in ('net', 'ema', 'optimizer', 'objective')} if state else {}


def held(run):
    """Numbers in the memory of this rank: parameters, moments, averages."""
    moments = [value for entry in run.optimizer.state.values() for value in entry.values() if value.ndim]
    parameters = [p for module in (run.net, *(average.module for average in run.averages.values())) for p in module.parameters()]
    return sum(misc.local(tensor).numel() for tensor in (*parameters, *moments))


def spoiled(run):
    """Whether a step with a loss that is not finite on the last rank leaves the optimizer as it was, and is counted on all ranks."""
    forward, before = AmbientLoss.forward, run.state()
    last = distributed.rank() == distributed.size() - 1

    def spoil(self, *inputs, **named):
        values = forward(self, *inputs, **named)
        return {name: value * float('nan') if last else value for name, value in values.items()}

    AmbientLoss.forward = spoil
    run.step()
    AmbientLoss.forward = forward
    after = run.state()
    counted = all(distributed.all_values(int(run.guard.in_row) == 1))
    return counted and (before is None or difference(before['optimizer'], after['optimizer']) == 0.0)


def watch_whole(run):
    """[most numbers of parameters that are whole on this rank when a block begins, the rest of the network, the largest block]; the first
    grows with each step."""
    blocks = [run.net.model.get_submodule(name) for name in run.sharding.blocks]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    found = [0, sum(p.numel() for p in run.net.parameters()) - sum(sizes), max(sizes)]

    def note(*unused):
        found[0] = max(found[0], sum(p.numel() for p in run.net.parameters() if not hasattr(p, 'to_local')))

    for block in blocks:
        block.register_forward_pre_hook(note)
    return found


def compared(folder, name, flags):
    """What two runs of a case, with and without --shard, have found."""
    plain = tiny.make_run(folder, *[flag for flag in flags if not flag.startswith('--compile=')])
    divided, graphs = tiny.make_run(folder, *flags, '--shard=1'), torch._dynamo.utils.counters['stats']['unique_graphs']
    peak = watch_whole(divided)
    start = sharding.gather(divided.net.state_dict())
    found = dict(blocks=divided.sharding.blocks, start=difference(plain.net.state_dict(), start) if distributed.rank() == 0 else None)
    found['losses'] = [losses(run) for run in (plain, divided)]
    found['peak'], found['graphs'] = peak, torch._dynamo.utils.counters['stats']['unique_graphs'] - graphs
    found['held'] = [distributed.all_values(held(run)) for run in (plain, divided)]
    states = [state and run.sharding.copied(state) for run in (plain, divided) for state in [run.state()]]
    found['weights'] = difference(*map(weights, states))
    whole = divided.sharding.whole(divided.ema).module
    found['whole'] = difference(states[1]['ema']['halflife'], whole.state_dict()) if states[1] else 0.0
    found['held out'] = [run.data.validation(run.sharding.whole(run.ema).module, run.objective.first, run.device)
                         for run in (plain, divided) if run.data.validation]
    found['after'] = [losses(divided, 1), crossed(folder, name, [*flags, '--shard=1'], states[0])]
    found['spoiled'] = spoiled(divided)
    return found


def crossed(folder, name, flags, state):
    """Losses of a run after a state of a run of another kind."""
    path, run = os.path.join(folder, f'{name}.pt'), tiny.make_run(folder, *flags)
    distributed.from_rank0(lambda: checkpoint.save(path, state))
    run.restore(checkpoint.load(path) if distributed.rank() == 0 else None, path)
    run.stats.flush()  # of the steps before
    return losses(run, 1)


def main():
    folder, cases = sys.argv[1], json.loads(sys.argv[2])
    torch.compile = functools.partial(torch.compile, backend='eager')
    distributed.init()
    found = {name: compared(folder, name, flags) for name, flags in cases.items()}
    if distributed.rank() == 0:
        with open(os.path.join(folder, 'found.json'), 'w') as file:
            json.dump(found, file)
    distributed.shutdown()


if __name__ == '__main__':
    main()
