# SPDX-License-Identifier: Apache-2.0
"""Converts images of any kind into the zip or folder that train.py reads, describes such a data set, and checks it.

python dataset_tool.py --source=images/ --dest=images.zip --transform=center-crop --resolution=64x64
python dataset_tool.py encode --source=images.zip --vae=stabilityai/sd-vae-ft-mse --dest=latents
python dataset_tool.py stats images.zip
python dataset_tool.py check images.zip
python dataset_tool.py noise images.zip
python dataset_tool.py captions --source=images.zip --text-encoder=openai/clip-vit-large-patch14
python dataset_tool.py annotate --clean=clean.zip --data=blurred.zip"""

import math
import re

import click

from torch_utils.command_line import HELP, Command, Group, Number, Spec, group, show_choices, version_option

LAYOUTS, CHANNELWISE = ('nhw', 'nhwc', 'nchw'), 'channel'


@click.group(cls=Group)
@version_option
def main():
    """Prepare images for training.

    Without a command it converts: dataset_tool.py --source=... --dest=... (see dataset_tool.py convert --help)."""


main.default = 'convert'


def show_sources(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """--source=help: prints the formats that are read."""
    if HELP in value:
        from training.data.convert.sources import describe_sources
        show_choices(ctx, '\n'.join(describe_sources()))
    return value


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """'64x48' -> (64, 48), width first; '64' -> (64, 64)."""
    if value is None:
        return None
    match = re.fullmatch(r'(\d+)(?:x(\d+))?', value)
    if not match or not int(match[1]) or not int(match[2] or 1):
        raise click.BadParameter(f'"{value}" is not WIDTHxHEIGHT, such as 64x64')
    return int(match[1]), int(match[2] or match[1])


def parse_part(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """'0/2' -> (0, 2)."""
    if value is None:
        return None
    match = re.fullmatch(r'(\d+)/(\d+)', value)
    if not match or int(match[1]) >= int(match[2]):
        raise click.BadParameter(f'"{value}" is not K/N with K < N, such as 0/2')
    return int(match[1]), int(match[2])


def parse_units(ctx: click.Context, param: click.Parameter, value: str | None) -> dict | str | None:
    """'10,2.5' -> {'offset': 10.0, 'scale': 2.5}; '0,1/10,2' -> {'offset': [0.0, 10.0], 'scale': [1.0, 2.0]}; 'channel' as it is."""
    if value in (None, CHANNELWISE):
        return value
    try:
        pairs = [[float(text) for text in part.split(',')] for part in value.split('/')]
        offset, scale = (list(numbers) for numbers in zip(*pairs, strict=True))
    except ValueError:
        raise click.BadParameter(f'"{value}" is not OFFSET,SCALE, such as 0,1, nor one such pair per channel, such as 0,1/10,2, '
                                 f'nor "{CHANNELWISE}"') from None
    if not all(math.isfinite(number) for pair in pairs for number in pair) or min(scale) <= 0:
        raise click.BadParameter(f'"{value}": both must be finite, and the scale more than 0')
    return {'offset': offset, 'scale': scale} if len(pairs) > 1 else {'offset': offset[0], 'scale': scale[0]}


SOURCE = group(
    'Source',
    click.option('--source', metavar='PATH[:KEY=VALUE,...]', required=True, multiple=True, callback=show_sources,
                 help='Images; may be repeated. --source=help lists the formats that are read, with their keys'),
    click.option('--split', metavar='NAME', help='Split to read from sources that have several: train, test, ...'),
    click.option('--layout', type=click.Choice(LAYOUTS), metavar='|'.join(LAYOUTS),
                 help='Order of the axes of an array, where its shape is ambiguous'),
    click.option('--max-images', metavar='INT', type=click.IntRange(min=1), help='Use at most this many images'),
    click.option('--sample', type=click.Choice(['first', 'spread']), metavar='first|spread', default='first', show_default=True,
                 help='Which images --max-images takes: the first ones, or evenly over all classes'),
    click.option('--part', metavar='K/N', callback=parse_part,
                 help='Use every N-th image, starting from image K (counted from 0). Applied before --max-images; '
                 'tiles of one image stay together'),
    click.option('--on-bad', type=click.Choice(['fail', 'skip']), metavar='fail|skip', default='fail', show_default=True,
                 help='What to do with images that cannot be read, or differ from the others'),
)
PIXELS = group(
    'Pixels',
    click.option('--resolution', metavar='WxH', callback=parse_size,
                 help='Size to resize to (Lanczos); the network must be able to halve both sides at each of its levels'),
    click.option('--transform', type=Spec('training.data.convert.transforms:TRANSFORMS'),
                 help='Crop or pad before resizing; --transform=help lists the choices'),
    click.option('--tile', metavar='WxH', callback=parse_size, help='Cut images into tiles of this size, named by image and position. '
                 'The last tile of a row or column is shifted inwards; images smaller than a tile are left out'),
    click.option('--overlap', metavar='INT', type=click.IntRange(min=0), default=0, help='Pixels that neighbouring tiles share'),
    click.option('--channels', type=click.Choice(['1', '3']), metavar='1|3', help='Convert every image to grey (1) or RGB (3)'),
    click.option('--units', metavar='OFFSET,SCALE|channel', callback=parse_units,
                 help='For float data: network = (value - OFFSET) / SCALE. One pair per channel: OFFSET,SCALE/OFFSET,SCALE/...; where '
                 'their scales differ, --sigmas are in network units. "channel": mean and 2 std of each channel  [default: mean, 2 std]'),
    click.option('--stabilise', type=Spec('training.estimation.stabilise:STABILISERS'),
                 help='For counts of photons or other events: store their square roots as --stabilise=help says, whose noise has the same '
                 'level everywhere; generate.py and denoise.py give back counts (docs/counts.md)'),
)
ANNOTATIONS = group(
    'Labels and noise levels',
    click.option('--labels', metavar='FILE', type=click.Path(exists=True, dir_okay=False),
                 help='CSV (file,label), JSON or .npy with one class or vector per image, in place of the labels of the source'),
    click.option('--captions', metavar='FILE', type=click.Path(exists=True, dir_okay=False),
                 help='Captions of the images: .csv (file,caption), .json, or .txt with one per line; the command captions makes labels of '
                 'them'),
    click.option('--sigmas', metavar='FILE|NUMBER|auto', help='Noise std that the images already have: CSV, JSON, .npy, or one number; '
                 'in the units of the source, for 8-bit images in those of [-1,1]; "auto" measures one level for all of them'),
    click.option('--sigma-min', metavar='FILE|NUMBER', help='Lowest noise level to train each image at, for images that are wrong below it '
                 '(blurred ones, for example); given like --sigmas; null in JSON: no limit'),
    click.option('--sigma-max', metavar='FILE|NUMBER', help='Highest noise level to train each image at; given like --sigmas; '
                 'inf, or null in JSON: no limit'),
)
OUTPUT = group(
    'Output',
    click.option('--dest', metavar='PATH', required=True,
                 help='Where to write: a .zip, a folder (a name without an extension), or an .npz (implies --packed)'),
    click.option('--packed', is_flag=True, help='Write one array that training need not decode, as an .npz or a folder'),
    click.option('--sheet', metavar='FILE',
                 help='Contact sheet of some of the images, a .png, or "none"  [default: NAME-sheet.png beside --dest]'),
    click.option('--workers', metavar='INT', type=click.IntRange(min=1), help='Number of processes  [default: one per core]'),
)


@main.command(cls=Command)
@SOURCE
@PIXELS
@ANNOTATIONS
@OUTPUT
def convert(**options):
    """Convert images: 8-bit ones to PNG, all others (16-bit, float) to float32 .npy with the units that map them back.

    Labels come from class folders, or from a dataset.json in the source, which takes precedence. MNIST keeps its 28x28 pixels."""
    from training.data.convert.conversion import convert as convert_images
    for line in convert_images(options):
        click.echo(line)


# ----------------------------------------------------------------------------------------------------
# Latents


@main.command(cls=Command)
@click.option('--source', metavar='DATA', required=True, help='8-bit pictures, a data set that this program has written')
@click.option('--vae', metavar='REF', required=True,
              help='Autoencoder: a folder or Hugging Face name of an AutoencoderKL, such as stabilityai/sd-vae-ft-mse')
@click.option('--dest', metavar='PATH', required=True, help='Where to write the packed set of latents: a folder, or an .npz')
@click.option('--form', type=click.Choice(['distribution', 'mean']), metavar='distribution|mean', default='distribution', show_default=True,
              help='distribution: mean and std, of which each visit draws a sample; mean: the mean alone')
@click.option('--statistics', metavar='measured|sd|edm2|DATA', default='measured', show_default=True,
              help='Units of the network: mean and 2 std of each channel; the constants of Stable Diffusion or EDM2; or those of another '
              'set of latents')
@click.option('--range', type=click.Choice(['-1..1', '0..1']), metavar='-1..1|0..1',
              help='Values of pixels that the autoencoder sees  [default: those of --statistics, for measured ones -1..1]')
@click.option('--xflip', is_flag=True, help='Also store the latents of the mirrored pictures, for train.py --xflip=1')
@click.option('--sigma-min', metavar='FILE|NUMBER', help='Lowest noise level to train each image at, in network units of the latents; '
              'given like --sigmas of convert')
@click.option('--sigma-max', metavar='FILE|NUMBER', help='Highest noise level to train each image at, in the same units')
@click.option('--device', metavar='DEVICE', help='Device to encode on, such as cuda or cpu  [default: the GPU, if there is one]')
def encode(**options):
    """Encode pictures as latents of an autoencoder, which train.py reads and whose samples generate.py decodes."""
    from torch_utils import distributed
    from training.data.convert.encode import encode as encode_pictures
    from training.networks.autoencoder import open_coder
    options['device'] = distributed.pick_device(options['device'])
    for line in encode_pictures(options, open_coder):
        click.echo(line)


# ----------------------------------------------------------------------------------------------------
# Describing and checking an archive


@main.command(cls=Command)
@click.argument('data', metavar='DATA')
@click.option('--sigma', metavar='FLOAT', type=click.FloatRange(min=0, min_open=True), help='Noise level to print the SNR at')
def stats(data, sigma):
    """Print count, shape, range, sigma_data, classes, noise levels, and the SNR at a noise level."""
    from training.data.convert.statistics import describe
    for line in describe(data, sigma):
        click.echo(line)


@main.command(cls=Command)
@click.argument('data', metavar='DATA')
def check(data):
    """Look for problems that would stop training: decode every image, and compare dataset.json with the images.

    Prints one line per problem, with the name of the file; the exit code is 1 if there are any."""
    from training.data.convert.checking import check as check_archive
    if not check_archive(data, click.echo):
        raise SystemExit(1)


# ----------------------------------------------------------------------------------------------------
# Captions

CAPTIONS = group(
    'Captions',
    click.option('--source', metavar='DATA', required=True, help='Data set: a zip, folder or packed set that this tool has written'),
    click.option('--dest', metavar='DATA', help='Where to write a copy with the labels  [default: the source itself is changed]'),
    click.option('--captions', metavar='FILE', type=click.Path(exists=True, dir_okay=False),
                 help='Captions: .csv (file,caption), .json, or .txt with one per line in the order of the images  [default: those that '
                 'the data set holds]'),
    click.option('--text-encoder', metavar='REF', required=True, help='Text model of the package transformers: a folder, or a name of the '
                 'Hugging Face Hub, owner/name[@revision]'),
    click.option('--tokens', metavar='INT', type=click.IntRange(min=1),
                 help='Store the vectors of this many tokens per caption, for networks that take sequences  [default: one pooled vector of '
                 'norm 1]'),
    click.option('--device', metavar='DEVICE', help='Device of the text encoder, such as cuda or cpu  [default: the GPU, if there is one]'),
)


@main.command(cls=Command)
@CAPTIONS
def captions(**options):
    """Embed the captions of a data set with a text encoder, and store the embeddings as its labels (docs/text.md)."""
    from training.data.convert.captions import embed
    for line in embed(options):
        click.echo(line)


# ----------------------------------------------------------------------------------------------------
# Noise levels


def noise_methods(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """--method: one of the METHODS of the estimators, which are listed where they are."""
    from training.data.convert.noise import METHODS
    if value not in METHODS:
        raise click.BadParameter(f'"{value}" is not one of {", ".join(METHODS)}')
    return value


NOISE = group(
    'Noise levels',
    click.option('--law', type=click.Choice(['gaussian', 'rician']), metavar='gaussian|rician', default='gaussian', show_default=True,
                 help='rician: magnitude images, whose sigma is measured in their background'),
    click.option('--method', metavar='NAME', default='auto', show_default=True, callback=noise_methods,
                 help='pooled (images that share a level); immerkaer, mad or weak (single images); spectral, pairs or dark (with the '
                 'option of that purpose); auto: what fits the other options'),
    click.option('--group', metavar='set|class|image|sigmas|FILE', default='set', show_default=True,
                 help='Which images share a level: all, those of a class, none, those with the same "sigmas"; or a CSV, JSON or .npy file '
                 'with the group of each image'),
    click.option('--clean', metavar='DATA', help='Clean images of the same kind, to compare spectra with'),
    click.option('--pairs', metavar='DATA', help='A second exposure of each image, in the same order'),
    click.option('--dark', metavar='DATA', help='Dark frames of the same camera'),
    click.option('--plot', metavar='FILE.png', help='Picture of levels, variance against intensity, spectrum, and the most and least '
                 'noisy images'),
    click.option('--json', is_flag=True, help='Print everything as JSON'),
    click.option('--write', is_flag=True, help='Write the levels into the data set, as "sigmas"'),
    click.option('--overwrite', is_flag=True, help='Replace the levels that it has'),
)


@main.command(cls=Command)
@click.argument('data', metavar='DATA')
@NOISE
def noise(**options):
    """Estimate how noisy the images of a data set are, and whether their noise is white (docs/noise.md)."""
    from training.data.convert.noise import noise as measure_noise
    for line in measure_noise(options):
        click.echo(line)


# ----------------------------------------------------------------------------------------------------
# Levels at which imperfect images may be used

IMPERFECT = group(
    'Sets',
    click.option('--clean', metavar='DATA', required=True, help='Clean images: a data set that this tool has written'),
    click.option('--data', metavar='DATA', required=True, help='Imperfect images of the same kind and size: blurred, compressed, foreign'),
    click.option('--dest', metavar='DATA', help='Where to write an annotated copy  [default: --data itself is changed]'),
)
LIMITS = group(
    'Limits',
    click.option('--limit', type=click.Choice(['sigma_min', 'sigma_max']), metavar='sigma_min|sigma_max', default='sigma_min',
                 show_default=True, help='What to find: the level above which images that are wrong in their details may be used, or up to '
                 'which images that are right in their details only, such as crops'),
    click.option('--method', type=click.Choice(['spectral', 'classifier']), metavar='spectral|classifier', default='spectral',
                 show_default=True, help='Compare means and covariances, in seconds; or train a classifier of noisy images'),
    click.option('--threshold', type=Number(above=0, most=0.499), default=0.45, show_default=True,
                 help='Mean P(clean) of imperfect images from which they count as alike'),
    click.option('--per', type=click.Choice(['set', 'class', 'image']), metavar='set|class|image', default='set', show_default=True,
                 help='One limit for the set, for each class, or for each image (classifier)'),
    click.option('--levels', type=click.IntRange(min=8, max=1024), metavar='INT', default=64, show_default=True,
                 help='Noise levels at which images are compared'),
    click.option('--noise', type=Spec('training.diffusion.noise:NOISE'), default='lognormal', show_default=True,
                 help='Distribution of noise levels in training, of train.py --noise'),
    click.option('--white-noise', type=click.Choice(['auto', 'ignore']), metavar='auto|ignore', default='auto', show_default=True,
                 help='auto: where white noise alone tells the images from clean ones, write it as sigmas, in place of a sigma_min'),
    click.option('--seed', type=click.IntRange(min=0), metavar='INT', default=0, show_default=True, help='Random seed'),
)
CLASSIFIER = group(
    'Classifier',
    click.option('--folds', type=click.IntRange(min=2, max=100), metavar='INT', default=2, show_default=True,
                 help='Classifiers, each of which labels a part of the images that it was not trained on'),
    click.option('--arch', type=Spec('training.annotation.classifier:ENCODERS'), default='half_unet', show_default=True,
                 help='Network; --arch=help lists its keys'),
    click.option('--kimg', type=Number(above=0), default=5000, show_default=True, help='Length of each training in thousand noisy images'),
    click.option('--batch', type=click.IntRange(min=2), metavar='INT', default=256, show_default=True, help='Images per training step'),
    click.option('--lr', type=Number(above=0), default=1e-3, show_default=True, help='Highest learning rate'),
    click.option('--batch-gpu', type=click.IntRange(min=1), metavar='INT', default=1024, show_default=True,
                 help='Noisy images that a GPU labels together'),
    click.option('--device', metavar='DEVICE', help='Device, such as cuda or cpu  [default: the GPU, if there is one]'),
)
REPORTS = group(
    'Results',
    click.option('--report', metavar='FILE', help='JSON of everything found, or "none"  [default: NAME-annotation.json beside the data]'),
    click.option('--sheet', metavar='FILE', help='Images at their limits, .png, or "none"  [default: NAME-annotation.png beside the data]'),
    click.option('--plot', metavar='FILE', help='P(clean) over sigma, a .png (needs matplotlib)'),
)


@main.command(cls=Command)
@IMPERFECT
@LIMITS
@CLASSIFIER
@REPORTS
def annotate(**options):
    """Find the noise levels at which imperfect images are as good as clean ones, and write their sigma_min (docs/annotate.md)."""
    from training.annotation.annotate import annotate as annotate_images
    for line in annotate_images(options):
        click.echo(line)


if __name__ == '__main__':
    main()
