# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules.

An optimizer is called as (params, lr) with its keys; a schedule as (nimg, batch) with its keys, and returns the factor of --lr for the
step after nimg images. Every schedule is multiplied by the ramp-up."""

import math
from collections.abc import Iterable

import torch

from torch_utils import registry
from training.run.config import OptimizerConfig


def adam(params: Iterable[torch.nn.Parameter], lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
         weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015), whose weight_decay is an L2 penalty added to the gradient, as in the published code."""
    return torch.optim.Adam(params, lr=lr, betas=_betas(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True)


def adamw(params: Iterable[torch.nn.Parameter], lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
          weight_decay: float = 0.01) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): Adam with decoupled weight decay, every step multiplying each weight by 1 - lr weight_decay."""
    return torch.optim.AdamW(params, lr=lr, betas=_betas(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True)


def _betas(beta1, beta2):
    for name, value in (('beta1', beta1), ('beta2', beta2)):
        if not 0 <= value < 1:
            raise ValueError(f'{name}={value} must be 0 or more and below 1')
    return float(beta1), float(beta2)  # PyTorch takes no whole numbers


def constant(nimg: int, batch: int) -> float:
    """Constant learning rate, as in EDM (Karras et al. 2022)."""
    return 1.0


def inverse_sqrt(nimg: int, batch: int, ref: float = 70000) -> float:
    """Inverse square root decay: 1 / sqrt(max(t / ref, 1)) after t steps, constant for the first `ref` of them (Karras et al. 2024,
    equation 67).

    ref=0: constant throughout."""
    if not 0 <= ref < math.inf:
        raise ValueError(f'ref={ref} must be 0 or more steps')
    return 1 / math.sqrt(max(nimg / (ref * batch), 1)) if ref else 1.0


def cosine(nimg: int, batch: int, kimg: float = 0.0, least: float = 0.0) -> float:
    """Cosine decay from 1 to `least` over `kimg` thousand images, by default the whole of --duration (Loshchilov & Hutter 2017).

    kimg=0 stands for --duration of the run's first command; a run that is continued with a longer --duration keeps its curve."""
    if not (0 < kimg < math.inf and 0 <= least <= 1):
        raise ValueError(f'kimg={kimg} must be above 0, and least={least} from 0 to 1')
    return least + (1 - least) * (1 + math.cos(math.pi * min(nimg / (kimg * 1e3), 1))) / 2


class LearningRate:
    """(nimg, batch) -> the learning rate of an OptimizerConfig: lr times ramp-up times schedule."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.lr, self.rampup = config.lr, max(config.rampup_kimg * 1e3, 1e-8)
        self.schedule = registry.build(config.schedule, LR_SCHEDULES, '--lr-schedule')

    def __call__(self, nimg: int, batch: int) -> float:
        return self.lr * min(nimg / self.rampup, 1) * self.schedule(nimg, batch)


OPTIMIZERS = {'adam': adam, 'adamw': adamw}
LR_SCHEDULES = {'constant': constant, 'cosine': cosine, 'inverse_sqrt': inverse_sqrt}
