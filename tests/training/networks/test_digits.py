# SPDX-License-Identifier: Apache-2.0
"""A thousand steps on digits in bfloat16 end where those in float32 do."""

import pytest
import torch

from torch_utils import misc, registry
from training.networks.interface import ARCHS
from training.networks.preconditioning import build_network

STEPS, BATCH = 1000, 64


def loss(net, images, key):
    """EDM's loss at sigma ~ exp(N(-1.2, 1.2^2)), drawn by the key."""
    draw = lambda name, *shape: torch.randn(*shape, generator=misc.generator(*key, name))
    sigma = (draw('sigma', len(images), 1, 1, 1) * 1.2 - 1.2).exp()
    weight = (sigma ** 2 + net.sigma_data ** 2) / (sigma * net.sigma_data) ** 2
    return (weight * (net(images + sigma * draw('noise', *images.shape), sigma) - images) ** 2).mean()


def held_out_loss(digits, seed, dtype):
    """Of a network after 1,000 steps, evaluated in its own precision at the same noise for all."""
    arch = registry.build('ddpmpp:cbase=16,cres=1|1,blocks=1,attn=4,dropout=0', ARCHS)()
    with misc.seeded(seed):
        net = build_network({'img_resolution': 8, 'img_channels': 1, **arch}).train()
    net.compute_dtype = dtype
    train, held_out = digits[:-300], digits[-300:]
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    for step in range(STEPS):
        chosen = torch.randint(len(train), [BATCH], generator=misc.generator(seed, step, 'images'))
        for group in optimizer.param_groups:
            group['lr'] = 2e-3 * min(1, step / 100) * (1 - step / STEPS)
        optimizer.zero_grad()
        loss(net, train[chosen], (seed, step)).backward()
        optimizer.step()
    with torch.no_grad():
        return float(torch.stack([loss(net.eval(), held_out, ('held out', index)) for index in range(8)]).mean())


@pytest.mark.slow
def test_bfloat16_ends_in_the_band_of_float32():
    """Held-out losses, against mean and standard deviation of three seeds in float32."""
    digits = pytest.importorskip('sklearn.datasets').load_digits().images
    digits = torch.tensor(digits, dtype=torch.float32)[:, None] / 8 - 1
    digits = digits[torch.randperm(len(digits), generator=misc.generator('digits'))]
    exact = torch.tensor([held_out_loss(digits, seed, torch.float32) for seed in range(3)])
    rough = torch.tensor([held_out_loss(digits, seed, torch.bfloat16) for seed in range(3)])
    print('float32', exact.tolist(), 'bfloat16', rough.tolist())
    assert exact.max() < 0.6 and (rough - exact.mean()).abs().max() < 3 * exact.std()
    assert (rough.mean() - exact.mean()).abs() < 2 * exact.std()
