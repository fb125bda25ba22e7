# SPDX-License-Identifier: Apache-2.0
"""Kills a small training at random moments, again and again, and compares what its continuation comes to with a run that nobody killed.

python -m tests.kill_matrix --count=100 --ranks=1
python -m tests.kill_matrix --count=20 --signal=TERM
python -m tests.kill_matrix --count=20 --arch=dit

Writes are slowed down, so that many of the signals fall into them. Prints a line for each run that came to its end, and the tally; exits
with 1 where a run ended in other numbers, or a half-written file lay under a final name."""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import eval_fid
from tests.support import launch, tiny
from tests.support.archs import TINY
from torch_utils import checkpoint
from training.run.stopping import STOPPED

# train.py, but for a disk that takes its time: each file is flushed, and each name given, a little late.
SLOW_DISK = """
import os, time, train
def late(function):
    return lambda *args, **kwargs: (time.sleep({seconds}), function(*args, **kwargs))[1]
os.fsync, os.replace, os.rename = late(os.fsync), late(os.replace), late(os.rename)
train.main()
"""
STEPS = 40
UNET = [*tiny.UNET, '--dropout=0.2']
FLAGS = ['--augment=0.5', '--xflip=1', '--val=0.2', '--threads=1', '--seed=5', '--expr-id=x', '--dump=1', '--snap=2',
         '--samples=2', '--keep-states=2', '--metrics-every=4', '--metrics-num=16', '--metrics-detector=pixels', '--resume=latest',
         f'--duration={STEPS * 16 / 1e6}']


class Trials:
    """Runs of one command line in folders of their own. arch: None (a U-Net), or a key of TINY, which is trained with classes."""

    def __init__(self, folder, ranks, seed, arch=None, slow_sec=0.05):
        self.folder, self.ranks, self.random = Path(folder), ranks, random.Random(seed)
        self.script, self.log = self.folder / 'slow.py', self.folder / 'log'
        self.script.write_text(SLOW_DISK.format(seconds=slow_sec))
        data = tiny.make_zip(self.folder / 'data.zip')
        eval_fid.main(['ref', f'--data={data}', f'--dest={self.folder / "ref.npz"}', '--detector=pixels'], standalone_mode=False)
        network = [f'--arch={TINY[arch]}', '--cond=1', '--label-dropout=0.2', '--cep=gaussian'] if arch else UNET
        self.args = [f'--data={data}', f'--metrics-ref={self.folder / "ref.npz"}', *tiny.REST, *FLAGS, *network]
        self.where = collections.Counter()
        self.expected = self.finish('straight')
        start = time.time()
        assert self.finish('again') == self.expected
        self.seconds = time.time() - start  # of a whole run, whose modules are imported by now

    def start(self, name):
        return tiny.start([f'--outdir={self.folder / name}', *self.args], self.log, self.ranks, self.script)

    def finish(self, name):
        """Lets the run come to its end; its digests."""
        process = self.start(name)
        code = process.wait(600)
        assert code == 0, f'exit code {code}\n{self.log.read_text()}'
        return self.digests(name)

    def digests(self, name):
        (run,) = (self.folder / name).iterdir()
        found = tiny.digests(run, f'training-state-{STEPS * 16 / 1e3:010.3f}.pt')
        return found | {path.name: tiny.files_digest(path) for path in run.glob('network-snapshot-*')}

    def interrupt(self, name, number):
        """Starts the run, and sends it a signal after a random time; True where that ended it."""
        process = self.start(name)
        with contextlib.suppress(TimeoutError):
            code = process.wait_for(self.random.uniform(0, 1.1 * self.seconds))
            assert code == 0, f'exit code {code}\n{self.log.read_text()}'
            return False
        if number == signal.SIGKILL:
            launch.kill_tree(process)
        else:
            launch.signal_ranks(process, number)
            code, log = process.wait(600), self.log.read_text()
            early = code == -number and 'training images' not in log  # nothing had begun that could be finished
            assert code in (0, STOPPED) or early or self.ranks > 1, f'exit code {code}\n{log}'
        self.note(name)
        return True

    def note(self, name):
        """Counts what the signal fell into, and looks at every file that has a final name."""
        folders = list((self.folder / name).glob('*'))
        if not folders:
            self.where['before there was a folder'] += 1
            return
        (run,) = folders
        names = os.listdir(run)
        places = {'a state': '.training-state', 'a snapshot': '.network-snapshot', 'a grid': '.samples', 'JSON': '.options'}
        begun = [place for place, start in places.items() if any(each.startswith(start) for each in names)]
        self.where[f'writing {begun[0]}' if begun else 'training' if 'stats.jsonl' in names else 'before the first tick'] += 1
        for path in checkpoint.states(run):
            checkpoint.load(path)
        for each in names:
            if each.startswith('network-snapshot'):
                assert sorted(os.listdir(run / each)) == ['README.md', 'config.json', 'model.safetensors']
            if each.endswith('.json'):
                json.loads((run / each).read_text())


def main(count, ranks, number, seed, folder, tell=print, arch=None):
    """(signals that ended a process, runs that came to their end, those with other numbers)."""
    trials = Trials(folder, ranks, seed, arch)
    tell(f'{ranks} ranks; a whole run takes {trials.seconds:.1f} s')
    sent = runs = other = 0
    while sent < count:
        name, here = f'run{runs}', 0
        while sent < count and here < 8 and trials.interrupt(name, number):
            sent, here = sent + 1, here + 1
        if not here:  # it came to its end before the signal
            shutil.rmtree(trials.folder / name)
            continue
        found = trials.finish(name)
        differing = [key for key in trials.expected if found.get(key) != trials.expected[key]]
        runs, other = runs + 1, other + bool(differing)
        tell(f'run {runs}: {here} x {number.name}, {sent} of {count}: ' + (f'OTHER {", ".join(differing)}' if differing else 'equal'))
    tell(f'{sent} x {number.name} on {ranks} ranks: {runs - other} of {runs} runs ended in the uninterrupted numbers; they fell into: '
         + ', '.join(f'{place} {times}' for place, times in trials.where.most_common()))
    return sent, runs, other


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--count', type=int, default=100)
    parser.add_argument('--ranks', type=int, default=1)
    parser.add_argument('--signal', choices=['KILL', 'TERM', 'INT', 'USR1'], default='KILL')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--arch', choices=TINY)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tell = lambda line: print(line, flush=True)
        sys.exit(main(given.count, given.ranks, signal.Signals[f'SIG{given.signal}'], given.seed, place, tell, given.arch)[2] > 0)
