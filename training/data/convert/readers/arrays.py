# SPDX-License-Identifier: Apache-2.0
"""Images in arrays: .npy, .npz, and scikit-learn's digits."""

import numpy as np

from dnnlib import UserError, arrays
from dnnlib.archive import Archive
from training.data.convert.readers.source import Kind, Source

LAYOUTS = {'nhw': (0, 1, 2), 'nhwc': (0, 3, 1, 2), 'nchw': (0, 1, 2, 3)}  # axes in the order N, (C,) H, W


class ArraySource(Source):
    """Base class for images in one array, which a subclass passes to hold()."""

    def hold(self, images: np.ndarray, labels: list | None = None) -> None:
        """images: [N,C,H,W]. labels: a list of N, or None. Raises ValueError if there are no images."""
        if not len(images):
            raise ValueError('no images in it')
        self._images, self.labels = images, labels
        self.names = [str(i) for i in range(len(images))]

    def kind(self, index: int) -> Kind:
        """The Kind that all images share."""
        return Kind(*self._images.shape[1:], self._images.dtype == np.uint8, str(self._images.dtype))

    def read(self, index: int) -> np.ndarray:
        """An image, [C,H,W]."""
        return np.asarray(self._images[index])


class DigitsSource(ArraySource):
    """scikit-learn's 1,797 digits of 8x8 pixels and 17 grey levels."""

    what = 'the word "digits"'

    def __init__(self, path: str):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError('--source=digits needs scikit-learn: pip install scikit-learn') from None
        found = load_digits()
        images = np.round(found.images * 255 / 16).astype(np.uint8)  # 17 grey levels, 0 to 16
        self.hold(images[:, None], found.target.tolist())

    @staticmethod
    def matches(path: str) -> bool:
        """True for the word "digits" only."""
        return path == 'digits'


class NumpySource(ArraySource):
    """An .npy file, or an .npz with "images" and maybe "labels".

    layout: nhw, nhwc or nchw, if the shape is ambiguous. split: of an .npz with train_images or x_train, train_labels or y_train."""

    what = '.npy, .npz'

    def __init__(self, path: str, layout: str | None = None, split: str | None = None):
        if layout not in (None, *LAYOUTS):
            raise UserError(f'--source={path}: layout={layout} is unknown; choose from {", ".join(LAYOUTS)}')
        self._path, self._layout, self._mapped = path, layout, path.lower().endswith('.npy')
        if self._mapped:
            if split:
                raise UserError(f'--source={path}: split={split}: an .npy file is one array; name the file of the split')
            self.hold(self._map())
            return
        found = {name.removesuffix('.npy'): array for name, array in _npz(path)}
        images, labels = _of_split(found, split) if split else _only(found)
        self.hold(_as_nchw(images, layout, path), None if labels is None else labels.tolist())
        if self.labels is not None and not (isinstance(self.labels, list) and len(self.labels) == len(self.names)):
            raise ValueError(f'{len(self.names)} images, but {np.size(self.labels)} labels')

    @staticmethod
    def matches(path: str) -> bool:
        """By the ending of the name."""
        return path.lower().endswith(('.npy', '.npz'))

    def _map(self):
        return _as_nchw(arrays.open_npy(self._path), self._layout, self._path)

    def __getstate__(self):
        return {**self.__dict__, '_images': None} if self._mapped else self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._mapped:
            self._images = self._map()


def _only(found):
    """(images, labels or None) of an .npz that has one array of images."""
    keys = [key for key, array in found.items() if array.ndim in (3, 4)]
    images = 'images' if 'images' in keys else keys[0] if len(keys) == 1 else None
    if images is None:
        raise ValueError(f'needs an array "images", or one of three or four dimensions, or split= to choose by; it has {", ".join(found)}')
    return found[images], found.get('labels')


def _of_split(found, split):
    """(images, labels or None) of an .npz that has them for several splits, as those of Keras and MedMNIST do."""
    names = [(f'{split}_images', f'{split}_labels'), (f'x_{split}', f'y_{split}')]
    pair = next((pair for pair in names if pair[0] in found), None)
    if pair is None:
        raise ValueError(f'needs an array {names[0][0]} or {names[1][0]} for split={split}; it has {", ".join(found)}')
    labels = found.get(pair[1])
    # MedMNIST's classes are a column of whole numbers.
    return found[pair[0]], labels[:, 0] if labels is not None and labels.ndim == 2 and labels.shape[1] == 1 else labels


def _npz(path):
    """(name, array) of the arrays in an .npz, which is a zip file of .npy files."""
    archive = Archive(path, f'--source={path}')
    for name in archive.names:
        if name.endswith('.npy'):
            yield name, arrays.from_bytes(archive.read(name, most=None))


def _as_nchw(images, layout, path):
    """Any layout as [N,C,H,W]."""
    layout = find_layout(images, layout, path)
    images = images.transpose(LAYOUTS[layout])
    return images[:, None] if layout == 'nhw' else images


def find_layout(images, layout: str | None, path: str) -> str:
    """The key in LAYOUTS for anything with a shape and a dtype. By default, the channels are the one axis that is smaller than the
    other two. Raises UserError."""
    if images.ndim not in (3, 4) or images.dtype.kind not in 'uif' or images.size == 0:
        raise UserError(f'--source={path}: {images.dtype} of shape {list(images.shape)}; expected numbers '
                        '[N,H,W], [N,H,W,C] or [N,C,H,W]')
    if layout is None and images.ndim == 4:
        smallest = lambda axis: images.shape[axis] < min(np.delete(images.shape[1:], axis - 1))
        fits = [name for name, axis in (('nchw', 1), ('nhwc', 3)) if smallest(axis)]
        if len(fits) != 1:
            raise UserError(f'--source={path}: shape {list(images.shape)} may be [N,H,W,C] or [N,C,H,W]; '
                            'give --layout=nhwc or --layout=nchw')
        layout = fits[0]
    layout = layout or 'nhw'
    if len(layout) != images.ndim:
        raise UserError(f'--layout={layout}: the array in {path} has shape {list(images.shape)}')
    return layout
