# SPDX-License-Identifier: Apache-2.0
"""Measures how likely a network finds given images: bits per dimension by the probability-flow ODE.

python eval_nll.py --network=NAME --data=cifar-test.zip --split=test --num=1000
torchrun --standalone --nproc_per_node=8 eval_nll.py --network=NAME --data=cifar-test.zip --split=test"""

import hashlib
import json
import math
import os

import click
import numpy as np
import torch
from tqdm import tqdm

import dnnlib
from metrics.likelihood import log_likelihood
from torch_utils import distributed, misc
from torch_utils.command_line import Command, Number, version_option
from training import hub
from training.dataset import ImageDataset

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5  # EDM's, where neither the options nor the network say otherwise
POSITIVE, COUNT = Number(above=0), click.IntRange(min=1)


@click.command(cls=Command)
@click.option('--network', help='Snapshot folder, training-state .pt, or Hugging Face name', metavar='REF', required=True)
@click.option('--data', help='Images: a zip or folder, such as dataset_tool.py makes', metavar='PATH', required=True)
@click.option('--split', help='Which part of the data set this is (train, test, ...); kept in the result', metavar='NAME')
@click.option('--num', '--num-images', 'num', metavar='INT', type=COUNT,
              help='How many images, the first in sorted order; under torchrun write --num-images  [default: all]')
@click.option('--cond', metavar='BOOL', type=bool, help='Give the network the labels of the data  [default: if it takes labels]')
@click.option('--trace', type=click.Choice(['hutchinson', 'exact']), default='hutchinson', show_default=True,
              help='Trace of dD/dx: estimated with random probes, or exact, at as many backward passes as an image has numbers')
@click.option('--probes', metavar='INT', type=COUNT, default=1, show_default=True,
              help='Probes an image, averaged; more make single images\' values more exact')
@click.option('--repeats', metavar='INT', type=COUNT, default=1, show_default=True,
              help='Draws of dequantisation noise and probes an image, averaged')
@click.option('--sigma-min', metavar='FLOAT', type=POSITIVE, help='Where the density is taken  [default: 0.002, or the network\'s own]')
@click.option('--sigma-max', metavar='FLOAT', type=POSITIVE, help='Where the prior stands  [default: 80, or the network\'s own]')
@click.option('--sigma-data', metavar='FLOAT', type=POSITIVE,
              help='Data std: the prior is N(0, sigma_max^2 + sigma_data^2)  [default: the network\'s own]')
@click.option('--rtol', metavar='FLOAT', type=POSITIVE, default=1e-5, show_default=True, help='Relative tolerance of the solver')
@click.option('--atol', metavar='FLOAT', type=POSITIVE, default=1e-5, show_default=True, help='Absolute tolerance, for values of unit size')
@click.option('--max-steps', metavar='INT', type=COUNT, default=2000, show_default=True, help='More steps than this for one image: stop')
@click.option('--seed', metavar='INT', type=click.IntRange(min=0), default=0, show_default=True, help='Of dequantisation and probes')
@click.option('--weights', type=click.Choice(['ema', 'raw']), default='ema', show_default=True,
              help='Which weights of a training state')
@click.option('--batch', '--batch-size', 'batch', metavar='INT', type=COUNT, default=64, show_default=True,
              help='Images at a time on each rank; changes no value')
@click.option('--threads', metavar='INT', type=COUNT, help='CPU threads of each rank; equal values need equal threads')
@click.option('--device', metavar='DEVICE', help='Such as cuda or cpu  [default: the GPU of the rank, if it has one]')
@click.option('--per-image', metavar='NPZ', help='Also each image\'s own values, in this file')
@click.option('--out-path', metavar='JSON', help='Where the result goes  [default: beside the network, NETWORK.nll.json]')
@version_option
def main(**options):
    """Bits per dimension of images under a network: -log2 p / (C H W) of 8-bit images with uniform dequantisation.

    Float images have no grey levels: theirs is the differential figure, in the units of the data."""
    o = dnnlib.EasyDict(options)
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init()
    run(o)


def run(o):
    """Reads, measures, prints, and writes the JSON."""
    out_path = o.out_path or default_path(o.network, '.nll.json')
    for path, option, suffix in ((out_path, '--out-path', '.json'), (o.per_image, '--per-image', '.npz')):
        if path:
            prepare_output(path, option, suffix)
    net = hub.load_network(o.network, device=distributed.pick_device(o.device), weights=o.weights)
    net.compute_dtype = torch.float32  # half precision rounds the trace away
    dataset, conditional = open_data(net, o)
    items = choose_items(dataset, o)
    flow = flow_options(net, o)
    found = measure(net, dataset, items, conditional, flow, o)
    if distributed.rank() == 0:
        offset = math.log2(dataset.units['scale'] if dataset.units else 127.5)
        per_image = {'raw_idx': dataset.raw_idx[items], 'bits_per_dim': found['bits'] + offset,
                     'evaluations': found['evaluations'].astype(np.int64)}
        result = {**summary(per_image, dataset), **provenance(net, dataset, items, conditional, flow, offset, o)}
        write(result, per_image, out_path, o)


def open_data(net, o):
    """(ImageDataset, whether the network is given its labels), of the network's shape and units."""
    conditional = bool(net.label_dim) if o.cond is None else o.cond
    if conditional and not net.label_dim:
        raise click.ClickException('--cond=1: the network takes no labels; leave the option out')
    dataset = ImageDataset(o.data, use_labels=conditional)
    height, width = (net.img_resolution,) * 2 if isinstance(net.img_resolution, int) else net.img_resolution
    expected = [net.img_channels, height, width]
    if list(dataset.image_shape) != expected:
        raise click.ClickException(f'--data={o.data}: its images are {list(dataset.image_shape)}, the network makes {expected} '
                                   '[C,H,W]; convert them with dataset_tool.py')
    if dataset.units != net.units:
        raise click.ClickException(f'--data={o.data}: its units are {dataset.units or "8-bit"}, those of the network '
                                   f'{net.units or "8-bit"}; convert it like the training data')
    if dataset.label_dim > net.label_dim or (conditional and dataset.classes is None and dataset.label_dim != net.label_dim):
        raise click.ClickException(f'--data={o.data}: its labels have {dataset.label_dim} dimensions, those of the network '
                                   f'{net.label_dim}; number the classes as in the training data, or use --cond=0')
    return dataset, conditional


def choose_items(dataset, o):
    """The items that are evaluated, int64: the first --num of those without noise of their own."""
    clean = np.flatnonzero(dataset.native_sigma == 0)
    if not len(clean):
        raise click.ClickException(f'--data={o.data}: all {len(dataset)} images carry noise ("sigmas" in dataset.json); the '
                                   'likelihood is that of clean images')
    if len(clean) < len(dataset):
        distributed.print0(f'{len(dataset) - len(clean)} of {len(dataset)} images carry noise and are left out')
    option = '--num' if distributed.size() == 1 else '--num-images'  # torchrun takes --num for its own --numa-binding
    if o.num is not None and o.num > len(clean):
        raise click.ClickException(f'{option}={o.num}: --data={o.data} holds only {len(clean)} clean images; pass '
                                   f'{option}={len(clean)} or less')
    return clean[:o.num]


def flow_options(net, o):
    """The levels and tolerances of log_likelihood; the range lies within the network's."""
    sigma_min = o.sigma_min or max(SIGMA_MIN, net.sigma_min)
    sigma_max = o.sigma_max or min(SIGMA_MAX, net.sigma_max)
    if not net.sigma_min <= sigma_min < sigma_max <= net.sigma_max:
        raise click.ClickException(f'--sigma-min={sigma_min:g} --sigma-max={sigma_max:g}: must rise, within the range of the '
                                   f'network, {net.sigma_min:g} to {net.sigma_max:g}')
    return dict(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=o.sigma_data or getattr(net, 'sigma_data', SIGMA_DATA),
                rtol=o.rtol, atol=o.atol, max_steps=o.max_steps)


def measure(net, dataset, items, conditional, flow, o):
    """{name: [repeats, N]} on every rank: bits per dimension in network units, and network evaluations."""
    found = {name: torch.zeros([o.repeats, len(items)], dtype=torch.float64) for name in ('bits', 'evaluations')}
    bits = math.prod(dataset.image_shape) * math.log(2)
    mine, error = np.arange(len(items))[distributed.rank()::distributed.size()], None
    with tqdm(total=o.repeats * len(mine), unit='img', desc='rank 0' if distributed.size() > 1 else None, smoothing=0,
              disable=True if distributed.rank() else None) as bar:
        try:
            for repeat in range(o.repeats):
                for rows in (mine[first:first + o.batch] for first in range(0, len(mine), o.batch)):
                    batch = read_batch(net, dataset, items[rows], repeat, conditional, o)
                    part = log_likelihood(net, **batch, **flow, progress=bar.update)
                    found['bits'][repeat, rows] = -part.log_p.cpu() / bits
                    found['evaluations'][repeat, rows] = part.evaluations.cpu().double()
        except (ValueError, click.ClickException) as err:
            error = getattr(err, 'message', f'--network={o.network}: {err}')
    errors = [message for message in distributed.all_values(error) if message]
    if errors:
        raise click.ClickException(errors[0])
    return {name: distributed.all_sum(values.to(distributed.device())).cpu().numpy() for name, values in found.items()}


def read_batch(net, dataset, items, repeat, conditional, o):
    """x, probes and class_labels of log_likelihood. The random numbers are functions of (seed, repeat, place in the archive)."""
    device = distributed.pick_device(o.device)
    raw_idx = dataset.raw_idx[items]
    x = dataset.to_network(np.stack([dataset.decode(i) for i in raw_idx])).double()
    if dataset.units is None:
        # Grey level u stands for [u - 1/2, u + 1/2): so a network's output is rounded to it.
        noise = [torch.rand(dataset.image_shape, generator=misc.generator(o.seed, 'dequantisation', repeat, i), dtype=torch.float64)
                 for i in raw_idx]
        x += (torch.stack(noise) - 0.5) / 127.5
    probes = None
    if o.trace == 'hutchinson':
        shape = [o.probes, *dataset.image_shape]
        probes = torch.stack([torch.randint(2, shape, generator=misc.generator(o.seed, 'probes', repeat, i), dtype=torch.int8) * 2 - 1
                              for i in raw_idx]).to(device)
    labels = None
    if conditional:
        labels = torch.zeros([len(items), net.label_dim])  # a split may lack the highest classes
        labels[:, :dataset.label_dim] = torch.from_numpy(dataset.labels(items))
    return dict(x=x.to(device), probes=probes, class_labels=labels if labels is None else labels.to(device))


def summary(per_image, dataset):
    """The numbers of the result: means over images, their standard error, and the spread of the means over repeats."""
    values = per_image['bits_per_dim']
    means, images = values.mean(axis=1), values.mean(axis=0)
    name = 'bits_per_dim' if dataset.units is None else 'differential_bits_per_dim'
    return {name: misc.as_float(values.mean()),
            'standard_error': misc.as_float(images.std(ddof=1) / math.sqrt(len(images))) if len(images) > 1 else None,
            'std_over_repeats': misc.as_float(means.std(ddof=1)) if len(means) > 1 else None,
            'evaluations_per_image': float(per_image['evaluations'].mean())}


def provenance(net, dataset, items, conditional, flow, offset, o):
    """What decides the numbers."""
    return {
        'method': 'probability-flow ODE, Dormand-Prince 5(4)',
        'num_images': len(items),
        'found_images': len(dataset),
        'data': {'path': o.data, 'split': o.split, 'image_shape': list(dataset.image_shape),
                 'sha256': dnnlib.util.file_digest(o.data) if os.path.isfile(o.data) else None},
        'network': {'ref': o.network, 'weights': o.weights, 'state_sha256': state_digest(net), 'config': net.config},
        'conditional': conditional,
        'dequantisation': 'none' if dataset.units else '(u + U[0,1) - 1/2) / 127.5 - 1',
        'offset_bits': offset,
        'prior_variance': flow['sigma_max'] ** 2 + flow['sigma_data'] ** 2,
        'flow': flow,
        'device': str(distributed.pick_device(o.device)),
        'ranks': distributed.size(),
        'versions': misc.versions(),
        'options': dict(o),
    }


def write(result, per_image, out_path, o):
    """Files and table."""
    with dnnlib.replacing(out_path) as part, open(part, 'w', encoding='utf-8') as f:
        json.dump(result, f, indent=2, allow_nan=False)
    if o.per_image:
        with dnnlib.replacing(o.per_image) as part, open(part, 'wb') as f:
            np.savez(f, **per_image)
    for name in ('bits_per_dim', 'differential_bits_per_dim', 'standard_error', 'std_over_repeats', 'evaluations_per_image'):
        if result.get(name) is not None:
            print(f'{name:<26} {result[name]:.4f}')
    what = ', '.join(filter(None, [o.data, o.split and f'split {o.split}', f'{result["num_images"]} images', f'seed {o.seed}']))
    print(f'{"of":<26} {what}')
    print(f'{"under":<26} {o.network} ({o.weights}), sigma {result["flow"]["sigma_min"]:g} to {result["flow"]["sigma_max"]:g}')
    print(f'written to {", ".join(filter(None, [out_path, o.per_image]))}')


def state_digest(net):
    """SHA-256 of the network's tensors in the order of their names, wherever and however they are kept."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        sha.update(f'{name} {value.dtype} {list(value.shape)}'.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def default_path(network, suffix):
    """Beside a network that lies on this machine, in the working folder for one of the Hub."""
    return (os.path.abspath(network) if os.path.exists(network) else network.replace('/', '--')) + suffix


def prepare_output(path, option, suffix):
    """Makes the folder, and refuses a path that cannot become a file, before hours are spent."""
    if os.path.isdir(path) or not path.endswith(suffix):
        raise click.ClickException(f'{option}={path}: expected the name of a file that ends in {suffix}')
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise click.ClickException(f'{option}={path}: the folder {folder} is not writable')


if __name__ == '__main__':
    main()
