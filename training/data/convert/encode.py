# SPDX-License-Identifier: Apache-2.0
"""A data set of pictures -> a packed one of their latents, with units and the autoencoder's name and digest (dataset_tool.py encode).

The bytes depend on the pictures, the autoencoder and the options: a second encode writes the same."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.cpus import cpu_count
from dnnlib.progress import Progress
from torch_utils import numerics
from training.data import tables
from training.data.convert.annotations import lower_limits, read_levels
from training.data.convert.statistics import Summary, facts_of_dataset, lines, measure
from training.data.convert.transforms import SIGMA_DATA
from training.data.convert.writers import packed_dest
from training.data.dataset import ImageDataset
from training.data.packed import EMPTY, PackedFolder, new_packed

BLOCK = 64  # pictures that are decoded and encoded together
# --statistics: (range of the autoencoder's pixels, units). Stable Diffusion multiplies latents by 0.18215 (Rombach et al. 2022); EDM2
# gives each channel mean 0 and std 0.5 (Karras et al. 2024).
CONSTANTS = {'sd': ('-1..1', {'offset': 0.0, 'scale': 1 / 0.18215}),
             'edm2': ('0..1', {'offset': [5.81, 3.25, 0.12, -2.15], 'scale': [std / 0.5 for std in (4.17, 4.62, 3.71, 3.28)]})}
MEASURED = 'measured'
NOT_WHITE = ('--source={}: its images carry white noise ("sigmas"), which the autoencoder correlates and makes depend on the '
             'picture, so that the ambient loss does not apply; leave the noisy ones out, or give --sigma-min, the level of '
             'latents above which images are used')


def encode(o: dict, open_coder: Callable) -> Iterator[str]:
    """Writes --dest for the options of the command line, a dict; yields lines of text to print. open_coder(description, device): of
    networks/autoencoder.py. Raises UserError."""
    numerics.set_numerics()
    dest = packed_dest(o['dest'])
    dataset = open_pictures(o)
    range, units = choose_units(o)
    coder = open_coder({'ref': os.path.abspath(o['vae']) if os.path.isdir(o['vae']) else o['vae'], 'range': range}, o['device'])
    check(dataset, coder, units, o)
    if told := replaced(dataset, o):
        yield told
    height, width = (side // coder.factor for side in dataset.image_shape[1:])
    stored = (coder.channels * (2 if o['form'] == 'distribution' else 1), height, width)
    copies = 2 if o['xflip'] else 1
    os.makedirs(os.path.dirname(dest), exist_ok=True)
    began = time.monotonic()
    with new_packed(dest, stored, np.float32) as folder:
        summary = write(folder, dataset, coder, o)
        units = units or {'offset': summary.mean.tolist(), 'scale': np.where(summary.std > 0, summary.std / SIGMA_DATA, 1.0).tolist()}
        columns = {key: np.concatenate([values] * copies) for key, values in columns_of(dataset, o, units).items()}
        told = {'autoencoder': coder.described, 'form': o['form'], 'xflip': o['xflip'], 'picture_shape': list(dataset.image_shape)}
        captions = dataset.contents.captions()
        text = {'text': dataset.text} if dataset.text else {}
        folder.finish(columns | ({EMPTY: dataset.empty[None]} if text else {}), captions and captions * copies, units=units, latents=told,
                      **text)
    seconds = max(time.monotonic() - began, 1e-9)
    made = ImageDataset(dest)
    yield from lines(summary, facts_of_dataset(ImageDataset(dest, use_labels=made.has_labels, xflip=o['xflip'])))
    yield f'{o["dest"]}: latents of {len(dataset)} pictures{", and of each mirrored" * o["xflip"]}, {summary.count / seconds:.1f} img/s'


def open_pictures(o: dict) -> ImageDataset:
    """The 8-bit pictures of --source, with their labels. Raises UserError."""
    dataset = ImageDataset(o['source'])
    if dataset.has_labels:
        dataset = ImageDataset(o['source'], use_labels=True)
    if dataset.latents is not None:
        raise UserError(f'--source={o["source"]}: holds latents already; encode the pictures')
    if dataset.is_float:
        raise UserError(f'--source={o["source"]}: holds float data, and an autoencoder takes 8-bit pictures')
    return dataset


def choose_units(o: dict) -> tuple[str, dict | None]:
    """(range, units or None where they are to be measured) that --statistics and --range name. Raises UserError."""
    name, range = o['statistics'], o['range']
    if name == MEASURED:
        return range or '-1..1', None
    if name in CONSTANTS:
        own, units = CONSTANTS[name]
        where = f'--statistics={name}: is of latents of pixels in {own}'
    elif os.path.exists(name):
        other = ImageDataset(name)
        if other.latents is None:
            raise UserError(f'--statistics={name}: holds no latents; name a set that encode has written')
        own, units = other.latents.autoencoder['range'], other.units
        where = f'--statistics={name}: holds latents of pixels in {own}'
    else:
        raise UserError(f'--statistics={name}: expected {MEASURED}, {", ".join(CONSTANTS)}, or the path of a set of latents')
    if range not in (None, own):
        raise UserError(f'{where}, and --range={range}; leave --range out')
    return own, units


def check(dataset: ImageDataset, coder, units: dict | None, o: dict) -> None:
    """Refuses pictures that the autoencoder cannot take, and units of another number of channels."""
    channels, height, width = dataset.image_shape
    if channels != coder.image_channels:
        raise UserError(f'--source={o["source"]}: its pictures have {channels} channels, and --vae={o["vae"]} takes '
                        f'{coder.image_channels}; convert them with dataset_tool.py --channels')
    if height % coder.factor or width % coder.factor:
        raise UserError(f'--source={o["source"]}: its pictures have {height}x{width} pixels, and the sides must be multiples of '
                        f'{coder.factor} for --vae={o["vae"]}; convert them with dataset_tool.py --resolution')
    if units is not None and np.size(units['scale']) not in (1, coder.channels):
        raise UserError(f'--statistics={o["statistics"]}: has {np.size(units["scale"])} channels, and the latents of --vae={o["vae"]} have '
                        f'{coder.channels}')


def replaced(dataset: ImageDataset, o: dict) -> str | None:
    """Refuses levels of the pictures, which do not hold for latents, unless the command line has others; a line about those it drops."""
    noisy = int((dataset.native_sigma > 0).sum())
    if noisy and not o['sigma_min']:
        raise UserError(NOT_WHITE.format(o['source']))
    for key in ('sigma_min', 'sigma_max'):
        if dataset.contents.has(key) and not o[key]:
            option = f'--{key.replace("_", "-")}'
            raise UserError(f'--source={o["source"]}: has {key} in units of pixels, which do not hold for latents; give {option}, in '
                            'network units of the latents')
    return f'{noisy} of {len(dataset)} pictures carry white noise; as latents they are used above --sigma-min' if noisy else None


def columns_of(dataset: ImageDataset, o: dict, units: dict) -> dict:
    """{key: array} of the labels of the pictures and the limits of the command line, which are in network units."""
    found = {}
    if dataset.label_table is not None:
        found['labels'] = dataset.label_table.astype(np.int64) if dataset.label_table.ndim == 1 else dataset.label_table
    names = [dataset.image_name(i) for i in dataset.raw_idx]
    for key in ('sigma_min', 'sigma_max'):
        if o[key]:
            values = read_levels(o[key], f'--{key.replace("_", "-")}', key, names)
            values = lower_limits(values, names) if key == 'sigma_min' else values
            try:
                limits = tables.CHECKS[key](values, names)
            except ValueError as err:
                raise UserError(f'--{key.replace("_", "-")}={o[key]}: {err}') from None
            found[key] = limits * tables.level_scale(units)
    return found


def write(folder: PackedFolder, dataset: ImageDataset, coder, o: dict) -> Summary:
    """Encodes all pictures, and then all of them mirrored where --xflip asks for it; returns the Summary of the latents."""
    distribution, summary = o['form'] == 'distribution', Summary()
    copies, total = (2 if o['xflip'] else 1), len(dataset)
    out = folder.allocate(copies * total)
    with ThreadPoolExecutor(cpu_count()) as pool, Progress(copies * total, 'Encoding') as bar:
        for mirrored in range(copies):
            for first in range(0, total, BLOCK):
                pictures = np.stack([*pool.map(dataset.decode, dataset.raw_idx[first:first + BLOCK])])
                pictures = torch.from_numpy(np.ascontiguousarray(pictures[..., ::-1]) if mirrored else pictures)
                mean, std = coder.encode(pictures)
                latents = (torch.cat([mean, std], dim=1) if distribution else mean).numpy()
                if not np.isfinite(latents).all():
                    raise UserError(f'--vae={o["vae"]}: the latents of {dataset.image_name(first)} or one of the {len(latents)} pictures '
                                    'from there are not finite')
                out[mirrored * total + first:mirrored * total + first + len(latents)] = latents
                for one in latents:
                    summary.add(measure(one, distribution))
                bar.update(len(latents))
    out.flush()
    return summary
