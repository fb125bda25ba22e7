# SPDX-License-Identifier: Apache-2.0
"""Generated images for metrics, sampled from a network in memory or read from files, with a record of how they were generated."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import beside
from metrics import results
from metrics.generated import FileImages, choose_count
from torch_utils import distributed
from torch_utils.command_line import ranges
from training.sampling import pieces as sampling
from training.sampling import record
from training.sampling.folder import record_of, record_path
from training.sampling.generate import check_finite, generate_images
from training.sampling.outputs import Output


def uint8_batches(net: torch.nn.Module, seeds: Iterable[int], batch: int, who: str, output: Output,
                  **pieces: Any) -> Iterator[torch.Tensor]:
    """Yields this rank's images of the seeds, uint8 [n,C,H,W]. output: of sampling/outputs.py; pieces: as for generate_images; who: what
    errors call the network."""
    for part in generate_images(net, seeds, batch=batch, rank=distributed.rank(), world=distributed.size(), **pieces):
        check_finite(part, who)
        yield output.uint8(output(part.images))


class NetworkImages:
    """--network: images sampled in memory and rounded to 8 bits as in a PNG; each repeat uses the next seeds.

    networks: Networks, where several such sources share them; the network is loaded again where another's weights took its place."""

    def __init__(self, o: EasyDict, networks: sampling.Networks | None = None) -> None:
        self._o, self._networks = o, networks or sampling.Networks()
        self.found = len(set(o.seeds))
        self.count = choose_count(o, self.found, f'--seeds={ranges(o.seeds)}: names {self.found} images')
        span = max(o.seeds) - min(o.seeds) + 1
        seeds = list(dict.fromkeys(o.seeds))[:self.count]
        self._seeds = [[seed + i * span for seed in seeds] for i in range(o.repeats)]
        net, self._pieces = sampling.prepare(o, [seed for part in self._seeds for seed in part], self._networks)
        self._output = self._networks.output(net, o)
        if not self._output.is_picture:
            hint = '; leave --decode=none out' if net.autoencoder else ''
            raise UserError(f'--network={o.network}: does not generate 8-bit grey or RGB images, which detectors need{hint}')
        self.shape = tuple(self._output.shape)
        self.labels = [{'seeds': ranges(seeds)} for seeds in self._seeds]
        self._facts = distributed.from_rank0(record.describe, o, net, self._pieces, self._output, self._networks.digest)

    def facts(self) -> dict:
        """How the images are generated, in the form of the record of a folder."""
        return {**self._facts, 'seeds': ranges(self._seeds[0])}

    def default_path(self, suffix: str) -> str:
        """Path of the result: NETWORK, a tag that distinguishes its results, and the suffix."""
        o, seeds = self._o, ranges(self._seeds[0])
        tag = results.tag(self._facts, self.count, o.repeats, o.detector, seeds=None if seeds == ranges(range(self.count)) else seeds)
        return beside(o.network, f'.{tag}{suffix}')

    def repeats(self) -> Iterator:
        """Yields the batches of each repeat. Raises UserError where the network is no longer what it was."""
        net, _ = self._networks.open(self._o)
        if distributed.from_rank0(self._networks.digest, net) != self._facts['sha256']:
            raise UserError(f'--network={self._o.network}: has other weights than when this began; start again')
        for seeds in self._seeds:
            yield uint8_batches(net, seeds, self._o.batch_size, f'--network={self._o.network}', self._output, **self._pieces)

    def check_unchanged(self) -> None:
        """Nothing to check: a network in memory does not change."""


class RecordedImages(FileImages):
    """--gen-path: images in files, with the record of their folder if it describes exactly these images."""

    def __init__(self, o: EasyDict) -> None:
        super().__init__(o)
        self._record, self._missing = distributed.from_rank0(self._find_record)

    def _find_record(self):
        if not os.path.isdir(self.files.path):
            return None, 'not a folder of images; only folders have a record'
        names = [self.files.name(i) for i in range(len(self.files))]
        found, why = record_of(self.files.path, names, self.shape)
        if why and os.path.lexists(record_path(self.files.path)):
            print(f'Warning: --gen-path={self._o.gen_path}: {why}; the result does not say how the images were generated', file=sys.stderr)
        return found, why

    def facts(self) -> dict:
        """Path, digest, and the record, or null with the reason."""
        return {**super().facts(), 'record': self._record, **({} if self._record else {'record_missing': self._missing})}
