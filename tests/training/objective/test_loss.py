# SPDX-License-Identifier: Apache-2.0
"""Objectives: published losses reproduced, and closed forms on Gaussian data. The consistency term has its own file."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file

from dnnlib import UserError
from tests.support import GOLDEN
from tests.support.denoisers import Linear, Mixture, make_batch, unit
from torch_utils import misc
from training.data.batches import Batch
from training.diffusion.noise import LogNormal, LogUniform, VPUniform
from training.objective import weighting
from training.objective.consistency import Bridge, Euler
from training.objective.loss import TERMS, AmbientLoss, Objective, Term, build_terms
from training.objective.penalty import squared

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


class Own(Term):
    """A term of one's own: its parameter times the size of D, and what it saw."""

    name, every, evaluations = 'own', 3, 0.5

    def __init__(self):
        super().__init__()
        self.factor, self.seen = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64)), []

    def forward(self, net, batch, randn, seen):
        self.seen.append(seen)
        return {'own': self.factor * seen.D.flatten(1).sum(1)}


class Wide(Linear):
    """A denoiser with another channel, and a note of when it is asked for it."""

    def outputs(self, x, sigma, **labels):
        self.calls.append('outputs')
        return self.a.to(x.dtype) * x, 0 * x


def test_two_terms_of_one_name_are_refused():
    chains = [chain(LogNormal(), weighting.edm, 8, batch_size=0) for chain in (Euler, Bridge)]
    with pytest.raises(ValueError, match='terms denoise, consistency, consistency have the same name'):
        Objective([edm_term(), *chains])
    with pytest.raises(ValueError, match='terms denoise, denoise have the same name'):
        Objective([edm_term(), edm_term()])


def test_the_first_term_is_looked_at_in_every_step():
    with pytest.raises(ValueError, match='every=3: the first term, own, must be evaluated in every step'):
        Objective([Own(), edm_term()])
    objective = Objective([edm_term(), Own()])
    assert objective.first is objective.terms['denoise'] and list(objective.terms) == ['denoise', 'own']


def test_a_term_is_zero_in_the_steps_between_and_so_are_its_gradients():
    """Zeros, not None: DistributedDataParallel waits for a gradient of every parameter in every step."""
    term = Own()
    objective, net, batch = Objective([edm_term(), term]), Linear(), make_batch()
    for step in range(7):
        objective.zero_grad(set_to_none=True)
        values = objective(net, batch, misc.Draws(0, step))
        sum(value.sum() for value in values.values()).backward()
        assert list(values) == ['denoise', 'own'] and values['own'].shape == (8,) and values['own'].dtype == batch.images.dtype
        assert term.factor.grad is not None
        due = step % 3 == 0
        assert bool(values['own'].abs().sum() > 0) == bool(term.factor.grad != 0) == due
    assert len(term.seen) == 3 and len(net.calls) == 7  # one shared evaluation a step, and no more


def test_all_outputs_are_asked_for_only_where_a_due_term_needs_them():
    class Needy(Own):
        needs_outputs = True

    term, net = Needy(), Wide()
    objective = Objective([edm_term(), term])
    for step in range(4):
        net.calls.clear()
        values = objective(net, make_batch(), misc.Draws(0, step))
        assert len(net.calls) == 1 and (net.calls[0] == 'outputs') == (step % 3 == 0)
        assert (values['denoise'] > 0).all()
    assert all(seen.rest is not None for seen in term.seen) and len(term.seen) == 2


def test_the_evaluations_of_the_terms_add_up():
    """One shared by all; a chain of s steps costs s + 1 for each sample, on its share of the rows and steps."""
    chains = Euler(LogNormal(), weighting.edm, 8, batch_size=4, steps=3, samples=2, every=2)
    assert Objective([edm_term()]).evaluations == 1
    assert Objective([edm_term(), chains, Own()]).evaluations == 1 + 0.5 * 2 * 4 / 2 + 0.5


def test_the_teacher_goes_to_the_terms_that_need_it():
    term, plain, teacher = Own(), edm_term(), Linear()
    term.needs_teacher = True
    objective = Objective([plain, term])
    objective.set_teacher(teacher)
    assert term.teacher == (teacher,) and not hasattr(plain, 'teacher')
    assert list(objective.state_dict()) == ['terms.own.factor']  # the teacher is no part of it


def test_a_specification_names_terms_of_the_registry(monkeypatch):
    monkeypatch.setitem(TERMS, 'own', Own)
    context = dict(noise=LogNormal(), weight=weighting.edm, penalty=squared, batch=8, diffusion=None)
    objective = Objective(build_terms(['denoise:inverse=True', 'own', 'bridge:steps=3,batch_size=4'], **context))
    assert list(objective.terms) == ['denoise', 'own', 'consistency']
    assert objective.first.inverse and objective.first.penalty is squared and objective.terms['consistency'].steps == 3
    with pytest.raises(UserError, match='--term=bound: the variational bound needs discrete timesteps: use --precond=iddpm'):
        build_terms(['bound'], **context)
    with pytest.raises(UserError, match='--term=other: unknown name "other"; choose from denoise'):
        build_terms(['other'], **context)


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
