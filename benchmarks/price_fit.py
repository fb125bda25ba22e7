# SPDX-License-Identifier: Apache-2.0
"""The price of a clean image: fits of distance against the number of images, with bootstrap intervals, and a check of their coverage.

python benchmarks/price_fit.py

    distance = a + b n_eff^-c,    n_eff = n_clean + n_noisy / kappa(sigma)

kappa(sigma) is the price: so many images noisy at sigma replace one clean image. a, b and c are fitted to models trained on clean images
alone, and 1 / kappa to mixtures; all fits are least squares of the logarithm of the distance."""

import dataclasses
import sys
from pathlib import Path

import click
import numpy as np
import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch_utils.command_line import Command, version_option  # noqa: E402 (the folder above had to be found first)

POWERS = np.geomspace(0.1, 4.0, 80)                             # values of c that are tried
MOST = 4.0                                                      # the largest value of 1 / kappa that is tried
VALUES = np.concatenate([[0.0], np.geomspace(1e-3, MOST, 60)])  # values that are tried first,
FINER = np.geomspace(0.85, 1 / 0.85, 21)                        # and factors of the best of them: steps of 1.6 %
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Curve:
    """distance(n) = a + b n^-c for one fit (floats), or for many (arrays [B])."""

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray

    def __call__(self, n: np.ndarray) -> np.ndarray:
        """Distance of a model trained on n clean images; n: any shape for one fit, [B,...] for many."""
        n = np.asarray(n, np.float64)
        a, b, c = (np.reshape(value, (-1,) + (1,) * (n.ndim - 1)) if np.ndim(value) else value for value in (self.a, self.b, self.c))
        return a + b * n ** -c

    def slope(self, n: np.ndarray) -> np.ndarray:
        """d distance / dn, the change of the distance by one more clean image; by one more noisy image it is 1 / kappa of this."""
        n = np.asarray(n, np.float64)
        return -self.b * self.c * n ** (-self.c - 1)

    def count(self, distance: np.ndarray) -> np.ndarray:
        """The number of clean images with this distance; infinite at a and below."""
        excess = np.maximum(np.asarray(distance, np.float64) - self.a, 0)
        with np.errstate(divide='ignore'):
            return (excess / self.b) ** (-1 / self.c)


def fit_curve(counts: np.ndarray, distances: np.ndarray) -> Curve:
    """The Curve through distances [N] or [B,N] of models trained on `counts` [N] clean images; a and b are not negative.

    For every c of POWERS a and b solve a weighted linear problem; two rounds with weights 1 / fit^2 approximate the least squares of the
    logarithm. Needs three different counts (ValueError)."""
    counts, values = np.asarray(counts, np.float64), np.atleast_2d(np.asarray(distances, np.float64))
    if len(np.unique(counts)) < 3:
        raise ValueError(f'{len(np.unique(counts))} different counts of clean images; a curve needs at least 3')
    x = (counts / counts.max()) ** -POWERS[:, None]  # [P,N]
    target, fit = values[:, None, :], values[:, None, :]
    for _ in range(3):
        a, b = _line(x, target, fit ** -2.0)
        fit = np.maximum(a[..., None] + b[..., None] * x, 1e-300)  # [B,P,N]
    best = np.square(np.log(fit) - np.log(target)).sum(2).argmin(1)
    rows = np.arange(len(values))
    c = POWERS[best]
    found = Curve(a[rows, best], b[rows, best] * counts.max() ** c, c)
    return found if np.ndim(distances) == 2 else Curve(*(float(value[0]) for value in (found.a, found.b, found.c)))


def _line(x, y, weights):
    """(a, b) [B,P] >= 0 that minimise the sum of weights (y - a - b x)^2; x: [P,N], y: [B,1,N], weights: [B,1 or P,N]."""
    s, sx, sy, sxx, sxy = ((weights * value).sum(2) for value in (np.ones_like(x), x, y, x * x, x * y))
    b = (s * sxy - sx * sy) / np.maximum(s * sxx - sx * sx, 1e-300)
    a = (sy - b * sx) / s
    return np.where(b < 0, sy / s, np.where(a < 0, 0.0, a)), np.where(b < 0, 0.0, np.where(a < 0, sxy / sxx, b))


def fit_value(curve: Curve, clean: np.ndarray, noisy: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """1 / kappa of mixtures of clean [M] and noisy [M] images at one sigma with these distances [M], or [B,M] with a curve for each row.

    The value from 0 to MOST with the least squares of the logarithm, on a grid: 0 where noisy images do not help."""
    clean, noisy, target = (np.asarray(each, np.float64) for each in (clean, noisy, distances))
    many = Curve(*(np.atleast_1d(each) for each in (curve.a, curve.b, curve.c)))
    best = np.zeros([len(many.a), 1])
    for values in (VALUES, FINER):
        tried = np.broadcast_to(values, [len(best), len(values)]) if values is VALUES else np.minimum(best * values, MOST)  # [B,V]
        distance = many(clean + tried[..., None] * noisy)
        error = np.square(np.log(distance) - np.log(np.atleast_2d(target))[:, None, :]).sum(2)
        best = np.take_along_axis(tried, error.argmin(1)[:, None], 1)
    return best[:, 0] if target.ndim == 2 else float(best[0, 0])


@dataclasses.dataclass(frozen=True)
class Prices:
    """A Curve, kappa {sigma: (value, low, high)}, infinite where noisy images do not help, and the draws that the intervals are of.

    curves: of the draws. values: {sigma: 1 / kappa [B]} of the draws. range: fewest and most clean images of the curve."""

    curve: Curve
    kappa: dict[float, tuple[float, float, float]]
    curves: Curve
    values: dict[float, np.ndarray]
    range: tuple[float, float]


def prices(counts: np.ndarray, distances: np.ndarray, mixtures: dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]],
           rng: np.random.Generator, draws: int = 1000) -> Prices:
    """The price at each sigma with 95 % intervals.

    counts, distances: [N] of models trained on clean images alone, all seeds. mixtures: {sigma: (clean [M], noisy [M], distances [M])}.

    The intervals are percentiles of a bootstrap of residuals: with three seeds there are only ten different resamples of seeds. Residuals
    of the curve keep their place and change their signs (a wild bootstrap), since models trained on few images scatter more; those
    of the mixtures at all sigma are pooled and drawn anew. Both are enlarged for the fitted parameters and by the ratio of Student's
    quantile to the normal one."""
    distances = np.asarray(distances, np.float64)
    curve = fit_curve(counts, distances)
    value = {sigma: fit_value(curve, *each) for sigma, each in mixtures.items()}
    fitted = {sigma: curve(clean + value[sigma] * noisy) for sigma, (clean, noisy, _) in mixtures.items()}
    own = curve(counts)
    residuals = enlarged(np.log(distances / own), 3)
    pool = enlarged(np.concatenate([np.log(each[2] / fitted[sigma]) for sigma, each in mixtures.items()]), len(mixtures))
    curves = fit_curve(counts, own * np.exp(residuals * rng.choice([-1.0, 1.0], (draws, len(residuals)))))
    values = {sigma: fit_value(curves, each[0], each[1], fitted[sigma] * np.exp(rng.choice(pool, (draws, len(each[2])))))
              for sigma, each in mixtures.items()}
    kappa = {sigma: (inverse(value[sigma]), *interval(values[sigma])) for sigma in mixtures}
    return Prices(curve, kappa, curves, values, (float(np.min(counts)), float(np.max(counts))))


def enlarged(residuals: np.ndarray, parameters: int) -> np.ndarray:
    """Residuals [N] of a fit of some parameters, with mean 0, enlarged for the lost degrees of freedom and for few of them."""
    free = max(len(residuals) - parameters, 1)
    student = scipy.stats.t.ppf((1 + LEVEL) / 2, free) / scipy.stats.norm.ppf((1 + LEVEL) / 2)
    return (residuals - residuals.mean()) * np.sqrt(len(residuals) / free) * student


def interval(values: np.ndarray) -> tuple[float, float]:
    """(low, high) of kappa from draws of 1 / kappa."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method='nearest')
    return inverse(high), inverse(low)


def inverse(value: float) -> float:
    """1 / value; infinite for 0."""
    return 1 / float(value) if value > 0 else float('inf')


# ---- Gaussian data, whose price is known


VARIANCE = 0.25


def gaussian_price(sigma: float, variance: float = VARIANCE) -> float:
    """The price of a clean image for the variance v of Gaussian data with known mean: (1 + sigma^2 / v)^2.

    A clean image of N(0, v) carries the Fisher information 1 / (2 v^2) about v, a noisy one, of N(0, v + sigma^2), carries
    1 / (2 (v + sigma^2)^2). The maximum-likelihood estimate has the variance of the inverse sum, and the Fréchet distance of
    N(0, v_hat) to N(0, v) is (sqrt(v_hat) - sqrt(v))^2 = (v_hat - v)^2 / (4 v) + ..., so that it falls as 1 / n_eff."""
    return (1 + sigma ** 2 / variance) ** 2


def likeliest_variance(clean: np.ndarray, noisy: np.ndarray, sigma: float, rounds: int = 30) -> np.ndarray:
    """The maximum-likelihood variance of each coordinate [D], by Fisher scoring, from clean [n,D] and noisy [m,D] values of mean 0."""
    squares = [np.square(clean).sum(0), np.square(noisy).sum(0)]
    v = np.full(clean.shape[1], VARIANCE)
    for _ in range(rounds):
        weights = [v ** -2, (v + sigma ** 2) ** -2]
        total = weights[0] * squares[0] + weights[1] * (squares[1] - len(noisy) * sigma ** 2)
        v = np.maximum(total / (len(clean) * weights[0] + len(noisy) * weights[1]), 1e-6)
    return v


def simulated(rng: np.random.Generator, images: int = 900, dim: int = 100, seeds: int = 3, sigmas=(0.1, 0.2, 0.4, 0.8),
              alone=(0.05, 0.1, 0.2, 0.5, 1.0), mixed=(0.1, 0.3), floor: float = 0.0) -> tuple:
    """(counts, distances, mixtures) as prices() takes them, of Gaussian data: each seed has its own images, noise and choice of clean ones,
    and the clean ones of a smaller share are among those of a larger one, as in benchmarks/price.py. floor: added to every distance."""
    counts, distances, mixtures = [], [], {sigma: ([], [], []) for sigma in sigmas}
    distance = lambda v: float(np.square(np.sqrt(v) - VARIANCE ** 0.5).sum()) + floor
    for _ in range(seeds):
        data = rng.normal(0, VARIANCE ** 0.5, (images, dim))
        noise = rng.normal(size=(images, dim))
        for share in alone:
            count = round(share * images)
            counts.append(count)
            distances.append(distance(np.square(data[:count]).mean(0)))
        for sigma in sigmas:
            for share in mixed:
                count = round(share * images)
                found = distance(likeliest_variance(data[:count], data[count:] + sigma * noise[count:], sigma))
                for column, entry in zip(mixtures[sigma], (count, images - count, found)):
                    column.append(entry)
    return np.array(counts), np.array(distances), {sigma: tuple(map(np.array, each)) for sigma, each in mixtures.items()}


def coverage(repetitions: int, seed: int = 0, draws: int = 400, **options) -> dict[float, tuple[float, float, float]]:
    """{sigma: (share of the intervals that hold the known price, median estimate, median ratio of the interval's ends)}."""
    found = {}
    for k in range(repetitions):
        rng = np.random.default_rng([seed, k])
        for sigma, (value, low, high) in prices(*simulated(rng, **options), rng, draws).kappa.items():
            found.setdefault(sigma, []).append((low <= gaussian_price(sigma) <= high, value, high / low))
    return {sigma: (float(np.mean([row[0] for row in rows])), *(float(np.median([row[k] for row in rows])) for k in (1, 2)))
            for sigma, rows in found.items()}


@click.command(cls=Command)
@click.option('--repetitions', default=300, show_default=True, help='Simulated experiments of a row')
@version_option
def main(repetitions):
    """Print how often the intervals of simulated Gaussian data hold its known price."""
    heads = ['seeds', 'shares in mixtures', 'floor', 'sigma', 'known price', 'median estimate', 'covered, of 95 %', 'high / low']
    print(f'| {" | ".join(heads)} |\n' + '| --- ' * len(heads) + '|')
    for options in [{}, {'mixed': (0.1,)}, {'floor': 0.1}, {'seeds': 10}]:
        for sigma, (covered, value, width) in coverage(repetitions, **options).items():
            shares = ', '.join(f'{share:g}' for share in options.get('mixed', (0.1, 0.3)))
            print(f'| {options.get("seeds", 3)} | {shares} | {options.get("floor", 0):g} | {sigma:g} | {gaussian_price(sigma):.3f} | '
                  f'{value:.3f} | {100 * covered:.1f} % | {width:.2f} |', flush=True)


if __name__ == '__main__':
    main()
