# SPDX-License-Identifier: Apache-2.0
"""Cuts large images into tiles, each with the label, caption and levels of its image."""

import sys

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from training.data.convert.readers.source import Kind, Source

MAX_TILES = 2 ** 17  # limit per image: the largest picture that is read, in tiles of 32x32 pixels
PER_IMAGE = ('labels', 'captions', 'sigmas', 'sigma_min', 'sigma_max')


class Tiled(Source):
    """The tiles of a source's images, row by row, named image/y00000x00224. Images smaller than a tile are left out, and counted.

    width, height: of a tile. overlap: least number of pixels that neighbours share; the last tile of a row or column is shifted inwards
    to end with the image. origin: the index of each tile's image in the source. Raises UserError if no image is large enough."""

    def __init__(self, source, width: int, height: int, overlap: int = 0):
        self._source, self._shape, self.units, self.text = source, (height, width), source.units, source.text
        self.stabilise = source.stabilise
        self._kinds, self._places, self._last, small = {}, [], (None, None), 0
        for index in range(len(source.names)):
            try:
                kind = self._kinds[index] = source.kind(index)
            except DAMAGE:
                self._places.append((index, 0, 0))  # read() will raise its error
                continue
            tops, lefts = starts(kind.height, height, overlap), starts(kind.width, width, overlap)
            small += not (tops and lefts)
            if len(tops) * len(lefts) > MAX_TILES:
                raise UserError(f'--tile={width}x{height}: cuts {source.names[index]} ({kind.width}x{kind.height}) into '
                                f'{len(tops) * len(lefts)} tiles, more than the limit of {MAX_TILES} per image; use larger ones')
            self._places += [(index, top, left) for top in tops for left in lefts]
        if small:
            print(f'Left out {small} of {len(source.names)} images, smaller than --tile={width}x{height}', file=sys.stderr)
        if not self._places:
            raise UserError(f'--tile={width}x{height}: all {len(source.names)} images are smaller')
        self.origin = [index for index, _, _ in self._places]
        self.names = [f'{source.names[index]}/y{top:05}x{left:05}' for index, top, left in self._places]
        self.class_names = source.class_names
        for key in PER_IMAGE:
            values = getattr(source, key)
            setattr(self, key, None if values is None else [values[index] for index in self.origin])

    def __getstate__(self):
        return {**self.__dict__, '_last': (None, None)}

    def kind(self, index: int) -> Kind:
        """The Kind of the image, in the tile's size."""
        kind = self._kinds.get(self.origin[index]) or self._source.kind(self.origin[index])
        return kind._replace(height=self._shape[0], width=self._shape[1])

    def read(self, index: int) -> np.ndarray:
        """The tile; its image is decoded once for consecutive tiles."""
        image, top, left = self._places[index]
        if self._last[0] != image:
            try:
                self._last = image, self._source.read(image)
            except DAMAGE as err:
                self._last = image, err  # raised for each tile, after one attempt
        if isinstance(self._last[1], Exception):
            raise self._last[1]
        found = self._last[1][:, top:top + self._shape[0], left:left + self._shape[1]]
        if found.shape[1:] != self._shape:
            raise ValueError(f'its {self._last[1].shape[2]} x {self._last[1].shape[1]} pixels are not those of its header')
        return found


def starts(side: int, tile: int, overlap: int = 0) -> list[int]:
    """The first pixels of the tiles that cover a side completely; [] if it is shorter than a tile."""
    if side < tile:
        return []
    found = list(range(0, side - tile + 1, tile - overlap))
    return found if found[-1] == side - tile else [*found, side - tile]
