# SPDX-License-Identifier: Apache-2.0
"""Limits that dataset_tool.py annotate finds for images with known defects.

python benchmarks/annotation.py --source=digits
python benchmarks/annotation.py --source=cifar10-train-jpeg.zip --num=10000

A tenth of the images is clean; the others are blurred, compressed, or given white noise, as 8-bit images (noise: as floats)."""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import scipy.ndimage
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset_tool  # noqa: E402 (the folder above had to be found first)
from dnnlib import UserError  # noqa: E402
from torch_utils import misc  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402

DEFECTS = 'blur:0.4,blur:0.6,blur:0.8,blur:1.0,jpeg:18,jpeg:50,jpeg:90,noise:0.2,none:0'


def spoil(images: np.ndarray, kind: str, amount: float, seed: int) -> np.ndarray:
    """uint8 images [N,C,H,W] with a defect: blur (std in pixels), jpeg (quality), noise (std, in units of [-1,1]; float32) or none."""
    if kind == 'blur':
        return np.uint8(np.rint(scipy.ndimage.gaussian_filter(np.float32(images), (0, 0, amount, amount))))
    if kind == 'jpeg':
        return np.stack([_compressed(image, int(amount)) for image in images])
    if kind == 'noise':
        noise = np.random.default_rng(misc.seed_of(seed, 'noise')).standard_normal(images.shape, np.float32)
        return np.float32(images) + np.float32(127.5 * amount) * noise
    if kind == 'none':
        return images
    raise UserError(f'--defects: "{kind}" is unknown; choose from blur, jpeg, noise, none')


def _compressed(image, quality):
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, 'JPEG', quality=quality)
    found = np.asarray(Image.open(file))
    return found[None] if found.ndim == 2 else found.transpose(2, 0, 1)


def write(folder: str, name: str, images: np.ndarray) -> str:
    """A packed data set of images [N,C,H,W]; returns its path."""
    dest, source = os.path.join(folder, f'{name}.npz'), os.path.join(folder, f'{name}-source.npy')
    np.save(source, images)
    tool(f'--source={source}', f'--dest={dest}', '--layout=nchw', '--workers=1', '--sheet=none',
         *(['--units=127.5,127.5'] if images.dtype != np.uint8 else []))
    return dest


def tool(*arguments: str) -> None:
    """Runs a command of dataset_tool.py, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset_tool.main(list(arguments), 'dataset_tool.py', standalone_mode=False)


@click.command(cls=Command)
@click.option('--source', default='digits', show_default=True, metavar='PATH', help='8-bit images: what dataset_tool.py reads')
@click.option('--side', type=int, help='Side to enlarge or shrink the images to')
@click.option('--num', type=int, help='Number of images, of which a tenth is clean  [default: all]')
@click.option('--defects', default=DEFECTS, show_default=True, metavar='LIST', help='Defects: blur:STD, jpeg:QUALITY, noise:STD, none:0')
@click.option('--clean', default=0.1, show_default=True, help='Share of clean images')
@click.option('--options', default='', metavar='OPTIONS', help='Further options of dataset_tool.py annotate')
@click.option('--seed', default=0, show_default=True, help='Random seed')
@version_option
def main(source, side, num, defects, clean, options, seed):
    """Print the limit of each defect, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        whole = os.path.join(folder, 'whole.npz')
        tool(f'--source={source}', f'--dest={whole}', '--sheet=none', *([f'--max-images={num}', '--sample=spread'] if num else []),
             *([f'--resolution={side}x{side}'] if side else []))
        dataset = ImageDataset(whole)
        order = np.random.default_rng(misc.seed_of(seed, 'order')).permutation(len(dataset))
        images = np.stack([dataset.decode(row) for row in dataset.raw_idx[order]])
        count = round(clean * len(images))
        print(f'{count} clean images, {len(images) - count} others of {"x".join(map(str, images.shape[1:]))}')
        for kind, amount in (defect.split(':') for defect in defects.split(',')):
            data = spoil(images[count:], kind, float(amount), seed)
            first = images[:count] if data.dtype == np.uint8 else np.float32(images[:count])
            start, report = time.time(), os.path.join(folder, 'report.json')
            tool('annotate', f'--clean={write(folder, "clean", first)}', f'--data={write(folder, "data", data)}', f'--report={report}',
                 '--sheet=none', f'--seed={seed}', *options.split())
            with open(report, encoding='utf-8') as file:
                found = json.load(file)
            limit = found['noise'] or found['groups'][0]['limit']
            told = 'left out' if limit is None else f'{limit:.2f}' + ' as sigmas' * bool(found['noise'])
            held = (found['held_out'] or {}).get('held out', '')
            print(f'{kind:5} {amount:>4}  {told:<16} {time.time() - start:.0f} s  {held}', flush=True)


if __name__ == '__main__':
    main()
