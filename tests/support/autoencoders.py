# SPDX-License-Identifier: Apache-2.0
"""Autoencoders of tests: an exact one without weights, registered as "tiny", and diffusers' AutoencoderKL of a few thousand weights."""

import hashlib

import torch

from torch_utils import misc
from training.networks.autoencoder import AUTOENCODERS, Autoencoder

TINY = 'tiny:one'


class Tiny(Autoencoder):
    """Latents of 4 channels at half the size, from which the picture can be had back: the mean, three differences of colour, and whatever
    of a 2x2 square the mean does not tell is lost. ref: a word, of which the digest is made."""

    channels, factor = 4, 2
    opened = 0  # how often one was made

    def __init__(self, ref, device='cpu'):
        Tiny.opened += 1
        self.device, self.sha256 = torch.device(device), hashlib.sha256(ref.encode()).hexdigest()
        # Columns: red, green, blue and a fourth that repeats grey; orthogonal but for the last.
        self.mixing = torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 4.0], [1.0, 1.0, 1.0]], device=self.device)

    def moments(self, x):
        means = torch.nn.functional.avg_pool2d(x.to(self.device), 2)
        mean = torch.einsum('kc,nchw->nkhw', self.mixing, means) + 3
        left = torch.linspace(0.5, 1, mean.shape[3], device=self.device)  # not the same in a mirror
        return mean * left, torch.full_like(mean, 0.125) * (1 + means.mean(1, keepdim=True).abs())

    def reconstruct(self, z):
        left = torch.linspace(0.5, 1, z.shape[3], device=self.device)
        colours = (z.to(self.device) / left - 3)[:, :3] / torch.tensor([1.0, 2, 4], device=self.device).reshape(3, 1, 1)
        return torch.nn.functional.interpolate(colours, scale_factor=2)


AUTOENCODERS['tiny'] = Tiny


def save_tiny_kl(folder, seed=0, **more):
    """Saves an AutoencoderKL with random weights, factor 2, and returns it; skips the test without diffusers."""
    import pytest
    diffusers = pytest.importorskip('diffusers')
    with misc.seeded(seed, 'a tiny autoencoder'):
        vae = diffusers.AutoencoderKL(**{**dict(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
            down_block_types=['DownEncoderBlock2D'] * 2, up_block_types=['UpDecoderBlock2D'] * 2), **more})
    vae.save_pretrained(folder)
    return vae.eval()
