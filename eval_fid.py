# SPDX-License-Identifier: Apache-2.0
"""Evaluates generated images or a network against reference images: FID, KID, Inception score, precision and recall, memorisation.

python eval_fid.py --gen_path=out --ref_stats=ref.npz
python eval_fid.py ref --data=cifar.zip --dest=ref.npz --split=train
python eval_fid.py nearest --gen-path=out --train=cifar.zip --held-out=cifar-test.zip"""

import click

from dnnlib import EasyDict, UserError, replacing
from dnnlib.files import prepare_output
from torch_utils.command_line import Command, Group, IntList, Names, Spec, group, version_option
from training.sampling import options as sampling

COUNT, PROTOCOL_NUM = click.IntRange(min=1), 50_000  # the count of generated images behind published distances
FORMATS, SETTINGS = ('markdown', 'csv'), 'settings'  # of tables, and their order


SHARED = group(
    'Detector and speed',
    click.option('--batch-size', help='Images per rank and batch; affects the speed, not the results', metavar='INT',
                 type=COUNT, default=64, show_default=True),
    click.option('--detector', type=Spec('metrics.detectors:DETECTORS'), default='inception', show_default=True,
                 help='Network that computes the features; --detector=help lists them'),
    click.option('--detector-weights', help='Local copy of the Inception weights, or another URL for them', metavar='PATH|URL'),
    click.option('--device', help='Device, such as cpu or cuda  [default: the GPU, if there is one]', metavar='NAME'),
)
REFERENCE = group(
    'Reference',
    click.option('--ref-stats', metavar='FILE|URL[#sha256=HEX]',
                 help='Reference statistics, made by "ref" or EDM (.npz), EDM2 (.pkl), clean-fid (.npz) or torch-fidelity (.pt); the '
                 'file must have the SHA-256 given after #sha256='),
    click.option('--ref-path', help='Reference images, in place of --ref-stats', metavar='PATH'),
    click.option('--other-shape', is_flag=True,
                 help='Allow a reference that was made from images of another size or mode'),
    click.option('--split', help='Which part of the data set --ref-path is (train, test, ...); stored in the result', metavar='NAME'),
)
NETWORK = group(
    'Images',
    click.option('--network', metavar='REF',
                 help='Network to evaluate, in place of --gen-path: generates images in memory, with the options of generate.py below'),
)
SEEDS = group(
    'Images',
    click.option('--seeds', type=IntList(), default=f'0-{PROTOCOL_NUM - 1}', show_default=True,
                 help='Seeds of the images that the network generates'),
    click.option('--repeats', metavar='INT', type=COUNT, default=1, show_default=True,
                 help='Number of evaluations, each with the next seeds; the result has mean, std and min'),
)
NUMBERS = group(
    'Metrics',
    click.option('--metrics', type=Names('metrics.evaluate:METRICS'), default='fid,is', show_default=True,
                 help='Metrics to compute; --metrics=help lists them'),
    click.option('--intervals', is_flag=True, help='Also give 95 % confidence intervals of fid, fid_inf and kid'),
    click.option('--kid-subsets', metavar='INT', type=COUNT, default=100, show_default=True, help='Number of subsets for KID'),
    click.option('--kid-subset-size', metavar='INT', type=click.IntRange(min=2), default=1000, show_default=True,
                 help='Images per subset for KID'),
    click.option('--splits', metavar='INT', type=COUNT, default=10, show_default=True, help='Number of splits for the Inception score'),
    click.option('--metric-seed', metavar='INT', type=click.IntRange(0, 2 ** 32 - 1), default=2020, show_default=True,
                 help='Seed of the random subsets and splits in kid, is and fid_inf'),
)


FILES = group(
    'Images',
    click.option('--gen-path', help='Generated images: a folder, zip, npz or npy', metavar='PATH'),
    click.option('--num', '--num-images', 'num', metavar='INT', type=click.IntRange(min=2),
                 help=f'Number of generated images, the first in sorted order  [default: all, which must be {PROTOCOL_NUM}]; '
                 'under torchrun write --num-images'),
)
OUTPUT = group(
    'Output',
    click.option('--out-path', metavar='JSON',
              help='File for the result  [default: GEN_PATH.fid.json, or NETWORK.heun18.fid.json with all settings that are not defaults '
              'in the name]'),
)


@click.group(cls=Group, invoke_without_command=True)
@FILES
@NETWORK
@SEEDS
@REFERENCE
@NUMBERS
@sampling.OPTIONS
@SHARED
@OUTPUT
@version_option
@click.pass_context
def main(ctx, **options):
    """Compute FID, Inception score and other metrics of generated images, or of a network.

    \b
    python eval_fid.py --gen_path=out --ref_stats=ref.npz
    torchrun --standalone --nproc_per_node=8 eval_fid.py --gen_path=out --ref_path=cifar.zip
    python eval_fid.py --network=NAME --ref-stats=ref.npz --repeats=3 --metrics=fid,kid,is,pr,dc
    python eval_fid.py ref --data=cifar.zip --dest=ref.npz --split=train --keep-features
    python eval_fid.py nearest --gen-path=out --train=cifar.zip --held-out=cifar-test.zip
    python eval_fid.py sweep --network=NAME --ref-stats=ref.npz --outdir=sweep --guidance=1,1.5,2 --steps=9,18 --seeds=0-1999
    python eval_fid.py table *.fid.json"""
    given = with_given(options).given
    if ctx.invoked_subcommand:
        if given:
            word = ctx.invoked_subcommand
            raise UserError(f'{option_name(given[0])}: the options of "{word}" go after that word')
        return
    check_options(o := with_given(options), given)
    from training.evaluation import comparison  # here, so that --help need not wait for torch
    comparison.evaluate(o)


@main.command('ref', cls=Command)
@click.option('--data', help='Reference images: a folder, zip, npz or npy', metavar='PATH', required=True)
@click.option('--dest', help='File for the statistics', metavar='NPZ', required=True)
@click.option('--split', help='Which part of the data set this is (train, test, ...); stored in the file and in every result',
              metavar='NAME')
@click.option('--keep-features', is_flag=True, help='Also store the features of all images, which kid, cmmd, pr and dc need: '
              '400 MB for 50,000 images with Inception')
@SHARED
def ref(**options):
    """Write the statistics of all images of a reference data set to a file."""
    if not options['dest'].endswith('.npz'):
        raise UserError(f'--dest={options["dest"]}: must end in .npz')
    from training.evaluation import comparison
    comparison.write_reference(with_given(options))


@main.command('nearest', cls=Command)
@click.option('--gen-path', help='Generated images: a folder, zip, npz or npy', metavar='PATH', required=True)
@click.option('--train', help='Training images of the network', metavar='PATH', required=True)
@click.option('--held-out', help='Images of the same kind that it was not trained on, for comparison', metavar='PATH')
@click.option('--out-path', help='File for the result  [default: GEN_PATH.nearest.json]', metavar='JSON')
@click.option('--picture', help='File for a picture of the closest pairs  [default: GEN_PATH.nearest.png]', metavar='PNG')
@click.option('--pairs', help='Number of closest pairs in the picture', metavar='INT', type=COUNT, default=32, show_default=True)
@SHARED
def nearest(**options):
    """Detect memorisation: find the nearest training image of each generated image."""
    from training.evaluation import copies
    copies.find_nearest(with_given(options))


@main.command('sweep', cls=Command)
@click.option('--network', help='Network to evaluate', metavar='REF', required=True)
@click.option('--outdir', help='Folder for the result of each cell, and for table.md, table.csv and plot.png of all; the same command '
              'again resumes an interrupted sweep', metavar='DIR', required=True)
@REFERENCE
@NUMBERS
@SEEDS
@sampling.SWEEP
@SHARED
def sweep(**options):
    """Evaluate every combination of guidance, steps, samplers and weights: one result each, one table and one plot."""
    check_reference_options(o := with_given(options))
    from training.evaluation import comparison
    comparison.run_sweep(o)


@main.command('table', cls=Command)
@click.argument('paths', metavar='JSON...', nargs=-1, required=True)
@click.option('--format', type=click.Choice(FORMATS), default='markdown', show_default=True, help='Format of the table')
@click.option('--sort', metavar='METRIC', default=SETTINGS, show_default=True,
              help='Order of the rows: by a metric, lowest first; by "settings" (weights, sampler, guidance, steps, ...); or as "given"')
@click.option('--out-path', metavar='FILE', help='File for the table  [default: print it]')
@click.option('--plot', metavar='PNG', help='Also plot the metrics against steps, guidance or EMA lengths, as PNG')
def write_table(paths, format, sort, out_path, plot):
    """Make a table, and a plot, of many results from their JSON files."""
    from metrics import curves, results, table
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
    with replacing(out_path) as part, open(part, 'w', encoding='utf-8') as f:
        f.write(text)
    print(f'{len(paths)} results in {out_path}')


def with_given(options: dict) -> EasyDict:
    """The options, and as `given` the names of those that are on the command line."""
    context = click.get_current_context()
    return EasyDict(options, given=[key for key in options
                                    if context.get_parameter_source(key) is click.core.ParameterSource.COMMANDLINE])


def option_name(key: str) -> str:
    """The name of a parameter on the command line."""
    return '--class' if key == 'class_idx' else f'--{key.replace("_", "-")}'


def check_options(o: EasyDict, given: list[str]) -> None:
    """Raises UserError for options that contradict each other. given: the names of those on the command line."""
    if (o.gen_path is None) == (o.network is None):
        raise UserError('--gen-path is missing: pass generated images (a folder, zip, npz or npy), or a network with --network' if o.network
                        is None else 'pass one of --gen-path=PATH (images) and --network=REF, got both')
    check_reference_options(o)
    alone = [key for key in ('seeds', 'repeats', *sampling.NAMES, *sampling.KEYS) if key in given]
    if alone and o.network is None:
        raise UserError(f'{option_name(alone[0])}: needs --network=REF')


def check_reference_options(o: EasyDict) -> None:
    """Raises UserError unless there is exactly one reference."""
    if (o.ref_stats is None) == (o.ref_path is None):
        raise UserError('pass one of --ref-stats=NPZ (statistics) and --ref-path=PATH (images), '
                        f'got {"none" if o.ref_stats is None else "both"}')
    if o.ref_stats and o.split:
        raise UserError(f'--split={o.split}: needs --ref-path; for statistics, the split is set by "ref --split"')


if __name__ == '__main__':
    main()
