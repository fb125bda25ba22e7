# SPDX-License-Identifier: Apache-2.0
"""Mirrors: other loggers, such as TensorBoard, that receive a run's statistics and sample grids. The scripts implement them.

A mirror is an object with scalars(fields, nimg), picture(path, nimg) and close()."""

import math
import os
import traceback

from dnnlib import UserError


class Mirrors:
    """All mirrors of a run, {option: mirror}, as one. A mirror that fails is reported once, and never ends the training.

    Only rank 0 has mirrors."""

    def __init__(self, mirrors: dict | None = None) -> None:
        self._mirrors, self._reported = mirrors or {}, set()

    def scalars(self, fields: dict, nimg: int) -> None:
        """A line of stats.jsonl: {name: number or None}. Several lines may have the same nimg."""
        fine = lambda value: isinstance(value, int | float) and math.isfinite(value)
        numbers = {name: value for name, value in fields.items() if fine(value) and name != 'nimg'}
        self._each('scalars', numbers, nimg)

    def picture(self, path: str | os.PathLike, nimg: int) -> None:
        """A PNG of samples."""
        self._each('picture', path, nimg)

    def close(self) -> None:
        """Closes all mirrors."""
        self._each('close')

    def _each(self, what, *args):
        for option, mirror in self._mirrors.items():
            try:
                getattr(mirror, what)(*args)
            except Exception as err:  # a full disk, a network that is down, or anything else that another program raises
                if option not in self._reported:
                    print(f'Warning: {option} fails ({reason(err)}); the training continues, and stats.jsonl has all numbers', flush=True)
                self._reported.add(option)


def reason(err: Exception) -> str:
    """What an error was, and where. The text of another program's error is not shown: it may hold addresses, hosts and keys."""
    if isinstance(err, UserError):
        return err.message
    if isinstance(err, OSError) and err.errno and err.strerror == os.strerror(err.errno):
        return err.strerror
    *_, last = traceback.extract_tb(err.__traceback__)
    return f'{type(err).__name__}, {os.path.basename(last.filename)}:{last.lineno}'
