# SPDX-License-Identifier: Apache-2.0
"""A data set -> its items: which images are used, their labels, native noise levels and limits, and the units of their pixels.

Network units: (stored - offset) / scale. 8-bit images have offset = scale = 127.5, which gives [-1, 1]; float images carry their
`units` {offset, scale} in dataset.json, each one number or a list of one per channel. The `sigmas` of dataset.json are in stored (physical)
units for float images, and divided by the scale on reading; for 8-bit images, and where channels have different scales, they are in
network units. `sigma_max`, in the same units, is the highest level to train an image at (null: any), for images that match the wanted
distribution only in their details; `sigma_min` is the level above which to train it (null or 0: any), for images that match only in
their coarse features. With both, a level that satisfies either is allowed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from training.data import tables
from training.data.cache import open_contents
from training.data.contents import Names, text_of
from training.data.latents import Latents, read_latents
from training.data.packed import Packed

UNITS_8BIT = {'offset': 127.5, 'scale': 127.5}  # network = stored / 127.5 - 1
PICTURE_CHANNELS = (1, 3)  # grey and RGB


class Levels(NamedTuple):
    """How many of the images are clean, and how noisy the others are."""

    images: int
    clean: int
    lowest: float   # sigma_n of the noisy images, in network units; 0 where there are none
    highest: float

    @classmethod
    def of(cls, sigma_n: np.ndarray) -> 'Levels':
        """Those of images with these levels, [N]."""
        noisy = sigma_n[sigma_n > 0]
        return cls(len(sigma_n), len(sigma_n) - len(noisy), *((float(noisy.min()), float(noisy.max())) if len(noisy) else (0.0, 0.0)))


class Form(NamedTuple):
    """The facts about its data that a run depends on."""

    image_shape: tuple  # (C, H, W)
    label_dim: int      # 0 where labels are not used
    units: dict | None  # {offset, scale}; None for 8-bit pictures, and for float ones in the units of these
    latents: Latents | None = None  # where the images are latents
    text: dict | None = None  # dnnlib.text_record, of labels that were made of captions
    levels: Levels | None = None

    @property
    def resolution(self) -> list[int]:
        """[H, W]."""
        return list(self.image_shape[1:])


class ImageDataset:
    """The items of a zip, folder or packed array of images, without their pixels.

    path: zip or folder of PNG, JPEG or .npy ([C,H,W]) members, in the order of their names, dataset.json optional; or a packed data set
    (packed.py). use_labels: read labels, which must exist. keep: share of the images to keep, a fixed random subset; max_size: the same by
    count. xflip: add every kept image again, mirrored; of latents, the stored ones of mirrored pictures. random_seed: for the subset.
    cache_dir: folder for a decoded copy (cache.py); copy: the path of an existing one.

    Attributes: path, name, contents (contents.py), image_shape (C,H,W), stored_shape (2C channels for distributions of latents), is_float,
    units ({offset, scale}, None for 8-bit), latents (Latents, or None), has_labels, label_dim (0 without use_labels), text
    (dnnlib.text_record of labels that were made of captions, or None) and empty (the label of the empty caption, float32 [label_dim]),
    raw_idx int64 [N] (the image, by its place in the archive), flip bool [N] (its mirrored form), row int64 [N] (place of the item in the
    archive, another than raw_idx for latents of mirrored pictures), native_sigma float64 [N] (network units), levels (Levels of it);
    sigma_min, sigma_max float64 [N], limits of the levels to train at (network units; 0 and inf for no limit). Raises UserError in one line
    for anything that is wrong with the files or the options."""

    def __init__(self, path: str | os.PathLike, use_labels: bool = False, keep: float = 1.0, max_size: int | None = None,
                 xflip: bool = False, random_seed: int = 0, cache_dir: str | os.PathLike | None = None,
                 copy: str | os.PathLike | None = None):
        if not 0 < keep <= 1:
            raise UserError(f'--dataset-keep-percentage={keep}: must be more than 0 and at most 1 (which keeps all)')
        self.contents = Packed(copy, where=str(path)) if copy else open_contents(path, cache_dir)
        self.path = self.contents.where
        self.name = Path(os.path.abspath(self.path)).stem
        self.stored_shape, self.is_float = tuple(self.contents.image_shape), self.contents.is_float
        self.latents = self._read_latents()
        channels = self.stored_shape[0] // (2 if self.latents and self.latents.distribution else 1)
        self.image_shape = (channels, *self.stored_shape[1:])
        self.units = self._read_units() if self.is_float else None
        self._read_labels(use_labels)
        kept = self._subset(keep, max_size, random_seed)
        if xflip and self.latents and not self.latents.xflip:
            raise UserError(f'--xflip=1: {self.path} holds latents, and a mirrored latent is not the latent of a mirrored picture; encode '
                            'them with dataset_tool.py encode --xflip, or use --xflip=0')
        self.raw_idx = np.concatenate([kept, kept]) if xflip else kept
        self.row = np.concatenate([kept, kept + self._total]) if xflip and self.latents else self.raw_idx
        self.flip = np.arange(len(self.raw_idx)) >= len(kept)
        scale = tables.level_scale(self.units)
        self.native_sigma = self._table('sigmas', tables.levels, scale, absent=0.0)
        self.levels = Levels.of(self.native_sigma)
        self.sigma_max = self._table('sigma_max', tables.limits, scale, absent=np.inf)
        self.sigma_min = self._table('sigma_min', tables.lower_limits, scale, absent=0.0)

    def __len__(self):
        return len(self.raw_idx)

    @property
    def resolution(self) -> list[int]:
        """[H, W]."""
        return list(self.image_shape[1:])

    @property
    def form(self) -> Form:
        """The Form of the images. Float pictures in the units of 8-bit ones, such as noisy or restored photographs, have the form of
        these, so that a network trained on them generates pictures."""
        as_pictures = self.units == UNITS_8BIT and self.image_shape[0] in PICTURE_CHANNELS and self.latents is None
        return Form(self.image_shape, self.label_dim, None if as_pictures else self.units, self.latents, self.text, self.levels)

    @property
    def classes(self) -> np.ndarray | None:
        """The class of each item, int64 [N]; None if labels are not used, or are vectors."""
        return self._labels[self.raw_idx].astype(np.int64) if self.label_dim and self._labels.ndim == 1 else None

    @property
    def label_table(self) -> np.ndarray | None:
        """The labels of all items as stored: classes int32 [N], vectors float32 [N, label_dim], or None."""
        return self._labels[self.raw_idx] if self.label_dim else None

    def labels(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
        """float32 [n, label_dim] of items: one-hot classes, or the vectors of dataset.json; [n, 0] without use_labels."""
        raw = self.raw_idx[np.asarray(indices)]
        if self.label_dim == 0:
            return np.zeros([len(raw), 0], np.float32)
        return as_vectors(torch.from_numpy(self._labels[raw]), self.label_dim).numpy()

    def fingerprint(self) -> dict:
        """The fingerprint of the whole data set, including images that are not kept, independent of its path; see dnnlib.fingerprint."""
        return self.contents.fingerprint()

    def image_name(self, raw_idx: int) -> str:
        """The name of an image within the archive."""
        return self.contents.name(raw_idx)

    def decode(self, raw_idx: int) -> np.ndarray:
        """An image of the archive as stored, never flipped: uint8 or float32 of stored_shape. Thread-safe."""
        return self.contents.decode(raw_idx)

    def to_network(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Stored images -> network units, float32; of distributions, std / scale after (mean - offset) / scale."""
        images = torch.as_tensor(images).to(torch.float32, copy=True)
        if self.units is None:
            return images.div_(127.5).sub_(1)
        offset, scale = (images.new_tensor(one).reshape(-1, 1, 1) if isinstance(one, list) else one
                         for one in (self.units['offset'], self.units['scale']))  # [C,1,1] if they differ by channel
        if self.stored_shape != self.image_shape:
            mean, std = images.chunk(2, dim=-3)
            mean.sub_(offset).div_(scale)
            std.div_(scale)
            return images
        return images.sub_(offset).div_(scale)

    def _subset(self, keep, max_size, random_seed):
        """Sorted raw indices: the beginning of one permutation (as published), so that a smaller share is a subset of a larger one."""
        total = self._total
        size = min(int(keep * total), total if max_size is None else int(max_size))
        if size < 1:
            raise UserError(f'--dataset-keep-percentage={keep}: keeps none of the {total} images; '
                            f'use at least {1 / total:.3g}')
        if size == total:
            return np.arange(total)
        return np.sort(np.random.RandomState(random_seed % 2 ** 31).permutation(total)[:size])

    @property
    def _total(self):
        """Number of images, without latents of mirrored pictures."""
        return self.contents.count // (2 if self.latents and self.latents.xflip else 1)

    def _read_latents(self):
        try:
            return read_latents(self.contents.latents if self.is_float else None, self.stored_shape, self.contents.count)
        except ValueError as err:
            raise UserError(f'{self.path}: dataset.json has {err}; make it with dataset_tool.py encode') from None

    def _read_units(self):
        try:
            found = tables.units(self.contents.units)
        except KeyError:
            raise UserError(
                f'{self.path}: float images need "units": {{"offset": ..., "scale": ...}} in dataset.json, with network = '
                '(stored - offset) / scale; convert with dataset_tool.py, or write 0 and 1 for values in network units') from None
        except ValueError as err:
            raise UserError(f'{self.path}: dataset.json has {err}') from None
        if isinstance(found['scale'], list) and len(found['scale']) != self.image_shape[0]:
            raise UserError(f'{self.path}: dataset.json has units of {len(found["scale"])} channels, but its images have '
                            f'{self.image_shape[0]}')
        return found

    def _read_labels(self, use_labels):
        self.has_labels, self.label_dim, self._labels = self.contents.has('labels'), 0, None
        self.text = self.empty = None
        if not use_labels:
            return
        if not self.has_labels:
            raise UserError(f'--cond=1 needs labels, and {self.path} has none in its dataset.json; '
                            'make them with dataset_tool.py --labels (or captions), or use --cond=0')
        self._labels = self._checked('labels', lambda values, _: tables.labels(values))
        if self._labels.ndim == 1:
            self._labels = self._labels.astype(np.int32)
        # The number of classes is that of the whole archive: a subset must not change the network.
        self.label_dim = int(self._labels.max()) + 1 if self._labels.ndim == 1 else self._labels.shape[1]
        self.text, self.empty = text_of(self.contents)
        if self.text and (self._labels.ndim == 1 or self.label_dim != len(self.empty)):
            raise UserError(f'{self.path}: "text" in dataset.json describes labels of {len(self.empty)} numbers, and its labels differ; '
                            'make them again with dataset_tool.py captions')

    def _table(self, key, check, scale, absent):
        """A table of one number per item, float64 [N], in network units; filled with `absent` if there is no such table."""
        found = self._checked(key, lambda values, names: check(values, names, scale)) if self.contents.has(key) else None
        return np.broadcast_to(np.float64(absent), len(self)) if found is None else found[self.raw_idx]

    def _checked(self, key, check):
        try:
            return check(self.contents.values(key), Names(self.contents))
        except ValueError as err:
            raise UserError(f'{self.path}: {self.contents.called(key)} {err}') from None


def as_vectors(labels: torch.Tensor, label_dim: int) -> torch.Tensor:
    """Labels as networks take them, float32 [N, label_dim]: classes [N] one-hot, vectors as they are; on the labels' device."""
    if labels.ndim == 2:
        return labels
    return torch.zeros([len(labels), label_dim], device=labels.device).scatter_(1, labels[:, None].long(), 1.0)
