# SPDX-License-Identifier: Apache-2.0
"""ADM's crop and padding, in closed form: constants stay, a single pixel lands where it should, ratios are kept."""

import numpy as np
import pytest
from PIL import Image

from tests.test_dataset_tool import convert, picture_folder, pictures, refusal
from training.data.convert.transforms import center_crop_dhariwal, pad
from training.data.dataset import ImageDataset

DEPTHS = [np.uint8, np.float32]


@pytest.mark.parametrize('depth', DEPTHS)
@pytest.mark.parametrize('shape', [(3, 40, 25), (1, 7, 9), (5, 64, 64), (2, 8, 31)])
def test_constant_images_stay_constant(depth, shape):
    image = np.full(shape, 77, depth)
    crop, edge, mirror = center_crop_dhariwal(image, 8, 8), pad(image, 8, 12), pad(image, fill='reflect')
    assert crop.shape == (shape[0], 8, 8) and edge.shape == (shape[0], 12, 8) and mirror.shape == (shape[0], *[max(shape[1:])] * 2)
    for found in (crop, edge, mirror):
        assert found.dtype == depth
        np.testing.assert_allclose(found, 77, rtol=1e-6)


def test_a_pixel_of_an_image_four_times_as_large_is_a_sixteenth():
    """Halved twice by averages, and no bicubic filter is left to do; of 8 x 16 pixels the middle 8 stay."""
    image = np.zeros([1, 32, 64], np.float32)
    image[0, 13, 21] = 16
    want = np.zeros([1, 8, 8], np.float32)
    want[0, 13 // 4, 21 // 4 - 4] = 1
    np.testing.assert_array_equal(center_crop_dhariwal(image, 8, 8), want)


def test_a_ramp_stays_a_ramp_when_enlarged():
    """Bicubic interpolation is exact for straight lines, away from the edge; pixel centres are at (i + 0.5) / 2."""
    image = np.broadcast_to(np.arange(8, dtype=np.float32), (1, 8, 8))
    found = center_crop_dhariwal(image, 16, 16)
    np.testing.assert_allclose(found[0, :, 4:-4], np.broadcast_to((np.arange(16) + 0.5) / 2 - 0.5, (16, 16))[:, 4:-4], atol=1e-5)


def test_short_side_and_middle_of_photographs():
    """70 x 50 to 16: by averages to 35 x 25, by the bicubic filter to 22 x 16, the middle 16."""
    image = pictures(1, (50, 70, 3))[0]
    whole = Image.fromarray(image).resize((35, 25), Image.BOX).resize((22, 16), Image.BICUBIC)
    np.testing.assert_array_equal(center_crop_dhariwal(image.transpose(2, 0, 1), 16, 16), np.asarray(whole).transpose(2, 0, 1)[:, :, 3:19])


@pytest.mark.parametrize('depth', DEPTHS)
def test_padding_puts_the_image_in_the_middle(depth):
    image = np.arange(1, 13, dtype=depth).reshape(1, 3, 4)
    for size in ((9, 8), (4, 4), (None, None)):
        found = pad(image, *size, fill='constant', value=50)
        width, height = size if size[0] else (4, 4)
        top, left = (height - 3) // 2, (width - 4) // 2
        want = np.full([1, height, width], 50, depth)
        want[:, top:top + 3, left:left + 4] = image
        np.testing.assert_array_equal(found, want)
        assert found.dtype == depth
    rows = np.clip(np.arange(8) - 2, 0, 2)
    np.testing.assert_array_equal(pad(image, 4, 8), image[:, rows])
    np.testing.assert_array_equal(pad(image, 4, 8, fill='reflect'), image[:, [2, 1, 0, 1, 2, 1, 0, 1]])


def test_what_is_larger_is_shrunk_in_its_shape():
    image = np.zeros([1, 16, 32], np.float32)
    image[:, :, 16:] = 1
    found = pad(image, 8, 8, fill='constant', value=-3)
    assert (found[:, [0, 1, 6, 7]] == -3).all() and abs(found[:, 2:6, :2]).max() < 0.1 and abs(found[:, 2:6, 6:] - 1).max() < 0.1


def test_as_a_command(tmp_path):
    images = pictures(2, (20, 30, 3))
    picture_folder(tmp_path / 'in', images)
    convert(tmp_path / 'in', tmp_path / 'x.zip', '--transform=center-crop-dhariwal', '--resolution=8x8')
    convert(tmp_path / 'in', tmp_path / 'y.zip', '--transform=pad:fill=constant,value=9')
    found, padded = ImageDataset(str(tmp_path / 'x.zip')), ImageDataset(str(tmp_path / 'y.zip'))
    for i, image in enumerate(images):
        np.testing.assert_array_equal(found.decode(i), center_crop_dhariwal(image.transpose(2, 0, 1), 8, 8))
        assert (padded.decode(i)[:, 5:25].transpose(1, 2, 0) == image).all() and (padded.decode(i)[:, :5] == 9).all()
    args = [f'--source={tmp_path}/in', f'--dest={tmp_path}/z.zip', '--workers=1']
    for more, text in ((['--transform=pad:fill=zero'], 'fill=zero is unknown; choose from edge, reflect, constant'),
                       (['--transform=pad:fill=constant,value=256'], 'value=256 is not possible in uint8'),
                       (['--transform=pad', '--sigmas=0.1'], '--transform would make the noise'),
                       (['--transform=crop'], 'choose from'), (['--transform=pad:colour=1'], 'fill=edge'),
                       (['--transform=center-crop-dhariwal', '--resolution=8x4'], 'crops a square'),
                       (['--transform=center-crop-dhariwal'], 'needs --resolution')):
        assert text in refusal(*args, *more), more
    assert not (tmp_path / 'z.zip').exists()
