# SPDX-License-Identifier: Apache-2.0
"""Wrong labels: an exact count, never the own class, by class prior or within groups, fixed per image."""

import numpy as np
import pytest
import scipy.stats

from dnnlib import UserError
from training.data.corruption import LabelCorruption

SHARES = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def labels_of(n, seed=0):
    return np.random.default_rng(seed).choice(5, n, p=SHARES)


def corrupted(labels, rate=0.1, seed=0, groups=None, raw_idx=None):
    return LabelCorruption(rate, seed, groups).apply(labels, np.arange(len(labels)) if raw_idx is None else raw_idx)


@pytest.mark.parametrize('rate', [0, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.777, 1])
@pytest.mark.parametrize('n', [10, 1797, 20_000])
def test_the_count_is_exact_and_no_label_stays_its_own(rate, n):
    labels = labels_of(n)
    changed = corrupted(labels, rate) != labels
    assert changed.sum() == round(rate * n)  # each relabelled image counts only if its label differs
    assert set(corrupted(labels, rate)) <= set(labels)


def test_new_classes_follow_the_prior_of_the_others():
    """Symmetric: p(c | y) = p(c) / (1 - p(y)) over 200,000 flips."""
    labels = labels_of(200_000)
    new, prior = corrupted(labels, rate=1.0), np.bincount(labels) / len(labels)
    for own in range(5):
        expected = np.where(np.arange(5) == own, 0, prior)
        counts = np.bincount(new[labels == own], minlength=5)
        others = np.arange(5) != own
        assert counts[own] == 0
        assert scipy.stats.chisquare(counts[others], expected[others] / expected.sum() * counts.sum()).pvalue > 1e-6


def test_the_choice_of_images_does_not_depend_on_their_class():
    labels = labels_of(100_000)
    changed = corrupted(labels, rate=0.2) != labels
    counts = np.bincount(labels[changed], minlength=5)
    assert scipy.stats.chisquare(counts, np.bincount(labels) * 0.2).pvalue > 1e-6


def test_groups_confuse_their_members_only():
    labels, groups = labels_of(50_000), [[0, 3], [1, 2]]
    new = corrupted(labels, rate=0.5, groups=groups)
    assert (new != labels).sum() == 25_000
    partner = np.array([3, 2, 1, 0, 4])
    changed = new != labels
    np.testing.assert_array_equal(new[changed], partner[labels[changed]])
    assert not changed[labels == 4].any()
    # Within a group of three, by the prior.
    new = corrupted(labels, rate=0.5, groups=[[0, 2, 4]])
    from_0 = np.bincount(new[(labels == 0) & (new != labels)], minlength=5)
    prior = np.bincount(labels)[[2, 4]]
    assert from_0[[0, 1, 3]].sum() == 0
    assert scipy.stats.chisquare(from_0[[2, 4]], prior / prior.sum() * from_0.sum()).pvalue > 1e-6


def test_labels_are_fixed_per_image():
    """The same in every call and order; x-flips share the fate of their image; a seed makes another choice."""
    labels = labels_of(3000)
    straight = corrupted(labels, rate=0.3, seed=5)
    np.testing.assert_array_equal(straight, corrupted(labels, rate=0.3, seed=5))
    order = np.random.default_rng(1).permutation(3000)
    np.testing.assert_array_equal(corrupted(labels[order], 0.3, 5, raw_idx=order), straight[order])
    doubled = corrupted(np.tile(labels, 2), 0.3, 5, raw_idx=np.tile(np.arange(3000), 2))
    np.testing.assert_array_equal(doubled, np.tile(straight, 2))
    other = corrupted(labels, rate=0.3, seed=6)
    overlap = ((other != labels) & (straight != labels)).sum()
    assert abs(overlap - 270) < 5 * np.sqrt(3000 * 0.09 * 0.91)


def test_a_higher_rate_only_adds():
    labels = labels_of(5000)
    few, many = corrupted(labels, 0.05), corrupted(labels, 0.2)
    np.testing.assert_array_equal(many[few != labels], few[few != labels])


def test_raw_indices_may_have_gaps_and_the_input_is_left_alone():
    labels, kept = np.array([0, 1, 0, 1]), np.array([3, 70, 900, 5])
    new = corrupted(labels, rate=0.5, raw_idx=kept)
    assert (new != labels).sum() == 2 and new.dtype == np.int64
    np.testing.assert_array_equal(labels, [0, 1, 0, 1])


def test_no_global_random_state():
    state = np.random.get_state()[1].copy()
    corrupted(labels_of(100), rate=0.5)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize('options, said', [
    ({'rate': 1.5}, '--label-corruption=1.5'), ({'rate': -0.1}, '--label-corruption=-0.1'), ({'rate': float('nan')}, '=nan'),
    ({'seed': -1}, '--corruption-seed=-1'), ({'groups': [[0, 1], [1, 2]]}, 'at most one group'),
    ({'groups': [[0, 0]]}, 'at most one group'), ({'groups': [[-1, 2]]}, 'whole numbers from 0')])
def test_options_out_of_range_are_one_line(options, said):
    with pytest.raises(UserError) as error:
        LabelCorruption(**options)
    assert said in error.value.message and '\n' not in error.value.message


@pytest.mark.parametrize('labels, options, said', [
    (np.zeros(10, int), {'rate': 0.1}, 'asks for 1 of 10 images, but only 0'),
    (np.arange(10) % 5, {'rate': 0.5, 'groups': [[0, 1]]}, 'asks for 5 of 10 images, but only 4'),
    (np.arange(10) % 5, {'rate': 0.1, 'groups': [[0, 7]]}, 'the data has the classes 0 to 4')])
def test_what_the_data_cannot_give_is_refused(labels, options, said):
    with pytest.raises(UserError, match='label-corruption') as error:
        corrupted(labels, **options)
    assert said in error.value.message and '\n' not in error.value.message


# --- captions, which pairs of images swap


def captions_of(n, kinds=None, seed=0):
    """Vectors [n, 3]: all different, or of so many kinds."""
    values = np.random.default_rng(seed).standard_normal((kinds or n, 3)).astype(np.float32)
    return values if kinds is None else values[np.random.default_rng(seed + 1).integers(0, kinds, n)]


def swapped(vectors, rate=0.1, seed=0, raw_idx=None, groups=None):
    raw_idx = np.arange(len(vectors)) if raw_idx is None else raw_idx
    return LabelCorruption(rate, seed, groups).partners(vectors, raw_idx)


@pytest.mark.parametrize('rate', [0, 0.025, 0.1, 0.333, 1])
@pytest.mark.parametrize('n, kinds', [(10, None), (1001, None), (1000, 2), (1001, 7), (1001, 2)])
def test_an_exact_count_of_images_gets_another_caption(rate, n, kinds):
    vectors = captions_of(n, kinds)
    partners = swapped(vectors, rate)
    changed = (vectors[partners] != vectors).any(1)
    assert changed.sum() == round(rate * n)
    assert (partners[~changed] == np.arange(n)[~changed]).all()


@pytest.mark.parametrize('kinds', [None, 5])
def test_captions_are_swapped_between_pairs(kinds):
    """Of an even count, each image has its partner's caption and the partner its own, so that no caption is lost or doubled."""
    vectors = captions_of(1000, kinds)
    partners = swapped(vectors, 0.2)
    changed = np.flatnonzero(partners != np.arange(1000))
    assert len(changed) == 200 and (partners[partners] == np.arange(1000)).all()
    assert sorted(map(tuple, vectors[partners])) == sorted(map(tuple, vectors))


def test_partners_are_random():
    """Over many seeds, every image is about equally often chosen, and equally often the partner of another."""
    vectors, counts, pairs = captions_of(12), np.zeros(12), np.zeros((12, 12))
    for seed in range(2000):
        partners = swapped(vectors, 0.5, seed)
        chosen = np.flatnonzero(partners != np.arange(12))
        counts[chosen] += 1
        pairs[chosen, partners[chosen]] += 1
    assert scipy.stats.chisquare(counts).pvalue > 1e-6 and abs(counts.sum() - 12_000) == 0
    assert scipy.stats.chisquare(pairs[np.triu_indices(12, 1)]).pvalue > 1e-6


def test_a_higher_rate_only_adds_images_and_the_seed_decides():
    vectors, before = captions_of(500, 20), None
    for rate in (0.02, 0.1, 0.11, 0.5, 1):
        partners = swapped(vectors, rate)
        if before is not None:
            kept = before != np.arange(500)
            assert (partners[kept] == before[kept]).all()
        before = partners
    assert (swapped(vectors, 0.5) == swapped(vectors, 0.5)).all()
    assert (swapped(vectors, 0.5) != swapped(vectors, 0.5, seed=1)).any()


def test_the_choice_does_not_depend_on_which_others_are_kept():
    """An image's place in the order is its own: of half of the images, those that come first do so among all, too."""
    vectors = captions_of(400)
    some = np.arange(0, 400, 2)
    chosen = lambda rows, rate: set(rows[swapped(vectors[rows], rate, raw_idx=rows) != np.arange(len(rows))])
    assert chosen(some, 0.1) <= chosen(np.arange(400), 0.4)


def test_an_image_and_its_flip_get_one_caption():
    vectors = np.concatenate([captions_of(50)] * 2)
    partners = swapped(vectors, 0.3, raw_idx=np.concatenate([np.arange(50)] * 2))
    assert (vectors[partners][:50] == vectors[partners][50:]).all()
    assert (vectors[partners] != vectors).any(1).sum() == 2 * 15


def test_a_caption_of_most_images_still_gives_the_exact_count():
    vectors = captions_of(100, None)
    vectors[10:] = vectors[10]  # 90 of 100 have one caption
    partners = swapped(vectors, 1.0)
    assert (vectors[partners] != vectors).any(1).all()


def test_captions_without_a_choice_are_refused():
    with pytest.raises(UserError, match='all images have the same caption'):
        swapped(np.ones([5, 2], np.float32), 0.5)
    with pytest.raises(UserError, match=r'--label-corruption-groups=\[\[0, 1\]\]: groups are of classes'):
        swapped(captions_of(5), 0.5, groups=[[0, 1]])
