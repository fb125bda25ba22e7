# SPDX-License-Identifier: Apache-2.0
"""Diffusion in T discrete steps (Ho et al. 2020; Nichol & Dhariwal 2021): schedules, posterior, respacing, and the variational bound.

In this file x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t = 0 .. T-1. Elsewhere in this program x = x_t / sqrt(abar_t) = x_0 + u_t eps
has the level u_t = sqrt(1 / abar_t - 1), and a denoiser gives D = E[x_0 | x] at sigma = u_t; the bound only needs x_0, D and the
variance."""

import math
from typing import NamedTuple

import numpy as np
import torch

from torch_utils import misc, registry

TRAINED_TIMES = 1000  # networks are conditioned on t * 1000 / T, for every T
BIN = 1 / 255         # half the distance between two grey levels in [-1,1]


class Diffusion:
    """The tables of a schedule, float64 [T] each, and the formulas based on them.

    betas: [T]. timesteps: int64 [T], for a respaced schedule: which steps of the original schedule of `trained_steps` steps are kept.
    Levels and coefficients are computed as written in the papers, so that they equal published tables to the last digits.
    Arguments t are int64 [N]; results have the dtype and device of the images given with them."""

    def __init__(self, betas: np.ndarray, timesteps: np.ndarray | None = None, trained_steps: int | None = None) -> None:
        betas = np.asarray(betas, np.float64)
        if not (betas.ndim == 1 and len(betas) and (betas > 0).all() and (betas < 1).all()):
            raise ValueError(f'betas must be a list of numbers in (0, 1); got {betas.min()} to {betas.max()} of shape {list(betas.shape)}')
        self.steps = len(betas)
        self.timesteps = np.arange(self.steps) if timesteps is None else np.asarray(timesteps)
        self.trained_steps = trained_steps or self.steps
        abar = np.cumprod(1 - betas)
        before = np.append(1.0, abar[:-1])
        btilde = betas * (1 - before) / (1 - abar)
        # The posterior of the first step has no variance: its logarithm takes the second step's.
        btilde_log = np.log(np.append(btilde[1] if self.steps > 1 else betas[0], btilde[1:]))
        tables = dict(betas=betas, alpha_bar=abar, alpha_bar_before=before, levels=np.sqrt(1 / abar - 1),
                      signal=np.sqrt(abar), noise_std=np.sqrt(1 - abar),  # tables because 1 - abar loses digits in float32
                      from_x0=betas * np.sqrt(before) / (1 - abar), from_xt=(1 - before) * np.sqrt(1 - betas) / (1 - abar),
                      posterior_variance=btilde, posterior_log_variance=btilde_log,
                      beta_log=np.log(betas), beta_log_large=np.append(btilde_log[0], np.log(betas[1:])))
        for name, table in tables.items():
            setattr(self, name, torch.from_numpy(table))
        self._copies = {}

    def at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The table `name` at t, as [N,1,1,1] with the dtype and device of `like`."""
        if (name, like.device) not in self._copies:  # made once, because a copy to the device waits for it
            self._copies[name, like.device] = getattr(self, name).to(like.device)
        return misc.batched(self._copies[name, like.device][t].to(like.dtype))

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The t whose level is nearest to sigma: any shape -> int64 of that shape."""
        if ('middles', sigma.device) not in self._copies:
            self._copies['middles', sigma.device] = ((self.levels[1:] + self.levels[:-1]) / 2).to(sigma.device)
        middles = self._copies['middles', sigma.device]
        return torch.searchsorted(middles, sigma.to(middles.dtype).contiguous())

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """The time on which a network trained with this schedule is conditioned: t * 1000 / T of the schedule before respacing."""
        return torch.from_numpy(self.timesteps)[t] * (TRAINED_TIMES / self.trained_steps)

    def respace(self, spec: str | int) -> 'Diffusion':
        """The diffusion on a subset of these steps, with unchanged abar; spec: see kept_steps()."""
        kept = kept_steps(self.steps, spec)
        abar = self.alpha_bar.numpy()[kept]
        return Diffusion(1 - abar / np.append(1.0, abar[:-1]), self.timesteps[kept], self.trained_steps)

    # ---- forward and reverse

    def noisy(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t."""
        return self.at('signal', t, x0) * x0 + self.at('noise_std', t, x0) * noise

    def posterior_mean(self, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0); with the denoiser's D for x0, the mean of the reverse step (equation 11)."""
        return self.at('from_x0', t, x_t) * x0 + self.at('from_xt', t, x_t) * x_t

    def log_variance(self, t: torch.Tensor, like: torch.Tensor, out: torch.Tensor | None = None, fixed: str = 'large') -> torch.Tensor:
        """Log variance of the reverse step: [N,C,H,W] from the network's channels `out`, else [N,1,1,1].

        Learned: v log beta + (1 - v) log btilde, v = (out + 1) / 2, not bounded (equation 15). Fixed: "large" is beta, with btilde_1
        for the first step, and "small" is btilde."""
        small = self.at('posterior_log_variance', t, like)
        if out is None:
            return self.at({'large': 'beta_log_large', 'small': 'posterior_log_variance'}[fixed], t, like)
        return small + (out + 1) / 2 * (self.at('beta_log', t, like) - small)

    # ---- predictions

    def predict(self, kind: str, x0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The target of a network with the given kind of prediction, where the image is x0; kind: see PREDICTIONS."""
        a, b = self._prediction(kind, t, x_t)
        return a * x0 + b * x_t

    def x0_from(self, kind: str, out: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The x_0 that follows from a network's output; kind: see PREDICTIONS."""
        a, b = self._prediction(kind, t, x_t)
        return (out - b * x_t) / a

    def _prediction(self, kind, t, like):
        a, b = PREDICTIONS[kind](self)
        key = kind, like.device
        if key not in self._copies:
            self._copies[key] = [a.to(like.device), b.to(like.device)]
        return [misc.batched(table[t].to(like.dtype)) for table in self._copies[key]]


class Linear(Diffusion):
    """Linear schedule: beta_t rises linearly from 0.1 / T to 20 / T, which for T = 1000 is 1e-4 to 0.02 (Ho et al. 2020)."""

    def __init__(self, steps: int = 1000) -> None:
        if steps <= 20:
            raise ValueError(f'steps={steps}: the linear schedule ends at beta = 20 / steps, which must be below 1; take more than 20')
        super().__init__(np.linspace(0.1 / steps, 20 / steps, steps))


class Cosine(Diffusion):
    """Cosine schedule: abar(t) = f(t) / f(0) with f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), and every beta limited to `largest` (Nichol &
    Dhariwal 2021, equation 17)."""

    def __init__(self, steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> None:
        if steps < 2:
            raise ValueError(f'steps={steps} must be at least 2')
        if not (0 <= s < math.inf and 0 < largest < 1):
            raise ValueError(f's={s} must not be negative, and largest={largest} must be in (0, 1)')
        f = np.cos((np.arange(steps + 1) / steps + s) / (1 + s) * math.pi / 2) ** 2
        super().__init__(np.minimum(1 - f[1:] / f[:-1], largest))


class ScaledLinear(Diffusion):
    """Stable Diffusion's schedule: sqrt(beta_t) rises linearly from sqrt(start) to sqrt(end) (Rombach et al. 2022)."""

    def __init__(self, steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> None:
        if steps < 2:
            raise ValueError(f'steps={steps} must be at least 2')
        if not 0 < start <= end < 1:
            raise ValueError(f'start={start} and end={end}: 0 < start <= end < 1 is needed')
        super().__init__(np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2)


def kept_steps(steps: int, spec: str | int) -> np.ndarray:
    """The steps, int64 ascending, that a respacing of `steps` steps keeps.

    "250": 250 steps, evenly spaced from first to last; "10,15,20": 10, 15 and 20 steps in three equal parts; "ddim50": every k-th step
    from 0, for the k that gives 50 of them (Song et al. 2021). Raises ValueError where that is not possible."""
    spec = str(spec)
    try:
        counts = [int(spec.removeprefix('ddim'))] if spec.startswith('ddim') else [int(count) for count in spec.split(',')]
    except ValueError:
        raise ValueError(f'"{spec}" is not a respacing such as 250, ddim50 or 10,15,20') from None
    if min(counts) < 1:
        raise ValueError(f'"{spec}": each part must keep at least 1 step')
    if spec.startswith('ddim'):
        strides = [stride for stride in range(1, steps + 1) if -(-steps // stride) == counts[0]]
        if not strides:
            raise ValueError(f'"{spec}": no whole stride through {steps} steps gives {counts[0]} of them; {_nearby(steps, counts[0])}')
        return np.arange(0, steps, strides[0])
    parts = np.array_split(np.arange(steps), len(counts))
    return np.concatenate([_evenly(part, count, spec) for part, count in zip(parts, counts, strict=True)])


def _evenly(part, count, spec):
    """`count` steps of `part`, from its first to its last."""
    if count > len(part):
        raise ValueError(f'"{spec}": {count} of {len(part)} steps cannot be kept')
    stride = (len(part) - 1) / max(count - 1, 1)
    # A cumulative sum rather than a product, to round like the published lists where they fall between two steps.
    return part[np.rint(np.cumsum(np.append(0.0, np.full(count - 1, stride)))).astype(np.int64)]


def _nearby(steps, count):
    possible = sorted({-(-steps // stride) for stride in range(1, steps + 1)}, key=lambda n: abs(n - count))
    return f'try ddim{possible[0]} or ddim{possible[1]}' if len(possible) > 1 else f'try ddim{possible[0]}'


# ---- the variational bound


def normal_kl(mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor) -> torch.Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, elementwise."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (ratio.exp() - ratio - 1 + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def normal_cdf(z: torch.Tensor) -> torch.Tensor:
    """The papers' 0.5 (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))), within 2e-4 of Phi(z), which noise.normal_cdf gives exactly."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))


def grey_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """log P(grey level of x) in nats, elementwise, under N(mean, exp(log_variance)) and bins of width 2/255 around the 256 levels.

    The outermost bins extend to infinity. x: images in [-1,1], levels k/127.5 - 1; probabilities are clamped to at least 1e-12."""
    scale = (-0.5 * log_variance).exp()
    upper = normal_cdf((x - mean + BIN) * scale).where(x <= 0.999, 1)
    lower = normal_cdf((x - mean - BIN) * scale).where(x >= -0.999, 0)
    return (upper - lower).clamp(min=1e-12).log()


def bound(diffusion: Diffusion, x0: torch.Tensor, D: torch.Tensor, t: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """The bound's term of step t, in nats, elementwise: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) for t = 0.

    x0, D: [N,C,H,W]; t: int64 [N]; log_variance: of the reverse step, [N,C,H,W] or [N,1,1,1]. Both means hold the same share of x_t,
    so they differ by from_x0 (x_0 - D): x_t itself is not needed, and the scaling of the images by 1/sqrt(abar) makes no difference."""
    apart = diffusion.at('from_x0', t, x0) * (x0 - D)
    kl = normal_kl(apart, diffusion.at('posterior_log_variance', t, x0), torch.zeros_like(apart), log_variance)
    return torch.where(misc.batched(t) == 0, -grey_log_likelihood(x0, D, log_variance), kl)


class BoundTerms(NamedTuple):
    """The results of one step for each image, [N] each."""

    vb: torch.Tensor      # term of the bound, bits per dimension
    x0_mse: torch.Tensor  # mean squared error of D
    eps_mse: torch.Tensor  # the same in units of eps


def bound_terms(diffusion: Diffusion, x0: torch.Tensor, D: torch.Tensor, t: torch.Tensor, out: torch.Tensor | None = None, *,
                fixed: str = 'large', clip: bool = True) -> BoundTerms:
    """BoundTerms of images x0 [N,C,H,W] at steps t, int64 [N], from D = E[x_0 | x] at the level diffusion.levels[t].

    out: the network's channels for the variance, [N,C,H,W]; None: the variance is `fixed`, see Diffusion.log_variance(). clip: D into
    [-1,1], as in evaluation. Bits per dimension of an image: prior_bits() plus vb of every t, with fresh noise in each."""
    D = D.clamp(-1, 1) if clip else D
    vb = mean_bits(bound(diffusion, x0, D, t, diffusion.log_variance(t, x0, out, fixed)))
    x0_mse = (D - x0).square().flatten(1).mean(1)
    return BoundTerms(vb, x0_mse, x0_mse / diffusion.at('levels', t, x0).flatten().square())


def prior_bits(diffusion: Diffusion, x0: torch.Tensor) -> torch.Tensor:
    """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [N]: the prior term of the bound."""
    last = torch.full([len(x0)], diffusion.steps - 1, device=x0.device)
    abar, zero = diffusion.at('alpha_bar', last, x0), torch.zeros_like(x0)
    return mean_bits(normal_kl(abar.sqrt() * x0, (1 - abar).log(), zero, zero))


def mean_bits(nats: torch.Tensor) -> torch.Tensor:
    """[N,C,H,W] in nats -> bits per dimension, [N]."""
    return nats.flatten(1).mean(1) / math.log(2)


def build_diffusion(spec: str, slot: str = '--diffusion') -> Diffusion:
    """"cosine:steps=4000" -> Diffusion; raises UserError for anything that is not a schedule."""
    return registry.build(spec, DIFFUSIONS, slot)


# Kinds of predictions, as a x_0 + b x_t: kind -> (a, b), float64 [T] each.
PREDICTIONS = {
    'eps': lambda d: (-(d.alpha_bar / (1 - d.alpha_bar)).sqrt(), (1 - d.alpha_bar).rsqrt()),
    'previous': lambda d: (d.from_x0, d.from_xt),  # the mean of x_{t-1}
    'v': lambda d: (-(1 - d.alpha_bar).rsqrt(), (d.alpha_bar / (1 - d.alpha_bar)).sqrt()),  # sqrt(abar) eps - sqrt(1 - abar) x_0
    'x0': lambda d: (torch.ones_like(d.alpha_bar), torch.zeros_like(d.alpha_bar)),
}
DIFFUSIONS = {'cosine': Cosine, 'linear': Linear, 'scaled_linear': ScaledLinear}
