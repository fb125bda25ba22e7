# SPDX-License-Identifier: Apache-2.0
"""Effect of the consistency term on models trained on noisy data only: a 2-D mixture with known denoiser, and digits.

python benchmarks/consistency_toys.py mixture [--arms='none;published;...'] [--seeds=20]
python benchmarks/consistency_toys.py digits [--arms='none;published;...'] [--seeds=3]"""

import contextlib
import functools
import importlib
import io
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from consistency_bias import DATA  # noqa: E402 (the folders above had to be found first)

from dnnlib.files import read_json  # noqa: E402
from torch_utils import misc, registry  # noqa: E402
from training.data.batches import Batch  # noqa: E402
from training.diffusion.noise import LogNormal  # noqa: E402
from training.networks.ema import HalfLifeEMA  # noqa: E402
from training.objective import weighting  # noqa: E402
from training.objective.consistency import CHAINS  # noqa: E402
from training.objective.loss import AmbientLoss, Objective  # noqa: E402

SIGMA_N, SIGMA_DATA, POINTS, BATCH = 0.5, 0.6, 20_000, 128
ERROR_AT = {'below': [0.05, 0.1, 0.2, 0.3, 0.4], 'above': [0.6, 1.0, 2.0]}  # test levels below and above sigma_n
ARMS = {
    'none': None,
    'published': 'euler:estimator=mean,steps=5,samples=6,stop=no,grad=true,coeff=1',
    'default': 'bridge',
}


class Networks(torch.nn.Module):
    """Independent small networks with EDM's preconditioning, one per seed, evaluated together: row block s belongs to seed s."""

    def __init__(self, seeds, width=64, hidden=3, features=8):
        super().__init__()
        sizes = [2 + features, *[width] * hidden, 2]
        init = lambda s, i, *shape: torch.randn(shape, generator=misc.generator(s, 'init', i))
        self.weights = torch.nn.ParameterList(
            torch.stack([init(s, i, a, b) * (0.1 if b == 2 else (2 / a) ** 0.5) for s in range(seeds)])
            for i, (a, b) in enumerate(zip(sizes, sizes[1:])))
        self.biases = torch.nn.ParameterList(torch.zeros(seeds, 1, b) for b in sizes[1:])
        self.seeds = seeds
        self.register_buffer('freqs', torch.arange(1, features // 2 + 1) * 0.7)

    def forward(self, x, sigma, class_labels=None, augment_labels=None):
        """x: [S n,2,1,1], sigma: [S n,1,1,1] -> D."""
        scale = (sigma ** 2 + SIGMA_DATA ** 2).sqrt()
        angle = sigma.log().flatten(1) / 4 * self.freqs * math.pi
        h = torch.cat([(x / scale).flatten(1), angle.cos(), angle.sin()], 1).unflatten(0, (self.seeds, -1))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, torch.nn.functional.silu(h) if i else h, weight)
        F = h.flatten(0, 1)[..., None, None]
        return (SIGMA_DATA / scale) ** 2 * x + sigma * SIGMA_DATA / scale * F


class Draws(misc.Draws):
    """Draws for the batches of all seeds together, with any number of rows."""

    def _block(self, name, index, shape):
        return torch.randn([misc.BLOCK_ROWS, *shape], generator=misc.generator(self.seed, self.step, name, index))

    def __call__(self, name, shape):
        return torch.randn(shape, generator=misc.generator(self.seed, self.step, name))


def train_mixture(spec, seeds, steps, lr=2e-3):
    """(EMA of `seeds` networks after `steps` updates, seconds): each on its own 20,000 noisy points of the mixture."""
    data, law, weight = DATA['mixture'], LogNormal(), functools.partial(weighting.edm, sigma_data=SIGMA_DATA)
    points = torch.stack([noisy_points(data, s) for s in range(seeds)])  # [S,P,2,1,1]
    net = Networks(seeds)
    ema = HalfLifeEMA(net, halflife_kimg=20 * BATCH / 1e3 * 10)
    chains = [registry.build(spec, CHAINS, '--consistency', noise=law, weight=weight, batch=BATCH)] if spec else []
    objective, optimizer = Objective([AmbientLoss(weight), *chains]), torch.optim.Adam(net.parameters(), lr=lr)
    objective.set_teacher(ema.module)
    sigma_n = torch.full([seeds * BATCH, 1, 1, 1], SIGMA_N)
    start = time.perf_counter()
    for step in range(steps):
        draws = Draws(0, step)
        rows = torch.randint(POINTS, (seeds, BATCH), generator=misc.generator(0, step, 'rows'))
        images = points[torch.arange(seeds)[:, None], rows].flatten(0, 1)
        u = torch.special.ndtr(draws('sigma', [seeds * BATCH, 1, 1, 1])).clamp(1e-7, 1 - 1e-7)
        batch = Batch(images, sigma_n, law.above(sigma_n, u), draws('noise', images.shape))
        loss = sum(term.sum() for term in objective(net, batch, draws).values()) / BATCH
        optimizer.param_groups[0]['lr'] = lr * min(1, (steps - step) / (0.5 * steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(net, step * BATCH, BATCH)
    return ema.module, time.perf_counter() - start


def noisy_points(data, seed):
    """20,000 points of the mixture at level sigma_n, [P,2,1,1]."""
    generator = misc.generator(seed, 'data')
    clean = data.draw(POINTS, generator).float()
    return clean + SIGMA_N * torch.randn(clean.shape, generator=generator)


@torch.no_grad()
def mixture_errors(net, points=4000):
    """{below, above}: [S], root mean square distance to the exact denoiser per coordinate, over the levels in ERROR_AT."""
    data, generator = DATA['mixture'], misc.generator('judge')
    found = {}
    for where, levels in ERROR_AT.items():
        squares = []
        for sigma in levels:
            clean = data.draw(points, generator).float()
            x = clean + sigma * torch.randn(clean.shape, generator=generator)
            D = net(x.repeat(net.seeds, 1, 1, 1), torch.full([net.seeds * points, 1, 1, 1], sigma))
            squares.append((D.unflatten(0, (net.seeds, -1)) - data.denoise(x, sigma)).square().flatten(1).mean(1))
        found[where] = torch.stack(squares).mean(0).sqrt()
    return found


def report_mixture(arms, seeds, steps):
    """Prints a table, one line per arm."""
    print(f'{seeds} seeds, {POINTS} points at sigma_n = {SIGMA_N}, {steps} steps of {BATCH}; RMS error to the exact denoiser: '
          'mean ± standard error (worst seed)\n')
    print('| arm | below sigma_n | above sigma_n | against none, below | seconds |\n| --- | --- | --- | --- | --- |')
    base = None
    for name in arms:
        net, seconds = train_mixture(ARMS.get(name, name), seeds, steps)
        errors = mixture_errors(net)
        base = errors['below'] if base is None else base
        cells = [f'{e.mean():.4f} ± {e.std() / seeds ** 0.5:.4f} ({e.max():.4f})' for e in errors.values()]
        change = errors['below'] - base  # same data, initial weights and draws: a paired comparison
        print(f'| {name} | {" | ".join(cells)} | {change.mean():+.4f} ± {change.std() / seeds ** 0.5:.4f} | {seconds:.0f} |', flush=True)


# ---- digits, with the program's own commands

IMAGES = 898  # half of the digits, as in examples/demo.py
TRAIN = ['--sigma=0.4', '--corruption_probability=1', '--cbase=16', '--cres=1,2', '--blocks=1', '--attn=0', '--augment=0', '--dropout=0',
         '--batch=128', '--lr=2e-3', '--lr-rampup=0.01', '--ema=0.006', '--tick=8', '--snap=1000', '--dump=0', '--samples=0', '--threads=1']


def call(script, *arguments):
    """Runs a command of the program in this process, silently."""
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(script).main(arguments, script, standalone_mode=False)


def digits_run(folder, spec, seed, kimg, images):
    """(Fréchet distance in pixels of samples to the clean held-out half, images per second of the fastest tick)."""
    path = functools.partial(os.path.join, folder)
    name = f'seed{seed}'
    run = path(f'run-{len(os.listdir(folder))}-{name}')
    call('train', f'--outdir={run}', '--nosubdir', f'--data={path("train.zip")}', *TRAIN, f'--seed={seed}', f'--duration={kimg / 1e3}',
         *([f'--consistency={spec}'] if spec else []))
    network = next(entry.path for entry in os.scandir(run) if entry.name.startswith('network-snapshot'))
    call('generate', f'--network={network}', f'--outdir={run}/samples', f'--seeds=0-{images - 1}')
    call('eval_fid', f'--gen_path={run}/samples', f'--ref_stats={path("reference.npz")}', '--detector=pixels', f'--num={images}',
         f'--out_path={run}/distance.json')
    lines = [json.loads(line) for line in Path(run, 'stats.jsonl').read_text().splitlines()]
    rates = [line['Timing/img_per_sec'] for line in lines if 'Timing/img_per_sec' in line]
    return read_json(Path(run, 'distance.json'))['fid_score'], max(rates)


def report_digits(arms, seeds, kimg, images):
    """Prints a table, one line per arm."""
    print(f'{seeds} seeds, {images} digits, all noisy at 0.4, {kimg:g} kimg; Fréchet distance in pixels to the other, clean half\n')
    print('| arm | distance: mean ± standard error | each seed | img/s, fastest tick |\n| --- | --- | --- | --- |')
    with tempfile.TemporaryDirectory() as folder:
        path = functools.partial(os.path.join, folder)
        for part, name in enumerate(['train', 'reference']):
            call('dataset_tool', '--source=digits', f'--dest={path(f"{name}.zip")}', f'--part={part}/2', f'--max-images={IMAGES}')
        call('eval_fid', 'ref', f'--data={path("reference.zip")}', f'--dest={path("reference.npz")}', '--detector=pixels')
        for name in arms:
            scores, rates = zip(*(digits_run(folder, ARMS.get(name, name), seed, kimg, images) for seed in range(seeds)))
            spread = torch.tensor(scores).std().item() / seeds ** 0.5 if seeds > 1 else math.nan
            each = ', '.join(f'{score:.2f}' for score in scores)
            print(f'| {name} | {sum(scores) / seeds:.2f} ± {spread:.2f} | {each} | {max(rates):.0f} |', flush=True)


@click.command()
@click.argument('toy', type=click.Choice(['mixture', 'digits']))
@click.option('--arms', default=';'.join(ARMS), help='Names of arms or values of --consistency, separated by semicolons')
@click.option('--seeds', type=int)
@click.option('--steps', default=1500, help='Training steps on the mixture')
@click.option('--kimg', default=16.0, help='Training length on the digits, in thousands of images')
@click.option('--images', default=IMAGES, help='Generated digits')
def main(toy, arms, seeds, steps, kimg, images):
    """Train every arm and print a table."""
    torch.set_num_threads(1)
    arms = arms.split(';')
    if toy == 'mixture':
        report_mixture(arms, seeds or 20, steps)
    else:
        report_digits(arms, seeds or 3, kimg, images)


if __name__ == '__main__':
    main()
