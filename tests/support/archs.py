# SPDX-License-Identifier: Apache-2.0
"""The architectures beside the U-Nets at a size for tests, and networks of them whose weights are all random."""

import math

import torch

from torch_utils import misc, registry
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network

# --arch; a new architecture needs only its line here to be tested by tests/training/networks/test_archs.py and the slow kill matrix.
TINY = {
    'dit': 'dit:width=16,depth=2,heads=2',
    'vit': 'vit:width=16,depth=2,heads=2',
    'uvit': 'uvit:width=16,depth=2,heads=2',
}


def config(arch, **others):
    """A configuration for build_network(): 8x8, two channels, three classes."""
    return {'img_resolution': 8, 'img_channels': 2, 'label_dim': 3, **registry.build(TINY[arch], ARCHS)(), **others}


def network(arch, **others):
    """A network in eval mode, every parameter of which matters."""
    with misc.seeded('network'):
        net = build_network(config(arch, **others))
    return randomized(net)


def randomized(net, seed=0):
    """Gives every parameter a random value, in eval mode."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=misc.generator(seed, name))
            p.copy_(noise / math.sqrt(p[0].numel()) if p.ndim > 1 else noise * 0.1 + name.endswith('weight'))
    return net.eval()
