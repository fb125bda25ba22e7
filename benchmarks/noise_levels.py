# SPDX-License-Identifier: Apache-2.0
"""Noise levels: how accurately they are estimated, how fast, and what a wrong one does (docs/noise.md).

python benchmarks/noise_levels.py accuracy --data=../shared/data/cifar10-train-jpeg.zip
python benchmarks/noise_levels.py speed
python benchmarks/noise_levels.py wrong --png=docs/figures/noise_wrong_level.png"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import click
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.figures import figure  # noqa: E402 (the folder above had to be found first)
from torch_utils.command_line import Command, Group, version_option  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402
from training.data.packed import PackedFolder  # noqa: E402
from training.diffusion import ambient  # noqa: E402
from training.estimation import clipping, single, spectral, wrong_level  # noqa: E402
from training.estimation.pooled import pooled  # noqa: E402

LEVELS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
DIGITS = 'digits'


@click.group(cls=Group)
@version_option
def main():
    """Noise levels: accuracy, speed, and what a wrong one does."""


# ---- accuracy


@main.command(cls=Command)
@click.option('--data', metavar='DATA', multiple=True, help='Clean pictures besides the digits; may be repeated')
@click.option('--images', metavar='INT', type=int, default=1000, show_default=True, help='Images of each set, at most; of digits all')
@click.option('--seeds', metavar='INT', type=int, default=4, show_default=True, help='Draws of the noise for pooled levels of digits')
def accuracy(data, images, seeds):
    """Print tables of estimated levels against true ones, unclipped and as 8-bit images."""
    for name in (DIGITS, *data):
        clean, others = load(name, images)
        repeats = seeds if name == DIGITS else 1
        print(f'\n{os.path.basename(name)}: {len(clean)} images of {"x".join(map(str, clean.shape[1:]))}\n')
        print('| method | ' + ' | '.join(f'{level:g}' for level in LEVELS) + ' |\n|-|' + '-|' * len(LEVELS))
        for row, cells in rows(clean, others, repeats):
            print(f'| {row} | ' + ' | '.join(cells) + ' |', flush=True)


def load(name, count):
    """(images, other images of the same law or None), float32 [N,C,H,W] in [-1,1]."""
    if name == DIGITS:
        from sklearn.datasets import load_digits
        return (load_digits().images[:, None] / 8 - 1).astype(np.float32), None
    dataset = ImageDataset(name)
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(dataset))[:2 * count]
    found = dataset.to_network(np.stack([dataset.decode(index) for index in order])).numpy()
    return found[:len(found) // 2], found[len(found) // 2:]


def noisy(clean, level, clipped, seed=0):
    """Images at a level, and if `clipped` rounded to 8 bits."""
    found = clean + level * np.random.Generator(np.random.Philox(key=seed + 1)).standard_normal(clean.shape)
    return (np.rint((found.clip(-1, 1) + 1) * 127.5) / 127.5 - 1 if clipped else found).astype(np.float32)


def rows(clean, others, repeats):
    """Yields (method, one text per level)."""
    for clipped in (False, True):
        what = ', clipped' if clipped else ''
        for name, method in single.SINGLE.items():
            cells = []
            for level in LEVELS:
                images = noisy(clean, level, clipped)
                try:
                    found = method(images)[0]
                except ValueError:  # the images are too small for it
                    cells.append('')
                    continue
                found = clipping.corrected(found, clipping.histogram(images)) if clipped else found
                cells.append(f'{found.mean():.3f} ± {found.std():.3f}')
            yield f'{name}, each image{what}', cells
        cells = []
        for level in LEVELS:
            found = [pooled(noisy(clean, level, clipped, seed)) for seed in range(repeats)]
            values = np.array([one.sigma for one in found])
            spread = f' ± {values.std(ddof=1):.4f}' if repeats > 1 else ''
            cells.append(f'{values.mean():.4f}{spread}' + ' (clean)' * all(one.clean for one in found))
        yield f'**pooled**{what}' + (f', {repeats} draws' if repeats > 1 else ''), cells
        if others is not None and not clipped:
            reference = spectra(others)
            found = [spectral.against_clean(spectra(noisy(clean, level, False)), reference)[0] for level in LEVELS]
            yield 'spectral, with as many clean images', [f'{one.sigma:.4f}' + ' (clean)' * one.clean for one in found]
    pairs = [spectral.of_noise(spectra((noisy(clean, level, False) - noisy(clean, level, False, 1)) / 2 ** 0.5), 'pairs')[0].sigma
             for level in LEVELS[1:]]
    yield 'pairs of exposures', ['0', *(f'{one:.4f}' for one in pairs)]


def spectra(images):
    found = spectral.Spectra(images.shape[1:])
    for first in range(0, len(images), 256):
        found.add(images[first:first + 256])
    return found


# ---- speed


@main.command(cls=Command)
@click.option('--images', metavar='INT', type=int, default=100_000, show_default=True, help='Images of 3x32x32')
def speed(images):
    """Print seconds and memory of dataset_tool.py noise on sets of 1/4 of the images and of all."""
    from training.data.convert.noise import noise
    options = dict.fromkeys(('clean', 'pairs', 'dark', 'plot', 'json', 'write', 'overwrite'))
    options |= {'law': 'gaussian', 'method': 'auto', 'group': 'set'}
    print('| images | seconds | CPU seconds | MiB of memory at most, beyond the start | level |\n|-|-|-|-|-|')
    with tempfile.TemporaryDirectory() as folder:
        for count in (images // 4, images):
            path = make(os.path.join(folder, str(count)), count)
            start, cpu = time.perf_counter(), time.process_time()
            with Memory() as memory:
                told = noise({**options, 'data': path})
            level = next(line for line in told if line.startswith('sigmas')).removeprefix('sigmas').strip()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            print(f'| {count} | {seconds:.1f} | {cpu:.1f} | {memory.most / 2 ** 20:.0f} | {level} |', flush=True)


def make(folder, count):
    """Writes a packed set of smooth random pictures with noise of 0.1, and returns its path."""
    os.makedirs(folder)
    rng, packed = np.random.Generator(np.random.Philox(key=0)), PackedFolder(folder, (3, 32, 32), np.uint8)
    out, wave = packed.allocate(count), 1 / (0.03 + np.hypot(*np.meshgrid(np.fft.rfftfreq(32), np.fft.fftfreq(32)))) ** 3
    for first in range(0, count, 1000):
        shape = out[first:first + 1000].shape
        smooth = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape, np.float32)) * wave, (32, 32))
        images = 0.4 * smooth / smooth.std() + 0.1 * rng.standard_normal(shape, np.float32)
        out[first:first + 1000] = np.rint((images.clip(-1, 1) + 1) * 127.5)
    out.flush()
    packed.finish({})
    return folder


class Memory:
    """The largest increase of this process's own memory, without mapped files, while the context is open. Attribute: most (bytes)."""

    def __enter__(self):
        self.most, self._start, self._end = 0, self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _now(self):
        info = psutil.Process().memory_info()
        return info.rss - getattr(info, 'shared', 0)

    def _watch(self):
        while not self._end.wait(0.1):
            self.most = max(self.most, self._now() - self._start)

    def __exit__(self, *error):
        self._end.set()
        self._thread.join()


# ---- a wrong level


@main.command(cls=Command)
@click.option('--png', metavar='FILE', help='Where to draw the picture')
@click.option('--draws', metavar='INT', type=int, default=2_000_000, show_default=True, help='Draws of each fit')
def wrong(png, draws):
    """Print the gain of the denoiser that a wrong level gives, by formula and fitted with the loss, for Gaussian images; draw it."""
    s, variance, factors = 0.2, 0.25, (0.8, 0.9, 1.0, 1.1, 1.2)
    print('| stated / true | sigma | gain by formula | fitted |\n|-|-|-|-|')
    points = {}
    for factor in factors:
        for sigma in (0.3, 0.5, 1.0):
            points[factor, sigma] = fitted(sigma, s, factor * s, variance, draws)
            print(f'| {factor} | {sigma} | {wrong_level.gain(sigma, s, factor * s, variance):.4f} | {points[factor, sigma]:.4f} |')
    if png:
        picture(png, s, variance, factors, points)


def fitted(sigma, s, stated, variance, draws):
    """The gain g of D(x) = g x that has the least ambient loss, for images of N(0, variance) with noise of std s, stated as `stated`."""
    import torch
    normal = torch.Generator().manual_seed(0)
    y = torch.randn(draws, dtype=torch.float64, generator=normal) * (variance + s ** 2) ** 0.5
    levels = [torch.tensor(value, dtype=torch.float64) for value in (stated, sigma)]
    x = ambient.add_noise(y, *levels, torch.randn(draws, dtype=torch.float64, generator=normal))
    # The prediction of y is a + g b, linear in the gain.
    at = lambda g: ambient.predict_at(g * x, x, levels[1], levels[0])
    a, b = at(0.0), at(1.0) - at(0.0)
    return float(((y - a) * b).sum() / (b * b).sum())


def picture(path, s, variance, factors, points):
    sigma = np.geomspace(0.25, 3, 200)
    with figure(path, f'--png={path}', 1, 3, (13, 4)) as (_, axes):
        first, second, third = axes[0]
        right = wrong_level.gain(sigma, s, s, variance)
        for number, factor in enumerate(factors):
            here = sigma[sigma > factor * s]
            first.plot(here, wrong_level.shifted(here, s, factor * s) / here, color=f'C{number}', label=f'{factor:g}')
            second.plot(sigma, wrong_level.gain(sigma, s, factor * s, variance) / right, color=f'C{number}', label=f'{factor:g}')
            fits = [(level, value / wrong_level.gain(level, s, s, variance)) for (one, level), value in points.items() if one == factor]
            second.plot(*zip(*fits), 'o', ms=4, color=f'C{number}')
        first.set(title='level that is learned, over the level asked for', xlabel='sigma', xscale='log')
        second.set(title='gain over the right one (dots: fitted)', xlabel='sigma', xscale='log')
        first.legend(title='stated / true')
        kappa = np.linspace(0.5, 1, 100)
        third.plot(kappa, np.sqrt(1 - kappa ** 2), label='understated: noise left in samples / s')
        above = np.linspace(1, 1.5, 100)
        third.plot(above, above ** 2 - 1, label='overstated: variance lost by every mode / s²')
        third.set(title='what samples have too much or too little', xlabel='stated / true')
        third.legend(fontsize=8)


if __name__ == '__main__':
    main()
