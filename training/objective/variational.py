# SPDX-License-Identifier: Apache-2.0
"""Discrete-time objectives (Nichol & Dhariwal 2021): L_simple, the variational bound L_vlb, and L_hybrid = L_simple + coeff L_vlb."""

import math
from collections.abc import Callable

import torch

from dnnlib import UserError
from torch_utils import registry
from training.data.batches import Batch
from training.diffusion import ambient, discrete
from training.objective.loss import TERMS, Evaluation, Term, evaluate


class Bound(Term):
    """Variational bound: coeff L_vlb in bits, estimated as T times its term at the timestep of each image (Nichol & Dhariwal 2021).

    forward() returns {'bound': [N]}, sums over C, H, W. The network predicts a variance beside D (see Diffusion.log_variance). frozen:
    the term trains the variance only, and D is treated as a constant. The bound needs x_0, so only clean images have one. With
    frozen=False noisy images contribute their squared error at sigma_n, weighted as the x_0 error of clean images is in the divergence;
    otherwise they contribute 0."""

    name = 'bound'
    needs_outputs = True

    def __init__(self, diffusion: discrete.Diffusion | None, coeff: float = 1.0, frozen: bool = True) -> None:
        super().__init__()
        if diffusion is None:
            raise ValueError('the variational bound needs discrete timesteps: use --precond=iddpm with an --objective')
        if not 0 < coeff < math.inf:
            raise ValueError(f'coeff={coeff} must be positive')
        self.diffusion, self.factor, self.frozen = diffusion, coeff * diffusion.steps, frozen

    def forward(self, net: torch.nn.Module, batch: Batch, randn: Callable | None = None,
                seen: Evaluation | None = None) -> dict[str, torch.Tensor]:
        """{'bound': [N]}. seen: the Evaluation with the network's channels for the variance, if there is one. Draws nothing from randn."""
        x, D, rest = seen or evaluate(net, batch, outputs=True)
        D = D.detach() if self.frozen else D
        t = self.diffusion.timestep(batch.sigma.flatten())
        log_variance = self.diffusion.log_variance(t, x, rest)
        nats = discrete.bound(self.diffusion, batch.images, D, t, log_variance)
        other = torch.zeros_like(nats) if self.frozen else self._error(batch, x, D, t, log_variance.detach())
        nats = torch.where(ambient.column(batch.sigma_n, x) == 0, nats, other)
        return {'bound': self.factor / math.log(2) * nats.flatten(1).sum(1)}

    def _error(self, batch, x, D, t, log_variance):
        """(from_x0 error)^2 / (2 variance), the cost of an error of D in the divergence, with the error of an image at sigma_n."""
        error = ambient.predict_at(D, x, batch.sigma, level=batch.sigma_n) - batch.images
        return (self.diffusion.at('from_x0', t, x) * error).square() * (-log_variance).exp() / 2


def simple() -> list[str]:
    """L_simple: the squared error of the predicted noise at uniform timesteps, that is the denoising term with the weight 1 / sigma^2 (Ho
    et al. 2020)."""
    return ['denoise']


def hybrid(coeff: float = 0.001) -> list[str]:
    """L_hybrid = L_simple + coeff L_vlb, where L_simple trains the mean and L_vlb only the variance (Nichol & Dhariwal 2021).

    L_vlb is T times the mean of the bound's terms over t; coeff=1/T is the published code without "rescale_learned_sigmas"."""
    if not 0 < coeff < math.inf:
        raise ValueError(f'coeff={coeff} must be positive; --objective=simple has no bound')
    return ['denoise', registry.unparse('bound', {'coeff': coeff})]


def vlb() -> list[str]:
    """L_vlb: the variational bound alone, which trains both mean and variance (Nichol & Dhariwal 2021).

    L_vlb is T times the mean of the bound's terms over t."""
    return ['bound:frozen=False']


def terms_of(kind: str | None = None, inverse: bool = False, slot: str = '--objective') -> list[str]:
    """The terms, as specs of TERMS, of a piece of OBJECTIVES; None: the denoising term alone. inverse: see AmbientLoss."""
    try:
        terms = registry.build(kind, OBJECTIVES, slot)() if kind else ['denoise']
    except ValueError as err:
        raise UserError(f'{slot}={kind}: {err}') from None
    return [f'{term}:inverse=True' if inverse and term == 'denoise' else term for term in terms]


OBJECTIVES = {'hybrid': hybrid, 'simple': simple, 'vlb': vlb}
TERMS['bound'] = Bound
