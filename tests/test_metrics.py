# SPDX-License-Identifier: Apache-2.0
"""Statistics, Fréchet distance, the Inception network and what evaluate.py makes of images."""

import io
import json
import os
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import click
import numpy as np
import PIL.Image
import pytest
import scipy.linalg
import torch
from safetensors.numpy import load_file

from metrics import evaluate, frechet, inception
from metrics.frechet import frechet_distance, half_factor
from metrics.statistics import Moments, Statistics, load_statistics, save_statistics

DATA = Path(__file__).parent / 'data'
GOLDEN = load_file(DATA / 'metrics' / 'metrics.safetensors')
FACTS = json.loads((DATA / 'metrics' / 'metrics.json').read_text())
KEYS = json.loads((DATA / 'inception' / 'state_dict_keys.json').read_text())


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
    stats = moments_of(GOLDEN['stats.features'], [7, 8, 30]).statistics()
    np.testing.assert_allclose(stats.mean, GOLDEN['stats.mu'], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(stats.cov, GOLDEN['stats.sigma'], rtol=1e-11, atol=1e-13)


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
    with pytest.raises(click.ClickException, match=message) as caught:
        load_statistics(path)
    assert '\n' not in caught.value.message and 's.npz' in caught.value.message


def test_truncated_statistics_file(tmp_path):
    np.savez(tmp_path / 's.npz', mu=np.zeros(300), sigma=np.eye(300))
    (tmp_path / 't.npz').write_bytes((tmp_path / 's.npz').read_bytes()[:50000])
    np.save(tmp_path / 'plain.npz.npy', np.eye(3))
    for name in ('t.npz', 'plain.npz.npy'):
        with pytest.raises(click.ClickException, match='not a readable .npz'):
            load_statistics(tmp_path / name)


# Fréchet distance


@pytest.mark.parametrize('case', FACTS['frechet'], ids=lambda case: case['name'])
def test_frechet_golden(case):
    args = [GOLDEN[f'{case["name"]}.{key}'] for key in ('mu1', 'sigma1', 'mu2', 'sigma2')]
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


def formula_tensor(name, shape):
    """The golden's weights, which follow from each tensor's name."""
    if name.endswith('num_batches_tracked'):
        return torch.tensor(0)
    n = np.random.Generator(np.random.Philox(key=zlib.crc32(f'shared/{name}'.encode()))).standard_normal(shape)
    if name.endswith('running_var'):
        n = 0.5 + np.abs(n)
    elif name.endswith(('running_mean', 'bias')):
        n = 0.1 * n
    elif name.endswith('bn.weight'):
        n = 1 + 0.1 * n
    else:
        n = n * np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else n / np.sqrt(shape[-1])
    return torch.from_numpy(n.astype(np.float32))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('inception') / 'weights.pth'
    torch.save({name: formula_tensor(name, shape) for name, shape in KEYS.items()}, path)
    return str(path)


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
    for name, message in [('other.pth', 'not the FID network'), ('noise.pth', 'not a file of weights'),
                          ('pickled.pth', 'not a file of weights'), ('absent.pth', 'no such file')]:
        with pytest.raises(click.ClickException, match=message) as caught:
            inception.Inception(str(tmp_path / name))
        assert '\n' not in caught.value.message


def test_missing_weights_without_network(tmp_path, monkeypatch):
    """The line names the URL, the cache path and the option."""
    monkeypatch.setenv('AMBIENT_CACHE', str(tmp_path))
    monkeypatch.setattr('urllib.request.urlopen', lambda *a, **k: (_ for _ in ()).throw(OSError('network is unreachable')))
    with pytest.raises(click.ClickException) as caught:
        inception.Inception()
    message = caught.value.message
    assert inception.URL in message and str(tmp_path) in message and '--detector-weights' in message and '\n' not in message


# From images to numbers


class Toy:
    """A detector with logits that costs nothing."""

    name, sha256, device = 'toy', None, 'cpu'

    def dim(self, shape):
        return 4

    def __call__(self, images):
        x = images.flatten(1)[:, :4].float() / 40
        return x, x * torch.tensor([1., -1, 0.5, 2])


def batch_of(count, shape=(3, 4, 4), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def test_inception_score_golden():
    """One split against torch-fidelity's."""

    class Logits(Toy):
        def dim(self, shape):
            return 1

        def __call__(self, images):
            return torch.zeros(len(images), 1), torch.from_numpy(GOLDEN['isc.logits'])[images.flatten().long()]

    images = np.arange(200, dtype=np.uint8).reshape(-1, 1, 1, 1)
    found = evaluate.collect(np.split(images, [3, 90]), Logits())
    assert found.inception_score == pytest.approx(FACTS['inception_score']['isc2']['inception_score_mean'], rel=1e-6)


def test_inception_score_of_sure_and_of_blind_classifiers():
    """C classes, one-hot and equally frequent: C. The same answer for every image: 1."""

    class Sure(Toy):
        scale = 100.0

        def __call__(self, images):
            x = torch.nn.functional.one_hot(images.flatten().long() % 4, 4).float()
            return x, x * self.scale

    images = [np.arange(40, dtype=np.uint8).reshape(-1, 1, 1, 1)]
    assert evaluate.collect(images, Sure()).inception_score == pytest.approx(4, rel=1e-4)
    blind = Sure()
    blind.scale = 0.0
    assert evaluate.collect(images, blind).inception_score == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize('detector', [Toy(), evaluate.PixelDetector()], ids=['toy', 'pixels'])
def test_batch_size_changes_nothing(detector):
    images = batch_of(37)
    results = [evaluate.collect(np.split(images, range(size, 37, size)), detector) for size in (1, 5, 37)]
    reference = Statistics(np.zeros(len(results[0].statistics.mean)), np.eye(len(results[0].statistics.mean)))
    first, *others = (evaluate.numbers(result, reference) for result in results)
    for other in others:
        assert other['fid_score'] == pytest.approx(first['fid_score'], rel=1e-9)
        if first['inception_score'] is None:
            assert other['inception_score'] is None
        else:
            assert other['inception_score'] == pytest.approx(first['inception_score'], rel=1e-9)


def test_inception_batch_size_changes_nothing(weights, capsys):
    detector = evaluate.InceptionDetector(weights)
    assert 'not the published' in capsys.readouterr().err
    images = batch_of(3, (3, 16, 16))
    a, b = (evaluate.collect(np.split(images, cuts), detector) for cuts in ([], [1]))
    reference = Statistics(np.zeros(2048), np.eye(2048))
    distances = [evaluate.numbers(found, reference) for found in (a, b)]
    assert distances[0]['fid_score'] == pytest.approx(distances[1]['fid_score'], rel=1e-6)
    assert distances[0]['inception_score'] == pytest.approx(distances[1]['inception_score'], rel=1e-6)
    assert abs(evaluate.numbers(a, a.statistics)['fid_score']) < 1e-6


def test_pixels_are_in_network_units():
    features, logits = evaluate.PixelDetector()(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    assert features.tolist() == [[-1.0, 1.0]] and logits is None


def test_detectors_refuse_what_they_cannot_take(weights):
    with pytest.raises(click.ClickException, match='12288.*4096.*--detector=inception'):
        evaluate.PixelDetector().dim((3, 64, 64))
    with pytest.raises(click.ClickException, match='has no weights'):
        evaluate.PixelDetector(weights='x.pth')
    with pytest.raises(click.ClickException, match='got 5'):
        evaluate.InceptionDetector(weights).dim((5, 8, 8))


def test_collect_refuses_other_arrays():
    for batches, message in [([], 'no images'), ([batch_of(2).astype(np.float32)], 'must be uint8'),
                             ([batch_of(2), batch_of(2, (3, 4, 5))], 'earlier ones')]:
        with pytest.raises(click.ClickException, match=message):
            evaluate.collect(batches, evaluate.PixelDetector())


def test_reference_of_another_detector_or_size():
    pixels = evaluate.PixelDetector()
    good = Statistics(np.zeros(48), np.eye(48), detector='pixels', shape=(3, 4, 4))
    evaluate.check_reference(good, pixels, (3, 4, 4), 'r')
    evaluate.check_reference(Statistics(np.zeros(48), np.eye(48)), pixels, (3, 4, 4), 'r')
    for reference, shape, message in [
            (Statistics(np.zeros(48), np.eye(48), detector='inception'), (3, 4, 4), '--detector=inception'),
            (good, (3, 5, 5), '48 dimensions, these images have 75'), (good, (3, 2, 8), r'made from \[3, 4, 4\]')]:
        with pytest.raises(click.ClickException, match=message):
            evaluate.check_reference(reference, pixels, shape, 'r')
    toy = Toy()
    toy.sha256 = 'a' * 64
    with pytest.raises(click.ClickException, match='bbbbbbbb, not aaaaaaaa'):
        other = Statistics(np.zeros(4), np.eye(4), detector='toy', detector_sha256='b' * 64)
        evaluate.check_reference(other, toy, (3, 4, 4), 'r')


# Files


def write_images(folder, images, suffix='.png'):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        picture = PIL.Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        picture.save(folder / f'{i:06d}{suffix}')


def all_of(path, **kwargs):
    source = evaluate.ImageFiles(path, '--gen-path')
    return source, np.concatenate([batch.numpy() for batch in source.batches(4, **kwargs)])


@pytest.mark.parametrize('channels', [1, 3])
def test_every_container_gives_the_same_images(tmp_path, channels):
    images = batch_of(11, (channels, 5, 6))
    write_images(tmp_path / 'flat', images)
    for i in range(11):  # sub-folders, as dataset_tool.py and generate.py --subdirs make them
        (tmp_path / 'deep' / f'{i // 4:05d}').mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / 'flat' / f'{i:06d}.png', tmp_path / 'deep' / f'{i // 4:05d}' / f'{i:06d}.png')
    (tmp_path / 'deep' / 'dataset.json').write_text('{}')
    (tmp_path / 'deep' / '.hidden.png').write_text('')
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
        for i in reversed(range(11)):
            archive.write(tmp_path / 'flat' / f'{i:06d}.png', f'00000/img{i:08d}.png')
        archive.writestr('dataset.json', '{}')
    np.save(tmp_path / 'a.npy', images)
    np.savez(tmp_path / 'b.npz', images=images.transpose(0, 2, 3, 1), labels=np.arange(11))
    (tmp_path / 'raw').mkdir()
    for i, image in enumerate(images):
        np.save(tmp_path / 'raw' / f'{i:06d}.npy', image)
    for name in ('flat', 'deep', 'z.zip', 'a.npy', 'b.npz', 'raw'):
        source, found = all_of(tmp_path / name)
        assert len(source) == 11 and source.shape == (channels, 5, 6), name
        assert (found == images).all(), name
    assert (all_of(tmp_path / 'flat', count=6)[1] == images[:6]).all()


def test_palettes_and_bitmaps_are_read_as_rgb_and_grey(tmp_path):
    PIL.Image.new('P', (4, 4)).save(tmp_path / 'p.png')
    assert evaluate.ImageFiles(tmp_path, '--gen-path').shape == (3, 4, 4)
    PIL.Image.new('1', (4, 4), 1).save(tmp_path / 'p.png')
    source, found = all_of(tmp_path)
    assert source.shape == (1, 4, 4) and (found == 255).all()


def test_jpeg_is_warned_of(tmp_path, capsys):
    write_images(tmp_path / 'j', batch_of(2, (3, 8, 8)), '.jpg')
    evaluate.ImageFiles(tmp_path / 'j', '--gen-path')
    assert '2 of 2 files are JPEG' in capsys.readouterr().err


@pytest.mark.parametrize('spoil, message', [
    (lambda f: (f / '000002.png').write_bytes((f / '000002.png').read_bytes()[:60]), '000002.png cannot be read'),
    (lambda f: (f / '000002.png').write_bytes(b'not a picture'), '000002.png cannot be read'),
    (lambda f: PIL.Image.new('RGB', (9, 4)).save(f / '000002.png'), r'000002.png is \[3, 4, 9\], 000000.png is \[3, 4, 4\]'),
    (lambda f: PIL.Image.new('L', (4, 4)).save(f / '000002.png'), r'000002.png is \[1, 4, 4\]'),
    (lambda f: PIL.Image.new('RGBA', (4, 4)).save(f / '000002.png'), '000002.png cannot be read.*RGBA'),
    (lambda f: np.save(f / 'x.npy', np.zeros((3, 4, 4), np.float32)), 'x.npy cannot be read.*float32'),
])
def test_bad_images_are_named(tmp_path, spoil, message):
    write_images(tmp_path / 'g', batch_of(5))
    spoil(tmp_path / 'g')
    with pytest.raises(click.ClickException, match=message) as caught:
        all_of(tmp_path / 'g')
    assert '\n' not in caught.value.message


@pytest.mark.parametrize('name, content, message', [
    ('none.zip', None, 'no such folder or file'),
    ('cut.zip', b'PK\3\4abc', 'cannot be read'),
    ('text.txt', b'abc', 'not a folder, .zip'),
    ('cut.npz', b'PK\3\4abc', 'cannot be read'),
    ('floats.npy', np.zeros((3, 4, 4, 3)), 'found 0'),
    ('five.npy', np.zeros((3, 5, 8, 8), np.uint8), 'neither'),
    ('empty.npy', np.zeros((0, 8, 8, 3), np.uint8), 'holds no images'),
])
def test_bad_containers(tmp_path, name, content, message):
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(click.ClickException, match=message) as caught:
        evaluate.ImageFiles(tmp_path / name, '--gen-path')
    assert caught.value.message.startswith(f'--gen-path={tmp_path / name}') and '\n' not in caught.value.message


def test_damaged_zip_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
        for i in range(3):
            buffer = io.BytesIO()
            PIL.Image.fromarray(batch_of(1, (4, 4), seed=i)[0]).save(buffer, 'PNG')
            archive.writestr(f'{i}.png', buffer.getvalue())
        offset = archive.getinfo('1.png').header_offset
    data = bytearray((tmp_path / 'z.zip').read_bytes())
    data[offset + 80] ^= 255
    (tmp_path / 'z.zip').write_bytes(data)
    with pytest.raises(click.ClickException, match=r'1\.png cannot be read'):
        all_of(tmp_path / 'z.zip')


RANK_SCRIPT = '''
import json, sys
import click, numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from metrics import evaluate
from test_metrics import Toy, batch_of
from torch_utils import distributed
distributed.init()
rank, size = distributed.rank(), distributed.size()
results = []
for count in (1, 9):
    mine = batch_of(9)[rank:count:size]
    found = evaluate.collect([mine[i:i + 2] for i in range(0, len(mine), 2)], Toy())
    stats = found.statistics
    results.append([stats.num_images, stats.mean.tolist(), stats.cov.tolist(), found.inception_score])
try:
    evaluate.collect([batch_of(2) if rank == 0 else batch_of(2).astype(float)], Toy())
except click.ClickException as err:
    results.append(err.message)
assert len(distributed.all_values(results)) == 2 and results in distributed.all_values(results)
if rank == 0:
    json.dump(results, open(sys.argv[3], 'w'))
distributed.shutdown()
'''


def test_two_ranks_equal_one(tmp_path):
    """With 9 images (5 and 4 a rank) and with 1 (a rank has none); an error of rank 1 reaches rank 0."""
    (tmp_path / 'ranks.py').write_text(RANK_SCRIPT)
    here = Path(__file__).parent
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', tmp_path / 'ranks.py',
               here.parent, here, tmp_path / 'out.json']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *results, error = json.loads((tmp_path / 'out.json').read_text())
    for count, (num_images, mean, cov, score) in zip((1, 9), results):
        alone = evaluate.collect([batch_of(9)[:count]], Toy())
        assert num_images == count
        np.testing.assert_allclose(mean, alone.statistics.mean, rtol=1e-12)
        np.testing.assert_allclose(cov, alone.statistics.cov, rtol=1e-10, atol=1e-12)
        assert score == pytest.approx(alone.inception_score, rel=1e-10)
    assert 'must be uint8' in error
