# SPDX-License-Identifier: Apache-2.0
"""Every command of docs/ runs, in the order of its page, on small stand-ins and at a small size; those that cannot are named with a reason.

tests/test_readme.py runs README's, and checks that all of them are written as the program understands them."""

import shutil

import numpy as np
import pytest

from tests.support import ROOT, launch, stand_ins
from tests.test_readme import PAGES, TINY, commands, script_and_args, tiny

pytestmark = pytest.mark.slow

# Why a command is not run here, by what it begins with or holds.
NOT_RUN = {'pip ': 'tests/test_install.py installs the package; further packages come from the index',
           'make ': 'starts the tests',
           'pytest': 'starts the tests',
           'tests.kill_matrix': 'takes hours; tests/test_kill_matrix.py runs it once',
           '...': 'stands for any command of its script',
           'my_train.py': 'tests/test_extension.py runs it',
           'hf:': 'needs the network',
           'https://': 'needs the network',
           'DiT-XL-2-256x256.pt': 'published weights: tests/training/checkpoints/test_published.py runs it with small ones',
           'edm2-img512': 'published weights: tests/training/checkpoints/test_edm2.py runs it with small ones',
           'edm2-img64-s-1': 'published weights: tests/training/checkpoints/test_edm2.py runs it with small ones',
           'srun ': 'needs Slurm; tests/test_nodes.py starts several nodes',
           '--nnodes=2': 'waits for a second machine; tests/test_nodes.py starts several nodes',
           'benchmarks/networks.py --data': 'trains 45 networks; its other command is run',
           'benchmarks/price.py': 'trains a grid; tests/benchmarks/test_price.py runs a tiny one',
           'benchmarks/pairing.py': 'trains 9 networks; tests/benchmarks/test_pairing.py runs small ones',
           'speed.py training': 'takes minutes; speed.py all, at its smallest, runs it',
           'benchmarks/small_detector.py': 'needs labelled photographs; tests/benchmarks/test_small_detector.py runs it',
           'benchmarks/distillation.py': 'needs a grid of benchmarks/price.py; tests/benchmarks/test_distillation.py has its parts',
           'examples/blurred.py': 'trains several networks; tests/test_blurred.py runs a tiny one',
           'annotation.py --source=cifar10': 'needs the photographs; its other commands are run',
           'refinement.py --scale=cifar8': 'needs the photographs; its other command is run',
           'noise_levels.py accuracy': 'needs the photographs; its other commands are run',
           'evaluation.py parity': 'needs the independent implementations; tests/benchmarks/test_parity.py runs it with those at hand'}
# Pages whose commands begin with a published network for pictures or texts; the tests run them from end to end with a stand-in for it.
ELSEWHERE = {'latents.md': 'tests/test_latents.py', 'text.md': 'tests/test_text.py'}
# Options of the page that need the published Inception network, which is not at hand, and what stands in for them.
OTHERS = {'fid,fid_inf,sfid,kid': 'fid,kid', '--intervals': '', 'fid,kid,is,pr,dc': 'fid,kid,pr,dc', '--guidance=1,1.5,2': '',
          '--metrics-ref=cifar-ref.npz': '--metrics-ref=cifar-ref.npz --metrics-num=8 --metrics-detector=pixels', 'ema:0.1': 'ema:0.10',
          'a.json': 'NAME.heun18-pixels-3x8.fid.json', 'b.json': 'out.fid.json', '--data=FILE': '--data=images',
          'runs/*/*.fid.json': '*.fid.json'}
# Options of TINY that a command does not take, by what tells of it.
REFUSED = {'--arch=': ('--cbase', '--cres', '--blocks', '--attn', '--dropout'),
           '--preset=edm2': ('--cbase', '--cres', '--blocks', '--attn'), '--method=vlb': ('--rtol', '--atol', '--sigma-min'),
           '--dequantise': ('--sigma-min',)}
# Benchmarks, at a size that shows that they run.
SMALL = {'counts': ['--duration=0.0002', '--num=2'],
         'denoising': ['--num=2', '--samples=2'], 'consistency_bias': ['--points=50', '--samples=4'],
         'consistency_toys mixture': ['--arms=none', '--seeds=1', '--steps=3'],
         'consistency_toys digits': ['--arms=none', '--seeds=1', '--kimg=0.256', '--images=8'],
         'large_data': ['--images=64', '--size=8', '--seconds=1'], 'intervals frechet': ['--repetitions=4'],
         'intervals kernel': ['--repetitions=4'], 'evaluation features': ['--images=2', '--size=8', '--threads=1'],
         'improved_ddpm': ['--kimg=0.256', '--seeds=0-0', '--images=8'], 'outliers': ['--seeds=2', '--data=mixture'],
         'noise_levels speed': ['--images=400'], 'noise_levels wrong': ['--draws=1000'],
         'mixture_theory': ['--repetitions=2'], 'corruption_theory': ['--repetitions=2'],
         'label_noise': ['--sets=few', '--arms=none', '--seeds=1', '--kimg=0.256', '--images=200'],
         'refinement': ['--seeds=1', '--arms=continued,ode', '--rounds=1', '--duration=0.0002', '--mimg=0.0002', '--samples=8',
                        '--steps=2'],
         'annotation': ['--num=200', '--defects=blur:0.8'],
         'speed limits': ['--seconds=0.01', '--size=64'], 'speed all': ['--quick'],
         'states': ['--cbase=16'], 'traffic': ['--arch=ddpmpp:cbase=32,cres=1|1,blocks=1,attn=4', '--size=8'],
         'price_fit': ['--repetitions=2'], 'sampling': ['--images=2', '--batch=2', '--steps=2', '--repeats=1']}


def reason(line):
    return next((why for part, why in NOT_RUN.items() if part in f'{line} '), None)


def prepare(folder, page):
    """The stand-ins, and runs with a network for the pages that take one up."""
    stand_ins.pictures(folder)
    stand_ins.converted(folder)
    if page == 'data.md':
        for make in (stand_ins.published_sets, stand_ins.containers, stand_ins.scientific):
            make(folder)
    if page == 'noise.md':  # enough images for a common level
        stand_ins.write_zip(folder / 'images.zip', 16, 16)
        for k in range(16):
            (folder / 'images' / f'{k}.png').write_bytes(stand_ins.png(stand_ins.RNG.integers(0, 256, (16, 16, 3), np.uint8)))
    if page == 'counts.md':
        for name in ('counts', 'clean', 'test'):
            np.save(folder / f'{name}.npy', stand_ins.RNG.poisson(20, (4, 16, 16)))
        stand_ins.write_zip(folder / 'magnitudes.zip', 16, 16, channels=1)
    discrete = ['--precond=iddpm', '--objective=hybrid', '--diffusion=cosine:steps=8'] if page == 'improved_ddpm.md' else []
    for name in ('00000-mix', '00001-edm'):
        args = [f'--outdir=runs/{name}', '--nosubdir', '--data=cifar.zip', '--power-ema=0.05,0.1', *discrete]
        call(folder, 'train.py', args)
    run = folder / 'runs' / '00000-mix'
    shutil.copytree(sorted(run.glob('network-snapshot-*'))[-1], folder / 'NAME')
    shutil.copytree(folder / 'NAME', folder / 'REF')
    shutil.copy(sorted(run.glob('training-state-*'))[-1], folder / 'training-state.pt')


def reduced(script, args):
    """The arguments at a small size: those of a benchmark's SMALL, or of TINY where the command takes them."""
    name = script.removeprefix('benchmarks/')[:-3]
    if script.startswith('benchmarks/'):
        return [*args, *SMALL.get(f'{name} {args[0]}' if args else name, SMALL.get(name, []))]
    found, line = tiny(script, args), ' '.join(args)
    for mark, refused in REFUSED.items():
        if mark in line:
            found = [arg for arg in found if arg in args or not arg.startswith(refused)]
    return found


def call(folder, script, args):
    args = reduced(script, args)
    result = launch.run(ROOT / script, args, cwd=folder)
    assert result.returncode == 0, f'{script} {" ".join(args)}\n{result.stdout}\n{result.stderr}'


def stood_in(word, folder):
    """The words that stand for one of the page: files of a pattern, and options that go without the published Inception network."""
    words = [word]
    for part, instead in OTHERS.items():
        if part in word:
            words = word.replace(part, instead).split()
    if words and '*' in words[0] and not word.startswith('-'):
        return sorted(str(path.relative_to(folder)) for path in folder.glob(words[0]))
    return words


@pytest.mark.parametrize('page', [page for page in PAGES[1:] if page.name not in ELSEWHERE], ids=lambda page: page.name)
def test_commands_run(page, tmp_path):
    prepare(tmp_path, page.name)
    failures = []
    for words in commands(page):
        line = ' '.join(words)
        if reason(line):
            continue
        script, args = script_and_args(words)
        if 'DIR/' in line:  # a network that an earlier command of the page has trained there
            trained = max(tmp_path.glob('DIR/*/network-snapshot-*/config.json'), default=tmp_path / 'NAME' / 'config.json').parent
            args = [f'--network={trained}' if arg == '--network=NAME' else arg for arg in args]
        args = [one for word in args for one in stood_in(word, tmp_path)]
        try:
            call(tmp_path, script, args)
        except AssertionError as err:
            failures.append(str(err)[-1500:])
    assert not failures, '\n\n'.join(failures)


def test_stand_ins_are_images():
    assert np.ptp(stand_ins.PICTURES) > 200 and 'train' in TINY
