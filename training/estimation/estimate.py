# SPDX-License-Identifier: Apache-2.0
"""What an estimator of noise levels gives for a group of images that share a level."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A level in the units of the images, with what is known about it."""

    sigma: float
    uncertainty: float  # standard error
    method: str
    images: int
    floor: float        # what the method reads at most on such images if they are clean
    clipped: float = 0.0     # share of the pixels at the ends of the range
    correction: float = 1.0  # by which clipping made the level too small, and which is in sigma already
    uneven: bool = False     # the finest details are not what white noise of one level leaves

    @property
    def clean(self) -> bool:
        """Whether clean images would read as much: at most the floor, or three times that with details that are no white noise."""
        return self.sigma <= (3 if self.uneven else 1) * self.floor

    @property
    def coloured(self) -> bool:
        """Whether this is no level, because the noise is not white."""
        return self.uneven and not self.clean
