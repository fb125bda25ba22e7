# SPDX-License-Identifier: Apache-2.0
"""Log-likelihood of images under a denoiser, by the probability-flow ODE and an adaptive solver with a separate step size per image.

The flow dx/dsigma = (x - D) / sigma transports p(x; sigma) between levels, and log p decreases along it by the divergence
(C H W - tr dD/dx) / sigma (Song et al. 2021, section 4.3; Karras et al. 2022, equation 1)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from torch_utils import misc

SAFETY = 0.9       # safety factor of the next step size
SHRINK, GROW = 0.2, 5.0  # smallest and largest ratio of a step size to the previous one

# Dormand and Prince 1980, 5(4): nodes, weights of the earlier slopes in each stage, orders 5 minus 4. The last stage is the result.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = ((1 / 5,),
          (3 / 40, 9 / 40),
          (44 / 45, -56 / 15, 32 / 9),
          (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
          (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
          (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84))
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class Likelihood(NamedTuple):
    """The result of log_likelihood for each image, on x's device."""

    log_p: torch.Tensor  # float64 [N], log p(x; sigma_min), nats
    evaluations: torch.Tensor  # int64 [N], calls of the denoiser


def log_likelihood(net: Callable, x: torch.Tensor, *, probes: torch.Tensor | None = None, class_labels: torch.Tensor | None = None,
                   sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5, rtol: float = 1e-5, atol: float = 1e-5,
                   max_steps: int = 1000, progress: Callable[[int], object] | None = None) -> Likelihood:
    """log p(x; sigma_min) under the denoiser's probability flow, whose end at sigma_max is N(0, sigma_max^2 + sigma_data^2).

    Levels below sigma_min are left out: for an exact denoiser this costs KL(p(.; 0) | p(.; sigma_min)) nats per image on average.

    net(x, sigma [n,1,1,1], class_labels) -> D, differentiable in x, in any float dtype. x: [N,C,H,W], network units.
    probes: [N,K,C,H,W] of +1 and -1, for the estimate of the trace as the mean of z^T (dD/dx) z (Hutchinson 1990; the K probes stay the
    same along the path); None: the exact trace, C H W backward passes per evaluation. class_labels: [N, label_dim] or None.
    rtol, atol: bounds on the error of a step, for values of unit size and for log p per dimension alike; the rounding of a float32
    network makes less than about 1e-6 useless. progress(n): called when n more images are done.
    On the CPU an image's result does not depend on the others, bit for bit at equal threads. Returns Likelihood.
    Raises ValueError where the denoiser is not finite, or where an image needs more than max_steps steps.

    The ODE is solved in the angle theta, sigma = sigma_data tan(theta), and in y = x / sqrt(sigma^2 + sigma_data^2): there
    dy/dtheta = (c_skip x - D) / c_out is the negative of EDM's network (Lu and Song 2024), which is of unit size at
    every level, and vanishes for Gaussian data of std sigma_data."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f'0 < sigma_min < sigma_max is needed, got sigma_min={sigma_min:g}, sigma_max={sigma_max:g}')
    flow = _Flow(net, x.shape[1:], probes, class_labels, sigma_data)
    start, end = (math.atan(sigma / sigma_data) for sigma in (sigma_min, sigma_max))
    scale = math.hypot(sigma_min, sigma_data)
    state = torch.cat([x.flatten(1).double() / scale, x.new_zeros([len(x), 1], dtype=torch.float64)], dim=1)  # [N, CHW + 1]
    state, evaluations = integrate(flow, state, start, end, rtol=rtol, atol=atol, first_step=start, max_steps=max_steps,
                                   progress=progress)
    y, volume = state[:, :-1], state[:, -1] * flow.dims
    log_prior = -_row_means(y.square()) * flow.dims / 2 - flow.dims / 2 * math.log(2 * math.pi)  # of y at sigma_max
    return Likelihood(log_prior + volume - flow.dims * math.log(scale), evaluations)


class _Flow:
    """Vector field for integrate(): (theta [n], state [n, CHW + 1], rows [n]) -> d state / d theta; the last column is log p / CHW."""

    def __init__(self, net, shape, probes, class_labels, sigma_data):
        self.net, self.shape, self.dims = net, shape, math.prod(shape)
        self.probes, self.class_labels, self.sigma_data = probes, class_labels, sigma_data

    def __call__(self, theta, state, rows):
        sin, cos = (_each(function, theta)[:, None] for function in (math.sin, math.cos))
        x = self.sigma_data / cos * state[:, :-1]
        D, trace = self.denoise(x, self.sigma_data * sin / cos, rows)
        slope = (cos ** 2 * x - D) / (self.sigma_data * sin)
        divergence = (cos ** 2 - trace / self.dims) / (sin * cos)
        return torch.cat([slope, divergence], dim=1)

    def denoise(self, x, sigma, rows):
        """(D [n,CHW], tr dD/dx [n,1]), float64, of x [n,CHW] at sigma [n,1]; rows: which of the probes and labels are theirs."""
        parts = []
        for chunk, count in misc.chunks(len(x), x.device, misc.rows_per_call(self.net, self.shape[1:], x.device, len(x))):
            D, trace = self._chunk(x[chunk].unflatten(1, self.shape), sigma[chunk], rows[chunk])
            parts.append(torch.cat([D, trace], dim=1)[:count])
        D, trace = torch.cat(parts).split([self.dims, 1], dim=1)
        if not D.isfinite().all():
            raise ValueError(f'the network is not finite at sigma={float(sigma[~D.isfinite().all(dim=1)][0]):.4g}')
        return D, trace

    @torch.enable_grad()
    def _chunk(self, x, sigma, rows):
        x = x.requires_grad_()
        D = self.net(x, misc.batched(sigma), None if self.class_labels is None else self.class_labels[rows])
        trace = torch.zeros_like(sigma)
        count = self.dims if self.probes is None else self.probes.shape[1]
        for k in range(count):
            z = self._unit(D, k) if self.probes is None else self.probes[rows, k].to(D.dtype)
            pulled, = torch.autograd.grad(D, x, z, retain_graph=k + 1 < count)  # z^T dD/dx; images do not mix
            trace += _row_means((z * pulled).double().flatten(1))[:, None] * self.dims
        return D.detach().double().flatten(1), trace if self.probes is None else trace / count

    def _unit(self, D, k):
        z = torch.zeros_like(D).flatten(1)
        z[:, k] = 1
        return z.view_as(D)


def integrate(field: Callable, state: torch.Tensor, start: float, end: float, *, rtol: float, atol: float, first_step: float,
              max_steps: int = 1000, progress: Callable[[int], object] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Solves d state / dt = field(t [n], state [n,K], rows [n]) from t = start to end > start, with a separate step size per row.

    state: float64 [N,K]. field gets the rows that are not finished, and their indices among the N (int64). A step is accepted where
    its error is within atol + rtol |state|: in root mean square over the columns, and in the last column by itself.
    Returns (state at end [N,K], calls of field for each row, int64 [N]). Raises ValueError after max_steps steps, including rejected
    ones."""
    done, calls = torch.empty_like(state), torch.zeros(len(state), dtype=torch.int64, device=state.device)
    rows = torch.arange(len(state), device=state.device)
    t, step = torch.full_like(state[:, 0], start), torch.full_like(state[:, 0], first_step)
    slope = field(t, state, rows)
    for taken in range(1, max_steps + 1):
        last = t + step >= end
        step = torch.where(last, end - t, step)
        reached, error, end_slope = _step(field, t, state, slope, step, rows)
        ratio = _error_ratio(error, atol + rtol * torch.maximum(state.abs(), reached.abs()))
        good = ratio <= 1
        state, slope = (torch.where(good[:, None], new, old) for new, old in ((reached, state), (end_slope, slope)))
        t = torch.where(good, t + step, t)
        step = step * (SAFETY * _each(lambda r: r ** -0.2, ratio.clamp(min=1e-10))).clamp(SHRINK, GROW)
        finished = good & last
        if finished.any():
            done[rows[finished]], calls[rows[finished]] = state[finished], 1 + taken * len(STAGES)
            rows, t, step, state, slope = (values[~finished] for values in (rows, t, step, state, slope))
            if progress:
                progress(int(finished.sum()))
        if not len(rows):
            return done, calls
    raise ValueError(f'an image needs more than {max_steps} steps; it is at {float(t.min()):.4g} of {start:.4g} to {end:.4g}')


def _step(field, t, state, slope, step, rows):
    """(state after the step, its error, the slope there), all [n,K]."""
    slopes = [slope]
    for node, weights in zip(NODES, STAGES):
        reached = state + step[:, None] * _weighted(weights, slopes)
        slopes.append(field(t + node * step, reached, rows))
    return reached, step[:, None] * _weighted(ERROR, slopes), slopes[-1]


def _weighted(weights, slopes):
    return sum(weight * slope for weight, slope in zip(weights, slopes) if weight)


def _error_ratio(error, allowed):
    """[n]: the error of each row relative to the tolerance."""
    ratio = error / allowed
    return torch.maximum(_row_means(ratio[:, :-1].square()).sqrt(), ratio[:, -1].abs())


def _each(function, values):
    """function(number) of each of values [n]: PyTorch's vectorised powers differ in the last bit with the position in a tensor."""
    return values.new_tensor([function(value) for value in values.tolist()])


def _row_means(values):
    """Means [n] of the rows of [n,K], one by one: the rounding of a sum over many rows at once would depend on their number."""
    return torch.stack([row.mean() for row in values])
