# SPDX-License-Identifier: Apache-2.0
"""The contact sheet shows what was asked for, at the pixels where a person would look."""

import os

import numpy as np
from PIL import Image

from tests.test_dataset_tool import convert, picture_folder, pictures, refusal
from training.data.convert import sheet
from training.data.convert.writers import encode_npy, encode_png


def test_images_are_taken_evenly_over_classes_the_noisy_ones_last():
    labels, sigmas = [i // 50 for i in range(50_000)], [0.1 * (i % 3) for i in range(50_000)]
    rows = sheet.choose(labels, sigmas, list(range(50_000)))
    assert [labels[row[0]] for row in rows] == list(range(0, 1000, 100)) and {len(row) for row in rows} == {10}
    for row in rows:
        assert len({labels[i] for i in row}) == 1 and [sigmas[i] for i in row] == sorted(sigmas[i] for i in row)
    rows = sheet.choose(None, sigmas, list(range(5, 1000)))
    assert len(rows) == 10 and len({i for row in rows for i in row}) == 100 and sigmas[rows[0][0]] == 0 and sigmas[rows[-1][-1]] == 0.2
    assert sheet.choose([[0.5, 1]] * 3, None, [0, 1, 2]) == [[0, 1, 2]] and sheet.choose([0, 1, 0], None, [0, 1, 2]) == [[0, 2], [1]]


def test_pixels_of_the_sheet(tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    deep = (small.astype(np.float32) - 127.5) * 3 + 700  # five channels, of which three are shown
    cells = [('a.png', encode_png(small), ''), ('b.png', encode_png(255 - small), 'sigma 0.2')]
    sheet.draw(tmp_path / 'a.png', 'title', [('0 cat', cells)])
    sheet.draw(tmp_path / 'b.png', 'title', [('0 cat', [('a.npy', encode_npy(np.concatenate([deep, deep[:2]])), '')])],
               {'offset': [700] * 5, 'scale': 3 * 127.5})
    want = small.repeat(12, 1).repeat(12, 2).transpose(1, 2, 0)
    for name, images in (('a.png', (want, 255 - want)), ('b.png', (want,))):
        found = np.asarray(Image.open(tmp_path / name))
        top = np.flatnonzero((found != 255).any((1, 2)) & (found[:, -60:] != 255).any((1, 2)))[0]
        for image in images:
            spots = [x for x in range(found.shape[1] - 95) if (found[top:top + 96, x:x + 96] == image).all()]
            assert len(spots) == 1, name
    assert np.asarray(Image.open(tmp_path / 'a.png')).shape[0] > found.shape[0]  # room for the level


def test_where_the_sheet_goes(tmp_path):
    folder = picture_folder(tmp_path / 'in', pictures(3, (300, 100, 3)))
    convert(folder, tmp_path / 'x.zip')
    convert(folder, tmp_path / 'out')
    assert sorted(os.listdir(tmp_path)) == ['in', 'out', 'out-sheet.png', 'x-sheet.png', 'x.zip']
    assert not [name for _, _, names in os.walk(tmp_path / 'out') for name in names if 'sheet' in name]
    assert Image.open(tmp_path / 'x-sheet.png').height < 128 + 60
    convert(folder, tmp_path / 'y.zip', '--sheet=none')
    convert(folder, tmp_path / 'y.zip', f'--sheet={tmp_path}/new/look.png')
    assert not (tmp_path / 'y-sheet.png').exists() and (tmp_path / 'new' / 'look.png').exists()
    for option, text in (('x.jpg', 'must end in .png'), (f'{tmp_path}/z/look.png', 'is inside --dest')):
        assert text in refusal(f'--source={folder}', f'--dest={tmp_path}/z', f'--sheet={option}')
    assert not (tmp_path / 'z').exists()
