# SPDX-License-Identifier: Apache-2.0
"""A source and options -> an archive: what most images are like, what is wrong with the others, their members and dataset.json."""

import collections
import contextlib
import multiprocessing
import os
import sys

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from dnnlib.progress import Progress
from torch_utils import registry
from training.data.convert import transforms, writers
from training.data.convert.annotations import LEVELS, PROPOSE_CHANNELS, annotate
from training.data.convert.selection import select
from training.data.convert.sources import open_sources
from training.data.convert.tiles import Tiled
from training.data.dataset import UNITS_8BIT

CHUNK = 32  # images that a worker process takes at a time
SAMPLE = 256  # images, at most, that tell what the others should be like


def convert(options):
    """Writes the archive that the options of the command line ask for, a dict; returns how many images are in it. Raises UserError."""
    check_options(options)
    writer = writers.ArchiveWriter(options['dest'])
    source = open_sources(options['source'], not options['labels'], not options['units'], layout=options['layout'], split=options['split'])
    annotate(source, options)
    if options['tile']:
        source = Tiled(source, *options['tile'], options['overlap'])
    indices = select(source, options)
    job = plan(source, indices, options)
    # The processes start before the bar, whose thread a fork would not survive.
    with multiprocessing.Pool(options['workers'] or os.cpu_count(), _prepare, (source, job)) as pool, writer:
        return write(pool, source, job, indices, writer, options)


def check_options(options):
    """Refuses combinations that cannot work."""
    size, transform = options['resolution'], registry.parse(options['transform'] or '')[0]
    if transform not in ('', 'pad') and not size:
        raise UserError(f'--transform={transform} needs --resolution=WIDTHxHEIGHT')
    if transform in ('center-crop', 'center-crop-dhariwal') and size[0] != size[1]:
        raise UserError(f'--transform={transform} crops a square; --resolution={size[0]}x{size[1]} is none')
    if transform == 'center-crop-wide' and size[0] < size[1]:
        raise UserError(f'--transform=center-crop-wide needs a width above the height, not {size[0]}x{size[1]}')
    if options['sample'] == 'spread' and not options['max_images']:
        raise UserError('--sample=spread needs --max-images')
    tile, overlap = options['tile'], options['overlap']
    if overlap and not tile:
        raise UserError(f'--overlap={overlap} needs --tile')
    if tile and overlap >= min(tile):
        raise UserError(f'--overlap={overlap} must be less than the sides of --tile={tile[0]}x{tile[1]}')


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
        raise UserError(f'{shown(options["source"])}: none of its {len(indices)} images can be read')
    target, size = int(options['channels'] or 0) or None, options['resolution']
    # With a new size or a given number of channels, images may differ in them.
    traits = [(kind.is_8bit, None if target else kind.channels, None if size else (kind.height, kind.width)) for kind in kinds]
    is_8bit, channels, shape = usual = collections.Counter(traits).most_common(1)[0][0]
    as_png = is_8bit and (target or channels) in writers.PNG_COLOURS
    if as_png and options['units']:
        raise UserError('--units is for float data; these images are 8-bit, with offset and scale 127.5')
    per_channel = options['units'] == PROPOSE_CHANNELS
    if is_8bit and not (as_png or per_channel):
        source.units = source.units or UNITS_8BIT  # 8-bit values that PNG has no channels for
    told = np.size(source.units['scale']) if source.units else 1
    if not as_png and isinstance(source.units and source.units['scale'], list) and told != (target or channels):
        raise UserError(f'--units, or those of the source, are for {told} channels, and the images have {target or channels}')
    return transforms.Job(usual, transform_of(options, as_png), size, target, as_png, per_channel)


def transform_of(options, as_png):
    """What --transform names, None without; tried on a blank image, so that what it refuses is told once. Raises UserError."""
    if not options['transform']:
        return None
    found = registry.build(options['transform'], transforms.TRANSFORMS, '--transform')
    try:
        found(np.zeros([1, 2, 2], np.uint8 if as_png else np.float32), *(options['resolution'] or (None, None)))
    except ValueError as err:
        raise UserError(f'--transform={options["transform"]}: {err}') from None
    return found


def shown(specs):
    """The option --source as it was given, for errors."""
    return ' '.join(f'--source={spec}' for spec in ([specs] if isinstance(specs, str) else specs))


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
        print(f'{source.names[index]}: {problem}', file=sys.stderr)
    if bad and options['on_bad'] == 'fail':
        raise UserError(f'{len(bad)} of {count} images cannot be used (listed above); repair them, leave them out '
                        'with --on-bad=skip, or make them alike with --channels and --resolution')
    if bad:
        print(f'Left out {len(bad)} of {count} images (listed above)', file=sys.stderr)


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
            stem = source.names[index] if options['tile'] else f'{number // 1000:05}/img{number:08}'
            name = f'{stem}.{extension}'  # an image that is left out leaves its number out (as published)
            writer.write(name, member.data)
            written.append((name, index))
            sums = [sums[0] + member.total, sums[1] + member.squares]
            values += int(np.prod(member.shape[1:] if job.per_channel else member.shape))
    report(source, bad, len(indices), options)
    if small:
        print(f'Left out {small} of {len(indices)} images, too small for --transform={options["transform"]}', file=sys.stderr)
    if not written:
        raise UserError(f'{shown(options["source"])}: none of its {len(indices)} images can be used')
    writer.write_json('dataset.json', metadata(source, written, None if job.as_png else (*sums, values)))
    return len(written)


def metadata(source, written, sums):
    """What dataset.json holds: labels (or null), sigmas, sigma_min and sigma_max where there are any, units of float data."""
    pairs = lambda values: [[name, values[index]] for name, index in written]
    meta = {'labels': pairs(source.labels) if source.labels else None}
    levels = [(key, getattr(source, key)) for key in LEVELS]
    meta |= {key: pairs(values) for key, values in levels if values is not None}
    if sums is not None:
        meta['units'] = source.units or transforms.propose_units(*sums)
    return meta
