# SPDX-License-Identifier: Apache-2.0
"""Data sets of latents: what is read, fresh samples at each visit, stored mirrored latents, and noise."""

import json

import numpy as np
import pytest
import torch

from dnnlib import UserError
from torch_utils import misc
from training.data.batches import HostBatch, micro_batches
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.device import DeviceStore
from training.data.latents import read_latents, sample
from training.data.packed import PackedFolder
from training.data.store import ImageStore

RECORD = dict(autoencoder={'ref': 'tiny:one', 'range': '-1..1', 'sha256': 'a' * 64}, form='distribution', xflip=True,
              picture_shape=[3, 6, 8])
UNITS = {'offset': [1.0, -2.0], 'scale': [2.0, 4.0]}


def write(path, count=6, channels=4, **more):
    """A packed set of `count` images; with xflip the second half is of mirrored pictures."""
    path.mkdir()
    folder = PackedFolder(path, (channels, 3, 4), np.float32)
    images = np.random.default_rng(1).standard_normal((count, channels, 3, 4)).astype(np.float32)
    images[:, channels // 2:] = np.abs(images[:, channels // 2:])
    folder.allocate(count)[:] = images
    folder.finish({'labels': np.arange(count) % 2}, units=UNITS, latents={**RECORD, **more})
    return images


def clean(dataset):
    return ImageStore(dataset, Corruption(), dataset.native_sigma)


def network(images, offset=(1.0, -2.0), scale=(2.0, 4.0)):
    offset, scale = (np.float32(values).reshape(-1, 1, 1) for values in (offset, scale))
    return np.concatenate([(images[:, :2] - offset) / scale, images[:, 2:] / scale], axis=1)


def test_shapes_and_units(tmp_path):
    images = write(tmp_path / 'x')
    dataset = ImageDataset(tmp_path / 'x')
    assert dataset.image_shape == (2, 3, 4) and dataset.stored_shape == (4, 3, 4) and dataset.resolution == [3, 4]
    assert len(dataset) == 3 and dataset.form.latents.autoencoder['ref'] == 'tiny:one'
    found = clean(dataset).gather([2, 0])
    assert np.allclose(found, network(images[[2, 0]]), atol=1e-6)


def test_mirrored_pictures_are_stored_and_never_mirrored_latents(tmp_path):
    images = write(tmp_path / 'x')
    dataset = ImageDataset(tmp_path / 'x', xflip=True)
    assert len(dataset) == 6 and dataset.raw_idx.tolist() == [0, 1, 2, 0, 1, 2] and dataset.flip.tolist() == [False] * 3 + [True] * 3
    assert np.allclose(clean(dataset).gather(range(6)), network(images), atol=1e-6)
    assert np.array_equal(DeviceStore(clean(dataset), 'cpu').gather(range(6)), clean(dataset).gather(range(6)))
    kept = ImageDataset(tmp_path / 'x', xflip=True, keep=0.67)
    assert sorted(set(kept.row - kept.raw_idx)) == [0, 3] and len(kept) == 4  # an image and its mirrored form are kept together
    write(tmp_path / 'y', xflip=False)
    assert len(ImageDataset(tmp_path / 'y')) == 6
    with pytest.raises(UserError, match='--xflip=1: .*mirrored latent is not .*encode --xflip'):
        ImageDataset(tmp_path / 'y', xflip=True)


@pytest.mark.parametrize('cache_gib', [8, 0])
def test_noise_is_fixed_and_in_the_means_alone(tmp_path, cache_gib):
    images = write(tmp_path / 'x')
    dataset = ImageDataset(tmp_path / 'x', xflip=True)
    corruption = Corruption(sigma=0.5, probability=1.0, seed=3)
    levels = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
    store = ImageStore(dataset, corruption, levels, cache_gib=cache_gib)
    added = store.gather(range(6)).numpy() - network(images)
    assert not added[:, 2:].any() and np.array_equal(store.gather(range(6)).numpy() - network(images), added)
    assert np.allclose(added[0, :2], 0.5 * corruption.noise(0, (2, 3, 4)), atol=1e-6)
    assert np.allclose(added[3:, :2], added[:3, :2, :, ::-1], atol=1e-6)  # one noise for an image and its mirrored form
    device = DeviceStore(store, 'cpu')
    assert np.array_equal(device.gather(range(6)), store.gather(range(6)))
    assert np.array_equal(device.gather([4, 1]), store.gather([4, 1]))


def host(images):
    zeros = torch.zeros(len(images))
    return HostBatch(images, zeros, zeros + 1, None, torch.arange(len(images)), {})


def drawn(images, step, size, first_row=0, seed=7):
    draws_of = lambda row: misc.Draws(seed, step, first_row + row)
    return torch.cat([batch.images for batch, _ in micro_batches(host(images), size, 'cpu', draws_of, channels=2)])


def test_each_visit_draws_a_fresh_sample_that_ranks_and_resumes_agree_on():
    mean, std = torch.full([48, 2, 8, 8], 3.0), torch.full([48, 2, 8, 8], 0.25)
    images = torch.cat([mean, std], dim=1)
    first, second = drawn(images, 0, 48), drawn(images, 1, 48)
    assert first.shape == (48, 2, 8, 8) and not torch.equal(first, second)
    for found in (first, second):
        assert abs(float(found.mean()) - 3) < 4 * 0.25 / 78 and abs(float(found.std()) / 0.25 - 1) < 0.04
    assert abs(float(((first - 3) * (second - 3)).mean())) < 4 * 0.25 ** 2 / 78  # independent
    assert torch.equal(drawn(images, 0, 5), first) and torch.equal(drawn(images, 0, 48), first)
    assert torch.equal(torch.cat([drawn(images[:20], 0, 20), drawn(images[20:], 0, 7, first_row=20)]), first)
    assert torch.equal(drawn(mean, 0, 48), mean)  # of means nothing is drawn


def test_sample():
    images = torch.tensor([1.0, 2.0, 0.5, 0.0]).reshape(1, 4, 1, 1)
    assert sample(images, torch.full([1, 2, 1, 1], 2.0)).flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize('change, problem', [
    ({'form': 'eight'}, 'form is not distribution or mean'), ({'xflip': 1}, 'xflip is not true or false'),
    ({'picture_shape': [3, 6]}, 'picture_shape'), ({'autoencoder': {}}, 'no "ref"'), ({'more': 1}, 'not an object of')])
def test_records_are_checked(tmp_path, change, problem):
    with pytest.raises(ValueError, match=problem):
        read_latents({**RECORD, **change}, (4, 3, 4), 6)
    write(tmp_path / 'x', **change)
    with pytest.raises(UserError, match='dataset.json has "latents"'):
        ImageDataset(tmp_path / 'x')


def test_counts_are_checked():
    for shape, count in (((3, 3, 4), 6), ((4, 3, 4), 5)):
        with pytest.raises(ValueError, match=f'and {count} images of {shape[0]} channels'):
            read_latents(RECORD, shape, count)
    assert read_latents(None, (4, 3, 4), 5) is None


def test_a_folder_of_files_can_hold_latents(tmp_path):
    """EDM2's own sets are .npy files of eight channels: with "latents" and "units" in their dataset.json they are read as such."""
    images = np.random.default_rng(0).random((2, 4, 3, 4)).astype(np.float32)
    for i, image in enumerate(images):
        np.save(tmp_path / f'{i}.npy', image)
    (tmp_path / 'dataset.json').write_text(json.dumps({'units': UNITS, 'latents': {**RECORD, 'xflip': False}}))
    dataset = ImageDataset(tmp_path)
    assert dataset.image_shape == (2, 3, 4) and np.allclose(clean(dataset).gather([1]), network(images[1:]), atol=1e-6)
