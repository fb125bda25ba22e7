# SPDX-License-Identifier: Apache-2.0
"""Measures the likelihood of images under a network, in bits per dimension: by the probability-flow ODE or by the variational bound.

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
    click.option('--data', help='Images, as a zip or folder written by dataset_tool.py', metavar='PATH', required=True),
    click.option('--split', help='Name of this part of the data set (train, test, ...), recorded in the result', metavar='NAME'),
    click.option('--num', '--num-images', 'num', metavar='INT', type=COUNT,
                 help='Use only the first images, in sorted order; under torchrun write --num-images  [default: all]'),
    click.option('--cond', metavar='BOOL', type=bool, help='Condition on the labels of the data  [default: if the network takes labels]'),
)
METHOD = group(
    'Method',
    _word('--method', ['ode', 'vlb'], 'ode', 'ode: estimate by the probability-flow ODE; vlb: variational upper bound on the bits'),
    _word('--dequantise', ['uniform', 'gaussian'], 'uniform', 'ode: how 8-bit images are dequantised: uniform noise, or Gaussian noise of '
          'level sigma_1 with the decoder of the bound, which makes the result comparable with --method=vlb'),
    _number('--repeats', 'Repeats per image with fresh noise, averaged', COUNT, 1, 'INT'),
    _number('--seed', 'Random seed', click.IntRange(min=0), 0, 'INT'),
)
FLOW = group(
    'Probability-flow ODE (--method=ode)',
    _word('--trace', ['hutchinson', 'exact'], 'hutchinson',
          'Trace of dD/dx: Hutchinson\'s estimate with random probes, or exact, which takes C H W backward passes'),
    _number('--probes', 'Probes per image, averaged; more make the values of single images more precise', COUNT, 1, 'INT'),
    _number('--sigma-min', 'Lowest level, at which the density is taken; not with gaussian  [default: 0.002, within the network\'s range]'),
    _number('--sigma-max', 'Highest level, that of the prior  [default: 80, within the network\'s range]'),
    _number('--sigma-data', 'Data std; the prior is N(0, sigma_max^2 + sigma_data^2)  [default: that of the network]'),
    _number('--rtol', 'Relative tolerance of the solver', default=1e-5),
    _number('--atol', 'Absolute tolerance, for values of unit size', default=1e-5),
    _number('--max-steps', 'Stop with an error if an image needs more steps', COUNT, 2000, 'INT'),
)
BOUND = group(
    'Variational bound (--method=vlb, and --dequantise=gaussian)',
    click.option('--diffusion', type=Spec('training.diffusion.discrete:DIFFUSIONS'),
                 help='Diffusion schedule  [default: that of the network, else cosine:steps=1000]'),
    click.option('--steps', metavar='LIST', help='Respace the schedule to fewer steps, such as 250 or ddim50  [default: all]'),
    _word('--variance', ['auto', 'learned', 'large', 'small'], 'auto',
          'Variance of the reverse steps; auto: learned if the network was trained to predict it, else large'),
    click.option('--plot', metavar='PNG', help='vlb: plot the terms of the bound'),
)
OUTPUT = group(
    'Output and speed',
    click.option('--out-path', metavar='JSON', help='File for the result  [default: beside the network, as NETWORK.ode.json]'),
    click.option('--npz-path', metavar='NPZ', help='Also write the values of each image, and the terms of the bound, to this file'),
    click.option('--batch', '--batch-size', 'batch', metavar='INT', type=COUNT, default=64, show_default=True,
                 help='Batch size per rank; does not change the result'),
    click.option('--threads', metavar='INT', type=COUNT, help='CPU threads per rank; bit-identical results need the same number'),
    click.option('--device', metavar='DEVICE', help='Device, such as cuda or cpu  [default: the GPU of the rank, if it has one]'),
)


@click.command(cls=Command)
@WHAT
@METHOD
@FLOW
@BOUND
@OUTPUT
@version_option
@click.pass_context
def main(ctx: click.Context, **options) -> None:
    """Likelihood of images under a network, in bits per dimension: -log2 p / (C H W) of 8-bit images.

    The ODE dequantises 8-bit images with uniform noise, which costs bits; --dequantise=gaussian bounds the bits of the 8-bit values
    themselves, as --method=vlb does: compare only these two. Float images are not dequantised: theirs are bits of the probability
    density, in the units of the data."""
    o = EasyDict(options)
    check_options(ctx, o)
    from training.likelihood import evaluation  # here, so that --help need not wait for torch
    evaluation.run(o)


def check_options(ctx: click.Context, o: EasyDict) -> None:
    """Refuses options that do not apply to the method."""
    chosen = f'--method={o.method}' + (' --dequantise=gaussian' if (o.method, o.dequantise) == ('ode', 'gaussian') else '')
    for key in sorted(set().union(*OWN_OPTIONS.values()) - OWN_OPTIONS[chosen]):
        if ctx.get_parameter_source(key) == click.core.ParameterSource.COMMANDLINE:
            why = ', whose density is taken at the lowest level of --diffusion' if key == 'sigma_min' and o.method == 'ode' else ''
            raise UserError(f'--{key.replace("_", "-")}: not an option of {chosen}{why}; leave it out')


if __name__ == '__main__':
    main()
