# SPDX-License-Identifier: Apache-2.0
"""Images to files: PNG, npy, npz and grids, each written whole or not at all, by threads that work while the sampler does."""

import collections
import concurrent.futures
import contextlib
import math

import numpy as np
import PIL.Image

from dnnlib.util import replacing

GRID_CELL = 64  # images smaller than this are enlarged in grids by a whole factor, so that single pixels can be seen
GRID_GAP = 2  # pixels between the images of a grid
GRID_BACKGROUND = 255


def is_picture(channels, units=None):
    """True where images can be PNGs: 8-bit data (no units), grey or RGB."""
    return channels in (1, 3) and units is None


def write_png(path, image):
    """image: uint8 [1,H,W] (grey) or [3,H,W] (RGB)."""
    with replacing(path) as part, open(part, 'wb') as f:
        _pil(image).save(f, format='PNG')


def write_npy(path, image):
    """image: [C,H,W] of any dtype."""
    with replacing(path) as part, open(part, 'wb') as f:
        np.save(f, np.asarray(image))


def write_npz(path, image, **facts):
    """image: [C,H,W] of any dtype, stored as `image`; facts: more arrays by name (those that are None are left out)."""
    with replacing(path) as part, open(part, 'wb') as f:
        np.savez(f, image=np.asarray(image), **{name: value for name, value in facts.items() if value is not None})


def _pil(image):
    image = np.asarray(image)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3), f'{image.dtype} {image.shape} is no picture'
    # Pillow takes grey images as [H,W]: it has no word for [H,W,1].
    return PIL.Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def grid(images, columns=None):
    """One picture of many, row by row, as square as it gets unless `columns` is given.

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


def write_grid(path, images, columns=None):
    """images: uint8 [N,C,H,W], C = 1 or 3. Writes their grid() as PNG."""
    write_png(path, grid(images, columns))


def as_pictures(images):
    """Float images [N,C,H,W] as grey uint8 [N,1,H,W] to look at: the first channel, from its lowest to its highest value."""
    first = np.asarray(images, dtype=np.float64)[:, :1]
    low, high = np.nanmin(first), np.nanmax(first)
    return np.nan_to_num((first - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)


class Writers:
    """Threads that write files while the caller goes on. The first error of a file is raised by a later submit or at the end."""

    def __init__(self, threads=4, backlog=256):
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._backlog, self._pending = backlog, collections.deque()
        self.written = 0

    def __enter__(self):
        return self

    def submit(self, function, *args, **kwargs):
        """Calls function(*args, **kwargs) soon; waits where too many calls are outstanding."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._backlog):
            self._settle()
        self._pending.append(self._pool.submit(function, *args, **kwargs))

    def _settle(self):
        self._pending.popleft().result()
        self.written += 1

    def __exit__(self, kind, *_):
        if kind is None:
            with contextlib.ExitStack() as stack:
                stack.callback(self._pool.shutdown, cancel_futures=True)
                while self._pending:
                    self._settle()
        else:
            self._pool.shutdown(cancel_futures=True)
