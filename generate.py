# SPDX-License-Identifier: Apache-2.0
"""Generates images: one file a seed, whose content depends on the network and the seed alone.

python generate.py --network=NAME --outdir=out --seeds=0-63 --grid
torchrun --standalone --nproc_per_node=8 generate.py --network=NAME --outdir=out --seeds=0-49999 --subdirs"""

import functools
import math
import os
import tempfile

import click
import torch
from tqdm import tqdm

from torch_utils import distributed
from torch_utils.command_line import Command, IntList, version_option
from training import generation, hub, images, registry, samplers, schedules
from training import guidance as guide
from training import labels as label_sources
from training.registry import Spec

GRID_IMAGES, STEPS = 64, 18
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
@click.option('--skip-existing', is_flag=True,
              help='Keep whole images that are there and make the others, to go on after an interruption with the same options')
@click.option('--class', 'class_idx', metavar='INT', type=click.IntRange(min=0), help='Class of all images')
@click.option('--labels', metavar='SOURCE',
              help='uniform: a class drawn for each seed; dataset:PATH: drawn as often as in a data set; FILE: .npy, .json or .txt, whose '
              'row s (a class, or a vector) is for seed s  [default: uniform]')
@click.option('--guidance', metavar='FLOAT', type=float, default=1, show_default=True,
              help='Weight w of D_0 + w (D_1 - D_0), where D_0 is told no label; 1 is off')
@click.option('--guidance-interval', metavar='LO,HI',
              help='Guide at LO < sigma <= HI only; or at t:LO,HI, indices 0 to 999 of the cosine schedule  [default: 0,inf]')
@click.option('--gnet', metavar='REF', help='D_0 is this network, told the same labels (autoguidance)')
@click.option('--weights', metavar='WHICH', default='ema', show_default=True, help='Which weights of a training state: ema or raw')
@click.option('--gnet-weights', metavar='WHICH', default='ema', show_default=True, help='The same for --gnet')
@click.option('--batch', '--batch-size', '--max-batch-size', metavar='INT', type=COUNT, default=64, show_default=True,
              help='Images at a time on each rank; changes no image')
@click.option('--sampler', '--solver', metavar='|'.join(samplers.STEPPERS) + '[:k=v]', type=Spec(samplers.STEPPERS), default='heun',
              show_default=True, help='What walks down the noise levels, with its keys')
@click.option('--levels', '--disc', metavar='|'.join(schedules.SCHEDULES) + '[:k=v]', type=Spec(schedules.SCHEDULES),
              help='The noise levels, with their keys, such as explicit:sigmas=80|10|1  [default: edm; its own, respaced, where a network '
              'of --objective is sampled by ancestral or ddim]')
@click.option('--steps', metavar='INT', type=COUNT,
              help=f'Sampling steps N; heun evaluates the network 2N - 1 times, the others N times  [default: {STEPS}]')
@click.option('--sigma-min', metavar='FLOAT', type=float, help='Key of --levels: the lowest  [default: its own, or the network\'s]')
@click.option('--sigma-max', metavar='FLOAT', type=float, help='Key of --levels: the highest  [default: its own, or the network\'s]')
@click.option('--rho', metavar='FLOAT', type=float, help='Key of --levels=edm: their exponent  [default: 7]')
@click.option('--S-churn', '--s-churn', 'S_churn', metavar='FLOAT', type=POSITIVE,
              help='Key of --sampler=heun or euler: strength of the noise added on the way  [default: 0, deterministic]')
@click.option('--S-min', '--s-min', 'S_min', metavar='FLOAT', type=POSITIVE, help='The lowest level that gets such noise  [default: 0]')
@click.option('--S-max', '--s-max', 'S_max', metavar='FLOAT', type=POSITIVE, help='The highest level that gets it  [default: inf]')
@click.option('--S-noise', '--s-noise', 'S_noise', metavar='FLOAT', type=POSITIVE, help='Scale of such noise  [default: 1]')
@click.option('--schedule', type=click.Choice(list(schedules.TIMES)),
              help='Key of --sampler=heun or euler: sigma(t), in whose t the steps are straight  [default: linear]')
@click.option('--scaling', type=click.Choice(list(samplers.SCALINGS)),
              help='Key of --sampler=heun or euler: the scale of the state on the way  [default: none]')
@click.option('--stop-sigma', metavar='FLOAT', type=POSITIVE,
              help='End with the mean E[x_0 | x] at the last level that is not below this, for models of noisy images only  [default: 0]')
@click.option('--stop-variance', metavar='FLOAT', type=POSITIVE, help='The same, as the square of the level')
@click.option('--precision', type=click.Choice(list(PRECISIONS)),
              help='Inside the network; the sampler is float64  [default: as the network was saved]')
@click.option('--compile', metavar='[BOOL]', type=bool, is_flag=False, flag_value=True, default=False, show_default=True,
              help='Compile the U-Net (torch.compile): a minute or so at the start, faster after; changes pixels a little')
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


def run(network, outdir, seeds, subdirs, format, grid, skip_existing, weights, gnet, gnet_weights, precision, compile, device, threads,
        class_idx, labels, guidance, guidance_interval, batch, steps, **sampler):
    """Sets up, samples and writes this rank's share, then counts over all ranks."""
    seeds = list(dict.fromkeys(seeds))  # a seed that was named twice is one image
    check_writable(outdir)
    grid = grid_path(grid, outdir)
    load = functools.partial(load_network, device=distributed.pick_device(device), precision=precision, compile=compile)
    net = load(network, weights=weights)
    guidance = pick_guidance(net, load(gnet, weights=gnet_weights) if gnet else None, guidance, guidance_interval)
    pieces = {'labels': pick_labels(net, seeds, labels, class_idx), 'guidance': guidance,
              **sampler_pieces(net, steps, **sampler)}
    files = images.Files(outdir, pick_format(format, net), subdirs)
    missing = distributed.from_rank0(find_missing, files, seeds, net, skip_existing)
    distributed.print0(f'Generating {len(missing)} images from {network} to {outdir}'
                       + (f', {guide.describe(guidance)}' if guidance.weight != 1 else ''))
    first_images = FirstImages(net, seeds[:GRID_IMAGES] if grid else [])
    if distributed.rank() == 0:
        first_images.read(files, set(seeds) - set(missing))
    batches = generation.generate_images(net, missing, batch=batch, rank=distributed.rank(), world=distributed.size(), **pieces)
    written = write_all(net, batches, len(missing[distributed.rank()::distributed.size()]), files, first_images)
    if grid:
        write_grid(grid, first_images.images, net)
    report(written, len(missing), seeds, files)


def load_network(ref, weights, device, precision, compile):
    """The network, as it is to run."""
    net = hub.load_network(ref, device=device, weights=weights)
    if precision:
        net.compute_dtype = PRECISIONS[precision]
    if compile:
        # The U-Net alone: what is around it is in float32 and costs little, and some samplers ask for more than D.
        net.model.compile(dynamic=False)
    return net


def pick_guidance(net, gnet, weight, interval):
    """The Guidance that the options ask for; refuses options that would do nothing."""
    if weight == 1 and (gnet is not None or interval):
        option = 'gnet' if gnet is not None else 'guidance-interval'
        raise click.ClickException(f'--{option} does nothing without a --guidance other than 1; give --guidance=2, say')
    try:
        limits = guide.interval(interval) if interval else (0.0, math.inf)
    except ValueError as err:
        raise click.ClickException(f'--guidance-interval={interval}: {err}') from None
    found = guide.Guidance(weight, limits, gnet)
    try:
        guide.check(net, found)
    except ValueError as err:
        raise click.ClickException(f'--guidance={weight:g}: {err}') from None
    if weight != 1 and gnet is None and not net.config.get('label_dropout'):
        distributed.print0('Warning: the network was trained without label dropout, so that what it makes of no label means little; '
                           'train with --label-dropout, or give --gnet')
    return found


def pick_labels(net, seeds, spec, class_idx):
    """The source of labels that the options name."""
    try:
        return label_sources.pick(net, seeds, spec, class_idx)
    except ValueError as err:
        raise click.ClickException(f'--class={class_idx}: {err}' if class_idx is not None else f'--labels={spec}: {err}') from None


def find_missing(files, seeds, net, skip_existing):
    """The seeds to make images of; removes what a killed run left of them."""
    shape = [net.img_channels, *generation.resolution(net)]
    missing = files.missing(seeds, shape) if skip_existing else seeds
    files.remove_leftovers(missing)
    return missing


def sampler_pieces(net, steps, sampler, levels, sigma_min, sigma_max, rho, stop_sigma, stop_variance, **keys):
    """{schedule, num_steps, stepper} with their options bound; what they or the network refuse is found before any file is written."""
    if stop_sigma is not None and stop_variance is not None:
        raise click.ClickException('--stop-sigma and --stop-variance are the same option, as a level and as its square; give one of them')
    keys['stop_sigma'] = stop_sigma if stop_variance is None else math.sqrt(stop_variance)
    ends = {'sigma_min': sigma_min, 'sigma_max': sigma_max, 'rho': rho}
    stepper = combine('sampler', sampler, samplers.STEPPERS, keys)
    if levels is None and rho is None and trained_for(net, stepper):
        levels, schedule = f'respaced of {net.diffusion}', own_levels(net, ends)
        stepper = functools.partial(stepper, **{'clip': net.units is None, **stepper.keywords})
    else:
        levels = levels or 'edm'
        schedule = combine('levels', levels, schedules.SCHEDULES, ends)
    steps = steps or (None if 'sigmas' in registry.parameters(schedule) else STEPS)  # levels that are given are their own number
    try:
        sigmas = generation.noise_levels(net, schedule, steps)
    except ValueError as err:
        raise click.ClickException(f'--levels={levels} with its keys: {err}') from None
    try:
        stepper = generation.with_time(net, schedule, stepper, sigmas)
        samplers.check(stepper, sigmas)
    except ValueError as err:
        raise click.ClickException(f'--sampler={sampler} with its keys: {err}') from None
    if stepper.keywords.get('variance') == 'learned' and net.output_multiple < 2:
        raise click.ClickException(f'--sampler={sampler}: the network gives no variance; choose variance=small or large')
    return {'schedule': schedule, 'num_steps': steps, 'stepper': stepper}


def trained_for(net, stepper):
    """Whether a network was trained on the timesteps that a stepper walks in, as IDDPM's are."""
    return bool(getattr(net, 'diffusion', None)) and 'clip' in registry.parameters(stepper)


def own_levels(net, ends):
    """The schedule of a network's own timesteps, which published samplers take evenly spaced, and clip D on: the first step is long."""
    given = {key: value for key, value in ends.items() if value is not None}
    return functools.partial(schedules.respaced, diffusion=net.diffusion, **given)


def combine(slot, spec, pieces, keys):
    """The piece that --slot=SPEC names, with keys that have an option of their own; refuses what it does not take or was told twice."""
    name, told = registry.parse(spec)
    accepted = registry.parameters(pieces[name])
    keys = {key: value for key, value in keys.items() if value is not None}
    for key, value in keys.items():
        option = f'--{key.replace("_", "-")}={value}'
        if key not in accepted:
            raise click.ClickException(f'{option} is no key of --{slot}={name}, which takes {", ".join(accepted)}')
        if key in told:
            raise click.ClickException(f'{option} and --{slot}={spec}: "{key}" is given twice')
    for key, value in {**told, **keys}.items():
        if value != value:
            raise click.ClickException(f'--{slot}={name}: "{key}" is nan; give a number')
    return functools.partial(registry.build(spec, pieces, f'--{slot}'), **keys)


class FirstImages:
    """The images of the first few seeds, in network units, for the grid; those that other ranks have are zeros."""

    def __init__(self, net, seeds):
        self.row, self.units = {seed: i for i, seed in enumerate(seeds)}, net.units
        self.images = torch.zeros([len(seeds), net.img_channels, *generation.resolution(net)], device=generation.network_device(net))

    def read(self, files, seeds):
        """Takes those of the seeds that were there already from their files."""
        for seed in self.row.keys() & seeds:
            self.images[self.row[seed]] = generation.to_network(images.read(files.path(seed)), self.units)

    def take(self, part):
        """Takes what a batch has of them."""
        for seed, image in zip(part.seeds, part.images):
            if seed in self.row:
                self.images[self.row[seed]] = image


def write_all(net, batches, share, files, first_images):
    """Samples and writes this rank's images; returns how many. Raises click.ClickException that says how many came to be."""
    writers = images.Writers()
    try:
        with writers, tqdm(total=share, unit='img', desc='rank 0' if distributed.size() > 1 else None,
                           disable=True if distributed.rank() else None) as bar:
            for part in batches:
                check_finite(part)
                first_images.take(part)
                submit(writers, part, net.units, files)
                bar.update(len(part.seeds))
    except OSError as err:
        whose = f' of rank {distributed.rank()}' if distributed.size() > 1 else ''
        raise click.ClickException(f'{err.filename}: {err.strerror}; {writers.written} of {share} images{whose} were written; '
                                   'make room, and go on with --skip-existing') from None
    return writers.written


def check_finite(part):
    """Refuses images that are no numbers, which would be written as black ones."""
    bad = (~part.images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise click.ClickException(f'the image of seed {part.seeds[bad[0]]} is not finite ({len(bad)} of {len(part.seeds)} in '
                                   'its batch are not); the weights are broken, or too large for --precision=fp16')


def submit(writers, part, units, files):
    """Hands one batch to the writer threads, already on the CPU."""
    arrays = generation.to_uint8(part.images) if files.format == 'png' else generation.to_physical(part.images, units).float()
    told = [None] * len(part.seeds) if part.labels is None else part.labels.cpu().numpy()
    for seed, array, label in zip(part.seeds, arrays.cpu().numpy(), told):
        writers.submit(files.write, seed, array, label)


def report(written, missing, seeds, files):
    """Says how many images were written, over all ranks, and refuses another number than was wanted."""
    written = int(distributed.all_sum(torch.tensor(written, device=distributed.device())))
    if written != missing:
        raise click.ClickException(f'{written} of {missing} images were written to {files.outdir}')
    there = f': {written} written, {len(seeds) - missing} were there already' if missing < len(seeds) else ''
    distributed.print0(f'{len(seeds)} images ({files.format}) in {files.outdir}{there}')


def write_grid(path, first_images, net):
    """The picture of the first images, each of which one rank has."""
    first_images = distributed.all_sum(first_images.to(distributed.device()))
    if distributed.rank() == 0:
        images.write_grid(path, generation.pictures(first_images, net.units))
        print(f'The first {len(first_images)} images in one picture: {path}')


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
