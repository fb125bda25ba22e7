# SPDX-License-Identifier: Apache-2.0
"""Noise-level distributions p(sigma): pairs of cdf and inverse cdf, on tensors of any float type and device.

sigma is the standard deviation of the diffusion noise in network units (images in [-1,1])."""

import math

import torch

TINY = 2.0 ** -54  # what stands for a uniform of exactly 0, so that no draw is minus infinity


def normal_cdf(z):
    """Phi(z) with full relative precision in the lower tail (torch.special.ndtr underflows there)."""
    return 0.5 * torch.special.erfc(z * -math.sqrt(0.5))


class NoiseDistribution:
    """A law p(sigma). A piece needs cdf and icdf; sf and isf are worth giving where 1 - cdf would lose the upper tail.

    All methods take and return tensors of any shape, elementwise, in the dtype and on the device of the input."""

    def cdf(self, sigma):
        """P(level <= sigma)."""
        raise NotImplementedError

    def icdf(self, u):
        """The smallest sigma with cdf(sigma) >= u, for u in (0, 1)."""
        raise NotImplementedError

    def sf(self, sigma):
        """P(level > sigma), the survival function."""
        return 1 - self.cdf(sigma)

    def isf(self, q):
        """The level that is exceeded with probability q."""
        return self.icdf(1 - q)

    def next_above(self, sigma):
        """The smallest possible level above sigma."""
        return torch.nextafter(sigma, torch.full_like(sigma, math.inf))

    def above(self, sigma_n, u):
        """p(sigma | sigma > sigma_n) by inverse cdf: uniforms u in (0, 1) -> levels above sigma_n, where sf(sigma_n) > 0.

        The survival function carries the truncation: it keeps its relative precision where the cdf has rounded to 1."""
        return torch.maximum(self.isf(self.sf(sigma_n) * u), self.next_above(sigma_n))

    def below(self, sigma, u):
        """p(sigma' | sigma' < sigma) by inverse cdf: uniforms u in (0, 1) -> levels up to sigma; sigma where nothing is below."""
        limit = torch.nextafter(sigma, torch.zeros_like(sigma))
        return torch.minimum(self.icdf(self.cdf(limit) * u), sigma)

    def sample(self, n, generator):
        """n levels, float64 on the generator's device."""
        return self.icdf(_uniform(n, generator))

    def sample_above(self, sigma_n, generator):
        """One level strictly above each entry of sigma_n, float64."""
        sigma_n = sigma_n.to(generator.device, torch.float64)
        return self.above(sigma_n, _uniform(sigma_n.shape, generator))


def _uniform(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).clamp(min=TINY)


class LogNormal(NoiseDistribution):
    """ln sigma ~ N(mean, std^2), EDM's law (Karras et al. 2022, table 1)."""

    def __init__(self, mean=-1.2, std=1.2):
        _require(math.isfinite(mean), f'mean={mean} must be finite')
        _require(0 < std < math.inf, f'std={std} must be positive')
        self.mean, self.std = mean, std

    def cdf(self, sigma):
        return normal_cdf((sigma.log() - self.mean) / self.std)

    def icdf(self, u):
        return (torch.special.ndtri(u) * self.std + self.mean).exp()

    def sf(self, sigma):
        return normal_cdf((self.mean - sigma.log()) / self.std)

    def isf(self, q):
        return (self.mean - torch.special.ndtri(q) * self.std).exp()


class LogUniform(NoiseDistribution):
    """ln sigma uniform between ln min and ln max, the VE law."""

    def __init__(self, min=0.02, max=100.0):
        _require(0 < min < max < math.inf, f'min={min},max={max} must satisfy 0 < min < max')
        self.min, self.max = min, max

    def cdf(self, sigma):
        return ((sigma / self.min).log() / math.log(self.max / self.min)).clamp(0, 1)

    def icdf(self, u):
        return (self.min * (u * math.log(self.max / self.min)).exp()).clamp(self.min, self.max)


class VPUniform(NoiseDistribution):
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1) with t uniform between eps_t and 1, the VP law."""

    def __init__(self, beta_d=19.9, beta_min=0.1, eps_t=1e-5):
        _require(0 < beta_d < math.inf, f'beta_d={beta_d} must be positive')
        _require(0 <= beta_min < math.inf, f'beta_min={beta_min} must not be negative')
        _require(0 <= eps_t < 1, f'eps_t={eps_t} must be in [0, 1)')
        self.beta_d, self.beta_min, self.eps_t = beta_d, beta_min, eps_t

    def cdf(self, sigma):
        root = (self.beta_min ** 2 + 2 * self.beta_d * sigma.square().log1p()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return ((t - self.eps_t) / (1 - self.eps_t)).clamp(0, 1)

    def icdf(self, u):
        t = self.eps_t + u * (1 - self.eps_t)
        return (t * (self.beta_d / 2 * t + self.beta_min)).expm1().sqrt()


class IDDPMLevels(NoiseDistribution):
    """Uniform over the `steps` noise levels of IDDPM's cosine schedule, in EDM's form (Karras et al. 2022, appendix C.3.4).

    1 + u_j^2 = product over i = j+1 .. steps of 1 / max(abar(i-1) / abar(i), c1), abar(i) = sin^2(pi i / (2 steps (c2 + 1)))."""

    def __init__(self, steps=1000, c1=1e-3, c2=8e-3):
        _require(steps >= 1, f'steps={steps} must be at least 1')
        _require(0 < c1 < 1, f'c1={c1} must be in (0, 1)')
        _require(c2 >= 0, f'c2={c2} must not be negative')
        abar = (torch.arange(steps + 1, dtype=torch.float64) * (math.pi / 2 / steps / (c2 + 1))).sin().square()
        growth = -(abar[:-1] / abar[1:]).clamp(min=c1).log()
        self.levels = growth.flip(0).cumsum(0).expm1().sqrt()  # [steps], ascending: u_{steps-1} .. u_0
        self._copies = {}

    def cdf(self, sigma):
        return self._count(sigma).to(sigma.dtype) / len(self.levels)

    def icdf(self, u):
        # The steps of the cdf in the dtype of u, so that icdf(cdf(level)) is the level itself.
        heights = torch.arange(1, len(self.levels) + 1, dtype=u.dtype, device=u.device) / len(self.levels)
        return self._level(torch.searchsorted(heights, u.contiguous()), u)

    def next_above(self, sigma):
        return self._level(self._count(sigma), sigma)

    def _count(self, sigma):
        """How many levels are at or below sigma."""
        return torch.searchsorted(self._levels(sigma), sigma.contiguous(), right=True)

    def _level(self, place, like):
        return self._levels(like)[place.clamp(max=len(self.levels) - 1)]

    def _levels(self, like):
        """The levels in the dtype and on the device of `like`; kept, because a copy to the device waits for it."""
        key = like.dtype, like.device
        if key not in self._copies:
            self._copies[key] = self.levels.to(like)
        return self._copies[key]


def _require(holds, text):
    if not holds:
        raise ValueError(text)


NOISE = {'iddpm_levels': IDDPMLevels, 'lognormal': LogNormal, 'loguniform': LogUniform, 'vp_uniform': VPUniform}
