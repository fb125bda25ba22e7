# SPDX-License-Identifier: Apache-2.0
"""What a network of discrete timesteps predicts: one family of denoisers, the same simple loss, samples that stay within the data."""

import json

import numpy as np
import pytest
import torch

import dataset_tool
import generate
from dnnlib import UserError
from tests.support import tiny
from tests.training.networks.test_preconditioning import golden, small
from torch_utils import misc
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.data.batches import Batch
from training.data.dataset import ImageDataset
from training.diffusion import discrete
from training.networks.interface import Network
from training.networks.preconditioning import PREDICTIONS, build_network
from training.run.build import build_objective, transfer_weights
from training.run.config import ObjectiveConfig

SIGMA = torch.logspace(-4, 4, 60, dtype=torch.float64).reshape(-1, 1, 1, 1)
IDDPM = ['--precond=iddpm', '--augment=0', '--objective=simple']


class Fixed(Network):
    """An F that is a parameter, for the net around it."""

    def __init__(self, F):
        super().__init__()
        self.F = torch.nn.Parameter(F)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        return self.F


def discrete_net(prediction, **config):
    return small('iddpm', diffusion='cosine:steps=50', prediction=prediction, learned_variance=False, **config)


# ---- the formulas


def test_networks_predict_what_they_are_named_after():
    """x = x_0 + sigma eps: with F the image, the noise, v = sqrt(abar) eps - sqrt(1 - abar) x_0, or what EDM's residual is, D is x_0."""
    draws = misc.Draws(0, 0)
    x0, eps = 0.5 * draws('x0', [60, 1, 8, 8]).double(), draws('eps', [60, 1, 8, 8]).double()
    x, abar = x0 + SIGMA * eps, 1 / (1 + SIGMA ** 2)
    c_skip, c_out, _ = PREDICTIONS['edm'](SIGMA, 0.5)
    F = {'eps': eps, 'v': abar.sqrt() * eps - (1 - abar).sqrt() * x0, 'edm': (x0 - c_skip * x) / c_out, 'x0': x0}
    assert F.keys() == PREDICTIONS.keys()
    for name, value in F.items():
        c_skip, c_out, _ = PREDICTIONS[name](SIGMA, 0.5)
        torch.testing.assert_close(c_skip * x + c_out * value, x0, rtol=0, atol=1e-10)
    assert F['edm'].std() == pytest.approx(1, abs=0.05)


def test_v_is_edm_at_unit_variance_with_the_other_sign():
    (skip, out, scale), (skip_v, out_v, scale_v) = PREDICTIONS['edm'](SIGMA, 1.0), PREDICTIONS['v'](SIGMA, 0.5)
    for a, b in ((skip, skip_v), (out, -out_v), (scale, scale_v)):
        torch.testing.assert_close(a, b)


def test_v_is_the_papers():
    """What discrete.py says a network of v should answer, and what it stands for."""
    d = discrete.build_diffusion('cosine:steps=20')
    t, draws = torch.arange(20), misc.Draws(1, 0)
    x0, noise = (draws(name, [20, 1, 4, 4]).double() for name in ('x0', 'noise'))
    x_t, sigma = d.noisy(x0, t, noise), d.at('levels', t, x0)
    c_skip, c_out, c_in = PREDICTIONS['v'](sigma, 0.5)
    torch.testing.assert_close(c_skip * x_t / c_in + c_out * d.predict('v', x0, x_t, t), x0)


@pytest.mark.parametrize('name', PREDICTIONS)
def test_all_predictions_are_the_same_family_of_denoisers(name):
    """For the D of any net there is an F with which each other net gives this D, and with it the same ones at all levels."""
    source, net = discrete_net('eps'), discrete_net(name, sigma_data=0.7)
    assert net.sigma_data == 0.7
    sigma = net.u[:-1].reshape(-1, 1, 1, 1)
    x = sigma.double() * misc.Draws(2, 0)('x', [len(sigma), 2, 8, 8]).double()
    with torch.no_grad():
        D = source(x, sigma)
        c_skip, c_out, c_in, c_noise = net.coefficients(sigma)
        net.model = Fixed((D - c_skip * x.float()) / c_out)
        torch.testing.assert_close(net(x, sigma), D, rtol=1e-5, atol=1e-5)
    assert torch.equal(c_noise, source.coefficients(sigma)[3])


def test_errors_of_F_do_not_grow_with_sigma():
    """An error of F by 1 is one of D by sigma for eps, by sigma_data at most for edm, by 1 at most for v, and by 1 for x0."""
    largest = {name: torch.as_tensor(PREDICTIONS[name](SIGMA, 0.5)[1]).abs().max().item() for name in PREDICTIONS}
    assert largest == {'eps': pytest.approx(1e4), 'edm': pytest.approx(0.5, rel=1e-6), 'v': pytest.approx(1, rel=1e-6), 'x0': 1}
    for name in ('edm', 'v', 'x0'):
        c_skip = PREDICTIONS[name](SIGMA, 0.5)[0]
        assert (c_skip * SIGMA)[-1] < 1e-3, 'at the highest level D says nothing of the noise'


def test_simple_loss_and_its_gradient_are_the_same():
    """At equal D: the squared error of the noise, whatever F is, and so the same gradient at D = c_skip x + c_out F."""
    d, draws = discrete.build_diffusion('cosine:steps=50'), misc.Draws(3, 0)
    t = torch.arange(0, 50, 7)
    images, noise, D = (draws(name, [len(t), 2, 8, 8]).double() for name in ('images', 'noise', 'D'))
    sigma = d.at('levels', t, images).float().double()
    batch = Batch(images.float(), torch.zeros_like(sigma).float(), sigma.float(), noise.float())
    objective = ObjectiveConfig(noise=None, weight='snr')
    for name in PREDICTIONS:
        net = discrete_net(name)
        c_skip, c_out, _ = PREDICTIONS[name](sigma, 0.5)
        net.model = Fixed(((D - c_skip * (images + sigma * noise)) / c_out).float())
        _, terms = build_objective(objective, net, len(t))
        loss = terms(net, batch, draws)['denoise']
        expected = ((images + sigma * noise - D) / sigma - noise).square().flatten(1).sum(1)  # of the noise that D stands for
        torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-3)
        (gradient,) = torch.autograd.grad(loss.sum(), net.model.F)
        torch.testing.assert_close(gradient / c_out, 2 * (D - images) / sigma ** 2, rtol=2e-3, atol=1e-3, check_dtype=False)


# ---- configurations


@pytest.mark.parametrize('case', ['iddpm_song'])
def test_networks_that_name_none_predict_the_noise(case):
    """Published configurations have no such key: nothing about them changes, and eps by name is the same to the bit."""
    net, _, io = golden(case)
    assert 'prediction' not in net.config and net.prediction == 'eps'
    named = build_network(net.config | {'prediction': 'eps'}).eval()
    named.load_state_dict(net.state_dict())
    assert torch.equal(net(io['in.x'], io['in.sigma']), named(io['in.x'], io['in.sigma']))


def test_unknown_prediction_in_a_config_is_refused():
    with pytest.raises(UserError) as err:
        small('iddpm', prediction='score')
    assert err.value.message == 'network configuration: unknown prediction "score"; choose from edm, eps, v, x0'


def test_snapshot_carries_the_prediction(tmp_path):
    net = discrete_net('v')
    save_network(net, tmp_path / 'net')
    assert json.loads((tmp_path / 'net' / 'config.json').read_text())['prediction'] == 'v'
    x = misc.Draws(4, 0)('x', [2, 2, 8, 8])
    assert torch.equal(load_network(tmp_path / 'net')(x, torch.tensor(3.0)), net(x, torch.tensor(3.0)))


# ---- the command line


def test_option(tmp_path):
    for flags, expected in (([], 'v'), (['--prediction=edm'], 'edm'), (['--prediction=eps'], 'eps'), (['--prediction=x0'], 'x0')):
        assert tiny.options(tmp_path, *IDDPM, *flags).network.arguments['prediction'] == expected
    found = tiny.options(tmp_path, *IDDPM, '--prediction=edm', '--sigma-data=0.3').network.arguments
    assert found['sigma_data'] == 0.3 and build_network(found).sigma_data == 0.3
    assert 'prediction' not in tiny.options(tmp_path, '--precond=iddpm').network.arguments


@pytest.mark.parametrize('flags, words', [
    (['--prediction=v'], '--prediction=v is for discrete-time objectives: add one, such as --objective=hybrid'),
    (['--prediction=eps', '--precond=iddpm'], '--prediction=eps is for discrete-time objectives'),
    ([*IDDPM, '--prediction=v', '--sigma-data=0.3'], '--sigma-data=0.3 is for'),
    (['--precond=iddpm', '--sigma-data=0.3'], '--sigma-data=0.3 is for')])
def test_refused_in_one_line(tmp_path, flags, words):
    with pytest.raises(UserError) as err:
        tiny.options(tmp_path, *flags)
    assert words in err.value.message and '\n' not in err.value.message


def test_a_continued_run_keeps_what_it_predicts(tmp_path, monkeypatch):
    """Where the command names none; another one by name is refused. (test_version_0_1_0.py continues runs that had no choice.)"""
    monkeypatch.chdir(tmp_path)
    flags = [f'--data={tiny.make_zip("data.zip")}', '--outdir=run', '--nosubdir', *tiny.FLAGS, *IDDPM, '--diffusion=cosine:steps=20',
             '--sigma=0', '--seed=1']
    tiny.call(*flags, '--prediction=edm', '--duration=0.00008', '--dump=1')
    tiny.call(*flags, '--duration=0.00016', '--resume=latest')
    state = tiny.read_state('run/training-state-000000.160.pt')
    assert state['options']['network']['arguments']['prediction'] == 'edm'
    with pytest.raises(UserError, match='network.arguments.prediction: edm -> eps'):
        tiny.call(*flags, '--prediction=eps', '--duration=0.00016', '--resume=run/training-state-000000.160.pt')


def test_transfer_between_predictions_is_warned_of(tmp_path, capsys):
    save_network(small('iddpm'), tmp_path / 'published')
    for prediction, warnings in (('edm', 1), ('eps', 0)):
        transfer_weights(str(tmp_path / 'published'), small('iddpm', diffusion='cosine:steps=50', prediction=prediction))
        assert capsys.readouterr().out.count('has to learn another prediction; --prediction=eps keeps it') == warnings


# ---- data that is not 8-bit


@pytest.fixture(scope='module')
def smooth(tmp_path_factory):
    """{dtype: zip} of 200 pictures of low waves, 8x8."""
    folder, rng = tmp_path_factory.mktemp('smooth'), np.random.default_rng(0)
    wave = np.cos(np.linspace(0, np.pi, 8))
    along, across, both = rng.normal(size=(3, 200, 1, 1, 1))
    images = along * wave[:, None] + across * wave + both * wave[:, None] * wave
    stored = {'float32': 280 + 12 * images, 'uint16': (32768 + 9000 * images).clip(0, 65535)}
    for dtype, values in stored.items():
        np.save(folder / f'{dtype}.npy', values.astype(dtype))
        dataset_tool.main([f'--source={folder}/{dtype}.npy', f'--dest={folder}/{dtype}.zip'], standalone_mode=False)
    return {dtype: folder / f'{dtype}.zip' for dtype in stored}


def trained_and_sampled(data, outdir, *flags):
    """(lowest, highest) value of 16 images by the network's own sampler after a short training, and those of the data."""
    tiny.call(f'--outdir={outdir}', '--nosubdir', f'--data={data}', *IDDPM, '--diffusion=cosine:steps=100', '--cbase=16', '--cres=1',
              '--blocks=1', '--attn=0', '--dropout=0', '--batch=32', '--duration=0.00192', '--lr=3e-3', '--lr-rampup=0', '--ema=0.0003',
              '--tick=1.92', '--snap=1', '--dump=0', '--samples=0', '--seed=0', *flags)
    generate.main([f'--network={next(outdir.glob("network-snapshot-*"))}', f'--outdir={outdir}/out', '--seeds=0-15'],
                  standalone_mode=False)
    found = np.stack([np.load(path) for path in sorted((outdir / 'out').glob('*.npy'))])
    dataset = ImageDataset(str(data))
    images = np.stack([dataset.decode(i) for i in range(len(dataset))])
    return (found.min(), found.max()), (images.min(), images.max())


@pytest.mark.parametrize('dtype, flags', [('float32', []), ('uint16', []), ('float32', ['--prediction=x0'])])
def test_samples_stay_within_the_range_of_data_that_is_not_8_bit(smooth, tmp_path, dtype, flags):
    """Where D is not clipped: by predictions that are bounded at every level, within a tenth of the range."""
    (low, high), (least, most) = trained_and_sampled(smooth[dtype], tmp_path, *flags)
    margin = (float(most) - float(least)) / 10
    assert least - margin < low < high < most + margin
    assert high - low > margin * 3, 'and they are no flat pictures'


def test_a_predicted_noise_leaves_the_range_of_float_data(smooth, tmp_path):
    """What the default is there for: the same training with eps is off by many times the range."""
    (low, high), (least, most) = trained_and_sampled(smooth['float32'], tmp_path, '--prediction=eps')
    assert high - low > 10 * (most - least)
