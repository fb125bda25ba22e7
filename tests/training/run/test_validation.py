# SPDX-License-Identifier: Apache-2.0
"""Held-out loss: equal twice, independent of batch size and ranks, and what its definition says."""

import json
import zipfile

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.support import tiny
from torch_utils import misc, training_stats
from training.data.limits import usable_levels
from training.objective.loss import AmbientLoss
from training.objective.weighting import WEIGHTS
from training.run import validation

CPU = torch.device('cpu')
LEVELS = [0.1, 0.5, 2.0]
SIGMA_N = np.array([0, 0.4, 0, 1.0] * 5)


def halve(x, sigma, class_labels=None, augment_labels=None):
    """A denoiser that works on each image by itself, to the bit."""
    return x / 2


class Store:
    images = torch.randn([20, 2, 4, 4], generator=misc.generator('validation store'))

    def gather(self, where):
        return self.images[where]


def make(batch=20, seed=3, items=None, levels=LEVELS, limits=None):
    return validation.Validation(Store(), np.arange(20) if items is None else items, SIGMA_N, None, levels, batch, seed, limits)


def term():
    return AmbientLoss(WEIGHTS['uniform'])


def test_equal_twice_and_in_any_batch():
    expected = make()(halve, term(), CPU)
    assert make()(halve, term(), CPU) == expected
    for batch in (1, 3, 7, 64):
        found = make(batch)(halve, term(), CPU)
        assert list(found) == list(expected)
        assert all(found[name] == (value and pytest.approx(value, rel=1e-12)) for name, value in expected.items())
    assert make(seed=4)(halve, term(), CPU)['Val/clean'] != pytest.approx(expected['Val/clean'], rel=1e-6)


def test_values_against_a_direct_computation():
    """clean: |D(y + sigma n) - y|^2; noisy: |E[y|x] - y|^2 with E[y|x] = (1 - r) D + r x, at the levels above sigma_n alone."""
    found = make()(halve, term(), CPU)
    totals = {'clean': [], 'noisy': []}
    for k, sigma in enumerate(LEVELS):
        noise = misc.Draws(3, k)('held out', [20, 2, 4, 4]).double()
        at_level = {'clean': [], 'noisy': []}
        for y, sigma_n, n in zip(Store.images.double(), SIGMA_N, noise):
            if sigma_n < sigma:
                x = y + (sigma**2 - sigma_n**2) ** 0.5 * n
                r = (sigma_n / sigma) ** 2
                at_level['noisy' if sigma_n else 'clean'].append(float((((1 - r) * x / 2 + r * x - y) ** 2).sum()))
        for name, values in at_level.items():
            totals[name] += values
            expected = pytest.approx(np.mean(values), rel=1e-5) if values else None
            assert found[f'Val/{name}/sigma={sigma:.4g}'] == expected
    assert found['Val/noisy/sigma=0.1'] is None and len(totals['noisy']) == 5 + 10
    for name, values in totals.items():
        assert found[f'Val/{name}'] == pytest.approx(np.mean(values), rel=1e-5)


def test_images_are_judged_at_their_usable_levels_alone():
    """Image for image: buffer, sigma_min, sigma_max and the union of the two, as the pairs know them."""
    lower, upper = np.tile([0, 0.6, 1.0, 0, 0], 4), np.tile([np.inf, np.inf, 0.2, 0.5, 1.9], 4)
    limits = usable_levels(SIGMA_N, 1.5, lower, upper)
    for item in range(20):
        found = make(items=[item], limits=limits)(halve, term(), CPU)
        for sigma in LEVELS:
            usable = sigma > 1.5 * SIGMA_N[item] and (lower[item] == 0 and upper[item] == np.inf or 0 < lower[item] < sigma
                                                      or sigma <= upper[item] < np.inf)
            group = 'noisy' if SIGMA_N[item] else 'clean'
            assert (found[f'Val/{group}/sigma={sigma:.4g}'] is not None) == usable, (item, sigma)


@pytest.mark.parametrize('size, items', [(2, 20), (3, 20), (4, 2)])
def test_ranks_add_up(monkeypatch, size, items):
    """The sums of the ranks, some of which may have nothing to judge, are those of one process; all report the same names."""
    tables = []
    monkeypatch.setattr(training_stats.distributed, 'all_sum', lambda table: tables.append(table.clone()) or table)

    def judge(number, size):
        monkeypatch.setenv('RANK', str(number))
        monkeypatch.setenv('WORLD_SIZE', str(size))
        return make(3, items=np.arange(items))(halve, term(), CPU)

    whole = judge(0, 1)
    names = [list(judge(number, size)) for number in range(size)]
    assert all(found == list(whole) for found in names)
    torch.testing.assert_close(sum(tables[1:]), tables[0], rtol=1e-12, atol=1e-9)


def test_split_holds_images_out_with_their_flips():
    raw_idx = np.tile(np.arange(100, 140), 2)  # each image and its mirrored copy
    train, held_out = validation.split(raw_idx, 0.3, seed=1)
    assert sorted([*train, *held_out]) == list(range(80)) and len(held_out) == 24
    assert not set(raw_idx[train]) & set(raw_idx[held_out])
    again, other = validation.split(raw_idx, 0.3, seed=1)[1], validation.split(raw_idx, 0.3, seed=2)[1]
    assert np.array_equal(held_out, again) and not np.array_equal(held_out, other)
    assert len(validation.split(raw_idx, 0, seed=1)[1]) == 0
    without_flips = validation.split(np.arange(100, 140), 0.3, seed=1)[1]
    assert set(raw_idx[held_out]) == set(without_flips + 100)


@pytest.mark.parametrize('share, count', [(0.01, 0), (0.99, 20)])
def test_split_refuses_an_empty_side(share, count):
    with pytest.raises(UserError, match=f'--val={share}: holds out {count} of 20 images'):
        validation.split(np.arange(20), share, seed=1)


def test_run_judges_each_image_once_and_never_trains_on_it(tmp_path):
    run = tiny.make_run(tmp_path, '--val=0.25', '--xflip=1')
    assert len(run.data.validation.items) == 16
    seen = torch.cat([run.data.feed.next().raw_idx for _ in range(40)])
    assert len(set(seen.tolist())) == 48 and not set(seen.tolist()) & set(run.data.validation.items.tolist())
    run.data.feed.close()
    cdf = run.noise.cdf(torch.tensor(run.data.validation.levels, dtype=torch.float64))
    torch.testing.assert_close(cdf, (torch.arange(8, dtype=torch.float64) + 0.5) / 8)


def test_data_set_of_its_own(tmp_path):
    """Corrupted like the training data, with noise of its own."""
    other = tiny.make_zip(tmp_path / 'other.zip', count=20)
    run = tiny.make_run(tmp_path, f'--val={other}')
    judged = run.data.validation
    assert len(judged.items) == 20 and int((judged.sigma_n > 0).sum()) == 14  # 0.7 of 20
    pixels = torch.as_tensor(judged.store.stored(np.arange(20))).float() / 127.5 - 1
    noise = judged.store.gather(np.arange(20)) - pixels
    assert noise[judged.sigma_n > 0].std() == pytest.approx(0.4, rel=0.1) and not noise[judged.sigma_n == 0].any()
    assert all(value is not None for name, value in run.data.validation(halve, term(), CPU).items() if name in ('Val/clean', 'Val/noisy'))


def test_data_set_of_another_form_is_refused(tmp_path):
    plain = tiny.make_zip(tmp_path / 'plain.zip', count=4)
    run = tiny.make_run(tmp_path, '--val=0.1')
    for name, value in [('image_shape', (3, 8, 8)), ('label_dim', 3), ('units', {'offset': 0.0, 'scale': 1.0})]:
        training, held_out = (validation.ImageDataset(plain) for _ in range(2))
        setattr(training, name, value)
        with pytest.raises(UserError, match=f'--val=.*plain.zip: its {name} is') as error:
            validation.check_alike(training, held_out)
        assert '\n' not in error.value.message
    run.data.feed.close()


def test_levels_below_the_buffer_are_not_judged(tmp_path):
    """--pairing=skip:buffer=2 trains an image of level 0.4 above 0.8, so that 0.54 says nothing of what is learnt."""
    run = tiny.make_run(tmp_path, '--val=0.5', '--pairing=skip:buffer=2')
    found = run.data.validation(halve, term(), CPU)
    judged = {sigma for sigma in run.data.validation.levels if found[f'Val/noisy/sigma={sigma:.4g}'] is not None}
    assert judged == {sigma for sigma in run.data.validation.levels if sigma > 0.8}
    assert any(0.4 < sigma < 0.8 for sigma in run.data.validation.levels)
    run.data.feed.close()


def test_data_set_without_the_top_class(tmp_path):
    """Fewer classes are fine, the labels being as wide as the network takes them; more are refused."""
    run = tiny.make_run(tmp_path, '--cond=1', f'--val={tiny.make_zip(tmp_path / "two.zip", count=2)}')
    assert run.net.label_dim == 3
    widths = set()

    def net(x, sigma, class_labels=None, augment_labels=None):
        widths.add(tuple(class_labels.shape[1:]))
        assert class_labels.argmax(1).tolist() == [0, 1] and (class_labels.sum(1) == 1).all()
        return x / 2

    net.label_dim = 3
    assert run.data.validation(net, term(), CPU)['Val/clean'] is not None and widths == {(3,)}
    run.data.feed.close()
    (tmp_path / 'small').mkdir()
    tiny.make_zip(tmp_path / 'small' / 'data.zip', count=2)
    with pytest.raises(UserError, match='--val=.*three.zip: it has 3 classes, and the training data has 2') as error:
        tiny.make_run(tmp_path / 'small', '--cond=1', f'--val={tiny.make_zip(tmp_path / "three.zip", count=6)}', '--batch=2')
    assert '\n' not in error.value.message


def make_blurred(folder, **limits):
    """The tiny data set, whose images 32 to 63 have these limits; returns its path."""
    plain, path = tiny.make_zip(folder / 'plain.zip'), folder / 'data.zip'
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, 'w') as archive:
        names = [name for name in source.namelist() if name.endswith('.png')]
        for name in names:
            archive.writestr(name, source.read(name))
        meta = {key: [[name, value if i >= 32 else None] for i, name in enumerate(names)] for key, value in limits.items()}
        archive.writestr('dataset.json', json.dumps(meta))
    return path


@pytest.mark.parametrize('limits, usable', [
    ({'sigma_min': 0.8}, lambda sigma: sigma > 0.8), ({'sigma_max': 0.1}, lambda sigma: sigma <= 0.1),
    ({'sigma_min': 0.8, 'sigma_max': 0.1}, lambda sigma: (sigma > 0.8) | (sigma <= 0.1))])
def test_limits_reach_the_pairs_and_the_validation_of_a_run(tmp_path, limits, usable):
    own = make_blurred(tmp_path, **limits)
    run = tiny.make_run(tmp_path, '--sigma=0', '--corruption-probability=0', f'--val={own}')
    batches = [run.data.feed.next() for _ in range(40)]
    raw_idx, sigma = (torch.cat([getattr(batch, name) for batch in batches]) for name in ('raw_idx', 'sigma'))
    blurred = raw_idx >= 32
    assert '64 clean, 0 noisy (0.00%), 32 with a sigma_min or sigma_max; ' in run.data.line
    assert 20 < blurred.sum() < len(blurred) - 20 and usable(sigma[blurred]).all() and not usable(sigma[~blurred]).all()
    judged = run.data.validation
    assert all(judged.limits.usable(level)[32:].all() == usable(level) for level in map(torch.tensor, judged.levels))
    assert all(judged.limits.usable(level)[:32].all() for level in judged.levels)
    run.data.feed.close()


def test_sigma_min_as_noise_reaches_the_images_of_a_run(tmp_path):
    """Images 32 to 63 are brought to 0.8, in training and in the held-out data, with noise of their own; they have no limit left."""
    own = make_blurred(tmp_path, sigma_min=0.8)
    flags = '--sigma=0', '--corruption-probability=0', f'--val={own}'
    run = tiny.make_run(tmp_path, *flags, '--sigma-min-as=noise')
    batch = run.data.feed.next()
    assert torch.equal(batch.sigma_n, torch.where(batch.raw_idx >= 32, 0.8, 0.0)) and (batch.sigma > batch.sigma_n).all()
    judged, items = run.data.validation, torch.arange(64)
    noise = judged.store.gather(items) - (torch.as_tensor(judged.store.stored(items)).float() / 127.5 - 1)
    assert judged.sigma_n.tolist() == [0.0] * 32 + [pytest.approx(0.8)] * 32 and not noise[:32].any()
    assert noise[32:].std() == pytest.approx(0.8, rel=0.05)
    assert run.config.corruption.sigma_min_as == 'noise' and not run.data.feed.stream.limited
    run.data.feed.close()
    make_blurred(tmp_path, sigma_min=0.8, sigma_max=0.1)
    with pytest.raises(UserError, match='--sigma-min-as=noise: 32 of 64 images also have a sigma_max'):
        tiny.options(tmp_path, *flags, '--sigma-min-as=noise')
    make_blurred(tmp_path)
    with pytest.raises(UserError, match='--sigma-min-as=noise: no image of --data=.* has a sigma_min; leave it out'):
        tiny.options(tmp_path, *flags, '--sigma-min-as=noise')
