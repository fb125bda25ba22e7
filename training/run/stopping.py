# SPDX-License-Identifier: Apache-2.0
"""Requests to end a run early, by signals or the clock, and how its ranks agree on them."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from torch_utils import distributed
from torch_utils.monitor import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SEC = 0.2  # two signals closer than this are one request: timeout(1), for one, signals a process and then its group


class Stop(Exception):
    """The run ends here, and its state is to be saved. reason: text for the user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Signals:
    """Inside the context SIGTERM, SIGUSR1 and Ctrl-C are requests: the first is remembered, a second ends the process at once.

    They are handled in a separate thread, so that the second also works while the main thread hangs in a collective. Until `patient` is
    set, when there is something to finish, the first one ends the process, too. on_exit(text): called before the process ends.
    Attribute name: of the first signal, or None. Outside the main thread, where Python allows no handlers, signals are not handled."""

    def __init__(self, on_exit: Callable[[str], None] = lambda text: None) -> None:
        self.name, self.patient, self.on_exit = None, False, on_exit
        self._since = None

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        threading.Thread(target=self._listen, args=(self._ear,), daemon=True, name='signals').start()
        return self

    def __exit__(self, *exc):
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._mouth.close()  # which ends the thread

    def _listen(self, ear):
        with ear:
            while numbers := ear.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._heard(signal.Signals(number))

    def _heard(self, number):
        now = time.monotonic()
        if self.name is not None and now - self._since < SAME_SEC:
            return
        if self.name is not None:
            self._exit(f'a second signal, {number.name}: stopped at once; progress since the last state is lost', 128 + number)
        self.name, self._since = number.name, now
        if not self.patient:
            self._exit(f'{number.name} before the first step: stopped', STOPPED)

    def _exit(self, text, code):
        self.on_exit(text)
        os._exit(code)


class Requests:
    """Requests to end the run or to save a state, and the ranks' agreement on them, one step after they are made.

    signals: Signals. max_hours: time limit of this process, counted from `start` (seconds of time.time()); 0: none. state_minutes:
    between states; 0: none by the clock. The clock of rank 0 counts."""

    def __init__(self, signals: Signals, max_hours: float = 0.0, state_minutes: float = 0.0, start: float | None = None) -> None:
        self.signals, self.max_hours, self.state_sec = signals, max_hours, state_minutes * 60
        self.start = time.time() if start is None else start
        self.state_at = time.time()  # time of the last attempt to write a state
        self.retry_at = None         # when a failed attempt is repeated
        self._vote = None

    def begin(self) -> None:
        """Marks the start of training: from here on there is something to finish, and to save."""
        self.signals.patient, self.state_at = True, time.time()

    def asked(self) -> bool:
        """Whether this rank has been asked to end. Other ranks may not know yet: after stopping work early for it, call now()."""
        return self._reason() > 0

    def _reason(self):
        """0: none; 1: the time is up; 2 + i: SIGNALS[i]."""
        if self.signals.name is not None:
            return 2 + [number.name for number in SIGNALS].index(self.signals.name)
        return int(distributed.rank() == 0 and 0 < self.max_hours * 3600 <= time.time() - self.start)

    def _ask(self):
        now = time.time()
        due = 0 < self.state_sec <= now - self.state_at or (self.retry_at is not None and now >= self.retry_at)
        return distributed.agree([self._reason(), int(due and distributed.rank() == 0)])

    def after_step(self) -> bool:
        """Whether a state is due, as all ranks agreed during this step. Raises Stop on all of them where the run is to end."""
        vote, self._vote = self._vote, self._ask()
        return self._verdict(vote)

    def now(self) -> bool:
        """Like after_step(), for requests up to this moment: waits for every rank."""
        return self._verdict(self._ask())

    def _verdict(self, vote):
        if vote is None:
            return False
        reason, due = vote.result()
        if reason:
            raise Stop(f'--max-hours={self.max_hours:g} reached' if reason == 1 else SIGNALS[reason - 2].name)
        return bool(due)
