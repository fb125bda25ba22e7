# SPDX-License-Identifier: Apache-2.0
"""Tables, fits and figures of the cells that benchmarks/price.py has trained: results.json, table.md, distances.png and price.png."""

import itertools
import math
import os
from pathlib import Path

import numpy as np

from benchmarks import price_fit
from dnnlib import UserError, figures
from dnnlib.files import file_digest, finite, read_json, replacing, write_json
from dnnlib.versions import versions
from training.data.dataset import ImageDataset

METRIC = 'fid_score'  # what the curves are fitted to, and figures show; fid_inf may be negative
KINDS = {'clean': 'all clean', 'mix': 'mixture', 'alone': 'clean ones alone', 'noisy': 'noisy only'}
DRAWS, MARGIN = 2000, 40  # bootstrap draws; points of the curves of marginal value
HIGHEST = 1e3             # what an infinite price is drawn at


def read_cells(out: str | os.PathLike) -> list[dict]:
    """The contents of all cell.json, in the order of their names. Raises UserError if there are none."""
    cells = [read_json(path) for path in sorted(Path(out).glob('runs/*/cell.json'))]
    if not cells:
        raise UserError(f'--out={out}: no cell is finished there')
    return cells


def groups_of(cells: list[dict]) -> dict[tuple, list[dict]]:
    """{(kind, sigma, share): its cells, one per seed}: all clean, mixtures, clean ones alone, noisy only."""
    order = list(KINDS)
    key = lambda cell: (order.index(cell['kind']), cell['sigma'], cell['share'])
    found = itertools.groupby(sorted(cells, key=lambda cell: (*key(cell), cell['seed'])), key)
    return {(order[which], sigma, share): list(group) for (which, sigma, share), group in found}


def mean_error(values: list[float]) -> tuple[float, float]:
    """(mean, standard error of the mean; nan for a single value)."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def rows_of(cells: list[dict]) -> list[dict]:
    """A row for each group and way of sampling: kind, sigma, share, sampling, counts, seeds, and for each detector and metric the mean over
    seeds, its standard error, the ratio to all clean and that ratio's standard error (paired by seed, to first order)."""
    groups = groups_of(cells)
    clean = {cell['seed']: cell['distances']['full'] for cell in groups.get(('clean', 0.0, 1.0), [])}
    rows = []
    for (kind, sigma, share), found in groups.items():
        for sampling in found[0]['distances']:
            row = {'kind': kind, 'sigma': sigma, 'share': share, 'sampling': sampling, 'clean': found[0]['clean'],
                   'noisy': found[0]['noisy'], 'seeds': [cell['seed'] for cell in found], 'distances': {}}
            for detector, metrics in found[0]['distances'][sampling].items():
                row['distances'][detector] = {metric: figure_of(found, clean, sampling, detector, metric) for metric in metrics}
            rows.append(row)
    return rows


def figure_of(found, clean, sampling, detector, metric) -> dict:
    """{mean, error, ratio, ratio_error} of one distance of a group; see rows_of()."""
    values = {cell['seed']: cell['distances'][sampling][detector][metric] for cell in found}
    mean, error = mean_error(list(values.values()))
    result = {'mean': mean, 'error': error}
    both = [(values[seed], clean[seed][detector][metric]) for seed in values if seed in clean]
    if both:
        own, base = np.array(both).T
        ratio = own.mean() / base.mean()
        result |= {'ratio': float(ratio), 'ratio_error': mean_error((own - ratio * base) / base.mean())[1]}
    return result


# ---- prices


def prices_of(cells: list[dict], detector: str, draws: int = DRAWS) -> tuple[price_fit.Prices, dict] | None:
    """(the Prices by sigma, those of each share alone, {(sigma, share): (kappa, low, high)}) from distances by one detector; None where
    there are too few counts of clean images for a curve, no mixtures, or where more clean images do not bring the samples closer."""
    value = lambda cell: cell['distances']['full'][detector][METRIC]
    own = [cell for cell in cells if cell['kind'] in ('clean', 'alone')]
    mixed = [cell for cell in cells if cell['kind'] == 'mix']
    if len({cell['clean'] for cell in own}) < 3 or not mixed:
        return None
    counts, distances = np.array([cell['clean'] for cell in own]), np.array([value(cell) for cell in own])
    if price_fit.fit_curve(counts, distances).b == 0:
        return None
    columns = lambda chosen: tuple(np.array(column) for column in zip(*((cell['clean'], cell['noisy'], value(cell)) for cell in chosen)))
    by = lambda key: {name: columns([cell for cell in mixed if key(cell) == name]) for name in sorted({key(cell) for cell in mixed})}
    rng = np.random.default_rng(0)
    joint = price_fit.prices(counts, distances, by(lambda cell: cell['sigma']), rng, draws)
    apart = price_fit.prices(counts, distances, by(lambda cell: (cell['sigma'], cell['share'])), rng, draws)
    return joint, apart.kappa


def gaussian_prices(eigenvalues: np.ndarray, sigma: float) -> tuple[float, float]:
    """Prices of Gaussian data with a covariance of these eigenvalues [D] for the Fréchet distance of its sample mean and covariance:
    (of a first noisy image beside clean ones, of one where all are noisy).

    The distance is, to first order, the sum over pairs of modes of var_ij / n, var_ij = l_i l_j / (2 (l_i + l_j)) (twice that where i = j),
    and over modes of l_i / n; a noisy image has l + sigma^2 in the numerators. Each of these terms has a price of its own, and which
    ones are still uncertain depends on the mixture."""

    def variances(level):
        seen = eigenvalues + level ** 2
        pairs = np.outer(seen, seen) * (1 + np.eye(len(seen))) / (2 * np.maximum(np.add.outer(eigenvalues, eigenvalues), 1e-12))
        return np.concatenate([seen, pairs.ravel()])

    clean, noisy = variances(0.0), variances(sigma)
    kept = clean > 1e-9
    return float(clean[kept].sum() / (clean[kept] ** 2 / noisy[kept]).sum()), float(noisy[kept].sum() / clean[kept].sum())


def eigenvalues_of(out: str | os.PathLike) -> np.ndarray | None:
    """Eigenvalues of the covariance of the training images, network units, if they are there."""
    path = os.path.join(out, 'train.zip')
    if not os.path.exists(path):
        return None
    dataset = ImageDataset(path)
    images = dataset.to_network(np.stack([dataset.decode(index) for index in dataset.raw_idx])).flatten(1).double().numpy()
    return np.maximum(np.linalg.eigvalsh(np.cov(images.T)), 0)


# ---- text


def shown(value: float, error: float | None = None, digits: int = 3) -> str:
    """"1.23 ± 0.04", without the error where there is none."""
    text = f'{value:.{digits}g}'
    return text if error is None or math.isnan(error) else f'{text} ± {error:.1g}'


def floors(out: str | os.PathLike, detectors: list[str]) -> dict[str, dict]:
    """{detector: {fid_score, fid_inf, images}} of the training images themselves, where they have been measured."""
    paths = {name: os.path.join(out, f'train-{name}.fid.json') for name in detectors}
    found = {name: read_json(path) for name, path in paths.items() if os.path.exists(path)}
    return {name: {key: result[key] for key in ('fid_score', 'fid_inf', 'num_images')} for name, result in found.items()}


def distance_table(rows: list[dict], floor: dict[str, dict]) -> str:
    """The distances as Markdown: the training images themselves, then a line per group and way of sampling."""
    detectors = list(rows[0]['distances'])
    heads = [head for name in detectors for head in (f'`{name}`', '/ all clean', '/ all clean, `fid_inf`')]
    lines = [f'| training images | sigma | clean | noisy | sampled | {" | ".join(heads)} |', '| --- ' * (5 + len(heads)) + '|']
    if floor:
        cells = [cell for name in detectors for cell in (shown(floor[name]['fid_score']), '', '')]
        lines.append(f'| the training images themselves | | {floor[detectors[0]]["num_images"]} | 0 | | {" | ".join(cells)} |')
    for row in rows:
        cells = []
        for name in detectors:
            fid, limit = row['distances'][name][METRIC], row['distances'][name]['fid_inf']
            cells.append(shown(fid['mean'], fid['error']))
            cells += [shown(each['ratio'], each['ratio_error']) if 'ratio' in each else '' for each in (fid, limit)]
        sigma = f'{row["sigma"]:g}' if row['sigma'] else ''
        lines.append(f'| {KINDS[row["kind"]]} | {sigma} | {row["clean"]} | {row["noisy"]} | {row["sampling"]} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def price_table(found: dict[str, tuple], eigenvalues: np.ndarray | None) -> str:
    """Prices with their intervals as Markdown: a line per sigma and share of clean images."""
    entries = list(next(iter(found.values()))[1])
    gaussian = ['Gaussian data, first noisy', 'all noisy'] if eigenvalues is not None else []
    lines = [f'| sigma | share clean | {" | ".join([f"kappa, `{name}`" for name in found] + gaussian)} |',
             '| --- ' * (2 + len(found) + len(gaussian)) + '|']
    number = lambda value: f'{value:.3g}' if value > 1 / price_fit.MOST else f'below {1 / price_fit.MOST:g}'
    text = lambda kappa: f'{number(kappa[0])} [{number(kappa[1])}, {number(kappa[2])}]'
    for sigma in dict.fromkeys(sigma for sigma, _ in entries):
        theory = [f'{value:.3g}' for value in gaussian_prices(eigenvalues, sigma)] if gaussian else []
        shares = [share for each, share in entries if each == sigma]
        for share in [*shares, *(['all'] if len(shares) > 1 else [])]:
            cells = [text(joint.kappa[sigma] if share == 'all' else apart[sigma, share]) for joint, apart in found.values()]
            lines.append(f'| {sigma:g} | {share if share == "all" else f"{share:g}"} | {" | ".join(cells + theory)} |')
    return '\n'.join(lines)


# ---- figures


def points(rows: list[dict], detector: str) -> tuple[list, list, list]:
    """(counts of clean images, mean distances, their errors) of rows, to draw."""
    means = [row['distances'][detector][METRIC] for row in rows]
    return [row['clean'] for row in rows], [each['mean'] for each in means], [each['error'] for each in means]


def draw_distances(path: str, rows: list[dict], found: dict[str, tuple]) -> None:
    """Distance against the number of clean images: clean ones alone with their fit, mixtures, and noisy-only models as lines."""
    detectors = list(rows[0]['distances'])
    with figures.figure(path, 'the figure of distances', 1, len(detectors), (5.5 * len(detectors), 4.2)) as (_, axes):
        for axis, name in zip(axes[0], detectors):
            sigmas = sorted({row['sigma'] for row in rows if row['sigma']})
            colour = {sigma: f'C{k + 1}' for k, sigma in enumerate(sigmas)}
            pick = lambda kind, sigma=None: [row for row in rows if row['kind'] in kind and sigma in (None, row['sigma'])]
            x, y, error = points(pick(('clean', 'alone')), name)
            axis.errorbar(x, y, error, fmt='o', color='black', capsize=3, label='clean images alone')
            if name in found:
                n = np.geomspace(min(x), max(x), 100)
                axis.plot(n, found[name][0].curve(n), color='black', linewidth=1, label='fit')
            for sigma in sigmas:
                x, y, error = points(pick(('mix',), sigma), name)
                if x:
                    axis.errorbar(x, y, error, fmt='s', color=colour[sigma], capsize=3, label=f'with the rest noisy at {sigma:g}')
                for row in pick(('noisy',), sigma):
                    axis.axhline(row['distances'][name][METRIC]['mean'], color=colour[sigma], linewidth=1,
                                 linestyle={'full': '--', 'truncated': ':'}[row['sampling']])
            axis.set(xscale='log', yscale='log', xlabel='clean images', ylabel='distance to the held-out half', title=f'{name}')
            axis.legend(fontsize=8, title='noisy only: dashed, truncated: dotted', title_fontsize=8)


def draw_prices(path: str, found: dict[str, tuple], eigenvalues: np.ndarray | None) -> None:
    """kappa against sigma with intervals; and the marginal value of one more image, clean or noisy, against n_eff."""
    with figures.figure(path, 'the figure of prices', 1, 1 + len(found), (4.8 * (1 + len(found)), 4.2)) as (_, axes):
        for k, (name, (joint, _)) in enumerate(found.items()):
            sigmas = list(joint.kappa)
            value, low, high = np.minimum(np.array(list(joint.kappa.values())).T, HIGHEST)
            ends = [value - low, high - value]
            axes[0, 0].errorbar(np.array(sigmas) * 1.03 ** k, value, ends, fmt='o', color=f'C{k}', capsize=3, label=name)
            draw_margins(axes[0, 1 + k], name, joint)
        if eigenvalues is not None:
            levels = np.geomspace(min(sigmas) * 0.8, max(sigmas) * 1.25, 30)
            for column, label, style in zip(zip(*(gaussian_prices(eigenvalues, level) for level in levels)),
                                            ('Gaussian data, first noisy image', 'Gaussian data, all noisy'), (':', '--')):
                axes[0, 0].plot(levels, np.minimum(column, HIGHEST), color='grey', linewidth=1, linestyle=style, label=label)
        axes[0, 0].set(xscale='log', yscale='log', xlabel='sigma of the noisy images', ylabel='noisy images that replace a clean one')
        axes[0, 0].legend(fontsize=8)


def draw_margins(axis, name, joint: price_fit.Prices) -> None:
    """How much one more image lowers the distance, with 95 % bands of the bootstrap."""
    counts = np.geomspace(*joint.range, MARGIN)
    draws = -joint.curves.slope(counts[:, None])  # [MARGIN, draws]
    kinds = [('clean', 1.0, np.ones(1))] + [(f'noisy at {sigma:g}', 1 / kappa[0], joint.values[sigma])
                                            for sigma, kappa in joint.kappa.items()]
    for k, (label, value, values) in enumerate(kinds):
        colour = 'black' if k == 0 else f'C{k}'
        axis.plot(counts, -joint.curve.slope(counts) * value, color=colour, label=label)
        axis.fill_between(counts, *np.quantile(draws * values, [0.025, 0.975], axis=1), color=colour, alpha=0.15, linewidth=0)
    axis.set(xscale='log', yscale='log', xlabel='images present, n_clean + n_noisy / kappa', title=name,
             ylabel='fall of the distance by one more image')
    axis.legend(fontsize=8)


# ---- all of it


def write(out: str | os.PathLike, draws: int = DRAWS) -> dict:
    """Writes results.json, table.md and, where matplotlib is there, both figures of the cells in `out`; prints the tables."""
    cells = read_cells(out)
    rows = rows_of(cells)
    found = {name: prices for name in rows[0]['distances'] if (prices := prices_of(cells, name, draws))}
    eigenvalues = eigenvalues_of(out)
    floor = floors(out, list(rows[0]['distances']))
    tables = [distance_table(rows, floor), *([price_table(found, eigenvalues)] if found else [])]
    path = lambda name: os.path.join(out, name)
    with replacing(path('table.md')) as part:
        Path(part).write_text('\n\n'.join(tables) + '\n', encoding='utf-8')
    as_dict = lambda kappa: dict(zip(('value', 'low', 'high'), map(finite, kappa)))
    small = path('small.safetensors')
    result = {'settings': read_json(path('settings.json')), 'detector_sha256': file_digest(small) if os.path.exists(small) else None,
              'floor': floor, 'rows': rows, 'versions': versions(), 'prices': {
                  name: {'curve': {key: getattr(joint.curve, key) for key in 'abc'},
                         'kappa': [{'sigma': sigma, 'share': None, **as_dict(kappa)} for sigma, kappa in joint.kappa.items()] +
                                  [{'sigma': sigma, 'share': share, **as_dict(kappa)} for (sigma, share), kappa in apart.items()]}
                  for name, (joint, apart) in found.items()}}
    write_json(path('results.json'), result, null=True)
    print('\n' + '\n\n'.join(tables), flush=True)
    try:
        draw_distances(path('distances.png'), rows, found)
        if found:
            draw_prices(path('price.png'), found, eigenvalues)
    except UserError as err:
        print(err.message)
    return result
