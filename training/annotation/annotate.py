# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py annotate: from which noise level on imperfect images are as good as clean ones, written into their data set."""

import importlib.util
import os
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.files import prepare_output, write_json
from dnnlib.versions import versions
from torch_utils import registry
from training.annotation import patches, report, spectral, thresholds
from training.annotation.sets import images_of, in_chunks, open_sets
from training.data import tables
from training.data.convert.rewrite import check_place, replace_levels
from training.diffusion.noise import NOISE

TAIL = 1e-3  # of p(sigma) below the lowest level that is compared, and above the highest one
LEAST_IMAGES = 30  # of a class in each set, for a limit of its own
EXAMPLES = 64  # clean images whose colours are looked at
DIGITS = 4  # significant digits of the limits that are written


class Found(NamedTuple):
    """limits: of the images, [N] in network units; groups: facts for the report; held_out: further lines of the report.

    A sigma_min of 0 is no limit, and inf leaves an image out; a sigma_max of inf is no limit, and 0 leaves it out."""

    limits: np.ndarray
    groups: list[dict]
    held_out: dict | None = None


def annotate(options: dict) -> list[str]:
    """Writes the limits for the options of the command line, a dict; returns lines of text to print. Raises UserError."""
    data, dest = options['data'], options['dest'] or options['data']
    check_place(data, dest, '--data')
    outputs = _outputs(options, dest)
    sets = open_sets(options['clean'], data)
    if options['per'] == 'class' and sets.classes is None:
        raise UserError('--per=class: needs classes in both sets, "labels" in their dataset.json; use --per=set')
    noise = registry.build(options['noise'], NOISE, '--noise')
    levels = _levels(sets, noise, options['levels'])
    look = options['white_noise'] == 'auto' and options['limit'] == 'sigma_min' and not sets.data.native_sigma.any()
    by_moments = options['limit'] == 'sigma_min' and options['method'] == 'spectral'
    if by_moments and options['per'] == 'image':
        raise UserError('--per=image: --method=spectral compares sets, not single images; use --per=class, or --method=classifier')
    whole = _comparisons(sets, np.arange(len(sets.clean)), np.arange(len(sets.data))) if look or by_moments else None
    white = spectral.only_noise(whole, levels, options['threshold']) if look else None
    if white is not None:
        found = Found(np.zeros(len(sets.data)), [_facts('all', sets, white)])
    elif options['limit'] == 'sigma_max':
        found = _details(sets, levels, options)
    elif by_moments:
        found = _spectral(sets, whole, levels, options)
    else:
        from training.annotation.labelling import classify
        found = Found(*classify(sets, levels, options))
    limits = np.float64([f'{limit:.{DIGITS}g}' for limit in found.limits])
    std = white.noise if white is not None else None
    result = _result(sets, options, found._replace(limits=limits), noise, std)
    if outputs['sheet']:
        report.draw_examples(outputs['sheet'], sets, np.full(len(limits), std) if std else limits, options['seed'])
    if outputs['plot']:
        report.draw_curves(outputs['plot'], result)
    _write(sets, data, dest, options['limit'], limits, std)
    if outputs['report']:
        write_json(outputs['report'], result, null=True)
    return [*report.lines(result), *_next_steps(options, dest, outputs)]


def _outputs(options, dest):
    """{report, sheet, plot: path or None}; refuses paths that cannot be written."""
    stem = os.path.splitext(os.path.abspath(dest))[0]
    told = {'report': f'{stem}-annotation.json', 'sheet': f'{stem}-annotation.png', 'plot': None}
    found = {key: None if options[key] == 'none' else options[key] or default for key, default in told.items()}
    for key, path in found.items():
        if path:
            prepare_output(path, f'--{key}', '.json' if key == 'report' else '.png')
    if found['plot'] and importlib.util.find_spec('matplotlib') is None:
        raise UserError('--plot needs the package matplotlib: pip install matplotlib')
    return found


def _levels(sets, noise, count):
    """Levels at which images are compared, evenly spaced in ln sigma, float64 [count]: all of p(sigma) above the images' own noise."""
    low, high = noise.icdf(torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)).tolist()
    low = max(low, float(sets.data.native_sigma.max()))
    if low >= high:
        raise UserError(f'--data={sets.data.path}: its images carry noise of up to {low:g}, above all levels of --noise')
    return np.geomspace(low, high, count)


# ----------------------------------------------------------------------------------------------------
# By means and covariances


def _comparisons(sets, clean_rows, rows):
    """Comparisons of these images of both sets in all bases."""
    some = images_of(sets.clean, clean_rows[np.linspace(0, len(clean_rows) - 1, min(EXAMPLES, len(clean_rows))).astype(int)])
    bases, found = spectral.bases(some, (len(clean_rows), len(rows))), []
    for dataset, chosen, title in ((sets.clean, clean_rows, 'Reading clean images'), (sets.data, rows, 'Reading images')):
        moments, done = [spectral.Moments(basis, some[0].numel()) for basis in bases], 0
        for part, images in in_chunks(dataset, chosen, title):
            for one in moments:
                one.add(images, done)
            done += len(part)
        found.append(moments)
    return [spectral.Comparison(*pair) for pair in zip(*found)]


def _spectral(sets, whole, levels, options):
    limits, groups = np.zeros(len(sets.data)), []
    for name, clean_rows, rows in _parts(sets, options):
        compared = whole if name == 'all' else _comparisons(sets, clean_rows, rows)
        found = spectral.curve(compared, levels, options['threshold'], _carried(sets, rows))
        limits[rows] = found.limit  # of all images first, then of classes that have enough images
        groups.append(_facts(name, sets, found, len(clean_rows), len(rows)))
    return Found(limits, groups)


def _details(sets, levels, options):
    if options['method'] != 'spectral' or options['per'] == 'image':
        raise UserError('--limit=sigma_max: patches are compared by their covariances, of a set or a class; leave out '
                        '--method=classifier and --per=image')
    limits, groups = np.zeros(len(sets.data)), []
    sides = patches.sides_of(sets.data.image_shape)
    for name, clean_rows, rows in _parts(sets, options):
        found = [patches.moments_of(dataset, chosen, sides, options['seed'], f'Reading {title}')
                 for dataset, chosen, title in ((sets.clean, clean_rows, 'clean images'), (sets.data, rows, 'images'))]
        details = patches.details(*found, sets.data.image_shape, levels, options['threshold'], _carried(sets, rows))
        limits[rows] = details.limit
        groups += [{**_facts(f'{name}, {side}x{side}', sets, curve, len(clean_rows), len(rows)), 'side': side}
                   for side, curve in zip(details.sides, details.curves)]
    return Found(limits, groups)


def _parts(sets, options):
    """(name, rows of clean images, rows of others): all images first, then those of each class with enough images, if --per=class."""
    yield 'all', np.arange(len(sets.clean)), np.arange(len(sets.data))
    for label in np.unique(sets.classes) if options['per'] == 'class' else ():
        rows = [np.flatnonzero(classes == label) for classes in (sets.clean_classes, sets.classes)]
        if min(map(len, rows)) >= LEAST_IMAGES:
            yield f'class {label}', *rows


def _carried(sets, rows):
    """The std of the white noise that these images are known to carry: the root of its mean variance."""
    return float(np.sqrt(np.square(sets.data.native_sigma[rows]).mean()))


def _facts(name, sets, found, clean=None, images=None):
    """A group of the report, of a Curve."""
    return {'name': name, 'clean': clean or len(sets.clean), 'images': images or len(sets.data), 'limit': found.limit,
            'levels': found.levels.tolist(), 'probability': found.probability.tolist(),
            'area': thresholds.area_under_curve(found.kl).tolist(), 'kl': found.kl.tolist(), 'kl_error': found.error.tolist()}


# ----------------------------------------------------------------------------------------------------
# Results


def _result(sets, options, found, noise, std):
    """What --report holds."""
    key, limits = options['limit'], found.limits
    sigmas = sets.data.native_sigma if std is None else np.full(len(sets.data), std)
    low, high = _both(sets, key, limits)
    told = lambda dataset: {'path': dataset.path, 'images': len(dataset), 'fingerprint': dataset.fingerprint()}
    return {'limit': key, 'method': options['method'], 'per': options['per'], 'threshold': options['threshold'],
            'kl': thresholds.kl_of_threshold(options['threshold']), 'clean': told(sets.clean), 'data': told(sets.data), 'noise': std,
            'found': report.summary_of(limits, 0 if key == 'sigma_min' else np.inf), 'by_class': report.by_class(limits, sets.classes),
            'usable': report.usable_shares(noise, sigmas, low, high), 'held_out': found.held_out,
            'groups': found.groups, 'options': {key: options[key] for key in sorted(options)}, 'versions': versions()}


def _both(sets, key, limits):
    """(sigma_min, sigma_max) of the images, [N] each: the new ones, and those that stay. Images without a usable level have sigma_min inf
    and no sigma_max."""
    if key == 'sigma_min':
        return limits, sets.data.sigma_max
    return np.where(limits == 0, np.inf, sets.data.sigma_min), np.where(limits == 0, np.inf, limits)


def _write(sets, data, dest, key, limits, std):
    """Writes the tables that changed into the data set; std: of the white noise that the images carry, if only that was found."""
    scale = tables.level_scale(sets.data.units)
    low, high = _both(sets, key, limits)
    stored = {'sigma_min': [min(limit * scale, tables.LARGEST) or None for limit in low.tolist()],  # JSON has no infinity
              'sigma_max': [limit * scale if limit < np.inf else None for limit in high.tolist()]}
    changed = ['sigma_min'] if key == 'sigma_min' else ['sigma_min', 'sigma_max'] if not limits.all() else ['sigma_max']
    columns = {name: stored[name] if any(value is not None for value in stored[name]) else None for name in changed}
    if std is not None:
        columns['sigmas'] = [float(f'{std * scale:.{DIGITS}g}')] * len(limits)
    replace_levels(data, dest, columns, [sets.data.image_name(row) for row in sets.data.raw_idx])


def _next_steps(options, dest, outputs):
    yield f'{dest}: written' + ''.join(f'; {path}' for path in outputs.values() if path)
    yield f'To train on both: python dataset_tool.py --source={options["clean"]} --source={dest} --dest=both.zip'
