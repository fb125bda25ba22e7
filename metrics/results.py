# SPDX-License-Identifier: Apache-2.0
"""Result files of eval_fid.py: reading and checking, file names, comparability, and writing without losing earlier numbers.

A result is a JSON object: numbers under the names of their metrics, and everything that is quoted with them under the names in FACTS."""

import hashlib
import json
import os
from typing import Any

from dnnlib import UserError
from dnnlib.files import finite, read_json, write_json

SUFFIX = '.fid.json'
PROTOCOL_NUM = 50000  # generated images behind published FIDs, which decrease with this number
FACTS = ('summary', 'intervals', 'repeats', 'metrics', 'num_images', 'found_images', 'image_shape', 'generated', 'reference', 'detector',
         'device', 'gpu', 'tf32', 'threads', 'ranks', 'versions', 'options')
OTHERS = {'closest_pairs': 'eval_fid.py nearest', 'bits_per_dim': 'eval_nll.py', 'differential_bits_per_dim': 'eval_nll.py'}
KINDS = {'': {'num_images': int, 'generated': dict, 'reference': dict, 'detector': dict, 'summary': dict, 'intervals': dict,
              'repeats': list, 'metrics': dict},
         'generated': {'sha256': str, 'path': str, 'record': dict},
         'reference': {'num_images': int, 'split': str, 'sha256': str, 'path': str},
         'detector': {'name': str}}
ORIGIN = {'network': str, 'sha256': str, 'weights': str, 'sampler': str, 'steps': int, 'evaluations': int, 'guidance': (int, float),
          'guidance_interval': (list, str), 'guidance_channels': int, 'gnet': str, 'gnet_sha256': str}
WORDS = {'images': 'of other images', 'reference': 'against another reference', 'detector': 'with another detector'}
MOST = 2 ** 63  # larger whole numbers cannot be counts


# ----------------------------------------------------------------------------------------------------
# Reading


def read_result(path: str | os.PathLike) -> dict:
    """The result in a JSON file. Raises UserError, which names the file, if it is not a result of eval_fid.py."""
    found = read_json(path)
    for key, program in OTHERS.items():
        if key in found:
            raise UserError(f'{path}: a result of {program}, where one of eval_fid.py with its metrics is expected')
    for part, kinds in KINDS.items():
        _check(path, part, found.get(part) or {} if part else found, kinds)
    _check(path, 'generated', origin(found), ORIGIN)
    if not values(found) or not isinstance(found.get('detector'), dict) or found.get('num_images') is None:
        raise UserError(f'{path}: not a result of eval_fid.py: expected metrics with their "num_images" and "detector"')
    return found


def _check(path, part, found, kinds):
    for key, kind in kinds.items():
        value = found.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or isinstance(value, int) and abs(value) >= MOST):
            names = {dict: 'an object', list: 'a list', int: 'a whole number', str: 'text'}
            raise UserError(f'{path}: not a result of eval_fid.py: "{part and f"{part}."}{key}" must be {names.get(kind, "another type")}, '
                            f'got {type(value).__name__}')


def values(result: dict) -> dict[str, float | int | None]:
    """{name: number or None} for the metrics of a result."""
    return {key: value for key, value in result.items() if key not in FACTS and not isinstance(value, bool)
            and (value is None or isinstance(value, float) or isinstance(value, int) and abs(value) < MOST)}


def origin(result: dict) -> dict:
    """The record of how the images of a result were generated; {} if it is not known."""
    generated = result.get('generated') or {}
    return generated.get('record') or (generated if 'network' in generated else {})


def network_digest(result: dict) -> str | None:
    """SHA-256 of the network that generated the images of a result; None if it is not known."""
    return origin(result).get('sha256')


# ----------------------------------------------------------------------------------------------------
# Names


def tag(facts: dict, count: int, repeats: int = 1, detector: str = 'inception', **others: Any) -> str:
    """The part of a file name that distinguishes the results of one network, such as "heun6-guidance1.5-ema0.05-2k": sampler and steps;
    guidance, weights, detector and image count if they differ from 1, ema, inception and 50,000; and a six-digit hash of all other
    settings that differ from their defaults.

    facts: a record of the network and its sampler. others: further options, None for their defaults."""
    sampler, _, keys = str(facts['sampler']).partition(':')
    name, _, detector_keys = detector.partition(':')
    images = '' if count == PROTOCOL_NUM and repeats == 1 else f'{count // 1000}k' if count % 1000 == 0 else str(count)
    parts = [f'{sampler}{facts["steps"]}',
             f'guidance{facts["guidance"]:g}' if facts['guidance'] != 1 else '',
             facts['weights'].replace(':', '') if facts['weights'] != 'ema' else '',
             name if name != 'inception' else '',
             f'{repeats}x{images}' if repeats > 1 else images]
    labels = {key: value for key, value in (facts.get('labels') or {}).items() if key != 'path'}
    rest = {**others, 'sampler': keys, 'detector': detector_keys, 'levels': facts['levels'].replace('edm', '', 1),
            'labels': labels if labels != {'source': 'uniform'} else None, 'precision': facts['precision'].replace('fp32', ''),
            **{key: facts.get(key) for key in ('stop_sigma', 'guidance_interval', 'guidance_channels', 'gnet_sha256', 'compile')}}
    rest = {key: value for key, value in rest.items() if value}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:6] if rest else ''
    return '-'.join(filter(None, [*parts, digest]))


# ----------------------------------------------------------------------------------------------------
# Several results under one name: earlier numbers are kept


def write_beside(path: str | os.PathLike, result: dict) -> list[str]:
    """Writes a result under its default name; returns lines that say what happened to an earlier result there, if anything.

    If images, reference, detector, settings, device and versions are the same, metrics that only the earlier result has are kept in the
    new file. Otherwise an earlier result with other numbers is renamed, to NAME.1.fid.json or the next free number."""
    result, lines = finite(result), []
    if os.path.lexists(path):
        try:
            old = read_result(path)
        except UserError:
            old = None
        extra = {} if old is None else {key: value for key, value in values(old).items() if key not in result}
        if old is None or _identity(old) != _identity(result) or extra and not _joinable(old, result):
            aside = _free_name(path)
            os.rename(path, aside)
            lines.append(f'the earlier result, {_difference(old, result)}, is now {aside}')
        elif extra:
            result = _joined(old, result, extra)
            lines.append(f'kept from the earlier result: {", ".join(extra)}')
    write_json(path, result)
    return lines


def _identity(result):
    """What must be equal for two results to be the same measurement: images, reference, detector."""
    generated, reference = result.get('generated') or {}, result.get('reference') or {}
    where = {'network', 'path', 'gnet', 'record', 'record_missing'}
    images = {key: value for key, value in generated.items() if key not in where or key == 'path' and not generated.get('sha256')}
    return {'images': [images, result.get('num_images'), [_seeds(each) for each in result.get('repeats') or ()]],
            'reference': [reference.get('sha256') or reference.get('path'), reference.get('split'), reference.get('num_images')],
            'detector': [result['detector'].get('name'), result['detector'].get('sha256')]}


def incomparable(old: dict, new: dict) -> list[str]:
    """Why two results must not be compared in one table or plot: ["against another reference", ...]; [] if they may be."""
    before, now = _identity(old), _identity(new)
    found = [words for key, words in WORDS.items() if key != 'images' and before[key] != now[key]]
    if old.get('num_images') != new.get('num_images'):
        found.append(f'of {old.get("num_images")} images, now {new.get("num_images")}')
    before, now = _settings(old), _settings(new)
    return found + [f'with {key} {before.get(key)}, now {now.get(key)}' for key in {**before, **now} if before.get(key) != now.get(key)]


def joinable(old: dict, new: dict) -> bool:
    """Whether write_beside() would replace the old result by the new one without losing a value, and without renaming a file."""
    return _identity(old) == _identity(new) and (_joinable(old, new) or not {*measured(old)} - {*measured(new)})


def measured(result: dict) -> list[str]:
    """The names of the metrics that were computed, as in --metrics."""
    names = (result.get('metrics') or {}).get('names')
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _settings(result):
    """The settings of the metrics, without switches that are off, which results of earlier versions lack."""
    return {key: value for key, value in (result.get('metrics') or {}).items() if key != 'names' and value is not False}


def _seeds(repeat):
    return repeat.get('seeds') if isinstance(repeat, dict) else None


def _difference(old, new):
    """How an earlier result differs, in words."""
    if old is None:
        return 'which was not written by eval_fid.py'
    before, now = _identity(old), _identity(new)
    return ' and '.join(WORDS[key] for key in WORDS if before[key] != now[key]) or 'with other settings, device or versions'


def _joinable(old, new):
    same = lambda key: old.get(key) == new.get(key)
    return same('versions') and same('device') and _settings(old) == _settings(new) and isinstance(old['metrics'].get('names'), list)


def _joined(old, new, extra):
    """The new result with the values of the metrics that only the old one has."""
    numbers = values(new)
    names = [*new['metrics']['names'], *(name for name in old['metrics']['names'] if name not in new['metrics']['names'])]
    parts = {'metrics': {**new['metrics'], 'names': names}}
    if new.get('summary') and old.get('summary'):
        parts['summary'] = {**old['summary'], **new['summary']}
    if old.get('intervals') or new.get('intervals'):
        parts['intervals'] = {**(old.get('intervals') or {}), **(new.get('intervals') or {})}
    if new.get('repeats') and old.get('repeats'):
        parts['repeats'] = [{**before, **now} for before, now in zip(old['repeats'], new['repeats'])]
    return {**numbers, **extra, **new, **parts}


def _free_name(path):
    """x.fid.json -> x.1.fid.json, or the next number that is free."""
    stem, suffix = (path[:-len(SUFFIX)], SUFFIX) if path.endswith(SUFFIX) else os.path.splitext(path)
    number = 1
    while os.path.lexists(found := f'{stem}.{number}{suffix}'):
        number += 1
    return found
