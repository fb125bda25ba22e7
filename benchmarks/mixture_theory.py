# SPDX-License-Identifier: Apache-2.0
"""Gaussian mixtures seen through noise of known levels: simulated rates, price and mixtures of clean and noisy samples.

python benchmarks/mixture_theory.py rates --json=rates.json --png=docs/figures/theory_rates.png
python benchmarks/mixture_theory.py price --json=price.json --png=docs/figures/theory_price.png
python benchmarks/mixture_theory.py mixed --json=mixed.json --png=docs/figures/theory_mixed.png

Samples are X_i = Z_i + s_i N(0, I_d), Z_i from k atoms (arXiv 2411.02780, section 4; docs/theory.md). A group is the samples of one level.
They are drawn as exact counts in bins of s/16 of a line, and as exact scatter matrices, so that their number costs nothing."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from scipy.optimize import linprog, minimize, nnls
from scipy.special import logsumexp, ndtr
from scipy.stats import wasserstein_distance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.figures import figure  # noqa: E402 (the folder above had to be found first)
from dnnlib.files import write_json  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402

RADIUS = 2.0  # of the interval that is known to contain the atoms
BIN = 1 / 16  # width of a bin, in standard deviations of the noise
GRID = np.linspace(-RADIUS, RADIUS, 401)  # atoms of the projection onto the moments of distributions on the interval
SHAPES = {2: ([-1, 1], [0.5, 0.5]), 3: ([-1, 0, 1], [0.25, 0.5, 0.25])}  # k atoms and their weights, to be scaled


# ---- a line


class Group(NamedTuple):
    """Samples of one level on a line. centres: of the bins [B]; counts: int [R, B], R repetitions; sigma: std of the noise."""

    centres: np.ndarray
    counts: np.ndarray
    sigma: float


def draw(atoms: Sequence[float], weights: Sequence[float], sigma: float, n: int, repetitions: int, rng: np.random.Generator) -> Group:
    """n samples of the mixture of N(atom, sigma^2) in each repetition, as their counts in bins."""
    reach, width = max(np.abs(atoms)) + 9 * sigma, BIN * sigma
    edges = np.arange(-math.ceil(reach / width), math.ceil(reach / width) + 1) * width
    shares = np.diff(ndtr((edges[:, None] - np.asarray(atoms)) / sigma), axis=0) @ weights
    return Group((edges[1:] + edges[:-1]) / 2, rng.multinomial(int(n), shares / shares.sum(), repetitions), sigma)


def moments(groups: Sequence[Group], count: int) -> tuple[np.ndarray, np.ndarray]:
    """(estimates [R, count] of the moments 1 to count of the atoms, their standard deviations [count] for atoms near 0).

    E[s^j He_j(X/s)] is the j-th moment, and its variance is about j! s^(2j): samples are weighted by s^(-2j). Bins are allowed for by their
    variance (Sheppard's correction)."""
    found, spread = [], []
    for j in range(1, count + 1):
        total, information = 0.0, 0.0
        for centres, counts, sigma in groups:
            level, n = sigma * math.sqrt(1 + BIN ** 2 / 12), counts[0].sum()
            values = level ** j * np.polynomial.hermite_e.hermeval(centres / level, [0] * j + [1])
            total = total + level ** (-2 * j) * (counts @ values)
            information += n * level ** (-2 * j)
        found.append(total / information)
        spread.append(math.sqrt(math.factorial(j) / information))
    return np.stack(found, 1), np.array(spread)


def quadrature(m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k atoms with the moments 1 to 2k - 1 of each row of m [R, 2k-1]: (atoms [R, k], weights [R, k], whether they exist [R]).

    The atoms are the roots of the polynomial of degree k that is orthogonal to all of lower degree (Gauss quadrature)."""
    k = (m.shape[1] + 1) // 2
    full = np.concatenate([np.ones([len(m), 1]), m], 1)
    hankel = full[:, np.arange(k)[:, None] + np.arange(k)]
    exists = np.linalg.eigvalsh(hankel)[:, 0] > 1e-15
    hankel[~exists] = np.eye(k)
    lower = -np.linalg.solve(hankel, full[:, k:, None])[..., 0]  # coefficients of 1, x, ..., x^(k-1)
    companion = np.zeros([len(m), k, k])
    companion[:, np.arange(1, k), np.arange(k - 1)] = 1
    companion[:, :, -1] = -lower
    roots = np.linalg.eigvals(companion)
    exists &= np.abs(roots.imag).max(1) < 1e-9
    atoms = np.sort(roots.real, 1)
    exists &= (np.diff(atoms, axis=1).min(1) > 1e-9) & (np.abs(atoms).max(1) <= RADIUS)
    atoms[~exists] = np.linspace(-1, 1, k)
    weights = np.linalg.solve(atoms[:, None, :] ** np.arange(k)[:, None], full[:, :k, None])[..., 0]
    return atoms, weights, exists


def denoised_moments(groups: Sequence[Group], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The denoised method of moments (Wu and Yang 2020), for levels of each sample's own: [(atoms, weights)] of each repetition.

    Moments that no k atoms on the interval have are first projected onto those of distributions there, by weighted least squares."""
    m, spread = moments(groups, 2 * k - 1)
    atoms, weights, exists = quadrature(m)
    rows = np.concatenate([[np.full(len(GRID), 100 / spread.min())], GRID ** np.arange(1, 2 * k)[:, None] / spread[:, None]])
    found = []
    for a, w, fits, wanted in zip(atoms, weights, exists, m):
        if not fits:
            p = nnls(rows, np.concatenate([[rows[0, 0]], wanted / spread]))[0]
            a, w = GRID[p > 0], p[p > 0] / p.sum()
        found.append((a, w))
    return found


def likelihood(groups: Sequence[Group], k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Maximum likelihood of k atoms with known levels: the best of two searches, from the moments and from atoms that are far apart."""
    found, starts = [], denoised_moments(groups, k)
    for r, (atoms, weights) in enumerate(starts):
        seen = [(centres[counts[r] > 0], counts[r][counts[r] > 0], sigma) for centres, counts, sigma in groups]
        merged = np.interp((np.arange(k) + 0.5) / k, np.cumsum(weights) - weights / 2, atoms)
        own = (atoms, weights) if len(atoms) == k else (merged + 0.01 * np.arange(k), np.full(k, 1 / k))
        wide = (np.linspace(-1, 1, k), np.full(k, 1 / k))
        tries = [minimize(_cost, np.concatenate([a, np.log(np.maximum(w, 1e-6))]), (seen, k), 'L-BFGS-B', jac=True,
                          bounds=[(-RADIUS, RADIUS)] * k + [(-20, 5)] * k, options={'ftol': 1e-15, 'gtol': 1e-9, 'maxiter': 500})
                 for a, w in (own, wide)]
        best = min(tries, key=lambda one: one.fun).x
        found.append((best[:k], np.exp(best[k:] - logsumexp(best[k:]))))
    return found


def _cost(x, seen, k):
    # Mean negative log-likelihood of binned samples, and its gradient in the atoms and in the logarithms of the weights.
    share, cost, slope = np.exp(x[k:] - logsumexp(x[k:])), 0.0, np.zeros(2 * k)
    n = sum(counts.sum() for _, counts, _ in seen)
    for centres, counts, sigma in seen:
        apart = (centres[:, None] - x[:k]) / sigma
        log = np.log(share + 1e-300) - apart ** 2 / 2
        total = logsumexp(log, axis=1)
        posterior = np.exp(log - total[:, None])
        cost -= counts @ total / n
        slope[:k] -= counts @ (posterior * apart / sigma) / n
        slope[k:] -= counts @ (posterior - share) / n
    return cost, slope


def scaled(k, size):
    """(atoms, weights) of the shape with k atoms, at -size to size."""
    atoms, weights = SHAPES[k]
    return size * np.asarray(atoms, float), np.asarray(weights)


def line_errors(k: int, size: float, groups: Sequence[tuple[float, int]], repetitions: int, rng: np.random.Generator,
                estimator=denoised_moments) -> np.ndarray:
    """W1 errors [R] of the k atoms at -size to size, from groups of (level, number of samples)."""
    truth = scaled(k, size)
    found = estimator([draw(*truth, sigma, n, repetitions, rng) for sigma, n in groups if n], k)
    return np.array([wasserstein_distance(truth[0], a, truth[1], w) for a, w in found])


# ---- many dimensions


def scatter(square: float, n: int, sigma: float, d: int, rng: np.random.Generator) -> np.ndarray:
    """sum_i X_i X_i^T, [d, d], of n samples X_i = (Z_i, 0, ..., 0) + sigma N(0, I_d), whose first coordinates have this sum of squares.

    Given those, t [n], the others G [n, d-1] are sigma N(0, 1). G^T t / |t| is normal, and what the direction t / |t| leaves
    of G^T G is an independent Wishart matrix of n - 1 degrees of freedom, drawn by Bartlett's decomposition; needs n > d."""
    factor = np.tril(rng.standard_normal([d - 1, d - 1]), -1)
    factor[np.arange(d - 1), np.arange(d - 1)] = np.sqrt(rng.chisquare(n - 1 - np.arange(d - 1)))
    cross = rng.standard_normal(d - 1)
    whole = np.empty([d, d])
    whole[0, 0], whole[0, 1:] = square, sigma * math.sqrt(square) * cross
    whole[1:, 0], whole[1:, 1:] = whole[0, 1:], sigma ** 2 * (factor @ factor.T + np.outer(cross, cross))
    return whole


def covariance(k: int, size: float, groups: Sequence[tuple[float, int]], d: int, rng: np.random.Generator) -> np.ndarray:
    """Unbiased estimate of E[Z Z^T], [d, d], for k atoms along the first axis: samples are weighted by s^(-4).

    groups: (level, number of samples) of each level."""
    total, information = 0.0, 0.0
    for sigma, n in groups:
        if n:
            centres, counts, _ = draw(*scaled(k, size), sigma, n, 1, rng)
            square = float(counts[0] @ (centres ** 2 - (BIN * sigma) ** 2 / 12))
            total = total + sigma ** -4 * (scatter(square, n, sigma, d, rng) - n * sigma ** 2 * np.eye(d))
            information += n * sigma ** -4
    return total / information


def subspace_errors(size: float, groups: Sequence[tuple[float, int]], d: int, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """[R, 2]: W1 between two atoms at -size and size along an axis and their projection onto the direction that the samples give, which
    is size times the sine of the angle; and the operator norm of the error of the covariance."""
    found = []
    for _ in range(repetitions):
        estimate = covariance(2, size, groups, d, rng)
        along = np.linalg.eigh(estimate)[1][0, -1]
        estimate[0, 0] -= size ** 2
        found.append((size * math.sqrt(max(0, 1 - along ** 2)), np.abs(np.linalg.eigvalsh(estimate)[[0, -1]]).max()))
    return np.array(found)


def transport(atoms, weights, others, shares, cosine):
    """W1 between atoms on one line and others on a second line through 0, whose directions have this cosine: a linear program."""
    cost = np.sqrt(np.maximum(0, atoms[:, None] ** 2 + others ** 2 - 2 * cosine * atoms[:, None] * others))
    rows = np.kron(np.eye(len(atoms)), np.ones(len(others)))
    columns = np.kron(np.ones(len(atoms)), np.eye(len(others)))
    return linprog(cost.ravel(), A_eq=np.concatenate([rows, columns])[:-1], b_eq=np.concatenate([weights, shares])[:-1]).fun


def full_errors(k: int, size: float, groups: Sequence[tuple[float, int]], d: int, repetitions: int, rng: np.random.Generator) -> np.ndarray:
    """[R, 3]: W1 of the whole estimate, its subspace part, and its part on the line: direction from one half of the samples, atoms by
    maximum likelihood from the other half projected onto it."""
    truth, found = scaled(k, size), []
    halves = [(sigma, n // 2) for sigma, n in groups if n]
    for _ in range(repetitions):
        cosine = np.linalg.eigh(covariance(k, size, halves, d, rng))[1][0, -1]
        seen = cosine * truth[0]
        (atoms, weights), = likelihood([draw(seen, truth[1], sigma, n, 1, rng) for sigma, n in halves], k)
        found.append((transport(*truth, atoms, weights, cosine), math.sqrt(1 - cosine ** 2) * float(np.abs(truth[0]) @ truth[1]),
                      wasserstein_distance(seen, atoms, truth[1], weights)))
    return np.array(found)


# ---- slopes


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x; nan where a y is negative."""
    with np.errstate(invalid='ignore'):  # of too few repetitions, whose mean may be negative
        return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def worst(cells: np.ndarray) -> np.ndarray:
    """Means over repetitions of errors [x, instance, R], of the worst instance of each x: [x]."""
    return cells.mean(2).max(1)


def with_interval(statistic, cells: Sequence[np.ndarray], rng: np.random.Generator, resamples: int = 400) -> tuple[float, float, float]:
    """(statistic(cells), and its 95 % interval): the repetitions, the last axis of each array, are resampled on their own in each cell."""
    draws = []
    for _ in range(resamples):
        again = [np.take_along_axis(cell, rng.integers(cell.shape[-1], size=cell.shape), -1) for cell in cells]
        draws.append(statistic(again))
    return statistic(cells), *np.percentile(draws, [2.5, 97.5])


def rate(x, cells, rng):
    """Slope of the worst instance's mean error in x, with its interval."""
    return with_interval(lambda arrays: slope(x, worst(np.stack(arrays))), list(cells), rng)


SIZES = np.geomspace(0.02, 1.7, 26)  # the instances: atoms at -size to size
AROUND_LOST = np.geomspace(0.6, 2, 9)
SUBSPACE = {'n': [(10.0 ** p, 64) for p in (4, 5, 6, 7, 8)], 'd': [(1e6, 2 ** p) for p in (5, 6, 7, 8, 9)]}  # (n, d)
LINE = {2: [10.0 ** p for p in range(4, 10)], 3: [10.0 ** p for p in range(6, 13)]}  # numbers of samples


def line_cells(k, counts, sizes, repetitions, rng, estimator=denoised_moments):
    """Errors [n, size, R]."""
    return np.array([[line_errors(k, size, [(1.0, n)], repetitions, rng, estimator) for size in sizes] for n in counts])


def subspace_cells(settings, repetitions, rng):
    """Errors [setting, size, R, 2] for settings (n, d), at sizes around (d/n)^(1/4), within which the worst one lies."""
    return np.array([[subspace_errors(size, [(1.0, int(n))], int(d), repetitions, rng) for size in AROUND_LOST * (d / n) ** 0.25]
                     for n, d in settings])


def measure_rates(repetitions: int, rng: np.random.Generator) -> list[dict]:
    """One entry for each rate: what, x, the errors shown, the slope with its interval, and the stated one."""
    found = []

    def note(what, stated, name, x, cells):
        measured, low, high = rate(x, cells, rng)
        found.append({'what': what, 'stated': stated, 'in': name, 'x': list(map(float, x)), 'errors': worst(cells).tolist(),
                      'slope': measured, 'low': float(low), 'high': float(high)})
        click.echo(f'{what}: {measured:.3f} [{low:.3f}, {high:.3f}], stated {stated:.3f}', err=True)

    for k, counts in LINE.items():
        sizes = SIZES if k == 2 else SIZES[SIZES > 0.06]
        note(f'W1 on a line, k = {k}, worst instance', -1 / (4 * k - 2), 'n', counts, line_cells(k, counts, sizes, repetitions, rng))
        note(f'W1 on a line, k = {k}, atoms 1.5 s apart or more', -0.5, 'n', LINE[2][1:],
             line_cells(k, LINE[2][1:], [0.75 if k == 2 else 1.5], repetitions, rng))
    few = max(2, repetitions // 10)
    note('W1 on a line, k = 2, maximum likelihood, worst instance', -1 / 6, 'n', LINE[2][::2],
         line_cells(2, LINE[2][::2], SIZES[::2], few, rng, likelihood))
    rng = rng.spawn(1)[0]
    for name, settings in SUBSPACE.items():
        x, sign = [pair[0] if name == 'n' else pair[1] for pair in settings], -1 if name == 'n' else 1
        cells = subspace_cells(settings, few, rng)
        note(f'subspace part of W1, worst instance, in {name}', sign * 0.25, name, x, cells[..., 0])
        note(f'covariance, operator norm, in {name}', sign * 0.5, name, x, cells[:, :1, :, 1])
        fixed = np.array([[subspace_errors(1.0, [(1.0, int(n))], int(d), few, rng)[:, 0]] for n, d in settings])
        note(f'subspace part of W1, atoms 2 s apart, in {name}', sign * 0.5, name, x, fixed)
    return found


# ---- the price of a noisy sample


LEVELS = (1.25, 1.5, 2.0, 2.5, 3.0)
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # numbers of noisy samples that are tried, in units of the stated one
TARGETS = {  # name: (stated exponent of the price, clean samples, errors(groups, R, rng) of an instance, share of the repetitions)
    'subspace, d = 64': (4, 10 ** 4, lambda groups, R, rng: subspace_errors(0.4, groups, 64, R, rng)[:, 0], 0.1),
    'line, k = 2': (6, 10 ** 6, lambda groups, R, rng: line_errors(2, 0.2, groups, R, rng), 1),
    'line, k = 3': (10, 10 ** 7, lambda groups, R, rng: line_errors(3, 0.6, groups, R, rng), 1)}


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """Where a parabola through log y against log x takes the value log level, nearest to the middle of x."""
    middle = np.log(x).mean()
    a, b, c = np.polyfit(np.log(x) - middle, np.log(y), 2)
    roots = np.roots([a, b, c - math.log(level)])
    return math.exp(middle + roots[np.abs(roots).argmin()].real)


def measure_price(repetitions: int, rng: np.random.Generator) -> list[dict]:
    """One entry for each target: how many noisy samples alone reach the error of the clean ones, per clean one, at each level."""
    found = []
    for what, (power, clean, errors, share) in TARGETS.items():
        R = max(2, int(share * repetitions))
        cells = [errors([(1.0, clean)], 4 * R, rng)]
        tried = [[max(int(clean * s ** power * f), clean) for f in AROUND] for s in LEVELS]
        cells += [np.stack([errors([(s, m)], R, rng) for m in counts]) for s, counts in zip(LEVELS, tried)]

        def prices(arrays, tried=tried, clean=clean):
            return np.array([crossing(counts, cell.mean(1), arrays[0].mean()) / clean for counts, cell in zip(tried, arrays[1:])])

        value = with_interval(lambda arrays, prices=prices: slope(LEVELS, prices(arrays)), cells, rng)
        ranges = [with_interval(lambda arrays, i=i, prices=prices: prices(arrays)[i], cells, rng, 200) for i in range(len(LEVELS))]
        found.append({'what': what, 'stated': power, 'slope': value[0], 'low': float(value[1]), 'high': float(value[2]),
                      'levels': LEVELS, 'prices': [list(map(float, one)) for one in ranges]})
        click.echo(f'{what}: {value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}], stated {power}', err=True)
    return found


# ---- clean and noisy samples together


def measure_sum(repetitions: int, rng: np.random.Generator, level: float = 2.0) -> list[dict]:
    """Errors of n clean samples, of n clean and n s^p noisy ones, and of 2n clean ones, which should equal the second."""
    found = []
    for what, (power, clean, errors, share) in TARGETS.items():
        groups = {'clean': [(1.0, clean)], 'both': [(1.0, clean), (level, int(clean * level ** power))], 'twice': [(1.0, 2 * clean)]}
        cells = {name: errors(one, max(2, int(4 * share * repetitions)), rng) for name, one in groups.items()}
        found.append({'what': what, 'stated': power} | {name: mean_and_error(cell) for name, cell in cells.items()})
    return found


def mean_and_error(values):
    """[mean, standard error]."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))]


FEW = (0, 600, 2000, 6000, 20000, 60000)  # clean samples
NOISY, LEVEL, DIM, REACH = 10 ** 6, 3.0, 256, 1.5  # noisy samples and their level; dimensions; atoms at -REACH to REACH


def measure_mixed(repetitions: int, rng: np.random.Generator) -> list[dict]:
    """Errors of clean samples with and without many noisy ones, at one fixed instance in many dimensions."""
    found = []
    for k in SHAPES:
        for clean in FEW:
            for noisy in (0, NOISY):
                if clean or noisy:
                    errors = full_errors(k, REACH, [(1.0, clean), (LEVEL, noisy)], DIM, repetitions, rng)
                    found.append({'k': k, 'clean': clean, 'noisy': noisy} |
                                 {name: mean_and_error(errors[:, i]) for i, name in enumerate(('whole', 'subspace', 'line'))})
    return found


# ---- tables and figures


def show_rates(found):
    click.echo('| what | in | from, to | errors there | slope, 95 % | stated |\n| --- | --- | --- | --- | --- | --- |')
    for one in found:
        click.echo(f'| {one["what"]} | {one["in"]} | {one["x"][0]:g}, {one["x"][-1]:g} | {one["errors"][0]:.3g}, {one["errors"][-1]:.3g} | '
                   f'{one["slope"]:.3f} [{one["low"]:.3f}, {one["high"]:.3f}] | {one["stated"]:.3f} |')


def show_price(found):
    click.echo(f'| what | {" | ".join(f"s = {s:g}" for s in LEVELS)} | slope, 95 % | stated |\n{"| --- " * (len(LEVELS) + 3)}|')
    for one in found:
        cells = ' | '.join(f'{value:.3g} ({s ** one["stated"]:.3g})' for s, (value, _, _) in zip(LEVELS, one['prices']))
        click.echo(f'| {one["what"]} | {cells} | {one["slope"]:.2f} [{one["low"]:.2f}, {one["high"]:.2f}] | {one["stated"]} |')


def show_mixed(found):
    click.echo('| what | n clean | n clean and n s^p noisy, s = 2 | 2n clean |\n| --- | --- | --- | --- |')
    plus = lambda pair: f'{pair[0]:.4f} ± {pair[1]:.4f}'
    for one in found['sum']:
        click.echo(f'| {one["what"]}, p = {one["stated"]} | {plus(one["clean"])} | {plus(one["both"])} | {plus(one["twice"])} |')
    click.echo(f'\n| k | clean | noisy, s = {LEVEL:g} | W1 | subspace part | part on the line |\n| --- | --- | --- | --- | --- | --- |')
    for one in found['mixed']:
        cells = ' | '.join(plus(one[part]) for part in ('whole', 'subspace', 'line'))
        click.echo(f'| {one["k"]} | {one["clean"]} | {one["noisy"]} | {cells} |')


def draw_rates(found, path):
    with figure(path, '--png', 1, 2, (11, 4.2)) as (_, axes):
        for axis, name in zip(axes[0], ('n', 'd')):
            for i, one in enumerate(one for one in found if one['in'] == name):
                x, y = np.array(one['x']), np.array(one['errors'])
                axis.loglog(x, y, 'o', color=f'C{i}', markersize=4, label=f'{one["what"]}: {one["slope"]:.3f}')
                axis.loglog(x, y[-1] * (x / x[-1]) ** one['stated'], '--', color=f'C{i}', linewidth=1)
            axis.set(xlabel=name, ylabel='error (dashed: stated slope)')
            axis.set_ylim(bottom=axis.get_ylim()[0] / (50 if name == 'n' else 4))  # room for the names
            axis.xaxis.set_minor_formatter('')
            if name == 'd':
                axis.set_xticks(x, [f'{value:g}' for value in x])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6, loc='lower left' if name == 'n' else 'lower right')


def draw_price(found, path):
    with figure(path, '--png', 1, 1, (6, 4.2)) as (_, axes):
        for i, one in enumerate(found):
            y = np.array(one['prices'])
            axes[0][0].errorbar(LEVELS, y[:, 0], np.maximum(0, [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]]), fmt='o', color=f'C{i}',
                                label=f'{one["what"]}: slope {one["slope"]:.2f}')
            axes[0][0].plot(LEVELS, np.array(LEVELS) ** one['stated'], '--', color=f'C{i}', label=f's^{one["stated"]}')
        axes[0][0].set(xscale='log', yscale='log', xlabel='s', ylabel='noisy samples that replace a clean one')
        axes[0][0].set_xticks(LEVELS, [f'{s:g}' for s in LEVELS], minor=False)
        axes[0][0].grid(alpha=0.3)
        axes[0][0].legend(fontsize=8)


def draw_mixed(found, path):
    with figure(path, '--png', 1, len(SHAPES), (5.5 * len(SHAPES), 4.2)) as (_, axes):
        for axis, k in zip(axes[0], SHAPES):
            for i, (noisy, label) in enumerate(((0, 'clean alone'), (NOISY, f'and {NOISY:g} noisy'))):
                rows = [one for one in found['mixed'] if one['k'] == k and one['noisy'] == noisy and one['clean']]
                for part, style in (('whole', 'o-'), ('subspace', '--')):
                    axis.loglog([one['clean'] for one in rows], [one[part][0] for one in rows], style, color=f'C{i}',
                                label=f'{label}: {part}')
            alone = next(one for one in found['mixed'] if one['k'] == k and not one['clean'])
            axis.axhline(alone['whole'][0], color='C2', linewidth=1, label='noisy alone: whole')
            axis.set(xlabel='clean samples', ylabel='W1', title=f'k = {k}, d = {DIM}, s = {LEVEL:g}')
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)


def measure_both(repetitions, rng):
    """The sum of clean and noisy samples, and few clean samples with many noisy ones."""
    return {'sum': measure_sum(repetitions, rng), 'mixed': measure_mixed(max(2, repetitions // 10), rng)}


PARTS = {'rates': (measure_rates, show_rates, draw_rates), 'price': (measure_price, show_price, draw_price),
         'mixed': (measure_both, show_mixed, draw_mixed)}


@click.command(cls=Command)
@click.argument('part', type=click.Choice(list(PARTS)))
@click.option('--repetitions', type=click.IntRange(min=2), default=200, show_default=True, help='Simulated data sets of each cell')
@click.option('--seed', type=click.IntRange(min=0), default=0, show_default=True, help='Seed of all random numbers')
@click.option('--json', 'dest', metavar='FILE', help='Write the figures to this file')
@click.option('--png', metavar='FILE', help='Write the figure to this file')
@version_option
def main(part, repetitions, seed, dest, png):
    """Simulate what clean and noisy samples of a mixture are worth: rates, the price of a noisy sample, or both kinds together."""
    measure, show, draw_it = PARTS[part]
    found = measure(repetitions, np.random.default_rng([seed, *map(ord, part)]))
    show(found)
    if dest:
        write_json(dest, {'part': part, 'seed': seed, 'repetitions': repetitions, 'found': found}, null=True)
    if png:
        Path(png).absolute().parent.mkdir(parents=True, exist_ok=True)
        draw_it(found, png)


if __name__ == '__main__':
    main()
