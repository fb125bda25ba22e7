# SPDX-License-Identifier: Apache-2.0
"""What the transformers share: patches and tokens, attention (Vaswani et al. 2017), MLP, sizes.

Tokens are [N, T, width], patches row by row. Parameters are cast to the type of the tokens where they are used."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dnnlib import UserError
from torch_utils import misc
from training.networks.interface import check_choice
from training.networks.layers import Castable, Linear, by_row, initial

SHORT_NAMES = {'patch_size': 'patch', 'num_heads': 'heads'}  # Network.short_names, beside that of the width
CONV_INIT = {'init_mode': 'kaiming_uniform', 'init_weight': math.sqrt(1 / 3), 'init_bias': math.sqrt(1 / 3)}  # torch's own


def normal_linear(in_features: int, out_features: int, bias: bool = True, std: float = 0.02) -> Linear:
    """A Linear with weights from N(0, std^2) and bias 0."""
    return Linear(in_features, out_features, bias, init_weight=std * math.sqrt(in_features))


def normal_table(rows: int, width: int, std: float = 0.02) -> nn.Parameter:
    """Learned positions [1, rows, width], from N(0, std^2) at first."""
    return initial([1, rows, width], 'kaiming_normal', fan_in=1, fan_out=1, gain=std)


def dimensions(sizes: dict[str, tuple], size: str, width: int, depth: int, heads: int) -> tuple[int, int, int]:
    """(width, depth, heads) of a size; those that are not 0 replace its own. Another width than its own has heads of 64 channels.

    Raises ValueError, in one line, for sizes that are not in the table and for impossible numbers."""
    check_choice('size', size, sizes)
    own = sizes[size]
    heads = heads or (own[2] if width in (0, own[0]) else max(1, width // 64))
    width, depth = width or own[0], depth or own[1]
    if min(width, depth, heads) < 1:
        raise ValueError(f'width={width}, depth={depth} and num_heads={heads} (heads) must be 1 or more')
    if width % heads:
        raise ValueError(f'num_heads={heads} (heads) must divide the width, {width}')
    return width, depth, heads


def patch_grid(img_resolution: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. Raises ValueError where a side of the image is not a multiple of the patch."""
    height, width = misc.height_width(img_resolution)
    if patch_size < 1:
        raise ValueError(f'patch_size={patch_size} (patch) must be 1 or more')
    if height % patch_size or width % patch_size or min(height, width) < 1:
        raise ValueError(f'images of {height}x{width} cannot be cut into patches of {patch_size}x{patch_size}: '
                         f'each side must be a multiple of patch_size={patch_size} (patch)')
    return height // patch_size, width // patch_size


class PatchEmbed(nn.Module):
    """Images [N,C,H,W] -> tokens [N, T, width], one linear map of each patch. init: of layers.Linear."""

    def __init__(self, in_channels: int, patch_size: int, width: int, **init: Any) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(in_channels * patch_size ** 2, width, **init)
        self.proj.weight = nn.Parameter(self.proj.weight.detach().unflatten(1, (in_channels, patch_size, patch_size)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = F.conv2d(x, self.proj.cast('weight', x.dtype), self.proj.cast('bias', x.dtype), stride=self.patch_size)
        return tokens.flatten(2).transpose(1, 2)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Tokens [N, T, patch_size^2 C], whose channels vary fastest -> images [N,C,H,W]."""
    patches = tokens.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))  # [N, rows, columns, i, j, C]
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def with_tokens(first: list[torch.Tensor], patches: torch.Tensor) -> torch.Tensor:
    """Tokens [N or 1, ..., width] before those of the patches [N, T, width], in the type of these."""
    return torch.cat([tokens.to(patches.dtype).expand(len(patches), -1, -1) for tokens in first] + [patches], dim=1)


class LayerNorm(nn.Module):
    """Normalisation of each token; torch computes its statistics in float32 whatever x.dtype is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention softmax(q k^T / sqrt(d) + bias) v of each head, between linear maps.

    Outputs of `qkv` are ordered by (query, key or value; head; channel). linear: (in, out, bias) -> a Linear."""

    def __init__(self, width: int, heads: int, linear: Callable[..., Linear], qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width, qkv_bias)
        self.proj = linear(width, width)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """bias: [heads, T, T], of the logits."""
        query, key, value = self._qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # [N, heads, T, d] each
        mask = None if bias is None else bias.to(x.dtype)
        return self.proj(F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2))

    def _qkv(self, x):
        return self.qkv(x)


class MLP(nn.Module):
    """Tokens -> tokens, each by itself, with `hidden` channels between. approximate: of GELU, "none" or "tanh"."""

    def __init__(self, width: int, hidden: int, linear: Callable[..., Linear], approximate: str = 'none') -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f'mlp_ratio times the width, {width}, must be 1 or more')
        self.gelu = functools.partial(F.gelu, approximate=approximate)
        self.fc1, self.fc2 = linear(width, hidden), linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(by_row(self.gelu, self.fc1(x), self.training))


def inner_layers(blocks: Iterable[nn.Module]) -> Iterator[Castable]:
    """As Network.inner_layers: the linear maps of attention and MLP, and of skips, in these blocks."""
    for block in blocks:
        for part in (block, block.attn, block.mlp):
            yield from (layer for layer in part.children() if isinstance(layer, Castable))


# What published weights tell about themselves.


def has_layout(state: dict[str, torch.Tensor], needed: dict[str, int], optional: dict[str, int] | None = None) -> bool:
    """Whether a state dict has all tensors that are needed, and these and the optional ones have so many dimensions, none empty."""
    dims = needed | (optional or {})
    return needed.keys() <= state.keys() and all(state[name].ndim == dims[name] and state[name].numel() for name in dims if name in state)


def published_size(sizes: dict[str, tuple], name: str, width: int, depth: int) -> str:
    """The size of published weights, which also gives their heads. Raises UserError for others."""
    for size, (own_width, own_depth, _) in sizes.items():
        if (width, depth) == (own_width, own_depth):
            return size
    known = ', '.join(f'{size} {own_width}/{own_depth}' for size, (own_width, own_depth, _) in sizes.items())
    raise UserError(f'{name} weights of width {width} and depth {depth} are of no published size (width/depth: {known}), and do not show '
                    'their number of heads; put a config.json beside them')


def published_side(tokens: int, patch_size: int, name: str) -> int:
    """img_resolution of published weights, which are all for squares. Raises UserError where the tokens make none."""
    side = math.isqrt(max(tokens, 0))
    if not side or side ** 2 != tokens:
        raise UserError(f'{name} weights for {tokens} patches, which is not the number of a square image; put a config.json beside them')
    return side * patch_size


def published_variance(features: int, patch_size: int, channels: int, name: str) -> bool:
    """Whether a last layer of so many features has outputs for the variance, too. Raises UserError where it fits neither."""
    pixels = patch_size ** 2
    if features not in (channels * pixels, 2 * channels * pixels):
        raise UserError(f'{name} weights whose last layer has {features} features; expected {channels * pixels} or '
                        f'{2 * channels * pixels} for {channels} channels and patches of {patch_size}x{patch_size}')
    return features == 2 * channels * pixels


def published_labels(rows: int) -> dict:
    """label_dim and null_label of a table of class embeddings: its last row is "no label", except that 1000 rows are those of ImageNet's
    classes without one."""
    return {'label_dim': rows, 'null_label': False} if rows == 1000 else {'label_dim': rows - 1}


def published_blocks(state: dict[str, torch.Tensor], prefix: str) -> int:
    """Number of blocks prefix.0, prefix.1, ..."""
    return len({key.split('.')[1] for key in state if key.startswith(f'{prefix}.')})
