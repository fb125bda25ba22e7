# SPDX-License-Identifier: Apache-2.0
"""Attacks, as in checkpoints.py, on what reads published weights of transformers, here of a size that is small enough for thousands."""

import argparse

import torch

from tests.fuzz import mutators
from tests.fuzz.checkpoints import Torch, use
from tests.support.hostile import pick
from torch_utils import misc
from training.checkpoints.load import load_network
from training.networks import dit, uvit, vit
from training.networks.interface import network_class
from training.networks.preconditioning import build_network

TINY = 16, 2, 2  # width, depth, heads
CONFIG = {'img_resolution': 8, 'img_channels': 4, 'label_dim': 3, 'size': 'tiny', 'precond': 'iddpm'}
ARGUMENTS = {'DiT': {'diffusion': 'linear:steps=1000'}, 'VisionTransformer': {'learned_variance': False, 'num_steps': 20},
             'UViT': {'learned_variance': False}}


class Weights(Torch):
    """A plain state dict, or a training checkpoint of DiT, with or without zip file."""

    def prepare(self, folder):
        for module in (dit, uvit, vit):
            module.SIZES['tiny'] = TINY
        self.path, self.sound = folder / 'weights.pt', []
        for name, others in ARGUMENTS.items():
            assert network_class(name)
            with misc.seeded('fuzz'):
                state = build_network({**CONFIG, **others, 'model_type': name}).model.state_dict()
            trees = [state] + ([{'model': state, 'ema': state, 'opt': {0: torch.zeros(3)}, 'epoch': 3}] if name == 'DiT' else [])
            self.sound += [self.saved(tree) for tree in trees]
        self.arguments = self.saved({'model': state, 'ema': state, 'args': argparse.Namespace(model='U-ViT', lr=1e-4, ids=[1])})
        self.path.write_bytes(self.arguments)
        self.read()
        for data in self.sound:
            self.path.write_bytes(data)
            self.read()

    def damage(self, draws):
        if draws.random() < 0.1:  # which only the pickle holds, and no tree that PyTorch loads by itself
            return mutators.pack([(name, mutators.damage_pickle(mutators.tokens(part), draws, []) if name.endswith('.pkl') else part)
                                  for name, part in mutators.members(self.arguments)])
        self.load_base(pick(self.sound, draws))
        return super().damage(draws)

    def read(self):
        use(load_network(self.path))
