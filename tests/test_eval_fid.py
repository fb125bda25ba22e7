# SPDX-License-Identifier: Apache-2.0
"""The eval_fid.py command: published calls, its JSON, its refusals, and ranks."""

import hashlib
import json
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import eval_fid
import generate
from dnnlib import EasyDict, UserError
from dnnlib.files import file_digest
from metrics import report, results, table
from metrics.detectors import DETECTORS, Detector
from metrics.evaluate import Settings
from metrics.frechet import frechet_distance
from metrics.generated import choose_count
from metrics.image_files import ImageFiles
from metrics.kernel import kernel_distance
from metrics.manifold import density_coverage, precision_recall
from metrics.statistics import load_statistics
from tests.support import ROOT, launch
from torch_utils import misc
from training.checkpoints.save import save_network
from training.networks import preconditioning
from training.sampling.generate import Samples

PIXELS = '--detector=pixels'


def run(*args, code=0):
    """Runs the command in this process; returns what it prints."""
    result = CliRunner().invoke(eval_fid.main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def refused(*args, code=1):
    """The one line of a refusal."""
    output = run(*args, code=code)
    lines = output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('Error: '), output
    return lines[0]


def torchrun(*args):
    """The finished command, run by two ranks of torchrun."""
    return subprocess.run(launch.command(ROOT / 'eval_fid.py', args, ranks=2), capture_output=True, text=True, timeout=300)


def two_ranks(*args):
    """The finished command, run by two ranks."""
    return launch.run(ROOT / 'eval_fid.py', args, ranks=2)


@pytest.fixture
def inception(monkeypatch):
    """In its place a detector that is quick and, like it, takes images of any shape: means and largest values of the channels."""
    def net(images):
        images = images.double().flatten(2)
        return torch.cat([images.mean(2), images.amax(2)], dim=1)
    monkeypatch.setitem(DETECTORS, 'inception', lambda device: Detector('inception', net, device))


@pytest.fixture
def images():
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (12, 3, 2, 4), dtype=np.uint8), rng.integers(0, 200, (30, 3, 2, 4), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path, images, monkeypatch):
    """Folders gen (12 images) and ref (30) in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, batch in zip(('gen', 'ref'), images):
        Path(name).mkdir()
        for i, image in enumerate(batch):
            PIL.Image.fromarray(image.transpose(1, 2, 0)).save(f'{name}/{i:06d}.png')
    return tmp_path


def expected_distance(gen, ref):
    gen, ref = (batch.reshape(len(batch), -1) / 127.5 - 1 for batch in (gen, ref))
    return frechet_distance(gen.mean(0), np.cov(gen, rowvar=False), ref.mean(0), np.cov(ref, rowvar=False))


def test_ref_path_works(folders, images):
    """The published script assigned --ref_path's statistics to another name and crashed."""
    output = run('--gen_path=gen', '--ref_path=ref', '--num=12', '--batch_size=5', '--out_path=sub/fid.json', PIXELS)
    result = json.loads(Path('sub/fid.json').read_text())
    assert result['fid_score'] == pytest.approx(expected_distance(*images), rel=1e-9)
    assert result['inception_score'] is None
    assert f'{result["fid_score"]:.4f}' in output and '30 images' in output


def test_ref_stats_equal_ref_path_and_carry_their_provenance(folders, images):
    run('ref', '--data=ref', '--dest=stats/ref.npz', '--split=train', PIXELS)
    stats = load_statistics('stats/ref.npz')
    assert (stats.num_images, stats.split, stats.source, stats.detector, stats.shape) == (30, 'train', 'ref', 'pixels', (3, 2, 4))
    output = run('--gen_path=gen', '--ref_stats=stats/ref.npz', '--num=12', PIXELS)
    result = json.loads(Path('gen.fid.json').read_text())  # beside the images where --out_path is not given
    assert result['fid_score'] == pytest.approx(expected_distance(*images), rel=1e-9)
    digest = hashlib.sha256(Path('stats/ref.npz').read_bytes()).hexdigest()
    assert result['reference'] == {
        'path': 'stats/ref.npz', 'sha256': digest, 'num_images': 30, 'split': 'train', 'source': 'ref', 'detector': 'pixels',
        'detector_sha256': None, 'note': None, 'shape': [3, 2, 4], 'device': 'cpu', 'tf32': False, 'versions': result['versions']}
    assert result['device'] == 'cpu'
    assert result['num_images'] == result['found_images'] == 12 and result['image_shape'] == [3, 2, 4]
    assert result['detector'] == {'name': 'pixels', 'weights': None, 'sha256': None, 'tf32': False}
    assert {'commit', 'torch', 'python'} <= result['versions'].keys()
    assert result['options']['num'] == 12 and result['options']['gen_path'] == 'gen'
    assert 'split train' in output and not list(Path('.').glob('.*'))


def test_a_set_against_itself(folders):
    run('--gen-path=gen', '--ref-path=gen', '--num=12', PIXELS)
    assert abs(json.loads(Path('gen.fid.json').read_text())['fid_score']) < 1e-6


def test_counts(folders, images):
    """Another number than 50,000 is refused by name; --num takes the first ones in sorted order and says so."""
    line = refused('--gen_path=gen', '--ref_path=ref', PIXELS)
    assert 'found 12 images, expected 50000' in line and '--num=12' in line
    line = refused('--gen_path=gen', '--ref_path=ref', '--num=13', PIXELS)
    assert '--num=13' in line and 'found 12 images only' in line
    output = run('--gen_path=gen', '--ref_path=ref', '--num=9', PIXELS)
    assert 'the first 9 of 12' in output
    result = json.loads(Path('gen.fid.json').read_text())
    assert (result['num_images'], result['found_images']) == (9, 12)
    assert result['fid_score'] == pytest.approx(expected_distance(images[0][:9], images[1]), rel=1e-9)


def test_the_advice_fits_the_launcher(monkeypatch):
    """torchrun, with one rank too, takes --num for an abbreviation of its own."""
    options = EasyDict(num=None, gen_path='g')
    for launched, option in ((False, ' --num=3 '), (True, ' --num-images=3 ')):
        if launched:
            monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
        with pytest.raises(UserError, match=option):
            choose_count(options, 3, 'found 3')


def test_the_published_count_needs_no_option(folders, images, monkeypatch):
    monkeypatch.setattr('metrics.generated.PROTOCOL_NUM', 12)
    run('--gen_path=gen', '--ref_path=ref', PIXELS)
    assert json.loads(Path('gen.fid.json').read_text())['num_images'] == 12


def test_the_file_of_a_reference_is_hashed(folders, images):
    with zipfile.ZipFile('ref.zip', 'w') as archive:
        for path in sorted(Path('ref').iterdir()):
            archive.write(path)
    run('--gen_path=gen', '--ref_path=ref.zip', '--num=12', PIXELS)
    result = json.loads(Path('gen.fid.json').read_text())
    assert result['reference']['sha256'] == hashlib.sha256(Path('ref.zip').read_bytes()).hexdigest()
    assert result['fid_score'] == pytest.approx(expected_distance(*images), rel=1e-9)


@pytest.mark.parametrize('args, words', [
    ([], ['--gen-path is missing']),
    (['--gen_path=gen'], ['--ref-stats', '--ref-path', 'got none']),
    (['--gen_path=gen', '--ref_path=ref', '--ref_stats=ref.npz'], ['--ref-stats', '--ref-path', 'got both']),
    (['--gen_path=nowhere', '--ref_path=ref'], ['--gen-path=nowhere', 'no such']),
    (['--gen_path=empty', '--ref_path=ref'], ['--gen-path=empty', 'no images in it']),
    (['--gen_path=gen', '--ref_path=empty', '--num=12'], ['--ref-path=empty', 'no images in it']),
    (['--gen_path=gen', '--ref_stats=nowhere.npz', '--num=12'], ['nowhere.npz', 'no such file']),
    (['--gen_path=gen', '--ref_stats=other.npz', '--num=12', PIXELS], ['other.npz', '7 dimensions', 'have 24']),
    (['--gen_path=gen', '--ref_stats=inception.npz', '--num=12', PIXELS], ['inception.npz', '--detector=inception']),
    (['--gen_path=gen', '--ref_stats=images.npz', '--num=12', PIXELS], ['images.npz', 'no mu and sigma', '--ref-path']),
    (['--gen_path=gen', '--ref_path=ref', '--num=12', '--detector-weights=w.pth', PIXELS], ['--detector-weights', 'no weights']),
    (['--gen_path=gen', '--ref_path=ref', '--num=12', '--detector-weights=w.pth'], ['w.pth', 'no such file']),
    (['--gen_path=gen', '--ref_path=ref', '--num=12', '--device=abacus', PIXELS], ['--device=abacus']),
    (['--gen_path=gen', '--ref_path=ref', '--num=12', '--device=cuda:99', PIXELS], ['--device=cuda:99', '--device=cpu']),
    (['--gen_path=gen', '--ref_path=ref', '--num=12', '--out_path=ref', PIXELS], ['--out-path=ref', 'folder']),
    (['--num=12', 'ref', '--data=ref', '--dest=a.npz'], ['--num', 'after that word']),
    (['--gen_path=gen', '--ref_path=ref', '--metrics=fid,fud'], ['"fud"', 'fid, fid_inf, sfid, kid, cmmd, is, pr, dc']),
    (['--gen_path=gen', '--ref_path=ref', '--detector=pixel'], ['"pixel"', 'inception, pixels, dinov2']),
    (['--gen_path=gen', '--ref_path=ref', '--detector=pixels:a=1'], ['has no key "a"']),
    (['--gen_path=gen', '--ref_stats=plain.npz', '--num=12', '--metrics=fid,pr', PIXELS], ['plain.npz', '--keep-features']),
    (['--gen_path=gen', '--ref_path=ref', '--num=12', '--metrics=kid', PIXELS], ['subsets of 1000', '--kid-subset-size']),
    (['--gen_path=gen', '--ref_path=ref', '--num=12', '--metrics=fid,sfid', PIXELS], ['fid,sfid', 'sfid needs --detector=inception']),
    (['--gen_path=gen', '--ref_stats=plain.npz', '--num=12', '--metrics=cmmd', PIXELS], ['cmmd needs --detector=clip']),
    (['--gen_path=gen', '--ref_path=ref', '--repeats=3'], ['--repeats', '--network']),
    (['--gen_path=gen', '--network=net', '--ref_path=ref'], ['--gen-path', '--network', 'both']),
    (['--gen_path=gen', '--ref_stats=plain.npz', '--split=train'], ['--split=train', '--ref-path']),
    (['--network=nowhere', '--ref_path=ref', '--seeds=0-4', '--num=5', PIXELS], ['nowhere']),
    (['--network=nowhere', '--ref_path=ref', '--seeds=0-4', PIXELS], ['--seeds=0-4: names 5 images, expected 50000', '--num=5']),
    (['nearest', '--gen-path=gen', '--train=empty', PIXELS], ['--train=empty', 'no images in it']),
    (['nearest', '--gen-path=gen', '--train=small.npy', PIXELS], ['the same size', '[3, 5, 5] in --train', '[3, 2, 4] in --gen-path']),
    (['ref', '--data=ref', '--dest=ref.json'], ['--dest=ref.json', '.npz']),
    (['ref', '--data=empty', '--dest=a.npz'], ['--data=empty', 'no images in it']),
])
def test_refusals(folders, images, args, words):
    Path('empty').mkdir()
    np.savez('other.npz', mu=np.zeros(7), sigma=np.eye(7))
    np.savez('inception.npz', mu=np.zeros(24), sigma=np.eye(24), detector='inception')
    np.savez('images.npz', images=images[0])
    np.savez('plain.npz', mu=np.zeros(24), sigma=np.eye(24))
    np.save('small.npy', np.zeros((2, 5, 5, 3), np.uint8))
    line = refused(*args, code=2 if '--metrics=fid,fud' in args else 1)
    for word in words:
        assert word in line


def test_a_corrupt_picture_is_named_and_nothing_is_written(folders):
    Path('gen/000007.png').write_bytes(Path('gen/000007.png').read_bytes()[:70])
    assert '000007.png' in refused('--gen_path=gen', '--ref_path=ref', '--num=12', PIXELS)
    assert not Path('gen.fid.json').exists()


def test_mixed_sizes(folders):
    PIL.Image.new('RGB', (5, 5)).save('gen/000003.png')
    line = refused('--gen_path=gen', '--ref_path=ref', '--num=12', PIXELS)
    assert '000003.png' in line and '[3, 5, 5]' in line and '[3, 2, 4]' in line


def test_missing_weights_without_network(folders, monkeypatch):
    """The default detector on a machine that reaches nothing: URL, cache path and option in one line."""
    monkeypatch.setenv('AMBIENT_CACHE', str(folders / 'cache'))
    monkeypatch.setattr('urllib.request.urlopen', lambda *a, **k: (_ for _ in ()).throw(OSError('network is unreachable')))
    line = refused('--gen_path=gen', '--ref_path=ref', '--num=12')
    assert 'https://github.com/toshas/torch-fidelity/' in line and str(folders / 'cache') in line and '--detector-weights' in line


def test_reference_statistics_by_url(folders, monkeypatch):
    """The published script took no URL."""
    run('ref', '--data=ref', '--dest=ref.npz', PIXELS)
    monkeypatch.setenv('AMBIENT_CACHE', str(folders / 'cache'))
    url = (folders / 'ref.npz').as_uri()
    monkeypatch.setattr('dnnlib.download.is_url', lambda ref: str(ref).startswith('file:'))  # urllib's own offline scheme
    run('--gen_path=gen', f'--ref_stats={url}', '--num=12', PIXELS)
    assert json.loads(Path('gen.fid.json').read_text())['reference']['path'] == url


def test_references_of_edm2(folders, inception):
    """EDM2's .pkl was refused, with a hint to load it unsafely."""
    arguments = ['--num=12', '--metrics=fid']
    run('ref', '--data=ref', '--dest=ref.npz')
    stats = load_statistics('ref.npz')
    other = {'mu': np.zeros(7), 'sigma': np.eye(7)}
    Path('edm2.pkl').write_bytes(pickle.dumps({'fid': {'mu': stats.mean, 'sigma': stats.cov}, 'fd_dinov2': other}))
    digest = hashlib.sha256(Path('edm2.pkl').read_bytes()).hexdigest()
    run('--gen_path=gen', '--ref_stats=ref.npz', '--out-path=a.json', *arguments)
    run('--gen_path=gen', '--ref_stats=edm2.pkl', '--out-path=b.json', *arguments)
    run('--gen_path=gen', f'--ref_stats=edm2.pkl#sha256={digest}', '--out-path=b.json', *arguments)
    a, b = (json.loads(Path(name).read_text()) for name in ('a.json', 'b.json'))
    assert a['fid_score'] == b['fid_score'] and b['reference']['sha256'] == digest
    assert b['reference']['detector'] == 'inception' and b['reference']['note'] is None
    assert 'it holds "fid" (--detector=inception)' in refused('--gen_path=gen', '--ref_stats=edm2.pkl', '--num=12', PIXELS)
    assert 'SHA-256 is' in refused('--gen_path=gen', f'--ref_stats=edm2.pkl#sha256={"0" * 64}', *arguments)


def test_an_unknown_detector_is_told_of(folders, images):
    """Published statistics are compared all the same."""
    run('ref', '--data=ref', '--dest=ref.npz', PIXELS)
    stats = load_statistics('ref.npz')
    np.savez('set_clean_train_na.npz', mu=stats.mean, sigma=stats.cov)
    output = run('--gen_path=gen', '--ref_stats=set_clean_train_na.npz', '--num=12', PIXELS)
    result = json.loads(Path('gen.fid.json').read_text())
    assert result['fid_score'] == pytest.approx(expected_distance(*images), rel=1e-9)
    note = result['reference']['note']
    assert result['reference']['detector'] is None and 'does not say which detector made it' in note and 'mode "clean"' in note
    assert f'Warning: --ref-stats=set_clean_train_na.npz: {note}' in output


@pytest.mark.parametrize('source', ['--ref_path=colour', '--ref_stats=colour.npz'])
def test_images_of_another_shape_are_refused(folders, inception, source):
    """Inception takes images of any shape: 8x8 grey ones were compared with a reference of 16x16 RGB ones without a word."""
    rng = np.random.default_rng(0)
    for name, shape in (('grey', (8, 8)), ('colour', (16, 16, 3))):
        Path(name).mkdir()
        for i in range(4):
            PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(f'{name}/{i}.png')
    run('ref', '--data=colour', '--dest=colour.npz')
    arguments = ['--gen_path=grey', source, '--num=4', '--metrics=fid']
    line = refused(*arguments)
    assert f'{source.replace("_", "-")}: made from [3, 16, 16] images, these are [1, 8, 8] [C,H,W]' in line and '--other-shape' in line
    assert not Path('grey.fid.json').exists()
    output = run(*arguments, '--other-shape')
    result = json.loads(Path('grey.fid.json').read_text())
    assert result['fid_score'] > 0 and result['image_shape'] == [1, 8, 8] and result['reference']['shape'] == [3, 16, 16]
    assert 'made from [3, 16, 16] images, compared with [1, 8, 8]' in output


def test_torchrun_as_published(folders, images):
    """eval_fid.py joins torchrun's process group: two ranks share the images, and rank 0 alone prints and writes."""
    done = torchrun('--gen_path=gen', '--ref_path=ref', '--num-images=11', '--batch_size=3', PIXELS, '--out_path=two.json')
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('fid_score') == 1
    result = json.loads(Path('two.json').read_text())
    assert result['fid_score'] == pytest.approx(expected_distance(images[0][:11], images[1]), rel=1e-6)
    assert result['ranks'] == 2 and result['num_images'] == 11


# All metrics, kept features, other commands


SMALL = ['--kid-subset-size=10', '--kid-subsets=4', '--splits=2', PIXELS]


def test_all_metrics_from_kept_features_and_from_images(folders, images):
    """Statistics with features give the numbers that the images give; the JSON names what decided them."""
    run('ref', '--data=ref', '--dest=ref.npz', '--keep-features', PIXELS)
    arguments = ['--gen_path=gen', '--num=12', '--metrics=dc,pr,kid,fid', *SMALL]
    output = run(*arguments, '--ref_stats=ref.npz', '--out-path=a.json')
    run(*arguments, '--ref_path=ref', '--split=test', '--out-path=b.json')
    a, b = (json.loads(Path(name).read_text()) for name in ('a.json', 'b.json'))
    gen, ref = (batch.reshape(len(batch), -1) / 127.5 - 1 for batch in images)
    expected = dict(zip(['kid', 'kid_std', 'precision', 'recall', 'density', 'coverage'],
                        [*kernel_distance(gen, ref, 4, 10, 2020), *precision_recall(ref, gen), *density_coverage(ref, gen)]))
    for result in (a, b):
        assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert result['metrics'] == {'names': ['fid', 'kid', 'pr', 'dc'], 'kid_subsets': 4, 'kid_subset_size': 10, 'pr_k': 3,
                                     'dc_k': 5, 'splits': 2, 'seed': 2020, 'intervals': False}
        assert 'inception_score' not in result and 'repeats' not in result
    assert b['reference']['split'] == 'test' and a['generated'] == {
        'path': 'gen', 'sha256': file_digest('gen'), 'record': None, 'record_missing': 'there is no gen.json beside the images'}
    lines = output.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ['metric', 'fid_score', 'kid', 'kid_std', 'precision', 'recall', 'density',
                                                        'coverage']
    assert all('12' in line and 'pixels' in line and '30 images' in line for line in lines[1:-1])


def test_intervals_in_the_result_and_in_print(folders):
    """Of 260 images of 24 features; kid has none here, since the reference has 30, and the program says so."""
    np.save('many.npy', np.random.default_rng(0).integers(0, 256, (260, 2, 4, 3), dtype=np.uint8))
    output = run('--gen-path=many.npy', '--ref-path=ref', '--num=260', '--metrics=fid,fid_inf,kid', '--intervals', *SMALL)
    result = json.loads(Path('many.npy.fid.json' if Path('many.npy.fid.json').exists() else 'many.fid.json').read_text())
    intervals = result['intervals']
    for name in ('fid_score', 'fid_inf'):
        assert intervals[name]['low'] < result[name] < intervals[name]['high'] and intervals[name]['level'] == 0.95
        shown = f'{result[name]:.4f} [{intervals[name]["low"]:.4f}, {intervals[name]["high"]:.4f}]'
        assert shown in output and result['metrics']['intervals']
    assert intervals['kid']['low'] is None and 'kid: interval: none: ' in output


def test_a_folder_that_changes_is_refused(folders, monkeypatch):
    """A picture arrives while the others are read: nothing is written."""
    def slowly(self, *args):
        yield from batches(self, *args)
        PIL.Image.new('RGB', (4, 2)).save('gen/999999.png')
    batches = ImageFiles.batches
    monkeypatch.setattr(ImageFiles, 'batches', slowly)
    line = refused('--gen_path=gen', '--ref_path=ref', '--num=12', PIXELS)
    assert '--gen-path=gen: changed while it was being read' in line and '999999.png' in line
    assert not Path('gen.fid.json').exists()


def test_all_corrupt_pictures_are_counted_by_two_ranks(folders):
    for i in (2, 5, 8):
        Path(f'gen/{i:06d}.png').write_bytes(b'\x89PNG')
    done = two_ranks('--gen_path=gen', '--ref_path=ref', '--num-images=12', PIXELS)
    line = next(line for line in done.stderr.splitlines() if line.startswith('Error: '))
    assert done.returncode and '3 of 12 images cannot be used' in line
    assert all(name in line for name in ('000002.png', '000005.png', '000008.png'))
    assert not Path('gen.fid.json').exists()


def test_nearest(folders, images):
    """Two generated images are training images; the report, the pairs by name and the picture say so."""
    for i, j in ((3, 20), (7, 4)):
        Path(f'gen/{i:06d}.png').write_bytes(Path(f'ref/{j:06d}.png').read_bytes())
    np.save('unseen.npy', np.random.default_rng(8).integers(0, 200, (25, 2, 4, 3), dtype=np.uint8))
    output = run('nearest', '--gen-path=gen', '--train=ref', '--held-out=unseen.npy', '--pairs=5', PIXELS)
    result = json.loads(Path('gen.nearest.json').read_text())
    named = [(pair['generated'], pair['train']) for pair in result['closest_pairs']]
    assert set(named[:2]) == {('000003.png', '000020.png'), ('000007.png', '000004.png')} and len(named) == 5
    assert result['closest_pairs'][0]['distance'] < 1e-5 and result['closest_pairs'][2]['distance'] > 0.1
    assert [result[key]['num_images'] for key in ('gen_path', 'train', 'held_out')] == [12, 30, 25]
    assert result['train'] == {'path': 'ref', 'num_images': 30, 'sha256': file_digest('ref')}
    assert result['held_out']['sha256'] == hashlib.sha256(Path('unseen.npy').read_bytes()).hexdigest()
    assert result['nn_ratio_below_third'] == pytest.approx(2 / 12) and 'copying_z' in output
    assert result['detector']['name'] == 'pixels' and 'commit' in result['versions']
    picture = np.array(PIL.Image.open('gen.nearest.png'))  # pairs side by side: gap, cell, gap, cell
    cells = [picture[2:2 + 32, left:left + 64] for left in (2, 2 + 64 + 2)]  # 2x4 pixels, each shown 16 times larger
    assert (cells[0] == cells[1]).all() and cells[0].std() > 0


# A network


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """A folder with a tiny network of 8x8 grey images."""
    net = preconditioning.build_network(dict(img_resolution=8, img_channels=1, label_dim=3, model_type='SongUNet', model_channels=16,
                                             channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]))
    source = misc.generator('eval')
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=source) * 0.05
    folder = tmp_path_factory.mktemp('network') / 'net'
    save_network(net.eval(), str(folder))
    return str(folder)


@pytest.fixture
def grey(tmp_path, monkeypatch):
    """Reference images ref.npy in the working directory."""
    monkeypatch.chdir(tmp_path)
    np.save('ref.npy', np.random.default_rng(5).integers(0, 256, (30, 8, 8), dtype=np.uint8))
    return tmp_path


FROM_NETWORK = ['--ref_path=ref.npy', '--seeds=0-12', '--num=13', '--steps=2', '--metrics=fid,kid,pr', *SMALL]


def test_a_network_equals_its_pngs(grey, network):
    """Images in memory are rounded as the files of generate.py are; a repeat takes the seeds that follow."""
    output = run(f'--network={network}', '--repeats=2', '--batch_size=4', '--out-path=net.json', *FROM_NETWORK)
    result = json.loads(Path('net.json').read_text())
    singles = []
    for i, seeds in enumerate(('0-12', '13-25')):
        CliRunner().invoke(generate.main, [f'--network={network}', f'--outdir=g{i}', f'--seeds={seeds}', '--steps=2'],
                           catch_exceptions=False)
        run(f'--gen_path=g{i}', '--ref_path=ref.npy', '--num=13', '--metrics=fid,kid,pr', *SMALL)
        singles.append(json.loads(Path(f'g{i}.fid.json').read_text()))
    names = ['fid_score', 'kid', 'kid_std', 'precision', 'recall']
    for repeat, single, seeds in zip(result['repeats'], singles, ('0-12', '13-25')):
        assert repeat.pop('seeds') == seeds
        assert repeat == pytest.approx({name: single[name] for name in names}, rel=1e-9)
    distances = [single['fid_score'] for single in singles]
    assert abs(distances[0] - distances[1]) > 0.01
    assert result['summary']['fid_score'] == pytest.approx(
        {'mean': np.mean(distances), 'std': np.std(distances, ddof=1), 'min': min(distances)}, rel=1e-9)
    assert result['fid_score'] == result['summary']['fid_score']['mean'] and result['num_images'] == 13
    assert {'network': network, 'weights': 'ema', 'sampler': 'heun'}.items() <= result['generated'].items()
    assert result['generated']['sigmas'] == pytest.approx([80, 0.002, 0])
    assert len(result['generated']['sha256']) == 64 and result['options']['seeds'] == '0-12'
    assert 'mean' in output and '2 x 13' in output


def test_a_network_by_two_ranks(grey, network):
    """Numbers within 1e-6 of one rank's, features gathered."""
    run(f'--network={network}', '--out-path=one.json', '--batch_size=4', *FROM_NETWORK)
    done = two_ranks(f'--network={network}', '--out-path=two.json', *(arg.replace('--num', '--num-images') for arg in FROM_NETWORK))
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(Path(name).read_text()) for name in ('one.json', 'two.json'))
    names = ['fid_score', 'kid', 'kid_std', 'precision', 'recall']
    assert two['ranks'] == 2 and {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-6)


def test_a_network_that_makes_nonsense(grey, network, monkeypatch):
    monkeypatch.setattr('training.sampling.generate._sample', lambda net, seeds, *_: Samples(
        seeds, torch.full((len(seeds), 1, 8, 8), float('nan')), None))
    line = refused(f'--network={network}', *FROM_NETWORK)
    assert f'--network={network}: the image of seed 0 is not finite (13 of 13 in its batch are not)' in line
    assert '--class=3' in refused(f'--network={network}', '--class=3', *FROM_NETWORK)


def test_numbers_in_print():
    """Small values keep digits, and rounding leaves no minus."""
    assert [report.number(v) for v in (None, 12.34567, 0.00012345, -0.00012345, -3e-12, 0.0)] == [
        '-', '12.3457', '0.0001234', '-0.0001234', '0.0000', '0.0000']
    assert report.summary([{'x': 1.0, 'y': None}, {'x': 3.0, 'y': None}]) == {
        'x': {'mean': 2.0, 'std': pytest.approx(2 ** 0.5), 'min': 1.0}, 'y': {'mean': None, 'std': None, 'min': None}}
    assert report.summary([{'x': 1.0}]) == {'x': {'mean': 1.0, 'std': None, 'min': 1.0}}


def test_help_and_version():
    assert '--gen-path' in run('--help') and 'ref' in run('--help')
    assert '--dest' in run('ref', '--help')
    assert 'commit' in run('--version')


def test_defaults_of_the_options_are_those_of_the_program():
    """They are written down twice, so that --help need not import what knows them."""
    default = {param.name: param.default for param in eval_fid.main.params}
    plain = Settings()
    assert (default['kid_subsets'], default['kid_subset_size'], default['splits'], default['metric_seed']) == (
        plain.kid_subsets, plain.kid_subset_size, plain.splits, plain.seed)
    assert (results.PROTOCOL_NUM, tuple(table.FORMATS), table.SETTINGS) == (eval_fid.PROTOCOL_NUM, eval_fid.FORMATS, eval_fid.SETTINGS)
