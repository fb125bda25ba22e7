# SPDX-License-Identifier: Apache-2.0
"""zip | folder -> images, labels and native noise levels; decoded once, made noisy once, then gathered in batches.

Network units: (stored - offset) / scale. 8-bit images have offset = scale = 127.5, which gives [-1, 1]; float images carry their
`units` {offset, scale} in dataset.json. The `sigmas` of dataset.json are in stored (physical) units for float images, and divided
by the scale on reading; for 8-bit images they are in network units. `sigma_max`, in the same units, is the highest level that an
image may be trained at (null: any), for images that are like those wanted in their details only."""

import os
from pathlib import Path

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.archive import DAMAGE, Archive, damage, decode_image

UNITS_8BIT = {'offset': 127.5, 'scale': 127.5}  # of data that tells none


class ImageDataset:
    """What a zip or folder of images holds: which items there are, not yet their pixels.

    path: zip or folder of PNG, JPEG or .npy ([C,H,W]) members, dataset.json optional; members count in the order of their names.
    use_labels: read labels; they must be there. keep: share of the images, a fixed random subset; max_size: the same by count.
    xflip: every kept image a second time, mirrored. random_seed: of the subset.

    Attributes: path, name, image_shape (C,H,W), is_float, units ({offset, scale}, None for 8-bit), has_labels, label_dim (0
    without use_labels), raw_idx int64 [N] (place in the archive), flip bool [N], native_sigma float64 [N] (network units).
    Raises UserError in one line for anything that is wrong with the files or the options."""

    def __init__(self, path, use_labels=False, keep=1.0, max_size=None, xflip=False, random_seed=0):
        if not 0 < keep <= 1:
            raise UserError(f'--dataset-keep-percentage={keep}: must be more than 0 and at most 1 (which keeps all)')
        self._archive = Archive(path)
        self.path = self._archive.path
        self.name = Path(os.path.abspath(self.path)).stem
        self._names = self._archive.images()
        self._meta = self._archive.read_json()
        self.image_shape = self._dtype = None
        first = self.decode(0)
        self.image_shape, self._dtype = first.shape, first.dtype
        self.is_float = first.dtype == np.float32
        self.units = self._read_units() if self.is_float else None
        self._read_labels(use_labels)
        kept = self._subset(keep, max_size, random_seed)
        self.raw_idx = np.concatenate([kept, kept]) if xflip else kept
        self.flip = np.arange(len(self.raw_idx)) >= len(kept)
        self.native_sigma = self._read_sigmas()[self.raw_idx]
        self.sigma_max = self._read_sigma_max()[self.raw_idx]

    def __len__(self):
        return len(self.raw_idx)

    @property
    def resolution(self):
        """[H, W]."""
        return list(self.image_shape[1:])

    @property
    def classes(self):
        """The class of each item, int64 [N]; None where labels are not used, or are vectors."""
        return self._labels[self.raw_idx] if self.label_dim and self._labels.ndim == 1 else None

    def labels(self, indices):
        """float32 [n, label_dim] of items: one-hot classes, or the vectors of dataset.json; [n, 0] without use_labels."""
        raw = self.raw_idx[np.asarray(indices)]
        if self.label_dim == 0:
            return np.zeros([len(raw), 0], np.float32)
        if self._labels.ndim == 2:
            return self._labels[raw]
        return np.eye(self.label_dim, dtype=np.float32)[self._labels[raw]]

    def decode(self, raw_idx):
        """An image of the archive as it lies there, never flipped: [C,H,W], uint8 or float32. Safe in threads."""
        name = self._names[raw_idx]
        try:
            image = decode_image(name, self._archive.read(name))
        except DAMAGE as err:
            raise UserError(f'{self.path}: cannot read {name} ({damage(err)})') from None
        if image.dtype not in (np.uint8, np.float32, np.float64):
            raise UserError(f'{self.path}: {name} is {image.dtype} of shape {list(image.shape)}; expected 8-bit or '
                            'float32 [C,H,W]: convert it with dataset_tool.py')
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        if self.image_shape is not None and (image.shape != self.image_shape or image.dtype != self._dtype):
            raise UserError(
                f'{self.path}: {name} is {_describe(image.dtype, image.shape)}, but {self._names[0]} is '
                f'{_describe(self._dtype, self.image_shape)}; make them equal with dataset_tool.py --resolution')
        return image

    def to_network(self, images):
        """Stored images -> network units, float32."""
        images = torch.as_tensor(images).to(torch.float32, copy=True)
        if self.units is None:
            return images.div_(127.5).sub_(1)
        return images.sub_(self.units['offset']).div_(self.units['scale'])

    def _subset(self, keep, max_size, random_seed):
        """Sorted raw indices: the head of one permutation, so that a smaller share is part of a larger one (and as published)."""
        total = len(self._names)
        size = min(int(keep * total), total if max_size is None else int(max_size))
        if size < 1:
            raise UserError(f'--dataset-keep-percentage={keep}: keeps none of the {total} images; '
                            f'use at least {1 / total:.3g}, or --max-size of 1 or more')
        if size == total:
            return np.arange(total)
        return np.sort(np.random.RandomState(random_seed % 2 ** 31).permutation(total)[:size])

    def _read_units(self):
        try:
            units = {key: float(self._meta['units'][key]) for key in ('offset', 'scale')}
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f'{self.path}: float images need "units": {{"offset": ..., "scale": ...}} in dataset.json, with network = '
                '(stored - offset) / scale; convert with dataset_tool.py, or write 0 and 1 for values in network units') from None
        if not (np.isfinite(list(units.values())).all() and units['scale'] > 0):
            raise UserError(f'{self.path}: dataset.json has units {units}; both must be finite, the scale above 0')
        return units

    def _by_file(self, key):
        """The values of dataset.json's `key` in the order of the images; None where it is absent or null."""
        table = self._meta.get(key)
        if not table:
            return None
        try:
            pairs = table.items() if isinstance(table, dict) else table
            table = {str(name).replace('\\', '/'): value for name, value in pairs}
        except (TypeError, ValueError):
            raise UserError(f'{self.path}: "{key}" in dataset.json must be [file, value] pairs or an object') from None
        missing = [name for name in self._names if name not in table]
        if missing:
            raise UserError(f'{self.path}: "{key}" in dataset.json misses {len(missing)} of {len(self._names)} files, '
                            f'such as {missing[0]}; list every file')
        return [table[name] for name in self._names]

    def _read_labels(self, use_labels):
        self.has_labels, self.label_dim, self._labels = bool(self._meta.get('labels')), 0, None
        if not use_labels:
            return
        if not self.has_labels:
            raise UserError(f'--cond=1 needs labels, and {self.path} has none in its dataset.json; '
                            'make them with dataset_tool.py --labels, or use --cond=0')
        values = self._by_file('labels')
        try:
            labels = np.array(values)
            classes = labels.dtype.kind in 'iu' and labels.ndim == 1
            self._labels = labels.astype(np.int64) if classes else labels.astype(np.float32).reshape(len(values), -1)
            if not np.isfinite(self._labels).all() or (classes and labels.min() < 0):
                raise ValueError
        except (TypeError, ValueError):
            raise UserError(f'{self.path}: labels in dataset.json must be classes 0, 1, ... or finite vectors of one '
                            'length') from None
        # The number of classes is that of the whole archive: a subset must not change the network.
        self.label_dim = int(labels.max()) + 1 if classes else self._labels.shape[1]

    def _read_sigmas(self):
        """Native noise levels of every image of the archive, float64, network units."""
        values = self._by_file('sigmas')
        if values is None:
            return np.zeros(len(self._names))
        try:
            sigmas = np.array(values, np.float64).reshape(len(self._names))
        except (TypeError, ValueError):
            raise UserError(f'{self.path}: "sigmas" in dataset.json must be one number a file') from None
        if not (np.isfinite(sigmas) & (sigmas >= 0)).all():
            bad = int(np.flatnonzero(~(np.isfinite(sigmas) & (sigmas >= 0)))[0])
            raise UserError(f'{self.path}: "sigmas" in dataset.json gives {self._names[bad]} the level {sigmas[bad]}; '
                            'levels must be 0 or more')
        return sigmas / self.units['scale'] if self.units else sigmas

    def _read_sigma_max(self):
        """The highest level that every image of the archive may be trained at, float64, network units; inf where there is no limit."""
        values = self._by_file('sigma_max')
        if values is None:
            return np.full(len(self._names), np.inf)
        try:
            limits = np.array([np.inf if value is None else value for value in values], np.float64).reshape(len(self._names))
        except (TypeError, ValueError):
            raise UserError(f'{self.path}: "sigma_max" in dataset.json must be one number a file, or null') from None
        if not (limits > 0).all():
            bad = int(np.flatnonzero(~(limits > 0))[0])
            raise UserError(f'{self.path}: "sigma_max" in dataset.json gives {self._names[bad]} the limit {limits[bad]}; '
                            'limits must be above 0, or null for none')
        return limits / self.units['scale'] if self.units else limits


def _describe(dtype, shape):
    return f'{dtype} {"x".join(map(str, shape))}'
