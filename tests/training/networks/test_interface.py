# SPDX-License-Identifier: Apache-2.0
"""What the interface of networks promises: recomputed blocks, times, and label tables."""

import pytest
import torch

from torch_utils import misc, registry
from training.networks import rows
from training.networks.conditioning import LabelTable
from training.networks.interface import ARCHS, Network
from training.networks.preconditioning import PRECONDS, build_network

SMALL = {'img_resolution': 8, 'img_channels': 1, 'label_dim': 3, 'model_channels': 16, 'channel_mult': [1, 1], 'num_blocks': 1,
         'attn_resolutions': [8], 'dropout': 0.3, 'label_dropout': 0.3}


def gradients(checkpointing, compiled=False, calls=2):
    """Gradients of a loss that calls the network more than once before backward(), as the consistency term does."""
    with misc.seeded('net'):
        net = build_network(ARCHS['ddpmpp']() | SMALL).train()
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
    net.model.checkpointing = checkpointing
    draws = rows.attach_row_draws(net)
    draws.begin(misc.Draws(0, 1, 0), 4)
    if compiled:
        net.model.compile()
    with misc.seeded('x'):
        x, sigma, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.eye(3)[[0, 1, 2, 0]]
    sum(net(x, sigma * (call + 1), labels).square().mean() for call in range(calls)).backward()
    return [p.grad for p in net.parameters()]


def test_recomputed_blocks_give_the_same_gradients_with_dropout():
    kept, recomputed = gradients(False), gradients(True)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed))


def test_recomputed_blocks_keep_fewer_activations():
    """Bytes that autograd keeps for the backward pass."""
    def kept(checkpointing):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            with misc.seeded('net'):
                net = build_network(ARCHS['ddpmpp']() | SMALL | {'num_blocks': 3}).train()
            net.model.checkpointing = checkpointing
            net(torch.ones(4, 1, 8, 8), torch.ones(4), torch.zeros(4, 3))
        return total
    assert kept(True) < kept(False) / 3


@pytest.mark.slow
def test_recomputed_blocks_compile():
    torch.testing.assert_close(gradients(True, compiled=True), gradients(False), rtol=1e-4, atol=1e-5)


class Clock(Network):
    """A network whose output is its noise labels."""

    takes_times = True

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0):
        super().__init__()

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        self.seen = noise_labels
        return torch.zeros(len(x), 2 * x.shape[1], *x.shape[2:])


@pytest.mark.parametrize('precond', PRECONDS)
def test_times_span_about_a_thousand(precond, monkeypatch):
    """Of every preconditioner, increasing with sigma, so that a sinusoid or a table of times distinguishes its levels."""
    monkeypatch.setitem(ARCHS, 'clock', type('Arch', (), {'network': Clock}))
    net = build_network({'img_resolution': 4, 'img_channels': 1, 'model_type': 'Clock', 'precond': precond})
    sigma = torch.logspace(-2, 1.5, 50).clamp(max=net.sigma_max)
    net(torch.zeros(50, 1, 4, 4), sigma)
    assert (net.model.seen.diff() >= 0).all() and net.model.seen.min() >= 0 and net.model.seen.max() <= 1000
    assert net.model.seen.max() - net.model.seen.min() > 350


def test_label_tables():
    table = LabelTable(3, 5)
    assert torch.equal(table(torch.eye(3)), table.weight[:3])
    assert torch.equal(table(torch.zeros(2, 3)), table.weight[[3, 3]])
    assert torch.equal(LabelTable(3, 5, null=False)(torch.zeros(2, 3)), torch.zeros(2, 5))
    dropped = LabelTable(3, 5, dropout=0.5).train()
    with misc.seeded('drop'):
        out = dropped(torch.eye(3)[[1] * 1000])
    share = (out == dropped.weight[3]).all(1).double().mean()
    assert abs(share - 0.5) < 5 * 0.5 / 1000 ** 0.5 and ((out == dropped.weight[3]) | (out == dropped.weight[1])).all()


def test_each_architecture_has_a_sentence_of_its_own():
    sentences = {name: text for name, text, _ in registry.listing(ARCHS)}
    assert all(sentences.values()) and len(set(sentences.values())) == len(sentences)
    assert 'DDPM++' in sentences['ddpmpp'] and 'NCSN++' in sentences['ncsnpp']
