# SPDX-License-Identifier: Apache-2.0
"""examples/blurred.py from end to end, at a size that shows that it runs, and that what is there is not made again."""

import pytest
from PIL import Image

from dnnlib.files import read_json
from tests.support import ROOT, launch
from training.data.dataset import ImageDataset


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    pytest.importorskip('sklearn')
    options = [f'--outdir={tmp_path}', '--seeds=1', '--kimg=0.256', '--samples=20']
    first = launch.run(ROOT / 'examples' / 'blurred.py', options)
    assert first.returncode == 0, first.stdout + first.stderr
    found = read_json(tmp_path / 'distances.json')
    assert set(found) == {'blurred', 'alone', 'mixed', 'annotated', 'clean'} and all(len(values) == 1 for values in found.values())
    assert found['blurred'][0]['pixels'] == pytest.approx(4.1, abs=0.3)
    dataset = ImageDataset(str(tmp_path / 's0' / 'annotated.zip'))
    assert (dataset.sigma_min == 0).sum() == 90 and (dataset.sigma_min[dataset.sigma_min > 0] == dataset.sigma_min.max()).all()
    assert 1.3 < dataset.sigma_min.max() < 2
    assert Image.open(tmp_path / 'samples.png').size[0] > 500
    again = launch.run(ROOT / 'examples' / 'blurred.py', options)
    assert again.returncode == 0 and again.stdout.count('Warning') == 0 and read_json(tmp_path / 'distances.json') == found
