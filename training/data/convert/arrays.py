# SPDX-License-Identifier: Apache-2.0
"""Images in arrays: .npy, .npz, and scikit-learn's digits."""

import numpy as np

from dnnlib import UserError, arrays
from dnnlib.archive import Archive
from training.data.convert.source import Kind, Source

LAYOUTS = {'nhw': (0, 1, 2), 'nhwc': (0, 3, 1, 2), 'nchw': (0, 1, 2, 3)}  # axes in the order N, (C,) H, W


class ArraySource(Source):
    """Images that lie in one array: hold() is told of it."""

    def hold(self, images, labels=None):
        """images: [N,C,H,W]. labels: a list of N, or None."""
        self._images, self.labels = images, labels
        self.names = [str(i) for i in range(len(images))]

    def kind(self, index):
        """The Kind that all images share."""
        return Kind(*self._images.shape[1:], self._images.dtype == np.uint8, str(self._images.dtype))

    def read(self, index):
        """An image, [C,H,W]."""
        return np.asarray(self._images[index])


class DigitsSource(ArraySource):
    """scikit-learn's 1,797 digits of 8x8 pixels and 17 grey levels."""

    what = 'the word "digits"'

    def __init__(self, path):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError('--source=digits needs scikit-learn: pip install scikit-learn') from None
        found = load_digits()
        images = np.round(found.images * 255 / 16).astype(np.uint8)  # 17 grey levels, 0 to 16
        self.hold(images[:, None], found.target.tolist())

    @staticmethod
    def matches(path):
        """The word alone."""
        return path == 'digits'


class NumpySource(ArraySource):
    """An .npy file, or an .npz with "images" and maybe "labels". layout: nhw, nhwc or nchw, where the shape does not tell."""

    what = '.npy, .npz'

    def __init__(self, path, layout=None):
        if layout not in (None, *LAYOUTS):
            raise UserError(f'--source={path}: layout={layout} is none of {", ".join(LAYOUTS)}')
        if path.lower().endswith('.npy'):
            self.hold(_as_nchw(arrays.open_npy(path), layout, path))
            return
        found = {name.removesuffix('.npy'): array for name, array in _npz(path)}
        keys = [key for key, array in found.items() if array.ndim in (3, 4)]
        images = 'images' if 'images' in keys else keys[0] if len(keys) == 1 else None
        if images is None:
            raise ValueError(f'needs an array "images", or one of three or four dimensions; it has {", ".join(found)}')
        self.hold(_as_nchw(found[images], layout, path), found['labels'].tolist() if 'labels' in found else None)
        if self.labels is not None and not (isinstance(self.labels, list) and len(self.labels) == len(self.names)):
            raise ValueError(f'{len(self.names)} images, but {np.size(self.labels)} labels')

    @staticmethod
    def matches(path):
        """By the ending of the name."""
        return path.lower().endswith(('.npy', '.npz'))


def _npz(path):
    """(name, array) of the arrays in an .npz, which is a zip file of .npy files."""
    archive = Archive(path, f'--source={path}')
    for name in archive.names:
        if name.endswith('.npy'):
            yield name, arrays.from_bytes(archive.read(name, most=None))


def _as_nchw(images, layout, path):
    """Any layout as [N,C,H,W]. Without a word on it, the channels are the one axis that is smaller than the other two."""
    if images.ndim not in (3, 4) or images.dtype.kind not in 'uif' or images.size == 0:
        raise UserError(f'--source={path}: {images.dtype} of shape {list(images.shape)}; expected numbers '
                        '[N,H,W], [N,H,W,C] or [N,C,H,W]')
    if layout is None and images.ndim == 4:
        smallest = lambda axis: images.shape[axis] < min(np.delete(images.shape[1:], axis - 1))
        fits = [name for name, axis in (('nchw', 1), ('nhwc', 3)) if smallest(axis)]
        if len(fits) != 1:
            raise UserError(f'--source={path}: shape {list(images.shape)} may be [N,H,W,C] or [N,C,H,W]; '
                            'say --layout=nhwc or --layout=nchw')
        layout = fits[0]
    layout = layout or 'nhw'
    if len(layout) != images.ndim:
        raise UserError(f'--layout={layout}: the array in {path} has shape {list(images.shape)}')
    images = images.transpose(LAYOUTS[layout])
    return images[:, None] if layout == 'nhw' else images
