# SPDX-License-Identifier: Apache-2.0
"""An image of a source -> the member of an archive: channels, crops, sizes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from dnnlib.archive import DAMAGE, damage
from training.data.convert.readers.source import Kind
from training.data.convert.stabilising import stabilised
from training.data.convert.statistics import Measured, measure
from training.data.convert.writers import encode_npy, encode_png
from training.estimation.stabilise import Stabiliser

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's conversion to grey
FILLS = ('edge', 'reflect', 'constant')
SIGMA_DATA = 0.5  # std that float data gets in network units


class Member(NamedTuple):
    """A converted image; or its problem; or neither, if it is too small for its crop."""

    data: bytes | None = None
    problem: str | None = None
    shape: tuple = ()
    total: float = 0.0  # sums of the values and of their squares, or [C] per channel, for mean and std of float data
    squares: float = 0.0
    gain: float = 1.0  # factor by which the conversion changed the std of white noise
    channels: int = 0  # of the original image
    measured: Measured | None = None
    tally: np.ndarray | None = None  # of counts, see stabilising.stabilised()


class Job(NamedTuple):
    """How the images of a source are converted.

    traits: (is_8bit, channels, (height, width)) that every image must have, None for those that may differ.
    transform: (image, width, height) -> [C,H,W], or None for an image that is too small; of TRANSFORMS. size: (width, height) or None.
    as_png: 8-bit members; otherwise float32 .npy. per_channel: whether a Member's sums are those of each channel. stabilise: the
    transform of counts; clean images are those of level 0."""

    traits: tuple
    transform: Callable | None = None
    size: tuple | None = None
    channels: int | None = None
    as_png: bool = True
    per_channel: bool = False
    stabilise: Stabiliser | None = None

    def convert(self, source, index: int) -> Member:
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
            tally = None
            if self.stabilise:
                image, problem, tally = stabilised(image, sigma, self.stabilise)
                if problem:
                    return Member(problem=problem, tally=tally)
            image = self._resized(to_channels(image, self.channels))
        except DAMAGE as err:
            return Member(problem=f'cannot be read ({damage(err)})')
        if image is None:
            return Member()
        told = {'shape': image.shape, 'gain': noise_gain(kind.channels, len(image)), 'channels': kind.channels, 'measured': measure(image),
                'tally': tally}
        if self.as_png:
            return Member(encode_png(image), **told)
        values = image.astype(np.float64)
        axes = (1, 2) if self.per_channel else None
        return Member(encode_npy(image), total=values.sum(axes), squares=np.square(values).sum(axes), **told)

    def objection(self, kind: Kind, sigma: float) -> str | None:
        """The reason why an image of a Kind, with noise of level sigma, cannot be converted; None if it can."""
        traits = kind.is_8bit, kind.channels, (kind.height, kind.width)
        if any(want not in (None, got) for want, got in zip(self.traits, traits)):
            return f'{kind}, unlike most others'
        if sigma and noise_gain(kind.channels, self.channels) is None:
            return (f'grey with noise of level {sigma:g}, which would be repeated in three channels, but training assumes independent '
                    'noise; make all images grey with --channels=1')
        return None

    def _resized(self, image):
        if self.transform:
            return self.transform(image, *(self.size or (None, None)))
        return resize(image, *self.size) if self.size else image


def noise_gain(count: int, channels: int | None) -> float | None:
    """The factor by which the std of white noise changes when `count` channels become `channels` (None: unchanged); None if the noise
    is repeated in several channels, and no longer white."""
    colours = count - (count in (2, 4))  # without alpha
    if channels is None or channels in (count, colours):
        return 1.0
    return math.sqrt(np.square(LUMA).sum()) if channels == 1 else None


def as_float(image: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    """(float32 array, None), or (None, description of the values that float32 cannot represent). Raises ValueError for other types."""
    if image.dtype.kind not in 'biuf':
        raise ValueError(f'{image.dtype}, expected real numbers')
    with np.errstate(over='ignore'):
        found = image.astype(np.float32)
    wrong = np.count_nonzero(~np.isfinite(found))
    if wrong:
        return None, f'values that are not finite ({wrong} of {found.size})'
    if image.dtype.kind in 'iu' and image.itemsize > 2 and (found != image).any():
        return None, 'numbers that float32 cannot represent; divide them, or convert them to float'
    return found, None


def to_channels(image: np.ndarray, channels: int | None) -> np.ndarray:
    """[C,H,W] with the given number of channels (None: unchanged): grey is repeated, RGB becomes luma, alpha is dropped."""
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


def center_crop(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest centred square of [C,H,W], resized to width x height."""
    side = min(image.shape[1:])
    return resize(_center(image, side, side), width, height)


def _center(image, height, width):
    """The centred rectangle of [C,H,W] with this size."""
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top:top + height, left:left + width]


def center_crop_dhariwal(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """ADM's crop to a square, [C,height,width]: halved by averaging while the short side is at least twice the target, resized to it
    by a bicubic filter, then cropped. Small images are enlarged."""
    while min(image.shape[1:]) >= 2 * width:
        image = resize(image, image.shape[2] // 2, image.shape[1] // 2, Image.BOX)
    scale = width / min(image.shape[1:])
    image = resize(image, round(image.shape[2] * scale), round(image.shape[1] * scale), Image.BICUBIC)
    return _center(image, height, width)


def pad(image: np.ndarray, width: int | None = None, height: int | None = None, *, fill: str = 'edge', value: float = 0.0) -> np.ndarray:
    """[C,H,W] centred in width x height, by default in a square of its long side; larger images are shrunk to fit, keeping their aspect.

    fill: the border: edge (its outermost pixels), reflect (its mirror image) or constant (value, as stored). Raises ValueError."""
    if fill not in FILLS:
        raise ValueError(f'fill={fill} is unknown; choose from {", ".join(FILLS)}')
    if not np.isfinite(value) or image.dtype == np.uint8 and not (0 <= value <= 255 and value == int(value)):
        raise ValueError(f'value={value} is not possible in {image.dtype} images')
    width, height = (width, height) if width else [max(image.shape[1:])] * 2
    scale = min(width / image.shape[2], height / image.shape[1])
    if scale < 1:
        sides = (max(1, min(most, round(side * scale))) for most, side in ((width, image.shape[2]), (height, image.shape[1])))
        image = resize(image, *sides)
    around = [(0, 0), *((gap // 2, gap - gap // 2) for gap in (height - image.shape[1], width - image.shape[2]))]
    return np.pad(image, around, fill, **({'constant_values': image.dtype.type(value)} if fill == 'constant' else {}))


def center_crop_wide(image: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """The centre at width x height between black bars that make it a square, [C,width,width]; None if the image is too small.

    As published: of H rows, the middle H * width / W are kept, and stretched to the given height."""
    rows = round(width * image.shape[1] / image.shape[2])
    if image.shape[2] < width or rows < height:
        return None
    top = (image.shape[1] - rows) // 2
    view = resize(image[:, top:top + rows], width, height)
    canvas = np.zeros([len(image), width, width], image.dtype)
    bar = (width - height) // 2
    canvas[:, bar:bar + height] = view
    return canvas


def resize(image: np.ndarray, width: int, height: int, filter: int = Image.LANCZOS) -> np.ndarray:
    """[C,H,W] -> [C,height,width] by a filter of Pillow's; 8-bit values are rounded, floats are not clipped."""
    if image.shape[1:] == (height, width):
        return image
    if image.dtype == np.uint8 and len(image) == 3:
        whole = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        return np.asarray(whole.resize((width, height), filter)).transpose(2, 0, 1)
    # Channel by channel: Pillow would treat a fourth channel as alpha, and multiply colours by it.
    bands = [Image.fromarray(np.ascontiguousarray(band)).resize((width, height), filter) for band in image]
    return np.stack([np.asarray(band) for band in bands])


def propose_units(total, squares, count: int) -> dict:
    """{offset, scale} that give data with these sums mean 0 and std SIGMA_DATA in network units; lists if the sums are per channel.
    count: number of values in each sum."""
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(squares / count - mean * mean, 0.0))
    return {'offset': mean.tolist(), 'scale': np.where(std > 0, std / SIGMA_DATA, 1.0).tolist()}


TRANSFORMS = {'center-crop': center_crop, 'center-crop-wide': center_crop_wide, 'center-crop-dhariwal': center_crop_dhariwal, 'pad': pad}
