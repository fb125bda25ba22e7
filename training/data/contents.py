# SPDX-License-Identifier: Apache-2.0
"""The contents of a data set, images and annotations: of a zip or folder of pictures here, of one packed array in packed.py.

Both have: path; where (its name in errors); count; image_shape (C,H,W); is_float; units (of float images, as in dataset.json); latents (of
dataset.json, unchecked, or None); has(key); values(key): the labels, sigmas, sigma_min or sigma_max, one per image, unchecked, or None;
called(key): their name in errors; captions(): one text per image, or None; text: the record of labels that were made of captions
(dnnlib.text_record), unchecked, or None, and empty(), the label of the empty caption, float32 [label_dim]; name(i); decode(i): image
[C,H,W] as stored, uint8 or float32; fingerprint(), see dnnlib.fingerprint."""

import math
import os
from typing import Any

import numpy as np

from dnnlib import UserError, text_record
from dnnlib.archive import DAMAGE, MAX_MEMBER, MAX_PIXELS, Archive, damage, decode_image
from training.data import tables

SLACK_PIXELS, SLACK_BYTES = 2 ** 20, 2 ** 24  # by which an image may exceed the size expected from the first one, and still be read


class Pictures:
    """A zip or folder of PNG, JPEG or .npy ([C,H,W]) members in the order of their names, dataset.json optional."""

    def __init__(self, path: str | os.PathLike):
        self._archive = Archive(path)
        self.path = self.where = self._archive.path
        self._names = self._archive.images()
        self.count = len(self._names)
        self._meta = self._archive.read_json()
        self.units, self.latents, self.text = (self._meta.get(key) for key in ('units', 'latents', 'text'))
        self.image_shape = None
        first = self.decode(0)
        self.image_shape, self._dtype = first.shape, first.dtype

    @property
    def is_float(self) -> bool:
        return self._dtype == np.float32

    def has(self, key: str) -> bool:
        return bool(self._meta.get(key))

    def values(self, key: str) -> Any:
        if not self.has(key):
            return None
        try:
            return tables.by_file(self._meta[key], self._names)
        except ValueError as err:
            raise UserError(f'{self.where}: {self.called(key)} {err}') from None

    def called(self, key: str) -> str:
        return f'"{key}" in dataset.json'

    def captions(self) -> list[str] | None:
        return checked_captions(self.values('captions'), f'{self.where}: {self.called("captions")}')

    def empty(self) -> np.ndarray | None:
        found = self.text.get('empty') if isinstance(self.text, dict) else None
        return checked_empty([] if found is None else found, f'{self.where}: {self.called("text")}')

    def name(self, index: int) -> str:
        return self._names[index]

    def fingerprint(self) -> dict:
        return self._archive.fingerprint()

    def decode(self, index: int) -> np.ndarray:
        """Safe in threads. Raises UserError."""
        name = self._names[index]
        pixels, size = MAX_PIXELS, MAX_MEMBER
        if self.image_shape is not None:  # an image far larger than the first is refused without being decoded
            pixels = min(pixels, SLACK_PIXELS + 4 * self.image_shape[1] * self.image_shape[2])
            size = min(size, SLACK_BYTES + 32 * math.prod(self.image_shape))
        try:
            image = decode_image(name, self._archive.read(name, size), most=pixels)
        except DAMAGE as err:
            raise UserError(f'{self.where}: cannot read {name} ({damage(err)})') from None
        if image.dtype not in (np.uint8, np.float32, np.float64):
            raise UserError(f'{self.where}: {name} is {image.dtype} of shape {list(image.shape)}; expected 8-bit or '
                            'float32 [C,H,W]: convert it with dataset_tool.py')
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        if self.image_shape is not None and (image.shape != self.image_shape or image.dtype != self._dtype):
            raise UserError(
                f'{self.where}: {name} is {_describe(image.dtype, image.shape)}, but {self._names[0]} is '
                f'{_describe(self._dtype, self.image_shape)}; make them equal with dataset_tool.py --resolution')
        if image.dtype == np.float32 and not np.isfinite(image).all():
            wrong = np.count_nonzero(~np.isfinite(image))
            raise UserError(f'{self.where}: {name} has values that are not finite ({wrong} of {image.size}); leave it out with '
                            'dataset_tool.py --on-bad=skip')
        return image


class Names:
    """The names of the images by index, each made only when it is needed."""

    def __init__(self, contents: Any):
        self._contents = contents

    def __getitem__(self, index):
        return self._contents.name(index)


def checked_captions(found: Any, where: str) -> list[str] | None:
    """Captions, if they are texts. Raises UserError."""
    if found is not None and not (isinstance(found, list) and all(isinstance(caption, str) for caption in found)):
        raise UserError(f'{where} must be one text per file')
    return found


def checked_empty(found: Any, where: str) -> np.ndarray:
    """The label of the empty caption as float32 [label_dim]. Raises UserError."""
    try:
        label, = tables.labels(found if isinstance(found, np.ndarray) else [found])
    except (TypeError, ValueError):
        label = np.zeros([])
    if label.ndim != 1:
        raise UserError(f'{where}: the label of the empty caption, "empty", must be a finite vector; make it with dataset_tool.py captions')
    return label


def text_of(contents: Any) -> tuple[dict | None, np.ndarray | None]:
    """(record of how captions became the labels, label of the empty caption); (None, None) of other labels. Raises UserError."""
    if contents.text is None:
        return None, None
    try:
        record = text_record.checked(contents.text)
    except ValueError as err:
        raise UserError(f'{contents.where}: "text" in dataset.json {err}') from None
    empty, expected = contents.empty(), text_record.label_dim(record)
    if len(empty) != expected:
        raise UserError(f'{contents.where}: "text" in dataset.json describes labels of {expected} numbers, and that of the '
                        f'empty caption has {len(empty)}; make them with dataset_tool.py captions')
    return record, empty


def _describe(dtype, shape):
    return f'{dtype} {"x".join(map(str, shape))}'
