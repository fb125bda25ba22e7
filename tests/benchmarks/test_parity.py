# SPDX-License-Identifier: Apache-2.0
"""Numbers that clean-fid, torch-fidelity and prdc gave, without those programs; and the table of benchmarks/parity.py."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from benchmarks import parity
from metrics import kernel, manifold
from tests.support import GOLDEN

THEIRS = json.loads((GOLDEN / 'metrics' / 'parity.json').read_text())


def features():
    x = np.random.RandomState(5).randint(0, 256, (80, 12)) / 64
    return torch.from_numpy(x[:40]), torch.from_numpy(x[40:] * 1.1)


def test_clean_fid():
    a, b = features()
    assert parity.frechet_of(a, b) == pytest.approx(THEIRS['clean-fid 0.1.35']['frechet'], rel=1e-9)
    assert kernel.squared_mmd(a, b) == pytest.approx(THEIRS['clean-fid 0.1.35']['squared_mmd'], rel=1e-9)


def test_torch_fidelity():
    (a, b), theirs = features(), THEIRS['torch-fidelity 0.4.0']
    assert parity.frechet_of(a, b) == pytest.approx(theirs['frechet'], rel=1e-9)
    found = kernel.kernel_distance(a, b, 10, 20, 2020)
    assert found == pytest.approx((theirs['kernel_inception_distance_mean'], theirs['kernel_inception_distance_std']), rel=1e-9)
    assert manifold.precision_recall(a, b) == pytest.approx((theirs['precision'], theirs['recall']), rel=1e-6)  # float32 there


def test_prdc():
    assert manifold.manifold_metrics(*features(), pr_k=5, dc_k=5) == pytest.approx(THEIRS['prdc 0.2'], rel=1e-12)


def test_files_are_read_as_pillow_reads_them(tmp_path):
    """Photograph-like pictures as JPEG and PNG, as they are and resized."""
    (tmp_path / 'data').mkdir()
    y, x = np.mgrid[:32, :32]
    for i in range(3):
        picture = np.stack([128 + 90 * np.sin((x + i) / 5 + c) + 30 * np.cos(y * x / 70) for c in range(3)], -1).astype(np.uint8)
        PIL.Image.fromarray(picture).save(tmp_path / 'data' / f'{i}.jpg', quality=80)
    sets = parity.write_sets(str(tmp_path / 'data'), 2, str(tmp_path))
    assert list(sets) == ['jpeg', 'png', 'png 64', 'jpeg 64']
    for name, path in sets.items():
        found = parity.read_images(path)
        assert found.shape == (2, 3, *([64, 64] if '64' in name else [32, 32])) and found.std() > 10
        assert (found == parity.pillow(path)).all()
    assert (parity.read_images(sets['jpeg']) == parity.read_images(sets['png'])).all()


def test_what_is_beyond_its_tolerance_fails(capsys):
    rows = parity.Rows()
    rows.compare('a', 'x', 1.0, 1.0 + 1e-7, 1e-6)
    rows.compare('b', 'x', [1.0, 5.0], [1.0, 4.0], 0.2)
    rows.compare('c', 'x', 1.0, 2.0, None)
    rows.compare('d', 'x', np.zeros(2), np.zeros(3), 1)
    rows.compare('e', 'x', float('nan'), 1.0, 1)
    rows.peer('none', lambda rows: __import__('no_such_package'))
    assert (rows.failed, rows.skipped) == (3, 1)
    verdicts = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert verdicts[1:6] == ['pass', 'FAIL', 'definition', 'FAIL', 'FAIL']


def test_parity_needs_data():
    with pytest.raises(SystemExit, match='--data=PATH'):
        parity.parity(type('Args', (), {'data': None}))
