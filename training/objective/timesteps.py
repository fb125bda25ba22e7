# SPDX-License-Identifier: Apache-2.0
"""How a discrete-time objective samples timesteps: uniformly, or more often where the loss is large (Nichol & Dhariwal 2021)."""

import math
from collections.abc import Callable

import torch

from torch_utils import distributed
from training.data.batches import Batch


class Uniform(torch.nn.Module):
    """Uniform timesteps: every timestep of the diffusion is equally likely, without importance weights."""

    def over(self, levels: torch.Tensor) -> 'Uniform':
        """Prepares for the noise levels of a diffusion, ascending; returns itself."""
        return self

    def redraw(self, batch: Batch, randn: Callable) -> Batch:
        """The batch, with the levels to train at."""
        return batch

    def weigh(self, terms: dict[str, torch.Tensor], batch: Batch) -> tuple[dict[str, torch.Tensor], tuple]:
        """The terms {name: [N]}, weighted so that their mean is that over uniform timesteps; and what note() is to be called with. Keeps
        nothing, because a compiled graph must be a function of its inputs."""
        return terms, ()

    def note(self, *found: torch.Tensor) -> None:
        """Called with what weigh() found in a micro-batch."""

    def update(self) -> None:
        """Called after each step, to update the estimates."""


class SecondMoment(Uniform):
    """Importance sampling: draws t with p_t proportional to sqrt(E[L_t^2]), estimated from the latest losses of each t, and weights the
    loss by 1 / (T p_t), which keeps it unbiased and lowers its variance (Nichol & Dhariwal 2021).

    history: how many losses of each t are kept; until every t has that many, the draws are uniform. uniform: share of uniform draws, which
    keeps every p_t above 0. The kept losses are the state, equal on all ranks; nothing here waits for the device.
    Only the timesteps of clean images are redrawn and recorded: the level of a noisy image depends on its sigma_n, and stays that of its
    pair."""

    def __init__(self, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__()
        if history < 1:
            raise ValueError(f'history={history} must be at least 1')
        if not 0 < uniform <= 1:
            raise ValueError(f'uniform={uniform} must be above 0, so that every timestep can be drawn, and at most 1')
        self.history, self.uniform = history, uniform
        self._noted = []

    def over(self, levels: torch.Tensor) -> 'Uniform':
        steps = len(levels)
        self.register_buffer('levels', levels.float(), persistent=False)
        # Ring buffers: loss number n of a t, counted from 0, is stored at n % history.
        self.register_buffer('losses', torch.zeros(steps, self.history, dtype=torch.float64, device='cpu'))
        self.register_buffer('counts', torch.zeros(steps, dtype=torch.int64, device='cpu'))  # losses seen of each t
        return self

    def redraw(self, batch: Batch, randn: Callable) -> Batch:
        """Redraws the levels of the clean images according to the losses so far. Batch.factor holds the importance weights."""
        u = torch.special.erfc(randn('timestep', [len(batch.images)]).double() * -math.sqrt(0.5)) / 2  # uniform, from normal draws
        t, weight = self.draw(u)
        clean = batch.sigma_n.flatten() == 0
        sigma = self.levels[t].where(clean, batch.sigma.flatten()).reshape(batch.sigma.shape)
        return batch._replace(sigma=sigma, factor=weight.float().where(clean, 1))

    def weigh(self, terms: dict[str, torch.Tensor], batch: Batch) -> tuple[dict[str, torch.Tensor], tuple]:
        """Multiplies by the importance weights; the unweighted losses of the clean images are what is noted."""
        t = torch.searchsorted(self.levels, batch.sigma.flatten())
        found = t, sum(terms.values()).detach(), batch.sigma_n.flatten() == 0
        return {name: values * batch.factor for name, values in terms.items()}, found

    def probabilities(self) -> torch.Tensor:
        """p_t, float64 [T]."""
        steps = len(self.counts)
        size = self.losses.square().mean(1).sqrt()
        p = (1 - self.uniform) * size / size.sum() + self.uniform / steps
        return p.where((self.counts >= self.history).all() & (size.sum() > 0), 1 / steps)

    def draw(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Uniforms u in (0, 1), [N] -> (t int64 [N], importance weights 1 / (T p_t), float64 [N])."""
        p = self.probabilities()
        ends = p.cumsum(0)
        t = torch.searchsorted(ends, u * ends[-1], right=True).clamp(max=len(p) - 1)
        return t, 1 / (len(p) * p[t])

    def note(self, t: torch.Tensor, losses: torch.Tensor, counts: torch.Tensor) -> None:
        """Records losses [N] at t int64 [N] for the next update(), where `counts`, bool [N], is true and they are finite."""
        fine = counts & losses.isfinite()
        self._noted.append((t.where(fine, len(self.counts)), losses.detach().double().where(fine, 0)))

    def update(self) -> None:
        """Moves what all ranks recorded since the last call into the state, in the order of the global batch."""
        t, losses = (distributed.all_rows(torch.cat(column)) for column in zip(*self._noted, strict=True))
        self._noted.clear()
        # Sorted by t, stably, so that each loss's place in the ring buffer follows, and whether a later one overwrites it.
        order = t.argsort(stable=True)
        t, losses = t[order], losses[order]
        place, steps = torch.arange(len(t), device=t.device), len(self.counts)
        earlier = place - torch.searchsorted(t, t)
        later = torch.searchsorted(t, t, right=True) - place - 1
        slot = t * self.history + (torch.cat([self.counts, self.counts.new_zeros(1)])[t] + earlier) % self.history
        slot = slot.where((t < steps) & (later < self.history), steps * self.history)  # losses that are not kept go past the end
        rings = torch.cat([self.losses.flatten(), losses.new_zeros(1)]).scatter(0, slot, losses)
        self.losses.copy_(rings[:-1].reshape(self.losses.shape))
        self.counts += torch.zeros(steps + 1, dtype=torch.int64, device=t.device).index_add_(0, t, torch.ones_like(t))[:-1]


TIMESTEPS = {'second_moment': SecondMoment, 'uniform': Uniform}
