# SPDX-License-Identifier: Apache-2.0
"""Moving averages of a network's weights, measured in images, and the reconstruction of other averages after a run."""

import copy
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch

from torch_utils import misc


class Average:
    """Base class of the averages: a frozen copy of the network that update() moves towards the weights, by 1 - beta().

    copy: makes the copy; that of a network which is divided among the ranks is divided, too (training/run/sharding.py).
    Attribute module: the averaged network, in eval mode and without gradients."""

    def __init__(self, net: torch.nn.Module, copy: Callable[[torch.nn.Module], torch.nn.Module] = copy.deepcopy) -> None:
        self.module = copy(net).eval().requires_grad_(False)

    def beta(self, nimg: int, batch: int) -> float:
        """The factor by which an update with `batch` images, after nimg images, multiplies the average."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, net: torch.nn.Module, nimg: int, batch: int) -> None:
        """Moves the average towards net, of the same structure; nimg: images before this batch. Does not wait for the device.

        Buffers are copied: running statistics are averages already, and constants stay constant."""
        mine, theirs = ([misc.local(p) for p in module.parameters()] for module in (self.module, net))
        torch._foreach_lerp_(mine, theirs, 1 - self.beta(nimg, batch))
        for own, new in zip(self.module.buffers(), net.buffers(), strict=True):
            own.copy_(new)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the averaged network."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restores an average from state_dict()."""
        self.module.load_state_dict(state)


class HalfLifeEMA(Average):
    """EDM's average with a half-life of halflife_kimg thousand images (Karras et al. 2022, appendix F.2).

    rampup_ratio: the half-life is at most this fraction of the images so far, so that the initial weights soon fade; None: no ramp."""

    def __init__(self, net: torch.nn.Module, halflife_kimg: float = 500, rampup_ratio: float | None = 0.05,
                 copy: Callable[[torch.nn.Module], torch.nn.Module] = copy.deepcopy) -> None:
        if not halflife_kimg >= 0:
            raise ValueError(f'halflife_kimg={halflife_kimg} must be 0 or more')
        if rampup_ratio is not None and not rampup_ratio > 0:
            raise ValueError(f'rampup_ratio={rampup_ratio} must be positive, or None for no ramp')
        super().__init__(net, copy)
        self.halflife_kimg, self.rampup_ratio = halflife_kimg, rampup_ratio

    def beta(self, nimg: int, batch: int) -> float:
        """As Average.beta."""
        halflife = self.halflife_kimg * 1e3
        if self.rampup_ratio is not None:
            halflife = min(halflife, self.rampup_ratio * nimg)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0


class PowerFunctionEMA(Average):
    """Power-function average: weights at time tau count in proportion to tau^gamma, for every length of the run (Karras et al. 2024,
    section 3.1).

    sigma_rel: the width of that profile relative to the run; others can be reconstructed from 0.05 and 0.10 afterwards."""

    def __init__(self, net: torch.nn.Module, sigma_rel: float = 0.05,
                 copy: Callable[[torch.nn.Module], torch.nn.Module] = copy.deepcopy) -> None:
        self.sigma_rel, self.gamma = sigma_rel, exponent(sigma_rel)
        super().__init__(net, copy)

    def beta(self, nimg: int, batch: int) -> float:
        """As Average.beta: (1 - batch / (nimg + batch))^(gamma + 1), so that the first update copies the network."""
        return (nimg / (nimg + batch)) ** (self.gamma + 1)


def exponent(sigma_rel: float) -> float:
    """gamma >= 0 of the power function tau^gamma whose relative width is sigma_rel (Karras et al. 2024, appendix C.1)."""
    if not 0 < sigma_rel <= width(0.0):
        raise ValueError(f'sigma_rel={sigma_rel} must lie above 0 and at most at {width(0.0):.4f}, the width of the plain mean')
    inverse = float(sigma_rel) ** -2
    # width(gamma) = sigma_rel as a polynomial; the largest root is the only one that is not negative.
    return max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max(), 0.0)


def width(gamma: float) -> float:
    """sigma_rel = sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))): the std of the profile tau^gamma on [0, 1]."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def inner_product(t_a: np.ndarray | float, gamma_a: np.ndarray | float, t_b: np.ndarray | float,
                  gamma_b: np.ndarray | float) -> np.ndarray | float:
    """Integral of the product of two profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]; NumPy arrays broadcast."""
    first = np.minimum(t_a, t_b)
    # (first / t)^(gamma + 1) / first each, one of which has the base 1; written so that no large power overflows.
    shared = (first / t_a) ** (gamma_a + 1) * (first / t_b) ** (gamma_b + 1) / first
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shared


def reconstruction(stored: list[tuple[int, float]], target: tuple[int, float]) -> np.ndarray:
    """Factors of stored averages whose sum approximates another average, float64 [K] with the sum 1 (Karras et al. 2024, appendix C.3).

    stored: K pairs (nimg, sigma_rel) of PowerFunctionEMAs. target: such a pair, of any width, at the time of one of them; between
    snapshots a profile cannot be approximated well. Snapshots later than the target get 0; factors may be negative. Raises ValueError."""
    t, gamma = _profiles(stored)
    t_new, gamma_new = _profiles([target])
    if t_new not in t:
        near = t[np.argsort(abs(t - t_new), kind='stable')[:1]]
        raise ValueError(f'nimg={target[0]} must be the time of a stored average, the nearest of which is {near.astype(int).tolist()}')
    usable = t <= t_new
    matrix = inner_product(t[usable, None], gamma[usable, None], t[usable], gamma[usable])
    # Normalised to unit length, because profiles of early times are larger by orders of magnitude, and those of dense snapshots similar.
    length = np.sqrt(matrix.diagonal())
    wanted = inner_product(t[usable], gamma[usable], t_new, gamma_new)
    found = np.linalg.solve(matrix / np.outer(length, length), wanted / length) / length
    factors = np.zeros(len(usable))
    factors[usable] = found / found.sum()
    return factors


def profile_error(stored: list[tuple[int, float]], target: tuple[int, float], factors: np.ndarray) -> float:
    """Relative error of the reconstructed profile: the norm of its difference to the wanted one over the norm of the latter.

    0.003 for widths between 0.05 and 0.12 from 16 even snapshots of (0.05, 0.10); more for widths far outside, or few snapshots."""
    t, gamma = (np.append(*pair) for pair in zip(_profiles(stored), _profiles([target])))
    signed = np.append(factors, -1.0)
    products = inner_product(t[:, None], gamma[:, None], t, gamma)
    return math.sqrt(max(signed @ products @ signed, 0.0) / products[-1, -1])


def _profiles(averages):
    """Pairs (nimg, sigma_rel) -> (times, exponents), float64 each."""
    pairs = [(nimg, exponent(sigma_rel)) for nimg, sigma_rel in averages]
    if any(not nimg > 0 for nimg, _ in pairs):
        raise ValueError('nimg of an average must be above 0')
    return np.array(pairs, np.float64).reshape(-1, 2).T


@torch.no_grad()
def combine(states: Iterable[dict], factors: Iterable[float]) -> dict[str, torch.Tensor]:
    """The sum of factor times state dict, computed in float64 and returned in the dtypes of the states.

    states: iterable of K state dicts, of which one at a time is in memory. Integers are taken from the last of them."""
    total, dtypes = {}, {}
    for state, factor in zip(states, factors, strict=True):
        for name, tensor in state.items():
            dtypes[name] = tensor.dtype
            if tensor.is_floating_point():
                total[name] = total.get(name, 0) + tensor.double() * float(factor)
            else:
                total[name] = tensor
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}
