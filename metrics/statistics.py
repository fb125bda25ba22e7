# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of features, gathered batch by batch and rank by rank in float64, and the .npz files that hold them."""

import dataclasses
import math
import os
import tokenize
import zipfile

import numpy as np
import torch

from dnnlib import UserError, one_line, replacing
from dnnlib.archive import DAMAGE
from torch_utils import distributed


@dataclasses.dataclass(frozen=True)
class Statistics:
    """mean [D] and unbiased covariance cov [D,D], float64, and what is known of where they come from (None where it is not)."""

    mean: np.ndarray
    cov: np.ndarray
    num_images: int | None = None
    detector: str | None = None
    detector_sha256: str | None = None
    source: str | None = None
    split: str | None = None
    shape: tuple | None = None  # (C, H, W) of the images
    features: np.ndarray | None = dataclasses.field(default=None, repr=False)  # float32 [N,D], where they were kept
    spatial_mean: np.ndarray | None = dataclasses.field(default=None, repr=False)  # of sFID's features: [2023],
    spatial_cov: np.ndarray | None = dataclasses.field(default=None, repr=False)   # [2023,2023], float64


class Moments:
    """Running count, mean and scatter sum (x - mean)(x - mean)^T of the features seen so far.

    Deviations are taken from a mean at once (Chan, Golub and LeVeque 1979), never as a difference of large sums, so that the
    covariance of few samples in many dimensions keeps its exact rank to rounding."""

    def __init__(self, dim, device='cpu'):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        """Takes in features [n,D] of any float dtype."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f'features of shape {list(features.shape)}, expected [n, {len(self.mean)}]')
        if not len(features):
            return
        part = Moments.__new__(Moments)
        features = features.to(self.mean)
        part.count, part.mean = len(features), features.mean(0)
        centred = features - part.mean
        part.scatter = centred.T @ centred
        self.merge(part)

    def merge(self, other):
        """Takes in all that another Moments has seen."""
        total = self.count + other.count
        if not total:
            return
        step = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(step, step, alpha=self.count * other.count / total)
        self.mean += step * (other.count / total)
        self.count = total

    def all_reduce(self):
        """Merges the ranks, in place: afterwards every rank holds the moments of all features. Call it once."""
        device = distributed.device()
        own, mean = self.count, self.mean.to(device)
        self.count = int(distributed.all_sum(torch.tensor(own, device=device)))
        if self.count == own and distributed.size() == 1:
            return
        overall = distributed.all_sum(mean * (own / max(self.count, 1)))
        step = mean - overall
        scatter = distributed.all_sum(self.scatter.to(device).addr(step, step, alpha=own))
        self.mean, self.scatter = overall.to(self.mean), scatter.to(self.scatter)

    def covariance(self):
        """Unbiased covariance [D,D], float64; zero for a single sample."""
        return self.scatter / max(self.count - 1, 1)

    def statistics(self, **facts):
        """The Statistics of what was seen; facts: its further fields."""
        return Statistics(self.mean.cpu().numpy(), self.covariance().cpu().numpy(), num_images=self.count, **facts)


def save_statistics(stats, path):
    """Writes `mu` and `sigma` under their published names, the facts that are known, and kept features, to an .npz file."""
    facts = {name: getattr(stats, name) for name in FACTS}
    known = {name: np.array(value) for name, value in facts.items() if value is not None}
    with replacing(path) as part, open(part, 'wb') as f:
        spatial = {} if stats.spatial_mean is None else {'mu_s': stats.spatial_mean, 'sigma_s': stats.spatial_cov}
        np.savez(f, mu=stats.mean, sigma=stats.cov, **spatial, **known)


def load_statistics(path, name=None, features=True):
    """Reads an .npz of statistics, ours or a published one (`mu`, `sigma` alone).

    name: what errors call the file. features: whether to read them too, where they were kept; they may be many.
    Raises UserError where it is no such file."""
    name = name or path
    found = _read_arrays(path, name, {'mu', 'sigma', 'mu_s', 'sigma_s', *FACTS} - (set() if features else {'features'}))
    if not {'mu', 'sigma'} <= found.keys():
        raise UserError(f'{name}: has no mu and sigma; images go with --ref-path, statistics are made by "ref"')
    for key, value in found.items():
        kinds, what = KINDS.get(key, ('U', 'text'))
        if value.dtype.kind not in kinds or value.ndim != DIMS.get(key, 0):
            raise UserError(f'{name}: "{key}" must be {what}, got {value.dtype} {list(value.shape)}')
    mean, cov = _pop_gaussian(found, 'mu', 'sigma', name)
    spatial_mean, spatial_cov = _pop_gaussian(found, 'mu_s', 'sigma_s', name) if {'mu_s', 'sigma_s'} <= found.keys() else (None, None)
    found.pop('mu_s', None), found.pop('sigma_s', None)
    rows = found.pop('features', None)
    if rows is not None and rows.shape[1] != len(mean):
        raise UserError(f'{name}: features {list(rows.shape)} and mu {list(mean.shape)} do not fit together')
    facts = {key: value.tolist() for key, value in found.items()} | {'features': rows}
    if 'shape' in facts:
        facts['shape'] = tuple(facts['shape'])
    return Statistics(mean, cov, **facts, spatial_mean=spatial_mean, spatial_cov=spatial_cov)


def _pop_gaussian(found, mu, sigma, name):
    """Takes mean [D] and covariance [D,D] out of the arrays found, in float64, and checks them."""
    mean, cov = (np.asarray(found.pop(key), dtype=np.float64) for key in (mu, sigma))
    if not len(mean) or cov.shape != (len(mean), len(mean)):
        raise UserError(f'{name}: {mu} {list(mean.shape)} and {sigma} {list(cov.shape)} do not fit together')
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(f'{name}: {mu} or {sigma} is not finite')
    return mean, cov


def _read_arrays(path, name, keys):
    """{key: array} of those of the keys that are there; published files may hold more."""
    if not os.path.isfile(path):
        raise UserError(f'{name}: no such file')
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix('.npy'): info for info in archive.infolist() if info.filename.endswith('.npy')}
            return {key: _read_array(archive, info) for key, info in members.items() if key in keys}
    except (*DAMAGE, TypeError, AttributeError, LookupError, OverflowError, RecursionError, RuntimeError, tokenize.TokenError) as err:
        raise UserError(f'{name}: not a readable .npz of statistics ({one_line(err)})') from None


def _read_array(archive, info):
    """The array of a member. Raises ValueError, before memory is taken, where it claims to be larger than what it is read from."""
    if info.file_size > MOST_DEFLATED * info.compress_size + 2 ** 26:
        raise ValueError(f'{info.filename} claims to be {info.file_size} bytes, packed in {info.compress_size}')
    with archive.open(info) as f:
        version = np.lib.format.read_magic(f)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(f)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=1) < 0 or size != info.file_size - f.tell():
            raise ValueError(f'{info.filename} claims {dtype} {list(shape)} and has {info.file_size - f.tell()} bytes')
        values = np.frombuffer(f.read(), dtype).copy()  # writable
    return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


MOST_DEFLATED = 100  # bytes that one byte of a large compressed member may stand for; of real statistics it is less than 2
NUMBERS = 'fiu', 'an array of numbers'
KINDS = {**dict.fromkeys(['mu', 'sigma', 'mu_s', 'sigma_s', 'features'], NUMBERS), 'num_images': ('iu', 'a whole number'),
         'shape': ('iu', 'three whole numbers')}
DIMS = {'mu': 1, 'sigma': 2, 'mu_s': 1, 'sigma_s': 2, 'features': 2, 'shape': 1}  # of those that are not single values
FACTS = tuple(field.name for field in dataclasses.fields(Statistics)[2:] if not field.name.startswith('spatial_'))
