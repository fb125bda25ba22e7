# SPDX-License-Identifier: Apache-2.0
"""Denoises images with a trained network: E[x_0 | y] in one evaluation, or posterior samples with their mean and uncertainty.

python denoise.py --network=NAME --data=noisy.zip --dest=clean.zip
python denoise.py --network=NAME --data=scans/:sigma=12 --dest=scans-clean --samples=16
torchrun --standalone --nproc_per_node=8 denoise.py --network=NAME --data=noisy.zip --dest=clean.zip --samples=64"""

import click

from dataset_tool import parse_units
from dnnlib import EasyDict, UserError
from torch_utils.command_line import Command, Number, group, version_option
from training.sampling.options import PRECISIONS

COUNT = click.IntRange(min=1)
IMAGES = group(
    'Images',
    click.option('--network', metavar='REF', required=True,
                 help='Snapshot folder, training-state .pt, Hugging Face name, URL, or .pkl of EDM or EDM2'),
    click.option('--weights', metavar='WHICH', default='ema', show_default=True,
                 help='Which weights of a training state: ema, raw or ema:LENGTH'),
    click.option('--data', metavar='PATH[:KEY=VALUE,...]', required=True,
                 help='Noisy images, of any kind that dataset_tool.py --source reads; its key sigma=STD|FILE gives their levels in the '
                 'units of the values'),
    click.option('--dest', metavar='PATH', required=True,
                 help='Where the images go, in their own formats: a folder, .zip, .npy, .npz or .tif'),
    click.option('--sigma', metavar='STD', type=Number(above=0),
                 help='Noise std of all images in network units  [default: the levels of the set]'),
    click.option('--units', metavar='OFFSET,SCALE', callback=parse_units,
                 help='network = (value - OFFSET) / SCALE, one pair or one per channel  [default: those of the network, or of the set]'),
    click.option('--class', 'class_idx', metavar='INT', type=click.IntRange(min=0),
                 help='Class of all images  [default: the labels of the set]'),
    click.option('--text-encoder', metavar='REF',
                 help='Where the text encoder of a network of captions is  [default: as config.json says]'),
)
METHOD = group(
    'Method',
    click.option('--samples', metavar='K', type=click.IntRange(min=0), default=0, show_default=True,
                 help='Posterior samples of each image; their mean is written, and from 2 on their standard deviation to DEST-std. '
                 '0: E[x_0 | y] in one evaluation'),
    click.option('--keep-samples', is_flag=True, help='Also write the samples, to DEST-samples'),
    click.option('--steps', metavar='INT', type=COUNT, default=18, show_default=True, help='Evaluations of the network for each sample'),
    click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, show_default=True, help='Seed of the samples'),
    click.option('--overlap', metavar='INT', type=click.IntRange(min=0),
                 help='Pixels that neighbouring tiles of large images share  [default: half of the network\'s smaller side]'),
)
OUTPUT = group(
    'Results',
    click.option('--reference', metavar='PATH[:KEY=VALUE,...]',
                 help='Clean images of the same names, to measure PSNR, SSIM and the share of intervals that hold'),
    click.option('--report', metavar='FILE', help='File for the numbers: .json, or .csv with a row for each image'),
    click.option('--sheet', metavar='FILE|none', help='Picture of the first images before and after  [default: DEST-sheet.png]'),
    click.option('--skip-existing', is_flag=True, help='Continue after an interruption, with the images that are done in DEST.partial'),
)
SPEED = group(
    'Speed',
    click.option('--batch', '--batch-size', metavar='INT', type=COUNT, default=64, show_default=True,
                 help='Images of the network\'s size at a time and rank; does not change the results'),
    click.option('--precision', type=click.Choice(PRECISIONS), metavar='|'.join(PRECISIONS), default='auto', show_default=True,
                 help='Arithmetic of the network; the sampler uses float64. auto: that of its training on GPUs that have it, else fp32'),
    click.option('--compile', metavar='[BOOL]', type=bool, is_flag=False, flag_value=True, default=False, show_default=True,
                 help='Compile the network with torch.compile'),
    click.option('--threads', metavar='INT', type=COUNT, help='CPU threads per rank; bit-identical images need the same number'),
    click.option('--device', metavar='DEVICE', help='Device, such as cuda or cpu  [default: the GPU of the rank, if it has one]'),
)


@click.command(cls=Command)
@IMAGES
@METHOD
@OUTPUT
@SPEED
@version_option
def main(**options) -> None:
    """Denoise images with a network that was trained on such images, clean or noisy.

    The images must carry white Gaussian noise of a known level. They come back in their own units and formats, under their own
    names; images of level 0 stay as they are."""
    if isinstance(options['units'], str):
        raise UserError(f'--units={options["units"]}: give numbers, OFFSET,SCALE')
    from training.restoration import denoising  # here, so that --help need not wait for torch
    denoising.run(EasyDict(options))


if __name__ == '__main__':
    main()
