# SPDX-License-Identifier: Apache-2.0
"""Weights on the squared x_0 error against their definitions, the published numbers, and the table of the docs."""

import inspect
import math

import pytest
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN, ROOT
from torch_utils import registry
from training.objective import weighting
from training.objective.weighting import WEIGHTS, LearnedWeight

SIGMA = torch.logspace(-4, 4, 33, dtype=torch.float64).reshape(-1, 1, 1, 1)
MIN_SNR = load_file(GOLDEN / 'weights' / 'min_snr.safetensors')
K_DIFFUSION = load_file(GOLDEN / 'weights' / 'k_diffusion.safetensors')

# What the squared error of a prediction has to be multiplied by to be that of x_0; v in the variance-preserving convention.
TO_X0 = {'x0': lambda s, d: 1, 'eps': lambda s, d: s ** 2, 'v': lambda s, d: s ** 2 / (1 + s ** 2),
         'F': lambda s, d: s ** 2 * d ** 2 / (s ** 2 + d ** 2)}


@pytest.mark.parametrize('sigma_data', [0.5, 0.6, 1.3])
def test_edm_weight_is_one_over_c_out_squared(sigma_data):
    c_out = SIGMA * sigma_data / (SIGMA ** 2 + sigma_data ** 2).sqrt()
    torch.testing.assert_close(weighting.edm(SIGMA, sigma_data) * c_out ** 2, torch.ones_like(SIGMA), rtol=1e-12, atol=0)


def test_snr_is_signal_power_over_noise_power():
    torch.testing.assert_close(weighting.snr(SIGMA), 1 / SIGMA ** 2, rtol=1e-13, atol=0)
    torch.testing.assert_close(weighting.snr(SIGMA, signal=0.5), 0.25 / SIGMA ** 2, rtol=1e-13, atol=0)


def test_uniform_weight_is_one():
    assert (weighting.uniform(SIGMA) == 1).all()


@pytest.mark.parametrize('name', WEIGHTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_weights_are_finite_positive_and_keep_dtype_and_shape(name, dtype):
    weight = registry.build(name, WEIGHTS)(SIGMA.to(dtype))
    assert weight.dtype == dtype and weight.shape == SIGMA.shape
    assert weight.isfinite().all() and (weight > 0).all()
    torch.testing.assert_close(weight.double(), registry.build(name, WEIGHTS)(SIGMA), rtol=1e-6, atol=0)


def test_sigma_data_comes_from_the_network_unless_given():
    """One source of truth: the caller's sigma_data reaches the weight, an explicit one wins."""
    from_network = registry.build('edm', WEIGHTS, sigma_data=1.3)
    explicit = registry.build('edm:sigma_data=0.7', WEIGHTS, sigma_data=1.3)
    assert torch.equal(from_network(SIGMA), weighting.edm(SIGMA, 1.3)) and torch.equal(explicit(SIGMA), weighting.edm(SIGMA, 0.7))


@pytest.mark.parametrize('spec', [
    'edm:sigma_data=0', 'snr:signal=-1', 'min_snr:gamma=0', 'min_snr:signal=0', 'soft_min_snr:gamma=-1', 'soft_min_snr:gamma=inf',
    'truncated_snr:signal=0', 'p2:k=0', 'p2:gamma=-1'])
def test_values_out_of_range_are_refused(spec):
    with pytest.raises(ValueError, match='must be'):
        registry.build(spec, WEIGHTS)(SIGMA)


# ---- the published weights


def test_weights_are_their_formulas():
    snr = SIGMA ** -2
    for signal in (1.0, 0.5):
        ratio = snr * signal ** 2
        close = lambda weight, expected: torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
        close(weighting.min_snr(SIGMA, gamma=3, signal=signal), torch.minimum(ratio, torch.tensor(3.0)))
        close(weighting.soft_min_snr(SIGMA, gamma=3, signal=signal), ratio * 3 / (ratio + 3))
        close(weighting.truncated_snr(SIGMA, signal=signal), torch.maximum(ratio, torch.tensor(1.0)))
        close(weighting.p2(SIGMA, k=2, gamma=0.5, signal=signal), ratio / (2 + ratio) ** 0.5)
    # The other convention moves the threshold by sigma_data^2, and the whole by a constant.
    close(weighting.min_snr(SIGMA, gamma=1.25, signal=0.5), 0.25 * weighting.min_snr(SIGMA, gamma=5))
    close(weighting.soft_min_snr(SIGMA, gamma=1.0, signal=0.5), 0.25 * weighting.soft_min_snr(SIGMA))
    torch.testing.assert_close(weighting.soft_min_snr(SIGMA, gamma=1e12), snr, rtol=1e-3, atol=0)


def test_min_snr_at_an_snr_of_5_is_the_papers_example():
    sigma = torch.tensor(5.0, dtype=torch.float64) ** -0.5
    on = {form: (weighting.min_snr(sigma) * factor(sigma, 0.5)).item() for form, factor in TO_X0.items()}
    assert [on[form] for form in ('x0', 'eps', 'v')] == pytest.approx([5, 1, 5 / 6], rel=1e-12)
    assert on['F'] == pytest.approx(5 * sigma.item() ** 2 * 0.25 / (sigma.item() ** 2 + 0.25), rel=1e-12)


@pytest.mark.parametrize('schedule', ['cosine', 'linear'])
@pytest.mark.parametrize('name, prediction, weight', [
    ('START_X.constant', 'x0', weighting.uniform), ('START_X.snr', 'x0', weighting.snr), ('EPSILON.constant', 'eps', weighting.snr),
    ('START_X.trunc_snr', 'x0', weighting.truncated_snr), ('EPSILON.max_snr_1', 'eps', weighting.truncated_snr),
    ('START_X.min_snr_5', 'x0', weighting.min_snr), ('EPSILON.min_snr_5', 'eps', weighting.min_snr),
    ('VELOCITY.vmin_snr_5', 'v', weighting.min_snr), ('VELOCITY.vmin_snr_1', 'v', lambda s: weighting.min_snr(s, gamma=1)),
    ('START_X.min_snr_1', 'x0', lambda s: weighting.min_snr(s, gamma=1)),
    ('EPSILON.min_snr_1', 'eps', lambda s: weighting.min_snr(s, gamma=1))])
def test_published_min_snr_numbers(schedule, name, prediction, weight):
    if f'{schedule}.{name}' not in MIN_SNR:
        pytest.skip('the published code refuses this one')
    sigma = MIN_SNR[f'{schedule}.snr'] ** -0.5
    # The records were made in single precision.
    torch.testing.assert_close(weight(sigma) * TO_X0[prediction](sigma, 0.5), MIN_SNR[f'{schedule}.{name}'], rtol=1e-5, atol=0)


@pytest.mark.parametrize('sigma_data', [0.5, 1.0])
@pytest.mark.parametrize('name, weight', [
    ('karras', weighting.edm), ('snr', lambda s, d: weighting.snr(s)),
    ('soft-min-snr', lambda s, d: weighting.soft_min_snr(s, gamma=d ** -2))])
def test_published_weights_of_k_diffusion(sigma_data, name, weight):
    sigma, record = K_DIFFUSION['sigma'], f'sd{sigma_data}.{name}'
    ours = weight(sigma, sigma_data)
    torch.testing.assert_close(ours, K_DIFFUSION[f'{record}.x0_space_weight'], rtol=1e-12, atol=0)
    torch.testing.assert_close(ours * TO_X0['F'](sigma, sigma_data), K_DIFFUSION[f'{record}.c_weight'], rtol=1e-12, atol=0)


# ---- the table of the docs


def table():
    """{weight: {prediction: formula}} of docs/weights.md."""
    lines = (ROOT / 'docs' / 'weights.md').read_text().splitlines()
    rows = [[cell.strip().strip('`') for cell in line.strip('|').split('|')] for line in lines if line.startswith('| `')]
    return {row[0]: dict(zip(('x0', 'eps', 'v', 'F'), row[1:], strict=True)) for row in rows if row[0] != '--weight='}


def evaluated(formula, sigma, **constants):
    elementwise = lambda choose: lambda a, b: choose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64))
    names = {'s': sigma, 'min': elementwise(torch.minimum), 'max': elementwise(torch.maximum), **constants}
    return eval(formula.replace('^', '**'), {'__builtins__': {}}, names) * torch.ones_like(sigma)


TABLE = table()


def test_the_table_has_every_weight():
    assert list(TABLE) == [name for name in sorted(WEIGHTS) if not inspect.isclass(WEIGHTS[name])]  # those that are not learned


@pytest.mark.parametrize('name', TABLE)
@pytest.mark.parametrize('prediction', TO_X0)
def test_the_table_of_the_docs_is_what_the_code_does(name, prediction):
    """Its formulas are read from the page and evaluated; each is the weight on the x_0 error, carried over to the prediction."""
    for given in ({}, {'gamma': 2.5}, {'k': 3.0, 'gamma': 0.5}):
        accepted = registry.parameters(WEIGHTS[name])
        options = {key: value for key, value in given.items() if key in accepted}
        values = {**accepted, **options}
        expected = WEIGHTS[name](SIGMA, **options) * TO_X0[prediction](SIGMA, 0.5)
        shown = evaluated(TABLE[name][prediction], SIGMA, d=0.5, g=values.get('gamma'), k=values.get('k'))
        torch.testing.assert_close(shown, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize('name', TABLE)
def test_the_gradient_is_the_same_through_every_prediction(name):
    """The same network output as x_0, eps, v and F, each with its own error, target and weight of the table."""
    values = registry.parameters(WEIGHTS[name])
    x0, noise, error = (torch.randn(len(SIGMA), 2, 3, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
                        for i in range(3))
    x, d, alpha = x0 + SIGMA * noise, 0.5, (1 + SIGMA ** 2) ** -0.5
    c_skip, c_out = d ** 2 / (SIGMA ** 2 + d ** 2), SIGMA * d / (SIGMA ** 2 + d ** 2).sqrt()
    predictions = {'x0': lambda D: D, 'eps': lambda D: (x - D) / SIGMA, 'v': lambda D: alpha * (x - D) / SIGMA - alpha * SIGMA * D,
                   'F': lambda D: (D - c_skip * x) / c_out}
    gradients = {}
    for form, predict in predictions.items():
        D = (x0 + 0.1 * error).requires_grad_()
        weight = evaluated(TABLE[name][form], SIGMA, d=d, g=values.get('gamma'), k=values.get('k'))
        loss = (weight * (predict(D) - predict(x0)).square()).sum()
        gradients[form], = torch.autograd.grad(loss, D)
    by_code = 2 * WEIGHTS[name](SIGMA) * 0.1 * error
    for form in predictions:
        torch.testing.assert_close(gradients[form], by_code, rtol=1e-5, atol=0)


# ---- the learned weight


def test_learned_weight_starts_at_edm_and_adds_nothing():
    learned = registry.build('learned', WEIGHTS, sigma_data=0.7)
    torch.testing.assert_close(learned(SIGMA), weighting.edm(SIGMA, 0.7), rtol=1e-12, atol=0)
    assert (learned.offset(SIGMA) == 0).all() and learned.offset(SIGMA).shape == SIGMA.shape
    assert list(learned.state_dict()) == ['linear'] and learned.linear.shape == (128,)
    assert torch.equal(LearnedWeight().frequencies, LearnedWeight().frequencies)  # no random state decides


def test_learned_weight_converges_to_the_logarithm_of_the_mean_cost():
    """a exp(-u) + u is least at u = ln a, where it is 1 + ln a; the costs of 64 levels differ by a factor of 200."""
    learned, sigma = LearnedWeight(), torch.logspace(-2, 2, 64).reshape(-1, 1, 1, 1)
    mean_cost = 0.002 + 0.4 / (1 + (sigma.log() + 1).square())  # of lambda times the squared error
    optimizer = torch.optim.Adam(learned.parameters(), lr=1e-2)
    source = torch.Generator().manual_seed(0)
    for step in range(2000):
        optimizer.param_groups[0]['lr'] = 1e-2 * min(1, 4 * (1 - step / 2000))
        cost = mean_cost / weighting.edm(sigma) * torch.randn(64, 3, 4, 4, generator=source).square()
        loss = learned(sigma) * cost + learned.offset(sigma)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        # 1,500 steps of 48 costs a level; neighbours share what they learn. exp(u) is a mean, so its error is relative.
        torch.testing.assert_close(learned.offset(sigma), mean_cost.log(), rtol=0, atol=0.06)
        exact = learned(sigma) * mean_cost / weighting.edm(sigma) + learned.offset(sigma)
    torch.testing.assert_close(exact, 1 + mean_cost.log(), rtol=0, atol=2e-3)


def test_learned_weight_has_finite_gradients_at_all_levels():
    learned = LearnedWeight(channels=16)
    with torch.no_grad():
        learned.linear.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    sigma = SIGMA.float()
    (learned(sigma) * (sigma.square() / (1 + sigma.square())) + learned.offset(sigma)).sum().backward()
    assert learned.linear.grad.isfinite().all() and (learned.linear.grad != 0).all()
    bound = 2 * 2 * math.sqrt(2 * 16)
    assert learned.offset(sigma).abs().max() < bound and learned.offset(sigma).std() > 0.5


@pytest.mark.parametrize('options', [{'channels': 0}, {'sigma_data': 0}])
def test_learned_weight_refuses_values_out_of_range(options):
    with pytest.raises(ValueError, match=f'{next(iter(options))}=0 must be'):
        LearnedWeight(**options)
