# SPDX-License-Identifier: Apache-2.0
"""The command line of train.py: what is refused and how, what is accepted as published, what --help, --version and --dry-run say."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train
from dnnlib import EasyDict, UserError
from tests.support import launch, tiny
from torch_utils import misc, registry
from torch_utils.command_line import Spec
from training.data import corruption, device
from training.data.convert.writers import encode_png
from training.data.pairs import PAIRINGS
from training.diffusion.noise import NOISE
from training.networks.interface import ARCHS
from training.networks.preconditioning import PRECONDS, build_network
from training.objective.penalty import PENALTIES
from training.objective.weighting import WEIGHTS
from training.run import build
from training.run.build import build_objective
from training.run.config import from_json, to_json
from training.run.configure import configure
from training.run.stopping import STOPPED

SCRIPTS = ['train', 'generate', 'denoise', 'eval_fid', 'eval_nll', 'dataset_tool', 'checkpoint_tool', 'plot_run', 'refine', 'examples.demo',
           'examples.blurred']
NET = ['--cbase=8', '--cres=1,2', '--blocks=1', '--attn=4', '--batch=16', '--samples=0']
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason='is refused without a GPU only')


def rewrite(source, dest, change):
    """A copy of a zip; change(name, bytes) -> bytes, or None to leave the member out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, 'w') as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)


def make_inputs(folder):
    """Good and bad inputs, by their names."""
    tiny.make_zip(folder / 'good.zip')
    good = (folder / 'good.zip').read_bytes()
    (folder / 'cut.zip').write_bytes(good[:len(good) // 2])
    (folder / 'text.pt').write_text('not a state')
    torch.save({'net': {}}, folder / 'other.pt')
    (folder / 'way').write_text('a file where a folder should be')
    (folder / 'empty').mkdir()
    tenth = '00000/img00000010.png'
    with zipfile.ZipFile(folder / 'good.zip') as archive:
        png = archive.read(tenth)
    rewrite(folder / 'good.zip', folder / 'cutpng.zip', lambda name, data: png[:40] if name == tenth else data)
    rewrite(folder / 'good.zip', folder / 'nolabels.zip', lambda name, data: None if name == 'dataset.json' else data)
    missing = json.dumps({'labels': [[f'00000/img{i:08d}.png', 0] for i in range(63)]})
    rewrite(folder / 'good.zip', folder / 'misses.zip', lambda name, data: missing if name == 'dataset.json' else data)
    other = encode_png(np.zeros([1, 8, 10], np.uint8))
    rewrite(folder / 'good.zip', folder / 'size.zip', lambda name, data: other if name == tenth else data)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cli')
    make_inputs(folder)
    return folder


@pytest.fixture
def here(inputs, monkeypatch, tmp_path):
    """The inputs as the working directory; the run's folders go to the returned one."""
    monkeypatch.chdir(inputs)
    return tmp_path / 'runs'


def invoke(*args):
    return CliRunner().invoke(train.main, [str(arg) for arg in args])


def refused(*args, outdir='runs'):
    """The one line of a refusal; nothing may be left in outdir."""
    given = [arg.split('=')[0] for arg in args]
    defaults = [arg for arg in [f'--outdir={outdir}', '--data=good.zip', '--duration=0.000016', *NET] if arg.split('=')[0] not in given]
    result = invoke(*defaults, *args)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    lines = result.output.strip().splitlines()
    assert [line for line in lines if line.startswith('Error: ')] == lines[-1:], result.output
    assert 'Traceback' not in result.output and 'Usage:' not in result.output
    assert len(lines[-1]) < 400
    assert not os.path.exists(outdir) or not list(Path(outdir).rglob('*')), 'something is left behind'
    return lines[-1]


@pytest.mark.parametrize('args, words', [
    # Data.
    (['--data=nowhere.zip'], ['nowhere.zip', 'no such']),
    (['--data=cut.zip'], ['cut.zip', 'not a whole zip']),
    (['--data=empty'], ['empty', 'no images']),
    (['--data=size.zip'], ['size.zip', 'img00000010.png', '8x10', '8x8', '--resolution']),
    (['--data=cutpng.zip'], ['cutpng.zip', 'img00000010.png', 'cannot read']),
    (['--data=misses.zip', '--cond=1'], ['misses.zip', 'misses 1 of 64', 'img00000063.png']),
    (['--data=nolabels.zip', '--cond=1'], ['--cond=1', 'nolabels.zip', '--cond=0']),
    (['--val=nowhere.zip'], ['nowhere.zip']),
    (['--val=1.5'], ['--val=1.5', 'between 0 and 1']),
    (['--val=0'], ['--val=0']),
    (['--val=nan'], ['--val=nan']),
    (['--val=0.999'], ['--val']),
    (['--val=0.001'], ['--val']),
    # Numbers.
    (['--batch-gpu=5'], ['--batch=16', '--batch-gpu=5', 'try --batch-gpu=4']),
    (['--batch=0'], ['--batch']),
    (['--sigma=-0.1'], ['--sigma=-0.1']),
    (['--sigma=nan'], ['--sigma=nan']),
    (['--sigma=inf'], ['--sigma=inf']),
    (['--sigma=0.2', '--corruption_probability=1.5'], ['--corruption-probability=1.5', 'between 0 and 1']),
    (['--sigma=0.2', '--corruption_probability=nan'], ['--corruption-probability=nan']),
    (['--dataset_keep_percentage=0'], ['--dataset-keep-percentage=0', 'more than 0']),
    (['--dataset_keep_percentage=nan'], ['--dataset-keep-percentage=nan']),
    (['--dataset_keep_percentage=100'], ['--dataset-keep-percentage=100', 'at most 1']),
    (['--dataset_keep_percentage=0.001'], ['--dataset-keep-percentage=0.001', 'keeps none of the 64']),
    (['--lr=0'], ['--lr', 'above 0']),
    (['--lr=nan'], ['--lr']),
    (['--ema=-1'], ['--ema']),
    (['--dropout=1'], ['--dropout']),
    (['--seed=-1'], ['--seed']),
    (['--sigma-data=0'], ['--sigma-data']),
    (['--duration=inf'], ['--duration']),
    (['--consistency_coeff=1', '--consistency_batch_size=17'], ['--consistency-batch-size=17', '--batch=16']),
    (['--sigma=0.2', '--corruption-protocol=published', '--corruption-seed=1'], ['--corruption-seed=1']),
    # Slots.
    (['--noise=gauss'], ['--noise=gauss', ', '.join(NOISE)]),
    (['--noise=lognormal:men=1'], ['"men"', 'mean=-1.2, std=1.2']),
    (['--noise=lognormal:std=0'], ['--noise=lognormal:std=0', 'std']),
    (['--noise=lognormal:std=abc'], ['"std" must be a number']),
    (['--noise=lognormal:mean'], ['key=value']),
    (['--noise=loguniform:min=3,max=2'], ['--noise=loguniform:min=3,max=2']),
    (['--noise=iddpm_levels:steps=1.5'], ['whole number']),
    (['--weight=min'], ['--weight=min', ', '.join(WEIGHTS)]),
    (['--weight=snr:gamma=5'], ['"gamma"', 'signal=1.0']),
    (['--weight=snr:signal=-1'], ['--weight=snr:signal=-1', 'must be positive']),
    (['--weight=edm:sigma_data=nan'], ['--weight=edm:sigma_data=nan']),
    (['--penalty=huber'], ['--penalty=huber', ', '.join(PENALTIES)]),
    (['--penalty=squared:c=1'], ['"c"', 'no keys']),
    (['--pairing=best'], ['--pairing=best', ', '.join(PAIRINGS)]),
    (['--pairing=skip:buffer=0.5'], ['buffer=0.5', '1 or more']),
    (['--pairing=clamp:buffer=2'], ['buffer=2']),
    (['--sigma=200', '--corruption_probability=1', '--noise=loguniform'], ['--pairing=skip']),
    (['--sigma=0.2'], ['--sigma=0.2', '--corruption-probability', 'does nothing']),
    (['--corruption_probability=0.9'], ['--corruption-probability=0.9', '--sigma', 'does nothing']),
    (['--expr-id=a/b'], ['--expr-id', '"a/b"', '--outdir']),
    (['--desc=..'], ['--desc', '".."']),
    # Gradients and averages.
    (['--clip=-1'], ['--clip', '"-1"']),
    (['--gns=1'], ['--gns=1', '--batch-gpu']),
    (['--power-ema=0.05,0.5'], ['--power-ema', 'sigma_rel=0.5']),
    (['--power-ema=0.05', '--snap=0'], ['--power-ema', '--snap=0']),
    # Network and arithmetic.
    (['--cbase=48'], ['144 channels', '--cbase', '--cres']),
    (['--cres=1,1,1,1,1'], ['8x8', 'multiple of 16']),
    (['--cres=a'], ['--cres', '"a"']),
    (['--cres=0'], ['channels']),
    (['--attn=x'], ['--attn', '"x"']),
    (['--arch=unet'], ['--arch', 'ddpmpp']),
    (['--arch=ddpmpp:cbase=16'], ['--cbase=8', '--arch=ddpmpp:cbase=16', 'given twice']),
    (['--arch=ddpmpp:depth=3'], ['"depth"', 'cbase=128', 'cres=2|2|2']),
    (['--arch=adm:label_dim=3'], ['"label_dim"']),
    (['--arch=ddpmpp:embedding_type=sine'], ['embedding_type=sine', 'positional, fourier']),
    # Optimizer and terms.
    (['--optimizer=adam:weight_decay=0.2', '--weight-decay=0.1'],
     ['--weight-decay=0.1', '--optimizer=adam:weight_decay=0.2', 'given twice']),
    (['--optimizer=sgd'], ['--optimizer=sgd', 'adam, adamw']),
    (['--optimizer=adam:beta1=1'], ['--optimizer=adam:beta1=1', 'beta1=1 must be']),
    (['--optimizer=adamw:weight_decay=-1'], ['--optimizer=adamw:weight_decay=-1']),
    (['--lr-schedule=linear'], ['--lr-schedule=linear', 'constant, cosine, inverse_sqrt']),
    (['--lr-schedule=inverse_sqrt:ref=-1'], ['--lr-schedule=inverse_sqrt:ref=-1', 'ref=-1 must be']),
    (['--lr-schedule=cosine:least=2'], ['--lr-schedule=cosine:least=2', 'least=2']),
    (['--lr-schedule=cosine:kimg=-1'], ['--lr-schedule=cosine:kimg=-1', 'kimg=-1']),
    (['--term=denoise'], ['--term=denoise', 'the same name']),
    (['--consistency=bridge:batch_size=4', '--term=euler:batch_size=4'], ['denoise, consistency, consistency', 'the same name']),
    (['--term=bound'], ['--term=', '--precond=iddpm', '--objective']),
    (['--term=bridge:batch_size=17'], ['--term=bridge:batch_size=17', '--batch=16']),
    (['--precond=ddpm'], ['--precond', 'iddpm']),
    (['--precond=ve', '--sigma-data=0.3'], ['--sigma-data=0.3', '--precond=edm']),
    (['--fp16=1', '--precision=bf16'], ['--fp16=1', '--precision=bf16']),
    pytest.param(['--fp16=1'], ['fp16', 'GPU', 'bf16'], marks=CPU_ONLY),
    pytest.param(['--precision=fp16'], ['fp16', 'GPU', 'bf16'], marks=CPU_ONLY),
    # What a run starts from, and where it goes.
    (['--resume=good.zip'], ['good.zip', 'training state']),
    (['--resume=text.pt'], ['text.pt', 'training state']),
    (['--resume=other.pt'], ['other.pt', 'lacks', 'optimizer']),
    (['--arch=ddpmpp:dropout=1'], ['dropout=1 must be 0 or more and below 1']),
    (['--resume=nowhere.pt'], ['nowhere.pt', 'no such']),
    (['--resume=text.pt', '--transfer=network'], ['--resume=FILE', '--transfer']),
    (['--transfer=nowhere'], ['nowhere', 'no such']),
    (['--transfer=empty'], ['empty', 'config.json']),
    (['--outdir=way'], ['way']),
    (['--outdir=way/below'], ['way']),
    (['--outdir=/proc/nowhere'], ['/proc/nowhere']),
    # The line itself.
    (['--batsh=4'], ['--batsh', '--batch']),
    (['stray'], ['stray']),
    (['--cond=perhaps'], ['--cond', 'perhaps']),
])
def test_refusals(here, args, words):
    line = refused(*args, outdir=here)
    for word in words:
        assert word in line, line


def test_required_options():
    for args, word in [(['--data=good.zip'], '--outdir'), (['--outdir=runs'], '--data')]:
        result = invoke(*args)
        assert result.exit_code == 2 and result.output.splitlines() == [f"Error: Missing option '{word}'."]


def test_transfer_of_nothing_that_fits(here, monkeypatch):
    """Refused after the folder was made, which is taken back."""
    monkeypatch.setattr(build, 'load_network', lambda ref: torch.nn.Linear(7, 3))
    assert 'none of its tensors fits' in refused('--transfer=other', outdir=here)
    assert 'none of its tensors fits' in refused('--transfer=other', '--nosubdir', '--tensorboard', outdir=here)


def test_a_run_is_not_overwritten(here):
    args = [f'--outdir={here}', '--data=good.zip', '--duration=0.000016', '--snap=0', '--dump=0', '--nosubdir', *NET]
    assert invoke(*args).exit_code == 0
    before = (here / 'stats.jsonl').read_bytes()
    result = invoke(*args)
    assert result.exit_code == 1 and 'already holds a run' in result.output.splitlines()[-1]
    assert (here / 'stats.jsonl').read_bytes() == before


def test_a_refused_start_leaves_other_files_alone(here):
    here.mkdir()
    (here / 'notes.txt').write_text('mine')
    result = invoke(f'--outdir={here}', '--data=cutpng.zip', '--nosubdir', *NET)
    assert result.exit_code == 1 and [path.name for path in here.iterdir()] == ['notes.txt']


@pytest.mark.parametrize('package', ['wandb', 'tensorboard'])
def test_mirrors_without_their_package(here, monkeypatch, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *args: None if name == package else find_spec(name, *args))
    line = refused('--wandb=project' if package == 'wandb' else '--tensorboard', outdir=here)
    assert line == f'Error: --{package} needs the package {package}: pip install {package}'


def torchrun(*args, cwd):
    command = launch.command(tiny.ROOT / 'train.py', args, ranks=2)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'})


@pytest.mark.parametrize('args, words', [
    (['--batch=1'], '--batch=1 is smaller than the 2 ranks'),          # met by all ranks
    (['--batch=16', '--outdir=way'], 'way: File exists'),              # met by rank 0 alone, while the other waits for it
])
def test_ranks_say_it_once(here, args, words):
    result = torchrun(f'--outdir={here}', '--data=good.zip', *NET, *args, cwd=os.getcwd())
    assert result.returncode != 0
    assert result.stderr.count('Error: ') - result.stderr.count('ChildFailedError: ') == 1, result.stderr
    assert f'Error: {words}' in result.stderr and '[rank' not in result.stderr and not here.exists()


# --- what is accepted

PUBLISHED = {
    'ambient-laws': ['--outdir=runs', '--data=good.zip', '--sigma=0.2', '--corruption_probability=0.9', '--dataset_keep_percentage=1.0',
                     '--consistency_coeff=1.0', '--consistency_batch_size=8', '--num_consistency_steps=4', '--num_primes=3',
                     '--with_weight=False', '--with_grad=True', '--expr_id=x', '--weight_decay=0.01', '--batch=16', '--cbase=8',
                     '--cres=1,2'],
    'edm': ['--outdir=runs', '--data=good.zip', '--cond=1', '--arch=ncsnpp', '--precond=ve', '--duration=200', '--batch=16',
            '--batch-gpu=8', '--cbase=8', '--cres=1,2', '--lr=2e-4', '--ema=50', '--dropout=0.1', '--augment=0.0', '--xflip=1',
            '--fp16=1', '--ls=100', '--bench=1', '--cache=1', '--workers=4', '--desc=text', '--nosubdir', '--tick=200', '--snap=10',
            '--dump=50', '--seed=3', '--dry-run'],
    'edm resume': ['--outdir=runs', '--data=good.zip', '--resume=latest', '--batch=16', '--cbase=8', '--cres=1,2', '-n'],
    'edm transfer': ['--outdir=runs', '--data=good.zip', '--transfer=network.pkl', '--batch=16', '--cbase=8', '--cres=1,2', '-n'],
}


def dry_run(*args):
    result = invoke(*args, '--dry-run')
    assert result.exit_code == 0, result.output
    return json.JSONDecoder().raw_decode(result.output)[0], result.output


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_command_lines(here, monkeypatch, name):
    tiny.pretend_gpu(monkeypatch, (7, 5), compiler=False)  # for --fp16
    before = sorted(Path('.').rglob('*'))
    config, output = dry_run(*PUBLISHED[name])
    assert sorted(Path('.').rglob('*')) == before, 'a dry run writes nothing'
    assert 'M parameters' in output.splitlines()[-1] and 'network evaluations' in output.splitlines()[-1]
    if name == 'ambient-laws':
        assert config['corruption'] == dict(sigma=0.2, probability=0.9, seed=0, protocol='fixed', labels=None, sigma_min_as='limit')
        first, second = config['objective']['terms']
        assert first == 'denoise' and registry.parse(second) == ('euler', dict(
            estimator='mean', coeff=1.0, batch_size=8, steps=3, samples=3, weighted=False, stop='no', grad=True))
        assert config['run']['expr_id'] == 'x' and registry.parse(config['optimizer']['kind']) == ('adam', {'weight_decay': 0.01})
    if name == 'edm':
        assert config['network'] == dict(cep=None, transfer=None, teacher=None, arguments=ARCHS['ncsnpp']() | dict(
            img_resolution=8, img_channels=1, label_dim=3, use_fp16=True, precond='ve', dropout=0.1, model_channels=8,
            channel_mult=[1, 2]))
        run, optimizer = config['run'], config['optimizer']
        assert (run['precision'], optimizer['loss_scale'], run['duration_kimg'], run['tick_kimg']) == ('fp16', 100, 200e3, 200)
        assert (run['batch_gpu'], optimizer['ema_halflife_kimg'], run['seed'], run['desc']) == (8, 50e3, 3, 'text')
        assert config['data'].pop('fingerprint')['images'] == 64
        assert config['data'] == dict(path='good.zip', use_labels=True, keep=1.0, xflip=True, augment=0.0, validation=None, cache_gib=8,
                                      cache_dir=None, on='auto', workers=4)


@pytest.mark.parametrize('name, noise, weight', [('edm', 'lognormal', 'edm'), ('vp', 'vp_uniform', 'snr'), ('ve', 'loguniform', 'snr'),
                                                 ('iddpm', 'iddpm_levels', 'snr')])
def test_preconditioning_brings_its_published_objective(here, name, noise, weight):
    config, _ = dry_run('--outdir=runs', '--data=good.zip', f'--precond={name}', *NET)
    assert (config['objective']['noise'], config['objective']['weight']) == (noise, weight)
    config, _ = dry_run('--outdir=runs', '--data=good.zip', f'--precond={name}', '--weight=uniform', '--noise=lognormal:mean=-0.5', *NET)
    assert (config['objective']['noise'], config['objective']['weight']) == ('lognormal:mean=-0.5', 'uniform')


def options(*args):
    return configure(EasyDict(train.main.make_context('train', ['--outdir=runs', '--data=good.zip', *NET, *args]).params))


@pytest.mark.parametrize('args', [
    ['--sigma=0.3', '--corruption_probability=0.5', '--cond=1', '--xflip=1', '--val=0.1'],
    *[[f'--precond={name}', '--consistency_coeff=0.5', '--consistency_batch_size=4'] for name in PRECONDS],
    ['--arch=adm', '--cbase=32', '--sigma-data=0.3', '--weight=snr:signal=2', '--noise=lognormal:mean=-0.4,std=1',
     '--pairing=truncate:buffer=1.2']])
def test_configuration_goes_through_json_and_makes_the_same_objects_again(here, args):
    """options.json describes the run: what is read from it builds the same network and the same objective."""
    config = options(*args, '--seed=1')
    again = from_json(json.loads(json.dumps(to_json(config), allow_nan=False)))
    assert again == config and again == options(*args, '--seed=1')
    found = []
    for c in (config, again):
        kept = copy.deepcopy(c)
        net = build_network(c.network.arguments)
        noise, objective = build_objective(c.objective, net, c.run.batch)
        assert c == kept, 'building changes nothing in the configuration'
        found.append((net, noise, objective))
    (net, noise, objective), (net2, noise2, objective2) = found
    assert str(net) == str(net2) and net.config == net2.config == config.network.arguments
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert torch.equal(noise.icdf(u), noise2.icdf(u))
    assert list(objective.terms) == list(objective2.terms)
    for name, term in objective.terms.items():
        assert plain(term) == plain(objective2.terms[name])


def plain(term):
    """The settings of a term of the objective: numbers as they are, pieces by name and options."""
    return {key: (value.func.__name__, value.keywords) if hasattr(value, 'func') else getattr(value, '__name__', type(value).__name__)
            if not isinstance(value, (int, float, bool, str)) else value for key, value in vars(term).items() if not key.startswith('_')}


@pytest.mark.parametrize('change, words', [
    (lambda c: c.update(colour='red'), 'unknown key "colour"; it holds data, corruption, network, objective, optimizer, run'),
    (lambda c: c['optimizer'].update(momentum=1), 'unknown key "optimizer.momentum"; optimizer. holds kind, lr'),
    (lambda c: c['data']['validation'].update(count=1), 'unknown key "data.validation.count"'),
    (lambda c: c['run'].pop('seed'), 'missing key "run.seed"'),
    (lambda c: c.pop('data'), 'missing key "data"'),
    (lambda c: c['run'].update(seed='one'), '"run.seed" must be int, got \'one\''),
    (lambda c: c['run'].update(batch=True), '"run.batch" must be int, got True'),
    (lambda c: c['data'].update(xflip=1), '"data.xflip" must be bool, got 1'),
    (lambda c: c.update(optimizer='adam'), '"optimizer" must be an object, got str'),
    (lambda c: c['objective'].update(weight=None), '"objective.weight" must be str, got None')])
def test_a_configuration_with_other_keys_or_kinds_is_refused(here, change, words):
    values = to_json(options('--val=0.2', '--seed=1'))
    change(values)
    with pytest.raises(UserError) as err:
        from_json(values)
    assert f'configuration: {words}' in err.value.message and '\n' not in err.value.message


PUBLISHED_KEYS = ['--cbase=16', '--cres=1,2,2', '--blocks=2', '--attn=4,2', '--dropout=0.2']


@pytest.mark.parametrize('arch', ['adm', 'ddpmpp', 'ncsnpp'])
def test_published_options_of_the_network_equal_its_keys(here, arch):
    """--cbase and its companions are keys of --arch under another spelling, one by one and together."""
    def arguments(*args):
        flags = ['--outdir=runs', '--data=good.zip', '--batch=16', '--seed=1', *args]
        return configure(EasyDict(train.main.make_context('train', flags).params)).network.arguments

    keys = [flag.removeprefix('--').replace(',', '|') for flag in PUBLISHED_KEYS]
    for flag, key in zip(PUBLISHED_KEYS, keys):
        assert arguments(f'--arch={arch}', flag) == arguments(f'--arch={arch}:{key}') != arguments(f'--arch={arch}')
    together = arguments(f'--arch={arch}:{",".join(keys)}')
    assert arguments(f'--arch={arch}', *PUBLISHED_KEYS) == together
    assert together.items() >= dict(model_channels=16, channel_mult=[1, 2, 2], num_blocks=2, attn_resolutions=[4, 2], dropout=0.2).items()


def test_weight_decay_is_a_key_of_the_optimizer(here):
    decayed = options('--weight-decay=0.1', '--seed=1')
    assert decayed == options('--optimizer=adam:weight_decay=0.1', '--seed=1')
    assert options('--weight-decay=0', '--seed=1').optimizer == options('--seed=1').optimizer
    assert options('--optimizer=adamw', '--weight-decay=0').optimizer.kind == 'adamw:weight_decay=0.0'  # its own is not 0


# --- what it says of itself

def test_help_is_short_and_in_groups():
    text = CliRunner().invoke(train.main, ['--help']).output
    assert text.count('\n') < 100 and max(map(len, text.splitlines())) <= 120
    for option in train.main.params:
        assert option.help and max(option.opts, key=len) in text
        assert option.name in ('version', 'help') or option.group in text
        row = getattr(option, 'row', option.help.split('  [')[0])
        assert ' '.join(row.split())[:40] in ' '.join(text.split()), option.name
    assert CliRunner().invoke(train.main, ['-h']).output == text


@pytest.mark.parametrize('option', [param for param in train.main.params if isinstance(param.type, Spec)], ids=lambda param: param.name)
def test_help_of_a_slot(option):
    """Each choice with a sentence, and its keys with their defaults."""
    result = CliRunner().invoke(train.main, [f'{option.opts[0]}=help'])
    assert result.exit_code == 0, result.output
    for name, text, keys in registry.listing(option.type.registry):
        assert len(text) > 10 and name in result.output, name
        for key, value in keys.items() if option.type._keys else ():
            assert f'{key}={value}' in ' '.join(result.output.split()), (name, key)


@pytest.mark.parametrize('command', [['train', '--preset=help'], *([script, flag] for script in SCRIPTS if '.' not in script
                                                                   for flag in ('--help', '--version', '--nonsense'))], ids=' '.join)
def test_answers_without_torch(command):
    """Which takes seconds to import; and each help is short, but for the list of the presets."""
    code = ('import importlib, sys\ntry: importlib.import_module(sys.argv[1]).main(sys.argv[2:])\nexcept SystemExit: pass\n'
            'assert not {"torch", "numpy"} & sys.modules.keys(), "imported"')
    done = subprocess.run([sys.executable, '-c', code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('\n') < (200 if command[1] == '--preset=help' else 100)


def test_words_of_the_options_are_those_of_the_program():
    """They are written down twice, so that --help need not import what knows them."""
    choices = {param.name: list(param.type.choices) for param in train.main.params if isinstance(param.type, click.Choice)}
    assert choices == {'corruption_protocol': list(corruption.PROTOCOLS), 'sigma_min_as': list(corruption.SIGMA_MIN_AS),
                       'ambient_weight': ['none', 'inverse'], 'precision': ['auto', *misc.PRECISIONS], 'data_on': list(device.PLACES),
                       'checkpoint': ['none', 'blocks', 'auto']}
    assert f'exit with code {STOPPED}' in next(param.help for param in train.main.params if param.name == 'max_hours')


@pytest.mark.parametrize('script', SCRIPTS)
def test_version(script):
    result = CliRunner().invoke(importlib.import_module(script).main, ['--version'])
    assert result.exit_code == 0
    parts = dict(part.split(' ', 1) for part in result.output.strip().split(', '))
    assert parts.keys() == {'version', 'commit', 'python', 'torch', 'cuda'} and parts['torch'] == str(torch.__version__)
