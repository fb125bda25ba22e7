# SPDX-License-Identifier: Apache-2.0
"""The two data sets of an annotation: clean images, and imperfect ones of the same form."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.cpus import cpu_count
from dnnlib.progress import Progress
from training.data.dataset import ImageDataset

CHUNK, NUMBERS = 512, 2 ** 24  # images, and numbers in them, that are held decoded at a time
LEAST = 20  # images of a set


class Sets(NamedTuple):
    """clean, data: the images. clean_classes, classes: int64 [N] each, or None unless both have classes."""

    clean: ImageDataset
    data: ImageDataset
    clean_classes: np.ndarray | None
    classes: np.ndarray | None


def open_sets(clean: str, data: str) -> Sets:
    """The Sets of two paths. Raises UserError where they do not fit together."""
    opened = {'--clean': ImageDataset(clean), '--data': ImageDataset(data)}
    first, second = opened.values()
    for option, dataset in opened.items():
        if dataset.stored_shape != dataset.image_shape:
            raise UserError(f'{option}={dataset.path}: holds distributions of latents; annotate the pictures, then encode them')
        if len(dataset) < LEAST:
            raise UserError(f'{option}={dataset.path}: holds {len(dataset)} images; sets are compared by {LEAST} of each or more')
    if first.image_shape != second.image_shape:
        told = ['x'.join(map(str, dataset.image_shape)) for dataset in (first, second)]
        raise UserError(f'--data={data}: its images are {told[1]}, those of --clean={clean} are {told[0]}; give both one '
                        '--resolution')
    if first.is_float != second.is_float or first.units != second.units:
        raise UserError(f'--data={data}: its values have other units than those of --clean={clean}; convert both with the same --units')
    if first.native_sigma.any():
        raise UserError(f'--clean={clean}: {np.count_nonzero(first.native_sigma)} of its images have sigmas, and so are not clean')
    limited = np.count_nonzero((first.sigma_min > 0) | np.isfinite(first.sigma_max))
    if limited:
        raise UserError(f'--clean={clean}: {limited} of its images have a sigma_min or sigma_max, and so are not clean')
    found = [_classes(dataset) for dataset in (first, second)]
    return Sets(first, second, *(found if all(classes is not None for classes in found) else (None, None)))


def _classes(dataset):
    return ImageDataset(dataset.path, use_labels=True).classes if dataset.has_labels else None


def images_of(dataset: ImageDataset, rows: np.ndarray, pool: ThreadPoolExecutor | None = None) -> torch.Tensor:
    """Images by index, in network units: float32 [n,C,H,W]."""
    decode = (pool or _Alone()).map(dataset.decode, dataset.raw_idx[rows])
    return dataset.to_network(np.stack(list(decode)))


def in_chunks(dataset: ImageDataset, rows: np.ndarray, title: str) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """(rows [n], their images [n,C,H,W]) for all rows in their order, with a progress bar; images are decoded in threads."""
    size = max(1, min(CHUNK, NUMBERS // math.prod(dataset.image_shape)))
    with ThreadPoolExecutor(cpu_count()) as pool, Progress(len(rows), title) as bar:
        for start in range(0, len(rows), size):
            part = rows[start:start + size]
            yield part, images_of(dataset, part, pool)
            bar.update(len(part))


class _Alone:
    map = staticmethod(map)
