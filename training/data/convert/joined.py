# SPDX-License-Identifier: Apache-2.0
"""Several sources as one: their images one after the other, with the labels and levels of each."""

import bisect
import contextlib
import itertools
import os
import re
from collections.abc import Sequence

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from training.data import tables
from training.data.convert.readers.source import Kind, Source
from training.estimation.stabilise import from_record

ABSENT = {'sigmas': 0.0, 'sigma_min': None, 'sigma_max': None}  # values for images of a source without levels, if others have some


class Joined(Source):
    """Sources one after the other. If they share names of images, these are prefixed with the name of the source's file or folder:
    noisy/00.png, and for another source of that name noisy-2/00.png.

    sources: [(path, Source)]. keep_labels, keep_units: whether to use the sources' own; otherwise they may disagree, and units are kept
    only as far as levels depend on them. Raises UserError."""

    def __init__(self, sources: Sequence[tuple[str, Source]], keep_labels: bool = True, keep_units: bool = True):
        _check_depths(sources)
        self._sources = [source for _, source in sources]
        self._starts = [0, *itertools.accumulate(len(source.names) for source in self._sources)]
        self.names = _names(sources)
        self.labels = _labels(sources) if keep_labels else None
        self.text = _text(sources) if self.labels else None
        if any(source.captions for source in self._sources):
            self.captions = [text for source in self._sources for text in source.captions or [''] * len(source.names)]
        for key, absent in ABSENT.items():
            setattr(self, key, _levels(self._sources, key, absent))
        self.stabilise = _stabilised(sources)
        self.units = _units(sources) if keep_units else _units_of_levels(sources)

    def _find(self, index):
        number = bisect.bisect_right(self._starts, index) - 1
        return self._sources[number], index - self._starts[number]

    def kind(self, index: int) -> Kind:
        """The Kind of the image, from its own source."""
        source, index = self._find(index)
        return source.kind(index)

    def read(self, index: int) -> np.ndarray:
        """The image, as its own source reads it."""
        source, index = self._find(index)
        return source.read(index)


def _check_depths(sources):
    """Refuses a mixture of 8-bit and other sources, judged by their first images: they need different units."""
    found = {}
    for path, source in sources:
        with contextlib.suppress(*DAMAGE):
            found.setdefault(source.kind(0).is_8bit, path)
    if len(found) == 2:
        raise UserError(f'--source: {found[True]} has 8-bit images, and {found[False]} has others; convert them to one kind first')


def _names(sources):
    names = [name for _, source in sources for name in source.names]
    if len(set(names)) == len(names):
        return names
    prefixes = []
    for path, _ in sources:
        stem = os.path.basename(os.path.abspath(path))
        stem = stem if os.path.isdir(path) else re.sub(r'(?<=.)\.(tar\.\w+|\w+)$', '', stem)
        choices = itertools.chain([stem], (f'{stem}-{number}' for number in itertools.count(2)))
        prefixes.append(next(prefix for prefix in choices if prefix not in prefixes))
    return [f'{prefix}/{name}' for prefix, (_, source) in zip(prefixes, sources) for name in source.names]


def _labels(sources):
    """Labels of one sort: class numbers, names of classes, or vectors; None if no source has any."""
    sorts = {}
    for path, source in sources:
        sorts.setdefault(_sort(source.labels), path)
    if len(sorts) == 1:
        return None if None in sorts else [label for _, source in sources for label in source.labels]
    (sort, path), (other_sort, other) = itertools.islice(sorts.items(), 2)
    told = ', '.join(f'{where} has {what or "no labels"}' for what, where in ((sort, path), (other_sort, other)))
    raise UserError(f'--source: {told}; give each PATH:label=NAME (label=none: no labels), or --labels=FILE for all')


def _sort(labels):
    if not labels:
        return None
    return {str: 'names of classes', int: 'class numbers'}.get(type(labels[0]), 'vectors')


def _text(sources):
    """The record of labels that were made of captions, which must be the same for all."""
    (first, source), *others = sources
    for path, other in others:
        if other.text != source.text:
            raise UserError(f'--source: the labels of {first} and {path} are not of the same text encoder; give each label=none, and embed '
                            'the captions again')
    return source.text


def _levels(sources, key, absent):
    if all(getattr(source, key) is None for source in sources):
        return None
    return [level for source in sources for level in (getattr(source, key) or itertools.repeat(absent, len(source.names)))]


def _stabilised(sources):
    """The record of the transform of stabilised counts, which must be the same for all, whatever their units."""
    (first, source), *others = sources
    for path, other in others:
        if other.stabilise != source.stabilise:
            told = ', '.join(f'{where} {from_record(record).words() if record else "not at all"}'
                             for where, record in ((first, source.stabilise), (path, other.stabilise)))
            raise UserError(f'--source: their values are not stabilised alike ({told}); convert the counts again with one --stabilise')
    return source.stabilise


def _units(sources):
    (first, source), *others = sources
    for path, other in others:
        if other.units != source.units:
            told = ', '.join(f'{where} has {units or "none"}' for where, units in ((first, source.units), (path, other.units)))
            raise UserError(f'--source: their units differ ({told}); give --units=OFFSET,SCALE for all')
    return source.units


def _units_of_levels(sources):
    """Units from which tables.level_scale() knows whether levels are in stored or in network units, which must be the same for all."""
    found = {}
    for path, source in sources:
        if source.units and any(getattr(source, key) is not None for key in ABSENT):
            found.setdefault(tables.common_scale(source.units) is None, (path, source.units))
    if len(found) == 2:
        raise UserError(f'--source: {found[True][0]} has channels of different scales, and therefore levels in network units, but '
                        f'{found[False][0]} in those of its values; convert one of them with units like the other\'s first')
    return next((units for _, units in found.values()), None)
