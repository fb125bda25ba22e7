# SPDX-License-Identifier: Apache-2.0
"""(image, sigma) pairs that the pairing policies draw per second on one core, for several mixes of images.

python benchmarks/pairs.py [--images=50000] [--seconds=1]"""

import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.data.pairs import PairStream  # noqa: E402 (the folder above had to be found first)
from training.diffusion.noise import LogNormal  # noqa: E402

BATCHES = (256, 512, 4096)


def mixes(count):
    """Yields (name, sigma_n, sigma_min, sigma_max) for this number of images. In all mixes but the first and the last two, 10 % of the
    images are clean and may be used at every level."""
    source = np.random.default_rng(0)
    zeros, none, clean = np.zeros(count), np.full(count, np.inf), source.random(count) < 0.1
    spread, high, low = (source.lognormal(mean, std, count) for mean, std in ((-1.5, 0.7), (0.3, 0.4), (-1.5, 0.4)))
    yield 'all clean', zeros, zeros, none
    yield '90 % at sigma_n 0.2', np.where(clean, 0, 0.2), zeros, none
    yield '90 % at sigma_n 0.4', np.where(clean, 0, 0.4), zeros, none
    yield '90 % with different sigma_n', np.where(clean, 0, spread), zeros, none
    yield '90 % with one of 3 sigma_n and 4 sigma_max', np.where(clean, 0, source.choice([0, 0.1, 0.2], count)), zeros, np.where(
        clean, np.inf, source.choice([0.25, 0.5, 1, np.inf], count))
    yield '90 % with different sigma_min', zeros, np.where(clean, 0, high), none
    yield '90 % with different sigma_n and sigma_max', np.where(clean, 0, spread), zeros, np.where(clean, np.inf, 8 * low)
    half, other = source.random([2, count]) < 0.5
    yield 'a third noisy, half with a sigma_min, half with a sigma_max', spread * (source.random(count) < 0.3), high * half, np.where(
        other, low, np.inf)
    yield '99 % at sigma_n 0.4', np.where(source.random(count) < 0.01, 0, 0.4), zeros, none


def rate(stream, seconds):
    """Pairs per second of CPU time, after a few batches of warm-up."""
    for _ in range(3):
        stream.next()
    used, start = stream.used, time.process_time()
    while time.process_time() - start < seconds:
        stream.next()
    return (stream.used - used) / (time.process_time() - start)


@click.command()
@click.option('--images', type=click.IntRange(min=100), default=50_000, show_default=True)
@click.option('--seconds', type=float, default=1.0, show_default=True, help='CPU seconds per measurement')
@click.option('--pairing', multiple=True, default=['sigma_first'], show_default=True)
def main(images, seconds, pairing):
    """Print the pairs per second of each policy, mix and batch size."""
    torch.set_num_threads(1)
    click.echo('| images | pairing | share used |' + ''.join(f' batch {batch} |' for batch in BATCHES))
    click.echo('|-' * (3 + len(BATCHES)) + '|')
    for name, levels, lower, upper in mixes(images):
        for policy in pairing:
            streams = [PairStream(levels, LogNormal(), policy, batch=batch, lower=lower, upper=upper) for batch in BATCHES]
            rates = ''.join(f' {rate(stream, seconds):,.0f} |' for stream in streams)
            click.echo(f'| {name} | {policy} | {streams[0].acceptance():.3f} |{rates}')


if __name__ == '__main__':
    main()
