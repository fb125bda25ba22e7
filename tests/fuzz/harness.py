# SPDX-License-Identifier: Apache-2.0
"""Opens damaged files in a process of its own, within limits of time and memory, and writes down what came of each.

    python -m tests.fuzz.harness KIND FOLDER SEED FIRST LAST

Inputs FIRST ... LAST - 1; each is a function of (KIND, SEED, its number). One line of JSON an input goes to FOLDER/results.jsonl; the
number under way is in FOLDER/now, for those that end the process."""

import collections
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from tests.support import ROOT

SECONDS, MEMORY = 10, 2 << 30  # of one input; what the process may take in addition to what it has when it is ready
LONGEST = 1500                 # characters of a message, the path of the file included
FORBIDDEN = ('exec', 'import', 'os.system', 'os.exec', 'os.fork', 'os.posix_spawn', 'os.mkdir', 'subprocess.Popen',
             'pickle.find_class', 'socket.connect', 'ctypes.dlopen')


def run(kind, folder, count, seed=0, seconds=600, first=0):
    """Opens inputs first ... first + count - 1 of a kind; returns {outcome: [numbers]}: "loaded", "refused", and what failed, in words.

    A process that dies is started again behind the input that ended it. seconds: for all of them."""
    folder = Path(folder)
    results, now = folder / 'results.jsonl', folder / 'now'
    results.write_text('')
    outcomes, place = collections.defaultdict(list), first
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'PYTHONPATH': str(ROOT)}
    while place < first + count:
        now.write_text('')
        args = [kind, str(folder), str(seed), str(place), str(first + count)]
        done = subprocess.run([sys.executable, '-X', 'faulthandler', '-m', 'tests.fuzz.harness', *args], capture_output=True, text=True,
                              env=env, cwd=ROOT, timeout=seconds)
        if done.returncode == 0:
            break
        assert now.read_text(), done.stderr[-3000:]  # before the first input: no fault of theirs
        place = int(now.read_text())
        assert done.returncode < 0, done.stderr[-3000:]
        outcomes[f'killed by {signal.Signals(-done.returncode).name}: {_where(done.stderr)}'].append(place)
        place += 1
    for line in results.read_text().splitlines():
        number, outcome = json.loads(line)
        outcomes[outcome].append(number)
    return dict(outcomes)


def failures(outcomes):
    """{what: [numbers]} of those that neither loaded nor were refused."""
    return {what: numbers for what, numbers in outcomes.items() if what not in ('loaded', 'refused')}


def _where(text):
    """The innermost of the program's own frames in what faulthandler says."""
    frames = [line.strip() for line in text.splitlines() if 'File "' in line]
    own = [line for line in frames if str(ROOT) in line and '/tests/' not in line and '.venv' not in line]
    return (own or frames or text.strip().splitlines()[-1:] or ['?'])[0].replace(f'{ROOT}/', '')


# ---- in the process


def main(kind, folder, seed, first, last):
    from tests.fuzz.kinds import KINDS
    case = KINDS[kind](Path(folder))
    case.read()  # whatever is imported late is in by now
    limits = Limits()
    with open(Path(folder) / 'results.jsonl', 'a') as results:
        for number in range(int(first), int(last)):
            (Path(folder) / 'now').write_text(str(number))
            case.write(_generator(kind, int(seed), number))
            outcome = limits.judge(case)
            results.write(json.dumps([number, outcome]) + '\n')
            results.flush()


def _generator(*key):
    import numpy as np

    from torch_utils import misc
    return np.random.default_rng(misc.seed_of(*key))


class Limits:
    """What reading may cost, and must not do."""

    def __init__(self):
        self.active = False
        for encoding in ('utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-32-be'):
            ''.encode(encoding)  # imports it; json guesses encodings
        sys.addaudithook(self._forbid)
        used = int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))

    def _forbid(self, event, args):
        if self.active and event in FORBIDDEN:
            self.active = False
            raise SystemExit(f'executed {event} {str(args)[:200]}')

    def judge(self, case):
        """"loaded", "refused", or what is wrong with how it was read."""
        from dnnlib import UserError
        signal.alarm(SECONDS)
        self.active = True
        try:
            case.read()
            found = 'loaded'
        except UserError as err:
            self.active = False
            found = _check(err) or 'refused'
        except BaseException as err:  # also SystemExit, RecursionError and MemoryError
            self.active = False
            found = describe(err)
        self.active = False
        signal.alarm(0)
        return case.check() or found


def _check(err):
    """What is wrong with a refusal; None where nothing is."""
    cause = err
    while cause is not None:
        if isinstance(cause, MemoryError) or any(word in str(cause) for word in ('allocate memory', 'bad_alloc', 'memory exhausted')):
            return f'asked for too much memory, {describe(cause)}'
        cause = cause.__context__
    bad = [c for c in err.message if not c.isprintable()]
    if bad:
        return f'message with {ascii(bad[0])}: {ascii(err.message[-80:])}'
    return f'message of {len(err.message)} characters' if len(err.message) > LONGEST else None


def describe(err):
    """An error, and the innermost line of the program's own that it passed through; without numbers, so that alike ones are one."""
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if frame.filename.startswith(str(ROOT))
              and '/tests/' not in frame.filename and '.venv' not in frame.filename]
    where = f'{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno} {frames[-1].name}' if frames else 'tests'
    text = ''.join('#' if c.isdigit() else c for c in ascii(str(err).splitlines()[0] if str(err) else '')[:60])
    return f'{type(err).__name__} at {where}: {text}'


if __name__ == '__main__':
    main(*sys.argv[1:])
