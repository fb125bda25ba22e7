# SPDX-License-Identifier: Apache-2.0
"""Converts images of any kind into the zip or folder that train.py reads, and tells what is in one.

python dataset_tool.py --source=images/ --dest=images.zip --transform=center-crop --resolution=64x64
python dataset_tool.py stats images.zip
python dataset_tool.py check images.zip"""

import math
import re

import click

from torch_utils.command_line import HELP, Command, Group, Spec, group, show_choices, version_option

LAYOUTS, CHANNELWISE = ('nhw', 'nhwc', 'nchw'), 'channel'


@click.group(cls=Group)
@version_option
def main():
    """Prepare images for training.

    Without the name of a command it converts: dataset_tool.py --source=... --dest=... (dataset_tool.py convert --help)."""


main.default = 'convert'


def show_sources(ctx, param, value):
    """--source=help: what is read."""
    if HELP in value:
        from training.data.convert.sources import describe_sources
        show_choices(ctx, '\n'.join(describe_sources()))
    return value


def parse_size(ctx, param, value):
    """'64x48' -> (64, 48), width first; '64' -> (64, 64)."""
    if value is None:
        return None
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', value)
    if not match or not int(match[1]) or not int(match[2] or 1):
        raise click.BadParameter(f'"{value}" is not WIDTHxHEIGHT, such as 64x64')
    return int(match[1]), int(match[2] or match[1])


def parse_part(ctx, param, value):
    """'0/2' -> (0, 2)."""
    if value is None:
        return None
    match = re.fullmatch(r'(\d+)/(\d+)', value)
    if not match or int(match[1]) >= int(match[2]):
        raise click.BadParameter(f'"{value}" is not K/N with K < N, such as 0/2')
    return int(match[1]), int(match[2])


def parse_units(ctx, param, value):
    """'10,2.5' -> {'offset': 10.0, 'scale': 2.5}; '0,1/10,2' -> {'offset': [0.0, 10.0], 'scale': [1.0, 2.0]}; 'channel' as it is."""
    if value in (None, CHANNELWISE):
        return value
    try:
        pairs = [[float(text) for text in part.split(',')] for part in value.split('/')]
        offset, scale = (list(numbers) for numbers in zip(*pairs, strict=True))
    except ValueError:
        raise click.BadParameter(f'"{value}" is not OFFSET,SCALE, such as 0,1, nor one of these a channel, such as 0,1/10,2, '
                                 f'nor "{CHANNELWISE}"') from None
    if not all(math.isfinite(number) for pair in pairs for number in pair) or min(scale) <= 0:
        raise click.BadParameter(f'"{value}": both must be finite, and the scale more than 0')
    return {'offset': offset, 'scale': scale} if len(pairs) > 1 else {'offset': offset[0], 'scale': scale[0]}


SOURCE = group(
    'Source',
    click.option('--source', metavar='PATH[:KEY=VALUE,...]', required=True, multiple=True, callback=show_sources,
                 help='Images; may be repeated. --source=help lists what is read, with its keys'),
    click.option('--split', metavar='NAME', help='Of sources that have several: train, test, ...'),
    click.option('--layout', type=click.Choice(LAYOUTS), metavar='|'.join(LAYOUTS),
                 help='Axes of an array, where its shape does not tell'),
    click.option('--max-images', metavar='INT', type=click.IntRange(min=1), help='Use only so many images'),
    click.option('--sample', type=click.Choice(['first', 'spread']), metavar='first|spread', default='first', show_default=True,
                 help='Which ones --max-images takes: the first, or evenly over all classes'),
    click.option('--part', metavar='K/N', callback=parse_part,
                 help='Use every N-th image from the K-th on, counted from 0; before --max-images; of tiles, whole images'),
    click.option('--on-bad', type=click.Choice(['fail', 'skip']), metavar='fail|skip', default='fail', show_default=True,
                 help='Images that cannot be read, or differ from the others'),
)
PIXELS = group(
    'Pixels',
    click.option('--resolution', metavar='WxH', callback=parse_size,
                 help='Size to resize to (Lanczos); sides that the network can halve at each of its levels'),
    click.option('--transform', type=Spec('training.data.convert.transforms:TRANSFORMS'),
                 help='Crop or pad before resizing; --transform=help lists how'),
    click.option('--tile', metavar='WxH', callback=parse_size, help='Cut images into tiles of this size, each an image of the set, named '
                 'by its image and place; the last ones are moved inwards, smaller images left out'),
    click.option('--overlap', metavar='INT', type=click.IntRange(min=0), default=0, help='Pixels that neighbouring tiles share'),
    click.option('--channels', type=click.Choice(['1', '3']), metavar='1|3', help='Make every image grey, or RGB'),
    click.option('--units', metavar='OFFSET,SCALE|channel', callback=parse_units,
                 help='Float data: network = (value - OFFSET) / SCALE; OFFSET,SCALE/OFFSET,SCALE/... of each channel, whose --sigmas '
                 'are in network units where scales differ; "channel": mean, 2 std of each  [default: mean, 2 std]'),
)
TOLD = group(
    'What is known of the images',
    click.option('--labels', metavar='FILE', type=click.Path(exists=True, dir_okay=False),
                 help='CSV (file,label), JSON or .npy with a class or vector an image, instead of what the source says'),
    click.option('--sigmas', metavar='FILE|NUMBER', help='Noise std that the images already have: CSV, JSON, .npy, or one number; '
                 'in the source\'s own units, for 8-bit images in those of [-1,1]'),
    click.option('--sigma-min', metavar='FILE|NUMBER', help='Noise level above which images may be trained on that are wrong at lower '
                 'ones (blurred, say), given like --sigmas; null in JSON: no such limit'),
    click.option('--sigma-max', metavar='FILE|NUMBER', help='Highest noise level that images may be trained at, given like --sigmas; '
                 'inf, or null in JSON: any'),
)
OUTPUT = group(
    'Output',
    click.option('--dest', metavar='PATH', required=True, help='A .zip, the name of a folder without an extension, or an .npz (--packed)'),
    click.option('--packed', is_flag=True, help='Write one array, which training need not decode: an .npz, which implies it, or a folder'),
    click.option('--sheet', metavar='FILE',
                 help='A picture of some of the images, .png, or "none"  [default: beside --dest, NAME-sheet.png]'),
    click.option('--workers', metavar='INT', type=click.IntRange(min=1), help='Processes  [default: one a core]'),
)


@main.command(cls=Command)
@SOURCE
@PIXELS
@TOLD
@OUTPUT
def convert(**options):
    """Convert images: 8-bit ones to PNG, any others (16-bit, float) to float32 .npy with the units that map them back.

    Labels come from class folders, or from a dataset.json in the source, which wins. MNIST keeps its 28x28 pixels."""
    from training.data.convert.conversion import convert as convert_images
    for line in convert_images(options):
        click.echo(line)


# ----------------------------------------------------------------------------------------------------
# What is in an archive, and whether it is whole


@main.command(cls=Command)
@click.argument('data', metavar='DATA')
@click.option('--sigma', metavar='FLOAT', type=click.FloatRange(min=0, min_open=True), help='Noise level to give the SNR of')
def stats(data, sigma):
    """Print count, shape, range, sigma_data, classes, noise levels, and the SNR at a noise level."""
    from training.data.convert.statistics import describe
    for line in describe(data, sigma):
        click.echo(line)


@main.command(cls=Command)
@click.argument('data', metavar='DATA')
def check(data):
    """Look for whatever training would stumble over: every image is decoded, and dataset.json compared with them.

    Prints a line for each problem, with the name of the file; ends with exit code 1 where there are any."""
    from training.data.convert.checking import check as check_archive
    if not check_archive(data, click.echo):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
