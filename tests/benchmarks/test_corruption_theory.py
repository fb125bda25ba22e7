# SPDX-License-Identifier: Apache-2.0
"""The theorem of slight condition corruption: closed forms, the gain at published settings, and the law of a trained denoiser."""

import math

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import corruption_theory as theory
from metrics.frechet import frechet_distance


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize('law', theory.LAWS)
def test_the_distance_and_the_entropy_are_those_of_gaussians(law, rng):
    mean, cov, mu = theory.samples(60, 7, 1.3, 1, rng)
    wide = cov[0] + theory.added(mean, 0.4, law)[0]
    assert theory.distance(mean / 1.16, wide[None], mu)[0] == pytest.approx(frechet_distance(mean[0] / 1.16, wide, mu, np.eye(7)))
    values = lambda matrix: np.log(np.linalg.eigvalsh(matrix)).sum() / 2
    assert theory.entropy_rise(mean, cov, 0.4, law)[0] == pytest.approx(values(wide) - values(cov[0]))
    assert theory.entropy_rise(mean, cov, 0.4, law)[0] > 0
    assert theory.gain(mean, cov, mu, 0.0, law)[0] == 0


@pytest.mark.parametrize('share, expected, error', [(1, 5.58e-3, 0.09e-3), (0.3, 5.4e-4, 0.1e-4)])
def test_the_gain_of_the_isotropic_law(share, expected, error, rng):
    """n = 200, d = 20, |mu| = 1, g = share / sqrt(n): computed once with other code, 400 training sets."""
    mean, cov, mu = theory.samples(200, 20, 1.0, 1000, rng)
    found = theory.gain(mean, cov, mu, share / math.sqrt(200), 'isotropic')
    own = found.std() / math.sqrt(1000)
    assert found.mean() > 10 * own
    # The covariance divides by n - 1 here, and by n perhaps there: (d / 2n) |mu|^2 g^2 d of difference, at most.
    assert abs(found.mean() - expected) < 4 * math.hypot(own, error) + 20 / 400 * 20 * (share ** 2 / 200)


@pytest.mark.parametrize('law', theory.LAWS)
@pytest.mark.parametrize('n, d, norm', [(1000, 10, 1.0), (4000, 20, 2.0)])
def test_the_expected_gain(law, n, d, norm, rng):
    """Within 10 % of simulation, at a size of g where both of its orders matter."""
    g = 0.5 * math.sqrt(d / n)
    mean, cov, mu = theory.samples(n, d, norm, 2000, rng)
    found = theory.gain(mean, cov, mu, g, law)
    assert abs(found.mean() - theory.expected_gain(n, d, norm, g, law)) < 0.1 * abs(found.mean()) + 4 * found.std() / math.sqrt(2000)


def test_samples_have_the_moments_of_a_training_set(rng):
    mean, cov, mu = theory.samples(50, 5, 2.0, 4000, rng)
    np.testing.assert_allclose(mean.mean(0), mu, atol=5 * math.sqrt(1 / 50 / 4000))
    np.testing.assert_allclose(cov.mean(0), np.eye(5), atol=5 * math.sqrt(2 / 49 / 4000))
    np.testing.assert_allclose(cov[:, 0, 0].var(), 2 / 49, rtol=0.1)
    np.testing.assert_allclose(mean[:, 1].var(), 1 / 50, rtol=0.1)


def test_a_least_squares_denoiser_shrinks_the_mean_and_widens_one_direction(rng):
    """Its law is N(m / (1 + g^2), S + g^2 / (1 + g^2) m m^T), m and S those of the samples: derived in docs/theory.md."""
    x = rng.standard_normal((200, 3)) + np.array([1.0, -1.0, 0.5])
    mean, cov = theory.trained_law(x, 0.7, 1.0, 3, 2000, rng)
    centre, own = x.mean(0), np.cov(x, rowvar=False, ddof=0)
    np.testing.assert_allclose(mean, centre / 1.49, atol=0.02)
    np.testing.assert_allclose(cov - own, theory.added(centre, 0.7, 'rank one'), atol=0.03)
    assert np.linalg.norm(cov - own - theory.added(centre, 0.7, 'isotropic')) > 0.5


def test_the_table_has_every_slope(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, 'DS', (8, 16))
    monkeypatch.setattr(theory, 'measure_trained', lambda rng: {'mean': 1.0, 'stated': 1.0, **dict.fromkeys(theory.LAWS, 0.0)})
    found = CliRunner().invoke(theory.main, ['--repetitions=50', f'--json={tmp_path / "a.json"}'], catch_exceptions=False).output
    rows = [line.split('|')[1:-1] for line in found.splitlines() if line.startswith(('| entropy', '| gain'))]
    assert len(rows) == 14
    for row in rows[:6]:  # the entropy hardly depends on the training set
        assert float(row[5].split('[')[0]) == pytest.approx(float(row[6]), abs=0.02)
