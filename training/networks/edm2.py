# SPDX-License-Identifier: Apache-2.0
"""EDM2's magnitude-preserving U-Net with the published layer names (Karras et al. 2024, configuration G)."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dnnlib import UserError
from torch_utils import distributed
from torch_utils.magnitude import MPConv, MPFourier, force_unit_rows, normalize, unit_rows
from training.networks.conditioning import Conditioning
from training.networks.interface import ARCHS, Arch, Network
from training.networks.layers import initial, repeat_pixels, silu
from training.networks.rows import Dropout
from training.networks.unet import check_sizes, level_sizes

SILU_SIZE = 0.596  # root mean square of silu(x) for x ~ N(0, 1)
SIZES = {'XXS': 64, 'XS': 128, 'S': 192, 'M': 256, 'L': 320, 'XL': 384, 'XXL': 448}  # published model_channels


def normal(*shape: int) -> torch.Tensor:
    """Initial values N(0, 1), of which every weight of this network has its first ones."""
    return initial(list(shape), 'kaiming_normal', fan_in=1, fan_out=1).detach()


def mp_conv(in_channels: int, out_channels: int, kernel: int) -> MPConv:
    """A convolution; kernel=0: a linear map."""
    return MPConv(normal(out_channels, in_channels, *[kernel, kernel] * (kernel > 0)))


def mp_fourier(channels: int) -> MPFourier:
    """Frequencies 2 pi N(0, 1), phases U(0, 2 pi)."""
    uniform = initial([channels], 'kaiming_uniform', fan_in=1, fan_out=1).detach() / math.sqrt(3)  # U(-1, 1)
    return MPFourier(2 * math.pi * normal(channels), math.pi * (1 + uniform))


def mp_silu(x: torch.Tensor, training: bool) -> torch.Tensor:
    """silu(x) / 0.596 (equation 81)."""
    return silu(x, training) / SILU_SIZE


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), of unit variance where a and b are independent and have it (equation 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Channels of a and b, which contribute to the next layer in the proportion 1 - t to t whatever their numbers are (equation 103)."""
    per_channel = [(1 - t) / math.sqrt(a.shape[1]), t / math.sqrt(b.shape[1])]
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat([a * (scale * per_channel[0]), b * (scale * per_channel[1])], dim=1)


class Resample(nn.Module):
    """Doubles (up) or halves the resolution of [N,C,H,W] by a separable filter with an even number of taps."""

    def __init__(self, up: bool, taps: Sequence[float]) -> None:
        super().__init__()
        if not taps or len(taps) % 2 or not sum(taps):
            raise ValueError(f'resample_filter={list(taps)} must have an even number of taps, whose sum is not 0')
        row = torch.tensor(list(taps), dtype=torch.float32)
        self.up, self.margin = up, (len(taps) - 1) // 2
        self.is_box = len(taps) == 2 and taps[0] == taps[1]
        # Follows from the constructor's arguments, so it is not in the state dict. 4: for the zeros between the pixels when going up.
        self.register_buffer('kernel', torch.outer(row, row)[None, None] * (4 if up else 1) / row.sum() ** 2, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_box:
            return repeat_pixels(x) if self.up else F.avg_pool2d(x, 2)
        convolve = F.conv_transpose2d if self.up else F.conv2d
        return convolve(x, self.kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1), stride=2, padding=self.margin, groups=x.shape[1])


class LabelProjection(Conditioning):
    """Class labels [N, label_dim] -> [N, channels], of unit variance for one-hot labels; "no label" gives 0."""

    def __init__(self, label_dim: int, channels: int, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.label_dim, self.weight = label_dim, nn.Parameter(normal(channels, label_dim))

    def embed(self, labels: torch.Tensor) -> torch.Tensor:
        """As Conditioning.embed."""
        return F.linear(labels * math.sqrt(self.label_dim), unit_rows(self.weight, labels.dtype))


class Block(nn.Module):
    """Residual block of encoder or decoder, optionally resampling, with optional self-attention after it.

    x [N, C, H, W], emb [N or 1, emb_channels], and in some blocks of the decoder a skip [N, K, H, W], where C + K = in_channels ->
    [N, out_channels, H', W']. resample: None, 'up' or 'down'. attention: at least one head of channels_per_head channels fits, or there
    is none, as published. clip_act: largest activation; 0: any."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, decoder: bool, resample: str | None = None,
                 attention: bool = False, resample_filter: Sequence[float] = (1, 1), channels_per_head: int = 64, dropout: float = 0.0,
                 concat_balance: float = 0.5, res_balance: float = 0.3, attn_balance: float = 0.3, clip_act: float = 256.0) -> None:
        super().__init__()
        self.decoder, self.clip_act = decoder, clip_act
        self.concat_balance, self.res_balance, self.attn_balance = concat_balance, res_balance, attn_balance
        self.num_heads = out_channels // channels_per_head if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ValueError(f'{out_channels} channels cannot be divided into {self.num_heads} heads of attention of about '
                             f'{channels_per_head}; choose channels_per_head or model_channels (cbase) accordingly')
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = mp_conv(in_channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = mp_conv(emb_channels, out_channels, 0)
        self.conv_res1 = mp_conv(out_channels, out_channels, 3)
        self.conv_skip = mp_conv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = mp_conv(out_channels, 3 * out_channels, 1) if self.num_heads else None
        self.attn_proj = mp_conv(out_channels, out_channels, 1) if self.num_heads else None
        self.resample = Resample(resample == 'up', resample_filter) if resample else None
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if skip is not None:
            x = mp_cat(x, skip, self.concat_balance)
        if self.resample is not None:
            x = self.resample(x)
        if not self.decoder:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), 1)
        scale = self.emb_linear(emb, self.emb_gain)[:, :, None, None] + 1
        y = self.conv_res0(mp_silu(x, self.training))
        y = self.conv_res1(self.dropout(mp_silu(y * scale.to(y.dtype), self.training)))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), self.attn_balance)
        return x.clamp(-self.clip_act, self.clip_act) if self.clip_act else x

    def _attend(self, x):
        # The published layout of the 3C channels is (head, channel within the head, one of query, key, value).
        qkv = self.attn_qkv(x).permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (self.num_heads, -1, 3))  # [N, H*W, heads, d, 3]
        # [N, heads, H*W, d] each, with d innermost in memory, as fast kernels want it, and the heads next to it, for channels-last images.
        query, key, value = (part.transpose(1, 2) for part in normalize(qkv, 3).movedim(4, 0).contiguous().unbind(0))
        return self.attn_proj(F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(x.shape))


class EDM2UNet(Network):
    """Magnitude-preserving U-Net of EDM2 (Karras et al. 2024, configuration G), whose weights are normalised in every training step.

    img_resolution: one int or [H, W]; attn_resolutions: heights of levels with attention, which the lowest level of the decoder has in
    any case. A level narrower than channels_per_head has none, as published: small networks need a smaller channels_per_head.
    channel_mult_noise, channel_mult_emb: channels of the Fourier features and of the embedding, in multiples of model_channels; None:
    those of the first and of the widest level. label_balance, concat_balance, res_balance, attn_balance: the share of label, skip,
    residual branch and attention in their mp_sum or mp_cat. clip_act: largest activation between blocks; 0: any."""

    short_names = {'model_channels': 'cbase', 'channel_mult': 'cres', 'num_blocks': 'blocks', 'attn_resolutions': 'attn'}
    float32_ends = True
    takes_levels = True  # its Fourier features vary within 0.2 of a label: they suit ln(sigma) / 4, and not times up to 1000

    def __init__(self, img_resolution: int | Sequence[int], in_channels: int, out_channels: int, label_dim: int = 0, augment_dim: int = 0,
                 model_channels: int = 192, channel_mult: Sequence[int] = (1, 2, 3, 4), channel_mult_noise: int | None = None,
                 channel_mult_emb: int | None = None, num_blocks: int = 3, attn_resolutions: Sequence[int] = (16, 8), dropout: float = 0.0,
                 label_dropout: float = 0.0, label_balance: float = 0.5, concat_balance: float = 0.5, res_balance: float = 0.3,
                 attn_balance: float = 0.3, resample_filter: Sequence[float] = (1, 1), channels_per_head: int = 64,
                 clip_act: float = 256.0) -> None:
        channels = [model_channels * mult for mult in channel_mult]
        check_sizes(channels, num_blocks, dropout)
        check_values(channels_per_head, clip_act, channel_mult_noise, channel_mult_emb, label_balance=label_balance,
                     concat_balance=concat_balance, res_balance=res_balance, attn_balance=attn_balance)
        super().__init__()
        self.label_dim, self.augment_dim, self.label_balance = label_dim, augment_dim, label_balance
        noise_channels = model_channels * channel_mult_noise if channel_mult_noise is not None else channels[0]
        emb_channels = model_channels * channel_mult_emb if channel_mult_emb is not None else max(channels)
        self.block = dict(emb_channels=emb_channels, resample_filter=resample_filter, channels_per_head=channels_per_head, dropout=dropout,
                          concat_balance=concat_balance, res_balance=res_balance, attn_balance=attn_balance, clip_act=clip_act)

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.augment_gain = nn.Parameter(torch.zeros([])) if augment_dim else None
        self.emb_fourier = mp_fourier(noise_channels)
        self.emb_noise = mp_conv(noise_channels, emb_channels, 0)
        self.emb_label = LabelProjection(label_dim, emb_channels, label_dropout) if label_dim else None
        self.emb_augment = mp_conv(augment_dim, emb_channels, 0) if augment_dim else None
        levels = [('{}x{}_'.format(*size), width, size[0] in attn_resolutions)
                  for size, width in zip(level_sizes(img_resolution, len(channels)), channels)]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips = self._build_encoder(levels, num_blocks, in_channels)
        self._build_decoder(levels, num_blocks, skips)
        self.out_conv = mp_conv(channels[0], out_channels, 3)

    def _build_encoder(self, levels, num_blocks, in_channels):
        """levels: (prefix of the names, channels, whether there is attention) of each, finest first. Returns the channels of the skips."""
        width = levels[0][1]
        self.enc[f'{levels[0][0]}conv'] = mp_conv(in_channels + 1, width, 3)
        skips = [width]
        for name, channels, attention in levels:
            if len(skips) > 1:
                self.enc[f'{name}down'] = Block(width, width, decoder=False, resample='down', **self.block)
                skips.append(width)
            for index in range(num_blocks):
                self.enc[f'{name}block{index}'] = Block(width, channels, decoder=False, attention=attention, **self.block)
                width = channels
                skips.append(width)
        return skips

    def _build_decoder(self, levels, num_blocks, skips):
        width, skips = levels[-1][1], list(skips)
        for name, channels, attention in reversed(levels):
            if name == levels[-1][0]:
                self.dec[f'{name}in0'] = Block(width, width, decoder=True, attention=True, **self.block)
                self.dec[f'{name}in1'] = Block(width, width, decoder=True, **self.block)
            else:
                self.dec[f'{name}up'] = Block(width, width, decoder=True, resample='up', **self.block)
            for index in range(num_blocks + 1):
                self.dec[f'{name}block{index}'] = Block(width + skips.pop(), channels, decoder=True, attention=attention, **self.block)
                width = channels

    @property
    def label_embedding(self) -> Conditioning | None:
        """As Network.label_embedding."""
        return self.emb_label

    def begin_step(self) -> None:
        """Forced weight normalisation: gives the rows of all weights unit size, in place. The training loop calls it."""
        force_unit_rows(weight for name, weight in self.named_parameters() if name.endswith('weight'))

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None,
                augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        emb = self._embed(noise_labels, class_labels, augment_labels)
        image, dtype = self.enter(x)
        ones = torch.ones_like(image[:, :1])  # take the place of biases
        first, *blocks = self.enc.values()
        skips = [first(torch.cat([image, ones], dim=1)).to(dtype)]
        for block in blocks:
            skips.append(self.run(block, skips[-1], emb))
        features = skips[-1]
        for name, block in self.dec.items():
            features = self.run(block, features, emb, *([skips.pop()] if '_block' in name else []))
        return self.out_conv(features.to(image.dtype), self.out_gain).to(x.dtype)

    def inner_layers(self) -> Iterator[nn.Module]:
        """As Network.inner_layers: the convolutions of the blocks."""
        for block in self.modules():
            if isinstance(block, Block):
                yield from (layer for layer in block.children() if isinstance(layer, MPConv) and layer is not block.emb_linear)

    def _embed(self, noise_labels, class_labels, augment_labels):
        """[N or 1, emb_channels]."""
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(class_labels.to(emb.dtype)), self.label_balance)
        if self.emb_augment is not None and augment_labels is not None:
            # Added with a gain that begins at 0, so that the embedding of images that are not augmented is the published one.
            emb = emb + self.emb_augment(augment_labels.to(emb.dtype), self.augment_gain)
        return mp_silu(emb, self.training)


def check_values(channels_per_head: int, clip_act: float, *multipliers: int | None, **balances: float) -> None:
    """Raises ValueError, in one line, for impossible values of these constructor arguments."""
    if channels_per_head < 1:
        raise ValueError(f'channels_per_head={channels_per_head} must be 1 or more')
    if clip_act is None or clip_act < 0:
        raise ValueError(f'clip_act={clip_act} must be above 0, or 0 for no limit')
    if any(multiplier is not None and multiplier < 1 for multiplier in multipliers):
        raise ValueError(f'channel_mult_noise={multipliers[0]} and channel_mult_emb={multipliers[1]} must be 1 or more, or none')
    for name, value in balances.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name}={value} must be from 0 to 1')


class SizedArch(Arch):
    """The choice of --arch with one more key: size, one of SIZES in letters of either case, in place of cbase."""

    def __init__(self, network: type[Network], **preset: Any) -> None:
        super().__init__(network, **preset)
        size = inspect.Parameter('size', inspect.Parameter.KEYWORD_ONLY, default='S')
        self.__signature__ = self.__signature__.replace(parameters=[size, *self.__signature__.parameters.values()])

    def __call__(self, size: str | None = None, **keys: Any) -> dict:
        """As Arch; prints which levels cannot have attention."""
        if size is not None:
            if size.upper() not in SIZES:
                raise UserError(f'--arch=edm2: size={size} is unknown; choose from {", ".join(SIZES)}')
            if 'cbase' in keys:
                raise UserError(f'--arch=edm2: size={size} and cbase={keys["cbase"]} both set the channels of the first level; '
                                'give one of them')
            keys['cbase'] = SIZES[size.upper()]
        found = super().__call__(**keys)
        base, mults, head = (found.get(name, inspect.signature(self.network).parameters[name].default)
                             for name in ('model_channels', 'channel_mult', 'channels_per_head'))
        if narrow := [str(base * mult) for mult in mults if 0 < base * mult < head]:
            distributed.print0(f'Note: --arch=edm2: levels of {", ".join(narrow)} channels are narrower than a head of attention '
                               f'(channels_per_head={head}), and have none')
        return found


ARCHS['edm2'] = SizedArch(EDM2UNet)
