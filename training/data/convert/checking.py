# SPDX-License-Identifier: Apache-2.0
"""Checks a data set: every image can be decoded and is like the others, and their annotations are valid and complete."""

import collections
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE, Archive, damage, decode_image
from dnnlib.cpus import cpu_count
from dnnlib.progress import Progress
from training.data import tables
from training.data.contents import Pictures
from training.data.convert.statistics import Summary, facts_of, facts_of_dataset, lines, measure
from training.data.dataset import ImageDataset
from training.data.latents import read_latents
from training.data.packed import Packed, is_packed

CHUNK = 64  # images per task of a thread
SHOWN = 100  # problems of one kind, at most, that are printed one by one
META = 'dataset.json'


def check(path: str, say: Callable[[str], Any]) -> bool:
    """True if nothing is wrong with the zip, folder or packed array; say(line) is called for each problem. Raises UserError if it cannot
    be opened."""
    problems = Problems(say)
    summary, count, facts = (_check_packed if is_packed(path) else _check_pictures)(path, problems, say)
    problems.close()
    if problems.count:
        say(f'{path}: {problems.count} problems')
    else:
        for line in lines(summary, facts()):
            say(line)
        say(f'{path}: nothing wrong with its {count} images')
    return not problems.count


def _check_pictures(path, problems, say):
    """For a zip or folder: (Summary of most images, number of images, function that returns the Facts if there are no problems)."""
    archive = Archive(path)
    names = archive.images()
    others = sorted({*archive.names} - {*names, META})
    if others:
        say(f'{len(others)} other files, such as {others[0]}, which training does not read')
    meta = _meta(archive, problems)
    seen, summaries = _look_at(names, lambda name: decode_image(name, archive.read(name)), is_distribution(meta.get('latents')))
    usual = max(summaries, key=lambda like: summaries[like].count, default=None)
    for name, one in zip(names, seen):
        if isinstance(one, str):
            problems.add('image', f'{name}: {one}')
        elif one != usual:
            problems.add('unlike', f'{name}: {_phrase(one)}, where most are {_phrase(usual)}')
    is_float = bool(usual) and usual[0] != 'uint8'
    found, shape = _check_latents(meta.get('latents'), usual[1], len(names), problems) if is_float else (None, usual and usual[1])
    scale = _check_units(meta.get('units'), shape[0], problems) if is_float else 1.0
    known = set(names)
    for key in tables.CHECKS:
        if meta.get(key):
            _check_table(key, meta[key], names, known, scale, problems)
    if not problems.count:
        _check_text(path, problems)
    return summaries.get(usual), len(names), lambda: facts_of(meta, names, shape, is_float)._replace(latents=found)


def _check_packed(path, problems, say):
    """The same for a packed data set."""
    contents = Packed(path)
    if path.lower().endswith('.npz'):
        _check_members(path, problems)
    names = [contents.name(index) for index in range(contents.count)]
    seen, summaries = _look_at(range(contents.count), contents.decode, is_distribution(contents.latents))
    for name, one in zip(names, seen):
        if isinstance(one, str):
            problems.add('image', f'{name}: {one}')
    shape = _check_latents(contents.latents, contents.image_shape, contents.count, problems)[1]
    scale = _check_units(contents.units, shape[0], problems) if contents.is_float else 1.0
    for key, function in tables.CHECKS.items():
        try:
            if contents.has(key):
                function(contents.values(key), names, scale)
        except ValueError as err:
            problems.add(key, f'{key}.npy {err}')
        except UserError as err:
            problems.add(key, str(err))
    if not problems.count:
        _check_text(path, problems)
    return (next(iter(summaries.values()), None), len(names),
            lambda: facts_of_dataset(ImageDataset(path, use_labels=contents.has('labels'))))


def _check_text(path, problems):
    """Checks captions, and the labels that were made of them, by opening the data as training does."""
    try:
        contents = (Packed if is_packed(path) else Pictures)(path)
        contents.captions()
        if contents.text is not None:
            ImageDataset(path, use_labels=True)
    except UserError as err:
        problems.add('text', err.message.removeprefix(f'{path}: '))


def _check_members(path, problems):
    """Checks the CRC-32 of the members of an .npz, which mapping them does not verify."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            try:
                with archive.open(info) as member:
                    while member.read(1 << 24):
                        pass
            except DAMAGE as err:
                problems.add('member', f'{info.filename}: cannot be read ({damage(err)})')


class Problems:
    """Prints problems, one line each, up to SHOWN of a kind; then the number of further ones."""

    def __init__(self, say: Callable[[str], Any]):
        self._say, self._kinds = say, collections.Counter()

    @property
    def count(self) -> int:
        """The number of problems of all kinds."""
        return sum(self._kinds.values())

    def add(self, kind: str, line: str) -> None:
        """Counts a problem, and prints it unless there were too many of its kind."""
        self._kinds[kind] += 1
        if self._kinds[kind] <= SHOWN:
            self._say(line)

    def close(self) -> None:
        """Prints how many problems were not printed."""
        for kind, count in self._kinds.items():
            if count > SHOWN:
                self._say(f'... and {count - SHOWN} more of this kind: {kind}')


def is_distribution(told: Any) -> bool:
    """Whether an unchecked "latents" of dataset.json is of distributions, which have twice the channels."""
    return isinstance(told, dict) and told.get('form') == 'distribution'


def _check_latents(told, shape, count, problems):
    """(Latents or None, shape [C,H,W] of one), for stored images of that shape and count."""
    try:
        found = read_latents(told, shape, count)
    except ValueError as err:
        problems.add('latents', f'{META}: has {err}')
        found = None
    return found, (shape[0] // 2, *shape[1:]) if found and found.distribution else shape


def _look_at(places, read, distribution=False):
    """([(type, shape) of each image, or its problem as a str], {(type, shape): Summary}); read(place) decodes, in threads."""
    def of_chunk(start):
        likes, summaries = [], {}
        for place in places[start:start + CHUNK]:
            image = _look(place, read)
            likes.append(image if isinstance(image, str) else (str(image.dtype), image.shape))
            if not isinstance(image, str):
                summaries.setdefault(likes[-1], Summary()).add(measure(image, distribution and len(image) % 2 == 0))
        return likes, summaries

    found, total, known = [], {}, {}
    with ThreadPoolExecutor(cpu_count()) as pool, Progress(len(places), 'Checking') as bar:
        for likes, summaries in pool.map(of_chunk, range(0, len(places), CHUNK)):
            found += [known.setdefault(like, like) for like in likes]  # equal ones share one object
            for like, summary in summaries.items():
                total.setdefault(like, Summary()).merge(summary)
            bar.update(len(likes))
    return found, total


def _look(place, read):
    """The image [C,H,W], uint8 or float32; or its problem as a str."""
    try:
        image = read(place)
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
    """The content of dataset.json; {} if it is missing or damaged."""
    try:
        return archive.read_json(META)
    except UserError as err:
        problems.add('json', str(err))
        return {}


def _check_units(told, channels, problems):
    """The divisor of the levels of float images."""
    try:
        units = tables.units(told)
        if isinstance(units['scale'], list) and len(units['scale']) != channels:
            problems.add('units', f'{META}: has units of {len(units["scale"])} channels, and the images have {channels}')
        return tables.level_scale(units)
    except KeyError:
        problems.add('units', f'{META}: float images need "units": {{"offset": ..., "scale": ...}}')
    except ValueError as err:
        problems.add('units', f'{META}: {err}')
    return 1.0


def _check_table(key, table, names, known, scale, problems):
    """Checks that the table has exactly the images of the archive, with values that training accepts."""
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
        tables.CHECKS[key](values, present, scale)
    except ValueError as err:
        problems.add(key, f'{META}: "{key}" {err}')
