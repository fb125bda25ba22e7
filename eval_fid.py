# SPDX-License-Identifier: Apache-2.0
"""Measures generated images against a reference: Fréchet distance and Inception score, with everything that decides them.

python eval_fid.py --gen_path=out --ref_stats=ref.npz
python eval_fid.py ref --data=cifar.zip --dest=ref.npz --split=train"""

import dataclasses
import json
import os

import click

import dnnlib
from dnnlib.util import file_digest
from metrics.evaluate import DETECTORS, ImageFiles, check_reference, collect, numbers
from metrics.statistics import load_statistics, save_statistics
from torch_utils import command_line, distributed, misc

PROTOCOL_NUM = 50000  # the count of generated images behind published distances, which fall as it grows


class Group(command_line.Command, click.Group):
    """A command with a sub-command: `eval_fid.py --gen_path=...` works as published, and so does `eval_fid.py ref ...`."""


def shared_options(command):
    """The options that both commands have."""
    options = [
        click.option('--batch-size', help='Images a rank looks at together; changes the speed, not the numbers', metavar='INT',
                     type=click.IntRange(min=1), default=64, show_default=True),
        click.option('--detector', help='Where features come from', type=click.Choice(list(DETECTORS)), default='inception',
                     show_default=True),
        click.option('--detector-weights', help='Local copy of the Inception weights, or another address for them',
                     metavar='PATH|URL'),
        click.option('--device', help='Such as cpu or cuda  [default: the GPU, where there is one]', metavar='NAME'),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=Group, invoke_without_command=True)
@click.option('--gen-path', help='Generated images: a folder, zip, npz or npy', metavar='PATH')
@click.option('--ref-stats', help='Reference statistics (mu, sigma)', metavar='NPZ|URL')
@click.option('--ref-path', help='Reference images, in place of --ref-stats', metavar='PATH')
@click.option('--out-path', help='Where the result goes  [default: beside the images, GEN_PATH.fid.json]', metavar='JSON')
@click.option('--num', '--num-images', 'num', metavar='INT', type=click.IntRange(min=2),
              help=f'How many generated images, the first in sorted order  [default: all, which must be {PROTOCOL_NUM}]; '
              'under torchrun write --num-images')
@shared_options
@command_line.version_option
@click.pass_context
def main(ctx, **options):
    """Fréchet distance and Inception score of generated images.

    \b
    python eval_fid.py --gen_path=out --ref_stats=ref.npz
    torchrun --standalone --nproc_per_node=8 eval_fid.py --gen_path=out --ref_path=cifar.zip
    python eval_fid.py ref --data=cifar.zip --dest=ref.npz --split=train"""
    if ctx.invoked_subcommand:
        early = [key for key in options if ctx.get_parameter_source(key) == click.core.ParameterSource.COMMANDLINE]
        if early:
            word = ctx.invoked_subcommand
            raise click.ClickException(f'--{early[0].replace("_", "-")}: the options of "{word}" go after that word')
        return
    check_options(options)
    distributed.init()
    evaluate_images(dnnlib.EasyDict(options))


@main.command('ref', cls=command_line.Command)
@click.option('--data', help='Reference images: a folder, zip, npz or npy', metavar='PATH', required=True)
@click.option('--dest', help='Where the statistics go', metavar='NPZ', required=True)
@click.option('--split', help='Which part of the data set this is (train, test, ...); kept in the file and in every result',
              metavar='NAME')
@shared_options
def ref(**options):
    """Writes the statistics of reference images, all of them."""
    if not options['dest'].endswith('.npz'):
        raise click.ClickException(f'--dest={options["dest"]}: must end in .npz')
    distributed.init()
    write_reference(dnnlib.EasyDict(options))


def check_options(options):
    """What can be refused before any work."""
    if not options['gen_path']:
        raise click.ClickException('--gen-path is missing: the folder, zip, npz or npy of generated images')
    if (options['ref_stats'] is None) == (options['ref_path'] is None):
        raise click.ClickException('pass one of --ref-stats=NPZ (statistics) and --ref-path=PATH (images), '
                                   f'got {"none" if options["ref_stats"] is None else "both"}')


def evaluate_images(o):
    """The main command: reads, measures, prints, and writes the JSON."""
    out_path = o.out_path or os.path.abspath(o.gen_path) + '.fid.json'
    prepare_output(out_path, '--out-path')
    images = ImageFiles(o.gen_path, '--gen-path')
    count = choose_count(o, len(images))
    reference, digest = open_reference(o)
    detector = make_detector(o)
    detector.dim(images.shape)
    if isinstance(reference, ImageFiles):
        reference = collect(reference.batches(o.batch_size), detector, len(reference)).statistics
    where = f'--ref-path={o.ref_path}' if o.ref_path else f'--ref-stats={o.ref_stats}'
    check_reference(reference, detector, images.shape, where)
    found = collect(images.batches(o.batch_size, count), detector, count)
    if distributed.rank() == 0:
        values = {name: None if value is None else misc.as_float(value) for name, value in numbers(found, reference).items()}
        result = provenance(values, o, found.statistics, len(images), detector, reference, digest)
        with dnnlib.replacing(out_path) as part, open(part, 'w', encoding='utf-8') as f:
            json.dump(result, f, indent=2)
        print_table(values, result)
        print(f'written to {out_path}')


def open_reference(o):
    """(reference Statistics or ImageFiles, SHA-256 of the file; None for a folder)."""
    if o.ref_path:
        return ImageFiles(o.ref_path, '--ref-path'), file_digest(o.ref_path) if os.path.isfile(o.ref_path) else None
    path = first_on_node(dnnlib.open_url, o.ref_stats)
    return load_statistics(path, f'--ref-stats={o.ref_stats}'), file_digest(path)


def write_reference(o):
    """The `ref` command."""
    prepare_output(o.dest, '--dest')
    images = ImageFiles(o.data, '--data')
    stats = collect(images.batches(o.batch_size), make_detector(o), len(images)).statistics
    if distributed.rank() == 0:
        save_statistics(dataclasses.replace(stats, source=o.data, split=o.split), o.dest)
        print(f'{stats.num_images} images, {len(stats.mean)} features ({stats.detector}) -> {o.dest}')


def choose_count(o, found):
    """How many of the generated images are evaluated; published distances need the published number unless told otherwise."""
    option = '--num' if distributed.size() == 1 else '--num-images'  # torchrun takes --num for its own --numa-binding
    if o.num is None and found != PROTOCOL_NUM:
        raise click.ClickException(f'--gen-path={o.gen_path}: found {found} images, expected {PROTOCOL_NUM}; '
                                   f'pass {option}={found} to evaluate these')
    count = o.num or found
    if count > found:
        raise click.ClickException(f'{option}={count}: --gen-path={o.gen_path} holds only {found} images; '
                                   f'pass {option}={found} or less')
    if count < found:
        distributed.print0(f'evaluating the first {count} of {found} images, in sorted order')
    return count


def make_detector(o):
    """The detector on its device; one rank a node fetches its weights."""
    return first_on_node(DETECTORS[o.detector], weights=o.detector_weights, device=distributed.pick_device(o.device))


def first_on_node(function, *args, **kwargs):
    """function(...) on one rank of each node, then on the others: what it downloads is fetched once."""
    if distributed.local_rank() == 0:
        result = function(*args, **kwargs)
        distributed.barrier()
        return result
    distributed.barrier()
    return function(*args, **kwargs)


def prepare_output(path, option):
    """Makes the folder, and refuses a path that cannot become a file, before hours are spent."""
    if os.path.isdir(path):
        raise click.ClickException(f'{option}={path}: is a folder, expected the name of a file')
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise click.ClickException(f'{option}={path}: the folder {folder} is not writable')


def provenance(values, o, stats, found, detector, reference, digest):
    """What stands in the JSON: the numbers under their published names, then everything that decides them."""
    return {
        **values,
        'num_images': stats.num_images,
        'found_images': found,
        'image_shape': list(stats.shape),
        'detector': {'name': detector.name, 'weights': detector.weights, 'sha256': detector.sha256},
        'reference': {
            'path': o.ref_path or o.ref_stats, 'sha256': digest, 'num_images': reference.num_images, 'split': reference.split,
            'source': o.ref_path or reference.source, 'detector': reference.detector,
            'detector_sha256': reference.detector_sha256},
        'device': str(detector.device),
        'ranks': distributed.size(),
        'versions': misc.versions(),
        'options': dict(o),
    }


def print_table(values, result):
    """The numbers, each with what it must be quoted with."""
    reference = result['reference']
    against = ', '.join(str(part) for part in (reference['path'], reference['split'] and f'split {reference["split"]}',
                                               reference['num_images'] and f'{reference["num_images"]} images') if part)
    rows = [('metric', 'value', 'images', 'detector', 'against')]
    for name, value in values.items():
        text = '-' if value is None else f'{round(value, 4) + 0.0:.4f}'  # + 0.0: no "-0.0000"
        rows.append((name, text, str(result['num_images']), result['detector']['name'], against if name == 'fid_score' else '-'))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == '__main__':
    main()
