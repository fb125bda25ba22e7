# SPDX-License-Identifier: Apache-2.0
"""EDM2's U-Net: reference outputs and gradients, sizes, initial weights, magnitudes, attention, rectangles, precision, the compiler."""

import copy
import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from dnnlib import UserError
from tests.support import edm2
from torch_utils import misc, registry
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.networks import rows
from training.networks.edm2 import SIZES, Resample, mp_cat, mp_silu, mp_sum
from training.networks.interface import ARCHS
from training.networks.preconditioning import PRECONDS, build_network

COUNTS = json.loads((edm2.DATA / 'param_counts.json').read_text())['counts']
FUNCTIONS = {name.removeprefix('f.'): value for name, value in load_file(edm2.DATA / 'functions.safetensors').items()}
SMALL = {'model_type': 'EDM2UNet', 'img_resolution': 8, 'img_channels': 3, 'model_channels': 16, 'channel_mult': [1, 2], 'num_blocks': 1,
         'attn_resolutions': [4], 'channels_per_head': 16}


def draw(*shape, key='x'):
    return torch.randn(shape, generator=misc.generator(key, *shape))


def small(**config):
    """A small network whose gains are not 0, so that everything in it matters."""
    with misc.seeded('small'):
        net = build_network({**SMALL, **config})
    for p in net.parameters():
        if not p.ndim:
            p.data.fill_(0.7)
    return net.eval()


# ---- reference outputs


@pytest.mark.parametrize('name', edm2.CASES)
def test_outputs_are_the_published_ones(name):
    net, weight, io, about = edm2.case(name)
    x, sigma, labels = io['in.x'], io['in.sigma'], io.get('in.class_labels')
    near = lambda found, key, scale=1.0: torch.testing.assert_close(found, io[key], rtol=0, atol=1e-5 * max(1, scale))
    D, limit = net(x, sigma, labels), max(1, float(sigma.max()))
    assert ((D - io['out.D']).abs().amax([1, 2, 3]) <= 1e-5 * sigma.clamp(min=1)).all()
    near(weight.offset(sigma.reshape(-1, 1, 1, 1)), 'out.logvar')
    near(net(x, 0.7, labels), 'out.D_scalar_sigma_0.7')
    if labels is not None:
        near(net(x, sigma), 'out.D_no_class_labels', limit)
        near(net(x, sigma, io['in.soft_labels']), 'out.D_soft_labels', limit)
    near(net.model(io['in.F_x'], io['in.F_noise_labels'], labels), 'out.F')
    if 'rect.x' in io:
        n = len(io['rect.x'])
        near(net(io['rect.x'], sigma[:n], None if labels is None else labels[:n]), 'rect.D', limit)
    exact = net.model.double()(io['in.F_x'].double(), io['in.F_noise_labels'].double(), None if labels is None else labels.double())
    torch.testing.assert_close(exact, io['out64.F'], rtol=0, atol=1e-10)
    torch.testing.assert_close(weight.double().offset(sigma.double()).flatten(), io['out64.logvar'].flatten(), rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', edm2.CASES)
def test_names_and_heads_are_the_published_ones(name):
    net, weight, _, about = edm2.case(name)
    assert ([f'unet.{key}' for key in net.model.state_dict()] + list(weight.state_dict()), about['n_params']) == (
        list(about['state_dict']), sum(p.numel() for module in (net, weight) for p in module.parameters()))
    blocks = {f'{side}.{key}': block for side in ('enc', 'dec') for key, block in getattr(net.model, side).items()}
    assert {key: block.num_heads for key, block in blocks.items() if hasattr(block, 'num_heads')} == about['heads']


def test_layers_inside_are_the_published_ones():
    net, _, io, _ = edm2.case('edm2_latent_cond')
    found, modules = {}, dict(net.model.named_modules())
    for name in [key[4:] for key in io if key.startswith('mid.') and key[4:] in modules]:
        modules[name].register_forward_hook(lambda module, inputs, out, name=name: found.setdefault(name, out))
    found['F'] = net.model(*(lambda s: (io['in.x'] / (s ** 2 + 0.25).sqrt(), s.flatten().log() / 4, io['in.class_labels']))(
        io['in.sigma'].reshape(-1, 1, 1, 1)))
    assert len(found) == 13
    for name, out in found.items():
        torch.testing.assert_close(out, io[f'mid.{name}'], rtol=0, atol=1e-5, msg=name)


def gradients(net, weight, io):
    """(D, u, gradient of x, {name: norm}) of the reference loss."""
    x = io['in.x'].clone().requires_grad_()
    D, u = net(x, io['in.sigma'], io.get('in.class_labels')), weight.offset(io['in.sigma'].reshape(-1, 1, 1, 1))
    ((io['in.grad_cotangent'] * D).sum() + (io['in.grad_cotangent_logvar'] * u).sum()).backward()
    return D, u, x.grad, norms(net, weight)


def norms(net, weight):
    named = [(f'unet.{name}', p) for name, p in net.model.named_parameters()] + list(weight.named_parameters())
    return {name: float(p.grad.double().norm()) for name, p in named}


@pytest.mark.parametrize('name', edm2.CASES)
def test_gradients_are_the_published_ones(name):
    net, weight, io, about = edm2.case(name)
    _, _, grad, found = gradients(net, weight, io)
    torch.testing.assert_close(grad, io['out.grad_x'], rtol=0, atol=1e-5 * max(1, float(io['out.grad_x'].abs().max())))
    assert found == pytest.approx(about['grad_norms'], rel=2e-4)


def test_training_mode_is_the_published_one():
    """begin_step() changes the weights as each published forward pass in training does, and gradients belong to the changed ones."""
    net, weight, io, about = edm2.case('edm2_latent_cond')
    published = about['training']
    net.train()
    for module in (*net.modules(), weight):
        if hasattr(module, 'begin_step'):
            module.begin_step()
    D, u, grad, found = gradients(net, weight, io)
    limit = max(1, float(io['in.sigma'].max()))
    for value, key, scale in ((D, 'train.D', limit), (u, 'train.logvar', 1), (grad, 'train.grad_x', limit)):
        torch.testing.assert_close(value, io[key], rtol=0, atol=1e-5 * scale)
    assert found == pytest.approx(published['train_grad_norms'], rel=2e-4)
    state = {f'unet.{key}': p for key, p in net.model.named_parameters()} | dict(weight.named_parameters())
    assert state.keys() == published['train_post_weights'].keys()
    for key, stats in published['train_post_weights'].items():
        p = state[key].detach().double()
        assert p.flatten()[:4].tolist() == pytest.approx(stats['first4'], abs=1e-6)
        assert float(p.square().sum()) == pytest.approx(stats['sumsq'], rel=1e-6)
        if f'train.post.{key}' in io:
            torch.testing.assert_close(state[key].detach(), io[f'train.post.{key}'], rtol=0, atol=1e-6)
    after = net.eval()(io['in.x'], io['in.sigma'], io['in.class_labels'])
    torch.testing.assert_close(after, io['train.D_eval_after'], rtol=0, atol=1e-5 * limit)


@pytest.mark.slow
def test_full_size_network():
    """XS for ImageNet-512, with 125 million weights."""
    net, weight, io, _ = edm2.case('formula_edm2_img512_xs')
    D = net(io['in.x'], io['in.sigma'], io['in.class_labels'])
    torch.testing.assert_close(D, io['out.D'], rtol=0, atol=1e-5 * max(1, float(io['in.sigma'].max())))
    torch.testing.assert_close(weight.offset(io['in.sigma'].reshape(-1, 1, 1, 1)), io['out.logvar'], rtol=0, atol=1e-5)


@pytest.mark.parametrize('dtype, suffix, atol', [(torch.float32, '', 2e-6), (torch.float64, '.f64', 1e-7)])
def test_published_functions(dtype, suffix, atol):
    """Resampling filters are in float32."""
    a, a2, b = (FUNCTIONS[name].to(dtype) for name in ('a', 'a2', 'b'))
    found = {'mp_silu': mp_silu(a, True), **{f'mp_sum_{t}': mp_sum(a, a2, t) for t in (0.3, 0.5)},
             **{f'mp_cat_{t}': mp_cat(a, b, t) for t in (0.5, 0.7)},
             **{f'resample_{"".join(map(str, taps))}_{way}': Resample(way == 'up', taps)(a)
                for taps in ([1, 1], [1, 3, 3, 1]) for way in ('up', 'down')}}
    for name, value in found.items():
        torch.testing.assert_close(value, FUNCTIONS[name + suffix], rtol=0, atol=atol, msg=name)


# ---- sizes, initial weights


def on_meta(name):
    """(net without memory for its weights, published facts)."""
    with torch.device('meta'):
        return build_network({'model_type': 'EDM2UNet', **COUNTS[name]['kwargs']}).eval(), COUNTS[name]


@pytest.mark.parametrize('name', COUNTS)
def test_published_sizes(name):
    """Parameters, names and shapes."""
    net, about = on_meta(name)
    own = 128  # of the published network's weight of u(sigma)
    assert sum(p.numel() for p in net.parameters()) == about['n_params'] - own
    shapes = [(f'unet.{key}', value.shape) for key, value in net.model.state_dict().items()]
    shapes += [('logvar_fourier.freqs', [own]), ('logvar_fourier.phases', [own]), ('logvar_linear.weight', [1, own])]
    text = '\n'.join(f'{key} {tuple(shape)}' for key, shape in shapes)
    assert hashlib.sha256(text.encode()).hexdigest() == about['state_dict_keys_sha256']


@pytest.mark.parametrize('name', [name if name == 'edm2-img512-s' else pytest.param(name, marks=pytest.mark.slow) for name in COUNTS])
def test_published_amounts_of_work(name):
    """Multiply-accumulates of matrix products and convolutions, for one image."""
    net, about = on_meta(name)
    with torch.device('meta'), FlopCounterMode(display=False) as counted:
        net(torch.zeros(1, net.img_channels, 64, 64), torch.ones(1), torch.zeros(1, net.label_dim))
    # The published code resamples by convolutions with 2x2 kernels; means and repetitions do not count here.
    resampling = 19200 * about['kwargs']['model_channels']
    assert counted.get_total_flops() == 2 * (about['macs_matmul_conv'] - resampling)


@pytest.mark.parametrize('size, channels', SIZES.items())
def test_the_key_size(size, channels):
    assert registry.build(f'edm2:size={size}', ARCHS)() == registry.build(f'edm2:cbase={channels}', ARCHS)() == {
        'model_type': 'EDM2UNet', 'model_channels': channels}


def test_initial_weights_have_the_published_spread():
    golden = json.loads((edm2.DATA / 'init_stats.json').read_text())
    with misc.seeded('initial weights'):
        net = build_network({'model_type': 'EDM2UNet', **golden['kwargs']})
    for name, value in net.model.state_dict().items():
        known = golden['params'][f'unet.{name}']
        assert list(value.shape) == known['shape']
        if not known['std']:
            assert not value.any()
        elif name.endswith('weight'):
            assert float(value.std()) == pytest.approx(1, abs=5 * math.sqrt(0.5 / value.numel()))
            assert abs(float(value.mean())) < 5 / math.sqrt(value.numel())
    freqs, phases = net.model.emb_fourier.freqs, net.model.emb_fourier.phases
    assert float(freqs.std()) == pytest.approx(2 * math.pi, rel=0.4) and phases.max() <= 2 * math.pi
    assert 0 <= phases.min() < 1 and phases.max() > 5
    x, sigma = draw(2, 4, 16, 16), torch.tensor([0.3, 5.0])
    c_skip = (0.25 / (sigma ** 2 + 0.25)).reshape(-1, 1, 1, 1)
    assert torch.equal(net(x, sigma, torch.eye(20)[:2]), c_skip * x)  # all gains are 0


# ---- magnitudes


def test_activations_keep_unit_variance():
    """Of a fresh network, in which emb_gain is 0: at the output of every block, whatever the size of its weights."""
    with misc.seeded('magnitudes'):
        net = build_network({**SMALL, 'model_channels': 64, 'label_dim': 5, 'img_resolution': 16, 'channel_mult': [1, 2],
                             'attn_resolutions': [8], 'channels_per_head': 32}).eval()
    for name, p in net.named_parameters():
        p.data.mul_(1 + 10 * (len(name) % 3))
    found = {}
    for name, module in net.model.named_modules():
        if name.startswith(('enc.', 'dec.', 'emb_')) and name.count('.') <= 1:
            module.register_forward_hook(lambda module, inputs, out, name=name: found.update({name: float(out.square().mean())}))
    net(draw(16, 3, 16, 16) * 1.2, torch.ones(16), torch.eye(5)[torch.arange(16) % 5])
    assert len(found) == 14 and all(0.6 < value < 1.3 for value in found.values()), found  # padding takes a little


@pytest.mark.parametrize('t', [0.0, 0.3, 0.5, 1.0])
def test_sums_and_concatenations(t):
    a, b = draw(50, 8, 6, 6, key='a'), draw(50, 24, 6, 6, key='b')
    assert mp_sum(a, draw(50, 8, 6, 6, key='c'), t).square().mean() == pytest.approx(1, abs=0.03)
    both = mp_cat(a, b, t)
    assert both.square().mean() == pytest.approx(1, abs=0.03)
    first, second = both[:, :8].square().sum(), both[:, 8:].square().sum()
    assert float(first / (first + second)) == pytest.approx((1 - t) ** 2 / ((1 - t) ** 2 + t ** 2), abs=0.01)
    assert mp_silu(draw(100_000), True).square().mean() == pytest.approx(1, abs=0.02)


def test_activations_are_clipped():
    net = small(clip_act=0.5)
    outputs = []
    for block in net.model.dec.values():
        block.register_forward_hook(lambda module, inputs, out: outputs.append(float(out.abs().max())))
    net(draw(2, 3, 8, 8), torch.ones(2))
    assert outputs and all(value == 0.5 for value in outputs)


# ---- attention, resampling, refusals


def test_levels_narrower_than_a_head_have_no_attention():
    """As published, also where it is asked for; a smaller channels_per_head gives it back."""
    heads = lambda **config: [block.num_heads for block in small(attn_resolutions=[8, 4], **config).model.dec.values()]
    assert heads(channels_per_head=64) == [0] * 7
    assert heads(channels_per_head=32) == [1, 0, 1, 1, 0, 0, 0] and heads(channels_per_head=8) == [4, 0, 4, 4, 0, 2, 2]
    assert [block.num_heads for block in small(attn_resolutions=[]).model.dec.values()] == [2, 0, 0, 0, 0, 0, 0]


def test_the_command_line_tells_where_attention_is_missing(capsys):
    registry.build('edm2:cbase=16,cres=1|2|4,channels_per_head=64', ARCHS)()
    assert capsys.readouterr().out == ('Note: --arch=edm2: levels of 16, 32 channels are narrower than a head of attention '
                                       '(channels_per_head=64), and have none\n')
    for spec in ('edm2:size=xxs', 'edm2:cbase=16,channels_per_head=16'):
        registry.build(spec, ARCHS)()
    assert not capsys.readouterr().out


@pytest.mark.parametrize('config, said', [
    ({'model_channels': 24, 'channels_per_head': 9}, '48 channels cannot be divided into 5 heads'),
    ({'channels_per_head': 0}, 'channels_per_head=0 must be 1 or more'), ({'clip_act': -1}, 'clip_act=-1 must be above 0, or 0'),
    ({'clip_act': None}, 'clip_act=None must be'), ({'res_balance': 1.2}, 'res_balance=1.2 must be from 0 to 1'),
    ({'resample_filter': [1, 2, 1]}, r'resample_filter=\[1, 2, 1\] must have an even number of taps'),
    ({'resample_filter': []}, 'resample_filter'), ({'resample_filter': [1, -1]}, 'whose sum is not 0'),
    ({'channel_mult_emb': 0}, 'channel_mult_emb=0 must be 1 or more'), ({'img_resolution': [8, 9]}, 'multiple of 2'),
    ({'num_blocks': 0}, r'num_blocks=0 \(blocks\)'), ({'dropout': 1}, 'dropout=1')])
def test_impossible_values_are_refused(config, said):
    with pytest.raises(UserError, match=said) as error:
        build_network({**SMALL, **config})
    assert '\n' not in error.value.message


@pytest.mark.parametrize('spec, said', [
    ('edm2:size=huge', 'size=huge is unknown; choose from xxs, xs, s, m, l, xl, xxl'),
    ('edm2:size=xs,cbase=64', 'size=xs and cbase=64 both set'), ('edm2:size=1', '"size" must be a word'),
    ('edm2:channels=1', '"edm2" has no key "channels"; it takes size=s, cbase=192')])
def test_sizes_that_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        registry.build(spec, ARCHS, '--arch')()


# ---- rectangles, labels, further channels


@pytest.mark.parametrize('taps', [[1, 1], [1, 3, 3, 1]])
def test_transposed_network_gives_transposed_output(taps):
    """A 8x16 network whose kernels are transposed is the 16x8 network: no place of the code mixes up height and width."""
    wide, tall = (small(img_resolution=size, attn_resolutions=[attn], img_channels=5, resample_filter=taps)
                  for size, attn in (([8, 16], 4), ([16, 8], 8)))
    assert '8x16_block0' in wide.model.enc and '4x8_in0' in wide.model.dec and wide.model.enc['4x8_block0'].num_heads == 2
    rename = lambda key: key.replace('8x16_', '16x8_').replace('4x8_', '8x4_')
    tall.load_state_dict({rename(key): value.mT if value.ndim == 4 else value for key, value in wide.state_dict().items()})
    x, sigma = draw(2, 5, 8, 16), torch.tensor([0.2, 1.0])
    torch.testing.assert_close(tall(x.mT, sigma), wide(x, sigma).mT, rtol=0, atol=1e-5)


def test_one_row_of_labels_serves_all_images():
    net = small(label_dim=4, augment_dim=9)
    x, sigma = draw(3, 3, 8, 8), torch.tensor([0.2, 1.0, 3.0])
    row = torch.eye(4)[[2]]
    torch.testing.assert_close(net(x, sigma, row), net(x, sigma, row.expand(3, -1)), rtol=0, atol=1e-6)
    assert torch.equal(net(x, sigma), net(x, sigma, torch.zeros(1, 4)))
    assert not torch.allclose(net(x, sigma), net(x, sigma, row), atol=1e-3)


def test_without_augmentation_the_network_is_the_published_one():
    """Also with augment_dim, whose labels are 0 or left out then."""
    plain, augmented = small(), small(augment_dim=9)
    missing, unexpected = augmented.load_state_dict(plain.state_dict(), strict=False)
    assert sorted(missing) == ['model.augment_gain', 'model.emb_augment.weight'] and not unexpected
    x, sigma = draw(2, 3, 8, 8), torch.tensor([0.2, 1.0])
    assert torch.equal(augmented(x, sigma), plain(x, sigma)) and torch.equal(augmented(x, sigma, None, torch.zeros(2, 9)), plain(x, sigma))
    assert not torch.allclose(augmented(x, sigma, None, torch.ones(2, 9)), plain(x, sigma), atol=1e-3)


def test_dropped_labels_are_no_labels():
    net, n = small(label_dim=4, label_dropout=0.25), 200
    x, labels = draw(1, 3, 8, 8).expand(n, -1, -1, -1), torch.eye(4)[torch.arange(n) % 4]
    with torch.no_grad():
        with_label, without = net(x, torch.ones(n), labels), net(x, torch.ones(n))
        with misc.seeded('label dropout'):
            D = net.train()(x, torch.ones(n), labels)
    near = lambda a, b: (a - b).abs().amax(dim=(1, 2, 3)) < 1e-5
    dropped = near(D, without)
    assert torch.equal(dropped, ~near(D, with_label)) and abs(float(dropped.float().mean()) - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / n)


def test_channels_for_the_variance():
    net = small(precond='iddpm', diffusion='cosine:steps=50')
    D, rest = net.outputs(draw(2, 3, 8, 8), torch.tensor([0.2, 1.0]))
    assert D.shape == rest.shape == (2, 3, 8, 8) and rest.abs().min() > 0


@pytest.mark.parametrize('precond', PRECONDS)
def test_its_labels_are_those_of_edm_under_every_preconditioner(precond):
    """ln(sigma) / 4: the published features distinguish nothing smooth in times up to 1000."""
    net, seen = small(precond=precond), []
    net.model.emb_fourier.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    sigma = torch.tensor([0.05, 0.7, 9.0])
    net(draw(3, 3, 8, 8), sigma)
    torch.testing.assert_close(seen[0], sigma.log() / 4)


# ---- precision, copies, recomputation, the compiler


def test_bfloat16_inside_is_close_to_float32():
    net = small(model_channels=64, channels_per_head=64)
    exact = net.model(draw(4, 3, 8, 8), torch.zeros(4), None)
    rough = net.model(draw(4, 3, 8, 8).bfloat16(), torch.zeros(4), None)
    assert rough.dtype == torch.bfloat16
    assert 1e-4 < (rough.float() - exact).square().mean().sqrt() / exact.std() < 0.03
    found = []
    for inner in (exact, rough):
        inner.float().square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        net.zero_grad()
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


def test_float16_parameters_are_close_to_float32():
    """As a network of a published pickle has them; only the quotients of its gains are rounded anew."""
    net = small(label_dim=4)
    for number, gain in enumerate(p for p in net.parameters() if not p.ndim):
        gain.data.fill_(0.5 + 0.07 * number)
    half = copy.deepcopy(net).half()
    net.load_state_dict(half.state_dict())
    x, sigma, labels = draw(2, 3, 8, 8), torch.tensor([0.2, 1.0]), torch.eye(4)[:2]
    difference = (half(x, sigma, labels) - net(x, sigma, labels)).abs().max()
    assert 1e-5 < difference < 2e-3 and half(x, sigma, labels).dtype == torch.float32


def test_a_saved_network_is_the_same(tmp_path):
    net = small(label_dim=4, channel_mult_emb=3, clip_act=0, resample_filter=[1, 3, 3, 1])
    save_network(net, tmp_path / 'net')
    loaded, x, sigma = load_network(tmp_path / 'net'), draw(2, 3, 8, 8), torch.tensor([0.2, 1.0])
    assert loaded.config == net.config and torch.equal(loaded(x, sigma), net(x, sigma))


def test_a_copy_gives_the_same_output():
    net = small(label_dim=4)
    x, sigma = draw(2, 3, 8, 8), torch.tensor([0.2, 1.0])
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x, sigma), net(x, sigma))
    twin.model.begin_step()
    assert not torch.equal(twin.model.out_conv.weight, net.model.out_conv.weight)


TRAINED = {'label_dim': 2, 'augment_dim': 9, 'dropout': 0.3, 'label_dropout': 0.2}


def test_recomputed_blocks_give_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        net = small(**TRAINED).train()
        net.model.checkpointing = checkpointing
        rows.attach_row_draws(net).begin(misc.Draws(0, 1, 0), 2)
        net(draw(2, 3, 8, 8), torch.tensor([0.3, 3.0]), torch.eye(2), torch.ones(2, 9)).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and all(grad.any() for grad in found[0])


@pytest.mark.slow
def test_network_is_one_graph_for_the_compiler():
    net = small(**TRAINED).train()
    args = draw(2, 3, 8, 8), torch.tensor([0.3, 3.0]), torch.eye(2), torch.zeros(2, 9)
    compiled = torch.compile(net, fullgraph=True, backend='eager')
    with misc.seeded('dropout'):
        expected = net(*args)
    with misc.seeded('dropout'):
        torch.testing.assert_close(compiled(*args), expected)
