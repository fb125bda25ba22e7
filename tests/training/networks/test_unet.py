# SPDX-License-Identifier: Apache-2.0
"""The U-Nets: layers against published numbers, names, sizes, initial weights, rectangles, label dropout, precision, compiler."""

import functools
import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from dnnlib import UserError
from tests.support import GOLDEN
from torch_utils import misc, registry
from training.networks import layers, unet
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network

DATA = GOLDEN / 'networks'
LAYERS = json.loads((DATA / 'layers' / 'cases.json').read_text())
COUNTS = json.loads((DATA / 'param_counts.json').read_text())
UNETS = ('adm', 'ddpmpp', 'ncsnpp')
SMALL = {'model_channels': 16, 'num_blocks': 1, 'dropout': 0.0}


@pytest.fixture(scope='module')
def layer_io():
    return load_file(DATA / 'layers' / 'io.safetensors')


def randomized(net, seed=0):
    """Gives every parameter a random value, so that layers which start at zero matter."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=misc.generator(seed, name))
            p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else noise * 0.1 + name.endswith('weight'))
    return net.eval()


@pytest.mark.parametrize('case', LAYERS, ids=lambda c: f'{c["index"]:02}-{c["cls"]}')
def test_layer_equals_published(case, layer_io):
    layer = (getattr(layers, case['cls'], None) or getattr(unet, case['cls']))(**case['kwargs']).eval()
    prefix = f'{case["index"]:02}.'
    layer.load_state_dict({k[len(prefix) + 3:]: v for k, v in layer_io.items() if k.startswith(prefix + 'sd.')})
    out = layer(*(layer_io[key] for key in (prefix + 'in0', prefix + 'in1') if key in layer_io))
    torch.testing.assert_close(out, layer_io[prefix + 'out'], rtol=0, atol=1e-5)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('count', [1, 2, 3, 4])
@pytest.mark.parametrize('shape', [(64, 16, 16), (48, 28, 28), (3, 5, 7)], ids=str)
@pytest.mark.parametrize('function', [F.silu, F.gelu, functools.partial(F.gelu, approximate='tanh')], ids=['silu', 'gelu', 'tanh-gelu'])
def test_activations_of_a_row_do_not_depend_on_its_place(function, shape, count, threads):
    x = torch.randn(8, *shape, generator=misc.generator('x'))
    threads(count)
    calls = []
    found = layers.by_row(lambda part: calls.append(len(part)) or function(part), x, training=False)
    for shift in range(1, 8):
        assert torch.equal(layers.by_row(function, x.roll(shift, 0), training=False), found.roll(shift, 0)), shift
    if shape == (64, 16, 16) and count != 3:
        assert calls == [8]  # at once, because no thread's part has numbers beyond whole vectors
    torch.testing.assert_close(found, function(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', COUNTS)
def test_paper_size_networks_have_the_published_parameters(name):
    with torch.device('meta'):
        net = build_network(COUNTS[name]['kwargs'])
    keys = '\n'.join(f'{key} {tuple(value.shape)}' for key, value in net.state_dict().items())
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]['n_params']
    assert hashlib.sha256(keys.encode()).hexdigest() == COUNTS[name]['state_dict_keys_sha256']


@pytest.mark.parametrize('arch, published', [('ddpmpp', 'ddpmpp_cifar10_uncond'), ('ncsnpp', 'ncsnpp_cifar10_uncond'),
                                             ('adm', 'adm_imagenet64_uncond_aug')])
def test_arch_presets_are_the_published_ones(arch, published):
    kwargs = COUNTS[published]['kwargs'] | {'dropout': 0.13}  # the published default of --dropout
    assert ARCHS[arch]().items() <= kwargs.items()
    assert set(kwargs) - set(ARCHS[arch]()) == {'img_resolution', 'img_channels', 'label_dim', 'augment_dim'}


def test_initial_weights_have_the_published_spread():
    golden = json.loads((DATA / 'init_stats.json').read_text())
    with misc.seeded('initial weights'):
        net = build_network(golden['kwargs'])
    for name, p in net.state_dict().items():
        if name not in golden['params']:
            continue  # buffers
        std, largest = golden['params'][name]
        if std == 0:  # biases start at 0, norm weights at 1
            torch.testing.assert_close(p.detach(), torch.full_like(p, largest), rtol=0, atol=0)
        else:
            # A uniform law's sample std has relative error sqrt(0.2 / n), on either side: five of them.
            assert abs(float(p.std()) / std - 1) < 5 * math.sqrt(0.4 / p.numel()), name
            assert float(p.abs().max()) <= std * math.sqrt(3) * (1 + 5 * math.sqrt(0.2 / p.numel())), name


def test_initial_weights_of_adm():
    """Uniform within 1/sqrt(fan_in) for weights and biases, zero at the end of branches, unit variance for the labels."""
    with misc.seeded('adm'):
        net = unet.DhariwalUNet(8, 3, 3, label_dim=50, augment_dim=9, model_channels=64, channel_mult=[1],
                                attn_resolutions=[8]).requires_grad_(False)
    block = net.enc['8x8_block0']
    for layer, fan_in in ((block.conv0, 64 * 9), (block.affine, 256), (block.qkv, 64), (net.map_layer0, 64)):
        assert float(layer.weight.std()) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05)
        assert 0.5 / math.sqrt(fan_in) < float(layer.bias.abs().max()) <= 1 / math.sqrt(fan_in)
    assert float(net.map_label.weight.std()) == pytest.approx(1, rel=0.05)
    for layer in (block.conv1, block.proj, net.out_conv, net.map_augment):
        assert not layer.weight.any()
    assert not net(torch.ones(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 50)).any()


def test_initial_weights_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    with misc.seeded(1):
        first = unet.SongUNet(8, 1, 1, embedding_type='fourier', channel_mult=[1], **SMALL)
    with misc.seeded(1):
        second = unet.SongUNet(8, 1, 1, embedding_type='fourier', channel_mult=[1], **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


# Rectangles


@pytest.mark.parametrize('arch', UNETS)
def test_rectangle_of_five_channels_trains(arch):
    net = build_network(ARCHS[arch]() | SMALL | {'img_resolution': [48, 80], 'img_channels': 5, 'channel_mult': [1, 1, 4],
                                                    'attn_resolutions': [12]})
    randomized(net)
    x = torch.randn(2, 5, 48, 80, generator=misc.generator('x'))
    D = net(x, torch.tensor([0.1, 2.0]))
    assert D.shape == x.shape
    D.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
    assert '48x80_block0' in net.model.enc and '12x20_in0' in net.model.dec
    assert net.model.enc['12x20_block0'].num_heads == 1 and net.model.enc['24x40_block0'].num_heads == 0


@pytest.mark.parametrize('arch', UNETS)
def test_transposed_network_gives_transposed_output(arch):
    """A 8x16 network whose kernels are transposed is the 16x8 network: no place of the code mixes up height and width."""
    config = ARCHS[arch]() | SMALL | {'img_channels': 2, 'model_channels': 64, 'channel_mult': [1, 1]}
    wide = randomized(build_network(config | {'img_resolution': [8, 16], 'attn_resolutions': [8]}))
    tall = build_network(config | {'img_resolution': [16, 8], 'attn_resolutions': [16]}).eval()
    weights = {key.replace('8x16_', '16x8_').replace('4x8_', '8x4_'): value.mT if value.ndim == 4 else value
               for key, value in wide.state_dict().items()}
    tall.load_state_dict(weights)
    x = torch.randn(2, 2, 8, 16, generator=misc.generator('x'))
    sigma = torch.tensor([0.2, 1.0])
    torch.testing.assert_close(tall(x.mT, sigma), wide(x, sigma).mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize('size', [12, [8, 12], [12, 8], 0])
def test_sides_that_cannot_be_halved_are_refused(size):
    with pytest.raises(ValueError, match='multiple of 8') as err:
        unet.SongUNet(size, 3, 3, channel_mult=[1, 1, 1, 1], **SMALL)
    assert '\n' not in str(err.value)


def test_unknown_choices_are_refused_with_the_choices():
    with pytest.raises(ValueError, match='encoder_type=residul is unknown; choose from standard, skip, residual'):
        unet.SongUNet(8, 3, 3, encoder_type='residul')


# Attention


@pytest.mark.parametrize('heads', [1, 2, 4])
def test_attention_is_softmax_attention_per_head(heads):
    """Against the formula softmax(q^T k / sqrt(d)) v, written out per head with the published order (head, channel, q k v)."""
    block = randomized(unet.UNetBlock(8, 8, 4, attention=True, num_heads=heads)).double()
    block.proj.weight.data.copy_(torch.eye(8)[:, :, None, None])
    block.proj.bias.data.zero_()
    x = torch.randn(2, 8, 3, 5, generator=misc.generator('x'), dtype=torch.float64)
    qkv = block.qkv(block.norm2(x)).reshape(2, heads, 8 // heads, 3, 15)
    for head in range(heads):
        q, k, v = qkv[:, head, :, 0], qkv[:, head, :, 1], qkv[:, head, :, 2]
        weight = torch.softmax(q.mT @ k / math.sqrt(8 // heads), dim=2)
        expected = (v @ weight.mT).reshape(2, -1, 3, 5)
        torch.testing.assert_close(block._attend(x).chunk(heads, dim=1)[head], expected)


def test_levels_narrower_than_a_head_have_no_attention():
    net = unet.DhariwalUNet(8, 3, 3, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8, 4])
    assert net.enc['8x8_block0'].num_heads == 0 and net.enc['4x4_block0'].num_heads == 1


# Labels


@pytest.fixture
def conditional():
    return randomized(build_network(ARCHS['ddpmpp']() | SMALL | {
        'img_resolution': 8, 'img_channels': 1, 'label_dim': 5, 'channel_mult': [1], 'label_dropout': 0.25}))


def test_dropped_label_is_no_label(conditional):
    """In training a row is either conditioned on its own label or exactly unconditional, and the share is label_dropout."""
    n = 400
    x = torch.randn(1, 1, 8, 8, generator=misc.generator('x')).expand(n, -1, -1, -1)
    labels = torch.eye(5)[torch.arange(n) % 5]
    with torch.no_grad():
        with_label, without = conditional(x, torch.ones(n), labels), conditional(x, torch.ones(n))
        with misc.seeded('label dropout'):
            D = conditional.train()(x, torch.ones(n), labels)
    near = lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)) < 1e-5
    dropped, kept = near(D, without), near(D, with_label)
    assert not near(with_label, without).any()
    assert torch.equal(dropped, ~kept)
    assert abs(float(dropped.float().mean()) - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / n)


def test_labels_are_never_dropped_outside_training(conditional):
    x, labels = torch.ones(64, 1, 8, 8), torch.eye(5)[torch.arange(64) % 5]
    assert torch.equal(conditional(x, torch.ones(64), labels), conditional(x, torch.ones(64), labels))


def test_dropout_is_for_training_only():
    net = unet.SongUNet(8, 1, 1, **SMALL | {'channel_mult': [1], 'dropout': 0.5})
    randomized(net)
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(net(x, torch.ones(1), None), net(x, torch.ones(1), None))
    net.train()
    with misc.seeded('dropout'):
        assert not torch.equal(net(x, torch.ones(1), None), net(x, torch.ones(1), None))


# Precision and compilation


@pytest.mark.parametrize('arch', UNETS)
def test_bfloat16_inside_is_close_to_float32(arch):
    net = randomized(build_network(ARCHS[arch]() | SMALL | {
        'img_resolution': 8, 'img_channels': 3, 'model_channels': 64, 'channel_mult': [1, 1], 'attn_resolutions': [8]}))
    x = torch.randn(4, 3, 8, 8, generator=misc.generator('x'))
    exact = net.model(x, torch.zeros(4), None)
    rough = net.model(x.bfloat16(), torch.zeros(4), None)
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.03  # eight bits of mantissa, several layers deep


def test_group_norm_has_float32_statistics():
    """A large mean beside a small spread would be lost to bfloat16 statistics."""
    x = (30 + torch.randn(2, 8, 16, 16, generator=misc.generator('x'))).bfloat16()
    norm = layers.GroupNorm(8)
    torch.testing.assert_close(norm(x).float(), norm(x.float()), rtol=2 ** -8, atol=1e-6)


@pytest.mark.parametrize('arch', UNETS)
def test_network_is_one_graph_for_the_compiler(arch):
    net = randomized(build_network(ARCHS[arch]() | SMALL | {
        'img_resolution': 8, 'img_channels': 3, 'label_dim': 2, 'augment_dim': 9, 'channel_mult': [1, 2],
        'attn_resolutions': [4], 'dropout': 0.3, 'label_dropout': 0.2})).train()
    x = torch.randn(2, 3, 8, 8, generator=misc.generator('x'))
    sigma, labels, augment = torch.tensor([0.3, 3.0]), torch.eye(2), torch.zeros(2, 9)
    compiled = torch.compile(net, fullgraph=True, backend='eager')
    with misc.seeded('dropout'):
        expected = net(x, sigma, labels, augment)
    with misc.seeded('dropout'):
        torch.testing.assert_close(compiled(x, sigma, labels, augment), expected)


@pytest.mark.parametrize('spec, told', [
    ('adm:blocks=0', r'num_blocks=0 \(blocks\) must be 1 or more'), ('ddpmpp:dropout=1', 'dropout=1 must be 0 or more and below 1'),
    ('ddpmpp:cbase=0', r'at each level, got \[0, 0, 0\]'), ('adm:cres=1|-2', r'at each level, got \[192, -384\]'),
    ('adm:cres=1.5|2', r'"cres" must be whole numbers with \| between them, such as 1\|2\|2, got "1.5\|2"')])
def test_sizes_that_no_network_has(spec, told):
    with pytest.raises(UserError, match=told):
        build_network(dict(img_resolution=16, img_channels=1, **registry.build(spec, ARCHS)()))
