# SPDX-License-Identifier: Apache-2.0
"""How many generated images are evaluated, and those that lie in files."""

from dnnlib import UserError
from dnnlib.files import file_digest
from metrics.image_files import ImageFiles
from torch_utils import distributed

PROTOCOL_NUM = 50000  # the count of generated images behind published distances, which fall as it grows


class FileImages:
    """--gen-path, and how many of its images are evaluated. What eval_fid.py evaluates has the attributes and methods of this.

    shape: (C, H, W). found: how many images there are. count: how many are evaluated. facts: what a result is quoted with;
    labels: what each repeat is."""

    def __init__(self, o):
        self._o, self._files = o, ImageFiles(o.gen_path, '--gen-path')
        self.shape, self.found = self._files.shape, len(self._files)
        self.count = choose_count(o, self.found, f'--gen-path={o.gen_path}: found {self.found} images')
        self.check_unchanged = self._files.check_unchanged
        self.facts = {'path': o.gen_path, 'sha256': file_digest(o.gen_path)}
        self.labels = [{}]
        if self.count < self.found:
            distributed.print0(f'evaluating the first {self.count} of {self.found} images, in sorted order')

    def repeats(self):
        """Yields this rank's batches, once."""
        yield self._files.batches(self._o.batch_size, self.count)


def choose_count(o, found, what):
    """How many generated images are evaluated; published distances need the published number unless told otherwise."""
    option = distributed.num_option()
    if o.num is None and found != PROTOCOL_NUM:
        raise UserError(f'{what}, expected {PROTOCOL_NUM}; pass {option}={found} to evaluate these')
    count = o.num or found
    if count > found:
        raise UserError(f'{option}={count}: {what} only; pass {option}={found} or less')
    return count
