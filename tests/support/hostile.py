# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs: files changed at random, each read under watch, in a process of their own.

An attack is a function of an importable module, attack(folder) -> make, which reads a good input once, for what is set up late;
make(draws) writes one hostile input below the folder with a NumPy generator, and returns a function without arguments that reads it.
What is read is fine, and so is a UserError of one line; any other exception, an input that takes 10 s or 2 GiB, code that is run or
imported (but libraries' own), and files that are written elsewhere are failures.

    tally = hostile.run('tests.fuzz.test_archives:zips', count=10_000, seed=0, folder=tmp_path, seconds=1200)
    assert not tally['failed'], hostile.told(tally)

Input k depends on (seed, k) alone: "python -m tests.support.hostile MODULE:ATTACK COUNT SEED FOLDER FIRST" reads some of them again."""

import collections
import contextlib
import copy
import faulthandler
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import numpy as np

from dnnlib import UserError
from tests.support import ROOT

SECONDS, GIB = 10, 2  # of one input
LONGEST = 5000  # characters of an error
EXAMPLES = 3  # of each failure that are told in full
RUNS_CODE = ('exec', 'import', 'os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'subprocess.Popen', 'pickle.find_class',
             'socket.connect', 'socket.bind', 'ctypes.dlopen', 'webbrowser.open')
INSTALLED = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, os.path.dirname(np.__path__[0])))
CHANGES_FILES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod', 'os.chown',
                 'shutil.rmtree', 'shutil.move', 'shutil.copyfile')
# Their last arguments tell the folder that a path begins in.
RELATIVE = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link', 'os.symlink', 'os.chmod', 'os.chown')
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
RUNNER = 'from tests.support import hostile; hostile.main()'  # as a module that pickles and other modules find under its own name


class Hang(BaseException):
    """An input took too long."""


class Trespass(BaseException):
    """An input had code run, or a file written elsewhere."""


# ----------------------------------------------------------------------------------------------------
# The side of the tests


def run(attack, count, seed, folder, seconds, first=0):
    """Reads the inputs first ... first + count - 1 of an attack "module:function"; returns the tally. seconds: of all of them together.

    A process that dies, or hangs where no alarm reaches it, is a failure too: another one goes on behind the input that did it."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    tally = dict(inputs=0, read=0, refused=0, failed=0, peak_mib=0.0, slowest_sec=0.0, seconds=0.0, failures=collections.Counter(),
                 examples=collections.defaultdict(list))
    start, last = time.monotonic(), first + count
    while first < last:
        args = [sys.executable, '-c', RUNNER, attack, *map(str, (last - first, seed, folder, first))]
        done = subprocess.run(args, capture_output=True, text=True, env=env, cwd=ROOT, timeout=start + seconds - time.monotonic())
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for index, line in enumerate(lines, first):
            _count(tally, index, *line)
        first += len(lines)
        if first < last:
            assert lines or done.returncode != 1, f'{attack}: the process ended at once\n{done.stderr[-6000:]}'
            _count(tally, first, f'the process died with {done.returncode}', done.stderr[-3000:], 0, 0)
            first += 1
    tally['seconds'] = round(time.monotonic() - start, 1)
    return tally


def _count(tally, index, outcome, text, seconds, mib):
    tally['inputs'] += 1
    tally['peak_mib'], tally['slowest_sec'] = max(tally['peak_mib'], mib), max(tally['slowest_sec'], seconds)
    if outcome in ('read', 'refused'):
        tally[outcome] += 1
        return
    tally['failed'] += 1
    tally['failures'][outcome] += 1
    if len(tally['examples'][outcome]) < EXAMPLES:
        tally['examples'][outcome].append(dict(input=index, text=text))


def told(tally):
    """A tally for people."""
    lines = [f'{count} x {kind}' for kind, count in tally['failures'].most_common()]
    lines += [f'--- input {example["input"]}: {kind}\n{example["text"]}' for kind, found in tally['examples'].items() for example in found]
    return '\n'.join([json.dumps({key: value for key, value in tally.items() if key not in ('failures', 'examples')}), *lines])


# ----------------------------------------------------------------------------------------------------
# The side of the process that reads


def main(args=None):
    """MODULE:ATTACK COUNT SEED FOLDER [FIRST]: prints [outcome, text, seconds, MiB above the start] of each input, a line of JSON each.

    This process is no good for anything else afterwards: its limits stay."""
    attack, count, seed, folder, *first = args or sys.argv[1:]
    module, _, name = attack.partition(':')
    first, seed, folder = int(first[0]) if first else 0, int(seed), str(folder)
    os.makedirs(folder, exist_ok=True)
    out = os.fdopen(os.dup(1), 'w')
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 (for good)
    make = getattr(importlib.import_module(module), name)(folder)
    guard = _Guard(folder)
    for index in range(first, first + int(count)):
        outcome, text, seconds, mib = guard.judge(make(np.random.default_rng([seed, index])))
        print(json.dumps([outcome, text, round(seconds, 3), round(mib, 1)]), file=out, flush=True)


class _Guard:
    """Limits of this process, and the judgement on one input: judge(read) -> (outcome, text, seconds, MiB above the start)."""

    def __init__(self, folder):
        self._allowed = tuple(os.path.realpath(path) for path in (folder, '/dev/null'))
        self._armed = False
        sys.addaudithook(self._on_event)
        signal.signal(signal.SIGALRM, self._on_alarm)
        # Above this MemoryError is raised, which counts as a failure even where it has become one line.
        resource.setrlimit(resource.RLIMIT_DATA, (_status('VmData') + GIB * 2 ** 30,) * 2)
        self._start = _status('VmRSS')

    def judge(self, read):
        _reset_peak()
        start = time.monotonic()
        outcome, text = self._read(read)
        seconds, used = time.monotonic() - start, max(_status('VmHWM') - self._start, 0)
        if seconds > SECONDS and outcome in ('read', 'refused'):
            outcome = f'more than {SECONDS} s'
        if used > GIB * 2 ** 30 and outcome in ('read', 'refused'):
            outcome = f'more than {GIB} GiB'
        return outcome, text, seconds, used / 2 ** 20

    def _read(self, read):
        """(what came of an input, its error in full)."""
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)  # for what the alarm cannot interrupt
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self._armed = True
        try:
            read()
            return 'read', ''
        except UserError as err:
            return _judge_error(err)
        except BaseException as err:
            return _kind(err), _trace(err)
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()

    def _on_alarm(self, *_):
        raise Hang(f'more than {SECONDS} s')

    def _on_event(self, event, args):
        if not self._armed:
            return
        if event in RUNS_CODE and not _is_library(event, args):
            raise Trespass(f'{event} {args}'[:200])
        if event == 'open' and (isinstance(args[2], int) and args[2] & WRITES):
            self._check_path(event, args[0])
        elif event in CHANGES_FILES:
            count = 2 if event in ('os.rename', 'os.link', 'shutil.move', 'shutil.copyfile') else 1
            for path, folder in zip(args[:count], args[-count:]):
                self._check_path(event, path, folder)

    def _check_path(self, event, path, folder=-1):
        """folder: the open folder that the path begins in, where it is the number of one."""
        if isinstance(path, int):
            return  # a file that is open already
        base = os.readlink(f'/proc/self/fd/{folder}') if isinstance(folder, int) and folder >= 0 and event in RELATIVE else ''
        full = os.path.realpath(os.path.join(base, os.fsdecode(path)))
        if not any(full == place or full.startswith(place + os.sep) for place in self._allowed):
            raise Trespass(f'{event} {full}'[:200])


def _is_library(event, args):
    """Whether code that is imported or run is that of an installed package: libraries import parts of themselves when they need them."""
    if event == 'import':
        return not args[1] or os.path.realpath(args[1]).startswith(INSTALLED)  # what is found is run, and that is seen below
    name = getattr(args[0], 'co_filename', '') if event == 'exec' else ''
    return name.startswith('<frozen') or os.path.isabs(name) and os.path.realpath(name).startswith(INSTALLED)


def _judge_error(err):
    chain, seen = err, 0
    while chain is not None and seen < 20:
        if isinstance(chain, MemoryError):
            return f'MemoryError told as a mistake of the user, at {_place(chain)}', _trace(err)
        chain, seen = chain.__context__, seen + 1
    problem = ('several lines' if len(err.message.splitlines()) != 1 else 'control characters' if not err.message.isprintable()
               else 'too long' if len(err.message) > LONGEST else None)
    return (f'error of {problem}, at {_place(err)}', repr(err.message[:3000])) if problem else ('refused', err.message)


def _kind(err):
    what = type(err).__name__ + (f' ({str(err).split()[0]})' if isinstance(err, Trespass) else '')
    return f'{what} at {_place(err)}'


def _place(err):
    """The innermost line of the program itself that an exception passed."""
    frames = [f for f in traceback.extract_tb(err.__traceback__)
              if f.filename.startswith(str(ROOT)) and '/.venv/' not in f.filename and f.filename != __file__]
    return f'{os.path.relpath(frames[-1].filename, ROOT)}:{frames[-1].lineno} {frames[-1].name}' if frames else 'nowhere'


def _trace(err):
    return ''.join(traceback.format_exception(err))[-3000:]


def _status(key):
    """A number of bytes in /proc/self/status."""
    with open('/proc/self/status') as f:
        return int(next(line for line in f if line.startswith(f'{key}:')).split()[1]) << 10


def _reset_peak():
    with contextlib.suppress(OSError), open('/proc/self/clear_refs', 'w') as f:
        f.write('5')  # VmHWM begins anew


# ----------------------------------------------------------------------------------------------------
# Mutators

EXTREMES = [b'\0', b'\xff', b'\xff\xff', b'\x7f\xff\xff\xff', b'\xff\xff\xff\xff', b'\xff\xff\xff\x7f', b'\0\0\0\0', b'\xff' * 8,
            b'\xff' * 7 + b'\x7f', b'\0' * 64]


def mutate(data, draws, extra=(), most=3):
    """Bytes with one to `most` changes: bits, cuts, extremes, random bytes, pieces moved or left out, pieces of `extra` (bytes) put in."""
    data = bytearray(data)
    for _ in range(draws.integers(1, most + 1)):
        place, kind = int(draws.integers(len(data) + 1)), int(draws.integers(9 if extra else 8))
        other, size = int(draws.integers(len(data) + 1)), int(draws.integers(1, 200))
        if kind <= 1 and data:
            data[place % len(data)] ^= 1 << int(draws.integers(8))
        elif kind == 2:
            extreme = pick(EXTREMES, draws)
            data[place:place + len(extreme)] = extreme
        elif kind == 3:
            data[place:place] = draws.bytes(int(draws.integers(1, 9)))
        elif kind == 4:
            data[place:place] = data[other:other + size]
        elif kind == 5:
            data[place:place + size] = data[other:other + size]
        elif kind == 6:
            del data[place:place + size]
        elif kind == 7 and draws.integers(3) == 0:
            del data[place:]
        elif kind == 8:
            data[place:place] = pick(extra, draws)
    return bytes(data)


class Token(float):
    """A JSON number that is written as this text, whatever it is."""

    def __new__(cls, text):
        made = super().__new__(cls, 0)
        made.text = text
        return made

    def __repr__(self):
        return self.text


def nested(depth, kind=list):
    """Lists or objects within each other, as text of JSON."""
    return '[' * depth + ']' * depth if kind is list else '{"a":' * depth + '0' + '}' * depth


VALUES = [None, True, False, 0, -1, 1, 0.5, -0.5, 2 ** 31, 2 ** 63 - 1, 2 ** 63, -2 ** 63 - 1, 2 ** 64, 10 ** 30, -10 ** 30, 10 ** 400,
          1e-320, 1e308, -1e308, 2 ** 1024, Token('1e999'), Token('-1e999'), Token('NaN'), Token('Infinity'), Token('-Infinity'),
          Token('-0'), Token('9' * 5000), Token('0' * 3), Token('+1'), Token('0x10'), Token(nested(50)), Token(nested(3000)),
          Token(nested(200_000)), Token(nested(200_000, dict)), Token('[' * 200_000), '', 'x', '1', 'nan', 'x' * 100_000, '\n\x1b[31m\r\0',
          '\ud800', '../../x', '/etc/passwd', [], {}, [[]], [None], [1, 2], [[1], [1, 2]], ['x', 1], {'x': 1}, {'': None}, [0] * 10_000]


def mutate_json(value, draws, extra=()):
    """Text of JSON with one to three values, or keys, of the tree changed; now and then its bytes too. extra: values of one's own."""
    tree = {'': json.loads(json.dumps(value))}
    for _ in range(draws.integers(1, 4)):
        spots = list(_spots(tree))
        holder, key = spots[int(draws.integers(len(spots)))]
        kind = draws.integers(6)
        if kind == 0 and isinstance(holder, dict) and holder is not tree:
            holder[pick(['', 'x', '\n', 'x' * 1000, '../x', '\ud800'], draws)] = holder.pop(key)
        elif kind == 1 and holder is not tree:
            del holder[key]
        elif kind == 2 and isinstance(holder, list):
            holder.append(holder[key])
        else:
            holder[key] = copy.deepcopy(pick([*VALUES, *extra], draws))
    data = _text(tree['']).encode('utf-8', 'surrogatepass')
    return mutate(data, draws) if draws.integers(8) == 0 else data


def _spots(node):
    for key, item in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(item, (dict, list)):
            yield from _spots(item)


def _text(value):
    """JSON in which Tokens stand as they are."""
    if isinstance(value, Token):
        return value.text
    if isinstance(value, dict):
        return '{' + ', '.join(f'{json.dumps(str(key))}: {_text(item)}' for key, item in value.items()) + '}'
    if isinstance(value, list):
        return '[' + ', '.join(map(_text, value)) + ']'
    return json.dumps(value)


def pick(choices, draws):
    """One of the choices."""
    return choices[int(draws.integers(len(choices)))]


def scratch(folder):
    """A new empty folder below the folder of an attack."""
    return tempfile.mkdtemp(dir=folder)


if __name__ == '__main__':
    main()
