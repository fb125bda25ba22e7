# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py --stabilise: which sources have counts, which of their images are noisy, and whether the counts are high enough.

Images are stored as the z of training.estimation.stabilise, whose noise has std 1: that is the level of each, or 0 for clean ones, which
are stored as the mean of z at their intensity. dataset.json's units name the transform."""

import contextlib

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from torch_utils import registry
from training.estimation.stabilise import LOW, STABILISERS, Anscombe, Generalised, Stabiliser, from_record, moments

# Files whose 8-bit values are numbers as measured, and not those of a picture, whose grey levels follow a curve.
MEASURED = ('.npy', '.npz', '.h5', '.hdf5', '.hdf', '.he5', '.tif', '.tiff', '.fits', '.fit', '.fts', '.fits.gz',
            '.fit.gz', '.fits.fz')
SIDE = 4           # pixels: means over squares of this side tell where counts are low
BINS = 16          # of means from 0 to LOW
FAINT = 0.05       # share of the squares below LOW that is worth a warning
OFF = 0.02         # so is a variance of the noise that is this far from 1
FRACTIONS = 0.01   # share of values that are no whole numbers, and of values where the root is 0, that is worth one
FIT_IMAGES = 1024  # images, at most, that gain and read noise are estimated from


def requested(options: dict) -> Stabiliser | None:
    """The transform of --stabilise, or None. Raises UserError for options that do not go with it."""
    spec = options.get('stabilise')
    if not spec:
        return None
    found = registry.build(spec, STABILISERS, '--stabilise')
    if options['sigmas']:
        raise UserError(f'--sigmas={options["sigmas"]}: --stabilise sets the levels itself, 1 in stored units; leave it out, and mark '
                        'clean images with --source=PATH:sigma=0')
    if options['channels']:
        raise UserError(f'--channels={options["channels"]}: sums of channels are no counts of one law; leave it out, or convert the counts '
                        'first')
    return found


def record_of(source, where: str) -> dict | None:
    """The record of the transform that a source's values have been through, of its units; None without one. Raises UserError."""
    told = source.units.get('stabilise') if isinstance(source.units, dict) else None
    try:
        return None if told is None else from_record(told).record()
    except ValueError as err:
        raise UserError(f'{where}: has {err}') from None


def mark(source, where: str) -> None:
    """Gives the images of a source of counts their levels: 0 for those that it says to be clean, 1 for all others. Raises UserError."""
    if source.stabilise:
        raise UserError(f'{where}: is stabilised already ({from_record(source.stabilise).words()}); leave --stabilise out')
    if any(limit is not None for limits in (source.sigma_min, source.sigma_max) for limit in limits or ()):
        raise UserError(f'{where}: has limits of levels, and with --stabilise these are in other units, of which the noise is 1; give them '
                        'with --sigma-min or --sigma-max')
    told = source.sigmas or [None] * len(source.names)
    if any(told):
        raise UserError(f'{where}: has levels above 0, and with --stabilise the noise is that of the counts; say sigma=0 for clean images, '
                        'and nothing for noisy ones')
    source.sigmas = [1.0] * len(source.names) if source.sigmas is None else [0.0] * len(source.names)
    source.units = None  # of the counts


def settle(stabiliser: Stabiliser, source, indices, paths: list[str], spec: str) -> Stabiliser:
    """The transform with its gain and read noise, estimated where they were not given; kept in source.stabilise. paths: of --source.
    Raises UserError for pictures, which have no counts."""
    refuse_pictures(source, indices, paths, f'--stabilise={spec}')
    found = stabiliser if stabiliser.is_known else fitted(source, indices, spec)
    source.stabilise = found.record()
    return found


def refuse_pictures(source, indices, paths, where):
    """Refuses 8-bit pictures. paths: of the source, or of several; where: the option in errors."""
    measured = all(path.lower().endswith(MEASURED) for path in paths)
    odd = [source.names[index] for index in indices if not (measured or source.names[index].lower().endswith(MEASURED))]
    try:
        is_8bit = bool(odd) and source.kind(indices[0]).is_8bit
    except DAMAGE:
        return  # plan() will tell
    if is_8bit:
        raise UserError(f'{where}: {odd[0]} is an 8-bit picture, whose values are no counts; give the counts themselves, as '
                        '.npy, TIFF, FITS or HDF5')


def fitted(source, indices, spec: str) -> Stabiliser:
    """Gain, read noise and offset of noisy images, from the variance of their values against the mean."""
    try:
        from training.estimation.signal_dependent import fit_poisson_gaussian
    except ImportError:
        raise UserError(f'--stabilise={spec}: give the gain and the variance of the read noise, generalised:a=..,b=..') from None
    noisy = [index for index in indices if source.sigmas[index]]
    some = noisy[::-(-len(noisy) // FIT_IMAGES)] if noisy else []
    if not some:
        raise UserError(f'--stabilise={spec}: no image is noisy, and the gain cannot be estimated; give a and b')
    try:
        fit = fit_poisson_gaussian(readable(source, some))
    except ValueError as err:
        raise UserError(f'--stabilise={spec}: the gain cannot be estimated from these images ({err}); give a and b') from None
    found = from_line(fit.a, fit.b, spec)
    print(f'Estimated from {len(some)} images: variance = {fit.a:.4g} (+- {fit.uncertainties[0]:.2g}) mean + {fit.b:.4g} '
          f'(+- {fit.uncertainties[1]:.2g}); --stabilise=generalised:a={found.a:.5g},b={found.b:.5g}'
          + (f',offset={found.offset:.5g}' if found.offset else ''))
    return found


def readable(source, indices):
    """Yields images as float64 [1,C,H,W]; damaged ones are left to the conversion."""
    for index in indices:
        with contextlib.suppress(*DAMAGE):
            yield np.float64(source.read(index))[None]


def from_line(a: float, b: float, spec: str) -> Stabiliser:
    """The transform for variances a mean + b; a negative b means an offset, at which the variance is 0. Raises UserError."""
    if not (a > 0 and np.isfinite([a, b]).all()):
        raise UserError(f'--stabilise={spec}: the noise of these images does not grow with their intensity (variance {a:.3g} mean + '
                        f'{b:.3g}); give a and b, or --sigmas for noise of one level')
    return Generalised(a, b) if b >= 0 else Generalised(a, 0.0, -b / a)


def stabilised(image: np.ndarray, sigma: float, stabiliser: Stabiliser) -> tuple[np.ndarray, str | None, np.ndarray]:
    """(float32 [C,H,W], problem or None, tally) of an image of values; sigma: 0 for a clean one.

    tally [BINS + 4] float64: squares by their mean count, those of LOW and above; values, those that are no whole numbers, and those where
    the root is 0."""
    values = np.float64(image)
    tally = np.zeros(BINS + 4)
    if isinstance(stabiliser, Anscombe) and values.min() < 0:
        return image, (f'counts below 0 (least {values.min():g}), which Poisson counts are not; give --stabilise=generalised:a=..,b=..,'
                       'offset=.. for values with an offset or read noise'), tally
    if not sigma:
        return np.float32(stabiliser.expected(values)), None, tally
    found = stabiliser.forward(values)
    counts = stabiliser.counts(values)
    height, width = (side // SIDE * SIDE for side in counts.shape[1:])
    squares = counts[:, :height, :width].reshape(len(counts), height // SIDE, SIDE, width // SIDE, SIDE).mean((2, 4))
    squares = squares if squares.size else counts.mean((1, 2))
    places = np.floor(squares.clip(0, LOW) * (BINS / LOW)).astype(int)
    tally[:BINS + 1] = np.bincount(places.ravel(), minlength=BINS + 1)
    tally[BINS + 1:] = counts.size, np.count_nonzero(values != np.rint(values)), np.count_nonzero(found == 0)
    return np.float32(found), None, tally


def warnings(stabiliser: Stabiliser, tally: np.ndarray) -> list[str]:
    """Lines about counts that are too low, and values that are no counts. tally: the sum over all images."""
    squares, (size, fractions, below) = tally[:BINS + 1], tally[BINS + 1:]
    found, low = [], squares[:BINS].sum() / max(squares.sum(), 1)
    if low > FAINT:
        places = (np.arange(BINS) + 0.5) * (LOW / BINS)
        middle = places[np.searchsorted(np.cumsum(squares[:BINS]), squares[:BINS].sum() / 2)]
        means = np.unique([0.5, 1, 2, 3, middle])
        variances = moments(stabiliser, means)[1]
        if np.abs(variances - 1).max() > OFF:
            table = ', '.join(f'{variance:.2f} at {mean:.2g}' for mean, variance in zip(means, variances))
            found.append(f'Warning: --stabilise: the mean count is below {LOW:g} in {low:.0%} of the area ({SIDE}x{SIDE} pixels at a '
                         f'time, half of them below {middle:.2g}), where the variance of the noise is not 1 but {table}; such regions come '
                         'back too smooth where it is less, and with noise left where it is more; add up pixels or exposures')
    if isinstance(stabiliser, Anscombe) and fractions > FRACTIONS * size:
        found.append(f'Warning: --stabilise=anscombe: {fractions / size:.0%} of the values are no whole numbers, and counts are; where '
                     'they were multiplied by a gain, give --stabilise=generalised:a=GAIN')
    if below > FRACTIONS * size:
        found.append(f'Warning: --stabilise: {below / size:.1%} of the values are so far below the offset that they are set to it; the '
                     'offset or the read noise is not that of these images')
    return found
