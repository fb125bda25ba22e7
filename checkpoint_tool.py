# SPDX-License-Identifier: Apache-2.0
"""Makes networks from what a run has stored.

python checkpoint_tool.py ema runs/00000-mix --length=0.12 --dest=mix-0.12"""

import os

import click

from torch_utils.command_line import Command, Number, version_option
from training import hub, posthoc

ROUGH = 0.05  # error of a profile that is worth a warning


@click.group()
@version_option
def main():
    """Work on the checkpoints of a run."""


@main.command('ema', cls=Command)
@click.argument('run', metavar='RUN', type=click.Path(exists=True, file_okay=False))
@click.option('--length', metavar='FLOAT', type=float, required=True, help='Width sigma_rel of the average, such as 0.12')
@click.option('--kimg', metavar='FLOAT', type=Number(least=0), help='At which point of the run  [default: the last stored]')
@click.option('--dest', metavar='DIR', required=True, help='Folder for the network, in the layout of a snapshot')
def reconstruct_ema(run, length, kimg, dest):
    """Reconstruct a power-function EMA of any length from those that RUN has stored (train.py --power-ema)."""
    if os.path.exists(dest):
        raise click.ClickException(f'--dest={dest} exists; choose a new name')
    net, used, error = posthoc.reconstruct(run, length, None if kimg is None else round(kimg * 1e3))
    hub.save_network(net, dest)
    for name, factor in used:
        click.echo(f'{factor:+12.5f}  {name}')
    click.echo(f'{dest}: EMA of length {length:g} from {len(used)} stored averages, whose profile is {error:.2%} off')
    if error > ROUGH:
        click.echo(f'Warning: {error:.0%} is far off; store more snapshots, or lengths nearer to {length:g} (train.py --snap, --power-ema)')


if __name__ == '__main__':
    main()
