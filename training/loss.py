# SPDX-License-Identifier: Apache-2.0
"""Objectives: a batch of images, each at its own noise level sigma_n, and a denoiser -> named loss terms, one number an image.

Terms are sums over C, H, W; whoever calls takes the mean over the batch. Everything runs in the dtype of the images."""

from typing import NamedTuple

import torch

from training import ambient, noise, penalty


class Batch(NamedTuple):
    """What one step looks at; levels are noise stds in network units, sigma >= sigma_n."""

    images: torch.Tensor  # [N,C,H,W], each already at level sigma_n
    sigma_n: torch.Tensor  # [N,1,1,1], 0 for clean images
    sigma: torch.Tensor  # [N,1,1,1], the level to denoise from; pairs.py chose it
    noise: torch.Tensor  # [N,C,H,W], unit normal, fresh in every step
    class_labels: torch.Tensor | None = None  # [N,label_dim]
    augment_labels: torch.Tensor | None = None  # [N,augment_dim]
    raw_idx: torch.Tensor | None = None  # [N] int64, which images these are


class Evaluation(NamedTuple):
    """The images at level sigma, and the denoiser's answer; shared by the terms of an objective."""

    x: torch.Tensor  # [N,C,H,W]
    D: torch.Tensor  # [N,C,H,W], estimates E[x_0 | x]


def evaluate(net, batch):
    """Takes the images up from sigma_n to sigma and calls the denoiser, once."""
    x = ambient.add_noise(batch.images, batch.sigma_n, batch.sigma, batch.noise)
    return Evaluation(x, net(x, batch.sigma, class_labels=batch.class_labels, augment_labels=batch.augment_labels))


class AmbientLoss(torch.nn.Module):
    """Denoising score matching against the image as it is, at its own level sigma_n (Daras et al. 2024, 2025).

    weight: (sigma) -> w; penalty: (error, sigma) -> rho. With sigma_n = 0 this is the plain EDM, VP or VE loss.
    inverse: multiply by (1 - r)^-2, r = sigma_n^2 / sigma^2, so that w weighs the squared x_0 error of noisy images as it does that of
    clean ones (Ambient Omni, Daras et al. 2025). It is without bound near sigma_n: pairs.with_inverse_weight keeps a distance."""

    def __init__(self, weight, penalty=penalty.squared, inverse=False):
        super().__init__()
        self.weight, self.penalty, self.inverse = weight, penalty, inverse

    def forward(self, net, batch, randn=None, seen=None):
        """{'denoise': [N]}, and 'log_weight' where the weight is learned.

        seen: the Evaluation, where the caller has it already. This term draws nothing from randn."""
        x, D = seen or evaluate(net, batch)
        y_hat = ambient.predict_at(D, x, batch.sigma, level=batch.sigma_n)  # E[y | x]
        sigma = ambient.column(batch.sigma, x)
        loss = self.weight(sigma) * self.penalty(y_hat - batch.images, sigma)
        if self.inverse:
            signal = ambient.predict_at(1, 0 * sigma, sigma, level=batch.sigma_n)  # 1 - r
            loss = loss * torch.where(signal > 0, signal.square().reciprocal(), 0)  # a pair at sigma_n says nothing of x_0
        terms = {'denoise': loss.flatten(1).sum(1)}
        if hasattr(self.weight, 'offset'):  # a learned weight lambda / exp(u) comes with a term u, once for every cost in the sum
            terms['log_weight'] = self.weight.offset(sigma).expand_as(loss).flatten(1).sum(1)
        return terms


class ConsistencyTerm(torch.nn.Module):
    """Asks D(x, sigma) to be the mean of D(x', sigma') over the reverse process from x, sigma' < sigma: a signal below sigma_n.

    noise: the law that sigma' is drawn from, truncated to (0, sigma). weight: (sigma) -> w, applied if `weighted`.
    coeff: factor of the whole term. batch_fraction: share of the batch that the term looks at.
    steps: Euler-Maruyama steps from sigma to sigma'. samples: independent chains an image; the square of their mean is
    biased up by their variance / samples. grad: differentiate through the chains."""

    def __init__(self, noise, weight, coeff=1.0, batch_fraction=1.0, steps=5, samples=6, weighted=False, grad=True):
        super().__init__()
        _check_consistency(coeff, batch_fraction, steps, samples)
        self.noise, self.weight, self.coeff, self.batch_fraction = noise, weight, coeff, batch_fraction
        self.steps, self.samples, self.weighted, self.grad = steps, samples, weighted, grad

    def forward(self, net, batch, randn, seen=None):
        """{'consistency': [N]}, zero on the rows that are not looked at. seen: the Evaluation, where there is one already."""
        x, D = seen or evaluate(net, batch)
        rows = self._rows(len(x), x.device)
        sigma, sigma_prime, chain_noise = self._draw(batch.sigma, x, randn, rows)
        error = consistency_error(net, x[rows], sigma, sigma_prime, D[rows], chain_noise, grad=self.grad,
                                  class_labels=_take(batch.class_labels, rows), augment_labels=_take(batch.augment_labels, rows))
        # Detached: a learned weight would grow just to shrink this term, which adds no u of its own.
        value = self.weight(sigma).detach() * error.square() if self.weighted else error.square()
        # Rows are whole, the share of the batch need not be: the factor keeps coeff's meaning for every size of micro-batch.
        scale = self.coeff * self.batch_fraction * len(x) / len(rows)
        return {'consistency': value.new_zeros(len(x)).index_put((rows,), scale * value.flatten(1).sum(1))}

    def _rows(self, n, device):
        """Evenly spread rows of a micro-batch of n: the same share of every rank and accumulation round, never none."""
        count = max(1, round(self.batch_fraction * n))
        return torch.arange(count, device=device) * n // count

    def _draw(self, sigma, x, randn, rows):
        """(sigma, sigma', noise of each step) of the rows; drawn for all rows, so that a row's draw is its own.

        sigma' has a draw of its own. The published code reuses the normal that made sigma, so that there sigma' = sigma for every
        row but the clamped ones, and most of the chains have no length."""
        sigma = ambient.column(sigma, x)
        u = noise.normal_cdf(randn('consistency_sigma', [len(x), 1, 1, 1]).to(x))
        sigma_prime = self.noise.below(sigma, u)
        shape = [len(x), self.samples, *x.shape[1:]]
        return sigma[rows], sigma_prime[rows], [randn(f'consistency_noise_{i}', shape)[rows].to(x) for i in range(self.steps)]


def consistency_error(net, x, sigma, sigma_prime, D, chain_noise, *, grad=True, class_labels=None, augment_labels=None):
    """mean over K chains of D(x', sigma'), less D(x, sigma): [N,C,H,W], zero in expectation for the true denoiser.

    x, D: [N,C,H,W]; sigma, sigma_prime: [N,1,1,1]; chain_noise: one [N,K,C,H,W] a step. Labels go to every call of the net.
    The levels of a chain are evenly spaced in sigma^(1/7), as EDM's sampling schedule is."""
    samples = chain_noise[0].shape[1]
    repeat = lambda t: None if t is None else t.repeat_interleave(samples, dim=0)  # [N,...] -> [N K,...]
    denoise = lambda x, sigma: net(x, sigma, class_labels=repeat(class_labels), augment_labels=repeat(augment_labels))
    x_prime, last = repeat(x), repeat(ambient.column(sigma_prime, x))
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        levels = _levels(repeat(ambient.column(sigma, x)), last, len(chain_noise))
        for now, then, unit in zip(levels[:-1], levels[1:], chain_noise):
            x_prime = ambient.reverse_step(x_prime, denoise(x_prime, now), now, then, unit.flatten(0, 1))
    return denoise(x_prime, last).unflatten(0, (-1, samples)).mean(1) - D


def _levels(first, last, steps, rho=7):
    """steps + 1 levels from first down to last, each [N,1,1,1]; the ends are exact."""
    start, end = first ** (1 / rho), last ** (1 / rho)
    between = ((start + (end - start) * (i / steps)) ** rho for i in range(1, steps))
    # Rounding must not take a level beyond an end: the square root of that step would be noise of a visible size.
    return [first, *(level.clamp(min=last, max=first) for level in between), last]


def _take(labels, rows):
    return None if labels is None else labels[rows]


def _check_consistency(coeff, batch_fraction, steps, samples):
    """The term's own limits, one line each."""
    for holds, text in [(0 <= coeff < float('inf'), f'coeff={coeff} must be 0 or more'),
                        (0 < batch_fraction <= 1, f'batch_fraction={batch_fraction} must be in (0, 1]'),
                        (steps >= 1, f'steps={steps} must be at least 1'),
                        (samples >= 1, f'samples={samples} must be at least 1')]:
        if not holds:
            raise ValueError(text)


class Objective(torch.nn.Module):
    """Named terms that share one evaluation of the denoiser; parameters of the terms are parameters of the objective."""

    def __init__(self, terms):
        super().__init__()
        self.terms = torch.nn.ModuleDict(terms)

    def forward(self, net, batch, randn):
        """{term name: [N]} of all terms; nothing is summed here, so that each can be reported by itself."""
        seen = evaluate(net, batch)
        values = {}
        for term in self.terms.values():
            values |= term(net, batch, randn, seen)
        return values
