# SPDX-License-Identifier: Apache-2.0
"""Progress of long loops: a bar on a terminal, an occasional line when the output goes to a file."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

from dnnlib.util import format_time

INTERVAL_SEC = 60


class Progress:
    """with Progress(total, 'Decoding') as bar: bar.update(n); or: for x in Progress(total, 'Decoding').over(xs).

    On a terminal (stderr) a tqdm bar. Elsewhere a line on stdout every `interval` seconds, so that short loops print
    nothing: "Decoding: 12000 of 50000 img (24%), 1750 img/s, ETA 22s". total: None if unknown. desc: None for a bar without a
    name. show: whether this process prints at all. initial: items done before. unit "B" is printed in MiB. options: passed to tqdm."""

    def __init__(self, total: int | None, desc: str | None = None, unit: str = 'img', *, show: bool = True, initial: int = 0,
                 interval: float = INTERVAL_SEC, clock: Callable[[], float] = time.monotonic, **options: Any):
        self.total, self.desc, self.unit, self.done, self.initial = total, desc, unit, initial, initial
        self._begun = 0.0  # items' worth of work on items that are not done
        self._show, self._interval, self._clock = show, interval, clock
        self._options, self._bar = options, None

    def __enter__(self):
        self._start = self._last = self._clock()
        if self._show and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=self.initial, desc=self.desc, unit=self.unit, **self._options)
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def update(self, n: float = 1) -> None:
        """Counts n more items as done, and forgets advance()."""
        self.done, self._begun = self.done + n, 0.0
        if self._bar is not None:
            self._bar.update(n)
        self._print_line()

    def advance(self, n: float) -> None:
        """Counts n items' worth of work on items that are not done: lines are printed, and speed and ETA known, before the first is."""
        self._begun += n
        self._print_line()

    def _print_line(self):
        if self._bar is None and self._show and self._clock() - self._last >= self._interval:
            self._last = self._clock()
            print(self.line(self._last - self._start), flush=True)

    def over(self, items: Iterable) -> Iterator:
        """Yields the items; each is counted when the loop has finished with it."""
        with self:
            for item in items:
                yield item
                self.update()

    def line(self, seconds: float) -> str:
        """The line to print after `seconds`."""
        unit, scale = ('MiB', 2 ** 20) if self.unit == 'B' else (self.unit, 1)
        worked = self.done + self._begun
        done, rate = f'{self.done / scale:.0f}', (worked - self.initial) / seconds if seconds else 0
        speed = f'{rate / scale:.0f}' if rate >= 10 * scale else f'{rate / scale:.2g}'
        if self.total is None:
            return f'{self.desc or "Progress"}: {done} {unit}, {speed} {unit}/s'
        left = f', ETA {format_time(max(self.total - worked, 0) / rate)}' if rate > 0 else ''
        share = f' ({worked / self.total:.0%})' if self.total else ''
        return f'{self.desc or "Progress"}: {done} of {self.total / scale:.0f} {unit}{share}, {speed} {unit}/s{left}'
