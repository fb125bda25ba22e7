# SPDX-License-Identifier: Apache-2.0
"""How many CPU cores this process may use, which on a shared machine are fewer than there are."""

import functools
import math
import os
from pathlib import Path

CGROUPS = Path('/sys/fs/cgroup')


@functools.cache
def cpu_count():
    """Cores that this process may use at once: those it may run on (taskset, Slurm), or less by the quota of its container; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, math.floor(min(cores, quota())))


def quota(root=CGROUPS, own=Path('/proc/self/cgroup')):
    """Cores' worth of time that the control groups of this process allow it, the strictest of them; inf where none limits it."""
    return min((_share(folder) for folder in _groups(root, own)), default=math.inf)


def _groups(root, own):
    """The folders of the group that this process is in and of those around it: of version 2, and of version 1's CPU controller."""
    found = [root, root / 'cpu']
    for line in _read(own).splitlines():
        _, kinds, path = line.split(':', 2)
        if kinds in ('', 'cpu', 'cpu,cpuacct'):
            inside = (root if not kinds else root / 'cpu') / path.strip('/')
            found += [folder for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
    return found


def _share(folder):
    """The limit of one group: "max 100000" or "200000 100000" in version 2; two files in version 1, -1 for none."""
    words = _read(folder / 'cpu.max').split() or [_read(folder / f'cpu.cfs_{name}_us').strip() for name in ('quota', 'period')]
    try:
        time, period = (float(word) for word in words)
    except ValueError:
        return math.inf
    return time / period if time > 0 and period > 0 else math.inf


def _read(path):
    try:
        return path.read_text()
    except OSError:
        return ''
