# SPDX-License-Identifier: Apache-2.0
"""Real U-Nets, small enough for seconds, that the tests of sampling share."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from torch_utils import misc
from training import generation, hub, preconditioning

DATA = Path(__file__).parent / 'data'


def golden_network(case, precond='edm'):
    config = json.loads((DATA / 'networks' / case / 'case.json').read_text())['config']
    net = preconditioning.build_network({**config, 'precond': precond})
    hub.load_weights(net, load_file(DATA / 'networks' / case / 'model.safetensors'), case)
    return net.eval().requires_grad_(False)


def tiny(channels=1, label_dim=0, size=8, key='tiny', **config):
    """A U-Net with random weights, drawn by the key."""
    net = preconditioning.build_network(dict(
        img_resolution=size, img_channels=channels, label_dim=label_dim, model_type='SongUNet', model_channels=16,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], **config))
    source = misc.generator(key)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=source) * 0.05
    return net.eval()


def all_images(net, seeds, **options):
    options = {'num_steps': 3, **options}
    return torch.cat([part.images for part in generation.generate_images(net, seeds, **options)])
