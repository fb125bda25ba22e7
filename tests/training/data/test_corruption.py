# SPDX-License-Identifier: Apache-2.0
"""Who is noisy, how noisy, with which noise: exact shares, white noise of the stated level, the published protocol."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dnnlib import UserError
from tests.support import GOLDEN
from training.data.corruption import Corruption

DATA = GOLDEN / 'dataset'
FACTS = json.loads((DATA / 'corruption_protocol.json').read_text())['facts']


def levels(corruption, count, shape=(3, 8, 8), native=0.0):
    return corruption.levels(np.arange(count), np.full(count, native), shape)


# ----------------------------------------------------------------------------------------------------
# Noise


def test_noise_is_unit_normal_and_white():
    """Std within 5 standard errors of 1 over 1.5 million values; autocorrelation at small shifts and between images is 0."""
    corruption = Corruption(sigma=0.2, probability=1.0, seed=3)
    noise = np.stack([corruption.noise(i, (3, 32, 32)) for i in range(500)]).astype(np.float64)
    error = 1 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 5 * error
    assert abs(noise.std() - 1) < 5 * error / np.sqrt(2)
    assert abs((noise ** 4).mean() - 3) < 5 * error * np.sqrt(96)
    for shift in ((0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 1), (0, 0, 0, 2)):
        assert abs((noise * np.roll(noise, shift, (0, 1, 2, 3))).mean()) < 5 * error, shift


def test_apply_brings_images_to_sigma_n():
    """Added noise has std sqrt(sigma_n^2 - native^2), that multiple of the image's unit noise; no clipping."""
    corruption = Corruption(sigma=0.5, probability=1.0)
    native = np.array([0.0, 0.3, 0.5, 0.7])
    sigma_n = corruption.levels(np.arange(4), native, (1, 64, 64))
    images = np.ones([4, 1, 64, 64], np.float32)
    added = corruption.apply(images, np.arange(4), native, sigma_n) - images
    for k, std in enumerate([0.5, 0.4, 0.0, 0.0]):
        np.testing.assert_allclose(added[k], std * corruption.noise(k, (1, 64, 64)), atol=1e-6)
        assert abs(added[k].std() - std) <= 5 * std / np.sqrt(2 * 64 * 64)
    assert (images == 1).all()
    assert added[0].max() > 1  # far outside [-1, 1]


def test_noise_is_a_function_of_seed_and_image_alone():
    """Equal over instances, order of calls and time; different for other seeds and images, seed and index swapped too."""
    shape = (2, 4, 6)
    a, b = Corruption(0.1, 1.0, seed=1), Corruption(0.7, 0.2, seed=1)
    later = [b.noise(i, shape) for i in (9, 2, 5)]
    np.testing.assert_array_equal(later[1], a.noise(2, shape))
    np.testing.assert_array_equal(a.noise(2, shape), a.noise(2, shape))
    assert a.noise(2, shape).dtype == np.float32
    distinct = {Corruption(1, 1, seed=s).noise(i, shape).tobytes() for s in range(6) for i in range(6)}
    assert len(distinct) == 36


def test_noise_is_pinned():
    """The values themselves: another numpy or another key would silently retrain on other noise."""
    first = Corruption(1, 1, seed=5).noise(7, (3, 32, 32)).ravel()[:4]
    np.testing.assert_allclose(first, [1.3912764, -0.27758887, -0.51260149, -0.7000668], rtol=1e-6)


def test_global_random_state_is_neither_read_nor_written():
    """Fault 2a.1: the published data set reseeds the global generators, so that all ranks draw the same noise."""
    for protocol in ('fixed', 'published'):
        corruption = Corruption(0.2, 0.5, protocol=protocol)
        np.random.seed(1)
        before = corruption.noise(3, (3, 8, 8))
        np.random.seed(2)
        state = np.random.get_state()[1].copy()
        np.testing.assert_array_equal(corruption.noise(3, (3, 8, 8)), before)
        levels(corruption, 50)
        np.testing.assert_array_equal(np.random.get_state()[1], state)


# ----------------------------------------------------------------------------------------------------
# Choice of images


@pytest.mark.parametrize('probability', [0, 0.1, 0.37, 0.5, 0.9, 1])
@pytest.mark.parametrize('count', [1, 7, 898, 5000])
def test_share_is_exact(probability, count):
    chosen = levels(Corruption(0.2, probability, seed=4), count) > 0
    assert chosen.sum() == round(probability * count)


def test_choice_does_not_depend_on_the_image_shape():
    """Fault 2a.9: the published choice is drawn after C*H*W others, so that it changes with the shape of the images."""
    fixed, published = Corruption(0.2, 0.5), Corruption(0.2, 0.5, protocol='published')
    np.testing.assert_array_equal(levels(fixed, 200, (3, 8, 8)), levels(fixed, 200, (1, 64, 64)))
    assert (levels(published, 200, (3, 8, 8)) != levels(published, 200, (1, 64, 64))).any()


def test_choice_follows_the_seed_and_is_unbiased():
    """Over seeds each image is chosen with the stated probability; a larger probability only adds images."""
    counts = sum(levels(Corruption(0.2, 0.3, seed=s), 100) > 0 for s in range(400))
    assert np.abs(counts / 400 - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 400)
    few, many = (levels(Corruption(0.2, p, seed=9), 100) > 0 for p in (0.3, 0.6))
    assert (many >= few).all() and many.sum() > few.sum()


def test_a_flipped_copy_shares_the_membership_of_its_image():
    """Fault 2a.7: with x-flip an image must not be clean in one copy and noisy in the other."""
    corruption, kept = Corruption(0.2, 0.5, seed=2), np.array([1, 4, 5, 8, 11, 30])
    doubled = corruption.levels(np.tile(kept, 2), np.zeros(12), (1, 8, 8))
    np.testing.assert_array_equal(doubled[:6], doubled[6:])
    np.testing.assert_array_equal(doubled[:6], corruption.levels(kept, np.zeros(6), (1, 8, 8)))
    assert (doubled > 0).sum() == 6


def test_natively_noisy_images_are_brought_up_never_down():
    native = np.array([0.0, 0.1, 0.3])
    np.testing.assert_array_equal(Corruption(0.2, 1.0).levels(np.arange(3), native, (1, 2, 2)), [0.2, 0.2, 0.3])
    np.testing.assert_array_equal(Corruption(0.0, 1.0).levels(np.arange(3), native, (1, 2, 2)), native)
    np.testing.assert_array_equal(Corruption(0.2, 0.0).levels(np.arange(3), native, (1, 2, 2)), native)


# ----------------------------------------------------------------------------------------------------
# The published protocol


@pytest.mark.parametrize('fact', FACTS)
def test_published_membership_and_noise(fact):
    corruption = Corruption(fact['sigma'], fact['corruption_probability_per_image'], protocol='published')
    chosen = np.flatnonzero(levels(corruption, 20, fact['shape']))
    assert chosen.tolist() == fact['corrupted_raw_idx']
    for index, values in fact['noise_first5'].items():
        np.testing.assert_array_equal(corruption.noise(int(index), fact['shape']).ravel()[:5], values)


def test_published_noise_arrays():
    golden = load_file(DATA / 'corruption_3x8x8.safetensors')
    corruption = Corruption(0.2, 0.5, protocol='published')
    np.testing.assert_array_equal(levels(corruption, 20), golden['sigma_p'])
    for i in np.flatnonzero(golden['sigma_p']):
        np.testing.assert_array_equal(corruption.noise(i, (3, 8, 8)), golden['noise_p'][i])


# ----------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize('options, option', [
    ({'sigma': -0.1}, '--sigma=-0.1'), ({'sigma': float('nan')}, '--sigma=nan'), ({'sigma': float('inf')}, '--sigma=inf'),
    ({'probability': 1.5}, '--corruption-probability=1.5'), ({'probability': -0.1}, '--corruption-probability=-0.1'),
    ({'probability': float('nan')}, '--corruption-probability=nan'), ({'seed': -1}, '--corruption-seed=-1'),
    ({'protocol': 'none'}, 'choose from fixed, published'), ({'protocol': 'published', 'seed': 1}, 'leave it at 0')])
def test_options_out_of_range_are_one_line(options, option):
    with pytest.raises(UserError) as error:
        Corruption(**options)
    assert option in error.value.message and '\n' not in error.value.message


# ----------------------------------------------------------------------------------------------------
# sigma_min as noise


def test_sigma_min_as_a_limit_leaves_everything_as_it_is():
    found = Corruption().beyond_sigma_min([0.1, 0.2], [0.5, np.inf], [1.0, np.inf])
    assert [column.tolist() for column in found] == [[0.1, 0.2], [0.5, np.inf]]


def test_sigma_min_as_noise_raises_the_level_and_limits_nothing_any_more():
    """Images of a higher level of their own stay there; infinite limits, above which nothing is, stay limits."""
    corruption = Corruption(sigma_min_as='noise')
    sigma_n, sigma_min = corruption.beyond_sigma_min([0.1, 0.9, 0.2, 0.3], [0.5, 0.5, 0, np.inf], [np.inf, np.inf, 0.4, np.inf])
    assert sigma_n.tolist() == [0.5, 0.9, 0.2, 0.3] and sigma_min.tolist() == [0, 0, 0, np.inf]
    noisy = corruption.apply(np.zeros([4, 3, 64, 64], np.float32), np.arange(4), [0.1, 0.9, 0.2, 0.3], sigma_n)
    assert noisy[0].std() == pytest.approx(0.24 ** 0.5, rel=0.03) and not noisy[1:].any()  # 0.5^2 - 0.1^2


def test_sigma_min_as_noise_is_refused_for_images_with_both_limits():
    with pytest.raises(UserError, match='--sigma-min-as=noise: 1 of 3 images also have a sigma_max') as err:
        Corruption(sigma_min_as='noise').beyond_sigma_min([0, 0, 0], [0.5, 0, 0.5], [0.2, 0.2, np.inf])
    assert '\n' not in err.value.message
    with pytest.raises(UserError, match='--sigma-min-as=both: choose from limit, noise'):
        Corruption(sigma_min_as='both')
