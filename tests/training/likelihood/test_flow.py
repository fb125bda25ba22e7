# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods against closed forms: Gaussians, mixtures, uniform grey levels; the solver; and what must not change a result."""

import math

import pytest
import torch

from tests.support.denoisers import Mixture, unit
from tests.training.networks.test_preconditioning import small
from torch_utils import misc
from training.likelihood import flow
from training.likelihood.flow import integrate, log_likelihood

LOG_2PI = math.log(2 * math.pi)
LEVEL = 2 / 255 / 2  # half the distance of two grey levels, about 1 / 255


class Gaussian:
    """The exact denoiser of N(mean, cov) over flattened images, and its log density at a noise level."""

    def __init__(self, mean, cov):
        self.mean, self.cov = mean, cov

    def __call__(self, x, sigma, class_labels=None):
        noisy = self.cov + sigma.reshape(-1, 1, 1) ** 2 * torch.eye(len(self.cov), dtype=self.cov.dtype)
        offset = (x.flatten(1) - self.mean)[..., None]
        return (self.mean + (self.cov @ torch.linalg.solve(noisy, offset))[..., 0]).view_as(x)

    def log_p(self, x, sigma):
        noisy = self.cov + sigma ** 2 * torch.eye(len(self.cov), dtype=self.cov.dtype)
        return torch.distributions.MultivariateNormal(self.mean, noisy).log_prob(x.flatten(1))

    def sample(self, count, shape, seed=0):
        factor = torch.linalg.cholesky(self.cov)
        return (self.mean + unit(count, len(self.cov), seed=seed) @ factor.T).reshape(count, *shape)


def isotropic(dims, mean=0.0, std=0.5):
    return Gaussian(torch.full([dims], mean, dtype=torch.float64), std ** 2 * torch.eye(dims, dtype=torch.float64))


def correlated(dims, mean=0.0, seed=3):
    """Eigenvalues of the covariance from 0.01 to 1 on axes that no pixel has to itself."""
    axes, _ = torch.linalg.qr(unit(dims, dims, seed=seed))
    return Gaussian(mean * unit(dims, seed=seed + 1), axes @ torch.diag(torch.logspace(-2, 0, dims, dtype=torch.float64)) @ axes.T)


def rademacher(*shape, seed=0):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def bits(log_p, x):
    return -log_p / (x[0].numel() * math.log(2))


# --- closed forms

@pytest.mark.parametrize('mean, std', [(0.0, 0.5), (0.2, 0.5), (-0.3, 0.1), (0.0, 2.0)])
def test_gaussian_data_have_the_bits_of_the_closed_form(mean, std):
    """Wanted: 0.01; reached: 1e-3, of which nearly all is the mean that the prior does not know."""
    model = isotropic(48, mean, std)
    x = model.sample(64, [3, 4, 4])
    found = log_likelihood(model, x, probes=rademacher(64, 1, 3, 4, 4))
    expected = model.log_p(x, 0.002)
    assert abs(float(bits(found.log_p - expected, x).mean())) < 1e-3
    closed = 0.5 * math.log2(2 * math.pi * math.e * std ** 2)  # of the law, not of these images
    spread = float(bits(found.log_p, x).std() / 8)
    assert abs(float(bits(found.log_p, x).mean()) - closed) < 4 * spread + 1e-3


def test_a_prior_far_out_leaves_the_solver_alone():
    """With sigma_max high enough nothing is left but the solver's error, and that follows the tolerance."""
    model = correlated(16)
    x = model.sample(16, [1, 4, 4])
    expected = model.log_p(x, 0.002)
    errors = [float(bits(log_likelihood(model, x, sigma_max=1e5, rtol=tol, atol=tol).log_p - expected, x).abs().max())
              for tol in (1e-4, 1e-6, 1e-9)]
    assert errors[0] < 1e-3 and errors[1] < 1e-5 and errors[2] < 1e-8, errors


def test_the_prior_and_the_lowest_level_are_where_they_are_said_to_be():
    """Gaussian data of std sigma_data: exact for any sigma_max, however low, and the density is that at sigma_min."""
    model = isotropic(4, 0.0, 0.7)
    x = model.sample(8, [1, 2, 2])
    for sigma_min, sigma_max in ((0.002, 80.0), (0.3, 1.5)):
        found = log_likelihood(model, x, sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=0.7)
        torch.testing.assert_close(found.log_p, model.log_p(x, sigma_min), rtol=0, atol=1e-9)


def test_a_mixture_of_gaussians_meets_its_exact_density():
    shape = (1, 2, 2)
    means = 0.6 * unit(3, *shape, seed=1)
    weights, stds = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    model = Mixture({'gmm.weights': weights, 'gmm.means': means, 'gmm.stds': stds})
    parts = torch.arange(60) % 3
    x = means[parts] + stds[parts].reshape(-1, 1, 1, 1) * unit(60, *shape, seed=2)
    variance = stds ** 2 + 0.002 ** 2
    distance = (x[:, None] - means).square().flatten(2).sum(2)
    exact = (weights.log() - 2 * (LOG_2PI + variance.log()) - distance / (2 * variance)).logsumexp(1)
    found = log_likelihood(model, x, sigma_max=1000.0)
    assert float(bits(found.log_p - exact, x).abs().max()) < 1e-3
    coarse = log_likelihood(model, x)  # the default range: single images feel the mean that the prior does not know
    assert abs(float(bits(coarse.log_p - exact, x).mean())) < 1e-3


def test_what_is_left_out_below_sigma_min_costs_its_divergence():
    """On average over the data the bits lie above those of the clean law by KL(p(.; 0) | p(.; sigma_min)), second order here."""
    model, s = correlated(4, mean=0.3), 0.2
    x = model.sample(1000, [1, 2, 2])
    found = model.log_p(x, 0.0) - log_likelihood(model, x, sigma_min=s, rtol=1e-4, atol=1e-4).log_p
    shrink = s ** 2 / (torch.linalg.eigvalsh(model.cov) + s ** 2)
    expected = float((-(1 - shrink).log() - shrink).sum()) / 2
    assert expected > 0.1 and abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(1000)


def test_uniform_grey_levels_have_eight_bits():
    """256 levels, all as likely, filled up to a density that is uniform over an interval: 8 bits, at any sigma_min that is small."""
    low, high = -1 - LEVEL, 1 + LEVEL

    def denoise(x, sigma, class_labels=None):
        a, b = (low - x) / sigma, (high - x) / sigma
        density = lambda z: (-z ** 2 / 2).exp() / math.sqrt(2 * math.pi)
        tail = torch.special.ndtr
        return x + sigma * (density(a) - density(b)) / (tail(b) - tail(a)).clamp(min=1e-300)

    levels = torch.arange(256, dtype=torch.float64).repeat(2)
    noise = torch.rand(512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = ((levels + noise - 0.5) / 127.5 - 1).reshape(-1, 1, 1, 1)
    found = log_likelihood(denoise, x, sigma_data=1 / math.sqrt(3))
    total = float(bits(found.log_p, x).mean()) + math.log2(127.5)
    assert abs(total - 8) < 0.01, total


# --- traces

def test_one_probe_is_exact_for_a_diagonal_jacobian():
    model = isotropic(16, 0.1, 0.3)
    x = model.sample(4, [1, 4, 4])
    exact, estimated = (log_likelihood(model, x, probes=probes) for probes in (None, rademacher(4, 1, 1, 4, 4)))
    torch.testing.assert_close(estimated.log_p, exact.log_p, rtol=0, atol=1e-10)


def test_hutchinson_is_unbiased_and_more_probes_spread_less():
    model, copies = correlated(16), 256
    x = model.sample(1, [1, 4, 4]).repeat(copies, 1, 1, 1)
    exact = log_likelihood(model, x[:1], rtol=1e-4, atol=1e-4).log_p
    found = {count: log_likelihood(model, x, probes=rademacher(copies, count, 1, 4, 4), rtol=1e-4, atol=1e-4).log_p
             for count in (1, 4)}
    for values in found.values():
        assert abs(float(values.mean() - exact)) < 4 * float(values.std()) / math.sqrt(copies) + 1e-2
    assert found[1].std() > 0.1  # there was something to estimate
    assert 1.5 < float(found[1].std() / found[4].std()) < 2.7  # 2, to within the noise of two estimated stds


# --- what must not matter

def test_an_image_does_not_depend_on_those_beside_it(monkeypatch):
    """A float32 network with labels: values and number of evaluations are equal to the bit, in any company."""
    monkeypatch.setattr(misc, 'CPU_ROWS', (8, 8))  # so that the images need several calls
    net = small(label_dim=3)
    x, labels = 0.5 * unit(11, 2, 8, 8), torch.eye(3)[torch.arange(11) % 3]
    probes = rademacher(11, 2, 2, 8, 8)
    run = lambda rows: log_likelihood(net, x[rows], probes=probes[rows], class_labels=labels[rows])
    together = run(torch.arange(11))
    assert len(together.evaluations.unique()) > 1  # the images do go at paces of their own
    for rows in ([4], [10, 0], list(range(8)), [3, 2, 1, 9, 8, 7, 6, 5, 4]):
        alone = run(torch.tensor(rows))
        for name in alone._fields:
            assert torch.equal(getattr(alone, name), getattr(together, name)[rows]), (name, rows)


def by_hand(net, x, sigma_min, sigma_max, steps):
    """log p by classical Runge-Kutta steps of equal length in log sigma, and whole Jacobians: slow, and of another hand."""

    def field(x, sigma):
        D = lambda flat: net(flat.view_as(x), torch.tensor(sigma)).flatten().double()
        J = torch.autograd.functional.jacobian(D, x.flatten())
        return x - D(x.flatten()).view_as(x), x.numel() - float(J.trace())

    length, gained = math.log(sigma_max / sigma_min) / steps, 0.0
    for k in range(steps):
        level = lambda part, k=k: sigma_min * math.exp((k + part) * length)
        v1, d1 = field(x, level(0))
        v2, d2 = field(x + length / 2 * v1, level(0.5))
        v3, d3 = field(x + length / 2 * v2, level(0.5))
        v4, d4 = field(x + length * v3, level(1))
        x, gained = x + length / 6 * (v1 + 2 * v2 + 2 * v3 + v4), gained + length / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    variance = sigma_max ** 2 + 0.25
    return gained - float(x.square().sum()) / (2 * variance) - x.numel() / 2 * (LOG_2PI + math.log(variance))


@pytest.mark.parametrize('precond', ['edm', 've', 'vp', 'iddpm'])
def test_every_preconditioner_has_a_likelihood(precond):
    """Random weights are a rough field, and of no data; but what the flow does to densities is the same in either hand."""
    net = small(precond, img_resolution=4, img_channels=1).requires_grad_(False)
    x = 0.5 * unit(1, 1, 4, 4)
    found = log_likelihood(net, x, sigma_min=0.5, sigma_max=0.53, rtol=1e-4, atol=1e-4)
    # The noise labels of vp and iddpm pass through many periods of their embedding here, and iddpm's levels are steps.
    assert float(found.log_p) == pytest.approx(by_hand(net, x, 0.5, 0.53, steps=4), abs=1e-5 if precond in ('edm', 've') else 2e-2)


# --- the solver

def test_the_tableau_is_of_order_five_and_four():
    """Quadrature conditions of both formulas, consistency of the stages, and the slope of the error over the step."""
    fifth = [*flow.STAGES[-1], 0]
    fourth = [b - e for b, e in zip(fifth, flow.ERROR)]
    nodes = [0, *flow.NODES]
    for weights, order in ((fifth, 5), (fourth, 4)):
        assert [sum(b * c ** k for b, c in zip(weights, nodes)) for k in range(order)] == pytest.approx(
            [1 / (k + 1) for k in range(order)], abs=1e-14)
    assert [sum(stage) for stage in flow.STAGES] == pytest.approx(flow.NODES, abs=1e-14)
    rotation = lambda t, state, rows: torch.stack([-state[:, 1], state[:, 0] * (1 + t), torch.zeros_like(t)], dim=1)
    ends = []
    for count in (1, 2, 200):
        state, slope = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64), None
        t, step = torch.zeros(1, dtype=torch.float64), torch.full([1], 0.5 / count, dtype=torch.float64)
        for k in range(count):
            slope = rotation(t + k * step, state, None) if slope is None else slope
            state, _, slope = flow._step(rotation, t + k * step, state, slope, step, None)
        ends.append(state)
    errors = [float((end - ends[-1]).norm()) for end in ends[:2]]
    assert errors[0] / errors[1] > 2 ** 4.7


def test_rows_go_at_their_own_pace_and_arrive_together():
    """d state / dt = rate state: rates from slow to fast, errors within the tolerance, more calls where it is harder."""
    rates = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    field = lambda t, state, rows: -rates[rows, None] * state
    seen = []
    found, calls = integrate(field, torch.ones(3, 2, dtype=torch.float64), 0.0, 2.0, rtol=1e-8, atol=1e-8, first_step=1.0,
                             progress=seen.append)
    torch.testing.assert_close(found, (-2 * rates).exp()[:, None].expand(3, 2), rtol=0, atol=1e-7)
    assert calls[0] < calls[1] < calls[2] and sum(seen) == 3 and len(seen) > 1


def test_a_row_does_not_depend_on_how_many_there_are():
    """Enough of them for whole vectors on any CPU and a rest: powers of the two differ in the last bit, and steps are made of powers."""
    rates = torch.linspace(0.1, 10, 43, dtype=torch.float64)

    def run(rows):
        field = lambda t, state, under_way: -rates[rows[under_way], None] * state
        return integrate(field, torch.ones(len(rows), 2, dtype=torch.float64), 0.0, 2.0, rtol=1e-8, atol=1e-8, first_step=1.0)

    together = run(torch.arange(43))
    for row in range(0, 43, 2):
        for alone, values in zip(run(torch.tensor([row])), together):
            assert torch.equal(alone[0], values[row]), row


# --- refusals

def test_refusals():
    model, x = isotropic(4), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match='0 < sigma_min < sigma_max'):
        log_likelihood(model, x, sigma_min=80.0, sigma_max=0.002)
    with pytest.raises(ValueError, match='more than 3 steps'):
        log_likelihood(correlated(4), x, max_steps=3)
    broken = lambda x, sigma, labels: torch.where(sigma > 1, torch.nan, 0.3) * x
    with pytest.raises(ValueError, match='not finite at sigma='):
        log_likelihood(broken, x)
