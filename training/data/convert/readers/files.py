# SPDX-License-Identifier: Apache-2.0
"""Image files in a folder or zip."""

import os

import numpy as np

from dnnlib import UserError, pictures, text_record
from dnnlib.archive import IMAGES, RARER_IMAGES, Archive, decode_image, open_picture
from training.data import tables
from training.data.contents import checked_empty
from training.data.convert.annotations import match
from training.data.convert.readers import tiff
from training.data.convert.readers.source import NO_PICTURES, Kind, Source, folder_classes


class FileSource(Source):
    """Image files of a folder or zip. A dataset.json gives labels, levels and units; otherwise the top folders are the classes."""

    what = 'a folder, .zip'

    def __init__(self, path: str):
        self._archive = Archive(path, f'--source={path}')
        self.names = self._archive.images((*IMAGES, *RARER_IMAGES))
        meta = self._archive.read_json()
        if meta.get('latents') is not None:
            raise UserError(NO_PICTURES.format(path))
        self.units = _units(meta.get('units'), path)
        told = lambda key: match(meta[key], self.names, f'"{key}" in {path}') if meta.get(key) else None
        self.labels, self.sigmas, self.sigma_min, self.sigma_max = map(told, ('labels', 'sigmas', 'sigma_min', 'sigma_max'))
        self.captions = told('captions')
        if self.captions and not all(isinstance(caption, str) for caption in self.captions):
            raise UserError(f'--source={path}: "captions" in its dataset.json must be one text per file')
        self.text = _text(meta.get('text'), path) if self.labels else None
        if 'labels' not in meta:
            self.labels = folder_classes(self.names)

    @staticmethod
    def matches(path: str) -> bool:
        """Any folder, and files called .zip."""
        return os.path.isdir(path) or path.lower().endswith('.zip')

    def kind(self, index: int) -> Kind:
        """The Kind of an image, from the header of its file."""
        name = self.names[index]
        if name.lower().endswith('.npy'):
            array = self.read(index)
            return Kind(*array.shape, array.dtype == np.uint8, str(array.dtype))
        data = self._archive.read(name)
        if tiff.beyond_pillow(data):
            return tiff.tiff_kind(data)
        picture = open_picture(data)
        return Kind(*pictures.header(picture, data), picture.mode)

    def read(self, index: int) -> np.ndarray:
        """The image, [C,H,W], from decode_image, or from decode_tiff if Pillow would read only a part of it."""
        name = self.names[index]
        data = self._archive.read(name)
        return tiff.decode_tiff(data) if tiff.beyond_pillow(data) else decode_image(name, data)


def _units(told, path):
    try:
        return None if told is None else tables.units(told)
    except (KeyError, ValueError):
        raise UserError(f'--source={path}: "units" in its dataset.json must be {{"offset": ..., "scale": ...}}, finite numbers, '
                        'single or one per channel, the scale above 0') from None


def _text(told, path):
    if told is None:
        return None
    where = f'--source={path}: "text" in its dataset.json'
    try:
        return {**text_record.checked(told), 'empty': checked_empty(told.get('empty'), where).tolist()}
    except ValueError as err:
        raise UserError(f'{where} {err}') from None
