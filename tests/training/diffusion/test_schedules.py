# SPDX-License-Identifier: Apache-2.0
"""Noise levels: published values, closed forms, ranges, truncation; sigma(t) with its derivative and its inverse."""

import math

import pytest
import torch
from safetensors.torch import load_file

from dnnlib import UserError
from tests.support import GOLDEN
from torch_utils import registry
from training.diffusion import noise, schedules
from training.diffusion.discrete import build_diffusion, kept_steps
from training.networks import preconditioning

PUBLISHED = load_file(GOLDEN / 'samplers' / 'samplers.safetensors')
RANGED = {name: piece for name, piece in schedules.SCHEDULES.items() if name != 'explicit'}


@pytest.mark.parametrize('num_steps', [2, 3, 18, 256])
@pytest.mark.parametrize('name', RANGED)
def test_levels_fall_from_end_to_end(name, num_steps):
    sigmas = RANGED[name](num_steps)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (num_steps + 1,) and sigmas.device.type == 'cpu'
    assert (sigmas[1:] < sigmas[:-1]).all() and sigmas[-1] == 0
    ends = registry.parameters(RANGED[name])
    if name not in ('iddpm', 'respaced'):  # whose levels are what they are
        assert [sigmas[0].item(), sigmas[-2].item()] == pytest.approx([ends['sigma_max'], ends['sigma_min']], rel=1e-9)


@pytest.mark.parametrize('name', RANGED)
def test_the_range_is_kept(name):
    sigmas = RANGED[name](9, sigma_min=0.05, sigma_max=20.0)
    assert 0.05 * (1 - 1e-9) <= sigmas[-2] < 0.055 and 19 < sigmas[0] <= 20 * (1 + 1e-9)


@pytest.mark.parametrize('name', RANGED)
def test_a_single_step_starts_at_the_top(name):
    sigmas = RANGED[name](1)
    assert sigmas.tolist() == [RANGED[name](5)[0].item(), 0]


@pytest.mark.parametrize('name, first, last', [('edm', 80, 0.002), ('ve', 100, 0.02), ('vp', 152.167, 0.01049),
                                               ('iddpm', 80.204, 0.0064254)])
def test_published_ranges(name, first, last):
    sigmas = schedules.SCHEDULES[name](18)
    assert [sigmas[0].item(), sigmas[-2].item()] == pytest.approx([first, last], rel=1e-3)


@pytest.mark.parametrize('name', ['edm', 'vp', 've'])
def test_published_levels(name):
    """The levels at which the published sampler called its denoiser: equal to rounding."""
    calls = PUBLISHED[f'abl_euler_{name}_linear_none.sigma_calls']
    torch.testing.assert_close(schedules.SCHEDULES[name](8)[:-1], calls, rtol=1e-12, atol=0)


def test_respaced_levels_are_those_of_the_kept_timesteps():
    """The published list of 25 of 1000 and of ddim50; within a range, those of the timesteps in it."""
    levels = build_diffusion('linear').levels
    for num_steps, spacing, spec in ((25, 'even', '25'), (50, 'ddim', 'ddim50')):
        sigmas = schedules.respaced(num_steps, diffusion='linear', spacing=spacing)
        assert torch.equal(sigmas[:-1].flip(0), levels[kept_steps(1000, spec)])
    cut = schedules.respaced(7, diffusion='linear', sigma_min=levels[100].item(), sigma_max=levels[700].item())
    assert torch.equal(cut[:-1].flip(0), levels[100:701:100])


@pytest.mark.parametrize('kwargs, text', [
    ({'num_steps': 0}, '1 or more'), ({'num_steps': 1001}, 'cannot be kept'), ({'spacing': 'odd'}, 'choose from even, ddim'),
    ({'num_steps': 51, 'spacing': 'ddim'}, 'try ddim50'), ({'sigma_min': 1e6}, 'no level of cosine')])
def test_timesteps_that_cannot_be_kept_are_refused(kwargs, text):
    with pytest.raises(ValueError, match=text):
        schedules.respaced(**{'num_steps': 8} | kwargs)


def test_log_linear_steps_divide():
    sigmas = schedules.log_linear(12, sigma_min=0.1, sigma_max=51.2)[:-1]
    torch.testing.assert_close(sigmas[:-1] / sigmas[1:], torch.full([11], 512 ** (1 / 11), dtype=torch.float64))
    assert torch.equal(schedules.ve(12, sigma_min=0.1, sigma_max=51.2)[:-1], sigmas)


def test_cosine_levels_are_even_quantiles():
    """Of the law in which t is uniform."""
    law = noise.Cosine(0.002, 80.0)
    quantiles = torch.linspace(1, 0, 10, dtype=torch.float64)
    torch.testing.assert_close(schedules.cosine(10)[1:-2], law.icdf(quantiles[1:-1]), rtol=1e-12, atol=0)


def test_vp_levels_are_the_preconditioners():
    sigmas = schedules.vp(7)
    net = preconditioning.VPPrecond(img_resolution=8, img_channels=1, model_type='SongUNet', model_channels=8, channel_mult=[1],
                                    num_blocks=1, attn_resolutions=[])
    times = torch.linspace(1, 1e-3, 7, dtype=torch.float64)
    torch.testing.assert_close(sigmas[:-1], net.sigma(times), rtol=1e-10, atol=0)


def test_iddpm_levels_are_the_exact_ones():
    """The published sampler computed them in float32, which is off by 4.6e-4; the exact list is met to 1e-12."""
    exact, published = (PUBLISHED[f'iddpm_u_M1000.{name}'] for name in ('exact_float64', 'as_in_ablation_sampler'))
    inside = exact[(exact >= 0.002) & (exact <= 81)]
    torch.testing.assert_close(schedules.iddpm(len(inside))[:-1], inside, rtol=1e-12, atol=0)
    assert (published[:-1] / exact[:-1] - 1).abs().max() > 4e-4
    every = schedules.iddpm(8)[:-1]
    places = ((len(inside) - 1) / 7 * torch.arange(8)).round().long()
    torch.testing.assert_close(every, inside[places], rtol=1e-12, atol=0)
    calls = PUBLISHED['abl_euler_iddpm_linear_none.sigma_calls']
    torch.testing.assert_close(every, calls, rtol=1e-3, atol=0)  # the same places of the list


def test_iddpm_has_no_more_levels_than_it_has():
    with pytest.raises(ValueError, match='10 levels of iddpm lie between .* not enough for 11 steps'):
        schedules.iddpm(11, M=10, sigma_max=1e6)


def test_explicit_levels():
    build = lambda spec: registry.build(spec, schedules.SCHEDULES, '--schedule')
    assert build('explicit:sigmas=80|10|1|0.1')(4).tolist() == [80, 10, 1, 0.1, 0]
    assert build('explicit:sigmas=80|10|1|0.1')(None).tolist() == [80, 10, 1, 0.1, 0]
    assert build('explicit:sigmas=3')(1).tolist() == [3, 0]
    assert schedules.explicit(None, sigmas=[2, 1]).tolist() == [2, 1, 0]


@pytest.mark.parametrize('kwargs, words', [
    ({}, 'must be positive, falling'), ({'sigmas': '1|x'}, 'sigmas=1|x'), ({'sigmas': '1|2'}, 'falling'), ({'sigmas': '2|2'}, 'falling'),
    ({'sigmas': '1|0'}, 'positive'), ({'sigmas': '1|nan'}, 'positive'), ({'sigmas': 'inf|1'}, 'positive'), ({'sigmas': ''}, 'positive'),
    ({'sigmas': '2|1', 'num_steps': 3}, '2 steps, but 3'), ({'sigmas': '2|1', 'sigma_max': 1.5}, 'sigma_max=1.5'),
    ({'sigmas': '2|1', 'sigma_min': 1.5}, 'sigma_min=1.5')])
def test_explicit_levels_that_are_refused(kwargs, words):
    with pytest.raises(ValueError) as err:
        schedules.explicit(**{'num_steps': None, **kwargs})
    assert words in str(err.value) and '\n' not in str(err.value)


@pytest.mark.parametrize('kwargs', [{'num_steps': 0}, {'sigma_min': 0.0}, {'sigma_min': 80.0, 'sigma_max': 80.0}, {'sigma_max': math.inf},
                                    {'sigma_min': math.nan}, {'sigma_min': 2.0, 'sigma_max': 1.0}])
@pytest.mark.parametrize('name', sorted(RANGED.keys() - {'respaced'}))
def test_levels_that_do_not_fall_are_refused(name, kwargs):
    with pytest.raises(ValueError):
        RANGED[name](**{'num_steps': 18, **kwargs})


@pytest.mark.parametrize('name, kwargs', [('edm', {'rho': 0.0}), ('edm', {'rho': math.nan}), ('vp', {'epsilon_s': 0.0}),
                                          ('vp', {'epsilon_s': 1.0}), ('vp', {'sigma_min': 5.0}), ('iddpm', {'C_1': 1.0}),
                                          ('iddpm', {'M': 0}), ('iddpm', {'sigma_min': 1e-4, 'sigma_max': 1e-3})])
def test_keys_out_of_range_are_refused(name, kwargs):
    with pytest.raises(ValueError):
        schedules.SCHEDULES[name](8, **kwargs)


def test_names_and_keys_come_from_the_registry():
    sigmas = registry.build('vp:epsilon_s=0.01,sigma_max=50', schedules.SCHEDULES)(4, sigma_min=0.1)
    assert torch.equal(sigmas, schedules.vp(4, sigma_min=0.1, sigma_max=50, epsilon_s=0.01))
    with pytest.raises(UserError, match='"edm" has no key "M"; it takes sigma_min=0.002, sigma_max=80.0, rho=7.0'):
        registry.build('edm:M=3', schedules.SCHEDULES)


def times():
    """Every sigma(t), and VP also fitted to EDM's range, which has a negative beta_min."""
    return [schedules.Linear(), schedules.VE(), schedules.VP(), schedules.VP(sigma_min=0.002, sigma_max=80.0)]


@pytest.mark.parametrize('time', times(), ids=['linear', 've', 'vp', 'vp_fitted'])
def test_times_invert_and_differentiate(time):
    sigmas = torch.tensor([60.0, 7.0, 0.5, 0.02], dtype=torch.float64)
    t = time.time(sigmas).requires_grad_()
    torch.testing.assert_close(time.sigma(t).detach(), sigmas, rtol=1e-10, atol=0)
    slope, = torch.autograd.grad(time.sigma(t).sum(), t) if not isinstance(time, schedules.Linear) else (torch.ones(4),)
    torch.testing.assert_close(time.rate(t).detach(), slope.double(), rtol=1e-10, atol=0)
    assert time.time(torch.zeros(1, dtype=torch.float64)).tolist() == [0]


def test_vp_fits_its_ends():
    published = schedules.VP()
    assert [published.beta_d, published.beta_min] == pytest.approx([19.9, 0.1], rel=1e-9)
    fitted = schedules.VP(sigma_min=0.002, sigma_max=80.0)
    assert fitted.beta_min < 0
    ends = fitted.sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0.002, 80], rel=1e-9)
    assert fitted.rate(torch.tensor(1e-3, dtype=torch.float64)) > 0


def test_truncation_cuts_what_is_below():
    sigmas = schedules.explicit(None, sigmas='80|10|1|0.2|0.1')
    assert schedules.truncate(sigmas, 0.2).tolist() == [80, 10, 1, 0.2, 0]
    assert schedules.truncate(sigmas, 0.15).tolist() == [80, 10, 1, 0.2, 0]
    assert schedules.truncate(sigmas, 80.0).tolist() == [80, 0]
    assert schedules.truncate(sigmas[:3], 5.0).tolist() == [80, 10, 0]
    for below in (0.0, 1e-9, 0.1):
        assert torch.equal(schedules.truncate(sigmas, below), sigmas)


@pytest.mark.parametrize('stop_sigma', [80.1, -0.1, math.nan, math.inf])
def test_truncation_that_is_refused(stop_sigma):
    with pytest.raises(ValueError, match='between 0 and the highest level, 80'):
        schedules.truncate(schedules.edm(4), stop_sigma)
