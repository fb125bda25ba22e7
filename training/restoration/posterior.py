# SPDX-License-Identifier: Apache-2.0
"""Estimates of clean images from noisy ones by a network: E[x_0 | y] in one evaluation, or the mean and spread of posterior samples.

Every draw belongs to (seed, index of the image, number of the sample), so that results do not depend on batches or ranks."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from torch_utils import misc
from training.restoration.tiles import TiledDenoiser
from training.sampling import steppers
from training.sampling.generate import network_device, resolution
from training.sampling.restore import posterior_mean, restore


class Noisy(NamedTuple):
    """An image to denoise."""

    index: int
    image: torch.Tensor         # [C,H,W] float64, network units
    sigma: float                # above 0, network units
    label: torch.Tensor | None  # [label_dim], None for no label


class Estimate(NamedTuple):
    """What is found of an image, float32 in network units."""

    index: int
    mean: np.ndarray                   # [C,H,W]
    std: np.ndarray | None = None      # [C,H,W], with K - 1; None with fewer than 2 samples
    samples: np.ndarray | None = None  # [K,C,H,W], if they are kept
    noise: float | None = None         # rms(y - sample) / sigma: 1 where the stated level is right
    apart: float | None = None         # rms(mean - E[x_0 | y]) / rms(std / sqrt(K)): 1 where the levels of the network agree


class Method(NamedTuple):
    """How images are denoised. samples: 0 for E[x_0 | y] in one evaluation. overlap: of tiles, in pixels. batch: rows at a time."""

    samples: int = 0
    steps: int = 18
    seed: int = 0
    overlap: int = 0
    batch: int = 64
    keep: bool = False


class KeyedDraws:
    """randn_like(x), whose row i comes from a generator of its own, keyed by (seed, keys[i])."""

    def __init__(self, seed: int, keys: Sequence[tuple[int, int]], device: torch.device | str) -> None:
        self.generators = [misc.generator(seed, 'denoise', *key, device=device) for key in keys]

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal of x's shape and dtype."""
        return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=x.device) for g in self.generators])


def rows_of(net: Callable, shape: Sequence[int], batch: int) -> int:
    """Images [C,H,W] that are held at a time: `batch` of the network's own size, fewer of larger ones."""
    height, width = resolution(net)
    return max(1, batch * height * width // (shape[1] * shape[2]))


def estimates(net: Callable, images: Sequence[Noisy], method: Method, report: Callable[[float], None] | None = None) -> Iterator[Estimate]:
    """The Estimate of each image, in order. net: a denoiser in eval mode. images: of one shape, at least as large as the network's.

    report: called with the number of images' worth of work after each call of the sampler."""
    if not images:
        return
    batch = rows_of(net, images[0].image.shape, method.batch)
    for first in range(0, len(images), batch):
        part = images[first:first + batch]
        denoiser, y, sigma, labels, rows = _prepared(net, part, method, batch)
        means = posterior_mean(denoiser, y, sigma, labels, rows).cpu()
        if method.samples:
            yield from _sampled(net, part, means, method, batch, report)
            continue
        if report:
            report(len(part))
        for one, mean in zip(part, means):
            yield Estimate(one.index, mean.float().numpy())


def _prepared(net, images, method, batch):
    """(denoiser, y, sigma_n, labels, rows of an evaluation) on the network's device."""
    device = network_device(net)
    y = torch.stack([one.image for one in images]).to(device)
    sigma = torch.tensor([one.sigma for one in images], dtype=torch.float64, device=device)
    labels = None if images[0].label is None else torch.stack([one.label for one in images]).to(device)
    rows = lambda most: misc.rows_per_call(net, net.img_resolution, device, most)
    if list(y.shape[2:]) != resolution(net):
        return TiledDenoiser(net, method.overlap, rows(method.batch)), y, sigma, labels, 1
    return net, y, sigma, labels, rows(min(batch, len(images)))


def _sampled(net, images, means, method, batch, report):
    """Yields the Estimate of each image from posterior samples. means: E[x_0 | y], float64 [N,C,H,W]."""
    pairs = [(place, number) for place in range(len(images)) for number in range(method.samples)]
    for first in range(0, len(pairs), batch):
        part = pairs[first:first + batch]
        chosen = [images[place] for place, _ in part]
        denoiser, y, sigma, labels, rows = _prepared(net, chosen, method, batch)
        draws = KeyedDraws(method.seed, [(images[place].index, number) for place, number in part], y.device)
        found = restore(denoiser, y, sigma, stepper=steppers.dpmpp_2m_sde, num_steps=method.steps, randn_like=draws.randn_like,
                        labels=labels, rows=rows).cpu()
        for (place, number), x in zip(part, found):
            if not number:
                moments = Moments(images[place], method.keep)
            moments.add(x)
            if number == method.samples - 1:
                yield moments.estimate(means[place])
        if report:
            report(len(part) / method.samples)


class Moments:
    """Mean and variance of the samples of an image, taken one by one in their order (Welford 1962)."""

    def __init__(self, one: Noisy, keep: bool) -> None:
        self.one, self.kept, self.count = one, [] if keep else None, 0
        self.mean, self.squares, self.residual = torch.zeros_like(one.image), torch.zeros_like(one.image), 0.0

    def add(self, x: torch.Tensor) -> None:
        """Takes a sample, float64 [C,H,W]."""
        self.count += 1
        away = x - self.mean
        self.mean = self.mean + away / self.count
        self.squares = self.squares + away * (x - self.mean)
        self.residual += float((self.one.image - x).square().mean())
        if self.kept is not None:
            self.kept.append(x.float())

    def estimate(self, posterior: torch.Tensor) -> Estimate:
        """The Estimate. posterior: E[x_0 | y] in one evaluation, [C,H,W]."""
        noise = math.sqrt(self.residual / self.count) / self.one.sigma
        samples = torch.stack(self.kept).numpy() if self.kept else None
        if self.count < 2:
            return Estimate(self.one.index, self.mean.float().numpy(), None, samples, noise)
        variance = self.squares / (self.count - 1)
        expected = float(variance.mean()) / self.count
        apart = math.sqrt(float((self.mean - posterior).square().mean()) / expected) if expected > 0 else None
        return Estimate(self.one.index, self.mean.float().numpy(), variance.sqrt().float().numpy(), samples, noise, apart)
