# SPDX-License-Identifier: Apache-2.0
"""U-ViT (Bao et al. 2023): a transformer with long skips, in which time and class or text are tokens, under the published layer names."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dnnlib import UserError
from training.networks import transformer
from training.networks.conditioning import Conditioning, LabelEmbedding, LabelTable
from training.networks.interface import ARCHS, Arch, Network
from training.networks.layers import Castable, Conv2d, PositionalEmbedding
from training.networks.transformer import CONV_INIT, MLP, Attention, LayerNorm, PatchEmbed, normal_linear

SIZES = {'S': (512, 12, 8), 'S-deep': (512, 16, 8), 'M': (768, 16, 12), 'L': (1024, 20, 16), 'H': (1152, 28, 16)}  # width, depth, heads
EPS = 1e-5
LAYOUT = {'patch_embed.proj.weight': 4, 'pos_embed': 3, 'decoder_pred.weight': 2, 'mid_block.attn.qkv.weight': 2,
          'mid_block.mlp.fc1.weight': 2}  # dimensions of some tensors
TEXT_TOKENS = 77  # of the published text models, as CLIP gives them


class TextEmbedding(LabelEmbedding):
    """Labels [N, L text_dim], which are L tokens of a text -> [N, L width], one linear map of each token.

    "No label" (zeros) gives the bias L times."""

    def __init__(self, text_dim: int, width: int, dropout: float) -> None:
        super().__init__(text_dim, width, dropout, init_weight=0.02 * math.sqrt(text_dim))
        self.text_dim = text_dim

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """As Conditioning.embed."""
        return super().embed(labels.unflatten(1, (-1, self.text_dim))).flatten(1)


class UViTBlock(nn.Module):
    """Tokens -> tokens: x + attention(normalised x), then x + MLP(normalised x); with `skip`, of a linear map of x and the skip."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, EPS)
        self.attn = Attention(width, heads, normal_linear, qkv_bias)
        self.norm2 = LayerNorm(width, EPS)
        self.mlp = MLP(width, int(width * mlp_ratio), normal_linear)
        self.skip_linear = normal_linear(2 * width, width) if skip else None

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Network):
    """U-ViT of Bao et al. 2023: a transformer with long skips, in which time and class or text are tokens beside the patches.

    size: S | S-deep | M | L | H, of which embed_dim, depth and num_heads that are not 0 replace a part; depth counts the blocks beside the
    middle one, and an odd one is that below it. patch_size: side of a patch in pixels. mlp_time_embed: an MLP after the sinusoid of
    time. conv: a 3x3 convolution of the image at the end. skip: whether there are long skips. null_label: whether the table of classes
    has a row for "no label". clip_dim: where it is not 0, labels are texts of label_dim / clip_dim tokens, each of this width, one after
    the other in a row."""

    takes_times = True
    float32_ends = True
    short_names = transformer.SHORT_NAMES | {'embed_dim': 'width'}

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
                 size: str = 'S', patch_size: int = 2, embed_dim: int = 0, depth: int = 0, num_heads: int = 0, mlp_ratio: float = 4.0,
                 qkv_bias: bool = False, mlp_time_embed: bool = False, conv: bool = True, skip: bool = True, clip_dim: int = 0,
                 label_dropout: float = 0, null_label: bool = True) -> None:
        super().__init__()
        width, depth, heads = transformer.dimensions(SIZES, size, embed_dim, depth, num_heads)
        if width % 2:
            raise ValueError(f'embed_dim={width} (width) must be a multiple of 2, for the sinusoid of time')
        if clip_dim < 0 or clip_dim and (not label_dim or label_dim % clip_dim):
            raise ValueError(f'clip_dim={clip_dim} is for labels that are tokens of this width one after the other; label_dim={label_dim}')
        self.label_dim, self.augment_dim, self.clip_dim, self.patch_size = label_dim, augment_dim, clip_dim, patch_size
        self.grid = transformer.patch_grid(img_resolution, patch_size)
        self.extra = 1 + (label_dim // clip_dim if clip_dim else label_dim > 0)
        block = width, heads, mlp_ratio, qkv_bias

        self.pos_embed = transformer.normal_table(self.extra + math.prod(self.grid), width)
        self.patch_embed = PatchEmbed(in_channels, patch_size, width, **CONV_INIT)
        self.map_noise = PositionalEmbedding(width)
        self.time_embed = (nn.Sequential(normal_linear(width, 4 * width), nn.SiLU(), normal_linear(4 * width, width))
                           if mlp_time_embed else nn.Identity())
        self.label_emb = LabelTable(label_dim, width, label_dropout, null_label) if label_dim and not clip_dim else None
        self.context_embed = TextEmbedding(clip_dim, width, label_dropout) if clip_dim else None
        self.in_blocks = nn.ModuleList(UViTBlock(*block) for _ in range(depth // 2))
        self.mid_block = UViTBlock(*block)
        self.out_blocks = nn.ModuleList(UViTBlock(*block, skip) for _ in range(depth // 2))
        self.norm = LayerNorm(width, EPS)
        self.decoder_pred = normal_linear(width, patch_size ** 2 * out_channels)
        self.final_layer = Conv2d(out_channels, out_channels, 3, **CONV_INIT) if conv else None
        self.map_augment = normal_linear(augment_dim, width, bias=False) if augment_dim else None

    @property
    def label_embedding(self) -> Conditioning | None:
        """As Network.label_embedding."""
        return self.label_emb if self.context_embed is None else self.context_embed

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        time = self.time_embed(self.map_noise(noise_labels))
        if self.map_augment is not None and augment_labels is not None:
            time = time + self.map_augment(augment_labels)
        tokens = [time[:, None]]
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(class_labels)[:, None])  # classes come before the time, texts after it, as published
        elif self.context_embed is not None:
            tokens.append(self.context_embed(class_labels).unflatten(1, (self.extra - 1, -1)))
        image, dtype = self.enter(x)
        h = (transformer.with_tokens(tokens, self.patch_embed(image)) + self.pos_embed.to(image.dtype)).to(dtype)
        skips = []
        for block in self.in_blocks:
            h = self.run(block, h)
            skips.append(h)
        h = self.run(self.mid_block, h)
        for block in self.out_blocks:
            h = self.run(block, h, skips.pop())
        pixels = self.decoder_pred(self.norm(h.to(image.dtype)))[:, self.extra:]
        image = transformer.unpatchify(pixels, self.grid, self.patch_size)
        return (image if self.final_layer is None else self.final_layer(image)).to(x.dtype)

    def inner_layers(self) -> Iterator[Castable]:
        """As Network.inner_layers."""
        return transformer.inner_layers([*self.in_blocks, self.mid_block, *self.out_blocks])

    @classmethod
    def published(cls, state: dict[str, torch.Tensor]) -> dict | None:
        """As Network.published: cifar10_uvit_small.pth, imagenet256_uvit_huge.pth and their like.

        Weights do not show their diffusion: H and the text models have Stable Diffusion's 1000 levels, whose times count from 1; all
        others, of pixels or latents, the variance-preserving SDE."""
        if not transformer.has_layout(state, LAYOUT, {'label_emb.weight': 2, 'context_embed.weight': 2}):
            return None
        width, channels, patch, _ = state['patch_embed.proj.weight'].shape
        if transformer.published_variance(len(state['decoder_pred.weight']), patch, channels, 'U-ViT'):
            raise UserError('U-ViT weights with a learned variance, which no published ones have; put a config.json beside them')
        size = transformer.published_size(SIZES, 'U-ViT', width, 2 * transformer.published_blocks(state, 'in_blocks'))
        table, text = state.get('label_emb.weight'), state.get('context_embed.weight')
        extra = 1 + (TEXT_TOKENS if text is not None else table is not None)
        found = {'label_dim': TEXT_TOKENS * text.shape[1], 'clip_dim': text.shape[1]} if text is not None else {}
        found |= transformer.published_labels(len(table)) if table is not None else {}
        discrete = {'precond': 'iddpm', 'diffusion': 'scaled_linear:steps=1000', 'time_offset': 1, 'prediction': 'eps',
                    'learned_variance': False}
        return {**(discrete if size == 'H' or text is not None else {'precond': 'vp'}), 'model_type': cls.__name__,
                'img_channels': channels, 'patch_size': patch, 'size': size, **found,
                'img_resolution': transformer.published_side(state['pos_embed'].shape[1] - extra, patch, 'U-ViT'),
                'mlp_ratio': state['mid_block.mlp.fc1.weight'].shape[0] / width, 'qkv_bias': 'mid_block.attn.qkv.bias' in state,
                'mlp_time_embed': 'time_embed.0.weight' in state, 'conv': 'final_layer.weight' in state,
                'skip': 'out_blocks.0.skip_linear.weight' in state, 'sampling': {'sampler': 'dpmpp_2m', 'steps': 50}}


ARCHS['uvit'] = Arch(UViT, size='S', patch_size=2)
