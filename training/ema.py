# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages of a network's weights, measured in images."""

import copy

import torch


class HalfLifeEMA:
    """EDM's average: in halflife_kimg thousand images half of an old weight is forgotten (Karras et al. 2022, appendix F.2).

    rampup_ratio: the half-life is at most this share of the images so far, so that the random start soon fades; None: no ramp.
    Attribute module: the averaged network, in eval mode and without gradients."""

    def __init__(self, net, halflife_kimg=500, rampup_ratio=0.05):
        if not halflife_kimg >= 0:
            raise ValueError(f'halflife_kimg={halflife_kimg} must be 0 or more')
        if rampup_ratio is not None and not rampup_ratio > 0:
            raise ValueError(f'rampup_ratio={rampup_ratio} must be positive, or None for no ramp')
        self.module = copy.deepcopy(net).eval().requires_grad_(False)
        self.halflife_kimg, self.rampup_ratio = halflife_kimg, rampup_ratio

    def beta(self, nimg, batch):
        """What is kept of the average in an update by `batch` images, when nimg images came before them."""
        halflife = self.halflife_kimg * 1e3
        if self.rampup_ratio is not None:
            halflife = min(halflife, self.rampup_ratio * nimg)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, net, nimg, batch):
        """Moves the average towards net, of the same structure; nimg counts the images before this batch. No device sync.

        Buffers are copied: running statistics have averages of their own, constants stay constant."""
        mine, theirs = list(self.module.parameters()), list(net.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - self.beta(nimg, batch))
        for own, new in zip(self.module.buffers(), net.buffers(), strict=True):
            own.copy_(new)

    def state_dict(self):
        """Parameters and buffers of the averaged network."""
        return self.module.state_dict()

    def load_state_dict(self, state):
        """Takes up an average where state_dict() left it."""
        self.module.load_state_dict(state)
