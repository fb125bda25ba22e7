# SPDX-License-Identifier: Apache-2.0
"""Labels and noise levels from tables (CSV, JSON, .npy), in place of the source's own."""

import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from dnnlib import UserError, arrays, one_line
from dnnlib.archive import damage
from dnnlib.files import read_value
from torch_utils import registry
from training.data import tables

MAX_TOLD = 100  # classes whose numbers are printed
AUTO = 'auto'  # --sigmas: measure them
PROPOSE_CHANNELS = 'channel'  # --units: estimate one offset and scale per channel
LEVELS = {'sigmas': '--sigmas', 'sigma_min': '--sigma-min', 'sigma_max': '--sigma-max'}


def annotate(source, options: dict) -> None:
    """Replaces the source's labels, noise levels and units by those of the command line."""
    if options['labels']:
        source.labels = match(read_table(options['labels'], '--labels', 'labels'), source.names, f'--labels={options["labels"]}')
        source.text = None
    if options.get('captions'):
        source.captions = read_captions(options['captions'], source.names)
    for key, option in LEVELS.items():
        if options[key] and (key, options[key]) != ('sigmas', AUTO):  # which is measured once the images are chosen
            setattr(source, key, read_levels(options[key], option, key, source.names))
    if source.labels is not None:
        told, source.labels = source.labels, as_classes(source.labels)
        source.class_names = {label: name for label, name in zip(source.labels, told) if isinstance(name, str)}
        found = check(tables.labels, 'the table of labels (--labels, or those of the source)', source.labels)
        source.labels = found.tolist() if found.ndim == 1 else source.labels  # 3.0 is class 3
    if source.sigmas is not None:
        check(tables.levels, 'the table of noise levels (--sigmas, or "sigmas" in the source)', source.sigmas, source.names)
        option = next((option for option in ('resolution', 'transform') if options[option]), None)
        if option:
            raise UserError(f'--{option} would make the noise of images that have sigmas correlated; leave it out, or apply it '
                            'before the noise is added')
    if source.sigma_max is not None:
        where = 'the table of upper limits (--sigma-max, or "sigma_max" in the source)'
        limits = check(tables.limits, where, source.sigma_max, source.names)
        source.sigma_max = [limit if limit < float('inf') else None for limit in limits.tolist()]  # JSON has no infinity
    if source.sigma_min is not None:
        source.sigma_min = lower_limits(source.sigma_min, source.names)
    set_units(source, options['units'], [key for key in LEVELS if getattr(source, key) is not None and not options[key]])


def set_units(source, told: dict | str | None, own: Sequence[str]) -> None:
    """Sets the units given on the command line in place of the source's; None if they are to be estimated. own: names of the source's
    own levels.

    Levels are in stored units, or in network units if channels have different scales; they may not change from one to the other.
    Raises UserError."""
    if told == PROPOSE_CHANNELS and any(getattr(source, key) is not None for key in LEVELS):
        raise UserError('--units=channel: the scales of the channels are not known yet, and levels of such data are in network units; give '
                        'them, as in --units=0,1/10,2')
    if own and source.units and told and (tables.common_scale(told) is None) != (tables.common_scale(source.units) is None):
        raise UserError(f'--units: "{own[0]}" of the source is in the units of its values, or of the network where its channels have '
                        f'different scales, and these units would change that; give it again with {LEVELS[own[0]]}')
    source.units = None if told == PROPOSE_CHANNELS else told or source.units


def tell(source, told: dict[str, str], where: str) -> None:
    """Applies the keys of --source=PATH:key=value to all images of a source: label, sigma, sigma_min, sigma_max, as text.

    where: the option's name in errors. Raises UserError."""
    if 'label' in told:
        label = told['label']
        label = int(label) if re.fullmatch(r'\d{1,9}', label) else label
        if label == '':
            raise UserError(f'{where}: label= needs the name or number of a class, or none')
        source.text, source.labels = None, None if label == 'none' else [label] * len(source.names)
    for key, name in (('sigmas', 'sigma'), ('sigma_min', 'sigma_min'), ('sigma_max', 'sigma_max')):
        if name in told:
            setattr(source, key, read_levels(told[name], f'{where}: {name}', key, source.names))


def lower_limits(values: Sequence, names: Sequence[str]) -> list[float | None]:
    """Limits as stored in dataset.json: a level above 0, or None. Raises UserError."""
    found = check(tables.lower_limits, 'the table of lower limits (--sigma-min, or "sigma_min" in the source)', values, names)
    return [min(limit, tables.LARGEST) or None for limit in found.tolist()]  # JSON has no infinity


def check(table: Callable, name: str, *args: Any) -> Any:
    """table(*args) of tables.py; its errors become UserErrors that begin with `name`."""
    try:
        return table(*args)
    except ValueError as err:
        raise UserError(f'{name} {err}') from None


def read_levels(text: str, option: str, key: str, names: Sequence[str]) -> list[float | None]:
    """Noise levels from a number or a file, one per image; None for null in a JSON file. key: under which a JSON object may have them."""
    try:
        return [float(text)] * len(names)
    except ValueError:
        if not os.path.isfile(text):
            raise UserError(f'{option}={text}: neither a number nor a file') from None
    values = match(read_table(text, option, key), names, f'{option}={text}')
    try:
        return [None if value is None else float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f'{option}={text}: must hold one number per image') from None


def read_table(path: str, option: str, key: str) -> Any:
    """A CSV, JSON or .npy file in the form for match(); of a JSON object the value of `key`, if it has one."""
    try:
        if path.endswith('.npy'):
            return arrays.open_npy(path).tolist()
        if path.endswith('.json'):
            found = read_value(path, f'{option}={path}')
            return found.get(key, found) if isinstance(found, dict) else found
        with open(path, encoding='utf-8-sig', newline='') as file:
            rows = [[registry.parse_number(text.strip()) for text in row] for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as err:
        raise UserError(f'{option}={path}: cannot be read ({damage(err)}); give CSV, JSON or .npy') from None
    if rows and str(rows[0][0]).lower() in ('file', 'filename', 'name', 'image'):
        rows = rows[1:]  # a heading
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    return [[str(row[0]), row[1] if len(row) == 2 else row[1:]] for row in rows]


def read_captions(path: str, names: Sequence[str]) -> list[str]:
    """One caption per image, of --captions=FILE: .txt, one per line in the order of the images; .csv, file and caption; .json, an object or
    [file, caption] pairs, maybe under "captions", or a list in order. Raises UserError."""
    where = f'--captions={path}'
    if path.lower().endswith('.json'):
        found = read_value(path, where)
        found = found['captions'] if isinstance(found, dict) and isinstance(found.get('captions'), (dict, list)) else found
    else:
        found = _caption_rows(path, where)
    found = match(found, names, where)
    odd = next((i for i, caption in enumerate(found) if not isinstance(caption, str)), None)
    if odd is not None:
        raise UserError(f'{where}: the caption of {names[odd]} must be one text, got {one_line(json.dumps(found[odd]))[:50]}')
    return [' '.join(caption.split()) for caption in found]  # on one line


def _caption_rows(path, where):
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            if not path.lower().endswith('.csv'):
                return file.read().splitlines()
            rows = [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as err:
        raise UserError(f'{where}: cannot be read ({damage(err)}); give .txt, .csv or .json') from None
    long = next((row for row in rows if len(row) != 2), None)
    if long is not None:
        raise UserError(f'{where}: a row has {len(long)} columns, {one_line(",".join(long))[:60]}; give file and caption, in quotes '
                        'where it has commas')
    return rows[1:] if rows and rows[0][0].lower() in ('file', 'filename', 'file_name', 'name', 'image') else rows


def as_classes(values: list) -> list:
    """Labels unchanged, or numbers for names of classes, in alphabetical order. Raises UserError."""
    if not any(isinstance(value, str) for value in values):
        return values
    odd = next((value for value in values if type(value) not in (str, int, float)), '')
    if odd != '':
        raise UserError(f'the table of labels (--labels, or those of the source) has names of classes, but also '
                        f'{one_line(json.dumps(odd))[:50]}; give each image one name')
    numbers = {name: number for number, name in enumerate(sorted({str(value) for value in values}))}
    told = [f'{number} {name}' for name, number in numbers.items()]
    print('Classes: ' + ', '.join(told[:MAX_TOLD]) + (f', ... ({len(told)} in all)' if len(told) > MAX_TOLD else ''))
    return [numbers[str(value)] for value in values]


def match(table: Any, names: Sequence[str], where: str) -> list:
    """The values of a table in the order of the names. table: [[name, value], ...], {name: value}, or values in order.

    Names may be given without their folders. Raises UserError if a file is missing or the number of values differs."""
    if not isinstance(table, (list, tuple, dict)):
        raise UserError(f'{where}: expected a list or an object, got {type(table).__name__}')
    pairs = list(table.items()) if isinstance(table, dict) else list(table)
    by_name = all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs)
    if not by_name:
        if len(pairs) != len(names):
            raise UserError(f'{where}: {len(pairs)} values for {len(names)} images; give one per image, in their order')
        return pairs
    try:
        found = tables.by_name(pairs)
    except ValueError as err:
        raise UserError(f'{where}: {err}') from None
    keys = _keys(names, found, where)
    missing = [name for name, key in zip(names, keys) if key is None]
    if missing:
        raise UserError(f'{where}: misses {len(missing)} of {len(names)} images, such as {missing[0]}')
    return [found[key] for key in keys]


def _keys(names, found, where):
    """The names under which a table `found` has the images: their own, or without folders if that is unambiguous; otherwise None."""
    if all(name in found for name in names):
        return names
    whole, keys, meant = set(names), [], {}
    for name in names:
        base = os.path.basename(name)
        meant.setdefault(base, []).append(name)
        keys.append(name if name in found else base if base in found and base not in whole else None)
    for base in {key for key in keys if key is not None and key not in whole}:
        if len(meant[base]) > 1:
            raise UserError(f'{where}: "{base}" may be {meant[base][0]} or {meant[base][1]}; give names with their folders')
    return keys
