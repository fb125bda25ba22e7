# SPDX-License-Identifier: Apache-2.0
"""Objectives: from a batch of images, each at its own noise level sigma_n, and a denoiser to named loss terms, one number per image.

Terms are sums over C, H, W; the caller takes the mean over the batch. Everything is computed in the dtype of the images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from torch_utils import registry
from training.data.batches import Batch
from training.diffusion import ambient
from training.objective import penalty
from training.objective.timesteps import Uniform


class Evaluation(NamedTuple):
    """The images at level sigma, and the denoiser's output; shared by the terms of an objective."""

    x: torch.Tensor  # [N,C,H,W]
    D: torch.Tensor  # [N,C,H,W], estimates E[x_0 | x]
    rest: torch.Tensor | None = None  # [N,K,H,W], further channels of the network, where they were asked for


def evaluate(net: torch.nn.Module, batch: Batch, outputs: bool = False) -> Evaluation:
    """Adds noise to the images, from sigma_n up to sigma, and calls the denoiser once. outputs: also its further channels, see
    Precond.outputs()."""
    x = ambient.add_noise(batch.images, batch.sigma_n, batch.sigma, batch.noise)
    labels = dict(class_labels=batch.class_labels, augment_labels=batch.augment_labels)
    return Evaluation(x, *net.outputs(x, batch.sigma, **labels)) if outputs else Evaluation(x, net(x, batch.sigma, **labels))


class Term(torch.nn.Module):
    """A term of an objective, a piece of TERMS.

    Constructor arguments with these names are supplied: `noise` (p(sigma)), `weight`, `penalty`, `batch` (images of a global batch),
    `diffusion` (of a discrete-time network, else None); its other parameters are the keys of --term=NAME:key=value.
    forward(net, batch, randn, seen) -> {name: [N]}; seen is the Evaluation that all terms share, randn(name, shape) gives keyed draws.
    Its parameters are trained and stored together with those of the network."""

    name = ''              # name of its values, logged as Loss/NAME
    needs_outputs = False  # whether it needs the network's further channels, Evaluation.rest
    needs_teacher = False  # whether it needs the averaged network, by set_teacher(net) before the first step
    every = 1              # it is evaluated only in every n-th step, and is 0 in the others, see due()
    evaluations = 0.0      # network evaluations per image and step, on average, in addition to the shared one

    def due(self, step: int) -> bool:
        """Whether it is evaluated in this step. What else depends on the step has to be computed from the tensor randn.now: randn.step is a
        constant of a compiled graph, which then is compiled again in every step."""
        return step % self.every == 0

    def set_teacher(self, net: torch.nn.Module) -> None:
        """Stores the averaged network, for needs_teacher, in a tuple, so that it is not trained, moved or saved with this module."""
        self.teacher = (net,)


class AmbientLoss(Term):
    """Ambient denoising score matching: predicts each image at its own noise level sigma_n, which for clean images is the usual denoising
    loss (Daras et al. 2024, 2025).

    weight: (sigma) -> w; penalty: (error, sigma) -> rho. With sigma_n = 0 this is the standard EDM, VP or VE loss.
    inverse: multiply by (1 - r)^-2, r = sigma_n^2 / sigma^2, so that w weights the squared x_0 error of noisy images as it does that of
    clean ones (Ambient Omni, Daras et al. 2025). The factor is unbounded near sigma_n: pairs.with_inverse_weight keeps a distance."""

    name = 'denoise'

    def __init__(self, weight: Callable, penalty: Callable = penalty.squared, inverse: bool = False) -> None:
        super().__init__()
        self.weight, self.penalty, self.inverse = weight, penalty, inverse

    def forward(self, net: torch.nn.Module, batch: Batch, randn: Callable | None = None,
                seen: Evaluation | None = None) -> dict[str, torch.Tensor]:
        """{'denoise': [N]}, and 'log_weight' where the weight is learned.

        seen: the Evaluation, if there is one already. Draws nothing from randn."""
        x, D, _ = seen or evaluate(net, batch)
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


class Objective(torch.nn.Module):
    """Terms that share one evaluation of the denoiser; parameters of the terms are parameters of the objective.

    The first term is evaluated in every step, and is the one used for validation. timesteps: a piece of timesteps.TIMESTEPS over its
    levels; the caller calls redraw() for each batch before, and the timesteps' update() after the last micro-batch of a step.
    Raises ValueError for two terms with the same name."""

    def __init__(self, terms: list[Term], timesteps: Uniform | None = None) -> None:
        super().__init__()
        names = [term.name for term in terms]
        if len(set(names)) < len(names):
            raise ValueError(f'two of the terms {", ".join(names)} have the same name; use one of them')
        if terms[0].every != 1:
            raise ValueError(f'every={terms[0].every}: the first term, {names[0]}, must be evaluated in every step')
        self.terms, self.timesteps = torch.nn.ModuleDict(zip(names, terms)), timesteps or Uniform()

    @property
    def first(self) -> Term:
        """The main term, which is used for validation."""
        return next(iter(self.terms.values()))

    @property
    def evaluations(self) -> float:
        """Network evaluations (forward passes of one image) per image and step, on average."""
        return 1 + sum(term.evaluations for term in self.terms.values())

    def set_teacher(self, net: torch.nn.Module) -> None:
        """Gives the averaged network to the terms that need it."""
        for term in self.terms.values():
            if term.needs_teacher:
                term.set_teacher(net)

    def groups(self, net: torch.nn.Module) -> list[dict]:
        """What the optimizer trains: parameter groups [{"params": [...]}]; "factor" in a group multiplies the learning rate."""
        return [{'params': [p for p in (*net.parameters(), *self.parameters()) if p.requires_grad]}]

    def resting(self, net: torch.nn.Module, step: int) -> list[torch.nn.Parameter]:
        """Parameters that this step must leave alone, although they have gradients (which are 0)."""
        return []

    def due(self, step: int) -> tuple[str, ...]:
        """Names of the terms that are evaluated in this step; a compiled step has one graph for each choice."""
        return tuple(name for name, term in self.terms.items() if term.due(step))

    def redraw(self, batch: Batch, randn: Callable, due: tuple[str, ...]) -> Batch:
        """The batch with the levels to train at. due: as due() says."""
        return self.timesteps.redraw(batch, randn)

    def forward(self, net: torch.nn.Module, batch: Batch, randn: Callable) -> dict[str, torch.Tensor]:
        """{term name: [N]} of all terms, weighted by the timesteps; they are not summed, so that each can be reported separately."""
        terms, found = self.timesteps.weigh(self.values(net, batch, randn, self.due(randn.step)), batch)
        self.timesteps.note(*found)
        return terms

    def values(self, net: torch.nn.Module, batch: Batch, randn: Callable, due: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """{term name: [N]} without the weights of the timesteps. due: as due() says. It does not read randn.step."""
        seen = evaluate(net, batch, outputs=any(term.needs_outputs for name, term in self.terms.items() if name in due))
        values = {}
        for name, term in self.terms.items():
            values |= term(net, batch, randn, seen) if name in due else {name: self._nothing(term, seen)}
        return values

    def _nothing(self, term, seen):
        """Zeros that depend on the term's own parameters: every rank must have gradients of all of them in every step."""
        return seen.x.new_zeros(len(seen.x)) + sum(0 * p.sum() for p in term.parameters() if p.requires_grad)


def build_terms(specs: list[str], **context: Any) -> list[Term]:
    """The Terms that specs of TERMS name, such as "denoise:inverse=true"; context: the arguments that Term supplies. Raises UserError."""
    return [registry.build(spec, TERMS, '--term', **context) for spec in specs]


TERMS = {'denoise': AmbientLoss}  # the other files of this package add theirs
