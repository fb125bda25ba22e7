# SPDX-License-Identifier: Apache-2.0
"""A small file system of its own that can be filled and emptied, where this process may mount one."""

import contextlib
import subprocess

import pytest


class SmallDisk:
    """path: where it is mounted. fill() leaves no byte free; free() gives all of it back."""

    def __init__(self, path):
        self.path, self._ballast = path, path / 'ballast'

    def fill(self):
        with contextlib.suppress(OSError), open(self._ballast, 'ab', buffering=0) as f:
            while True:
                f.write(bytes(1 << 16))
        with contextlib.suppress(OSError), open(self._ballast, 'ab', buffering=0) as f:
            while True:
                f.write(b'0')

    def free(self):
        self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(path, mib):
    """A SmallDisk of this size in MiB at `path`; skips the test where mounting is not allowed."""
    path.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={mib}m', 'none', str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'cannot mount a small file system here: {done.stderr.strip()}')
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)
