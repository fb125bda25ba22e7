# SPDX-License-Identifier: Apache-2.0
"""zip | folder -> images, labels and native noise levels; decoded once, made noisy once, then gathered in batches.

Network units: (stored - offset) / scale. 8-bit images have offset = scale = 127.5, which gives [-1, 1]; float images carry their
`units` {offset, scale} in dataset.json, each a number or a list of one a channel. The `sigmas` of dataset.json are in stored (physical)
units for float images, and divided by the scale on reading; for 8-bit images, and where channels have different scales, they are in
network units. `sigma_max`, in the same units, is the highest level that an image may be trained at (null: any), for images that are
like those wanted in their details only."""

import math
import os
from pathlib import Path

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.archive import DAMAGE, MAX_MEMBER, MAX_PIXELS, Archive, damage, decode_image
from training.data import tables

SLACK_PIXELS, SLACK_BYTES = 2 ** 20, 2 ** 24  # by which one image may exceed what the first makes likely, before it is read
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
        found = np.zeros([len(raw), self.label_dim], np.float32)
        found[np.arange(len(raw)), self._labels[raw]] = 1
        return found

    def fingerprint(self):
        """What the data set is known by, whatever its path; see dnnlib.fingerprint. All of it counts, also what is not kept."""
        return self._archive.fingerprint()

    def decode(self, raw_idx):
        """An image of the archive as it lies there, never flipped: [C,H,W], uint8 or float32. Safe in threads."""
        name = self._names[raw_idx]
        pixels, size = MAX_PIXELS, MAX_MEMBER
        if self.image_shape is not None:  # what is far larger than the first image is not decoded to see that it differs
            pixels = min(pixels, SLACK_PIXELS + 4 * self.image_shape[1] * self.image_shape[2])
            size = min(size, SLACK_BYTES + 32 * math.prod(self.image_shape))
        try:
            image = decode_image(name, self._archive.read(name, size), most=pixels)
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
        offset, scale = (images.new_tensor(one).reshape(-1, 1, 1) if isinstance(one, list) else one
                         for one in (self.units['offset'], self.units['scale']))  # [C,1,1] where channels have their own
        return images.sub_(offset).div_(scale)

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
            found = tables.units(self._meta.get('units'))
        except KeyError:
            raise UserError(
                f'{self.path}: float images need "units": {{"offset": ..., "scale": ...}} in dataset.json, with network = '
                '(stored - offset) / scale; convert with dataset_tool.py, or write 0 and 1 for values in network units') from None
        except ValueError as err:
            raise UserError(f'{self.path}: dataset.json has {err}') from None
        if isinstance(found['scale'], list) and len(found['scale']) != self.image_shape[0]:
            raise UserError(f'{self.path}: dataset.json has units of {len(found["scale"])} channels, and its images have '
                            f'{self.image_shape[0]}')
        return found

    def _table(self, key, check, *args):
        """check(values of dataset.json's `key` in the order of the images, *args); None where the key is absent or null."""
        table = self._meta.get(key)
        if not table:
            return None
        try:
            return check(tables.by_file(table, self._names), *args)
        except ValueError as err:
            raise UserError(f'{self.path}: "{key}" in dataset.json {err}') from None

    def _read_labels(self, use_labels):
        self.has_labels, self.label_dim, self._labels = bool(self._meta.get('labels')), 0, None
        if not use_labels:
            return
        if not self.has_labels:
            raise UserError(f'--cond=1 needs labels, and {self.path} has none in its dataset.json; '
                            'make them with dataset_tool.py --labels, or use --cond=0')
        self._labels = self._table('labels', tables.labels)
        # The number of classes is that of the whole archive: a subset must not change the network.
        self.label_dim = int(self._labels.max()) + 1 if self._labels.ndim == 1 else self._labels.shape[1]

    def _read_sigmas(self):
        """Native noise levels of every image of the archive, float64, network units."""
        found = self._table('sigmas', tables.levels, self._names, tables.level_scale(self.units))
        return np.zeros(len(self._names)) if found is None else found

    def _read_sigma_max(self):
        """The highest level that every image of the archive may be trained at, float64, network units; inf where there is no limit."""
        found = self._table('sigma_max', tables.limits, self._names, tables.level_scale(self.units))
        return np.full(len(self._names), np.inf) if found is None else found


def _describe(dtype, shape):
    return f'{dtype} {"x".join(map(str, shape))}'
