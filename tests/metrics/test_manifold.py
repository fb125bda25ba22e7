# SPDX-License-Identifier: Apache-2.0
"""What is computed from features themselves: distances, kernel distance, precision and recall, Inception score, memorisation."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from metrics import distances, manifold, memorisation, scores
from metrics.kernel import kernel_distance, squared_mmd
from metrics.manifold import density_coverage, precision_recall
from tests.support import GOLDEN, ROOT

DATA = GOLDEN / 'metrics'
PUBLISHED = load_file(DATA / 'metrics.safetensors')
FACTS = json.loads((DATA / 'metrics.json').read_text())
FAKE, REAL = PUBLISHED['feat1'], PUBLISHED['feat2']


def normal(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 7 x 5, so that a few images need many of them."""
    monkeypatch.setattr(distances, 'ROWS', 7)
    monkeypatch.setattr(distances, 'COLUMNS', 5)


# Distances


@pytest.mark.parametrize('exclude_self', [False, True])
def test_nearest_is_the_sorted_matrix(small_blocks, exclude_self):
    x, y = normal(23, 3), normal(16, 3, seed=1)
    points = x if exclude_self else y
    whole = torch.cdist(x, points).square()
    if exclude_self:
        whole.fill_diagonal_(float('inf'))
    expected, order = whole.sort(dim=1)
    found, index = distances.nearest(x, points, k=6, exclude_self=exclude_self)
    torch.testing.assert_close(found, expected[:, :6], rtol=1e-10, atol=1e-12)
    assert (index == order[:, :6]).all()


def test_equal_images_far_from_the_origin_have_distance_zero():
    """float32 products would leave distances of about 60 here: the features have a mean of 1e4."""
    x = (normal(50, 64) + 1e4).float()
    found, index = distances.nearest(x, x.flip(0), k=1)
    assert (found == 0).all() and (index[:, 0] == torch.arange(49, -1, -1)).all()


def test_a_copy_is_a_neighbour_and_the_image_itself_is_not():
    x = normal(10, 4)
    d2, index = distances.nearest(torch.cat([x, x[:1]]), torch.cat([x, x[:1]]), k=1, exclude_self=True)
    assert index[0, 0] == 10 and index[10, 0] == 0 and d2[0, 0] == 0 and (d2[1:10] > 0.01).all()


def test_nearest_refuses_what_there_is_not():
    x = normal(4, 3)
    for k, exclude in ((5, False), (4, True), (0, False)):
        with pytest.raises(ValueError, match='neighbours requested'):
            distances.nearest(x, x, k, exclude_self=exclude)
    with pytest.raises(ValueError, match='expected'):
        distances.nearest(x, normal(4, 2), 1)


# Precision, recall, density, coverage


@pytest.mark.parametrize('k', [3, 5])
def test_manifold_golden(k):
    expected = FACTS['manifold'][f'prc_k{k}_save_cpu_ram0']
    assert precision_recall(REAL, FAKE, k) == pytest.approx((expected['precision'], expected['recall']), rel=1e-7)
    expected = FACTS['manifold'][f'prdc_k{k}']
    assert precision_recall(REAL, FAKE, k) == pytest.approx((expected['precision'], expected['recall']), rel=1e-12)
    assert density_coverage(REAL, FAKE, k) == pytest.approx((expected['density'], expected['coverage']), rel=1e-12)


def test_blocks_change_nothing(small_blocks):
    found = manifold.manifold_metrics(REAL, FAKE)
    assert (found['precision'], found['recall']) == pytest.approx((0.8066666666666666, 0.5769230769230769), rel=1e-12)
    assert (found['density'], found['coverage']) == pytest.approx((1.452, 1.0), rel=1e-12)


def test_a_set_and_itself():
    """Each image lies in its own ball: 1. The k-th neighbour lies on the rim, so a ball without it holds k images: density 1."""
    assert precision_recall(REAL, REAL) == (1, 1)
    assert density_coverage(REAL, REAL) == (1, 1)
    far = (REAL + 1e4).astype(np.float32)
    assert precision_recall(far, far.copy()) == (1, 1) and density_coverage(far, far.copy()) == (1, 1)


def test_swapping_the_sets_swaps_precision_and_recall():
    assert precision_recall(FAKE, REAL) == precision_recall(REAL, FAKE)[::-1]


@pytest.mark.parametrize('kind', ['of the real set', 'new'])
def test_one_image_repeated_has_no_recall(kind):
    """A collapsed generator: its balls have no extent, and hold at most the one real image."""
    real = normal(500, 16).float()
    image = real[3:4] if kind != 'new' else 0.1 * normal(1, 16, seed=5).float()
    precision, recall = precision_recall(real, image.repeat(300, 1))
    assert precision == 1 and recall < 0.01


def test_one_image_of_the_real_set_repeated_is_covered_once():
    real = normal(500, 16).float()
    density, coverage = density_coverage(real, real[3:4].repeat(300, 1))
    assert density >= 1 / 5 and coverage == density * 5 / 500  # as many balls hold it as it has images around it


def test_halves_of_one_set_agree():
    """Precision and recall are within 0.02; their standard error is 0.6 % at this count."""
    x = normal(5000, 4, seed=2).float()
    precision, recall = precision_recall(x[::2], x[1::2])
    assert abs(precision - recall) < 0.02 and precision > 0.9
    density, coverage = density_coverage(x[::2], x[1::2])
    assert density == pytest.approx(1, abs=0.05)  # 1 in expectation for equal laws
    assert coverage == pytest.approx(1 - 0.5 ** 5, abs=0.02)  # equal counts: 1 - 2^-k, Naeem et al. 2020, section 3.3


def test_ties_are_inside_the_rim_of_precision_alone():
    """A grid of whole numbers: the fakes lie at exactly the radius."""
    real = torch.arange(8.).reshape(-1, 1)
    fake = torch.arange(8., 16).reshape(-1, 1)
    assert precision_recall(real, fake, k=1) == (1 / 8, 1 / 8)
    assert density_coverage(real, fake, k=1) == (0, 0)


def test_too_few_images():
    with pytest.raises(ValueError, match='5 nearest neighbours requested, only 3 available'):
        density_coverage(normal(4, 2), normal(9, 2))


MEMORY = '''
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from metrics import manifold
torch.set_num_threads(1)
x = torch.randn(12000, 8, generator=torch.Generator().manual_seed(0))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
manifold.precision_recall(x[:1000], x[1000:2000])
before = peak()
manifold.precision_recall(x, x.flip(0))
print(peak() - before)
'''


def test_memory_stays_far_below_a_whole_matrix():
    """12,000 x 12,000 distances would take 1.1 GB in float64; the blocks take less than a fifth of that."""
    done = subprocess.run([sys.executable, '-c', MEMORY, ROOT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 220


# Kernel distance


def test_kernel_distance_golden():
    expected = FACTS['kernel']['kid0']
    found = kernel_distance(FAKE, REAL, subsets=10, subset_size=100, seed=2020)
    assert found == pytest.approx((expected['kernel_inception_distance_mean'], expected['kernel_inception_distance_std']), rel=1e-9)
    assert squared_mmd(FAKE[:130], REAL) == pytest.approx(FACTS['kernel']['mmd2_full_first_n']['unbiased'], rel=1e-10)


def test_squared_mmd_is_its_definition(monkeypatch):
    """Sums over explicit pairs, for sets of unequal size and blocks that do not divide them."""
    monkeypatch.setattr('metrics.kernel.BLOCK', 4)
    a, b = normal(9, 3), normal(6, 3, seed=1) + 0.3
    k = lambda x, y: (float(x @ y) / 3 + 1) ** 3
    pairs = lambda x: np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
    expected = pairs(a) + pairs(b) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-11)


def test_squared_mmd_is_unbiased():
    """Zero in the mean for equal laws, within four standard errors; the biased estimate would lie 50 of them above."""
    values = np.array([squared_mmd(normal(30, 4, 2 * i), normal(30, 4, 2 * i + 1)) for i in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20 and values.min() < 0
    far = np.mean([squared_mmd(normal(30, 4, 2 * i), normal(30, 4, 2 * i + 1) + 0.5) for i in range(20)])
    assert far > 20 * values.std() / 20


def test_kernel_distance_depends_on_its_seed_alone():
    found = [kernel_distance(FAKE, REAL, subsets=5, subset_size=50, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    with pytest.raises(ValueError, match='subsets of 1000 images requested, but a set has only 130'):
        kernel_distance(FAKE, REAL)


# Inception score


@pytest.mark.parametrize('case, splits, seed', [('isc0', 10, 2020), ('isc1', 10, None), ('isc2', 1, None), ('isc3', 7, 5)])
def test_inception_score_golden(case, splits, seed):
    expected = FACTS['inception_score'][case]
    found = scores.inception_score(PUBLISHED['isc.logits'], splits, seed)
    assert found == pytest.approx((expected['inception_score_mean'], expected['inception_score_std']), rel=1e-9, abs=1e-12)


def test_inception_score_of_sure_and_of_blind_classifiers():
    """C classes, one-hot and equally frequent: C, although log 0 stands in it. The same answer for every image: 1."""
    sure = 1e4 * torch.eye(4).repeat(25, 1)
    assert scores.inception_score(sure, splits=1) == pytest.approx((4, 0), rel=1e-12)
    assert scores.inception_score(torch.zeros(40, 7)) == pytest.approx((1, 0), rel=1e-12)
    with pytest.raises(ValueError, match='11 splits requested, but there are only 10 images'):
        scores.inception_score(torch.zeros(10, 3), splits=11)


def test_sums_of_parts_add_up():
    logits = torch.from_numpy(PUBLISHED['isc.logits'])
    where = scores.split_of(200, 3, seed=1)
    parts = sum(scores.split_sums(logits[rows::2], where[rows::2], 3) for rows in (0, 1))
    torch.testing.assert_close(scores.scores(parts), scores.scores(scores.split_sums(logits, where, 3)), rtol=1e-12, atol=0)


# Memorisation


def test_copies_are_found():
    """A tenth of the generated images are copies with a trace of noise; the others are as new as the held-out ones."""
    train, held_out, new = normal(2000, 8, 0), normal(500, 8, 1), normal(450, 8, 2)
    copied = torch.arange(50) * 3
    generated = torch.cat([train[copied] + 1e-3 * normal(50, 8, 3), new])
    found, unseen = memorisation.neighbours(generated, train), memorisation.neighbours(held_out, train)
    assert (found.index[:50] == copied.numpy()).all() and found.first[:50].max() < 0.01 < found.first[50:].min()
    order, matches = memorisation.closest_pairs(found, 50)
    assert set(order) == set(range(50)) and (matches == copied.numpy()[order]).all()
    report = memorisation.report(found, unseen)
    assert report['nn_ratio_below_third'] == pytest.approx(0.1, abs=0.01)
    assert report['closer_than_1pct_of_held_out'] == pytest.approx(0.1 + 0.9 * 0.01, abs=0.015)
    assert report['nn_distance_over_held_out'] < 1 and report['copying_z'] < -2
    honest = memorisation.report(memorisation.neighbours(new, train), unseen)
    assert abs(honest['copying_z']) < 3 and honest['nn_ratio_below_third'] < 0.01
    assert honest['nn_distance_over_held_out'] == pytest.approx(1, abs=0.05)
    assert set(memorisation.report(found)) < set(report)


def test_neighbour_ratio_of_equal_images():
    """Two equal training images: 0 / 0 is no copy of one in particular."""
    found = memorisation.neighbours(torch.zeros(2, 3), torch.zeros(3, 3))
    assert found.ratio.tolist() == [1, 1]


def test_mann_whitney_is_standard_normal_for_equal_laws():
    rng = np.random.default_rng(0)
    z = [memorisation.mann_whitney_z(rng.integers(0, 5, 40), rng.integers(0, 5, 60)) for _ in range(1000)]  # many ties
    assert abs(np.mean(z)) < 4 / np.sqrt(1000) and np.std(z) == pytest.approx(1, abs=0.1)
    assert memorisation.mann_whitney_z(np.arange(30), np.arange(30) + 100) < -6
    assert memorisation.mann_whitney_z(np.ones(3), np.ones(4)) == 0
