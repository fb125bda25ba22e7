# SPDX-License-Identifier: Apache-2.0
"""EasyDict, a console that is also a log file, errors and durations for people."""

import sys


class UserError(Exception):
    """A mistake of the user or a file that cannot be used, told in one line: what was given, what is allowed, what to do.

    The command line shows it without a traceback and ends with exit code 1. What came from a file or the command line stays within the
    line: control characters are written as escapes, and of a very long message the middle is left out."""

    LONGEST = 1600  # characters

    def __init__(self, message):
        message = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
        if len(message) > self.LONGEST:
            message = f'{message[:self.LONGEST // 2]} ... {message[-self.LONGEST // 4:]}'
        super().__init__(message)
        self.message = message


class EasyDict(dict):
    """A dict whose keys are attributes too: d.batch_size is d['batch_size']."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__

    def __delattr__(self, name):
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


class Logger:
    """Duplicates stdout and stderr into a file while the context is open; the file is appended to, so that a resumed run has one log."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self._file = open(self.path, 'a', encoding='utf-8')  # noqa: SIM115 (lives as long as the context)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Tee(stream, self._file) for stream in self._streams)
        return self

    def __exit__(self, *exc):
        sys.stdout, sys.stderr = self._streams
        self._file.close()


class _Tee:
    """A text stream that also writes to a file. Lines that rewrite themselves (progress bars) stay out of the file."""

    def __init__(self, stream, file):
        self._stream, self._file = stream, file

    def write(self, text):
        self._stream.write(text)
        if '\r' not in text:
            self._file.write(text)
        return len(text)

    def flush(self):
        self._stream.flush()
        self._file.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def format_time(seconds):
    """A duration in the two largest fitting units: 42s, 3m 07s, 5h 02m, 2d 11h."""
    s = int(round(seconds))
    if s < 60:
        return f'{s}s'
    if s < 3600:
        return f'{s // 60}m {s % 60:02}s'
    if s < 86400:
        return f'{s // 3600}h {s // 60 % 60:02}m'
    return f'{s // 86400}d {s // 3600 % 24:02}h'


def one_line(err, last=False):
    """What an error says, in one line of at most 200 characters: the first of its lines, or the last; its type where it says nothing."""
    return (str(err).strip().splitlines() or [type(err).__name__])[-1 if last else 0][:200]
