# SPDX-License-Identifier: Apache-2.0
"""A source and options -> an archive: finds the common format of the images, reports the others, writes members and dataset.json."""

import collections
import itertools
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE, damage
from dnnlib.cpus import cpu_count
from dnnlib.progress import Progress
from torch_utils import registry
from training.data import tables
from training.data.convert import sheet, stabilising, transforms, writers
from training.data.convert.annotations import AUTO, LEVELS, PROPOSE_CHANNELS, annotate
from training.data.convert.measured import measure_source
from training.data.convert.selection import select
from training.data.convert.sources import open_sources, parse_source
from training.data.convert.statistics import Facts, Summary, facts_of, lines
from training.data.convert.tiles import Tiled
from training.data.dataset import UNITS_8BIT

CHUNK = 32  # images per task of a worker process
SHOWN = 100  # images, at most, that are reported one by one
SAMPLE = 1024  # images, at most, whose headers are read first to find the common format


class Written(NamedTuple):
    """Facts about an archive that has been written."""

    summary: Summary
    facts: Facts
    cells: dict  # {index of the source: (name, bytes of the member)} of the images on the contact sheet
    places: dict  # {index of the source: place in the archive}


def convert(options: dict) -> list[str]:
    """Writes the archive for the options of the command line, a dict, and the contact sheet; returns lines of text to print. Raises
    UserError."""
    check_options(options)
    stabiliser = stabilising.requested(options)
    writer = writers.open_writer(options['dest'], options['packed'])
    picture = sheet.place(options['sheet'], options['dest'])
    source = open_sources(options['source'], not options['labels'], not options['units'], stabilising.mark if stabiliser else None,
                          layout=options['layout'], split=options['split'])
    annotate(source, options)
    automatic, measured = options['sigmas'] == AUTO, []
    if options['tile']:
        measured = measure_source(source, range(len(source.names)), options) if automatic else []
        source = Tiled(source, *options['tile'], options['overlap'])
    indices = select(source, options)
    if automatic and not options['tile']:
        measured = measure_source(source, indices, options)
    if stabiliser:
        specs = [options['source']] if isinstance(options['source'], str) else options['source']
        stabiliser = stabilising.settle(stabiliser, source, indices, [parse_source(spec)[0] for spec in specs], options['stabilise'])
    job = plan(source, indices, options, stabiliser)
    # The processes start before the progress bar, whose thread would not survive a fork.
    with multiprocessing.Pool(options['workers'] or cpu_count(), _prepare, (source, job)) as pool, writer:
        rows = sheet.choose(source.labels, source.sigmas, indices) if picture else []
        found = write(pool, source, job, indices, writer, options, {index for row in rows for index in row})
    told = [*measured, *lines(found.summary, found.facts)]
    if picture and draw_sheet(picture, rows, found, options):
        told.append(f'{picture}: contact sheet with {len(found.cells)} of them')
    return [*told, f'{options["dest"]}: {found.summary.count} images']


def draw_sheet(path, rows, found, options):
    """Draws the contact sheet of an archive; returns whether it could be written: a failure must not lose the archive."""
    facts, labels, names = found.facts, found.facts.labels, found.facts.class_names or {}
    title = f'{os.path.basename(os.path.abspath(options["dest"]))}: {found.summary.count} images, {" x ".join(map(str, facts.shape))}'
    title += ', of which the first 3 channels are shown' * (facts.shape[0] > 3)
    table = []
    for row in rows:
        row = [index for index in row if index in found.cells]
        places = [found.places[index] for index in row]
        label = int(labels[places[0]]) if places and labels is not None and labels.ndim == 1 else None
        notes = [f'sigma {facts.sigmas[place]:.2g}' if facts.sigmas[place] else '' for place in places]
        table.append(('' if label is None else f'{label} {names.get(label, "")}'.strip(),
                      [(*found.cells[index], note) for index, note in zip(row, notes)]))
    try:
        sheet.draw(path, title, [row for row in table if row[1]], facts.units if facts.is_float else None)
    except OSError as err:
        print(f'{path}: could not be written ({damage(err)})', file=sys.stderr)
        return False
    return True


def check_options(options: dict) -> None:
    """Refuses combinations that cannot work."""
    size, transform = options['resolution'], registry.parse(options['transform'] or '')[0]
    if transform not in ('', 'pad') and not size:
        raise UserError(f'--transform={transform} needs --resolution=WIDTHxHEIGHT')
    if transform in ('center-crop', 'center-crop-dhariwal') and size[0] != size[1]:
        raise UserError(f'--transform={transform} crops a square, but --resolution={size[0]}x{size[1]} is not square')
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


def plan(source, indices, options, stabiliser=None):
    """The Job that fits most images of a sample; images that differ from it count as bad. stabiliser: of --stabilise."""
    sample = indices[::-(-len(indices) // SAMPLE)]
    kinds, bad = _kinds(source, sample)
    if not kinds:
        sample = indices
        kinds, bad = _kinds(source, sample)
    if not kinds:
        raise UserError(f'{shown(options["source"])}: none of its {len(indices)} images can be read; the first, '
                        f'{source.names[sample[0]]}: {bad[sample[0]]}')
    target, size = int(options['channels'] or 0) or None, options['resolution']
    # Images may differ in size if they are resized, and in channels if --channels is given.
    traits = [(kind.is_8bit, None if target else kind.channels, None if size else (kind.height, kind.width)) for kind in kinds.values()]
    is_8bit, channels, shape = usual = collections.Counter(traits).most_common(1)[0][0]
    if is_8bit and channels == 3:  # a few grey photographs among others, as in ImageNet, are no reason to stop
        usual, target = (is_8bit, None, shape), 3
    as_png = is_8bit and not stabiliser and (target or channels) in writers.PNG_COLOURS
    if as_png and options['units']:
        raise UserError('--units is for float data; these images are 8-bit, with offset and scale 127.5')
    per_channel = options['units'] == PROPOSE_CHANNELS
    if is_8bit and not (as_png or per_channel or stabiliser):
        store_as_float(source, options['units'] or UNITS_8BIT)
    told = np.size(source.units['scale']) if source.units else 1
    if not as_png and isinstance(source.units and source.units['scale'], list) and told != (target or channels):
        raise UserError(f'--units, or those of the source, are for {told} channels, and the images have {target or channels}')
    job = transforms.Job(usual, transform_of(options, as_png), size, target, as_png, per_channel, stabiliser)
    objections = {index: job.objection(kind, source.sigmas[index] if source.sigmas else 0) for index, kind in kinds.items()}
    bad = dict(sorted((bad | {index: text for index, text in objections.items() if text}).items()))
    if bad and len(sample) < len(indices) and options['on_bad'] == 'fail':
        report(source, bad, len(sample), options, f'the {len(sample)} images (of {len(indices)}) that were examined first')
    return job


def store_as_float(source, units):
    """8-bit images with more channels than PNG has become float data: their levels, given in network units, are converted to its units."""
    source.units, scale = units, tables.level_scale(units)
    for key in LEVELS:
        values = getattr(source, key)
        if values is not None:
            setattr(source, key, [None if value is None else value * scale for value in values])


def transform_of(options, as_png):
    """The function for --transform, or None; tried on a blank image, so that its errors are reported once. Raises UserError."""
    if not options['transform']:
        return None
    found = registry.build(options['transform'], transforms.TRANSFORMS, '--transform')
    try:
        found(np.zeros([1, 2, 2], np.uint8 if as_png else np.float32), *(options['resolution'] or (None, None)))
    except ValueError as err:
        raise UserError(f'--transform={options["transform"]}: {err}') from None
    return found


def shown(specs: Sequence[str]) -> str:
    """The option --source as it was given, for errors."""
    return ' '.join(f'--source={spec}' for spec in ([specs] if isinstance(specs, str) else specs))


def _kinds(source, indices):
    """({index: Kind} of the images whose headers can be read, {index: problem} of the others)."""
    found, bad = {}, {}
    for index in indices:
        try:
            found[index] = source.kind(index)
        except DAMAGE as err:
            bad[index] = f'cannot be read ({damage(err)})'
    return found, bad


def report(source, bad, count, options, where=None):
    """Prints the problem of each bad image; with --on-bad=fail raises UserError. where: which images were examined, by default all."""
    for index, problem in itertools.islice(bad.items(), SHOWN):
        print(f'{source.names[index]}: {problem}', file=sys.stderr)
    if len(bad) > SHOWN:
        print(f'... and {len(bad) - SHOWN} more', file=sys.stderr)
    if bad and options['on_bad'] == 'fail':
        raise UserError(f'{len(bad)} of {where or f"{count} images"} cannot be used (listed above); repair them, leave them out '
                        'with --on-bad=skip, or make them alike with --channels and --resolution')
    if bad:
        print(f'Left out {len(bad)} of {count} images (listed above)', file=sys.stderr)


def tell_channels(changed, count, options):
    """Prints which images were converted to RGB without --channels=3. changed: Counter of their original channels."""
    if changed and not options['channels']:
        names = {1: 'grey', 2: 'grey with alpha', 4: 'RGB with alpha'}
        told = ', '.join(f'{number} {names.get(channels, channels)}' for channels, number in sorted(changed.items()))
        print(f'Converted to RGB, like most images: {told}, of {count} images', file=sys.stderr)


def write(pool, source, job, indices, writer, options, wanted=frozenset()):
    """Converts and writes the images and dataset.json; returns the Written. wanted: indices of images for the contact sheet."""
    bad, written, small, sums, values, changed = {}, [], 0, [0.0, 0.0], 0, collections.Counter()
    summary, cells, shape, tally = Summary(), {}, None, 0
    extension = 'png' if job.as_png else 'npy'
    members = Progress(len(indices), 'Converting').over(pool.imap(_convert, indices, CHUNK))
    for number, (index, member) in enumerate(zip(indices, members)):
        if member.problem:
            if job.stabilise and options['on_bad'] == 'fail' and member.tally is not None:
                raise UserError(f'--stabilise={options["stabilise"]}: {source.names[index]} has {member.problem}')
            bad[index] = member.problem
        elif member.data is None:
            small += 1
        else:
            stem = source.names[index] if options['tile'] else f'{number // 1000:05}/img{number:08}'
            name = f'{stem}.{extension}'  # the number of an image that is left out is skipped (as published)
            writer.write(name, member.data)
            written.append((name, index))
            summary.add(member.measured)
            shape = member.shape
            sums = [sums[0] + member.total, sums[1] + member.squares]
            tally = tally if member.tally is None else tally + member.tally
            values += int(np.prod(member.shape[1:] if job.per_channel else member.shape))
            if source.sigmas and source.sigmas[index]:
                source.sigmas[index] *= member.gain
            if member.channels != member.shape[0]:
                changed[member.channels] += 1
            if index in wanted:
                cells[index] = name, member.data
    report(source, bad, len(indices), options)
    tell_channels(changed, len(indices), options)
    for line in stabilising.warnings(job.stabilise, tally) if job.stabilise and written else ():
        print(line, file=sys.stderr)
    if small:
        print(f'Left out {small} of {len(indices)} images, too small for --transform={options["transform"]}', file=sys.stderr)
    if not written:
        raise UserError(f'{shown(options["source"])}: none of its {len(indices)} images can be used')
    meta = metadata(source, written, None if job.as_png else (*sums, values))
    writer.write_json('dataset.json', meta)
    facts = facts_of(meta, [name for name, _ in written], shape, not job.as_png, source.class_names)
    return Written(summary, facts, cells, {index: place for place, (_, index) in enumerate(written) if index in cells})


def metadata(source, written, sums):
    """The content of dataset.json: labels (or null), and if there are any sigmas, sigma_min, sigma_max, captions and the record of labels
    made of these; units of float data."""
    pairs = lambda values: [[name, values[index]] for name, index in written]
    meta = {'labels': pairs(source.labels) if source.labels else None}
    levels = [(key, getattr(source, key)) for key in LEVELS]
    meta |= {key: pairs(values) for key, values in levels if values is not None}
    if source.captions:
        meta['captions'] = pairs(source.captions)
    if source.labels and source.text:
        meta['text'] = source.text
    if sums is not None:
        meta['units'] = (source.units or transforms.propose_units(*sums)) | ({'stabilise': source.stabilise} if source.stabilise else {})
    return meta
