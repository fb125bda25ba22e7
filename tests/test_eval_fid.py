# SPDX-License-Identifier: Apache-2.0
"""The eval_fid.py command: published calls, its JSON, its refusals, and ranks."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import eval_fid
from metrics.frechet import frechet_distance
from metrics.statistics import load_statistics

ROOT = Path(__file__).parent.parent
PIXELS = '--detector=pixels'


def run(*args, code=0):
    """Runs the command in this process; returns what it prints."""
    result = CliRunner().invoke(eval_fid.main, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def refused(*args):
    """The one line of a refusal."""
    output = run(*args, code=1)
    lines = output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith('Error: '), output
    return lines[0]


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
        'detector_sha256': None}
    assert result['num_images'] == result['found_images'] == 12 and result['image_shape'] == [3, 2, 4]
    assert result['detector'] == {'name': 'pixels', 'weights': None, 'sha256': None}
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
    assert '--num=13' in line and 'holds only 12' in line
    output = run('--gen_path=gen', '--ref_path=ref', '--num=9', PIXELS)
    assert 'the first 9 of 12' in output
    result = json.loads(Path('gen.fid.json').read_text())
    assert (result['num_images'], result['found_images']) == (9, 12)
    assert result['fid_score'] == pytest.approx(expected_distance(images[0][:9], images[1]), rel=1e-9)


def test_the_published_count_needs_no_option(folders, images, monkeypatch):
    monkeypatch.setattr(eval_fid, 'PROTOCOL_NUM', 12)
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
    (['--gen_path=empty', '--ref_path=ref'], ['--gen-path=empty', 'holds no images']),
    (['--gen_path=gen', '--ref_path=empty', '--num=12'], ['--ref-path=empty', 'holds no images']),
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
    (['ref', '--data=ref', '--dest=ref.json'], ['--dest=ref.json', '.npz']),
    (['ref', '--data=empty', '--dest=a.npz'], ['--data=empty', 'holds no images']),
])
def test_refusals(folders, images, args, words):
    Path('empty').mkdir()
    np.savez('other.npz', mu=np.zeros(7), sigma=np.eye(7))
    np.savez('inception.npz', mu=np.zeros(24), sigma=np.eye(24), detector='inception')
    np.savez('images.npz', images=images[0])
    line = refused(*args)
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
    monkeypatch.setattr('dnnlib.util.is_url', lambda ref: str(ref).startswith('file:'))  # urllib's own offline scheme
    run('--gen_path=gen', f'--ref_stats={url}', '--num=12', PIXELS)
    assert json.loads(Path('gen.fid.json').read_text())['reference']['path'] == url


def test_torchrun_as_published(folders, images):
    """eval_fid.py joins torchrun's process group: two ranks share the images, and rank 0 alone prints and writes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'eval_fid.py',
               '--gen_path=gen', '--ref_path=ref', '--num-images=11', '--batch_size=3', PIXELS, '--out_path=two.json']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('fid_score') == 1
    result = json.loads(Path('two.json').read_text())
    assert result['fid_score'] == pytest.approx(expected_distance(images[0][:11], images[1]), rel=1e-6)
    assert result['ranks'] == 2 and result['num_images'] == 11


def test_help_and_version():
    assert '--gen-path' in run('--help') and 'ref' in run('--help')
    assert '--dest' in run('ref', '--help')
    assert 'commit' in run('--version')
