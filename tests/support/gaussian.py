# SPDX-License-Identifier: Apache-2.0
"""A network that is the exact denoiser of white Gaussian data N(0, V), whose posterior is known in closed form."""

import math

import torch

from torch_utils import misc


class GaussianNet(torch.nn.Module):
    """E[x_0 | x] = V / (V + sigma^2) x, with what the program asks of a network."""

    def __init__(self, shape=(1, 4, 4), V=0.25, units=None, **others):
        super().__init__()
        self.img_channels, *self.img_resolution = shape
        self.units, self.label_dim, self.text, self.autoencoder, self.config = units, 0, None, None, {}
        self.sigma_min, self.sigma_max, self.labels = 0.0, math.inf, []
        self.V = torch.nn.Parameter(torch.tensor(V, dtype=torch.float64), requires_grad=False)
        for name, value in others.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, x, sigma, class_labels=None):
        assert list(x.shape[1:]) == [self.img_channels, *self.img_resolution]
        self.labels.append(class_labels)
        return self.V / (self.V + misc.batched(sigma).double() ** 2) * x.double()


class Blur(GaussianNet):
    """The mean over (2 radius + 1)^2 pixels, zero beyond the image: a denoiser that is the same everywhere, and looks `radius` far."""

    def __init__(self, shape, radius):
        super().__init__(shape)
        self.radius = radius

    def forward(self, x, sigma, class_labels=None):
        side = 2 * self.radius + 1
        kernel = torch.full([x.shape[1], 1, side, side], 1 / side ** 2, dtype=x.dtype)
        return torch.nn.functional.conv2d(x, kernel, padding=self.radius, groups=x.shape[1])
