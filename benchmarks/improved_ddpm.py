# SPDX-License-Identifier: Apache-2.0
"""Improved DDPM on digits, by the program's own commands: schedules, objectives, predictions, samplers at few steps, gradient noise.

python benchmarks/improved_ddpm.py train --out=runs/digits
python benchmarks/improved_ddpm.py samplers --out=runs/digits
python benchmarks/improved_ddpm.py noise --out=runs/digits"""

import contextlib
import functools
import importlib
import io
import itertools
import math
import os
import sys
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.files import read_json, write_json  # noqa: E402 (the folder above had to be found first)
from torch_utils import misc  # noqa: E402
from training.checkpoints.load import load_network  # noqa: E402
from training.data.batches import Batch  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402
from training.objective.variational import terms_of  # noqa: E402
from training.run.build import build_objective  # noqa: E402
from training.run.config import ObjectiveConfig  # noqa: E402

IMAGES, JUDGED, STEPS = 898, 128, 25  # generated images, held-out images for bits per dimension, sampling steps
TRAIN = ['--cond=1', '--precond=iddpm', '--cres=1,2', '--blocks=1', '--attn=0', '--augment=0', '--dropout=0', '--batch=128',
         '--lr-rampup=0.01', '--ema=0.006', '--tick=16', '--snap=1000', '--dump=0', '--samples=0', '--threads=1']
WIDTH, LR = 16, 2e-3  # --cbase, and --lr at that width; for other widths it is scaled by 1 / sqrt(width)
ARMS = {  # (--objective, schedule, --timesteps, width, --prediction)
    'linear, simple': ('simple', 'linear', 'uniform', WIDTH, 'eps'),
    'cosine, simple': ('simple', 'cosine', 'uniform', WIDTH, 'eps'),
    'cosine, hybrid': ('hybrid', 'cosine', 'uniform', WIDTH, 'eps'),
    'cosine, vlb': ('vlb', 'cosine', 'uniform', WIDTH, 'eps'),
    'cosine, vlb, resampled': ('vlb', 'cosine', 'second_moment', WIDTH, 'eps'),
    'linear, hybrid': ('hybrid', 'linear', 'uniform', WIDTH, 'eps'),
    'cosine, hybrid, width 8': ('hybrid', 'cosine', 'uniform', 8, 'eps'),
    'cosine, hybrid, width 32': ('hybrid', 'cosine', 'uniform', 32, 'eps'),
    'cosine, hybrid, v': ('hybrid', 'cosine', 'uniform', WIDTH, 'v'),
    'cosine, hybrid, edm': ('hybrid', 'cosine', 'uniform', WIDTH, 'edm'),
    'cosine, hybrid, edm of the std': ('hybrid', 'cosine', 'uniform', WIDTH, 'edm --sigma-data=0.75'),
}
SAMPLERS = {**{name: f'ancestral:variance={name}' for name in ('small', 'large', 'learned')}, 'ddim': 'ddim', 'heun': 'heun'}
BUDGETS = 9, 17, 25, 35  # network evaluations of a sample
EVERY_SAMPLER = 'ancestral', 'ddim', 'dpmpp_2m', 'heun'
MICRO, PARTS, WARM = 32, 128, 400  # images per gradient, number of gradients, batches that fill the resampler's history


def call(script, *arguments):
    """Runs a command of the program in this process, silently."""
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(script).main([*map(str, arguments)], script, standalone_mode=False)


def make_data(path):
    """Writes the two halves of the digits, and the reference statistics of the second."""
    for part, name in enumerate(['train', 'held-out']):
        if not os.path.exists(path(f'{name}.zip')):
            call('dataset_tool', '--source=digits', f'--dest={path(f"{name}.zip")}', f'--part={part}/2')
    if not os.path.exists(path('held-out.npz')):
        call('eval_fid', 'ref', f'--data={path("held-out.zip")}', f'--dest={path("held-out.npz")}', '--detector=pixels')


def train(path, arm, seed, kimg, steps):
    """Trains one arm; returns the folder of its snapshot."""
    objective, schedule, timesteps, width, prediction = ARMS[arm]
    run = path(f'{arm.replace(", ", "-").replace(" ", "")}-{seed}')
    if not os.path.exists(run):
        call('train', f'--outdir={run}', '--nosubdir', f'--data={path("train.zip")}', *TRAIN, f'--seed={seed}', f'--duration={kimg / 1e3}',
             f'--objective={objective}', f'--diffusion={schedule}:steps={steps}', f'--timesteps={timesteps}', f'--cbase={width}',
             *f'--prediction={prediction}'.split(), f'--lr={LR * math.sqrt(WIDTH / width)}')
    return next(entry.path for entry in os.scandir(run) if entry.name.startswith('network-snapshot'))


def judge(path, network, images):
    """{name: value} for a network: bits per dimension of held-out digits, and the Fréchet distance in pixels to them for each sampler."""
    run, found = functools.partial(os.path.join, os.path.dirname(network)), {}
    variances = ['large', 'small', *(['learned'] if load_network(network).gives_variance else [])]
    for variance in variances:
        call('eval_nll', f'--network={network}', f'--data={path("held-out.zip")}', '--method=vlb', '--threads=1',
             f'--num={min(JUDGED, images)}',
             f'--variance={variance}', f'--out-path={run("bits.json")}')
        found[f'bits, {variance}'] = read_json(run('bits.json'))['bits_per_dim']
    for name, sampler in SAMPLERS.items():
        if name == 'learned' and 'learned' not in variances:
            continue
        found[f'{STEPS} steps, {name}'] = distance(path, network, sampler, STEPS, images)
    return found


def distance(path, network, sampler, evaluations, images):
    """Fréchet distance in pixels of samples with this number of network evaluations to the held-out digits; heun uses EDM's levels."""
    steps, result = (evaluations + 1) // 2 if sampler == 'heun' else evaluations, os.path.join(os.path.dirname(network), 'distance.json')
    call('eval_fid', f'--network={network}', f'--ref_stats={path("held-out.npz")}', '--detector=pixels', f'--num={images}',
         f'--seeds=0-{images - 1}', f'--sampler={sampler}', f'--steps={steps}', f'--out_path={result}')
    return read_json(result)['fid_score']


def remember(path, name, value):
    """Adds one value to figures.json."""
    figures = load(path)
    figures[name] = value
    write_json(path('figures.json'), figures)


def load(path):
    return read_json(path('figures.json')) if os.path.exists(path('figures.json')) else {}


def mean(values):
    """"mean ± standard error"."""
    values = torch.tensor(values, dtype=torch.float64)
    return f'{values.mean():.4g} ± {values.std() / len(values) ** 0.5:.2g}' if len(values) > 1 else f'{values.mean():.4g}'


def print_table(path, arms, seeds):
    """Prints a table of all values, one row per arm."""
    figures = load(path)
    columns = [f'bits, {name}' for name in ('large', 'small', 'learned')] + [f'{STEPS} steps, {name}' for name in SAMPLERS]
    print(f'| arm | {" | ".join(columns)} |\n|{" --- |" * (len(columns) + 1)}')
    for arm in arms:
        rows = [figures[f'{arm}/{seed}'] for seed in range(seeds) if f'{arm}/{seed}' in figures]
        cells = [mean([row[column] for row in rows]) if rows and column in rows[0] else '' for column in columns]
        print(f'| {arm} | {" | ".join(cells)} |')


def print_samplers(path, arm, seeds):
    """Prints the distances of one arm, one row per sampler and one column per number of evaluations."""
    figures = load(path)
    print(f'\n"{arm}":\n\n| evaluations | {" | ".join(map(str, BUDGETS))} |\n|{" --- |" * (len(BUDGETS) + 1)}')
    for sampler in EVERY_SAMPLER:
        found = [[figures.get(f'samplers/{arm}/{sampler}/{budget}/{seed}') for seed in range(seeds)] for budget in BUDGETS]
        print(f'| `{sampler}` | {" | ".join(mean([value for value in cell if value is not None]) for cell in found)} |')


# ---- gradient noise


def gradient_noise(path, network, objective, timesteps, seed):
    """tr(Sigma) / |G|^2 of the objective's gradient at the weights of a network, in images (McCandlish et al. 2018, appendix A.1).

    G is the mean over MICRO * PARTS images, Sigma the covariance of one image's gradient; both estimates are unbiased."""
    net = load_network(network).train().requires_grad_(True)
    config = ObjectiveConfig(noise=None, weight='snr', terms=terms_of(objective), timesteps=timesteps)
    _, objective = build_objective(config, net, MICRO)
    dataset = ImageDataset(path('train.zip'), use_labels=True)
    images = dataset.to_network(np.stack([dataset.decode(i) for i in dataset.raw_idx])).float()
    labels, levels = torch.from_numpy(dataset.labels(np.arange(len(dataset)))), net.own_diffusion().levels.float()

    def terms(step):
        draws = misc.Draws(misc.seed_of(seed, 'gradient noise'), step)
        pick = lambda name, count: (torch.special.ndtr(draws(name, [MICRO])) * count).long().clamp(max=count - 1)
        rows, sigma = pick('rows', len(images)), levels[pick('t', len(levels))].reshape(-1, 1, 1, 1)
        batch = Batch(images[rows], torch.zeros_like(sigma), sigma, draws('noise', images[rows].shape), class_labels=labels[rows])
        return sum(objective(net, objective.timesteps.redraw(batch, draws), draws).values())

    with torch.no_grad():
        for step in range(WARM * (timesteps != 'uniform')):
            terms(-1 - step)
            objective.timesteps.update()
    whole, squares = None, []
    for step in range(PARTS):
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(terms(step).mean(), list(net.parameters()))]).double()
        squares.append(gradient.square().sum().item())
        whole = gradient if whole is None else whole + gradient
    small, large = sum(squares) / PARTS, (whole / PARTS).square().sum().item()
    signal = (PARTS * large - small) / (PARTS - 1)
    spread = (small - large) / (1 / MICRO - 1 / (MICRO * PARTS))
    return {'spread': spread, 'signal': signal}


def print_noise(path, arm, seeds):
    """Prints the gradient noise scale of three objectives at the weights of one arm."""
    figures = load(path)
    print(f'\nat the weights of "{arm}":\n\n| gradient of | tr(Sigma) / tr(Sigma) of vlb | noise scale, images |\n| --- | --- | --- |')
    key = lambda name, seed: figures.get(f'noise/{arm}/{name}/{seed}')
    for name in NOISE:
        found = [(key(name, seed), key('vlb', seed)) for seed in range(seeds) if key(name, seed)]
        shares = [one['spread'] / vlb['spread'] for one, vlb in found]
        # A ratio of means, not a mean of ratios: the signal of a single measurement may be close to zero.
        scale = sum(one['spread'] for one, _ in found) / sum(one['signal'] for one, _ in found)
        print(f'| {name} | {mean(shares) if name != "hybrid" else ""} | {scale:.3g} |')


NOISE = {'hybrid': ('hybrid', 'uniform'), 'vlb': ('vlb', 'uniform'), 'vlb, resampled': ('vlb', 'second_moment')}


@click.command()
@click.argument('what', type=click.Choice(['train', 'samplers', 'noise']))
@click.option('--out', required=True, help='Folder for data, runs and results; runs and results already there are reused')
@click.option('--arms', default=';'.join(ARMS), help='Names of the arms, separated by semicolons')
@click.option('--seeds', default='0-2', help='First and last seed')
@click.option('--kimg', default=128.0, help='Training length in thousands of images')
@click.option('--steps', default=1000, help='Number of diffusion steps T')
@click.option('--images', default=IMAGES, help='Generated images')
def main(what, out, arms, seeds, kimg, steps, images):
    """Trains and evaluates every arm, or measures samplers or gradient noise at trained weights; prints tables."""
    torch.set_num_threads(1)
    os.makedirs(out, exist_ok=True)
    path, arms, (first, last) = functools.partial(os.path.join, out), arms.split(';'), map(int, seeds.split('-'))
    make_data(path)
    for seed in range(first, last + 1):
        for arm in arms:
            network = train(path, arm, seed, kimg, steps)
            if what == 'train' and f'{arm}/{seed}' not in load(path):
                remember(path, f'{arm}/{seed}', judge(path, network, images))
            for sampler, budget in itertools.product(EVERY_SAMPLER, BUDGETS) if what == 'samplers' else []:
                if (key := f'samplers/{arm}/{sampler}/{budget}/{seed}') not in load(path):
                    remember(path, key, distance(path, network, sampler, budget, images))
            for name, spec in NOISE.items() if what == 'noise' else []:
                if (key := f'noise/{arm}/{name}/{seed}') not in load(path):
                    remember(path, key, gradient_noise(path, network, *spec, seed))
    if what == 'train':
        print_table(path, arms, last + 1)
    for arm in arms if what != 'train' else []:
        {'noise': print_noise, 'samplers': print_samplers}[what](path, arm, last + 1)


if __name__ == '__main__':
    main()
