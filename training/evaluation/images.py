# SPDX-License-Identifier: Apache-2.0
"""Images that a network makes in memory, for metrics."""

from dnnlib import UserError
from metrics.generated import choose_count
from torch_utils import distributed, misc
from torch_utils.command_line import ranges
from training.sampling import options as sampling
from training.sampling.generate import check_finite, generate_images, noise_levels, resolution
from training.sampling.pixels import is_picture, to_uint8


def uint8_batches(net, seeds, batch, who, **pieces):
    """Yields this rank's images of the seeds, uint8 [n,C,H,W]. pieces: as for generate_images; who: what errors call the network."""
    for part in generate_images(net, seeds, batch=batch, rank=distributed.rank(), world=distributed.size(), **pieces):
        check_finite(part, who)
        yield to_uint8(part.images)


class NetworkImages:
    """--network: images made in memory, and rounded to 8 bits as their PNGs would be; each repeat takes the seeds that follow."""

    def __init__(self, o):
        self._o = o
        self.found = len(set(o.seeds))
        self.count = choose_count(o, self.found, f'--seeds={ranges(o.seeds)}: names {self.found} images')
        span = max(o.seeds) - min(o.seeds) + 1
        seeds = list(dict.fromkeys(o.seeds))[:self.count]
        self._seeds = [[seed + i * span for seed in seeds] for i in range(o.repeats)]
        self._net, self._pieces = sampling.prepare(o, [seed for part in self._seeds for seed in part])
        if not is_picture(self._net.img_channels, self._net.units):
            raise UserError(f'--network={o.network}: makes no 8-bit grey or RGB images, which detectors compare')
        self.shape = self._net.img_channels, *resolution(self._net)
        self.labels = [{'seeds': ranges(seeds)} for seeds in self._seeds]
        told = {key: o[key] for key in (*sampling.NAMES, *sampling.KEYS) if o[key] is not None}
        sigmas = noise_levels(self._net, self._pieces['schedule'], self._pieces['num_steps'])
        self.facts = {'network': o.network, 'sha256': misc.state_digest(self._net), **told, 'sigmas': sigmas.tolist()}

    def repeats(self):
        """Yields the batches of each repeat."""
        for seeds in self._seeds:
            yield uint8_batches(self._net, seeds, self._o.batch_size, f'--network={self._o.network}', **self._pieces)

    def check_unchanged(self):
        """A network in memory stays as it is."""
