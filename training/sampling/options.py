# SPDX-License-Identifier: Apache-2.0
"""The options of every script that samples a network; pieces.py builds what they name. Nothing here imports torch."""

from collections.abc import Callable

import click

from torch_utils.command_line import FloatList, IntList, Spec, group

SAMPLER, STEPS = 'heun', 18  # where neither the user nor the network says otherwise
PRECISIONS = 'auto', 'fp32', 'bf16', 'fp16'
POSITIVE, COUNT = click.FloatRange(min=0), click.IntRange(min=1)


def _number(name, text, kind=float, metavar='FLOAT'):
    return click.option(*([name] if isinstance(name, str) else name), metavar=metavar, type=kind, help=text)


def _word(name, choices, text):
    return click.option(name, type=click.Choice(choices), metavar='|'.join(choices), help=text)


# What `eval_fid.py sweep` takes several values of.
GUIDANCE = 'Guidance weight w in D_0 + w (D_1 - D_0), where D_0 is the unconditional prediction; 1: off'
INTERVAL = 'Guide only at LO < sigma <= HI, or with t:LO,HI at these indices (0 to 999) of the cosine schedule'
WEIGHTS = 'Which weights of a training state: ema, raw or ema:LENGTH, such as ema:0.05'
SOLVER = 'Sampler; --sampler=help lists them'
SOLVER_DEFAULT = f'  [default: that of the network\'s config.json, else {SAMPLER}]'
EVALUATES = 'Sampling steps N; heun takes 2N - 1 network evaluations, the others N'
STEPS_DEFAULT = f'  [default: those of config.json with its sampler, else {STEPS}]'
STEPPERS = Spec('training.sampling.steppers:STEPPERS')

CONDITIONS = group(
    'Labels and guidance',
    click.option('--class', 'class_idx', metavar='INT', type=click.IntRange(min=0), help='Class of all images'),
    click.option('--labels', metavar='SOURCE', help='uniform: draw a class for each seed; dataset:PATH: draw a label of that data set; '
                 'FILE: .npy, .json or .txt, row s (a class or a vector) for seed s  [default: uniform]'),
    click.option('--prompt', metavar='TEXT|FILE', help='For networks trained on captions: the caption of all images, or a .txt file with '
                 'one per line, of which seed s takes line s modulo their number'),
    click.option('--text-encoder', metavar='REF', help='Where the text encoder of --prompt is  [default: as config.json says]'),
    click.option('--gnet', metavar='REF', help='Autoguidance: take D_0 from this network, with the same labels if it takes any'),
    _number('--guidance-channels', 'Guide only the first INT channels, such as 3 of 4 for DiT as published  [default: all]', COUNT, 'INT'),
    click.option('--gnet-weights', metavar='WHICH', default='ema', show_default=True, help='Like --weights, for --gnet'),
)
ONE = group(
    'Sampler',
    click.option('--guidance', metavar='FLOAT', type=float, default=1, show_default=True, help=GUIDANCE),
    click.option('--guidance-interval', metavar='LO,HI', help=f'{INTERVAL}  [default: 0,inf]'),
    click.option('--weights', metavar='WHICH', default='ema', show_default=True, help=WEIGHTS),
    click.option('--sampler', '--solver', type=STEPPERS, help=SOLVER + SOLVER_DEFAULT),
    _number('--steps', EVALUATES + STEPS_DEFAULT, COUNT, 'INT'),
)
SEVERAL = group(
    'Cells of the sweep: every combination of',
    click.option('--guidance', metavar='LIST', type=FloatList(), default='1', show_default=True, help=f'{GUIDANCE}; such as 1,1.5,2'),
    click.option('--guidance-interval', metavar='LO,HI', multiple=True,
                 help=f'{INTERVAL}; may be repeated. Cells of weight 1 have none  [default: 0,inf]'),
    click.option('--weights', metavar='WHICH', default=['ema'], show_default=True, multiple=True, help=f'{WEIGHTS}; may be repeated'),
    click.option('--sampler', '--solver', type=STEPPERS, multiple=True, help=f'{SOLVER}; may be repeated{SOLVER_DEFAULT}'),
    click.option('--steps', metavar='LIST', type=IntList(), help=f'{EVALUATES}; such as 5,9,18{STEPS_DEFAULT}'),
)
REST = group(
    'Sampler',
    click.option('--levels', '--disc', type=Spec('training.diffusion.schedules:SCHEDULES'),
                 help='Noise levels, such as explicit:sigmas=80|10|1; --levels=help lists them  [default: those of config.json with its '
                 'sampler, else edm; for ancestral and ddim the network\'s own timesteps]'),
    _number('--sigma-min', 'Lowest noise level (key of --levels)  [default: of --levels, within the network\'s range]'),
    _number('--sigma-max', 'Highest noise level (key of --levels)  [default: of --levels, within the network\'s range]'),
    _number('--rho', 'Exponent of --levels=edm  [default: 7]'),
    _number(('--S-churn', '--s-churn', 'S_churn'), 'Strength of the noise that heun and euler add (churn)  [default: 0]', POSITIVE),
    _number(('--S-min', '--s-min', 'S_min'), 'Lowest level at which churn is applied  [default: 0]', POSITIVE),
    _number(('--S-max', '--s-max', 'S_max'), 'Highest level at which churn is applied  [default: inf]', POSITIVE),
    _number(('--S-noise', '--s-noise', 'S_noise'), 'Scale of the noise that churn adds  [default: 1]', POSITIVE),
    _word('--schedule', ('linear', 've', 'vp'), 'Noise schedule sigma(t) whose time t heun and euler step in  [default: linear]'),
    _word('--scaling', ('none', 'vp'), 'Scaling s(t) of x along the path of heun and euler  [default: none]'),
    _number('--stop-sigma', 'Truncated sampling: end with E[x_0 | x] at the last level not below this  [default: 0]', POSITIVE),
    _number('--stop-variance', '--stop-sigma given as a variance, its square', POSITIVE),
    click.option('--decode', metavar='auto|none|REF', default='auto', show_default=True,
                 help='Decode latents, leave them, or decode with the autoencoder here'),
)
SPEED = group(
    'Speed',
    click.option('--precision', type=click.Choice(PRECISIONS), metavar='|'.join(PRECISIONS), default='auto', show_default=True,
                 help='Arithmetic of the network; the sampler uses float64. auto: that of its training on GPUs that have it, else fp32'),
    click.option('--compile', metavar='[BOOL]', type=bool, is_flag=False, flag_value=True, default=False, show_default=True,
                 help='Compile the network with torch.compile: faster after a minute or so, with slightly different rounding'),
)


def OPTIONS(command: Callable) -> Callable:
    """Decorator that adds all of these options to a command."""
    return CONDITIONS(ONE(REST(SPEED(command))))


def SWEEP(command: Callable) -> Callable:
    """The same with lists of guidance weights, intervals, weights, samplers and step counts."""
    return CONDITIONS(SEVERAL(REST(SPEED(command))))


# Parameter names of these options: those that stand alone, and those that are keys of --levels or --sampler.
NAMES = ('class_idx', 'labels', 'prompt', 'text_encoder', 'guidance', 'guidance_interval', 'guidance_channels', 'gnet', 'weights',
         'gnet_weights', 'sampler', 'levels', 'steps', 'stop_sigma', 'stop_variance', 'decode', 'precision', 'compile')
KEYS = ('sigma_min', 'sigma_max', 'rho', 'S_churn', 'S_min', 'S_max', 'S_noise', 'schedule', 'scaling')
