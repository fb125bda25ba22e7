# SPDX-License-Identifier: Apache-2.0
"""Describes a data set in lines of text: count, shape, range, sigma_data, classes, noise levels, duplicate images.

Each image is measured by the code that has its pixels anyway; a Summary combines the measurements, so that a data set is read once."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from dnnlib.cpus import cpu_count
from dnnlib.progress import Progress
from training.data import tables
from training.data.dataset import UNITS_8BIT, ImageDataset
from training.data.latents import Latents
from training.data.limits import usable_levels
from training.diffusion.ambient import snr_db
from training.estimation.stabilise import of_units

CHUNK = 256  # images per task of a thread
DIGEST = 8  # bytes of an image's digest; among 1.28 million different images, two share one with probability 1 in 20 million
BARS = 20  # classes, at most, that are shown one by one
WIDTH = 40  # characters of the longest bar


class Measured(NamedTuple):
    """One image: least, largest, mean and variance of each channel, float64 [4,C], as stored; a digest of its pixels."""

    rows: np.ndarray
    digest: bytes


def measure(image: np.ndarray, distribution: bool = False) -> Measured:
    """The Measured of an image [C,H,W]; distribution: of the samples of a distribution of latents [2C,H,W], with the range of its means."""
    whole = np.ascontiguousarray(image).reshape(len(image), -1)
    flat, stds = np.split(whole, 2) if distribution else (whole, None)
    values = flat.astype(np.float64)
    mean = values.mean(1)
    values -= mean[:, None]
    variance = np.einsum('ij,ij->i', values, values) / values.shape[1]  # ten times as fast as var() on 256x256
    variance = variance if stds is None else variance + np.square(stds, dtype=np.float64).mean(1)
    return Measured(np.stack([flat.min(1), flat.max(1), mean, variance]), hashlib.sha256(whole).digest()[:DIGEST])


class Summary:
    """Statistics of images of one size, per channel as stored: low, high, mean, std; and duplicates."""

    def __init__(self):
        self.count, self.low, self.high, self.mean = 0, math.inf, -math.inf, 0.0
        # squares: the sum of the images' variances and of the squared differences of their means
        self._squares, self._digests = 0.0, bytearray()

    def add(self, image: Measured) -> None:
        """Adds the Measured of an image."""
        low, high, mean, variance = image.rows
        self._take(low, high, mean, variance, 1, image.digest)

    def merge(self, other):
        """Adds the images of another Summary, which follow those of this one."""
        self._take(other.low, other.high, other.mean, other._squares, other.count, other._digests)

    def _take(self, low, high, mean, squares, count, digests):
        total = self.count + count
        if total:
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
            apart = mean - self.mean
            self._squares = self._squares + squares + np.square(apart) * (self.count * count / total)
            self.mean = self.mean + apart * (count / total)
        self.count = total
        self._digests += digests

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the values of each channel around their mean."""
        return np.sqrt(self._squares / max(self.count, 1))

    def alike(self) -> tuple[int, tuple[int, int] | None]:
        """(number of images with the pixels of an earlier one, (indices of two equal images)); (0, None) if all differ."""
        digests = np.frombuffer(bytes(self._digests), np.uint64)
        order = np.argsort(digests, kind='stable')
        same = np.flatnonzero(digests[order][1:] == digests[order][:-1])
        if not len(same):
            return 0, None
        first = min(same, key=lambda i: order[i])
        return len(same), (int(order[first]), int(order[first + 1]))


class Facts(NamedTuple):
    """The annotations of N images in dataset.json, in network units, and the format of the images."""

    names: list
    shape: tuple
    is_float: bool
    units: dict | None
    labels: np.ndarray | None  # int64 [N], or float32 [N,D]
    label_dim: int
    sigmas: np.ndarray
    sigma_min: np.ndarray  # 0 without a limit
    sigma_max: np.ndarray  # infinite without a limit
    class_names: dict | None = None  # {class: name}
    latents: Latents | None = None  # where the images are latents
    text: dict | None = None  # record of labels that were made of captions


def facts_of(meta: dict, names: Sequence[str], shape: Sequence[int], is_float: bool, class_names: dict | None = None) -> Facts:
    """The Facts of the images `names` from a dataset.json. Raises ValueError if it is not valid."""
    scale = tables.level_scale(meta['units'] if is_float else None)
    values = lambda key: tables.by_file(meta[key], names) if meta.get(key) else None
    told = {'labels': values('labels'), **{key: values(key) for key in ('sigmas', 'sigma_min', 'sigma_max')}}
    zero = np.zeros(len(names))
    labels = None if told['labels'] is None else tables.labels(told['labels'])
    return Facts(names, shape, is_float, meta.get('units'), labels, _label_dim(labels),
                 zero if told['sigmas'] is None else tables.levels(told['sigmas'], names, scale),
                 zero if told['sigma_min'] is None else tables.lower_limits(told['sigma_min'], names, scale),
                 zero + math.inf if told['sigma_max'] is None else tables.limits(told['sigma_max'], names, scale), class_names,
                 text=meta.get('text'))


def facts_of_dataset(dataset: ImageDataset) -> Facts:
    """The Facts of an ImageDataset."""
    return Facts([dataset.image_name(i) for i in dataset.raw_idx], dataset.image_shape, dataset.is_float, dataset.units,
                 dataset.label_table, dataset.label_dim, dataset.native_sigma, dataset.sigma_min, dataset.sigma_max,
                 latents=dataset.latents, text=dataset.text)


def _label_dim(labels):
    return 0 if labels is None else int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]


def describe(path: str, sigma: float | None = None) -> Iterable[str]:
    """Lines of text about a zip or folder; sigma: noise level in network units to give the SNR of."""
    dataset = ImageDataset(path)
    if dataset.has_labels:
        dataset = ImageDataset(path, use_labels=True)
    yield from lines(summarise(dataset), facts_of_dataset(dataset), sigma)


def summarise(dataset: ImageDataset) -> Summary:
    """The Summary of an ImageDataset, whose images are decoded in threads, each once."""
    def of_chunk(start):
        found = Summary()
        for raw_idx in dataset.raw_idx[start:start + CHUNK]:
            found.add(measure(dataset.decode(raw_idx), dataset.stored_shape != dataset.image_shape))
        return found

    total = Summary()
    with ThreadPoolExecutor(cpu_count()) as pool, Progress(len(dataset), 'Reading') as bar:
        for part in pool.map(of_chunk, range(0, len(dataset), CHUNK)):
            total.merge(part)
            bar.update(part.count)
    return total


def lines(summary: Summary, facts: Facts, sigma: float | None = None) -> Iterator[str]:
    """The table: lines of text. sigma: as for describe()."""
    units = facts.units if facts.is_float and facts.units else UNITS_8BIT
    offset, scale = (np.ravel(units[key]) for key in ('offset', 'scale'))  # of all channels, or of each
    means, stds = (summary.mean - offset) / scale, summary.std / scale
    std = math.sqrt(np.mean(np.square(stds)) + np.var(means))
    low, high = summary.low.min(), summary.high.max()
    yield f'images      {summary.count}'
    yield from _duplicate_lines(summary, facts)
    yield f'shape       {" x ".join(map(str, facts.shape))} (channels x height x width)'
    if facts.latents:
        yield f'latents     {facts.latents.words()}'
    told = [tables.shown_all(units[key]) for key in ('offset', 'scale')]
    yield f'dtype       {"float32" if facts.is_float else "uint8"}, network = (stored - {told[0]}) / {told[1]}'
    if stabiliser := of_units(facts.units if facts.is_float else None):
        clean = stabiliser.inverse(np.array([low, high])).round(3)
        yield f'stabilised  {stabiliser.words()}; noise of std 1, which is {1 / tables.level_scale(units):.4g} in network units'
        yield f'            stored values stand for {clean[0]:.4g} to {clean[1]:.4g} before the transform'
    yield (f'range       {low:g} to {high:g} stored, {((summary.low - offset) / scale).min():.4g} to '
           f'{((summary.high - offset) / scale).max():.4g} in network units')
    yield f'mean        {means.mean():.4f} in network units'
    yield f'sigma_data  {std:.4f} (std of all values around their common mean, in network units)'
    native = facts.sigmas
    if native.any():
        std = math.sqrt(max(std ** 2 - np.square(native).mean(), 0))
        yield f'            {std:.4f} without the noise that the images carry'
    if std >= 0.005 and f'{std:.2f}' != '0.50':
        yield f'            train.py --precond=edm --sigma-data={std:.2f}, where 0.50 is the default'
    if native.any():
        yield (f'sigmas      {np.count_nonzero(native)} of {len(native)} images are noisy; min {native.min():.4g}, '
               f'median {np.median(native):.4g}, mean {native.mean():.4g}, max {native.max():.4g} in network units')
    else:
        yield 'sigmas      none: all images count as clean'
    yield from _limit_lines(facts)
    yield from _label_lines(facts)
    if sigma is not None:
        yield (f'SNR at sigma {sigma:g}:  {snr_db(sigma):.2f} dB as 10 log10(1 + 1/sigma^2),  '
               f'{snr_db(sigma, max(std, 1e-12)):.2f} dB as 10 log10(sigma_data^2 / sigma^2)')


def _duplicate_lines(summary, facts):
    count, pair = summary.alike()
    if count:
        yield f'duplicates  {count} images have the same pixels as another one, such as {facts.names[pair[1]]} and {facts.names[pair[0]]}'
    else:
        yield 'duplicates  none'


def _limit_lines(facts):
    for key, values, which, told in (('sigma_min', facts.sigma_min, 'a lower', facts.sigma_min > 0),
                                     ('sigma_max', facts.sigma_max, 'an upper', np.isfinite(facts.sigma_max))):
        values = values[told]
        if len(values):
            yield (f'{key}   {len(values)} of {len(told)} images have {which} limit; min {values.min():.4g}, '
                   f'median {np.median(values):.4g}, mean {values.mean():.4g}, max {values.max():.4g} in network units')
    idle = int(usable_levels(facts.sigmas, 1, facts.sigma_min, facts.sigma_max).empty().sum())
    if idle:
        yield f'            {idle} of them can never be used: no level is above their noise and within their limits'


def _label_lines(facts):
    if facts.labels is None:
        yield 'labels      none'
        return
    if facts.labels.ndim == 2:
        of_captions = f', of captions by {facts.text["encoder"]}' if facts.text else ''
        yield f'labels      vectors of length {facts.label_dim}{of_captions}'
        return
    counts = np.bincount(facts.labels, minlength=facts.label_dim)
    yield f'labels      {len(counts)} classes, {counts.min()} to {counts.max()} images each, median {np.median(counts):g}'
    names = [f'{number} {(facts.class_names or {}).get(number, "")}'.strip()[:30] for number in range(len(counts))]
    if len(counts) > BARS:
        order = np.argsort(-counts, kind='stable')
        for word, some in (('most', order[:5]), ('least', order[-5:])):
            yield f'            {word:5} ' + ', '.join(f'{names[i]}: {counts[i]}' for i in some)
        return
    width, digits = max(map(len, names)), len(str(counts.max()))
    for name, count in zip(names, counts):
        yield f'            {name:{width}}  {count:{digits}}  {"#" * max(round(WIDTH * count / counts.max()), int(count > 0))}'
