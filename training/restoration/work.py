# SPDX-License-Identifier: Apache-2.0
"""The folder of unfinished work, DEST.partial: a file for each image that is done, written by all ranks, and a record of what made them."""

import os
import shutil
from collections.abc import Sequence

import numpy as np

from dnnlib import UserError
from dnnlib.archive import DAMAGE
from dnnlib.files import read_json, replacing, write_json
from training.restoration.posterior import Estimate

RECORD = 'record.json'


class Work:
    """The folder. facts: what decides the results, JSON values; a folder of other facts is not continued."""

    def __init__(self, dest: str, facts: dict) -> None:
        self.path, self.facts = f'{os.path.normpath(dest)}.partial', facts

    def open(self, indices: Sequence[int], resume: bool) -> list[int]:
        """Begins the work, or continues it; returns those of the indices that are to be done. For one rank. Raises UserError."""
        record = os.path.join(self.path, RECORD)
        if os.path.lexists(self.path) and not os.path.isfile(record):
            raise UserError(f'{self.path}: is in the way, and not a folder of unfinished work; remove it, or name another --dest')
        if os.path.isfile(record) and not resume:
            shutil.rmtree(self.path)
        if os.path.isfile(record):
            old = read_json(record)
            changed = [key for key in self.facts if old.get(key) != self.facts[key]]
            if changed:
                raise UserError(f'--skip-existing: {self.path} was begun with {", ".join(_shown(key, old) for key in changed)}, and this '
                                f'is {", ".join(_shown(key, self.facts) for key in changed)}; leave the option out to begin again')
        else:
            os.makedirs(self.path)
            write_json(record, self.facts)
        return [index for index in indices if not self._is_whole(index)]

    def _file(self, index):
        return os.path.join(self.path, f'{index:08}.npz')

    def _is_whole(self, index):
        try:
            self.read(index)
        except DAMAGE:
            return False
        return True

    def write(self, found: Estimate) -> None:
        """Stores an Estimate."""
        values = {key: value for key, value in found._asdict().items() if value is not None}
        with replacing(self._file(found.index)) as part, open(part, 'wb') as file:
            np.savez(file, **values)

    def read(self, index: int) -> Estimate:
        """The Estimate of an image. Raises the errors in DAMAGE where there is none."""
        with np.load(self._file(index), allow_pickle=False) as found:
            values = {key: found[key] for key in found.files}
        numbers = {key: value.item() for key, value in values.items() if not value.ndim}
        return Estimate(**{**values, **numbers})

    def remove(self) -> None:
        """Removes the folder, once everything is written."""
        shutil.rmtree(self.path)


def _shown(key, facts):
    return f'{key}={str(facts.get(key))[:40]}'
