# SPDX-License-Identifier: Apache-2.0
"""From seeds to images: one random generator per seed, so that an image depends on its seed and not on the rest of the batch."""

import copy
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from dnnlib import UserError
from torch_utils import misc, registry
from training.diffusion import ambient, schedules
from training.sampling import steppers
from training.sampling.guidance import Guidance, Guided, check
from training.sampling.labels import default
from training.sampling.pixels import pictures
from training.sampling.writers import write_grid

NO_GUIDANCE = Guidance()
GRID_BATCH = 16  # batch size of sample_grid(), which can be stopped between two batches


class Samples(NamedTuple):
    """What generate_images yields; the three lists are aligned."""

    seeds: list  # [n] whole numbers, as given
    images: torch.Tensor  # [n,C,H,W] float64, network units
    labels: torch.Tensor | None  # [n] int64 classes or [n,label_dim] vectors, None for unconditional networks


class SeededDraws:
    """Random tensors whose row i comes from its own generator, seeded with seeds[i] mod 2^32."""

    def __init__(self, seeds: Iterable[int], device: torch.device | str = 'cpu') -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % 2 ** 32) for seed in seeds]

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Standard normal [n, *shape]."""
        return torch.stack([torch.randn(shape, generator=g, dtype=dtype, device=self.device) for g in self.generators])

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal of x's shape and dtype."""
        return self.randn(x.shape[1:], x.dtype)

    def randint(self, high: int) -> torch.Tensor:
        """int64 [n], uniform over 0 .. high - 1."""
        return torch.stack([torch.randint(high, [], generator=g, device=self.device) for g in self.generators])


@torch.no_grad()
def generate_images(net: Callable, seeds: Iterable[int], *, schedule: Callable = schedules.edm, stepper: Callable = steppers.heun,
                    num_steps: int | None = 18, batch: int = 64, labels: Callable | None = None, guidance: Guidance = NO_GUIDANCE,
                    device: torch.device | str | None = None, rank: int = 0, world: int = 1,
                    report: Callable[[int], None] | None = None) -> Iterator[Samples]:
    """Yields Samples for this rank's share of the seeds, in order, `batch` at a time; on the CPU the next multiple of misc.rows_per_call().

    net: a denoiser in eval mode. schedule(num_steps) -> levels, and stepper: pieces with their options bound.
    labels: a source of labels.py; None draws a class for each seed, and gives no caption. guidance: a Guidance. device: where to
    sample, by default where the network is. rank, world: this process takes every world-th seed. The images do not depend on rank, world
    or `batch`: bit for bit on the CPU with equal threads, up to rounding of the network on a GPU. No autograd graph is kept.
    report: called with the number of images after each evaluation of the network on a batch.
    Raises ValueError for guidance that the network does not allow and for levels that the schedule refuses."""
    assert not getattr(net, 'training', False), 'sampling needs the network in eval mode'
    assert batch >= 1, f'batch must be 1 or more, got {batch}'
    check(net, guidance)
    device = torch.device(device) if device is not None else network_device(net)
    sigmas = noise_levels(net, schedule, num_steps)
    labels = labels or default(net)
    mine = list(seeds)[rank::world]
    rows = misc.rows_per_call(net, net.img_resolution, device, min(batch, len(mine)))
    batch = -(-batch // rows) * rows  # fewer take as long
    for first in range(0, len(mine), batch):
        yield _sample(net, mine[first:first + batch], sigmas, stepper, labels, guidance, device, rows, report)


def _sample(net, seeds, sigmas, stepper, source, guidance, device, rows, report):
    # The order of the draws is the published one: latents, class, then one draw per step.
    draws = SeededDraws(seeds, device)
    latents = draws.randn([net.img_channels, *resolution(net)])
    labels = source(draws, seeds) if source else None
    x = latents.to(torch.float64) * sigmas[0]
    x = stepper(guided(net, labels, guidance, rows, report), x, sigmas, draws.randn_like)
    return Samples(seeds, x, labels)


def guided(net: Callable, labels: torch.Tensor | None = None, guidance: Guidance = NO_GUIDANCE, rows: int | None = None,
           report: Callable[[int], None] | None = None) -> Callable:
    """The denoiser that a stepper calls: the network with its labels, and with guidance where its weight is not 1."""
    denoise = ConditionedDenoiser(net, labels, rows, report)
    if guidance.weight == 1:
        return denoise
    worse = guidance.net
    guide = ConditionedDenoiser(net, None, rows) if worse is None else ConditionedDenoiser(worse, labels if worse.label_dim else None, rows)
    return Guided(denoise, guide, guidance.weight, guidance.interval, guidance.channels)


class ConditionedDenoiser:
    """A network with its labels bound: (x, sigma) -> D, always `rows` rows at a time, so that D does not depend on the batch.

    labels: int64 [N] classes, float32 [N, label_dim] vectors, or None for "no label". rows: by default misc.rows_per_call() of x.
    report: called with N after each evaluation.
    Attribute calls: evaluations so far."""

    def __init__(self, net: Callable, labels: torch.Tensor | None = None, rows: int | None = None,
                 report: Callable[[int], None] | None = None) -> None:
        self.net, self.rows, self.calls, self.report = net, rows, 0, report
        self.elsewhere, self._rounder = network_device(net).type != 'cpu', None
        classes = labels is not None and labels.ndim == 1
        self.labels = torch.nn.functional.one_hot(labels, net.label_dim).to(torch.float32) if classes else labels  # [N, label_dim]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return self._in_chunks(self.net, x, sigma)[0]

    def outputs(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(D, what else the network gives [N,K,H,W], K = 0 where that is nothing)."""
        if not hasattr(self.net, 'outputs'):
            return self(x, sigma), x[:, :0]
        return self._in_chunks(self.net.outputs, x, sigma)

    @property
    def gives_variance(self) -> bool:
        """Whether outputs() has the variance of a sampling step."""
        return getattr(self.net, 'gives_variance', False)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The network's nearest level, for networks that know discrete levels only; sigma on the CPU in and out.

        Where the network is on another device, its own levels are copied once."""
        if not hasattr(self.net, 'round_sigma'):
            return sigma
        if not (self.elsewhere and sigma.is_cpu):
            return self.net.round_sigma(sigma.to(network_device(self.net))).to(sigma)
        self._rounder = self._rounder or _on_host(self.net)
        return self._rounder.round_sigma(sigma).to(sigma)

    def _in_chunks(self, function, x, sigma):
        """The tensors that function(x, sigma, labels) gives, put together from calls of equal size."""
        self.calls += 1
        sigma = ambient.level_on(x.device, sigma, torch.float32)
        replays, parts = getattr(self.net, 'replays', False), []
        size = self.rows or misc.rows_per_call(self.net, x.shape[2:], x.device, len(x))
        for rows, count in misc.chunks(len(x), x.device, size):
            if replays:
                torch.compiler.cudagraph_mark_step_begin()
            found = function(x[rows], sigma[rows] if sigma.ndim else sigma, None if self.labels is None else self.labels[rows])
            found = found if isinstance(found, tuple) else (found,)
            parts.append([tensor[:count].clone() if replays else tensor[:count] for tensor in found])  # the next call overwrites it
        if self.report:
            self.report(len(x))
        return [torch.cat(pieces) for pieces in zip(*parts)]


def _on_host(net):
    """A preconditioner that shares everything with another but has its own buffers, which hold its levels, on the CPU."""
    found = copy.copy(net)
    found._buffers = {name: value if value is None else value.cpu() for name, value in getattr(net, '_buffers', {}).items()}
    return found


def noise_levels(net: Callable, schedule: Callable, num_steps: int | None) -> torch.Tensor:
    """The schedule's levels within the network's range, rounded to the network's own levels; float64 [T + 1], ending in 0."""
    levels = schedule(num_steps, **sigma_range(net, schedule))
    return torch.cat([ConditionedDenoiser(net).round_sigma(levels[:-1]), levels[-1:]])


def sigma_range(net: Callable, schedule: Callable) -> dict[str, float]:
    """{sigma_min, sigma_max} of a schedule (those that it has), limited to the network's range."""
    chosen, cut = registry.parameters(schedule), {'sigma_min': max, 'sigma_max': min}
    return {key: limit(chosen[key], getattr(net, key)) for key, limit in cut.items() if key in chosen}


def with_time(net: Callable, schedule: Callable, stepper: Callable, sigmas: torch.Tensor) -> Callable:
    """The stepper; where its sigma(t) is given by name, the curve is fitted to the schedule's range, or to the levels if that is unbounded.

    Raises ValueError for a range that no such curve has."""
    name = stepper.keywords.get('schedule')
    if name is None:
        return stepper
    ends = sigma_range(net, schedule)
    if not 0 < ends['sigma_min'] <= ends['sigma_max'] < math.inf:
        ends = {'sigma_min': float(sigmas[-2]), 'sigma_max': float(sigmas[0])}
    return functools.partial(stepper, schedule=registry.build(name, schedules.TIMES, '--schedule', **ends))


def check_finite(part: Samples, who: str = '') -> None:
    """Raises UserError for Samples that are not finite, which would become black pictures. who: what errors call the network."""
    bad = (~part.images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f'{who and f"{who}: "}the image of seed {part.seeds[bad[0]]} is not finite ({len(bad)} of {len(part.seeds)} in '
                        'its batch are not); the weights are broken, or overflow in --precision=fp16')


def resolution(net: Callable) -> list[int]:
    """[H, W] of a network's images."""
    return misc.height_width(net.img_resolution)


def network_device(net: Callable) -> torch.device:
    """Where the network's parameters are; the CPU for a denoiser that has none."""
    parameters = net.parameters() if hasattr(net, 'parameters') else ()
    return next((p.device for p in parameters), torch.device('cpu'))


def sample_grid(net: Callable, count: int, path: str | os.PathLike, stop: Callable[[], bool] = lambda: False, output: Any = None,
                **options: Any) -> torch.Tensor | None:
    """Writes one picture of the images of seeds 0 .. count - 1, and returns them, [count,C,H,W] in network units. Writes nothing and
    returns None if stop() is true after a batch.

    output: of outputs.py, by default images as they are. options: those of generate_images, on one rank."""
    parts = []
    for part in generate_images(net, range(count), batch=GRID_BATCH, **options):
        parts.append(part)
        if stop():
            return None
    images = torch.cat([part.images for part in parts])
    write_grid(path, pictures(images, net.units) if output is None else output.pictures(output(images)))
    return images
