# SPDX-License-Identifier: Apache-2.0
"""The consistency term: D(x, sigma) has to be the mean of D(x', sigma') over the reverse process from x down to sigma' < sigma.

For noisy images it is the only training signal below sigma_n. How x' is drawn (the chain) and how the deviation from the mean is
estimated are chosen separately; docs/consistency.md has the bias of each combination."""

import math
from collections.abc import Callable
from typing import Any

import torch

from training.data.batches import Batch
from training.diffusion import ambient
from training.diffusion.noise import NoiseDistribution, normal_cdf
from training.objective.loss import TERMS, Evaluation, Term, evaluate


def mean_square(error: torch.Tensor) -> torch.Tensor:
    """(mean over K)^2 of errors [n,K,C,H,W]: never negative, and biased up by their variance / K."""
    return error.mean(1).square()


def u_statistic(error: torch.Tensor) -> torch.Tensor:
    """Mean of the products of two different errors, K >= 2, [n,K,C,H,W] -> [n,C,H,W]: unbiased, and possibly negative.

    It equals mean_square minus (variance over K) / K, with the unbiased variance; for K = 2 it is the product of the two."""
    count = error.shape[1]
    return (error.sum(1).square() - error.square().sum(1)) / (count * (count - 1))


ESTIMATORS = {'mean': mean_square, 'u': u_statistic}
CHOICES = {'estimator': tuple(ESTIMATORS), 'stop': ('no', 'upper'), 'teacher': ('net', 'ema'), 'below': ('sigma', 'sigma_n')}


class ConsistencyTerm(Term):
    """The consistency loss; a subclass defines the chain's kernel, step(x, D, sigma, sigma_next, noise) -> x'.

    noise: the distribution that sigma' is drawn from, truncated. weight: (sigma) -> w. batch: images in a global batch.
    steps, samples: steps of a chain, and independent chains per image (K). coeff: factor of the whole term; it rises from 0 over
    the first `rampup` thousand images. batch_size: images of a global batch that are used, 0 for all; every: evaluate the term only in
    every n-th step. Neither changes the mean contribution to the loss. weighted: multiply by the run's w(sigma).
    below: sigma' ~ p anywhere below sigma, or below sigma_n for the noisy images. grad: differentiate through the chains.
    stop=upper: no gradient into D(x, sigma), which then serves as the target of the lower one. teacher=ema: chains and upper prediction
    come from the averaged network, without gradient. Raises ValueError for values out of range."""

    name = 'consistency'

    def __init__(self, noise: NoiseDistribution, weight: Callable, batch: int, *, estimator: str = 'u', steps: int = 20, samples: int = 2,
                 coeff: float = 0.1, below: str = 'sigma', stop: str = 'upper', teacher: str = 'net', grad: bool = False,
                 weighted: bool = False, batch_size: int = 32, rampup: float = 0.0, every: int = 1) -> None:
        super().__init__()
        words = dict(estimator=estimator, stop=stop, teacher=teacher, below=below)
        for key, value in words.items():
            if value not in CHOICES[key]:
                raise ValueError(f'{key}={value} must be one of {", ".join(CHOICES[key])}')
        numbers = dict(steps=(steps, 1), samples=(samples, 1), coeff=(coeff, 0), batch_size=(batch_size, 0), rampup=(rampup, 0),
                       every=(every, 1))
        for key, (value, least) in numbers.items():
            if not least <= value < math.inf:
                raise ValueError(f'{key}={value} must be {least} or more')
        if estimator == 'u' and samples < 2:
            raise ValueError(f'estimator=u needs samples=2 or more, got samples={samples}')
        if batch_size > batch:
            raise ValueError(f'batch_size={batch_size} is larger than --batch={batch}; use at most that, or 0 for the whole batch')
        self.noise, self.weight, self.batch = noise, weight, batch
        self.estimate, self.steps, self.samples, self.coeff = ESTIMATORS[estimator], steps, samples, coeff
        self.below, self.stop, self.grad, self.weighted, self.rampup, self.every = below, stop, grad, weighted, rampup, every
        self.needs_teacher = teacher == 'ema'
        self.fraction = (batch_size or batch) / batch  # of a global batch
        # A chain calls the network once per step, and once more for the lower prediction; a teacher makes its own upper prediction.
        self.evaluations = self.fraction * (samples * (steps + 1) + self.needs_teacher) / every

    def forward(self, net: torch.nn.Module, batch: Batch, randn: Callable, seen: Evaluation | None = None) -> dict[str, torch.Tensor]:
        """{'consistency': [N]}, zero on the rows that are not used.

        randn.now: number of global batches before this one. seen: the Evaluation, if there is one already."""
        if self.coeff == 0:
            return {'consistency': batch.images.new_zeros(len(batch.images))}
        x, D, _ = seen or evaluate(net, batch)
        rows = self._rows(len(x), x.device)
        sigma, sigma_prime, chain_noise = self._draw(batch, x, randn, rows)
        labels = dict(class_labels=_take(batch.class_labels, rows), augment_labels=_take(batch.augment_labels, rows))
        guide, D = self._guide(net, x[rows], sigma, D[rows], labels)
        error = consistency_error(net, x[rows], sigma, sigma_prime, D, chain_noise, step=self.step, guide=guide,
                                  grad=self.grad and guide is net, **labels)
        value = self.estimate(error)
        if self.weighted:
            # Detached: this term adds no u of its own, so a learned weight would just grow to shrink it.
            value = self.weight(sigma).detach() * value
        # The number of rows is rounded: the factor keeps the meaning of coeff for every size of micro-batch.
        scale = self._coeff(randn) * self.fraction * len(x) / len(rows)
        return {'consistency': value.new_zeros(len(x)).index_put((rows,), scale * value.flatten(1).sum(1))}

    def due(self, step: int) -> bool:
        """As Term.due; not in the first step of a ramp, where the factor is 0."""
        return super().due(step) and not (self.rampup and step == 0)

    def _coeff(self, randn):
        """The factor at this step, which compensates for skipped steps: a number, or with a ramp a 0-dim float64 tensor."""
        ramp = (randn.now * self.batch / (self.rampup * 1e3)).clamp(max=1) if self.rampup else 1
        return self.coeff * self.every * ramp

    def _rows(self, n, device):
        """Evenly spread rows of a micro-batch of n: the same share of every rank and accumulation round, never none."""
        count = max(1, round(self.fraction * n))
        return torch.arange(count, device=device) * n // count

    def _draw(self, batch, x, randn, rows):
        """(sigma, sigma', noise of each step) of the rows; drawn for all rows, so that a row's draw does not depend on the choice of rows.

        sigma' is drawn independently. The published code reuses the normal draw that made sigma, so that there sigma' = sigma for every
        row except the clamped ones, and most of the chains have no length."""
        sigma, limit = ambient.column(batch.sigma, x), ambient.column(batch.sigma_n, x)
        if self.below == 'sigma':
            limit = sigma
        limit = torch.where(limit > 0, limit, sigma)  # clean images have no level of their own to go below
        u = normal_cdf(randn('consistency_sigma', [len(x), 1, 1, 1]).to(x))
        sigma_prime = torch.minimum(self.noise.below(limit, u), sigma)
        shape = [len(x), self.samples, *x.shape[1:]]
        return sigma[rows], sigma_prime[rows], [randn(f'consistency_noise_{i}', shape)[rows].to(x) for i in range(self.steps)]

    def _guide(self, net, x, sigma, D, labels):
        """(denoiser of the chains, upper prediction)."""
        if self.needs_teacher:
            (guide,) = self.teacher
            with torch.no_grad():
                return guide, guide(x, sigma, **labels)
        return net, D.detach() if self.stop == 'upper' else D


class Bridge(ConsistencyTerm):
    """Consistency loss whose chains take Brownian-bridge steps, which are exact for linear denoisers at any number of steps."""

    step = staticmethod(ambient.bridge_step)


class Euler(ConsistencyTerm):
    """Consistency loss whose chains take Euler-Maruyama steps of the reverse-time diffusion, as in the published code."""

    step = staticmethod(ambient.reverse_step)


def consistency_error(net: torch.nn.Module, x: torch.Tensor, sigma: torch.Tensor, sigma_prime: torch.Tensor, D: torch.Tensor,
                      chain_noise: list[torch.Tensor], *, step: Callable = ambient.reverse_step, guide: torch.nn.Module | None = None,
                      grad: bool = True, class_labels: torch.Tensor | None = None,
                      augment_labels: torch.Tensor | None = None) -> torch.Tensor:
    """D(x', sigma') - D of K chains per image: [N,K,C,H,W], zero in expectation for the true denoiser and the true process.

    x, D: [N,C,H,W]; sigma, sigma_prime: [N,1,1,1]; chain_noise: one [N,K,C,H,W] per step. step: the chain's kernel; guide: the
    denoiser used in the chains (net by default). Every call gets the labels. The levels of a chain are evenly spaced in
    sigma^(1/7), as in EDM's sampling schedule."""
    samples = chain_noise[0].shape[1]
    repeat = lambda t: None if t is None else t.repeat_interleave(samples, dim=0)  # [N,...] -> [N K,...]
    labels = dict(class_labels=repeat(class_labels), augment_labels=repeat(augment_labels))
    walk = guide or net
    x_prime, last = repeat(x), repeat(ambient.column(sigma_prime, x))
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        levels = _levels(repeat(ambient.column(sigma, x)), last, len(chain_noise))
        for now, then, unit in zip(levels[:-1], levels[1:], chain_noise):
            x_prime = step(x_prime, walk(x_prime, now, **labels), now, then, unit.flatten(0, 1))
    return net(x_prime, last, **labels).unflatten(0, (-1, samples)) - D[:, None]


def _levels(first, last, steps, rho=7):
    """steps + 1 levels from first down to last, each [N,1,1,1]; the ends are exact."""
    start, end = first ** (1 / rho), last ** (1 / rho)
    between = ((start + (end - start) * (i / steps)) ** rho for i in range(1, steps))
    # Rounding must not move a level beyond an end: the square root of such a step would be visible noise.
    return [first, *(level.clamp(min=last, max=first) for level in between), last]


def _take(labels, rows):
    return None if labels is None else labels[rows]


def published_spec(**given: Any) -> str:
    """The published consistency term as a --consistency spec; `given` replaces some of its keys."""
    published = dict(estimator='mean', steps=5, samples=6, batch_size=32, weighted=False, stop='no', grad=True)
    return 'euler:' + ','.join(f'{key}={value}' for key, value in (published | given).items())


CHAINS = {'bridge': Bridge, 'euler': Euler}
TERMS |= CHAINS
