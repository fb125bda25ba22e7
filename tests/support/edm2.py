# SPDX-License-Identifier: Apache-2.0
"""Networks of the EDM2 reference outputs, whose weights are stored or follow from a formula."""

import json
import math

import numpy as np
import torch
from safetensors.torch import load_file

from tests.support import GOLDEN
from training.networks.preconditioning import build_network
from training.objective.weighting import EDM2Weight

DATA = GOLDEN / 'edm2'
CASES = ('edm2_head64_silent_no_attention', 'edm2_latent_cond', 'edm2_options', 'edm2_pixel_uncond_3level')


def formula(shapes, salt):
    """{name: tensor} by the formula; shapes: {name: shape} in the order of the parameters."""
    found, whole = {}, np.uint64(2 ** 32 - 1)
    for j, (name, shape) in enumerate(shapes.items()):
        mixed = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(j * 97654321 + salt) & whole
        for shift, factor in ((16, 2246822519), (13, 3266489917), (16, 1)):
            mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor) & whole
        u = mixed / 2 ** 32
        found[name] = torch.from_numpy((0.5 + 0.5 * u if not shape else (2 * u - 1) * math.sqrt(3)).astype(np.float32)).reshape(shape)
    return found


def build(kwargs, state):
    """(net, EDM2Weight) of published arguments and a state dict with published names, in eval mode."""
    kwargs = dict(kwargs)
    weight = EDM2Weight(kwargs.get('sigma_data', 0.5), kwargs.pop('logvar_channels', 128))
    if kwargs.get('clip_act', 1) is None:
        kwargs['clip_act'] = 0
    net = build_network({**kwargs, 'model_type': 'EDM2UNet'})
    net.model.load_state_dict({name[5:]: value for name, value in state.items() if name.startswith('unet.')})
    weight.load_state_dict({name: value for name, value in state.items() if name.startswith('logvar_')})
    return net.eval(), weight


def case(name):
    """(net, EDM2Weight, tensors of io.safetensors, case.json) of a case."""
    folder = DATA / name
    about, io = json.loads((folder / 'case.json').read_text()), load_file(folder / 'io.safetensors')
    if about['weights'] == 'formula':
        state = formula({key: about['state_dict'][key] for key in about['param_order']}, about['formula_salt'])
        state |= {key.removeprefix('buffer.'): value for key, value in io.items() if key.startswith('buffer.')}
    else:
        state = {key: value.float() for key, value in load_file(folder / 'model.safetensors').items()}
    return *build(about['kwargs'], {key: state[key] for key in about['state_dict']}), io, about


def guide():
    """The second network of the sampler's reference outputs."""
    about, io = json.loads((DATA / 'sampler.json').read_text()), load_file(DATA / 'sampler.safetensors')
    kwargs = {key: value for key, value in about['gnet_kwargs'].items() if key != 'logvar_channels'}
    net = build_network({**kwargs, 'model_type': 'EDM2UNet'}).eval()
    weights = formula({name: list(p.shape) for name, p in net.model.named_parameters()}, about['gnet_formula_salt'])
    buffers = {f'emb_fourier.{name}': io[f'gnet.buffer.unet.emb_fourier.{name}'] for name in ('freqs', 'phases')}
    net.model.load_state_dict(weights | buffers)
    return net
