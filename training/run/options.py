# SPDX-License-Identifier: Apache-2.0
"""The command line of train.py, in the groups of its help. Slots name a piece of a registry; configure.py turns them into the Config.

Nothing here imports torch, so that --help answers at once: registries are given by name, and imported when a value is checked."""

from collections.abc import Callable
from typing import Any

import click

from torch_utils.command_line import AutoOr, Names, Number, Spec, group, groups, row
from torch_utils.monitor import STOPPED
from training.run import presets, published

SHARE, POSITIVE, NOT_NEGATIVE, MINUTES = Number(least=0, most=1), Number(above=0), Number(least=0), Number(least=0.1, most=10080)
COUNT, WHOLE = click.IntRange(min=1), click.IntRange(min=0)
DIFFUSION = 'cosine:steps=4000'  # default schedule of a discrete-time objective
PREDICTION = 'v'  # default prediction of its network, see docs/improved_ddpm.md


def number(name: str, kind: click.ParamType | type, text: str, default: Any = None, metavar: str = 'FLOAT') -> Callable:
    return click.option(name, metavar=metavar, type=kind, default=default, show_default=default is not None, help=text)


def count(name: str, text: str, default: Any = None, kind: click.ParamType = COUNT) -> Callable:
    return number(name, kind, text, default, 'INT')


def switch(name: str | tuple, text: str, default: bool | None = False) -> Callable:
    names = [name] if isinstance(name, str) else name
    return click.option(*names, metavar='BOOL', type=bool, default=default, show_default=True, help=text)


def slot(name: str, registry: str, text: str, default: str | None = None, keys: bool = True, **more: Any) -> Callable:
    return click.option(name, type=Spec(registry, keys), default=default, show_default=default is not None, help=text, **more)


def word(name: str, choices: list[str], text: str, default: str | None = None) -> Callable:
    return click.option(name, type=click.Choice(choices), metavar='|'.join(choices), default=default, show_default=default is not None,
                        help=text)


def lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float]:
    """'0.05,0.10' -> [0.05, 0.1]: widths that a power-function average can have."""
    if not value:
        return []
    from training.networks.ema import exponent
    try:
        found = [float(item) for item in value.split(',')]
        for sigma_rel in found:
            exponent(sigma_rel)
            if round(sigma_rel, 3) != sigma_rel:
                raise ValueError(f'sigma_rel={sigma_rel} has more than three decimals, which is what its file names hold')
    except ValueError as err:
        raise click.BadParameter(f'"{value}": {err}') from None
    return sorted(set(found))


def name_of_folder(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Text that can be part of a folder's name."""
    if value is not None and (not value or value in ('.', '..') or any(c in value for c in '/\\\0')):
        raise click.BadParameter(f'"{value}" becomes part of a folder\'s name and must not contain "/" or "\\"; --outdir chooses the place')
    return value


LABELS = 'Fraction of images given a wrong class or caption [0.0]; within groups: 0,1/3,5'
DATA = group(
    'Data',
    click.option('--data', metavar='ZIP|DIR', required=True, help='Training images, as dataset_tool.py writes them'),
    switch('--cond', 'Train conditionally, on the labels of the data: classes or captions'),
    click.option('--val', metavar='DATA|SHARE', help='Held-out images: a data set, or a fraction of --data such as 0.05'),
    number('--sigma', float, 'Noise std of the corrupted images, in network units (images in [-1,1])', 0.0),
    number('--corruption-probability', float, 'Fraction of the images that are corrupted (an exact count)', 0.0),
    count('--corruption-seed', 'Seed that decides which images are noisy, and their noise', 0, WHOLE),
    word('--corruption-protocol', ['fixed', 'published'], 'published: choose images and noise as the ambient-laws code does', 'fixed'),
    word('--sigma-min-as', ['limit', 'noise'], 'Images with a sigma_min: use only above it, or add noise up to it', 'limit'),
    row(LABELS, number('--label-corruption', SHARE, 'Fraction of the images given a wrong class or caption (an exact count)', 0.0)),
    row(LABELS, click.option('--label-corruption-groups', metavar='GROUPS', callback=groups,
                             help='Groups of classes that are confused with each other: 0,1/3,5,7')),
    switch('--xflip', 'Add a mirrored copy of each image, with its noise mirrored too'),
    number('--augment', SHARE, 'Augmentation probability; noisy images only get exact symmetries', 0.12),
    number('--dataset-keep-percentage', float, 'Fraction of the images to use at all, from 0 to 1', 1.0),
)

TERMS = 'Consistency loss, which also trains below sigma_n; further loss terms'
DISCRETE = f'Its schedule [{DIFFUSION}], network output [{PREDICTION}], timesteps [uniform]'
OBJECTIVE = group(
    'Objective (SLOT=help lists the choices of a slot with their keys)',
    slot('--precond', 'training.networks.preconditioning:PRECONDS', 'Preconditioning', 'edm', keys=False),
    slot('--noise', 'training.diffusion.noise:NOISE', 'Noise-level distribution p(sigma)  [default: as published for --precond]'),
    slot('--weight', 'training.objective.weighting:WEIGHTS', 'Loss weight w(sigma)  [default: as published for --precond]'),
    slot('--penalty', 'training.objective.penalty:PENALTIES', 'Penalty on the error', 'squared'),
    slot('--pairing', 'training.data.pairs:PAIRINGS', 'How noisy images are paired with noise levels', 'skip'),
    word('--ambient-weight', ['none', 'inverse'], 'inverse: weight noisy images by (1 - sigma_n^2/sigma^2)^-2, with a buffer', 'none'),
    row(TERMS, slot('--consistency', 'training.objective.consistency:CHAINS', 'Consistency loss, which also trains below sigma_n')),
    row(TERMS, slot('--term', 'training.objective.loss:TERMS', 'Additional loss term; may be repeated', multiple=True)),
    slot('--distill', 'training.objective.distillation:DISTILLATIONS', 'Train a one-step generator from a denoiser: rsd:teacher=REF'),
    number('--sigma-data', POSITIVE, 'Std of the data, for network and loss  [default: 0.5]'),
    slot('--objective', 'training.objective.variational:OBJECTIVES', 'Discrete-time objective of --precond=iddpm  [default: none]'),
    row(DISCRETE, slot('--diffusion', 'training.diffusion.discrete:DIFFUSIONS', 'Schedule of --objective')),
    row(DISCRETE, slot('--prediction', 'training.networks.preconditioning:PREDICTIONS', 'What the network of --objective predicts',
                       keys=False)),
    row(DISCRETE, slot('--timesteps', 'training.objective.timesteps:TIMESTEPS', 'How --objective draws the timesteps of clean images')),
)

NETWORK = group(
    'Network',
    slot('--arch', 'training.networks.interface:ARCHS', 'Architecture, such as ddpmpp:cbase=128,cres=1|2|2', 'ddpmpp'),
    number('--label-dropout', SHARE, 'Probability of dropping a label or caption, for classifier-free guidance', 0.0),
    slot('--cep', 'training.networks.conditioning:CEP', 'Condition-embedding perturbation  [default: none]'),
    click.option('--transfer', metavar='REF', help='Start from the weights of a network: folder, .pt file, Hugging Face name'),
)

TRAINING = group(
    'Training',
    number('--duration', POSITIVE, 'Training length in million images', 200, 'MIMG'),
    count('--batch', 'Global batch size', 512),
    click.option('--batch-gpu', metavar='auto|INT', type=AutoOr(COUNT),
                 help='Images per forward pass on each rank; auto: as many as fit in memory  [default: all]'),
    number('--lr', POSITIVE, 'Learning rate', 1e-3),
    number('--lr-rampup', NOT_NEGATIVE, 'Learning-rate warm-up, in million images', 10, 'MIMG'),
    slot('--lr-schedule', 'training.run.optimizer:LR_SCHEDULES', 'Learning-rate schedule after the warm-up', 'constant'),
    slot('--optimizer', 'training.run.optimizer:OPTIMIZERS', 'Optimizer', 'adam'),
    number('--clip', NOT_NEGATIVE, 'Clip the norm of the gradient to this; 0: off', 0.0),
    number('--ema', NOT_NEGATIVE, 'Half-life of the weight average, in million images', 0.5, 'MIMG'),
    click.option('--power-ema', metavar='LIST', callback=lengths, default='',
                 help='Widths of power-function averages to store, such as 0.05,0.10  [default: none]'),
    switch('--gns', 'Report the gradient noise scale, estimated from ranks or parts of a batch'),
    count('--seed', 'Random seed  [default: a random one, printed]', kind=WHOLE),
)

COMPILE = 'torch.compile [auto: on GPUs]; memory: compute blocks twice, divide among ranks'
SPEED = group(
    'Speed and memory',
    word('--precision', ['auto', 'fp32', 'tf32', 'bf16', 'fp16'], 'auto: bf16 on GPUs that have it, else fp32', 'auto'),
    number('--ls', AutoOr(POSITIVE), 'Loss scaling, divided out again; auto: 65536 at first in fp16, else 1', 'auto', 'auto|FLOAT'),
    switch('--bench', 'Let cuDNN time its algorithms and use the fastest', True),
    row(COMPILE, click.option('--compile', 'compile_net', metavar='auto|BOOL', type=AutoOr(bool), default='auto', show_default=True,
                              help='Compile with torch.compile; auto: on GPUs where it works')),
    row(COMPILE, word('--checkpoint', ['none', 'blocks', 'auto'], 'Compute each block again in the backward pass, to save memory; '
                      'auto: if the batch does not fit otherwise', 'none')),
    row(COMPILE, switch('--shard', 'Divide weights, gradients, moments and averages among the ranks (FSDP)')),
    number('--cache-gib', NOT_NEGATIVE, 'Memory per node for noisy images, in GiB; the rest are recomputed at each use', 8),
    click.option('--cache-dir', metavar='DIR', type=click.Path(file_okay=False),
                 help='Folder of the decoded copy of the data  [default: beside the data, else the user\'s cache]'),
    word('--data-on', ['auto', 'host', 'device'], 'Where batches are assembled; auto: on the GPU if the images fit', 'auto'),
    count('--workers', 'Threads that prepare noisy images; 0: no batch is prepared ahead', 1, WHOLE),
    count('--threads', 'CPU threads per rank  [default: PyTorch\'s]'),
    number('--timeout', MINUTES, 'With several ranks: end all of them if one does not respond for this long', 10, 'MINUTES'),
)

MIRRORS = 'Also log to TensorBoard; to this project of Weights & Biases'
PLACE = 'Suffix of the run folder\'s default name; write into --outdir itself'
OUTPUT = group(
    'Output',
    click.option('--outdir', metavar='DIR', required=True, help='Folder of all runs; this one gets the next numbered folder in it'),
    click.option('--expr-id', metavar='STR', callback=name_of_folder, help='Name of the run\'s folder; --resume=latest looks for it'),
    row(PLACE, click.option('--desc', metavar='STR', callback=name_of_folder, help='Suffix of the run folder\'s default name')),
    row(PLACE, click.option('--nosubdir', is_flag=True, help='Write into --outdir itself')),
    click.option('--resume', metavar='latest|PT', help='Continue exactly, from this run\'s latest state under --outdir or from a state'),
    number('--tick', POSITIVE, 'Thousand images between lines of statistics', 50, 'KIMG'),
    number('--snap', WHOLE, 'Ticks between network snapshots; 0: none', 50, 'TICKS'),
    number('--dump', WHOLE, 'Ticks between training states; 0: none', 500, 'TICKS'),
    number('--dump-minutes', NOT_NEGATIVE, 'Minutes between training states, in addition to --dump; 0: none', 30, 'MINUTES'),
    count('--keep-states', 'How many of the latest training states are kept; 0: all', 3, WHOLE),
    number('--max-hours', NOT_NEGATIVE, f'Save the state and exit with code {STOPPED} after this; 0: no limit', 0, 'HOURS'),
    count('--samples', 'Images in the grid of samples at each snapshot; 0: none', 64, WHOLE),
    number('--metrics-every', WHOLE, 'Ticks between evaluations of the weight average\'s samples; 0: none', 0, 'TICKS'),
    click.option('--metrics', metavar='NAMES', type=Names('metrics.evaluate:METRICS'), default='fid', show_default=True,
                 help='Metrics to compute, logged as Metrics/fid2k; --metrics=help lists them'),
    count('--metrics-num', 'Samples per evaluation, with seeds from 0', 2000, click.IntRange(min=2)),
    click.option('--metrics-ref', metavar='NPZ|URL', help='Reference statistics, as eval_fid.py ref writes them'),
    slot('--metrics-detector', 'metrics.detectors:DETECTORS', 'Network whose features are compared', 'inception'),
    row(MIRRORS, click.option('--tensorboard', is_flag=True, help='Log to TensorBoard as well, in the run\'s folder')),
    row(MIRRORS, click.option('--wandb', metavar='PROJECT', help='Log to a project of Weights & Biases as well')),
)

RECIPE = 'Published recipe (--preset=help); options.json of a run to repeat; others win'
START = group(
    'Options',
    row(RECIPE, click.option('--preset', metavar='NAME', is_eager=True, expose_value=False, callback=presets.use_preset,
                             help='Published recipe, see --preset=help; options given on the command line override it')),
    row(RECIPE, click.option('--config', metavar='JSON', is_eager=True, expose_value=False, callback=presets.use_config,
                             help='options.json of a run to repeat; options given on the command line override it')),
    slot('--regime', 'training.run.regimes:REGIMES', 'How to sample and go on, where all, few or no images are clean', keys=False),
    click.option('-n', '--dry-run', is_flag=True, help='Print the configuration and exit, without writing anything'),
)

GROUPS = (DATA, OBJECTIVE, NETWORK, TRAINING, SPEED, OUTPUT, published.OPTIONS, START)


def options(command: Callable) -> Callable:
    """Decorator that adds all options of train.py to a command."""
    for add in reversed(GROUPS):
        command = add(command)
    return command
