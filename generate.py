# SPDX-License-Identifier: Apache-2.0
"""Generates images: one file a seed, whose content depends on the network and the seed alone.

python generate.py --network=NAME --outdir=out --seeds=0-63 --grid
torchrun --standalone --nproc_per_node=8 generate.py --network=NAME --outdir=out --seeds=0-49999 --subdirs"""

import functools
import os
import tempfile

import click
import torch
from tqdm import tqdm

from torch_utils import distributed
from torch_utils.command_line import Command, IntList, version_option
from training import generation, hub, images, samplers

GRID_IMAGES = 64
PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


POSITIVE, COUNT = click.FloatRange(min=0), click.IntRange(min=1)


@click.command(cls=Command)
@click.option('--network', help='Snapshot folder, training-state .pt, or Hugging Face name', metavar='REF', required=True)
@click.option('--outdir', help='Where to write the images', metavar='DIR', required=True)
@click.option('--seeds', help='Which images: a list such as 0-63 or 1,2,5-10', type=IntList(), default='0-63', show_default=True)
@click.option('--subdirs', help='A folder for every 1000 seeds', is_flag=True)
@click.option('--format', type=click.Choice(['png', 'npy', 'npz']),
              help='png; npy or npz: float32 [C,H,W], in network units (-1 to 1) for 8-bit data, physical for other; npz '
              'with seed and label  [default: png; npy where the data is no 8-bit grey or RGB]')
@click.option('--grid', metavar='[FILE]', is_flag=False, flag_value='beside outdir',
              help=f'Also a picture of the first {GRID_IMAGES} images, FILE.png  [FILE, if left out: OUTDIR-grid.png]')
@click.option('--class', 'class_idx', metavar='INT', type=click.IntRange(min=0),
              help='Class of all images  [default: drawn per seed]')
@click.option('--weights', type=click.Choice(['ema', 'raw']), default='ema', show_default=True,
              help='Which weights of a training state')
@click.option('--batch', '--batch-size', '--max-batch-size', metavar='INT', type=COUNT, default=64, show_default=True,
              help='Images at a time on each rank; changes no image')
@click.option('--steps', metavar='INT', type=COUNT, default=18, show_default=True,
              help='Sampling steps N; 2N - 1 network evaluations')
@click.option('--sigma-min', metavar='FLOAT', type=float, help='Lowest noise level  [default: 0.002, or the network\'s own]')
@click.option('--sigma-max', metavar='FLOAT', type=float, help='Highest noise level  [default: 80, or the network\'s own]')
@click.option('--rho', metavar='FLOAT', type=float, default=7, show_default=True, help='Exponent of the noise levels')
@click.option('--S-churn', '--s-churn', 'S_churn', metavar='FLOAT', type=POSITIVE, default=0, show_default=True,
              help='Strength of the noise added on the way; 0 is deterministic')
@click.option('--S-min', '--s-min', 'S_min', metavar='FLOAT', type=POSITIVE, default=0, show_default=True,
              help='Lowest level that gets such noise')
@click.option('--S-max', '--s-max', 'S_max', metavar='FLOAT', type=POSITIVE, default='inf', show_default=True,
              help='Highest level that gets such noise')
@click.option('--S-noise', '--s-noise', 'S_noise', metavar='FLOAT', type=POSITIVE, default=1, show_default=True,
              help='Scale of such noise')
@click.option('--precision', type=click.Choice(list(PRECISIONS)),
              help='Inside the network; the sampler is float64  [default: as the network was saved]')
@click.option('--threads', metavar='INT', type=COUNT, help='CPU threads of each rank; equal pixels need equal threads')
@click.option('--device', metavar='DEVICE',
              help='Where to sample, such as cuda or cpu  [default: the GPU of the rank, if it has one]')
@version_option
def main(**options):
    """Generate images from a trained network: one file a seed, equal for every batch size and number of ranks."""
    if options['threads']:
        torch.set_num_threads(options['threads'])
    distributed.init()
    run(**options)


def run(network, outdir, seeds, subdirs, format, grid, weights, precision, device, threads, class_idx, batch, steps, **sampler):
    """Sets up, samples and writes this rank's share, then counts over all ranks."""
    seeds = list(dict.fromkeys(seeds))  # a seed that was named twice is one image
    check_writable(outdir)
    grid = grid_path(grid, outdir)
    net = hub.load_network(network, device=distributed.pick_device(device), weights=weights)
    if precision:
        net.compute_dtype = PRECISIONS[precision]
    format = pick_format(format, net)
    batches = generation.generate_images(net, seeds, class_idx=class_idx, num_steps=steps, batch=batch, rank=distributed.rank(),
                                         world=distributed.size(), **sampler_pieces(net, class_idx, steps, **sampler))
    distributed.print0(f'Generating {len(seeds)} images from {network} to {outdir}')
    written, first_images = write_all(net, batches, seeds, outdir, subdirs, format, seeds[:GRID_IMAGES] if grid else [])
    total = int(distributed.all_sum(torch.tensor(written, device=distributed.device())))
    if total != len(seeds):
        raise click.ClickException(f'{total} of {len(seeds)} images were written to {outdir}')
    if grid:
        write_grid(grid, first_images, net)
        distributed.print0(f'The first {len(first_images)} images in one picture: {grid}')
    distributed.print0(f'{total} images ({format}) in {outdir}')


def sampler_pieces(net, class_idx, steps, sigma_min, sigma_max, rho, **stepper):
    """{schedule, stepper} with their options bound; what they or the network refuse is found before any file is written."""
    levels = {'sigma_min': sigma_min, 'sigma_max': sigma_max, 'rho': rho}
    schedule = functools.partial(samplers.edm, **{key: value for key, value in levels.items() if value is not None})
    try:
        generation.noise_levels(net, schedule, steps)
    except ValueError as err:
        raise click.ClickException(f'--sigma-min, --sigma-max, --rho: {err}') from None
    for key, value in stepper.items():
        if value != value:
            raise click.ClickException(f'--{key}=nan: give a number')
    try:
        generation.check_class(net, class_idx)
    except ValueError as err:
        raise click.ClickException(f'--class={class_idx}: {err}') from None
    return {'schedule': schedule, 'stepper': functools.partial(samplers.heun, **stepper)}


def write_all(net, batches, seeds, outdir, subdirs, format, keep):
    """Samples and writes this rank's images.

    keep: the seeds whose images are wanted back. Returns how many were written, and those images (zeros for other ranks')."""
    row = {seed: i for i, seed in enumerate(keep)}
    kept = torch.zeros([len(keep), net.img_channels, *generation.resolution(net)], device=generation.network_device(net))
    share = len(seeds[distributed.rank()::distributed.size()])
    with images.Writers() as writers, tqdm(total=share, unit='img', desc='rank 0' if distributed.size() > 1 else None,
                                           disable=True if distributed.rank() else None) as bar:
        for part in batches:
            check_finite(part)
            for seed, image in zip(part.seeds, part.images):
                if seed in row:
                    kept[row[seed]] = image
            submit(writers, part, net.units, outdir, subdirs, format)
            bar.update(len(part.seeds))
    return writers.written, kept


def check_finite(part):
    """Refuses images that are no numbers, which would be written as black ones."""
    bad = (~part.images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise click.ClickException(f'the image of seed {part.seeds[bad[0]]} is not finite ({len(bad)} of {len(part.seeds)} in '
                                   'its batch are not); the weights are broken, or too large for --precision=fp16')


def submit(writers, part, units, outdir, subdirs, format):
    """Hands one batch to the writer threads, already on the CPU."""
    arrays = generation.to_uint8(part.images) if format == 'png' else generation.to_physical(part.images, units).float()
    labels = [None] * len(part.seeds) if part.labels is None else part.labels.cpu().numpy()
    for seed, array, label in zip(part.seeds, arrays.cpu().numpy(), labels):
        folder = os.path.join(outdir, f'{seed // 1000 * 1000:06d}') if subdirs else outdir
        writers.submit(write_image, os.path.join(folder, f'{seed:06d}.{format}'), array, seed, label)


def write_image(path, array, seed, label):
    """One image file, in the format of its name; makes its folder."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if path.endswith('.npz'):
        images.write_npz(path, array, seed=seed, label=label)
    else:
        (images.write_png if path.endswith('.png') else images.write_npy)(path, array)


def write_grid(path, first_images, net):
    """The picture of the first images, each of which one rank has."""
    first_images = distributed.all_sum(first_images.to(distributed.device()))
    if distributed.rank() == 0:
        images.write_grid(path, generation.pictures(first_images, net.units))


def check_writable(folder):
    """Makes the folder; raises OSError where no file can be made in it."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def grid_path(grid, outdir):
    """Where to write the grid: as told, or beside `outdir`, so that `outdir` holds the images and nothing else."""
    if grid is None:
        return None
    path = os.path.abspath(outdir) + '-grid.png' if grid == 'beside outdir' else grid
    if not path.endswith('.png'):
        raise click.ClickException(f'--grid={grid}: the picture is a PNG; give a name that ends in .png')
    check_writable(os.path.dirname(os.path.abspath(path)))
    return path


def pick_format(format, net):
    """The file format asked for, or the one that fits; refuses PNG for what is no 8-bit picture."""
    picture = images.is_picture(net.img_channels, net.units)
    if format == 'png' and not picture:
        what = f'{net.img_channels} channels' if net.units is None else 'data that is not 8-bit'
        raise click.ClickException(f'--format=png: the network makes {what}, and a PNG holds 8-bit grey or RGB; use npy or npz')
    return format or ('png' if picture else 'npy')


if __name__ == '__main__':
    main()
