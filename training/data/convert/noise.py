# SPDX-License-Identifier: Apache-2.0
"""Estimates the noise levels of a data set: of the whole, of classes or other groups that share a level, or of single images."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dnnlib import UserError
from dnnlib.archive import LOSSY
from dnnlib.cpus import cpu_count
from dnnlib.progress import Progress
from training.data import tables
from training.data.convert.annotations import match, read_table
from training.data.convert.noise_report import Found, as_json, lines, record_of
from training.data.convert.rewrite import replace_levels
from training.data.dataset import ImageDataset
from training.estimation import clipping, rician, single, spectral, whiteness
from training.estimation.estimate import Estimate
from training.estimation.pooled import PatchCovariances
from training.estimation.signal_dependent import fit_poisson_gaussian

METHODS = ('auto', 'pooled', *single.SINGLE, 'spectral', 'pairs', 'dark')
GROUPS = ('set', 'class', 'image', 'sigmas')
CHUNK = 256      # images read at a time
EXAMINED = 2048  # images that whiteness and the dependence on intensity are examined on
FLOORS = {'immerkaer': 0.06, 'mad': 0.06, 'weak': 0.04}  # what clean photographs of 32x32 read: mean and two std (docs/noise.md)
LESS = 6  # standard errors below the level of its group, from which on an image is less noisy


class Sets(NamedTuple):
    """The data sets of one call; those that are not given are None."""

    data: ImageDataset
    clean: ImageDataset | None
    pairs: ImageDataset | None
    dark: ImageDataset | None


def noise(options: dict) -> list[str]:
    """Measures, plots and writes for the options of the command line, a dict; returns lines to print. Raises UserError."""
    if options['law'] == 'rician':
        return magnitudes(options)
    sets = open_sets(options)
    data = sets.data
    if options['write'] and data.contents.has('sigmas') and not options['overwrite']:
        raise UserError(f'--write: {data.path} has levels already, in "sigmas"; replace them with --overwrite')
    if options['plot'] and not options['plot'].lower().endswith('.png'):
        raise UserError(f'--plot={options["plot"]}: must end in .png')
    names, group = groups_of(data, options['group'])
    method = method_of(options, sets)
    found = measure(sets, names, group, method)
    named = found.white is not None and found.white.coloured and found.white_from == 'reference'
    if options['write'] and (named or any(one.coloured for one in found.estimates)):
        raise UserError(f'--write: the noise of {data.path} is not white (run the command without --write for its spectrum), and has no '
                        'level that could be written')
    if options['plot']:
        from training.data.convert.noise_plot import draw
        draw(options['plot'], found)
    told = [json.dumps(as_json(found), indent=2)] if options['json'] else lines(found)
    if options['write']:
        names = [data.image_name(row) for row in data.raw_idx]
        replace_levels(data.path, data.path, {'sigmas': stored(found)}, names, {'noise': record_of(found)})
        if not options['json']:
            told.append(f'{data.path}: sigmas of {len(data)} images written')
    return told


def magnitudes(options: dict) -> list[str]:
    """Lines about the Rician noise of magnitude images, from their background. Raises UserError."""
    unused = next((key for key in ('method', 'group', 'clean', 'pairs', 'dark', 'plot', 'write')
                   if options[key] not in ('auto', 'set', None, False)), None)
    if unused:
        raise UserError(f'--law=rician measures one sigma in the background of all images, and has no use for --{unused}; leave it out')
    data = open_set(options['data'], options['data'])
    chosen = data.raw_idx[np.linspace(0, len(data) - 1, min(len(data), EXAMINED)).astype(int)]
    images = np.stack([data.decode(index) for index in chosen]).astype(np.float64)
    if images.min() < 0:
        raise UserError(f'{data.path}: has values below 0, down to {images.min():.4g}; magnitudes are 0 or more')
    if not options['json']:
        return rician.lines(images)
    found = rician.background(images)
    told = {'data': data.path, 'law': 'rician', 'images': len(images), **(found._asdict() if found else {'sigma': None})}
    return [json.dumps(told, indent=2)]


def open_sets(options: dict) -> Sets:
    """The Sets, checked against each other. Raises UserError."""
    for key in ('pairs', 'dark', 'clean'):
        others = [other for other in ('pairs', 'dark', 'clean') if other != key and options[other]]
        if options[key] and others:
            raise UserError(f'--{key} and --{others[0]} are different ways to measure; give one of them')
    found = Sets(*(open_set(options[key], f'--{key}={options[key]}' if key != 'data' else options[key]) if options[key] else None
                   for key in ('data', 'clean', 'pairs', 'dark')))
    for key, other in found._asdict().items():
        if other is None or key == 'data':
            continue
        here = f'--{key}={options[key]}'
        if other.image_shape[0] != found.data.image_shape[0] or key != 'dark' and other.image_shape != found.data.image_shape:
            raise UserError(f'{here}: its images are {_shape(other)} (channels x height x width), those of {found.data.path} '
                            f'{_shape(found.data)}; they must be alike')
        if other.units != found.data.units:
            raise UserError(f'{here}: its values have other units ({other.units or "8 bits"}) than those of {found.data.path} '
                            f'({found.data.units or "8 bits"}); convert both with the same --units')
        if key == 'pairs' and len(other) != len(found.data):
            raise UserError(f'{here}: has {len(other)} images, {found.data.path} {len(found.data)}; the second exposures must be in the '
                            'order of the first')
    return found


def open_set(path: str, where: str) -> ImageDataset:
    """The ImageDataset at a path, with its classes if it has labels. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f'{where}: no such zip file or folder')
    found = ImageDataset(path)
    if found.latents is not None:
        raise UserError(f'{where}: holds latents, and noise is estimated of pictures; measure these before they are encoded')
    return ImageDataset(path, use_labels=True) if found.has_labels else found


def _shape(data):
    return ' x '.join(map(str, data.image_shape))


def groups_of(data: ImageDataset, group: str) -> tuple[list[str], np.ndarray]:
    """(names of the groups, the group of each image int64 [N]) for --group; single images: no names. Raises UserError."""
    if group == 'set':
        return ['all'], np.zeros(len(data), np.int64)
    if group == 'image':
        return [], np.arange(len(data))
    if group == 'class':
        if data.classes is None:
            raise UserError(f'--group=class: {data.path} has no classes; use --group=set, image, or a FILE with the group of each image')
        told = [f'class {number}' for number in data.classes.tolist()]
    elif group == 'sigmas':
        if not data.contents.has('sigmas'):
            raise UserError(f'--group=sigmas: {data.path} has no levels, "sigmas", to group its images by; use --group=set, class or image')
        told = [f'stated {level:.4g}' for level in data.native_sigma.tolist()]
    elif not os.path.isfile(group):
        raise UserError(f'--group={group}: choose from {", ".join(GROUPS)}, or name a CSV, JSON or .npy file with the group of each image')
    else:
        names = [data.image_name(index) for index in range(len(data))]
        told = [str(value) for value in match(read_table(group, '--group', 'groups'), names, f'--group={group}')]
    order = {name: number for number, name in enumerate(dict.fromkeys(told))}
    return list(order), np.array([order[name] for name in told])


def method_of(options: dict, sets: Sets) -> str:
    """The method that --method names, or that fits what is given. Raises UserError."""
    method, given = options['method'], {'spectral': sets.clean, 'pairs': sets.pairs, 'dark': sets.dark}
    needed = {'spectral': 'clean', 'pairs': 'pairs', 'dark': 'dark'}
    if method == 'auto':
        found = next((name for name, one in given.items() if one is not None), None)
        method = found or (single.DEFAULT if options['group'] == 'image' else 'pooled')
    if method in needed and given[method] is None:
        raise UserError(f'--method={method} needs --{needed[method]}=SET')
    unused = next((key for name, key in needed.items() if given[name] is not None and name != method), None)
    if unused:
        raise UserError(f'--{unused} is not used by --method={method}; leave one of them out')
    if options['group'] == 'image' and method in ('pooled', 'spectral'):
        raise UserError(f'--method={method} is for groups of images; for single ones use {", ".join(single.SINGLE)} or pairs')
    if method == 'dark' and options['group'] != 'set':
        raise UserError('--dark: dark frames give one level for all images; use --group=set')
    return method


# ----------------------------------------------------------------------------------------------------
# Measuring


def read(data: ImageDataset, chosen: Sequence[int], bar: Progress | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (items [n], images float32 [n,C,H,W] in network units) of chosen items, decoded in threads, a few parts ahead."""
    parts = [chosen[first:first + CHUNK] for first in range(0, len(chosen), CHUNK)]

    def load(part):
        return data.to_network(np.stack([data.decode(index) for index in data.raw_idx[part]])).numpy()

    with ThreadPoolExecutor(cpu_count()) as pool:
        waiting = [pool.submit(load, part) for part in parts[:2 * cpu_count()]]
        for number, part in enumerate(parts):
            images = waiting.pop(0).result()
            if number + 2 * cpu_count() < len(parts):
                waiting.append(pool.submit(load, parts[number + 2 * cpu_count()]))
            yield part, images
            if bar:
                bar.update(len(part))


def measure(sets: Sets, names: list[str], group: np.ndarray, method: str) -> Found:
    """The Found of a data set, measured in one pass over its images."""
    data, count = sets.data, len(sets.data)
    readings, levels, uncertainties = np.zeros(count), np.zeros(count), np.zeros(count)
    estimates, less, white, odd = [], [], None, np.zeros(count, bool)
    dark = of_dark(sets.dark) if method == 'dark' else None
    clean = spectra_of(sets.clean) if method == 'spectral' else None
    single_images = not names
    with Progress(count, 'Measuring') as bar:
        for number in range(1 if single_images else len(names)):
            members = np.arange(count) if single_images else np.flatnonzero(group == number)
            where = data.path if single_images or len(names) == 1 else f'{data.path}: group "{names[number]}"'
            try:
                estimator = Group(data, members, method, clean, sets.pairs)
                for part, images in read(data, members, bar):
                    readings[part] = estimator.add(part, images)
                one, found = dark or estimator.result(readings[members])
            except ValueError as err:
                raise UserError(f'{where}: {err}') from None
            white = found if white is None or found is not None and found.p < white.p else white
            if single_images:
                levels, uncertainties = estimator.levels(readings)
            else:
                levels[members], uncertainties[members] = (0.0 if one.clean else one.sigma), one.uncertainty
                estimates.append(one)
                lower = less_noisy(one, readings[members], data.image_shape)
                less.append(int(lower.sum()))
                odd[members[lower]] = True
    if not np.ptp(readings) and not readings.any() and method not in ('dark', 'pairs'):
        raise UserError(f'{data.path}: all images are constant; noise cannot be measured on them')
    floor = FLOORS[method] if method in FLOORS else max((one.floor for one in estimates), default=0.0)
    if single_images:
        levels = np.where(levels <= floor, 0.0, levels)
    noisy = np.flatnonzero((levels > 0) & ~odd)
    white_flat, signal = examine(data, noisy, estimator.clipped)
    lossy = sum(data.image_name(index).lower().endswith(LOSSY) for index in range(count))
    return Found(data, method, names, estimates, less, levels, uncertainties, readings, floor, white or white_flat,
                 'reference' if white else 'flat patches', signal, lossy)


class Group:
    """Measures images that are added in parts: those of a group, or single ones."""

    def __init__(self, data, members, method, clean, pairs):
        self.data, self.method, self.clean, self.pairs = data, method, clean, pairs
        self.pooled = PatchCovariances(data.image_shape, len(members)) if method == 'pooled' else None
        self.spectra = spectral.Spectra(data.image_shape) if method in ('spectral', 'pairs') else None
        self.own = np.zeros(len(data)) if method == 'pairs' else None
        self._ends, self._beyond, self._seen, self._histogram = 0.0, False, 0, np.zeros(256)

    @property
    def clipped(self):
        """The share of the pixels at the ends of the range; 0 where values lie beyond."""
        return 0.0 if self._beyond else self._ends / max(self._seen, 1)

    def add(self, part, images):
        """Adds images, the items `part`; returns the level that each reads by itself [n], corrected for clipping."""
        self._beyond |= bool(np.abs(images).max() > 1 + 1e-5)
        ends = 0.0 if self._beyond else clipping.share(images)
        self._ends, self._seen = self._ends + ends * len(images), self._seen + len(images)
        shares = clipping.histogram(images) if ends > clipping.SHARE else None
        if shares is not None:
            self._histogram += shares.sum(0)
        if self.pooled:
            self.pooled.add(images)
        if self.method == 'spectral':
            self.spectra.add(images)
        if self.method == 'pairs':
            _, (_, others) = part, next(read(self.pairs, part))
            difference = (images - others) / np.float32(2 ** 0.5)
            self.spectra.add(difference)
            found = np.sqrt(np.square(difference).mean((1, 2, 3), dtype=np.float64))
            self.own[part] = found if shares is None else clipping.corrected(found, shares)
        name = self.method if self.method in single.SINGLE else single.DEFAULT
        found, _ = single.SINGLE[name](images)
        return found if shares is None else clipping.corrected(found, shares)

    def result(self, readings):
        """(Estimate, Whiteness or None) of all images added; readings: the levels that they read by themselves [n]."""
        count = len(readings)
        if self.pooled:
            return self.pooled.estimate(), None
        if self.method in ('spectral', 'pairs'):
            found, white = spectral.against_clean(self.spectra, self.clean) if self.clean else spectral.of_noise(self.spectra, 'pairs')
            return self._corrected(found), white
        middle = float(np.median(readings))
        error = max(1.25 * float(np.std(readings)), float(single.errors(middle, self.data.image_shape, self.method))) / np.sqrt(count)
        return Estimate(middle, error, self.method, count, FLOORS[self.method], self.clipped), None

    def _corrected(self, found):
        """An Estimate for images that are clipped."""
        if self.clipped <= clipping.SHARE or found.clean:
            return found
        sigma = float(clipping.corrected(np.array([found.sigma]), self._histogram[None] / self._histogram.sum())[0])
        factor = sigma / found.sigma
        return found._replace(sigma=sigma, uncertainty=found.uncertainty * factor, clipped=self.clipped, correction=factor)

    def levels(self, readings):
        """(levels, uncertainties) [N] of single images."""
        if self.method == 'pairs':
            return self.own, self.own / np.sqrt(2 * np.prod(self.data.image_shape))
        return readings.copy(), single.errors(readings, self.data.image_shape, self.method)


def less_noisy(one: Estimate, readings: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Which images of a group read less than its level by more than chance, bool [n]: texture can only add to what they read."""
    if one.clean or one.coloured or one.method not in ('pooled', single.DEFAULT):
        return np.zeros(len(readings), bool)
    return readings < one.sigma * (1 - min(0.5, LESS * float(single.errors(1.0, shape, single.DEFAULT))))


def spectra_of(data: ImageDataset) -> spectral.Spectra:
    """The Spectra of clean images."""
    found = spectral.Spectra(data.image_shape)
    with Progress(len(data), 'Reading clean images') as bar:
        for _, images in read(data, np.arange(len(data)), bar):
            found.add(images)
    return found


def of_dark(data: ImageDataset) -> tuple[Estimate, whiteness.Whiteness]:
    """(Estimate, Whiteness) of dark frames: of their differences from their mean, which is the same in all exposures. Raises UserError."""
    count, every = len(data), np.arange(len(data))
    if count < spectral.FEWEST:
        raise UserError(f'--dark={data.path}: {count} frames are too few; give {spectral.FEWEST} or more')
    total, seen = 0.0, np.zeros(256)
    for _, images in read(data, every):
        total = total + images.sum(0, dtype=np.float64)
        seen += clipping.histogram(images).sum(0) if clipping.share(images) > clipping.SHARE else 0
    mean, found = (total / count).astype(np.float32), spectral.Spectra(data.image_shape)
    for _, images in read(data, every):
        found.add((images - mean) * np.float32((count / (count - 1)) ** 0.5))
    try:
        one, white = spectral.of_noise(found, 'dark')
    except ValueError as err:
        raise UserError(f'--dark={data.path}: {err}') from None
    if seen.any():
        sigma = float(clipping.corrected(np.array([one.sigma]), seen[None] / seen.sum())[0])
        one = one._replace(sigma=sigma, uncertainty=one.uncertainty * sigma / one.sigma, correction=sigma / one.sigma)
    return one, white


def examine(data: ImageDataset, noisy: np.ndarray, clipped: float) -> tuple:
    """(Whiteness of the noise in flat patches, PoissonGaussian) of some of the noisy items; None for what they do not tell."""
    if not len(noisy):
        return None, None
    chosen = noisy[::-(-len(noisy) // EXAMINED)]
    ends = (-1.0, 1.0) if clipped > clipping.SHARE else None
    white, signal = whiteness.of_flat_patches((images for _, images in read(data, chosen)), ends), None
    with contextlib.suppress(ValueError):  # too few flat patches
        signal = fit_poisson_gaussian((images for _, images in read(data, chosen)), ends)
    return white, signal


def stored(found: Found) -> list[float]:
    """Levels as dataset.json has them: in the units of the values where all channels have one scale."""
    return [float(level) for level in found.levels * tables.level_scale(found.data.units)]
