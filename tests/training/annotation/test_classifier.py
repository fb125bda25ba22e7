# SPDX-License-Identifier: Apache-2.0
"""The classifier: never better than theory on Gaussian fields, near it after some training, blind where there is nothing to see."""

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.training.annotation import fields
from training.annotation import calibration, classifier, thresholds

SMALL = 'half_unet:cbase=8,cres=1,blocks=1,attn=0,dropout=0'
CUT = 4


def run(clean, data, kimg, levels, arch=SMALL, seed=0, lr=1e-2):
    """Held-out logits (of clean images [N, L], of others [M, L, 1]) of one classifier, trained on the first half of each set."""
    halves = [np.split(np.arange(len(images)), 2) for images in (clean, data)]
    recipe = classifier.Recipe(arch, kimg, 64, lr, seed)
    read = lambda images: lambda rows: images[torch.from_numpy(rows)]
    native = np.zeros(max(len(clean), len(data)))
    net = classifier.train(read(clean), read(data), tuple(half[0] for half in halves), native, (levels[0], levels[-1]), clean.shape[1:],
                           recipe)
    return [classifier.label(net, read(images), half[1], native, levels, name=name, seed=seed)
            for images, half, name in zip((clean, data), halves, ('clean', 'data'))]


def limit(clean, data, levels):
    found = calibration.probabilities(data, calibration.calibrate(clean[..., 0], data))
    return thresholds.crossing(levels, thresholds.isotonic(found.mean(0)[None]), 0.45)[0]


@pytest.mark.parametrize('kimg, arch, tolerance', [
    (12, SMALL, 0.6), pytest.param(80, 'half_unet:cbase=16,cres=1|2,blocks=1,attn=4,dropout=0', 0.3, marks=pytest.mark.slow)])
def test_gaussian_fields(kimg, arch, tolerance):
    p, f = fields.power(8)
    q = p * np.exp(-np.square(f / CUT))
    levels = np.geomspace(0.1, 6, 12)
    count = 800 if kimg < 50 else 3000
    clean, data = run(fields.fields(count, p), fields.fields(count, q, 1), kimg, levels, arch, lr=1e-2 if kimg < 50 else 4e-3)
    areas = calibration.area(clean[..., 0], data[..., 0])
    best = np.array([fields.best_area(p, q, sigma) for sigma in levels])
    weak = np.array([fields.kl(p, q, sigma) < 1 for sigma in levels])
    assert weak.any() and (areas[weak] <= best[weak] + 0.03).all()
    assert areas[0] > 0.8
    assert limit(clean, data, levels) == pytest.approx(fields.theory(p, q), rel=tolerance)


@pytest.mark.slow
def test_clean_against_clean():
    images = fields.network(fields.digits())
    levels = np.geomspace(0.05, 6, 12)
    clean, data = run(images[:898], images[898:1796], 60, levels, 'half_unet:cbase=16,cres=1|2,blocks=1,attn=4')
    assert np.abs(calibration.area(clean[..., 0], data[..., 0]).mean() - 0.5) <= 0.03
    assert limit(clean, data, levels) == 0


def test_labels_depend_on_seed_name_and_row_alone():
    p, _ = fields.power(8)
    images, levels, native = fields.fields(9, p), np.geomspace(0.1, 6, 5), np.zeros(9)
    net = classifier.build(SMALL, images.shape[1:], 0, 0).eval()
    torch.nn.init.normal_(net.logit.weight, generator=torch.Generator().manual_seed(0))
    read = lambda rows: images[torch.from_numpy(rows)]
    label = lambda rows, **more: classifier.label(net, read, np.array(rows), native, levels, **{'name': 'data', 'draws': 2, **more})
    whole = label(range(9), batch=1)
    assert whole.shape == (9, 5, 2) and np.array_equal(whole, label(range(9), batch=10_000))
    assert np.array_equal(whole[[7, 2, 3]], label([7, 2, 3]))
    assert not np.array_equal(whole, label(range(9), seed=1)) and not np.array_equal(whole, label(range(9), name='clean'))


def test_images_are_brought_to_the_level_from_the_noise_that_they_carry():
    images, levels = torch.ones(400, 1, 2, 2), np.array([0.5])
    class Seen(torch.nn.Module):
        def forward(self, x, noise_labels):
            assert noise_labels[0].item() == pytest.approx(np.log(0.5) / 4)
            return (x / (0.5 ** 2 + 0.25) ** -0.5)[:, 0, 0, 0]
    for native in (0.0, 0.3, 0.5):
        x = classifier.label(Seen(), lambda rows: images[torch.from_numpy(rows)], np.arange(400), np.full(400, native), levels, name='data')
        assert x.std() == pytest.approx((0.25 - native ** 2) ** 0.5, rel=0.15, abs=1e-6) and x.mean() == pytest.approx(1, abs=0.08)


def test_the_network_is_the_encoder():
    net = classifier.build('half_unet:cbase=8,cres=1|2,blocks=1,attn=4', (3, 8, 8), 0, 0)
    assert not hasattr(net, 'dec') and not [name for name, _ in net.named_parameters() if name.startswith('dec')]
    found = net(torch.zeros(5, 3, 8, 8), torch.zeros(5))
    assert found.shape == (5,) and all(p.grad is not None for p in _backward(net, found))
    same = classifier.build('half_unet:cbase=8,cres=1|2,blocks=1,attn=4', (3, 8, 8), 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), same.parameters()))
    with pytest.raises(UserError, match='--arch=half_unet:cres=1|2|2|2: images of 6x6 cannot be halved'):
        classifier.build('half_unet:cres=1|2|2|2', (3, 6, 6), 0, 0)


def _backward(net, found):
    found.sum().backward()
    return list(net.parameters())
