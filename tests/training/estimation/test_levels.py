# SPDX-License-Identifier: Apache-2.0
"""Levels of white noise on images whose noise is known: single images, pooled, against clean images, from pairs and dark frames."""

import numpy as np
import pytest

from tests.support.fields import smooth
from training.estimation import clipping, single, spectral, wrong_level
from training.estimation.pooled import PatchCovariances, balanced, choose, pooled


def noise(images, level, seed=1):
    return (images + level * np.random.default_rng(seed).standard_normal(images.shape)).astype(np.float32)


def eight_bits(images):
    return (np.rint((images.clip(-1, 1) + 1) * 127.5) / 127.5 - 1).astype(np.float32)


@pytest.mark.parametrize('name', single.SINGLE)
def test_single_images(name):
    levels, errors = single.SINGLE[name](noise(np.zeros((80, 3, 32, 32), np.float32), 0.2))
    assert levels.mean() == pytest.approx(0.2, rel=0.04)
    assert levels.std() == pytest.approx(errors.mean(), rel=0.3)  # the uncertainty is that of one image
    assert single.SINGLE[name](noise(smooth(40), 0.1))[0].mean() == pytest.approx(0.1, rel=0.08)


@pytest.mark.parametrize('name', single.SINGLE)
def test_single_refuses_what_is_too_small(name):
    with pytest.raises(ValueError, match='pixels or more'):
        single.SINGLE[name](np.zeros((2, 1, 2, 2), np.float32))


def test_mad_agrees_with_scikit_image():
    restoration = pytest.importorskip('skimage.restoration')
    pytest.importorskip('pywt')
    images = noise(smooth(5, (3, 33, 24)), 0.1)
    images[0, :, 5:15] = 0  # details of exactly 0 are left out
    expected = [restoration.estimate_sigma(image, channel_axis=0, average_sigmas=True) for image in images]
    assert single.mad(images)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('clipped', [False, True])
@pytest.mark.parametrize('level', [0.05, 0.2, 0.4])
def test_pooled(level, clipped):
    images = noise(smooth(150), level)
    found = pooled(eight_bits(images) if clipped else images)
    assert found.sigma == pytest.approx(level, rel=0.025)
    assert abs(found.sigma - level) < 3 * found.uncertainty + 0.003 * level
    assert not found.clean and not found.coloured
    assert (found.correction > 1.005) == clipped


def test_pooled_digits():
    """Images of one patch, most of whose pixels are at the end of the range: clipping takes away two thirds of the variance there."""
    digits = pytest.importorskip('sklearn.datasets').load_digits().images[:, None] / 8 - 1
    found = pooled(eight_bits(noise(digits, 0.1)))
    assert found.sigma == pytest.approx(0.1, rel=0.05)
    assert 1.5 < found.correction < 2
    assert pooled(digits.astype(np.float32)).clean


def test_pooled_digits_with_much_noise():
    """The eigenvalues alone read 9 % too much in these draws, and the pixels that never vary bound the level; but not where a border
    without noise was added to noisy images."""
    digits = pytest.importorskip('sklearn.datasets').load_digits().images[:, None] / 8 - 1
    assert np.mean([pooled(eight_bits(noise(digits, 0.4, seed))).sigma for seed in (6, 10, 11)]) == pytest.approx(0.4, rel=0.03)
    framed = noise(0 * digits, 0.2)
    framed[:, :, [0, -1]] = framed[:, :, :, [0, -1]] = 0.5
    found = pooled(framed.astype(np.float32))
    assert found.uneven and found.sigma > 0.1


def test_clean_images_read_as_clean():
    found = pooled(eight_bits(smooth(150)))
    assert found.clean and found.sigma < found.floor


def test_coloured_noise_has_no_level():
    rng = np.random.default_rng(4)
    white = rng.standard_normal((200, 3, 33, 33))
    soft = (white[..., 1:, 1:] + white[..., :-1, 1:] + white[..., 1:, :-1] + white[..., :-1, :-1]) / 2  # of std 1, and 0 at the top
    found = pooled((smooth(200) + 0.2 * soft).astype(np.float32))
    assert found.uneven and found.sigma < 0.1


def test_pooled_in_parts_and_too_few():
    images = noise(smooth(40), 0.1)
    parts = PatchCovariances(images.shape[1:], len(images))
    for first in range(0, 40, 8):  # a part of each fold
        parts.add(images[first:first + 8])
    assert parts.estimate().sigma == pytest.approx(pooled(images).sigma, rel=1e-5)
    with pytest.raises(ValueError, match='3 images of 32x32 pixels are too few to be pooled: 8 or more'):
        pooled(images[:3])
    with pytest.raises(ValueError, match='constant'):
        pooled(np.full((50, 1, 16, 16), 0.5, np.float32))
    assert choose((3, 32, 32), 1000) == (8, 3) and choose((3, 16, 16), 20)[0] < 8


def test_largest_patch_counts_are_bounded():
    assert PatchCovariances((3, 256, 256), 100_000).stride > 16


def test_balanced_drops_the_signal():
    values = np.sort(np.concatenate([np.random.default_rng(0).normal(1, 0.01, 40), [3, 10, 50.0]]))
    mean, number = balanced(values, 10 ** 6)
    assert mean == pytest.approx(1, abs=0.01) and 35 <= number <= 40


def test_clipping_of_known_values():
    """The variance that is left of clipped noise, by simulation, at a value near the end and over a range."""
    rng = np.random.default_rng(0)
    for values in (np.full(200_000, -1.0), np.full(200_000, 0.7), np.linspace(-1, 1, 200_000)):
        seen = eight_bits(values + 0.3 * rng.standard_normal(len(values)))
        middle = np.clip(values[::1000, None] + 0.3 * np.linspace(-4, 4, 401), -1, 1)
        law = np.exp(-np.linspace(-4, 4, 401) ** 2 / 2)
        law /= law.sum()
        truth = (middle ** 2 @ law - (middle @ law) ** 2).mean() / 0.09
        shares = clipping.histogram(seen[None])
        assert clipping.left(shares, 0.3)[0] == pytest.approx(truth, abs=0.01)
        measured = 0.3 * np.sqrt(truth)
        assert clipping.corrected(np.array([measured]), shares)[0] == pytest.approx(0.3, rel=0.02)
    assert clipping.share(np.array([[1.5, -1.0]])) == 0


def test_against_clean_images():
    first, second = smooth(300, (1, 32, 32)), smooth(300, (1, 32, 32), seed=8)
    clean = spectral.Spectra((1, 32, 32))
    clean.add(second)
    for level in (0.1, 0.2):
        noisy = spectral.Spectra((1, 32, 32))
        noisy.add(noise(first, level))
        found, white = spectral.against_clean(noisy, clean)
        assert found.sigma == pytest.approx(level, rel=0.02)
        assert white.white and white.p > 1e-3
    same = spectral.Spectra((1, 32, 32))
    same.add(first)
    assert spectral.against_clean(same, clean)[0].clean


def test_pairs_are_unbiased_and_their_uncertainty_is_right():
    ratios = []
    for seed in range(30):
        both = np.random.default_rng(seed).standard_normal((2, 20, 1, 16, 16)) * 0.1
        spectra = spectral.Spectra((1, 16, 16))
        spectra.add((both[0] - both[1]) / 2 ** 0.5)
        found, _ = spectral.of_noise(spectra, 'pairs')
        ratios.append((found.sigma - 0.1) / found.uncertainty)
    assert abs(np.mean(ratios)) < 0.7 and 0.6 < np.std(ratios) < 1.5


def test_too_few_for_a_spectrum():
    spectra = spectral.Spectra((1, 16, 16))
    spectra.add(np.ones((3, 1, 16, 16), np.float32))
    with pytest.raises(ValueError, match='3 images are too few'):
        spectral.of_noise(spectra, 'pairs')


def test_what_remains_of_an_understated_level():
    assert wrong_level.remaining(0.2, 0.18) == pytest.approx(0.44 * 0.2, abs=1e-3)
    assert wrong_level.remaining(0.2, 0.22) == 0
    assert wrong_level.shifted(1.1547 * 0.18, 0.2, 0.18) / (1.1547 * 0.18) == pytest.approx(1.084, abs=2e-3)
