# SPDX-License-Identifier: Apache-2.0
"""denoise.py as a command: a real network, several ranks, tiles, errors in one line."""

import json

import numpy as np
import pytest

from tests.support import ROOT, launch
from tests.support.unets import contents, tiny
from training.checkpoints.save import save_network


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A network of 8x8 grey pictures, and noisy images of two sizes, as float .npy with levels of their own."""
    root, rng = tmp_path_factory.mktemp('denoise'), np.random.default_rng(0)
    save_network(tiny(), root / 'network')
    (root / 'in').mkdir()
    for k in range(7):
        np.save(root / 'in' / f'{k}.npy', rng.normal(size=(1, 8, 8) if k < 5 else (1, 11, 14)).astype(np.float32))
    sigmas = {f'{k}.npy': 0.3 * (k % 3) for k in range(7)}
    (root / 'in' / 'dataset.json').write_text(json.dumps({'sigmas': sigmas, 'units': {'offset': 0, 'scale': 1}}))
    return root


def command(folder, dest, *more, ranks=1):
    paths = [f'--network={folder / "network"}', f'--data={folder / "in"}', f'--dest={folder / dest}']
    return launch.run(ROOT / 'denoise.py', [*paths, '--samples=2', '--steps=2', '--threads=1', *more], ranks)


def test_files_do_not_depend_on_ranks_or_batch(folder):
    """Bit for bit, in tiles too."""
    one, two = command(folder, 'one', '--batch=3', '--keep-samples'), command(folder, 'two', '--keep-samples', ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for word in ('', '-std', '-samples'):
        ours, theirs = contents(folder / f'one{word}'), contents(folder / f'two{word}')
        assert ours == theirs and len(ours) == {'': 8, '-std': 4, '-samples': 8}[word]
    assert np.load(folder / 'one' / '1.npy').shape == (1, 8, 8) and np.load(folder / 'one' / '5.npy').shape == (1, 11, 14)
    assert two.stdout.count('Denoising 4 images at level 0.3 to 0.6: 2 posterior samples') == 1
    assert '3 of 7 images are of level 0 and stay as they are' in two.stdout


@pytest.mark.parametrize('ranks', [1, 2])
def test_errors_are_one_line(folder, ranks):
    result = command(folder, 'refused', '--class=1', ranks=ranks)
    assert result.returncode != 0 and 'Traceback' not in result.stderr + result.stdout
    assert result.stderr.count('Error: --class=1: the network is unconditional') == 1
    assert not (folder / 'refused').exists() and not (folder / 'refused.partial').exists()
