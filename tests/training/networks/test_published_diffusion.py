# SPDX-License-Identifier: Apache-2.0
"""DiT and Min-SNR's ViT in the published diffusion code: losses, steps, samples and guidance of a small network each."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.support import GOLDEN
from torch_utils import misc
from training.checkpoints.load import load_weights
from training.checkpoints.published import complete
from training.data.batches import Batch
from training.diffusion import discrete, schedules
from training.networks.preconditioning import build_network
from training.objective.variational import terms_of
from training.run.build import build_objective
from training.run.config import ObjectiveConfig
from training.sampling import steppers
from training.sampling.generate import noise_levels
from training.sampling.guidance import Guided, level_at

DATA = GOLDEN / 'transformers'
SMALL = {'img_resolution': 8, 'img_channels': 4, 'label_dim': 10, 'depth': 2, 'num_heads': 4, 'precond': 'iddpm'}
DIT = {'model_type': 'DiT', 'hidden_size': 64, 'diffusion': 'linear:steps=1000', 'prediction': 'eps', **SMALL}
VIT = {'model_type': 'VisionTransformer', 'embed_dim': 64, 'num_steps': 1000, 'learned_variance': False, **SMALL}


def network(config, folder):
    net = build_network(config).eval().requires_grad_(False)
    load_weights(net, complete(config, load_file(DATA / folder / 'model.safetensors')), folder)
    return net


def one_hot(y, dtype=torch.float32):
    """Published labels -> rows; 10 is "no label"."""
    return F.one_hot(y, 11)[:, :10].to(dtype)


class Exact(torch.nn.Module):
    """The denoiser of a network in float64, where the preconditioners themselves compute D in float32."""

    def __init__(self, net):
        super().__init__()
        self.net, self.gives_variance = net.double(), net.gives_variance

    def outputs(self, x, sigma, class_labels=None, augment_labels=None):
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.net.coefficients(sigma)
        labels = torch.zeros(1, 10, dtype=torch.float64) if class_labels is None else class_labels.double()
        F_x = self.net.model(c_in * x, c_noise.double().flatten(), labels)
        return c_skip * x + c_out * F_x[:, :4], F_x[:, 4:]

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return self.outputs(x, sigma, class_labels)[0]


class Labelled:
    """A denoiser with its labels, as steppers call it; it has no begin_step, so that each call is judged by its own level."""

    def __init__(self, net, labels):
        self.net, self.labels = net, labels

    def __call__(self, x, sigma):
        return self.net(x, sigma, self.labels)

    def outputs(self, x, sigma):
        return self.net.outputs(x, sigma, self.labels)

    def round_sigma(self, sigma):
        return sigma


def losses(net, objective, io, key, diffusion, exact=True):
    """{term: [N]}, means over the elements, of recorded images, labels, timesteps and noise."""
    _, terms = build_objective(objective, net, len(io[f'{key}t']))
    dtype = torch.float64 if exact else torch.float32
    x0, noise = io[f'{key}x_start'].to(dtype), io[f'{key}noise'].to(dtype)
    sigma = diffusion.at('levels', io[f'{key}t'], x0)
    batch = Batch(x0, torch.zeros_like(sigma), sigma, noise, one_hot(io[f'{key}y']))
    found = terms(Exact(net) if exact else net, batch, misc.Draws(0, 0))
    return {name: value / x0[0].numel() for name, value in found.items()}


def near(found, expected, rtol):
    """Equal relative to the largest value."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=rtol * expected.abs().max().item())


class TestDiT:
    """Linear schedule of 1000 steps, predicted noise, learned range; guidance of three channels by 4."""

    FOLDER = DATA / 'dit' / 'dit_p2_cond_sigma_diffusion'
    IO, INFO = load_file(FOLDER / 'io.safetensors'), json.loads((FOLDER / 'case.json').read_text())
    DIFFUSION = discrete.build_diffusion(DIT['diffusion'])

    def net(self):
        return network(DIT, 'dit/dit_p2_cond_sigma')

    def test_forward_process(self):
        x_t = self.DIFFUSION.noisy(self.IO['in.x_start'], self.IO['in.t'], self.IO['in.noise'])
        torch.testing.assert_close(x_t, self.IO['q_sample'], rtol=0, atol=5e-7)

    def test_loss_is_that_of_the_hybrid_objective(self):
        """coeff=0.001, its default, is 1 / T: mse plus a bound that is divided by nothing."""
        config = ObjectiveConfig(noise=None, weight='snr', terms=terms_of('hybrid'))
        found = losses(self.net(), config, self.IO, 'in.', self.DIFFUSION)
        torch.testing.assert_close(found['denoise'], self.IO['loss.mse.f64'], rtol=1e-9, atol=0)
        torch.testing.assert_close(found['bound'], self.IO['loss.vb.f64'], rtol=1e-9, atol=0)
        torch.testing.assert_close(found['denoise'] + found['bound'], self.IO['loss.loss.f64'], rtol=1e-9, atol=0)
        found = losses(self.net(), config, self.IO, 'in.', self.DIFFUSION, exact=False)
        torch.testing.assert_close(found['denoise'], self.IO['loss.mse'], rtol=2e-5, atol=0)

    def test_gradients_of_the_loss(self):
        """In float32 like those recorded; the bound at t = 0 is then 1 % off, which moves gradients by up to 2 %."""
        net, config = self.net().requires_grad_(True), ObjectiveConfig(noise=None, weight='snr', terms=terms_of('hybrid'))
        found = losses(net, config, self.IO, 'in.', self.DIFFUSION, exact=False)
        sum(found.values()).mean().backward()
        for name, p in net.model.named_parameters():
            assert float(p.grad.norm()) == pytest.approx(self.INFO['grad_norms_mean_loss'][name], rel=1e-4), name

    def test_reverse_step(self):
        d, io = self.DIFFUSION, self.IO
        x0, t = io['in.x_start'].double(), io['in.t']
        x_t = d.noisy(x0, t, io['in.noise'].double())
        D, rest = Exact(self.net()).outputs(x_t / d.at('signal', t, x0), d.at('levels', t, x0), one_hot(io['in.y']))
        near(d.posterior_mean(D, x_t, t), io['pmv.mean.f64'], 1e-10)
        near(d.log_variance(t, x0, rest), io['pmv.log_variance.f64'], 1e-10)

    @pytest.mark.parametrize('sampler', ['ddpm', 'ddim'])
    def test_guided_samples(self, sampler):
        """Five respaced steps; the published loop carries two halves, of which the second is overwritten by the first at every call."""
        net, io = self.net(), self.IO
        assert self.INFO['timestep_map'] == discrete.kept_steps(1000, '5').tolist()
        sigmas = noise_levels(net, functools.partial(schedules.respaced, diffusion=DIT['diffusion']), 5)
        sigmas = torch.cat([self.DIFFUSION.levels[self.INFO['timestep_map']].flip(0), sigmas[-1:]])  # before rounding to float32
        exact, labels = Exact(net), one_hot(io['sample.y'][:2])
        guided = Guided(Labelled(exact, labels), Labelled(exact, None), self.INFO['cfg_scale'], channels=3)
        x = io['sample.init'].double() * (1 + sigmas[0] ** 2).sqrt()  # the published state is x / sqrt(1 + sigma^2)
        noise = iter(io['sample.noise'][:, :2].double())
        stepper = {'ddpm': functools.partial(steppers.ancestral, variance='learned'), 'ddim': steppers.ddim}[sampler]
        found = stepper(guided, x, sigmas, lambda x: next(noise))
        near(found, io[f'sample.{sampler}_cfg.f64'][:2], 1e-9)
        plain = stepper(Guided(Labelled(exact, labels), Labelled(exact, None), self.INFO['cfg_scale']), x, sigmas, torch.zeros_like)
        assert not torch.allclose(plain, found, rtol=0.1)


class TestViT:
    """iDDPM's cosine levels, M = 1000, predicted image or noise; guidance by 1.5; losses with Min-SNR's weights."""

    FOLDER = DATA / 'vit' / 'vit_p2_cond_drop_sampler_and_loss'
    IO, INFO = load_file(FOLDER / 'io.safetensors'), json.loads((FOLDER / 'case.json').read_text())

    def net(self, prediction='x0', levels=False, **config):
        """levels: those recorded, which are 5e-4 off at the low end."""
        net = network({**VIT, 'prediction': prediction, **config}, 'vit/vit_p2_cond_drop')
        if levels:
            net.u.copy_(self.IO['u'])
        return net

    def test_levels(self):
        net = self.net()
        torch.testing.assert_close(net.u, self.IO['u'], rtol=6e-4, atol=0)
        net.u.copy_(self.IO['u'])
        assert (net.sigma_min, net.sigma_max) == (self.INFO['sigma_min'], self.INFO['sigma_max'])
        assert torch.equal(net.round_sigma(self.IO['in.sigma']), self.IO['round_sigma'])
        assert torch.equal(net.round_sigma(self.IO['in.sigma'], return_index=True), self.IO['round_index'])

    @pytest.mark.parametrize('prediction', ['x0', 'eps'])
    def test_denoiser(self, prediction):
        net = self.net(prediction, levels=True)
        for i, sigma in enumerate(self.IO['in.sigma']):
            D = net(self.IO['in.x'] * (1 + sigma), sigma, one_hot(self.IO['in.y']))
            near(D, self.IO[f'D.{prediction}.{i}'], 2e-6)

    @pytest.mark.parametrize('prediction', ['x0', 'eps'])
    @pytest.mark.parametrize('kind', ['guided', 'interval'])
    def test_guidance(self, prediction, kind):
        """By times from 200 to 800; guiding the output of the network is guiding D."""
        net, io = self.net(prediction, levels=True), self.IO
        labels, guide = one_hot(io['in.y2'][:2]), lambda x, sigma: net(x, sigma, one_hot(io['in.y2'][2:]))
        for i, sigma in enumerate(io['in.sigma']):
            led = Guided(Labelled(net, labels), guide, self.INFO['guidance'], self.interval() if kind == 'interval' else (0, 1e9))
            near(led((io['in.x2'] * (1 + sigma))[:2], sigma), io[f'D_{kind}.{prediction}.{i}'][:2], 4e-6)

    def interval(self):
        low, high = self.INFO['interval']
        return level_at(low - 0.5), level_at(high + 0.5)

    @pytest.mark.parametrize('prediction', ['x0', 'eps'])
    @pytest.mark.parametrize('kind', ['guided', 'interval'])
    def test_samples(self, prediction, kind):
        """Heun's method on EDM's levels, rounded to the network's."""
        net, io = self.net(prediction, levels=True), self.IO
        levels = noise_levels(net, schedules.edm, self.INFO['num_steps'])
        assert levels[-2] == net.sigma_min
        denoise = Guided(Labelled(net, one_hot(io['in.y2'][:2])), Labelled(net, None), self.INFO['guidance'],
                         self.interval() if kind == 'interval' else (0, 1e9))
        x = io['in.latents'].double() * levels[0]
        found = steppers.heun(lambda x, sigma: denoise(x, sigma), x, levels, torch.zeros_like)  # no begin_step: each call for itself
        near(found, io[f'sample.{prediction}.{kind}'][:2], 1e-5)

    @pytest.mark.parametrize('name, prediction, weight', [
        ('x0_min_snr_5', 'x0', 'min_snr:gamma=5'), ('v_vmin_snr_5', 'v', 'min_snr:gamma=5'), ('eps_min_snr_5', 'eps', 'min_snr:gamma=5'),
        ('eps_constant', 'eps', 'snr'), ('x0_constant', 'x0', 'uniform')])
    def test_losses(self, name, prediction, weight):
        """The three Min-SNR weights are one weight of the error of D: min(1 / sigma^2, 5)."""
        net = self.net(prediction, diffusion='cosine:steps=1000').requires_grad_(True)
        (found,) = losses(net, ObjectiveConfig(noise=None, weight=weight), self.IO, 'loss.', net.own_diffusion()).values()
        expected = self.IO[f'loss.{name}.loss'].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        found.mean().backward()
        for key, p in net.model.named_parameters():
            assert float(p.grad.norm()) == pytest.approx(self.INFO['grad_norms_mean_loss'][name][key], rel=1e-4), key
