# SPDX-License-Identifier: Apache-2.0
"""benchmarks/small_detector.py: it learns, its file is a detector of eval_fid.py, and what it cannot take is refused."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks import small_detector
from dnnlib.files import file_digest
from metrics.detectors import module_detector


def stripes(dest, count, seed, classes=2):
    """A zip of noisy 8x8 RGB pictures: class 0 has horizontal stripes, class 1 vertical ones."""
    rng = np.random.default_rng(seed)
    pattern = np.where(np.arange(8)[:, None] // 2 % 2, 160, 96) * np.ones([8, 8])
    with zipfile.ZipFile(dest, 'w') as archive:
        for k in range(count):
            picture = (pattern if k % 2 else pattern.T)[..., None] + rng.normal(0, 20, (8, 8, 3))
            held = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(held, 'png')
            archive.writestr(f'{k:04d}.png', held.getvalue())
        archive.writestr('dataset.json', json.dumps({'labels': [[f'{k:04d}.png', k % classes] for k in range(count)]}))
    return dest


def test_it_learns_and_its_file_is_a_detector(tmp_path):
    data, val = stripes(tmp_path / 'a.zip', 128, 0), stripes(tmp_path / 'b.zip', 64, 1)
    dest = tmp_path / 'small.safetensors'
    call = lambda: CliRunner().invoke(small_detector.main, [f'--data={data}', f'--val={val}', f'--dest={dest}', '--kimg=2.5'],
                                      catch_exceptions=False)
    printed = call().output
    digest = file_digest(dest)
    assert 'accuracy 1.000 on 64 held-out images' in printed and digest in printed
    detector = module_detector('cpu', 'benchmarks.small_detector.SmallClassifier', str(dest))
    features, logits = detector(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)))
    assert features.shape == (5, small_detector.FEATURES) and logits.shape == (5, 10) and detector.sha256 == digest
    call()
    assert file_digest(dest) == digest  # the same seed gives the same file


def test_images_are_moved_by_a_pixel_at_most():
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(200, -1, -1, -1)
    found = small_detector.shifted(images, torch.Generator().manual_seed(0))
    inner = found[:, 0, 3, 3] - images[0, 0, 3, 3]
    assert set(inner.tolist()) == {row * 8 + column for row in (-1, 0, 1) for column in (-1, 0, 1)}
    assert found.shape == images.shape


@pytest.mark.parametrize('classes, dest, message', [(12, 'a.safetensors', 'at most 10 classes'), (2, 'a.pt', 'must end in .safetensors')])
def test_what_it_cannot_take_is_refused(tmp_path, classes, dest, message):
    data = stripes(tmp_path / 'a.zip', 24, 0, classes)
    result = CliRunner().invoke(small_detector.main, [f'--data={data}', f'--val={data}', f'--dest={tmp_path / dest}', '--kimg=0.1'])
    assert result.exit_code != 0 and message in result.output and 'Traceback' not in result.output
    assert not (tmp_path / dest).exists()
