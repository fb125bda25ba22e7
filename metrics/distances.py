# SPDX-License-Identifier: Apache-2.0
"""Euclidean distances between large sets of features, block by block, so that the whole matrix is never in memory."""

from collections.abc import Iterator

import numpy as np
import torch

ROWS, COLUMNS = 2048, 4096  # size of one block: 64 MB in float64
TIE = 1e-11  # squared distances this close, relative to the squared norms, are equal: far above float64's rounding


class Block:
    """One block of the matrix of squared distances: d2 [n,m] float64 between the rows `i` and the columns `j` (slices)."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor], i: slice, j: slice):
        self.i, self.j, self._norms = i, j, norms
        # float32 products would leave 1e-4 of a squared distance between equal images; in float64 it is 1e-13.
        self.d2 = torch.addmm(norms[0] + norms[1], x, y.T, alpha=-2).clamp_(min=0)

    @property
    def slack(self) -> torch.Tensor:
        """The rounding error of d2 [n,m]; two distances that differ by less are a tie."""
        return TIE * (self._norms[0] + self._norms[1])


def blocks(queries: torch.Tensor | np.ndarray, points: torch.Tensor | np.ndarray,
           device: torch.device | str | None = None) -> Iterator[Block]:
    """Yields the Blocks of all pairs, row by row.

    queries [N,D], points [M,D]: float tensors or arrays. device: where to compute, by default the device of queries."""
    queries, points = torch.as_tensor(queries), torch.as_tensor(points)
    if queries.ndim != 2 or points.ndim != 2 or queries.shape[1] != points.shape[1]:
        raise ValueError(f'features of shapes {list(queries.shape)} and {list(points.shape)}, expected [N,D] and [M,D]')
    device = device or queries.device
    centre = points.mean(0, dtype=torch.float64).to(device)  # subtracting it leaves distances unchanged and reduces their rounding errors
    centred = lambda rows: rows.to(device, torch.float64, copy=True).sub_(centre)
    columns = _slices(len(points), COLUMNS)
    norms = [centred(points[j]).square_().sum(1) for j in columns]
    for i in _slices(len(queries), ROWS):
        x = centred(queries[i])
        own = x.square().sum(1)[:, None]
        for j, other in zip(columns, norms):
            yield Block(x, centred(points[j]), (own, other), i, j)


def _slices(count, size):
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def nearest(queries: torch.Tensor | np.ndarray, points: torch.Tensor | np.ndarray, k: int = 1, exclude_self: bool = False,
            device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest points of each query: squared distances [N,k] float64, ascending, and indices [N,k], on the CPU.

    exclude_self: queries are the points themselves, and a point is not its own neighbour (but an identical other point is).
    Raises ValueError if there are fewer than k."""
    available = len(points) - bool(exclude_self)
    if not 1 <= k <= available:
        raise ValueError(f'{k} nearest neighbours requested, only {max(available, 0)} available')
    queries, points = torch.as_tensor(queries), torch.as_tensor(points)
    found, row = [], None
    for block in blocks(queries, points, device):
        d2 = block.d2
        if exclude_self:
            own = torch.arange(block.i.start, block.i.stop, device=d2.device)
            inside = (own >= block.j.start) & (own < block.j.stop)
            d2[inside, own[inside] - block.j.start] = float('inf')
        d2, index = d2.topk(min(k, d2.shape[1]), largest=False)
        index = index + block.j.start
        if block.i != row:
            row = block.i
            found.append((d2, index))
            continue
        d2, index = (torch.cat(pair, dim=1) for pair in zip(found[-1], (d2, index)))
        d2, order = d2.topk(min(k, d2.shape[1]), largest=False)
        found[-1] = d2, index.gather(1, order)
    index = torch.cat([index for _, index in found]).cpu()
    return _sorted_differences(queries.cpu(), points.cpu(), index)


def _sorted_differences(queries, points, index):
    """Squared distances to the points `index` [N,k], recomputed as sums of squared differences: exactly zero for equal images."""
    d2 = torch.cat([(queries[i, None].double() - points[index[i]].double()).square().sum(2) for i in _slices(len(queries), ROWS)])
    d2, order = d2.sort(dim=1, stable=True)
    return d2, index.gather(1, order)
