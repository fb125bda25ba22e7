# SPDX-License-Identifier: Apache-2.0
"""Tiles cover their images, keep their values, labels and levels, and stay together in one part."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from tests.test_dataset_tool import convert, picture_folder, refusal, run
from training.data.convert.readers.files import FileSource
from training.data.convert.tiles import Tiled, starts
from training.data.dataset import ImageDataset


@pytest.mark.parametrize('tile', [1, 3, 8])
def test_starts_cover_a_side(tile):
    for side in range(25):
        for overlap in range(tile):
            found = starts(side, tile, overlap)
            if side < tile:
                assert not found
                continue
            assert found[0] == 0 and found[-1] == side - tile
            steps = np.diff(found)
            assert (steps > 0).all() and (steps <= tile - overlap).all() and (steps[:-1] == tile - overlap).all()


def placed(path):
    """{image: [(top, left, pixels [C,H,W])]} of a zip of tiles."""
    dataset, found = ImageDataset(str(path)), {}
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name != 'dataset.json')
    for i, name in enumerate(names):
        image, _, place = name.rpartition('/')
        found.setdefault(image, []).append((int(place[1:6]), int(place[7:12]), dataset.decode(i)))
    return found


@pytest.mark.parametrize('depth', [np.uint8, np.float32])
def test_tiles_put_together_are_the_image(tmp_path, depth):
    rng = np.random.default_rng(0)
    images = {'a': rng.normal(0, 50, (20, 33)), 'b': rng.normal(0, 50, (12, 16))}
    (tmp_path / 'in').mkdir()
    for name, image in images.items():
        images[name] = image = image.astype(depth)
        if depth == np.uint8:
            Image.fromarray(image).save(tmp_path / 'in' / f'{name}.png')
        else:
            np.save(tmp_path / 'in' / f'{name}.npy', image)
    convert(tmp_path / 'in', tmp_path / 'x.zip', '--tile=16x12', '--overlap=4')
    found = placed(tmp_path / 'x.zip')
    assert [(top, left) for top, left, _ in found['a.png' if depth == np.uint8 else 'a.npy']] == [
        (top, left) for top in (0, 8) for left in (0, 12, 17)]
    for name, tiles in found.items():
        image = images[name[0]]
        seen = np.zeros(image.shape, int)
        for top, left, tile in tiles:
            assert (tile[0] == image[top:top + 12, left:left + 16]).all()
            seen[top:top + 12, left:left + 16] += 1
        assert (seen > 0).all()


def test_labels_and_levels_are_those_of_the_image(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), np.uint8)
    picture_folder(tmp_path / 'in', images, ['cat/0.png', 'dog/1.png', 'dog/2.png'])
    (tmp_path / 's.csv').write_text('0.png,0.1\n1.png,0\n2.png,0.3\n')
    convert(tmp_path / 'in', tmp_path / 'x.zip', '--tile=8', f'--sigmas={tmp_path}/s.csv')
    dataset = ImageDataset(str(tmp_path / 'x.zip'), use_labels=True)
    assert dataset.classes.tolist() == [0, 0, 1, 1, 1, 1] and dataset.native_sigma.tolist() == [0.1, 0.1, 0, 0, 0.3, 0.3]
    convert(tmp_path / 'in', tmp_path / 'y.zip', '--tile=8', '--part=1/2', '--max-images=1')
    with zipfile.ZipFile(tmp_path / 'y.zip') as archive:
        assert archive.namelist() == ['dog/1.png/y00000x00000.png', 'dataset.json']
        assert json.loads(archive.read('dataset.json')) == {'labels': [['dog/1.png/y00000x00000.png', 1]]}


def test_images_that_are_small_or_bad(tmp_path):
    picture_folder(tmp_path / 'in', np.zeros([2, 8, 8, 3], np.uint8))
    Image.new('RGB', (7, 30)).save(tmp_path / 'in' / 'thin.png')
    said = convert(tmp_path / 'in', tmp_path / 'x.zip', '--tile=8')
    assert 'Left out 1 of 3 images, smaller than --tile=8x8' in said and len(ImageDataset(str(tmp_path / 'x.zip'))) == 2
    (tmp_path / 'in' / 'junk.png').write_bytes(b'junk')
    args = [f'--source={tmp_path}/in', f'--dest={tmp_path}/y.zip', '--tile=8', '--workers=1']
    result = run(*args)
    assert result.exit_code == 1 and 'junk.png/y00000x00000: cannot be read' in result.output
    convert(tmp_path / 'in', tmp_path / 'y.zip', '--tile=8', '--on-bad=skip')
    for args, text in ((['--tile=9'], 'smaller'), (['--overlap=2'], '--overlap=2 needs --tile'),
                       (['--tile=8x4', '--overlap=4'], '--overlap=4 must be less than the sides of --tile=8x4')):
        (tmp_path / 'in' / 'junk.png').unlink(missing_ok=True)
        assert text in refusal(f'--source={tmp_path}/in', f'--dest={tmp_path}/z.zip', *args)


def test_a_damaged_image_is_looked_at_once(tmp_path, monkeypatch):
    """And told of with a bound, whatever its header says of its size."""
    Image.new('L', (300, 300)).save(tmp_path / 'a.png')
    data = (tmp_path / 'a.png').read_bytes()
    (tmp_path / 'a.png').write_bytes(data[:len(data) // 2])
    source, calls = FileSource(str(tmp_path)), []
    read = source.read
    source.read = lambda index: calls.append(index) or read(index)
    tiled = Tiled(source, 8, 8)
    for index in range(len(tiled.names)):
        with pytest.raises(DAMAGE):
            tiled.read(index)
    assert len(tiled.names) == 38 ** 2 and calls == [0]
    done = run(f'--source={tmp_path}', f'--dest={tmp_path}/x.zip', '--tile=8x8', '--workers=1')
    assert done.exit_code != 0 and f'... and {38 ** 2 - 100} more' in done.output and len(done.output.splitlines()) < 110
    monkeypatch.setattr('training.data.convert.tiles.MAX_TILES', 38 ** 2 - 1)
    with pytest.raises(UserError, match=r'^--tile=8x8: cuts a.png .300x300. into 1444 tiles, .* limit of 1443 .* use larger ones$'):
        Tiled(FileSource(str(tmp_path)), 8, 8)
