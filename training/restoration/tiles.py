# SPDX-License-Identifier: Apache-2.0
"""A network as the denoiser of larger images: it denoises overlapping tiles, whose results are blended with smooth windows.

Blending D in each evaluation, and not finished samples, keeps the spread of posterior samples: all tiles see one state of the whole image,
and with it the same noise."""

import math
from typing import Any

import torch

from torch_utils import misc
from training.data.convert.tiles import starts
from training.sampling.generate import resolution


def profile(start: int, tile: int, side: int, overlap: int) -> torch.Tensor:
    """Weights of a tile's pixels along one axis, float64 [tile]: 0 in the outer quarter of an overlap, which only gives context, then a
    rise of sin^2 to 1; no fall towards the border of the image, which begins at `start` = 0 and has this `side`."""
    margin = overlap // 4
    ramp = overlap - 2 * margin
    place = torch.arange(tile, dtype=torch.float64) - margin + 0.5
    rise = torch.sin(math.pi / 2 * (place / max(ramp, 1)).clamp(0, 1)).square()
    ones = torch.ones(tile, dtype=torch.float64)
    rises = overlap > 0
    return (rise if start > 0 and rises else ones) * (rise.flip(0) if start + tile < side and rises else ones)


class TiledDenoiser:
    """net(x, sigma, labels) for images of any size from the network's up: the mean of its results on tiles, weighted by profile().

    overlap: pixels that neighbouring tiles share at least. rows: tiles of one evaluation, always the same number. Where the network's
    result at a pixel depends on no more than overlap // 4 pixels around it, and not on the place, this equals its result on the whole
    image. Everything else is that of the network."""

    def __init__(self, net: torch.nn.Module, overlap: int, rows: int) -> None:
        self.net, self.overlap, self.rows, self._windows = net, overlap, rows, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """x: [N,C,H,W]; sigma: 0-dim, [N] or [N,1,1,1]; class_labels: [N,label_dim] or None. D, [N,C,H,W] of x's dtype."""
        sigma = misc.batched(sigma).expand(len(x), 1, 1, 1)
        labels = [None] * len(x) if class_labels is None else class_labels.split(1)
        return torch.stack([self._whole(*one) for one in zip(x, sigma, labels)])

    def _whole(self, x, sigma, label):
        """One image [C,H,W]."""
        (height, width), (tall, wide) = x.shape[1:], resolution(self.net)
        places = [(top, left) for top in starts(height, tall, self.overlap) for left in starts(width, wide, self.overlap)]
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:1])
        for chosen, count in misc.chunks(len(places), 'cpu', self.rows):
            mine = [places[k] for k in chosen]
            tiles = torch.stack([x[:, top:top + tall, left:left + wide] for top, left in mine])
            found = self.net(tiles, sigma.expand(len(tiles), 1, 1, 1), None if label is None else label.expand(len(tiles), -1))
            for (top, left), D in zip(mine[:count], found[:count].to(x.dtype)):
                window = self._window(top, left, height, width, x)
                total[:, top:top + tall, left:left + wide] += window * D
                weights[:, top:top + tall, left:left + wide] += window
        return total / weights

    def _window(self, top, left, height, width, like):
        """The weights of a tile, [1,H,W], which depend on the borders of the image that it touches."""
        tall, wide = resolution(self.net)
        kind = top > 0, top + tall < height, left > 0, left + wide < width
        if kind not in self._windows:
            rows, columns = profile(top, tall, height, self.overlap), profile(left, wide, width, self.overlap)
            self._windows[kind] = (rows[:, None] * columns).to(like)[None]
        return self._windows[kind]
