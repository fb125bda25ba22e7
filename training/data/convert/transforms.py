# SPDX-License-Identifier: Apache-2.0
"""An image of a source -> the member of an archive: channels, crops, sizes."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from dnnlib.archive import DAMAGE, damage
from training.data.convert.source import Kind
from training.data.convert.writers import encode_npy, encode_png

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's conversion to grey
TRANSFORMS = ('center-crop', 'center-crop-wide')
SIGMA_DATA = 0.5  # std that float data gets in network units


class Member(NamedTuple):
    """A converted image; or what is wrong with it; or neither, where it is too small for its crop."""

    data: bytes | None = None
    problem: str | None = None
    shape: tuple = ()
    total: float = 0.0  # sum of the values, and of their squares: mean and std of float data
    squares: float = 0.0
    gain: float = 1.0  # what converting multiplied the std of white noise by
    channels: int = 0  # of the image as it was


class Job(NamedTuple):
    """How the images of a source are converted.

    traits: (is_8bit, channels, (height, width)) that every image must have, None where it may differ.
    size: (width, height) or None. as_png: 8-bit members; otherwise float32 .npy."""

    traits: tuple
    transform: str | None = None
    size: tuple | None = None
    channels: int | None = None
    as_png: bool = True

    def convert(self, source, index):
        """Image number `index` of a source as a Member. Never raises for a bad image."""
        try:
            image = source.read(index)
            kind, sigma = Kind(*image.shape, image.dtype == np.uint8, ''), source.sigmas[index] if source.sigmas else 0
            if self.objection(kind, sigma):
                return Member(problem=self.objection(source.kind(index), sigma))
            if not self.as_png:
                image, problem = as_float(image)
                if problem:
                    return Member(problem=f'{source.kind(index)}, with {problem}')
            image = self._resized(to_channels(image, self.channels))
        except DAMAGE as err:
            return Member(problem=f'cannot be read ({damage(err)})')
        if image is None:
            return Member()
        told = {'shape': image.shape, 'gain': noise_gain(kind.channels, len(image)), 'channels': kind.channels}
        if self.as_png:
            return Member(encode_png(image), **told)
        values = image.astype(np.float64)
        return Member(encode_npy(image), total=values.sum(), squares=np.square(values).sum(), **told)

    def objection(self, kind, sigma):
        """What keeps an image of a Kind, with noise of level sigma, from being converted; None where nothing does."""
        traits = kind.is_8bit, kind.channels, (kind.height, kind.width)
        if any(want not in (None, got) for want, got in zip(self.traits, traits)):
            return f'{kind}, unlike most others'
        if sigma and noise_gain(kind.channels, self.channels) is None:
            return (f'grey with noise of level {sigma:g}, which would be repeated in three channels, where training takes it for white '
                    'noise; make all images grey with --channels=1')
        return None

    def _resized(self, image):
        if self.transform == 'center-crop':
            return resize(center_crop(image), *self.size)
        if self.transform == 'center-crop-wide':
            return center_crop_wide(image, *self.size)
        return resize(image, *self.size) if self.size else image


def noise_gain(count, channels):
    """What the std of white noise is multiplied by when `count` channels become `channels` (None: as they are); None where it is
    repeated in several channels, and no longer white."""
    colours = count - (count in (2, 4))  # without alpha
    if channels is None or channels in (count, colours):
        return 1.0
    return math.sqrt(np.square(LUMA).sum()) if channels == 1 else None


def as_float(image):
    """(float32 array, None), or (None, what float32 would not hold). Raises ValueError for numbers that are not real."""
    if image.dtype.kind not in 'biuf':
        raise ValueError(f'{image.dtype}, expected real numbers')
    with np.errstate(over='ignore'):
        found = image.astype(np.float32)
    wrong = np.count_nonzero(~np.isfinite(found))
    if wrong:
        return None, f'values that are not finite ({wrong} of {found.size})'
    if image.dtype.kind in 'iu' and image.itemsize > 2 and (found != image).any():
        return None, 'numbers that float32 does not hold; divide them, or make them float'
    return found, None


def to_channels(image, channels):
    """[C,H,W] with the wanted number of channels (None: as it is): grey repeated, RGB to luma, alpha dropped."""
    count = len(image)
    if channels is None or count == channels:
        return image
    if channels not in (1, 3) or count > 4:
        raise ValueError(f'{count} channels cannot become {channels}')
    if count in (2, 4):
        image = image[:count - 1]
    if len(image) == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=0)
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).convert('L'))[None]
    return np.tensordot(LUMA, image, 1)[None].astype(image.dtype)


def center_crop(image):
    """The largest centred square of [C,H,W]."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top:top + side, left:left + side]


def center_crop_wide(image, width, height):
    """The centre at width x height between black bars that make it a square, [C,width,width]; None if the image is too small.

    As published: of H rows, the middle H * width / W are kept, and stretched to the height that is asked for."""
    rows = round(width * image.shape[1] / image.shape[2])
    if image.shape[2] < width or rows < height:
        return None
    top = (image.shape[1] - rows) // 2
    view = resize(image[:, top:top + rows], width, height)
    canvas = np.zeros([len(image), width, width], image.dtype)
    bar = (width - height) // 2
    canvas[:, bar:bar + height] = view
    return canvas


def resize(image, width, height):
    """[C,H,W] -> [C,height,width] by Lanczos; 8-bit values are rounded, floats are not clipped."""
    if image.shape[1:] == (height, width):
        return image
    if image.dtype == np.uint8 and len(image) == 3:
        whole = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        return np.asarray(whole.resize((width, height), Image.LANCZOS)).transpose(2, 0, 1)
    # Channel by channel: Pillow would multiply colours by a channel that it takes for alpha.
    bands = [Image.fromarray(np.ascontiguousarray(band)).resize((width, height), Image.LANCZOS) for band in image]
    return np.stack([np.asarray(band) for band in bands])


def propose_units(total, squares, count):
    """{offset, scale} that give data with these sums mean 0 and std SIGMA_DATA in network units."""
    mean = total / count
    std = math.sqrt(max(squares / count - mean * mean, 0.0))
    return {'offset': mean, 'scale': std / SIGMA_DATA if std > 0 else 1.0}
