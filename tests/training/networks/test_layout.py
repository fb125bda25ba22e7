# SPDX-License-Identifier: Apache-2.0
"""Channels-last networks and what is written for the compiler: values, gradients, and the strides and casts of compiled graphs."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from benchmarks.traffic import capture, kind_of
from tests.support import archs, tiny
from torch_utils import misc
from training.checkpoints.save import save_network
from training.networks import edm2, fused, layers, rows, unet
from training.networks.interface import COMPILE_OPTIONS, match_layout
from training.run.states import on_host

UNETS = {'ddpmpp': 'ddpmpp:cbase=32,cres=1|2,blocks=1,attn=4,dropout=0.1', 'ncsnpp': 'ncsnpp:cbase=32,cres=1|2,blocks=1,attn=4',
         'ddpmpp with skips': 'ddpmpp:cbase=32,cres=1|2,blocks=1,attn=4,resample_filter=1|1',
         'adm': 'adm:cbase=32,cres=1|2,blocks=1,attn=4', 'edm2': 'edm2:cbase=16,cres=1|2,blocks=1,attn=4,channels_per_head=16'}
SIDES = {'ddpmpp with skips': {'encoder_type': 'skip', 'decoder_type': 'skip'}}
EACH = pytest.mark.parametrize('arch', UNETS)
aten = torch.ops.aten


def network(arch, **others):
    return archs.network(UNETS.get(arch, arch), **SIDES.get(arch, {}), **others)


def batch(count=4):
    """x, sigma, labels."""
    draw = lambda name, *size: torch.randn(*size, generator=misc.generator(name))
    return draw('x', count, 2, 8, 8), draw('sigma', count).exp(), torch.eye(3)[torch.arange(count) % 3]


@pytest.fixture
def as_compiled(monkeypatch):
    """Runs without a compiler what is written for it."""
    for module in (layers, unet):
        monkeypatch.setattr(module, 'is_fused', lambda x: True)


def results(net, *inputs):
    """Output and gradients."""
    net.zero_grad()
    out = net(*inputs)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters())]


# Values


@pytest.mark.parametrize('given', ['nothing', 'offset', 'scale and shift', 'all'])
@pytest.mark.parametrize('activate', [False, True])
def test_written_out_normalisation_is_torch_s(given, activate, monkeypatch):
    draw = lambda *shape: torch.randn(*shape, generator=misc.generator(0, 'given', shape), dtype=torch.float64).requires_grad_()
    norm = layers.GroupNorm(24, num_groups=6).double()
    norm.weight.data, norm.bias.data = draw(24).detach(), draw(2, 24)[0].detach()
    x = (3 + draw(3, 24, 4, 5)).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    offset = draw(1, 24) if given in ('offset', 'all') else None
    scale, shift = (draw(3, 24), draw(1, 24)) if given in ('scale and shift', 'all') else (None, None)
    leaves = [leaf for leaf in (x, offset, scale, shift, *norm.parameters()) if leaf is not None]
    outcome = lambda: (out := norm(x, offset, scale, shift, activate), *torch.autograd.grad((out * torch.arange(5)).sum(), leaves))
    expected = outcome()
    monkeypatch.setattr(layers, 'is_fused', lambda x: True)
    found = outcome()
    torch.testing.assert_close(found, expected)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_statistics_of_a_large_mean_beside_a_small_spread(as_compiled):
    x = (30 + torch.randn(2, 8, 16, 16, generator=misc.generator('x'))).bfloat16()
    norm = layers.GroupNorm(8)
    torch.testing.assert_close(norm(x).float(), F.group_norm(x.float(), 2), rtol=2 ** -8, atol=1e-5)


def test_gradients_of_the_pieces_are_right():
    draw = lambda *shape: torch.randn(*shape, generator=misc.generator(0, 'piece', shape), dtype=torch.float64).requires_grad_()
    for piece in (fused.Affine, fused.AffineSiLU):
        assert torch.autograd.gradcheck(piece.apply, (draw(2, 3, 2, 2), draw(2, 3), draw(2, 3) + 1))
    assert torch.autograd.gradcheck(fused.ChannelStatistics.apply, (draw(2, 3, 2, 3),))


@EACH
def test_channels_last_and_what_is_compiled_give_the_same(arch, as_compiled, monkeypatch):
    net, inputs = network(arch), batch()
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)  # for resampling
    net.model.set_channels_last()
    found = results(net, *inputs)
    monkeypatch.undo()
    net.model.set_channels_last(False)
    torch.testing.assert_close(found, results(net, *inputs), rtol=2e-4, atol=2e-4)


def test_repeated_pixels(monkeypatch):
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    expected = F.interpolate(x, scale_factor=2, mode='nearest')
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = layers.repeat_pixels(x.contiguous(memory_format=layout))
        assert torch.equal(found, expected) and found.is_contiguous(memory_format=layout)


# The layout


@EACH
def test_the_layout_changes_neither_values_nor_files(arch, tmp_path):
    net, inputs = network(arch), batch()
    plain = copy.deepcopy(net)
    net.model.set_channels_last()
    wide = [p for p in net.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert wide and all(layers.is_channels_last(p) for p in wide) and all(p.is_contiguous() for p in plain.parameters())
    twin = copy.deepcopy(net)
    assert twin.model.channels_last and all(layers.is_channels_last(p) for p in twin.parameters() if p.ndim == 4 and min(p.shape) > 1)
    assert all(torch.equal(*pair) for pair in zip(net.state_dict().values(), plain.state_dict().values()))
    assert misc.state_digest(net) == misc.state_digest(plain)
    for name, one in (('net', net), ('plain', plain)):
        save_network(one, tmp_path / name)
    read = lambda name: load_file(tmp_path / name / 'model.safetensors')
    assert tiny.digest(read('net')) == tiny.digest(read('plain'))
    with torch.no_grad():
        torch.testing.assert_close(net(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)
    twin.load_state_dict(plain.state_dict())
    assert all(layers.is_channels_last(p) for p in twin.parameters() if p.ndim == 4 and min(p.shape) > 1)
    net.model.set_channels_last(False)
    with torch.no_grad():
        assert torch.equal(net(*inputs), plain(*inputs)) and all(p.is_contiguous() for p in net.parameters())


def test_states_do_not_depend_on_the_layout():
    """Moments that were read from a file lie as the parameters again."""
    net = network('ddpmpp')
    net.model.set_channels_last()
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    results(net, *batch())
    optimizer.step()
    state = on_host({'net': net.state_dict(), 'optimizer': optimizer.state_dict()})
    moments = [value for part in state['optimizer']['state'].values() for value in part.values()]
    assert all(value.is_contiguous() for value in (*state['net'].values(), *moments))
    other = copy.deepcopy(net)
    again = torch.optim.Adam(other.parameters(), fused=True)
    again.load_state_dict(state['optimizer'])
    match_layout(again)
    assert all(value.stride() == p.stride() for p, part in again.state.items() for value in part.values() if value.shape == p.shape)
    for one, steps in ((net, optimizer), (other, again)):
        results(one, *batch())
        steps.step()
    assert all(torch.equal(*pair) for pair in zip(net.parameters(), other.parameters()))


# Compiled graphs


class Chain(nn.Module):
    """A block that halves the resolution and attends, and one that doubles it, of a concatenation: twice as many channels as it gives, for
    which the compiler itself would not choose channels-last."""

    def __init__(self, make):
        super().__init__()
        self.down, self.up = make(16, 16, down=True, attention=True), make(32, 16, up=True)

    def forward(self, x, emb):
        h = self.down(x, emb)
        return self.up(torch.cat([h, h.square()], dim=1), emb)


def song(cin, cout, **options):
    return unet.UNetBlock(cin, cout, 8, num_heads=1, adaptive_scale=False, resample_proj=True, dropout=0.1, **options)


def convolutions(graphs):
    """(name, strides of the 4-D tensors) of every convolution of the graphs, forward and backward."""
    for graph in ('forward', 'backward'):
        for node in graphs[graph].graph.nodes:
            if node.op == 'call_function' and kind_of(node) in (aten.convolution, aten.convolution_backward):
                made = node.meta['val'] if isinstance(node.meta['val'], tuple) else [node.meta['val']]
                tensors = [*made, *(used.meta['val'] for used in node.all_input_nodes)]
                yield f'{graph} {node.name}', [value for value in tensors if isinstance(value, torch.Tensor) and value.ndim == 4]


def check_strides(graphs, least):
    """Every tensor of a convolution lies channels-last, weights and gradients as well; the filter that resamples, one for all channels, has
    no order of channels."""
    found = list(convolutions(graphs))
    wrong = [(name, value.shape, value.stride()) for name, values in found for value in values
             if not value.is_contiguous(memory_format=torch.channels_last) and value.stride(0) != 0]
    assert len(found) >= least and not wrong, wrong


def captured(model, *inputs):
    rows.attach_row_draws(nn.ModuleDict({'model': model})) if not hasattr(model, 'model') else rows.attach_row_draws(model)
    return capture(lambda x, *rest: sum(model(x * scale, *rest).float().square().sum() for scale in (1, 2)), *inputs)


def casts_of_parameters(graph):
    """{parameter: how many casts} of a graph: of itself, or of a tensor of its shape made of it alone, as EDM2's normalised weights are."""
    source, counts = {}, {}
    for node in graph.nodes:
        if node.op == 'placeholder' and 'primals' in node.name:
            source[node], counts[node] = node, 0
        elif node.op == 'call_function' and len(found := {source.get(one) for one in node.all_input_nodes}) == 1 and None not in found:
            source[node] = (weight := found.pop())
            cast = kind_of(node) in (torch.ops.prims.convert_element_type, aten._to_copy)
            counts[weight] += cast and node.meta['val'].shape == weight.meta['val'].shape and weight.meta['val'].dtype == torch.float32
    return counts


def check_casts(graphs, least):
    """The forward graph, behind the compiler's search for equal expressions, casts each parameter once, though the network is called
    twice."""
    counts = casts_of_parameters(graphs['forward'].graph)
    assert sum(counts.values()) >= least and max(counts.values()) == 1, counts


def test_compiled_blocks_are_channels_last_and_cast_weights_once():
    chain = Chain(song).train()
    for p in chain.parameters():
        p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
    x = torch.zeros(2, 16, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    graphs = captured(chain, x, torch.zeros(2, 8))
    check_strides(graphs, least=2 * 2 * 8)
    check_casts(graphs, least=8)


@pytest.mark.slow
@EACH
def test_compiled_networks_are_channels_last_and_cast_weights_once(arch):
    net, (x, sigma, labels) = network(arch).train(), batch()
    net.compute_dtype = torch.bfloat16
    net.model.set_channels_last()
    graphs = captured(net, x, sigma, labels)
    check_strides(graphs, least=2 * 2 * 20)
    check_casts(graphs, least=20)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 13), reason="its code for CPUs takes no view as a bias; that for GPUs adds biases by itself")
@EACH
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled_channels_last_networks_give_the_same_gradients(arch, dtype):
    net, inputs = network(arch), batch()
    exact = results(net, *inputs)
    net.compute_dtype = dtype
    net.model.set_channels_last()
    net.model.compile(fullgraph=True, dynamic=False, options=COMPILE_OPTIONS)
    found = results(net, *inputs)
    flat = lambda tensors: torch.cat([value.flatten() for value in tensors])
    assert (flat(found[1:]) - flat(exact[1:])).norm() < (1e-4 if dtype == torch.float32 else 0.04) * flat(exact[1:]).norm()
    assert (found[0] - exact[0]).norm() < (1e-5 if dtype == torch.float32 else 0.02) * exact[0].norm()


def test_edm2_resamples_as_the_others(monkeypatch):
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    x = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert torch.equal(edm2.Resample(True, [1, 1])(x), F.interpolate(x, scale_factor=2, mode='nearest'))
