# SPDX-License-Identifier: Apache-2.0
"""What single detectors and the metrics that belong to them compute: sFID, CMMD and CLIP, DINOv2's positions, VGG-16."""

import dataclasses
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from dnnlib import UserError
from metrics import detectors, evaluate, vgg
from metrics.frechet import frechet_distance
from metrics.kernel import gaussian_distance
from metrics.statistics import Statistics, load_statistics, save_statistics
from tests.metrics.test_evaluate import Toy, made
from tests.support import GOLDEN
from tests.support.formula_weights import batch_of, save_inception_weights

# sFID


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    return made(f'inception:weights={save_inception_weights(tmp_path_factory.mktemp("inception") / "weights.pth")}')


def test_spatial_features_golden(inception):
    """Those of torch-fidelity's network with the same weights, after the ReLU of the first branch of Mixed_6d; rows, columns, channels."""
    images = torch.from_numpy(np.load(GOLDEN / 'inception' / 'features.npz')['images_32'][:2])
    expected = torch.from_numpy(np.load(GOLDEN / 'inception' / 'spatial.npz')['spatial_32'])
    features, logits, spatial = inception(images, spatial=True)
    assert spatial.shape == (2, 7 * 17 * 17) == (2, inception.spatial_dim)
    assert (spatial - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert torch.equal(features, inception(images)[0]) and torch.equal(logits, inception(images)[1])


def test_sfid_from_images_and_through_a_file(inception, tmp_path, monkeypatch):
    """The distance of the spatial features' Gaussians, from kept statistics under the published names. One channel, for speed."""
    monkeypatch.setattr('metrics.inception.SPATIAL_CHANNELS', 1)
    monkeypatch.setattr(inception, 'spatial_dim', 17 * 17)
    ours, theirs = batch_of(2, (3, 16, 16)), batch_of(3, (3, 16, 16), seed=1)
    reference = evaluate.collect([theirs], inception, keep_spatial=True).statistics
    save_statistics(reference, tmp_path / 'r.npz')
    assert {'mu_s', 'sigma_s'} <= set(np.load(tmp_path / 'r.npz').files)
    x, y = (inception(torch.from_numpy(images), spatial=True)[2].double().numpy() for images in (ours, theirs))
    expected = frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    found = evaluate.evaluate_batches(np.split(ours, [1]), inception, load_statistics(tmp_path / 'r.npz'), ('sfid',))
    assert found == {'sfid': pytest.approx(expected, rel=1e-5)}


def test_what_sfid_refuses(inception):
    plain = Statistics(np.zeros(2048), np.eye(2048))
    with pytest.raises(UserError, match=r'r: --metrics=sfid: .*mu_s, sigma_s.*with "ref".*--ref-path') as caught:
        evaluate.check_reference(plain, inception, (3, 8, 8), 'r', ('sfid',))
    assert '\n' not in caught.value.message
    with pytest.raises(UserError, match='--metrics=fid,sfid: sfid needs --detector=inception, not --detector=pixels'):
        evaluate.check_detector(detectors.pixel_detector('cpu'), ('fid', 'sfid'))


def test_spatial_statistics_that_do_not_fit(tmp_path):
    np.savez(tmp_path / 's.npz', mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(4), sigma_s=np.eye(5))
    with pytest.raises(UserError, match=r's.npz: mu_s \[4\] and sigma_s \[5, 5\] do not fit'):
        load_statistics(tmp_path / 's.npz')


# Names


def test_only_distances_of_fid_networks_are_called_fid():
    names = {name: evaluate.distance_name(name) for name in ('inception:precision=bf16', 'pixels', 'dinov2', 'clip', 'vgg16', None)}
    assert names == {'inception:precision=bf16': 'fid_score', 'pixels': 'fid_score', 'dinov2': 'fd_dinov2', 'clip': 'fd_clip',
                     'vgg16': 'fd_vgg16', None: 'fid_score'}
    toy = Toy()
    toy.name = 'dinov2'
    reference = evaluate.collect([batch_of(9)], toy).statistics
    assert set(evaluate.evaluate_batches([batch_of(9)], toy, reference, ('fid', 'fid_inf'))) == {'fd_dinov2', 'fd_dinov2_inf'}


# CMMD


def test_cmmd_by_hand():
    """Two points against one: k is 1 on the diagonal and exp(-d^2 / 200) elsewhere; the diagonal counts."""
    a, b = torch.tensor([[0., 0], [3, 4]]), torch.tensor([[0., 12]])
    k = lambda d2: np.exp(-d2 / 200)
    expected = 1000 * ((2 + 2 * k(25)) / 4 + 1 - 2 * (k(144) + k(9 + 64)) / 2)
    assert gaussian_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert gaussian_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match='rows of one length'):
        gaussian_distance(a, torch.zeros(2, 3))


def test_cmmd_is_of_clip():
    with pytest.raises(UserError, match='cmmd needs --detector=clip, not --detector=toy'):
        evaluate.check_detector(Toy(), ('cmmd',))
    toy = Toy()
    toy.name = 'clip'
    reference = evaluate.collect([batch_of(7, seed=1)], toy, keep_features=True).statistics
    found = evaluate.evaluate_batches([batch_of(5)], toy, reference, ('cmmd',))
    x = toy(torch.from_numpy(batch_of(5)))[0]
    assert found == {'cmmd': pytest.approx(gaussian_distance(x, reference.features), rel=1e-9)}
    with pytest.raises(UserError, match='r: --metrics=cmmd compare single images'):
        evaluate.check_reference(dataclasses.replace(reference, features=None), toy, (3, 4, 4), 'r', ('cmmd',))


@pytest.mark.parametrize('name', ['clip', 'dinov2'])
def test_detectors_that_need_a_package(monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'transformers', None)  # which makes its import fail
    with pytest.raises(UserError, match=f'--detector={name}: needs the package transformers'):
        made(name)


def test_clip(tmp_path):
    """A tiny network of its kind: embeddings of norm 1 of images that were resized and normalised."""
    transformers = pytest.importorskip('transformers')
    config = transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                           patch_size=14, projection_dim=5)
    net = transformers.CLIPVisionModelWithProjection(config).eval()
    net.save_pretrained(tmp_path)
    detector = made(f'clip:model={tmp_path}')
    flat = ((100 / 255 - torch.tensor(detectors.CLIP_MEAN)) / torch.tensor(detectors.CLIP_STD)).reshape(1, 3, 1, 1).expand(2, -1, 28, 28)
    expected = net(pixel_values=flat).image_embeds
    found = detector(torch.full((2, 1, 16, 16), 100, dtype=torch.uint8))[0]
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-4)
    assert detector.name == 'clip' and detector.dim((3, 8, 8)) == 5


# DINOv2


def keys(x):
    """Keys' cubic kernel with a = -0.75, which PyTorch's bicubic resize has."""
    x, a = abs(x), -0.75
    return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1 if x <= 1 else a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_positions_of_dinov2_are_resized_as_its_authors_do():
    """37 x 37 trained positions to 16 x 16: position i is read at (i + 1/2) 37 / 16.1 - 1/2."""
    trained = torch.randn(1, 1 + 37 * 37, 2, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.Module()
    embeddings.position_embeddings = torch.nn.Parameter(trained.clone())
    net = torch.nn.Module()
    net.embeddings, net.config = embeddings, type('Config', (), {'patch_size': 14})
    detectors._resize_positions(net)
    matrix = np.zeros((16, 37))
    for i in range(16):
        where = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(np.floor(where)) - 1, int(np.floor(where)) + 3):
            matrix[i, min(max(j, 0), 36)] += keys(where - j)
    grid = np.einsum('ia,jb,abd->ijd', matrix, matrix, trained[0, 1:].reshape(37, 37, 2).double().numpy())
    found = embeddings.position_embeddings
    assert found.shape == (1, 257, 2) and torch.equal(found[:, 0], trained[:, 0])
    np.testing.assert_allclose(found[0, 1:].detach().reshape(16, 16, 2).numpy(), grid, atol=2e-5)
    detectors._resize_positions(net)  # of the right size already: left alone
    assert net.embeddings.position_embeddings is found


def test_dinov2_of_larger_images_takes_those_positions(tmp_path):
    transformers = pytest.importorskip('transformers')
    config = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14)
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    net = made(f'dinov2:model={tmp_path}').net.__closure__
    net = next(cell.cell_contents for cell in net if isinstance(cell.cell_contents, torch.nn.Module))
    pixels = torch.zeros(1, 3, 224, 224)
    inside = net.embeddings(pixels) - torch.cat([net.embeddings.cls_token, net.embeddings.patch_embeddings(pixels)], dim=1)
    torch.testing.assert_close(inside, net.embeddings.position_embeddings, rtol=0, atol=1e-6)


# VGG-16


@pytest.fixture
def tiny(monkeypatch):
    """VGG-16's plan with two channels and three hidden numbers, and its weights."""
    monkeypatch.setattr(vgg, 'WIDTHS', (2, 'pool') * 5)
    monkeypatch.setattr(vgg, 'HIDDEN', 3)
    features, classifier = vgg.layers()
    named = [(f'{name}.{key}', value) for name, part in (('features', features), ('classifier', classifier))
             for key, value in part.state_dict().items()]
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(value.shape, generator=generator) * 0.4 for key, value in named}


def test_vgg16_has_the_names_of_torchvision():
    with torch.device('meta'):
        features, classifier = vgg.layers()
    shapes = {key: list(value.shape) for key, value in features.state_dict().items()}
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    assert list(shapes) == [f'{i}.{kind}' for i in numbers for kind in ('weight', 'bias')]
    assert shapes['0.weight'] == [64, 3, 3, 3] and shapes['28.weight'] == [512, 512, 3, 3]
    assert {key: list(value.shape) for key, value in classifier.state_dict().items()} == {
        '0.weight': [4096, 25088], '0.bias': [4096], '3.weight': [4096, 4096], '3.bias': [4096]}


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_vgg16_features(tiny, tmp_path, suffix):
    """Its formula, on images of its own size; of the file's last layer it knows nothing."""
    path, tensors = tmp_path / f'w.{suffix}', {**tiny, 'classifier.6.weight': torch.zeros(1000, 3)}
    torch.save(tensors, path) if suffix == 'pth' else safetensors.torch.save_file(tensors, path)
    detector = made(f'vgg16:weights={path}')
    images = torch.from_numpy(batch_of(2, (3, 224, 224)))
    x = (images / 255 - torch.tensor(vgg.MEAN).reshape(3, 1, 1)) / torch.tensor(vgg.STD).reshape(3, 1, 1)
    for i in range(0, 15, 3):
        x = torch.nn.functional.conv2d(x, tiny[f'features.{i}.weight'], tiny[f'features.{i}.bias'], padding=1).relu()
        x = torch.nn.functional.max_pool2d(x, 2)
    x = x.flatten(1)
    for i in (0, 3):
        x = (x @ tiny[f'classifier.{i}.weight'].T + tiny[f'classifier.{i}.bias']).relu()
    found, logits = detector(images)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    assert logits is None and found.max() > 0 and detector.name == 'vgg16' and len(detector.sha256) == 64
    assert detector.dim((1, 32, 32)) == 3


def test_vgg16_weights_that_are_none(tiny, tmp_path):
    torch.save({'features.0.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'pickled.pth')  # a pickled module: refused, never run
    (tmp_path / 'noise.safetensors').write_bytes(b'abc')
    for name, message in [('other.pth', 'features.0.weight" is missing or has the wrong shape'),
                          ('pickled.pth', 'cannot be read as weights'),
                          ('noise.safetensors', 'eader'), ('absent.pth', 'no such file')]:
        with pytest.raises(UserError, match=message) as caught:
            made(f'vgg16:weights={tmp_path / name}')
        assert '\n' not in caught.value.message and name in caught.value.message
