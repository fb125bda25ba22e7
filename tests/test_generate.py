# SPDX-License-Identifier: Apache-2.0
"""generate.py's options for samplers, guidance and labels: published values and names, combinations, what is refused."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import generate
from dnnlib.progress import Progress
from tests.support.tiny import make_zip
from tests.support.unets import DATA, ROOT, all_images, contents, golden_network, launched, refused, run, tiny
from torch_utils import registry
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.diffusion import discrete, schedules
from training.sampling import generation, guidance, labels, steppers
from training.sampling import pieces as sampling
from training.sampling.channels import moments, statistics
from training.sampling.generate import ConditionedDenoiser, generate_images, noise_levels
from training.sampling.guidance import Guidance


@pytest.fixture(scope='module')
def golden():
    return load_file(DATA / 'samplers' / 'samplers.safetensors')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Snapshot folders of networks, by kind."""
    root = tmp_path_factory.mktemp('networks')
    networks = {'grey': tiny(), 'rgb': tiny(3, label_dim=3), 'dropout': tiny(3, label_dim=3, label_dropout=0.1),
                'worse': tiny(3, label_dim=3, key='worse'), 'iddpm': tiny(precond='iddpm'),
                'discrete': tiny(precond='iddpm', diffusion='cosine:steps=100'),
                'published': golden_network('edm_ddpmpp_cond_aug')}
    for name, net in networks.items():
        save_network(net, root / name)
    return root


def arrays(folder, outdir, *options, seeds='0-2', steps=2):
    """The images of a command, network units, float32 [N,C,H,W]; its output."""
    result = run(folder, outdir, '--format=npy', f'--seeds={seeds}', f'--steps={steps}', *options)
    assert result.exit_code == 0, result.output
    return torch.from_numpy(np.stack([np.load(path) for path in sorted(outdir.glob('*.npy'))])), result.output


def pieces(folder, tmp_path, *options):
    """(levels, stepper with its keys) that a command line comes to."""
    context = generate.main.make_context('generate', [f'--network={folder}', f'--outdir={tmp_path}', *options])
    names = ('steps', 'sampler', 'levels', 'sigma_min', 'sigma_max', 'rho', 'stop_sigma', 'stop_variance', 'S_churn', 'S_min', 'S_max',
             'S_noise', 'schedule', 'scaling')
    net = load_network(folder)
    found = sampling.sampler_pieces(net, **{name: context.params[name] for name in names})
    return noise_levels(net, found['schedule'], found['num_steps']), found['stepper']


# --- samplers

def test_published_ablation_options(golden, folders, tmp_path):
    options = ['--solver=heun', '--disc=vp', '--schedule=vp', '--scaling=vp']
    found, _ = arrays(folders / 'published', tmp_path, *options, steps=6)
    torch.testing.assert_close(found, golden['net.ablation_vp_6'].float(), rtol=0, atol=1e-4)


def test_published_sampler(golden, folders, tmp_path):
    found, _ = arrays(folders / 'published', tmp_path, '--S_churn=10', steps=6)
    torch.testing.assert_close(found, golden['net.edm_6_churn10'].float(), rtol=0, atol=1e-4)


def test_published_ablation_of_a_network_with_discrete_levels(golden):
    net = golden_network('iddpm_song', 'iddpm')
    keys = dict.fromkeys(('sigma_min', 'sigma_max', 'rho', 'stop_sigma', 'stop_variance', 'S_churn', 'S_min', 'S_max', 'S_noise'))
    found = sampling.sampler_pieces(net, 5, 'heun', 'iddpm', schedule='linear', scaling='none', **keys)
    sigmas = noise_levels(net, found['schedule'], 5)
    image = found['stepper'](ConditionedDenoiser(net), golden['net_iddpm.latents'].double() * sigmas[0], sigmas, None)
    expected = golden['net_iddpm.ablation_5']
    torch.testing.assert_close(image, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_defaults_are_edms(folders, tmp_path):
    sigmas, stepper = pieces(folders / 'rgb', tmp_path)
    assert torch.equal(sigmas, schedules.edm(18)) and stepper.func is steppers.heun and not stepper.keywords


def test_keys_may_stand_in_the_slot_or_alone(folders, tmp_path):
    in_slot = pieces(folders / 'rgb', tmp_path, '--levels=edm:rho=5,sigma_max=20', '--sampler=euler:S_churn=4,scaling=vp', '--steps=7')
    alone = pieces(folders / 'rgb', tmp_path, '--disc=edm', '--rho=5', '--sigma_max=20', '--solver=euler', '--S_churn=4', '--scaling=vp',
                   '--steps=7')
    assert torch.equal(in_slot[0], alone[0]) and torch.equal(in_slot[0], schedules.edm(7, rho=5, sigma_max=20.0))
    assert in_slot[1].func is alone[1].func is steppers.euler and in_slot[1].keywords == alone[1].keywords


def test_the_time_fits_the_range_of_the_levels(folders, tmp_path):
    _, stepper = pieces(folders / 'rgb', tmp_path, '--schedule=vp', '--sigma_max=50')
    curve = stepper.keywords['schedule']
    assert curve.sigma(torch.tensor(1.0).double()).item() == pytest.approx(50)
    _, stepper = pieces(folders / 'rgb', tmp_path, '--schedule=vp', '--levels=explicit:sigmas=30|2|0.1')
    assert stepper.keywords['schedule'].sigma(torch.tensor(1.0).double()).item() == pytest.approx(30)


def test_levels_stay_within_the_networks_range(folders, tmp_path):
    net = load_network(folders / 'iddpm')
    sigmas, _ = pieces(folders / 'iddpm', tmp_path, '--levels=log_linear', '--steps=6')
    assert sigmas[-2] == net.u[-2].double() and torch.equal(sigmas[:-1], net.round_sigma(sigmas[:-1]))


def test_explicit_levels(folders, tmp_path):
    sigmas, _ = pieces(folders / 'rgb', tmp_path, '--levels=explicit:sigmas=80|10|1')
    assert sigmas.tolist() == [80, 10, 1, 0]


def test_truncated_sampling(folders, tmp_path):
    """Ends with the mean at the last level that is not below: of three levels, the network is evaluated at two."""
    net = load_network(folders / 'rgb')
    options = ['--levels=explicit:sigmas=80|10|1', '--solver=euler']
    by_level, _ = arrays(folders / 'rgb', tmp_path / 'a', *options, '--stop-sigma=5', steps=3)
    by_variance, _ = arrays(folders / 'rgb', tmp_path / 'b', *options, '--stop_variance=25', steps=3)
    short = all_images(net, range(3), schedule=lambda steps: torch.tensor([80, 10, 0]).double(), stepper=steppers.euler)
    assert torch.equal(by_level, by_variance) and torch.equal(by_level, short.float())
    whole, _ = arrays(folders / 'rgb', tmp_path / 'c', *options, '--stop_variance=0', steps=3)
    assert torch.equal(whole, arrays(folders / 'rgb', tmp_path / 'd', *options, steps=3)[0]) and not torch.equal(whole, short.float())


@pytest.mark.parametrize('stepper', sorted(steppers.STEPPERS))
@pytest.mark.parametrize('levels', sorted(schedules.SCHEDULES))
def test_every_sampler_runs_on_all_levels(folders, tmp_path, stepper, levels):
    options = ['--levels=explicit:sigmas=40|6|0.5'] if levels == 'explicit' else [f'--levels={levels}']
    found, _ = arrays(folders / 'iddpm', tmp_path, f'--sampler={stepper}', *options, seeds='0,3', steps=3)
    assert found.isfinite().all() and not torch.equal(found[0], found[1])


def test_the_variance_that_a_network_learned(folders, tmp_path):
    """auto takes it where the network was trained to give it; others may have channels that nothing has trained."""
    for kind in ('discrete', 'iddpm'):
        found = {}
        for variance in ('learned', 'auto', 'small'):
            options = [f'--sampler=ancestral:variance={variance}', '--levels=edm']
            found[variance], _ = arrays(folders / kind, tmp_path / kind / variance, *options, steps=3)
        assert torch.equal(found['auto'], found['learned' if kind == 'discrete' else 'small'])
        assert not torch.equal(found['learned'], found['small'])


def test_a_network_of_discrete_timesteps_is_sampled_on_its_own(folders, tmp_path):
    """By the steppers of such timesteps and unless told otherwise: evenly spaced, D clipped as published."""
    levels = discrete.build_diffusion('cosine:steps=100').levels
    for name in ('ancestral', 'ddim'):
        sigmas, stepper = pieces(folders / 'discrete', tmp_path, f'--sampler={name}', '--steps=12')
        torch.testing.assert_close(sigmas[:-1].flip(0), levels[discrete.kept_steps(100, '12')], rtol=1e-6, atol=0)
        assert stepper.keywords['clip'] is True
        assert pieces(folders / 'discrete', tmp_path, f'--sampler={name}:clip=false')[1].keywords['clip'] is False
    for options in (['--sampler=heun'], ['--sampler=ancestral', '--levels=edm'], ['--sampler=ancestral', '--rho=5']):
        sigmas, stepper = pieces(folders / 'discrete', tmp_path, *options)
        assert sigmas[0] < 81 and stepper.keywords.get('clip') == (True if 'ancestral' in options[0] else None)
    assert pieces(folders / 'iddpm', tmp_path, '--sampler=ancestral')[0][0] < 81  # published: no timesteps are said to be its own


# --- guidance and labels

def test_guidance(folders, tmp_path):
    options = ['--guidance=2.5', '--guidance_interval=0.1,20', '--guidance-channels=1']
    found, output = arrays(folders / 'dropout', tmp_path, *options, steps=4)
    expected = all_images(load_network(folders / 'dropout'), range(3), num_steps=4, guidance=Guidance(2.5, (0.1, 20.0), channels=1))
    assert torch.equal(found, expected.float())
    assert 'guidance 2.5 where 0.1 < sigma <= 20 (t = 55 to 967 of 0 to 999), in the first channel' in output and 'Warning' not in output


def test_a_network_without_label_dropout_is_warned_of(folders, tmp_path):
    _, output = arrays(folders / 'rgb', tmp_path / 'a', '--guidance=2')
    assert output.count('Warning: the network was trained without label dropout') == 1
    _, output = arrays(folders / 'rgb', tmp_path / 'b', '--guidance=2', f'--gnet={folders / "worse"}')
    assert 'Warning' not in output


def test_autoguidance(folders, tmp_path):
    found, _ = arrays(folders / 'rgb', tmp_path, '--guidance=1.5', f'--gnet={folders / "worse"}', '--class=2')
    net, worse = (load_network(folders / name) for name in ('rgb', 'worse'))
    expected = all_images(net, range(3), num_steps=2, guidance=Guidance(1.5, net=worse), labels=labels.one_class(2))
    assert torch.equal(found, expected.float())


def test_labels(folders, tmp_path):
    net = load_network(folders / 'rgb')
    (tmp_path / 'labels.json').write_text(json.dumps([[0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.5], [1, 0, 0]]))
    found, _ = arrays(folders / 'rgb', tmp_path / 'a', f'--labels={tmp_path / "labels.json"}', seeds='1,3')
    source = labels.pick(net, [1, 3], str(tmp_path / 'labels.json'))
    assert torch.equal(found, all_images(net, [1, 3], num_steps=2, labels=source).float())
    uniform, _ = arrays(folders / 'rgb', tmp_path / 'b', '--labels=uniform')
    assert torch.equal(uniform, arrays(folders / 'rgb', tmp_path / 'c')[0])
    result = run(folders / 'rgb', tmp_path / 'd', f'--labels={tmp_path / "labels.json"}', '--seeds=2', '--format=npz')
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / 'd' / '000002.npz') as saved:
        np.testing.assert_array_equal(saved['label'], np.float32([0.2, 0.3, 0.5]))


def test_pixels_do_not_depend_on_batch_and_ranks(folders, tmp_path):
    """Guided, with a worse network, classes of a data set and noise on the way: one rank at batches 64 and 3, two ranks at batch 1."""
    data = make_zip(tmp_path / 'data.zip')
    common = [f'--network={folders / "rgb"}', '--seeds=0-6', '--steps=3', '--S_churn=5', '--threads=1', '--guidance=2', '--device=cpu',
              f'--gnet={folders / "worse"}', '--guidance-interval=t:0,900', f'--labels=dataset:{data}']
    for name, batch in (('64', 64), ('3', 3)):
        assert CliRunner().invoke(generate.main, [*common, f'--outdir={tmp_path / name}', f'--batch={batch}']).exit_code == 0
    result = launched(2, *common, f'--outdir={tmp_path / "ranks"}', '--batch=1')
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / '64') == contents(tmp_path / '3') == contents(tmp_path / 'ranks') and len(contents(tmp_path / '3')) == 7


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on the CPU')
@pytest.mark.parametrize('how', ['--compile', '--compile=true'])
def test_compiled_images_are_close(folders, tmp_path, how):
    found, _ = arrays(folders / 'dropout', tmp_path / 'a', '--guidance=2', how, steps=4)
    expected, _ = arrays(folders / 'dropout', tmp_path / 'b', '--guidance=2', steps=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize('kind, options, words', [
    ('rgb', ['--sampler=rk45'], 'choose from ancestral, ddim'),
    ('rgb', ['--sampler=heun:order=3'], 'has no key "order"'),
    ('rgb', ['--sampler=dpmpp_2m', '--S_churn=4'], '--S-churn=4.0 is not a key of --sampler=dpmpp_2m, which takes stop_sigma'),
    ('rgb', ['--sampler=ddim', '--schedule=vp'], '--schedule=vp is not a key of --sampler=ddim'),
    ('rgb', ['--sampler=heun:S_churn=1', '--S_churn=4'], '"S_churn" is given twice'),
    ('rgb', ['--sampler=heun:S_noise=nan'], '"S_noise" is nan'),
    ('rgb', ['--sampler=heun:alpha=2'], 'alpha'),
    ('rgb', ['--sampler=ddim:eta=2'], 'eta must be between 0 and 1'),
    ('rgb', ['--sampler=ancestral:variance=learned'], 'the network does not predict a variance'),
    ('rgb', ['--sampler=ancestral:variance=odd'], 'variance=odd'),
    ('rgb', ['--levels=karras'], 'choose from cosine, edm'),
    ('rgb', ['--levels=cosine', '--rho=5'], '--rho=5.0 is not a key of --levels=cosine, which takes sigma_min, sigma_max'),
    ('rgb', ['--levels=edm:rho=7', '--rho=5'], '"rho" is given twice'),
    ('rgb', ['--levels=explicit:sigmas=1|10'], 'falling'),
    ('rgb', ['--levels=explicit:sigmas=10|1', '--steps=3'], '3 are asked for'),
    ('rgb', ['--levels=iddpm', '--steps=2000'], 'not enough for 2000 steps'),
    ('rgb', ['--stop-sigma=1', '--stop_variance=1'], 'give one of them'),
    ('rgb', ['--stop-sigma=100'], 'stop_sigma=100'),
    ('rgb', ['--schedule=vp', '--sigma-min=1', '--sigma-max=2'], 'no VP schedule'),
    ('grey', ['--guidance=2'], '--guidance=2: the network is unconditional'),
    ('rgb', ['--guidance=nan'], '--guidance=nan'),
    ('rgb', ['--guidance=-1'], '--guidance=-1'),
    ('rgb', ['--guidance-interval=0,1'], '--guidance-interval has no effect without a --guidance other than 1'),
    ('rgb', ['--guidance-channels=2'], '--guidance-channels has no effect without a --guidance other than 1'),
    ('rgb', ['--guidance=2', '--guidance-channels=4'], '--guidance-channels=4 must be between 1 and the 3 of the network'),
    ('rgb', ['--gnet=worse'], '--gnet has no effect without'),
    ('rgb', ['--guidance=2', '--guidance-interval=1,0'], '--guidance-interval=1,0: give lo,hi'),
    ('rgb', ['--guidance=2', '--gnet=grey'], 'the guiding network has images [1, 8, 8], and the network has [3, 8, 8]'),
    ('rgb', ['--guidance=2', '--gnet=nowhere'], 'nowhere: no such file or folder'),
    ('rgb', ['--class=1', '--labels=uniform'], '--class=1: one class for all images and a source of labels exclude each other'),
    ('rgb', ['--labels=classes.npy'], '--labels=classes.npy: no such file; choose uniform'),
    ('rgb', ['--labels=dataset:nowhere.zip'], 'nowhere.zip: no such zip file or folder'),
    ('grey', ['--labels=uniform'], '--labels=uniform: the network is unconditional'),
])
def test_refused(folders, tmp_path, kind, options, words):
    options = [f'--gnet={folders / option[7:]}' if option in ('--gnet=worse', '--gnet=grey') else option for option in options]
    options = options if any(option.startswith('--steps') or 'explicit' in option for option in options) else [*options, '--steps=2']
    result = CliRunner().invoke(generate.main, [f'--network={folders / kind}', f'--outdir={tmp_path / "out"}', *options])
    assert words in refused(result)
    assert not (tmp_path / 'out').exists() or not contents(tmp_path / 'out')


def test_the_docs_list_every_piece_and_key():
    text = (ROOT / 'docs' / 'sampling.md').read_text(encoding='utf-8')
    rows = {line.split('`')[1]: line for line in text.splitlines() if line.startswith('| `') and not line.startswith('| `--')}
    assert rows.keys() == steppers.STEPPERS.keys() | schedules.SCHEDULES.keys()
    for pieces in (steppers.STEPPERS, schedules.SCHEDULES):
        for name, piece in pieces.items():
            keys = registry.parameters(piece).keys() - {'stop_sigma'}
            hidden = {'euler': {'S_churn', 'S_min', 'S_max', 'S_noise', 'schedule', 'scaling'},  # "the same"
                      'explicit': {'sigma_min', 'sigma_max'}}.get(name, set())
            assert all(key in rows[name] for key in keys - hidden), name
    low, high = guidance.interval('t:0,800')
    assert f'`t:0,800` is sigma up to {high:.2f}' in text and low == 0


def test_dark_images_raise_the_alarm_and_good_ones_do_not(tmp_path):
    """Statistics of a network's own samples are its data's; a shifted bias makes it dark. Without statistics nothing is said."""
    net = tiny(3)
    images = torch.cat([part.images for part in generate_images(net, range(1000, 1128), num_steps=3)])
    net.data_statistics = statistics(*moments(images.clamp(-1, 1)))
    save_network(net, tmp_path / 'good')
    net.model.dec['8x8_aux_conv'].bias.data -= 2
    save_network(net, tmp_path / 'dark')
    net.data_statistics = None
    save_network(net, tmp_path / 'old')
    make = lambda name, *options: run(tmp_path / name, tmp_path / f'{name}-out', '--seeds=0-23', '--steps=3', *options).output
    assert 'Warning' not in make('good') and 'Warning' not in make('old')
    line, = [line for line in make('dark').splitlines() if line.startswith('Warning')]
    assert 'the colours of 24 samples differ from those of the data' in line and 'has mean -' in line
    assert 'Warning' not in make('dark', '--stop-sigma=0.5')


# --- progress

@pytest.mark.parametrize('options', [[], ['--sampler=ancestral'], ['--guidance=2'], ['--guidance=2', '--guidance-interval=0.1,10']])
def test_a_long_batch_prints_its_progress_where_nobody_watches(folders, tmp_path, monkeypatch, options):
    monkeypatch.setattr(generation, 'Progress', functools.partial(Progress, interval=0))
    _, output = arrays(folders / 'dropout', tmp_path / 'out', *options, seeds='0-2', steps=4)
    lines = [line for line in output.splitlines() if line.startswith('Progress: ')]
    evaluations = 4 if '--sampler=ancestral' in options else 7
    shares = [f'({i / evaluations:.0%})' for i in range(1, evaluations + 1)]
    assert [line.split()[5].rstrip(',') for line in lines] == [*shares, '(100%)']  # the last when the batch is complete
    assert lines[0].startswith('Progress: 0 of 3 img') and ', ETA ' in lines[0] and lines[-1].startswith('Progress: 3 of 3 img')
