# SPDX-License-Identifier: Apache-2.0
"""The vision transformer of Min-SNR (Hang et al. 2023), in which time and class are tokens, under the published layer names."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from training.networks import transformer
from training.networks.conditioning import LabelTable
from training.networks.interface import ARCHS, Arch, Network
from training.networks.layers import Castable, Conv2d, initial
from training.networks.transformer import CONV_INIT, MLP, Attention, LayerNorm, PatchEmbed, normal_linear

SIZES = {'S': (512, 13, 8), 'B': (768, 12, 12), 'L': (1024, 21, 16), 'XL': (1152, 28, 16)}  # width, depth, heads

# Dimensions of some tensors, and of some that not all networks have.
LAYOUT = {'patch_embed.proj.weight': 4, 'linear_projection.weight': 2, 'time_embedding.weight': 2, 'blocks.0.attn.q_bias': 1,
          'blocks.0.mlp.fc1.weight': 2}
OPTIONAL = {'pos_embed': 3, 'class_embedding.weight': 2, 'blocks.0.attn.relative_position_index': 2,
            'rel_pos_bias.relative_position_index': 2}


class TimeTable(nn.Module):
    """Times t [N] -> learned vectors [N, width]: row t of a table, linearly interpolated between rows, the last row beyond them."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = initial([rows, width], 'kaiming_normal', fan_in=1, fan_out=1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        last = len(self.weight) - 1
        t = t.clamp(0, last)
        lower = t.floor()
        below, above = (F.embedding(row.long(), self.weight).to(t.dtype) for row in (lower, (lower + 1).clamp(max=last)))
        return torch.lerp(below, above, (t - lower)[:, None])


def relative_index(grid: tuple[int, int], extra: int) -> torch.Tensor:
    """int64 [T, T]: for each pair of tokens the row of a table, one row for each offset between two patches.

    The first `extra` tokens (1 or 2: time, class) are no patches; each kind of pair with them has one of the last rows."""
    height, width = grid
    row, column = (place.flatten() for place in torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij'))
    offset = lambda place, side: place[:, None] - place[None, :] + side - 1
    index = F.pad(offset(row, height) * (2 * width - 1) + offset(column, width), (extra, 0, extra, 0))
    end = relative_rows(grid, extra)
    if extra == 1:
        index[0], index[:, 0] = end - 3, end - 2
    else:
        index[0], index[:, 0], index[1], index[:, 1] = end - 5, end - 4, end - 3, end - 2
        index[1, 1], index[1, 0], index[0, 1] = end - 8, end - 7, end - 6
    index[0, 0] = end - 1
    return index


def relative_rows(grid: tuple[int, int], extra: int) -> int:
    """Rows of the table of relative_index()."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + extra * (extra + 2)


def add_relative_bias(module: nn.Module, grid: tuple[int, int], heads: int, extra: int) -> None:
    """Gives a module the table of a bias of attention that depends on the offset between two patches (Bao et al. 2022)."""
    module.relative_position_bias_table = nn.Parameter(torch.zeros([relative_rows(grid, extra), heads]))
    module.register_buffer('relative_position_index', relative_index(grid, extra))


def relative_bias(module: nn.Module) -> torch.Tensor:
    """That bias, [heads, T, T]."""
    return F.embedding(module.relative_position_index, module.relative_position_bias_table).permute(2, 0, 1)


class BiasedAttention(Attention):
    """Attention whose keys have no bias. relative: arguments of a relative bias of its own, (grid, extra tokens)."""

    def __init__(self, width: int, heads: int, relative: tuple | None) -> None:
        super().__init__(width, heads, normal_linear, qkv_bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.relative = relative is not None
        if relative:
            add_relative_bias(self, relative[0], heads, relative[1])

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, relative_bias(self) if self.relative else bias)

    def _qkv(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.cast('weight', x.dtype), bias.to(x.dtype))


class ViTBlock(nn.Module):
    """Tokens -> tokens: x + gamma_1 attention(normalised x), then x + gamma_2 MLP(normalised x).

    number: of the block, from 1; initial weights at the ends of both branches are divided by sqrt(2 number). init_values: initial gammas;
    0: there are none. relative: of BiasedAttention."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, eps: float, number: int, init_values: float,
                 relative: tuple | None) -> None:
        super().__init__()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full([width], float(init_values))) if init_values else None for _ in range(2))
        self.norm1 = LayerNorm(width, eps)
        self.attn = BiasedAttention(width, heads, relative)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = MLP(width, int(width * mlp_ratio), normal_linear)
        for layer in (self.attn.proj, self.mlp.fc2):
            layer.weight.data /= math.sqrt(2 * number)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = x + _scaled(self.gamma_1, self.attn(self.norm1(x), bias))
        return x + _scaled(self.gamma_2, self.mlp(self.norm2(x)))


def _scaled(gamma, x):
    return x if gamma is None else gamma.to(x.dtype) * x


class VisionTransformer(Network):
    """ViT of Min-SNR (Hang et al. 2023): a transformer in which time and class are tokens beside the patches.

    size: S | B | L | XL, of which embed_dim, depth and num_heads that are not 0 replace a part. patch_size: side of a patch in pixels.
    num_steps: rows of the table of times; fractional times lie between two rows. null_label: whether the table of classes has a row for
    "no label". use_mean_pooling: no normalisation after the last block, as published. use_abs_pos_emb: learned positions.
    use_rel_pos_bias, use_shared_rel_pos_bias: bias of attention for each offset between patches, of each block or of all blocks
    together. use_conv_last: a 3x3 convolution of the image at the end. init_values: initial scale of each branch of a block, 0: none.
    init_scale: factor of the last layer's initial weights."""

    takes_times = True
    float32_ends = True
    short_names = transformer.SHORT_NAMES | {'embed_dim': 'width'}

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
                 size: str = 'S', patch_size: int = 2, embed_dim: int = 0, depth: int = 0, num_heads: int = 0, mlp_ratio: float = 4.0,
                 num_steps: int = 1000, use_abs_pos_emb: bool = True, use_rel_pos_bias: bool = False, use_shared_rel_pos_bias: bool = False,
                 use_mean_pooling: bool = True, use_conv_last: bool = False, init_values: float = 0.0, init_scale: float = 0.001,
                 norm_eps: float = 1e-6, label_dropout: float = 0, null_label: bool = True) -> None:
        super().__init__()
        width, depth, heads = transformer.dimensions(SIZES, size, embed_dim, depth, num_heads)
        if num_steps < 1:
            raise ValueError(f'num_steps={num_steps} must be 1 or more')
        if use_rel_pos_bias and use_shared_rel_pos_bias:
            raise ValueError('use_rel_pos_bias and use_shared_rel_pos_bias exclude each other')
        self.label_dim, self.augment_dim, self.patch_size = label_dim, augment_dim, patch_size
        self.grid, self.extra = transformer.patch_grid(img_resolution, patch_size), 1 + (label_dim > 0)

        self.pos_embed = transformer.normal_table(self.extra + math.prod(self.grid), width) if use_abs_pos_emb else None
        self.patch_embed = PatchEmbed(in_channels, patch_size, width, **CONV_INIT)
        self.rel_pos_bias = nn.Module() if use_shared_rel_pos_bias else None
        if self.rel_pos_bias is not None:
            add_relative_bias(self.rel_pos_bias, self.grid, heads, self.extra)
        relative = (self.grid, self.extra) if use_rel_pos_bias else None
        self.blocks = nn.ModuleList(ViTBlock(width, heads, mlp_ratio, norm_eps, index + 1, init_values, relative) for index in range(depth))
        self.norm = None if use_mean_pooling else LayerNorm(width, norm_eps)
        self.linear_projection = normal_linear(width, patch_size ** 2 * out_channels, std=0.02 * init_scale)
        self.to_pixel = Conv2d(out_channels, out_channels, 3, **CONV_INIT) if use_conv_last else None
        self.class_embedding = LabelTable(label_dim, width, label_dropout, null_label) if label_dim else None
        self.time_embedding = TimeTable(num_steps, width)
        self.map_augment = normal_linear(augment_dim, width, bias=False) if augment_dim else None

    @property
    def label_embedding(self) -> LabelTable | None:
        """As Network.label_embedding."""
        return self.class_embedding

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        time = self.time_embedding(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            time = time + self.map_augment(augment_labels)
        conditions = [time] if self.class_embedding is None else [time, self.class_embedding(class_labels)]
        image, dtype = self.enter(x)
        h = transformer.with_tokens([vector[:, None] for vector in conditions], self.patch_embed(image))
        if self.pos_embed is not None:
            h = h + self.pos_embed.to(image.dtype)
        h = h.to(dtype)
        bias = None if self.rel_pos_bias is None else relative_bias(self.rel_pos_bias)
        for block in self.blocks:
            h = self.run(block, h, bias)
        h = h[:, self.extra:].to(image.dtype)
        h = self.linear_projection(h if self.norm is None else self.norm(h))
        image = transformer.unpatchify(h, self.grid, self.patch_size)
        return (image if self.to_pixel is None else self.to_pixel(image)).to(x.dtype)

    def inner_layers(self) -> Iterator[Castable]:
        """As Network.inner_layers."""
        return transformer.inner_layers(self.blocks)

    @classmethod
    def published(cls, state: dict[str, torch.Tensor]) -> dict | None:
        """As Network.published: ema_0.9999_xl.pt (ImageNet-256), ema_0.9999_large.pt (ImageNet-64) and their like.

        Weights do not show what they predict: for 4 channels (latents) this is the image, as in the published XL; otherwise the noise."""
        if not transformer.has_layout(state, LAYOUT, OPTIONAL):
            return None
        width, channels, patch, _ = state['patch_embed.proj.weight'].shape
        variance = transformer.published_variance(len(state['linear_projection.weight']), patch, channels, 'ViT')
        table, latents = state.get('class_embedding.weight'), channels == 4
        own, shared = (state.get(f'{place}.relative_position_index') for place in ('blocks.0.attn', 'rel_pos_bias'))
        tokens = next((found.shape[1] for found in (state.get('pos_embed'), own, shared) if found is not None), 0)
        found = {'use_abs_pos_emb': 'pos_embed' in state,
                 'use_rel_pos_bias': own is not None, 'use_shared_rel_pos_bias': shared is not None,
                 'use_mean_pooling': 'norm.weight' not in state, 'use_conv_last': 'to_pixel.weight' in state,
                 'init_values': 0.1 if 'blocks.0.gamma_1' in state else 0}
        return {'precond': 'iddpm', 'C_1': 0.001, 'C_2': 0.008, 'M': 1000, 'prediction': 'x0' if latents else 'eps',
                'learned_variance': variance, 'model_type': cls.__name__, 'img_channels': channels, 'patch_size': patch,
                'img_resolution': transformer.published_side(tokens - 1 - (table is not None), patch, 'ViT'),
                'size': transformer.published_size(SIZES, 'ViT', width, transformer.published_blocks(state, 'blocks')),
                'mlp_ratio': state['blocks.0.mlp.fc1.weight'].shape[0] / width, 'num_steps': len(state['time_embedding.weight']), **found,
                **(transformer.published_labels(len(table)) if table is not None else {}),
                'sampling': {'sampler': 'heun', 'steps': 50 if latents else 20}}


ARCHS['vit'] = Arch(VisionTransformer, size='S', patch_size=2)
