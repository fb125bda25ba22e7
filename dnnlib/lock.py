# SPDX-License-Identifier: Apache-2.0
"""One writer per folder: a lock that ends with its owner's process and says who that is."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time

NAME = '.lock'
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # from file systems without locks


class FolderLock:
    """The lock of a folder, a byte-range lock on a file in it: the kernel, or the NFS server, releases it when its owner ends, for
    whatever reason.

    Such a lock belongs to the process, and is lost when the process closes any descriptor of the file: nothing else here opens it.
    Attribute known: False if the file system has no locks, so that none is held."""

    def __init__(self, folder: str | os.PathLike):
        self.path, self._handle, self.known = os.path.join(folder, NAME), None, True

    def acquire(self, wait_sec: float = 0.0) -> str | None:
        """Takes the lock; returns None, or a short description of its owner if the lock cannot be taken in time."""
        end = time.monotonic() + wait_sec
        while not self._try():
            if time.monotonic() >= end:
                return self._owner()
            time.sleep(0.1)
        return None

    def _try(self):
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            os.close(handle)
            if err.errno in NO_LOCKS:
                self.known = False
                return True
            if err.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(self.path)):  # the last owner may have removed the file that was locked here
                self._handle = handle
                self._introduce()
                return True
        os.close(handle)
        return False

    def _introduce(self):
        job = next((os.environ[name] for name in ('SLURM_JOB_ID', 'LSB_JOBID', 'PBS_JOBID') if name in os.environ), None)
        text = json.dumps(dict(pid=os.getpid(), host=socket.gethostname(), since=time.strftime('%Y-%m-%d %H:%M:%S'), job=job))
        with contextlib.suppress(OSError):  # a full disk must not prevent the lock
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, text.encode(), 0)

    def _owner(self):
        try:
            with open(self.path, encoding='utf-8') as f:
                told = json.load(f)
            job = f', job {told["job"]}' if told['job'] else ''
            return f'process {told["pid"]} on {told["host"]}{job}, since {told["since"]}'
        except (OSError, ValueError, KeyError, TypeError):
            return 'another process'

    def release(self) -> None:
        """Releases the lock, and removes its file."""
        if self._handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            os.close(self._handle)
            self._handle = None
