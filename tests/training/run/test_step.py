# SPDX-License-Identifier: Apache-2.0
"""The training step as one compiled graph: no breaks, no symbolic shapes, no recompilation, the numbers of the step without a compiler."""

import pytest
import torch

from tests.support import tiny

CONSISTENCY = ['--consistency=bridge:batch_size=8,steps=2,samples=3']


@pytest.fixture
def graphs(monkeypatch):
    """What is compiled from here on: a list with the symbolic inputs of each graph, in order. Nothing is really compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, compiled = [], torch.nn.Module.compile

    def backend(graph, inputs):
        symbolic = [node.name for node in graph.graph.nodes if node.op == 'placeholder'
                    and any(isinstance(size, torch.SymInt) for size in getattr(node.meta['example_value'], 'shape', [node.meta['example_value']]))]
        found.append(symbolic)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **options: compiled(self, backend=backend, **options))
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize('flags', [[], CONSISTENCY])
def test_step_is_one_graph(tmp_path, graphs, flags):
    run = tiny.make_run(tmp_path, '--compile=1', *flags)
    for _ in range(4):
        run.step()
    assert graphs == [[]] and not torch._dynamo.utils.counters['graph_break']
