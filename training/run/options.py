# SPDX-License-Identifier: Apache-2.0
"""The command line of train.py, in the groups of its help. Slots name a piece of a registry; configure.py makes the Config of them.

Nothing here imports torch, so that --help answers at once: registries are named, and imported when a value is checked."""

import click

from torch_utils.command_line import Names, Number, Spec, group, groups, row
from training.run import presets, published

SHARE, POSITIVE, NOT_NEGATIVE, MINUTES = Number(least=0, most=1), Number(above=0), Number(least=0), Number(least=0.1, most=10080)
COUNT, WHOLE = click.IntRange(min=1), click.IntRange(min=0)
STOPPED = 75  # exit code of a run that ended early and is to be continued: sysexits.h's EX_TEMPFAIL
DIFFUSION = 'cosine:steps=4000'  # the schedule of a discrete-time objective that is told none
PREDICTION = 'v'  # and what its network predicts, see docs/improved_ddpm.md


def number(name, kind, text, default=None, metavar='FLOAT'):
    return click.option(name, metavar=metavar, type=kind, default=default, show_default=default is not None, help=text)


def count(name, text, default=None, kind=COUNT):
    return number(name, kind, text, default, 'INT')


def switch(name, text, default=False):
    names = [name] if isinstance(name, str) else name
    return click.option(*names, metavar='BOOL', type=bool, default=default, show_default=True, help=text)


def slot(name, registry, text, default=None, keys=True, **more):
    return click.option(name, type=Spec(registry, keys), default=default, show_default=default is not None, help=text, **more)


def word(name, choices, text, default=None):
    return click.option(name, type=click.Choice(choices), metavar='|'.join(choices), default=default, show_default=default is not None,
                        help=text)


def lengths(ctx, param, value):
    """'0.05,0.10' -> [0.05, 0.1]; widths that a power-function average can have."""
    if not value:
        return []
    from training.networks.ema import exponent
    try:
        found = [float(item) for item in value.split(',')]
        for sigma_rel in found:
            exponent(sigma_rel)
            if round(sigma_rel, 3) != sigma_rel:
                raise ValueError(f'sigma_rel={sigma_rel} has more than the three decimals that its files are named by')
    except ValueError as err:
        raise click.BadParameter(f'"{value}": {err}') from None
    return sorted(set(found))


def name_of_folder(ctx, param, value):
    """A word that can stand in the name of one folder."""
    if value is not None and (not value or value in ('.', '..') or any(c in value for c in '/\\\0')):
        raise click.BadParameter(f'"{value}" becomes part of the name of a folder: leave "/" and "\\" out; --outdir says where it goes')
    return value


LABELS = 'Share of images with a wrong class [0.0]; confuse these: 0,1/3,5'
DATA = group(
    'Data',
    click.option('--data', metavar='ZIP|DIR', required=True, help='Training images, as dataset_tool.py writes them'),
    switch('--cond', 'Class-conditional, by the labels of the data'),
    click.option('--val', metavar='DATA|SHARE', help='Held-out images: a data set, or a share of --data such as 0.05'),
    number('--sigma', float, 'Noise std that corrupted images carry, in network units (images in [-1,1])', 0.0),
    number('--corruption-probability', float, 'Share of the images that is corrupted; the count is exact', 0.0),
    count('--corruption-seed', 'Decides which images are noisy, and with which noise', 0, WHOLE),
    word('--corruption-protocol', ['fixed', 'published'], 'published: noise and choice of the ambient-laws code', 'fixed'),
    word('--sigma-min-as', ['limit', 'noise'], 'With a sigma_min: use images above it, or add noise up to it', 'limit'),
    row(LABELS, number('--label-corruption', SHARE, 'Share of the images that gets a wrong class; the count is exact', 0.0)),
    row(LABELS, click.option('--label-corruption-groups', metavar='GROUPS', callback=groups, help='Classes to confuse: 0,1/3,5,7')),
    switch('--xflip', 'Each image a second time, mirrored with its noise'),
    number('--augment', SHARE, 'Augmentation probability; noisy images get exact symmetries only', 0.12),
    number('--dataset-keep-percentage', float, 'Share of the images that is used at all, from 0 to 1', 1.0),
)

DISCRETE = f'Its schedule [{DIFFUSION}], network output [{PREDICTION}], timesteps [uniform]'
OBJECTIVE = group(
    'Objective (SLOT=help lists the choices of a slot with their keys)',
    slot('--precond', 'training.networks.preconditioning:PRECONDS', 'Preconditioning', 'edm', keys=False),
    slot('--noise', 'training.diffusion.noise:NOISE', 'Noise-level distribution p(sigma)  [default: as published for --precond]'),
    slot('--weight', 'training.objective.weighting:WEIGHTS', 'Loss weight w(sigma)  [default: as published for --precond]'),
    slot('--penalty', 'training.objective.penalty:PENALTIES', 'Penalty on the error', 'squared'),
    slot('--pairing', 'training.data.pairs:PAIRINGS', 'How noisy images are paired with noise levels', 'skip'),
    word('--ambient-weight', ['none', 'inverse'], 'inverse: noisy images weigh (1 - sigma_n^2/sigma^2)^-2, with a buffer', 'none'),
    slot('--consistency', 'training.objective.consistency:CHAINS', 'Consistency loss, which reaches below sigma_n  [default: none]'),
    slot('--term', 'training.objective.loss:TERMS', 'A further loss term; may be repeated', multiple=True),
    number('--sigma-data', POSITIVE, 'Std of the data, for network and loss  [default: 0.5]'),
    slot('--objective', 'training.objective.variational:OBJECTIVES', 'Discrete-time objective of --precond=iddpm  [default: none]'),
    row(DISCRETE, slot('--diffusion', 'training.diffusion.discrete:DIFFUSIONS', 'Its schedule')),
    row(DISCRETE, slot('--prediction', 'training.networks.preconditioning:PREDICTIONS', 'What its network predicts', keys=False)),
    row(DISCRETE, slot('--timesteps', 'training.objective.timesteps:TIMESTEPS', 'How its timesteps are drawn for clean images')),
)

NETWORK = group(
    'Network',
    slot('--arch', 'training.networks.interface:ARCHS', 'Architecture, such as ddpmpp:cbase=128,cres=1|2|2', 'ddpmpp'),
    number('--label-dropout', SHARE, 'Share of the labels that is left out, for classifier-free guidance', 0.0),
    slot('--cep', 'training.networks.conditioning:CEP', 'Condition-embedding perturbation  [default: none]'),
    click.option('--transfer', metavar='REF', help='Start from the weights of a network: folder, .pt state, Hugging Face name'),
)

TRAINING = group(
    'Training',
    number('--duration', POSITIVE, 'Training length in million images (pairs used)', 200, 'MIMG'),
    count('--batch', 'Global batch size', 512),
    count('--batch-gpu', 'Rows a rank works on at a time; smaller accumulates gradients  [default: all]'),
    number('--lr', POSITIVE, 'Learning rate', 1e-3),
    number('--lr-rampup', NOT_NEGATIVE, 'Million images over which it rises from 0', 10, 'MIMG'),
    slot('--lr-schedule', 'training.run.optimizer:LR_SCHEDULES', 'How it falls', 'constant'),
    slot('--optimizer', 'training.run.optimizer:OPTIMIZERS', 'Optimizer', 'adam'),
    number('--clip', NOT_NEGATIVE, 'Largest norm of the gradient; 0: any', 0.0),
    number('--ema', NOT_NEGATIVE, 'Half-life of the weight average, in million images', 0.5, 'MIMG'),
    click.option('--power-ema', metavar='LIST', callback=lengths, default='',
                 help='Widths of power-function averages to store, such as 0.05,0.10  [default: none]'),
    switch('--gns', 'Report the gradient noise scale, from ranks or parts of a batch'),
    count('--seed', 'Random seed  [default: a random one, printed]', kind=WHOLE),
)

SPEED = group(
    'Speed and memory',
    word('--precision', ['fp32', 'tf32', 'bf16', 'fp16'], 'Arithmetic of the network  [default: fp32]'),
    number('--ls', POSITIVE, 'Loss scaling, taken out of the gradients again', 1),
    switch('--bench', 'Let cuDNN choose its algorithms by timing them', True),
    switch(('--compile', 'compile_net'), 'Compile the network with torch.compile'),
    number('--cache-gib', NOT_NEGATIVE, 'Memory of a node for noisy images; beyond it they are made at each use', 8),
    click.option('--cache-dir', metavar='DIR', type=click.Path(file_okay=False),
                 help='Where the decoded copy of the data lies  [default: beside the data, else the user\'s cache]'),
    word('--data-on', ['auto', 'host', 'device'], 'Where batches are put together: on the GPU where the images fit', 'auto'),
    count('--workers', 'Threads that make noisy images; 0: one, and no batch is prepared ahead', 1, WHOLE),
    count('--threads', 'CPU threads of each rank  [default: PyTorch\'s]'),
    number('--timeout', MINUTES, 'Several ranks: end them all when one has been silent for so long', 10, 'MINUTES'),
)

MIRRORS = 'Also log to TensorBoard, or to a project of Weights & Biases'
PLACE = 'Text to add to the folder\'s name, if no --expr-id; write into --outdir itself'
OUTPUT = group(
    'Output',
    click.option('--outdir', metavar='DIR', required=True, help='Where runs go; this one gets the next numbered folder in it'),
    click.option('--expr-id', metavar='STR', callback=name_of_folder, help='Name of the run\'s folder; --resume=latest looks for it'),
    row(PLACE, click.option('--desc', metavar='STR', callback=name_of_folder, help='Text to add to the folder\'s name')),
    row(PLACE, click.option('--nosubdir', is_flag=True, help='Write into --outdir itself')),
    click.option('--resume', metavar='latest|PT', help='Continue exactly: this run\'s newest state under --outdir, or this state'),
    number('--tick', POSITIVE, 'Thousand images between lines of statistics', 50, 'KIMG'),
    number('--snap', WHOLE, 'Ticks between network snapshots; 0: none', 50, 'TICKS'),
    number('--dump', WHOLE, 'Ticks between training states; 0: none', 500, 'TICKS'),
    number('--dump-minutes', NOT_NEGATIVE, 'Minutes between training states, besides --dump; 0: none', 30, 'MINUTES'),
    count('--keep-states', 'How many training states are kept, the newest; 0: all', 3, WHOLE),
    number('--max-hours', NOT_NEGATIVE, f'Then save the state and exit with code {STOPPED}, as after SIGTERM; 0: no limit', 0, 'HOURS'),
    count('--samples', 'Images in the grid drawn at each snapshot; 0: none', 64, WHOLE),
    number('--metrics-every', WHOLE, 'Ticks between metrics of the weight average\'s images; 0: none', 0, 'TICKS'),
    click.option('--metrics', metavar='NAMES', type=Names('metrics.evaluate:METRICS'), default='fid', show_default=True,
                 help='Which; logged as Metrics/fid2k; --metrics=help lists them'),
    count('--metrics-num', 'How many images, seeds 0 and up', 2000, click.IntRange(min=2)),
    click.option('--metrics-ref', metavar='NPZ|URL', help='Reference statistics, as eval_fid.py ref writes them'),
    slot('--metrics-detector', 'metrics.detectors:DETECTORS', 'Where features come from', 'inception'),
    row(MIRRORS, click.option('--tensorboard', is_flag=True, help='Log to TensorBoard as well, in the run\'s folder')),
    row(MIRRORS, click.option('--wandb', metavar='PROJECT', help='Log to a project of Weights & Biases as well')),
)

START = group(
    'Options',
    click.option('--preset', metavar='NAME', is_eager=True, expose_value=False, callback=presets.use_preset,
                 help='Options of a published recipe; --preset=help lists them. Options given besides win'),
    click.option('--config', metavar='JSON', is_eager=True, expose_value=False, callback=presets.use_config,
                 help='Options of an earlier run, from its options.json. Options given besides win'),
    click.option('-n', '--dry-run', is_flag=True, help='Print the configuration, and write nothing'),
)

GROUPS = (DATA, OBJECTIVE, NETWORK, TRAINING, SPEED, OUTPUT, published.OPTIONS, START)


def options(command):
    """A decorator that adds all of them."""
    for add in reversed(GROUPS):
        command = add(command)
    return command
