# SPDX-License-Identifier: Apache-2.0
"""Whether an archive is whole: every image decodes and is like the others, and dataset.json is valid and names each of them."""

import collections
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE, Archive, damage, decode_image
from dnnlib.progress import Progress
from training.data import tables
from training.data.convert.annotations import LEVELS
from training.data.convert.statistics import Summary, facts_of, lines, measure

CHUNK = 64  # images that a thread takes at a time
SHOWN = 100  # problems of one kind, at most, that are told one by one
META = 'dataset.json'


def check(path, say):
    """Whether nothing is wrong with the zip or folder; say(line) is told of what is found. Raises UserError where it cannot be opened."""
    archive = Archive(path)
    names, problems = archive.images(), Problems(say)
    others = sorted({*archive.names} - {*names, META})
    if others:
        say(f'{len(others)} other files, such as {others[0]}, which training does not read')
    meta = _meta(archive, problems)
    seen, summaries = _decode(archive, names)
    usual = max(summaries, key=lambda like: summaries[like].count, default=None)
    for name, one in zip(names, seen):
        if isinstance(one, str):
            problems.add('image', f'{name}: {one}')
        elif one != usual:
            problems.add('unlike', f'{name}: {_phrase(one)}, where most are {_phrase(usual)}')
    is_float = bool(usual) and usual[0] != 'uint8'
    _check_meta(meta, names, usual[1][0] if is_float else 0, problems)
    problems.close()
    if problems.count:
        say(f'{path}: {problems.count} problems')
    else:
        for line in lines(summaries[usual], facts_of(meta, names, usual[1], is_float)):
            say(line)
        say(f'{path}: nothing wrong with its {len(names)} images')
    return not problems.count


class Problems:
    """What is wrong, a line each, up to SHOWN of a kind: then how many more there are."""

    def __init__(self, say):
        self._say, self._kinds = say, collections.Counter()

    @property
    def count(self):
        """Of all kinds."""
        return sum(self._kinds.values())

    def add(self, kind, line):
        """Takes, and maybe tells, one more."""
        self._kinds[kind] += 1
        if self._kinds[kind] <= SHOWN:
            self._say(line)

    def close(self):
        """Tells how many were not told."""
        for kind, count in self._kinds.items():
            if count > SHOWN:
                self._say(f'... and {count - SHOWN} more of this kind: {kind}')


def _decode(archive, names):
    """(of every image its type and shape, or what is wrong with it as a str; {type and shape: Summary}), decoded in threads."""
    def of_chunk(start):
        likes, summaries = [], {}
        for name in names[start:start + CHUNK]:
            image = _look(archive, name)
            likes.append(image if isinstance(image, str) else (str(image.dtype), image.shape))
            if not isinstance(image, str):
                summaries.setdefault(likes[-1], Summary()).add(measure(image))
        return likes, summaries

    found, total, known = [], {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, Progress(len(names), 'Checking') as bar:
        for likes, summaries in pool.map(of_chunk, range(0, len(names), CHUNK)):
            found += [known.setdefault(like, like) for like in likes]  # one object for those that are equal
            for like, summary in summaries.items():
                total.setdefault(like, Summary()).merge(summary)
            bar.update(len(likes))
    return found, total


def _look(archive, name):
    """The image [C,H,W], uint8 or float32; or what is wrong with it."""
    try:
        image = decode_image(name, archive.read(name))
    except DAMAGE as err:
        return f'cannot be read ({damage(err)})'
    if image.dtype not in (np.uint8, np.float32, np.float64):
        return f'{image.dtype}, expected 8-bit or float32 [C,H,W]: convert it with dataset_tool.py'
    if image.dtype == np.uint8:
        return image
    with np.errstate(over='ignore'):
        image = image.astype(np.float32)
    finite = np.isfinite(image)
    if not finite.all():
        return f'{np.count_nonzero(~finite)} of {image.size} values are not finite ({np.count_nonzero(np.isnan(image))} NaN)'
    return image


def _phrase(like):
    return f'{like[0]} {" x ".join(map(str, like[1]))}'


def _meta(archive, problems):
    """dataset.json, {} where there is none or it is none."""
    try:
        return archive.read_json(META)
    except UserError as err:
        problems.add('json', str(err))
        return {}


def _check_meta(meta, names, channels, problems):
    """channels: of float images; 0 for 8-bit ones, which have no units."""
    scale = 1.0
    if channels:
        try:
            units = tables.units(meta.get('units'))
            scale = tables.level_scale(units)
            if isinstance(units['scale'], list) and len(units['scale']) != channels:
                problems.add('units', f'{META}: has units of {len(units["scale"])} channels, and the images have {channels}')
        except KeyError:
            problems.add('units', f'{META}: float images need "units": {{"offset": ..., "scale": ...}}')
        except ValueError as err:
            problems.add('units', f'{META}: {err}')
    known = set(names)
    for key in ('labels', *LEVELS):
        if meta.get(key):
            _check_table(key, meta[key], names, known, scale, problems)


def _check_table(key, table, names, known, scale, problems):
    """Each image must be in the table, and nothing else; its values must be those that training takes."""
    try:
        found = tables.by_name(tables.pairs_of(table))
    except ValueError as err:
        problems.add(key, f'{META}: "{key}" {err}')
        return
    for name in names:
        if name not in found:
            problems.add(f'missing from "{key}"', f'{name}: not in "{key}" of {META}')
    for name in found:
        if name not in known:
            problems.add(f'"{key}" of no image', f'{name}: in "{key}" of {META}, but not in the archive')
    present = [name for name in names if name in found]
    values = [found[name] for name in present]
    if not values:
        return
    try:
        if key == 'labels':
            tables.labels(values)
        elif key == 'sigmas':
            tables.levels(values, present, scale)
        elif key == 'sigma_max':
            tables.limits(values, present, scale)
        else:
            tables.lower_limits(values, present, scale)
    except ValueError as err:
        problems.add(key, f'{META}: "{key}" {err}')
