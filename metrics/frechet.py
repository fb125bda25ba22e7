# SPDX-License-Identifier: Apache-2.0
"""Fréchet distance between two Gaussians, exact for covariances of any rank."""

import numpy as np
import scipy.linalg.lapack
import torch

INDEFINITE = 1e-4  # a negative eigenvalue beyond this share of the largest one is not rounding
ACCURACY = 1e-9    # of the overlap, relative to the two traces


def frechet_distance(mu1: torch.Tensor | np.ndarray, cov1: torch.Tensor | np.ndarray, mu2: torch.Tensor | np.ndarray,
                     cov2: torch.Tensor | np.ndarray) -> float:
    """|mu1 - mu2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), in float64.

    mu: [D], cov: [D,D] symmetric positive semi-definite; arrays or tensors. Returns a float, which rounding may make negative for
    equal statistics. With half-factors cov = A A^T the last trace is the sum of the singular values of A1^T A2 (the
    eigenvalues of cov1 cov2 are their squares), so the square root of a nearly singular matrix is never taken.
    Heusel et al. 2017, equation 6. Raises ValueError for other shapes, non-finite or indefinite statistics."""
    mu1, mu2 = (np.asarray(mu, dtype=np.float64) for mu in (mu1, mu2))
    cov1, cov2 = (np.asarray(cov, dtype=np.float64) for cov in (cov1, cov2))
    if mu1.shape != mu2.shape:
        raise ValueError(f'statistics of {mu1.size} and of {mu2.size} dimensions cannot be compared')
    for mu, cov in ((mu1, cov1), (mu2, cov2)):
        if mu.ndim != 1 or cov.shape != (len(mu), len(mu)):
            raise ValueError(f'mean {list(mu.shape)} and covariance {list(cov.shape)} do not fit together')
        if not (np.isfinite(mu).all() and np.isfinite(cov).all()):
            raise ValueError('the statistics are not finite')
    half1, half2 = half_factor(cov1), half_factor(cov2)
    spread = np.trace(cov1) + np.trace(cov2)
    overlap = nuclear_norm(half1.T @ half2, ACCURACY * spread)
    return float(np.square(mu1 - mu2).sum() + spread - 2 * overlap)


def nuclear_norm(matrix: np.ndarray, accuracy: float = 0.0) -> float:
    """Sum of the singular values of a matrix [n,m].

    The square roots of the eigenvalues of its smaller Gram matrix take a quarter of the time of the singular values. Rounding moves an
    eigenvalue w by eps times the largest one, and so its root by eps w_max / (2 sqrt w): where these sum up to more than `accuracy`,
    the singular values are computed after all."""
    if not matrix.size:
        return 0.0
    values = np.linalg.eigvalsh(matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix)
    if values[0] > 0:
        roots = np.sqrt(values)
        if (np.finfo(np.float64).eps * values[-1] / (2 * roots)).sum() <= accuracy:
            return float(roots.sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def half_factor(cov: np.ndarray) -> np.ndarray:
    """A [D,r] with A A^T = cov, r its numerical rank; directions below D eps of the largest are rounding errors, and are left out.

    Pivoted Cholesky, which stops at the rank and takes a fifth of the time of an eigendecomposition; the latter is used if the
    matrix, for example after storage in float32, is not quite semi-definite. Raises ValueError if it is far from that."""
    packed, pivots, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
    factor = np.empty((len(cov), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor if _reproduces(factor, cov) else _eigen_factor(cov)


def _reproduces(factor, cov):
    """Whether factor factor^T = cov to rounding, tested on a few fixed vectors."""
    probes = np.random.default_rng(0).standard_normal((len(cov), 4))
    rounding = 100 * len(cov) * np.finfo(np.float64).eps * np.abs(cov).max(initial=0) * np.sqrt(len(cov))
    return np.abs(factor @ (factor.T @ probes) - cov @ probes).max(initial=0) <= rounding


def _eigen_factor(cov):
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    if values[0] < -INDEFINITE * abs(values[-1]) or np.abs(cov - cov.T).max() > INDEFINITE * np.abs(values).max():
        raise ValueError('not a covariance: it is not symmetric, or has negative eigenvalues')
    kept = values > len(cov) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])
