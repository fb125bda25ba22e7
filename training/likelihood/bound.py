# SPDX-License-Identifier: Apache-2.0
"""The variational bound of images under a denoiser, term by term (Nichol & Dhariwal 2021, equations 4 to 7), and its plot."""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from dnnlib.figures import figure
from torch_utils import misc
from training.diffusion.discrete import Diffusion, bound_terms, prior_bits


class Bound(NamedTuple):
    """The bound of each image in bits per dimension, total = prior + vb.sum(1); all float64 on the device of the images."""

    total: torch.Tensor    # [N]
    prior: torch.Tensor    # [N], KL of x_T to the standard normal prior
    vb: torch.Tensor       # [N,T], the term of each step: KL of the reverse step; for the first one -log P of the 8-bit values
    x0_mse: torch.Tensor   # [N,T], mean squared error of D (within [-1,1])
    eps_mse: torch.Tensor  # [N,T], the same in units of the noise


def variational_bound(net: Callable, diffusion: Diffusion, x0: torch.Tensor, noise: Callable[[int], torch.Tensor], *,
                      class_labels: torch.Tensor | None = None, variance: str = 'large',
                      progress: Callable[[float], object] | None = None) -> Bound:
    """Evaluates every term of the bound once, each with independent noise.

    net(x, sigma [n,1,1,1], class_labels) -> D, called at the levels of the `diffusion` (a Diffusion); any denoiser gives a bound, a
    bad one a loose bound. x0: [N,C,H,W] grey levels k / 127.5 - 1. noise(t) -> standard normal [N,C,H,W] of step t.
    variance: "large" (beta), "small" (beta tilde), or "learned", from the further channels of net.outputs().
    progress(n): called after every step with N / T. On the CPU an image's result does not depend on the others.
    Raises ValueError where the denoiser is not finite."""
    x0, steps = x0.double(), []
    for t in range(diffusion.steps):
        x = x0 + float(diffusion.levels[t]) * noise(t).to(x0)
        steps.append(step_terms(net, diffusion, x0, x, t, class_labels, variance))
        if progress:
            progress(len(x0) / diffusion.steps)
    vb, x0_mse, eps_mse = torch.stack(steps, dim=2)
    prior = torch.cat([prior_bits(diffusion, x0[rows])[:count] for rows, count in _chunks(net, x0)])
    return Bound(prior + torch.stack([row.sum() for row in vb]), prior, vb, x0_mse, eps_mse)


def step_terms(net: Callable, diffusion: Diffusion, x0: torch.Tensor, x: torch.Tensor, t: int, class_labels: torch.Tensor | None = None,
               variance: str = 'large') -> torch.Tensor:
    """vb, x0_mse and eps_mse of step t, float64 [3,N], from images x at its level; other arguments as in variational_bound."""
    parts = [_terms(net, diffusion, x0[rows], x[rows], t, None if class_labels is None else class_labels[rows], variance)[:, :count]
             for rows, count in _chunks(net, x0)]
    return torch.cat(parts, dim=1)


def _chunks(net, x):
    return misc.chunks(len(x), x.device, misc.rows_per_call(net, x.shape[2:], x.device, len(x)))


@torch.no_grad()
def _terms(net, diffusion, x0, x, t, class_labels, variance):
    """vb, x0_mse and eps_mse, [3,n]."""
    sigma = x.new_full([len(x), 1, 1, 1], float(diffusion.levels[t]))
    D, out = net.outputs(x, sigma, class_labels) if variance == 'learned' else (net(x, sigma, class_labels), None)
    if not D.isfinite().all():
        raise ValueError(f'the network is not finite at sigma={float(diffusion.levels[t]):.4g}')
    when = torch.full([len(x)], t, device=x.device)
    if out is not None:
        return torch.stack(bound_terms(diffusion, x0, D.double(), when, out.double()))
    return torch.stack(bound_terms(diffusion, x0, D.double(), when, fixed=variance))


def write_picture(path: str | os.PathLike, levels: Sequence[float], terms: dict) -> None:
    """Writes a PNG of the terms against the noise level: bits per dimension of each step, and the two mean squared errors.

    levels: [T]. terms: {"vb", "x0_mse", "eps_mse"}: [T]. Needs matplotlib."""
    titles = {'vb': f'Bits per dimension of each step ({sum(terms["vb"]):.3f} in all)', 'x0_mse': 'Squared error of x_0',
              'eps_mse': 'Squared error of epsilon'}
    with figure(path, '--plot', 1, 3, (13, 3.6)) as (_, axes):
        for axis, (name, title) in zip(axes.flat, titles.items()):
            axis.plot(levels, terms[name], linewidth=1.2, marker='.' if len(levels) < 60 else None)
            axis.set(title=title, xlabel='sigma', xscale='log', yscale='log')
            axis.title.set_fontsize(10)
            axis.grid(alpha=0.3)
