# SPDX-License-Identifier: Apache-2.0
"""Improved DDPM (Nichol & Dhariwal 2021) on handwritten digits: schedules, objectives, few steps, and the noise of gradients.

python benchmarks/improved_ddpm.py --outdir=iddpm --seeds=0,1,2 --jobs=2"""

import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from torch_utils.command_line import Command, ints  # noqa: E402 (the folder above had to be found first)

COUNT, STEPS, FEW = 898, 250, 25  # half of the digits; timesteps trained on; steps sampled in
TRAIN = ['--cond=1', '--precond=iddpm', '--arch=ddpmpp', '--cbase=24', '--cres=1,2', '--blocks=1', '--attn=4', '--augment=0',
         '--dropout=0.05', '--batch=128', '--lr=2e-3', '--lr-rampup=0.01', '--ema=0.008', '--tick=5', '--snap=1000', '--dump=0', '--samples=0',
         '--gns=1', '--batch-gpu=64']
ARMS = {  # name -> options
    'linear, simple': ['--objective=simple', f'--diffusion=linear:steps={STEPS}'],
    'cosine, simple': ['--objective=simple', f'--diffusion=cosine:steps={STEPS}'],
    'cosine, hybrid': ['--objective=hybrid', f'--diffusion=cosine:steps={STEPS}'],
    'cosine, vlb': ['--objective=vlb', f'--diffusion=cosine:steps={STEPS}'],
    'cosine, vlb, resampled': ['--objective=vlb', f'--diffusion=cosine:steps={STEPS}', '--timesteps=second_moment'],
}
# What the networks of an objective are sampled with.
VARIANCES = {'simple': ['small', 'large'], 'hybrid': ['small', 'large', 'learned'], 'vlb': ['learned']}


def run(*command):
    """A command of the project, one thread, silent unless it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if done.returncode:
        raise click.ClickException(f'{" ".join(map(str, command))}: {(done.stderr or done.stdout).strip().splitlines()[-1]}')


def read(path):
    """A JSON file."""
    return json.loads(Path(path).read_text(encoding='utf-8'))


def distance(network, folder, name, *sampler):
    """Fréchet distance in pixel space to the held-out digits, of as many samples."""
    result = folder / f'{name}.json'
    run('eval_fid.py', f'--network={network}', f'--ref-stats={folder.parent / "reference.npz"}', '--detector=pixels', '--metrics=fid',
        f'--seeds=0-{COUNT - 1}', f'--num={COUNT}', f'--out-path={result}', *sampler)
    return read(result)['fid_score']


def bits(network, folder, name, *options):
    """Bits per dimension of held-out digits."""
    result = folder / f'{name}.json'
    run('eval_nll.py', f'--network={network}', f'--data={folder.parent / "reference.zip"}', f'--out-path={result}', *options)
    return read(result)['bits_per_dim']


def evaluate(outdir, name, seed, kimg, images):
    """{measure: value} of one arm and seed: trained, then looked at with its own and with fixed variances."""
    folder = outdir / f'{name.replace(", ", "-")}-{seed}'
    run('train.py', f'--outdir={folder}', '--nosubdir', f'--data={outdir / "train.zip"}', *TRAIN, *ARMS[name], f'--seed={seed}',
        f'--duration={kimg / 1e3}')
    network = max(folder.glob('network-snapshot-*'))
    found = {'vlb': bits(network, folder, 'vlb', '--method=vlb', f'--num={images}'),
             'vlb few': bits(network, folder, 'vlb-few', '--method=vlb', f'--num={images}', f'--steps={FEW}')}
    for variance in VARIANCES[name.split(', ')[1]]:
        found[f'fd {variance}'] = distance(network, folder, f'fd-{variance}', f'--steps={FEW}', f'--sampler=ancestral:variance={variance}')
    lines = [json.loads(line) for line in (folder / 'stats.jsonl').read_text(encoding='utf-8').splitlines()]
    late = [line for line in lines if line.get('GNS/signal') is not None][-4:]
    found['gns'] = statistics.fmean(line['GNS/spread'] for line in late) / statistics.fmean(line['GNS/signal'] for line in late)
    return found


def prepare(outdir):
    """Digits for training, the other half, and its statistics."""
    outdir.mkdir(parents=True, exist_ok=True)
    for part, name in enumerate(['train', 'reference']):
        run('dataset_tool.py', '--source=digits', f'--dest={outdir / f"{name}.zip"}', f'--part={part}/2', f'--max-images={COUNT}')
    run('eval_fid.py', 'ref', f'--data={outdir / "reference.zip"}', f'--dest={outdir / "reference.npz"}', '--detector=pixels')


def show(results, seeds):
    """A table of means over the seeds, then paired differences with their standard errors."""
    measures = list(dict.fromkeys(key for found in results.values() for key in found))
    print('| | ' + ' | '.join(measures) + ' |\n|-|' + '-|' * len(measures))
    for name in ARMS:
        rows = [results[name, seed] for seed in seeds]
        cells = [f'{statistics.fmean(row[key] for row in rows):.4g}' if key in rows[0] else '' for key in measures]
        print(f'| {name} | ' + ' | '.join(cells) + ' |')
    of = lambda name, key: [results[name, seed][key] for seed in seeds]
    less = lambda a, b: [x - y for x, y in zip(a, b)]
    over = lambda a, b: [x / y for x, y in zip(a, b)]
    hybrid, simple, vlb = 'cosine, hybrid', 'cosine, simple', 'cosine, vlb'
    pairs = {'hybrid - simple, bits per dimension': less(of(hybrid, 'vlb'), of(simple, 'vlb')),
             f'hybrid - simple, bits in {FEW} steps': less(of(hybrid, 'vlb few'), of(simple, 'vlb few')),
             'cosine - linear, bits per dimension': less(of(simple, 'vlb'), of('linear, simple', 'vlb')),
             'cosine - linear, distance, small variance': less(of(simple, 'fd small'), of('linear, simple', 'fd small')),
             f'learned - small variance, {FEW} steps': less(of(hybrid, 'fd learned'), of(hybrid, 'fd small')),
             f'learned - large variance, {FEW} steps': less(of(hybrid, 'fd learned'), of(hybrid, 'fd large')),
             'gradient noise scale, vlb / hybrid': over(of(vlb, 'gns'), of(hybrid, 'gns')),
             'gradient noise scale, resampled vlb / vlb': over(of(f'{vlb}, resampled', 'gns'), of(vlb, 'gns'))}
    for name, values in pairs.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float('nan')
        print(f'{name}: {statistics.fmean(values):+.4f} +- {error:.4f} ({", ".join(f"{value:+.4f}" for value in values)})')


@click.command(cls=Command)
@click.option('--outdir', metavar='DIR', default='iddpm', show_default=True, help='Where everything goes')
@click.option('--seeds', metavar='LIST', callback=ints, default='0,1,2', show_default=True, help='Seeds of the trainings')
@click.option('--kimg', metavar='KIMG', type=float, default=50, show_default=True, help='Length of each training')
@click.option('--images', metavar='INT', type=int, default=128, show_default=True, help='Held-out digits for bits per dimension')
@click.option('--jobs', metavar='INT', type=int, default=1, show_default=True, help='Trainings at a time, each on one thread')
def main(outdir, seeds, kimg, images, jobs):
    """Train every arm with every seed, and print what came of it as a table."""
    outdir = Path(outdir).absolute()
    prepare(outdir)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {(name, seed): pool.submit(evaluate, outdir, name, seed, kimg, images) for seed in seeds for name in ARMS}
        results = {key: future.result() for key, future in futures.items()}
    lines = [{'arm': name, 'seed': seed, **found} for (name, seed), found in results.items()]
    (outdir / 'results.json').write_text(json.dumps(lines, indent=1), encoding='utf-8')
    show(results, seeds)


if __name__ == '__main__':
    main()
