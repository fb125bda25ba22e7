# SPDX-License-Identifier: Apache-2.0
"""The label of each seed: one class, uniform classes, labels drawn from a data set, those of a file, or those of captions.

A source is called as (draws, seeds) -> labels, int64 [n] classes or float32 [n, label_dim] vectors. Every source draws exactly one
random number from each seed's generator, so that a seed's later draws do not depend on where its label came from. Sources that use a
table have it as attribute `table`, and those of captions the texts as `prompts`."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from dnnlib import arrays, one_line, text_record
from training.data.dataset import ImageDataset

DATASET = 'dataset:'


def uniform(label_dim: int) -> Callable:
    """A class drawn for each seed, uniform over 0 ... label_dim - 1, as published."""
    return lambda draws, seeds: draws.randint(label_dim)


def one_class(index: int) -> Callable:
    """The same class for every seed."""
    return lambda draws, seeds: torch.full_like(draws.randint(2), index)


def drawn(table: torch.Tensor) -> Callable:
    """A row of the table drawn for each seed: labels are as frequent as in the table."""

    def source(draws, seeds):
        return table[draws.randint(len(table)).cpu()].to(draws.device)

    source.table = table
    return source


def listed(table: torch.Tensor) -> Callable:
    """Row s of the table for seed s."""

    def source(draws, seeds):
        draws.randint(2)
        return table[list(seeds)].to(draws.device)

    source.table = table
    return source


def cycled(table: torch.Tensor, prompts: list[str]) -> Callable:
    """Row s modulo R of the table [R, label_dim] for seed s; prompts: the captions of the rows."""

    def source(draws, seeds):
        draws.randint(2)
        return table[[seed % len(table) for seed in seeds]].to(draws.device)

    source.table, source.prompts = table, prompts
    return source


def default(net: Callable) -> Callable | None:
    """The source without any option: no label for networks that take captions, a class drawn for each seed for others with labels."""
    if getattr(net, 'text', None):
        return cycled(torch.zeros([1, net.label_dim]), [''])
    return uniform(net.label_dim) if net.label_dim else None


def pick(net, seeds: Iterable[int], spec: str | None = None, class_idx: int | None = None) -> Callable | None:
    """The source that the options name; None for unconditional networks.

    spec: "uniform", "dataset:PATH", or a file: .npy, .json (a list) or .txt (one label per line), whose row s is for seed s. A whole
    number is a class, several numbers are a vector. class_idx: one class for all. Raises ValueError, in one line, for what does not fit."""
    if spec is not None and class_idx is not None:
        raise ValueError('one class for all images and a source of labels exclude each other; give one of them')
    if not net.label_dim:
        if spec is not None or class_idx is not None:
            raise ValueError('the network is unconditional and has no classes; leave the option out')
        return None
    text = getattr(net, 'text', None)
    if text and (class_idx is not None or spec in (None, 'uniform')):
        raise ValueError(f'the network was trained on captions; give --prompt=TEXT (empty: no caption), or --labels={DATASET}PATH')
    if class_idx is not None:
        if not 0 <= class_idx < net.label_dim:
            raise ValueError(f'the network has classes 0 to {net.label_dim - 1}')
        return one_class(class_idx)
    if spec in (None, 'uniform'):
        return uniform(net.label_dim)
    if spec.startswith(DATASET):
        return drawn(of_dataset(spec[len(DATASET):], net.label_dim, text))
    table = of_file(spec, net.label_dim)
    if text and table.ndim == 1:
        raise ValueError(f'it has classes, and the network was trained on captions; give rows of {net.label_dim} numbers, or --prompt=FILE')
    if max(seeds, default=0) >= len(table):
        raise ValueError(f'it has {len(table)} rows, for seeds 0 to {len(table) - 1}, and none for seed {max(seeds)}')
    return listed(table)


def of_dataset(path: str | os.PathLike, label_dim: int, text: dict | None = None) -> torch.Tensor:
    """The labels of a data set's images, as a table. text: of the network, where its labels are captions (dnnlib.text_record)."""
    if not ImageDataset(path).has_labels:
        raise ValueError('the data set has no labels in its dataset.json; make them with dataset_tool.py --labels')
    dataset = ImageDataset(path, use_labels=True)
    if told := text_record.difference(text, dataset.text):
        raise ValueError(f'the labels of the data set are not those of the network: {told}')
    return _table(dataset.labels(range(len(dataset))) if dataset.classes is None else dataset.classes, label_dim)


def of_file(path: str, label_dim: int) -> torch.Tensor:
    """The labels of a file, as a table."""
    readers = {'.json': lambda text: json.loads(text), '.txt': _lines}
    suffix = Path(path).suffix.lower()
    if not os.path.isfile(path):
        raise ValueError(f'no such file; choose uniform, {DATASET}PATH, or a file: .npy, .json or .txt')
    if suffix != '.npy' and suffix not in readers:
        raise ValueError('a file of labels must be .npy, .json or .txt')
    try:
        values = arrays.open_npy(path) if suffix == '.npy' else np.array(readers[suffix](Path(path).read_text('utf-8')))
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f'it cannot be read as a table of numbers: {one_line(err)}') from None
    return _table(values, label_dim)


def _lines(text):
    """One label per line: a whole number, or numbers separated by commas or spaces."""
    number = lambda word: int(word) if word.lstrip('+-').isdigit() else float(word)
    rows = [[number(word) for word in line.replace(',', ' ').split()] for line in text.splitlines() if line.strip()]
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else rows


def _table(values, label_dim):
    """int64 [R] or float32 [R, label_dim] on the CPU; refuses what the network does not take."""
    kind = values.dtype.kind
    if len(values.shape) == 1 and kind == 'f' and label_dim == 1:
        values = values[:, None]
    if not values.size or kind not in 'iuf' or values.ndim > 2 or values.ndim == 1 and kind == 'f':
        raise ValueError(f'labels must be whole numbers (classes) or rows of {label_dim} numbers, got {values.dtype} of shape '
                         f'{list(values.shape)}')
    if values.ndim == 1:
        if not 0 <= values.min() <= values.max() < label_dim:
            raise ValueError(f'its classes are {values.min()} to {values.max()}, and the network has 0 to {label_dim - 1}')
        return torch.from_numpy(values.astype(np.int64))
    if values.shape[1] != label_dim:
        raise ValueError(f'its rows have {values.shape[1]} numbers, and the network takes {label_dim}')
    if not np.isfinite(values).all():
        raise ValueError(f'row {int((~np.isfinite(values)).any(axis=1).argmax())} is not finite')
    return torch.from_numpy(values.astype(np.float32))
