# SPDX-License-Identifier: Apache-2.0
"""Packed data sets, as written by dataset_tool.py --packed, as sources."""

import contextlib
import os
import zipfile

from dnnlib import UserError
from training.data import tables
from training.data.contents import text_of
from training.data.convert.readers.arrays import ArraySource
from training.data.convert.readers.source import NO_PICTURES
from training.data.packed import Packed, is_packed


class PackedSource(ArraySource):
    """The images of a packed .npz or folder, with their labels, levels and units."""

    what = 'a data set written with --packed'

    def __init__(self, path: str):
        self._path, contents = path, Packed(path, where=f'--source={path}')
        if contents.latents is not None:
            raise UserError(NO_PICTURES.format(path))
        told = {key: None if contents.values(key) is None else contents.values(key).tolist() for key in tables.CHECKS}
        self.hold(contents.images, told['labels'])
        self.units, self.sigmas, self.captions = contents.units, told['sigmas'], contents.captions()
        text, empty = text_of(contents)
        self.text = text and {**text, 'empty': empty.tolist()}
        # As in dataset.json, since JSON has no infinity.
        self.sigma_min = told['sigma_min'] and [min(limit, tables.LARGEST) or None for limit in told['sigma_min']]
        self.sigma_max = told['sigma_max'] and [limit if limit <= tables.LARGEST else None for limit in told['sigma_max']]

    def __getstate__(self):
        return {**self.__dict__, '_images': None}  # mapped again elsewhere

    def __setstate__(self, state):
        self.__dict__.update(state, _images=Packed(state['_path']).images)

    @staticmethod
    def matches(path: str) -> bool:
        """A packed folder, or an .npz with a dataset.json, which distinguishes it from arrays of other programs."""
        if not is_packed(path) or os.path.isdir(path):
            return is_packed(path)
        with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            return 'dataset.json' in archive.namelist()
        return False
