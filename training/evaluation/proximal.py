# SPDX-License-Identifier: Apache-2.0
"""Proximal FID: chooses among networks without clean images. Generated images are noised to the levels of noisy images, and compared with
these (SFBD, Lu, Wu and Yu 2025).

Both sides are treated alike. --detector=pixels takes the values as they are, in network units, beyond [-1, 1] too; a detector that takes
pictures gets both sides clipped and rounded to 8 bits, which is one map of both laws: equal laws stay equal."""

from collections.abc import Callable

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.progress import Progress
from metrics.detectors import Detector
from metrics.evaluate import distance_name
from metrics.frechet import frechet_distance
from metrics.statistics import Moments
from torch_utils import distributed, misc
from training.diffusion.ambient import add_noise
from training.sampling.generate import check_finite, generate_images
from training.sampling.pixels import is_picture, to_uint8


class Proximal:
    """The noisy side, computed once. images(items) -> [n,C,H,W] of the items 0 ... N-1 at their levels; levels: float64 [N], all above 0.

    units: of the data, None for 8-bit pictures. Under torchrun every rank makes one. Raises UserError for images that the detector does
    not take."""

    def __init__(self, images: Callable, levels: np.ndarray, detector: Detector, units: dict | None, batch: int = 64) -> None:
        self.levels, self.detector, self.batch = torch.from_numpy(np.asarray(levels, np.float64)), detector, batch
        shape = tuple(images(np.arange(1)).shape[1:])
        self.plain = detector.name == 'pixels'
        if not self.plain and not is_picture(shape[0], units):
            raise UserError(f'--detector={detector.name}: takes 8-bit grey or RGB pictures, and these data are not; use --detector=pixels')
        self._dim = detector.dim(shape)
        mine = np.arange(len(levels))[distributed.rank()::distributed.size()]
        self.noisy = self._moments((images(mine[first:first + batch]) for first in range(0, len(mine), batch)), len(mine), 'noisy images')

    def distance(self, net: torch.nn.Module, pieces: dict, *, num: int, seed: int = 0, labels: Callable | None = None,
                 who: str = '') -> dict:
        """{name of the distance: value, 'num': ...} of `num` generated images, of seeds from 0, against the noisy ones; on every rank.

        pieces: schedule, num_steps and stepper for generate_images. The noise of an image is a function of (seed, its number). who: what
        errors call the network."""
        order = torch.randperm(len(self.levels), generator=misc.generator(seed, 'proximal levels'))
        share = len(range(distributed.rank(), num, distributed.size()))

        def batches():
            for part in generate_images(net, range(num), batch=self.batch, rank=distributed.rank(), world=distributed.size(), labels=labels,
                                        **pieces):
                check_finite(part, who)
                levels = self.levels[order[[number % len(order) for number in part.seeds]]]
                noise = [torch.randn(part.images.shape[1:], generator=misc.generator(seed, 'proximal', number)) for number in part.seeds]
                yield add_noise(part.images.cpu(), 0.0, levels, torch.stack(noise).double())

        found = self._moments(batches(), share, 'proximal FID')
        args = (side for moments in (found, self.noisy) for side in (moments.mean.cpu(), moments.covariance().cpu()))
        return {distance_name(self.detector.name): frechet_distance(*args), 'num': num, 'noisy': self.noisy.count,
                'detector': self.detector.name, 'detector_sha256': self.detector.sha256,
                'levels': [self.levels.min().item(), self.levels.max().item()]}

    def _moments(self, batches, total, what):
        """Moments of the features of all ranks' images [n,C,H,W] in network units."""
        moments = Moments(self._dim, self.detector.device)
        with Progress(total, what, show=distributed.rank() == 0) as bar:
            for images in batches:
                images = images.to(self.detector.device)
                moments.add(images.flatten(1) if self.plain else self.detector(to_uint8(images))[0])
                bar.update(len(images))
        moments.all_reduce()
        return moments
