# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py --sigmas=auto: the noise level of a source, measured on its images as they are, before anything is done to them."""

import sys
from collections.abc import Sequence

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE, LOSSY
from training.data import tables
from training.data.convert.annotations import PROPOSE_CHANNELS
from training.data.dataset import UNITS_8BIT
from training.estimation import clipping, single
from training.estimation.estimate import Estimate
from training.estimation.pooled import PatchCovariances

SAMPLE = 1000    # images that are measured
SIDE = 128       # pixels: of larger images the middle is measured
LESS = 6         # standard errors below the common level, from which on an image is less noisy


def measure_source(source, indices: Sequence[int], options: dict) -> list[str]:
    """Sets source.sigmas, one level for all images, or leaves it None where they read as clean ones do; returns a line to print. Raises
    UserError where the images cannot be measured, or would not keep white noise."""
    if source.sigmas is not None:
        raise UserError('--sigmas=auto: the source has levels, "sigmas"; leave the option out to keep them')
    told = options['units'] or source.units
    if told == PROPOSE_CHANNELS or told and tables.common_scale(told) is None:
        raise UserError('--sigmas=auto: needs one scale for all channels; give --units=OFFSET,SCALE, or measure the set once it is '
                        'converted: dataset_tool.py noise')
    images = sample(source, indices[::-(-len(indices) // SAMPLE)])
    units = UNITS_8BIT if images.dtype == np.uint8 else {'offset': float(images.mean()), 'scale': 2 * float(images.std()) or 1.0}
    network = ((images - np.float32(units['offset'])) / np.float32(units['scale'])).astype(np.float32)
    lossy = sum(source.names[index].lower().endswith(LOSSY) for index in indices)
    if lossy:
        print(f'Warning: --sigmas=auto: {lossy} images are JPEG or WebP files, whose compression changes noise; measure images before any '
              'resize or JPEG, and store noisy ones without loss', file=sys.stderr)
    try:
        covariances = PatchCovariances(network.shape[1:], len(network))
        covariances.add(network)
        found = covariances.estimate()
    except ValueError as err:
        raise UserError(f'--sigmas=auto: {err}; give the level as a number or a file') from None
    if found.coloured:
        raise UserError('--sigmas=auto: the noise of the images is not white, as after a resize or JPEG; measure images before either, or '
                        'give the level as a number or a file (dataset_tool.py noise shows the spectrum of a set)')
    if found.clean:
        return [f'--sigmas=auto: the images read {found.sigma:.3g} of [-1, 1], as clean ones do (floor {found.floor:.3g}): no sigmas']
    changed = next((option for option in ('resolution', 'transform') if options[option]), None)
    if changed:
        raise UserError(f'--{changed} would make the noise of these images, of the level {found.sigma:.3g}, correlated, and its level '
                        'another one; measure and keep them as they are, or apply it before the noise is added')
    check_alike(network, found)
    scale = 1.0 if images.dtype == np.uint8 else units['scale']
    source.sigmas = [found.sigma * scale] * len(source.names)
    return [f'--sigmas=auto: {found.sigma * scale:.4g} +- {found.uncertainty * scale:.2g} from {found.images} images'
            + (f', clipping corrected by {found.correction - 1:.1%}' if found.correction > 1.001 else '')]


def sample(source, chosen: Sequence[int]) -> np.ndarray:
    """The middle of chosen images, [n,C,H,W] uint8 or float32: of the size of the smallest, with the channels of most. Raises UserError."""
    found = []
    for index in chosen:
        try:
            found.append(source.read(index))
        except DAMAGE:
            continue  # reported when it is converted
    if not found:
        raise UserError('--sigmas=auto: none of the images that were tried can be read')
    kinds = [(image.shape[0], image.dtype == np.uint8) for image in found]
    usual = max(set(kinds), key=kinds.count)
    found = [image for image, kind in zip(found, kinds) if kind == usual]
    height, width = (min(SIDE, *(image.shape[axis] for image in found), SIDE) for axis in (1, 2))
    middle = lambda image: image[:, (image.shape[1] - height) // 2:][:, :height, (image.shape[2] - width) // 2:][:, :, :width]
    return np.stack([middle(image) if usual[1] else middle(image).astype(np.float32) for image in found])


def check_alike(images: np.ndarray, found: Estimate) -> None:
    """Warns where some images are less noisy than the common level."""
    readings, _ = single.immerkaer(images)
    if found.clipped > clipping.SHARE:
        readings = clipping.corrected(readings, clipping.histogram(images))
    less = int((readings < found.sigma * (1 - min(0.5, LESS * float(single.errors(1.0, images.shape[1:], single.DEFAULT))))).sum())
    if less > max(2, 0.01 * len(images)):
        print(f'Warning: --sigmas=auto: {less} of {len(images)} images are less noisy than their common level, {found.sigma:.3g}; convert '
              'without it, and measure them in groups: dataset_tool.py noise --group=class, image or FILE', file=sys.stderr)
