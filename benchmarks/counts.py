# SPDX-License-Identifier: Apache-2.0
"""Counts of photons, with every step a user takes: digits as Poisson counts are converted, trained on without a clean image, generated and
denoised; what comes back is compared with the clean intensities.

python benchmarks/counts.py --outdir=counts

The same network is trained on the counts as they are, as if their noise had one level, to see what stabilising gains."""

import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib import UserError  # noqa: E402 (the folder above had to be found first)
from dnnlib.files import write_json  # noqa: E402
from metrics.report import print_columns  # noqa: E402
from torch_utils.command_line import Command  # noqa: E402
from training.data.convert.readers.arrays import DigitsSource  # noqa: E402
from training.estimation.stabilise import Anscombe  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 297
EDGES = (2, 4, 10, 30, 100.001)  # intensities that are averaged over
NETWORK = ['--cbase=32', '--cres=1,2', '--blocks=1', '--attn=4', '--augment=0', '--dropout=0', '--batch=64', '--lr=3e-3',
           '--lr-schedule=cosine', '--lr-rampup=0', '--ema=0.004', '--tick=16', '--snap=10000', '--dump=0', '--samples=0',
           '--regime=noisy-only']


def run(*command):
    """Prints a command of the project as a user would type it, and runs it."""
    print(f'\n$ python {" ".join(command)}', flush=True)
    if subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode:
        raise UserError(f'{command[0]} failed; see its message above')


def make(outdir, seed):
    """Writes counts.npy, test.npy and clean.npy, of intensities from 2 (black) to 100 (white); returns the mean count."""
    source = DigitsSource('digits')
    images = np.stack([source.read(i)[0] for i in range(len(source.names))]).astype(np.float64)
    clean = 2 + 98 * images / images.max()
    counts = np.random.default_rng(seed).poisson(clean).astype(np.uint16)
    np.save(f'{outdir}/counts.npy', counts[HELD_OUT:])
    np.save(f'{outdir}/test.npy', counts[:HELD_OUT].astype(np.float32))
    np.save(f'{outdir}/clean.npy', clean[:HELD_OUT].astype(np.float32))
    return float(counts[HELD_OUT:].mean())


def snapshot(folder):
    """The last network of the run in a folder."""
    return str(sorted(Path(folder).glob('*/network-snapshot-*'))[-1])


def measured(found, clean):
    """{"bias", "rms"} by intensity, and "mean" of all over the mean of the clean ones."""
    error, rows = found - clean, []
    for low, high in zip(EDGES, EDGES[1:]):
        inside = (clean >= low) & (clean < high)
        rows.append({'from': low, 'to': round(high), 'bias': float(error[inside].mean()),
                     'rms': float(np.sqrt(np.square(error[inside]).mean()))})
    return {'mean': float(found.mean() / clean.mean()), 'by_intensity': rows}


@click.command(cls=Command)
@click.option('--outdir', required=True, metavar='DIR', help='Folder for data, networks and images')
@click.option('--duration', type=click.FloatRange(min=0, min_open=True), default=0.1, show_default=True, metavar='MIMG',
              help='Training duration of each network')
@click.option('--num', type=click.IntRange(min=1), default=1500, show_default=True, metavar='INT', help='Images to generate')
@click.option('--seed', type=click.IntRange(min=0), default=0, show_default=True, metavar='INT', help='Seed of the noise and of training')
@click.option('--json', 'path', metavar='FILE', help='File for the numbers')
def main(outdir, duration, num, seed, path):
    """Means and errors of counts that are generated and denoised, with and without the stabilising transform."""
    os.makedirs(outdir, exist_ok=True)
    level = np.sqrt(make(outdir, seed))
    test, clean = (np.load(f'{outdir}/{name}.npy').astype(np.float64) for name in ('test', 'clean'))
    data, found = np.load(f'{outdir}/counts.npy').mean(), {'noisy counts': measured(test, clean)}
    generated = {}
    for name, noise in (('stabilised', '--stabilise=anscombe'), ('one level', f'--sigmas={level:.4g}')):
        place = f'{outdir}/{name.replace(" ", "-")}'
        run('dataset_tool.py', f'--source={outdir}/counts.npy', f'--dest={place}.npz', noise, '--sheet=none')
        run('train.py', f'--outdir={place}', f'--data={place}.npz', *NETWORK, f'--duration={duration:g}', f'--seed={seed}')
        run('generate.py', f'--network={snapshot(place)}', f'--outdir={place}/images', f'--seeds=0-{num - 1}', f'--grid={place}.png')
        own = [] if name == 'stabilised' else [f'--data={outdir}/test.npy:sigma={level:.4g}']
        run('denoise.py', f'--network={snapshot(place)}', *(own or [f'--data={outdir}/test.npy']), f'--dest={place}-denoised.npy',
            '--sheet=none')
        images = np.stack([np.load(file) for file in sorted(Path(place, 'images').glob('*.npy'))])
        generated[name] = float(images.mean() / data)
        found[name] = measured(np.load(f'{place}-denoised.npy').astype(np.float64), clean)
    stabiliser, restored = Anscombe(), np.load(f'{outdir}/stabilised-denoised.npy').astype(np.float64)
    found['stabilised, plain inverse'] = measured(stabiliser.plain_inverse(stabiliser.expected(restored)), clean)
    tell(found, generated)
    if path:
        write_json(path, {'generated': generated, 'denoised': found, 'images': num, 'seed': seed, 'duration': duration})


def tell(found, generated):
    """Prints the table."""
    heads = [f'{row["from"]:g} to {row["to"]:g}' for row in found['noisy counts']['by_intensity']]
    cells = lambda row: [f'{one["bias"]:+.2f} {one["rms"]:.2f}' for one in row['by_intensity']]
    print('\nDenoised counts of held-out digits: bias and rms error by intensity, and the mean over that of the clean images')
    print_columns([('', *heads, 'mean'), *((name, *cells(row), f'{row["mean"]:.4f}') for name, row in found.items())])
    print('\nMean of generated counts over that of the data: ' + ', '.join(f'{name} {value:.4f}' for name, value in generated.items()))


if __name__ == '__main__':
    main()
