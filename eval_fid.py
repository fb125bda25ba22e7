# SPDX-License-Identifier: Apache-2.0
"""Measures generated images, or a network's, against a reference: FID, KID, Inception score, precision and recall, memorisation.

python eval_fid.py --gen_path=out --ref_stats=ref.npz
python eval_fid.py ref --data=cifar.zip --dest=ref.npz --split=train
python eval_fid.py nearest --gen-path=out --train=cifar.zip --held-out=cifar-test.zip
python eval_fid.py sweep --network=NAME --ref-stats=ref.npz --outdir=sweep --guidance=1,1.5,2 --steps=9,18 --seeds=0-1999
python eval_fid.py table runs/*/*.fid.json --sort=fid_score"""

import dataclasses
import math

import click

import dnnlib
from dnnlib import UserError
from dnnlib.files import beside, file_digest, prepare_output, write_json
from metrics import curves, memorisation, report, results, table
from metrics.detectors import DETECTORS
from metrics.evaluate import METRICS, Settings, check_reference, collect, evaluate_batches, needs_features
from metrics.generated import PROTOCOL_NUM
from metrics.image_files import ImageFiles
from metrics.statistics import load_statistics, save_statistics
from torch_utils import command_line, distributed, registry
from torch_utils.command_line import Spec, ranges
from training.evaluation.images import NetworkImages, RecordedImages
from training.evaluation.sweep import Sweep
from training.sampling import options as sampling
from training.sampling import record
from training.sampling.writers import write_grid

COUNT = click.IntRange(min=1)


class Group(command_line.Command, click.Group):
    """A command with sub-commands: `eval_fid.py --gen_path=...` works as published, and so does `eval_fid.py ref ...`."""


SHARED = command_line.options_of(
    click.option('--batch-size', help='Images a rank looks at together; changes the speed, not the numbers', metavar='INT',
                 type=COUNT, default=64, show_default=True),
    click.option('--detector', type=Spec(DETECTORS), default='inception', show_default=True,
                 help='Where features come from: inception:channels_last=true,precision=bf16,compile=true (FID proper has none of '
                 'these), pixels, dinov2:model=NAME|DIR (needs transformers), torchscript:path=FILE, '
                 'module:name=package.module.Class,weights=FILE.safetensors. The last two execute code: the archive\'s, and that of '
                 'the class you name'),
    click.option('--detector-weights', help='Local copy of the Inception weights, or another address for them', metavar='PATH|URL'),
    click.option('--device', help='Such as cpu or cuda  [default: the GPU, where there is one]', metavar='NAME'),
)
REFERENCE = command_line.options_of(
    click.option('--ref-stats', help='Reference statistics (mu, sigma)', metavar='NPZ|URL'),
    click.option('--ref-path', help='Reference images, in place of --ref-stats', metavar='PATH'),
    click.option('--split', help='Which part of the data set --ref-path is (train, test, ...); kept in the result', metavar='NAME'),
)
NETWORK = command_line.options_of(
    click.option('--network', metavar='REF',
                 help='In place of --gen-path: a network generates in memory, as generate.py does with its options from --class on'),
)
SEEDS = command_line.options_of(
    click.option('--seeds', type=command_line.IntList(), default=f'0-{PROTOCOL_NUM - 1}', show_default=True,
                 help='Which images of the network'),
    click.option('--repeats', metavar='INT', type=COUNT, default=1, show_default=True,
                 help='Evaluations of the network, each with the seeds that follow; mean, std and min are given'),
)
NUMBERS = command_line.options_of(
    click.option('--metrics', type=command_line.Names(METRICS), default='fid,is', show_default=True,
                 help=f'What to compute, of {",".join(METRICS)}: pr is precision and recall, dc density and coverage; kid, pr and dc '
                 'need the features of the reference'),
    click.option('--kid-subsets', metavar='INT', type=COUNT, default=Settings.kid_subsets, show_default=True, help='Subsets of KID'),
    click.option('--kid-subset-size', metavar='INT', type=click.IntRange(min=2), default=Settings.kid_subset_size, show_default=True,
                 help='Images in each of them'),
    click.option('--splits', metavar='INT', type=COUNT, default=Settings.splits, show_default=True, help='Splits of the Inception score'),
    click.option('--metric-seed', metavar='INT', type=click.IntRange(0, 2 ** 32 - 1), default=Settings.seed, show_default=True,
                 help='Seed of KID\'s subsets and of the splits'),
)


@click.group(cls=Group, invoke_without_command=True)
@click.option('--gen-path', help='Generated images: a folder, zip, npz or npy', metavar='PATH')
@REFERENCE
@click.option('--out-path', metavar='JSON',
              help='Where the result goes  [default: beside the images or network: GEN_PATH.fid.json, or NETWORK.heun18.fid.json with what '
              'is not the default in the name]')
@click.option('--num', '--num-images', 'num', metavar='INT', type=click.IntRange(min=2),
              help=f'How many generated images, the first in sorted order  [default: all, which must be {PROTOCOL_NUM}]; '
              'under torchrun write --num-images')
@NUMBERS
@NETWORK
@SEEDS
@sampling.OPTIONS
@SHARED
@command_line.version_option
@click.pass_context
def main(ctx, **options):
    """Fréchet distance, Inception score and more of generated images, or of a network's.

    \b
    python eval_fid.py --gen_path=out --ref_stats=ref.npz
    torchrun --standalone --nproc_per_node=8 eval_fid.py --gen_path=out --ref_path=cifar.zip
    python eval_fid.py --network=NAME --ref-stats=ref.npz --repeats=3 --metrics=fid,kid,is,pr,dc
    python eval_fid.py ref --data=cifar.zip --dest=ref.npz --split=train --keep-features
    python eval_fid.py nearest --gen-path=out --train=cifar.zip --held-out=cifar-test.zip
    python eval_fid.py sweep --network=NAME --ref-stats=ref.npz --outdir=sweep --guidance=1,1.5,2 --steps=9,18 --seeds=0-1999
    python eval_fid.py table *.fid.json"""
    given = [key for key in options if ctx.get_parameter_source(key) == click.core.ParameterSource.COMMANDLINE]
    if ctx.invoked_subcommand:
        if given:
            word = ctx.invoked_subcommand
            raise UserError(f'{option_name(given[0])}: the options of "{word}" go after that word')
        return
    check_options(dnnlib.EasyDict(options), given)
    distributed.init()
    evaluate(dnnlib.EasyDict(options))


@main.command('ref', cls=command_line.Command)
@click.option('--data', help='Reference images: a folder, zip, npz or npy', metavar='PATH', required=True)
@click.option('--dest', help='Where the statistics go', metavar='NPZ', required=True)
@click.option('--split', help='Which part of the data set this is (train, test, ...); kept in the file and in every result',
              metavar='NAME')
@click.option('--keep-features', is_flag=True, help='Also store the features of all images, which kid, pr and dc compare: 4 bytes a '
              'number, 400 MB for 50,000 images seen by Inception')
@SHARED
def ref(**options):
    """Writes the statistics of reference images, all of them."""
    if not options['dest'].endswith('.npz'):
        raise UserError(f'--dest={options["dest"]}: must end in .npz')
    distributed.init()
    write_reference(dnnlib.EasyDict(options))


@main.command('nearest', cls=command_line.Command)
@click.option('--gen-path', help='Generated images: a folder, zip, npz or npy', metavar='PATH', required=True)
@click.option('--train', help='The images that the network was trained on', metavar='PATH', required=True)
@click.option('--held-out', help='Images of the same kind that it has not seen: what distances to expect', metavar='PATH')
@click.option('--out-path', help='Where the result goes  [default: GEN_PATH.nearest.json]', metavar='JSON')
@click.option('--picture', help='Where the closest pairs go  [default: GEN_PATH.nearest.png]', metavar='PNG')
@click.option('--pairs', help='How many pairs it shows', metavar='INT', type=COUNT, default=32, show_default=True)
@SHARED
def nearest(**options):
    """Memorisation: the distance of each generated image to its nearest training image."""
    distributed.init()
    find_nearest(dnnlib.EasyDict(options))


@main.command('sweep', cls=command_line.Command)
@click.option('--network', help='The network that is evaluated', metavar='REF', required=True)
@click.option('--outdir', help='Where the result of each cell goes, and table.md, table.csv and plot.png of all; the same command again '
              'does what is not done yet', metavar='DIR', required=True)
@REFERENCE
@NUMBERS
@SEEDS
@sampling.SWEEP
@SHARED
def sweep(**options):
    """Every combination of guidance, steps, samplers and weights: a result of each, one table and one plot."""
    check_reference_options(o := dnnlib.EasyDict(options))
    distributed.init()
    run_sweep(o)


@main.command('table', cls=command_line.Command)
@click.argument('paths', metavar='JSON...', nargs=-1, required=True)
@click.option('--format', type=click.Choice(list(table.FORMATS)), default='markdown', show_default=True, help='How it is written')
@click.option('--sort', metavar='METRIC', default=table.SETTINGS, show_default=True,
              help='In the order of this metric, the lowest first, of the settings (weights, sampler, guidance, steps ...), or as given')
@click.option('--out-path', metavar='FILE', help='Where the table goes  [default: the console]')
@click.option('--plot', metavar='PNG', help='Where a picture goes: metrics against steps, guidance or lengths of averages  [default: none]')
def write_table(paths, format, sort, out_path, plot):
    """One table of many results, and a picture, from their JSON files alone."""
    for path, option in ((out_path, '--out-path'), (plot, '--plot')):
        if path:
            prepare_output(path, option)
    found = [results.read_result(path) for path in paths]
    text = table.FORMATS[format](*table.lay_out(found, sort))
    if plot:
        curves.draw(found, plot, '--plot')
    if not out_path:
        print(text, end='')
        return
    with dnnlib.replacing(out_path) as part, open(part, 'w', encoding='utf-8') as f:
        f.write(text)
    print(f'{len(paths)} results in {out_path}')


def option_name(key):
    """What a parameter is called on the command line."""
    return '--class' if key == 'class_idx' else f'--{key.replace("_", "-")}'


def check_options(o, given):
    """What can be refused before any work. given: the options on the command line."""
    if (o.gen_path is None) == (o.network is None):
        raise UserError('--gen-path is missing: the folder, zip, npz or npy of generated images, or --network' if o.network
                        is None else 'pass one of --gen-path=PATH (images) and --network=REF, got both')
    check_reference_options(o)
    alone = [key for key in ('seeds', 'repeats', *sampling.NAMES, *sampling.KEYS) if key in given]
    if alone and o.network is None:
        raise UserError(f'{option_name(alone[0])}: goes with --network=REF')


def check_reference_options(o):
    """What can be refused of the reference before any work."""
    if (o.ref_stats is None) == (o.ref_path is None):
        raise UserError('pass one of --ref-stats=NPZ (statistics) and --ref-path=PATH (images), '
                        f'got {"none" if o.ref_stats is None else "both"}')
    if o.ref_stats and o.split:
        raise UserError(f'--split={o.split}: goes with --ref-path; statistics carry the split that "ref --split" gave them')


def evaluate(o):
    """The main command: reads or generates, measures, prints, and writes the JSON."""
    if o.out_path:
        prepare_output(o.out_path, '--out-path')
    source = NetworkImages(o) if o.network else RecordedImages(o)
    out_path = o.out_path or source.default_path(results.SUFFIX)
    prepare_output(out_path, '--out-path')
    reference, detector, digest = open_comparison(o, source.shape)
    reference = make_ready(o, reference, detector, source.shape)
    values = measure(o, source, reference, detector)
    if distributed.rank() == 0:
        result = provenance(values, o, source, detector, reference, digest)
        told = write_json(out_path, result, null=True) if o.out_path else results.write_beside(out_path, result)
        report.print_table(values, result)
        print(f'written to {out_path}{"".join(f"; {line}" for line in told or ())}')


def open_comparison(o, shape):
    """(reference ImageFiles or Statistics, detector, SHA-256 of the reference), for images [C,H,W]."""
    reference, digest = open_reference(o)
    detector = make_detector(o)
    detector.dim(shape)
    return reference, detector, digest


def make_ready(o, reference, detector, shape):
    """The Statistics that images [C,H,W] are compared with."""
    if isinstance(reference, ImageFiles):
        reference = dataclasses.replace(statistics_of(reference, detector, o, needs_features(o.metrics)), split=o.split)
    where = f'--ref-path={o.ref_path}' if o.ref_path else f'--ref-stats={o.ref_stats}'
    distributed.from_rank0(check_reference, reference, detector, shape, where, o.metrics)
    return reference


def settings_of(o):
    """The Settings that the options ask for."""
    return Settings(o.kid_subsets, o.kid_subset_size, splits=o.splits, seed=o.metric_seed)


def measure(o, source, reference, detector):
    """[{name: value} of each repeat]."""
    values = []
    for batches in source.repeats():
        values.append(evaluate_batches(batches, detector, reference, o.metrics, settings_of(o), source.count))
        source.check_unchanged()
    return values


def run_sweep(o):
    """The `sweep` command: whatever is refused is refused before the first cell; images of a reference are looked at for cells alone."""
    cells = Sweep(o)
    reference, detector, digest = open_comparison(o, cells.shape)
    facts = {'metrics': metrics_facts(o), **common_facts(o, detector), 'reference': {
        'path': o.ref_path or o.ref_stats, 'sha256': digest, 'split': o.split if o.ref_path else reference.split,
        'num_images': len(reference) if o.ref_path else reference.num_images}}
    todo = cells.unfinished(facts)
    if todo:
        reference = make_ready(o, reference, detector, cells.shape)
    cells.run(todo, lambda o, source: provenance(measure(o, source, reference, detector), o, source, detector, reference, digest))
    cells.write()


def open_reference(o):
    """(reference ImageFiles or Statistics, SHA-256 of the file; None for a folder). Only rank 0 holds features."""
    if o.ref_path:
        return ImageFiles(o.ref_path, '--ref-path'), file_digest(o.ref_path)
    path = distributed.first_on_node(dnnlib.open_url, o.ref_stats)
    features = needs_features(o.metrics) and distributed.rank() == 0
    return load_statistics(path, f'--ref-stats={o.ref_stats}', features), file_digest(path)


def statistics_of(files, detector, o, keep_features):
    """Statistics of all of the ImageFiles, and their features where asked for."""
    detector.dim(files.shape)
    found = collect(files.batches(o.batch_size), detector, len(files), (), keep_features=keep_features).statistics
    files.check_unchanged()
    return found


def write_reference(o):
    """The `ref` command."""
    prepare_output(o.dest, '--dest')
    stats = statistics_of(ImageFiles(o.data, '--data'), make_detector(o), o, o.keep_features)
    if distributed.rank() == 0:
        save_statistics(dataclasses.replace(stats, source=o.data, split=o.split), o.dest)
        print(f'{stats.num_images} images, {len(stats.mean)} features ({stats.detector}) -> {o.dest}')


def find_nearest(o):
    """The `nearest` command."""
    out_path, picture = (given or beside(o.gen_path, f'.nearest.{suffix}')
                         for given, suffix in ((o.out_path, 'json'), (o.picture, 'png')))
    prepare_output(out_path, '--out-path')
    prepare_output(picture, '--picture')
    sources = {option: ImageFiles(path, option) for option, path in
               (('--gen-path', o.gen_path), ('--train', o.train), ('--held-out', o.held_out)) if path}
    shapes = {option: files.shape for option, files in sources.items()}
    if len(set(shapes.values())) > 1:
        raise UserError('images must be of one size and mode, got ' +
                        ', '.join(f'{list(shape)} in {option}' for option, shape in shapes.items()))
    detector = make_detector(o)
    features = {option: statistics_of(files, detector, o, True).features for option, files in sources.items()}
    if distributed.rank() == 0:
        write_nearest(o, sources, features, detector, out_path, picture)


def write_nearest(o, sources, features, detector, out_path, picture):
    """Distances, numbers, picture and JSON, on one rank."""
    try:
        found = memorisation.neighbours(features['--gen-path'], features['--train'], detector.device)
    except ValueError as err:
        raise UserError(f'--train={o.train}: {err}') from None
    unseen = memorisation.neighbours(features['--held-out'], features['--train'], detector.device) if o.held_out else None
    values = memorisation.report(found, unseen)
    pairs = list(zip(*memorisation.closest_pairs(found, o.pairs)))
    shown = [image for ours, theirs in pairs for image in (sources['--gen-path'][ours], sources['--train'][theirs])]
    write_grid(picture, shown, columns=2 * math.ceil(math.sqrt(len(pairs) / 2)))
    named = [{'generated': sources['--gen-path'].name(ours), 'train': sources['--train'].name(theirs), 'distance': found.first[ours],
              'ratio': found.ratio[ours]} for ours, theirs in pairs]
    used = {option.strip('-').replace('-', '_'): {'path': files.path, 'num_images': len(files), 'sha256': file_digest(files.path)}
            for option, files in sources.items()}
    result = {**values, **used, 'closest_pairs': named, **common_facts(o, detector)}
    write_json(out_path, result, null=True)
    report.print_columns([('measure', 'value'), *((name, report.number(value)) for name, value in values.items())])
    print(f'written to {out_path}; the {len(pairs)} closest pairs (generated left, training image right) to {picture}')


def make_detector(o):
    """The detector on its device; one rank a node fetches its weights."""
    weights = {'weights': o.detector_weights} if o.detector_weights else {}
    name = registry.parse(o.detector)[0]
    if weights and 'weights' not in registry.parameters(DETECTORS[name]):
        raise UserError(f'--detector-weights={o.detector_weights}: --detector={name} has no weights; leave the option out')
    made = registry.build(o.detector, DETECTORS, '--detector', **weights)
    return distributed.first_on_node(made, device=distributed.pick_device(o.device))


def metrics_facts(o):
    """What was computed, and with what settings."""
    return {'names': list(o.metrics), **dataclasses.asdict(settings_of(o))}


def provenance(values, o, source, detector, reference, digest):
    """What stands in the JSON: the numbers under their published names (means over repeats), then everything that decides them."""
    means = report.summary(values)
    repeats = {'repeats': [{**label, **found} for label, found in zip(source.labels, values)]} if o.network else {}
    return {
        **{name: found['mean'] for name, found in means.items()},
        **({'summary': means} if len(values) > 1 else {}),
        **repeats,
        'metrics': metrics_facts(o),
        'num_images': source.count,
        'found_images': source.found,
        'image_shape': list(source.shape),
        'generated': source.facts(),
        'reference': {
            'path': o.ref_path or o.ref_stats, 'sha256': digest, 'num_images': reference.num_images, 'split': reference.split,
            'source': o.ref_path or reference.source, 'detector': reference.detector,
            'detector_sha256': reference.detector_sha256},
        **common_facts(o, detector),
    }


def common_facts(o, detector):
    """What every result is quoted with; of the options those that were given."""
    context = click.get_current_context()
    told = {key: value for key, value in o.items() if value is not None
            and context.get_parameter_source(key) is click.core.ParameterSource.COMMANDLINE}
    return {
        'detector': {'name': detector.name, 'weights': detector.weights, 'sha256': detector.sha256},
        **record.machine(detector.device),
        'options': {**told, **({'seeds': ranges(o.seeds)} if 'seeds' in told else {})},
    }


if __name__ == '__main__':
    main()
