# SPDX-License-Identifier: Apache-2.0
"""Conversions between network units, 8-bit pictures, physical units and counts, and grids of images."""

import math

import numpy as np
import torch

from training.data.dataset import UNITS_8BIT
from training.estimation.stabilise import of_units

GRID_CELL = 64  # grids enlarge images smaller than this by a whole factor, so that single pixels can be seen
GRID_GAP = 2  # pixels between the images of a grid
GRID_BACKGROUND = 255


def is_picture(channels: int, units: dict | None = None) -> bool:
    """Whether images can be written as PNG: 8-bit data (no units), grey or RGB."""
    return channels in (1, 3) and units is None


def grid(images: np.ndarray | torch.Tensor, columns: int | None = None) -> np.ndarray:
    """Many images in one picture, row by row, as nearly square as possible unless `columns` is given.

    images: uint8 [N,C,H,W], C = 1 or 3. Returns uint8 [C,H',W']; small images are enlarged."""
    images = np.asarray(images)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    zoom = max(1, GRID_CELL // max(height, width))
    cell = height * zoom + GRID_GAP, width * zoom + GRID_GAP
    size = [math.ceil(count / columns) * cell[0] + GRID_GAP, columns * cell[1] + GRID_GAP]
    canvas = np.full([channels, *size], GRID_BACKGROUND, np.uint8)
    for i, image in enumerate(images):
        top, left = (GRID_GAP + place * length for place, length in zip(divmod(i, columns), cell))
        canvas[:, top:top + height * zoom, left:left + width * zoom] = image.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return canvas


def as_pictures(images: np.ndarray | torch.Tensor) -> np.ndarray:
    """Float images [N,C,H,W] as grey uint8 [N,1,H,W] to look at: the first channel, from its lowest to its highest value."""
    first = np.asarray(images, dtype=np.float64)[:, :1]
    low, high = np.nanmin(first), np.nanmax(first)
    return np.nan_to_num((first - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Network units [-1,1] to 8-bit grey levels, as published: x * 127.5 + 128, clipped, truncated."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)


def to_physical(images: torch.Tensor, units: dict | None) -> torch.Tensor:
    """Network units to the data's own, x * scale + offset; unchanged where units is None.

    images: [N,C,H,W]. units: {"scale", "offset"}, each a number or one per channel."""
    if units is None:
        return images
    scale, offset = (images.new_tensor(units[key]).reshape(-1, 1, 1) for key in ('scale', 'offset'))  # [1 or C,1,1]
    return images * scale + offset


def to_values(images: torch.Tensor, units: dict | None) -> torch.Tensor:
    """Clean images in network units -> the data's own values: to_physical, and of stabilised counts the counts, by the unbiased inverse.

    images, units: as for to_physical; "stabilise" in the units names the transform."""
    stabiliser, images = of_units(units), to_physical(images, units)
    return stabiliser.inverse(images) if stabiliser else images


def to_network(image: np.ndarray, units: dict | None) -> torch.Tensor:
    """The image of a file in network units, float64 [C,H,W]: inverts to_uint8 and to_values, up to rounding, and values at the end of
    their range.

    image: an array [C,H,W]; uint8 for pictures."""
    image = torch.as_tensor(image, dtype=torch.float64)
    stabiliser, units = of_units(units), units or UNITS_8BIT
    image = stabiliser.expected(image) if stabiliser else image
    scale, offset = (torch.as_tensor(units[key], dtype=torch.float64).reshape(-1, 1, 1) for key in ('scale', 'offset'))
    return (image - offset) / scale


def pictures(batch: torch.Tensor, units: dict | None = None) -> np.ndarray:
    """Images in network units as pictures, NumPy uint8 [N,1 or 3,H,W]; of data that is not 8-bit the first channel is shown."""
    if is_picture(batch.shape[1], units):
        return to_uint8(batch).cpu().numpy()
    return as_pictures(batch.cpu().numpy())
