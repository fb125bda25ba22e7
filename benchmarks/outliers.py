# SPDX-License-Identifier: Apache-2.0
"""Robust penalties against outliers: 8x8 digits, one training image in five replaced, clean-test error of each penalty and seed.

python benchmarks/outliers.py [--json=FILE]"""

import json
import math
import os
import sys
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dnnlib.util import replacing  # noqa: E402 (the folder above had to be found first)
from torch_utils import misc  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training import registry  # noqa: E402
from training.loss import AmbientLoss, Batch  # noqa: E402
from training.networks import NETWORKS  # noqa: E402
from training.noise import NOISE  # noqa: E402
from training.pairs import PairStream  # noqa: E402
from training.penalty import PENALTIES  # noqa: E402
from training.preconditioning import EDMPrecond  # noqa: E402
from training.weighting import WEIGHTS  # noqa: E402

SPECS = ('squared', 'pseudo_huber', 'pseudo_huber_norm', 'pseudo_huber_norm:c=0.1,schedule=snr')
SHARES = (0.0, 0.2)
SD = 0.75
SIZE, TEST, LEVELS = 8, 400, 32  # pixels a side; images held out; test levels an image


class Stack(torch.nn.Module):
    """`members` independent networks of three layers, by batched products; rows come grouped by member, equally many of each."""

    def __init__(self, resolution, in_channels, out_channels, label_dim=0, members=1, width=192, seed=0):
        super().__init__()
        self.augment_dim, self.members = 0, members
        sizes = [in_channels * resolution ** 2 + 16, width, width, out_channels * resolution ** 2]
        draw = misc.Draws(seed, 0)
        # One start for all: members differ by their data and penalty alone.
        self.weights = torch.nn.ParameterList(
            (draw(f'layer_{i}', [m, n]) * math.sqrt(1 / m)).repeat(members, 1, 1) for i, (m, n) in enumerate(zip(sizes, sizes[1:])))
        self.biases = torch.nn.ParameterList(torch.zeros(members, 1, n) for n in sizes[1:])
        self.register_buffer('frequencies', torch.arange(1, 9) * 0.7)

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        phases = c_noise.unsqueeze(1) * self.frequencies
        h = torch.cat([x.flatten(1), phases.sin(), phases.cos()], 1).unflatten(0, (self.members, -1))  # [members, rows, features]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, torch.nn.functional.silu(h) if i else h, weight)
        return h.reshape(x.shape)


NETWORKS['Stack'] = Stack


def digits():
    """[1797,1,8,8] float32 in [-1,1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise click.ClickException('benchmarks/outliers.py needs the package scikit-learn: pip install scikit-learn') from None
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


KIND = os.environ.get('KIND', 'noise')
def split(images, seed, share):
    """(training images, a share of them outliers; clean test images). An outlier has the place of a digit, and pixels of uniform noise."""
    rng = np.random.default_rng([seed, 1])
    order = torch.from_numpy(rng.permutation(len(images)))
    train, test = images[order[TEST:]].clone(), images[order[:TEST]]
    count = round(share * len(train))
    noise = torch.from_numpy(rng.uniform(-1, 1, [count, 1, SIZE, SIZE])).float()
    if KIND == 'noise':
        train[:count] = noise
    elif KIND == 'binary':
        train[:count] = noise.sign()
    elif KIND == 'inverted':
        train[:count] *= -1
    elif KIND == 'white':
        train[:count] = 1
    elif KIND == 'loud':
        train[:count] = noise * 4
    return train, test


def train_all(images, seeds, share, specs, steps, batch):
    """Networks of every spec and seed, trained on the same pairs and noise for every spec; rows of the Stack: [spec, seed]."""
    noise, weight = registry.build('lognormal', NOISE), registry.build('edm', WEIGHTS, sigma_data=SD)
    losses = [AmbientLoss(weight, registry.build(spec, PENALTIES, '--penalty', sigma_data=SD)) for spec in specs]
    net = EDMPrecond(SIZE, 1, sigma_data=SD, model_type='Stack', members=len(specs) * seeds)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.9, 0.99))
    data = [split(images, seed, share)[0] for seed in range(seeds)]
    streams = [PairStream(np.zeros(len(d)), noise, batch=batch, seed=seed) for seed, d in enumerate(data)]
    zero = torch.zeros(seeds * batch, 1, 1, 1)
    for step in tqdm(range(steps), disable=None, leave=False):
        pairs = [stream.next() for stream in streams]
        clean = torch.cat([d[index] for d, (index, _) in zip(data, pairs)])
        sigma = torch.from_numpy(np.concatenate([s for _, s in pairs])).float().reshape(-1, 1, 1, 1)
        unit = misc.Draws(0, step)('noise', clean.shape)
        x = clean + sigma * unit
        D = net(x.repeat(len(specs), 1, 1, 1), sigma.repeat(len(specs), 1, 1, 1)).unflatten(0, (len(specs), -1))
        rows = Batch(clean, zero, sigma, unit)
        # Sums over members: each has the gradient that it would have alone.
        loss = sum(term(lambda *_, D=D[i], **__: D, rows)['denoise'].sum() for i, term in enumerate(losses)) / batch
        for group in optimizer.param_groups:
            group['lr'] = 2e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@torch.no_grad()
def test_errors(net, images, seeds, specs):
    """EDM's weight times the squared error a pixel, on clean test images: [spec, seed, level], at LEVELS even quantiles of p(sigma)."""
    noise, weight = registry.build('lognormal', NOISE), registry.build('edm', WEIGHTS, sigma_data=SD)
    levels = noise.icdf((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS).float()
    clean = torch.cat([split(images, seed, 0)[1] for seed in range(seeds)])
    result = []
    for i, level in enumerate(levels):
        sigma = level.expand(len(clean), 1, 1, 1)
        x = (clean + sigma * misc.Draws(1, i)('test', clean.shape))
        D = net(x.repeat(len(specs), 1, 1, 1), sigma.repeat(len(specs), 1, 1, 1)).unflatten(0, (len(specs), -1))
        error = weight(sigma) * (D - clean).square()
        result.append(error.mean((2, 3, 4)).unflatten(1, (seeds, -1)).mean(2))
    return levels, torch.stack(result, 2)

if __name__ == '__main__':
    import time
    torch.set_num_threads(1)
    steps = int(os.environ.get('STEPS', 600)); seeds=int(os.environ.get('SEEDS', 2))
    images = digits()
    print(images.std())
    for share in SHARES:
        t = time.time()
        net = train_all(images, seeds, share, SPECS, steps, 64)
        levels, e = test_errors(net, images, seeds, SPECS)
        print(KIND, share, time.time() - t)
        for s, row in zip(SPECS, e):
            print(f'{s:40}', [f'{v:.4f}' for v in row.mean(1)], [f'{v:.3f}' for v in (row.mean(0)/e[0].mean(0))[::4]])
