# SPDX-License-Identifier: Apache-2.0
"""What is in a data set, as lines for people: count, shape, range, sigma_data, classes, noise levels, signal-to-noise ratios."""

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dnnlib.progress import Progress
from training.data import tables
from training.data.dataset import UNITS_8BIT, ImageDataset
from training.diffusion.ambient import snr_db


def describe(path, sigma=None):
    """Lines of text about a zip or folder; sigma: noise level in network units to give the SNR of."""
    dataset = ImageDataset(path)
    if dataset.has_labels:
        dataset = ImageDataset(path, use_labels=True)
    low, high, mean, std = moments(dataset)
    units = dataset.units or UNITS_8BIT
    shape = ' x '.join(str(side) for side in dataset.image_shape)
    yield f'images      {len(dataset)}'
    yield f'shape       {shape} (channels x height x width)'
    dtype = 'float32' if dataset.is_float else 'uint8'
    yield f'dtype       {dtype}, network = (stored - {tables.shown_all(units["offset"])}) / {tables.shown_all(units["scale"])}'
    yield f'range       {low[0]:g} to {high[0]:g} stored, {low[1]:.4g} to {high[1]:.4g} in network units'
    yield f'mean        {mean:.4f} in network units'
    yield f'sigma_data  {std:.4f} (std of all values around their common mean, in network units)'
    native = dataset.native_sigma
    if native.any():
        signal = math.sqrt(max(std ** 2 - np.square(native).mean(), 0))
        yield f'            {signal:.4f} without the noise that the images carry'
        yield (f'sigmas      {np.count_nonzero(native)} of {len(native)} images are noisy; least {native.min():.4g}, '
               f'median {np.median(native):.4g}, mean {native.mean():.4g}, most {native.max():.4g} in network units')
        std = signal
    else:
        yield 'sigmas      none: every image counts as clean'
    yield from _limit_lines(dataset)
    yield from _label_lines(dataset)
    if sigma is not None:
        yield (f'SNR at sigma {sigma:g}:  {snr_db(sigma):.2f} dB as 10 log10(1 + 1/sigma^2),  '
               f'{snr_db(sigma, max(std, 1e-12)):.2f} dB as 10 log10(sigma_data^2 / sigma^2)')


def moments(dataset):
    """The least and the largest value, each (stored, in network units), and (mean, std) of all values in network units."""
    offset, scale = (tables.per_channel((dataset.units or UNITS_8BIT)[key]) for key in ('offset', 'scale'))

    def of_image(raw_idx):
        image = dataset.decode(raw_idx)
        values = (image - offset) / scale
        return image.min(), values.min(), image.max(), values.max(), values.mean(), values.var()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(of_image, dataset.raw_idx)
        rows = np.array(list(Progress(len(dataset), 'Reading').over(found)), np.float64)
    means, variances = rows[:, 4], rows[:, 5]
    # All images have one size, so the total variance is the mean one within images plus that of their means.
    std = math.sqrt(variances.mean() + means.var())
    return rows[:, :2].min(0).tolist(), rows[:, 2:4].max(0).tolist(), float(means.mean()), std


def _limit_lines(dataset):
    limited = dataset.sigma_max[np.isfinite(dataset.sigma_max)]
    if not len(limited):
        return
    yield (f'sigma_max   {len(limited)} of {len(dataset)} images have an upper limit; least {limited.min():.4g}, '
           f'median {np.median(limited):.4g}, mean {limited.mean():.4g}, most {limited.max():.4g} in network units')
    idle = np.count_nonzero(dataset.native_sigma >= dataset.sigma_max)
    if idle:
        yield f'            {idle} of them can never be used: they are as noisy as that already'


def _label_lines(dataset):
    classes = dataset.classes
    if not dataset.has_labels:
        yield 'labels      none'
    elif classes is None:
        yield f'labels      vectors of length {dataset.label_dim}'
    else:
        counts = np.bincount(classes, minlength=dataset.label_dim)
        yield f'labels      {dataset.label_dim} classes, {counts.min()} to {counts.max()} images each'
        yield '            ' + ', '.join(f'{number}: {count}' for number, count in enumerate(counts))
