# SPDX-License-Identifier: Apache-2.0
"""Non-leaky augmentation (Karras et al. 2020, 2022) for images that may carry noise: exact symmetries for all of them.

Moves that resample are applied to clean images only: interpolation correlates and shrinks noise, and the ambient loss assumes white
noise of std sigma_n."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

SCALE_STD = 0.2         # octaves
ANISO_STD = 0.2         # octaves
ANISO_TURN = 0.5        # probability that a stretch has a random axis instead of the horizontal one
TRANSLATE_STD = 0.125   # of the image's width and height

# Symlet 6: an orthogonal low-pass filter, so that doubling the resolution and halving it again changes nothing.
SYM6 = [0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
        0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
        0.0017677118642428036, -0.007800708325034148]
CENTRE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)  # its centre, in half pixels from its first tap
FILTERS = {}  # (size, device): see _filters
MARGIN = 7  # pixels beyond the edge that are filtered too: half for positions just outside, half for the width of the filter


class Moves(NamedTuple):
    """The transformation of each image, [N] each, applied in this order; see labels() for the nine numbers given to the network."""

    xflip: torch.Tensor     # 1 where mirrored left-right
    yflip: torch.Tensor     # 1 where mirrored top-bottom
    scale: torch.Tensor     # magnified by 2^(SCALE_STD scale)
    cos: torch.Tensor       # turned counter-clockwise, as displayed, by this angle
    sin: torch.Tensor
    stretch: torch.Tensor   # magnified by 2^(ANISO_STD stretch) along the axis, and by the inverse across it
    axis: torch.Tensor      # angle of that axis
    shift_x: torch.Tensor   # moved right by TRANSLATE_STD shift_x W
    shift_y: torch.Tensor   # moved down by TRANSLATE_STD shift_y H

    def labels(self) -> torch.Tensor:
        """[N,9]: xflip, yflip, scale, cos - 1, sin, stretch cos(axis), stretch sin(axis), shift_x, shift_y; 0 where unmoved."""
        stretch_x, stretch_y = self.stretch * self.axis.cos(), self.stretch * self.axis.sin()
        return torch.stack([self.xflip, self.yflip, self.scale, self.cos - 1, self.sin, stretch_x, stretch_y,
                            self.shift_x, self.shift_y], dim=1)


class AugmentPipe:
    """pipe(images, sigma_n, randn) -> (augmented images [N,C,H,W], augmentation labels [N,9]).

    images [N,C,H,W] float32; sigma_n [N,1,1,1], the noise that each already carries; randn(name, shape): standard normal draws.
    p: overall probability; each move happens with probability p times its own multiplier, at most 1.
    An image with sigma_n > 0 is mirrored, and turned by quarter turns (half turns where it is not square), and nothing else.
    Raises ValueError for a p outside [0, 1] and for negative multipliers."""

    label_dim = 9

    def __init__(self, p: float = 0.12, xflip: float = 1e8, yflip: float = 1, scale: float = 1, rotate_frac: float = 1, aniso: float = 1,
                 translate_frac: float = 1):
        multipliers = {'xflip': xflip, 'yflip': yflip, 'scale': scale, 'rotate_frac': rotate_frac, 'aniso': aniso,
                       'translate_frac': translate_frac}
        if not 0 <= p <= 1:
            raise ValueError(f'p={p}: the probability of augmentation must be from 0 to 1')
        for name, value in multipliers.items():
            if not value >= 0:
                raise ValueError(f'{name}={value}: a multiplier of the probability must be 0 or more')
        self.p = p
        self.chance = {name: min(p * value, 1.0) for name, value in multipliers.items()}

    def __call__(self, images: torch.Tensor, sigma_n: torch.Tensor, randn: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = sigma_n.reshape(-1) > 0
        moves = self.draw(noisy, images.shape[2] == images.shape[3], randn)
        return apply(images, moves, noisy), moves.labels()

    def draw(self, noisy: torch.Tensor, is_square: bool, randn: Callable) -> Moves:
        """The moves of a batch: noisy [N], true where only exact symmetries are allowed."""
        normal = iter(randn('augment', [len(noisy), 15]).unbind(1))
        uniform = lambda: torch.special.ndtr(next(normal))
        gate = lambda name: (uniform() < self.chance[name]).float()

        xflip = gate('xflip') * (uniform() < 0.5)
        yflip = gate('yflip') * (uniform() < 0.5)
        scale = gate('scale') * next(normal) * ~noisy
        angle = gate('rotate_frac') * self._angle(uniform(), noisy, is_square)
        exact = lambda values: torch.where(noisy, values.round(), values)  # quarter turns: exactly -1, 0 or 1
        stretch = gate('aniso') * next(normal) * ~noisy
        axis = (uniform() < ANISO_TURN) * _circle(uniform())
        shifted = gate('translate_frac') * ~noisy
        return Moves(xflip, yflip, scale, exact(angle.cos()), exact(angle.sin()), stretch, axis,
                     shifted * next(normal), shifted * next(normal))

    def _angle(self, u, noisy, is_square):
        turns = 4 if is_square else 2
        step = (u * turns).floor().clamp(max=turns - 1) * (2 * math.pi / turns)
        return torch.where(noisy, step, _circle(u))


def _circle(u):
    return (2 * u - 1) * math.pi


def apply(images: torch.Tensor, moves: Moves, noisy: torch.Tensor) -> torch.Tensor:
    """images [N,C,H,W] after the moves; noisy [N]: images that are turned exactly and never resampled."""
    images = _where(moves.xflip > 0, images.flip(3), images)
    images = _where(moves.yflip > 0, images.flip(2), images)
    images = _resample_rows((moves.labels()[:, 2:] != 0).any(1) & ~noisy, images, _inverse(moves, *images.shape[2:]))
    images = _where(noisy & (moves.cos == -1), images.rot90(2, [2, 3]), images)
    if images.shape[2] == images.shape[3]:
        images = _where(noisy & (moves.sin == 1), images.rot90(1, [2, 3]), images)
        images = _where(noisy & (moves.sin == -1), images.rot90(-1, [2, 3]), images)
    return images


def _resample_rows(rows, images, inverse):
    if images.device.type != 'cpu' or torch.compiler.is_compiling():
        return _where(rows, resample(images, inverse), images)
    images = images.clone()  # the rows are known on the host without a synchronisation, and only those are processed
    images[rows] = resample(images[rows], inverse[rows])
    return images


def _where(rows, yes, no):
    return torch.where(rows.reshape(-1, 1, 1, 1), yes, no)


def _inverse(moves, height, width):
    """[N,2,3]: from (x, y, 1) in the result to (x, y) in the image, both in pixels from the centre, x to the right and y down."""
    along, across = torch.exp2(-ANISO_STD * moves.stretch), torch.exp2(ANISO_STD * moves.stretch)
    size = torch.exp2(-SCALE_STD * moves.scale)
    axis_x, axis_y = moves.axis.cos(), -moves.axis.sin()  # y points down, angles go counter-clockwise
    # Stretch along a unit vector a: across I + (along - across) a a^T.
    mixed = (along - across) * axis_x * axis_y
    stretch = torch.stack([across + (along - across) * axis_x ** 2, mixed,
                           mixed, across + (along - across) * axis_y ** 2], dim=1).reshape(-1, 2, 2)
    turn = torch.stack([moves.cos, -moves.sin, moves.sin, moves.cos], dim=1).reshape(-1, 2, 2)
    linear = size.reshape(-1, 1, 1) * (turn @ stretch)  # the last move is undone first
    shift = TRANSLATE_STD * torch.stack([moves.shift_x * width, moves.shift_y * height], dim=1)
    return torch.cat([linear, -linear @ shift[:, :, None]], dim=2)


def resample(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Band-limited resampling: images [N,C,H,W] at the positions that inverse [N,2,3] gives for each pixel, see _inverse.

    The image is continued by reflection beyond its edges. The identity returns the image unchanged, since the filter is orthogonal. All
    shapes depend on the image's shape only, so that no synchronisation with the device is needed."""
    height, width = images.shape[2:]
    double_y, halve_y, places_y = _filters(height, images.device)
    double_x, halve_x, places_x = _filters(width, images.device)
    fine = double_y @ images @ double_x.T
    linear, shift = inverse[:, :, :2, None, None], inverse[:, :, 2, None, None]
    places = linear[:, :, 0] * places_x + linear[:, :, 1] * places_y[:, None] + shift  # [N, (x, y), fine H, fine W]
    grid = torch.stack([_index(places[:, 0], width) * (2 / (fine.shape[3] - 1)) - 1,
                        _index(places[:, 1], height) * (2 / (fine.shape[2] - 1)) - 1], dim=3)
    moved = F.grid_sample(fine, grid, mode='bilinear', padding_mode='border', align_corners=True)
    return halve_y @ moved @ halve_x.T


def _filters(size, device):
    """_make_filters(), made once: a dict, because the compiler looks through functools.cache, and would make them in every step."""
    if (size, device) not in FILTERS:
        FILTERS[size, device] = _make_filters(size, device)
    return FILTERS[size, device]


def _make_filters(size, device):
    """For one axis: the matrix that reflects and doubles, the one that halves, and where the doubled pixels lie.

    [2 (size + 2 MARGIN) + 10, size], [size, 2 size + 10] and [2 size + 10], the last in pixels from the image's centre. Matrices,
    because at these sizes one product is faster than a convolution with a single channel."""
    padded = size + 2 * MARGIN
    reflect = torch.eye(size, dtype=torch.float64)[_fold(torch.arange(padded) - MARGIN, size)]
    double = math.sqrt(2) * _taps(padded) @ reflect
    halve = math.sqrt(0.5) * _taps(size).T
    places = (torch.arange(len(_taps(size)), dtype=torch.float64) - CENTRE) / 2 - (size - 1) / 2
    return tuple(value.to(device, torch.float32) for value in (double, halve, places))


def _taps(size):
    """[2 size + 10, size]: entry (j, n) is tap j - 2n of the filter."""
    tap = torch.arange(2 * size + len(SYM6) - 2)[:, None] - 2 * torch.arange(size)
    values = torch.tensor(SYM6, dtype=torch.float64)[tap.clamp(0, len(SYM6) - 1)]
    return values * ((tap >= 0) & (tap < len(SYM6)))


def _index(place, size):
    """Index into the doubled, padded axis of a place in pixels from the centre; beyond half the padding places are reflected."""
    half = (size - 1) / 2
    inside = place.abs() <= half + MARGIN / 2
    return 2 * (torch.where(inside, place, _fold(place + half, size) - half) + half + MARGIN) + CENTRE


def _fold(place, size):
    """Reflects coordinates into [0, size - 1] about the centres of the first and the last pixel."""
    period = max(2 * (size - 1), 1)
    place = place.remainder(period)
    return torch.minimum(place, period - place).clamp(max=size - 1)
