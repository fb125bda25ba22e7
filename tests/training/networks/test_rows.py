# SPDX-License-Identifier: Apache-2.0
"""Dropout and its like by the row of the global batch: their law, that cuts do not change them, and what a copy or a compiler sees."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from tests.support.denoisers import make_batch
from torch_utils import misc, registry
from training.diffusion.noise import LogNormal
from training.networks import rows
from training.networks.conditioning import CEP
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network
from training.objective import weighting
from training.objective.consistency import Euler
from training.objective.loss import AmbientLoss, Objective

CPU = torch.device('cpu')
SMALL = {'img_resolution': 8, 'img_channels': 1, 'label_dim': 3, 'model_channels': 16, 'channel_mult': [1], 'num_blocks': 1,
         'attn_resolutions': [], 'dropout': 0.3, 'label_dropout': 0.3}


def network(arch='ddpmpp', cep='gaussian'):
    """A conditional U-Net in training, with random weights everywhere, and its draws."""
    with misc.seeded('net'):
        net = build_network(ARCHS[arch]() | SMALL).train()
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    net.model.label_embedding.perturb = registry.build(cep, CEP, '--cep')
    return net, rows.attach_row_draws(net)


def layer_of(p, **place):
    """A Dropout by itself, in micro-batch, call and place as given."""
    layer = rows.Dropout(p)
    layer.rows, layer.index = rows.RowDraws(), place.get('index', 0)
    layer.rows.begin(misc.Draws(place.get('seed', 0), place.get('step', 0), place.get('first_row', 0)), place.get('rows', 64))
    for _ in range(place.get('calls', 1)):
        layer.rows.next_call()
    return layer


# ---- the law


@pytest.mark.parametrize('p', [0.01, 0.13, 0.5, 0.97])
def test_dropout_is_that_of_torch(p):
    """0 with probability p, 1 / (1 - p) otherwise, in every row and place alike: 262,144 numbers, to five standard errors."""
    x = torch.ones(64, 16, 16, 16, requires_grad=True)
    out = layer_of(p)(x)
    assert out.unique().tolist() == [0.0, pytest.approx(1 / (1 - p), rel=1e-6)]
    dropped = (out == 0).double()
    for share in (dropped.mean(), dropped.flatten(1).mean(1), dropped.mean(dim=(0, 2, 3)), dropped.mean(dim=(0, 1)).flatten()):
        error = math.sqrt(p * (1 - p) * share.numel() / dropped.numel())
        assert ((share - p).abs() < 5 * error).all()
    out.sum().backward()
    assert torch.equal(x.grad, out)
    assert layer_of(p)(x.bfloat16()).dtype == torch.bfloat16


def test_masks_of_different_places_are_independent():
    """Layers, calls, steps, seeds and rows: all correlations of 36 masks of 16,384 numbers lie within 5.5 standard errors of 0."""
    x = torch.ones(16, 4, 16, 16)
    places = [{}, *({name: k} for name in ('index', 'step', 'seed') for k in (1, 2)), {'calls': 2}, {'first_row': 16}, {'first_row': 160}]
    masks = [layer_of(0.3, **place)(x).flatten() for place in places]
    masks += [rows.draw(torch.tensor([0, 1, 0, 16]), 0, name, 'keep', 0.3, list(x.shape), CPU).flatten() for name in ('label', 'other')]
    masks += list(layer_of(0.3)(torch.ones(32, 4, 64, 64))[8:].flatten(1))  # rows of one mask, of several blocks
    off = torch.corrcoef(torch.stack(masks).float()) - torch.eye(len(masks))
    assert off.abs().max() < 5.5 / math.sqrt(x.numel())
    assert torch.equal(layer_of(0.3)(x).flatten(), masks[0])


@pytest.mark.parametrize('law, mean, variance', [('uniform', 1 / 2, 1 / 12), ('normal', 0, 1)])
def test_laws_of_perturbations(law, mean, variance):
    layer = layer_of(0)
    draw = getattr(layer, law)('x', torch.zeros(64, 1000)).double()
    assert abs(draw.mean() - mean) < 5 * math.sqrt(variance / draw.numel())
    assert draw.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / draw.numel()))
    assert not torch.equal(getattr(layer, law)('y', draw), draw) and len(draw.unique(dim=0)) == 64


def test_nothing_is_drawn_in_eval_mode_and_at_p_0(monkeypatch):
    monkeypatch.setattr(rows, 'draw', None)
    x = torch.ones(4, 2)
    assert layer_of(0)(x) is x and layer_of(0.5).eval()(x) is x and rows.Dropout(0.5).eval()(x) is x
    net, _ = network()
    x, labels = torch.ones(3, 1, 8, 8), torch.eye(3)
    assert torch.equal(net.eval()(x, 1.0, labels), net(x, 1.0, labels)) and net.row_draws.key.tolist() == [0, 0, 0, 1]


def test_a_network_by_itself_draws_from_torch():
    """One that attach_row_draws() was not called for, as in a notebook: masks are nn.Dropout's, and follow torch's random state."""
    x = torch.randn(8, 4, 3, generator=misc.generator('x'))
    with misc.seeded('step'):
        found = rows.Dropout(0.4)(x)
    with misc.seeded('step'):
        assert torch.equal(found, nn.Dropout(0.4)(x))


@pytest.mark.parametrize('p', [-0.1, 1, math.nan])
def test_probabilities_that_are_none_are_refused(p):
    with pytest.raises(ValueError, match='must be 0 or more and below 1'):
        rows.Dropout(p)


# ---- cuts


@pytest.mark.parametrize('shape', [[3], [5, 2], [6, 10]])
@pytest.mark.parametrize('most', [2 ** 16, 100])  # blocks of 16 rows, and of 16, 10 and 1
@pytest.mark.parametrize('law', rows.LAWS)
def test_rows_do_not_depend_on_the_cut(law, most, shape, monkeypatch):
    monkeypatch.setattr(rows, 'BLOCK_NUMBERS_CPU', most)

    def part(first, last):
        return rows.draw(torch.tensor([7, 1, first, last - first]), 2, 'x', law, 0.4, [last - first, *shape], CPU)

    whole = part(0, 35)
    assert whole.dtype == (torch.bool if law == 'keep' else torch.float32)
    for cut in ([0, 16, 32, 35], [0, 1, 2, 18, 35], [0, 15, 34, 35]):
        assert torch.equal(torch.cat([part(*pair) for pair in itertools.pairwise(cut)]), whole)
    assert len(whole.flatten(1).unique(dim=0)) == 35 or law == 'keep' and shape != [6, 10]


@pytest.mark.parametrize('share, samples', [(1, 1), (1, 3), (0.5, 1), (0.5, 4)])
def test_calls_with_more_or_fewer_rows(share, samples):
    """A call may look at some rows of a micro-batch, each several times: its draws are those of the whole batch's call."""
    def part(first, last):
        count = int((last - first) * share) * samples
        return rows.draw(torch.tensor([7, 1, first, last - first]), 2, 'x', 'keep', 0.4, [count, 6, 6], CPU)

    whole = part(0, 32)
    assert len(whole) == 32 * share * samples and len(whole.unique(dim=0)) == len(whole)
    for cut in ([0, 16, 32], [0, 4, 8, 32], [0, 2, 12, 32]):
        assert torch.equal(torch.cat([part(*pair) for pair in itertools.pairwise(cut)]), whole)


@pytest.fixture
def recorded(monkeypatch):
    """Every draw since the last clear(), in order: ((layer, name, call), values)."""
    found, draw = [], rows.draw

    def record(key, layer, name, *rest):
        found.append(((layer, name, int(key[1])), draw(key, layer, name, *rest)))
        return found[-1][1]

    monkeypatch.setattr(rows, 'draw', record)
    return found


@pytest.mark.parametrize('arch, cep', [('ddpmpp', 'gaussian'), ('adm', 'uniform')])
def test_networks_and_chains_see_the_same_masks_however_the_batch_is_cut(arch, cep, recorded):
    net, draws = network(arch, cep)
    batch = make_batch(16, torch.float32, shape=(1, 8, 8))._replace(class_labels=torch.eye(3)[torch.arange(16) % 3])
    chain = Euler(LogNormal(), weighting.edm, 16, estimator='mean', steps=2, samples=2, batch_size=8, grad=True)

    def parts(objective, cut):
        """(draws of the global batch, loss of each row) for micro-batches that end at the cut."""
        every, losses = [], []
        for first, last in itertools.pairwise(cut):
            recorded.clear()
            part = batch._replace(**{name: value[first:last] for name, value in batch._asdict().items() if torch.is_tensor(value)})
            randn = misc.Draws(3, 5, first)
            draws.begin(randn, last - first)
            losses.append(sum(objective(net, part, randn).values()))
            every.append(list(recorded))
        assert all([place for place, _ in found] == [place for place, _ in every[0]] for found in every)
        return [(place[0], torch.cat([found[i][1] for found in every])) for i, place in enumerate(every[0])], torch.cat(losses)

    for terms, cuts in (([AmbientLoss(weighting.edm), chain], [range(0, 17, 8), range(0, 17, 4), [0, 2, 6, 16]]),
                        ([AmbientLoss(weighting.edm)], [[0, 1, 7, 16], [0, 13, 16]])):
        objective = Objective(terms)
        whole, expected = parts(objective, [0, 16])
        assert {place[1] for place, _ in whole} == {'dropout', 'label', 'perturbation'}
        assert len({place for place, _ in whole}) == len(whole)  # no two draws have one key
        for cut in cuts:
            found, losses = parts(objective, list(cut))
            for (place, values), (other, masks) in zip(found, whole, strict=True):
                assert place == other and torch.equal(values, masks), place
            torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_rows_without_labels_are_perturbed_each_by_itself(recorded):
    net, draws = network()
    draws.begin(misc.Draws(0, 0), 4)
    net(torch.ones(4, 1, 8, 8), 1.0)
    assert {place[1]: len(values) for place, values in recorded} == {'dropout': 4, 'label': 4, 'perturbation': 4}


# ---- what a network is to the rest of the program


def test_attachment_leaves_no_trace():
    """Names, weights and configuration are as before; a copy, which an average is, has draws of nobody's."""
    net, draws = network()
    plain = build_network(net.config)
    assert list(net.state_dict()) == list(plain.state_dict())
    twin = copy.deepcopy(net)
    assert net.row_draws is draws and twin.row_draws is None
    layers = [module for module in twin.modules() if isinstance(module, rows.RowLayer)]
    assert len(layers) == 6 and all(layer.rows is None for layer in layers)
    before = draws.key.clone()
    twin(torch.ones(2, 1, 8, 8), 1.0, torch.eye(3)[:2])
    assert torch.equal(draws.key, before)


def test_the_gradient_is_that_of_the_masks_of_its_own_call():
    """Later calls and micro-batches do not reach back."""
    x, layer = torch.ones(4, 100, requires_grad=True), layer_of(0.5, rows=4)
    kept = layer.rows.key
    first, value = layer(x), kept.clone()
    layer.rows.next_call()
    second = layer(x)
    layer.rows.begin(misc.Draws(1, 1), 4)
    assert torch.equal(kept, value) and not torch.equal(first, second)
    first.sum().backward()
    assert torch.equal(x.grad, first)


@pytest.mark.parametrize('whole', [False, True])
def test_compiled_networks_draw_the_same(whole):
    """One graph without breaks, by the network alone as --compile does it or with its preconditioner, and no other from step to step."""
    def outputs(call):
        for step in range(3):
            draws.begin(misc.Draws(1, step, 4 * step), 4)
            yield from (call(x, 1.0, labels) for _ in range(2))

    net, draws = network()
    x, labels = torch.randn(4, 1, 8, 8, generator=misc.generator('x')), torch.eye(3)[[0, 1, 2, 0]]
    expected = list(outputs(net))
    graphs = []
    options = dict(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    if whole:
        compiled = torch.compile(net, **options)
    else:
        net.model.compile(**options)
        compiled = net
    found = list(outputs(compiled))
    assert len(graphs) == 1 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert len({tuple(out.flatten().tolist()) for out in found}) == 6
