# SPDX-License-Identifier: Apache-2.0
"""From which noise level on two sets of images are alike, by their means and covariances alone, in closed form and without training.

With noise of level sigma, images of mean m and covariance S have the covariance S + sigma^2. Between Gaussians of these moments, q of the
imperfect images and p of the clean ones,

    KL(q || p) = 1/2 [tr((S_p + sigma^2)^-1 (S_q + sigma^2 + d d')) - D + ln det(S_p + sigma^2) - ln det(S_q + sigma^2)],  d = m_q - m_p,

which for equal means and a common eigenbasis is 1/2 sum (rho - 1 - ln rho), rho = (Q + sigma^2) / (P + sigma^2). Images that carry noise
of std s already are given only sqrt(sigma^2 - s^2) of it: then S_q stands for S_q - s^2. Differences that leave mean and covariance as
they are cannot be seen."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.fft
import torch

from training.annotation import thresholds

GROUPS = 10       # of the jackknife
FULL = 512        # numbers per image up to which whole covariances are compared, given as many images in each set
FLOOR = (2 / 255) ** 2 / 12  # variance by rounding to 8 bits: differences below are not looked at
SURE = 2.0        # standard errors by which a difference must exceed the threshold somewhere to count
SURE_NOISE = 3.0  # and by which an estimate of white noise must exceed 0
LEAST_NOISE = 0.01  # white noise below is not looked for: it is little more than a grey level
LEAST = 1e-9      # nats: smaller divergences count as this, since their logarithm is taken


def _extrapolation():
    """Weights of estimates from all, all but one group, and half of the images, which cancel terms in 1 / n and 1 / n^2 (Lagrange)."""
    x = np.array([1, GROUPS / (GROUPS - 1), 2])  # of 1 / n
    return [np.prod([other / (other - one) for other in x if other != one]) for one in x]


WEIGHTS = _extrapolation()


class Basis(NamedTuple):
    """Coordinates in which moments are taken. colours: [C, C] rotation of the channels followed by a discrete cosine transform of each,
    whose coefficients count as uncorrelated; None: the pixels themselves, with their whole covariance."""

    colours: np.ndarray | None = None

    @property
    def full(self) -> bool:
        """Whether moments include covariances."""
        return self.colours is None

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Images [N,C,H,W] in network units -> coordinates, float64 [N, D]."""
        found = images.numpy().astype(np.float64)
        if not self.full:
            found = scipy.fft.dctn(np.einsum('ij,njhw->nihw', self.colours, found), axes=(2, 3), norm='ortho')
        return found.reshape(len(found), -1)


def bases(images: torch.Tensor, counts: Iterable[int]) -> list[Basis]:
    """The bases for sets of these numbers of images, cosines first; images: some clean ones, [N,C,H,W], whose colours have the axes of
    the rotation."""
    channels = images.numpy().astype(np.float64).transpose(1, 0, 2, 3).reshape(images.shape[1], -1)
    cosines = Basis(np.linalg.eigh(np.atleast_2d(np.cov(channels)))[1].T)
    size = images[0].numel()
    return [cosines, Basis()] if size <= FULL and min(counts) > size else [cosines]


class Moments:
    """Sums of coordinates and of their products over GROUPS groups of images: whole matrices for a full Basis, else squares."""

    def __init__(self, basis: Basis, size: int):
        self.basis, self.count = basis, np.zeros(GROUPS)
        self._sum, self._products = np.zeros([GROUPS, size]), np.zeros([GROUPS, size, size] if basis.full else [GROUPS, size])

    def add(self, images: torch.Tensor, first: int = 0, each: int = 1) -> None:
        """Adds images [N,C,H,W], of which `each` in a row belong together; first: number of such sets added before. Set i belongs to group
        i mod GROUPS."""
        found = self.basis(images)
        group = (np.arange(len(found)) // each + first) % GROUPS
        for k in range(GROUPS):
            part = found[group == k]
            self.count[k] += len(part)
            self._sum[k] += part.sum(0)
            self._products[k] += part.T @ part if self.basis.full else np.square(part).sum(0)

    def of(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean [D], covariance [D, D] or variances [D]) of the images of these groups; bool [GROUPS]."""
        count = self.count[groups].sum()
        mean, products = self._sum[groups].sum(0) / count, self._products[groups].sum(0) / count
        return mean, (products - (np.outer(mean, mean) if self.basis.full else np.square(mean))) * (count / (count - 1))


class Spectra(NamedTuple):
    """Two covariances in the eigenbasis of the clean one: clean: its eigenvalues P; data: the eigenvalues of the other one; power: the
    diagonal Q of the other one in that basis; shift: squares of the difference of the means. Each [D]."""

    clean: np.ndarray
    data: np.ndarray
    power: np.ndarray
    shift: np.ndarray

    def kl(self, sigma: np.ndarray, noise: float = 0.0) -> np.ndarray:
        """KL(q || p) in nats per image at each level sigma [S] >= noise, the std of white noise that the data carry; [S]."""
        squares = np.square(np.asarray(sigma, np.float64))[:, None] + FLOOR
        p = self.clean + squares
        log_ratio = np.log(p) - np.log(np.maximum(self.data - noise ** 2 + squares, FLOOR))
        return 0.5 * ((self.power - noise ** 2 + self.shift + squares) / p - 1 + log_ratio).sum(1)

    def white(self) -> float:
        """Variance of white noise that would account best for Q - P: their mean, weighted by 1 / Q^2 as for known P (the spectral
        estimate)."""
        weight = 1 / np.square(self.power.clip(min=0) + FLOOR)
        return float((weight * (self.power - self.clean)).sum() / weight.sum())


def spectra(clean: tuple[np.ndarray, np.ndarray], data: tuple[np.ndarray, np.ndarray]) -> Spectra:
    """The Spectra of (mean, covariance or variances) of the clean images and of the others."""
    (mean_p, p), (mean_q, q) = clean, data
    shift = mean_q - mean_p
    if p.ndim == 1:
        return Spectra(p, q, q, np.square(shift))
    values, vectors = np.linalg.eigh(p)
    power = np.einsum('ij,ij->j', vectors, q @ vectors)
    return Spectra(values.clip(min=0), np.linalg.eigvalsh(q).clip(min=0), power, np.square(vectors.T @ shift))


def _parts():
    """Groups bool [GROUPS] to estimate from: all; all but one, for each; halves."""
    place = np.arange(GROUPS)
    halves = [place % 2 == 0, place % 2 == 1, place < GROUPS // 2, place >= GROUPS // 2]
    return [place >= 0], [place != k for k in place], halves


class Comparison:
    """Two sets of images compared at all levels. clean, data: their Moments, in one Basis.

    An estimate from n images is too large, f + a / n + b / n^2 on average, since the two covariances also differ by chance. Estimates from
    all images, from all but a group, and from half of them give f (the jackknife of second order; Quenouille 1956, Schucany et al. 1971).
    The standard error is that of the jackknife, and how much the second order changes is added to it."""

    def __init__(self, clean: Moments, data: Moments):
        self._spectra = [[spectra(clean.of(groups), data.of(groups)) for groups in kind] for kind in _parts()]

    def kl(self, sigma: np.ndarray, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(KL(q || p) in nats per image, its standard error) at levels sigma [S]; [S] each."""
        return self._corrected(lambda found: found.kl(sigma, noise))

    def white(self) -> tuple[float, float]:
        """(variance of the white noise that accounts best for the difference, its standard error)."""
        found, error = self._corrected(Spectra.white)
        return float(found), float(error)

    def _corrected(self, estimate):
        whole, parts, halves = (np.stack([estimate(one) for one in kind]) for kind in self._spectra)
        means = [whole[0], parts.mean(0), halves.mean(0)]
        second = sum(weight * mean for weight, mean in zip(WEIGHTS, means))
        first = GROUPS * means[0] - (GROUPS - 1) * means[1]
        error = np.sqrt((GROUPS - 1) * np.square(parts - means[1]).mean(0))
        return second, np.hypot(error, second - first)


class Curve(NamedTuple):
    """Two sets compared over levels [L], ascending. kl: nats per image, non-increasing; error: its standard errors; noise: std of the white
    noise that the data carry; limit: the level from which they count as alike: 0 at all levels, inf at none."""

    levels: np.ndarray
    kl: np.ndarray
    error: np.ndarray
    noise: float
    limit: float

    @property
    def probability(self) -> np.ndarray:
        """Mean P(clean) of the imperfect images, [L]."""
        return thresholds.mean_probability(self.kl)


def curve(comparisons: Sequence[Comparison], levels: np.ndarray, threshold: float, noise: float = 0.0) -> Curve:
    """The Curve of the Comparison with the highest limit; threshold: of the mean P(clean).

    A Comparison whose difference is nowhere sure to exceed the threshold has the limit 0."""
    most = thresholds.kl_of_threshold(threshold)
    found = []
    for compared in comparisons:
        raw, error = compared.kl(levels, noise)
        kl = np.maximum(-thresholds.isotonic(-raw[None])[0], LEAST)
        limit = float(thresholds.crossing(levels, -np.log(kl)[None], -math.log(most))[0])
        sure = (raw - SURE * error > most).any()
        found.append(Curve(levels, kl, error, noise, limit if sure else 0.0))
    return max(found, key=lambda one: one.limit)


def only_noise(comparisons: Sequence[Comparison], levels: np.ndarray, threshold: float) -> Curve | None:
    """The Curve with the data's white noise counted, if that noise is all that tells them from clean images; otherwise None."""
    found = [compared.white() for compared in comparisons]
    if any(variance <= max(SURE_NOISE * error, LEAST_NOISE ** 2) for variance, error in found):
        return None
    noise = math.sqrt(min(found, key=lambda one: one[1])[0])
    above = levels[levels >= noise]
    counted = curve(comparisons, above, threshold, noise) if len(above) else None
    return counted if counted and not counted.limit else None
