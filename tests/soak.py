# SPDX-License-Identifier: Apache-2.0
"""Lets a small training run for a while, with states, snapshots, held-out loss and metrics, and looks at its memory and open files.

python -m tests.soak --minutes=30 [--ranks=2]

Prints one line per minute, and at the end the slope of the resident memory against the steps after the first fifth of the time; exits with
1 where that is 1 MiB per 1,000 steps or more, or where the number of open files grew."""

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

import eval_fid
from tests.support import launch, tiny

FLAGS = ['--augment=0.5', '--dropout=0.2', '--val=0.2', '--threads=1', '--seed=5', '--expr-id=x', '--tick=0.8', '--dump=2', '--snap=4',
         '--samples=2', '--metrics-every=8', '--metrics-num=16', '--metrics-detector=pixels', '--duration=1000']


def look(process, log):
    """(steps, MiB and open files of all ranks together)."""
    kimg = re.findall(r'^tick \d+  kimg ([\d.]+)', log.read_text(), re.MULTILINE)
    ranks = psutil.Process(process.pid).children() or [psutil.Process(process.pid)]
    return float(kimg[-1] if kimg else 0) * 1e3 / 16, sum(p.memory_info().rss for p in ranks) / 2**20, sum(p.num_fds() for p in ranks)


def main(minutes, ranks, folder):
    folder = Path(folder)
    data, log = tiny.make_zip(folder / 'data.zip'), folder / 'log'
    eval_fid.main(['ref', f'--data={data}', f'--dest={folder / "ref.npz"}', '--detector=pixels'], standalone_mode=False)
    args = [f'--outdir={folder / "runs"}', f'--data={data}', f'--metrics-ref={folder / "ref.npz"}', *tiny.FLAGS, *FLAGS]
    process, start, seen = tiny.start(args, log, ranks), time.time(), []
    try:
        while time.time() - start < minutes * 60:
            time.sleep(min(1.0, minutes * 6))
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            seen.append((time.time() - start, *look(process, log)))
            if int(seen[-1][0] / 60) > int(seen[-2][0] / 60 if len(seen) > 1 else 0):
                print('{:4.0f} s  {:8.0f} steps  {:8.1f} MiB  {} open files'.format(*seen[-1]), flush=True)
    finally:
        launch.kill_tree(process)
    _, steps, mib, files = np.array([each for each in seen if each[0] > minutes * 12]).T  # the first fifth fills caches
    slope = np.polyfit(steps, mib, 1)[0] * 1000
    third = len(files) // 3
    print(f'{ranks} ranks, {steps[-1]:.0f} steps: {slope:+.3f} MiB per 1,000 steps, between {mib.min():.1f} and {mib.max():.1f} MiB; '
          f'open files: at most {files[:third].max():.0f} in the first third, {files[-third:].max():.0f} in the last')
    return slope >= 1 * ranks or files[-third:].max() > files[:third].max()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=30)
    parser.add_argument('--ranks', type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sys.exit(int(main(given.minutes, given.ranks, place)))
