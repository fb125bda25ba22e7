# SPDX-License-Identifier: Apache-2.0
"""Counts -> values whose noise has the standard deviation 1 everywhere, and the unbiased way back.

A value y = a N + offset + sqrt(b) e has N ~ Poisson(lambda) counts, the gain a, and read noise of variance b around the offset. Then

    z = (2/a) sqrt(a (y - offset) + 3 a^2 / 8 + b)

has a variance near 1 for every lambda that is not small (Anscombe 1948 for a = 1, b = 0; Murtagh, Starck and Bijaoui 1995). A denoiser
of z gives E[z], and y = z^2/4 - 3/8 of it would be too low, by 1/4 for Poisson counts, since the square root is concave. The inverse is
therefore that of lambda -> E[z | lambda] (Makitalo and Foi 2011, 2013). Arrays are NumPy arrays or tensors, of any shape."""

import math
from typing import Any

import numpy as np
import scipy.special

LEAST = math.sqrt(1.5)     # E[z] without counts and read noise, 2 sqrt(3/8): the closed form is 0 there
LOW = 4.0                  # mean count below which the noise of z has less variance than 1
NEWTON = 12                # iterations of expected(): from 2 sqrt(lambda + s^2 + 3/8) three reach the rounding errors
KEYS = ('a', 'b', 'offset')
TAIL, NODES = 8.0, 641     # moments(): stds of the normal that are summed over, and points there


class Stabiliser:
    """The transform of values with the gain a, read noise of variance b, and offset, all in the units of the values.

    a = 0: not known, to be estimated. Raises ValueError."""

    def __init__(self, a: float = 0.0, b: float = 0.0, offset: float = 0.0) -> None:
        self.a, self.b, self.offset = float(a), float(b), float(offset)
        if not all(map(math.isfinite, (self.a, self.b, self.offset))) or self.a < 0 or self.b < 0:
            raise ValueError('the gain a must be above 0, the variance b of the read noise 0 or more, and all numbers finite; a fit '
                             'var = a mean + b whose b is negative has offset=-b/a and b=0')
        if not self.a and (self.b or self.offset):
            raise ValueError('give the gain a as well, or neither a nor b, which are then estimated')

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stabiliser) and self.record() == other.record()

    def __hash__(self) -> int:
        return hash((self.a, self.b, self.offset))

    @property
    def is_known(self) -> bool:
        """Whether the gain is known."""
        return self.a > 0

    @property
    def read(self) -> float:
        """The variance of the read noise in counts."""
        return self.b / self.a ** 2

    def record(self) -> dict:
        """{"a", "b", "offset"}, as in dataset.json's units; from_record() is its inverse."""
        return {key: getattr(self, key) for key in KEYS}

    def counts(self, values: Any) -> Any:
        """Values -> counts, (y - offset) / a."""
        return (values - self.offset) / self.a

    def forward(self, values: Any) -> Any:
        """Noisy values -> z. Below the point where the root is 0, z is 0."""
        return 2 * (self.counts(values) + 0.375 + self.read).clip(min=0) ** 0.5

    def plain_inverse(self, z: Any) -> Any:
        """The algebraic inverse of forward(): biased for means of z."""
        return self.a * (z * z / 4 - 0.375 - self.read) + self.offset

    def inverse(self, z: Any) -> Any:
        """E[z] -> E[y], unbiased: the closed form of Makitalo and Foi (2011), less the variance of the read noise (2013).

        Within .0183 counts of the exact inverse for Poisson, .044 with read noise. Values of z below that of no counts give the offset."""
        return self.a * (_closed(z.clip(min=LEAST)) - self.read).clip(min=0) + self.offset

    def slope(self, z: Any) -> Any:
        """Derivative of inverse(), without its lower limit: a std of z times this is one of y, where it is small."""
        return self.a * _slope(z.clip(min=LEAST))

    def curvature(self, z: Any) -> Any:
        """Second derivative of inverse(): half of it times the variance of z is what inverse(mean of z) lacks of the mean of inverse(z)."""
        counted, z = z > LEAST, z.clip(min=LEAST)
        found = 0.5 + LEAST / (2 * z ** 3) - 33 / (4 * z ** 4) + 7.5 * LEAST / z ** 5
        return self.a * found * (counted & (_closed(z) >= self.read))

    def expected(self, values: Any) -> Any:
        """Clean values E[y] -> E[z]: the inverse of inverse(), by Newton's method. Values below the offset count as the offset."""
        target = self.counts(values).clip(min=0) + self.read
        z = 2 * (target + 0.375) ** 0.5
        for _ in range(NEWTON):
            z = (z - (_closed(z) - target) / _slope(z)).clip(min=LEAST)
        return z

    def words(self) -> str:
        """What it is, in one line."""
        if self.record() == Stabiliser(1.0).record():
            return 'Anscombe, z = 2 sqrt(y + 3/8)'
        offset = f', offset {self.offset:g}' if self.offset else ''
        return f'generalised Anscombe, gain a={self.a:g}, read noise of variance b={self.b:g}{offset}'


class Anscombe(Stabiliser):
    """Poisson counts: z = 2 sqrt(y + 3/8). Values must be whole numbers of events, 0 or more."""

    def __init__(self) -> None:
        super().__init__(1.0)


class Generalised(Stabiliser):
    """Counts with a gain and read noise: z = (2/a) sqrt(a (y - offset) + 3a^2/8 + b), b the variance of the read noise around the offset.
    Without a, both are estimated from the images."""


def _closed(z):
    """The closed form for a = 1, b = 0: within .0183 counts of the exact inverse for every mean count."""
    return z * z / 4 + LEAST / (4 * z) - 11 / (8 * z * z) + 5 * LEAST / (8 * z ** 3) - 0.125


def _slope(z):
    return z / 2 - LEAST / (4 * z * z) + 11 / (4 * z ** 3) - 15 * LEAST / (8 * z ** 4)


def from_record(told: Any) -> Stabiliser:
    """The Stabiliser of {"a", "b", "offset"}. Raises ValueError."""
    try:
        if told.keys() == set(KEYS) and {type(value) for value in told.values()} <= {int, float} and told['a']:
            return Stabiliser(**told)
    except (AttributeError, ValueError, OverflowError):
        pass
    raise ValueError('units whose "stabilise" is not {"a": ..., "b": ..., "offset": ...}, finite numbers, a above 0 and b not below it')


def of_units(units: dict | None) -> Stabiliser | None:
    """The transform that stored values have been through, of checked units of a data set or network; None without one."""
    told = (units or {}).get('stabilise')
    return None if told is None else from_record(told)


def moments(stabiliser: Stabiliser, counts: Any) -> tuple[np.ndarray, np.ndarray]:
    """(mean, variance) of z for these mean counts, [n] float64: sums over the Poisson and normal laws, exact to about 1e-6."""
    found = []
    nodes = np.linspace(-TAIL, TAIL, NODES) if stabiliser.b else np.zeros(1)
    normal = np.exp(-nodes ** 2 / 2)
    normal /= normal.sum()
    for mean in np.ravel(np.float64(counts)):
        spread = 10 * math.sqrt(mean) + 20
        events = np.arange(max(0, math.floor(mean - spread)), math.ceil(mean + spread))
        log_weights = scipy.special.xlogy(events, mean) - mean - scipy.special.gammaln(events + 1)
        weights = np.exp(log_weights)[:, None] * normal
        z = 2 * (events[:, None] + math.sqrt(stabiliser.read) * nodes + 0.375 + stabiliser.read).clip(min=0) ** 0.5
        first = (weights * z).sum()
        found.append((first, (weights * (z - first) ** 2).sum()))
    first, second = np.reshape(found, (-1, 2)).T
    return first, second


STABILISERS = {'anscombe': Anscombe, 'generalised': Generalised}
