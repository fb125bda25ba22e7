# SPDX-License-Identifier: Apache-2.0
"""Objectives: published losses reproduced, and closed forms on Gaussian data. The consistency term has its own file."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from tests.support.denoisers import Linear, Mixture, make_batch, unit
from torch_utils import misc
from training.data.batches import Batch
from training.diffusion.noise import LogNormal, LogUniform, VPUniform
from training.objective import weighting
from training.objective.consistency import Euler
from training.objective.loss import AmbientLoss, Objective

DATA = GOLDEN / 'losses'
EDM, AMBIENT = load_file(DATA / 'edm_losses.safetensors'), load_file(DATA / 'ambient_losses.safetensors')
KWARGS = {case['name']: case.get('kwargs', {}) for name in ('edm', 'ambient') for case in
          json.loads((DATA / f'{name}_losses.json').read_text())}


def edm_term(**kwargs):
    return AmbientLoss(functools.partial(weighting.edm, **kwargs))


# ---- published losses


@pytest.mark.parametrize('case', ['edm0', 'edm1', 'vp0', 'vp1', 've0', 've1'])
def test_clean_images_give_the_published_edm_vp_and_ve_losses(case):
    kwargs, normal, u = dict(KWARGS[case]), EDM['rnd_normal'], EDM['rnd_uniform']
    if case.startswith('edm'):
        sigma_data = kwargs.pop('sigma_data', 0.5)
        law = LogNormal(**{name.removeprefix('P_'): value for name, value in kwargs.items()})
        sigma, term = law.icdf(torch.special.ndtr(normal)), edm_term(sigma_data=sigma_data)
    else:
        term = AmbientLoss(weighting.snr)
        if case.startswith('vp'):  # the published code counts t down from 1
            sigma = VPUniform(**{name.replace('epsilon', 'eps'): value for name, value in kwargs.items()}).isf(u)
        else:
            sigma = LogUniform(**{name.removeprefix('sigma_'): value for name, value in kwargs.items()}).icdf(u)
    torch.testing.assert_close(sigma.flatten(), EDM[f'{case}.sigma'], rtol=1e-10, atol=0)
    batch = Batch(EDM['images'], torch.zeros_like(sigma), EDM[f'{case}.sigma'].reshape(-1, 1, 1, 1), EDM['noise'])
    loss = term(Mixture(EDM), batch)['denoise']
    torch.testing.assert_close(loss, EDM[f'{case}.loss'].flatten(1).sum(1), rtol=1e-10, atol=0)


def published_batch(case):
    column = lambda name: AMBIENT[name].reshape(-1, 1, 1, 1)
    return Batch(AMBIENT['images'], column('current_sigma'), column(f'{case}.sigma'), AMBIENT['noise'])


@pytest.mark.parametrize('case', ['noconsist0', 'noconsist1'])
def test_noisy_images_give_the_published_ambient_loss(case):
    loss = edm_term(sigma_data=KWARGS[case].get('sigma_data', 0.5))(Mixture(AMBIENT), published_batch(case))['denoise']
    torch.testing.assert_close(loss, AMBIENT[f'{case}.loss'].flatten(1).sum(1), rtol=1e-10, atol=1e-20)


# ---- the ambient loss


def test_clean_images_reduce_to_edm_bit_for_bit():
    net, batch = Linear(), make_batch(sigma_n=0, dtype=torch.float32)
    D = net(batch.images + batch.sigma * batch.noise, batch.sigma)
    by_hand = weighting.edm(batch.sigma) * (D - batch.images) ** 2
    assert torch.equal(edm_term()(net, batch)['denoise'], by_hand.flatten(1).sum(1))


def test_2a3_clamped_levels_have_neither_loss_nor_gradient():
    net, batch = Linear(), make_batch()
    loss = edm_term()(net, batch._replace(sigma=batch.sigma_n))['denoise']
    assert (loss == 0).all()
    loss.sum().backward()
    assert net.a.grad == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_2a10_everything_runs_in_the_dtype_of_the_images(dtype):
    batch = make_batch(dtype=dtype)._replace(sigma=make_batch().sigma)  # levels in double precision change nothing
    consistency = Euler(LogNormal(), weighting.edm, 8, weighted=True, batch_size=0, steps=2)
    objective = Objective([edm_term(), consistency])
    seen = []
    net = lambda x, sigma, **labels: seen.append((x.dtype, misc.batched(sigma).shape[0])) or 0.5 * x
    values = objective(net, batch, misc.Draws(0, 0))
    assert all(value.dtype == dtype and value.shape == (8,) for value in values.values())
    assert {kind for kind, _ in seen} == {dtype}


def test_noisy_images_alone_recover_the_exact_denoiser_of_gaussian_data():
    """Training D = a x on images at level 0.2 gives sd^2 / (sd^2 + s^2) to 1 %; the loss that calls them clean does not."""
    sd, sigma_n, n = 0.5, 0.2, 40_000
    y = sd * unit(n, 1, 4, 4) + sigma_n * unit(n, 1, 4, 4, seed=1)  # 640,000 numbers: a is known to 0.3 %
    net = Linear()

    def best(level, claimed):
        """The minimiser over a: the loss is a parabola in it, so two slopes give it exactly."""
        batch = Batch(y, torch.full([n, 1, 1, 1], claimed), torch.full([n, 1, 1, 1], level), unit(n, 1, 4, 4, seed=2))
        slopes = []
        for a in (0.0, 1.0):
            net.a.data.fill_(a)
            slopes.append(torch.autograd.grad(edm_term()(net, batch)['denoise'].mean(), net.a)[0].item())
        return slopes[0] / (slopes[0] - slopes[1])

    for level in (0.3, 0.5, 1.0):
        exact = sd ** 2 / (sd ** 2 + level ** 2)
        assert best(level, claimed=sigma_n) == pytest.approx(exact, rel=0.01)
        naive = (sd ** 2 + sigma_n ** 2) / (sd ** 2 + sigma_n ** 2 + level ** 2)
        assert best(level, claimed=0.0) == pytest.approx(naive, rel=0.01) and naive > 1.03 * exact


# ---- the objective


def test_terms_share_one_evaluation():
    terms = [edm_term(), Euler(LogNormal(), weighting.edm, 8, batch_size=4, steps=3, samples=2, stop='no')]
    net, batch = Linear(), make_batch()
    values = Objective(terms)(net, batch, misc.Draws(0, 0))
    assert list(values) == ['denoise', 'consistency']
    assert len(net.calls) == 1 + 3 + 1  # the images, three steps of the chains, the chains' ends
    for term in terms:  # alone, a term evaluates for itself and gives the same
        assert torch.equal(term(Linear(), batch, misc.Draws(0, 0))[term.name], values[term.name])


def test_parameters_of_terms_belong_to_the_objective():
    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, sigma):
            return self.scale * torch.ones_like(sigma)

    objective = Objective([AmbientLoss(Learned())])
    assert list(objective.state_dict()) == ['terms.denoise.weight.scale']
    value = objective(Linear(), make_batch(), misc.Draws(0, 0))['denoise'].sum()
    value.backward()
    (parameter,) = objective.parameters()
    torch.testing.assert_close(parameter.grad, value.detach() / 2)
