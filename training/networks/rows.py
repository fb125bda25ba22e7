# SPDX-License-Identifier: Apache-2.0
"""Random draws inside a network in training (dropout, label dropout, perturbations), keyed by the row of the global batch.

A draw depends only on seed, step, place in the network and row, so that masks do not change with the distribution of the rows over
ranks and micro-batches."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from torch_utils import misc

# Largest block, in numbers: fewer than misc.BLOCK_ROWS large rows are drawn together. A block is large enough that its overhead is small,
# and not larger, because a small micro-batch has to draw rows of a block that it does not use.
BLOCK_NUMBERS, BLOCK_NUMBERS_CPU = 2 ** 22, 2 ** 16


class RowDraws:
    """State that the layers of a network share: the current step, rows, and call of the network.

    key: int64 [4] on the CPU, so that reading it does not wait for a device: seed, calls so far, first row and number of rows of this
    micro-batch. It is replaced, never modified, so that a call keeps its own; compiled code takes it as an input, not as a constant.
    A copy of a network does not have it, because nothing would update it there."""

    def __init__(self) -> None:
        self.key = torch.tensor([0, 0, 0, 1], device='cpu')

    def begin(self, draws: misc.Draws, rows: int) -> None:
        """Begins a micro-batch with this number of rows. draws: its misc.Draws."""
        self.key = torch.tensor([misc.seed_of(draws.seed, draws.step, 'network'), 0, draws.first_row, rows], device='cpu')

    def next_call(self) -> None:
        """Begins a call of the network, whose draws are independent of those of earlier calls."""
        self.key = self.key + torch.tensor([0, 1, 0, 0], device='cpu')

    @contextlib.contextmanager
    def at(self, key: torch.Tensor) -> Iterator[None]:
        """Context in which draws are those of an earlier key, for blocks that are computed again in the backward pass."""
        now, self.key = self.key, key
        try:
            yield
        finally:
            self.key = now

    def __deepcopy__(self, memo):
        return None


class RowLayer(nn.Module):
    """A layer with random draws, keyed after attach_row_draws(), and otherwise from torch's global random state.

    name: what is drawn; a layer that draws two things gives them two names. Shapes begin with the rows of the call: n, or a multiple
    or an even share M of the micro-batch's n rows, in order; row j of a call counts as the global row first_row M / n + j.
    It has no parameters. Two places in a network need two layers: one that is called twice in a forward pass repeats its draws."""

    rows, index = None, 0

    def keep(self, name: str, shape: list[int], p: float, device: torch.device) -> torch.Tensor:
        """bool of the shape: False with probability p."""
        if self.rows is None:
            return torch.rand(shape, device=device) >= p
        return self._draw(name, 'keep', p, shape, device)

    def uniform(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """U(0, 1), of shape, type and device of `like`."""
        return torch.rand_like(like) if self.rows is None else self._draw(name, 'uniform', 0.0, like.shape, like.device).to(like.dtype)

    def normal(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """N(0, 1), of shape, type and device of `like`."""
        return torch.randn_like(like) if self.rows is None else self._draw(name, 'normal', 0.0, like.shape, like.device).to(like.dtype)

    def _draw(self, name, law, p, shape, device):
        # A custom operator hides the draw from the compiler; without the compiler it would only cost time.
        function = draw_operator if torch.compiler.is_compiling() else draw
        return function(self.rows.key, self.index, name, law, float(p), list(shape), device)


class Dropout(RowLayer):
    """Like F.dropout, in training: values of [N,...] are set to 0 with probability p, and multiplied by 1 / (1 - p) otherwise."""

    def __init__(self, p: float) -> None:
        super().__init__()
        misc.require(0 <= p < 1, f'p={p} of a dropout must be 0 or more and below 1')
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.p):
            return x
        if self.rows is None:
            return F.dropout(x, self.p)
        kept, scale = self.keep('dropout', x.shape, self.p, x.device), 1 / (1 - self.p)
        # The mask is kept for the backward pass: on a GPU as bool, one byte per value; on a CPU in the dtype of x, which is faster.
        return x * (kept.to(x.dtype) * scale) if x.is_cpu else x * kept * scale


def attach_row_draws(net: nn.Module) -> RowDraws:
    """Connects each RowLayer of a preconditioned network to new RowDraws, and returns these, to begin() each micro-batch with."""
    net.row_draws = net.model.row_draws = RowDraws()
    for index, layer in enumerate(module for module in net.modules() if isinstance(module, RowLayer)):
        layer.rows, layer.index = net.row_draws, index
    return net.row_draws


def draw(key: torch.Tensor, layer: int, name: str, law: str, p: float, shape: list[int], device: torch.device) -> torch.Tensor:
    """Rows of a draw of the global batch: a pure function of its arguments. Bool for the law "keep", float32 otherwise.

    The global batch is drawn in blocks of rows, each from its own generator; blocks that lie partly outside are drawn completely."""
    seed, call, first_row, rows = key.tolist()
    first = first_row * shape[0] // rows
    last = first + shape[0]
    most = BLOCK_NUMBERS_CPU if device.type == 'cpu' else BLOCK_NUMBERS
    size = max(1, min(misc.BLOCK_ROWS, most // max(1, math.prod(shape[1:]))))
    out = _empty(shape, law, device)
    for block in range(first // size, -(-last // size)):
        source = misc.generator(seed, call, layer, name, block, device=device)
        start, low, high = block * size, max(block * size, first), min((block + 1) * size, last)
        part = out[low - first:high - first]
        if high - low == size:
            LAWS[law](part, p, source)
        else:
            part.copy_(LAWS[law](_empty([size, *shape[1:]], law, device), p, source)[low - start:high - start])
    return out


def _empty(shape, law, device):
    return torch.empty(shape, dtype=torch.bool if law == 'keep' else torch.float32, device=device)


LAWS = {'keep': lambda out, p, source: out.bernoulli_(1 - p, generator=source),
        'normal': lambda out, p, source: out.normal_(generator=source),
        'uniform': lambda out, p, source: out.uniform_(generator=source)}
draw_operator = torch.library.custom_op('ambient::draw_rows', draw, mutates_args=())
draw_operator.register_fake(lambda key, layer, name, law, p, shape, device: _empty(shape, law, device))
