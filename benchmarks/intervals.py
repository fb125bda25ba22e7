# SPDX-License-Identifier: Apache-2.0
"""How often the 95 % intervals of eval_fid.py contain the true value, in simulation.

python benchmarks/intervals.py frechet [--repetitions=2000]
python benchmarks/intervals.py kernel [--repetitions=2000]"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from metrics import intervals, kernel  # noqa: E402 (the folder above had to be found first)
from metrics.frechet import frechet_distance  # noqa: E402

# dimensions, images, law, shift of the means and stretch of the deviations against the reference
FRECHET = [
    (16, 256, 'normal', 0.3, 1.2), (16, 256, 'exponential', 0.3, 1.2), (16, 1024, 'exponential', 0, 1),
    (64, 256, 'exponential', 0.3, 1.2), (64, 512, 'normal', 0, 1), (64, 512, 'half-normal', 0, 1), (64, 512, 'half-normal', 0.3, 1.2),
    (64, 512, 'student', 0.1, 1.05), (64, 2048, 'half-normal', 0, 1), (64, 2048, 'exponential', 0.1, 1.05),
    (250, 250, 'half-normal', 0.3, 1.2), (128, 256, 'half-normal', 0, 1), (128, 256, 'half-normal', 0.3, 1.2),
    (128, 128, 'half-normal', 0, 1), (128, 128, 'half-normal', 0.3, 1.2), (128, 64, 'half-normal', 0, 1),
    (128, 64, 'half-normal', 0.3, 1.2)]
# dimensions, generated images, reference images, size of subsets, law, shift
KERNEL = [
    (8, 256, 256, 256, 'normal', 0), (8, 256, 256, 256, 'normal', 0.1), (8, 256, 512, 256, 'exponential', 0.5),
    (16, 256, 256, 256, 'normal', 0.1), (64, 256, 256, 256, 'normal', 0), (64, 300, 300, 300, 'half-normal', 0),
    (64, 300, 300, 300, 'half-normal', 0.05), (64, 300, 300, 300, 'half-normal', 0.1), (64, 300, 300, 300, 'exponential', 0.5),
    (64, 256, 256, 100, 'half-normal', 0), (64, 256, 256, 100, 'half-normal', 0.1)]


def spectrum(dim):
    """Standard deviations of the features, which decay by a factor of e^2."""
    return np.exp(-2 * np.arange(dim) / dim)


def draw(rng, law, count, dim):
    """Features of mean 0 and variance 1, [count,dim]."""
    if law == 'exponential':
        return rng.exponential(size=(count, dim)) - 1
    if law == 'half-normal':  # skewed and bounded below, as pooled activations are
        return (np.abs(rng.standard_normal((count, dim))) - np.sqrt(2 / np.pi)) / np.sqrt(1 - 2 / np.pi)
    if law == 'student':  # of eight degrees of freedom
        return rng.standard_t(8, size=(count, dim)) / np.sqrt(8 / 6)
    return rng.standard_normal((count, dim))


def frechet_case(dim, count, law, shift, stretch, repetitions, seed=0):
    """(share of the fid intervals that contain the mean over the repetitions, share of the fid_inf intervals that contain the true
    distance, that mean, that distance)."""
    rng, scale = np.random.default_rng(seed), spectrum(dim)
    own = scale * np.where(np.arange(dim) % 2, stretch, 1 / stretch)
    mu, cov = np.zeros(dim), np.diag(scale ** 2)
    truth = np.square(shift * scale).sum() + np.square(own - scale).sum()
    found = []
    for _ in range(repetitions):
        x = draw(rng, law, count, dim) * own + shift * scale
        distance = frechet_distance(x.mean(0), np.cov(x, rowvar=False), mu, cov)
        spread = intervals.frechet_spread(x, mu, cov)
        found.append([distance, *intervals.frechet_bounds(distance, spread), *intervals.extrapolated_bounds(distance, spread)])
    found = np.array(found)
    mean = found[:, 0].mean()
    share = lambda low, high, target: float(((found[:, low] <= target) & (target <= found[:, high])).mean())
    return share(1, 2, mean), share(3, 4, truth), mean, truth


def kernel_case(dim, count, others, size, law, shift, repetitions, seed=0, subsets=30):
    """(share of the kid intervals that contain the squared MMD, that squared MMD: 0, or the mean of the unbiased estimates)."""
    rng, scale, found = np.random.default_rng(seed), spectrum(dim), []
    whole = count == others == size
    for repetition in range(repetitions):
        x, y = (torch.from_numpy(draw(rng, law, n, dim) * scale + by * scale + 0.5) for n, by in ((count, shift), (others, 0)))
        if whole:
            value, extra = kernel.squared_mmd(x, y), 0.0
        else:
            value, deviation = kernel.kernel_distance(x, y, subsets, size, repetition)
            extra = deviation ** 2 / (subsets - 1)
        found.append([value, *intervals.kernel_bounds(value, extra, x, y)])
    found = np.array(found)
    target = found[:, 0].mean() if shift else 0.0
    return float(((found[:, 1] <= target) & (target <= found[:, 2])).mean()), target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['frechet', 'kernel'])
    parser.add_argument('--repetitions', type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == 'frechet':
        print('| features | images | law | shift | fid | covers | fid_inf | covers |\n| --- | --- | --- | --- | --- | --- | --- | --- |')
        for dim, count, law, shift, stretch in FRECHET:
            fid, inf, mean, truth = frechet_case(dim, count, law, shift, stretch, args.repetitions)
            print(f'| {dim} | {count} | {law} | {shift} | {mean:.3f} | {fid:.1%} | {truth:.3f} | {inf:.1%} |', flush=True)
    else:
        print('| features | images | others | subsets of | law | shift | kid | covers |\n| --- | --- | --- | --- | --- | --- | --- | --- |')
        for dim, count, others, size, law, shift in KERNEL:
            share, target = kernel_case(dim, count, others, size, law, shift, args.repetitions)
            print(f'| {dim} | {count} | {others} | {size} | {law} | {shift} | {target:.5f} | {share:.1%} |', flush=True)


if __name__ == '__main__':
    main()
