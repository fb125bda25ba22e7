# SPDX-License-Identifier: Apache-2.0
"""Denoising of pictures by trained networks, beside the best linear denoiser of the training set and the classical ones of scikit-image.

python benchmarks/denoising.py --network=REF --data=held-out.zip --train=train.zip --sigma=0.2,0.4 --num=100 --samples=8

The noise is white, and not clipped. Without scikit-image its rows are left out. --network may be repeated."""

import functools
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.files import write_json  # noqa: E402 (the folder above had to be found first)
from metrics.report import print_columns  # noqa: E402
from torch_utils import misc  # noqa: E402
from torch_utils.command_line import Command, FloatList  # noqa: E402
from training.checkpoints.load import load_network  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402
from training.restoration import quality  # noqa: E402
from training.restoration.posterior import Estimate, Method, Noisy, estimates  # noqa: E402
from training.sampling.generate import resolution  # noqa: E402

TV_WEIGHTS = (0.25, 0.5, 0.75, 1.0, 1.5)  # of total variation, in units of sigma; the best is shown


class Linear(torch.nn.Module):
    """E[x_0 | x] of Gaussian data with the mean and covariance of images: the best linear denoiser (Wiener filter)."""

    label_dim, sigma_min, text, units = 0, 0.0, None, None

    def __init__(self, images):
        super().__init__()
        _, self.img_channels, *self.img_resolution = images.shape
        flat = images.flatten(1).double()
        self.mean = flat.mean(0)
        values, self.axes = torch.linalg.eigh((flat - self.mean).T @ (flat - self.mean) / len(flat))
        self.values = values.clamp(min=0)

    def forward(self, x, sigma, class_labels=None):
        level = misc.batched(sigma).reshape(-1, 1).double() ** 2
        kept = (x.flatten(1).double() - self.mean) @ self.axes * (self.values / (self.values + level))
        return (self.mean + kept @ self.axes.T).reshape(x.shape)


def read(path, num):
    """The first pictures of a set in network units, float32 [N,C,H,W]."""
    dataset = ImageDataset(path, max_size=None)
    return dataset.to_network(np.stack([dataset.decode(i) for i in range(min(num or len(dataset), len(dataset)))]))


def classical(sigma):
    """{name: [function of a picture [C,H,W]]} of scikit-image, each told sigma; of several functions the best counts. {} without it."""
    try:
        from skimage import restoration
    except ImportError:
        print('scikit-image is not installed (pip install scikit-image): its denoisers are left out')
        return {}

    def of(function, **keys):
        def denoise(y):
            found = function(np.ascontiguousarray(y.transpose(1, 2, 0)), channel_axis=-1, **keys)
            return found.reshape(*y.shape[1:], len(y)).transpose(2, 0, 1)
        return denoise

    return {'non-local means': [of(restoration.denoise_nl_means, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma)],
            'wavelets (BayesShrink)': [of(restoration.denoise_wavelet, sigma=sigma, method='BayesShrink', rescale_sigma=True)],
            'total variation, best weight': [of(restoration.denoise_tv_chambolle, weight=weight * sigma) for weight in TV_WEIGHTS]}


def measured(found, clean, samples=0):
    """{psnr, ssim, coverage, noise}: means over pictures. found: [Estimate]."""
    pairs = list(zip(found, clean))
    means = {name: float(np.mean([measure(one.mean, x) for one, x in pairs]))
             for name, measure in (('psnr', quality.psnr), ('ssim', quality.ssim))}
    if samples > 1:
        means['coverage'] = float(np.mean([quality.coverage(one.mean, one.std, x, samples) for one, x in pairs]))
        means |= {key: float(np.mean([getattr(one, key) for one in found])) for key in ('noise', 'apart')}
    return means


def by_functions(functions, y, clean):
    """[Estimate] of the function that is best."""
    found = [[Estimate(index, function(image)) for index, image in enumerate(y)] for function in functions]
    return max(found, key=lambda one: measured(one, clean)['psnr'])


def by_network(net, y, sigma, overlap, samples):
    """[Estimate] of a network."""
    overlap = min(resolution(net)) // 2 if overlap is None else overlap
    noisy = [Noisy(index, image, sigma, None) for index, image in enumerate(y)]
    return list(estimates(net, noisy, Method(samples=samples, overlap=overlap)))


@click.command(cls=Command)
@click.option('--network', required=True, multiple=True, metavar='REF', help='Networks to compare')
@click.option('--data', required=True, metavar='PATH', help='Clean 8-bit pictures that the networks were not trained on')
@click.option('--train', metavar='PATH', help='Clean pictures of the network\'s size, whose best linear denoiser is shown')
@click.option('--sigma', type=FloatList(), default='0.2,0.4', show_default=True, metavar='LIST', help='Levels, network units')
@click.option('--stated', type=FloatList(), default='1', show_default=True, metavar='LIST',
              help='Levels that the networks are told, in units of the true one')
@click.option('--num', type=click.IntRange(min=1), default=100, show_default=True, metavar='INT', help='Pictures')
@click.option('--samples', type=click.IntRange(min=0), default=8, show_default=True, metavar='INT', help='Posterior samples')
@click.option('--overlap', type=click.IntRange(min=0), metavar='INT', help='Of tiles  [default: half of the network\'s side]')
@click.option('--json', 'path', metavar='FILE', help='File for the numbers')
def main(network, data, train, sigma, stated, num, samples, overlap, path):
    """PSNR and SSIM of denoised pictures, and the coverage of 90 % intervals."""
    clean, nets = read(data, num), {ref: load_network(ref) for ref in network}
    linear, results = {'linear, of the training set': Linear(read(train, None))} if train else {}, []
    for level in sigma:
        noise = misc.generator('benchmark of denoising', level)
        y = clean.double() + level * torch.randn(clean.shape, generator=noise, dtype=torch.float64)
        rows = [('noisy', 0, functools.partial(by_functions, [np.asarray], y.numpy(), clean.numpy()))]
        rows += [(name, 0, functools.partial(by_functions, known, y.numpy(), clean.numpy())) for name, known in classical(level).items()]
        for told in stated:
            label = '' if told == 1 else f', told {told * level:g}'
            rows += [(f'{name}: mean{label}', 0, functools.partial(by_network, net, y, told * level, overlap, 0))
                     for name, net in {**linear, **nets}.items()]
            rows += [(f'{name}: {samples} samples{label}', samples, functools.partial(by_network, net, y, told * level, overlap, samples))
                     for name, net in nets.items() if samples]
        for name, count, run in rows:
            begun = time.process_time()
            found = run()
            seconds = (time.process_time() - begun) / len(clean)
            results.append({'sigma': level, 'denoiser': name, **measured(found, clean.numpy(), count), 'cpu_seconds_per_image': seconds})
            print(results[-1], flush=True)
    shown = lambda row, key, digits: f'{row[key]:.{digits}f}' if key in row else '-'
    keys = {'PSNR': ('psnr', 2), 'SSIM': ('ssim', 3), 'in 90 %': ('coverage', 3), 'noise': ('noise', 2), 'apart': ('apart', 2),
            'CPU s/image': ('cpu_seconds_per_image', 3)}
    print_columns([('sigma', 'denoiser', *keys), *(
        (f'{row["sigma"]:g}', row['denoiser'], *(shown(row, *key) for key in keys.values())) for row in results)])
    if path:
        write_json(path, results)


if __name__ == '__main__':
    main()
