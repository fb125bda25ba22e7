# SPDX-License-Identifier: Apache-2.0
"""Counts from end to end: converted, stabilised, generated or trained on, and back as counts with the right means."""

import numpy as np
import pytest
import torch

import denoise
import generate
import train
from dnnlib import UserError
from tests.support import tiny
from tests.support.gaussian import GaussianNet
from tests.test_end_to_end import call, convert
from torch_utils import misc
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.data.dataset import ImageDataset
from training.estimation.stabilise import Anscombe, of_units
from training.networks.preconditioning import build_network
from training.run.validation import check_alike
from training.sampling import pieces

SIDE = 8
RAMP = np.geomspace(2, 100, SIDE) * np.ones([SIDE, 1])  # mean counts by column


def intensities(count, spread, rng):
    """Clean images [count,H,W]: a ramp of mean counts from 2 to 100, each image brighter or darker by a factor."""
    return RAMP * rng.uniform(1 - spread, 1 + spread, (count, 1, 1))


class Known(GaussianNet):
    """A network that knows its training images but for their noise, as far as their mean over images and columns tells it: the exact
    denoiser of normal data around that mean, with a std of 1 stored unit common to all pixels."""

    def __init__(self, dataset):
        images = dataset.to_network(np.stack([dataset.decode(i) for i in range(len(dataset))])).double()
        super().__init__(dataset.image_shape, units=dataset.form.units)
        self.mean = images.mean((0, 2), keepdim=True)[0]
        self.spread = 0.2 / dataset.units['scale']

    def forward(self, x, sigma, class_labels=None):
        noise, size = misc.batched(sigma).double() ** 2, x[0].numel()
        offset = (x.double() - self.mean).mean((1, 2, 3), keepdim=True)
        return self.mean + self.spread ** 2 / (self.spread ** 2 + noise / size) * offset + torch.zeros_like(x)


def outputs(folder):
    return np.stack([np.load(path) for path in sorted(folder.glob('*.npy'))]).astype(np.float64)


@pytest.fixture
def counted(tmp_path):
    """(stabilised set, the counts [N,H,W])."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(intensities(1000, 0.02, rng)).astype(np.uint16)
    return convert(tmp_path, 'counts', counts, '--stabilise=anscombe', '--sheet=none'), counts


def test_generated_counts_have_the_means_of_the_data(counted, tmp_path, monkeypatch):
    """Mean counts from 2 to 100, column by column, within 1 % and what the draws allow; the plain inverse is a quarter too low."""
    path, counts = counted
    net = Known(ImageDataset(path))
    monkeypatch.setattr(pieces, 'open_network', lambda *args, **options: net)
    call(generate.main, '--network=NET', f'--outdir={tmp_path / "out"}', '--seeds=0-63', '--steps=8', '--sigma-max=20', '--grid')
    found, data = outputs(tmp_path / 'out').mean((0, 1, 2)), counts.mean((0, 1))
    assert abs(found.mean() / data.mean() - 1) < 0.01
    assert (abs(found / data - 1) < 0.01 + 3 * np.sqrt(1 / (1000 * SIDE * data))).all()
    plain = of_units(net.units).plain_inverse(np.float64(net.mean[0, 0] * net.units['scale'] + net.units['offset']))
    assert (abs(plain[2:] - data[2:] + 0.25) < 0.15).all() and (plain < data).all()
    assert (tmp_path / 'out-grid.png').stat().st_size > 0
    before = {name: (tmp_path / 'out' / name).read_bytes() for name in ('000000.npy', '000005.npy')}
    (tmp_path / 'out' / '000007.npy').unlink()
    call(generate.main, '--network=NET', f'--outdir={tmp_path / "out"}', '--seeds=0-63', '--steps=8', '--sigma-max=20', '--grid',
         '--skip-existing')
    assert before == {name: (tmp_path / 'out' / name).read_bytes() for name in before} and (tmp_path / 'out' / '000007.npy').exists()


def test_variance_of_the_stored_values_is_that_of_annotation(counted):
    """.92 at a mean count of 2, 1 from 4 on, whatever the intensity."""
    path, counts = counted
    dataset = ImageDataset(path)
    stored = np.stack([dataset.decode(i)[0] for i in range(len(dataset))]).astype(np.float64)
    assert abs(stored.var((0, 1))[0] - 0.92) < 0.05 and abs(stored.var((0, 1))[2:6] - 1).max() < 0.06
    np.testing.assert_allclose(stored, Anscombe().forward(np.float64(counts)), rtol=1e-6)


def test_the_transform_travels_with_the_network(tmp_path):
    """From dataset.json into the network's configuration, and out of its snapshot; sets of other units are not mixed with it."""
    counts = np.random.default_rng(0).poisson(np.full((8, 8, 8), 20)).astype(np.uint16)
    path = convert(tmp_path, 'x', counts, '--stabilise=generalised:a=2,b=3,offset=1', '--units=9,7', '--sheet=none')
    same = convert(tmp_path, 'same', counts, '--units=9,7', '--sigmas=1', '--sheet=none')
    config = tiny.options(str(tmp_path), f'--data={path}').network.arguments
    assert config['units'] == {'offset': 9.0, 'scale': 7.0, 'stabilise': {'a': 2.0, 'b': 3.0, 'offset': 1.0}}
    save_network(build_network(config), tmp_path / 'network')
    assert load_network(tmp_path / 'network').units == ImageDataset(path).units == config['units']
    call(generate.main, f'--network={tmp_path / "network"}', f'--outdir={tmp_path / "out"}', '--seeds=0-1', '--steps=1')
    assert (outputs(tmp_path / 'out') >= 1).all(), 'no value below the offset'
    with pytest.raises(UserError, match='its units is'):
        check_alike(ImageDataset(path), ImageDataset(same))
    with pytest.raises(UserError, match='"stabilise" is not'):
        build = tmp_path / 'network' / 'config.json'
        build.write_text(build.read_text().replace('"a": 2.0', '"a": 0'))
        load_network(tmp_path / 'network')


@pytest.mark.slow
def test_counts_train_and_come_back(tmp_path):
    """A network that is trained on counts alone, all of them noisy: flat images of six classes with mean counts from 2 to 100. The means of
    the images that it generates are those of the data within 1 %, in each class; so are denoised ones."""
    rng, means = np.random.default_rng(0), np.array([2, 4, 10, 25, 50, 100])
    labels = np.arange(1536) % len(means)
    clean = (means[labels] * rng.uniform(0.95, 1.05, len(labels)))[:, None, None] + np.zeros((1, SIDE, SIDE))
    np.save(tmp_path / 'labels.npy', labels)
    path = convert(tmp_path, 'counts', rng.poisson(clean).astype(np.uint16), '--stabilise=anscombe', '--sheet=none',
                   f'--labels={tmp_path / "labels.npy"}')
    call(train.main, f'--outdir={tmp_path / "runs"}', f'--data={path}', '--cond=1', '--cbase=16', '--cres=1,1', '--blocks=1', '--attn=4',
         '--batch=64', f'--duration={3600 * 64 / 1e6}', '--tick=19.2', '--snap=5', '--dump=0', '--lr=2e-3', '--lr-schedule=cosine',
         '--lr-rampup=0', '--ema=0.003', '--dropout=0', '--augment=0', '--samples=0', '--regime=noisy-only')
    snapshot = sorted(tiny.only_folder(tmp_path / 'runs').glob('network-snapshot-*'))[-1]
    call(generate.main, f'--network={snapshot}', f'--outdir={tmp_path / "out"}', '--seeds=0-599', '--steps=10', '--format=npz')
    files = [np.load(file) for file in sorted((tmp_path / 'out').glob('*.npz'))]
    classes = np.array([int(file['label']) for file in files])
    generated = np.array([file['image'].mean() for file in files])
    by_class = np.array([generated[classes == k].mean() / clean[labels == k].mean() for k in range(len(means))])
    print('generated', by_class.round(4), by_class.mean())
    np.save(tmp_path / 'noisy.npy', rng.poisson(25, (64, SIDE, SIDE)).astype(np.uint16))
    call(denoise.main, f'--network={snapshot}', f'--data={tmp_path / "noisy.npy"}', f'--dest={tmp_path / "y.npy"}', '--sheet=none',
         '--class=3')
    restored = np.load(tmp_path / 'y.npy')
    print('denoised', restored.mean() / 25, np.square(restored - 25).mean() / 25)
    assert abs((by_class * means).sum() / means.sum() - 1) < 0.01 and abs(by_class.mean() - 1) < 0.01
    assert (abs(by_class - 1) < 0.01).all()
    assert abs(restored.mean() / 25 - 1) < 0.01 and np.square(restored - 25).mean() < 0.1 * 25
