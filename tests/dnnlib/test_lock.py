# SPDX-License-Identifier: Apache-2.0
"""A folder's lock: one owner, who is named, and whose death gives it back."""

import errno
import fcntl
import os
import signal

import pytest

from dnnlib.lock import FolderLock


@pytest.fixture
def owner(tmp_path):
    """pid of another process that holds the lock of tmp_path."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        lock = FolderLock(tmp_path)
        os.write(write, b'1' if lock.acquire() is None else b'0')
        signal.pause()
    assert os.read(read, 1) == b'1'
    yield pid
    for handle in (read, write):
        os.close(handle)
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_another_process_is_named(tmp_path, owner):
    told = FolderLock(tmp_path).acquire(0.2)
    assert told.startswith(f'process {owner} on {os.uname().nodename}') and ', since 20' in told
    (tmp_path / '.lock').write_text('{')
    assert FolderLock(tmp_path).acquire() == 'another process'


def test_it_dies_with_its_owner(tmp_path, owner):
    lock = FolderLock(tmp_path)
    assert lock.acquire()
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    assert lock.acquire() is None and (tmp_path / '.lock').exists()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_file_that_its_owner_removed_is_no_lock(tmp_path, monkeypatch):
    """Who opened it before, and gets the lock after, holds nothing: the next one makes a new file."""
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.acquire() is None
    lockf, once = fcntl.lockf, []

    def late(handle, how):
        if not once:
            once.append(first.release())
        return lockf(handle, how)
    monkeypatch.setattr(fcntl, 'lockf', late)
    assert second.acquire(1) is None
    assert os.path.samestat(os.stat(tmp_path / '.lock'), os.fstat(second._handle))


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'lockf', none)
    lock = FolderLock(tmp_path)
    assert lock.acquire() is None and not lock.known
