# SPDX-License-Identifier: Apache-2.0
"""Condition-embedding perturbation: its variance, when it is the identity, and that it leaves no trace in a network."""

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch

from dnnlib import UserError
from torch_utils import misc, registry
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.networks.conditioning import CEP, LabelEmbedding
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network
from training.networks.rows import RowLayer
from training.networks.unet import SongUNet

N, D = 40_000, 24


def perturbation(spec, n=N, d=D):
    """delta [n, d] that the piece adds."""
    with misc.seeded('cep', spec):
        return registry.build(spec, CEP, '--cep')(torch.zeros(n, d), RowLayer()).double()


@pytest.mark.parametrize('gamma', [0.1, 1, 5])
@pytest.mark.parametrize('d', [1, 24, 200])
@pytest.mark.parametrize('kind, share, kurtosis', [('uniform', 1 / 3, 9 / 5), ('gaussian', 1, 3)])
def test_variance_of_each_coordinate(kind, share, kurtosis, gamma, d):
    """gamma^2 / (3d) and gamma^2 / d; over coordinates to five, in each one to six standard errors."""
    delta, expected = perturbation(f'{kind}:gamma={gamma}', n=20_000, d=d), share * gamma ** 2 / d
    error = lambda n: expected * math.sqrt((kurtosis - 1) / n)
    assert abs(delta.var() - expected) < 5 * error(delta.numel())
    assert ((delta.var(dim=0) - expected).abs() < 6 * error(len(delta))).all()
    assert (delta.mean(dim=0).abs() < 6 * math.sqrt(expected / len(delta))).all()


def test_laws_and_independence_of_the_coordinates():
    uniform, gaussian = perturbation('uniform:gamma=2'), perturbation('gaussian:gamma=2')
    reach, std = 2 / math.sqrt(D), 2 / math.sqrt(D)
    assert uniform.abs().max() <= reach
    # The KS distance of 960,000 exact draws exceeds 0.0027 once in a million times.
    assert scipy.stats.kstest(uniform.flatten()[:960_000], scipy.stats.uniform(-reach, 2 * reach).cdf).statistic < 0.0027
    assert scipy.stats.kstest(gaussian.flatten()[:960_000], scipy.stats.norm(0, std).cdf).statistic < 0.0027
    for delta in (uniform, gaussian):
        assert np.abs(np.corrcoef(delta.T) - np.eye(D)).max() < 5.5 / math.sqrt(N)
    # Published lengths: the Gaussian's is about gamma, the uniform's gamma / sqrt(3).
    assert gaussian.norm(dim=1).square().mean().sqrt() == pytest.approx(2, rel=0.01)
    assert uniform.norm(dim=1).square().mean().sqrt() == pytest.approx(2 / math.sqrt(3), rel=0.01)


def test_the_formula_of_the_paper_by_the_letter():
    assert perturbation('gaussian:gamma=2,literal=true').var().item() == pytest.approx(2 / math.sqrt(D), rel=0.02)


def embedding_of(spec, dropout=0):
    with misc.seeded('embedding'):
        layer = LabelEmbedding(5, 16, dropout, bias=True, init_bias=1)
    layer.perturb = registry.build(spec, CEP, '--cep') if spec else None
    return layer


@pytest.mark.parametrize('spec', CEP)
def test_identity_in_eval_mode_and_at_gamma_zero(spec):
    labels = torch.eye(5)[torch.arange(64) % 5]
    plain = embedding_of(None)(labels)
    assert torch.equal(embedding_of(f'{spec}:gamma=0').train()(labels), plain)
    assert torch.equal(embedding_of(spec).eval()(labels), plain)
    perturbed = embedding_of(spec).train()(labels)
    assert (perturbed != plain).any(dim=1).all() and (perturbed - plain).norm(dim=1).max() < 3


@pytest.mark.parametrize('spec', CEP)
def test_dropped_labels_are_perturbed_like_others(spec):
    """After the dropout decision: the mean over a label is c(y) or c(null), and the spread about either is the same."""
    n, rate = 20_000, 0.3
    layer, labels = embedding_of(f'{spec}:gamma=0.2', dropout=rate), torch.eye(5)[torch.full([n], 2)]
    kept, null = layer.eval()(labels[:1]), layer.eval()(torch.zeros(1, 5))
    with misc.seeded('dropout', spec):
        out = layer.train()(labels).detach()
    dropped = (out - null).norm(dim=1) < (out - kept).norm(dim=1)
    assert abs(dropped.double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / n)
    expected = 0.2 ** 2 / 16 / (3 if spec == 'uniform' else 1)
    for rows, centre in [(dropped, null), (~dropped, kept)]:
        delta = out[rows] - centre
        assert delta.square().mean().item() == pytest.approx(expected, rel=0.03)
        assert delta.mean(dim=0).abs().max() < 6 * math.sqrt(expected / len(delta))


@pytest.mark.parametrize('arch', ['ddpmpp', 'adm'])
def test_a_network_keeps_its_names_configuration_and_samples(arch):
    """Switched on for training by one attribute, in either family; a copy in eval mode, as an EMA is, does not notice."""
    small = {'model_channels': 32, 'channel_mult': [1], 'num_blocks': 1, 'attn_resolutions': [], 'dropout': 0}
    config = ARCHS[arch]() | small | {'img_resolution': 8, 'img_channels': 1, 'label_dim': 3}
    with misc.seeded('net'):
        net = build_network(config)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    before, names = copy.deepcopy(net.config), list(net.state_dict())
    x, sigma, labels = torch.ones(4, 1, 8, 8), torch.ones(4), torch.eye(3)[[0, 1, 2, 0]]
    plain = net.eval()(x, sigma, labels)
    net.model.label_embedding.perturb = registry.build('uniform:gamma=3', CEP, '--cep')
    assert net.config == before and list(net.state_dict()) == names
    assert torch.equal(copy.deepcopy(net).eval()(x, sigma, labels), plain)
    with misc.seeded('step'):
        first = net.train()(x, sigma, labels)
    with misc.seeded('step'):
        again = net(x, sigma, labels)
    assert (first != plain).flatten(1).any(dim=1).all() and torch.equal(first, again)
    first.sum().backward()
    assert net.model.label_embedding.weight.grad.isfinite().all()


@pytest.mark.parametrize('spec', ['uniform:gamma=-1', 'gaussian:gamma=inf'])
def test_values_out_of_range_are_refused(spec):
    with pytest.raises(ValueError, match='gamma=.* must be 0 or more'):
        registry.build(spec, CEP, '--cep')(torch.zeros(1, 4), RowLayer())


def test_unknown_kinds_are_refused_with_the_choices():
    with pytest.raises(UserError, match='choose from gaussian, uniform'):
        registry.build('cauchy', CEP, '--cep')


# --- labels that are captions: "no label" is the empty caption

TEXT = {'encoder': 'e', 'sha256': 64 * 'a', 'pooling': 'mean', 'normalised': True, 'dim': 6, 'length': 9, 'tokens': None}


def captioned(dropout=0.0, arch='ddpmpp', text=TEXT, label_dim=6, **config):
    """A tiny network of captions, with a random label of the empty one and random weights."""
    net = build_network({'img_resolution': 8, 'img_channels': 1, 'label_dim': label_dim, 'label_dropout': dropout,
                         **ARCHS[arch](cbase=16, cres=[1], blocks=1, attn=[]), **({'text': text} if text else {}), **config})
    source = misc.generator('captioned')
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=source) * 0.1
    if text:
        net.set_null_label(torch.randn(label_dim, generator=source))
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize('arch', ['ddpmpp', 'adm'])
def test_no_label_is_the_empty_caption(arch):
    net, x = captioned(arch=arch), torch.randn(3, 1, 8, 8, generator=misc.generator('x'))
    null = net.model.label_embedding.null_label.expand(3, -1)
    expected = net(x, 2.0, null)
    for labels in (None, torch.zeros(3, 6)):
        assert torch.allclose(net(x, 2.0, labels), expected, atol=1e-5)
    own = torch.randn(3, 6, generator=misc.generator('labels'))
    mixed = net(x, 2.0, torch.cat([own[:1], torch.zeros(2, 6)]))
    assert torch.allclose(mixed[0], net(x, 2.0, own)[0], atol=1e-5) and torch.allclose(mixed[1:], expected[1:], atol=1e-5)
    assert (net(x, 2.0, own) - expected).abs().max() > 1e-3  # the labels matter
    plain = captioned(arch=arch, text=None)
    assert torch.equal(plain(x, 2.0, own), net(x, 2.0, own))  # with a label, nothing differs
    assert (plain(x, 2.0) - net(x, 2.0)).abs().max() > 1e-3


def test_dropped_captions_become_the_empty_one():
    net = captioned(dropout=1.0).train()
    seen = []
    net.model.label_embedding.embed = lambda labels: seen.append(labels) or torch.zeros(len(labels), 16)
    net(torch.zeros(4, 1, 8, 8), 1.0, torch.ones(4, 6))
    assert torch.equal(seen[0], net.model.label_embedding.null_label.expand(4, -1))


def test_the_empty_caption_is_saved_with_the_weights_of_such_networks_alone():
    names = {text is not None: {*captioned(text=text).state_dict()} for text in (None, TEXT)}
    assert names[True] - names[False] == {'model.map_label.null_label'} and names[False] < names[True]
    twin = copy.deepcopy(captioned())
    assert torch.equal(twin.model.label_embedding.null_label, captioned().model.label_embedding.null_label)
    with torch.device('meta'), misc.seeded('meta'):
        sketch = build_network(captioned().config)
    assert sketch.model.label_embedding.null_label.is_meta and sketch.text == TEXT


def test_networks_of_captions_are_saved_and_loaded(tmp_path):
    net = captioned(text={**TEXT, 'sha256': 64 * '9'})  # digits alone, which are no size
    save_network(net, tmp_path / 'net')
    found = load_network(tmp_path / 'net')
    assert found.text == net.text and torch.equal(found.model.label_embedding.null_label, net.model.label_embedding.null_label)
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(found(x, 1.0), net(x, 1.0))
    assert 'e (mean, 99999999)' in (tmp_path / 'net' / 'README.md').read_text()


@pytest.mark.parametrize('text, words', [({**TEXT, 'dim': 5}, 'its captions have labels of 5 numbers, and label_dim=6'),
                                         ({'dim': 6}, 'lacks "encoder"'), ([], 'must be an object')])
def test_impossible_records_in_a_configuration_are_refused(text, words):
    with pytest.raises(UserError, match='network configuration: "text"') as caught:
        build_network({**captioned(text=None).config, 'text': text})
    assert words in str(caught.value)


def test_captions_need_an_embedding_of_labels(monkeypatch):
    monkeypatch.setattr(SongUNet, 'label_embedding', None)
    with pytest.raises(UserError, match='captions need an embedding of labels, and SongUNet has none'):
        captioned()


@pytest.mark.parametrize('spec', ['uniform:gamma=2', 'gaussian:gamma=2'])
def test_perturbation_of_captions_and_of_sequences(spec):
    """gamma^2 / (3d) or gamma^2 / d, with d the width of a token, however many there are; applied to the empty caption too."""
    piece = registry.build(spec, CEP, '--cep')
    with misc.seeded('cep', spec):
        delta = piece(torch.zeros(2000, 7, 24), RowLayer())
    assert delta.var().item() == pytest.approx(4 / 24 / (3 if 'uniform' in spec else 1), rel=0.02)
    net = captioned(dropout=1.0).train()
    x = torch.ones(2, 1, 8, 8)
    before = net(x, 1.0, torch.ones(2, 6))
    net.model.label_embedding.perturb = piece
    with misc.seeded('cep'):
        assert (net(x, 1.0, torch.ones(2, 6)) - before).abs().max() > 1e-4
    assert torch.equal(net.eval()(x, 1.0), captioned()(x, 1.0))
