# SPDX-License-Identifier: Apache-2.0
"""The theorem of slight condition corruption (Chen et al. 2024), in closed form and simulated: entropy rises, W2 to the truth falls.

python benchmarks/corruption_theory.py --json=corruption.json --png=docs/figures/theory_corruption.png

A class is N(mu, I_d), of which n samples are seen; the embedding of its label is perturbed by g times a standard normal vector."""

import math
import sys
from pathlib import Path

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.mixture_theory import slope, with_interval  # noqa: E402 (the folder above had to be found first)
from dnnlib.figures import figure  # noqa: E402
from dnnlib.files import write_json  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402

LAWS = ('isotropic', 'rank one')  # of the covariance that the perturbation adds: as the paper states it; as derived in docs/theory.md


def added(mean: np.ndarray, g: float, law: str) -> np.ndarray:
    """What a perturbation of size g adds to the covariance of the generated law, [..., d, d]; mean: [..., d], of the samples."""
    share, d = g ** 2 / (1 + g ** 2), mean.shape[-1]
    if law == 'isotropic':
        return share * (mean ** 2).sum(-1)[..., None, None] * np.eye(d)
    return share * mean[..., :, None] * mean[..., None, :]


def entropy_rise(mean: np.ndarray, cov: np.ndarray, g: float, law: str) -> np.ndarray:
    """H(generated with perturbation) - H(without), in nats: half the difference of the log-determinants. [...]"""
    return (np.linalg.slogdet(cov + added(mean, g, law))[1] - np.linalg.slogdet(cov)[1]) / 2


def distance(mean: np.ndarray, cov: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """W2^2 between N(mean, cov) and the truth N(mu, I): |mean - mu|^2 + d + sum of (lambda - 2 sqrt(lambda)) over the eigenvalues. [...]"""
    values = np.linalg.eigvalsh(cov)
    return ((mean - mu) ** 2).sum(-1) + (1 + values - 2 * np.sqrt(np.maximum(values, 0))).sum(-1)


def gain(mean: np.ndarray, cov: np.ndarray, mu: np.ndarray, g: float, law: str) -> np.ndarray:
    """W2^2 to the truth without perturbation less that with it; positive where the perturbation helps. [...]"""
    return distance(mean, cov, mu) - distance(mean / (1 + g ** 2), cov + added(mean, g, law), mu)


def expected_gain(n: float, d: int, norm: float, g: float, law: str) -> float:
    """Mean of the gain over training sets to second order in 1/sqrt(n) and in g^2, for g^2 and d/n small.

    E tr(S^(-1/2)) - d = 3/8 d (d + 1) / n is what a wider covariance gains to first order, since E sqrt(lambda) < 1; norm: |mu|."""
    square, directions = norm ** 2 + d / n, d if law == 'isotropic' else 1
    shift = 2 * g ** 2 * d / n - g ** 4 * norm ** 2
    return shift + g ** 2 * square * directions * 3 / 8 * (d + 1) / n - directions * (g ** 2 * square) ** 2 / 4


def samples(n: int, d: int, norm: float, repetitions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(means [R, d], covariances [R, d, d], mu [d]) of n samples of N(mu, I), |mu| = norm; the covariances are unbiased.

    Mean and covariance are independent, and n - 1 times the covariance is a Wishart matrix (Bartlett's decomposition); needs n > d."""
    mu = np.zeros(d)
    mu[0] = norm
    factor = np.tril(rng.standard_normal([repetitions, d, d]), -1)
    factor[:, np.arange(d), np.arange(d)] = np.sqrt(rng.chisquare(n - 1 - np.arange(d), [repetitions, d]))
    return mu + rng.standard_normal([repetitions, d]) / math.sqrt(n), factor @ factor.transpose(0, 2, 1) / (n - 1), mu


def trained_law(x: np.ndarray, g: float, sigma: float, width: int, rounds: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of the law that the least-squares denoiser D(x_t, c) = A x_t + V c of one class samples from.

    x: [n, d], seen `rounds` times with fresh noise of level sigma and fresh perturbations g N(0, I) of the embedding c = (1, 0, ..., 0) of
    `width` dimensions; sampled with c itself. D = m + A (x_t - m) is the denoiser of N(m, C), where V c = (I - A) m and
    A = C (C + sigma^2)^(-1)."""
    n, d = x.shape
    products, targets = 0.0, 0.0
    for _ in range(rounds):
        embedding = g * rng.standard_normal([n, width])
        embedding[:, 0] += 1
        inputs = np.concatenate([x + sigma * rng.standard_normal([n, d]), embedding], 1)
        products, targets = products + inputs.T @ inputs, targets + inputs.T @ x
    weights = np.linalg.solve(products, targets).T
    A, V = weights[:, :d], weights[:, d]
    C = np.linalg.solve(np.eye(d) - A, A) * sigma ** 2
    return np.linalg.solve(np.eye(d) - A, V), (C + C.T) / 2


# ---- slopes


NS, DS, GS = (400, 800, 1600, 3200, 6400), (8, 16, 32, 64), (0.1, 0.2, 0.3, 0.4, 0.5)  # g in units of 1/sqrt(n)
N, D = 1600, 20


def measure_slopes(repetitions: int, rng: np.random.Generator) -> list[dict]:
    """One entry for each law, quantity and variable: the slope of the mean over training sets, its interval, that of the closed form."""
    largest, found = 0.3 / math.sqrt(max(NS)), []
    cases = [('entropy', 'g', GS, lambda g: (N, D, 1, g / math.sqrt(N)), '2'),
             ('entropy', 'd', DS, lambda d: (N, d, 1, 0.3 / math.sqrt(N)), '1'),
             ('entropy', 'd, mu^2 = d', DS, lambda d: (N, d, math.sqrt(d), 0.3 / math.sqrt(N)), ''),
             ('gain', 'g', GS, lambda g: (N, D, 1, g / math.sqrt(N)), '2'),
             ('gain', 'd', DS, lambda d: (N, d, 1, 0.3 / math.sqrt(N)), '1 or more'),
             ('gain', 'n, all with the same g', NS, lambda n: (n, D, 1, largest), '-1'),
             ('gain', 'n, g = 0.3 / sqrt(n)', NS, lambda n: (n, D, 1, 0.3 / math.sqrt(n)), '-2')]
    for what, name, x, setting, stated in cases:
        for law in LAWS:
            cells = []
            for value in x:
                n, d, norm, g = setting(value)
                mean, cov, mu = samples(n, d, norm, repetitions, rng)
                cells.append(entropy_rise(mean, cov, g, law) if what == 'entropy' else gain(mean, cov, mu, g, law))
            statistic = lambda arrays, x=x: slope(x, [np.mean(one) for one in arrays])
            measured, low, high = with_interval(statistic, cells, rng)
            formula = [closed_form(what, law, *setting(value)) for value in x]
            found.append({'what': what, 'law': law, 'in': name, 'x': x, 'means': [float(one.mean()) for one in cells], 'formula': formula,
                          'slope': measured, 'low': float(low), 'high': float(high), 'of formula': slope(x, formula), 'stated': stated})
    return found


def closed_form(what, law, n, d, norm, g):
    """Mean entropy rise or gain, to first order."""
    if what == 'gain':
        return expected_gain(n, d, norm, g, law)
    directions, inverse = d if law == 'isotropic' else 1, (n - 1) / (n - d - 2)  # the mean of the inverse of a sample's covariance is that
    return directions / 2 * math.log(1 + g ** 2 / (1 + g ** 2) * (norm ** 2 + d / n) * inverse)


SWEEP = np.concatenate([[0], np.geomspace(0.3, 30, 21)])  # g in units of 1/sqrt(n)


def measure_sweep(repetitions: int, rng: np.random.Generator, n: int = 200, d: int = 20) -> list[dict]:
    """For each law, over sizes of g: mean change of W2^2 and of the entropy; where the gain is largest and where it ends."""
    mean, cov, mu = samples(n, d, 1.0, repetitions, rng)
    found = []
    for law in LAWS:
        gains = np.array([gain(mean, cov, mu, g / math.sqrt(n), law) for g in SWEEP])
        entropies = np.array([entropy_rise(mean, cov, g / math.sqrt(n), law).mean() for g in SWEEP])

        def end(arrays):  # where the last positive gain and the next one are joined; nan for too few repetitions
            curve = arrays[0].mean(1)
            last = np.flatnonzero(curve > 0).max(initial=-1)
            if not 0 <= last < len(curve) - 1:
                return math.nan
            return float(SWEEP[last] + curve[last] / (curve[last] - curve[last + 1]) * (SWEEP[last + 1] - SWEEP[last]))
        turn = with_interval(end, [gains], rng, 200)
        best = int(gains.mean(1).argmax())
        # The closed form is a g^2 - b g^4 to this order: it ends at g^2 = a / b.
        a, b = (np.linalg.solve([[1e-6, -1e-12], [4e-6, -16e-12]], [expected_gain(n, d, 1, g, law) for g in (1e-3, 2e-3)]))
        found.append({'law': law, 'n': n, 'd': d, 'g sqrt(n)': SWEEP.tolist(), 'gain': gains.mean(1).tolist(),
                      'error': (gains.std(1, ddof=1) / math.sqrt(repetitions)).tolist(), 'entropy': entropies.tolist(),
                      'W2^2 without': float(distance(mean, cov, mu).mean()), 'best': float(SWEEP[best]),
                      'largest': float(gains.mean(1)[best]), 'ends': turn[0], 'ends, 95 %': [float(turn[1]), float(turn[2])],
                      'ends, formula': math.sqrt(a / b * n)})
    return found


def measure_trained(rng: np.random.Generator, n: int = 400, d: int = 6, g: float = 0.5) -> dict:
    """How far the law of a trained linear denoiser lies from each closed form, in the Frobenius norm of what is added."""
    x = rng.standard_normal([n, d]) + np.array([1.5] + [0.5] * (d - 1))
    mean, cov = trained_law(x, g, 1.0, 4, 2000, rng)
    centre, own = x.mean(0), np.cov(x, rowvar=False, ddof=0)
    return {'mean': float(mean @ centre / (centre @ centre)), 'stated': 1 / (1 + g ** 2)} | {
        law: float(np.linalg.norm(cov - own - added(centre, g, law)) / np.linalg.norm(cov - own)) for law in LAWS}


def show(found):
    """Prints the tables."""
    click.echo('| quantity | law | in | from, to | means there | slope, 95 % | of the closed form | stated |\n' + '| --- ' * 8 + '|')
    for one in found['slopes']:
        click.echo(f'| {one["what"]} | {one["law"]} | {one["in"]} | {one["x"][0]:g}, {one["x"][-1]:g} | {one["means"][0]:.3g}, '
                   f'{one["means"][-1]:.3g} | {one["slope"]:.3f} [{one["low"]:.3f}, {one["high"]:.3f}] | {one["of formula"]:.3f} | '
                   f'{one["stated"]} |')
    click.echo('\n| law | W2^2 without | largest gain | at g sqrt(n) | gain ends at g sqrt(n), 95 % | of the closed form |')
    click.echo('| --- ' * 6 + '|')
    for one in found['sweep']:
        click.echo(f'| {one["law"]} | {one["W2^2 without"]:.3f} | {one["largest"]:.3g} | {one["best"]:.2f} | {one["ends"]:.2f} '
                   f'[{one["ends, 95 %"][0]:.2f}, {one["ends, 95 %"][1]:.2f}] | {one["ends, formula"]:.2f} |')
    one = found['trained']
    click.echo(f'\nA trained linear denoiser: mean times {one["mean"]:.4f} (closed form {one["stated"]:.4f}); distance of the added '
               'covariance to the closed form, in units of its norm: ' + ', '.join(f'{law} {one[law]:.3f}' for law in LAWS))


def draw(found, path):
    """The gain and the rise of the entropy against g."""
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with figure(path, '--png', 1, 3, (14, 4)) as (_, axes):
        for i, one in enumerate(found['sweep']):
            g = np.array(one['g sqrt(n)'])
            relative = 100 * np.array(one['gain']) / one['W2^2 without']
            axes[0][0].plot(g[1:], relative[1:], 'o-', color=f'C{i}', markersize=3, label=one['law'])
            axes[0][1].loglog(g[1:], one['entropy'][1:], 'o-', color=f'C{i}', markersize=3, label=one['law'])
        axes[0][0].axhline(0, color='black', linewidth=0.8)
        axes[0][0].set(xscale='log', ylim=(-5, 10), xlabel='g sqrt(n)', ylabel='fall of W2^2 to the truth [%]',
                       title=f'n = {one["n"]}, d = {one["d"]}, |mu| = 1')
        axes[0][1].set(xlabel='g sqrt(n)', ylabel='rise of the entropy [nats]')
        for i, one in enumerate(one for one in found['slopes'] if one['what'] == 'gain' and one['in'].startswith('n')):
            x = np.array(one['x'])
            axes[0][2].loglog(x, one['means'], 'o', color=f'C{i}', markersize=4, label=f'{one["law"]}, {one["in"][3:]}: {one["slope"]:.2f}')
            axes[0][2].loglog(x, one['formula'], '--', color=f'C{i}', linewidth=1)
        axes[0][2].set(xlabel='n', ylabel='fall of W2^2 (dashed: closed form)')
        axes[0][2].set_xticks(NS, NS, minor=False)
        axes[0][2].set_xticks([], minor=True)
        for axis in axes[0]:
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)


@click.command(cls=Command)
@click.option('--repetitions', type=click.IntRange(min=2), default=2000, show_default=True, help='Simulated training sets of each cell')
@click.option('--seed', type=click.IntRange(min=0), default=0, show_default=True, help='Seed of all random numbers')
@click.option('--json', 'dest', metavar='FILE', help='Write the figures to this file')
@click.option('--png', metavar='FILE', help='Write the figure to this file')
@version_option
def main(repetitions, seed, dest, png):
    """Simulate what a perturbation of the condition does to the entropy of the generated law and to its distance to the truth."""
    rng = np.random.default_rng([seed, 7])
    found = {'slopes': measure_slopes(repetitions, rng), 'sweep': measure_sweep(repetitions, rng), 'trained': measure_trained(rng)}
    show(found)
    if dest:
        write_json(dest, {'seed': seed, 'repetitions': repetitions} | found, null=True)
    if png:
        draw(found, png)


if __name__ == '__main__':
    main()
