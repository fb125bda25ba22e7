# SPDX-License-Identifier: Apache-2.0
"""The interface of all sources of images, and the description of an image."""

from typing import NamedTuple

import numpy as np

NO_PICTURES = '--source={}: holds latents, not pictures; convert the pictures, and encode them again'


class Kind(NamedTuple):
    """What an image is before anything is done to it."""

    channels: int
    height: int
    width: int
    is_8bit: bool
    mode: str

    def __str__(self):
        return f'{self.width}x{self.height} {self.mode}'


class Source:
    """Images in one place, of one format.

    Source(path, **options): the keywords, each with a default, are the keys of --source=PATH:key=value (those of TOLD in sources.py are
    not the source's). Raises UserError, or an error of DAMAGE that says what is wrong with the file, whose name is then put before it.

    names: one per image, all different, with slashes between folders; tables of the command line refer to them.
    labels: a class number (int), the name of a class (str; the names are numbered in the order of the alphabet), or a vector (list) an
    image; None without. sigmas, sigma_min, sigma_max: a level an image, in the units of the values as stored (8-bit: of [-1,1]); None
    within a limit: none. captions: a text an image. units: {offset, scale} of float data. stabilise: the record of the transform that
    counts have been through, of units. text: of labels that were made of captions, their
    record with "empty", the label of the empty caption, as in dataset.json. Each is None if the source has none.

    A source goes to other processes: it can be pickled, and opens its files when they are first read there."""

    what = ''  # what it is called where sources are listed
    labels = sigmas = sigma_min = sigma_max = captions = units = text = stabilise = None
    class_names = None  # {class: name}, once the names have been numbered

    @staticmethod
    def matches(path: str) -> bool:
        """Whether the path looks like one of these, by its name or first bytes: cheap, and never an error."""
        return False

    def kind(self, index: int) -> Kind:
        """The Kind of an image, without decoding it where that can be. Raises errors of DAMAGE."""
        raise NotImplementedError

    def read(self, index: int) -> np.ndarray:
        """The image, [C,H,W], of its kind's shape and type. Raises errors of DAMAGE."""
        raise NotImplementedError


def folder_classes(names):
    """The top folders of names as classes, or None if there are fewer than two of them (as published)."""
    tops = [name.split('/')[0] if '/' in name else '' for name in names]
    return tops if len(set(tops)) > 1 else None
