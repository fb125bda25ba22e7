# SPDX-License-Identifier: Apache-2.0
"""Extracts networks from the checkpoints of a run, converts them to other layouts, and publishes them.

python checkpoint_tool.py strip runs/00000-mix/training-state-200000.pt --dest=mix
python checkpoint_tool.py push runs/00000-mix/network-snapshot-200000 owner/mix
python checkpoint_tool.py ema runs/00000-mix --length=0.12 --dest=mix-0.12"""

import os
import re
import tempfile

import click

from dnnlib import UserError
from dnnlib.files import new_folder
from torch_utils.command_line import Command, Group, Number, version_option

ROUGH = 0.05  # relative error of a reconstructed EMA profile above which a warning is printed
REF = "REF is a snapshot folder, a training-state .pt, a .pkl of EDM or EDM2, a URL or a Hugging Face name."
weights_option = click.option('--weights', metavar='ema|raw|ema:WIDTH', default='ema', show_default=True,
                              help='Which weights of a training state to use; ema:0.05 is a stored power-function average')


def web_address(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An http(s) URL that can stand in Markdown."""
    if value is not None and not re.fullmatch(r'https?://[^\s()<>]+', value):
        raise click.BadParameter(f'"{value}" is not an address such as https://example.org/code')
    return value


@click.group(cls=Group)
@version_option
def main():
    """Work on the checkpoints of a run."""


@main.command('strip', cls=Command, help=f'Write the weights of REF as a folder: config.json, model.safetensors, README.md. {REF}')
@click.argument('ref', metavar='REF')
@click.option('--dest', metavar='DIR', required=True, help='New folder for the network; must not exist yet')
@weights_option
def strip(ref, dest, weights):
    from training.checkpoints import publish
    print_left_out(publish.export(ref, dest, weights))
    click.echo(f'{dest}: the network of {ref}, {size_of(dest):.1f} MB')


@main.command('export', cls=Command, help=f'Write REF as a folder for another program. {REF}')
@click.argument('ref', metavar='REF')
@click.option('--format', type=click.Choice(['diffusers', 'folder']), required=True,
              help='diffusers: UNet2DModel and EDMEulerScheduler, for networks that these can represent exactly (--arch=adm of full '
              'width, --precond=edm); folder: as strip does')
@click.option('--dest', metavar='DIR', required=True, help='New folder for the network; must not exist yet')
@weights_option
def export(ref, format, dest, weights):
    from training.checkpoints import publish
    print_left_out(publish.export(ref, dest, weights, format))
    click.echo(f'{dest}: the network of {ref} for {format}, {size_of(dest):.1f} MB')


@main.command('push', cls=Command, help='Upload REF to the repository NAME (owner/name) of the Hugging Face Hub, with a model card that '
              "lists its options, metrics (the *.fid.json in the run's folder that belong to this very network) and samples. Needs a "
              'token: hf auth login, or HF_TOKEN.')
@click.argument('ref', metavar='REF')
@click.argument('name', metavar='NAME')
@click.option('--private', is_flag=True, help='If the repository is created, make it private')
@click.option('--revision', metavar='BRANCH', help='Branch to upload to, created if needed  [default: main]')
@click.option('--metrics', metavar='JSON', multiple=True, type=click.Path(exists=True, dir_okay=False),
              help='Result of eval_fid.py for this very network, to quote in the card; may be repeated')
@click.option('--samples', metavar='PNG', type=click.Path(exists=True, dir_okay=False),
              help='Picture for the card  [default: the samples-*.png of the snapshot]')
@click.option('--license', metavar='NAME', default='unknown', show_default=True,
              help='Licence of the weights for the card, as the Hub calls it, such as apache-2.0 or cc-by-nc-4.0')
@click.option('--code', metavar='URL', callback=web_address,
              help='URL of the code for the card to link to  [default: the card names program and version]')
@click.option('--dry-run', metavar='DIR', help='Write what would be uploaded into this new folder, and upload nothing')
@weights_option
def push(ref, name, private, revision, metrics, samples, license, code, dry_run, weights):
    from training.checkpoints import publish
    from training.checkpoints.load import load_network
    with tempfile.TemporaryDirectory() as parent:
        folder = dry_run or os.path.join(parent, 'network')
        with new_folder(folder) as part:
            found = publish.fill(part, load_network(ref, weights=weights), ref, metrics, samples, license, code)
        print_left_out(found)
        for what in ('samples', 'metrics'):
            click.echo(f'{what}: {found[what] or "none found; give them with --" + what}')
        address = None if dry_run else publish.push(folder, name, private, revision)
    click.echo(f'{dry_run}: what would be pushed to {name}' if dry_run else f'pushed to {address}')


@main.command('ema', cls=Command)
@click.argument('run', metavar='RUN', type=click.Path(exists=True, file_okay=False))
@click.option('--length', metavar='FLOAT', type=float, required=True, help='Width sigma_rel of the average, such as 0.12')
@click.option('--kimg', metavar='FLOAT', type=Number(least=0), help='Training progress to reconstruct it at  [default: the last stored]')
@click.option('--dest', metavar='DIR', required=True, help='New folder for the network, in the layout of a snapshot')
def reconstruct_ema(run, length, kimg, dest):
    """Reconstruct a power-function EMA of any length from the averages that RUN has stored (train.py --power-ema), or from EDM2's published
    snapshots of one network in a folder RUN."""
    if os.path.exists(dest):
        raise UserError(f'--dest={dest} exists; choose a new name')
    from training.checkpoints import posthoc
    from training.checkpoints.save import save_network
    net, used, error = posthoc.reconstruct(run, length, None if kimg is None else round(kimg * 1e3))
    save_network(net, dest)
    for name, factor in used:
        click.echo(f'{factor:+12.5f}  {name}')
    click.echo(f'{dest}: EMA of length {length:g} from {len(used)} stored averages, with a profile error of {error:.2%}')
    if error > ROUGH:
        click.echo(f'Warning: {error:.0%} is a large error; store more snapshots, or lengths nearer to {length:g} '
                   '(train.py --snap, --power-ema)')


def print_left_out(found: dict | None) -> None:
    """Prints the results of the network that its card does not quote."""
    for line in (found or {}).get('left_out', ()):
        click.echo(f'not quoted: {line}')


def size_of(folder: str | os.PathLike) -> float:
    """Megabytes of the files in a folder."""
    return sum(os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names) / 1e6


if __name__ == '__main__':
    main()
