# SPDX-License-Identifier: Apache-2.0
"""Limits by classifiers, at few levels with an isotonic fit; in folds, so that no image is labelled by a classifier that was trained on
it."""

import numpy as np
import scipy.special

from dnnlib import UserError
from torch_utils import distributed, misc
from training.annotation import calibration, classifier, report, thresholds
from training.annotation.sets import Sets

DRAWS = 4  # of the noise at each level, for limits of single images; means over images need one
MOST = 4096  # images of a set or class that are labelled for a limit they have in common
LEAST_IMAGES = 30  # of a class, for a limit of its own


def classify(sets: Sets, levels: np.ndarray, options: dict) -> tuple[np.ndarray, list[dict], dict[str, str]]:
    """(limits [N], groups, held_out) as annotate.Found for the options of the command line. Raises UserError."""
    folds, per = options['folds'], options['per']
    if min(len(sets.clean), len(sets.data)) < folds:
        raise UserError(f'--folds={folds}: there are {len(sets.clean)} clean images and {len(sets.data)} others; each fold needs some of '
                        'both')
    chosen = _chosen(sets, per)
    clean_rows = _spread(np.arange(len(sets.clean)), MOST)
    clean, data, areas = _scores(sets, clean_rows, chosen, levels, DRAWS if per == 'image' else 1, options)
    fitted = calibration.calibrate(clean[..., 0], data)
    values, of_clean = calibration.probabilities(data, fitted), calibration.probabilities(clean, fitted)
    limits, groups = _limits(sets, chosen, values, levels, options)
    for group in groups:
        group['area'] = areas.tolist()
    raw = calibration.calibration_error(scipy.special.expit(clean[..., 0]), scipy.special.expit(data).mean(2))
    told = {'held out': 'area under the ROC curve ' + ', '.join(
                f'{value:.2f} at {level:g}' for level, value in _at(report.SHOWN, levels, areas)),
            'calibration': f'mean error of P(clean) on held-out images {raw:.3f} as trained, '
                           f'{calibration.calibration_error(of_clean, values):.3f} as used'}
    return limits, groups, told


def _at(shown, levels, values):
    return [(level, float(np.interp(np.log(level), np.log(levels), values))) for level in shown if levels[0] <= level <= levels[-1]]


def _spread(rows, most):
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def _chosen(sets, per):
    """The imperfect images that are labelled, by row."""
    rows = np.arange(len(sets.data))
    if per == 'image':
        return rows
    if per == 'set':
        return _spread(rows, MOST)
    return np.sort(np.concatenate([_spread(np.flatnonzero(sets.classes == one), MOST) for one in np.unique(sets.classes)]))


def _fold_of(count, folds, seed, name):
    """The fold of each of `count` images, int64 [count]: shuffled, of equal size."""
    order = np.random.default_rng(misc.seed_of(seed, 'annotate', 'folds', name)).permutation(count)
    fold = np.empty(count, np.int64)
    fold[order] = np.arange(count) % folds
    return fold


def _scores(sets, clean_rows, rows, levels, draws, options):
    """Held-out logits of the clean images [n, L, 1] and of the others [m, L, draws], and the area under the ROC curve [L], a mean over the
    folds."""
    seed, folds = options['seed'], options['folds']
    device = distributed.pick_device(options['device'])
    recipe = classifier.Recipe(options['arch'], options['kimg'], options['batch'], options['lr'], seed, device)
    readers = classifier.reader(sets.clean), classifier.reader(sets.data)
    fold_clean, fold_data = (_fold_of(len(dataset), folds, seed, name) for dataset, name in ((sets.clean, 'clean'), (sets.data, 'data')))
    zero, native = np.zeros(len(sets.clean)), np.asarray(sets.data.native_sigma, np.float64)
    clean, data = np.empty([len(clean_rows), len(levels), 1], np.float32), np.empty([len(rows), len(levels), draws], np.float32)
    areas = []
    for fold in range(folds):
        kept = np.flatnonzero(fold_clean != fold), np.flatnonzero(fold_data != fold)
        net = classifier.train(*readers, kept, native, (levels[0], levels[-1]), sets.data.image_shape, recipe, fold)
        shared = {'seed': seed, 'batch': options['batch_gpu'], 'device': device}
        held_clean, held_data = np.flatnonzero(fold_clean[clean_rows] == fold), np.flatnonzero(fold_data[rows] == fold)
        clean[held_clean] = classifier.label(net, readers[0], clean_rows[held_clean], zero, levels, name='clean', **shared)
        data[held_data] = classifier.label(net, readers[1], rows[held_data], native, levels, name='data', draws=draws, **shared)
        if len(held_clean) and len(held_data):
            areas.append(calibration.area(clean[held_clean, :, 0], data[held_data, :, 0]))
    return clean, data, np.mean(areas, axis=0)


def _limits(sets, rows, values, levels, options):
    """(limits of all images, groups of the report); values: P(clean) of the images `rows`, [n, L]."""
    threshold, per = options['threshold'], options['per']
    parts = {'all': np.ones(len(rows), bool)}
    if per == 'class':
        parts |= {f'class {one}': sets.classes[rows] == one for one in np.unique(sets.classes)}
    limits, groups = np.zeros(len(sets.data)), []
    for name, members in parts.items():
        if name != 'all' and members.sum() < LEAST_IMAGES:
            continue
        curve = thresholds.isotonic(values[members].mean(0)[None])
        limit = float(thresholds.crossing(levels, curve, threshold)[0])
        limits[slice(None) if name == 'all' else sets.classes == int(name.split()[1])] = limit
        groups.append({'name': name, 'clean': len(sets.clean), 'images': int(members.sum()), 'limit': limit, 'levels': levels.tolist(),
                       'probability': curve[0].tolist(), 'spread': report.quantiles(values[members])})
    if per == 'image':
        limits[rows] = thresholds.crossing(levels, thresholds.isotonic(values), threshold)
    return limits, groups
