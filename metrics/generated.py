# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: the images of a folder or an archive, or those that a network makes in memory."""

import hashlib
import os

import click

from dnnlib.util import file_digest
from metrics.image_files import ImageFiles
from torch_utils import distributed
from training import generation, images, sampling

PROTOCOL_NUM = 50000  # the count of generated images behind published distances, which fall as it grows


class FileImages:
    """--gen-path, and how many of its images are evaluated."""

    def __init__(self, o):
        self._o, self._files = o, ImageFiles(o.gen_path, '--gen-path')
        self.shape, self.found = self._files.shape, len(self._files)
        self.count = choose_count(o, self.found, f'--gen-path={o.gen_path}: found {self.found} images')
        self.check_unchanged = self._files.check_unchanged
        self.facts = {'path': o.gen_path, 'sha256': digest_of(o.gen_path)}
        self.labels = [{}]
        if self.count < self.found:
            distributed.print0(f'evaluating the first {self.count} of {self.found} images, in sorted order')

    def repeats(self):
        """Yields this rank's batches, once."""
        yield self._files.batches(self._o.batch_size, self.count)


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
        if not images.is_picture(self._net.img_channels, self._net.units):
            raise click.ClickException(f'--network={o.network}: makes no 8-bit grey or RGB images, which detectors compare')
        self.shape = self._net.img_channels, *generation.resolution(self._net)
        self.labels = [{'seeds': ranges(seeds)} for seeds in self._seeds]
        told = {key: o[key] for key in (*sampling.NAMES, *sampling.KEYS) if o[key] is not None}
        sigmas = generation.noise_levels(self._net, self._pieces['schedule'], self._pieces['num_steps'])
        self.facts = {'network': o.network, 'sha256': network_digest(self._net), **told, 'sigmas': sigmas.tolist()}

    def repeats(self):
        """Yields the batches of each repeat."""
        for seeds in self._seeds:
            yield self._batches(seeds)

    def _batches(self, seeds):
        for part in generation.generate_images(self._net, seeds, batch=self._o.batch_size, rank=distributed.rank(),
                                               world=distributed.size(), **self._pieces):
            if not part.images.isfinite().all():
                raise click.ClickException(f'--network={self._o.network}: seeds {ranges(part.seeds)} give images that are not finite')
            yield generation.to_uint8(part.images)

    def check_unchanged(self):
        """A network in memory stays as it is."""


def digest_of(path):
    """SHA-256 of a file; None of a folder, whose files have a digest each and together none that others would find."""
    return file_digest(path) if os.path.isfile(path) else None


def ranges(numbers):
    """Whole numbers as IntList reads them: [0, 1, 2, 5] -> "0-2,5"."""
    numbers = sorted(set(numbers))
    starts = [n for i, n in enumerate(numbers) if not i or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ','.join(str(first) if first == last else f'{first}-{last}' for first, last in zip(starts, ends))


def network_digest(net):
    """SHA-256 over names, types and values of a network's tensors: equal for equal weights, whatever file they come from."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        value = value.detach().cpu().contiguous()
        sha.update(f'{name} {value.dtype} {list(value.shape)}'.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def choose_count(o, found, what):
    """How many generated images are evaluated; published distances need the published number unless told otherwise."""
    option = '--num-images' if 'TORCHELASTIC_RUN_ID' in os.environ else '--num'  # torchrun takes --num for its own --numa-binding
    if o.num is None and found != PROTOCOL_NUM:
        raise click.ClickException(f'{what}, expected {PROTOCOL_NUM}; pass {option}={found} to evaluate these')
    count = o.num or found
    if count > found:
        raise click.ClickException(f'{option}={count}: {what} only; pass {option}={found} or less')
    return count
