# SPDX-License-Identifier: Apache-2.0
"""The default sampler that a network's config.json names: whoever samples without being told one uses it, and what is told wins."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import eval_fid
import generate
from dnnlib import UserError
from tests.support import tiny, unets
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.diffusion import discrete, schedules
from training.sampling import pieces as sampling
from training.sampling import steppers
from training.sampling.generate import noise_levels

OBJECTIVE = ['--precond=iddpm', '--augment=0', '--objective=hybrid', '--diffusion=cosine:steps=30']
EXPLICIT = {'eps': ['--sampler=ancestral', '--levels=respaced:diffusion=cosine:steps=30', '--steps=30'],  # as many as it has
            'v': ['--sampler=dpmpp_2m', '--levels=edm', '--steps=18']}
OWN = {'sampler': 'ancestral:variance=small', 'steps': 7}
RESPACED = 'respaced:diffusion=cosine:steps=100'


def net(**config):
    return unets.tiny(precond='iddpm', diffusion='cosine:steps=100', **config)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('networks') / 'own'
    save_network(net(sampling=OWN), path)
    return path


def images(folder, outdir, *options):
    """The images of generate.py, float32 [N,C,H,W]."""
    generate.main([f'--network={folder}', f'--outdir={outdir}', '--seeds=0-2', '--format=npy', *options], standalone_mode=False)
    return np.stack([np.load(path) for path in sorted(outdir.glob('*.npy'))])


# ---- what is meant


@pytest.mark.parametrize('given, expected', [
    ({}, ('ancestral:variance=small', RESPACED, 7)),
    ({'steps': 3}, ('ancestral:variance=small', RESPACED, 3)),
    ({'levels': 'edm'}, ('ancestral:variance=small', 'edm', 7)),
    ({'levels': 'explicit:sigmas=9|1'}, ('ancestral:variance=small', 'explicit:sigmas=9|1', None)),
    ({'rho': 5.0}, ('ancestral:variance=small', 'edm', 7)),
    ({'sampler': 'ancestral'}, ('ancestral', RESPACED, 7)),  # the same sampler with other keys
    ({'sampler': 'ddim'}, ('ddim', RESPACED, 18)),  # another one
    ({'sampler': 'heun'}, ('heun', 'edm', 18)),
    ({'sampler': 'heun', 'steps': 5}, ('heun', 'edm', 5))])
def test_what_is_told_wins_and_steps_go_with_their_sampler(given, expected):
    assert sampling.choose(net(sampling=OWN), **given) == expected


def test_levels_of_the_network_go_with_its_sampler():
    own = net(sampling={'sampler': 'ddim', 'levels': 'log_linear', 'steps': 5})
    assert sampling.choose(own) == ('ddim', 'log_linear', 5)
    assert sampling.choose(own, sampler='ddim:eta=1') == ('ddim:eta=1', 'log_linear', 5)
    assert sampling.choose(own, sampler='ancestral') == ('ancestral', RESPACED, 18)
    assert sampling.choose(net(sampling={'sampler': 'heun', 'levels': 'explicit:sigmas=9|1'})) == ('heun', 'explicit:sigmas=9|1', None)


def test_networks_that_name_none_are_sampled_by_edms():
    for plain in (unets.tiny(), net()):
        assert sampling.choose(plain) == ('heun', 'edm', 18)
    pieces = sampling.default_pieces(unets.tiny())
    assert torch.equal(noise_levels(unets.tiny(), pieces['schedule'], pieces['num_steps']), schedules.edm(18))
    assert pieces['stepper'].func is steppers.heun and not pieces['stepper'].keywords


def test_pieces_of_a_network_that_names_them():
    own = net(sampling=OWN)
    pieces = sampling.default_pieces(own)
    expected = discrete.build_diffusion('cosine:steps=100').levels[discrete.kept_steps(100, '7')]
    torch.testing.assert_close(noise_levels(own, pieces['schedule'], pieces['num_steps'])[:-1].flip(0), expected, rtol=1e-6,
                               atol=0)
    assert pieces['stepper'].func is steppers.ancestral and pieces['stepper'].keywords == {'variance': 'small', 'clip': True}


# ---- who samples


def test_generate(folder, tmp_path):
    """Told nothing, it does what the same options written out do; --steps alone is heard; another sampler is as without a config."""
    plain = images(folder, tmp_path / 'a')
    assert np.array_equal(plain, images(folder, tmp_path / 'b', '--sampler=ancestral:variance=small', f'--levels={RESPACED}', '--steps=7'))
    few = images(folder, tmp_path / 'c', '--steps=3')
    assert np.array_equal(few, images(folder, tmp_path / 'd', '--sampler=ancestral:variance=small', '--steps=3'))
    save_network(net(), tmp_path / 'none')
    edm = images(tmp_path / 'none', tmp_path / 'e', '--steps=4')
    assert np.array_equal(edm, images(folder, tmp_path / 'f', '--sampler=heun', '--steps=4'))
    assert not np.array_equal(plain, few) and not np.array_equal(few, edm)


def test_evaluation_records_what_it_used(folder, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), np.uint8)
    np.save(tmp_path / 'ref.npy', pictures)
    facts = {}
    for name, options in {'own': [], 'told': ['--sampler=ancestral:variance=small', '--steps=7'], 'heun': ['--sampler=heun']}.items():
        eval_fid.main([f'--network={folder}', f'--ref-path={tmp_path}/ref.npy', '--detector=pixels', '--metrics=fid', '--num=9',
                       '--seeds=0-8', f'--out-path={tmp_path}/{name}.json', *options], standalone_mode=False)
        result = json.loads((tmp_path / f'{name}.json').read_text())
        facts[name] = result['generated'], result['fid_score']
    assert facts['own'] == facts['told'] and facts['own'][1] != facts['heun'][1]
    used = {'sampler': 'ancestral:variance=small,clip=true', 'levels': RESPACED, 'steps': 7}
    assert used.items() <= facts['own'][0].items() and len(facts['own'][0]['sigmas']) == 8
    assert {'sampler': 'heun', 'levels': 'edm', 'steps': 18}.items() <= facts['heun'][0].items()


@pytest.mark.parametrize('prediction', EXPLICIT)
def test_training_run(tmp_path, prediction):
    """The snapshot names the sampler; the grid and the metrics of the run are those of generate.py and eval_fid.py on the snapshot."""
    data = tiny.make_zip(tmp_path / 'data.zip')
    eval_fid.main(['ref', f'--data={data}', f'--dest={tmp_path}/ref.npz', '--detector=pixels'], standalone_mode=False)
    run = tmp_path / 'run'
    tiny.call(f'--outdir={run}', '--nosubdir', f'--data={data}', *tiny.FLAGS, *OBJECTIVE, f'--prediction={prediction}', '--seed=5',
              '--duration=0.00008', '--samples=4', '--snap=1', '--dump=0', '--metrics-every=1', '--metrics-num=12',
              '--metrics-detector=pixels', f'--metrics-ref={tmp_path}/ref.npz')
    snapshot = run / 'network-snapshot-000000.080'
    config = json.loads((snapshot / 'config.json').read_text())
    assert f'--sampler={config["sampling"]["sampler"]}' in EXPLICIT[prediction]
    assert f'--steps={config["sampling"]["steps"]}' in EXPLICIT[prediction]
    explicit = EXPLICIT[prediction]
    generate.main([f'--network={snapshot}', f'--outdir={tmp_path}/out', '--seeds=0-3', '--grid', *explicit], standalone_mode=False)
    grids = [np.asarray(PIL.Image.open(path)) for path in (run / 'samples-000000.080.png', tmp_path / 'out-grid.png')]
    assert np.array_equal(*grids)
    eval_fid.main([f'--network={snapshot}', '--seeds=0-11', '--num=12', f'--ref-stats={tmp_path}/ref.npz', '--detector=pixels',
                   '--metrics=fid', f'--out-path={tmp_path}/fid.json', *explicit], standalone_mode=False)
    logged = [line['Metrics/fid12'] for line in tiny.read_log(run) if 'Metrics/fid12' in line]
    assert logged == [pytest.approx(json.loads((tmp_path / 'fid.json').read_text())['fid_score'], rel=1e-6)]


def test_what_train_writes(tmp_path):
    """What clips D for networks that predict the noise, and else what came nearest in few evaluations (docs/improved_ddpm.md)."""
    written = lambda *flags: tiny.options(tmp_path, *flags).network.arguments
    for prediction, expected in (('eps', ('ancestral', 50)), ('v', ('dpmpp_2m', 18)), ('edm', ('dpmpp_2m', 18)), ('x0', ('dpmpp_2m', 18))):
        found = written('--precond=iddpm', '--objective=simple', f'--prediction={prediction}')
        assert found['sampling'] == dict(zip(('sampler', 'steps'), expected))
    assert written('--precond=iddpm', '--objective=simple')['sampling']['sampler'] == 'dpmpp_2m'
    assert 'sampling' not in written() and 'sampling' not in written('--precond=iddpm')


# ---- mistakes


@pytest.mark.parametrize('value, words', [
    ('ancestral', 'expected an object such as {"sampler": "ancestral", "steps": 50}'),
    ({}, 'expected an object such as'),
    ({'steps': 3}, 'expected an object such as'),
    ({'sampler': 'ddim', 'solver': 'heun'}, 'expected an object such as'),
    ({'sampler': 'odd'}, 'sampler=odd: unknown name "odd"; choose from ancestral, ddim'),
    ({'sampler': 3}, 'unknown name "3"'),
    ({'sampler': 'ddim:order=3'}, 'has no key "order"'),
    ({'sampler': 'ddim', 'levels': 'karras'}, 'levels=karras: unknown name "karras"'),
    ({'sampler': 'ddim', 'steps': 0}, '"steps" must be a whole number of 1 or more'),
    ({'sampler': 'ddim', 'steps': '9'}, '"steps" must be a whole number'),
    ({'sampler': 'ddim', 'steps': 900}, '900 of 100 steps cannot be kept'),
    ({'sampler': 'ddim:eta=2'}, 'eta must be between 0 and 1')])
def test_a_broken_config_is_refused_in_one_line(tmp_path, value, words):
    save_network(net(sampling=value), tmp_path / 'net')
    with pytest.raises(UserError) as err:
        sampling.default_pieces(load_network(tmp_path / 'net'))
    assert err.value.message.startswith('network configuration: sampling') and words in err.value.message and '\n' not in err.value.message
    result = CliRunner().invoke(generate.main, [f'--network={tmp_path / "net"}', f'--outdir={tmp_path / "out"}'])
    assert result.exit_code == 1 and 'Error: network configuration: sampling' in result.output
    assert not (tmp_path / 'out' / '000000.png').exists()


def test_keys_of_another_sampler_are_refused_and_say_whose_it_is(folder):
    with pytest.raises(UserError) as err:
        sampling.sampler_pieces(load_network(folder), S_churn=4.0)
    assert err.value.message.startswith('network configuration: sampling: --S-churn=4.0 is not a key of --sampler=ancestral')
