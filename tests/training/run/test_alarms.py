# SPDX-License-Identifier: Apache-2.0
"""Alarms of a training: copies of training images, colours, weights that are not finite, and what they are told of the data."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.support import tiny
from tests.support.denoisers import unit
from training.checkpoints.load import load_network
from training.checkpoints.save import save_network
from training.run import alarms
from training.run.alarms import Alarms, Copies, Inspection, data_statistics


class Store:
    def __init__(self, images):
        self.images = images.float()

    def gather(self, items):
        return self.images[torch.as_tensor(items)]


TRAIN = 0.5 * unit(300, 3, 6, 6, seed=1)


def judge(samples, xflip=False, held_out=None, train=TRAIN):
    """What the alarms say of samples."""
    net = SimpleNamespace(img_channels=3, label_dim=0, units={'offset': 0, 'scale': 1}, data_statistics=None)
    copies = Copies(Store(train), np.arange(len(train)), held_out and (Store(held_out[0]), np.arange(len(held_out[0]))), xflip)
    return Alarms(Inspection(None, copies), net).judge(samples)


def test_a_network_that_returns_training_images_is_reported_and_fresh_samples_are_not():
    copied = TRAIN[torch.arange(64) * 3] + 0.02 * unit(64, 3, 6, 6, seed=3)
    fields, lines = judge(copied)
    assert fields == {'Copies/num_images': 64, 'Copies/share': 1.0, 'Copies/share_real': 0.0}
    assert len(lines) == 1 and '100% of 64 samples are copies of training images' in lines[0]
    for seed in range(20):
        fields, lines = judge(0.5 * unit(64, 3, 6, 6, seed=100 + seed))
        assert fields['Copies/share'] == 0 and not lines


def test_some_copies_among_fresh_samples():
    """A share above a tenth is reported; one or two images are not."""
    fresh = 0.5 * unit(64, 3, 6, 6, seed=7)
    for count, told in [(2, False), (6, False), (8, True)]:
        samples = torch.cat([TRAIN[:count], fresh[count:]])
        fields, lines = judge(samples)
        assert fields['Copies/share'] == count / 64 and bool(lines) == told


def test_mirrored_copies_count_where_training_sees_mirrored_images():
    mirrored = TRAIN[:32].flip(3)
    assert judge(mirrored)[0]['Copies/share'] == 0 and judge(mirrored, xflip=True)[0]['Copies/share'] == 1
    symmetric = torch.cat([TRAIN, TRAIN.flip(3)], dim=3)  # an image's own mirror image is not its second neighbour
    assert judge(symmetric[:32], xflip=True, train=symmetric)[0]['Copies/share'] == 1


def test_real_images_say_what_is_to_be_expected():
    """Where held-out images, or the training images themselves, are as near to each other, nearness is no alarm."""
    twins = TRAIN + 0.02 * unit(*TRAIN.shape, seed=9)
    fields, lines = judge(twins[:64], held_out=[twins[64:128]])
    assert fields['Copies/share'] == fields['Copies/share_real'] == 1 and not lines
    paired = torch.cat([TRAIN, twins, 2 * unit(1, 3, 6, 6)])  # each has one twin
    fields, lines = judge(twins[:64], train=torch.cat([TRAIN, twins[200:]]))
    assert 0.3 < fields['Copies/share_real'] < 0.7 and fields['Copies/share'] == 1 and lines
    assert judge(0.5 * unit(64, 3, 6, 6, seed=7), train=paired)[0]['Copies/share'] == 0


def test_the_nearest_item_is_named():
    copies = Copies(Store(TRAIN), np.arange(100, 300), None, False)
    assert copies(TRAIN[[250, 120]])[2].tolist() == [250, 120]


def dataset(count=400, sigma_n=0.0, **tables):
    found = dict(flip=np.zeros(count, bool), sigma_max=np.full(count, np.inf), image_shape=(1, 6, 6), classes=None)
    return SimpleNamespace(**(found | tables)), np.full(count, sigma_n)


def test_statistics_of_noisy_images_are_those_without_their_noise():
    clean = 0.3 * unit(400, 1, 6, 6) - 0.4
    found = [data_statistics(Store(clean + sigma * unit(400, 1, 6, 6, seed=5)), *dataset(sigma_n=sigma), np.arange(400), 0)
             for sigma in (0.0, 0.6)]
    for key, tolerance in (('mean', 0.03), ('std', 0.03)):
        assert found[1][key] == pytest.approx(found[0][key], abs=tolerance)
    assert found[0]['std'][0] == pytest.approx(0.3, abs=0.01)


def test_statistics_leave_out_mirrored_images_and_those_of_other_colours():
    images = torch.full([400, 1, 6, 6], 0.5)
    images[:100] = -1
    limited = dataset(sigma_max=np.where(np.arange(400) < 100, 0.2, np.inf))
    assert data_statistics(Store(images), *limited, np.arange(400), 0)['mean'] == [0.5]
    mirrored = dataset(flip=np.arange(400) < 100)
    assert data_statistics(Store(images), *mirrored, np.arange(400), 0)['num_images'] == 300
    assert data_statistics(Store(images), *dataset(), np.arange(alarms.FEWEST - 1), 0) is None


def test_large_sets_cost_no_more(monkeypatch):
    monkeypatch.setattr(alarms, 'MOST_IMAGES', 50)
    found = data_statistics(Store(TRAIN[:, :1]), *dataset(300), np.arange(300), 0)
    assert found['num_images'] == 50
    items = [alarms.pick(np.arange(300), (1, 6, 6), seed, 'x').tolist() for seed in (0, 0, 1)]
    assert items[0] == items[1] != items[2]


def snapshots(folder):
    return sorted(path.name for path in folder.glob('network-snapshot-*'))


def test_a_run_looks_at_its_samples_and_tells_its_snapshots_of_the_data(tmp_path, capsys):
    data = tiny.make_zip(tmp_path / 'tiny.zip')
    tiny.call(f'--outdir={tmp_path / "run"}', '--nosubdir', f'--data={data}', *tiny.FLAGS, '--duration=0.00008', '--samples=16', '--snap=1',
              '--val=0.25', '--corruption-probability=0.5')
    lines = tiny.read_log(tmp_path / 'run')
    found = {key: value for line in lines for key, value in line.items()}
    assert found['Samples/num_images'] == found['Val/num_images'] == 16 and -1 <= found['Samples/mean_0'] <= 1
    assert found['Copies/share'] == 0 and 'of 16 images' in capsys.readouterr().out
    net = load_network(tmp_path / 'run' / snapshots(tmp_path / 'run')[0])
    assert abs(net.data_statistics['mean'][0]) < 0.2 and 0.4 < net.data_statistics['std'][0] < 0.8  # grey levels drawn evenly
    assert 'data_statistics' not in json.loads((tmp_path / 'run' / snapshots(tmp_path / 'run')[0] / 'config.json').read_text())
    save_network(net, tmp_path / 'copy')
    assert load_network(tmp_path / 'copy').data_statistics == net.data_statistics


def test_a_run_with_broken_weights_writes_no_snapshot_and_goes_on(tmp_path, capsys):
    """The old program wrote them, and images of nothing."""
    run = tiny.make_run(tmp_path, '--samples=4', '--power-ema=0.1')
    with torch.no_grad():
        next(run.ema.module.parameters()).view(-1)[:3] = float('nan')
    run.snapshot()
    out = capsys.readouterr().out
    assert not snapshots(tmp_path) and not list(tmp_path.glob('ema-*')) and not list(tmp_path.glob('samples*'))
    assert out.count('Warning') == 1 and 'no snapshot is written' in out and '(3 of ' in out and not run.missed
    run.step()
    with torch.no_grad():
        next(run.ema.module.parameters()).view(-1)[:3] = 0
    run.snapshot()
    assert len(snapshots(tmp_path)) == 1
    run.data.feed.close()


def test_broken_weights_are_refused_by_name(tmp_path):
    run = tiny.make_run(tmp_path, '--samples=0')
    net = run.ema.module
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = float('inf')
    save_network(net, tmp_path / 'net')
    line = pytest.raises(UserError, load_network, tmp_path / 'net').value.message
    assert 'net: weights are not finite: 1 of ' in line and next(iter(net.state_dict())) in line and '(1 of ' in line
    run.data.feed.close()
