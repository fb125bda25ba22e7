# SPDX-License-Identifier: Apache-2.0
"""A quick check, at the start of a run, of the noise levels that its images are said to have."""

import numpy as np

from training.data.dataset import ImageDataset
from training.estimation.pooled import FLOOR, PatchCovariances

MOST, SIDE = 256, 32  # images; pixels: of larger ones the middle, which has the same noise
FEWEST = 64           # noisy images
APART = 0.1           # relative difference that is told of
LEAST = 4 * FLOOR     # lower levels are not checked: texture adds to what is read
CLIPPED = 0.25        # images of several levels are scaled to one, after which clipping is not corrected: higher levels are left out


def warning(dataset: ImageDataset, seed: int = 0) -> str | None:
    """A line about native levels that differ from what the images show by more than APART, or None.

    Images of several levels are divided by theirs first, so that all of them have noise of one level, the median. Levels from --sigma are
    right by construction, and not checked."""
    noisy = np.flatnonzero((dataset.native_sigma >= LEAST) & ~dataset.flip)
    one_level = len(noisy) and np.ptp(dataset.native_sigma[noisy]) < 1e-3 * dataset.native_sigma[noisy[0]]
    if not one_level and not dataset.is_float:
        noisy = noisy[dataset.native_sigma[noisy] <= CLIPPED]
    if len(noisy) < FEWEST or dataset.latents is not None:
        return None
    generator = np.random.Generator(np.random.Philox(key=seed))
    chosen = np.sort(generator.permutation(noisy)[:MOST])
    stated = float(np.median(dataset.native_sigma[chosen]))
    images = np.stack([_middle(dataset.decode(index)) for index in dataset.raw_idx[chosen]])
    images = dataset.to_network(images).numpy()
    if not one_level:
        images *= (stated / dataset.native_sigma[chosen]).astype(np.float32)[:, None, None, None]
    try:
        covariances = PatchCovariances(images.shape[1:], len(images), clipped=bool(one_level))
        covariances.add(images)
        found = covariances.estimate()
    except ValueError:
        return None  # too few or too small to tell
    ratio = found.sigma / stated
    # What is not white noise only adds to the level: then it may be lower than what is read, and not higher.
    if abs(ratio - 1) <= APART + 3 * found.uncertainty / stated or found.coloured and ratio > 1:
        return None
    shown = 'clean' if found.clean else f'of the level {found.sigma:.3g} (+- {found.uncertainty:.1g})'
    several = '' if one_level else ', as the median of several,'
    return (f'Warning: the noise levels of {dataset.path} may be wrong: "sigmas" states {stated:.3g}{several} and {len(chosen)} of its '
            f'noisy images look {shown}. What a wrong level does, and how to measure it: docs/noise.md, dataset_tool.py noise')


def _middle(image):
    top, left = ((side - SIDE) // 2 if side > SIDE else 0 for side in image.shape[1:])
    return image[:, top:top + SIDE, left:left + SIDE]
