# SPDX-License-Identifier: Apache-2.0
"""denoise.py from end to end, with an exact network of Gaussian data: all kinds of sets, levels, units, labels, reports, refusals."""

import csv
import io
import json
import zipfile

import click
import numpy as np
import PIL.Image
import pytest
import torch

import denoise
from dnnlib import UserError
from tests.support import words
from tests.support.denoisers import unit
from tests.support.gaussian import GaussianNet
from training.data import text
from training.data.convert.sources import open_source
from training.restoration import denoising

V, SIGMA = 0.25, 0.5
SHRINK = V / (V + SIGMA ** 2)
UNITS = {'offset': 100.0, 'scale': 20.0}
RNG = np.random.default_rng(0)


@pytest.fixture
def use(monkeypatch):
    """use(net): the network that --network stands for."""
    return lambda net: monkeypatch.setattr(denoising, 'open_network', lambda *args, **options: net)


def call(*args):
    """Runs denoise.py in this process; what it refuses is a UserError."""
    try:
        denoise.main([str(arg) for arg in ('--network=NET', *args)], standalone_mode=False)
    except click.ClickException as err:
        raise UserError(err.message) from None


def refused(*args):
    with pytest.raises(UserError) as err:
        call(*args)
    assert '\n' not in err.value.message
    return err.value.message


def pixels(*shape):
    return RNG.integers(30, 220, shape).astype(np.uint8)


def shrunk(stored, offset=127.5, scale=127.5, a=SHRINK):
    """E[x_0 | y] in the units of the values."""
    return a * (np.float64(stored) - offset) + offset


def near(found, expected):
    """Whether whole numbers are the expected ones, rounded; halves may go either way."""
    return found.shape == expected.shape and np.abs(found - expected).max() < 0.501


def png(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, 'PNG')
    return buffer.getvalue()


def folder_of(path, files, **meta):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    if meta:
        (path / 'dataset.json').write_text(json.dumps(meta))
    return path


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


# --- files


def test_pictures_with_levels_of_their_own(use, tmp_path, capsys):
    use(GaussianNet())
    images = [pixels(4, 4) for _ in range(3)]
    names, levels = ['a/0.png', 'a/1.png', 'b/2.png'], [0.5, 0.0, 0.25]
    data = folder_of(tmp_path / 'in', dict(zip(names, map(png, images))), sigmas=dict(zip(names, levels)),
                     labels=[[name, 1] for name in names], captions={name: name for name in names})
    call(f'--data={data}', f'--dest={tmp_path / "out"}')
    for name, image, level in zip(names, images, levels):
        found = np.asarray(PIL.Image.open(tmp_path / 'out' / name))
        assert found.dtype == np.uint8 and near(found, shrunk(image, a=V / (V + level ** 2)))
    assert (tmp_path / 'out' / 'a/1.png').read_bytes() == png(images[1])
    meta = json.loads((tmp_path / 'out' / 'dataset.json').read_text())
    assert 'sigmas' not in meta and meta['labels'] == [[name, 1] for name in names] and meta['captions'] == {name: name for name in names}
    output = capsys.readouterr().out
    assert '1 of 3 images are of level 0' in output and 'Denoising 2 images at level 0.25 to 0.5' in output
    assert PIL.Image.open(tmp_path / 'out-sheet.png').size[0] > 100
    assert not (tmp_path / 'out.partial').exists() and open_source(str(tmp_path / 'out')).sigmas is None


def test_float_data_in_physical_units(use, tmp_path, capsys):
    """Levels of the set are in the units of the values, --sigma in those of the network."""
    use(GaussianNet(units=UNITS))
    stored = 100 + 20 * unit(2, 1, 4, 4).numpy()
    data = folder_of(tmp_path / 'in', {'x.npy': npy(stored[0].astype(np.float32)), 'y.npy': npy(stored[1, 0])})
    call(f'--data={data}:sigma=10', f'--dest={tmp_path / "out.zip"}', '--sheet=none')
    with zipfile.ZipFile(tmp_path / 'out.zip') as archive:
        x, y = (np.load(io.BytesIO(archive.read(name))) for name in ('x.npy', 'y.npy'))
    assert x.dtype == np.float32 and x.shape == (1, 4, 4) and y.dtype == np.float64 and y.shape == (4, 4)
    np.testing.assert_allclose(x, shrunk(stored[0], 100), rtol=1e-6)
    np.testing.assert_allclose(y, shrunk(stored[1, 0], 100), rtol=1e-6)
    assert 'level 0.5 (10 in the units of the values)' in capsys.readouterr().out
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--sheet=none', '--sigma=0.5')
    np.testing.assert_array_equal(np.load(tmp_path / 'out' / 'x.npy'), x)


def test_units_of_float_images_for_a_network_of_pictures(use, tmp_path):
    use(GaussianNet())
    deep = RNG.integers(20000, 40000, (4, 4)).astype(np.uint16)
    data = folder_of(tmp_path / 'in', {'a.png': png(deep)})
    assert '--units=OFFSET,SCALE' in refused(f'--data={data}', f'--dest={tmp_path / "out"}', '--sigma=0.5')
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--sigma=0.5', '--units=32767.5,32767.5')
    found = np.asarray(PIL.Image.open(tmp_path / 'out' / 'a.png'))
    assert found.dtype == np.uint16 and near(found, shrunk(deep, 32767.5))


def test_jpegs_become_png(use, tmp_path, capsys):
    use(GaussianNet((3, 8, 8)))
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels(8, 8, 3)).save(buffer, 'JPEG')
    data = folder_of(tmp_path / 'in', {'a.jpg': buffer.getvalue(), 'b.jpg': buffer.getvalue()}, sigmas={'a.jpg': 0.5, 'b.jpg': 0},
                     labels=[['a.jpg', 0], ['b.jpg', 1]])
    call(f'--data={data}', f'--dest={tmp_path / "out"}')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['a.png', 'b.jpg', 'dataset.json']
    assert json.loads((tmp_path / 'out' / 'dataset.json').read_text())['labels'] == [['a.png', 0], ['b.jpg', 1]]
    assert '1 JPEG or WebP files have become PNG' in capsys.readouterr().out


def test_values_beyond_the_range_are_told(use, tmp_path, capsys):
    use(GaussianNet(V=-2 * SIGMA ** 2))  # D = 2 x
    image = np.full([4, 4], 250, np.uint8)
    data = folder_of(tmp_path / 'in', {'a.png': png(image)})
    call(f'--data={data}', f'--dest={tmp_path / "out"}', f'--sigma={SIGMA}', f'--report={tmp_path / "r.json"}')
    assert (np.asarray(PIL.Image.open(tmp_path / 'out' / 'a.png')) == 255).all()
    assert '16 values of 1 images were beyond the range of their type' in capsys.readouterr().out
    assert json.loads((tmp_path / 'r.json').read_text())['clipped'] == {'a.png': 16}


# --- arrays and containers


@pytest.mark.parametrize(('shape', 'layout'), [((3, 4, 4), 'nhw'), ((3, 4, 4, 2), 'nhwc'), ((3, 2, 4, 4), 'nchw')])
def test_npy_keeps_its_layout(shape, layout, use, tmp_path):
    channels = {'nhw': 1}.get(layout, 2)
    use(GaussianNet((channels, 4, 4), units=UNITS))
    stored = (100 + 20 * unit(*shape)).numpy()
    np.save(tmp_path / 'in.npy', stored)
    call(f'--data={tmp_path / "in.npy"}', f'--dest={tmp_path / "out.npy"}', '--sigma=0.5', '--samples=3', '--keep-samples', '--steps=3')
    out, std, samples = (np.load(tmp_path / f'out{word}.npy') for word in ('', '-std', '-samples'))
    assert out.dtype == stored.dtype and out.shape == std.shape == shape and samples.shape == (3, 3, *shape[1:])
    np.testing.assert_allclose(samples.mean(1), out, rtol=1e-5)
    np.testing.assert_allclose(samples.std(1, ddof=1), std, rtol=1e-3)
    call(f'--data={tmp_path / "in.npy"}', f'--dest={tmp_path / "mean.npy"}', '--sigma=0.5')
    np.testing.assert_allclose(np.load(tmp_path / 'mean.npy'), shrunk(stored, 100), rtol=1e-6)


def test_npz_keeps_its_other_arrays(use, tmp_path):
    use(GaussianNet())
    images = pixels(3, 4, 4)
    np.savez(tmp_path / 'in.npz', images=images, labels=np.arange(3))
    call(f'--data={tmp_path / "in.npz"}', f'--dest={tmp_path / "out.npz"}', '--sigma=0.5')
    with np.load(tmp_path / 'out.npz') as found:
        assert sorted(found.files) == ['images', 'labels'] and found['labels'].tolist() == [0, 1, 2]
        assert found['images'].dtype == np.uint8 and near(found['images'], shrunk(images))


@pytest.mark.parametrize('name', ['packed.npz', 'packed'])
def test_packed_sets_stay_packed(name, use, tmp_path):
    from training.data.convert.writers import open_writer
    use(GaussianNet(units=UNITS))
    stored = np.float32(100 + 20 * unit(2, 1, 4, 4).numpy())
    with open_writer(tmp_path / name, packed=True) as writer:
        for k in range(2):
            writer.write(f'{k}.npy', npy(stored[k]))
        writer.write_json('dataset.json', {'labels': [['0.npy', 2], ['1.npy', 0]], 'sigmas': [['0.npy', 10], ['1.npy', 0]], 'units': UNITS})
    out = tmp_path / name.replace('packed', 'out')
    call(f'--data={tmp_path / name}', f'--dest={out}')
    found = open_source(str(out))
    assert found.labels == [2, 0] and not any(found.sigmas or [0]) and found.units == UNITS
    np.testing.assert_allclose(found.read(0), shrunk(stored[0], 100), rtol=1e-6)
    np.testing.assert_array_equal(found.read(1), stored[1])


def test_tiff_stack(use, tmp_path):
    tifffile = pytest.importorskip('tifffile')
    use(GaussianNet(units={'offset': 1000.0, 'scale': 500.0}))
    pages = RNG.integers(500, 1500, (3, 4, 4)).astype(np.uint16)
    tifffile.imwrite(tmp_path / 'in.tif', pages, photometric='minisblack')
    call(f'--data={tmp_path / "in.tif"}:sigma=250', f'--dest={tmp_path / "out.tif"}', '--samples=2', '--steps=2')
    found = tifffile.imread(tmp_path / 'out.tif')
    assert found.dtype == np.uint16 and found.shape == (3, 4, 4) and np.load(tmp_path / 'out-std.npy').shape == (3, 1, 4, 4)
    call(f'--data={tmp_path / "in.tif"}:sigma=250', f'--dest={tmp_path / "mean.tif"}')
    assert near(tifffile.imread(tmp_path / 'mean.tif'), shrunk(pages, 1000))


def test_containers_become_pictures_or_npy(use, tmp_path):
    h5py = pytest.importorskip('h5py')
    use(GaussianNet(units=UNITS))
    stored = np.float32(100 + 20 * unit(2, 4, 4).numpy())
    with h5py.File(tmp_path / 'in.h5', 'w') as file:
        file['images'], file['labels'], file['sigmas'] = stored, [0, 1], [10.0, 0.0]
    call(f'--data={tmp_path / "in.h5"}', f'--dest={tmp_path / "out"}')
    np.testing.assert_allclose(np.load(tmp_path / 'out' / '00000000.npy'), shrunk(stored[:1], 100), rtol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / 'out' / '00000001.npy'), stored[1:])
    assert json.loads((tmp_path / 'out' / 'dataset.json').read_text()) == {
        'labels': [['00000000.npy', 0], ['00000001.npy', 1]], 'units': UNITS}


# --- reports


def test_report_on_references(use, tmp_path, capsys):
    """Clean 8-bit pictures as references of float ones; PSNR before is that of the noise, 20 log10(2 / sigma)."""
    use(GaussianNet((1, 32, 32)))
    clean = np.rint((0.5 * unit(4, 32, 32).numpy()).clip(-1, 1) * 127.5 + 127.5).astype(np.uint8)
    noisy = clean / 127.5 - 1 + 0.25 * unit(4, 32, 32, seed=1).numpy()
    data = folder_of(tmp_path / 'in', {f'{k}.npy': npy(np.float32(noisy[k])) for k in range(4)}, units={'offset': 0, 'scale': 1})
    reference = folder_of(tmp_path / 'clean', {f'{k}.png': png(clean[k]) for k in range(4)})
    args = f'--data={data}:sigma=0.25', f'--reference={reference}', '--samples=4', '--steps=8', '--sheet=none'
    call(*args, f'--dest={tmp_path / "a"}', f'--report={tmp_path / "r.json"}')
    found = json.loads((tmp_path / 'r.json').read_text())
    assert found['psnr_before']['mean'] == pytest.approx(20 * np.log10(2 / 0.25), abs=0.2)
    error = 0.25 * 0.25 ** 2 / (0.25 + 0.25 ** 2) * (1 + 1 / 4)  # of the mean of 4 samples
    assert found['psnr_after']['mean'] == pytest.approx(10 * np.log10(4 / error), abs=0.4) and 0 < found['ssim_after']['mean'] < 1
    assert found['coverage']['mean'] == pytest.approx(0.9, abs=0.03) and found['noise']['mean'] == pytest.approx(1, abs=0.05)
    assert found['interval']['level'] == 0.9 and len(found['images']) == 4 and found['images'][0]['name'] == '0.npy'
    output = capsys.readouterr().out
    assert 'PSNR' in output and 'Intervals that state 90%' in output and 'Warning' not in output
    call(*args, f'--dest={tmp_path / "b"}', f'--report={tmp_path / "r.csv"}')
    with open(tmp_path / 'r.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]['psnr_after']) == pytest.approx(found['images'][2]['psnr_after'])


def test_a_wrong_level_is_told(use, tmp_path, capsys):
    use(GaussianNet((1, 32, 32), units=UNITS))
    data = folder_of(tmp_path / 'in', {'a.npy': npy(100 + 20 * (0.5 + 1) * unit(32, 32).numpy())})
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--sigma=0.5', '--samples=2', '--steps=4')
    assert 'Warning: the noise of the images is not that of the stated levels' in capsys.readouterr().out


@pytest.mark.parametrize(('change', 'warns'), [({}, True), ({'probability': 0.9}, False), ({'terms': ['denoise', 'euler:steps=5']}, False),
                                               ({'transfer': 'clean'}, False)])
def test_levels_that_were_not_trained(change, warns, use, tmp_path, capsys):
    use(GaussianNet())
    options = {'corruption': {'sigma': 0.4, 'probability': change.get('probability', 1.0)},
               'network': {'transfer': change.get('transfer')}, 'objective': {'terms': change.get('terms', ['denoise'])}}
    folder_of(tmp_path / 'run', {'options.json': json.dumps(options).encode()})
    data = folder_of(tmp_path / 'in', {'a.png': png(pixels(4, 4))})
    args = [f'--network={tmp_path / "run" / "network-snapshot-000001"}', f'--data={data}']
    for k, (more, expected) in enumerate([(['--sigma=0.4'], False), (['--sigma=0.3'], warns), (['--sigma=0.4', '--samples=2'], warns)]):
        call(*args, f'--dest={tmp_path / f"out{k}"}', '--steps=2', *more)
        assert ('never below sigma = 0.4' in capsys.readouterr().out) == expected


# --- labels


def test_labels(use, tmp_path, capsys):
    net = GaussianNet(label_dim=3)
    use(net)
    files = {f'{k}.png': png(pixels(4, 4)) for k in range(2)}
    data = folder_of(tmp_path / 'in', files, labels={'0.png': 2, '1.png': 0})
    call(f'--data={data}', f'--dest={tmp_path / "a"}', '--sigma=0.5')
    assert torch.equal(net.labels[-1][:2], torch.eye(3)[[2, 0]])
    call(f'--data={data}', f'--dest={tmp_path / "b"}', '--sigma=0.5', '--class=1')
    assert torch.equal(net.labels[-1][:2], torch.eye(3)[[1, 1]]) and 'Warning' not in capsys.readouterr().out
    call(f'--data={data}:label=none', f'--dest={tmp_path / "c"}', '--sigma=0.5')
    assert net.labels[-1] is None and 'Warning: the network is conditional' in capsys.readouterr().out
    net.config = {'label_dropout': 0.1}
    call(f'--data={data}:label=none', f'--dest={tmp_path / "d"}', '--sigma=0.5')
    assert 'Warning' not in capsys.readouterr().out
    assert 'has class 2, and the network has classes 0 to 1' in with_net(use, GaussianNet(label_dim=2), data, tmp_path)
    assert '2 classes by name, and the network has 3' in with_net(use, net, folder_of(
        tmp_path / 'by name', {f'{k}/a.png': data for k, data in enumerate(files.values())}), tmp_path)
    assert '--class=3: the network has classes 0 to 2' in with_net(use, net, data, tmp_path, '--class=3')
    assert '--class=1: the network is unconditional' in with_net(use, GaussianNet(), data, tmp_path, '--class=1')


def test_captions(use, tmp_path, monkeypatch):
    """Captions of the set are embedded, or their embeddings in the set are used, if they are of the same encoder."""
    words.register(monkeypatch)
    captions = text.open_captions('words:one', None, 'cpu')
    net = GaussianNet(label_dim=words.DIM, text=captions.record)
    use(net)
    files = {f'{k}.png': png(pixels(4, 4)) for k in range(3)}
    told = {'0.png': 'a cat', '1.png': '', '2.png': 'a cat'}
    expected = torch.from_numpy(captions(['a cat', '', 'a cat']))
    expected[1] = 0
    call(f'--data={folder_of(tmp_path / "in", files, captions=told)}', f'--dest={tmp_path / "a"}', '--sigma=0.5')
    torch.testing.assert_close(net.labels[-1][:3], expected)
    meta = dict(labels=dict(zip(files, expected.tolist())), text={**captions.record, 'empty': [0.0] * words.DIM})
    data = folder_of(tmp_path / 'embedded', files, **meta)
    call(f'--data={data}', f'--dest={tmp_path / "b"}', '--sigma=0.5')
    torch.testing.assert_close(net.labels[-1][:3], expected)
    net.text = text.open_captions('words:two', None, 'cpu').record
    assert 'its labels are not those of the network: another text encoder' in with_net(use, net, data, tmp_path)


def with_net(use, net, data, tmp_path, *more):
    use(net)
    return refused(f'--data={data}', f'--dest={tmp_path / "refused"}', '--sigma=0.5', *more)


# --- interruptions, and what is refused


def test_resume(use, tmp_path, capsys, monkeypatch):
    use(GaussianNet())
    data = folder_of(tmp_path / 'in', {f'{k}.png': png(pixels(4, 4)) for k in range(5)})
    args = [f'--data={data}', '--sigma=0.5', '--samples=2', '--steps=3', '--batch=1']
    call(*args, f'--dest={tmp_path / "whole"}')
    write, written = denoising.Work.write, []

    def interrupted(self, found):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(found.index)
        write(self, found)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, click.exceptions.Abort)):
        patch.setattr(denoising.Work, 'write', interrupted)
        call(*args, f'--dest={tmp_path / "out"}')
    assert not (tmp_path / 'out').exists() and (tmp_path / 'out.partial').is_dir()
    assert '--skip-existing' in (told := refused(*args, f'--dest={tmp_path / "out"}', '--skip-existing', '--seed=1')) and 'seed=0' in told
    capsys.readouterr()
    call(*args, f'--dest={tmp_path / "out"}', '--skip-existing')
    assert '3 images were done already' in capsys.readouterr().out
    for name in ('out', 'out-std'):
        ours, theirs = (sorted((tmp_path / folder).iterdir()) for folder in (name, name.replace('out', 'whole')))
        assert len(ours) == 5 and [path.read_bytes() for path in ours] == [path.read_bytes() for path in theirs]
    assert not (tmp_path / 'out.partial').exists()


def test_what_is_refused(use, tmp_path):
    use(GaussianNet())
    out = f'--dest={tmp_path / "out"}'
    data = folder_of(tmp_path / 'in', {'a.png': png(pixels(4, 4)), 'b.png': png(pixels(4, 4))})
    here = [f'--data={data}', out]
    assert '--data=' in refused(f'--data={tmp_path / "none"}', out) and 'no such file' in refused(f'--data={tmp_path / "none"}', out)
    assert 'says no noise levels' in refused(*here)
    assert 'level 0, that is clean' in refused(f'--data={data}:sigma=0', out)
    assert '--keep-samples: needs --samples' in refused(*here, '--sigma=1', '--keep-samples')
    assert 'is read by this command' in refused(f'--data={data}', f'--dest={data}', '--sigma=1')
    assert 'folder named without an extension' in refused(f'--data={data}', f'--dest={tmp_path / "out.png"}', '--sigma=1')
    assert '--overlap=4: must be less' in refused(*here, '--sigma=1', '--overlap=4')
    assert 'must end in .json or .csv' in refused(*here, '--sigma=1', f'--report={tmp_path / "r.txt"}')
    assert 'at least 4 x 4' in refused(f'--data={folder_of(tmp_path / "small", {"s.png": png(pixels(3, 9))})}', out, '--sigma=1')
    assert '3 channels' in refused(f'--data={folder_of(tmp_path / "rgb", {"s.png": png(pixels(4, 4, 3))})}', out, '--sigma=1')
    one = folder_of(tmp_path / 'one', {'a.png': png(pixels(4, 4))})
    assert 'misses 1 of 2 images, such as b.png' in refused(*here, '--sigma=1', f'--reference={one}')
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.partial').exists()
    damaged = folder_of(tmp_path / 'damaged', {'a.png': png(pixels(4, 4)), 'b.png': png(pixels(4, 4))[:60]})
    assert 'b.png cannot be read' in refused(f'--data={damaged}', out, '--sigma=1')


def test_networks_that_are_refused(use, tmp_path):
    data = folder_of(tmp_path / 'in', {'a.png': png(pixels(4, 4))})
    assert 'makes latents' in with_net(use, GaussianNet(autoencoder={'ref': 'x'}), data, tmp_path)
    assert 'the network goes up to 0.3' in with_net(use, GaussianNet(sigma_max=0.3), data, tmp_path)
    net = GaussianNet(label_dim=2, text={'encoder': 'x', 'tokens': 0, 'dim': 2})
    assert 'trained on captions, and these images have none' in with_net(use, net, data, tmp_path)


def test_values_that_are_not_finite(use, tmp_path):
    use(GaussianNet(units=UNITS))
    image = np.ones([4, 4])
    image[1, :2] = np.nan, np.inf
    data = folder_of(tmp_path / 'in', {'a.npy': npy(np.ones([4, 4])), 'b.npy': npy(image)})
    assert 'b.npy has 2 of 16 values that are not finite' in refused(f'--data={data}', f'--dest={tmp_path / "out"}', '--sigma=1')
    assert not (tmp_path / 'out').exists()
    use(GaussianNet(V=float('nan')))
    data = folder_of(tmp_path / 'fine', {'a.png': png(pixels(4, 4))})
    assert 'estimate of a.png is not finite' in refused(f'--data={data}', f'--dest={tmp_path / "out2"}', '--sigma=1')


def test_levels_of_data_whose_channels_have_different_scales(use, tmp_path):
    """They are in network units; a set of other units says something else."""
    units = {'offset': [0.0, 10.0], 'scale': [1.0, 5.0]}
    use(GaussianNet((2, 4, 4), units=units))
    stored = unit(2, 4, 4).numpy() * [[[1.0]], [[5.0]]] + [[[0.0]], [[10.0]]]
    data = folder_of(tmp_path / 'in', {'a.npy': npy(stored)}, sigmas={'a.npy': 0.5}, units=units)
    call(f'--data={data}', f'--dest={tmp_path / "out"}')
    offset = np.reshape([0.0, 10.0], (2, 1, 1))
    np.testing.assert_allclose(np.load(tmp_path / 'out' / 'a.npy'), shrunk(stored, offset), rtol=1e-5, atol=1e-6)
    other = folder_of(tmp_path / 'other', {'a.npy': npy(stored)}, sigmas={'a.npy': 0.5}, units={'offset': 0, 'scale': 2})
    assert '--sigma=STD in network units' in refused(f'--data={other}', f'--dest={tmp_path / "out2"}')
    third = folder_of(tmp_path / 'third', {'a.npy': npy(stored)}, sigmas={'a.npy': 0.5}, units={'offset': 0, 'scale': [1, 2]})
    assert 'other scales' in refused(f'--data={third}', f'--dest={tmp_path / "out2"}')


def test_large_images(use, tmp_path, capsys):
    use(GaussianNet((1, 8, 8)))
    image = pixels(19, 30)
    data = folder_of(tmp_path / 'in', {'a.png': png(image), 'b.png': png(pixels(8, 8))})
    call(f'--data={data}', f'--dest={tmp_path / "out"}', '--sigma=0.5')
    assert near(np.asarray(PIL.Image.open(tmp_path / 'out' / 'a.png')), shrunk(image))
    assert '1 of 2 images are larger than 8x8 and are denoised in tiles with an overlap of 4 pixels' in capsys.readouterr().out
