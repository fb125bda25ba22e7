# SPDX-License-Identifier: Apache-2.0
"""EasyDict, a console that is also written to a log file, user errors, and durations as text."""

import os
import sys
import threading

LONGEST = 4000  # characters of an error message: names inside other programs' files may be of any length


class UserError(Exception):
    """A mistake of the user or an unusable file, in one line: what was given, what is allowed, what to do.

    The command line shows it without a traceback and exits with code 1."""

    def __init__(self, message: str):
        message = printable(message if len(message) <= LONGEST else f'{message[:LONGEST]}...')
        super().__init__(message)
        self.message = message


class EasyDict(dict):
    """A dict whose keys are also attributes: d.batch_size is d['batch_size']."""

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
    """Duplicates stdout and stderr into a file while the context is open; the file is appended to, so that a resumed run has one log.

    Printing never fails because of the file: see LogFile. Thread-safe."""

    def __init__(self, path: str | os.PathLike):
        self.path = path

    def __enter__(self):
        self._file = LogFile(self.path)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_Tee(stream, self._file) for stream in self._streams)
        return self

    def __exit__(self, *exc):
        sys.stdout, sys.stderr = self._streams
        self._file.close()

    def note(self, text: str) -> None:
        """Writes a line to the file only, at once."""
        self._file.write(f'{text}\n')


class LogFile:
    """Text appended to a file, in UTF-8; write() and flush() never raise.

    Text that cannot be written (a full disk) is kept, up to KEPT bytes, and written first by the next write that works; a line in the
    file says how many bytes beyond that are missing."""

    KEPT = 1 << 20

    def __init__(self, path: str | os.PathLike):
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._lock = threading.RLock()  # a signal handler may print while its own thread prints
        self._waiting, self._dropped, self._reason = bytearray(), 0, ''

    def write(self, text: str) -> None:
        """Takes text; complete lines are in the file when this returns, if possible."""
        data = text.encode('utf-8', 'backslashreplace')
        with self._lock:
            if self._dropped:
                self._drain()
            if self._dropped or len(self._waiting) + len(data) > self.KEPT:
                self._dropped += len(data)
            else:
                self._waiting += data
            if b'\n' in data:
                self._drain()

    def flush(self) -> None:
        """Writes the pending text, if possible."""
        with self._lock:
            self._drain()

    def close(self) -> None:
        """Writes the pending text, if possible, and closes the file; later text is discarded."""
        with self._lock:
            self._drain()
            if self._fd is not None:
                os.close(self._fd)
            self._fd = None

    def _drain(self):
        if self._write_out() and self._dropped:
            self._waiting += f'\n[{self._dropped} bytes of output are missing here: {self._reason}]\n'.encode()
            self._dropped = 0
            self._write_out()

    def _write_out(self):
        """Whether all pending text has been written."""
        try:
            while self._waiting and self._fd is not None:
                del self._waiting[:os.write(self._fd, self._waiting)]
        except OSError as err:
            self._reason = one_line(err.strerror or err)
        return not self._waiting


def append_line(path: str | os.PathLike, text: str) -> bool:
    """Appends a line to a file that other processes and threads may write to; returns whether that worked, and never raises."""
    data = memoryview(f'{text}\n'.encode('utf-8', 'backslashreplace'))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while data:
                data = data[os.write(fd, data):]
        finally:
            os.close(fd)
    except OSError:
        return False
    return True


class _Tee:
    """A text stream that also writes to a LogFile, except for lines that rewrite themselves (progress bars)."""

    def __init__(self, stream, file):
        self._stream, self._file = stream, file

    def write(self, text):
        if '\r' not in text:
            self._file.write(text)  # first, because a closed terminal would raise
        return self._stream.write(text)

    def flush(self):
        self._file.flush()
        self._stream.flush()

    def __getattr__(self, name):
        return getattr(self._stream, name)


def format_time(seconds: float) -> str:
    """A duration in the two largest fitting units: 42s, 3m 07s, 5h 02m, 2d 11h."""
    s = int(round(seconds))
    if s < 60:
        return f'{s}s'
    if s < 3600:
        return f'{s // 60}m {s % 60:02}s'
    if s < 86400:
        return f'{s // 3600}h {s // 60 % 60:02}m'
    return f'{s // 86400}d {s // 3600 % 24:02}h'


def printable(text: str) -> str:
    """Text with line ends and control characters, which file names may contain, replaced by escapes."""
    return text if text.isprintable() else ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(err: BaseException | str, last: bool = False) -> str:
    """The message of an error in at most 200 characters: its first line, or its last; the type of the error if it has no message."""
    return (str(err).strip().splitlines() or [type(err).__name__])[-1 if last else 0][:200]
