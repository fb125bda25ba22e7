# SPDX-License-Identifier: Apache-2.0
"""Robust penalties and outliers: part of the training set is replaced by outliers; denoising error on clean test images.

python benchmarks/outliers.py --json=outliers.json [--png=docs/figures/outliers.png]"""

import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib import UserError  # noqa: E402 (the folder above had to be found first)
from dnnlib.figures import figure  # noqa: E402
from dnnlib.files import write_json  # noqa: E402
from dnnlib.progress import Progress  # noqa: E402
from torch_utils import misc, registry  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training.data.batches import Batch  # noqa: E402
from training.data.pairs import PairStream  # noqa: E402
from training.diffusion.noise import NOISE  # noqa: E402
from training.networks.interface import ARCHS, Arch, Network  # noqa: E402
from training.networks.preconditioning import EDMPrecond  # noqa: E402
from training.objective.loss import AmbientLoss  # noqa: E402
from training.objective.penalty import PENALTIES  # noqa: E402
from training.objective.weighting import WEIGHTS  # noqa: E402

PLAIN, ROBUST = 'squared', 'pseudo_huber'
SPECS = (PLAIN, ROBUST, 'pseudo_huber_norm')
KINDS = ('none', 'inside', 'beyond')  # outliers: none, within the range of the clean values, up to four times as large
TEST, LEVELS = 400, 32  # held-out images; noise levels at which they are tested
BATCH, RATE, RAMP = 64, 2e-3, 100  # for each network: images per step, learning rate, steps of warm-up
CENTRES = torch.tensor([[0.6, 0.6], [-0.6, 0.5], [0.0, -0.7], [0.5, -0.2]])
SPREAD = 0.1  # std of each part of the mixture


class Toy(NamedTuple):
    """A clean data set and how to train on it. images: [N,C,H,W] in network units; width: of the hidden layers."""

    images: torch.Tensor
    sigma_data: float
    width: int
    steps: int


def digits():
    """The 1,797 digits of scikit-learn, 8x8, in [-1,1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError('--data=digits needs the package scikit-learn: pip install scikit-learn') from None
    return Toy(torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1, sigma_data=0.75, width=192, steps=1500)


def mixture():
    """2,400 points of four narrow Gaussians in the plane, as images [2,1,1]; all coordinates are below 1.2 or so."""
    place = torch.arange(2400) % len(CENTRES)
    points = CENTRES[place] + SPREAD * misc.Draws(0, 0)('mixture', [2400, 2])
    return Toy(points.reshape(-1, 2, 1, 1), sigma_data=0.5, width=64, steps=1500)


DATA = {'digits': digits, 'mixture': mixture}


def split(images, seed, kind='none', share=0.2):
    """(training images, of which a share are outliers; clean test images) for a seed. The values of an outlier are independent: +1 or -1
    (`inside`), or uniform between -4 and 4 (`beyond`). With `none` the outliers are left out."""
    order = torch.randperm(len(images), generator=misc.generator(seed, 'split'))
    train, test = images[order[TEST:]].clone(), images[order[:TEST]]
    count = round(share * len(train))
    if kind == 'none':
        return train[count:], test
    values = 2 * torch.rand([count, *images.shape[1:]], generator=misc.generator(seed, 'outliers')) - 1
    train[:count] = values.sign() if kind == 'inside' else 4 * values
    return train, test


class Stack(Network):
    """Independent networks of three layers, by batched products: one initialisation per seed, the same for each penalty.

    Rows of the input come grouped by network, [penalty, seed, row], equally many for each."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, penalties=1, seeds=1, width=64):
        super().__init__()
        self.networks = penalties * seeds
        sizes = [in_channels * img_resolution ** 2 + 16, width, width, out_channels * img_resolution ** 2]
        draw = misc.Draws(0, 0)
        self.weights = torch.nn.ParameterList(
            draw(f'layer_{i}', [seeds, m, n]).repeat(penalties, 1, 1) / math.sqrt(m) for i, (m, n) in enumerate(zip(sizes, sizes[1:])))
        self.biases = torch.nn.ParameterList(torch.zeros(self.networks, 1, n) for n in sizes[1:])
        self.register_buffer('frequencies', torch.arange(1, 9) * 0.7)

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        phase = c_noise.unsqueeze(1) * self.frequencies
        h = torch.cat([x.flatten(1), phase.sin(), phase.cos()], 1).unflatten(0, (self.networks, -1))  # [networks, rows, features]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, torch.nn.functional.silu(h) if i else h, weight)
        return h.reshape(x.shape)


def answers(net, x, sigma, penalties):
    """D of the networks of every penalty on the same rows: [penalty, seed * row, C, H, W]."""
    return net(x.repeat(penalties, 1, 1, 1), sigma.repeat(penalties, 1, 1, 1)).unflatten(0, (penalties, -1))


def train_all(toy, kind, seeds, specs=SPECS, steps=None):
    """Networks for every penalty and seed; all penalties see the same images, levels and noise. Adam, rate falling to 0."""
    noise, weight = registry.build('lognormal', NOISE), registry.build('edm', WEIGHTS, sigma_data=toy.sigma_data)
    losses = [AmbientLoss(weight, registry.build(spec, PENALTIES, '--penalty', sigma_data=toy.sigma_data)) for spec in specs]
    _, C, H, _ = toy.images.shape
    ARCHS['stack'] = Arch(Stack)
    net = EDMPrecond(H, C, sigma_data=toy.sigma_data, model_type='Stack', penalties=len(specs), seeds=seeds, width=toy.width)
    del ARCHS['stack']  # no choice of --arch
    data = [split(toy.images, seed, kind)[0] for seed in range(seeds)]
    streams = [PairStream(torch.zeros(len(images)), noise, batch=BATCH, seed=seed) for seed, images in enumerate(data)]
    optimizer, steps = torch.optim.Adam(net.parameters(), lr=RATE, betas=(0.9, 0.99)), steps or toy.steps
    for step in Progress(steps, kind, 'step', leave=False).over(range(steps)):
        pairs = [stream.next() for stream in streams]
        images = torch.cat([own[index] for own, (index, _) in zip(data, pairs)])
        sigma = torch.cat([torch.from_numpy(level) for _, level in pairs]).float().reshape(-1, 1, 1, 1)
        batch = Batch(images, torch.zeros_like(sigma), sigma, misc.Draws(0, step)('noise', images.shape))
        D = answers(net, images + sigma * batch.noise, sigma, len(specs))
        # A sum over networks: each gets the gradient of its own mean.
        loss = sum(term(lambda *_, known=known, **__: known, batch)['denoise'].sum() for term, known in zip(losses, D)) / BATCH
        optimizer.param_groups[0]['lr'] = RATE * min(1, (step + 1) / RAMP) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def test_levels():
    """LEVELS even quantiles of EDM's p(sigma), float32."""
    u = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    return registry.build('lognormal', NOISE).icdf(u).float()


@torch.no_grad()
def errors(denoise, toy, seeds):
    """EDM's weight times the squared error per value on the clean test images: [penalty, seed, level].

    denoise: (x, sigma) -> [penalty, seed * row, C, H, W]."""
    weight = registry.build('edm', WEIGHTS, sigma_data=toy.sigma_data)
    clean = torch.cat([split(toy.images, seed)[1] for seed in range(seeds)])
    found = []
    for i, level in enumerate(test_levels()):
        sigma = level.expand(len(clean), 1, 1, 1)
        D = denoise(clean + sigma * misc.Draws(1, i)('test', clean.shape), sigma)
        error = weight(sigma) * (D - clean).square()
        found.append(error.mean((2, 3, 4)).unflatten(1, (seeds, -1)).mean(2))
    return torch.stack(found, 2)


def exact(x, sigma):
    """E[x_0 | x] of the clean mixture, [1, row, 2, 1, 1]."""
    points, total = x.flatten(1).unsqueeze(1), (sigma.square() + SPREAD ** 2).flatten(1)  # [row, 1, 2], [row, 1]
    share = (-(points - CENTRES).square().sum(2) / (2 * total)).softmax(1)  # [row, part]
    mean = share @ CENTRES
    return (mean + SPREAD ** 2 / total * (x.flatten(1) - mean)).reshape(1, *x.shape)


def measure(name, seeds, specs=SPECS, kinds=KINDS, steps=None):
    """{kind of outliers: {penalty: [seed][level]}} of one data set, nested lists; `exact` under "none" where it is known."""
    toy, results = DATA[name](), {}
    for kind in kinds:
        net = train_all(toy, kind, seeds, specs, steps)
        found = errors(lambda x, sigma, net=net: answers(net, x, sigma, len(specs)), toy, seeds)
        results[kind] = dict(zip(specs, found.tolist()))
    if name == 'mixture' and 'none' in results:
        results['none']['exact'] = errors(exact, toy, seeds)[0].tolist()
    return results


def summary(values):
    """(mean, standard error) over seeds."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def table(results):
    """Table with a row for each data set, kind of outliers and penalty, as Markdown."""
    lines = ['| data | outliers | penalty | clean-test error of each seed | mean ± s.e. | against squared, same seed | lower on |',
             '| --- | --- | --- | --- | --- | --- | --- |']
    for data, kinds in results.items():
        for kind, rows in kinds.items():
            plain = torch.tensor(rows[PLAIN]).mean(1)
            for name, row in rows.items():
                own = torch.tensor(row).mean(1)
                mean, error = summary(own)
                change, spread = summary(100 * (own / plain - 1))
                against = '' if name == PLAIN else f'{change:+.1f} ± {spread:.1f} %'
                lower = '' if name == PLAIN else f'{int((own < plain).sum())} of {len(own)}'
                seeds = ' '.join(f'{value:.4f}' for value in own)
                lines.append(f'| {data} | {kind} | `{name}` | {seeds} | {mean:.4f} ± {error:.4f} | {against} | {lower} |')
    return '\n'.join(lines)


def draw(results, path):
    """Draws a column for each data set: the change of each seed's error from squared to robust, and its dependence on sigma."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with figure(path, '--png', 2, len(results), (5.2 * len(results), 7)) as (_, axes):
        for (data, kinds), (above, below) in zip(results.items(), axes.T):
            for i, spec in enumerate(spec for spec in SPECS if spec != PLAIN):
                for place, (_, rows) in enumerate(kinds.items()):
                    change = 100 * (torch.tensor(rows[spec]).mean(1) / torch.tensor(rows[PLAIN]).mean(1) - 1)
                    above.plot([place - 0.12 + 0.24 * i] * len(change), change, 'ox'[i], color=f'C{i}', label=None if place else spec)
            for (kind, rows), style in zip(kinds.items(), (':', '--', '-')):
                ratio = torch.tensor(rows[ROBUST]).mean(0) / torch.tensor(rows[PLAIN]).mean(0)
                below.plot(test_levels(), 100 * (ratio - 1), style, color='C0', label=f'outliers: {kind}')
            above.set(title=data, xlim=(-0.5, len(kinds) - 0.5))
            above.set_xticks(range(len(kinds)), [f'outliers: {kind}' for kind in kinds])
            above.set_ylabel('clean-test error against squared,\neach seed [%]')
            below.set(xscale='log', xlabel='sigma', ylabel=f'{ROBUST} against squared,\nmean of seeds [%]')
            for axis in (above, below):
                axis.axhline(0, color='black', linewidth=0.8)
                axis.grid(alpha=0.3)
                axis.legend(fontsize=8)


@click.command(cls=Command)
@click.option('--seeds', type=click.IntRange(min=2), default=5, show_default=True, help='Number of seeds (splits, outliers, weights)')
@click.option('--data', type=click.Choice([*DATA, 'both']), default='both', show_default=True, help='Data set')
@click.option('--json', 'dest', metavar='FILE', help='Write the errors of every seed and level to this file')
@click.option('--png', metavar='FILE', help='Write the figure to this file')
@version_option
def main(seeds, data, dest, png):
    """Compare squared and robust penalties where 20 % of the training images are outliers: denoising error on clean test images."""
    torch.set_num_threads(1)
    results = {name: measure(name, seeds) for name in DATA if data in (name, 'both')}
    click.echo(table(results))
    if dest:
        write_json(dest, {'levels': test_levels().tolist(), 'errors': results})
    if png:
        draw(results, png)


if __name__ == '__main__':
    main()
