# SPDX-License-Identifier: Apache-2.0
"""Threads are as many as a process may use, not as many as the machine has."""

import math
import os
import subprocess
import sys

import pytest

from dnnlib import cpus
from tests.support import ROOT


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace('_', '.', 1)).write_text(text)


@pytest.mark.parametrize('own, files, want', [
    ('0::/a/b', {'a': 'max 100000', 'a/b': '250000 100000'}, 2.5),
    ('0::/a/b', {'a': '150000 100000', 'a/b': 'max 100000'}, 1.5),  # the strictest of those around it
    ('0::/', {'.': '50000 100000'}, 0.5), ('0::/elsewhere', {}, math.inf), ('', {}, math.inf), ('0::/a', {'a': 'damaged'}, math.inf)])
def test_quota_of_version_2(tmp_path, own, files, want):
    (tmp_path / 'own').write_text(own)
    for folder, text in files.items():
        write(tmp_path / 'root' / folder, cpu_max=text)
    assert cpus.quota(tmp_path / 'root', tmp_path / 'own') == want


@pytest.mark.parametrize('time, want', [('400000', 4), ('-1', math.inf)])
def test_quota_of_version_1(tmp_path, time, want):
    (tmp_path / 'own').write_text('4:cpu,cpuacct:/job\n3:memory:/job\n')
    write(tmp_path / 'root' / 'cpu' / 'job', cpu_cfs_quota_us=time, cpu_cfs_period_us='100000')
    assert cpus.quota(tmp_path / 'root', tmp_path / 'own') == want


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='no affinity here')
def test_affinity_counts():
    code = 'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from dnnlib.cpus import cpu_count; print(cpu_count())'
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True).stdout == '1\n'
