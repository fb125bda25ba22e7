# SPDX-License-Identifier: Apache-2.0
"""The number of CPU cores that this process may use, which on a shared machine is smaller than the number of cores."""

import functools
import math
import os
from pathlib import Path

CGROUPS = Path('/sys/fs/cgroup')


@functools.cache
def cpu_count() -> int:
    """Cores that this process may use: limited by its affinity (taskset, Slurm) and by the quota of its container; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return max(1, math.floor(min(cores, quota())))


def quota(root: Path = CGROUPS, own: Path = Path('/proc/self/cgroup')) -> float:
    """The strictest CPU limit of this process's control groups, in cores; inf without a limit."""
    return min((_share(folder) for folder in _groups(root, own)), default=math.inf)


def _groups(root, own):
    """The folders of this process's control group and its parents: of version 2, and of version 1's CPU controller."""
    found = [root, root / 'cpu']
    for line in _read(own).splitlines():
        _, kinds, path = line.split(':', 2)
        if kinds in ('', 'cpu', 'cpu,cpuacct'):
            inside = (root if not kinds else root / 'cpu') / path.strip('/')
            found += [folder for folder in (inside, *inside.parents) if folder.is_relative_to(root)]
    return found


def _share(folder):
    """The limit of one group: "max 100000" or "200000 100000" in version 2; two files in version 1, where -1 means no limit."""
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
