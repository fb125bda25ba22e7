# SPDX-License-Identifier: Apache-2.0
"""The architectures beside the U-Nets at a size for tests, and networks of them whose weights are all random."""

import inspect
import math

import torch

from torch_utils import misc, registry
from training.networks.interface import ARCHS, network_class
from training.networks.preconditioning import build_network

# --arch; a new architecture needs only its line here to be tested by tests/training/networks/test_archs.py and the slow kill matrix.
TINY = {
    'dit': 'dit:width=16,depth=2,heads=2',
    'vit': 'vit:width=16,depth=2,heads=2',
    'uvit': 'uvit:width=16,depth=2,heads=2',
}
# Others of their forms, which are tested as networks only.
VARIANTS = {
    'vit with relative positions': 'vit:width=16,depth=2,heads=2,use_rel_pos_bias=true,use_mean_pooling=false,use_conv_last=true,'
                                   'init_values=0.1',
    'vit with shared positions': 'vit:width=16,depth=2,heads=2,use_shared_rel_pos_bias=true,use_abs_pos_emb=false,null_label=false',
    'uvit of texts': 'uvit:width=16,depth=2,heads=2,clip_dim=1,mlp_time_embed=true,qkv_bias=true',
    'uvit without skips': 'uvit:width=16,depth=2,heads=2,skip=false,conv=false,null_label=false',
}


def config(arch, **others):
    """A configuration for build_network(): 8x8, two channels, three classes."""
    return {'img_resolution': 8, 'img_channels': 2, 'label_dim': 3, **registry.build((TINY | VARIANTS)[arch], ARCHS)(), **others}


def augmented(arch):
    """{'augment_dim': 9} where the network takes augmentation labels, else {}."""
    return {'augment_dim': 9} if 'augment_dim' in inspect.signature(network_class(config(arch)['model_type'])).parameters else {}


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
