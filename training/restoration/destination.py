# SPDX-License-Identifier: Apache-2.0
"""Where restored images go: a folder or zip of files, a packed data set, an .npy or .npz array, a TIFF stack. Each appears when complete.

A writer is a context with write(index, image), which takes an image as stored, float64 [C,H,W], and returns it as written; and
keep(index), which takes the source's own image; both in the order of the source. Attribute clipped: {name: number of values beyond the
range of their type}."""

import contextlib
import os
import zipfile
from typing import Any

import numpy as np

from dnnlib import UserError, arrays
from dnnlib.archive import Archive
from dnnlib.files import replacing
from training.data.convert import writers
from training.data.convert.readers.arrays import LAYOUTS, NumpySource, find_layout
from training.data.convert.readers.formats import needs
from training.data.convert.readers.packed import PackedSource
from training.data.convert.readers.tiff import TiffSource
from training.restoration.formats import Form, Forms, encode, float_form, member_form, quantised
from training.restoration.images import ImageSet

ARRAYS = ('.npy', '.npz', '.tif', '.tiff')
STACKS = ('.tif', '.tiff')
TABLES = ('labels', 'sigma_min', 'sigma_max', 'captions')  # of dataset.json, that restored images keep


class Members:
    """A folder or zip of files, or a packed data set, with the annotations of the source but for its noise levels.

    floats: whether all are float32 .npy, as uncertainties are. number: of samples of each image; they are called NAME-00.png and so on."""

    def __init__(self, dest: str, images: ImageSet, forms: Forms, floats: bool = False, number: int = 0, packed: bool = False) -> None:
        self.images, self.forms, self.floats, self.number, self.packed = images, forms, floats, number, packed
        self.writer = writers.open_writer(dest, packed)
        self.clipped, self.written = {}, {}  # {name: index}, in order

    def __enter__(self):
        self._open = contextlib.ExitStack()
        self._open.enter_context(self.writer)
        return self

    def _form(self, index, image):
        """The Form of an image, whose name no other has."""
        if self.packed:
            return member_form(self.images.names[index], image if image.dtype == np.uint8 and not self.forms.floats else np.float32(image))
        form = self.forms(index, image)
        if self.floats:
            form = float_form(form)
            return form._replace(name=f'{self.images.names[index]}.npy') if form.name in self.written else form
        return form

    def write(self, index: int, image: np.ndarray) -> np.ndarray:
        """Adds an image, [C,H,W], or its samples, [K,C,H,W]."""
        form = self._form(index, self.images.read(index))
        if not self.number:
            return self._add(index, form, image)
        stem, ending = os.path.splitext(form.name)
        digits = max(2, len(str(self.number - 1)))
        return np.stack([self._add(index, form._replace(name=f'{stem}-{k:0{digits}}{ending}'), one) for k, one in enumerate(image)])

    def _add(self, index, form: Form, image):
        values, beyond = quantised(image, form.dtype, form.top)
        self.clipped |= {form.name: beyond} if beyond else {}
        self.writer.write(form.name, encode(form, values))
        self.written[form.name] = index
        return values

    def keep(self, index: int) -> None:
        """Adds the source's own image, the bytes of its file where it is one; nothing to a set of uncertainties or samples."""
        if self.floats or self.number:
            return
        data, name = None if self.packed else self.forms.original(index), self.images.names[index]
        if data is None:
            image = self.images.read(index)
            form = self._form(index, image)
            data, name = encode(form, image.astype(form.dtype)), form.name
        self.writer.write(name, data)
        self.written[name] = index

    def __exit__(self, kind, *error):
        if kind is None and not (self.floats or self.number):
            meta = self._metadata()
            if meta or self.packed:
                self.writer.write_json('dataset.json', meta)
        return self._open.__exit__(kind, *error)

    def _metadata(self):
        """dataset.json without sigmas: that of the source with the names of the files written, or what the source tells."""
        if self.forms.archive is None or self.packed:
            return self._told()
        renamed = {**{os.path.basename(old): os.path.basename(new) for old, new in self.forms.renamed.items()}, **self.forms.renamed}
        found = {key: value for key, value in self.forms.archive.read_json().items() if key != 'sigmas'}
        for key in TABLES:
            if isinstance(found.get(key), dict):
                found[key] = {renamed.get(name, name): value for name, value in found[key].items()}
            elif found.get(key):  # pairs, or values in the order of the files
                named = lambda row: isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)
                found[key] = [[renamed.get(row[0], row[0]), row[1]] if named(row) else row for row in found[key]]
        return found

    def _told(self):
        source = self.images.source
        told = {key: getattr(source, key) for key in TABLES if getattr(source, key) is not None}
        if 'labels' in told and isinstance(told['labels'][0], str):
            told.pop('labels')  # the folders have the names of the classes
        meta = {key: [[name, values[index]] for name, index in self.written.items()] for key, values in told.items()}
        text = {'text': source.text} if source.text and 'labels' in meta else {}
        return meta | text | ({} if self._as_pictures() or not (meta or self.packed) else {'units': self.images.own_units()})

    def _as_pictures(self):
        return self.images.is_8bit and not self.forms.floats


class Array:
    """One array of all images, in an .npy, or in an .npz beside the source's other arrays, with the layout of the source.

    number: of samples of each image, an axis after the first."""

    def __init__(self, dest: str, images: ImageSet, floats: bool = False, number: int = 0) -> None:
        self.dest, self.images, self.number, self.clipped = dest, images, number, {}
        source, kinds = images.source, {images.kind(index)[:3] for index in range(len(images))}
        if len(kinds) > 1:
            raise UserError(f'--dest={dest}: is one array, and the images have several sizes; name a folder or a .zip')
        first = images.read(0)
        keep = not floats and first.dtype.kind in ('f' if images.counts else 'uif')
        self.dtype = first.dtype if keep else np.dtype(np.float32)
        self.axes, self.flat, self.others, self.key = (0, 1, 2), False, {}, 'images'
        if isinstance(source, NumpySource):
            self._like(images.path, source)
        shape = [first.shape[axis] for axis in self.axes][self.flat:]
        self.shape = (len(images), *([number] if number else []), *shape)

    def _like(self, path, source):
        """Takes over the layout, and the other arrays of an .npz."""
        if path.lower().endswith('.npy'):
            found = arrays.open_npy(path)
        else:
            archive = Archive(path)
            whole = {name[:-4]: arrays.from_bytes(archive.read(name, most=None)) for name in archive.names if name.endswith('.npy')}
            shape = (len(source.names), *source.kind(0)[:3])
            self.key = next(key for key, array in whole.items() if array.ndim in (3, 4) and array.size == np.prod(shape)
                            and len(array) == shape[0] and array.dtype == self.images.read(0).dtype)
            found = whole.pop(self.key)
            self.others = {key: array for key, array in whole.items() if key not in ('sigmas', 'sigma')}
        layout = find_layout(found, source._layout, path)
        self.flat = layout == 'nhw'
        self.axes = (0, 1, 2) if self.flat else tuple(int(axis) - 1 for axis in np.argsort(LAYOUTS[layout])[1:])

    def __enter__(self):
        self._open = contextlib.ExitStack()
        part = self._open.enter_context(replacing(self.dest))
        if self.dest.lower().endswith('.npz'):
            archive = self._open.enter_context(zipfile.ZipFile(part, 'w', zipfile.ZIP_STORED))
            for key, array in self.others.items():
                with archive.open(f'{key}.npy', 'w', force_zip64=True) as member:
                    np.save(member, array, allow_pickle=False)
            self._file = self._open.enter_context(archive.open(f'{self.key}.npy', 'w', force_zip64=True))
        else:
            self._file = self._open.enter_context(open(part, 'wb'))  # noqa: SIM115 (closed with the context)
        self._file.write(arrays.header(self.dtype, self.shape))
        return self

    def write(self, index: int, image: np.ndarray) -> np.ndarray:
        """Adds an image, [C,H,W], or its samples, [K,C,H,W]."""
        found, beyond = quantised(image, self.dtype)
        self.clipped |= {self.images.names[index]: beyond} if beyond else {}
        axes = self.axes if found.ndim == 3 else (0, *(axis + 1 for axis in self.axes))
        self._file.write(np.ascontiguousarray(found.transpose(axes)).tobytes())
        return found

    def keep(self, index: int) -> None:
        """Adds the source's own image; zeros to uncertainties, and copies to samples."""
        image = np.float64(self.images.read(index))
        self.write(index, np.stack([image] * self.number) if self.number else image)

    def __exit__(self, *error):
        return self._open.__exit__(*error)


class Spreads(Array):
    """An array of uncertainties: 0 where the source's own image is kept."""

    def __init__(self, dest: str, images: ImageSet) -> None:
        super().__init__(dest, images, floats=True)

    def keep(self, index: int) -> None:
        """Adds zeros."""
        self.write(index, np.zeros(self.images.kind(index)[:3]))


class Stack:
    """A TIFF file whose pages are the images, grey or RGB."""

    def __init__(self, dest: str, images: ImageSet) -> None:
        self.dest, self.images, self.clipped = dest, images, {}
        kinds = {images.kind(index) for index in range(len(images))}
        kind = images.kind(0)
        if len(kinds) > 1 or kind.channels not in (1, 3):
            raise UserError(f'--dest={dest}: the pages of a TIFF file must have one size, and 1 or 3 channels; name a folder or a .zip')
        self.dtype = np.dtype(kind.mode) if isinstance(images.source, TiffSource) else images.read(0).dtype
        if images.counts and self.dtype.kind != 'f':
            self.dtype = np.dtype(np.float32)
        self.tifffile = needs('tifffile', dest)

    def __enter__(self):
        self._open = contextlib.ExitStack()
        part = self._open.enter_context(replacing(self.dest))
        self._file = self._open.enter_context(self.tifffile.TiffWriter(part, bigtiff=True))
        return self

    def write(self, index: int, image: np.ndarray) -> np.ndarray:
        """Adds an image, [C,H,W]."""
        found, beyond = quantised(image, self.dtype)
        self.clipped |= {self.images.names[index]: beyond} if beyond else {}
        page, kind = (found[0], 'minisblack') if len(found) == 1 else (found.transpose(1, 2, 0), 'rgb')
        self._file.write(np.ascontiguousarray(page), photometric=kind, contiguous=False, metadata=None)
        return found

    def keep(self, index: int) -> None:
        """Adds the source's own image."""
        self.write(index, np.float64(self.images.read(index)))

    def __exit__(self, *error):
        return self._open.__exit__(*error)


def ending_of(dest: str) -> str:
    """The ending of --dest that decides what it is, '' for a folder. Raises UserError for others."""
    ending = os.path.splitext(dest.rstrip('/'))[1].lower()
    if ending not in ('', '.zip', *ARRAYS):
        raise UserError(f'--dest={dest}: must be a folder named without an extension, or end in .zip, .npy, .npz or .tif')
    return ending


def beside(dest: str, word: str, ending: str | None = None) -> str:
    """DEST-word, of the same kind as DEST or with the given ending."""
    path = os.path.normpath(dest)
    own = os.path.splitext(path)[1] if ending_of(dest) else ''
    return path[:len(path) - len(own)] + f'-{word}' + (own if ending is None else ending)


def open_dest(dest: str, images: ImageSet, forms: Forms) -> Any:
    """The writer of the restored images. Raises UserError for what the images do not fit."""
    ending, source = ending_of(dest), images.source
    if ending in STACKS:
        return Stack(dest, images)
    if ending == '.npy' or ending == '.npz' and isinstance(source, NumpySource) and images.path.lower().endswith('.npz'):
        return Array(dest, images)
    packed = ending == '.npz' or not ending and isinstance(source, PackedSource) and os.path.isdir(images.path)
    return Members(dest, images, forms, packed=packed)


def open_spread(dest: str, images: ImageSet, forms: Forms) -> Any:
    """The writer of uncertainties, float32: DEST-std, a folder or zip of .npy files, or an .npy for arrays."""
    if ending_of(dest) in ARRAYS:
        return Spreads(beside(dest, 'std', '.npy'), images)
    return Members(beside(dest, 'std'), images, forms, floats=True)


def open_samples(dest: str, images: ImageSet, forms: Forms, number: int) -> Any:
    """The writer of the samples of each image: DEST-samples."""
    if ending_of(dest) in ARRAYS:
        return Array(beside(dest, 'samples', '.npy'), images, number=number)
    return Members(beside(dest, 'samples'), images, forms, number=number)


def places(dest: str, samples: int, keep: bool) -> list[str]:
    """All paths that are written for --dest."""
    array = '.npy' if ending_of(dest) in ARRAYS else None
    return [dest] + [beside(dest, 'std', array)] * (samples > 1) + [beside(dest, 'samples', array)] * keep
