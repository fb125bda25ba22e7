# SPDX-License-Identifier: Apache-2.0
"""U-Nets with the published layer names: SongUNet (DDPM++, NCSN++; Song et al. 2021), DhariwalUNet (ADM; Dhariwal & Nichol 2021).

A network maps x [N,C,H,W], noise labels [N], class labels [N or 1, label_dim] or None and augmentation labels [N, augment_dim] or
None to [N,out_channels,H,W] in x.dtype; it knows nothing of sigma, loss or sampler. Parameters are cast where they are used.
Convolutions of the image and to the image are computed in float32 (Network.float32_ends)."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from torch_utils import misc
from torch_utils.magnitude import at_least_float32
from training.networks.conditioning import LabelEmbedding
from training.networks.interface import ARCHS, Arch, Network, check_choice
from training.networks.layers import Conv2d, FourierEmbedding, GroupNorm, Linear, PositionalEmbedding, is_channels_last, is_fused
from training.networks.rows import Dropout


class UNetBlock(nn.Module):
    """Residual block, optionally resampling, with optional self-attention after it.

    x [N, in_channels, H, W], emb [N, emb_channels] -> [N, out_channels, H', W'].
    adaptive_scale: the embedding scales and shifts the second normalisation; otherwise it is added before it.
    num_heads, or channels_per_head where that is None: a level with fewer channels than one head has no attention, as published.
    init, init_zero, init_attn: initialisers of ordinary layers, of those that end a branch, and of the attention's input."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, up: bool = False, down: bool = False,
                 attention: bool = False, num_heads: int | None = None, channels_per_head: int = 64, dropout: float = 0,
                 skip_scale: float = 1, eps: float = 1e-5, resample_filter: Sequence[float] = (1, 1), resample_proj: bool = False,
                 adaptive_scale: bool = True, init: dict | None = None, init_zero: dict | None = None,
                 init_attn: dict | None = None) -> None:
        super().__init__()
        init = init or {}
        init_zero = init_zero or {'init_weight': 0}
        self.in_channels, self.out_channels = in_channels, out_channels
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        heads = out_channels // channels_per_head if num_heads is None else num_heads
        self.num_heads = heads if attention else 0
        resample = {'up': up, 'down': down, 'resample_filter': resample_filter}

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (1 + adaptive_scale), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.dropout = Dropout(dropout)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **init_zero)
        self.skip = None
        if up or down or in_channels != out_channels:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resample, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, **(init_attn or init))
            self.proj = Conv2d(out_channels, out_channels, 1, **init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        fused = is_fused(x)
        h = self.conv0(self.norm0(x, activate=True), add_bias=not fused)
        params = self.affine(emb)  # [N or 1, C or 2C]
        offset, scale, shift = (None, *params.chunk(2, dim=1)) if self.adaptive_scale else (params, None, None)
        if fused and self.conv0.bias is not None:  # as a part of the offset its gradient needs no sum over pixels
            offset = self.conv0.bias[None] if offset is None else offset + self.conv0.bias
        h = self.conv1(self.dropout(self.norm1(h, offset, scale, shift, activate=True)))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        return (x + self._attend(x)) * self.skip_scale if self.num_heads else x

    def _attend(self, x):
        # The published layout of the 3C channels is (head, channel within the head, one of query, key, value).
        normalised, split = self.norm2(x), (self.num_heads, -1, 3)
        if is_fused(normalised) and is_channels_last(normalised):
            # With the rows of the weight in the order (query, key, value; head; channel) the three are views that fast kernels take.
            rows = (self.qkv.cast(name, x.dtype).unflatten(0, split).movedim(2, 0).flatten(0, 2) for name in ('weight', 'bias'))
            qkv = F.conv2d(normalised, *rows).permute(0, 2, 3, 1).unflatten(3, (3, self.num_heads, -1))  # [N, H, W, 3, heads, d]
            query, key, value = (part.flatten(1, 2).transpose(1, 2) for part in qkv.unbind(3))
        else:
            qkv = self.qkv(normalised).unflatten(1, split).flatten(4)  # [N, heads, d, 3, H*W]
            query, key, value = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)  # [N, heads, H*W, d] each, as fast kernels want it
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(x.shape))


class UNet(Network):
    """Base class of both networks: an encoder whose activations are kept as skips, and a decoder that uses them in reverse order.

    img_resolution: one int or [H, W]; channels: of each level, finest first; attn_resolutions: heights of levels with attention;
    attend_always: every decoder block of such a level attends, not the last alone; block: keyword arguments of all blocks.
    Raises ValueError where a side of the image cannot be halved often enough.
    Layers are named after their level's size: enc.HxW_conv, _down, _block0, ...; dec.HxW_in0, _in1, _up, _block0, ..."""

    short_names = {'model_channels': 'cbase', 'channel_mult': 'cres', 'num_blocks': 'blocks', 'attn_resolutions': 'attn'}
    float32_ends = True

    def __init__(self, img_resolution: int | Sequence[int], channels: list[int], num_blocks: int, attn_resolutions: Sequence[int],
                 attend_always: bool, block: dict) -> None:
        super().__init__()
        check_sizes(channels, num_blocks, block['dropout'])
        self.sizes = level_sizes(img_resolution, len(channels))
        self.channels, self.num_blocks, self.block = list(channels), num_blocks, block
        self.attends = [height in attn_resolutions for height, _ in self.sizes]
        self.attend_always = attend_always

    def _name(self, level, role):
        return '{}x{}_'.format(*self.sizes[level]) + role

    def _block(self, cin, cout, **options):
        return UNetBlock(cin, cout, **self.block, **options)

    def _build_encoder(self, in_channels, width):
        """Makes enc, whose first convolution gives `width` channels; returns the channels of the skips, in order."""
        self.enc = nn.ModuleDict({self._name(0, 'conv'): Conv2d(in_channels, width, 3, **self.block['init'])})
        skips = [width]
        for level, channels in enumerate(self.channels):
            if level:
                self.enc[self._name(level, 'down')] = self._block(width, width, down=True)
                self._build_side_input(level, width)
                skips.append(width)
            for index in range(self.num_blocks):
                self.enc[self._name(level, f'block{index}')] = self._block(width, channels, attention=self.attends[level])
                width = channels
                skips.append(width)
        return skips

    def _build_decoder(self, skips):
        """Makes dec, given the channels of the skips; returns the channels it ends with."""
        self.dec = nn.ModuleDict()
        width, deepest = self.channels[-1], len(self.channels) - 1
        for level in range(deepest, -1, -1):
            if level == deepest:
                self.dec[self._name(level, 'in0')] = self._block(width, width, attention=True)
                self.dec[self._name(level, 'in1')] = self._block(width, width)
            else:
                self.dec[self._name(level, 'up')] = self._block(width, width, up=True)
            for index in range(self.num_blocks + 1):
                attends = self.attends[level] and (self.attend_always or index == self.num_blocks)
                channels = self.channels[level]
                self.dec[self._name(level, f'block{index}')] = self._block(width + skips.pop(), channels, attention=attends)
                width = channels
            self._build_side_output(level, width)
        return width

    def inner_layers(self) -> Iterator[nn.Module]:
        """As Network.inner_layers: the convolutions of the blocks."""
        for block in self.modules():
            if isinstance(block, UNetBlock):
                yield from (layer for layer in block.children() if isinstance(layer, Conv2d) and layer.kernel)

    def _encode(self, image, emb, dtype):
        """image [N,C,H,W], emb [N or 1, K] -> the skips in dtype, finest first; the last one is the bottom of the U."""
        x = self.enc[self._name(0, 'conv')](image).to(dtype)
        skips, side = [x], image
        for level in range(len(self.sizes)):
            if level:
                x, side = self._side_input(level, self.run(self.enc[self._name(level, 'down')], x, emb), side)
                skips.append(x)
            for index in range(self.num_blocks):
                x = self.run(self.enc[self._name(level, f'block{index}')], x, emb)
                skips.append(x)
        return skips

    def _decode(self, skips, emb):
        """The skips -> (features at full resolution, what the side outputs sum up to)."""
        x, side, deepest = skips[-1], None, len(self.sizes) - 1
        for level in range(deepest, -1, -1):
            for role in ('in0', 'in1') if level == deepest else ('up',):
                x = self.run(self.dec[self._name(level, role)], x, emb)
            for index in range(self.num_blocks + 1):
                x = self.run(self.dec[self._name(level, f'block{index}')], torch.cat([x, skips.pop()], dim=1), emb)
            side = self._side_output(level, x, side)
        return x, side

    @property
    def label_embedding(self) -> LabelEmbedding | None:
        """As Network.label_embedding."""
        return self.map_label

    # A network without side paths leaves these four as they are.

    def _build_side_input(self, level, width):
        pass

    def _build_side_output(self, level, width):
        pass

    def _side_input(self, level, x, side):
        return x, side

    def _side_output(self, level, x, side):
        return side


def check_sizes(channels: list[int], num_blocks: int, dropout: float) -> None:
    """Raises ValueError, with the key of --arch beside the constructor argument, for impossible levels, blocks and dropout."""
    if num_blocks < 1:
        raise ValueError(f'num_blocks={num_blocks} (blocks) must be 1 or more')
    if not channels or min(channels) < 1:
        raise ValueError(f'model_channels (cbase) times channel_mult (cres) must be 1 or more at each level, got {channels}')
    if not 0 <= dropout < 1:
        raise ValueError(f'dropout={dropout} must be 0 or more and below 1')


def level_sizes(img_resolution: int | Sequence[int], levels: int) -> list[tuple[int, int]]:
    """[(H, W) of each level], finest first; raises ValueError where a side is not a multiple of 2^(levels - 1)."""
    height, width = misc.height_width(img_resolution)
    unit = 2 ** (levels - 1)
    if height % unit or width % unit or min(height, width) < 1:
        raise ValueError(f'images of {height}x{width} cannot be halved {levels - 1} times: '
                         f'each side must be a multiple of {unit}; resize the images or use fewer levels (channel_mult)')
    return [(height >> level, width >> level) for level in range(levels)]


class SongUNet(UNet):
    """U-Net of Song et al. 2021: ddpmpp is DDPM++ (positional noise embedding, standard encoder, filter 1|1), and ncsnpp is NCSN++
    (Fourier embedding, residual encoder, filter 1|3|3|1).

    embedding_type: positional | fourier. encoder_type: standard | skip | residual, how the downsampled image enters each level.
    decoder_type: standard | skip, where skip sums an output image of each level. Inputs and outputs: see the module's docstring."""

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
                 model_channels: int = 128, channel_mult: Sequence[int] = (1, 2, 2, 2), channel_mult_emb: int = 4, num_blocks: int = 4,
                 attn_resolutions: Sequence[int] = (16,), dropout: float = 0.10, label_dropout: float = 0,
                 embedding_type: str = 'positional', channel_mult_noise: int = 1, encoder_type: str = 'standard',
                 decoder_type: str = 'standard', resample_filter: Sequence[float] = (1, 1)) -> None:
        check_choice('embedding_type', embedding_type, ('positional', 'fourier'))
        check_choice('encoder_type', encoder_type, ('standard', 'skip', 'residual'))
        check_choice('decoder_type', decoder_type, ('standard', 'skip'))
        init = {'init_mode': 'xavier_uniform'}
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        block = {'emb_channels': emb_channels, 'num_heads': 1, 'dropout': dropout, 'skip_scale': math.sqrt(0.5), 'eps': 1e-6,
                 'resample_filter': resample_filter, 'resample_proj': True, 'adaptive_scale': False, 'init': init,
                 'init_zero': init | {'init_weight': 1e-5}, 'init_attn': init | {'init_weight': math.sqrt(0.2)}}
        super().__init__(img_resolution, [model_channels * m for m in channel_mult], num_blocks, attn_resolutions, False, block)
        self.label_dim, self.augment_dim, self.out_channels = label_dim, augment_dim, out_channels
        self.encoder_type, self.decoder_type, self.side_channels = encoder_type, decoder_type, in_channels

        self.map_noise = (FourierEmbedding(noise_channels) if embedding_type == 'fourier' else
                          PositionalEmbedding(noise_channels, endpoint=True))
        self.map_label = (LabelEmbedding(label_dim, noise_channels, label_dropout, math.sqrt(label_dim), **init)
                          if label_dim else None)
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self._build_decoder(self._build_encoder(in_channels, model_channels))

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        emb = self.map_noise(noise_labels)
        emb = emb.roll(emb.shape[1] // 2, dims=1)  # this family takes the sines first
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        image, dtype = self.enter(x)
        return self._decode(self._encode(image, emb, dtype), emb)[1].to(x.dtype)

    def _build_side_input(self, level, width):
        resample = {'down': True, 'resample_filter': self.block['resample_filter']}
        side, init = self.side_channels, self.block['init']
        if self.encoder_type == 'skip':
            self.enc[self._name(level, 'aux_down')] = Conv2d(side, side, 0, **resample)
            self.enc[self._name(level, 'aux_skip')] = Conv2d(side, width, 1, **init)
        elif self.encoder_type == 'residual':
            self.enc[self._name(level, 'aux_residual')] = Conv2d(side, width, 3, fused_resample=True, **resample, **init)
            self.side_channels = width

    def _side_input(self, level, x, side):
        if self.encoder_type == 'skip':
            side = self.enc[self._name(level, 'aux_down')](side)
            return x + self.enc[self._name(level, 'aux_skip')](side).to(x.dtype), side
        if self.encoder_type == 'residual':
            x = (x + self.enc[self._name(level, 'aux_residual')](side).to(x.dtype)) * math.sqrt(0.5)
            return x, x
        return x, side

    def _build_side_output(self, level, width):
        if level and self.decoder_type != 'skip':
            return
        if level < len(self.sizes) - 1 and self.decoder_type == 'skip':
            up = {'up': True, 'resample_filter': self.block['resample_filter']}
            self.dec[self._name(level, 'aux_up')] = Conv2d(self.out_channels, self.out_channels, 0, **up)
        self.dec[self._name(level, 'aux_norm')] = GroupNorm(width, eps=self.block['eps'])
        self.dec[self._name(level, 'aux_conv')] = Conv2d(width, self.out_channels, 3, **self.block['init_zero'])

    def _side_output(self, level, x, side):
        if level and self.decoder_type != 'skip':
            return side
        x = x.to(at_least_float32(x.dtype))
        image = self.dec[self._name(level, 'aux_conv')](self.dec[self._name(level, 'aux_norm')](x, activate=True))
        return image if side is None else image + self.dec[self._name(level, 'aux_up')](side)


class DhariwalUNet(UNet):
    """U-Net of Dhariwal & Nichol 2021 (ADM): attention at several resolutions with 64 channels per head; the embedding scales and shifts
    the normalised features.

    Inputs and outputs: see the module's docstring."""

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
                 model_channels: int = 192, channel_mult: Sequence[int] = (1, 2, 3, 4), channel_mult_emb: int = 4, num_blocks: int = 3,
                 attn_resolutions: Sequence[int] = (32, 16, 8), dropout: float = 0.10, label_dropout: float = 0) -> None:
        third = math.sqrt(1 / 3)
        init = {'init_mode': 'kaiming_uniform', 'init_weight': third, 'init_bias': third}
        init_zero = {'init_mode': 'kaiming_uniform', 'init_weight': 0, 'init_bias': 0}
        emb_channels = model_channels * channel_mult_emb
        block = {'emb_channels': emb_channels, 'dropout': dropout, 'init': init, 'init_zero': init_zero}
        super().__init__(img_resolution, [model_channels * m for m in channel_mult], num_blocks, attn_resolutions, True, block)
        self.label_dim, self.augment_dim, self.out_channels = label_dim, augment_dim, out_channels

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        self.map_label = LabelEmbedding(label_dim, emb_channels, label_dropout, bias=False, init_mode='kaiming_normal',
                                        init_weight=math.sqrt(label_dim)) if label_dim else None
        width = self._build_decoder(self._build_encoder(in_channels, self.channels[0]))
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv2d(width, out_channels, 3, **init_zero)

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels)
        emb = F.silu(emb)
        image, dtype = self.enter(x)
        features, _ = self._decode(self._encode(image, emb, dtype), emb)
        return self.out_conv(self.out_norm(features.to(image.dtype), activate=True)).to(x.dtype)


# What --arch selects; --cbase and --cres are keys of it.
_SONG = {'encoder_type': 'standard', 'decoder_type': 'standard', 'model_channels': 128, 'channel_mult': [2, 2, 2], 'dropout': 0.13}
ARCHS['adm'] = Arch(DhariwalUNet, model_channels=192, channel_mult=[1, 2, 3, 4], dropout=0.13)
ARCHS['ddpmpp'] = Arch(SongUNet, 'DDPM++, U-Net of Song et al. 2021: sinusoidal embedding of the noise level, and resampling by a '
                       '2x2 box filter.', **_SONG, embedding_type='positional', channel_mult_noise=1, resample_filter=[1, 1])
ARCHS['ncsnpp'] = Arch(SongUNet, 'NCSN++, U-Net of Song et al. 2021: random Fourier features of the noise level, a residual path from the '
                       'input image through the encoder, and smooth resampling by the filter 1|3|3|1.',
                       **_SONG | {'encoder_type': 'residual'}, embedding_type='fourier', channel_mult_noise=2, resample_filter=[1, 3, 3, 1])
