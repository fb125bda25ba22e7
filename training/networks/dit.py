# SPDX-License-Identifier: Apache-2.0
"""DiT with adaLN-Zero blocks (Peebles & Xie 2023), under the published layer names."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from training.networks import transformer
from training.networks.conditioning import LabelTable
from training.networks.interface import ARCHS, Arch, Network
from training.networks.layers import Castable, Linear, PositionalEmbedding
from training.networks.transformer import MLP, Attention, PatchEmbed, normal_linear

SIZES = {'S': (384, 12, 6), 'B': (768, 12, 12), 'L': (1024, 24, 16), 'XL': (1152, 28, 16)}  # width, depth, heads
TIME_CHANNELS = 256  # of the sinusoid
LAYOUT = {'x_embedder.proj.weight': 4, 'pos_embed': 3, 'final_layer.linear.weight': 2, 'blocks.0.adaLN_modulation.1.weight': 2,
          'blocks.0.mlp.fc1.weight': 2}  # dimensions of some tensors
xavier = functools.partial(Linear, init_mode='xavier_uniform')  # bias 0


def position_table(grid: tuple[int, int], width: int) -> torch.Tensor:
    """[1, T, width], float64: sin and cos of the column of each patch, then of its row, with frequencies 10000^(-4k / width)."""
    frequency = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    waves = [torch.outer(place.flatten(), frequency) for place in reversed(torch.meshgrid(rows, columns, indexing='ij'))]
    return torch.cat([part for wave in waves for part in (wave.sin(), wave.cos())], dim=1)[None]


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Normalised tokens, times 1 + scale, plus shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Modulation(nn.Sequential):
    """Condition c [N or 1, width] -> `count` tensors [N or 1, 1, width] of a type, which are zero at first."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__(nn.SiLU(), Linear(width, count * width, init_weight=0))
        self.count = count

    def forward(self, c: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return super().forward(c).to(dtype)[:, None].chunk(self.count, dim=2)


class DiTBlock(nn.Module):
    """Tokens x, condition c -> tokens: attention, then MLP, each of normalised tokens that c scales and shifts, and gated by c."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = Attention(width, heads, xavier)
        self.mlp = MLP(width, int(width * mlp_ratio), xavier, 'tanh')
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c, x.dtype)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1))
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens x, condition c -> the pixels of each patch [N, T, out_features], zero at first."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.linear = Linear(width, out_features, init_weight=0)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.linear(modulate(x, *self.adaLN_modulation(c, x.dtype)))


class DiT(Network):
    """DiT of Peebles & Xie 2023: a transformer whose blocks are scaled, shifted and gated by time and class.

    size: S | B | L | XL, of which hidden_size, depth and num_heads that are not 0 replace a part. patch_size: side of a patch in pixels.
    null_label: whether the table of classes has a row for "no label", as the published networks have that were trained with label
    dropout; a network without classes has this row alone. Positions are whole numbers of patches, for images of any sides."""

    takes_times = True
    float32_ends = True
    short_names = transformer.SHORT_NAMES | {'hidden_size': 'width'}

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
                 size: str = 'S', patch_size: int = 2, hidden_size: int = 0, depth: int = 0, num_heads: int = 0, mlp_ratio: float = 4.0,
                 label_dropout: float = 0, null_label: bool = True) -> None:
        super().__init__()
        width, depth, heads = transformer.dimensions(SIZES, size, hidden_size, depth, num_heads)
        if width % 4:
            raise ValueError(f'hidden_size={width} (width) must be a multiple of 4, for the table of positions')
        self.label_dim, self.augment_dim, self.patch_size = label_dim, augment_dim, patch_size
        self.grid = transformer.patch_grid(img_resolution, patch_size)

        self.register_buffer('pos_embed', position_table(self.grid, width).float())
        self.x_embedder = PatchEmbed(in_channels, patch_size, width, init_mode='xavier_uniform', init_bias=0)
        self.map_noise = PositionalEmbedding(TIME_CHANNELS)
        self.t_embedder = nn.ModuleDict({'mlp': nn.Sequential(normal_linear(TIME_CHANNELS, width), nn.SiLU(), normal_linear(width, width))})
        self.y_embedder = (nn.ModuleDict({'embedding_table': LabelTable(label_dim, width, label_dropout, null_label, std=0.02)})
                           if label_dim + null_label else None)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_size ** 2 * out_channels)
        self.map_augment = normal_linear(augment_dim, width, bias=False) if augment_dim else None

    @property
    def label_embedding(self) -> LabelTable | None:
        """As Network.label_embedding."""
        return self.y_embedder['embedding_table'] if self.label_dim else None

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        c = self.t_embedder['mlp'](self.map_noise(noise_labels))
        if self.y_embedder is not None:
            none = noise_labels.new_zeros([1, 0])
            c = c + self.y_embedder['embedding_table'](class_labels if self.label_dim else none)
        if self.map_augment is not None and augment_labels is not None:
            c = c + self.map_augment(augment_labels)
        image, dtype = self.enter(x)
        tokens = (self.x_embedder(image) + self.pos_embed.to(image.dtype)).to(dtype)
        for block in self.blocks:
            tokens = self.run(block, tokens, c)
        return transformer.unpatchify(self.final_layer(tokens.to(image.dtype), c), self.grid, self.patch_size).to(x.dtype)

    def inner_layers(self) -> Iterator[Castable]:
        """As Network.inner_layers."""
        return transformer.inner_layers(self.blocks)

    @classmethod
    def published(cls, state: dict[str, torch.Tensor]) -> dict | None:
        """As Network.published: DiT-XL-2-256x256.pt and its like, with the linear schedule of 1000 steps and 250 ancestral steps of the
        learned variance."""
        if not transformer.has_layout(state, LAYOUT, {'y_embedder.embedding_table.weight': 2}):
            return None
        width, channels, patch, _ = state['x_embedder.proj.weight'].shape
        variance = transformer.published_variance(len(state['final_layer.linear.weight']), patch, channels, 'DiT')
        table = state.get('y_embedder.embedding_table.weight')
        return {'precond': 'iddpm', 'diffusion': 'linear:steps=1000', 'prediction': 'eps', 'learned_variance': variance,
                'model_type': cls.__name__, 'img_channels': channels, 'patch_size': patch,
                'img_resolution': transformer.published_side(state['pos_embed'].shape[1], patch, 'DiT'),
                'size': transformer.published_size(SIZES, 'DiT', width, transformer.published_blocks(state, 'blocks')),
                'mlp_ratio': state['blocks.0.mlp.fc1.weight'].shape[0] / width,
                **(transformer.published_labels(len(table)) if table is not None else {'null_label': False}),
                'sampling': {'sampler': 'ancestral', 'steps': 250}}


ARCHS['dit'] = Arch(DiT, size='S', patch_size=2)
