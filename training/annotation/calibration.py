# SPDX-License-Identifier: Apache-2.0
"""Scores of a classifier on images that it was not trained on -> probabilities, the area under the ROC curve, and calibration errors."""

import numpy as np
import scipy.special
import scipy.stats

STEPS, RIDGE = 30, 1e-3  # of Newton's method, and the penalty on the slope that keeps it finite for separable scores
BINS = 10


def calibrate(clean: np.ndarray, data: np.ndarray) -> np.ndarray:
    """(slope, offset) [2, L] of P(clean) = sigmoid(slope s + offset) for scores s of clean images [N, L] and of others [M, L, ...].

    Logistic regression on held-out scores, level by level, both kinds with the same total weight (Platt 1999): a classifier that has
    learnt its images by heart is sure of itself, and this takes it back. A slope below 0, which is chance, becomes 0."""
    data = data.reshape(*data.shape[:2], -1)
    scores = [clean.astype(np.float64), data.transpose(0, 2, 1).reshape(-1, data.shape[1]).astype(np.float64)]
    scale = np.sqrt(np.mean([np.square(part).mean(0) for part in scores], axis=0)) + 1e-12
    s = np.concatenate(scores) / scale
    target = np.concatenate([np.ones(len(scores[0])), np.zeros(len(scores[1]))])[:, None]
    weight = np.concatenate([np.full(len(part), 0.5 / len(part)) for part in scores])[:, None]
    slope, offset = np.zeros(s.shape[1]), np.zeros(s.shape[1])
    for _ in range(STEPS):
        p = scipy.special.expit(slope * s + offset)
        error, curvature = weight * (p - target), weight * p * (1 - p)
        g, h = (error * s).sum(0) + RIDGE * slope, error.sum(0)
        aa, ab, bb = (curvature * s * s).sum(0) + RIDGE, (curvature * s).sum(0), curvature.sum(0) + 1e-9
        determinant = aa * bb - ab ** 2
        slope, offset = slope - (bb * g - ab * h) / determinant, offset - (aa * h - ab * g) / determinant
    chance = slope <= 0
    return np.stack([np.where(chance, 0, slope / scale), np.where(chance, 0, offset)])


def probabilities(scores: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """P(clean) of scores [N, L, draws] -> [N, L], the mean over the draws of the noise. fitted: of calibrate()."""
    slope, offset = fitted[:, :, None]
    return scipy.special.expit(slope * scores + offset).mean(2)


def area(clean: np.ndarray, data: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of scores of clean images [N, L] against others [M, L]: P(clean score > other), ties half; [L]."""
    ranks = scipy.stats.rankdata(np.concatenate([clean, data]), axis=0)[:len(clean)]
    return (ranks.mean(0) - (len(clean) + 1) / 2) / len(data)


def calibration_error(clean: np.ndarray, data: np.ndarray) -> float:
    """Mean distance between P(clean) [N, L], [M, L] and the share of clean images among those with such a P, in BINS bins; both kinds with
    the same total weight."""
    values = [np.ravel(clean), np.ravel(data)]
    edges = np.linspace(0, 1, BINS + 1)
    mass, told = ([np.histogram(part, edges, weights=w * np.full(part.size, 0.5 / part.size))[0] for part, w in zip(values, weights)]
                  for weights in ((1, 1), values))
    return float(np.abs(told[0] + told[1] - mass[0]).sum())
