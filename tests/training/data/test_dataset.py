# SPDX-License-Identifier: Apache-2.0
"""Archives read as published, images and labels by index, noisy copies made once, bad files in one line."""

import hashlib
import io
import json
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dnnlib import UserError
from tests.support import GOLDEN, launch
from training.data.contents import Pictures
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.packed import PackedFolder
from training.data.store import ImageStore

DATA = GOLDEN / 'dataset'
FACTS = json.loads((DATA / 'dataset_facts.json').read_text())
PROTOCOL = json.loads((DATA / 'corruption_protocol.json').read_text())


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, 'png')
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pictures(count, shape=(8, 8, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path, members, **meta):
    """A zip of {name: bytes} with dataset.json made of the keywords, if any."""
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if meta:
            archive.writestr('dataset.json', json.dumps(meta))
    return str(path)


def picture_zip(path, count=12, shape=(8, 8, 3), **meta):
    return write(path, {f'{i:03}.png': png(image) for i, image in enumerate(pictures(count, shape))}, **meta)


def store_of(dataset, corruption=None, **options):
    corruption = corruption or Corruption()
    sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
    return ImageStore(dataset, corruption, sigma_n, **options)


def raw(dataset, items):
    """Items as they are stored, without added noise."""
    return np.stack([dataset.decode(dataset.raw_idx[i])[..., ::-1 if dataset.flip[i] else 1] for i in items])


def packed_copy(path, folder, **options):
    """The same data as a packed folder."""
    contents = Pictures(path)
    folder.mkdir()
    made = PackedFolder(folder, contents.image_shape, np.uint8)
    for i in range(contents.count):
        made.append(contents.decode(i).tobytes())
    made.finish({})
    return ImageDataset(str(folder), **options)


def refusal(path, **options):
    """The one line with which the data set, or the decoding of its images, is refused."""
    with pytest.raises(UserError) as error:
        store_of(ImageDataset(str(path), **options))
    assert '\n' not in error.value.message
    return error.value.message


# ----------------------------------------------------------------------------------------------------
# Reading


def test_published_archive_reads_the_same():
    want, dataset = FACTS['reading_A'], ImageDataset(str(DATA / 'A_subfolders.zip'), use_labels=True)
    assert dataset.name == want['name'] and len(dataset) == want['n']
    assert list(dataset.image_shape) == want['image_shape'] and dataset.label_dim == want['label_dim']
    assert dataset.labels([5]).tolist() == [want['item5_label']]
    assert dataset.decode(5).dtype == want['item5_dtype'] and dataset.decode(5).sum() == want['item5_sum']
    doubled = ImageDataset(str(DATA / 'A_subfolders.zip'), max_size=5, xflip=True)
    assert doubled.raw_idx.tolist() == want['max5_seed0_raw_idx']
    assert doubled.flip.astype(int).tolist() == want['max5_xflip_flags']


@pytest.mark.parametrize('case', FACTS['max_size_raw_idx'])
def test_published_subset(case, tmp_path):
    """Names are enough for the subset, so 50,000 members can share one tiny picture."""
    path = write(tmp_path / 'x.zip', dict.fromkeys([f'{i:05}.png' for i in range(case['N'])], png(pictures(1)[0])))
    dataset = ImageDataset(path, max_size=case['max_size'], xflip=case['xflip'], random_seed=case['random_seed'])
    assert dataset.raw_idx.tolist() == case['raw_idx']


def test_folder_and_zip_are_the_same(tmp_path):
    path = picture_zip(tmp_path / 'a.zip', labels=[[f'{i:03}.png', i % 3] for i in range(12)])
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / 'folder')
    a, b = (ImageDataset(str(p), use_labels=True) for p in (path, tmp_path / 'folder'))
    np.testing.assert_array_equal(a.labels(range(12)), b.labels(range(12)))
    assert all((a.decode(i) == b.decode(i)).all() for i in range(12))


def test_labels_as_classes_vectors_and_objects(tmp_path):
    names = [f'{i:03}.png' for i in range(12)]
    classes = ImageDataset(picture_zip(tmp_path / 'c.zip', labels=dict(zip(names, [0, 4] * 6))), use_labels=True, max_size=4)
    assert classes.label_dim == 5  # of the whole archive, whatever the subset holds
    np.testing.assert_array_equal(classes.labels([0, 1, 2, 3]).argmax(1), np.array([0, 4] * 6)[classes.raw_idx])
    vectors = ImageDataset(picture_zip(tmp_path / 'v.zip', labels=[[n, [0.5, i]] for i, n in enumerate(names)]), use_labels=True)
    np.testing.assert_array_equal(vectors.labels([3, 1]), np.array([[0.5, 3], [0.5, 1]], np.float32))
    without = ImageDataset(picture_zip(tmp_path / 'n.zip', labels=None))
    assert not without.has_labels and without.labels([0, 1]).shape == (2, 0)


def test_keep_is_exact_before_xflip(tmp_path):
    """Fault 2a.8: the published share was taken of the doubled length, so that half of the images were all of them."""
    path = picture_zip(tmp_path / 'a.zip')
    dataset = ImageDataset(path, keep=0.5, xflip=True)
    assert len(dataset) == 12 and len(set(dataset.raw_idx)) == 6
    np.testing.assert_array_equal(dataset.raw_idx[:6], dataset.raw_idx[6:])
    assert set(ImageDataset(path, keep=0.25).raw_idx) < set(dataset.raw_idx)


def test_palette_and_bits_become_intensities(tmp_path):
    image = Image.fromarray(pictures(1)[0])
    for mode, channels in (('P', 3), ('1', 1), ('L', 1), ('RGBA', 4)):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, 'png')
        dataset = ImageDataset(write(tmp_path / f'{mode}.zip', {'a.png': buffer.getvalue()}))
        assert dataset.image_shape == (channels, 8, 8)
        if mode == 'P':
            np.testing.assert_array_equal(dataset.decode(0).transpose(1, 2, 0), np.asarray(image.convert('P').convert('RGB')))


def test_float_images_and_their_sigmas_are_scaled(tmp_path):
    images = np.random.default_rng(0).normal(100, 20, (3, 5, 4, 6)).astype(np.float32)
    members = {f'{i}.npy': npy(image) for i, image in enumerate(images)}
    path = write(tmp_path / 'f.zip', members, units={'offset': 100, 'scale': 40}, sigmas={'0.npy': 0, '1.npy': 4, '2.npy': 20})
    dataset = ImageDataset(path)
    assert dataset.is_float and dataset.image_shape == (5, 4, 6)
    np.testing.assert_allclose(dataset.native_sigma, [0, 0.1, 0.5])
    store = store_of(dataset)
    np.testing.assert_allclose(store.gather([2, 0]).numpy(), (images[[2, 0]] - 100) / 40, atol=1e-6)
    np.testing.assert_array_equal(dataset.decode(1), images[1])


def test_channels_with_units_of_their_own(tmp_path):
    """Where their scales differ, levels are in network units; with one scale, in those of the data."""
    offset, scale = np.array([100, -3]), np.array([40, 0.5])
    network = np.random.default_rng(0).normal(0, 0.5, (2, 2, 4, 6))
    images = (network * scale[:, None, None] + offset[:, None, None]).astype(np.float32)
    members = {f'{i}.npy': npy(image) for i, image in enumerate(images)}
    levels = {'sigmas': {'0.npy': 0.2, '1.npy': 0}, 'sigma_max': {'0.npy': 0.6, '1.npy': None}}
    dataset = ImageDataset(write(tmp_path / 'f.zip', members, units={'offset': offset.tolist(), 'scale': scale.tolist()}, **levels))
    np.testing.assert_allclose(store_of(dataset).gather([0, 1]).numpy(), network, atol=1e-5)
    np.testing.assert_allclose(dataset.to_network(images[1]), network[1], atol=1e-5)
    assert dataset.native_sigma.tolist() == [0.2, 0] and dataset.sigma_max.tolist() == [0.6, np.inf]
    dataset = ImageDataset(write(tmp_path / 'g.zip', members, units={'offset': offset.tolist(), 'scale': 2}, **levels))
    np.testing.assert_allclose(dataset.native_sigma, [0.1, 0])
    np.testing.assert_allclose(dataset.sigma_max, [0.3, np.inf])
    assert 'units of 3 channels, but its images have 2' in refusal(
        write(tmp_path / 'h.zip', members, units={'offset': [0, 0, 0], 'scale': 1}))


# ----------------------------------------------------------------------------------------------------
# Upper limits


def test_upper_limits_follow_the_images(tmp_path):
    """As an object or as pairs, null for none, in the units of sigmas; subsets and flips keep theirs."""
    names, limits = [f'{i:03}.png' for i in range(12)], [None, *np.linspace(0.05, 1, 11)]
    for table in (dict(zip(names, limits)), [list(pair) for pair in zip(names, limits)]):
        dataset = ImageDataset(picture_zip(tmp_path / 'a.zip', sigma_max=table), keep=0.5, xflip=True)
        assert dataset.sigma_max.dtype == np.float64
        assert dataset.sigma_max.tolist() == [np.inf if limits[i] is None else limits[i] for i in dataset.raw_idx]
    assert (ImageDataset(picture_zip(tmp_path / 'b.zip')).sigma_max == np.inf).all()
    members = {f'{i}.npy': npy(np.zeros([1, 4, 4], np.float32)) for i in range(2)}
    path = write(tmp_path / 'f.zip', members, units={'offset': 100, 'scale': 40}, sigma_max={'0.npy': 4, '1.npy': None})
    np.testing.assert_allclose(ImageDataset(path).sigma_max, [0.1, np.inf])


@pytest.mark.parametrize('limits', [[0, 1], [-0.1, 1], [float('nan'), 1], ['x', 1], [[1, 2], 1]])
def test_bad_upper_limits(tmp_path, limits):
    path = picture_zip(tmp_path / 'a.zip', 2, sigma_max=dict(zip(['000.png', '001.png'], limits)))
    assert '"sigma_max" in dataset.json' in refusal(path)
    assert '"sigma_max" in dataset.json misses 1 of 2' in refusal(picture_zip(tmp_path / 'b.zip', 2, sigma_max={'000.png': 1}))


def test_lower_limits_follow_the_images(tmp_path):
    """As upper ones, but 0 for none, and the largest number, or Python's Infinity, for never."""
    names, limits = [f'{i:03}.png' for i in range(12)], [None, 0, 1.7976931348623157e308, np.inf, *np.linspace(0.05, 1, 8)]
    dataset = ImageDataset(picture_zip(tmp_path / 'a.zip', sigma_min=dict(zip(names, limits))), keep=0.5, xflip=True)
    assert dataset.sigma_min.tolist() == [[0, 0, np.inf, np.inf, *limits[4:]][i] for i in dataset.raw_idx]
    assert (dataset.sigma_max == np.inf).all() and dataset.sigma_min.dtype == np.float64
    assert not ImageDataset(picture_zip(tmp_path / 'b.zip')).sigma_min.any()
    members = {f'{i}.npy': npy(np.zeros([1, 4, 4], np.float32)) for i in range(2)}
    path = write(tmp_path / 'f.zip', members, units={'offset': 100, 'scale': 40}, sigma_min={'0.npy': 4, '1.npy': None})
    np.testing.assert_allclose(ImageDataset(path).sigma_min, [0.1, 0])
    assert '"sigma_min" in dataset.json has the limit -1 for 001.png' in refusal(
        picture_zip(tmp_path / 'c.zip', 2, sigma_min={'000.png': 1, '001.png': -1}))


# ----------------------------------------------------------------------------------------------------
# Noisy copies


def test_clean_batches_are_exact(tmp_path):
    dataset = ImageDataset(picture_zip(tmp_path / 'a.zip'))
    images, store = pictures(12).transpose(0, 3, 1, 2), store_of(dataset)
    order = [5, 0, 5, 11]
    batch = store.gather(torch.tensor(order))
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), images[order].astype(np.float32) / np.float32(127.5) - 1)
    batch.zero_()
    assert store.gather(order).abs().sum() > 0  # a batch is a copy


def test_noisy_images_carry_one_fixed_noise(tmp_path):
    """Equal over epochs, stores, ranks and threads; the level is sigma_n, on top of a native level where there is one."""
    path = picture_zip(tmp_path / 'a.zip', 40, (32, 32, 3), sigmas={f'{i:03}.png': 0.3 if i < 20 else 0 for i in range(40)})
    dataset, corruption = ImageDataset(path), Corruption(0.5, 0.5, seed=1)
    sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
    store = ImageStore(dataset, corruption, sigma_n, workers=1)
    added = (store.gather(range(40)) - dataset.to_network(raw(dataset, range(40)))).numpy()
    assert store.noisy_count == (sigma_n == 0.5).sum() == 20
    for k in range(40):
        std = np.sqrt(sigma_n[k] ** 2 - dataset.native_sigma[k] ** 2)
        np.testing.assert_allclose(added[k], std * corruption.noise(k, (3, 32, 32)), atol=1e-6)
        assert abs(added[k].std() - std) <= 5 * std / np.sqrt(2 * 3072)
    other = store_of(ImageDataset(path), Corruption(0.5, 0.5, seed=1), workers=5)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(other.gather(order).numpy(), store.gather(order).numpy())
    np.testing.assert_array_equal(store.gather(order).numpy(), store.gather(order).numpy())


def test_xflip_mirrors_the_noisy_image_with_its_noise(tmp_path):
    """Fault 2a.7: noise added after the flip gave a second noisy look at the same image."""
    dataset = ImageDataset(picture_zip(tmp_path / 'a.zip'), xflip=True)
    store = store_of(dataset, Corruption(0.3, 1.0))
    assert store.noisy_count == 12
    np.testing.assert_array_equal(store.gather(range(12, 24)).numpy(), store.gather(range(12)).flip(3).numpy())


def test_published_protocol_gives_the_published_training_images():
    """The item itself, and its flip, which the published code mirrored before it added the same noise."""
    golden = load_file(DATA / 'corruption_3x8x8.safetensors')
    dataset = ImageDataset(str(DATA / 'corruption_src_20x3x8x8.zip'), xflip=True)
    store = store_of(dataset, Corruption(0.2, 0.5, protocol='published'))
    plain, mirrored = store.gather(range(20)).numpy(), store.gather(range(20, 40)).numpy()
    np.testing.assert_allclose(plain, golden['images_p'], atol=1e-6)
    clean = dataset.to_network(raw(dataset, range(20, 40))).numpy()
    noise = golden['sigma_p'][:, None, None, None] * golden['noise_p']
    assert PROTOCOL['xflip']['same_noise']
    np.testing.assert_allclose(mirrored, clean + noise, atol=1e-6)


def test_published_keep_of_the_noisy_archive():
    dataset = ImageDataset(str(DATA / 'corruption_src_20x3x8x8.zip'), max_size=7)
    assert dataset.raw_idx.tolist() == PROTOCOL['max_size7_raw_idx']


@pytest.mark.parametrize('protocol', ['fixed', 'published'])
def test_noisy_images_kept_or_made_anew_are_the_same(tmp_path, protocol):
    """And in a mapped file, with any number of threads, at the first use and later."""
    path, corruption = picture_zip(tmp_path / 'a.zip', 100), Corruption(0.2, 0.5, protocol=protocol)
    data = ImageDataset(path, xflip=True)
    kept, anew, threads = (store_of(data, corruption, cache_gib=g, workers=w) for g, w in ((1, 1), (0, 1), (0, 4)))
    packed = store_of(packed_copy(path, tmp_path / 'packed', xflip=True), corruption)
    assert kept.kept_bytes == kept.noisy_count * 8 * 8 * 3 * 4 and not anew.kept_bytes and packed.mapped and not kept.mapped
    for seed in range(3):
        order = np.random.default_rng(seed).integers(0, 200, 150)
        first, *others = (store.gather(order) for store in (kept, anew, threads, packed))
        assert all(torch.equal(first, other) for other in others)
    assert 0 < int(kept._have.sum()) <= kept.noisy_count


def test_what_is_kept_fits_the_memory_of_the_node(tmp_path):
    data, nbytes = ImageDataset(picture_zip(tmp_path / 'a.zip', 100)), 50 * 8 * 8 * 3 * 4
    for gib, kept in ((nbytes / 2 ** 30, nbytes), ((nbytes - 1) / 2 ** 30, 0)):
        store = store_of(data, Corruption(0.2, 0.5), cache_gib=gib)
        assert store.kept_bytes == kept
        assert ('keep noisy images' in store.words()) == bool(kept) and ('recomputed at each use' in store.words()) == (not kept)


RANKS = '''
import sys, hashlib, os
from torch_utils import distributed
from training.data.corruption import Corruption
from training.data.dataset import ImageDataset
from training.data.store import ImageStore
distributed.init()
data, c = ImageDataset(sys.argv[1], xflip=True), Corruption(0.2, 0.5)
sigma_n = c.levels(data.raw_idx, data.native_sigma, data.image_shape)
store = ImageStore(data, c, sigma_n, cache_gib=float(sys.argv[2]))
order = range(len(data))[::1 - 2 * distributed.rank()]  # one from each end: they meet
digests = [hashlib.sha256(store.gather(order).numpy().tobytes()).hexdigest() for _ in range(2)]
distributed.barrier()
filled = float(store._kept[-1].abs().sum() + store._kept[0].abs().sum()) if store.kept_bytes else 0
os.write(1, f'{distributed.rank()} {len(set(digests))} {digests[0]} {bool(store.kept_bytes)} {filled > 0}{chr(10)}'.encode())
distributed.shutdown()
'''


@pytest.mark.parametrize('gib', [0, 1])
def test_two_ranks_see_what_one_process_sees(tmp_path, gib):
    """With noisy images in memory that the two share, or made anew."""
    script, path = tmp_path / 'ranks.py', picture_zip(tmp_path / 'a.zip', 300)
    script.write_text(RANKS)
    run = launch.run(script, [path, gib], ranks=2)
    single = store_of(ImageDataset(path, xflip=True), Corruption(0.2, 0.5)).gather(range(600))
    want = [hashlib.sha256(images.numpy().tobytes()).hexdigest() for images in (single, single.flip(0))]
    assert sorted(run.stdout.splitlines()) == [f'{rank} 1 {want[rank]} {gib == 1} {gib == 1}' for rank in (0, 1)], run.stderr


def test_gather_from_threads(tmp_path):
    store = store_of(ImageDataset(picture_zip(tmp_path / 'a.zip', 200), xflip=True), Corruption(0.2, 0.5))
    orders = [np.random.default_rng(i).integers(0, 400, 64) for i in range(8)]
    want, got = [store.gather(order) for order in orders], [None] * 8

    def work(k):
        for _ in range(20):
            got[k] = store.gather(orders[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(a, b) for a, b in zip(want, got))


# ----------------------------------------------------------------------------------------------------
# Refusals, one line each


def test_missing_and_truncated_zip(tmp_path):
    assert 'no such zip file or folder' in refusal(tmp_path / 'none.zip')
    whole = Path(picture_zip(tmp_path / 'a.zip'))
    whole.write_bytes(whole.read_bytes()[:2000])
    assert 'not a whole zip file' in refusal(whole)


def test_no_images(tmp_path):
    assert 'no images in it' in refusal(write(tmp_path / 'a.zip', {'readme.txt': b'hello'}))
    (tmp_path / 'empty').mkdir()
    assert 'no images in it' in refusal(tmp_path / 'empty')


def test_image_of_another_size_or_type_is_named(tmp_path):
    path = write(tmp_path / 'a.zip', {'0.png': png(pictures(1)[0]), '1.png': png(pictures(1, (8, 10, 3))[0])})
    assert '1.png is uint8 3x8x10, but 0.png is uint8 3x8x8' in refusal(path)
    path = write(tmp_path / 'b.zip', {'0.png': png(pictures(1)[0]), '1.npy': npy(np.zeros([3, 8, 8], np.float32))})
    assert '1.npy is float32' in refusal(path)


def test_undecodable_members_are_named(tmp_path):
    good = png(pictures(1)[0])
    for name, data in (('bad.png', good[:60]), ('bad.png', b'hello'), ('bad.npy', b'\x93NUMPY junk'), ('bad.png', b'')):
        assert f'cannot read {name}' in refusal(write(tmp_path / 'a.zip', {'a.png': good, name: data}))


def test_pickles_in_npy_members_are_not_opened(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    assert 'cannot read a.npy' in refusal(write(tmp_path / 'a.zip', {'a.npy': buffer.getvalue()}))


def test_sixteen_bit_png_is_not_taken_for_eight(tmp_path):
    assert 'expected 8-bit or float32' in refusal(write(tmp_path / 'a.zip', {'a.png': png(np.zeros([8, 8], np.uint16))}))


def test_label_file_that_misses_a_file(tmp_path):
    path = picture_zip(tmp_path / 'a.zip', labels=[[f'{i:03}.png', 0] for i in range(12) if i != 7])
    assert 'misses 1 of 12 files, such as 007.png' in refusal(path, use_labels=True)
    path = picture_zip(tmp_path / 'b.zip', sigmas={'000.png': 0.1})
    assert '"sigmas" in dataset.json misses 11 of 12 files' in refusal(path)


@pytest.mark.parametrize('labels', [[-1, 0], [[1], [1, 2]], ['cat', 'dog'], [[1.0], [float('nan')]], [None, 1]])
def test_bad_labels(tmp_path, labels):
    names = ['000.png', '001.png']
    path = picture_zip(tmp_path / 'a.zip', 2, labels=[[n, v] for n, v in zip(names, labels)])
    assert '"labels" in dataset.json' in refusal(path, use_labels=True)


@pytest.mark.parametrize('sigmas', [[-0.1, 0], [float('nan'), 0], ['x', 0], [[1, 2], 0]])
def test_bad_sigmas(tmp_path, sigmas):
    path = picture_zip(tmp_path / 'a.zip', 2, sigmas=dict(zip(['000.png', '001.png'], sigmas)))
    assert '"sigmas" in dataset.json' in refusal(path)


@pytest.mark.parametrize('units', [None, {'offset': 0}, {'offset': 0, 'scale': 0}, {'offset': 'a', 'scale': 1}])
def test_float_images_need_units(tmp_path, units):
    assert 'units' in refusal(write(tmp_path / 'a.zip', {'a.npy': npy(np.zeros([1, 4, 4], np.float32))}, units=units))


def test_cond_without_labels(tmp_path):
    for meta in ({}, {'labels': None}):
        assert refusal(picture_zip(tmp_path / 'a.zip', **meta), use_labels=True).startswith('--cond=1')


def test_broken_json(tmp_path):
    for text in (b'{', b'[1]'):
        assert 'dataset.json' in refusal(write(tmp_path / 'a.zip', {'a.png': png(pictures(1)[0]), 'dataset.json': text}))


@pytest.mark.parametrize('keep', [0, -0.5, 1.5, float('nan'), 0.01])
def test_keep_out_of_range(tmp_path, keep):
    assert f'--dataset-keep-percentage={keep}' in refusal(picture_zip(tmp_path / 'a.zip'), keep=keep)
