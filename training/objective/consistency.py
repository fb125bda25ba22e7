# SPDX-License-Identifier: Apache-2.0
"""The consistency term: D(x, sigma) has to be the mean of D(x', sigma') over the reverse process from x down to sigma' < sigma.

For noisy images it is the only signal below sigma_n. How x' is drawn (the chain) and how the mean is judged (the estimator) are
chosen apart; docs/consistency.md has the bias of each pair."""

import dataclasses
import math

import torch

from training.diffusion import ambient, noise
from training.objective.loss import evaluate


def mean_square(error):
    """(mean over K)^2 of errors [n,K,C,H,W]: never negative, and biased up by their variance / K."""
    return error.mean(1).square()


def u_statistic(error):
    """Mean of the products of two different errors of K >= 2, [n,K,C,H,W] -> [n,C,H,W]: unbiased, and of either sign.

    It equals mean_square less (variance over K) / K, with the unbiased variance; for K = 2 it is the product of the two."""
    count = error.shape[1]
    return (error.sum(1).square() - error.square().sum(1)) / (count * (count - 1))


ESTIMATORS = {'mean': mean_square, 'u': u_statistic}
CHOICES = {'estimator': tuple(ESTIMATORS), 'stop': ('no', 'upper'), 'teacher': ('net', 'ema'), 'below': ('sigma', 'sigma_n')}


@dataclasses.dataclass(frozen=True)
class Consistency:
    """What the command line says about the term; a subclass gives the chain's kernel, step(x, D, sigma, sigma_next, noise) -> x'.

    steps, samples: steps of a chain, and independent chains an image (K). coeff: factor of the whole term; it rises from 0 over
    the first `rampup` thousand images. batch_size: images of a global batch that are looked at, 0 for all; every: in each so
    manieth step only. Neither changes the mean contribution to the loss. weighted: multiply by the run's w(sigma).
    below: sigma' ~ p anywhere below sigma, or below sigma_n for the noisy images. grad: differentiate through the chains.
    stop=upper: no gradient into D(x, sigma), which then teaches the lower one. teacher=ema: chains and upper prediction come
    from the averaged network, without gradient."""

    estimator: str = 'u'
    steps: int = 20
    samples: int = 2
    coeff: float = 0.1
    below: str = 'sigma'
    stop: str = 'upper'
    teacher: str = 'net'
    grad: bool = False
    weighted: bool = False
    batch_size: int = 32
    rampup: float = 0.0
    every: int = 1

    def __post_init__(self):
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f'{key}={getattr(self, key)} must be one of {", ".join(choices)}')
        for key, least in {'steps': 1, 'samples': 1, 'coeff': 0, 'batch_size': 0, 'rampup': 0, 'every': 1}.items():
            if not least <= getattr(self, key) < math.inf:
                raise ValueError(f'{key}={getattr(self, key)} must be {least} or more')
        if self.estimator == 'u' and self.samples < 2:
            raise ValueError(f'estimator=u needs samples=2 or more, got samples={self.samples}')

    def fraction(self, batch):
        """Share of a global batch of this size that the term looks at."""
        if self.batch_size > batch:
            raise ValueError(f'batch_size={self.batch_size} is larger than --batch={batch}; use at most that, or 0 for the whole batch')
        return (self.batch_size or batch) / batch

    def evaluations(self, batch):
        """Network evaluations an image and step that the term adds to the one of the denoising loss."""
        upper = 1 if self.teacher == 'ema' else 0  # the EMA's own upper prediction
        return self.fraction(batch) * (self.samples * (self.steps + 1) + upper) / self.every


class Bridge(Consistency):
    """Brownian-bridge steps: exact for linear denoisers in any number of steps."""

    step = staticmethod(ambient.bridge_step)


class Euler(Consistency):
    """Euler-Maruyama steps of the reverse-time diffusion."""

    step = staticmethod(ambient.reverse_step)


class ConsistencyTerm(torch.nn.Module):
    """The term that `plan` (a Consistency) describes.

    noise: the law that sigma' is drawn from, truncated. weight: (sigma) -> w, applied if the plan says so. batch: images in a
    global batch. A plan with a teacher needs set_teacher() before the first step."""

    def __init__(self, plan, noise, weight, batch):
        super().__init__()
        self.plan, self.noise, self.weight, self.batch = plan, noise, weight, batch
        self.fraction = plan.fraction(batch)
        self._teacher = ()

    def set_teacher(self, net):
        """The averaged network. In a tuple, so that it is no submodule: not trained, not moved, not in the state."""
        self._teacher = (net,)

    def forward(self, net, batch, randn, seen=None):
        """{'consistency': [N]}, zero on the rows and in the steps that are not looked at.

        randn.step: how many global batches came before. seen: the Evaluation, where there is one already."""
        coeff = self._coeff(randn.step)
        if coeff == 0:
            return {'consistency': batch.images.new_zeros(len(batch.images))}
        x, D, _ = seen or evaluate(net, batch)
        rows = self._rows(len(x), x.device)
        sigma, sigma_prime, chain_noise = self._draw(batch, x, randn, rows)
        labels = dict(class_labels=_take(batch.class_labels, rows), augment_labels=_take(batch.augment_labels, rows))
        guide, D = self._guide(net, x[rows], sigma, D[rows], labels)
        error = consistency_error(net, x[rows], sigma, sigma_prime, D, chain_noise, step=self.plan.step, guide=guide,
                                  grad=self.plan.grad and guide is net, **labels)
        value = ESTIMATORS[self.plan.estimator](error)
        if self.plan.weighted:
            # Detached: a learned weight would grow just to shrink this term, which adds no u of its own.
            value = self.weight(sigma).detach() * value
        # Rows are whole, the share of the batch need not be: the factor keeps coeff's meaning for every size of micro-batch.
        scale = coeff * self.fraction * len(x) / len(rows)
        return {'consistency': value.new_zeros(len(x)).index_put((rows,), scale * value.flatten(1).sum(1))}

    def _coeff(self, step):
        """The factor at this step: zero in skipped steps, which the others make up for."""
        plan = self.plan
        if step % plan.every:
            return 0
        ramp = min(step * self.batch / (plan.rampup * 1e3), 1) if plan.rampup else 1
        return plan.coeff * plan.every * ramp

    def _rows(self, n, device):
        """Evenly spread rows of a micro-batch of n: the same share of every rank and accumulation round, never none."""
        count = max(1, round(self.fraction * n))
        return torch.arange(count, device=device) * n // count

    def _draw(self, batch, x, randn, rows):
        """(sigma, sigma', noise of each step) of the rows; drawn for all rows, so that a row's draw is its own.

        sigma' has a draw of its own. The published code reuses the normal that made sigma, so that there sigma' = sigma for every
        row but the clamped ones, and most of the chains have no length."""
        sigma, limit = ambient.column(batch.sigma, x), ambient.column(batch.sigma_n, x)
        if self.plan.below == 'sigma':
            limit = sigma
        limit = torch.where(limit > 0, limit, sigma)  # clean images have no level of their own to go below
        u = noise.normal_cdf(randn('consistency_sigma', [len(x), 1, 1, 1]).to(x))
        sigma_prime = torch.minimum(self.noise.below(limit, u), sigma)
        shape = [len(x), self.plan.samples, *x.shape[1:]]
        return sigma[rows], sigma_prime[rows], [randn(f'consistency_noise_{i}', shape)[rows].to(x) for i in range(self.plan.steps)]

    def _guide(self, net, x, sigma, D, labels):
        """(who walks the chains, the upper prediction)."""
        if self.plan.teacher == 'ema':
            (guide,) = self._teacher
            with torch.no_grad():
                return guide, guide(x, sigma, **labels)
        return net, D.detach() if self.plan.stop == 'upper' else D


def consistency_error(net, x, sigma, sigma_prime, D, chain_noise, *, step=ambient.reverse_step, guide=None, grad=True,
                      class_labels=None, augment_labels=None):
    """D(x', sigma') - D of K chains an image: [N,K,C,H,W], zero in expectation for the true denoiser and the true process.

    x, D: [N,C,H,W]; sigma, sigma_prime: [N,1,1,1]; chain_noise: one [N,K,C,H,W] a step. step: the chain's kernel; guide: the
    denoiser that walks the chains (net by default). Labels go to every call. The levels of a chain are evenly spaced in
    sigma^(1/7), as EDM's sampling schedule is."""
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
    # Rounding must not take a level beyond an end: the square root of that step would be noise of a visible size.
    return [first, *(level.clamp(min=last, max=first) for level in between), last]


def _take(labels, rows):
    return None if labels is None else labels[rows]


def published_spec(**given):
    """The --consistency that the published term is, with the keys that are given in place of its own."""
    published = dict(estimator='mean', steps=5, samples=6, batch_size=32, weighted=False, stop='no', grad=True)
    return 'euler:' + ','.join(f'{key}={value}' for key, value in (published | given).items())


CHAINS = {'bridge': Bridge, 'euler': Euler}
