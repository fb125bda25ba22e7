# SPDX-License-Identifier: Apache-2.0
"""Distillation of a denoiser into a generator of one step, for data of which no clean image exists (DSD and RSD, Chen et al. and Zhang et
al. 2025, arXiv 2503.07578 and 2505.13377).

The teacher f is a denoiser trained by the ambient loss. Generator G(z) = net(level z, level) and auxiliary denoiser psi ("fake") start
from its weights and are trained in turns: psi by the ambient loss on G's images with noise of the data's level sigma_n, so that it
becomes to G what f is to the data; G by the difference of the two at x_t = x + sigma n, x = G(z).

Why noise goes: where f(., sigma) = psi(., sigma) for all x_t, the scores (f - x_t) / sigma^2 of the two laws at level sigma are equal, so
the laws are, and so are their characteristic functions p_0^(k) exp(-sigma^2 k^2 / 2). One level above sigma_n at which both denoisers are
exact therefore fixes the clean law, with its detail far below sigma_n. Below sigma_n neither denoiser was trained: a term there pulls G
towards whatever the networks extrapolate, and by default there is none.

On Gaussian data of variance v in some direction, with G's variance g^2 in it and exact denoisers a x_t and b x_t, a = v / (v + sigma^2),
b = g^2 / (g^2 + sigma^2), the expected gradient of rsd's numerator is dL/dg = -2 g (a - b) (1 - a + alpha (a - b)), and that of dmd
-g (a - b). Both vanish at g^2 = v only (for alpha > 1, also at g^2 = (alpha v + sigma^2) / (alpha - 1), and beyond it G is driven away),
and both have the sign of g^2 - v in between. Near v the two are in the ratio 2 sigma^2 / (v + sigma^2), whatever alpha is: alpha only
changes the pull far from the teacher, where it is larger for detail that G lacks."""

import math
from collections.abc import Callable

import torch

from torch_utils import misc
from training.data.batches import Batch
from training.diffusion import ambient
from training.diffusion.noise import normal_cdf
from training.objective.loss import Objective, Term
from training.objective.timesteps import Uniform

RHO = 7.0       # sigma^(1/RHO) is uniform
SMALLEST = 2e-3  # the published lowest level


class Turns(Uniform):
    """Whose step it is, and the levels of the generator's loss.

    In every fake_steps + 1 steps the last is the generator's, and the others are psi's, whose levels are those of the run's pairs. The
    generator's are drawn with sigma^(1/7) uniform between a lower limit and sigma_max. sigma_min: the lower limit; 0: buffer sigma_n of
    each pair, at least 0.002, because teacher and psi know nothing of levels below.
    The published draw, (80^(1/7) + (1 - u)(0.002^(1/7) - 80^(1/7)))^7 with u ~ U(0, 0.8), rises with u from 0.002 to 24.41, and is that
    of sigma_min=0.002 here."""

    def __init__(self, sigma_min: float, sigma_max: float, fake_steps: int, buffer: float) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max, self.fake_steps, self.buffer = sigma_min, sigma_max, fake_steps, buffer

    def is_fakes(self, step: int) -> bool:
        """Whether psi is trained in this step, else the generator."""
        return step % (self.fake_steps + 1) < self.fake_steps

    def redraw(self, batch: Batch, randn: Callable) -> Batch:
        """The batch with the levels of the generator's loss."""
        u = normal_cdf(randn('distill_level', batch.sigma.shape)).to(batch.sigma)
        least = (batch.sigma_n * self.buffer).clamp(min=SMALLEST)
        least = torch.full_like(least, self.sigma_min) if self.sigma_min else least
        low, high = least ** (1 / RHO), self.sigma_max ** (1 / RHO)
        return batch._replace(sigma=torch.maximum((low + u * (high - low)) ** RHO, least))


class Distillation(Objective):
    """Base of the objectives that train a generator; a subclass defines difference(x, f, psi) -> [N,C,H,W], the generator's loss.

    terms: [AmbientLoss], psi's. networks: (teacher f in eval mode and without gradients, psi). buffer: of the run's pairs. teacher: its
    reference on the command line, not used here. level: noise level at which the network is used as a generator. sigma_min, sigma_max,
    fake_steps: see Turns. fake_lr: learning rate of psi, as a factor of --lr.
    psi's parameters are trained and stored with the objective; the teacher is neither. Raises ValueError for values out of range."""

    def __init__(self, terms: list[Term], networks: tuple[torch.nn.Module, torch.nn.Module], buffer: float, *, teacher: str = '',
                 level: float = 2.5, sigma_min: float = 0.0, sigma_max: float = 24.41, fake_steps: int = 1, fake_lr: float = 1.0) -> None:
        for name, value in dict(level=level, fake_lr=fake_lr).items():
            misc.require(0 < value < math.inf, f'{name}={value} must be positive')
        misc.require(0 <= sigma_min < sigma_max < math.inf, f'sigma_min={sigma_min},sigma_max={sigma_max} must satisfy '
                     '0 <= sigma_min < sigma_max')
        misc.require(fake_steps >= 1, f'fake_steps={fake_steps} must be 1 or more')
        super().__init__(terms, Turns(sigma_min, sigma_max, fake_steps, buffer))
        guide, self.fake = networks
        self.teacher, self.level, self.fake_lr = (guide,), level, fake_lr

    @property
    def evaluations(self) -> float:
        """Network evaluations per image and step, on average: two in psi's steps, three in the generator's."""
        fake_steps = self.timesteps.fake_steps
        return (2 * fake_steps + 3) / (fake_steps + 1)

    def groups(self, net: torch.nn.Module) -> list[dict]:
        first, = super().groups(net)
        if self.fake_lr == 1:
            return [first]
        own = {id(p) for p in self.parameters()}
        return [{'params': [p for p in first['params'] if id(p) not in own]},
                {'params': [p for p in first['params'] if id(p) in own], 'factor': self.fake_lr}]

    def resting(self, net: torch.nn.Module, step: int) -> list[torch.nn.Parameter]:
        return list((net if self.timesteps.is_fakes(step) else self).parameters())

    def set_teacher(self, net: torch.nn.Module) -> None:
        """Nothing: the teacher here is not the averaged network."""

    def due(self, step: int) -> tuple[str, ...]:
        return ('fake',) if self.timesteps.is_fakes(step) else ('generator',)

    def redraw(self, batch: Batch, randn: Callable, due: tuple[str, ...]) -> Batch:
        return batch if 'fake' in due else self.timesteps.redraw(batch, randn)

    def values(self, net: torch.nn.Module, batch: Batch, randn: Callable, due: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """{'fake': [N]} in psi's steps, {'generator': [N]} in the others; of `batch`, the images are not used."""
        labels = dict(class_labels=batch.class_labels)
        z = self.level * randn('distill_latents', batch.images.shape).to(batch.images)
        generate = lambda: net(z, torch.full_like(batch.sigma, self.level), **labels)
        if 'fake' in due:
            with torch.no_grad():
                x = generate()
            y = ambient.add_noise(x, 0.0, batch.sigma_n, randn('distill_corruption', x.shape).to(x))
            values = self.first(self.fake, batch._replace(images=y, augment_labels=None))
            values = {'fake' if name == self.first.name else name: value for name, value in values.items()}
        else:
            values = {'generator': self.generator_loss(generate(), batch, labels)}
        # Every rank must have gradients of all parameters in every step, those of the network that rests and those for augmentation labels
        # too; resting() keeps the optimizer from using them.
        name, value = next(iter(values.items()))
        return values | {name: value + sum(0 * p.sum() for p in (*net.parameters(), *self.parameters()) if p.requires_grad)}

    def generator_loss(self, x: torch.Tensor, batch: Batch, labels: dict) -> torch.Tensor:
        """The loss [N] of generated images x [N,C,H,W] at the batch's levels, with its noise.

        It is divided by the mean |x - f| of each image, without a gradient, as in Yin et al. 2024: the gradient then hardly depends on
        sigma. Its zero does not move: there f = psi at every x_t."""
        x_t = ambient.add_noise(x, 0.0, batch.sigma, batch.noise)
        teacher, = self.teacher
        f = teacher(x_t, batch.sigma, **labels)
        psi = torch.func.functional_call(self.fake, {name: p.detach() for name, p in self.fake.named_parameters()},
                                         (x_t, batch.sigma), labels)
        size = (x - f).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return self.difference(x, f, psi).flatten(1).sum(1) / size

    def difference(self, x: torch.Tensor, f: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        """The loss of each pixel, [N,C,H,W], before the division."""
        raise NotImplementedError


class RSD(Distillation):
    """Restoration score distillation, (f - psi) ((f - x) - alpha (f - psi)) (Zhang et al. 2025, with the loss of SiD, Zhou et al. 2024).

    It equals (1 - alpha) (f - psi)^2 + (f - psi) (psi - x); both are estimates of a Fisher divergence, and the gradient goes through x,
    x_t, f and psi. For white noise DSD is the same loss. alpha: 1.2 is published; 1 or less is stable from everywhere."""

    def __init__(self, terms: list[Term], networks: tuple[torch.nn.Module, torch.nn.Module], buffer: float, *, teacher: str = '',
                 alpha: float = 1.2, level: float = 2.5, sigma_min: float = 0.0, sigma_max: float = 24.41, fake_steps: int = 1,
                 fake_lr: float = 1.0) -> None:
        misc.require(0 <= alpha < math.inf, f'alpha={alpha} must be 0 or more')
        super().__init__(terms, networks, buffer, level=level, sigma_min=sigma_min, sigma_max=sigma_max, fake_steps=fake_steps,
                         fake_lr=fake_lr)
        self.alpha = alpha

    def difference(self, x: torch.Tensor, f: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        return (f - psi) * ((f - x) - self.alpha * (f - psi))


class DMD(Distillation):
    """Distribution matching distillation, x (psi - f) with a constant second factor: the gradient of the reverse Kullback-Leibler
    divergence (Yin et al. 2024), in place of rsd's Fisher divergence."""

    def difference(self, x: torch.Tensor, f: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        return x * (psi - f).detach()


DISTILLATIONS = {'dmd': DMD, 'rsd': RSD}
