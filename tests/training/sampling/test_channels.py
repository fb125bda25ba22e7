# SPDX-License-Identifier: Apache-2.0
"""Colours of samples against the data's: raised for what can be seen, silent for what sampling explains, and silent without statistics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.denoisers import unit
from training.sampling.channels import Channels, checked, moments, statistics

DATA = dict(count=2000, seed=1)


def images(count, seed, shift=0.0, contrast=1.0, channels=3):
    """Images in [-1,1] with a brightness of their own, as photographs have: std 0.25 between images, 0.35 within."""
    brightness = 0.25 * unit(count, channels, 1, 1, seed=2 * seed)
    return (-0.2 + shift + brightness + 0.35 * contrast * unit(count, channels, 6, 6, seed=2 * seed + 1)).clamp(-1, 1)


def net(statistics, channels=3, label_dim=0, units=None):
    return SimpleNamespace(data_statistics=statistics, img_channels=channels, label_dim=label_dim, units=units)


@pytest.fixture(scope='module')
def data():
    return statistics(*moments(images(**DATA)))


def warning(data, samples, **options):
    channels = Channels(net(data), **options)
    for part in samples.split(24):
        channels.take(part)
    return channels.warning()


def test_statistics_are_those_of_the_pixels(data):
    pixels = images(**DATA)
    torch.testing.assert_close(torch.tensor(data['mean'], dtype=torch.float64), pixels.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(torch.tensor(data['std'], dtype=torch.float64), pixels.std(dim=(0, 2, 3), correction=0))
    torch.testing.assert_close(torch.tensor(data['image_mean_std'], dtype=torch.float64), pixels.mean(dim=(2, 3)).std(0, correction=0))
    assert data['num_images'] == 2000 and data['classes'] == 'as they are'


def test_every_class_counts_alike():
    """1,000 black images of one class and 10 white ones of another: grey, as samples of uniform classes are."""
    parts = torch.full([1010, 1, 4, 4], -1.0)
    parts[1000:] = 1
    classes = (torch.arange(1010) >= 1000).long()
    found = statistics(*moments(parts), classes)
    assert found['mean'] == pytest.approx([0], abs=1e-12) and found['std'] == pytest.approx([1]) and found['classes'] == 'balanced'


@pytest.mark.parametrize('count', [16, 64])
def test_good_samples_raise_no_alarm_over_many_seeds(data, count):
    """1,000 sets: at 6 standard errors and a visible difference none is expected in 10^7."""
    assert not [seed for seed in range(1000) if warning(data, images(count, 10 + seed))]


@pytest.mark.parametrize('options, words', [
    (dict(shift=-0.5), 'has mean -0.6'), (dict(shift=0.5), 'has mean 0.'), (dict(contrast=0.2), 'has std 0.'),
    (dict(contrast=2.5), 'has std 0.')])
def test_dark_white_and_flat_samples_raise_it_in_every_seed(data, options, words):
    for seed in range(40):
        line = warning(data, images(64, 10 + seed, **options))
        assert line and words in line and line.startswith('the colours of 64 samples') and 'channel 2' in line, line


def test_one_wrong_channel_is_named(data):
    samples = images(64, 5)
    samples[:, 1] -= 0.5
    line = warning(data, samples)
    assert 'channel 1' in line and 'channel 0' not in line and 'channel 2' not in line


def test_many_images_do_not_make_a_small_difference_an_alarm(data):
    """A difference of 0.05 is beyond doubt with 5,000 images, and not to be seen."""
    assert warning(data, images(5000, 3, shift=0.05)) is None


def test_nothing_is_said_where_nothing_is_known(data):
    dark = images(64, 5, shift=-0.5)
    assert warning(None, dark) is None and not Channels(net(None)).fields()
    assert warning(data, dark[:15]) is None  # too few
    assert warning(data, dark, stop_sigma=0.3) is None  # samples that are noisy on purpose
    for found, options in [(data, {}), ({**data, 'classes': 'balanced'}, dict(class_idx=1)),
                           ({**data, 'classes': 'balanced'}, dict(labels='dataset:x.zip'))]:
        labelled = Channels(net(found, label_dim=3), **options)
        labelled.take(dark)
        assert labelled.warning() is None
    labelled = Channels(net({**data, 'classes': 'balanced'}, label_dim=3), labels='uniform')
    labelled.take(dark)
    assert labelled.warning()


@pytest.mark.parametrize('broken', [None, [], {}, {'mean': [0]}, 'x', {'mean': 'abc', 'std': [1, 1, 1]}, float('nan')])
def test_other_peoples_statistics_decide_nothing(data, broken):
    assert checked(broken, 3) is None and checked(data, 1) is None and checked(data, 3) is data
    assert checked({**data, 'std': [float('nan')] * 3}, 3) is None and checked({**data, 'num_images': 0}, 3) is None


def test_fields_are_of_what_is_written(data):
    """Within [-1,1], as 8-bit images; those that are no numbers are left out."""
    channels = Channels(net(data))
    samples = torch.full([4, 3, 2, 2], -7.0)
    samples[3] = np.nan
    channels.take(samples)
    found = channels.fields()
    assert found['Samples/num_images'] == 3 and found['Samples/mean_1'] == -1 and found['Samples/std_2'] == 0
