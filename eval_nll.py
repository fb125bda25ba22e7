# SPDX-License-Identifier: Apache-2.0
"""Measures how likely a network finds given images, in bits per dimension: by the probability-flow ODE or by the variational bound.

python eval_nll.py --network=NAME --data=cifar-test.zip --split=test --num=1000
python eval_nll.py --network=NAME --data=cifar-test.zip --split=test --dequantise=gaussian
python eval_nll.py --network=NAME --data=cifar-test.zip --split=test --method=vlb --plot=terms.png
torchrun --standalone --nproc_per_node=8 eval_nll.py --network=NAME --data=cifar-test.zip --split=test"""

import click

from dnnlib import EasyDict, UserError
from torch_utils.command_line import Command, Number, Spec, group, version_option

POSITIVE, COUNT = Number(above=0), click.IntRange(min=1)
OF_FLOW = 'dequantise', 'trace', 'probes', 'sigma_max', 'sigma_data', 'rtol', 'atol', 'max_steps'
OF_STEPS = 'diffusion', 'steps', 'variance'
OWN_OPTIONS = {'--method=ode': {*OF_FLOW, 'sigma_min'}, '--method=ode --dequantise=gaussian': {*OF_FLOW, *OF_STEPS},
               '--method=vlb': {*OF_STEPS, 'plot'}}


def _number(name, text, kind=POSITIVE, default=None, metavar='FLOAT'):
    return click.option(name, metavar=metavar, type=kind, default=default, show_default=default is not None, help=text)


def _word(name, choices, default, text):
    return click.option(name, type=click.Choice(choices), metavar='|'.join(choices), default=default, show_default=True, help=text)


WHAT = group(
    'Network and images',
    click.option('--network', help='Snapshot folder, training-state .pt, or Hugging Face name', metavar='REF', required=True),
    click.option('--weights', metavar='WHICH', default='ema', show_default=True,
                 help='Which weights of a training state: ema, raw or ema:LENGTH'),
    click.option('--data', help='Images: a zip or folder, such as dataset_tool.py makes', metavar='PATH', required=True),
    click.option('--split', help='Which part of the data set this is (train, test, ...); kept in the result', metavar='NAME'),
    click.option('--num', '--num-images', 'num', metavar='INT', type=COUNT,
                 help='How many images, the first in sorted order; under torchrun write --num-images  [default: all]'),
    click.option('--cond', metavar='BOOL', type=bool, help='Give the network the labels of the data  [default: if it takes labels]'),
)
METHOD = group(
    'Method',
    _word('--method', ['ode', 'vlb'], 'ode', 'Probability-flow ODE, an estimate, or variational bound, an upper bound of the bits'),
    _word('--dequantise', ['uniform', 'gaussian'], 'uniform', 'ode: how grey levels become a density: noise that fills them up, or that of '
          'the level sigma_1 and the decoder of the bound, which makes the two methods comparable'),
    _number('--repeats', 'Draws of all noise an image, averaged', COUNT, 1, 'INT'),
    _number('--seed', 'Of all noise', click.IntRange(min=0), 0, 'INT'),
)
FLOW = group(
    'Probability-flow ODE (--method=ode)',
    _word('--trace', ['hutchinson', 'exact'], 'hutchinson',
          'Trace of dD/dx: estimated with random probes, or exact, at as many backward passes as an image has numbers'),
    _number('--probes', 'Probes an image, averaged; more make single images\' values more exact', COUNT, 1, 'INT'),
    _number('--sigma-min', 'Uniform: where the density is taken  [default: 0.002, or the network\'s own]'),
    _number('--sigma-max', 'Where the prior is  [default: 80, or the network\'s own]'),
    _number('--sigma-data', 'Data std; the prior is N(0, sigma_max^2 + sigma_data^2)  [default: the network\'s own]'),
    _number('--rtol', 'Relative tolerance of the solver', default=1e-5),
    _number('--atol', 'Absolute tolerance, for values of unit size', default=1e-5),
    _number('--max-steps', 'Give up where one image needs more steps', COUNT, 2000, 'INT'),
)
BOUND = group(
    'Variational bound (--method=vlb, and --dequantise=gaussian)',
    click.option('--diffusion', type=Spec('training.diffusion.discrete:DIFFUSIONS'),
                 help='Schedule whose levels are visited  [default: the network\'s own, or cosine:steps=1000]'),
    click.option('--steps', metavar='LIST', help='Only so many of its steps, such as 250 or ddim50  [default: all]'),
    _word('--variance', ['auto', 'learned', 'large', 'small'], 'auto',
          'Of the reverse steps; auto: learned where the network was trained to give it, else large'),
    click.option('--plot', metavar='PNG', help='vlb: a picture of the terms'),
)
OUTPUT = group(
    'Output and speed',
    click.option('--out-path', metavar='JSON', help='Where the result goes  [default: beside the network, as NETWORK.ode.json]'),
    click.option('--npz-path', metavar='NPZ', help='Also each image\'s own values, and the bound\'s terms, in this file'),
    click.option('--batch', '--batch-size', 'batch', metavar='INT', type=COUNT, default=64, show_default=True,
                 help='Images at a time on each rank; changes no value'),
    click.option('--threads', metavar='INT', type=COUNT, help='CPU threads of each rank; equal values need equal threads'),
    click.option('--device', metavar='DEVICE', help='Such as cuda or cpu  [default: the GPU of the rank, if it has one]'),
)


@click.command(cls=Command)
@WHAT
@METHOD
@FLOW
@BOUND
@OUTPUT
@version_option
@click.pass_context
def main(ctx, **options):
    """Bits per dimension of images under a network: -log2 p / (C H W) of 8-bit images.

    By the ODE grey levels are filled up to a density with uniform noise, which has a price; --dequantise=gaussian bounds the bits of
    the grey levels themselves, as --method=vlb does: compare only these two. Float images have no grey levels: theirs is the
    differential figure, in the units of the data."""
    o = EasyDict(options)
    check_options(ctx, o)
    from training.likelihood import evaluation  # here, so that --help need not wait for torch
    evaluation.run(o)


def check_options(ctx, o):
    """Refuses options that the method has no use for."""
    chosen = f'--method={o.method}' + (' --dequantise=gaussian' if (o.method, o.dequantise) == ('ode', 'gaussian') else '')
    for key in sorted(set().union(*OWN_OPTIONS.values()) - OWN_OPTIONS[chosen]):
        if ctx.get_parameter_source(key) == click.core.ParameterSource.COMMANDLINE:
            why = ', whose density is taken at the lowest level of --diffusion' if key == 'sigma_min' and o.method == 'ode' else ''
            raise UserError(f'--{key.replace("_", "-")}: not an option of {chosen}{why}; leave it out')


if __name__ == '__main__':
    main()
