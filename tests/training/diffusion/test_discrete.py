# SPDX-License-Identifier: Apache-2.0
"""Discrete-time diffusion against published numbers (tests/golden/iddpm) and against what its formulas promise."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from dnnlib import UserError
from tests.support import GOLDEN
from training.diffusion import ambient, discrete
from training.diffusion.discrete import bound_terms, build_diffusion, kept_steps

DATA = GOLDEN
G = load_file(DATA / 'iddpm' / 'bound.safetensors')
FACTS = json.loads((DATA / 'iddpm' / 'bound.json').read_text())
TABLES = {'betas': 'betas', 'alphas_cumprod': 'alpha_bar', 'alphas_cumprod_prev': 'alpha_bar_before',
          'sqrt_recipm1_alphas_cumprod': 'levels', 'posterior_variance': 'posterior_variance',
          'posterior_log_variance_clipped': 'posterior_log_variance',
          'posterior_mean_coef1': 'from_x0', 'posterior_mean_coef2': 'from_xt'}
SCHEDULES = [(name, steps) for name in ('linear', 'cosine') for steps in (1000, 4000)]


def channels(matrix, x):
    return torch.einsum('ij,njhw->nihw', matrix, x)


def model(x, t, tmax):
    """The network of the recorded numbers: (first C channels, those for the variance)."""
    a, b, shift, offset = (G[f'model.{name}'].to(x) for name in ('A', 'B', 'b', 'd'))
    u = (t.double() / tmax).to(x).reshape(-1, 1, 1, 1)
    mean = x + (1 - u) * (channels(a, x) - x + FACTS['model.k'] * x) + u * (1 - u) * shift.reshape(1, -1, 1, 1)
    return mean, torch.tanh(channels(b, x) + offset.reshape(1, -1, 1, 1) - u / 2)


def close(found, expected, rtol=1e-9):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# ---- schedules


@pytest.mark.parametrize('name, steps', SCHEDULES)
def test_schedules_equal_the_published_tables(name, steps):
    d = build_diffusion(f'{name}:steps={steps}')
    where = G[f'sched.{name}.{steps}.idx']
    for published, own in TABLES.items():
        torch.testing.assert_close(getattr(d, own)[where], G[f'sched.{name}.{steps}.{published}'], rtol=1e-12, atol=0)
    sums = FACTS[f'sched.{name}.{steps}.sums']
    assert d.betas.sum().item() == pytest.approx(sums['betas'], rel=1e-12)
    assert d.alpha_bar.sum().item() == pytest.approx(sums['alphas_cumprod'], rel=1e-12)


def test_cosine_follows_its_equation_and_clips_one_beta():
    d = build_diffusion('cosine')
    assert (d.betas == 0.999).sum() == 1 and d.betas[-1] == 0.999
    f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert d.alpha_bar[499].item() == pytest.approx(f(500) / f(0), rel=1e-12)
    assert round(d.alpha_bar[499].item(), 5) == 0.49384
    assert d.betas[0].sqrt().item() == pytest.approx(0.006425, rel=1e-3)  # a little less than a grey level, 1/127.5


def test_levels_are_those_of_the_house():
    """x_t / sqrt(abar) = x_0 + u eps, and the nearest timestep of a level is its own, in float32 too."""
    for name, steps in SCHEDULES:
        d = build_diffusion(f'{name}:steps={steps}')
        t = torch.arange(steps)
        assert torch.equal(d.timestep(d.levels), t) and torch.equal(d.timestep(d.levels.float()), t)
        assert (d.levels.diff() > 0).all()
    x0, noise, t = G['x_start'], G['noise'], G['cosine.t']
    d = build_diffusion('cosine')
    close(d.noisy(x0, t, noise) / d.at('alpha_bar', t, x0).sqrt(), x0 + d.at('levels', t, x0) * noise, rtol=1e-12)


@pytest.mark.parametrize('spec', ['cosine:steps=4000', 'linear:steps=4000'])
def test_noise_of_the_first_steps_is_exact_in_float32(spec):
    """1 - abar is about 2e-5 there, which has an error of 0.3 % where it is formed from an abar in float32."""
    d, t = build_diffusion(spec), torch.arange(20)
    std = d.noisy(torch.zeros(20, 1, 2, 2), t, torch.ones(20, 1, 2, 2))
    assert std.dtype == torch.float32
    expected = (1 - d.alpha_bar[:20]).sqrt()  # float64
    torch.testing.assert_close(std[:, 0, 0, 0].double(), expected, rtol=2e-7, atol=0)
    image = d.noisy(torch.ones(20, 1, 2, 2), t, torch.zeros(20, 1, 2, 2))
    torch.testing.assert_close(image[:, 0, 0, 0].double(), d.alpha_bar[:20].sqrt(), rtol=2e-7, atol=0)


def test_levels_between_two_go_to_the_nearer_one():
    d = build_diffusion('linear:steps=50')
    between = d.levels[:-1] + 0.49 * d.levels.diff()
    assert torch.equal(d.timestep(between), torch.arange(49))
    assert torch.equal(d.timestep(between + 0.02 * d.levels.diff()), torch.arange(1, 50))
    assert torch.equal(d.timestep(torch.tensor([[0.0], [1e9]])), torch.tensor([[0], [49]]))


def test_first_step_takes_the_log_variance_of_the_second():
    d = build_diffusion('linear:steps=100')
    assert d.posterior_variance[0] == 0
    assert d.posterior_log_variance[0] == d.posterior_log_variance[1] == d.posterior_variance[1].log()


def test_scaled_linear_is_linear_in_the_square_root():
    d = build_diffusion('scaled_linear')
    assert d.steps == 1000
    assert (d.betas[0].item(), d.betas[-1].item()) == (pytest.approx(0.00085, rel=1e-12), pytest.approx(0.012, rel=1e-12))
    for t in (1, 500, 777):
        share = t / 999
        assert d.betas[t].item() == pytest.approx((0.00085 ** 0.5 * (1 - share) + 0.012 ** 0.5 * share) ** 2, rel=1e-12)
    assert d.levels[-1].item() == pytest.approx(14.6146, abs=1e-4)  # the well-known highest level of Stable Diffusion
    short = build_diffusion('scaled_linear:steps=3,start=0.04,end=0.16')
    close(short.betas, torch.tensor([0.04, 0.09, 0.16], dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize('spec, text', [
    ('scaled_linear:steps=1', 'at least 2'), ('scaled_linear:start=0', '0 < start <= end < 1'),
    ('scaled_linear:start=0.5,end=0.1', '0 < start <= end < 1'),
    ('linear:steps=20', 'more than 20'), ('cosine:steps=1', 'at least 2'), ('cosine:largest=1', r'in \(0, 1\)'),
    ('cosine:s=-1', 'must not be negative'), ('square', 'choose from cosine, linear'), ('cosine:T=1000', 'has no key "T"')])
def test_schedules_that_cannot_be_are_refused(spec, text):
    with pytest.raises(UserError, match=text) as err:
        build_diffusion(spec)
    assert '--diffusion=' in err.value.message and '\n' not in err.value.message


# ---- respacing


@pytest.mark.parametrize('case', FACTS['space_timesteps'], ids=lambda case: f'{case["T"]}-{case["section_counts"]}')
def test_respacing_equals_the_published_lists(case):
    counts = case['section_counts']
    spec = ','.join(map(str, counts)) if isinstance(counts, list) else counts
    if 'error' in case:
        with pytest.raises(ValueError, match='no whole stride|cannot be kept'):
            kept_steps(case['T'], spec)
    else:
        assert kept_steps(case['T'], spec).tolist() == case['steps']


@pytest.mark.parametrize('name', ['a', 'b'])
def test_respaced_tables_equal_the_published_ones(name):
    case = FACTS[f'respaced.{name}']
    d = build_diffusion(f'{case["schedule"]}:steps={case["T"]}').respace(case['respacing'])
    torch.testing.assert_close(d.betas, G[f'respaced.{name}.betas'], rtol=1e-12, atol=0)
    torch.testing.assert_close(d.alpha_bar, G[f'respaced.{name}.alphas_cumprod'], rtol=1e-12, atol=0)


@pytest.mark.parametrize('spec', ['250', 'ddim50', '10,15,20', '1'])
def test_respacing_keeps_the_levels_and_what_the_network_is_told(spec):
    parent = build_diffusion('cosine:steps=4000')
    child = parent.respace(spec)
    kept = torch.from_numpy(kept_steps(4000, spec))
    torch.testing.assert_close(child.alpha_bar, parent.alpha_bar[kept], rtol=0, atol=1e-12)
    torch.testing.assert_close(child.network_time(torch.arange(child.steps)), kept / 4.0, rtol=0, atol=0)
    again = child.respace(str(max(child.steps // 2, 1)))  # of what is left
    assert set(again.timesteps.tolist()) <= set(kept.tolist()) and again.trained_steps == 4000


@pytest.mark.parametrize('spec, text', [('ddim51', 'try ddim50 or ddim53'), ('0', 'at least 1 step'), ('x', 'not a respacing'),
                                        ('ddim', 'not a respacing'), ('600,600', '600 of 500')])
def test_respacing_that_cannot_be_is_refused(spec, text):
    with pytest.raises(ValueError, match=text):
        build_diffusion('linear').respace(spec)


# ---- posterior, variances, predictions


@pytest.mark.parametrize('name', ['linear', 'cosine'])
class TestPublishedStep:
    """One step at t = 0, 1, 2, 500, 998, 999 on recorded images."""

    def setup(self, name):
        d, t, x0 = build_diffusion(name), G[f'{name}.t'], G['x_start']
        x_t = d.noisy(x0, t, G['noise'])
        return d, t, x0, x_t, lambda key: G[f'core.{name}.{key}.f64']

    def test_forward(self, name):
        d, t, x0, x_t, published = self.setup(name)
        close(x_t, published('x_t'), rtol=1e-12)
        close((1 - d.at('alpha_bar', t, x0)).expand_as(x0), published('q_var'), rtol=1e-12)

    def test_posterior(self, name):
        d, t, x0, x_t, published = self.setup(name)
        close(d.posterior_mean(x0, x_t, t), published('post_mean'), rtol=1e-12)
        close(d.at('posterior_variance', t, x0).expand_as(x0), published('post_var'), rtol=1e-12)
        close(d.at('posterior_log_variance', t, x0).expand_as(x0), published('post_logvar'), rtol=1e-12)

    @pytest.mark.parametrize('clip', [0, 1])
    def test_learned_variance(self, name, clip):
        d, t, _, x_t, published = self.setup(name)
        eps, out = model(x_t, t, 1000)
        D = d.x0_from('eps', eps, x_t, t)
        D = D.clamp(-1, 1) if clip else D
        close(D, published(f'p_pred_xstart_clip{clip}'))
        close(d.posterior_mean(D, x_t, t), published(f'p_mean_clip{clip}'))
        close(d.log_variance(t, x_t, out), published(f'p_log_variance_clip{clip}'))
        close(d.log_variance(t, x_t, out).exp(), published(f'p_variance_clip{clip}'))

    @pytest.mark.parametrize('kind, label', [('x0', 'START_X'), ('previous', 'PREVIOUS_X')])
    def test_other_predictions(self, name, kind, label):
        d, t, _, x_t, published = self.setup(name)
        D = d.x0_from(kind, model(x_t, t, 1000)[0], x_t, t)
        close(D, published(f'p_pred_xstart_{label}'))
        close(d.posterior_mean(D, x_t, t), published(f'p_mean_{label}'))

    def test_fixed_variances(self, name):
        d, t, x0, _, published = self.setup(name)
        for fixed in ('small', 'large'):
            close(d.log_variance(t, x0, fixed=fixed).expand_as(x0), published(f'p_log_variance_FIXED_{fixed.upper()}'), rtol=1e-12)
        close(d.at('posterior_variance', t, x0).expand_as(x0), published('p_variance_FIXED_SMALL'), rtol=1e-12)


def test_learned_range_ends_at_the_two_bounds():
    """out = 1 is beta, out = -1 is btilde, and beyond them the logarithm goes on."""
    d, t, like = build_diffusion('cosine'), torch.arange(1, 1000), torch.zeros(999, 1, 1, 1, dtype=torch.float64)
    close(d.log_variance(t, like, like + 1).flatten().exp(), d.betas[1:], rtol=1e-12)
    close(d.log_variance(t, like, like - 1).flatten().exp(), d.posterior_variance[1:], rtol=1e-12)
    assert (d.log_variance(t, like, like + 1.1) >= d.log_variance(t, like, like + 1)).all()


@pytest.mark.parametrize('kind', ['eps', 'previous', 'v', 'x0'])
def test_predictions_are_there_and_back(kind):
    d, x0, noise, t = build_diffusion('linear'), G['x_start'], G['noise'], G['linear.t']
    x_t, abar = d.noisy(x0, t, noise), d.at('alpha_bar', t, x0)
    closed_form = {'eps': noise, 'x0': x0, 'v': abar.sqrt() * noise - (1 - abar).sqrt() * x0, 'previous': d.posterior_mean(x0, x_t, t)}
    close(d.predict(kind, x0, x_t, t), closed_form[kind], rtol=1e-11)
    close(d.x0_from(kind, closed_form[kind], x_t, t), x0, rtol=1e-10)


def test_double_tweedie_in_variance_preserving_form():
    """E[x_tn | x_t] of the VP process is the program's but for the scaling: for Gaussian data the closed-form regression."""
    variance, low, high = 0.25, 0.3, 0.7  # levels as noise stds beside sqrt(1 - level^2) x_0
    signal = lambda s: math.sqrt(1 - s ** 2)
    spread = lambda s: signal(s) ** 2 * variance + s ** 2  # variance of the noisy image
    x_t = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    D = x_t * signal(high) * variance / spread(high)
    found = signal(low) * ambient.predict_at(D, x_t / signal(high), high / signal(high), level=low / signal(low))
    assert found.item() == pytest.approx(signal(high) / signal(low) * spread(low) / spread(high), rel=1e-12)
    assert found.item() == pytest.approx(0.3849206, abs=1e-7)


# ---- the bound


def test_grey_log_likelihood_equals_the_published_numbers():
    found = discrete.grey_log_likelihood(G['dgll.x'], G['dgll.means'], 2 * G['dgll.log_scales'])
    close(found, G['dgll.out.f64'])
    single = discrete.grey_log_likelihood(G['dgll.x'].float(), G['dgll.means'].float(), 2 * G['dgll.log_scales'].float())
    torch.testing.assert_close(single, G['dgll.out.f32'], rtol=1e-4, atol=1e-4)


def test_cdf_equals_the_published_numbers_and_is_near_the_normal_one():
    close(discrete.normal_cdf(G['cdf.x']), G['cdf.out'], rtol=1e-12)
    z = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert (discrete.normal_cdf(z) - torch.special.ndtr(z)).abs().max() < 3e-4


@pytest.mark.parametrize('mean', [-1.3, -1.0, -0.2, 0.5, 1.0])
@pytest.mark.parametrize('scale', [0.003, 0.02, 0.3, 2.0])
def test_probabilities_of_the_256_grey_levels_add_up_to_one(mean, scale):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    chance = discrete.grey_log_likelihood(x, torch.full_like(x, mean), torch.full_like(x, 2 * math.log(scale))).exp()
    assert chance.sum().item() == pytest.approx(1, abs=1e-5)


def test_kl_of_equals_is_zero_and_equals_the_published_form():
    mean, log_variance = G['dgll.means'], G['dgll.log_scales']
    assert discrete.normal_kl(mean, log_variance, mean, log_variance).abs().max() == 0
    found = discrete.normal_kl(G['dgll.x'], log_variance, mean, log_variance.flip(2))
    close(found, G['nkl.out'])
    p, q = (torch.distributions.Normal(m, (v / 2).exp()) for m, v in ((G['dgll.x'], log_variance), (mean, log_variance.flip(2))))
    close(found, torch.distributions.kl_divergence(p, q))


LOSSES = sorted(key.removeprefix('loss.').removesuffix('.loss.f64') for key in G if key.startswith('loss.') and key.endswith('.loss.f64'))


@pytest.mark.parametrize('case', LOSSES)
def test_losses_equal_the_published_numbers(case):
    """Mean squared error of what is predicted, the bound beside it (mean frozen), and the bound alone; plain and rescaled."""
    schedule, prediction, variance, loss = case.split('.')
    d, t, x0 = build_diffusion(schedule), G[f'{schedule}.t'], G['x_start']
    x_t = d.noisy(x0, t, G['noise'])
    out, rest = model(x_t, t, 1000)
    kind = {'EPSILON': 'eps', 'START_X': 'x0'}[prediction]
    learned = variance == 'LEARNED_RANGE'
    terms = bound_terms(d, x0, d.x0_from(kind, out, x_t, t), t, rest if learned else None, fixed=variance[6:].lower(), clip=False)
    mse = (out - d.predict(kind, x0, x_t, t)).square().mean(dim=(1, 2, 3))
    close(mse, terms.eps_mse if kind == 'eps' else terms.x0_mse)
    whole = {'KL': terms.vb, 'RESCALED_KL': d.steps * terms.vb, 'MSE': mse + terms.vb * learned,
             'RESCALED_MSE': mse + 0.001 * d.steps * terms.vb}[loss]
    close(whole, G[f'loss.{case}.loss.f64'])
    for name, factor in (('mse', 1), ('vb', 0.001 * d.steps if loss == 'RESCALED_MSE' else 1)):
        if (key := f'loss.{case}.{name}.f64') in G:
            close({'mse': mse, 'vb': factor * terms.vb}[name], G[key])


BOUNDS = sorted({key.removesuffix('.vb.f64') for key in G if key.startswith('bpd.') and key.endswith('.vb.f64')})


@pytest.mark.parametrize('case', BOUNDS)
def test_bits_per_dimension_equal_the_published_loop(case):
    """All terms and their sum, t descending, with the recorded noise; every third case on a respaced diffusion."""
    facts = FACTS[case[:case.rindex('.clip')]]
    d = build_diffusion(f'{facts["schedule"]}:steps={facts["T"]}')
    d = d.respace(facts['respacing']) if facts['respacing'] else d
    assert facts['timestep_map'] is None or d.timesteps.tolist() == facts['timestep_map']
    x0, clip = G['x_start'][:3], case.endswith('clip1')
    columns = []
    for t, noise in zip(range(d.steps - 1, -1, -1), G[f'{case[:case.rindex(".clip")]}.noise'], strict=True):
        t = torch.full([3], t)
        x_t = d.noisy(x0, t, noise)
        eps, rest = model(x_t, torch.from_numpy(d.timesteps)[t], facts['T'])
        columns.append(bound_terms(d, x0, d.x0_from('eps', eps, x_t, t), t, rest, clip=clip))
    for name, key in (('vb', 'vb'), ('x0_mse', 'xstart_mse'), ('eps_mse', 'mse')):
        close(torch.stack([getattr(column, name) for column in columns], dim=1), G[f'{case}.{key}.f64'])
    prior = discrete.prior_bits(d, x0)
    torch.testing.assert_close(prior, G[f'{case}.prior_bpd.f64'], rtol=1e-9, atol=1e-15)
    close(prior + sum(column.vb for column in columns), G[f'{case}.total_bpd.f64'])


def test_bound_is_zero_for_who_knows_the_image():
    """D = x_0 with the posterior's own variance: every term but the first costs nothing, and a wrong D or variance costs something."""
    d, x0 = build_diffusion('cosine:steps=10'), G['x_start']
    for t in (torch.full([len(x0)], t) for t in range(1, 10)):
        assert bound_terms(d, x0, x0, t, fixed='small', clip=False).vb.abs().max() < 1e-14
        assert (bound_terms(d, x0, x0 + 0.1, t, fixed='small', clip=False).vb > 0).all()
        assert (bound_terms(d, x0, x0, t, torch.full_like(x0, 0.5), clip=False).vb > 0).all()


def test_images_of_all_timesteps_have_finite_gradients_in_one_batch():
    """The first step's likelihood and the others' divergence are worked out side by side: neither may spoil the other's gradient."""
    d = build_diffusion('cosine:steps=1000')
    t = torch.tensor([0, 1, 500, 998, 999])
    D = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    D = (D * torch.tensor([0.02, 3, 3, 3, 3]).reshape(-1, 1, 1, 1)).requires_grad_()  # the first bins are narrow
    out = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bound_terms(d, torch.zeros(5, 2, 4, 4), D, t, out, clip=False).vb.sum().backward()
    assert D.grad.isfinite().all() and out.grad.isfinite().all() and (out.grad.flatten(1).abs().sum(1) > 0).all()
