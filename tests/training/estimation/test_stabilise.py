# SPDX-License-Identifier: Apache-2.0
"""The transforms of counts: their variance, the bias of both inverses by exact sums over the Poisson law, derivatives, refusals."""

import numpy as np
import pytest
import torch

from training.estimation.stabilise import LEAST, Anscombe, Generalised, Stabiliser, from_record, moments, of_units

MEANS = np.concatenate([np.linspace(0.01, 2, 60), np.linspace(2, 100, 200)])
READ = (0.01, 0.1, 0.25, 1.0, 4.0, 25.0)  # variances of the read noise in counts


def test_variance_of_stabilised_counts():
    """The figures of the literature for low counts, and 1 above."""
    variances = moments(Anscombe(), [1, 2, 4, 10, 30, 100])[1]
    assert variances.round(2)[:2].tolist() == [0.72, 0.92] and variances[2].round(3) == 0.999 and variances[3].round(3) == 1.001
    assert abs(variances[4:] - 1).max() < 1e-3


def test_moments_are_those_of_draws():
    rng, stabiliser = np.random.default_rng(0), Generalised(2.5, 6.0, 100.0)
    for mean in (0.5, 3, 40):
        values = 2.5 * rng.poisson(mean, 400_000) + 100 + rng.normal(0, 6 ** 0.5, 400_000)
        z, (first, second) = stabiliser.forward(values), moments(stabiliser, [mean])
        assert abs(z.mean() - first[0]) < 0.01 and abs(z.var() / second[0] - 1) < 0.01


def test_unbiased_inverse_of_poisson_counts():
    """Within 1 % from a mean count of 2 to 100, and within .0183 of a count everywhere; the plain inverse is a quarter too low."""
    stabiliser, first = Anscombe(), moments(Anscombe(), MEANS)[0]
    error = stabiliser.inverse(first) - MEANS
    assert abs(error).max() < 0.0183 and abs(error / MEANS)[MEANS >= 2].max() < 0.0035
    plain = stabiliser.plain_inverse(first) - MEANS
    assert abs(plain[MEANS >= 4] + 0.25).max() < 2e-3


@pytest.mark.parametrize('read', READ)
def test_unbiased_inverse_with_gain_read_noise_and_offset(read):
    """The gain and the offset change nothing but the units; within .044 of a count, and from 2 on within .025."""
    stabiliser = Generalised(3.0, 9 * read, -20.0)
    first = moments(stabiliser, MEANS)[0]
    error = stabiliser.counts(stabiliser.inverse(first)) - MEANS
    assert abs(error).max() < 0.044 and abs(error[MEANS >= 2]).max() < 0.025
    plain = stabiliser.counts(stabiliser.plain_inverse(first)) - MEANS
    assert abs(plain[MEANS >= 10] + 0.25).max() < 0.02
    unit = Generalised(1.0, read)
    np.testing.assert_allclose(unit.forward(MEANS), stabiliser.forward(3 * MEANS - 20), rtol=1e-9)


def test_offset_and_negative_intercept_are_one():
    """A fit var = a mean + b of data with an offset has b = read noise - a offset: forward and back are the same."""
    known, fitted = Generalised(2.0, 10.0, 50.0), Generalised(2.0, 0.0, -(10.0 - 2 * 50.0) / 2)
    values = np.linspace(46, 500, 100)
    np.testing.assert_allclose(known.forward(values), fitted.forward(values), rtol=1e-9)
    z = known.forward(values[10:])
    np.testing.assert_allclose(known.inverse(z), fitted.inverse(z), rtol=1e-9)


def test_without_counts_the_inverse_is_the_offset():
    assert Anscombe().inverse(np.array([LEAST])) == pytest.approx(0, abs=1e-12)
    assert (Anscombe().inverse(np.array([-5.0, 0.0, 1.0, LEAST])) >= 0).all()
    z = np.linspace(-2, 30, 1000)
    for stabiliser in (Anscombe(), Generalised(2.0, 3.0, 7.0)):
        found = stabiliser.inverse(z)
        assert (np.diff(found) >= 0).all() and found[0] == stabiliser.offset


@pytest.mark.parametrize('stabiliser', [Anscombe(), Generalised(2.0, 3.0, 7.0)])
def test_expected_inverts_inverse(stabiliser):
    z = np.linspace(3, 60, 300)
    np.testing.assert_allclose(stabiliser.expected(stabiliser.inverse(z)), z, rtol=1e-12)
    values = stabiliser.offset + stabiliser.a * np.linspace(0, 300, 500)
    np.testing.assert_allclose(stabiliser.inverse(stabiliser.expected(values)), values, atol=1e-9)
    assert stabiliser.expected(np.array([stabiliser.offset - 9])) == stabiliser.expected(np.array([stabiliser.offset]))


@pytest.mark.parametrize('stabiliser', [Anscombe(), Generalised(2.0, 3.0, 7.0)])
def test_derivatives(stabiliser):
    z, h = np.linspace(2.6, 20, 40), 1e-4
    np.testing.assert_allclose(stabiliser.slope(z), (stabiliser.inverse(z + h) - stabiliser.inverse(z - h)) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(stabiliser.curvature(z), (stabiliser.slope(z + h) - stabiliser.slope(z - h)) / (2 * h), rtol=1e-6)


def test_tensors_as_arrays():
    z = torch.linspace(0, 20, 50, dtype=torch.float64)
    for stabiliser in (Anscombe(), Generalised(2.0, 3.0, 7.0)):
        for name in ('forward', 'inverse', 'plain_inverse', 'expected', 'slope', 'curvature'):
            found = getattr(stabiliser, name)(z)
            assert found.dtype == torch.float64
            np.testing.assert_allclose(found.numpy(), getattr(stabiliser, name)(z.numpy()), rtol=1e-12)


def test_records():
    stabiliser = Generalised(2.0, 3.0, 7.0)
    assert stabiliser.record() == {'a': 2.0, 'b': 3.0, 'offset': 7.0} and from_record(stabiliser.record()) == stabiliser
    assert Anscombe() == Stabiliser(1.0) == Generalised(1) and 'Anscombe' in Generalised(1).words() and 'offset 7' in stabiliser.words()
    assert of_units(None) is None and of_units({'offset': 0, 'scale': 1}) is None
    assert of_units({'offset': 0, 'scale': 1, 'stabilise': {'a': 1, 'b': 0, 'offset': 0}}) == Anscombe()


@pytest.mark.parametrize('told', [3, {}, 'anscombe', {'a': 1, 'b': 0}, {'a': 0, 'b': 0, 'offset': 0}, {'a': True, 'b': 0, 'offset': 0},
                                  {'a': 10 ** 400, 'b': 0, 'offset': 0}, {'a': 1, 'b': -1, 'offset': 0}, {'a': 1, 'b': None, 'offset': 0},
                                  {'a': float('nan'), 'b': 0, 'offset': 0}])
def test_damaged_records_are_refused(told):
    with pytest.raises(ValueError, match='"stabilise" is not'):
        from_record(told)


@pytest.mark.parametrize('told, word', [((-1.0,), 'above 0'), ((1.0, -3.0), 'offset=-b/a'), ((0.0, 3.0), 'gain a as well'),
                                        ((float('inf'),), 'finite')])
def test_impossible_numbers_are_refused(told, word):
    with pytest.raises(ValueError, match=word):
        Generalised(*told)
