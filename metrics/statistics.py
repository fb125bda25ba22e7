# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of features, accumulated over batches and ranks in float64, and their files."""

import dataclasses
import os
from typing import Any

import numpy as np
import torch

from dnnlib import UserError, replacing
from dnnlib.files import json_object
from metrics import reference_files
from torch_utils import distributed


@dataclasses.dataclass(frozen=True)
class Statistics:
    """mean [D] and unbiased covariance cov [D,D], float64, and the facts of how they were made (None if unknown)."""

    mean: np.ndarray
    cov: np.ndarray
    num_images: int | None = None
    detector: str | None = None
    detector_sha256: str | None = None
    source: str | None = None
    split: str | None = None
    shape: tuple | None = None  # (C, H, W) of the images
    features: np.ndarray | None = dataclasses.field(default=None, repr=False)  # float32 [N,D], if they were kept
    device: str | None = None   # name of the GPU that made the features, or "cpu"
    tf32: bool | None = None    # whether TF32 was used there
    versions: str | None = None  # of the program and its libraries, a JSON object
    note: str | None = None     # what the file does not say; not stored in it
    spatial_mean: np.ndarray | None = dataclasses.field(default=None, repr=False)  # of sFID's features: [2023],
    spatial_cov: np.ndarray | None = dataclasses.field(default=None, repr=False)   # [2023,2023], float64


class Moments:
    """Running count, mean and scatter sum (x - mean)(x - mean)^T of the features seen so far.

    Sums of deviations from means are merged (Chan, Golub and LeVeque 1979), instead of taking differences of large sums, so that the
    covariance of few samples in many dimensions keeps its rank up to rounding."""

    def __init__(self, dim: int, device: torch.device | str = 'cpu'):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor) -> None:
        """Adds features [n,D] of any float dtype."""
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

    def merge(self, other: 'Moments') -> None:
        """Adds the features that another Moments has seen."""
        total = self.count + other.count
        if not total:
            return
        step = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter.addr_(step, step, alpha=self.count * other.count / total)
        self.mean += step * (other.count / total)
        self.count = total

    def all_reduce(self) -> None:
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

    def covariance(self) -> torch.Tensor:
        """Unbiased covariance [D,D], float64; zero for a single sample."""
        return self.scatter / max(self.count - 1, 1)

    def statistics(self, **facts: Any) -> Statistics:
        """The Statistics of the features seen so far; facts: further fields."""
        return Statistics(self.mean.cpu().numpy(), self.covariance().cpu().numpy(), num_images=self.count, **facts)


def save_statistics(stats: Statistics, path: str | os.PathLike) -> None:
    """Writes `mu` and `sigma` under their published names, the facts that are known, and kept features, to an .npz file."""
    facts = {name: getattr(stats, name) for name in sorted(FACTS)}
    known = {name: np.array(value) for name, value in facts.items() if value is not None}
    with replacing(path) as part, open(part, 'wb') as f:
        spatial = {} if stats.spatial_mean is None else {'mu_s': stats.spatial_mean, 'sigma_s': stats.spatial_cov}
        np.savez(f, mu=stats.mean, sigma=stats.cov, **spatial, **known)


def load_statistics(path: str | os.PathLike, name: str | None = None, features: bool = True, detector: str = 'inception') -> Statistics:
    """Reads Statistics from a file of this program, or one published or cached by another: see reference_files.

    name: the file's name in errors. features: whether to read them too, if they were kept; they may be large. detector: which
    statistics to read from a file with several. Raises UserError if it is not such a file."""
    name = str(name or path)
    keys = FACTS | {'mu_s', 'sigma_s'}
    found, detector = reference_files.read_arrays(path, name, keys if features else keys - {'features'}, detector)
    for key, value in found.items():
        kinds, what = KINDS.get(key, ('U', 'text'))
        if value.dtype.kind not in kinds or value.ndim != DIMS.get(key, 0):
            raise UserError(f'{name}: "{key}" must be {what}, got {value.dtype} {list(value.shape)}')
    if not {'mu', 'sigma'} <= found.keys() and found.get('features') is not None:
        found |= _moments(found['features'], name)
    if not {'mu', 'sigma'} <= found.keys():
        raise UserError(f'{name}: has no mu and sigma; give images with --ref-path, or make statistics with "ref"')
    mean, cov = _pop_gaussian(found, 'mu', 'sigma', name)
    spatial_mean, spatial_cov = _pop_gaussian(found, 'mu_s', 'sigma_s', name) if {'mu_s', 'sigma_s'} <= found.keys() else (None, None)
    found.pop('mu_s', None), found.pop('sigma_s', None)
    rows = found.pop('features', None)
    if rows is not None and rows.shape[1] != len(mean):
        raise UserError(f'{name}: features {list(rows.shape)} and mu {list(mean.shape)} do not fit together')
    facts = {'detector': detector} | {key: value.tolist() for key, value in found.items()} | {'features': rows if features else None}
    if 'shape' in facts:
        facts['shape'] = tuple(facts['shape'])
    if 'versions' in facts:
        json_object(facts['versions'], f'{name}: "versions"')
    note = None if facts['detector'] else reference_files.unknown_detector(name)
    return Statistics(mean, cov, **facts, spatial_mean=spatial_mean, spatial_cov=spatial_cov, note=note)


def _pop_gaussian(found, mu, sigma, name):
    """Removes mean [D] and covariance [D,D] from the arrays found, and returns them checked and in float64."""
    mean, cov = (np.asarray(found.pop(key), dtype=np.float64) for key in (mu, sigma))
    if not len(mean) or cov.shape != (len(mean), len(mean)):
        raise UserError(f'{name}: {mu} {list(mean.shape)} and {sigma} {list(cov.shape)} do not fit together')
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(f'{name}: {mu} or {sigma} is not finite')
    return mean, cov


def _moments(rows, name):
    """The moments of features [N,D], for files that hold only features."""
    if len(rows) < 2 or not rows.shape[1]:
        raise UserError(f'{name}: features {list(rows.shape)}: statistics need at least 2 images')
    moments = Moments(rows.shape[1])
    for first in range(0, len(rows), CHUNK):
        moments.add(torch.from_numpy(rows[first:first + CHUNK].astype(np.float64)))
    return {'mu': moments.mean.numpy(), 'sigma': moments.covariance().numpy(), 'num_images': np.array(len(rows))}


NUMBERS = 'fiu', 'an array of numbers'
KINDS = {**dict.fromkeys(['mu', 'sigma', 'mu_s', 'sigma_s', 'features'], NUMBERS), 'num_images': ('iu', 'a whole number'),
         'shape': ('iu', 'three whole numbers'), 'tf32': ('b', 'true or false')}
DIMS = {'mu': 1, 'sigma': 2, 'mu_s': 1, 'sigma_s': 2, 'features': 2, 'shape': 1}  # number of axes of arrays; all others are single values
FACTS = {field.name for field in dataclasses.fields(Statistics)[2:] if not field.name.startswith('spatial_')} - {'note'}
CHUNK = 4096  # rows of features summed at a time
