# SPDX-License-Identifier: Apache-2.0
"""denoise.py on counts: the transform of the network is applied to the files, and the means come back as counts."""

import json

import numpy as np
import PIL.Image
import pytest

from tests.support.gaussian import GaussianNet
from tests.training.restoration.test_denoising import call, folder_of, npy, png, refused
from torch_utils import misc
from training.data.dataset import ImageDataset
from training.estimation.stabilise import Anscombe, Generalised
from training.restoration import denoising
from training.restoration.images import ImageSet

POISSON = Anscombe()
UNITS = {'offset': 10.0, 'scale': 8.0, 'stabilise': POISSON.record()}
SIGMA = 1 / 8
RNG = np.random.default_rng(0)


class FlatNet(GaussianNet):
    """The exact denoiser of images of one value, N(0, V)."""

    def forward(self, x, sigma, class_labels=None):
        noise = misc.batched(sigma).double() ** 2 / (x[0].numel())
        return (self.V / (self.V + noise) * x.double().mean((1, 2, 3), keepdim=True)).expand_as(x)


@pytest.fixture
def use(monkeypatch):
    """use(net): the network that --network stands for."""
    return lambda net: monkeypatch.setattr(denoising, 'open_network', lambda *args, **options: net)


def counts(mean, side=4, dtype=np.uint16):
    return RNG.poisson(mean, (side, side)).astype(dtype)


def test_counts_come_back_as_means(use, tmp_path, capsys):
    """Level 1 / scale, E[z] of the network, then the unbiased inverse; whole numbers become float32, since means are none."""
    use(GaussianNet(units=UNITS))
    a, b, c = counts(20), counts(40, dtype=np.uint8), counts(30)
    data = folder_of(tmp_path / 'in', {'a.npy': npy(a), 'c.png': png(c)})
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--sheet=none')
    assert f'at level {SIGMA:g} (counts, Anscombe' in (told := capsys.readouterr().out) and '1 files of whole counts have become' in told
    shrink = 0.25 / (0.25 + SIGMA ** 2)
    for name, values in (('a', a), ('c', c)):
        z = shrink * (POISSON.forward(np.float64(values)) - 10) + 10
        found = np.load(tmp_path / 'out' / f'{name}.npy')
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.squeeze(), POISSON.inverse(z), rtol=1e-5)
    np.save(tmp_path / 'b.npy', b[None])
    call(f'--data={tmp_path / "b.npy"}', f'--dest={tmp_path / "b-out.npy"}', '--sheet=none')
    found = np.load(tmp_path / 'b-out.npy')
    assert found.dtype == np.float32 and found.shape == (1, 4, 4) and abs(found - b).max() < 20


@pytest.mark.parametrize('mean', [2, 4, 10, 100])
def test_mean_counts_are_unbiased(use, tmp_path, mean):
    """Within 1 % of the mean counts of flat images, where the plain inverse is a quarter too low."""
    use(FlatNet((1, 32, 32), V=100.0, units=UNITS))
    np.save(tmp_path / 'x.npy', values := RNG.poisson(mean, (40, 32, 32)).astype(np.uint16))
    call(f'--data={tmp_path / "x.npy"}', f'--dest={tmp_path / "y.npy"}', '--sheet=none')
    found = np.load(tmp_path / 'y.npy').mean()
    assert abs(found / mean - 1) < 0.01 and abs(found / values.mean() - 1) < 0.01
    plain = POISSON.plain_inverse(POISSON.forward(np.float64(values)).mean((1, 2))).mean()
    assert plain < mean - 0.2


def test_samples_and_their_spread(use, tmp_path):
    """The mean of K samples is that of their counts, not the counts of their mean; the std is in counts."""
    use(GaussianNet((1, 8, 8), V=0.01, units=UNITS))
    data = folder_of(tmp_path / 'in', {'a.npy': npy(counts(25, 8, np.float32)[None])})
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--samples=16', '--keep-samples', '--steps=6', '--sheet=none')
    kept = np.stack([np.load(path) for path in sorted((tmp_path / 'out-samples').glob('*.npy'))])
    assert kept.shape == (16, 1, 8, 8) and (kept >= 0).all()
    np.testing.assert_allclose(np.load(tmp_path / 'out' / 'a.npy'), kept.mean(0), rtol=2e-3)
    np.testing.assert_allclose(np.load(tmp_path / 'out-std' / 'a.npy'), kept.std(0, ddof=1), rtol=0.1)


def test_references_are_means(use, tmp_path):
    """A clean reference of intensity y is compared as E[z | y]: a perfect result has no error."""
    net = GaussianNet(units=UNITS)
    np.save(tmp_path / 'clean.npy', clean := RNG.uniform(2, 90, (3, 4, 4)))
    images = ImageSet('--reference', str(tmp_path / 'clean.npy'), net)
    z = images.scaled(clean[0][None], clean=True)
    np.testing.assert_allclose(images.stored(z), clean[0][None], rtol=1e-9)
    use(net)
    np.save(tmp_path / 'noisy.npy', RNG.poisson(clean).astype(np.uint16))
    call(f'--data={tmp_path / "noisy.npy"}', f'--reference={tmp_path / "clean.npy"}', f'--dest={tmp_path / "out.npy"}',
         f'--report={tmp_path / "report.json"}', '--sheet=none')
    found = json.loads((tmp_path / 'report.json').read_text())
    error = images.scaled(np.load(tmp_path / 'out.npy')[0][None], clean=True) - z
    assert found['images'][0]['psnr_after'] == pytest.approx(-10 * np.log10(np.mean(error ** 2) / 4), abs=1e-3)
    assert found['units'] == UNITS and found['psnr_after']['mean'] > found['psnr_before']['mean'] - 0.5


def test_stabilised_sets_stay_stabilised(use, tmp_path):
    use(GaussianNet(units=UNITS))
    z = POISSON.forward(np.float64(counts(30)))
    data = folder_of(tmp_path / 'in', {'a.npy': npy(np.float32(z[None]))}, units=UNITS, sigmas={'a.npy': 1.0})
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--sheet=none')
    np.testing.assert_allclose(np.load(tmp_path / 'out' / 'a.npy')[0], 0.25 / (0.25 + SIGMA ** 2) * (z - 10) + 10, rtol=1e-5)
    assert json.loads((tmp_path / 'out' / 'dataset.json').read_text())['units'] == UNITS


def test_packed_results_have_units_of_counts(use, tmp_path):
    """What is written are counts, and the set says so: its own units are linear, near the network's."""
    use(GaussianNet(units=UNITS))
    np.save(tmp_path / 'x.npy', np.stack([counts(25, dtype=np.uint8) for _ in range(3)]))
    call(f'--data={tmp_path / "x.npy"}', f'--dest={tmp_path / "y.npz"}', '--sheet=none')
    found = ImageDataset(tmp_path / 'y.npz')
    assert found.units.keys() == {'offset', 'scale'} and found.decode(0).mean() == pytest.approx(25, abs=5)
    assert found.units['offset'] == pytest.approx(POISSON.inverse(np.array(10.0))) and found.units['scale'] == pytest.approx(40, rel=0.02)


def test_refusals(use, tmp_path):
    use(GaussianNet(units=UNITS))
    dest = f'--dest={tmp_path / "out"}'
    np.save(tmp_path / 'x.npy', counts(25)[None])
    np.save(tmp_path / 'n.npy', counts(25)[None].astype(np.int32) - 40)
    assert 'has levels above 0, and the noise of counts' in refused(f'--data={tmp_path / "x.npy"}:sigma=2', dest)
    assert 'has values below 0' in refused(f'--data={tmp_path / "n.npy"}', dest)
    picture = folder_of(tmp_path / 'png', {'a.png': png(np.full((4, 4), 9, np.uint8))})
    assert 'is an 8-bit picture, whose values are no counts' in refused(f'--data={picture}', dest)
    other = {**UNITS, 'stabilise': Generalised(2.0, 3.0).record()}
    data = folder_of(tmp_path / 'in', {'a.npy': npy(np.ones((1, 4, 4), np.float32))}, units=other, sigmas={'a.npy': 1.0})
    assert 'the transform of the network is another' in refused(f'--data={data}', dest)
    use(GaussianNet(units={'offset': 0.0, 'scale': 1.0}))
    assert 'is another (none)' in refused(f'--data={data}', dest)
    use(GaussianNet((2, 4, 4), units={'offset': [1.0, 2.0], 'scale': [1.0, 2.0], 'stabilise': POISSON.record()}))
    np.save(tmp_path / 'two.npy', RNG.poisson(9, (3, 2, 4, 4)))
    assert 'different scales' in refused(f'--data={tmp_path / "two.npy"}', dest)


def test_units_by_hand_leave_the_values_alone(use, tmp_path):
    """--units says what the values are: stabilised elsewhere, say."""
    use(GaussianNet(units=UNITS))
    z = POISSON.forward(np.float64(counts(30)))
    np.save(tmp_path / 'x.npy', z[None])
    call(f'--data={tmp_path / "x.npy"}', f'--dest={tmp_path / "y.npy"}', '--sheet=none', '--units=10,8', f'--sigma={SIGMA}')
    np.testing.assert_allclose(np.load(tmp_path / 'y.npy')[0], 0.25 / (0.25 + SIGMA ** 2) * (z - 10) + 10, rtol=1e-6)


def test_tiff_stays_tiff_in_float(use, tmp_path):
    pytest.importorskip('tifffile')
    use(GaussianNet(units=UNITS))
    data = tmp_path / 'in'
    data.mkdir()
    PIL.Image.fromarray(counts(25)).save(data / 'a.tif')
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--sheet=none')
    found = np.asarray(PIL.Image.open(tmp_path / 'out' / 'a.tif'))
    assert found.dtype == np.float32 and found.mean() == pytest.approx(25, abs=5)
    call(f'--data={data}', f'--dest={tmp_path / "out.tif"}', '--sheet=none')
    assert np.asarray(PIL.Image.open(tmp_path / 'out.tif')).dtype == np.float32
