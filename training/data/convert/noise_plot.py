# SPDX-License-Identifier: Apache-2.0
"""The picture of dataset_tool.py noise: levels, variance against intensity, spectrum, and the images that read most and least."""

import numpy as np

from dnnlib.figures import figure
from training.data.convert.noise_report import Found

SHOWN = 10


def draw(path: str, found: Found) -> None:
    """Writes the picture as a PNG. Raises UserError where matplotlib is missing."""
    with figure(path, f'--plot={path}', 2, 3, (13, 7.5)) as (made, axes):
        made.suptitle(f'{found.data.name}: {len(found.levels)} images, method {found.method}')
        _levels(axes[0][0], found)
        _intensity(axes[0][1], found)
        _spectrum(axes[0][2], found)
        order = np.argsort(found.readings, kind='stable')
        _images(axes[1][0], found, order[::-1][:SHOWN], 'read most, by themselves')
        _images(axes[1][1], found, order[:SHOWN], 'read least')
        _groups(axes[1][2], found)


def _levels(axis, found):
    axis.hist(found.readings, 60, color='0.7', label='each image by itself')
    for number, one in enumerate(found.estimates[:8]):
        label = f'{found.names[number]}: {one.sigma:.3g}' + ' (clean)' * one.clean
        axis.axvline(one.sigma, color=f'C{number}', lw=1.5, label=label)
    axis.set(title='noise levels', xlabel='level', ylabel='images')
    axis.legend(fontsize=7)


def _intensity(axis, found):
    axis.set(title='variance against intensity', xlabel='intensity', ylabel='variance')
    if found.signal is None:
        axis.text(0.5, 0.5, 'too few flat patches', ha='center', va='center', transform=axis.transAxes)
        return
    curve = found.signal.curve
    axis.errorbar(curve.means, curve.variances, curve.errors, fmt='.', capsize=2)
    x = np.array([curve.means.min(), curve.means.max()])
    a, b = found.signal.a, found.signal.b
    axis.plot(x, a * x + b, lw=1, label=f'{a:.2g} x + {b:.2g}, p = {found.signal.p:.1g}')
    axis.set_ylim(0, 1.3 * curve.variances.max())
    axis.legend(fontsize=7)


def _spectrum(axis, found):
    axis.set(title=f'spectrum of the noise, from {found.white_from}', xlabel='frequency (cycles per pixel)', ylabel='power')
    if found.white is None:
        axis.text(0.5, 0.5, 'not measured', ha='center', va='center', transform=axis.transAxes)
        return
    white = found.white
    axis.errorbar(np.hypot(*white.frequencies.T), white.power, white.errors, fmt='.', capsize=2, label=f'p = {white.p:.2g} of white noise')
    axis.set_ylim(0, 1.3 * max(white.power.max(), 1e-12))
    axis.legend(fontsize=7)


def _images(axis, found, items, title):
    """The images of some items in rows of five, with their levels."""
    axis.set_title(title)
    axis.axis('off')
    channels, height, width = found.data.image_shape
    gap = max(2, height // 5)
    sheet = np.ones([2 * (height + gap), 5 * (width + 2), 3])
    for place, item in enumerate(items):
        image = found.data.to_network(found.data.decode(found.data.raw_idx[item])).numpy()
        image = (np.repeat(image[:1], 3, 0) if channels < 3 else image[:3]).transpose(1, 2, 0)
        top, left = place // 5 * (height + gap) + gap, place % 5 * (width + 2)
        sheet[top:top + height, left:left + width] = np.clip(image / 2 + 0.5, 0, 1)
        axis.text(left + width / 2, top - 1, f'{found.readings[item]:.3g}', ha='center', va='bottom', fontsize=7)
    axis.imshow(sheet, interpolation='nearest')


def _groups(axis, found):
    axis.set(title='levels of the groups', xlabel='group', ylabel='level')
    if not found.names:
        axis.text(0.5, 0.5, 'single images', ha='center', va='center', transform=axis.transAxes)
        return
    values, errors = (np.array([getattr(one, key) for one in found.estimates]) for key in ('sigma', 'uncertainty'))
    axis.errorbar(np.arange(len(values)), values, errors, fmt='.', capsize=2)
    axis.axhline(found.floor, color='0.6', ls=':', lw=1, label=f'floor {found.floor:.3g}')
    axis.set_ylim(0, 1.2 * max(values.max(), found.floor))
    if len(values) <= 12:
        axis.set_xticks(range(len(values)), found.names, rotation=45, ha='right', fontsize=7)
    axis.legend(fontsize=7)
