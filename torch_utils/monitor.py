# SPDX-License-Identifier: Apache-2.0
"""Ends a rank that has lost the others: each writes a heartbeat into the store every few seconds, and reads those of all.

A rank counts as lost when its process is stopped, its machine disconnected or its kernel hung, so that none of its threads runs. A rank
that is merely busy still sends heartbeats; and a collective operation, in which its main thread may hang, has its own timeout."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

STOPPED = 75  # exit code of a run that was asked to end and can be continued (EX_TEMPFAIL: try again)
EXIT_LOST = 76             # exit code of a rank that lost the others (EX_PROTOCOL of sysexits.h)
INTERVAL_SEC = 0.5, 15     # least and most time between heartbeats, which is otherwise a twentieth of the timeout
SHARE = 0.75               # share of the timeout after which a silent rank counts as lost
FAILED_SEC = 10            # time for the launcher to end this rank after another has ended with an error
NOTES_SEC = 5              # time for the notes of on_abort() before the process ends
DONE, FAILED = b'done', b'failed '  # last heartbeats: of a rank that has finished, and of one that ends with an error


class Judge:
    """Decides, from the heartbeats and the time between them, whether this rank must end, and why.

    peers: [rendezvous.Peer of rank 0, ...]. timeout: seconds. option: how it was set, such as ' (--timeout=10)'. remedy: what to do."""

    def __init__(self, peers: Sequence, rank: int, timeout: float, option: str, remedy: str):
        self.peers, self.rank, self.option, self.remedy = peers, rank, option, remedy
        self.interval = min(max(timeout / 20, INTERVAL_SEC[0]), INTERVAL_SEC[1])
        self.limit = SHARE * timeout
        self._beats, self._silence, self._failed = [None] * len(peers), [0.0] * len(peers), [0.0] * len(peers)
        self._without = 0.0

    def hear(self, beats: Sequence[bytes], passed: float) -> str | None:
        """Takes the heartbeats of all ranks; returns why this one must end, or None. passed: seconds since the previous call."""
        self._without, passed = 0.0, min(passed, 2 * self.interval)  # a longer silence was the store's, not theirs
        for other, beat in enumerate(beats):
            fresh, self._beats[other] = beat != self._beats[other], beat
            last = beat == DONE or beat.startswith(FAILED) or other == self.rank
            self._silence[other] = 0.0 if fresh or last else self._silence[other] + passed
            self._failed[other] = self._failed[other] + passed if beat.startswith(FAILED) and not fresh else 0.0
        worst = max(self._silence)
        if worst >= self.limit:
            lost = [other for other, silence in enumerate(self._silence) if silence >= self.limit - 2 * self.interval]
            names = ', '.join(f'rank {other} ({self.peers[other]})' for other in lost[:3])
            more = f' and {len(lost) - 3} more' if len(lost) > 3 else ''
            has = 'has' if len(lost) == 1 else 'have'
            return f'{names}{more} {has} not answered for {worst:.0f} s{self.option}: stopping; {self.remedy}'
        for other, seconds in enumerate(self._failed):
            if seconds >= FAILED_SEC:
                why = self._beats[other].removeprefix(FAILED).decode(errors='replace')
                return f'rank {other} ({self.peers[other]}) has ended with an error ({why}): stopping'
        return None

    def miss(self, place: tuple[str, int], passed: float) -> str | None:
        """The same if the store, at place = (host, port), has not answered for another `passed` seconds."""
        self._without += passed
        if self._without < self.limit:
            return None
        return (f'rank {self.rank} ({self.peers[self.rank]}): the store of the ranks, at {place[0]}:{place[1]}, has not answered for '
                f'{self._without:.0f} s{self.option}: this node is disconnected, or that one is down; stopping; {self.remedy}')

    def speaks(self) -> bool:
        """Whether this is the first rank of its node that is alive."""
        return not any(peer.node == self.peers[self.rank].node and silence < 3 * self.interval
                       for peer, silence in zip(self.peers[:self.rank], self._silence))


class Monitor:
    """Two threads: one talks to the store, which may block for ever; the other judges by the heartbeats that the first has read.

    group: rendezvous.Group. judge: Judge. tell: callable(text), called before the process ends."""

    def __init__(self, group: Any, judge: Judge, tell: Callable[[str], object]):
        self.group, self.judge, self.failed, self._tell = group, judge, False, tell
        self._keys = [f'beat/{other}' for other in range(len(group.peers))]
        self._news, self._last, self._leaving = None, DONE, threading.Event()
        self._threads = [threading.Thread(target=work, name=f'monitor{work.__name__}', daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def leave(self, error: str | None = None) -> None:
        """Ends the watch, and reports to the others that this rank has finished or, with the text of an error, has failed."""
        if not self._leaving.is_set():
            self.failed, self._last = error is not None, DONE if error is None else FAILED + error.encode()
            self._leaving.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(NOTES_SEC)

    def _beat(self):
        """Writes this rank's heartbeat, an increasing number, and reads those of all ranks."""
        store, count, pause = self.group.watch, 0, 0
        while True:
            left = self._leaving.wait(pause)
            count, pause = count + 1, self.judge.interval
            try:
                store = store or self.group.connect()
                store.set(self._keys[self.judge.rank], self._last if left else str(count))
                if not left:
                    self._news = store.multi_get(self._keys)
            except (OSError, RuntimeError):
                store = None  # try again; the watch reports it if it lasts
            if left:
                return

    def _watch(self):
        """Measures time by this process's own clock."""
        step = min(self.judge.interval, 1)
        before = heard = time.monotonic()
        while not self._leaving.wait(step):
            now, news, self._news = time.monotonic(), self._news, None
            if news is not None:
                text, heard = self.judge.hear(news, now - heard), now
            else:  # a longer step means that this process itself was stopped
                text = self.judge.miss(self.group.place, min(now - before, 2 * step))
            before = now
            if text:
                self._end(text)

    def _end(self, text):
        """Prints the reason and ends this process, whatever its main thread may be waiting for."""
        if not self.judge.speaks():
            time.sleep(1)  # one line per node: usually the launcher ends the others once the first rank has ended
        if self._leaving.is_set():
            return
        os.write(2, f'{text}\n'.encode())  # sys.stderr may be in use
        notes = threading.Thread(target=self._notes, args=(text,), daemon=True)
        notes.start()
        notes.join(NOTES_SEC)
        os._exit(EXIT_LOST)

    def _notes(self, text):
        self._tell(text)
        sys.stdout.flush()
