# SPDX-License-Identifier: Apache-2.0
"""The eval_nll.py command: its numbers and their provenance, its refusals, batches and ranks."""

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import eval_nll
from tests.support import ROOT, launch, tiny
from tests.training.networks.test_preconditioning import small
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.likelihood import evaluation
from training.networks.interface import Network

QUICK = ['--rtol=1e-2', '--atol=1e-2', '--sigma-max=5']


def run(*args, code=0):
    """Runs the command in this process; returns what it prints."""
    result = CliRunner().invoke(eval_nll.main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def refused(*args):
    """The one line of a refusal."""
    output = run(*args, code=1)
    lines = output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('Error: '), output
    return lines[0]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with data.zip (grey 8x8, 12 images in three classes) and networks `plain` and `labelled`."""
    monkeypatch.chdir(tmp_path)
    tiny.make_zip('data.zip', count=12)
    save_network(small(img_channels=1), 'plain')
    save_network(small(img_channels=1, label_dim=4), 'labelled')
    return tmp_path


def gaussian_network(std, mean=0.0, size=4, channels=1):
    """A network in EDM's preconditioning that is the exact denoiser of N(mean, std^2) for every pixel."""

    class Exact(Network):
        def forward(self, x, c_noise, class_labels=None, augment_labels=None):
            sigma = (4 * c_noise.double()).exp().reshape(-1, 1, 1, 1)
            total = sigma ** 2 + std ** 2  # = 1 / c_in^2, with sigma_data = std
            return ((mean * sigma ** 2 / total) / (sigma * std / total.sqrt())).expand(x.shape) + 0 * x

    net = small(img_channels=channels, img_resolution=size, sigma_data=std)
    net.model = Exact()
    return net


def write_data(path, images, **meta):
    """A zip of .npy images [N,C,H,W] with a dataset.json."""
    with zipfile.ZipFile(path, 'w') as archive:
        for i, image in enumerate(images):
            with archive.open(f'{i:04d}.npy', 'w') as f:
                np.save(f, image)
        archive.writestr('dataset.json', json.dumps({key: value if key == 'units' else [[f'{i:04d}.npy', v] for i, v in
                                                     enumerate(value)] for key, value in meta.items()}))


@pytest.mark.parametrize('std, mean', [(0.2, 0.0), (0.2, 0.1)])
def test_gaussian_data_under_their_exact_denoiser(tmp_path, monkeypatch, std, mean):
    """Grey levels of a Gaussian, rounded as generate.py rounds them: 8-bit bits per dimension of the closed form, within 0.01."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, 'load_network', lambda *args, **kwargs: gaussian_network(std, mean))
    x = mean + std * np.random.default_rng(3).standard_normal((400, 1, 4, 4))
    levels = np.round((x + 1) * 127.5)
    assert (levels >= 0).all() and (levels <= 255).all()
    write_data('data.zip', levels.astype(np.uint8))
    run('--network=exact', '--data=data.zip', '--trace=exact', '--batch=400')
    result = json.loads(Path('exact.ode.json').read_text())
    of_these = np.mean(0.5 * (x - mean) ** 2 / std ** 2 / math.log(2)) + 0.5 * math.log2(2 * math.pi * std ** 2) + math.log2(127.5)
    assert abs(result['bits_per_dim'] - of_these) < 2e-3
    assert abs(of_these - (0.5 * math.log2(2 * math.pi * math.e * std ** 2) + math.log2(127.5))) < 0.04  # of the law
    assert result['offset_bits'] == math.log2(127.5) and result['prior_variance'] == 80 ** 2 + std ** 2


def test_the_result_carries_what_decides_it(here):
    output = run('--network=labelled', '--data=data.zip', '--split=test', '--num=5', '--repeats=2', '--seed=7', '--npz-path=a/each.npz',
                 *QUICK)
    result = json.loads(Path('labelled.ode.json').read_text())
    each = np.load('a/each.npz')
    assert each['bits_per_dim'].shape == (2, 5) and each['raw_idx'].tolist() == [0, 1, 2, 3, 4]
    assert result['bits_per_dim'] == pytest.approx(each['bits_per_dim'].mean(), rel=1e-12)
    assert result['standard_error'] == pytest.approx(each['bits_per_dim'].mean(0).std(ddof=1) / math.sqrt(5), rel=1e-9)
    assert result['std_over_repeats'] == pytest.approx(each['bits_per_dim'].mean(1).std(ddof=1), rel=1e-9)
    assert (each['bits_per_dim'][0] != each['bits_per_dim'][1]).all()
    assert result['num_images'] == 5 and result['found_images'] == 12 and result['conditional'] is True
    assert result['data']['split'] == 'test' and len(result['data']['sha256']) == len(result['network']['state_sha256']) == 64
    assert result['flow'] == dict(sigma_min=0.002, sigma_max=5.0, sigma_data=0.5, rtol=0.01, atol=0.01, max_steps=2000)
    assert result['options']['seed'] == 7 and {'commit', 'torch'} <= result['versions'].keys()
    assert f'{result["bits_per_dim"]:.4f}' in output and 'split test' in output and '5 images' in output
    assert not list(here.rglob('.*'))


def test_labels_are_those_of_the_data(here):
    """A split that lacks the network's highest class is no other network's data; without labels the numbers differ."""
    run('--network=labelled', '--data=data.zip', '--num=3', *QUICK)
    run('--network=labelled', '--data=data.zip', '--num=3', '--cond=0', '--out-path=without.json', *QUICK)
    with_labels, without = (json.loads(Path(name).read_text()) for name in ('labelled.ode.json', 'without.json'))
    assert with_labels['conditional'] and not without['conditional']
    assert with_labels['bits_per_dim'] != without['bits_per_dim']


def test_a_value_depends_on_seed_and_image_alone(here):
    """Neither on the batch nor on how many other images there are; another seed gives another value."""
    values = {}
    for name, args in {'batches': ['--batch=3'], 'one': ['--batch=12'], 'few': ['--num=2'], 'seed': ['--seed=1', '--num=2']}.items():
        run('--network=plain', '--data=data.zip', f'--npz-path={name}.npz', *args, *QUICK)
        values[name] = np.load(f'{name}.npz')['bits_per_dim'][0]
    assert np.array_equal(values['batches'], values['one']) and np.array_equal(values['few'], values['one'][:2])
    assert (values['seed'] != values['few']).all()


def test_dequantisation_fills_each_grey_level_evenly():
    """Around the level, as generate.py rounds to it; a function of seed, repeat and image."""
    levels = torch.arange(256, dtype=torch.float64).reshape(-1, 1, 1, 1).expand(256, 1, 4, 4)
    noisy = lambda rows, seed=0, repeat=0: evaluation.dequantised(levels[rows] / 127.5 - 1, rows, seed, repeat)
    offset = (noisy(range(256)) + 1) * 127.5 - levels
    assert offset.abs().max() <= 0.5 and abs(offset.mean()) < 4 / math.sqrt(12 * offset.numel()) and abs(offset.var() - 1 / 12) < 0.005
    assert torch.equal(noisy([5])[0], noisy(range(256))[5])
    assert not torch.equal(noisy([5]), noisy([5], seed=1)) and not torch.equal(noisy([5]), noisy([5], repeat=1))


def test_float_data_have_differential_bits_in_their_own_units(tmp_path, monkeypatch):
    """Stored = 7 + 20 x: no noise is added, and the density is that of the stored values."""
    monkeypatch.chdir(tmp_path)
    units = {'offset': 7.0, 'scale': 20.0}
    net = gaussian_network(0.5)
    net.units = units
    monkeypatch.setattr(evaluation, 'load_network', lambda *args, **kwargs: net)
    x = 0.5 * np.random.default_rng(0).standard_normal((6, 1, 4, 4))
    write_data('data.zip', (7 + 20 * x).astype(np.float32), units=units)
    output = run('--network=exact', '--data=data.zip')
    result = json.loads(Path('exact.ode.json').read_text())
    expected = np.mean(x ** 2 / (2 * 0.25)) / math.log(2) + 0.5 * math.log2(2 * math.pi * 0.25 * 400)
    assert result['differential_bits_per_dim'] == pytest.approx(expected, abs=1e-3) and 'bits_per_dim' not in result
    assert result['dequantisation'] == 'none' and 'differential_bits_per_dim' in output


def test_channels_with_units_of_their_own(tmp_path, monkeypatch):
    """Stored = offset + scale x, by channel: the bits of a value are those of the mean log scale."""
    monkeypatch.chdir(tmp_path)
    units = {'offset': [7.0, -1.0], 'scale': [20.0, 0.5]}
    net = gaussian_network(0.5, channels=2)
    net.units = units
    monkeypatch.setattr(evaluation, 'load_network', lambda *args, **kwargs: net)
    x = 0.5 * np.random.default_rng(0).standard_normal((6, 2, 4, 4))
    offset, scale = (np.reshape(units[key], [2, 1, 1]) for key in ('offset', 'scale'))
    write_data('data.zip', (x * scale + offset).astype(np.float32), units=units)
    run('--network=exact', '--data=data.zip')
    result = json.loads(Path('exact.ode.json').read_text())
    entropy = lambda scale: 0.5 * math.log2(2 * math.pi * 0.25 * scale ** 2)
    expected = np.mean(x ** 2 / (2 * 0.25)) / math.log(2) + (entropy(20) + entropy(0.5)) / 2
    assert result['differential_bits_per_dim'] == pytest.approx(expected, abs=1e-3)


def test_noisy_images_are_left_out(here):
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), np.uint8)
    write_data('mixed.zip', images, sigmas=[0.0, 0.3, 0.0, 0.1])
    output = run('--network=plain', '--data=mixed.zip', '--npz-path=each.npz', *QUICK)
    assert '2 of 4 images are noisy and are left out' in output
    assert np.load('each.npz')['raw_idx'].tolist() == [0, 2]


@pytest.mark.parametrize('args, words', [
    (['--network=nowhere'], ['nowhere', 'no such file']),
    (['--data=nowhere.zip'], ['nowhere.zip', 'no such']),
    (['--num=13'], ['--num=13', 'only 12', '--num=12']),
    (['--cond=1'], ['--cond=1', 'takes no labels']),
    (['--data=rgb.zip'], ['[3, 8, 8]', '[1, 8, 8]']),
    (['--data=float.zip'], ['units', 'scale', '8-bit']),
    (['--data=noisy.zip'], ['all 2 images are noisy']),
    (['--network=labelled', '--data=classes.zip'], ['5 dimensions', 'those of the network 4']),
    (['--network=labelled', '--data=bare.zip'], ['needs labels', '--cond=0']),
    (['--sigma-min=5', '--sigma-max=1'], ['--sigma-min=5', '--sigma-max=1']),
    (['--network=ve', '--sigma-min=0.001'], ['--sigma-min=0.001', '0.02 to 100']),
    (['--max-steps=2'], ['--network=plain', 'more than 2 steps']),
    (['--network=broken'], ['--network=broken', 'not finite']),
    (['--network=nan'], ['nan: weights are not finite', '1 of ']),
    (['--out-path=a'], ['--out-path=a', '.json']),
    (['--npz-path=a.json'], ['--npz-path=a.json', '.npz']),
    (['--device=abacus'], ['--device=abacus']),
])
def test_refusals(here, args, words):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8), np.uint8)
    write_data('rgb.zip', pixels.repeat(3, axis=1))
    write_data('float.zip', pixels.astype(np.float32), units={'offset': 0, 'scale': 1})
    write_data('noisy.zip', pixels, sigmas=[0.1, 0.2])
    write_data('classes.zip', pixels, labels=[0, 4])
    write_data('bare.zip', pixels)
    save_network(small('ve', img_channels=1), 've')
    broken = small(img_channels=1)
    next(broken.parameters()).data.fill_(torch.nan)
    save_network(broken, 'nan')
    next(broken.parameters()).data.fill_(3e38)  # finite, and what is made of them is not
    save_network(broken, 'broken')
    line = refused(*{'--network': '--network=plain', '--data': '--data=data.zip',
                     **{arg.partition('=')[0]: arg for arg in args}}.values())
    for word in words:
        assert word in line, line
    assert not list(here.glob('*.ode.json'))


def test_bad_numbers_are_usage_errors(here):
    assert '--rtol' in run('--network=plain', '--data=data.zip', '--rtol=nan', code=2)
    assert '--probes' in run('--network=plain', '--data=data.zip', '--probes=0', code=2)


@pytest.mark.parametrize('args', [QUICK, ['--method=vlb', '--steps=5'],
                                  pytest.param(['--dequantise=gaussian', *QUICK], marks=pytest.mark.slow)])
def test_two_ranks_equal_one(here, args):
    run('--network=labelled', '--data=data.zip', '--num=7', '--npz-path=one.npz', '--out-path=one.json', *args)
    command = ['--network=labelled', '--data=data.zip', '--num-images=7', '--batch=2', '--npz-path=two.npz', '--out-path=two.json',
               f'--threads={torch.get_num_threads()}', *args]
    done = launch.run(ROOT / 'eval_nll.py', command, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('written to') == 1
    one, two = np.load('one.npz'), np.load('two.npz')
    for name in one.files:  # what is added up over images is so in another order
        np.testing.assert_allclose(one[name], two[name], rtol=1e-12 if name.startswith('terms') else 0)
    results = [json.loads(Path(name).read_text()) for name in ('one.json', 'two.json')]
    assert results[0]['bits_per_dim'] == results[1]['bits_per_dim'] and results[1]['ranks'] == 2


# --- the variational bound

def test_the_bound_of_gaussian_data_meets_the_flow_from_above(tmp_path, monkeypatch):
    """Under the exact denoiser both come to the closed form: the bound from above and closer the more steps, the flow at once."""
    monkeypatch.chdir(tmp_path)
    std = 0.2
    monkeypatch.setattr(evaluation, 'load_network', lambda *args, **kwargs: gaussian_network(std, size=32))
    x = std * np.random.default_rng(3).standard_normal((8, 1, 32, 32))
    write_data('data.zip', np.round((x + 1) * 127.5).astype(np.uint8))
    closed = np.mean(0.5 * x ** 2 / std ** 2 / math.log(2)) + 0.5 * math.log2(2 * math.pi * std ** 2) + math.log2(127.5)
    found = {}
    for steps in (25, 250, 2500):
        run('--network=exact', '--data=data.zip', '--method=vlb', f'--diffusion=cosine:steps={steps}')
        found[steps] = json.loads(Path('exact.vlb.json').read_text())['bits_per_dim']
    run('--network=exact', '--data=data.zip')
    flow = json.loads(Path('exact.ode.json').read_text())['bits_per_dim']
    assert found[25] > found[250] + 0.05 and found[250] > found[2500] + 0.05, found
    assert abs(flow - closed) < 0.01 and -0.02 < found[2500] - closed < 0.06, (found, flow, closed)


def test_gaussian_dequantisation_is_comparable_with_the_bound(tmp_path, monkeypatch):
    """Exact denoiser of Gaussian data, fixed variance: flow and bound of one diffusion agree, and say the same of it."""
    monkeypatch.chdir(tmp_path)
    std, schedule = 0.2, '--diffusion=cosine:steps=250'
    monkeypatch.setattr(evaluation, 'load_network', lambda *args, **kwargs: gaussian_network(std, size=32))
    k = np.round((std * np.random.default_rng(3).standard_normal((16, 1, 32, 32)) + 1) * 127.5)
    write_data('data.zip', k.astype(np.uint8))
    run('--network=exact', '--data=data.zip', '--method=vlb', schedule, '--npz-path=vlb.npz')
    run('--network=exact', '--data=data.zip', '--dequantise=gaussian', schedule, '--rtol=1e-3', '--atol=1e-3', '--npz-path=ode.npz')
    bound, flow = (json.loads(Path(f'exact.{name}.json').read_text()) for name in ('vlb', 'ode-gaussian'))
    cdf = lambda edge: torch.special.ndtr(torch.tensor(((k + edge) / 127.5 - 1) / std))
    exact = float(-(cdf(0.5) - cdf(-0.5)).log2().mean())
    assert exact < flow['bits_per_dim'] and abs(flow['bits_per_dim'] - bound['bits_per_dim']) < 0.02, (exact, flow, bound)
    assert flow['sigma_1'] == flow['flow']['sigma_min'] == bound['sigma_range'][0]
    assert {key: flow[key] for key in ('steps', 'trained_steps', 'variance')} == {key: bound[key] for key in
                                                                                 ('steps', 'trained_steps', 'variance')}
    assert np.array_equal(np.load('ode.npz')['decoder_bits_per_dim'], np.load('vlb.npz')['decoder_bits_per_dim'])
    assert flow['offset_bits'] == 0 and 'decoder' in flow['dequantisation']
    total = flow['flow_bits_per_dim'] + flow['decoder_bits_per_dim'] - flow['noise_bits_per_dim']
    assert flow['bits_per_dim'] == pytest.approx(total, rel=1e-9)


def test_gaussian_dequantisation_of_a_network_with_levels_of_its_own(here):
    """Its lowest level and its learned variance, labels given; every repeat with noise of its own."""
    save_network(small('iddpm', img_channels=1, label_dim=4, diffusion='cosine:steps=20'), 'iddpm')
    run('--network=iddpm', '--data=data.zip', '--dequantise=gaussian', '--num=3', '--repeats=2', '--npz-path=each.npz', *QUICK)
    result, each = json.loads(Path('iddpm.ode-gaussian.json').read_text()), np.load('each.npz')
    assert result['variance'] == 'learned' and result['conditional'] and result['steps'] == 20
    assert result['sigma_1'] == pytest.approx(float(load_network('iddpm').own_diffusion().levels[0]))
    assert (each['decoder_bits_per_dim'][0] != each['decoder_bits_per_dim'][1]).all()
    assert 'levels of its own' in refused('--network=iddpm', '--data=data.zip', '--dequantise=gaussian', '--diffusion=linear')


@pytest.mark.parametrize('args, words', [
    (['--sigma-min=0.01'], ['--sigma-min', '--dequantise=gaussian', 'lowest level of --diffusion']),
    (['--plot=terms.png'], ['--plot', '--dequantise=gaussian']),
    (['--method=vlb'], ['--dequantise', '--method=vlb']),
    (['--variance=learned'], ['--variance=learned', 'no channels']),
    (['--network=ve'], ['cosine:steps=1000', '0.006425', '0.02 to 100']),
    (['--sigma-max=0.005'], ['--sigma-max=0.005']),
    (['--data=float.zip', '--network=float'], ['--dequantise=gaussian', '8-bit', 'float.zip']),
])
def test_refusals_of_gaussian_dequantisation(here, args, words):
    save_network(small('ve', img_channels=1), 've')
    net = small(img_channels=1)
    net.config['units'] = {'offset': 0.0, 'scale': 1.0}
    save_network(net, 'float')
    write_data('float.zip', np.zeros([2, 1, 8, 8], np.float32), units=net.config['units'])
    line = refused(*{'--network': '--network=plain', '--data': '--data=data.zip', '--dequantise': '--dequantise=gaussian',
                     **{arg.partition('=')[0]: arg for arg in args}}.values())
    for word in words:
        assert word in line, line
    assert not list(here.glob('*.json'))


def test_the_bound_carries_its_terms(here):
    output = run('--network=plain', '--data=data.zip', '--method=vlb', '--diffusion=linear:steps=200', '--steps=20', '--repeats=2',
                 '--npz-path=each.npz', '--plot=terms.png')
    result, each = json.loads(Path('plain.vlb.json').read_text()), np.load('each.npz')
    assert {name: each[name].shape for name in ('terms_vb', 'terms_x0_mse', 'terms_eps_mse', 'levels', 'timesteps')} == dict.fromkeys(
        ('terms_vb', 'terms_x0_mse', 'terms_eps_mse', 'levels', 'timesteps'), (20,))
    assert result['bits_per_dim'] == pytest.approx(each['terms_vb'].sum() + result['prior_bits_per_dim'], rel=1e-9)
    assert result['decoder_bits_per_dim'] == pytest.approx(each['terms_vb'][0], rel=1e-9)
    assert result['x0_mse'] == pytest.approx(each['terms_x0_mse'].mean(), rel=1e-9)
    assert each['timesteps'][-1] == 199 and each['bits_per_dim'].shape == (2, 12)
    assert (result['steps'], result['trained_steps'], result['variance']) == (20, 200, 'large')
    with PIL.Image.open('terms.png') as picture:
        assert picture.size[0] > 1000
    assert 'prior_bits_per_dim' in output and 'terms.png' in output


@pytest.mark.parametrize('options, own', [(dict(M=20), 'large'), (dict(diffusion='cosine:steps=20'), 'learned'),
                                          (dict(diffusion='linear:steps=40', learned_variance=False), 'large')])
def test_a_network_with_levels_of_its_own(here, options, own):
    """iddpm: the bound visits its very levels, and takes the variance that it was trained to give; told so, that of other channels."""
    net = small('iddpm', img_channels=1, **options)
    save_network(net, 'iddpm')
    found = {}
    for variance in ('auto', 'large', *(['learned'] if net.output_multiple == 2 else [])):
        run('--network=iddpm', '--data=data.zip', '--method=vlb', '--npz-path=each.npz', f'--variance={variance}')
        found[variance] = json.loads(Path('iddpm.vlb.json').read_text())
        np.testing.assert_allclose(np.load('each.npz')['levels'], net.u[:-1].flip(0).double(), rtol=1e-6)
    assert found['auto']['variance'] == own and found['auto']['bits_per_dim'] == found[own]['bits_per_dim']
    if net.output_multiple == 2:
        assert found['learned']['bits_per_dim'] != found['large']['bits_per_dim']
    else:
        assert 'no channels' in refused('--network=iddpm', '--data=data.zip', '--method=vlb', '--variance=learned')
    assert 'levels of its own' in refused('--network=iddpm', '--data=data.zip', '--method=vlb', '--diffusion=linear')


@pytest.mark.parametrize('args, words', [
    (['--rtol=1e-3'], ['--rtol', '--method=vlb']),
    (['--method=ode', '--steps=10'], ['--steps', '--method=ode']),
    (['--variance=learned'], ['--variance=learned', 'no channels']),
    (['--steps=2000'], ['--steps=2000', '2000 of 1000']),
    (['--diffusion=quadratic'], ['--diffusion', 'cosine', 'linear']),
    (['--plot=terms.jpg'], ['--plot=terms.jpg', '.png']),
])
def test_refusals_of_the_bound(here, args, words):
    line = refused('--network=plain', '--data=data.zip', '--method=vlb', *args)
    for word in words:
        assert word in line, line


def test_the_bound_is_for_grey_levels(here):
    units = {'offset': 0.0, 'scale': 1.0}
    net = small(img_channels=1)
    net.config['units'] = units
    save_network(net, 'float')
    write_data('float.zip', np.zeros([2, 1, 8, 8], np.float32), units=units)
    assert '--method=ode' in refused('--network=float', '--data=float.zip', '--method=vlb')


def test_help_and_version():
    assert '--sigma-min' in run('--help') and 'commit' in run('--version')
