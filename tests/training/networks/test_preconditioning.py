# SPDX-License-Identifier: Apache-2.0
"""The denoisers: published networks reproduced, identities of the formulas, configurations that rebuild a network, refusals."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dnnlib import UserError
from tests.support import GOLDEN
from torch_utils import misc
from training.networks.preconditioning import PRECONDS, build_network

DATA = GOLDEN / 'networks'
CASES = sorted(path.parent.name for path in DATA.glob('*/case.json'))
SMALL = {'model_type': 'SongUNet', 'img_resolution': 8, 'img_channels': 2, 'model_channels': 16, 'channel_mult': [1, 2],
         'num_blocks': 1, 'dropout': 0.0}


def formula_weights(net):
    """Fills parameter j, element i with a hash of (i, j): weights that need no file."""
    for j, (name, p) in enumerate(net.named_parameters()):
        h = np.arange(p.numel(), dtype=np.uint32) * np.uint32(2654435761) + np.uint32((j * 97654321 + 12345) % 2 ** 32)
        for shift, factor in ((16, 2246822519), (13, 3266489917)):
            h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
        u = (h ^ (h >> np.uint32(16))) / 2 ** 32
        if p.ndim >= 2:
            values = (2 * u - 1) * math.sqrt(3 / p[0].numel())
        else:
            values = 0.2 * (u - 0.5) + ('norm' in name and name.endswith('weight'))
        p.data.copy_(torch.from_numpy(values.astype(np.float32)).reshape(p.shape))


def golden(name):
    """(network in eval mode with the case's weights, case, tensors)."""
    case = json.loads((DATA / name / 'case.json').read_text())
    io = load_file(DATA / name / 'io.safetensors')
    precond = case['precond'].removesuffix('Precond').lower()
    net = build_network(case['config'] | ({} if precond == 'edm' else {'precond': precond})).eval()
    if case['weights'] == 'formula':
        formula_weights(net)
        net.load_state_dict({key[7:]: value for key, value in io.items() if key.startswith('buffer.')}, strict=False)
    else:
        net.load_state_dict(load_file(DATA / name / 'model.safetensors'))
    return net, case, io


def small(precond='edm', **config):
    """A small network whose output layers are not zero."""
    with misc.seeded('small'):
        net = build_network(SMALL | ({} if precond == 'edm' else {'precond': precond}) | config)
        for p in net.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return net.eval()


@pytest.mark.parametrize('name', CASES)
def test_published_network_is_reproduced(name):
    """D with and without labels, at one sigma for all, the raw F, and gradients, at the published noise floor."""
    net, case, io = golden(name)
    if 'param_order' in case:
        assert [key for key, _ in net.named_parameters()] == case['param_order']
    assert sum(p.numel() for p in net.parameters()) == case['n_params']
    x, sigma = io['in.x'].requires_grad_(), io['in.sigma']
    labels, augment = io.get('in.class_labels'), io.get('in.augment_labels')
    limit = 2e-5 * sigma.clamp(min=1).reshape(-1, 1, 1, 1)
    D = net(x, sigma, labels, augment)
    assert D.dtype == torch.float32
    assert ((D - io['out.D']).abs() <= limit).all()
    for key, args in {'out.D_no_class_labels': (None, augment), 'out.D_no_augment_labels': (labels,)}.items():
        if key in io:
            assert ((net(x, sigma, *args) - io[key]).abs() <= limit).all(), key
    if 'out.D_scalar_sigma_0.7' in io:
        torch.testing.assert_close(net(x, torch.tensor(0.7), labels, augment), io['out.D_scalar_sigma_0.7'], rtol=0, atol=2e-5)
    if 'out.F' in io:
        F_x = net.model(io['in.F_x'], io['in.F_noise_labels'], labels, augment)
        torch.testing.assert_close(F_x, io['out.F'], rtol=0, atol=2e-5)
    if 'in.grad_cotangent' in io:
        (io['in.grad_cotangent'] * D).sum().backward()
        torch.testing.assert_close(x.grad, io['out.grad_x'], rtol=1e-4, atol=2e-5 * float(io['out.grad_x'].abs().max()))
        for key, p in net.named_parameters():
            assert float(p.grad.double().norm()) == pytest.approx(case['grad_norms'][key], rel=1e-4, abs=1e-12), key


def test_every_kind_of_network_is_among_the_published_cases():
    kinds = {(json.loads((DATA / name / 'case.json').read_text())['precond']) for name in CASES}
    assert kinds == {'EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond'} and len(CASES) == 13


def test_published_ambient_model_is_reproduced():
    folder = DATA / 'hf_ambient_laws'
    net = build_network(json.loads((folder / 'config.json').read_text())).eval()
    net.load_state_dict(load_file(folder / 'model.safetensors'))
    io = load_file(folder / 'io.safetensors')
    limit = 2e-5 * io['sigma'].clamp(min=1).reshape(-1, 1, 1, 1)
    assert ((net(io['x'], io['sigma']) - io['D']).abs() <= limit).all()
    D = net(io['x'], io['sigma'], augment_labels=io['augment_labels'])
    assert ((D - io['D_with_augment_labels']).abs() <= limit).all()


# The formulas

SIGMA = torch.logspace(-4, 3, 50, dtype=torch.float64).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize('sigma_data', [0.5, 1.3])
def test_edm_coefficients_keep_unit_variance(sigma_data):
    net = small(sigma_data=sigma_data)
    c_skip, c_out, c_in, c_noise = net.coefficients(SIGMA)
    weight = (SIGMA ** 2 + sigma_data ** 2) / (SIGMA * sigma_data) ** 2
    ones = torch.ones_like(SIGMA)
    torch.testing.assert_close(c_in ** 2 * (SIGMA ** 2 + sigma_data ** 2), ones)
    torch.testing.assert_close(weight * c_out ** 2, ones)
    torch.testing.assert_close(c_skip ** 2 * SIGMA ** 2 + (1 - c_skip) ** 2 * sigma_data ** 2, c_out ** 2)
    torch.testing.assert_close(c_noise, SIGMA.log() / 4)


@pytest.mark.parametrize('sigma', [0.01, 0.5, 20.0])
def test_edm_loss_of_a_silent_network_is_one(sigma):
    """With F = 0 and data of std sigma_data the weighted squared error is 1 per element at every sigma."""
    net = small()
    for p in net.model.dec['8x8_aux_conv'].parameters():
        p.data.zero_()
    y = 0.5 * torch.randn(1000, 2, 8, 8, generator=misc.generator('y'))
    x = y + sigma * torch.randn(y.shape, generator=misc.generator('noise'))
    with torch.no_grad():
        loss = (sigma ** 2 + 0.25) / (sigma * 0.5) ** 2 * (net(x, torch.tensor(sigma)) - y) ** 2
    assert float(loss.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / y.numel()))


def test_vp_sigma_and_its_inverse():
    net, _, io = golden('vp_ddpmpp')
    t = torch.linspace(1e-5, 1, 200, dtype=torch.float64)
    torch.testing.assert_close(net.sigma_inv(net.sigma(t)), t, rtol=1e-9, atol=0)
    # The published figures subtract 1 from an exponential in float32: sigma^2 carries an error of an ulp of 1.
    sigma = net.sigma(io['in.vp_t'].double())
    assert ((sigma ** 2 - io['out.vp_sigma'].double() ** 2).abs() <= 1.2e-7 + 1e-5 * sigma ** 2).all()
    torch.testing.assert_close(net.sigma_inv(io['out.vp_sigma']), io['out.vp_sigma_inv'], rtol=1e-5, atol=1e-7)
    assert net.sigma_min == pytest.approx(0.00100, abs=1e-5) and net.sigma_max == pytest.approx(152.167, abs=1e-3)


def test_iddpm_rounds_sigma_as_published():
    net, case, io = golden('iddpm_song')
    assert torch.equal(net.round_sigma(io['in.round_sigma_in']), io['out.round_sigma_out'])
    assert torch.equal(net.round_sigma(io['in.round_sigma_in'], return_index=True), io['out.round_sigma_index'])
    assert net.round_sigma(torch.tensor(3.0, dtype=torch.float64)).dtype == torch.float64
    assert net.sigma_min == pytest.approx(case['sigma_min'], rel=5e-4)  # published: alpha_bar in float32
    assert net.sigma_max == pytest.approx(case['sigma_max'], rel=1e-5)


def test_iddpm_levels_are_the_cosine_schedule():
    net = small('iddpm')
    assert net.sigma_max == pytest.approx(20291.17, abs=0.01) and net.sigma_min == pytest.approx(0.0064254, abs=1e-7)
    alpha_bar = torch.sin(math.pi * torch.arange(1001, dtype=torch.float64) / 2000 / 1.008) ** 2
    j = torch.arange(200, 1000)  # above this the ratio of alpha_bar is not clipped
    expected = ((1 - alpha_bar[j] / alpha_bar[1000]) / (alpha_bar[j] / alpha_bar[1000])).sqrt()
    torch.testing.assert_close(net.u[j].double(), expected, rtol=1e-5, atol=1e-9)


def test_iddpm_keeps_the_channels_for_a_variance():
    net = small('iddpm')
    x, sigma = torch.randn(3, 2, 8, 8, generator=misc.generator('x')), torch.tensor([0.1, 1.0, 10.0])
    D, rest = net.outputs(x, sigma)
    assert torch.equal(D, net(x, sigma)) and rest.shape == x.shape and rest.std() > 0
    assert small('edm').outputs(x, sigma)[1].shape[1] == 0


@pytest.mark.parametrize('precond', PRECONDS)
def test_sigma_of_every_shape_gives_the_same_denoiser(precond):
    net = small(precond)
    x = torch.randn(3, 2, 8, 8, generator=misc.generator('x'))
    D = net(x, torch.full([3], 0.7))
    for sigma in (0.7, torch.tensor(0.7), torch.full([3, 1, 1, 1], 0.7), torch.tensor(0.7, dtype=torch.float64)):
        torch.testing.assert_close(net(x, sigma), D, rtol=0, atol=1e-5)
    assert torch.equal(net(x.double(), torch.full([3], 0.7, dtype=torch.float64)), D)


def test_round_sigma_leaves_continuous_levels_alone():
    sigma = torch.rand(5, dtype=torch.float64)
    assert all(torch.equal(small(name).round_sigma(sigma), sigma) for name in ('edm', 'vp', 've'))


# Precision


def test_inner_precision_touches_only_the_correction():
    """In bfloat16 D is float32, and errs by a share of c_out F: at small sigma nearly nothing."""
    net = small()
    x = torch.randn(4, 2, 8, 8, generator=misc.generator('x'))
    sigma = torch.tensor([1e-3, 0.03, 1.0, 30.0])
    exact = net(x, sigma)
    net.compute_dtype = torch.bfloat16
    rough = net(x, sigma)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    c_out = net.coefficients(sigma)[1]
    assert ((rough - exact).abs().amax(dim=(1, 2, 3)) < 0.1 * c_out).all()


def test_float16_is_for_gpus():
    net = small(use_fp16=True)
    assert net.config['use_fp16'] is True and net.compute_dtype == torch.float16
    x = torch.ones(1, 2, 8, 8)
    assert torch.equal(net(x, torch.tensor(1.0)), small()(x, torch.tensor(1.0)))


# Configurations


@pytest.mark.parametrize('precond', PRECONDS)
def test_config_rebuilds_the_network(precond):
    given = SMALL | {'img_resolution': (8, 16), 'label_dim': 3, 'augment_dim': 9, 'units': {'offset': 1.5, 'scale': 2.0}}
    given |= {} if precond == 'edm' else {'precond': precond}
    net = build_network(given)
    assert type(net) is PRECONDS[precond]
    assert net.config == given | {'img_resolution': [8, 16]} == json.loads(json.dumps(net.config, allow_nan=False))
    again = build_network(net.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert (net.img_channels, net.img_resolution, net.label_dim, net.augment_dim) == (2, [8, 16], 3, 9)
    assert net.units == {'offset': 1.5, 'scale': 2.0} and 0 <= net.sigma_min < net.sigma_max and net.sigma_data == 0.5


def test_config_has_no_infinity():
    net = build_network(SMALL | {'sigma_max': math.inf})
    assert 'sigma_max' not in net.config and net.sigma_max == math.inf


def test_models_without_a_name_are_the_published_default():
    config = {'img_resolution': 8, 'img_channels': 1, 'model_channels': 16, 'channel_mult': [1], 'num_blocks': 1}
    with torch.device('meta'):
        kinds = {name: type(build_network(config | {'precond': name}).model).__name__ for name in PRECONDS}
    assert kinds == {'edm': 'DhariwalUNet', 'iddpm': 'DhariwalUNet', 've': 'SongUNet', 'vp': 'SongUNet'}


@pytest.mark.parametrize('change, names', [
    ({'precond': 'ddim'}, ['precond', '"ddim"', 'edm, iddpm, ve, vp']),
    ({'model_type': 'UNet'}, ['model_type', '"UNet"', 'DhariwalUNet, ', 'SongUNet']),
    ({'chanel_mult': [1]}, ['"chanel_mult"', 'channel_mult']),
    ({'beta_d': 3}, ['"beta_d"', 'sigma_data']),
    ({'encoder_type': 'none'}, ['encoder_type=none', 'standard, skip, residual']),
    ({'img_resolution': [9, 8]}, ['9x8', 'multiple of 2']),
])
def test_mistakes_in_a_config_are_named_in_one_line(change, names):
    with pytest.raises(UserError) as err:
        build_network(SMALL | change)
    assert '\n' not in err.value.message and all(name in err.value.message for name in names)


def test_missing_size_is_named():
    with pytest.raises(UserError, match='"img_channels" is missing'):
        build_network({'img_resolution': 8})


def test_labels_of_the_wrong_width_are_refused():
    net = small(label_dim=4)
    with pytest.raises(ValueError, match=r'\[2, 3\].*label_dim=4'):
        net(torch.ones(2, 2, 8, 8), torch.ones(2), torch.eye(3)[:2])


def test_no_label_is_the_zero_label():
    net = small(label_dim=4)
    x, sigma = torch.ones(2, 2, 8, 8), torch.tensor([0.5, 5.0])
    torch.testing.assert_close(net(x, sigma), net(x, sigma, torch.zeros(2, 4)), rtol=0, atol=1e-5)
    assert (net(x, sigma, torch.eye(4)[:2]) - net(x, sigma)).abs().max() > 1e-3
