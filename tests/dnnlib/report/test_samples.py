# SPDX-License-Identifier: Apache-2.0
"""Sample pictures in the page: which ones, how small, and that they stay within their bytes whatever they are."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib.report import samples
from dnnlib.report.runs import Run


def opened(uri):
    kind, data = uri.removeprefix('data:image/').split(';base64,')
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format.lower() == kind
        return image.size, np.asarray(image)


def write(path, height, width, channels=3, seed=0):
    """Noise, which no format makes small."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[:, :, 0]).save(path)
    return str(path)


def test_spaced():
    assert samples.spaced([1, 2, 3], 8) == [1, 2, 3] and samples.spaced([], 2) == []
    assert samples.spaced(list(range(100)), 2) == [0, 99]
    found = samples.spaced(list(range(100)), 8)
    assert len(set(found)) == 8 and (found[0], found[-1]) == (0, 99) and max(np.diff(found)) - min(np.diff(found)) <= 1


def test_small_pictures_are_kept_as_they_are(tmp_path):
    path = write(tmp_path / 'a.png', 64, 80, channels=1)
    size, pixels = opened(samples.data_uri(path, 100_000))
    assert size == (80, 64) and np.array_equal(pixels, np.asarray(Image.open(path)))


@pytest.mark.parametrize('limit', [200_000, 20_000, 2_000])
def test_limit_holds(tmp_path, limit):
    uri = samples.data_uri(write(tmp_path / 'a.png', 700, 1400), limit)
    (width, height), _ = opened(uri)
    assert len(base64.b64decode(uri.partition(',')[2])) <= limit and max(width, height) <= samples.SIDE and abs(width / height - 2) < 0.1


def test_broken_pictures_are_none(tmp_path):
    path = tmp_path / 'a.png'
    whole = Path(write(tmp_path / 'b.png', 64, 64)).read_bytes()
    for data in (b'', b'GIF89a', whole[:2000]):
        path.write_bytes(data)
        assert samples.data_uri(str(path), 100_000) is None
    assert samples.data_uri(str(tmp_path / 'gone.png'), 100_000) is None


def test_all_together_stay_within_the_budget(tmp_path):
    path = write(tmp_path / 'a.png', 300, 300)
    for count in (3, 20):
        runs = [Run('', str(k), samples=[(kimg, path) for kimg in range(3)]) for k in range(count)]
        found = samples.strips(runs)
        assert sum(len(uri) for strip in found for _, uri in strip) <= samples.BUDGET
        assert all(strip[0][0] == 0 and strip[-1][0] == 2 for strip in found)
