# SPDX-License-Identifier: Apache-2.0
"""Every noise law x pairing x weight x penalty x kind of data x consistency makes a step; what cannot be combined says so in one line."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner

import train
from dnnlib import UserError
from tests.support import tiny
from torch_utils import misc, registry
from training.data.batches import Batch
from training.data.pairs import PAIRINGS, PairStream
from training.diffusion.noise import NOISE
from training.objective.penalty import PENALTIES
from training.objective.weighting import WEIGHTS
from training.run.build import build_objective
from training.run.config import ObjectiveConfig

EXTREMES = (1e-4, 1e4)
LEVELS = {'clean': [0.0] * 6, 'mixed': [0.0, 0.2, 0.0, 0.5, 0.1, 0.0], 'noisy': [0.2, 0.05, 0.3, 0.5, 0.2, 0.4]}
CONSISTENCY = ['--consistency-coeff=1', '--consistency-batch-size=4', '--num-consistency-steps=3', '--num-primes=2']
COMBINATIONS = list(itertools.product(WEIGHTS, PENALTIES, (False, True)))


class Denoiser(torch.nn.Module):
    """The least that the objective asks of a network: D = a c_skip x + c_out (b tanh(c_in x) + c)."""

    sigma_data = 0.5

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Parameter(torch.tensor(value)) for value in (0.9, 0.3, 0.1))

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        total = (sigma.reshape(-1, 1, 1, 1) ** 2 + self.sigma_data ** 2).sqrt()
        out = sigma.reshape(-1, 1, 1, 1) * self.sigma_data / total
        return self.a * x * (self.sigma_data / total) ** 2 + out * (self.b * torch.tanh(x / total) + self.c)


@pytest.fixture(scope='module')
def terms(tmp_path_factory):
    """{whether the consistency term is on: the terms of a run}."""
    folder = tmp_path_factory.mktemp('matrix')
    return {on: tiny.options(folder, *(CONSISTENCY if on else [])).objective.terms for on in (False, True)}


def make_batch(levels, noise, pairing):
    """Six pairs that the policy chose, and one at each extreme level: below 1e-4 lies 5e-5, in noisy data."""
    stream = PairStream(levels, noise, pairing, batch=6, seed=1)
    index, sigma = stream.next()
    sigma_n = torch.tensor(levels)[torch.from_numpy(index)]
    sigma_n = torch.cat([sigma_n, torch.tensor([5e-5 if min(levels) else 0.0, max(levels)])])
    sigma = torch.cat([torch.from_numpy(sigma).float(), torch.tensor(EXTREMES)])
    draws = misc.Draws(2, 0)
    images = 0.5 * draws('images', [8, 1, 2, 2]) + sigma_n.reshape(8, 1, 1, 1) * draws('own noise', [8, 1, 2, 2])
    return Batch(images=images, sigma_n=sigma_n.reshape(8, 1, 1, 1), sigma=sigma.reshape(8, 1, 1, 1), noise=draws('noise', [8, 1, 2, 2]),
                 raw_idx=torch.arange(8)), draws


@pytest.mark.parametrize('data', LEVELS)
@pytest.mark.parametrize('pairing', PAIRINGS)
@pytest.mark.parametrize('noise', NOISE)
def test_a_step_of_every_combination(terms, noise, pairing, data):
    """Finite losses, gradients of every parameter, which are not all 0, and finite weights after the step."""
    built = registry.build(noise, NOISE)
    batch, draws = make_batch(LEVELS[data], built, pairing)
    assert (batch.sigma >= batch.sigma_n).all()
    for weight, penalty, on in COMBINATIONS:
        name = f'--noise={noise} --pairing={pairing} --weight={weight} --penalty={penalty} consistency={on} {data}'
        net = Denoiser()
        _, objective = build_objective(ObjectiveConfig(noise, weight, penalty, pairing, terms[on]), net, batch=8)
        found = objective(net, batch, draws)
        assert ('consistency' in found) == on and all(values.shape == (8,) and values.isfinite().all() for values in found.values()), name
        (sum(values.sum() for values in found.values()) / 8).backward()
        params = [*net.parameters(), *objective.parameters()]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in params), name
        assert any(p.grad.abs().max() > 0 for p in net.parameters()), name
        torch.optim.Adam(params, lr=1e-3).step()
        assert all(p.isfinite().all() for p in params), name


PIECES = [f'--{slot}={name}' for slot, pieces in [('noise', NOISE), ('pairing', PAIRINGS), ('weight', WEIGHTS), ('penalty', PENALTIES)]
          for name in pieces]


@pytest.mark.parametrize('flag', PIECES)
def test_every_piece_in_a_run(tmp_path, flag):
    """The same through the command line's options and a network, with the consistency term; the tick is written."""
    run = tiny.make_run(tmp_path, *CONSISTENCY, flag)
    for _ in range(2):
        run.step()
    run.report()
    run.data.feed.close()
    (line,) = tiny.read_log(tmp_path)
    assert line['Grad/skipped'] == 0 and line['Grad/norm'] > 0 and line['Loss/denoise'] > 0 and line['Loss/consistency'] >= 0
    assert all(p.isfinite().all() for p in run.params)


@pytest.mark.parametrize('pairing', PAIRINGS)
@pytest.mark.parametrize('noise', NOISE)
def test_stratified_laws_through_the_stream(noise, pairing):
    """With clean data every aligned batch of 64 covers the law evenly, whatever the policy; without the option it does not."""
    counts = []
    for spec in (f'{noise}:stratified=true', noise):
        law = registry.build(spec, NOISE)
        stream = PairStream([0.0] * 5, law, pairing, batch=64, seed=3)
        levels = [torch.from_numpy(stream.next()[1]) for _ in range(8)]
        # Discrete laws: the probability below the level and that up to it; the uniform lay between the two.
        inner = (torch.arange(1, 64) / 64).double()
        ranks = torch.stack([(batch[:, None] <= law.icdf(inner)).double().sum(0) for batch in levels])
        full = law.cdf(law.icdf(inner)) * 64
        counts.append((ranks - full).abs().max())
    assert counts[0] <= 1.001 < 2 < counts[1]


@pytest.mark.parametrize('name', ['noisy', 'mixed'])
def test_stratified_in_noisy_data(name):
    """The median of p(sigma | usable) splits every 256 pairs of truncate nearly in halves: within 4, where chance alone has std 8."""
    levels = torch.tensor(LEVELS[name]).double()
    law = registry.build('lognormal:stratified=true', NOISE)
    stream = PairStream(LEVELS[name], law, 'truncate', batch=256, seed=3)
    for _ in range(8):
        index, sigma = stream.next()
        bar = levels[torch.from_numpy(index)]
        upper = law.sf(torch.from_numpy(sigma)) < law.sf(bar) / 2
        assert abs(int(upper.sum()) - 128) <= 4


# --- what is refused

BOUNDED = {'loguniform': 200, 'iddpm_levels': 1e6, 'levels': 2, 'cosine': 2e4, 'vp_uniform': 1e3}


@pytest.mark.parametrize('pairing', sorted(set(PAIRINGS) - {'clamp'}))
@pytest.mark.parametrize('noise', BOUNDED)
def test_data_noisier_than_the_law(noise, pairing):
    """No image could ever be used: refused by name, in one line."""
    with pytest.raises(UserError, match=f'--pairing={pairing}: .*lower --sigma or raise the levels of --noise') as error:
        PairStream([float(BOUNDED[noise])] * 3, registry.build(noise, NOISE), pairing, batch=2)
    assert '\n' not in error.value.message


def invoke(folder, *flags):
    data = folder / 'data.zip'
    if not data.exists():
        tiny.make_zip(data)
    return CliRunner().invoke(train.main, [f'--outdir={folder / "run"}', f'--data={data}', *tiny.FLAGS, '--nosubdir', *flags])


@pytest.mark.parametrize('flag, words', [
    *[(f'--{slot}=nonsense', [f'--{slot}=nonsense', *pieces]) for slot, pieces in [
        ('noise', NOISE), ('pairing', PAIRINGS), ('weight', WEIGHTS), ('penalty', PENALTIES)]],
    *[(f'--weight={name}:nonsense=1', [f'--weight={name}', '"nonsense"']) for name in WEIGHTS],
    *[(f'--penalty={name}:nonsense=1', [f'--penalty={name}', '"nonsense"']) for name in PENALTIES],
    *[(f'--noise={name}:nonsense=1', [f'--noise={name}', '"nonsense"']) for name in NOISE],
    ('--penalty=pseudo_huber:c=-1', ['--penalty=pseudo_huber:c=-1', 'c=-1']),
    ('--penalty=pseudo_huber:schedule=linear', ['schedule=linear']),
    ('--weight=min_snr:gamma=0', ['--weight=min_snr:gamma=0', 'gamma=0']),
    ('--weight=learned:channels=0', ['--weight=learned:channels=0', 'channels=0']),
    ('--pairing=clamp:buffer=1.5', ['--pairing=clamp:buffer=1.5', 'buffer=1.5']),
    ('--pairing=truncate:buffer=0.9', ['--pairing=truncate:buffer=0.9', 'buffer=0.9'])])
def test_refused_by_name(tmp_path, flag, words):
    result = invoke(tmp_path, flag)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit)
    assert len(result.output.strip().splitlines()) == 1 and all(word in result.output for word in words), result.output
    assert not (tmp_path / 'run').exists()


# --- a piece of one's own

def test_a_new_weight_is_a_function_and_a_registry_line(tmp_path, monkeypatch):
    """It is an option of the command line, with its own keys, checked and trained with like the others."""
    def cubic(sigma, power=3.0):
        if power < 0:
            raise ValueError(f'power={power} must be 0 or more')
        return (1 + sigma) ** -power

    monkeypatch.setitem(WEIGHTS, 'cubic', cubic)
    flags = ['--duration=0.00008', '--seed=5', '--dump=1', '--snap=0']
    result = invoke(tmp_path, '--weight=cubic:power=2', *flags)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / 'run' / 'options.json').read_text())['objective']['weight'] == 'cubic:power=2'
    (line,) = tiny.read_log(tmp_path / 'run')
    assert line['Loss/denoise'] > 0

    # The losses are those of the weight: the batch of the first step, by hand.
    run = tiny.make_run(tmp_path, '--weight=cubic:power=2', '--dropout=0', '--augment=0')
    record = tiny.recorded(run)
    start = {name: value.clone() for name, value in run.net.state_dict().items()}
    run.step()
    (batch, terms), = record
    run.net.load_state_dict(start)
    x = batch.images + (batch.sigma ** 2 - batch.sigma_n ** 2).sqrt() * batch.noise
    r = batch.sigma_n ** 2 / batch.sigma ** 2
    error = (1 - r) * run.net(x, batch.sigma) + r * x - batch.images
    expected = ((1 + batch.sigma) ** -2 * error ** 2).sum([1, 2, 3])
    torch.testing.assert_close(terms['denoise'], expected, rtol=1e-3, atol=1e-5)
    for spec, words in [('cubic:power=-1', 'power=-1 must be 0 or more'), ('cubic:strength=2', '"cubic" has no key "strength"')]:
        refused = invoke(tmp_path, f'--weight={spec}', *flags, f'--outdir={tmp_path / "other"}')
        assert refused.exit_code == 1 and words in refused.output.splitlines()[-1] and not (tmp_path / 'other').exists()
    assert 'cubic' in CliRunner().invoke(train.main, ['--weight=help']).output
