# SPDX-License-Identifier: Apache-2.0
"""Export of networks as diffusers' UNet2DModel and EDMEulerScheduler, which exist for ADM with EDM's preconditioning only.

Block by block (our names -> theirs): conv0, affine, conv1 with scale and shift -> a ResnetBlock2D with time_scale_shift; the downsampling
block that begins a level -> the downsampler that ends the previous one; in0, in1 -> the mid block. Labels become an embedding, whose
last row, all zero, is "no label". The embedding of augmentation labels is left out: it is zero in sampling."""

import os
import re

import safetensors.torch
import torch

from dnnlib import UserError
from dnnlib.files import write_json

HEAD, GROUPS = 64, 32  # channels of an attention head; groups of every normalisation there
RESNET = {'norm0': 'norm1', 'conv0': 'conv1', 'affine': 'time_emb_proj', 'norm1': 'norm2', 'conv1': 'conv2', 'skip': 'conv_shortcut'}
OUTER = {'map_layer0': 'time_embedding.linear_1', 'map_layer1': 'time_embedding.linear_2', 'out_norm': 'conv_norm_out',
         'out_conv': 'conv_out'}


def difference(net: torch.nn.Module) -> str | None:
    """Why UNet2DModel and EDMEulerScheduler cannot represent this network exactly; None where they can."""
    config, unet = net.config, net.model
    if type(unet).__name__ not in ('DhariwalUNet', 'SongUNet'):
        return f'this program writes only U-Nets of ADM for diffusers, and this network is a {type(unet).__name__}'
    if type(unet).__name__ != 'DhariwalUNet':
        return 'SongUNet (ddpmpp, ncsnpp) scales its residual sums by sqrt(1/2) and projects the skip branch where the resolution changes'
    if config.get('precond', 'edm') != 'edm':
        return f'diffusers has a scheduler for --precond=edm, but not for {config["precond"]}'
    if config.get('channel_mult', [1])[0] != 1 or config.get('channel_mult_emb', 4) != 4:
        return 'its time embedding must have as many channels as the first level, and 4 times as many inside'
    widths = [len(value) for name, value in unet.state_dict().items() if re.search(r'norm\d?\.weight$', name)]
    if any(width % GROUPS or width < 4 * GROUPS for width in widths):
        return f'its normalisations have {GROUPS} groups, and those of {min(widths)} channels here have {min(GROUPS, min(widths) // 4)}'
    attended = [width for width, attends in zip(unet.channels, [*unet.attends[:-1], True]) if attends]
    if any(width % HEAD for width in attended):
        return f'its attention heads have {HEAD} channels, which do not divide {min(width for width in attended if width % HEAD)}'
    return None


def unet_config(net: torch.nn.Module) -> dict:
    """config.json of the UNet2DModel."""
    unet = net.model
    down = ['AttnDownBlock2D' if attends else 'ResnetDownsampleBlock2D' for attends in unet.attends]
    up = ['AttnUpBlock2D' if attends else 'ResnetUpsampleBlock2D' for attends in reversed(unet.attends)]
    return {'_class_name': 'UNet2DModel', 'sample_size': net.img_resolution, 'in_channels': net.img_channels,
            'out_channels': net.img_channels, 'time_embedding_type': 'positional', 'freq_shift': 0, 'flip_sin_to_cos': True,
            'down_block_types': down, 'up_block_types': up, 'block_out_channels': unet.channels, 'layers_per_block': unet.num_blocks,
            'downsample_type': 'resnet', 'upsample_type': 'resnet', 'dropout': unet.block['dropout'], 'act_fn': 'silu',
            'attention_head_dim': HEAD, 'norm_num_groups': GROUPS, 'attn_norm_num_groups': GROUPS, 'norm_eps': 1e-5,
            'resnet_time_scale_shift': 'scale_shift', 'num_class_embeds': net.label_dim + 1 if net.label_dim else None}


def unet_state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """State dict of the UNet2DModel."""
    found = {}
    for key, value in net.model.state_dict().items():
        path, _, leaf = key.rpartition('.')
        if path == 'map_label':
            rows = value.T * net.model.map_label.scale  # [label_dim, channels]
            found['class_embedding.weight'] = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        elif path in OUTER:
            found[f'{OUTER[path]}.{leaf}'] = value
        elif path != 'map_augment' and leaf != 'resample_filter':
            found |= _block_tensors(net.model, path, leaf, value)
    return {key: value.detach().to('cpu', torch.float32).contiguous().clone() for key, value in found.items()}


def _block_tensors(unet, path, leaf, value):
    """{name in diffusers: tensor} of one tensor in enc or dec; three tensors for the attention's input."""
    side, size, role, layer = re.fullmatch(r'(enc|dec)\.(\d+x\d+)_([a-z]+\d*)(?:\.(\w+))?', path).groups()
    level = ['{}x{}'.format(*found) for found in unet.sizes].index(size)
    if role == 'conv':
        return {f'conv_in.{leaf}': value}
    number = int(re.sub(r'\D', '', role) or 0)
    if role.startswith('in'):
        block, attention = f'mid_block.resnets.{number}', f'mid_block.attentions.{number}'
    else:
        # In diffusers a change of resolution belongs to the level that it leaves.
        stage = level - 1 if role == 'down' else len(unet.sizes) - 1 - level - (role == 'up')
        group = f'down_blocks.{level if role != "down" else stage}' if side == 'enc' else f'up_blocks.{stage}'
        block = {'down': f'{group}.downsamplers.0', 'up': f'{group}.upsamplers.0'}.get(role, f'{group}.resnets.{number}')
        attention = f'{group}.attentions.{number}'
    if layer in RESNET:
        return {f'{block}.{RESNET[layer]}.{leaf}': value}
    if layer == 'norm2':
        return {f'{attention}.group_norm.{leaf}': value}
    value = value.flatten(1) if leaf == 'weight' else value  # 1x1 convolutions are linear layers there
    if layer == 'proj':
        return {f'{attention}.to_out.0.{leaf}': value}
    heads = value.unflatten(0, (-1, HEAD, 3))  # rows are (head, channel within it, one of query, key, value)
    return {f'{attention}.to_{name}.{leaf}': heads[:, :, i].flatten(0, 1) for i, name in enumerate('qkv')}


def write_diffusers(net: torch.nn.Module, folder: str | os.PathLike) -> None:
    """Fills an empty folder: unet/, scheduler/, and README.md with a sampling loop.

    Raises UserError, in one line, for networks that diffusers cannot represent."""
    if reason := difference(net):
        raise UserError(f'--format=diffusers: UNet2DModel cannot represent this network: {reason}; share its own folder instead '
                        '(--format=folder)')
    scheduler = {'_class_name': 'EDMEulerScheduler', 'sigma_min': max(net.sigma_min, 0.002), 'sigma_max': min(net.sigma_max, 80.0),
                 'sigma_data': net.sigma_data, 'prediction_type': 'epsilon', 'rho': 7.0}
    for name, content in (('unet/config.json', unet_config(net)), ('scheduler/scheduler_config.json', scheduler)):
        os.makedirs(os.path.dirname(os.path.join(folder, name)))
        write_json(os.path.join(folder, name), content)
    with open(os.path.join(folder, 'unet', 'diffusion_pytorch_model.safetensors'), 'wb') as f:
        f.write(safetensors.torch.save(unet_state(net), metadata={'format': 'pt'}))
    height, width = net.model.sizes[0]
    labels = f', class_labels=torch.randint({net.label_dim}, [8])' if net.label_dim else ''
    with open(os.path.join(folder, 'README.md'), 'w', encoding='utf-8') as f:
        f.write(CARD.format(shape=f'8, {net.img_channels}, {height}, {width}', labels=labels))


CARD = """---
library_name: diffusers
---
# Diffusion model

    import torch
    from diffusers import EDMEulerScheduler, UNet2DModel
    unet = UNet2DModel.from_pretrained('NAME', subfolder='unet')
    scheduler = EDMEulerScheduler.from_pretrained('NAME', subfolder='scheduler')
    scheduler.set_timesteps(50)
    x = torch.randn({shape}) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            prediction = unet(scheduler.scale_model_input(x, t), t{labels}).sample
        x = scheduler.step(prediction, t, x).prev_sample
"""
