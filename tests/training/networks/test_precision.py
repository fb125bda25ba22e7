# SPDX-License-Identifier: Apache-2.0
"""Networks in half precision: first and last layer, embeddings and statistics in float32, gradients close to those of float32, and copies
of the weights that evaluation holds."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.support import archs
from tests.support.archs import TINY
from torch_utils import misc
from torch_utils.magnitude import MPConv
from training.checkpoints.save import save_network
from training.networks import layers
from training.networks.interface import Network

UNETS = {name: f'{name}:cbase=32,cres=1|2,blocks=1,attn=4,dropout=0' for name in ('ddpmpp', 'ncsnpp', 'adm')}
EVERY = UNETS | TINY
EACH = pytest.mark.parametrize('arch', EVERY)
BF16 = torch.bfloat16


def network(arch, dtype=torch.float32, **others):
    net = archs.network(EVERY[arch], **others)
    net.compute_dtype = dtype
    return net


def batch(count=4):
    """x, sigma, labels."""
    draw = lambda name, *size: torch.randn(*size, generator=misc.generator(name))
    return draw('x', count, 2, 8, 8), draw('sigma', count).exp(), torch.eye(3)[torch.arange(count) % 3]


def inputs_of(net, *args):
    """[(module, first input)] of every module within the network, in the order of the calls."""
    seen = []
    note = lambda module, given: seen.append((module, given[0]))
    hooks = [module.register_forward_pre_hook(note) for module in net.model.modules() if module is not net.model]
    net(*args)
    for hook in hooks:
        hook.remove()
    return seen


@EACH
def test_the_input_keeps_its_noise(arch):
    """c_in x rounded to bfloat16 lost 43 % of the noise at sigma 0.002; the first layer is given all of it."""
    net, x, sigma = network(arch, BF16), batch()[0], 0.002
    x = 0.5 * x.sign() + sigma * torch.randn(x.shape, generator=misc.generator('noise'))
    with torch.no_grad():
        first = next(seen for _, seen in inputs_of(net, x, sigma) if seen.ndim == 4)
    c_in = net.coefficients(torch.full([1, 1, 1, 1], sigma))[2]
    lost = float((first[:, :2].double() - c_in * x).std() / (c_in * sigma))
    assert lost < 1e-4, f'{lost:.0%} of the noise is lost'


@EACH
def test_ends_and_embeddings_are_float32(arch):
    """All that sees the image, the noise level or the class, and the last layer; the layers between are in bfloat16, and are known."""
    net, (x, sigma, labels) = network(arch, BF16), batch()
    with torch.no_grad():
        seen = inputs_of(net, x, sigma, labels)
    inner = set(net.model.inner_layers())
    weighted = [(module, given) for module, given in seen if isinstance(module, (layers.Castable, MPConv)) and module.weight is not None]
    assert inner and all((given.dtype == BF16) == (module in inner) for module, given in weighted)
    assert weighted[-1][1].dtype == torch.float32 and net.model(x, sigma, labels).dtype == torch.float32


def gradient(net, x, sigma, labels):
    """The gradient of EDM's loss, all parameters in a row."""
    net.zero_grad()
    weight = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
    (weight[:, None, None, None] * (net(x, sigma, labels) - x) ** 2).mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


# The relative error of gradients in bfloat16, which rounds each value by up to 2^-9. Measured: ddpmpp 2.0 %, ncsnpp 2.6 %, adm 1.4 %, dit
# 0.3 %, vit 0.6 %, uvit 0.7 %, edm2 0.7 %.
BOUND = {'ddpmpp': 0.03, 'ncsnpp': 0.04, 'adm': 0.025, 'dit': 0.01, 'vit': 0.01, 'uvit': 0.01, 'edm2': 0.01}


@EACH
def test_gradients_are_close_to_those_of_float32(arch):
    net, inputs = network(arch), batch(8)
    exact = gradient(net, *inputs)
    net.compute_dtype = BF16
    error = (gradient(net, *inputs) - exact).norm() / exact.norm()
    assert 1e-4 < error < BOUND[arch]


@EACH
def test_held_weights_give_the_same_bits(arch, tmp_path):
    """In evaluation alone; the state dict and the files stay those of float32, a copy of the network has them too."""
    net, (x, sigma, labels) = network(arch, BF16), batch()
    state, digest = {name: value.clone() for name, value in net.state_dict().items()}, misc.state_digest(net)
    with torch.no_grad():
        expected = net(x, sigma, labels)
        trained = net.train()(x, sigma, labels)
        net.eval().model.hold_weights(BF16)
        assert torch.equal(net(x, sigma, labels), expected)
        assert torch.equal(copy.deepcopy(net)(x, sigma, labels), expected)
        for layer in net.model.inner_layers():
            layer.weight.zero_()  # is not read any more, but by training
        assert torch.equal(net(x, sigma, labels), expected) and not torch.equal(net.train()(x, sigma, labels), trained)
        net.load_state_dict(state)
        net.eval().model.hold_weights(None)
        assert torch.equal(net(x, sigma, labels), expected) and misc.state_digest(net) == digest
    net.model.hold_weights(BF16)
    assert list(net.state_dict()) == list(state) and all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    save_network(net, tmp_path / 'held')
    net.model.hold_weights(None)
    save_network(net, tmp_path / 'plain')
    assert (tmp_path / 'held/model.safetensors').stat().st_size == (tmp_path / 'plain/model.safetensors').stat().st_size


def test_group_norm_of_half_precision_accumulates_in_float32():
    """torch's kernel for bfloat16 beside parameters of float32 gives what a cast before and after does, within the last bit of the result;
    sums in bfloat16 of values around 30 would be off by tenths."""
    x = (30 + torch.randn(2, 64, 16, 16, generator=misc.generator('x'))).to(BF16)
    norm = layers.GroupNorm(64)
    norm.weight.data, norm.bias.data = (torch.randn(64, generator=misc.generator(name)) for name in ('weight', 'bias'))
    exact = F.group_norm(x.float(), 16, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(norm(x).float(), exact, rtol=2 ** -8, atol=1e-3)


def test_a_network_of_ones_own_is_given_the_type_that_it_computes_in():
    class Plain(Network):
        def forward(self, x, noise_labels, class_labels, augment_labels=None):
            self.seen = x.dtype
            return x

    net = network('ddpmpp', BF16)
    net.model = Plain()
    net.compute_dtype = BF16
    assert net(torch.ones(1, 2, 8, 8), 1.0).dtype == torch.float32 and net.model.seen == BF16
    net.compute_dtype = torch.float16
    net(torch.ones(1, 2, 8, 8), 1.0)
    assert net.model.seen == torch.float32  # float16 is for GPUs
