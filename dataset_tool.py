# SPDX-License-Identifier: Apache-2.0
"""Converts images of any kind into the zip or folder that train.py reads, and tells what is in one.

python dataset_tool.py --source=images/ --dest=images.zip --transform=center-crop --resolution=64x64
python dataset_tool.py stats images.zip"""

import collections
import contextlib
import csv
import multiprocessing
import os
import re

import click
import numpy as np

from dnnlib import UserError, arrays
from dnnlib.archive import DAMAGE, damage
from dnnlib.files import read_value
from dnnlib.progress import Progress
from torch_utils import registry
from torch_utils.command_line import Command, hyphens, version_option
from training.data import tables
from training.data.convert import sources, transforms, writers
from training.data.convert.statistics import describe
from training.data.dataset import UNITS_8BIT

CHUNK = 32  # images that a worker process takes at a time
SAMPLE = 256  # images, at most, that tell what the others should be like


class Tool(click.Group):
    """A group whose first command needs no name: "dataset_tool.py --source=..." converts."""

    def parse_args(self, ctx, args):
        if args and args[0] not in (*self.commands, '--help', '--version'):
            args = ['convert', *args]
        return super().parse_args(ctx, hyphens(args[:1]) + args[1:])


@click.group(cls=Tool)
@version_option
def main():
    """Prepare images for training.

    Without a command's name it converts: dataset_tool.py --source=... --dest=... (options: dataset_tool.py convert --help)."""


def parse_size(ctx, param, value):
    """'64x48' -> (64, 48), width first; '64' -> (64, 64)."""
    if value is None:
        return None
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', value)
    if not match or not int(match[1]) or not int(match[2] or 1):
        raise click.BadParameter(f'"{value}" is not WIDTHxHEIGHT, such as 64x64')
    return int(match[1]), int(match[2] or match[1])


def parse_part(ctx, param, value):
    """'0/2' -> (0, 2)."""
    if value is None:
        return None
    match = re.fullmatch(r'(\d+)/(\d+)', value)
    if not match or int(match[1]) >= int(match[2]):
        raise click.BadParameter(f'"{value}" is not K/N with K < N, such as 0/2')
    return int(match[1]), int(match[2])


def parse_units(ctx, param, value):
    """'10,2.5' -> {'offset': 10.0, 'scale': 2.5}."""
    if value is None:
        return None
    try:
        offset, scale = (float(text) for text in value.split(','))
    except ValueError:
        raise click.BadParameter(f'"{value}" is not OFFSET,SCALE, such as 0,1') from None
    if not np.isfinite([offset, scale]).all() or scale <= 0:
        raise click.BadParameter(f'"{value}": both must be finite, and the scale more than 0')
    return {'offset': offset, 'scale': scale}


@main.command(cls=Command)
@click.option('--source', metavar='PATH', required=True,
              help='Folder, zip, cifar-10-python.tar.gz, MNIST ...idx3-ubyte(.gz), .npy, .npz, or the word "digits"')
@click.option('--dest', metavar='PATH', required=True, help='A .zip, or the name of a folder without an extension')
@click.option('--max-images', metavar='INT', type=click.IntRange(min=1), help='Use only so many images')
@click.option('--sample', type=click.Choice(['first', 'spread']), default='first', show_default=True,
              help='Which ones --max-images takes: the first, or evenly over all classes')
@click.option('--part', metavar='K/N', callback=parse_part,
              help='Use every N-th image from the K-th on, counted from 0; before --max-images')
@click.option('--transform', type=click.Choice(transforms.TRANSFORMS), help='Crop before resizing; needs --resolution')
@click.option('--resolution', metavar='WxH', callback=parse_size,
              help='Size to resize to (Lanczos); sides that the network can halve at each of its levels')
@click.option('--channels', type=click.Choice(['1', '3']), help='Make every image grey, or RGB')
@click.option('--labels', metavar='FILE', type=click.Path(exists=True, dir_okay=False),
              help='CSV (file,label), JSON or .npy with a class or vector an image, instead of what the source says')
@click.option('--sigmas', metavar='FILE|NUMBER', help='Noise std that the images already have: CSV, JSON, .npy, or one number; '
              'in the source\'s own units, for 8-bit images in those of [-1,1]')
@click.option('--sigma-max', metavar='FILE|NUMBER', help='Highest noise level that images may be trained at, given like --sigmas; '
              'inf, or null in JSON: any')
@click.option('--sigma-min', metavar='FILE|NUMBER', help='Noise level above which alone images may be trained, given like --sigmas; '
              '0, or null in JSON: any; inf: never')
@click.option('--layout', type=click.Choice(list(sources.LAYOUTS)), help='Axes of an array, where its shape does not tell')
@click.option('--units', metavar='OFFSET,SCALE', callback=parse_units,
              help='Float data: network = (value - OFFSET) / SCALE  [default: mean, 2 std]')
@click.option('--on-bad', type=click.Choice(['fail', 'skip']), default='fail', show_default=True,
              help='Images that cannot be read, or differ from the others')
@click.option('--workers', metavar='INT', type=click.IntRange(min=1), help='Processes  [default: one a core]')
def convert(**options):
    """Convert images: 8-bit ones to PNG, any others (16-bit, float) to float32 .npy with the units that map them back.

    Labels come from class folders, or from a dataset.json in the source, which wins. MNIST keeps its 28x28 pixels."""
    check_options(options)
    writer = writers.ArchiveWriter(options['dest'])
    source = sources.open_source(options['source'], options['layout'])
    apply_tables(source, options)
    indices = select(source, options)
    job = plan(source, indices, options)
    # The processes start before the bar, whose thread a fork would not survive.
    with multiprocessing.Pool(options['workers'] or os.cpu_count(), _prepare, (source, job)) as pool, writer:
        written = write(pool, source, job, indices, writer, options)
    click.echo(f'{options["dest"]}: {written} images')


def check_options(options):
    """Refuses combinations that cannot work."""
    size, transform = options['resolution'], options['transform']
    if transform and not size:
        raise UserError(f'--transform={transform} needs --resolution=WIDTHxHEIGHT')
    if transform == 'center-crop' and size[0] != size[1]:
        raise UserError(f'--transform=center-crop crops a square; --resolution={size[0]}x{size[1]} is none')
    if transform == 'center-crop-wide' and size[0] < size[1]:
        raise UserError(f'--transform=center-crop-wide needs a width above the height, not {size[0]}x{size[1]}')
    if options['sample'] == 'spread' and not options['max_images']:
        raise UserError('--sample=spread needs --max-images')


# ----------------------------------------------------------------------------------------------------
# Labels and choice of images


def apply_tables(source, options):
    """Replaces the source's labels, noise levels and units by those of the command line."""
    if options['labels']:
        values = sources.match(read_table(options['labels'], '--labels'), source.names, f'--labels={options["labels"]}')
        source.labels = as_classes(values)
    if options['sigmas']:
        source.sigmas = read_levels(options['sigmas'], '--sigmas', source.names)
    if options['sigma_max']:
        source.sigma_max = read_levels(options['sigma_max'], '--sigma-max', source.names)
    if options['sigma_min']:
        source.sigma_min = read_levels(options['sigma_min'], '--sigma-min', source.names)
    if source.labels is not None:
        check(tables.labels, 'the table of labels (--labels, or those of the source)', source.labels)
    if source.sigmas is not None:
        check(tables.levels, 'the table of noise levels (--sigmas, or "sigmas" in the source)', source.sigmas, source.names)
        if options['resolution']:
            raise UserError('--resolution would colour the noise of images that have sigmas; leave it out, or resize '
                            'before the noise is there')
    if source.sigma_max is not None:
        where = 'the table of upper limits (--sigma-max, or "sigma_max" in the source)'
        limits = check(tables.limits, where, source.sigma_max, source.names)
        source.sigma_max = [limit if limit < float('inf') else None for limit in limits.tolist()]  # JSON has no infinity
    if source.sigma_min is not None:
        where = 'the table of lower limits (--sigma-min, or "sigma_min" in the source)'
        limits = check(tables.lower_limits, where, source.sigma_min, source.names)
        source.sigma_min = [min(limit, tables.LARGEST) or None for limit in limits.tolist()]
    source.units = options['units'] or source.units


def check(table, name, *args):
    """table(*args) of tables.py, whose refusals are told of `name`."""
    try:
        return table(*args)
    except ValueError as err:
        raise UserError(f'{name} {err}') from None


def read_levels(text, option, names):
    """Noise levels from a number or a file, one an image; None where a JSON file has null."""
    try:
        return [float(text)] * len(names)
    except ValueError:
        if not os.path.isfile(text):
            raise UserError(f'{option}={text}: neither a number nor a file') from None
    values = sources.match(read_table(text, option), names, f'{option}={text}')
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'{option}={text}: must hold one number an image') from None


def read_table(path, option):
    """A CSV, JSON or .npy file as pairs, dict or list of values (sources.match)."""
    try:
        if path.endswith('.npy'):
            return arrays.open_npy(path).tolist()
        if path.endswith('.json'):
            found = read_value(path, f'{option}={path}')
            return found.get(option.strip('-').replace('-', '_'), found) if isinstance(found, dict) else found
        with open(path, encoding='utf-8', newline='') as file:
            rows = [[registry.parse_number(text.strip()) for text in row] for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as err:
        raise UserError(f'{option}={path}: cannot be read ({damage(err)}); give CSV, JSON or .npy') from None
    if rows and str(rows[0][0]).lower() in ('file', 'filename', 'name', 'image'):
        rows = rows[1:]  # a heading
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    return [[str(row[0]), row[1] if len(row) == 2 else row[1:]] for row in rows]


def as_classes(values):
    """Labels as they are, or numbers for names of classes, in the order of the alphabet."""
    if not any(isinstance(value, str) for value in values):
        return values
    numbers = {name: number for number, name in enumerate(sorted({str(value) for value in values}))}
    click.echo('Classes: ' + ', '.join(f'{number} {name}' for name, number in numbers.items()))
    return [numbers[str(value)] for value in values]


def select(source, options):
    """Indices of the images to use, in the source's order."""
    first, step = options['part'] or (0, 1)
    indices = list(range(first, len(source.names), step))
    limit = options['max_images']
    if not limit or limit >= len(indices):
        return indices
    classes = [_hashable(source.labels[i]) for i in indices] if source.labels else None
    if options['sample'] == 'spread':
        chosen = _spread(indices, classes, limit)
    else:
        chosen = indices[:limit]
    if classes:
        kept = len({_hashable(source.labels[i]) for i in chosen})
        if kept < len(set(classes)):
            click.echo(f'Warning: --max-images={limit} keeps {kept} of {len(set(classes))} classes'
                       + ('; --sample=spread takes them over all classes' if options['sample'] == 'first' else ''), err=True)
    return chosen


def _hashable(label):
    return tuple(label) if isinstance(label, list) else label


def _spread(indices, classes, limit):
    """The first of each class, then the second of each, and so on; without classes, at even distances."""
    if classes is None:
        return [indices[k * len(indices) // limit] for k in range(limit)]
    seen, turns = collections.Counter(), []
    for index, label in zip(indices, classes):
        turns.append((seen[label], index))
        seen[label] += 1
    return sorted(index for _, index in sorted(turns)[:limit])


# ----------------------------------------------------------------------------------------------------
# Conversion


def _prepare(source, job):
    """Runs once in each worker process."""
    global _source, _job
    _source, _job = source, job


def _convert(index):
    return _job.convert(_source, index)


def plan(source, indices, options):
    """The Job that fits most of a sample of the images; those that differ from it count as bad."""
    step = -(-len(indices) // SAMPLE)
    kinds = _kinds(source, indices[::step]) or _kinds(source, indices)
    if not kinds:
        raise UserError(f'--source={options["source"]}: none of its {len(indices)} images can be read')
    target, size = int(options['channels'] or 0) or None, options['resolution']
    # With a new size or a given number of channels, images may differ in them.
    traits = [(kind.is_8bit, None if target else kind.channels, None if size else (kind.height, kind.width)) for kind in kinds]
    is_8bit, channels, shape = usual = collections.Counter(traits).most_common(1)[0][0]
    as_png = is_8bit and (target or channels) in writers.PNG_COLOURS
    if as_png and options['units']:
        raise UserError('--units is for float data; these images are 8-bit, with offset and scale 127.5')
    if is_8bit and not as_png:
        source.units = source.units or UNITS_8BIT  # 8-bit values that PNG has no channels for
    return transforms.Job(usual, options['transform'], size, target, as_png)


def _kinds(source, indices):
    """The kinds of those images whose headers can be read."""
    found = []
    for index in indices:
        with contextlib.suppress(*DAMAGE):
            found.append(source.kind(index))
    return found


def report(source, bad, count, options):
    """Lists what is wrong with which image; with --on-bad=fail that is the end."""
    for index, problem in bad.items():
        click.echo(f'{source.names[index]}: {problem}', err=True)
    if bad and options['on_bad'] == 'fail':
        raise UserError(f'{len(bad)} of {count} images cannot be used (listed above); repair them, leave them out '
                        'with --on-bad=skip, or make them alike with --channels and --resolution')
    if bad:
        click.echo(f'Left out {len(bad)} of {count} images (listed above)', err=True)


def write(pool, source, job, indices, writer, options):
    """Converts and writes the images and dataset.json; returns how many there are."""
    bad, written, small, sums, values = {}, [], 0, [0.0, 0.0], 0
    extension = 'png' if job.as_png else 'npy'
    members = Progress(len(indices), 'Converting').over(pool.imap(_convert, indices, CHUNK))
    for number, (index, member) in enumerate(zip(indices, members)):
        if member.problem:
            bad[index] = member.problem
        elif member.data is None:
            small += 1
        else:
            name = f'{number:08}'
            name = f'{name[:5]}/img{name}.{extension}'  # an image that is left out leaves its number out (as published)
            writer.write(name, member.data)
            written.append((name, index))
            sums = [sums[0] + member.total, sums[1] + member.squares]
            values += int(np.prod(member.shape))
    report(source, bad, len(indices), options)
    if small:
        click.echo(f'Left out {small} of {len(indices)} images, too small for --transform={job.transform}', err=True)
    if not written:
        raise UserError(f'--source={options["source"]}: none of its {len(indices)} images can be used')
    writer.write_json('dataset.json', metadata(source, written, None if job.as_png else (*sums, values)))
    return len(written)


def metadata(source, written, sums):
    """What dataset.json holds: labels (or null), sigmas and their limits where there are any, units of float data."""
    pairs = lambda values: [[name, values[index]] for name, index in written]
    meta = {'labels': pairs(source.labels) if source.labels else None}
    tables_of = {key: getattr(source, key) for key in ('sigmas', 'sigma_min', 'sigma_max')}
    meta |= {key: pairs(values) for key, values in tables_of.items() if values is not None}
    if sums is not None:
        meta['units'] = source.units or transforms.propose_units(*sums)
    return meta


# ----------------------------------------------------------------------------------------------------
# Statistics


@main.command(cls=Command)
@click.argument('data', metavar='DATA')
@click.option('--sigma', metavar='FLOAT', type=click.FloatRange(min=0, min_open=True), help='Noise level to give the SNR of')
def stats(data, sigma):
    """Print count, shape, range, sigma_data, classes, noise levels, and the SNR at a noise level."""
    for line in describe(data, sigma):
        click.echo(line)


if __name__ == '__main__':
    main()
