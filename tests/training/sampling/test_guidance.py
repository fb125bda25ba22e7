# SPDX-License-Identifier: Apache-2.0
"""Guidance: closed forms, when the guide is called and when not, intervals in sigma and in t, what cannot be guided."""

import functools
import math

import pytest
import torch

from tests.support.unets import all_images, golden_network, tiny
from torch_utils import misc
from training.diffusion import schedules
from training.sampling import guidance, steppers
from training.sampling.generate import ConditionedDenoiser, guided
from training.sampling.guidance import Guidance, Guided

CHURN = functools.partial(steppers.heun, S_churn=10)


class Counted(torch.nn.Module):
    """A network that notes the labels of every call."""

    def __init__(self, net):
        super().__init__()
        self.net, self.told = net, []
        self.eval()
        for name in ('img_channels', 'img_resolution', 'label_dim', 'sigma_min', 'sigma_max', 'units'):
            setattr(self, name, getattr(net, name))

    def forward(self, x, sigma, class_labels=None):
        self.told.append(class_labels)
        return self.net(x, sigma, class_labels)

    def unlabelled(self):
        return sum(labels is None for labels in self.told)


def note(value, calls):
    """A denoiser that gives a constant, and notes the levels it is called at."""
    def denoise(x, sigma):
        calls.append(float(sigma))
        return torch.full_like(x, value)
    denoise.round_sigma = lambda sigma: sigma
    denoise.outputs = lambda x, sigma: (denoise(x, sigma), x[:, :0])
    return denoise


def walk(sigmas, interval, stepper=steppers.heun, weight=2.0):
    """(levels of D_1's calls, levels of D_0's calls) of a guided walk down the levels."""
    main, guide = [], []
    x = torch.zeros([1, 1, 2, 2], dtype=torch.float64)
    stepper(Guided(note(1.0, main), note(0.0, guide), weight, interval), x, sigmas, torch.zeros_like)
    return main, guide


# --- what it computes

def test_only_the_first_channels_are_guided():
    """Those that are not are the conditional network's own, as in the published samplers of DiT, also with what else a network gives."""
    x = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    for channels, expected in ((1, [4.0, 1, 1, 1]), (3, [4.0, 4, 4, 1]), (None, [4.0] * 4), (4, [4.0] * 4)):
        led = Guided(note(1.0, []), note(0.0, []), 4.0, channels=channels)
        for D in (led(x, torch.tensor(1.0)), led.outputs(x, torch.tensor(1.0))[0]):
            assert D.dtype == torch.float64 and D[:, :, 0, 0].tolist() == [expected] * 2
    net = tiny(3, label_dim=2)
    plain, some, every = (all_images(net, range(2), num_steps=1, guidance=Guidance(weight, channels=channels))
                          for weight, channels in ((1.0, None), (3.0, 2), (3.0, None)))  # in one step D is the image
    assert torch.equal(some[:, :2], every[:, :2]) and torch.equal(some[:, 2:], plain[:, 2:]) and not torch.equal(plain, every)


def test_channels_that_are_not_there():
    for channels in (0, 4):
        with pytest.raises(ValueError, match=f'--guidance-channels={channels} must be between 1 and the 3 of the network'):
            guidance.check(tiny(3, label_dim=2), Guidance(2.0, channels=channels))


def test_gaussians():
    """p_c = N(m, 1), p_u = N(0, S^2): D_w is linear in x, with the slope and the offset that the formula gives."""
    m, S, w, sigma = 0.7, 2.0, 1.8, torch.tensor(0.6, dtype=torch.float64)
    D_c = lambda x, sigma: m + (x - m) / (1 + sigma ** 2)
    D_u = lambda x, sigma: x * S ** 2 / (S ** 2 + sigma ** 2)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    slope = w / (1 + 0.36) + (1 - w) * 4 / 4.36
    torch.testing.assert_close(Guided(D_c, D_u, w)(x, sigma), slope * x + w * m * 0.36 / 1.36, rtol=1e-12, atol=1e-12)


def test_weight_one_is_the_conditional_network():
    net = Counted(golden_network('edm_ddpmpp_cond_aug'))
    plain = all_images(net.net, range(3), stepper=CHURN)
    for options in (Guidance(), Guidance(1.0, (0.1, 5.0))):
        net.told.clear()
        assert torch.equal(all_images(net, range(3), stepper=CHURN, guidance=options), plain)
        assert net.unlabelled() == 0 and len(net.told) == 5


def test_the_whole_interval_is_plain_guidance():
    net = golden_network('edm_ddpmpp_cond_aug')
    plain = all_images(net, range(3), guidance=Guidance(2.5))
    for text in ('0,inf', 't:0,999'):
        assert torch.equal(all_images(net, range(3), guidance=Guidance(2.5, guidance.interval(text))), plain)
    assert not torch.equal(all_images(net, range(3)), plain)


def test_weight_zero_is_the_network_without_labels():
    net = golden_network('edm_ddpmpp_cond_aug')
    x, sigma = torch.randn([2, 3, 16, 16], generator=torch.Generator().manual_seed(0)).double(), torch.tensor(0.8).double()
    labels = torch.tensor([1, 2])
    found = guided(net, labels, Guidance(0.0))(x[..., :net.img_resolution, :net.img_resolution], sigma)
    expected = ConditionedDenoiser(net)(x[..., :net.img_resolution, :net.img_resolution], sigma)
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=0)


def test_autoguidance():
    """D_0 is another network with the same labels; one that equals D_1 changes nothing."""
    net, worse = tiny(3, label_dim=4), Counted(tiny(3, label_dim=4, key='worse'))
    labels, x, sigma = torch.tensor([3, 0]), torch.ones([2, 3, 8, 8]).double(), torch.tensor(0.5).double()
    found = guided(net, labels, Guidance(1.5, net=worse))(x, sigma)
    D_1, D_0 = (ConditionedDenoiser(of, labels)(x, sigma).double() for of in (net, worse.net))
    torch.testing.assert_close(found, D_0 + 1.5 * (D_1 - D_0), rtol=1e-12, atol=1e-12)
    assert worse.unlabelled() == 0 and torch.equal(worse.told[0][:2], torch.eye(4)[[3, 0]])
    assert torch.equal(all_images(net, range(3), guidance=Guidance(3.0, net=net)), all_images(net, range(3)))


def test_autoguidance_of_an_unconditional_network():
    net, worse = tiny(), tiny(key='worse')
    assert not torch.equal(all_images(net, range(2), guidance=Guidance(2.0, net=worse)), all_images(net, range(2)))


@pytest.mark.parametrize('labels', [torch.tensor([3, 0]), torch.eye(4)[[3, 0]]])
def test_an_unconditional_network_guides_a_conditional_one(labels):
    """As EDM2's published guiding network does; it is given no labels, whether these are classes or vectors."""
    net, worse = tiny(3, label_dim=4), tiny(3, key='worse')
    x, sigma = torch.ones([2, 3, 8, 8]).double(), torch.tensor(0.5).double()
    D_1, D_0 = ConditionedDenoiser(net, labels)(x, sigma).double(), ConditionedDenoiser(worse)(x, sigma).double()
    found = guided(net, labels, Guidance(1.5, net=worse))(x, sigma)
    torch.testing.assert_close(found, D_0 + 1.5 * (D_1 - D_0), rtol=1e-12, atol=1e-12)
    assert len(all_images(net, range(2), guidance=Guidance(2.0, net=worse))) == 2


@pytest.mark.parametrize('how', ['labels', 'gnet'])
def test_pixels_do_not_depend_on_the_batch(how, monkeypatch):
    monkeypatch.setattr(misc, 'CPU_ROWS', (4, 4))  # so that the images need several calls
    net = tiny(3, label_dim=3, size=16)
    options = Guidance(2.0, (0.05, 20.0), tiny(3, label_dim=3, size=16, key='worse') if how == 'gnet' else None)
    expected = all_images(net, range(11), batch=1, stepper=CHURN, guidance=options)
    for batch in (5, 64):
        assert torch.equal(all_images(net, range(11), batch=batch, stepper=CHURN, guidance=options), expected), batch


def test_what_else_the_network_gives_is_that_of_the_labelled_one():
    net, labels = tiny(1, label_dim=2, precond='iddpm'), torch.tensor([1, 0])
    x, sigma = torch.ones([2, 1, 8, 8]).double(), torch.tensor(0.5).double()
    D, rest = guided(net, labels, Guidance(2.0)).outputs(x, sigma)
    assert torch.equal(rest, ConditionedDenoiser(net, labels).outputs(x, sigma)[1]) and rest.shape == x.shape
    torch.testing.assert_close(D, guided(net, labels, Guidance(2.0))(x, sigma), rtol=0, atol=0)
    plain = ConditionedDenoiser(tiny()).outputs(x, sigma)
    assert plain[1].shape == (2, 0, 8, 8)


# --- when the guide is called

def inside(sigmas, low, high):
    return [i for i, level in enumerate(sigmas[:-1].tolist()) if low < level <= high]


@pytest.mark.parametrize('low, high, steps', [(0.189, 1.61, range(17, 23)), (0.598, 5.0, range(13, 20))])
def test_published_intervals(low, high, steps):
    """Of 32 steps, those that the published settings guide (Kynkäänniemi et al. 2024), with both evaluations of each."""
    sigmas = schedules.edm(32)
    assert inside(sigmas, low, high) == list(steps)
    main, guide = walk(sigmas, (low, high))
    assert len(main) == 63 and len(guide) == 2 * len(steps)
    assert guide == [level for i in steps for level in sigmas[i:i + 2].tolist()]


@pytest.mark.parametrize('low, high', [(0, math.inf), (0, 0.5), (0.3, 1), (30, 100), (90, 100), (0.0019, 0.0021)])
def test_calls_of_the_guide(low, high):
    sigmas = schedules.edm(18)
    steps = inside(sigmas, low, high)
    main, guide = walk(sigmas, (low, high))
    assert len(main) == 35 and len(guide) == 2 * len(steps) - (17 in steps)


@pytest.mark.parametrize('name', sorted(steppers.STEPPERS.keys() - {'heun'}))
def test_steppers_of_one_evaluation_a_step(name):
    sigmas = schedules.edm(18)
    main, guide = walk(sigmas, (0.3, 1.0), steppers.STEPPERS[name])
    assert main == sigmas[:-1].tolist() and guide == [main[i] for i in inside(sigmas, 0.3, 1.0)] != []


def test_churn_does_not_move_the_decision():
    """A step that starts at hi is guided, although churn raises it above."""
    sigmas = torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    for high, calls in ((4.0, 3), (3.9, 1)):
        _, guide = walk(sigmas, (0.0, high), functools.partial(steppers.heun, S_churn=0.9))
        assert len(guide) == calls, high


def test_outside_of_the_interval_the_network_is_called_once():
    net = Counted(tiny(label_dim=3))
    all_images(net, range(2), num_steps=18, guidance=Guidance(2.0, (0.3, 1.0)))
    assert net.unlabelled() == 2 * len(inside(schedules.edm(18), 0.3, 1.0)) > 0
    assert len(net.told) == 35 + net.unlabelled()


def test_without_a_word_of_the_stepper_the_level_of_the_call_decides():
    guide = []
    denoise = Guided(note(1.0, []), note(0.0, guide), 2.0, (0.5, 1.0))
    for level in (0.5, 0.6, 1.0, 1.1):
        denoise(torch.zeros(1), torch.tensor(level, dtype=torch.float64))
    assert guide == [0.6, 1.0]


# --- intervals

def test_indices_are_those_of_the_iddpm_networks():
    levels = tiny(precond='iddpm').u[:-1].double().flip(0)  # of t = 0 ... 999, rising
    assert len(levels) == guidance.LEVELS
    assert [guidance.index_at(level) for level in levels.tolist()] == list(range(1000))
    # Near t = 999 the networks clip alpha_bar; the rest are the schedule's own.
    exact = torch.tensor([guidance.level_at(t) for t in range(998)], dtype=torch.float64)
    torch.testing.assert_close(exact, levels[:998], rtol=1e-3, atol=0)


@pytest.mark.parametrize('low, high', [(0, 800), (100, 100), (500, 999), (0, 999)])
def test_interval_in_t(low, high):
    levels = tiny(precond='iddpm').u[:-1].double().flip(0)
    found = guidance.interval(f't:{low},{high}')
    assert [t for t, level in enumerate(levels.tolist()) if found[0] < level <= found[1]] == list(range(low, high + 1))
    assert (found[0] == 0) == (low == 0) and (found[1] == math.inf) == (high == 999)


def test_interval_in_sigma():
    assert guidance.interval('0.28,2.9') == (0.28, 2.9) and guidance.interval('0,inf') == (0, math.inf)
    assert guidance.describe(Guidance(2, (0.28, 2.9))) == 'guidance 2 where 0.28 < sigma <= 2.9 (t = 166 to 786 of 0 to 999)'
    assert guidance.describe(Guidance(2)) == 'guidance 2 at all levels'


@pytest.mark.parametrize('text', ['', '1', '2,1', '1,1', '-1,2', 'a,b', '0,nan', '1,2,3', 't:5,4', 't:0.5,3', 't:0,1000', 'x:1,2'])
def test_intervals_that_are_refused(text):
    with pytest.raises(ValueError, match='give lo,hi'):
        guidance.interval(text)


# --- what cannot be guided

@pytest.mark.parametrize('net, options, words', [
    (dict(), Guidance(2.0), 'unconditional'),
    (dict(label_dim=2), Guidance(-1.0), '0 or more'),
    (dict(label_dim=2), Guidance(math.nan), '0 or more'),
    (dict(label_dim=2), dict(label_dim=3), r'label_dim 3, and the network has 2'),
    (dict(), dict(label_dim=3), r'label_dim 3, and the network has 0'),
    (dict(label_dim=2), dict(channels=3, label_dim=2), r'images \[3, 8, 8\], and the network has \[1, 8, 8\]'),
    (dict(label_dim=2), dict(label_dim=2, units={'offset': 1, 'scale': 2}), 'units'),
])
def test_refused(net, options, words):
    options = Guidance(2.0, net=tiny(**options)) if isinstance(options, dict) else options
    with pytest.raises(ValueError, match=words):
        all_images(tiny(**net), [0], guidance=options)
