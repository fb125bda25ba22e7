# SPDX-License-Identifier: Apache-2.0
"""What dataset_tool.py noise tells: lines of text, JSON, and the record in dataset.json."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from training.data import tables
from training.data.dataset import UNITS_8BIT, ImageDataset
from training.estimation.estimate import Estimate
from training.estimation.signal_dependent import PoissonGaussian
from training.estimation.whiteness import SIGNIFICANCE, Whiteness

SHOWN = 20      # groups that are listed
RECORDED = 1000  # groups, at most, in dataset.json
LOW = 0.1       # single images below this level come out high
FEW = 0.01      # share of images less noisy than their group that is told of


class Found(NamedTuple):
    """What was measured on a data set, in network units."""

    data: ImageDataset
    method: str
    names: list              # of the groups; none for single images
    estimates: list[Estimate]  # of the groups
    less: list[int]          # of each group, the number of images that are less noisy
    levels: np.ndarray       # [N], 0 for clean images
    uncertainties: np.ndarray  # [N]
    readings: np.ndarray     # [N], of each image by itself
    floor: float
    white: Whiteness | None
    white_from: str          # "reference" or "flat patches"
    signal: PoissonGaussian | None
    lossy: int               # number of images in lossy files


def lines(found: Found) -> list[str]:
    """Lines of text for people."""
    return [*_levels(found), *_spectrum(found), *_intensity(found), *(f'Warning: {text}' for text in warnings(found))]


def _levels(found):
    count, noisy = len(found.levels), found.levels[found.levels > 0]
    yield f'images      {count}, method {found.method}; levels in network units, in which 8-bit images lie in [-1, 1]'
    if not found.names:
        yield (f'sigmas      {len(noisy)} of {count} images read more than clean photographs do ({found.floor:.3g})' +
               (f'; min {noisy.min():.4g}, median {np.median(noisy):.4g}, max {noisy.max():.4g}' if len(noisy) else ''))
        if len(noisy):
            share = np.median(found.uncertainties[found.levels > 0] / noisy)
            yield f'            standard error of one image {share:.1%} of its level, besides what texture adds'
        return
    order = np.argsort([-one.images for one in found.estimates], kind='stable')
    for number in order[:SHOWN]:
        one, name = found.estimates[number], '' if len(found.names) == 1 else f'{found.names[number]}: '
        if one.clean:
            yield f'sigmas      {name}clean: reads {one.sigma:.4f}, as clean images do (floor {one.floor:.3g})'
            continue
        if one.coloured:
            yield f'sigmas      {name}none: the noise is not white; {one.sigma:.4f} in the frequencies where it is weakest'
            continue
        clipped = f', clipping corrected by {one.correction - 1:.1%}' if one.correction > 1.001 else ''
        yield f'sigmas      {name}{one.sigma:.4f} +- {one.uncertainty:.2g} ({one.images} images{clipped})'
    if len(order) > SHOWN:
        yield f'            and {len(order) - SHOWN} more groups; --json lists all'


def _spectrum(found):
    white = found.white
    if white is None:
        return
    told = (f'p = {white.p:.2g} at the level {SIGNIFICANCE:g}, power varies by {white.ratio - 1:.0%} over frequencies, from the '
            f'{found.white_from}')
    yield f'spectrum    {"not white" if white.coloured else "white"} ({told})'
    if white.correlated:
        yield f'            channels are correlated, by up to {white.correlation:.2f}'


def _intensity(found):
    signal = found.signal
    if signal is None:
        return
    a, b, (da, db) = signal.a, signal.b, signal.uncertainties
    verdict = 'depends on it' if signal.depends else 'the same everywhere'
    yield (f'intensity   {verdict}: variance = ({a:.3g} +- {da:.1g}) value + ({b:.3g} +- {db:.1g}), p = {signal.p:.2g} of no slope, std '
           f'from {np.sqrt(max(signal.curve.variances[0], 0)):.3g} to {np.sqrt(max(signal.curve.variances[-1], 0)):.3g}')
    if signal.depends:
        stored = stored_fit(found)
        yield f'            in stored units: variance = {stored["a"]:.4g} value + {stored["b"]:.4g}'


def stored_fit(found: Found) -> dict | None:
    """The fit {a, b} in the units of stored values, 0 to 255 of 8-bit images; None where channels have different scales."""
    units = found.data.units or UNITS_8BIT
    scale = tables.common_scale(units)
    if scale is None or np.size(units['offset']) > 1:
        return None
    a = found.signal.a * scale
    return {'a': a, 'b': found.signal.b * scale ** 2 - a * float(units['offset'])}


def warnings(found: Found) -> Iterator[str]:
    """What speaks against using the levels as they are, a sentence each."""
    noisy = found.levels[found.levels > 0]
    if found.lossy:
        yield (f'{found.lossy} images are JPEG or WebP files, whose compression changes noise; measure images before any resize or JPEG, '
               'and store noisy ones without loss')
    if found.method in ('immerkaer', 'mad', 'weak') and len(noisy) and np.median(noisy) < LOW:
        yield (f'single images below {LOW} come out high, because texture adds to what they read; pool images that share a level '
               '(--group=set or class), or give --clean, --pairs or --dark')
    for number in np.argsort([-less for less in found.less], kind='stable')[:1]:
        less, count, name = found.less[number], found.estimates[number].images, found.names[number]
        if less > max(2, FEW * count) and not (found.signal and found.signal.depends):
            yield (f'{less} of {count} images{"" if len(found.names) == 1 else f" of {name}"} are less noisy than the level of their '
                   'group: it is not of one level; use --group=image or class, or a FILE with the group of each image')
    if found.estimates and all(one.clean for one in found.estimates) and np.median(found.readings) > LOW:
        middle = np.median(found.readings)
        yield (f'the images read as clean where noise would be weakest, but single ones read {middle:.2g}: strong texture, '
               'as of small images, does that, and so does noise that is not white (resized, compressed); --clean, --pairs or --dark tell')
    white = found.white
    if any(one.coloured for one in found.estimates) and not (white is not None and white.coloured):
        yield ('what the images have in their finest details is not white noise of one level; coloured noise, as of resized or compressed '
               'images, looks like that')
    if white is not None and white.coloured:
        more = ' or more: flat patches do not show the low frequencies, which --clean, --pairs or --dark do'
        yield (f'the noise is not white, and the ambient loss relies on that; with more noise of the spectrum max S - S(f) (in --json) it '
               f'is white, of the level {white.largest:.4g}' + more * (found.white_from == 'flat patches'))
    if white is not None and white.correlated:
        yield 'the noise of the channels is correlated, and the ambient loss relies on independent noise'
    if found.signal is not None and found.signal.depends and len(noisy):
        yield ('the noise depends on the intensity, and the ambient loss relies on one level per image; convert such data with '
               'dataset_tool.py --stabilise')


def as_json(found: Found) -> dict:
    """Everything that was measured, for other programs."""
    groups = [{'group': name, **_group(one), 'less_noisy': less} for name, one, less in zip(found.names, found.estimates, found.less)]
    told = {'data': str(found.data.path), 'images': len(found.levels), 'method': found.method, 'units': 'network', 'floor': found.floor,
            'noisy': int((found.levels > 0).sum()), 'groups': groups}
    if not found.names:
        told['sigmas'] = [{'image': found.data.image_name(index), 'sigma': float(level), 'uncertainty': float(error)}
                          for index, (level, error) in enumerate(zip(found.levels, found.uncertainties))]
    white, signal = found.white, found.signal
    told['spectrum'] = white and {
        'from': found.white_from, 'white': white.white, 'p': white.p, 'significance': SIGNIFICANCE, 'ratio': white.ratio,
        'correlation': white.correlation, 'correlation_p': white.correlation_p, 'largest': white.largest,
        'bands': [{'vertical': float(f[0]), 'horizontal': float(f[1]), 'power': float(power), 'error': float(error), 'missing': float(more)}
                  for f, power, error, more in zip(white.frequencies, white.power, white.errors, white.missing)]}
    told['intensity'] = signal and {
        'depends': signal.depends, 'a': signal.a, 'b': signal.b, 'uncertainties': list(signal.uncertainties), 'p': signal.p,
        'stored': stored_fit(found), 'means': signal.curve.means.tolist(), 'variances': signal.curve.variances.tolist(),
        'errors': signal.curve.errors.tolist()}
    return {**told, 'warnings': list(warnings(found))}


def _group(one):
    return {'images': one.images, 'sigma': one.sigma, 'uncertainty': one.uncertainty, 'clean': bool(one.clean),
            'coloured': bool(one.coloured), 'floor': one.floor,
            'clipped': one.clipped, 'correction': one.correction}


def record_of(found: Found) -> dict:
    """How the levels were found, for dataset.json."""
    record = {'method': found.method, 'units': 'network', 'floor': found.floor}
    if found.names:
        groups = [{'group': name, **_group(one)} for name, one in zip(found.names, found.estimates)]
        return {**record, 'groups': groups[:RECORDED]}
    noisy = found.levels > 0
    share = float(np.median(found.uncertainties[noisy] / found.levels[noisy])) if noisy.any() else 0.0
    return {**record, 'relative_uncertainty': share}
