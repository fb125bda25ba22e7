# SPDX-License-Identifier: Apache-2.0
"""Sampling does not wait for the device: levels are written into kernels, and never read back."""

import functools

import pytest
import torch

from tests.support.elsewhere import DEVICE, Elsewhere, Waits
from training.diffusion import schedules
from training.networks.interface import Network
from training.networks.preconditioning import build_network
from training.sampling.generate import ConditionedDenoiser, guided, noise_levels
from training.sampling.guidance import Guidance
from training.sampling.steppers import STEPPERS

SMALL = dict(img_resolution=8, img_channels=3, label_dim=4, model_type='SongUNet', model_channels=16, channel_mult=[1, 2], num_blocks=1,
             attn_resolutions=[4], label_dropout=0.1)
DISCRETE = {'precond': 'iddpm', 'diffusion': 'cosine:steps=20'}


class Echo(Network):
    """Returns its input, once or twice."""

    def __init__(self, times):
        super().__init__()
        self.times, self.gain = times, torch.nn.Parameter(torch.ones([]))

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        return (self.gain * x + 0 * noise_labels.reshape(-1, 1, 1, 1) + 0 * class_labels.sum()).repeat(1, self.times, 1, 1)


def network(**more):
    """A network whose inner part is quick; the preconditioner is that of a real one."""
    net = build_network(SMALL | more)
    net.model = Echo(net.output_multiple)
    return net.eval().requires_grad_(False)


def sampled_there(net, stepper, guidance, sigmas, mode):
    """Runs a stepper over the levels with tensors of a GPU; the state at the end."""
    x, labels = torch.zeros(4, 3, 8, 8, dtype=torch.float64, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    with mode:
        return stepper(guided(net, labels, guidance, 4), x, sigmas, torch.empty_like)


CASES = {name: (piece, {}) for name, piece in STEPPERS.items()} | {
    'heun with churn': (functools.partial(STEPPERS['heun'], S_churn=10.0, S_min=0.1), {}),
    'euler with churn in other coordinates': (functools.partial(STEPPERS['euler'], S_churn=10.0, schedule='vp', scaling='vp'), {}),
    'heun of vp': (STEPPERS['heun'], {'precond': 'vp'}), 'heun of ve': (STEPPERS['heun'], {'precond': 've'}),
    'ancestral of its own levels': (functools.partial(STEPPERS['ancestral'], clip=True), DISCRETE),
    'ddim of its own levels': (functools.partial(STEPPERS['ddim'], eta=1.0), DISCRETE)}


@pytest.mark.parametrize('name', CASES)
def test_steppers_do_not_wait(name):
    stepper, more = CASES[name]
    net = network(**more)
    sigmas = noise_levels(net, schedules.edm, 4)
    net.to(DEVICE)
    for guidance in (Guidance(), Guidance(2.0), Guidance(2.0, (0.1, 5.0), network(**more).to(DEVICE), channels=2)):
        found = sampled_there(net, stepper, guidance, sigmas, Elsewhere())
        assert found.shape == (4, 3, 8, 8) and found.device == DEVICE and found.dtype == torch.float64


@pytest.mark.parametrize('name', CASES)
def test_levels_of_each_images_own_are_read_once(name):
    """To see which is 0; not at each step."""
    stepper, more = CASES[name]
    net = network(**more).to(DEVICE)
    sigmas = torch.empty(6, 4, 1, 1, 1, dtype=torch.float64, device=DEVICE)
    mode = Elsewhere(copies_allowed=True)
    found = sampled_there(net, stepper, Guidance(), sigmas, mode)
    assert found.shape == (4, 3, 8, 8) and found.device == DEVICE and mode.copies == 1


def test_networks_do_not_wait():
    net = build_network(SMALL).eval().requires_grad_(False)
    sampled_there(net.to(DEVICE), STEPPERS['heun'], Guidance(2.0), torch.tensor([80.0, 1.0, 0.0], dtype=torch.float64), Elsewhere())


def test_churn_with_own_levels_reads_these_once():
    """Levels after churn are rounded on the host, to a copy of the network's own."""
    net = network(**DISCRETE)
    sigmas = noise_levels(net, schedules.edm, 4)
    mode = Elsewhere(copies_allowed=True)
    sampled_there(net.to(DEVICE), functools.partial(STEPPERS['heun'], S_churn=10.0), Guidance(), sigmas, mode)
    assert mode.copies == 1


def test_levels_are_rounded_as_on_the_device():
    net = network(**DISCRETE)
    levels = torch.logspace(-2, 2, 50, dtype=torch.float64)
    denoise = ConditionedDenoiser(net)
    expected = net.round_sigma(levels)
    denoise.elsewhere = True  # as if the network were on a GPU
    found = denoise.round_sigma(levels)
    assert found.equal(expected) and found.dtype == torch.float64 and not found.equal(levels)


@pytest.mark.parametrize('wait', [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.cpu(), lambda x: x[x > 0],
                                  lambda x: torch.arange(3.0).to(x.device), lambda x: x + torch.as_tensor(0.5, device=x.device),
                                  lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device), lambda x: x.copy_(torch.zeros(3)),
                                  lambda x: x.nonzero()])
def test_waiting_is_seen(wait):
    mode = Elsewhere()
    with mode:
        x = torch.zeros(3, device=DEVICE)
        assert (x * 2 + torch.full([], 0.5, device=x.device) * torch.tensor(2.0)).device == DEVICE  # which does not wait
        with pytest.raises(Waits):
            wait(x)
