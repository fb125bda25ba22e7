# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals of distances between sets of features, from influence functions and U-statistics, without resampling."""

import dataclasses
import math

import numpy as np
import scipy.special
import torch

from metrics.frechet import half_factor

LEVEL = 0.95
Z = float(scipy.special.ndtri((1 + LEVEL) / 2))
ROWS = 4096           # rows of features converted to float64 at a time
KERNEL_ROWS = 4096    # images of a set from which KID's spread is estimated: matrices of 128 MB
FEWEST = 250          # images below which the distribution of a distance is too far from normal
FEWEST_PER_DIM = 1    # images per feature for an interval of the distance itself
EXTRAPOLATED_PER_DIM = 8  # the same for the extrapolation to infinitely many images: below, E FD(N) is not yet linear in 1/N
FEWEST_SUBSETS = 20   # subsets of KID for an estimate of the spread between them
FEWEST_FEATURES = 32  # features for KID: with fewer its distribution is too far from the one assumed (docs/evaluation.md)
METHODS = {'fid': 'influence function, corrected to second order, on a log scale; over generated images, reference fixed',
           'fid_inf': 'influence function; over generated images, reference fixed',
           'kid': 'variance of the U-statistic and of the subsets, on a log scale; over generated and reference images'}


@dataclasses.dataclass(frozen=True)
class Spread:
    """The spread of the Fréchet distance of a set of images to a fixed Gaussian, estimated from the images.

    halves: mean distance of its two halves. first: the variance of the distance by its influence function. variance: the same,
    corrected for the second order."""

    halves: float
    first: float
    variance: float


def frechet_spread(features: torch.Tensor | np.ndarray, mu2: torch.Tensor | np.ndarray, cov2: torch.Tensor | np.ndarray, seed: int = 0,
                   device: torch.device | str | None = None) -> Spread:
    """The Spread of the Fréchet distance of features [N,D] to the Gaussian mu2 [D], cov2 [D,D], under new draws of the features.

    The influence function estimates V = a + 2 b where the variance is a + b: a of the first order, falling as 1/N, and b of the
    second, as 1/N^2, which is all there is where both laws are equal (Efron and Stein 1981). Of halves it estimates 2 a + 8 b, so that
    (3 V - V_half / 2) / 2 = a + b; it lies between V / 2 and V. Halves are drawn with `seed`. Raises ValueError for fewer than four."""
    features = torch.as_tensor(features)
    if len(features) < 4:
        raise ValueError(f'{len(features)} images cannot be split into halves with a covariance; at least 4 are needed')
    half2 = torch.as_tensor(half_factor(np.asarray(cov2, np.float64)), device=device)
    mu2 = torch.as_tensor(mu2, dtype=torch.float64, device=device)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(features)))
    parts = [frechet_influence(features[order[i::2]], mu2, half2) for i in range(2)]
    variance = lambda influence: float(influence.var()) / len(influence)
    first = variance(frechet_influence(features, mu2, half2)[1])
    corrected = 1.5 * first - 0.25 * sum(variance(influence) for _, influence in parts) / 2
    return Spread(sum(distance for distance, _ in parts) / 2, first, min(max(corrected, first / 2), first))


def frechet_influence(features: torch.Tensor, mu2: torch.Tensor, half2: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(Fréchet distance, its influence function at each image [N]) of features [N,D] against the Gaussian of mean mu2 [D] and
    covariance half2 half2^T, half2 [D,r] float64, on whose device it is computed.

    2 (mu1 - mu2).x + x^T (I - T) x with x centred, T = A2 G^(-1/2) A2^T, G = A2^T cov1 A2, A2 = half2: the map that carries
    N(mu1, cov1) to N(mu2, cov2). Where cov1 is singular G^(-1/2) is the pseudo-inverse: the derivative in the images' weights."""
    device = half2.device
    mu1 = features.mean(0, dtype=torch.float64).to(device)
    centred = lambda rows: rows.to(device, torch.float64) - mu1
    gram = sum(x.T @ x for x in (centred(rows) @ half2 for rows in features.split(ROWS))) / (len(features) - 1)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > len(values) * torch.finfo(torch.float64).eps * 100 * values[-1].clamp(min=0)
    roots, project = values[kept].sqrt(), half2 @ vectors[:, kept]
    found, squares = [], 0.0
    for rows in features.split(ROWS):
        x = centred(rows)
        lengths = x.square().sum(1)
        squares += float(lengths.sum())
        found.append((2 * x @ (mu1 - mu2) + lengths - ((x @ project).square() / roots).sum(1)).cpu())
    distance = (mu1 - mu2).square().sum() + squares / (len(features) - 1) + half2.square().sum() - 2 * roots.sum()
    return float(distance), torch.cat(found)


def frechet_bounds(distance: float, spread: Spread) -> tuple[float, float]:
    """(low, high) of the expected distance of as many images of the same generator to this reference: those of its logarithm."""
    return _log_bounds(distance, 0.0, spread.variance)


def extrapolated(distance: float, spread: Spread) -> float:
    """The distance of infinitely many images (Chong and Forsyth 2020): the line through those of N images and of N / 2 in 1/N, at 0."""
    return 2 * distance - spread.halves


def extrapolated_bounds(distance: float, spread: Spread) -> tuple[float, float]:
    """(low, high) of the distance of infinitely many images to this reference.

    Twice the distance less that of the halves has the variance a + 2 b of frechet_spread: its first order is the distance's own, since
    the halves hold all images, and its second one twice as large. That is what the influence function says uncorrected."""
    middle, reach = extrapolated(distance, spread), Z * math.sqrt(spread.first)
    return middle - reach, middle + reach


def frechet_interval(distance: float, spread: Spread, count: int, dim: int) -> dict:
    """The interval of frechet_bounds as written to JSON; count, dim: N and D of the features."""
    return _interval('fid', *frechet_bounds(distance, spread), _too_few(count, max(FEWEST, FEWEST_PER_DIM * dim), dim))


def extrapolated_interval(distance: float, spread: Spread, count: int, dim: int) -> dict:
    """The interval of extrapolated_bounds as written to JSON."""
    return _interval('fid_inf', *extrapolated_bounds(distance, spread), _too_few(count, max(FEWEST, EXTRAPOLATED_PER_DIM * dim), dim))


def _too_few(count, least, dim):
    """The reason why there is no interval; None if there is one."""
    return f'none: {count} images of {dim} features, {least} images are needed' if count < least else None


def kernel_bounds(value: float, extra: float, x: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray,
                  device: torch.device | str | None = None) -> tuple[float, float]:
    """(low, high) of the squared MMD between the laws that x [N,D] and y [M,D] are drawn from, around its estimate `value`.

    extra: variance of the estimate besides that of the two sets. With the bias c of the V-statistic added the estimate is
    positive, and the bounds are those of its logarithm; c is subtracted again."""
    variance, bias = mmd_variance(x, y, device)
    return _log_bounds(value, bias, variance + extra)


def kernel_interval(value: float, deviation: float, subsets: int, subset_size: int, x: torch.Tensor | np.ndarray,
                    y: torch.Tensor | np.ndarray, device: torch.device | str | None = None) -> dict:
    """The interval of kernel_bounds around KID as written to JSON; deviation: standard deviation over its subsets."""
    whole = len(x) == len(y) == subset_size  # then all subsets are the same
    reason = _too_few(min(len(x), len(y)), FEWEST, x.shape[1])
    if x.shape[1] < FEWEST_FEATURES:
        reason = f'none: {x.shape[1]} features, {FEWEST_FEATURES} are needed'
    elif subsets < FEWEST_SUBSETS and not whole:
        reason = f'none: {subsets} subsets, {FEWEST_SUBSETS} are needed'
    bounds = (None, None) if reason else kernel_bounds(value, 0.0 if whole else deviation ** 2 / max(subsets - 1, 1), x, y, device)
    return _interval('kid', *bounds, reason)


def mmd_variance(x: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray,
                 device: torch.device | str | None = None) -> tuple[float, float]:
    """(variance of the unbiased squared MMD of x [N,D] and y [M,D] under new draws of both, bias c of the V-statistic).

    A first-order estimate that is negative counts half, which keeps the sum positive, like the bound in frechet_spread."""
    first, second, bias = mmd_orders(x, y, device)
    return max(second + max(first, first / 2), 0.0), bias


def mmd_orders(x: torch.Tensor | np.ndarray, y: torch.Tensor | np.ndarray,
               device: torch.device | str | None = None) -> tuple[float, float, float]:
    """(first order of that variance, second order, bias c of the V-statistic), each estimated without bias.

    With the kernel's centred parts k~, a(x) = E k(x,x') - E k(x,y) and b(y) alike: 4/N var a + 4/M var b, which may come out negative;
    2/(N(N-1)) var k~_xx + 2/(M(M-1)) var k~_yy + 4/(NM) var k~_xy. From at most KERNEL_ROWS images of each side."""
    counts = len(x), len(y)
    x, y = (_some(side).to(device or 'cpu', torch.float64) for side in (x, y))
    rows_x, noise_x, diagonal_x = _within(x)
    rows_y, noise_y, diagonal_y = _within(y)
    across = _cubic(x, y)
    centre = across.mean()
    over_x, over_y = across.mean(1) - centre, across.mean(0) - centre
    (n, m), (count_x, count_y) = across.shape, counts
    noise_xy = float((across - centre - over_x[:, None] - over_y).square().sum()) / ((n - 1) * (m - 1))
    first_x = float((rows_x - over_x).var()) - noise_x / (n - 2) - noise_xy / m  # minus what the noise adds to the variance of the rows
    first_y = float((rows_y - over_y).var()) - noise_y / (m - 2) - noise_xy / n
    first = 4 / count_x * first_x + 4 / count_y * first_y
    second = 2 / (count_x * (count_x - 1)) * noise_x + 2 / (count_y * (count_y - 1)) * noise_y + 4 / (count_x * count_y) * noise_xy
    return first, second, diagonal_x / count_x + diagonal_y / count_y


def _some(side):
    """At most KERNEL_ROWS rows, evenly spaced, so that they cover all classes of images sorted by class."""
    side = torch.as_tensor(side)
    if len(side) <= KERNEL_ROWS:
        return side
    return side[torch.from_numpy(np.random.RandomState(0).permutation(len(side))[:KERNEL_ROWS])]


def _cubic(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def _within(x):
    """(row effects [n], residual variance, mean of the diagonal minus that of the rest) of the kernel of x [n,D] with itself:
    the least squares k(i,j) = mu + r_i + r_j over pairs of different images."""
    kernel, n = _cubic(x, x), len(x)
    diagonal = float(kernel.diagonal().mean())
    kernel.fill_diagonal_(0)
    means = kernel.sum(1) / (n - 1)
    centre = means.mean()
    effects = (n - 1) / (n - 2) * (means - centre)
    rest = kernel.sub_(centre).sub_(effects[:, None]).sub_(effects).fill_diagonal_(0)
    return effects, float(rest.square().sum()) / (n * (n - 3)), diagonal - float(centre)


def _log_bounds(value, bias, variance):
    """(low, high) of value, from the logarithm of value + bias; a symmetric pair if that is not positive."""
    size, reach = value + bias, Z * math.sqrt(variance)
    if size <= 0:
        return value - reach, value + reach
    stretch = math.exp(min(reach / size, 100))
    return size / stretch - bias, size * stretch - bias


def _interval(method, low, high, reason):
    """The interval as written to JSON."""
    if reason:
        return {'low': None, 'high': None, 'level': LEVEL, 'method': reason}
    return {'low': low, 'high': high, 'level': LEVEL, 'method': METHODS[method]}
