# SPDX-License-Identifier: Apache-2.0
"""Statistics as EDM2, clean-fid and torch-fidelity write them, by their names and keys."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics import reference_files
from metrics.statistics import load_statistics
from tests.support import GOLDEN

DINO = 4  # dimensions in place of 1024


@pytest.fixture
def features():
    return np.random.default_rng(0).gamma(2.0, size=[30, 6]).astype(np.float32)


def moments(rows):
    rows = rows.astype(np.float64)
    return {'mu': rows.mean(0), 'sigma': np.cov(rows, rowvar=False)}


def same(stats, expected, rtol=0):
    np.testing.assert_allclose(stats.mean, expected['mu'], rtol=rtol)
    np.testing.assert_allclose(stats.cov, expected['sigma'], rtol=rtol, atol=1e-12 if rtol else 0)
    assert stats.mean.dtype == stats.cov.dtype == np.float64


@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_edm2(tmp_path, features, protocol):
    """A dict of dicts by the metric's name; the detector chooses, and is known by it."""
    both = {'fid': moments(features), 'fd_dinov2': moments(features[:, :DINO])}
    path = tmp_path / 'img512.pkl'
    path.write_bytes(pickle.dumps(both, protocol))
    for detector, entry in (('inception', 'fid'), ('dinov2', 'fd_dinov2')):
        stats = load_statistics(path, detector=detector)
        same(stats, both[entry])
        assert stats.detector == detector and stats.note is None and stats.num_images is None and stats.features is None
    with pytest.raises(UserError) as caught:
        load_statistics(path, f'--ref-stats={path}', detector='pixels')
    assert caught.value.message == (f'--ref-stats={path}: has no statistics of --detector=pixels; it holds "fid" (--detector=inception), '
                                    '"fd_dinov2" (--detector=dinov2)')


@pytest.mark.filterwarnings('ignore:numpy.core')
def test_edm2_of_numpy_1(tmp_path):
    golden = json.loads((GOLDEN / 'metrics' / 'pickles_numpy1.json').read_text())
    for protocol in '2345':
        (tmp_path / 'a.pkl').write_bytes(bytes.fromhex(golden[protocol]))
        same(load_statistics(tmp_path / 'a.pkl'), pickle.loads(bytes.fromhex(golden[protocol]))['fid'])


def test_a_pickle_of_one(tmp_path, features):
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(moments(features), 4))
    stats = load_statistics(tmp_path / 'a.pkl')
    same(stats, moments(features))
    assert stats.detector is None and 'does not say which detector' in stats.note


def test_clean_fid(tmp_path, features):
    """mu and sigma; and for KID the features alone."""
    np.savez(tmp_path / 'cifar10_legacy_tensorflow_train_32.npz', **moments(features))
    np.savez(tmp_path / 'cifar10_legacy_tensorflow_train_32_kid.npz', feats=features)
    same(load_statistics(tmp_path / 'cifar10_legacy_tensorflow_train_32.npz'), moments(features))
    stats = load_statistics(tmp_path / 'cifar10_legacy_tensorflow_train_32_kid.npz')
    same(stats, moments(features), rtol=1e-12)
    assert (stats.features == features).all() and stats.num_images == 30 and stats.detector is None
    assert load_statistics(tmp_path / 'cifar10_legacy_tensorflow_train_32_kid.npz', features=False).features is None


def test_torch_fidelity(tmp_path, features):
    """Its cache: features as a tensor, statistics as NumPy arrays of a torch.save, the mean in float32."""
    torch.save(torch.from_numpy(features), tmp_path / 'cifar10-inception-v3-compat-features-2048.pt')
    told = {'mu': features.mean(0), 'sigma': np.cov(features, rowvar=False)}
    torch.save(told, tmp_path / 'cifar10-inception-v3-compat-stat-fid-2048.pt')
    torch.save({key: torch.from_numpy(value) for key, value in told.items()}, tmp_path / 'tensors.pt')
    stats = load_statistics(tmp_path / 'cifar10-inception-v3-compat-features-2048.pt')
    same(stats, moments(features), rtol=1e-12)
    assert (stats.features == features).all() and stats.num_images == 30
    assert 'extractor "inception-v3-compat", features "2048"' in stats.note
    same(load_statistics(tmp_path / 'cifar10-inception-v3-compat-stat-fid-2048.pt'), told)
    same(load_statistics(tmp_path / 'tensors.pt'), told)


@pytest.mark.parametrize('name, words', [
    ('https://x.org/stats/cifar10_clean_train_na.npz#sha256=ab', '"clean", which resizes images to 299 x 299 with Pillow'),
    ('--ref-stats=stats/ffhq_legacy_pytorch_trainval70k_1024.npz', '"legacy_pytorch", which uses another network'),
    ('cifar10_legacy_tensorflow_train_32.npz', '"legacy_tensorflow", which uses the network and resize of the published FID'),
    ('fidelity_cache/my-set-vgg16-features-fc2_relu.pt', 'torch-fidelity, extractor "vgg16", features "fc2_relu"'),
    ('clean_dir/cifar10-32x32.npz', None)])
def test_what_names_tell(name, words):
    found = reference_files.unknown_detector(name)
    assert found.startswith('the file does not say which detector made it') and '\n' not in found
    assert words in found if words else found.endswith('made it')


def pickled(value, protocol=4):
    return lambda path: path.write_bytes(pickle.dumps(value, protocol))


def saved(value):
    return lambda path: torch.save(value, path)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path('ran'),)


EYE = {'mu': np.zeros(3), 'sigma': np.eye(3)}


@pytest.mark.parametrize('write, words', [
    (pickled({'fid': EYE, 'x': Payload()}), 'asks for pathlib'),
    (pickled({'fid': 5, 'other': {'mu': 1}}), 'holds no mu and sigma'),
    (pickled([1, 2]), 'holds no dict'),
    (pickled({'fid': {'mu': [0.0], 'sigma': [[1.0]]}}), 'holds no array "mu"'),
    (pickled({'fid': {**EYE, 'sigma': np.eye(4)}}), 'do not fit together'),
    (pickled({'fid': {**EYE, 'mu': np.full(3, np.nan)}}), 'not finite'),
    (pickled({'swav': EYE, 'fd_dinov2': EYE}), 'no statistics of --detector=inception; it holds "swav", "fd_dinov2" (--detector=dinov2)'),
    (pickled(EYE, 1), 'not a readable'),
    (lambda path: path.write_bytes(pickle.dumps({'fid': EYE})[:-50]), 'cut off'),
    (lambda path: path.write_bytes(b'\x80\x04'), 'cut off'),
    (lambda path: path.write_bytes(b''), 'not a readable'),
    (lambda path: path.write_bytes(b'PK\x05\x06' + bytes(18)), 'has no mu and sigma'),
    (saved(torch.zeros(3)), 'tensor [3] instead of features'),
    (saved(torch.zeros(1, 3)), 'at least 2 images'),
    (saved({'mu': torch.zeros(3)}), 'holds no mu and sigma'),
    (saved({'mu': np.zeros(3), 'sigma': torch.eye(3)}), '_rebuild_tensor_v2'),
    (saved({'mu': Payload()}), 'asks for'),
    (lambda path: np.savez(path.open('wb'), feats=np.zeros(3)), '"features" must be an array of numbers'),
    (lambda path: np.savez(path.open('wb'), **EYE, versions='[1]'), 'expected a JSON object'),
    (lambda path: np.savez(path.open('wb'), **EYE, tf32=1.5), '"tf32" must be true or false'),
])
def test_damaged_and_foreign_files(tmp_path, monkeypatch, write, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'a')
    with pytest.raises(UserError) as caught:
        load_statistics(tmp_path / 'a', '--ref-stats=a')
    assert caught.value.message.startswith('--ref-stats=a: ') and words in caught.value.message and '\n' not in caught.value.message
    assert not Path('ran').exists()
