# SPDX-License-Identifier: Apache-2.0
"""Augmentation: what it does to noise (published figures), exact symmetries of noisy images, geometry and labels of each move."""

import json
import math

import pytest
import torch

from tests.support import GOLDEN
from torch_utils import misc
from training.data import augment
from training.data.augment import AugmentPipe, Moves

STATS = json.loads((GOLDEN / 'augment' / 'augment_noise_stats.json').read_text())
NONE = dict.fromkeys(['xflip', 'yflip', 'scale', 'rotate_frac', 'aniso', 'translate_frac'], 0)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=misc.generator('noise', seed))


def level(n, sigma_n):
    return torch.full([n, 1, 1, 1], float(sigma_n))


def lag(images, dim):
    """Autocorrelation of neighbouring pixels along a dimension."""
    a, b = images.narrow(dim, 1, images.shape[dim] - 1), images.narrow(dim, 0, images.shape[dim] - 1)
    return float((a * b).mean() / images.var())


def moves(n=1, **values):
    """Moves of n images that do nothing but what is given; angle stands for cos and sin."""
    angle = torch.tensor(values.pop('angle', 0.0))
    values = dict.fromkeys(Moves._fields, 0.0) | {'cos': angle.cos(), 'sin': angle.sin()} | values
    return Moves(**{key: torch.as_tensor(value, dtype=torch.float32).expand(n) for key, value in values.items()})


def blob(x, y, height=24, width=32, radius=2.0):
    """[1,1,H,W]: a Gaussian spot x to the right of the centre and y below it, in pixels."""
    rows = torch.arange(height) - (height - 1) / 2 - y
    columns = torch.arange(width) - (width - 1) / 2 - x
    return torch.exp(-(rows[:, None] ** 2 + columns ** 2) / (2 * radius ** 2))[None, None]


def centre(image):
    """Centre of mass (x, y) from the image's centre, in pixels."""
    height, width = image.shape[2:]
    share = image[0, 0] / image.sum()
    return (float((share.sum(0) * (torch.arange(width) - (width - 1) / 2)).sum()),
            float((share.sum(1) * (torch.arange(height) - (height - 1) / 2)).sum()))


# What resampling does to noise


@pytest.mark.parametrize('case', ['scale', 'rotate_frac', 'aniso', 'translate_frac', 'cifar_p1', 'cifar_p0.12'])
def test_noise_statistics_are_the_published_ones(case):
    """Unit white noise given as clean images: its std and the correlation of neighbours afterwards."""
    if case.startswith('cifar'):
        pipe = AugmentPipe(p=float(case.removeprefix('cifar_p')))
    else:
        pipe = AugmentPipe(**NONE | {case: 1, 'p': 1})
    n = STATS['images'][0]
    images, _ = pipe(noise(*STATS['images']), level(n, 0), misc.Draws(0, 0))
    assert float(images.std()) == pytest.approx(STATS[case]['std'], abs=0.005)
    # Both sides are samples of 2000 images, whose own correlations spread by 0.09: 2.8 standard errors of the difference.
    assert lag(images, 3) == pytest.approx(STATS[case]['lag1_x'], abs=0.008)
    assert lag(images, 2) == pytest.approx(STATS[case]['lag1_y'], abs=0.008)


def test_fault_2a6_noise_of_noisy_images_stays_white():
    """In a mixed batch the clean images are resampled; those with sigma_n > 0 keep std sigma_n and uncorrelated pixels."""
    n, sigma_n = 1000, 0.2
    sigmas = torch.where(torch.arange(n) % 2 == 0, sigma_n, 0.0).reshape(-1, 1, 1, 1)
    images, labels = AugmentPipe(p=1)(sigma_n * noise(n, 3, 16, 16), sigmas, misc.Draws(0, 0))
    noisy, clean = images[::2], images[1::2]
    count = noisy.numel()
    assert abs(float(noisy.std()) / sigma_n - 1) < 5 * math.sqrt(0.5 / count)
    assert max(abs(lag(noisy, 2)), abs(lag(noisy, 3))) < 5 / math.sqrt(count)
    assert clean.std() < 0.85 * sigma_n and lag(clean, 3) > 0.15  # what the published pipe did to all of them
    assert not labels[::2, [2, 5, 6, 7, 8]].any() and (labels[1::2, [2, 7, 8]] != 0).all()


def test_noisy_images_are_one_of_eight_mirrored_and_turned_copies():
    """Every pixel keeps its bits, the labels say which copy it is, and all eight copies occur."""
    n = 256
    images = noise(n, 2, 6, 6)
    out, labels = AugmentPipe(p=1)(images, level(n, 0.1), misc.Draws(1, 0))
    turns = {(0.0, 0.0): 0, (-1.0, 1.0): 1, (-2.0, 0.0): 2, (-1.0, -1.0): -1}
    seen = set()
    for image, result, label in zip(images, out, labels):
        xflip, yflip, _, cos_less_one, sin = label[:5].tolist()
        image = image.flip(2) if xflip else image
        image = image.flip(1) if yflip else image
        assert torch.equal(result, image.rot90(turns[cos_less_one, sin], [1, 2]))
        seen.add((xflip, yflip, turns[cos_less_one, sin]))
    assert len(seen) == 16  # two flips and four turns: each copy in two ways


def test_noisy_rectangles_turn_by_half_turns_only():
    n = 64
    images = noise(n, 1, 4, 6)
    out, labels = AugmentPipe(p=1)(images, level(n, 0.1), misc.Draws(1, 0))
    assert out.shape == images.shape and set(labels[:, 3].tolist()) == {0.0, -2.0} and not labels[:, 4].any()
    assert torch.equal(out.flatten(1).sort().values, images.flatten(1).sort().values)


# Who is moved, and what is said about it


@pytest.mark.parametrize('sigma_n', [0, 0.3])
def test_labels_are_zero_exactly_where_the_image_is_unchanged(sigma_n):
    n = 400
    images = noise(n, 1, 8, 8)
    out, labels = AugmentPipe(p=0.12)(images, level(n, sigma_n), misc.Draws(0, 0))
    same = (out == images).flatten(1).all(1)
    assert labels.shape == (n, AugmentPipe.label_dim) and torch.equal(same, (labels == 0).all(1)) and 0 < same.sum() < n


def test_probability_zero_changes_nothing():
    images = noise(16, 1, 8, 8)
    out, labels = AugmentPipe(p=0)(images, level(16, 0), misc.Draws(0, 0))
    assert torch.equal(out, images) and not labels.any()


def test_labels_follow_their_laws():
    """Frequencies and moments of the nine labels at p = 0.12, each within 4.5 standard errors."""
    n, p = 20_000, 0.12
    labels = AugmentPipe(p=p).draw(torch.zeros(n, dtype=torch.bool), True, misc.Draws(5, 0)).labels()
    share = lambda columns: float((labels[:, columns] != 0).any(1).float().mean())
    for columns, expected in (([0], 0.5), ([1], p / 2), ([2], p), ([3, 4], p), ([5, 6], p), ([6], p / 2), ([7, 8], p)):
        assert abs(share(columns) - expected) < 4.5 * math.sqrt(expected * (1 - expected) / n), columns
    for column in (2, 7, 8):  # standard normal where not zero
        drawn = labels[:, column][labels[:, column] != 0]
        assert abs(float(drawn.mean())) < 4.5 / math.sqrt(len(drawn))
        assert abs(float(drawn.std()) - 1) < 4.5 * math.sqrt(0.5 / len(drawn))
    turned = labels[labels[:, 3] != 0]
    torch.testing.assert_close((turned[:, 3] + 1) ** 2 + turned[:, 4] ** 2, torch.ones(len(turned)))
    angle = torch.atan2(turned[:, 4], turned[:, 3] + 1).sort().values / (2 * math.pi) + 0.5
    grid = (torch.arange(len(angle)) + 0.5) / len(angle)
    assert float((angle - grid).abs().max()) < 1.95 / math.sqrt(len(angle))  # Kolmogorov, 0.1 %


def test_rows_do_not_depend_on_the_split_of_the_batch():
    n, cut = 40, 23
    images, sigmas = noise(n, 3, 12, 8), torch.where(torch.arange(n) % 3 == 0, 0.2, 0.0).reshape(-1, 1, 1, 1)
    pipe = AugmentPipe(p=0.7)
    whole, labels = pipe(images, sigmas, misc.Draws(3, 9))
    first = pipe(images[:cut], sigmas[:cut], misc.Draws(3, 9))
    second = pipe(images[cut:], sigmas[cut:], misc.Draws(3, 9, first_row=cut))
    assert torch.equal(torch.cat([first[1], second[1]]), labels)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), whole, rtol=0, atol=1e-5)


def test_input_and_global_random_state_are_left_alone():
    images = noise(32, 1, 8, 8)
    before, state = images.clone(), torch.random.get_rng_state()
    AugmentPipe(p=1)(images, level(32, 0), misc.Draws(0, 0))
    assert torch.equal(images, before) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize('options, message', [({'p': 1.5}, 'p=1.5'), ({'p': -0.1}, 'p=-0.1'), ({'yflip': -1}, 'yflip=-1')])
def test_impossible_probabilities_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentPipe(**options)


# Geometry


@pytest.mark.parametrize('move, expected', [
    ({'scale': 2.0}, lambda x, y: (x * 2 ** 0.4, y * 2 ** 0.4)),
    ({'angle': 0.7}, lambda x, y: (x * math.cos(0.7) + y * math.sin(0.7), y * math.cos(0.7) - x * math.sin(0.7))),
    ({'stretch': 1.5}, lambda x, y: (x * 2 ** 0.3, y / 2 ** 0.3)),
    ({'stretch': 1.5, 'axis': math.pi / 2}, lambda x, y: (x / 2 ** 0.3, y * 2 ** 0.3)),
    ({'stretch': 1.5, 'axis': math.pi / 4}, lambda x, y: ((x - y) / 2 * 2 ** 0.3 + (x + y) / 2 / 2 ** 0.3,
                                                         (y - x) / 2 * 2 ** 0.3 + (x + y) / 2 / 2 ** 0.3)),
    ({'shift_x': 0.5, 'shift_y': -0.25}, lambda x, y: (x + 0.5 * 0.125 * 32, y - 0.25 * 0.125 * 24)),
    ({'xflip': 1.0}, lambda x, y: (-x, y)),
    ({'yflip': 1.0}, lambda x, y: (x, -y)),
    ({'yflip': 1.0, 'angle': math.pi / 2, 'shift_x': 0.5}, lambda x, y: (-y + 2, -x)),  # in the order of the fields
    ({'scale': 1.0, 'shift_x': 1.0}, lambda x, y: (x * 2 ** 0.2 + 4, y * 2 ** 0.2)),
    ({'angle': math.pi / 2, 'stretch': 1.5}, lambda x, y: (y * 2 ** 0.3, -x / 2 ** 0.3)),
])
def test_a_spot_goes_where_the_move_says(move, expected):
    """Angles run counter-clockwise as displayed, x to the right, y down."""
    x, y = 4.0, -2.5
    result = augment.apply(blob(x, y), moves(**move), torch.tensor([False]))
    assert centre(result) == pytest.approx(expected(x, y), abs=0.03)


@pytest.mark.parametrize('quarter', [1, 2, -1])
def test_continuous_and_exact_turns_agree(quarter):
    """A smooth image turned by resampling equals the one turned exactly, and both have the same labels."""
    image = blob(3.0, -2.0, 24, 24) - 0.5 * blob(-4.0, 1.0, 24, 24)
    step = moves(angle=quarter * math.pi / 2)
    exact = augment.apply(image, step._replace(cos=step.cos.round(), sin=step.sin.round()), torch.tensor([True]))
    smooth = augment.apply(image, step, torch.tensor([False]))
    assert torch.equal(exact, image.rot90(quarter, [2, 3]))
    torch.testing.assert_close(smooth, exact, rtol=0, atol=0.02)
    assert (exact - image).abs().max() > 0.5


def test_exact_and_continuous_turns_share_their_labels():
    """The same draw turns a noisy image by the angle that its labels state, on the scale of the continuous labels."""
    n = 200
    pipe = AugmentPipe(**NONE | {'p': 1, 'rotate_frac': 1})
    labels = pipe.draw(torch.ones(n, dtype=torch.bool), True, misc.Draws(0, 0)).labels()
    assert {tuple(row) for row in labels[:, 3:5].tolist()} == {(0, 0), (-1, 1), (-2, 0), (-1, -1)}
    share = (labels[:, 3] == 0).float().mean()
    assert abs(float(share) - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 8, 12), (2, 1, 5)])
def test_resampling_at_the_same_places_changes_nothing(shape):
    images = noise(4, *shape)
    out = augment.resample(images, torch.eye(2, 3).expand(4, 2, 3))
    torch.testing.assert_close(out, images, rtol=0, atol=1e-4)


def test_image_continues_by_reflection():
    """Moved by three quarters of its width, a ramp comes back from the edge as its mirror image."""
    ramp = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    out = augment.apply(ramp, moves(shift_x=6.0), torch.tensor([False]))
    expected = ramp[0, 0, 0][(torch.arange(32) - 24).abs()]
    inner = (torch.arange(32) - 24).abs() > 4  # the tip of the fold is rounded off by the filter
    torch.testing.assert_close(out[0, 0, 16][inner], expected[inner], rtol=0, atol=0.01)


def test_filter_is_orthogonal_with_six_vanishing_moments():
    taps = torch.tensor(augment.SYM6, dtype=torch.float64)
    shifted = [float((taps[2 * k:] * taps[:len(taps) - 2 * k]).sum()) for k in range(6)]
    assert shifted == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6)
    places = torch.arange(12, dtype=torch.float64) - 5.5
    moments = [float((signs * taps * places ** k).sum()) for k in range(7)]
    assert moments[:6] == pytest.approx([0] * 6, abs=1e-8) and abs(moments[6]) > 1
