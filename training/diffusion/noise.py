# SPDX-License-Identifier: Apache-2.0
"""Noise-level distributions p(sigma): pairs of cdf and inverse cdf, on tensors of any float type and device.

sigma is the standard deviation of the diffusion noise in network units (images in [-1,1])."""

import math

import torch

from torch_utils import misc

TINY = 2.0 ** -54  # replaces a uniform draw of exactly 0, so that no normal draw is minus infinity


def normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """Phi(z) with full relative precision in the lower tail (torch.special.ndtr underflows there)."""
    return 0.5 * torch.special.erfc(z * -math.sqrt(0.5))


class NoiseDistribution:
    """A distribution p(sigma). A piece defines cdf and icdf, and also sf and isf where 1 - cdf would lose precision in the upper tail.

    stratified: the stream of pairs spreads its uniform draws with stratify(), so that every batch covers the distribution evenly.
    All methods take and return tensors of any shape, elementwise, in the dtype and on the device of the input."""

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        """P(level <= sigma)."""
        raise NotImplementedError

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        """The smallest sigma with cdf(sigma) >= u, for u in (0, 1)."""
        raise NotImplementedError

    def sf(self, sigma: torch.Tensor) -> torch.Tensor:
        """P(level > sigma), the survival function."""
        return 1 - self.cdf(sigma)

    def isf(self, q: torch.Tensor) -> torch.Tensor:
        """The level that is exceeded with probability q."""
        return self.icdf(1 - q)

    def next_above(self, sigma: torch.Tensor) -> torch.Tensor:
        """The smallest possible level above sigma."""
        return torch.nextafter(sigma, torch.full_like(sigma, math.inf))

    def above(self, sigma_n: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """p(sigma | sigma > sigma_n) by inverse cdf: uniforms u in (0, 1) -> levels above sigma_n, where sf(sigma_n) > 0.

        The survival function carries the truncation: it keeps its relative precision where the cdf has rounded to 1."""
        return torch.maximum(self.isf(self.sf(sigma_n) * u), self.next_above(sigma_n))

    def below(self, sigma: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """p(sigma' | sigma' < sigma) by inverse cdf: uniforms u in (0, 1) -> levels up to sigma; sigma where nothing is below."""
        limit = torch.nextafter(sigma, torch.zeros_like(sigma))
        return torch.minimum(self.icdf(self.cdf(limit) * u), sigma)

    def mass(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """P(low < level <= high), 0 where low >= high; computed in the tail with the higher precision."""
        below = self.cdf(high)
        return torch.where(below < 0.5, below - self.cdf(low), self.sf(low) - self.sf(high)).clamp(min=0) * (low < high)

    def between(self, low: torch.Tensor, high: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """p(sigma | low < sigma <= high) by inverse cdf: uniforms u in (0, 1) -> levels in that range, where mass(low, high) > 0.

        With high = inf this is above(low, u)."""
        below, beyond = self.cdf(high), self.sf(high)
        lower = self.icdf(below - (below - self.cdf(low)) * u)
        upper = self.isf(beyond + (self.sf(low) - beyond) * u)
        return torch.minimum(torch.maximum(torch.where(below < 0.5, lower, upper), self.next_above(low)), high)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """n levels, float64 on the generator's device."""
        return self.icdf(_uniform(n, generator))

    def sample_above(self, sigma_n: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One level strictly above each entry of sigma_n, float64."""
        sigma_n = sigma_n.to(generator.device, torch.float64)
        return self.above(sigma_n, _uniform(sigma_n.shape, generator))


def _uniform(shape, generator):
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).clamp(min=TINY)


def stratify(u: torch.Tensor) -> torch.Tensor:
    """Independent uniforms [n], n a power of two -> uniforms that are evenly spread together, and each still uniform.

    Every block of 2^k entries that starts at a multiple of 2^k has exactly one in each interval of length 2^-k, and other blocks
    are nearly as even: so batches of any size are stratified, and the sequence does not depend on their size. It is the van der
    Corput sequence (the binary digits of the index, reversed), with a random digital shift and jitter within its finest interval."""
    n = len(u)
    assert n & (n - 1) == 0, f'{n} uniforms are no power of two'
    place, mirrored = torch.arange(n, device=u.device), torch.zeros(n, dtype=torch.int64, device=u.device)
    for _ in range(n.bit_length() - 1):
        mirrored, place = 2 * mirrored + place % 2, place // 2
    # The whole part of n u is uniform over the intervals and its fraction is uniform within one, independently.
    scaled = u * n
    return ((mirrored ^ scaled[0].long()) + scaled.frac()) / n


class Cosine(NoiseDistribution):
    """Cosine schedule in continuous time: sigma = tan(pi t / 2) with uniform t, so that ln sigma has the density sech(ln sigma) / pi
    (Salimans & Ho 2022).

    Their schedule is alpha = cos(pi t / 2). min, max: where the distribution is truncated; the defaults cut off 0.006 % at each end.
    IDDPM's offset s = 0.008 corresponds to min = tan(pi/2 s / (1 + s)) = 0.0125."""

    def __init__(self, min: float = 1e-4, max: float = 1e4, stratified: bool = False) -> None:
        super().__init__(stratified)
        misc.require(0 <= min < max, f'min={min},max={max} must satisfy 0 <= min < max')
        self.min, self.max = min, max
        self._below, self._beyond = math.atan(min) / (math.pi / 2), math.atan(1 / max) / (math.pi / 2)  # shares cut off
        self._kept = 1 - self._below - self._beyond

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        return ((sigma.atan() / (math.pi / 2) - self._below) / self._kept).clamp(0, 1)

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        return self._level(u, 1 - u)

    def sf(self, sigma: torch.Tensor) -> torch.Tensor:
        return ((sigma.reciprocal().atan() / (math.pi / 2) - self._beyond) / self._kept).clamp(0, 1)

    def isf(self, q: torch.Tensor) -> torch.Tensor:
        return self._level(1 - q, q)

    def _level(self, u, q):
        """The level with cdf u and sf q, from the smaller of the two, which is more precise."""
        lower = (math.pi / 2) * (self._below + u * self._kept)
        upper = (math.pi / 2) * (self._beyond + q * self._kept)
        return torch.where(lower < upper, lower.tan(), upper.tan().reciprocal()).clamp(self.min, self.max)


class LogNormal(NoiseDistribution):
    """EDM's log-normal distribution: ln sigma ~ N(mean, std^2) (Karras et al. 2022, table 1)."""

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = False) -> None:
        super().__init__(stratified)
        misc.require(math.isfinite(mean), f'mean={mean} must be finite')
        misc.require(0 < std < math.inf, f'std={std} must be positive')
        self.mean, self.std = mean, std

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        return normal_cdf((sigma.log() - self.mean) / self.std)

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        return (torch.special.ndtri(u) * self.std + self.mean).exp()

    def sf(self, sigma: torch.Tensor) -> torch.Tensor:
        return normal_cdf((self.mean - sigma.log()) / self.std)

    def isf(self, q: torch.Tensor) -> torch.Tensor:
        return (self.mean - torch.special.ndtri(q) * self.std).exp()


class LogitNormal(LogNormal):
    """Logit-normal times of rectified flow: t = sigmoid(z) with z ~ N(mean, std^2), for x_t = (1 - t) x_0 + t noise (Esser et al. 2024).

    In that convention sigma = t / (1 - t) = exp(z), so this is the log-normal distribution in the parameters of that paper, whose best
    values are mean 0 and std 1."""

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = False) -> None:
        super().__init__(mean, std, stratified)


class LogUniform(NoiseDistribution):
    """The VE distribution: ln sigma uniform between ln min and ln max (Song et al. 2021; Karras et al. 2022, table 1)."""

    def __init__(self, min: float = 0.02, max: float = 100.0, stratified: bool = False) -> None:
        super().__init__(stratified)
        misc.require(0 < min < max < math.inf, f'min={min},max={max} must satisfy 0 < min < max')
        self.min, self.max = min, max

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        return ((sigma / self.min).log() / math.log(self.max / self.min)).clamp(0, 1)

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        return (self.min * (u * math.log(self.max / self.min)).exp()).clamp(self.min, self.max)


class VPUniform(NoiseDistribution):
    """The VP distribution: sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1) with t uniform between eps_t and 1 (Song et al. 2021;
    Karras et al. 2022, table 1)."""

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, eps_t: float = 1e-5, stratified: bool = False) -> None:
        super().__init__(stratified)
        misc.require(0 < beta_d < math.inf, f'beta_d={beta_d} must be positive')
        misc.require(0 <= beta_min < math.inf, f'beta_min={beta_min} must not be negative')
        misc.require(0 <= eps_t < 1, f'eps_t={eps_t} must be in [0, 1)')
        self.beta_d, self.beta_min, self.eps_t = beta_d, beta_min, eps_t

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        root = (self.beta_min ** 2 + 2 * self.beta_d * sigma.square().log1p()).sqrt()
        t = (root - self.beta_min) / self.beta_d
        return ((t - self.eps_t) / (1 - self.eps_t)).clamp(0, 1)

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        t = self.eps_t + u * (1 - self.eps_t)
        return (t * (self.beta_d / 2 * t + self.beta_min)).expm1().sqrt()


class Levels(NoiseDistribution):
    """Uniform over a list of noise levels, such as sigmas=0.1|0.2|0.5; a level that is listed twice is twice as likely.

    sigmas: text as on the command line, or numbers. None: NCSN's ten levels, geometric from 0.01 to 1 (Song & Ermon 2019)."""

    def __init__(self, sigmas: str | float | list | tuple | None = None, stratified: bool = False) -> None:
        super().__init__(stratified)
        self.levels = _read_levels(sigmas)  # float64 [n], ascending
        self._copies = {}

    def cdf(self, sigma: torch.Tensor) -> torch.Tensor:
        return self._count(sigma).to(sigma.dtype) / len(self.levels)

    def icdf(self, u: torch.Tensor) -> torch.Tensor:
        # The steps of the cdf in the dtype of u, so that icdf(cdf(level)) is the level itself.
        heights = torch.arange(1, len(self.levels) + 1, dtype=u.dtype, device=u.device) / len(self.levels)
        return self._level(torch.searchsorted(heights, u.contiguous()), u)

    def next_above(self, sigma: torch.Tensor) -> torch.Tensor:
        return self._level(self._count(sigma), sigma)

    def _count(self, sigma):
        """How many levels are at or below sigma."""
        return torch.searchsorted(self._levels(sigma), sigma.contiguous(), right=True)

    def _level(self, place, like):
        return self._levels(like)[place.clamp(max=len(self.levels) - 1)]

    def _levels(self, like):
        """The levels in the dtype and on the device of `like`; cached, because a copy to the device waits for it."""
        key = like.dtype, like.device
        if key not in self._copies:
            self._copies[key] = self.levels.to(like)
        return self._copies[key]


def _read_levels(sigmas):
    """Levels as given by the user -> float64 [n], ascending."""
    if sigmas is None:
        return torch.logspace(-2, 0, 10, dtype=torch.float64)
    items = sigmas.split('|') if isinstance(sigmas, str) else sigmas if isinstance(sigmas, (list, tuple)) else [sigmas]
    try:
        levels = torch.tensor([float(item) for item in items], dtype=torch.float64)
    except ValueError:
        levels = torch.zeros(0)
    fine = len(levels) and bool(((levels > 0) & levels.isfinite()).all())
    misc.require(fine, f'sigmas={sigmas} must be positive numbers separated by |, such as 0.1|0.2|0.5')
    return levels.sort().values


class IDDPMLevels(Levels):
    """Uniform over the `steps` noise levels of IDDPM's cosine schedule, in EDM's formulation (Karras et al. 2022, appendix C.3.4).

    1 + u_j^2 = product over i = j+1 .. steps of 1 / max(abar(i-1) / abar(i), c1), abar(i) = sin^2(pi i / (2 steps (c2 + 1)))."""

    def __init__(self, steps: int = 1000, c1: float = 1e-3, c2: float = 8e-3, stratified: bool = False) -> None:
        misc.require(steps >= 1, f'steps={steps} must be at least 1')
        misc.require(0 < c1 < 1, f'c1={c1} must be in (0, 1)')
        misc.require(c2 >= 0, f'c2={c2} must not be negative')
        abar = (torch.arange(steps + 1, dtype=torch.float64) * (math.pi / 2 / steps / (c2 + 1))).sin().square()
        growth = -(abar[:-1] / abar[1:]).clamp(min=c1).log()
        super().__init__(growth.flip(0).cumsum(0).expm1().sqrt().tolist(), stratified)  # u_{steps-1} .. u_0


NOISE = {'cosine': Cosine, 'iddpm_levels': IDDPMLevels, 'levels': Levels, 'logit_normal': LogitNormal, 'lognormal': LogNormal,
         'loguniform': LogUniform, 'vp_uniform': VPUniform}
