# SPDX-License-Identifier: Apache-2.0
"""What an annotation found: lines of text, a figure of P(clean | sigma), and a sheet of images at their limits."""

import io
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dnnlib.figures import figure
from torch_utils import misc
from training.annotation.sets import Sets, images_of
from training.data.convert import sheet
from training.data.limits import usable_levels
from training.diffusion.noise import NoiseDistribution

SHOWN = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # levels at which P(clean) is printed
PARTS, POINTS = 4, 64  # quartiles of p(sigma), and levels at which each is evaluated
CLASSES = 20  # classes, at most, whose limits are printed
EXAMPLES = 10


def usable_shares(noise: NoiseDistribution, sigmas: np.ndarray, sigma_min: np.ndarray, sigma_max: np.ndarray) -> list[float]:
    """Share of the images that may be used in each quartile of p(sigma), lowest levels first; levels of the images [N], network units."""
    limits = usable_levels(sigmas, 1.0, sigma_min, sigma_max)
    u = (torch.arange(PARTS * POINTS, dtype=torch.float64) + 0.5) / (PARTS * POINTS)
    shares = [limits.usable(torch.full_like(limits.bar, sigma)).double().mean() for sigma in noise.icdf(u).tolist()]
    return torch.stack(shares).reshape(PARTS, POINTS).mean(1).tolist()


def summary_of(limits: np.ndarray, none: float) -> dict:
    """Counts and statistics of limits [N] in network units; none: the value of an image without one. An image whose limit is the other
    end, 0 or inf, is left out of training."""
    out = np.isinf(limits) if none == 0 else limits == 0
    found = limits[(limits > 0) & np.isfinite(limits)]
    statistics = {name: float(f(found)) for name, f in (('min', np.min), ('median', np.median), ('mean', np.mean), ('max', np.max))}\
        if len(found) else {}
    return {'images': len(limits), 'limited': len(found), 'unlimited': int((limits == none).sum()), 'left_out': int(out.sum()),
            **statistics}


def by_class(limits: np.ndarray, classes: np.ndarray | None) -> dict[str, float]:
    """{class: median limit of its images}; empty without classes."""
    return {} if classes is None else {str(label): float(np.median(limits[classes == label])) for label in np.unique(classes)}


def lines(result: dict) -> Iterator[str]:
    """The lines to print of a result as it is written to JSON (before infinity becomes null)."""
    key, found = result['limit'], result['found']
    yield (f'{result["method"]}: {result["clean"]["images"]} clean images and {result["data"]["images"]} others; alike means P(clean) of '
           f'{result["threshold"]:g} or more on average, {result["kl"]:.2g} nats')
    for group in result['groups'][:CLASSES]:
        levels = [level for level in SHOWN if group['levels'][0] <= level <= group['levels'][-1]]
        values = np.interp(np.log(levels), np.log(group['levels']), group['probability'])
        yield f'P(clean)    {group["name"]}: ' + ', '.join(f'{value:.2f} at {level:g}' for level, value in zip(levels, values))
    if result['noise']:
        yield (f'sigmas      white noise of std {result["noise"]:.4g} is all that tells the images from clean ones: they are used above '
               'it, as noisy images')
    yield (f'{key}   {found["limited"]} of {found["images"]} images have this limit'
           + (f'; min {found["min"]:.4g}, median {found["median"]:.4g}, mean {found["mean"]:.4g}, max {found["max"]:.4g} in network units'
              if found['limited'] else ''))
    if found['unlimited']:
        yield f'            {found["unlimited"]} are used at all levels' + ' above their noise' * bool(result['noise'])
    if found['left_out']:
        yield f'            {found["left_out"]} are told from clean images at all levels and left out of training'
    shown = list(result['by_class'].items())
    if len(set(result['by_class'].values())) > 1:
        yield ('            median by class: ' + ', '.join(f'{label}: {_level(limit)}' for label, limit in shown[:CLASSES])
               + f', ... ({len(shown)} in all)' * (len(shown) > CLASSES))
    for name, told in (result.get('held_out') or {}).items():
        yield f'{name:<11} {told}'
    yield 'usable      share of the images per quartile of p(sigma), from the lowest levels: ' + ', '.join(
        f'{share:.0%}' for share in result['usable'])


def _level(limit):
    return '0' if limit == 0 else 'inf' if np.isinf(limit) else f'{limit:.4g}'


def draw_curves(path: str, result: dict) -> None:
    """Writes the figure: P(clean) and the area under the ROC curve of each group over sigma, with the threshold and the limits."""
    with figure(path, '--plot', 1, 2, (10, 4)) as (_, ((left, right),)):
        for group in result['groups'][:CLASSES]:
            line, = left.plot(group['levels'], group['probability'], label=group['name'])
            if 0 < group['limit'] < np.inf:
                left.axvline(group['limit'], color=line.get_color(), linestyle=':')
            if 'spread' in group:
                left.fill_between(group['levels'], *group['spread'], color=line.get_color(), alpha=0.2, linewidth=0)
            right.plot(group['levels'], group['area'], color=line.get_color(), label=group['name'])
        left.axhline(result['threshold'], color='grey', linestyle='--', label='threshold')
        left.set(xscale='log', xlabel='sigma', ylabel='mean P(clean) of the imperfect images', ylim=(0, 0.6))
        right.set(xscale='log', xlabel='sigma', ylabel='area under the ROC curve', ylim=(0.4, 1.02))
        for axis in (left, right):
            axis.legend(fontsize='small')


def draw_examples(path: str, sets: Sets, limits: np.ndarray, seed: int = 0) -> None:
    """Writes a sheet: clean and imperfect images, and both with noise at the limits of the imperfect ones.

    limits: of the imperfect images, [N]; those with one come first. With noise, images are shown times 1 / (1 + sigma)."""
    rows = np.argsort(~((limits > 0) & np.isfinite(limits)), kind='stable')
    rows = rows[:max(int(((limits > 0) & np.isfinite(limits)).sum()), 1)]
    rows = rows[np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).round().astype(int)]
    others = np.linspace(0, len(sets.clean) - 1, len(rows)).round().astype(int)
    sigma = torch.from_numpy(np.where(np.isfinite(limits), limits, 0)[rows]).float()[:, None, None, None]
    clean, data = images_of(sets.clean, others), images_of(sets.data, rows)
    noise = torch.randn(data.shape, generator=misc.generator(seed, 'annotate', 'examples'))
    noisy = [(images + sigma * noise) / (1 + sigma) for images in (clean, data)]
    notes = [_level(limit) for limit in limits[rows]]
    cells = lambda images, notes: [('image.npy', _as_npy(image), note) for image, note in zip(images, notes)]
    blank = [''] * len(rows)
    sheet.draw(path, 'Images without noise, and with noise at their limits',
               [('clean', cells(clean, blank)), ('imperfect', cells(data, notes)), ('clean, noisy', cells(noisy[0], blank)),
                ('imperfect, noisy', cells(noisy[1], notes))])


def _as_npy(image):
    file = io.BytesIO()
    np.save(file, (image.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).numpy())
    return file.getvalue()


def quantiles(values: np.ndarray, shares: Sequence[float] = (0.1, 0.9)) -> list[list[float]]:
    """Quantiles over the rows of [N, L], for the band of a figure."""
    return np.quantile(values, shares, axis=0).tolist()
