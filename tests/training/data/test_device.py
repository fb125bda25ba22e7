# SPDX-License-Identifier: Apache-2.0
"""Batches put together on the device are those of the host, to the bit; what does not fit stays on the host."""

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.support import GOLDEN, tiny
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.device import SHARE, DeviceStore, needed, on_device
from training.data.packed import new_packed
from training.data.store import ImageStore

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def store_of(path, corruption, **options):
    data = ImageDataset(str(path), **options)
    return ImageStore(data, corruption, corruption.levels(data.raw_idx, data.native_sigma, data.image_shape))


def floats(folder):
    images = np.random.default_rng(0).normal(5, 3, (20, 2, 4, 4)).astype(np.float32)
    with new_packed(folder / 'floats', images.shape[1:], images.dtype) as made:
        for image in images:
            made.append(image.tobytes())
        made.finish({'sigmas': np.linspace(0, 1, 20)}, units={'offset': 5.1, 'scale': 3.3})
    return folder / 'floats'


@pytest.mark.parametrize('probability', [0, 0.5, 1])
@pytest.mark.parametrize('kind', ['pictures', 'subset', 'floats', 'published'])
def test_the_same_bits(tmp_path, kind, probability):
    path = floats(tmp_path) if kind == 'floats' else GOLDEN / 'dataset' / 'corruption_src_20x3x8x8.zip'
    corruption = Corruption(0.3, probability, protocol='published' if kind == 'published' else 'fixed')
    host = store_of(path, corruption, xflip=kind != 'floats', keep=0.5 if kind == 'subset' else 1.0)
    device, count = DeviceStore(host, DEVICE), len(host.dataset)
    for seed in range(4):
        order = np.random.default_rng(seed).integers(0, count, 15)
        assert torch.equal(device.gather(order).cpu(), host.gather(order))
    clean = len(np.unique(host.dataset.raw_idx[~host.noisy.numpy()]))
    assert needed(host) == host.dataset.contents.decode(0).nbytes * clean + host.noisy_count * 4 * np.prod(host.dataset.image_shape)


def test_it_goes_there_where_it_fits(tmp_path):
    store = store_of(GOLDEN / 'dataset' / 'corruption_src_20x3x8x8.zip', Corruption(0.3, 0.5))
    nbytes = needed(store)
    assert on_device(store, 'host', DEVICE, free=10 ** 9) is store
    assert isinstance(on_device(store, 'auto', DEVICE, free=nbytes / SHARE), DeviceStore)
    assert on_device(store, 'auto', DEVICE, free=nbytes / SHARE - 1) is store
    assert isinstance(on_device(store, 'device', DEVICE, free=nbytes), DeviceStore)
    with pytest.raises(UserError, match='^--data-on=device: the images take 0.0 GiB'):
        on_device(store, 'device', DEVICE, free=nbytes - 1)
    assert on_device(store, 'auto', 'cpu') is store
    assert 'GiB in the memory of' in DeviceStore(store, DEVICE).words()


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_no_gpu(tmp_path):
    with pytest.raises(UserError, match='^--data-on=device needs a GPU'):
        tiny.options(tmp_path, '--data-on=device')


def test_a_run_is_the_same_on_the_device(tmp_path, monkeypatch):
    from training.run import build

    losses = []
    for place in ('host', 'auto'):
        monkeypatch.setattr(build, 'on_device', lambda store, where, device: on_device(store, where, device, free=10 ** 9))
        run = tiny.make_run(tmp_path, f'--data-on={place}', '--cond=1', '--xflip=1', '--threads=1')
        assert isinstance(run.data.feed.store, DeviceStore) == (place == 'auto')
        for _ in range(3):
            run.step()
        losses.append(tiny.digest([p.detach() for p in run.net.parameters()]))
        run.data.feed.close()
    assert losses[0] == losses[1]
