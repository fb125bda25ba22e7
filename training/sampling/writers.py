# SPDX-License-Identifier: Apache-2.0
"""Writing images to files: PNG, npy, npz and grids, each complete or not at all, by threads that work during sampling."""

import collections
import concurrent.futures
import io
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch

from dnnlib.archive import DAMAGE, decode_image
from dnnlib.files import replacing
from training.sampling.pixels import grid

PNG_END = b'IEND\xaeB`\x82'


def write_png(path: str | os.PathLike, image: np.ndarray | torch.Tensor) -> None:
    """Writes a PNG. image: uint8 [1,H,W] (grey) or [3,H,W] (RGB)."""
    with replacing(path) as part, open(part, 'wb') as f:
        _pil(image).save(f, format='PNG')


def write_npy(path: str | os.PathLike, image: np.ndarray | torch.Tensor) -> None:
    """Writes an npy file. image: [C,H,W] of any dtype."""
    with replacing(path) as part, open(part, 'wb') as f:
        np.save(f, np.asarray(image))


def write_npz(path: str | os.PathLike, image: np.ndarray | torch.Tensor, **facts: Any) -> None:
    """Writes an npz file. image: [C,H,W] of any dtype, stored as `image`; facts: more arrays by name (None is left out)."""
    with replacing(path) as part, open(part, 'wb') as f:
        np.savez(f, image=np.asarray(image), **{name: value for name, value in facts.items() if value is not None})


def read_image(path: str) -> np.ndarray:
    """The image in a file of write_png, write_npy or write_npz: [C,H,W]. Raises the errors in DAMAGE for incomplete files."""
    with open(path, 'rb') as f:
        data = f.read()
    if path.endswith('.npz'):
        return np.load(io.BytesIO(data), allow_pickle=False)['image']
    if path.endswith('.png') and not data.endswith(PNG_END):  # Pillow does not mind
        raise ValueError(f'{path}: no whole PNG')
    return decode_image(path, data)


class Files(NamedTuple):
    """The files of the images of seeds."""

    outdir: str
    format: str  # png, npy or npz
    subdirs: bool = False  # one folder per 1000 seeds

    def path(self, seed: int) -> str:
        """OUTDIR/000042.png, or OUTDIR/000000/000042.png."""
        folder = os.path.join(self.outdir, f'{seed // 1000 * 1000:06d}') if self.subdirs else self.outdir
        return os.path.join(folder, f'{seed:06d}.{self.format}')

    def write(self, seed: int, image: np.ndarray, label: np.ndarray | None = None) -> None:
        """Writes one image, and creates its folder. Raises OSError that names the file."""
        path = self.path(seed)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if self.format == 'npz':
                write_npz(path, image, seed=seed, label=label)
            else:
                (write_png if self.format == 'png' else write_npy)(path, image)
        except OSError as err:
            raise OSError(err.errno, err.strerror or str(err), err.filename or path) from None

    def missing(self, seeds: list[int], shape: Sequence[int]) -> list[int]:
        """Those of the seeds whose image is missing, damaged, or not of the shape [C,H,W]."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            return [seed for seed, whole in zip(seeds, pool.map(lambda seed: self._is_whole(seed, shape), seeds)) if not whole]

    def _is_whole(self, seed, shape):
        try:
            return list(read_image(self.path(seed)).shape) == list(shape)
        except DAMAGE:
            return False

    def remove_leftovers(self, seeds: list[int]) -> None:
        """Removes the temporary files of these seeds that a killed run left behind."""
        wanted = {os.path.basename(self.path(seed)) for seed in seeds}
        for folder in {os.path.dirname(self.path(seed)) for seed in seeds}:
            for name in os.listdir(folder) if os.path.isdir(folder) else ():
                part = re.fullmatch(r'\.(.+)\.\d+', name)
                if part and part[1] in wanted:
                    os.unlink(os.path.join(folder, name))


def _pil(image):
    image = np.asarray(image)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] in (1, 3), f'{image.dtype} {image.shape} is no picture'
    # Pillow takes grey images as [H,W], and does not accept [H,W,1].
    return PIL.Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def write_grid(path: str | os.PathLike, images: np.ndarray | torch.Tensor, columns: int | None = None) -> None:
    """Writes grid() of images as PNG. images: uint8 [N,C,H,W], C = 1 or 3."""
    write_png(path, grid(images, columns))


class Writers:
    """Threads that write files in the background. The first error is raised by a later submit or at the end.

    Attribute written: how many calls have succeeded; exact once the context is left, also by an error."""

    def __init__(self, threads: int = 4, backlog: int = 256) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._backlog, self._pending = backlog, collections.deque()
        self.written = 0

    def __enter__(self):
        return self

    def submit(self, function: Callable, *args: Any, **kwargs: Any) -> None:
        """Calls function(*args, **kwargs) in a thread; waits where too many calls are outstanding."""
        while self._pending and (self._pending[0].done() or len(self._pending) >= self._backlog):
            self._settle()
        self._pending.append(self._pool.submit(function, *args, **kwargs))

    def _settle(self):
        self._pending.popleft().result()
        self.written += 1

    def __exit__(self, kind, *_):
        try:
            while self._pending and kind is None:
                self._settle()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self.written += sum(not call.cancelled() and call.exception() is None for call in self._pending)
            self._pending.clear()
