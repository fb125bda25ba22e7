# SPDX-License-Identifier: Apache-2.0
"""Statistics, Fréchet distance and the Inception network."""

import json
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.numpy import load_file

from dnnlib import UserError
from metrics import frechet, inception
from metrics.frechet import frechet_distance, half_factor
from metrics.statistics import Moments, load_statistics, save_statistics
from tests.fuzz import mutators
from tests.support import GOLDEN
from tests.support.formula_weights import KEYS, save_inception_weights

DATA = GOLDEN
PUBLISHED = load_file(DATA / 'metrics' / 'metrics.safetensors')
FACTS = json.loads((DATA / 'metrics' / 'metrics.json').read_text())


def features_of(count, dim, seed=0):
    """Skewed, correlated features over scales from 0.03 to 30, as float64 [count,dim]."""
    rng = np.random.default_rng(seed)
    scale = np.exp(1.5 * np.random.default_rng(99).standard_normal(dim))
    return np.abs(rng.standard_normal((count, dim)) + 0.3 * rng.standard_normal((count, 1))) * scale


def moments_of(features, cuts=()):
    moments = Moments(features.shape[1])
    for part in np.split(features, cuts):
        moments.add(torch.from_numpy(part))
    return moments


# Statistics


def test_statistics_golden():
    stats = moments_of(PUBLISHED['stats.features'], [7, 8, 30]).statistics()
    np.testing.assert_allclose(stats.mean, PUBLISHED['stats.mu'], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(stats.cov, PUBLISHED['stats.sigma'], rtol=1e-11, atol=1e-13)


def test_moments_survive_a_large_mean():
    """A difference of raw sums would lose all digits here: mean 1e7, variance 1."""
    x = np.random.default_rng(0).standard_normal((400, 5))
    found = moments_of(x + 1e7, range(40, 400, 40)).covariance().numpy()
    np.testing.assert_allclose(found, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-7)


def test_merge_is_the_whole():
    x = features_of(50, 6)
    a, b = moments_of(x[:13]), moments_of(x[13:])
    a.merge(b)
    a.merge(Moments(6))
    assert a.count == 50
    torch.testing.assert_close(a.covariance(), moments_of(x).covariance(), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r'expected \[n, 6\]'):
        a.add(torch.zeros(3, 5))


def test_statistics_file_round_trip(tmp_path):
    stats = moments_of(features_of(20, 4)).statistics(detector='pixels', split='train', shape=(1, 2, 2), source='x.zip')
    save_statistics(stats, tmp_path / 'a.npz')
    assert [p.name for p in tmp_path.iterdir()] == ['a.npz']
    again = load_statistics(tmp_path / 'a.npz')
    assert (again.mean == stats.mean).all() and (again.cov == stats.cov).all()
    assert again.shape == (1, 2, 2) and again.num_images == 20 and again.detector_sha256 is None
    assert (again.detector, again.split, again.source) == ('pixels', 'train', 'x.zip')


def test_published_statistics_are_read_as_they_are(tmp_path):
    """mu and sigma alone, beside keys that are not ours."""
    np.savez(tmp_path / 'p.npz', mu=np.zeros(3, np.float32), sigma=np.eye(3, dtype=np.float32), mu_s=np.ones(9))
    stats = load_statistics(tmp_path / 'p.npz')
    assert stats.mean.dtype == stats.cov.dtype == np.float64 and stats.detector is stats.num_images is None


@pytest.mark.parametrize('content, message', [
    (b'nonsense', 'not a readable .npz'),
    ({'arr_0': np.zeros(3)}, 'has no mu and sigma'),
    ({'mu': np.zeros(3), 'sigma': np.eye(4)}, 'do not fit'),
    ({'mu': np.zeros(2), 'sigma': np.full((2, 2), np.nan)}, 'not finite'),
    ({'mu': np.array([None, {}]), 'sigma': np.eye(2)}, 'not a readable .npz'),  # a pickle inside: never opened
    (None, 'no such file'),
])
def test_bad_statistics_files(tmp_path, content, message):
    path = tmp_path / 's.npz'
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_statistics(path)
    assert '\n' not in caught.value.message and 's.npz' in caught.value.message


@pytest.mark.parametrize('key, value, words', [
    ('mu', np.array('x'), '"mu" must be an array of numbers, got <U1 []'), ('sigma', np.zeros(3), '"sigma" must be an array of numbers'),
    ('features', np.zeros(3), '"features" must be'), ('features', np.zeros([4, 2]), 'features [4, 2] and mu [3] do not fit'),
    ('detector', np.array(5), '"detector" must be text, got int64 []'), ('source', np.array(['a', 'b']), '"source" must be text'),
    ('num_images', np.array(1.5), '"num_images" must be a whole number'), ('num_images', np.array('x'), '"num_images"'),
    ('shape', np.array(5), '"shape" must be three whole numbers'), ('mu', np.array([1j, 0, 0]), '"mu" must be an array of numbers'),
    ('split', np.array(b'x'), '"split" must be text'), ('features', np.array([None]), 'not a readable .npz')])
def test_statistics_of_other_types(tmp_path, key, value, words):
    np.savez(tmp_path / 's.npz', **{'mu': np.zeros(3), 'sigma': np.eye(3), key: value})
    with pytest.raises(UserError, match=re.escape(words)):
        load_statistics(tmp_path / 's.npz')


def test_statistics_that_claim_more_than_they_have(tmp_path):
    """Neither a header nor a compressed member is believed: memory is taken for what is there."""
    np.savez(tmp_path / 's.npz', mu=np.zeros(3), sigma=np.eye(3))
    data = (tmp_path / 's.npz').read_bytes()
    for name, new in {'large.npz': b'(9999999999999,)', 'negative.npz': b'(-3,)'}.items():
        parts = [(member, content.replace(b'(3,), }' + b' ' * (len(new) - 4), new + b', }')) for member, content in mutators.members(data)]
        assert parts != mutators.members(data)
        (tmp_path / name).write_bytes(mutators.pack(parts))
    (tmp_path / 'bomb.npz').write_bytes(mutators.pack([('mu.npy', bytes(2 ** 27))], compressed={'mu.npy'}))
    for name in ('large.npz', 'negative.npz', 'bomb.npz'):
        with pytest.raises(UserError, match='not a readable .npz of statistics .mu.npy claims'):
            load_statistics(tmp_path / name)
    np.savez_compressed(tmp_path / 'c.npz', mu=np.zeros(2000), sigma=np.eye(2000), features=np.asfortranarray(np.ones([5, 2000])))
    found = load_statistics(tmp_path / 'c.npz')
    assert (found.cov == np.eye(2000)).all() and found.features.flags.writeable and found.features.shape == (5, 2000)


def test_truncated_statistics_file(tmp_path):
    np.savez(tmp_path / 's.npz', mu=np.zeros(300), sigma=np.eye(300))
    (tmp_path / 't.npz').write_bytes((tmp_path / 's.npz').read_bytes()[:50000])
    np.save(tmp_path / 'plain.npz.npy', np.eye(3))
    for name in ('t.npz', 'plain.npz.npy'):
        with pytest.raises(UserError, match='not a readable .npz'):
            load_statistics(tmp_path / name)


# Fréchet distance


@pytest.mark.parametrize('case', FACTS['frechet'], ids=lambda case: case['name'])
def test_frechet_golden(case):
    args = [PUBLISHED[f'{case["name"]}.{key}'] for key in ('mu1', 'sigma1', 'mu2', 'sigma2')]
    found, swapped = frechet_distance(*args), frechet_distance(*args[2:], *args[:2])
    assert isinstance(found, float)
    assert swapped == pytest.approx(found, rel=1e-10, abs=1e-10)
    if 'identical' in case['name']:
        assert abs(found) < 1e-12
    else:
        tolerance = 1e-6 if 'rank' in case['name'] or 'zero' in case['name'] else 1e-10
        for peer in ('edm', 'torch_fidelity', 'adm_evaluator'):
            assert found == pytest.approx(case[peer], rel=tolerance)


def test_frechet_of_diagonal_gaussians():
    """Closed form: |dmu|^2 + sum (sqrt a - sqrt b)^2."""
    rng = np.random.default_rng(3)
    mu1, mu2, a, b = rng.uniform(0, 2, (4, 20))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_a_set_with_itself_from_few_samples_in_many_dimensions():
    """1,000 samples in 2048 dimensions; the route over the eigenvalues of cov1 cov2 leaves 5e-5 here."""
    stats = moments_of(features_of(1000, 2048), [300, 301]).statistics()
    other = moments_of(features_of(1000, 2048), [700]).statistics()  # the same samples, otherwise batched
    assert abs(frechet_distance(stats.mean, stats.cov, stats.mean, stats.cov)) < 1e-6
    assert abs(frechet_distance(stats.mean, stats.cov, other.mean, other.cov)) < 1e-6


@pytest.mark.parametrize('counts', [(30, 50), (30, 400), (2, 2)])
def test_frechet_of_rank_deficient_statistics_in_sample_space(counts):
    """The exact value without a D x D matrix: its trace is the nuclear norm of X Y^T, X, Y centred and divided by sqrt(n-1)."""
    x, y = (features_of(n, 150, seed) for seed, n in enumerate(counts))
    xc, yc = ((s - s.mean(0)) / np.sqrt(len(s) - 1) for s in (x, y))
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.square(xc).sum() + np.square(yc).sum()
    expected -= 2 * np.linalg.svd(xc @ yc.T, compute_uv=False).sum()
    found = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('shape', [(40, 40), (40, 25), (25, 40), (6, 0)])
def test_nuclear_norm_by_either_route(shape):
    """Well conditioned matrices go by the eigenvalues of the Gram matrix; both routes agree."""
    matrix = np.random.default_rng(0).standard_normal(shape) + 10 * np.eye(*shape)
    exact = np.linalg.svd(matrix, compute_uv=False).sum()
    assert frechet.nuclear_norm(matrix, accuracy=1e-6) == pytest.approx(exact, rel=1e-12)
    assert frechet.nuclear_norm(matrix) == exact


def test_nuclear_norm_of_a_nearly_singular_matrix(monkeypatch):
    """Singular values from 1 to 1e-12: the Gram matrix knows nothing of those below 1e-8, and is not believed."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    values = np.concatenate([np.logspace(0, -12, 30), np.full(30, 1e-12)])
    gram = np.sqrt(np.linalg.eigvalsh((u * values) @ v @ ((u * values) @ v).T).clip(0)).sum()
    assert abs(gram - values.sum()) > 1e-9
    assert frechet.nuclear_norm((u * values) @ v, accuracy=1e-10) == pytest.approx(values.sum(), abs=1e-12)


@pytest.mark.parametrize('dim', [64, 300])
def test_frechet_equals_the_matrix_square_root(dim):
    """Against scipy's sqrtm, as most tools have it."""
    x, y = features_of(4 * dim, dim, 1), features_of(3 * dim, dim, 2)
    args = [x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)]
    root = scipy.linalg.sqrtm(args[1] @ args[3])
    expected = np.square(args[0] - args[2]).sum() + np.trace(args[1] + args[3] - 2 * root.real)
    assert frechet_distance(*args) == pytest.approx(expected, rel=1e-6)


def test_half_factor_has_the_numerical_rank():
    cov = np.cov(features_of(11, 40), rowvar=False)
    half = half_factor(cov)
    assert half.shape == (40, 10)
    np.testing.assert_allclose(half @ half.T, cov, atol=1e-12 * np.abs(cov).max())


def test_statistics_stored_in_float32_still_work():
    """Rounded to float32, a rank-deficient covariance has negative eigenvalues: the eigen-decomposition stands in."""
    x, y = features_of(60, 100, 1), features_of(300, 100, 2)
    exact = [x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False)]
    rounded = [a.astype(np.float32) for a in exact]
    assert np.linalg.eigvalsh(rounded[1].astype(np.float64))[0] < 0
    assert frechet_distance(*rounded) == pytest.approx(frechet_distance(*exact), rel=1e-3)
    assert abs(frechet_distance(*rounded[:2], *rounded[:2])) < 1e-6 * np.trace(rounded[1])


def test_frechet_refusals():
    zero, eye = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match='3 and of 4 dimensions'):
        frechet_distance(zero, eye, np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match='do not fit'):
        frechet_distance(zero, eye, zero, np.eye(4))
    with pytest.raises(ValueError, match='not finite'):
        frechet_distance(zero, eye, zero * np.nan, eye)
    for wrong in (np.diag([1., 1., -1.]), np.array([[0, 1.], [1, 0]]), np.array([[1, .5], [-.5, 1]])):
        with pytest.raises(ValueError, match='not a covariance'):
            frechet_distance(np.zeros(len(wrong)), wrong, np.zeros(len(wrong)), np.eye(len(wrong)))


# Inception


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return save_inception_weights(tmp_path_factory.mktemp('inception') / 'weights.pth')


@pytest.fixture(scope='module')
def network(weights):
    return inception.Inception(weights)


@pytest.mark.parametrize('side', [32, 64])
def test_inception_golden(network, side):
    data = np.load(DATA / 'inception' / 'features.npz')
    features, logits = network(torch.from_numpy(data[f'images_{side}']))
    for found, key in ((features, f'2048_{side}'), (logits, f'logits_unbiased_{side}')):
        expected = torch.from_numpy(data[key])
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_inception_keys_are_the_published_ones(network):
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == KEYS


def test_inception_takes_grey_as_rgb(network):
    grey = torch.randint(0, 256, (1, 1, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(grey)[0], network(grey.repeat(1, 3, 1, 1))[0], rtol=1e-5, atol=1e-6)


def test_inception_leaves_the_random_state_alone(weights):
    before = torch.random.get_rng_state()
    inception.Inception(weights)
    assert (torch.random.get_rng_state() == before).all()


def test_resize_two_to_four():
    """TensorFlow 1 without half-pixel centres: the row [a, b] becomes [a, (a+b)/2, b, b]."""
    found = inception.resize(torch.tensor([[[[10., 20.], [30., 60.]]]]), 4)[0, 0]
    expected = torch.tensor([[10., 15., 20., 20.], [20., 30., 40., 40.], [30., 45., 60., 60.], [30., 45., 60., 60.]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_resize_keeps_constants_and_the_own_size():
    flat = torch.full((1, 3, 7, 450), 93.)
    assert (inception.resize(flat, 299) == 93).all()
    own = torch.rand(1, 1, 299, 299, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inception.resize(own, 299), own, rtol=0, atol=0)


def test_resize_does_not_filter_reductions():
    x = torch.arange(598.).repeat(2, 1)[None, None]
    torch.testing.assert_close(inception.resize(x, 299)[0, 0, 0], torch.arange(0, 598, 2.))


def test_inception_weights_that_are_none(tmp_path):
    torch.save({'fc.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    (tmp_path / 'noise.pth').write_bytes(b'abc')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'pickled.pth')  # a pickled module: refused, never run
    for name, message in [('other.pth', 'not the FID network'), ('noise.pth', 'cannot be read as weights'),
                          ('pickled.pth', 'cannot be read as weights'), ('absent.pth', 'no such file')]:
        with pytest.raises(UserError, match=message) as caught:
            inception.Inception(str(tmp_path / name))
        assert '\n' not in caught.value.message


def test_missing_weights_without_network(tmp_path, monkeypatch):
    """The line names the URL, the cache path and the option."""
    monkeypatch.setenv('AMBIENT_CACHE', str(tmp_path))
    monkeypatch.setattr('urllib.request.urlopen', lambda *a, **k: (_ for _ in ()).throw(OSError('network is unreachable')))
    with pytest.raises(UserError) as caught:
        inception.Inception()
    message = caught.value.message
    assert inception.URL in message and str(tmp_path) in message and '--detector-weights' in message and '\n' not in message


@pytest.mark.parametrize('shape', [(2, 3, 147, 147), (1, 2, 17, 17), (1, 2, 3, 5), (1, 1, 8, 10)])
def test_the_maximum_in_rows_and_columns_is_the_maximum(shape):
    """Bit for bit, for odd and even sides, with negative numbers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inception.POOLS['halve'](x), torch.nn.functional.max_pool2d(x, 3, stride=2))
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(inception.POOLS['halve'](last), torch.nn.functional.max_pool2d(x, 3, stride=2))
