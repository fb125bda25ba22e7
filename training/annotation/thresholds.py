# SPDX-License-Identifier: Apache-2.0
"""What a mean P(clean) says about two distributions p (clean) and q, and limits of levels from curves over sigma.

E_q[p / (p + q)] = 1/2 - Delta/2, Delta = 1/2 int (p - q)^2 / (p + q), between 0 and the total variation. If ln p/q is N(K, 2K) under p and
N(-K, 2K) under q, as for two Gaussians that differ a little in each of many directions, K is KL(q || p), and the area under the ROC curve
is Phi(sqrt(K))."""

import math

import numpy as np
import scipy.optimize
import scipy.special

NODES = np.polynomial.hermite_e.hermegauss(64)  # Gauss-Hermite: sum of weights * f(nodes) / sqrt(2 pi) = E f(N(0, 1))
LARGEST_KL = 60.0  # beyond, the quadrature no longer resolves the mean, which is below 1e-7


def mean_probability(kl: np.ndarray | float) -> np.ndarray:
    """E_q[p / (p + q)] at KL(q || p) = kl, for a Gaussian log-likelihood ratio; 0.5 at 0, any shape."""
    kl = np.clip(np.asarray(kl, np.float64), 0, LARGEST_KL)[..., None]
    nodes, weights = NODES
    ratio = -kl + np.sqrt(2 * kl) * nodes
    return (scipy.special.expit(ratio) * weights).sum(-1) / math.sqrt(2 * math.pi)


def kl_of_threshold(threshold: float) -> float:
    """The KL divergence in nats per image at which the mean P(clean) is `threshold`, between 0 and 0.5; 0.45 gives 0.22."""
    return float(scipy.optimize.brentq(lambda kl: mean_probability(kl) - threshold, 1e-12, LARGEST_KL))


def area_under_curve(kl: np.ndarray | float) -> np.ndarray:
    """Area under the ROC curve of the likelihood ratio, Phi(sqrt(kl))."""
    return scipy.special.ndtr(np.sqrt(np.maximum(kl, 0)))


def isotonic(values: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence nearest to each row of [N, L] in squares, float64 [N, L].

    Entry k is the maximum over i <= k of the minimum over j >= k of the mean of values i ... j (Barlow et al. 1972)."""
    values = np.asarray(values, np.float64)
    length = values.shape[1]
    first, last = np.triu_indices(length)
    later, earlier = np.tril_indices(length, -1)
    out = np.empty_like(values)
    for start in range(0, len(values), 256):  # [256, L, L] at a time
        part = values[start:start + 256]
        sums = np.concatenate([np.zeros([len(part), 1]), part.cumsum(1)], axis=1)
        means = np.full([len(part), length, length], np.inf)
        means[:, first, last] = (sums[:, last + 1] - sums[:, first]) / (last + 1 - first)
        least = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
        least[:, later, earlier] = -np.inf  # intervals begin at k or before
        out[start:start + 256] = least.max(1)
    return out


def crossing(levels: np.ndarray, values: np.ndarray, threshold: float) -> np.ndarray:
    """The level from which each non-decreasing row of values [N, L] is at or above the threshold, interpolated in ln sigma; [N].

    levels: [L], ascending. 0 for a row that is above everywhere, inf for one that is nowhere: images that are never confused."""
    values = np.asarray(values, np.float64)
    above = values >= threshold
    place = above.argmax(1)  # 0 also where nothing is above
    rows, before = np.arange(len(values)), np.maximum(place - 1, 0)
    low, high = values[rows, before], values[rows, place]
    share = np.where(high > low, (threshold - low) / np.where(high > low, high - low, 1), 1.0)
    logs = np.log(levels)
    found = np.exp(logs[before] + share * (logs[place] - logs[before]))
    return np.where(above[:, 0], 0.0, np.where(above.any(1), found, np.inf))
