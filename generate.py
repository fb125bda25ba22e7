# SPDX-License-Identifier: Apache-2.0
"""Generates images: one file per seed, which depends only on the network, the sampler and the seed.

python generate.py --network=NAME --outdir=out --seeds=0-63 --grid
torchrun --standalone --nproc_per_node=8 generate.py --network=NAME --outdir=out --seeds=0-49999 --subdirs"""

import click

from dnnlib import EasyDict
from torch_utils.command_line import Command, IntList, group, version_option
from training.sampling import options as sampling

COUNT = click.IntRange(min=1)
IMAGES = group(
    'Images',
    click.option('--network', metavar='REF', required=True,
                 help='Snapshot folder, training-state .pt, Hugging Face name, URL, .pkl of EDM or EDM2, weights of DiT, ViT or U-ViT'),
    click.option('--outdir', help='Folder to write the images to', metavar='DIR', required=True),
    click.option('--seeds', help='Seeds, one image each, such as 0-63 or 1,2,5-10', type=IntList(), default='0-63', show_default=True),
    click.option('--format', type=click.Choice(['png', 'npy', 'npz']), metavar='png|npy|npz',
                 help='npy, npz: float32 [C,H,W], in network units (-1 to 1) for 8-bit data, else in the units of the data; npz also '
                 'holds seed and label  [default: png; npy for data that is not 8-bit grey or RGB]'),
    click.option('--subdirs', help='Create a subfolder for every 1000 seeds', is_flag=True),
    click.option('--grid', metavar='[FILE]', is_flag=False, flag_value='beside outdir',
                 help='Also write the first 64 images as one picture, FILE.png  [without FILE: OUTDIR-grid.png]'),
    click.option('--skip-existing', is_flag=True,
                 help='Resume after an interruption: keep the complete images in the folder and generate the others; refused if they '
                 'were generated with other options'),
)
SPEED = group(
    'Speed',
    click.option('--batch', '--batch-size', '--max-batch-size', metavar='INT', type=COUNT, default=64, show_default=True,
                 help='Batch size per rank; does not change the images'),
    click.option('--threads', metavar='INT', type=COUNT, help='CPU threads per rank; bit-identical images need the same number'),
    click.option('--device', metavar='DEVICE',
                 help='Device to sample on, such as cuda or cpu  [default: the GPU of the rank, if it has one]'),
)


@click.command(cls=Command)
@IMAGES
@sampling.OPTIONS
@SPEED
@version_option
def main(**options) -> None:
    """Generate images from a trained network: one file per seed, the same for every batch size and number of ranks."""
    from training.sampling import generation  # here, so that --help need not wait for torch
    generation.run(EasyDict(options))


if __name__ == '__main__':
    main()
