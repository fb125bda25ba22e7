# SPDX-License-Identifier: Apache-2.0
"""Distillation on Gaussian data with linear denoisers: where the generator ends, where the gradient vanishes, and which levels count."""

import math

import pytest
import torch

from dnnlib import UserError
from torch_utils import misc, registry
from training.data.batches import Batch
from training.diffusion import ambient
from training.objective import distillation
from training.objective.distillation import DISTILLATIONS, Turns
from training.objective.loss import AmbientLoss
from training.objective.weighting import edm

SIGMA_N = 0.5
CLEAN = torch.tensor([1.0, 0.25, 0.04])  # variances; the last is far below sigma_n^2
LEVEL = 2.5


class Wiener(torch.nn.Module):
    """The exact denoiser of N(0, diag v): D = v / (v + sigma^2) x, with v = exp(w) for a learned w."""

    def __init__(self, variance):
        super().__init__()
        self.w = torch.nn.Parameter(variance.log())

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        v = self.w.exp().reshape(1, 1, 1, -1)
        return v / (v + ambient.column(sigma, x).square()) * x

    def generated(self):
        """Variance of G(z) = D(level z, level)."""
        v = self.w.detach().exp()
        return (LEVEL * v / (v + LEVEL ** 2)).square()


class Blind(Wiener):
    """A Wiener filter whose slope is wrong below sigma_n, as a network's is that was never trained there."""

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        return torch.where(ambient.column(sigma, x) > SIGMA_N, super().forward(x, sigma), 0.3 * x)


def build(spec, teacher, fake, buffer=1.0):
    teacher = teacher.requires_grad_(False)
    return registry.build(spec, DISTILLATIONS, '--distill', terms=[AmbientLoss(edm)], networks=(teacher, fake), buffer=buffer)


def make_batch(rows, draws, sigma_n=SIGMA_N, sigma=None):
    """Pairs of noisy-only data: levels log-normal above sigma_n; the images are of no use."""
    own = torch.full([rows, 1, 1, 1], float(sigma_n))
    sigma = own + (0.7 * draws('pair', [rows, 1, 1, 1])).exp() if sigma is None else torch.full_like(own, sigma)
    images = torch.full([rows, 1, 1, len(CLEAN)], math.nan)
    return Batch(images, own, sigma, draws('noise', images.shape))


def loss_of(objective, net, step, rows=256, seed=0, **batch):
    draws = misc.Draws(seed, step)
    batch = objective.redraw(make_batch(rows, draws, **batch), draws, objective.due(step))
    return objective(net, batch, draws)


def train(objective, net, steps, lr, rows=256):
    """Turns of Adam, as the training loop takes them, with a falling learning rate."""
    params = [*net.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(params, lr=lr, betas=(0.0, 0.99))
    for step in range(steps):
        for group in optimizer.param_groups:
            group['lr'] = lr * (1 - step / steps) + 1e-4
        optimizer.zero_grad()
        sum(value.mean() for value in loss_of(objective, net, step, rows).values()).backward()
        for param in objective.resting(net, step):
            param.grad = None
        optimizer.step()


def train_only(params, lr, steps, loss):
    optimizer = torch.optim.Adam(params, lr=lr, betas=(0.0, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss(step).mean().backward()
        optimizer.step()


def started(spec='rsd', teacher=Wiener):
    """(objective, generator), both at the teacher, which is exact above sigma_n."""
    net = Wiener(CLEAN)
    return build(spec, teacher(CLEAN), Wiener(CLEAN)), net


@pytest.mark.parametrize('spec', ['rsd', 'rsd:alpha=0.5', 'rsd:fake_steps=2', 'dmd'])
def test_generator_of_noisy_data_has_the_clean_covariance(spec):
    """Learned psi: the variances of the generator, the one far below sigma_n^2 = 0.25 too, become those of the clean data."""
    objective, net = started(spec)
    before = net.generated()
    assert (before / CLEAN - 1).abs().min() > 0.3
    train(objective, net, 300, 0.1)
    assert (net.generated() / CLEAN).sqrt().sub(1).abs().max() < 0.15
    assert (objective.fake.w.exp() / CLEAN).sqrt().sub(1).abs().max() < 0.15  # psi is then the teacher


def variance_in_the_end(spec, teacher=Wiener):
    """With psi exact at every step: the generator's law is known."""
    class Exact(Wiener):
        def forward(self, x, sigma, **_):
            v = net.generated().reshape(1, 1, 1, -1)
            return v / (v + ambient.column(sigma, x).square()) * x

    net = Wiener(CLEAN)
    objective = build(spec, teacher(CLEAN), Exact(CLEAN))
    train_only(net.parameters(), 0.1, 120, lambda step: loss_of(objective, net, 2 * step + 1)['generator'])
    return net.generated()


def test_levels_below_sigma_n_spoil_the_generator():
    """The published levels go down to 0.002, where a teacher of noisy data is wrong; the default ends at sigma_n."""
    assert torch.allclose(variance_in_the_end('rsd').sqrt(), CLEAN.sqrt(), rtol=0.05)
    assert torch.allclose(variance_in_the_end('rsd', Blind).sqrt(), CLEAN.sqrt(), rtol=0.05)
    assert torch.allclose(variance_in_the_end('rsd:sigma_min=0.002').sqrt(), CLEAN.sqrt(), rtol=0.05)  # with a teacher right everywhere
    assert (variance_in_the_end('rsd:sigma_min=0.002', Blind) / CLEAN).sqrt().sub(1).abs().max() > 0.3


# --- the gradient


@pytest.mark.parametrize('spec', ['rsd', 'rsd:alpha=0', 'dmd'])
def test_gradient_vanishes_where_psi_is_the_teacher(spec):
    """For every generator, row and level: f = psi is what the pull of the teacher ends at."""
    objective, net = started(spec)
    loss_of(objective, net, 1)['generator'].sum().backward()
    assert torch.equal(net.w.grad, torch.zeros(3)) and objective.fake.w.grad.abs().max() == 0
    with torch.no_grad():
        objective.fake.w += 0.1
    loss_of(objective, net, 1)['generator'].sum().backward()
    assert (net.w.grad != 0).all() and objective.fake.w.grad.abs().max() == 0  # psi is not trained in the generator's step


class Scale(torch.nn.Module):
    """G(z) = g z, in one direction."""

    def __init__(self, g):
        super().__init__()
        self.g = torch.nn.Parameter(torch.tensor(g))

    def forward(self, x, sigma, **_):
        return self.g * x / LEVEL


class Signs:
    """Latents and noise over all four pairs of signs, whose second moments are those of normal draws: quadratic losses have no error."""

    step = 1
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(4, 1, 1, 1).expand(4, 1, 1, 3)

    def __call__(self, name, shape):
        return torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(4, 1, 1, 1).expand(shape)


def pull(spec, g, v, sigma, monkeypatch):
    """dL/dg, without the division by |x - f|, for exact denoisers of variances v and g^2."""
    monkeypatch.setattr(distillation.Distillation, 'generator_loss', undivided)
    net = Scale(g)
    objective = build(spec, Wiener(torch.full([3], v)), Wiener(torch.full([3], g * g)))
    level = torch.full([4, 1, 1, 1], sigma)
    objective(net, Batch(Signs.noise, 0 * level, level, Signs.noise), Signs())['generator'].mean().backward()
    return float(net.g.grad) / 3  # three equal directions


def undivided(self, x, batch, labels):
    x_t, (teacher,) = ambient.add_noise(x, 0.0, batch.sigma, batch.noise), self.teacher
    fake = Wiener(torch.ones(3)).requires_grad_(False)
    fake.w.copy_(self.fake.w.detach())
    return self.difference(x, teacher(x_t, batch.sigma), fake(x_t, batch.sigma)).flatten(1).sum(1)


@pytest.mark.parametrize('g, v', [(0.3, 1.0), (1.5, 1.0), (0.2, 0.04), (0.5, 0.04)])
@pytest.mark.parametrize('alpha', [0.0, 1.0, 1.2])
def test_gradient_of_exact_denoisers(g, v, alpha, monkeypatch):
    """-2 g (a - b) (1 - a + alpha (a - b)) for rsd, -g (a - b) for dmd."""
    sigma = 0.7
    a, b = v / (v + sigma ** 2), g * g / (g * g + sigma ** 2)
    assert pull(f'rsd:alpha={alpha}', g, v, sigma, monkeypatch) == pytest.approx(-2 * g * (a - b) * (1 - a + alpha * (a - b)), rel=1e-4)
    assert pull('dmd', g, v, sigma, monkeypatch) == pytest.approx(-g * (a - b), rel=1e-4)


def test_alpha_above_one_has_a_second_zero(monkeypatch):
    """At g^2 = (alpha v + sigma^2) / (alpha - 1); beyond it the generator is driven away from the data."""
    v, sigma, alpha = 1.0, 0.5, 1.5
    edge = math.sqrt((alpha * v + sigma ** 2) / (alpha - 1))
    assert abs(pull(f'rsd:alpha={alpha}', edge, v, sigma, monkeypatch)) < 1e-5
    assert pull(f'rsd:alpha={alpha}', 0.8 * edge, v, sigma, monkeypatch) > 0.01  # descent lowers g
    assert pull(f'rsd:alpha={alpha}', 1.3 * edge, v, sigma, monkeypatch) < -0.01
    assert pull('rsd:alpha=1.0', 1.3 * edge, v, sigma, monkeypatch) > 0.01


def test_rsd_is_the_loss_of_sid():
    x, f, psi = (misc.Draws(0, 0)(name, [4, 1, 2, 2]) for name in 'xfp')
    objective = build('rsd:alpha=1.2', Wiener(CLEAN), Wiener(CLEAN))
    expected = -0.2 * (f - psi).square() + (f - psi) * (psi - x)
    torch.testing.assert_close(objective.difference(x, f, psi), expected)


# --- turns and levels


def test_published_levels():
    """u = 0 gives 0.002 and u = 0.8 gives 24.41, evenly in sigma^(1/7)."""
    published = lambda u: (80 ** (1 / 7) + (1 - u) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert published(0) == pytest.approx(0.002) and published(0.8) == pytest.approx(24.41, abs=0.01)
    turns, draws = Turns(0.002, 24.41, 1, 1.0), misc.Draws(0, 1)
    sigma = turns.redraw(make_batch(20_000, draws), draws).sigma.flatten().sort().values.double()
    u = torch.linspace(0, 0.8, 20_000, dtype=torch.float64)
    assert (sigma.pow(1 / 7) - published(u).pow(1 / 7)).abs().max() < 0.02


@pytest.mark.parametrize('sigma_n, buffer, least', [(0.5, 1.0, 0.5), (0.5, 1.2, 0.6), (0.0, 1.2, 0.002), (40.0, 1.0, 40.0)])
def test_levels_begin_where_the_teacher_does(sigma_n, buffer, least):
    turns, draws = Turns(0.0, 24.41, 1, buffer), misc.Draws(0, 1)
    sigma = turns.redraw(make_batch(4000, draws, sigma_n), draws).sigma
    assert sigma.shape == (4000, 1, 1, 1) and sigma.min() >= torch.tensor(least)
    assert sigma.min() < least * 1.2 and (sigma.max() > 23 or sigma_n == 40)


def test_turns():
    objective, net = started('rsd:fake_steps=2')
    assert [objective.timesteps.is_fakes(step) for step in range(6)] == [True, True, False] * 2
    assert objective.evaluations == pytest.approx((2 + 2 + 3) / 3)
    assert [list(loss_of(objective, net, step)) for step in range(3)] == [['fake'], ['fake'], ['generator']]
    assert objective.resting(net, 0) == [net.w] and objective.resting(net, 2) == [objective.fake.w]
    assert list(objective.state_dict()) == ['fake.w']  # the teacher is no part of it
    draws = misc.Draws(0, 0)
    batch = make_batch(8, draws)
    assert torch.equal(objective.redraw(batch, draws, objective.due(0)).sigma, batch.sigma)  # psi has the levels of the pairs


def test_every_parameter_has_a_gradient_in_every_step():
    """DistributedDataParallel waits for all of them."""
    objective, net = started()
    for step, (mine, other) in enumerate([(objective.fake.w, net.w), (net.w, objective.fake.w)]):
        mine.grad = other.grad = None
        with torch.no_grad():
            objective.fake.w += 0.1
        next(iter(loss_of(objective, net, step).values())).sum().backward()
        assert (mine.grad != 0).all() and torch.equal(other.grad, torch.zeros(3))


def test_psi_learns_the_generators_denoiser_from_noisy_images():
    """Its ambient loss on G + sigma_n e is least at E[x_0 | x_t] of G's law, whatever the teacher is."""
    objective, net = started()
    net.w.data += 1
    train_only(objective.parameters(), 0.1, 150, lambda step: loss_of(objective, net, 2 * step, rows=512)['fake'])
    torch.testing.assert_close(objective.fake.w.detach().exp().sqrt(), net.generated().sqrt(), rtol=0.15, atol=0.04)


def test_division_has_no_gradient_and_a_floor():
    objective, net = started()
    with torch.no_grad():
        objective.fake.w += 0.5
    draws = misc.Draws(0, 1)
    batch = make_batch(4, draws)
    x = net(LEVEL * draws('z', batch.images.shape), torch.tensor(LEVEL)).detach().requires_grad_()
    objective.generator_loss(x, batch, {}).sum().backward()
    x_t = ambient.add_noise(other := x.detach().clone().requires_grad_(), 0.0, batch.sigma, batch.noise)
    f, psi = objective.teacher[0](x_t, batch.sigma), objective.fake(x_t, batch.sigma)
    size = (other - f).detach().abs().mean((1, 2, 3))
    (objective.difference(other, f, psi).sum((1, 2, 3)) / size).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    still = torch.zeros(2, 1, 1, 3)
    silent = batch._replace(sigma=batch.sigma[:2], noise=still)
    assert objective.generator_loss(still, silent, {}).tolist() == [0, 0]


def test_learning_rate_of_psi():
    objective, net = started('rsd:fake_lr=0.5')
    assert objective.groups(net) == [{'params': [net.w]}, {'params': [objective.fake.w], 'factor': 0.5}]
    objective, net = started()
    assert objective.groups(net) == [{'params': [net.w, objective.fake.w]}]


@pytest.mark.parametrize('spec, text', [
    ('rsd:alpha=-1', 'alpha=-1 must be 0 or more'), ('dmd:level=0', 'level=0 must be positive'), ('rsd:fake_steps=0', 'fake_steps=0'),
    ('rsd:sigma_min=30', 'sigma_min=30,sigma_max=24.41'), ('rsd:fake_lr=0', 'fake_lr=0'), ('dmd:alpha=1', 'no key "alpha"')])
def test_keys_out_of_range(spec, text):
    with pytest.raises(UserError, match=text):
        build(spec, Wiener(CLEAN), Wiener(CLEAN))
