# SPDX-License-Identifier: Apache-2.0
"""Denoising Gaussian data: mean, spread and intervals against the closed form, and what must not change them."""

import math

import pytest
import torch

from tests.support import archs
from tests.support.denoisers import unit
from tests.support.gaussian import GaussianNet
from torch_utils import misc
from training.restoration import quality
from training.restoration.posterior import Method, Noisy, estimates

V = 0.25
LARGE = (1, 40, 40)  # one image of many values takes less time than many images


def noisy(count, *levels, shape=(1, 4, 4), actual=1.0):
    """(x_0 [N,C,H,W], [Noisy]): images of N(0, V) with noise of `actual` times the stated levels, in turn."""
    x_0 = math.sqrt(V) * unit(count, *shape)
    sigma = torch.tensor(levels).repeat(-(-count // len(levels)))[:count]
    y = x_0 + actual * sigma.reshape(-1, 1, 1, 1) * unit(count, *shape, seed=1)
    return x_0, [Noisy(7 + i, y[i], float(sigma[i]), None) for i in range(count)]


def means(found):
    return torch.stack([torch.from_numpy(one.mean) for one in found])


def test_mean_in_one_evaluation():
    _, images = noisy(9, 0.2, 0.4, 0.8)
    for one, found in zip(images, estimates(GaussianNet(), images, Method())):
        assert found.index == one.index and found.std is None and found.samples is None
        torch.testing.assert_close(torch.from_numpy(found.mean), (V / (V + one.sigma ** 2) * one.image).float())


def test_samples_have_the_posteriors_mean_and_spread():
    """N(a y, a sigma^2), a = V / (V + sigma^2), in each image from its own level. 3,200 values of 8 samples: the mean's standard error is
    0.6 % of the spread, that of the spread 0.5 %; 18 steps are within 1 % of the spread."""
    _, images = noisy(4, 0.2, 0.6, shape=LARGE)
    found = list(estimates(GaussianNet(LARGE), images, Method(samples=8)))
    for level in (0.2, 0.6):
        mine = [k for k, one in enumerate(images) if one.sigma == pytest.approx(level)]
        a = V / (V + level ** 2)
        away = means([found[k] for k in mine]) - a * torch.stack([images[k].image for k in mine])
        spread = level * math.sqrt(a)
        assert abs(away.mean()) < 0.03 * spread and away.std() == pytest.approx(spread / math.sqrt(8), rel=0.05)
        variance = torch.stack([torch.from_numpy(found[k].std) for k in mine]).square().mean()
        assert variance.sqrt() == pytest.approx(spread, rel=0.03)


@pytest.mark.parametrize('samples', [2, 8])
def test_stated_intervals_hold(samples):
    """90 +- 2 %. 9,600 values: standard error 0.3 %, so that a coverage beyond 87 to 93 % fails with probability above 0.99; spreads that
    are 10 % off have 86.9 or 92.4 %."""
    x_0, images = noisy(6, 0.2, 0.6, 1.2, shape=LARGE)
    found = estimates(GaussianNet(LARGE), images, Method(samples=samples))
    held = [quality.coverage(one.mean, one.std, x, samples) for one, x in zip(found, x_0.numpy())]
    assert sum(held) / len(held) == pytest.approx(0.9, abs=0.02)


def test_checks_without_a_reference():
    """The noise that is found is 1 where the stated level is right; the samples agree with E[x_0 | y] in their standard errors."""
    _, images = noisy(2, 0.6, shape=LARGE)
    found = list(estimates(GaussianNet(LARGE), images, Method(samples=8)))
    mean = lambda name: sum(getattr(one, name) for one in found) / len(found)
    assert mean('noise') == pytest.approx(1, abs=0.03) and mean('apart') == pytest.approx(1, abs=0.1)
    _, wrong = noisy(2, 0.6, shape=LARGE, actual=2.0)
    found = list(estimates(GaussianNet(LARGE), wrong, Method(samples=8)))
    assert mean('noise') > 1.3


def test_one_sample_has_no_spread():
    _, images = noisy(2, 0.4)
    found = list(estimates(GaussianNet(), images, Method(samples=1, keep=True)))
    assert all(one.std is None and one.apart is None for one in found)
    assert all((one.samples[0] == one.mean).all() for one in found)


@pytest.mark.parametrize('samples', [0, 3])
def test_results_do_not_depend_on_the_batch_or_the_other_images(samples, monkeypatch):
    """Bit for bit, on a real network."""
    monkeypatch.setattr(misc, 'CPU_ROWS', (2, 2))  # so that the images need several calls
    net = archs.network('dit', img_channels=1, label_dim=0)
    _, images = noisy(5, 0.2, 0.4, shape=(1, 8, 8))
    method = Method(samples=samples, steps=3, keep=bool(samples))
    whole = list(estimates(net, images, method))
    for other in (estimates(net, images, method._replace(batch=2)), [next(estimates(net, [one], method)) for one in images]):
        for a, b in zip(whole, other):
            assert (a.mean == b.mean).all() and (not samples or (a.std == b.std).all() and (a.samples == b.samples).all())


def test_draws_belong_to_seed_image_and_sample():
    _, images = noisy(2, 0.4)
    same = [images[0], images[1]._replace(image=images[0].image)]
    draw = lambda part, **more: [one.samples for one in estimates(GaussianNet(), part, Method(samples=2, steps=4, keep=True, **more))]
    first, second = draw(same)
    assert (first[0] != first[1]).all() and (first != second).all() and (first != draw(same, seed=1)[0]).all()
    assert (draw(same[:1])[0] == first).all()


def test_labels_reach_the_network():
    net = GaussianNet(label_dim=2)
    _, images = noisy(3, 0.4)
    images = [one._replace(label=torch.eye(2)[k % 2]) for k, one in enumerate(images)]
    list(estimates(net, images, Method(samples=2, steps=2)))
    assert all(torch.equal(labels[:2], torch.eye(2)) or torch.equal(labels[:2], torch.eye(2)[[0, 0]]) for labels in net.labels)
