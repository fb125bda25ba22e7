# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline on real images, offline and in minutes on two CPU cores: handwritten digits, nine tenths of them noisy.

python examples/demo.py --outdir=demo"""

import dataclasses
import os
import subprocess
import sys
import time

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from dnnlib import UserError  # noqa: E402 (the checkout need not be installed)
from dnnlib.files import read_json  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402
from training.data.store import ImageStore  # noqa: E402
from training.run.build import build_corruption  # noqa: E402
from training.run.config import from_json  # noqa: E402
from training.sampling.pixels import grid, to_uint8  # noqa: E402

COUNT = 898  # half of the 1,797 digits, the last one left out
TRAIN = ['--sigma=0.4', '--corruption_probability=0.9', '--cbase=32', '--cres=1,2', '--blocks=2', '--attn=4', '--augment=0',
         '--dropout=0.05', '--batch=256', '--lr=2e-3', '--lr-rampup=0.01', '--ema=0.012', '--tick=8', '--snap=4', '--dump=4']


def run(*command: str) -> None:
    """Prints a command of the project as a user would type it, and runs it."""
    print(f'\n$ python {" ".join(command)}', flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise UserError(f'{command[0]} failed; see its message above')


def distance(outdir: str, name: str, images: str) -> float:
    """Fréchet distance in pixel space between `images` and the reference half."""
    result = os.path.join(outdir, f'distance-{name}.json')
    run('eval_fid.py', f'--gen_path={images}', f'--ref_stats={os.path.join(outdir, "reference.npz")}', '--detector=pixels',
        f'--num={COUNT}', f'--out_path={result}')
    return read_json(result)['fid_score']


def write_noisy(data: str, config, dest: str) -> None:
    """Writes the training images as the network saw them, as 8-bit images: all that is there before training."""
    dataset, corruption = ImageDataset(data), build_corruption(dataclasses.replace(config.corruption, probability=1.0))
    levels = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
    images = to_uint8(ImageStore(dataset, corruption, levels).gather(np.arange(len(dataset))))
    np.savez(dest, images=images.numpy().transpose(0, 2, 3, 1))


def first_images(path, count=20):
    """The first images in an .npz of write_noisy, or in a data set: uint8 [count,1,H,W]."""
    if path.endswith('.npz'):
        return np.load(path)['images'][:count].transpose(0, 3, 1, 2)
    dataset = ImageDataset(path)
    return np.stack([dataset.decode(row) for row in range(count)])


def write_comparison(dest, panels, columns=5, rows=4, gap=24, top=36):
    """Writes one picture: a panel for each (title, uint8 images [N,1,H,W]), side by side; their first images, enlarged."""
    pictures = [grid(images[:columns * rows], columns)[0] for _, images in panels]
    height, width = pictures[0].shape
    canvas = Image.new('L', (len(panels) * (width + gap) - gap, top + height), 255)
    try:
        font = ImageFont.load_default(18)
    except TypeError:  # Pillow before 10.1 has its font in one size
        font = ImageFont.load_default()
    for k, (picture, (title, _)) in enumerate(zip(pictures, panels)):
        canvas.paste(Image.fromarray(picture), (k * (width + gap), top))
        ImageDraw.Draw(canvas).text((k * (width + gap) + 2, 8), title, fill=0, font=font)
    canvas.save(dest, optimize=True)


@click.command(cls=Command)
@click.option('--outdir', default='demo', show_default=True, metavar='DIR', help='Folder for everything that is written')
@click.option('--seed', default=0, show_default=True, metavar='INT', help='Seed of the training run')
@click.option('--duration', default=0.14, show_default=True, metavar='MIMG', help='Training length in million images')
@version_option
def main(outdir: str, seed: int, duration: float) -> None:
    """Train on 898 digits, 90 % of them noisy at sigma 0.4, and compare samples of the model with the other half."""
    start = time.time()
    outdir = os.path.abspath(outdir)
    path = lambda name: os.path.join(outdir, name)
    os.makedirs(outdir, exist_ok=True)
    for part, name in enumerate(['train', 'reference']):
        run('dataset_tool.py', '--source=digits', f'--dest={path(f"{name}.zip")}', f'--part={part}/2', f'--max-images={COUNT}')
    run('eval_fid.py', 'ref', f'--data={path("reference.zip")}', f'--dest={path("reference.npz")}', '--detector=pixels')

    run('train.py', f'--outdir={path("runs")}', f'--data={path("train.zip")}', *TRAIN, f'--seed={seed}', f'--duration={duration}',
        '--expr_id=digits')
    newest = max(os.listdir(path('runs')))
    network = path(os.path.join('runs', newest, max(n for n in os.listdir(path(f'runs/{newest}')) if n.startswith('network-'))))
    samples = path('samples')
    run('generate.py', f'--network={network}', f'--outdir={samples}', f'--seeds=0-{COUNT - 1}', f'--grid={path("samples.png")}')

    options = read_json(os.path.join(os.path.dirname(network), 'options.json'))
    write_noisy(path('train.zip'), from_json(options), path('noisy.npz'))
    table = [('the noisy images themselves (sigma 0.4, 8-bit)', distance(outdir, 'noisy', path('noisy.npz'))),
             ('samples of the model trained on 10 % clean + 90 % noisy', distance(outdir, 'samples', samples)),
             ('the clean training half (floor)', distance(outdir, 'clean', path('train.zip')))]
    write_comparison(path('comparison.png'), [('training images, 90 % this noisy', first_images(path('noisy.npz'))),
                                              ('samples of the model', first_images(samples)),
                                              ('clean digits, for comparison', first_images(path('reference.zip')))])
    print(f'\nFréchet distance in pixel space to the other half, {COUNT} images in each set, training seed {seed}:')
    for name, value in table:
        print(f'  {name:<58}{value:6.2f}')
    print(f'\nNoisy digits, samples, clean digits: {path("comparison.png")}\n'
          f'Run with samples, statistics and network: {os.path.dirname(network)}\n'
          f'Took {(time.time() - start) / 60:.1f} minutes.')


if __name__ == '__main__':
    main()
