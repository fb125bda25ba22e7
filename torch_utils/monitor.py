# SPDX-License-Identifier: Apache-2.0
"""Ends a rank whose company is gone: each rank leaves a sign of life in the store every few seconds, and looks for those of the others."""

import os
import sys
import threading
import time

EXIT_LOST = 76             # exit code of a rank that lost the others (EX_PROTOCOL)
INTERVAL_SEC = 1, 15       # least and most time between signs of life; in between a twentieth of the timeout
SHARE = 0.75               # of the timeout: so much silence is the end
FAILED_SEC = 10            # in which the launcher may end this rank by itself, after another has ended with an error
NOTES_SEC = 5              # for what is to be done before the end
DONE, FAILED = b'done', b'failed '


class Monitor:
    """Two threads: one speaks with the store, which may block for ever; the other judges by what the first has heard.

    group: rendezvous.Group. timeout: seconds. option: how it was given, such as '--timeout=10', for the message. remedy: what to do
    then. tell: callable(text), called before the process ends."""

    def __init__(self, group, rank, timeout, option, remedy, tell):
        self.group, self.rank, self.timeout, self.option, self.remedy, self._tell = group, rank, timeout, option, remedy, tell
        self.interval = min(max(timeout / 20, INTERVAL_SEC[0]), INTERVAL_SEC[1])
        self.limit = SHARE * timeout
        self._keys = [f'beat/{other}' for other in range(len(group.cards))]
        self._signs, self._silence, self._failed = [None] * len(self._keys), [0.0] * len(self._keys), [0.0] * len(self._keys)
        self._news, self._last, self._leaving = None, DONE, threading.Event()
        self.failed = False
        self._threads = [threading.Thread(target=work, name=work.__name__, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def leave(self, error=None):
        """Ends the watch. The others learn that this rank needs nobody any more or, with the text of an error, that it is broken."""
        if not self._leaving.is_set():
            self.failed, self._last = error is not None, DONE if error is None else FAILED + error.encode()
            self._leaving.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(NOTES_SEC)

    def _beat(self):
        """Writes this rank's sign of life, a number that grows, and reads all of them."""
        store, count, pause = None, 0, 0
        while True:
            left = self._leaving.wait(pause)
            count, pause = count + 1, self.interval
            try:
                store = store or self.group.connect(self.interval)
                store.set(self._keys[self.rank], self._last if left else str(count))
                if not left:
                    self._news = store.multi_get(self._keys)
            except (OSError, RuntimeError):
                store = None  # tried again; the watch speaks if it lasts
            if left:
                return

    def _watch(self):
        """Counts the time that passes without news, by this process's own clock."""
        step = min(self.interval, 1)
        before = heard = time.monotonic()
        without = 0
        while not self._leaving.wait(step):
            now, news = time.monotonic(), self._news
            self._news = None
            # A step that took longer tells that this process itself was stopped: that is not the others' silence.
            without, before = without + min(now - before, 2 * step), now
            text = None
            if news is not None:
                text = self._judge(news, min(now - heard, 2 * self.interval))
                heard, without = now, 0
            elif without >= self.limit:
                host, port = self.group.place
                text = (f'rank {self.rank} ({self.group.cards[self.rank]}): the store of the ranks, at {host}:{port}, has not answered for '
                        f'{without:.0f} s{self.option}: this node is cut off, or that one is gone; stopping; {self.remedy}')
            if text:
                self._end(text)

    def _judge(self, news, passed):
        """Takes fresh signs; returns why this rank must end, or None. passed: seconds since the signs before, at most two intervals."""
        for other, sign in enumerate(news):
            fresh, self._signs[other] = sign != self._signs[other], sign
            over = sign == DONE or other == self.rank
            self._silence[other] = 0 if fresh or over or sign.startswith(FAILED) else self._silence[other] + passed
            self._failed[other] = self._failed[other] + passed if sign.startswith(FAILED) else 0
        if (worst := max(self._silence)) >= self.limit:
            lost = [f'rank {other} ({self.group.cards[other]})' for other, silence in enumerate(self._silence)
                    if silence >= self.limit - 2 * self.interval]
            more = f' and {len(lost) - 3} more' if len(lost) > 3 else ''
            has = 'has' if len(lost) == 1 else 'have'
            return f'{", ".join(lost[:3])}{more} {has} not answered for {worst:.0f} s{self.option}: stopping; {self.remedy}'
        for other, seconds in enumerate(self._failed):
            if seconds >= FAILED_SEC:
                why = self._signs[other].removeprefix(FAILED).decode(errors='replace')
                return f'rank {other} ({self.group.cards[other]}) has ended with an error ({why}): stopping'
        return None

    def _end(self, text):
        """Says it, and ends this process, whatever its main thread may be waiting for."""
        if not self._speaks():
            time.sleep(1)  # one line a node: when its first rank has ended the launcher ends the others, as a rule
        if self._leaving.is_set():
            return
        os.write(2, f'{text}\n'.encode())  # sys.stderr may be in use
        notes = threading.Thread(target=self._notes, args=(text,), daemon=True)
        notes.start()
        notes.join(NOTES_SEC)
        os._exit(EXIT_LOST)

    def _speaks(self):
        """Whether this is the first rank of its node that is alive."""
        cards = self.group.cards
        return not any(cards[other].node == cards[self.rank].node and silence < 3 * self.interval
                       for other, silence in enumerate(self._silence[:self.rank]))

    def _notes(self, text):
        self._tell(text)
        sys.stdout.flush()
