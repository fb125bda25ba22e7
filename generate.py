# SPDX-License-Identifier: Apache-2.0
"""Generates images: one file a seed, whose content depends on the network and the seed alone.

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
                 help='Snapshot folder, training-state .pt, Hugging Face name, URL, or a .pkl of EDM'),
    click.option('--outdir', help='Where to write the images', metavar='DIR', required=True),
    click.option('--seeds', help='Which images: a list such as 0-63 or 1,2,5-10', type=IntList(), default='0-63', show_default=True),
    click.option('--format', type=click.Choice(['png', 'npy', 'npz']), metavar='png|npy|npz',
                 help='npy, npz: float32 [C,H,W], in network units (-1 to 1) for 8-bit data, physical for other; npz with seed and '
                 'label  [default: png; npy where the data is no 8-bit grey or RGB]'),
    click.option('--subdirs', help='A folder for every 1000 seeds', is_flag=True),
    click.option('--grid', metavar='[FILE]', is_flag=False, flag_value='beside outdir',
                 help='Also a picture of the first 64 images, FILE.png  [FILE, if left out: OUTDIR-grid.png]'),
    click.option('--skip-existing', is_flag=True,
                 help='Keep whole images that are there and make the others, to go on after an interruption; refused where they were '
                 'made with other options'),
)
SPEED = group(
    'Speed',
    click.option('--batch', '--batch-size', '--max-batch-size', metavar='INT', type=COUNT, default=64, show_default=True,
                 help='Images at a time on each rank; changes no image'),
    click.option('--threads', metavar='INT', type=COUNT, help='CPU threads of each rank; equal pixels need equal threads'),
    click.option('--device', metavar='DEVICE',
                 help='Where to sample, such as cuda or cpu  [default: the GPU of the rank, if it has one]'),
)


@click.command(cls=Command)
@IMAGES
@sampling.OPTIONS
@SPEED
@version_option
def main(**options):
    """Generate images from a trained network: one file a seed, equal for every batch size and number of ranks."""
    from training.sampling import generation  # here, so that --help need not wait for torch
    generation.run(EasyDict(options))


if __name__ == '__main__':
    main()
