# SPDX-License-Identifier: Apache-2.0
"""The loop over the bound's terms: the published numbers, closed forms, and what must not change a result."""

import math

import pytest
import torch

from tests.support.denoisers import unit
from tests.training.diffusion import test_discrete as published
from tests.training.networks.test_preconditioning import small
from torch_utils import misc
from training.diffusion.discrete import Cosine, build_diffusion
from training.likelihood.bound import variational_bound

G = published.G


class Recorded:
    """The recorded network as a denoiser: x_t is sqrt(abar) x, and D follows from its eps."""

    def __init__(self, diffusion, times):
        self.diffusion, self.times = diffusion, times

    def outputs(self, x, sigma, class_labels=None):
        t = self.diffusion.timestep(sigma.flatten())
        x_t = self.diffusion.at('alpha_bar', t, x).sqrt() * x
        eps, rest = published.model(x_t, torch.from_numpy(self.diffusion.timesteps)[t], self.times)
        return self.diffusion.x0_from('eps', eps, x_t, t), rest


@pytest.mark.parametrize('case', ['bpd.cos10', 'bpd.lin50', 'bpd.lin_resp8'])
def test_the_published_loop(case):
    """Total, prior and every term with learned variance and the recorded noise, t descending there."""
    facts = published.FACTS[case]
    diffusion = build_diffusion(f'{facts["schedule"]}:steps={facts["T"]}')
    diffusion = diffusion.respace(facts['respacing']) if facts['respacing'] else diffusion
    x0, noise = G['x_start'][:3], G[f'{case}.noise'].flip(0)
    found = variational_bound(Recorded(diffusion, facts['T']), diffusion, x0, noise.__getitem__, variance='learned')
    published.close(found.total, G[f'{case}.clip1.total_bpd.f64'])
    torch.testing.assert_close(found.prior, G[f'{case}.clip1.prior_bpd.f64'], rtol=1e-9, atol=1e-15)
    for name, key in (('vb', 'vb'), ('x0_mse', 'xstart_mse'), ('eps_mse', 'mse')):
        published.close(getattr(found, name).flip(1), G[f'{case}.clip1.{key}.f64'])


class LearnedGaussian:
    """Denoiser of N(0, std^2) that also knows the reverse steps' variance: beta tilde + from_x0^2 Var(x_0 | x)."""

    def __init__(self, diffusion, std):
        self.diffusion, self.std = diffusion, std

    def outputs(self, x, sigma, class_labels=None):
        t = self.diffusion.timestep(sigma.flatten())
        rest = self.std ** 2 * sigma ** 2 / (self.std ** 2 + sigma ** 2)
        table = lambda name: self.diffusion.at(name, t, x)
        low, high = table('posterior_log_variance'), table('beta_log')
        exact = (table('posterior_variance') + table('from_x0') ** 2 * rest).log()
        return self(x, sigma), ((exact - low) / (high - low) * 2 - 1).expand(x.shape)

    def __call__(self, x, sigma, class_labels=None):
        return x * self.std ** 2 / (self.std ** 2 + sigma ** 2)


def test_the_right_variance_makes_the_bound_of_gaussian_data_tight():
    """With the reverse steps' own variance few steps come to the closed form; no fixed variance does, and none goes below it."""
    x = 0.2 * unit(8, 1, 32, 32)
    x0 = ((x + 1) * 127.5).round() / 127.5 - 1
    closed = float((x / 0.2).square().mean()) / 2 / math.log(2) + 0.5 * math.log2(2 * math.pi * 0.2 ** 2) + math.log2(127.5)
    for steps in (25, 100):
        diffusion = Cosine(steps)
        found = {variance: variational_bound(LearnedGaussian(diffusion, 0.2), diffusion, x0, lambda t: unit(8, 1, 32, 32, seed=t + 1),
                                             variance=variance).total.mean() for variance in ('learned', 'large', 'small')}
        assert found['learned'] == pytest.approx(closed, abs=0.02), (steps, found)
        assert found['large'] > closed + 0.1 and found['small'] > closed + 0.1, (steps, found)


def test_an_image_does_not_depend_on_those_beside_it(monkeypatch):
    monkeypatch.setattr(misc, 'CPU_ROWS', (8, 8))  # so that the images need several calls
    net, diffusion = small('iddpm', label_dim=3, M=10), Cosine(10)
    x0, labels = (0.5 * unit(11, 2, 8, 8)).clamp(-1, 1), torch.eye(3)[torch.arange(11) % 3]
    noise = [unit(11, 2, 8, 8, seed=t) for t in range(10)]
    run = lambda rows: variational_bound(net, diffusion, x0[rows], lambda t: noise[t][rows], class_labels=labels[rows],
                                         variance='learned')
    together = run(torch.arange(11))
    for rows in ([4], [10, 0], list(range(8))):
        for name, values in run(torch.tensor(rows))._asdict().items():
            assert torch.equal(values, getattr(together, name)[rows]), (name, rows)


def test_progress_counts_images_and_broken_networks_are_named():
    seen = []
    variational_bound(lambda x, sigma, labels: 0 * x, Cosine(4), torch.zeros(3, 1, 2, 2), lambda t: torch.zeros(3, 1, 2, 2),
                      progress=seen.append)
    assert len(seen) == 4 and sum(seen) == pytest.approx(3)
    with pytest.raises(ValueError, match='not finite at sigma='):
        variational_bound(lambda x, sigma, labels: x / 0 - x / 0, Cosine(4), torch.zeros(3, 1, 2, 2), lambda t: torch.zeros(3, 1, 2, 2))
