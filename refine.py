# SPDX-License-Identifier: Apache-2.0
"""Refines a network that was trained on noisy images: rounds of restoring these images with it, and training on (SFBD; Dataloops).

python refine.py --network=runs/00000-mix/network-snapshot-200000 --rounds=3 --duration=20 --outdir=refined
python refine.py restore --network=runs/00000-mix/network-snapshot-200000 --dest=restored.npz
python refine.py proximal --network=runs/00000-mix/network-snapshot-100000 --network=runs/00000-mix/network-snapshot-200000"""

import click

from dnnlib import EasyDict
from dnnlib.files import prepare_output
from torch_utils.command_line import Command, Group, Number, Spec, group, version_option

COUNT, WHOLE = click.IntRange(min=1), click.IntRange(min=0)


def _count(name, text, default=None, kind=COUNT):
    return click.option(name, metavar='INT', type=kind, default=default, show_default=default is not None, help=text)


NETWORK = 'Snapshot folder or training-state .pt of a run of train.py'
RUN = group(
    'The run that it is of',
    click.option('--config', metavar='JSON', help='Its options.json, which says its data, noise and training  [default: beside --network]'),
    click.option('--data', metavar='DATA', help='Its images, where they are not at the path that options.json names'),
)
REVERSE = group(
    'Restoring',
    click.option('--schedule', type=Spec('training.refinement.schedules:SCHEDULES'), default='sfbd', show_default=True,
                 help='Levels s_k at which the rounds stop; --schedule=help lists them'),
    click.option('--sampler', type=Spec('training.sampling.steppers:STEPPERS'), default='heun', show_default=True,
                 help='Reverse process: heun for the ODE, dpmpp_2m_sde or sde for the SDE; --sampler=help lists all'),
    _count('--steps', 'Steps of it from sigma_n down to s_k', 40),
)
CHOICE = group(
    'Proximal FID, which chooses a network without clean images',
    click.option('--detector', type=Spec('metrics.detectors:DETECTORS'), default='inception', show_default=True,
                 help='Network that computes the features; --detector=help lists them'),
    _count('--num', 'Number of generated images; 0: none, and the last round is chosen  [default: as many as noisy ones, at most 50000]',
           kind=WHOLE),
    _count('--sample-steps', 'Sampling steps of these  [default: those of config.json, else 18]'),
)
SPEED = group(
    'Seed and speed',
    _count('--seed', 'Seed of the draws of restoring, and of the noise of proximal FID', 0, WHOLE),
    _count('--batch', 'Images per rank and batch outside the training; does not change the results', 64),
    _count('--threads', 'CPU threads per rank; bit-identical results need the same number'),
    click.option('--device', metavar='DEVICE', help='Device, such as cuda or cpu  [default: the GPU, if there is one]'),
)


@click.group(cls=Group)
@version_option
def main():
    """Refine a network trained on noisy images, by rounds of restoring these and training on.

    Without a command it runs the loop: refine.py --network=... --rounds=... (see refine.py rounds --help)."""


main.default = 'rounds'


@main.command('rounds', cls=Command)
@group('Loop',
       click.option('--network', metavar='REF', required=True, help=NETWORK),
       click.option('--outdir', metavar='DIR', required=True, help='Folder of the rounds; the same command again resumes'),
       _count('--rounds', 'Number of rounds; 0: only measure the network', 1, WHOLE),
       click.option('--duration', metavar='MIMG', type=Number(above=0), required=True,
                    help='Training length of each round in million images'),
       _count('--gpus', 'Ranks of each stage, started by torchrun', 1),
       click.argument('train', nargs=-1, metavar='[-- OPTIONS OF TRAIN.PY]', type=click.UNPROCESSED))
@RUN
@REVERSE
@CHOICE
@SPEED
def rounds(**options):
    """In each round: restore all noisy images with the last network, always from the originals, and train on from its weights.

    Training has the options of the run; others may follow after "--", such as -- --lr=1e-4."""
    from training.refinement import loop  # here, so that --help need not wait for torch
    loop.run_rounds(EasyDict(options))


@main.command('restore', cls=Command)
@group('Set',
       click.option('--network', metavar='REF', required=True, help=NETWORK),
       click.option('--dest', metavar='NPZ', required=True, help='File for the set, which train.py reads'),
       _count('--round', 'Number of the round, for --schedule and the draws', 1))
@RUN
@REVERSE
@SPEED
def restore(**options):
    """Store the restored images of one round as a data set; also under torchrun."""
    prepare_output(options['dest'], '--dest', '.npz')
    from training.refinement import loop
    loop.run_restore(EasyDict(options))


@main.command('proximal', cls=Command)
@group('Networks',
       click.option('--network', 'networks', metavar='REF', required=True, multiple=True, help=f'{NETWORK}; may be repeated'),
       click.option('--out-path', metavar='JSON', help='File for the results  [default: print them only]'))
@RUN
@CHOICE
@SPEED
def proximal(**options):
    """Compare generated images, noised like the noisy images, with these, for one network or several; also under torchrun."""
    if options['out_path']:
        prepare_output(options['out_path'], '--out-path')
    from training.refinement import loop
    loop.run_proximal(EasyDict(options))


if __name__ == '__main__':
    main()
