# SPDX-License-Identifier: Apache-2.0
"""Generated images in files, and the number of images to evaluate."""

from collections.abc import Iterator

import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import beside, file_digest
from metrics.image_files import ImageFiles
from metrics.results import PROTOCOL_NUM
from torch_utils import distributed


class FileImages:
    """The images of --gen-path. Everything that eval_fid.py evaluates has the attributes and methods of this class.

    shape: (C, H, W). found: number of images available. count: number of images to evaluate. labels: a description of each repeat.
    facts(): what to quote with a result, on one rank. default_path(suffix): the default path of the result."""

    def __init__(self, o: EasyDict):
        self._o, self.files = o, ImageFiles(o.gen_path, '--gen-path')
        self.shape, self.found = self.files.shape, len(self.files)
        self.count = choose_count(o, self.found, f'--gen-path={o.gen_path}: found {self.found} images')
        self.check_unchanged = self.files.check_unchanged
        self.labels = [{}]
        if self.count < self.found:
            distributed.print0(f'evaluating the first {self.count} of {self.found} images, in sorted order')

    def facts(self) -> dict:
        """Path and digest; reads all files."""
        return {'path': self._o.gen_path, 'sha256': file_digest(self._o.gen_path)}

    def default_path(self, suffix: str) -> str:
        """GEN_PATH and the suffix."""
        return beside(self._o.gen_path, suffix)

    def repeats(self) -> Iterator[Iterator[torch.Tensor]]:
        """Yields this rank's batches, once."""
        yield self.files.batches(self._o.batch_size, self.count)


def choose_count(o: EasyDict, found: int, what: str) -> int:
    """The number of generated images to evaluate; refuses any other than the published one unless the user asks for it."""
    option = distributed.num_option()
    if o.num is None and found != PROTOCOL_NUM:
        raise UserError(f'{what}, expected {PROTOCOL_NUM}; pass {option}={found} to evaluate these')
    count = o.num or found
    if count > found:
        raise UserError(f'{option}={count}: {what} only; pass {option}={found} or less')
    return count
