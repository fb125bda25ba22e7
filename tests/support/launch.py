# SPDX-License-Identifier: Apache-2.0
"""Scripts as processes of their own, on one rank or several, without the seconds that each import of PyTorch takes.

A server process of each pytest worker imports the program once; what is started here is a fork of it. Ranks get the environment that
torchrun gives them, and an agent that ends the others when one fails, as torchrun does. torchrun itself is started by command()."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['tests.support.preload'])


def command(script, args, ranks=1):
    """The command line of a script of one rank, or of more by torchrun."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}'] if ranks > 1 else []
    return [sys.executable, *launcher, str(script), *map(str, args)]


class Process:
    """What subprocess.Popen is, as far as the tests ask; the leader of a process group."""

    def __init__(self, process):
        self._process, self.pid = process, process.pid

    def poll(self):
        self._process.join(0)
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired('script', timeout)
        return self._process.exitcode

    def wait_for(self, seconds):
        """The exit code; TimeoutError if the process still runs after this number of seconds."""
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def kill(self):
        self._process.kill()

    @property
    def returncode(self):
        return self._process.exitcode


def start(script, args, log, ranks=1, env=None, cwd=None, errors=None):
    """Starts a script; its output goes to the file `log`, and what it says on stderr to `errors`, or to `log` too."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **(env or {})}
    for path in {log, errors or log}:
        Path(path).write_bytes(b'')
    what = str(script), [str(arg) for arg in args], ranks, environment, str(cwd or Path.cwd()), str(log), str(errors or log)
    process = CONTEXT.Process(target=_agent, args=what)
    process.start()
    return Process(process)


def run(script, args, ranks=1, env=None, cwd=None, timeout=300):
    """Runs a script to its end: a subprocess.CompletedProcess with text of its own in stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        log, errors = Path(folder) / 'out', Path(folder) / 'err'
        process = start(script, args, log, ranks, env, cwd, errors)
        try:
            code = process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess([str(script), *map(str, args)], code, log.read_text(), errors.read_text())


def kill_tree(process):
    """SIGKILL to a process and to all that it started, at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def signal_ranks(process, number):
    """A signal to the ranks of a process of start(), not to who watches over them."""
    for member in psutil.Process(process.pid).children() or [psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def _agent(script, args, ranks, environment, cwd, log, errors):
    """One process of the server's: the script itself, or who watches over its ranks."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    flags = os.O_WRONLY | os.O_APPEND
    os.dup2(os.open(log, flags), 1)
    os.dup2(os.open(errors, flags), 2)
    if ranks == 1:
        _script(script, args)
    with socket.create_server(('127.0.0.1', 0)) as probe:
        port = probe.getsockname()[1]
    shared = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, TORCHELASTIC_RUN_ID='tests')
    workers = []
    for rank in range(ranks):
        workers.append(os.fork())
        if not workers[-1]:
            os.environ.update({key: str(value) for key, value in {**shared, 'RANK': rank, 'LOCAL_RANK': rank}.items()})
            _script(script, args)
    os._exit(_watch(workers))


def _watch(workers):
    """0 when all of them end well; 1 as soon as one does not, after the others were ended."""
    left = set(workers)
    while left:
        pid, status = os.wait()
        left.discard(pid)
        if status:
            for other in left:
                os.kill(other, signal.SIGTERM)
            time.sleep(0.2)
            for other in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            return 1
    return 0


def _script(script, args):
    """Runs a script as the main program, and ends this process as it ends."""
    sys.argv, code = [script, *args], 0
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else int(err.code is not None)
        if isinstance(err.code, str):
            print(err.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
