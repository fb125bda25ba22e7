# SPDX-License-Identifier: Apache-2.0
"""Nodes of a cluster on one machine: network namespaces with host names of their own, joined by a switch, each of which can be cut off.

with nodes.cluster(2) as (a, b):
    process = a.start(['torchrun', ...], log)
    b.cut()"""

import contextlib
import functools
import itertools
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

PREFIX = 'trainer'  # of the namespaces: trainer-PID-SERIAL-NAME
_serial = itertools.count()

# What a node runs its commands under: a host name and a table of hosts of its own.
ENTER = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


class Node:
    """One node: a host name, an address, and commands that run there."""

    def __init__(self, space, switch, number, folder):
        self.space, self.name, self.address = space, f'node{number}', f'10.99.0.{number + 1}'
        self._switch, self._port, self._hosts = switch, f'port{number}', Path(folder) / f'hosts{number}'

    def start(self, args, log, env=None, cwd=None):
        """Starts a command as the leader of a process group, its output in the file `log`; returns its subprocess.Popen."""
        enter = ['ip', 'netns', 'exec', self.space, 'unshare', '--mount', '--uts', 'sh', '-c', ENTER, 'sh', str(self._hosts), self.name]
        with open(log, 'w') as out:
            return subprocess.Popen([*enter, *map(str, args)], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})},
                                    cwd=cwd, start_new_session=True)

    def processes(self):
        """Those of this node."""
        found = _ip('netns', 'pids', self.space).split()
        return [psutil.Process(int(pid)) for pid in found if psutil.pid_exists(int(pid))]

    def cut(self):
        """Takes it off the network; it notices only that nobody answers."""
        _ip('-n', self._switch, 'link', 'set', self._port, 'down')

    def heal(self):
        """Puts it back."""
        _ip('-n', self._switch, 'link', 'set', self._port, 'up')

    def _plug_in(self):
        _ip('netns', 'add', self.space)
        _ip('-n', self._switch, 'link', 'add', self._port, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', self.space)
        _ip('-n', self._switch, 'link', 'set', self._port, 'master', 'br0', 'up')
        _ip('-n', self.space, 'addr', 'add', f'{self.address}/24', 'dev', 'eth0')
        _ip('-n', self.space, 'link', 'set', 'eth0', 'up')
        _ip('-n', self.space, 'link', 'set', 'lo', 'up')


@contextlib.contextmanager
def cluster(count, own_loopback=False):
    """A list of nodes, which know each other by name; skips the test where this machine allows no namespaces.

    own_loopback: each takes its own name for 127.0.1.1, as Debian and Ubuntu set it up."""
    require()
    _clean_up(_abandoned())
    name = f'{PREFIX}-{os.getpid()}-{next(_serial)}'
    with tempfile.TemporaryDirectory() as folder:
        made = [Node(f'{name}-{number}', f'{name}-switch', number, folder) for number in range(count)]
        for node in made:
            known = [f'{"127.0.1.1" if own_loopback and other is node else other.address} {other.name}' for other in made]
            node._hosts.write_text('\n'.join(['127.0.0.1 localhost', *known, '']))
        try:
            _ip('netns', 'add', f'{name}-switch')
            _ip('-n', f'{name}-switch', 'link', 'add', 'br0', 'type', 'bridge')
            _ip('-n', f'{name}-switch', 'link', 'set', 'br0', 'up')
            for node in made:
                node._plug_in()
            yield made
        finally:
            _clean_up([space for space in _spaces() if space.startswith(f'{name}-')])


def require():
    """Skips the test where network namespaces cannot be made."""
    reason = obstacle()
    if reason:
        pytest.skip(f'no network namespaces here: {reason}')


@functools.cache
def obstacle():
    """Why network namespaces cannot be made here; None where they can."""
    name = f'{PREFIX}-{os.getpid()}-probe'
    try:
        _ip('netns', 'add', name)
        try:
            _ip('-n', name, 'link', 'add', 'br0', 'type', 'bridge')
            _ip('-n', name, 'link', 'add', 'port0', 'type', 'veth', 'peer', 'name', 'eth0')
            subprocess.run(['ip', 'netns', 'exec', name, 'unshare', '--mount', '--uts', 'hostname', 'probe'], check=True,
                           capture_output=True)
        finally:
            _ip('netns', 'delete', name)
    except OSError as err:
        return f'{err.filename}: {err.strerror}'
    except subprocess.CalledProcessError as err:
        return (err.stderr or b'').decode().strip().split('\n')[-1] or str(err)
    return None


def _ip(*args):
    return subprocess.run(['ip', *args], check=True, capture_output=True).stdout.decode()


def _spaces():
    """Names of this helper's namespaces, of all processes."""
    return [line.split()[0] for line in _ip('netns', 'list').splitlines() if line.startswith(f'{PREFIX}-')]


def _abandoned():
    """Those whose makers were killed."""
    return [space for space in _spaces() if not psutil.pid_exists(int(space.split('-')[1]))]


def _clean_up(spaces):
    """Kills what runs in the namespaces, and removes them; their links go with them."""
    for space in spaces:
        deadline = time.monotonic() + 10
        while (pids := _ip('netns', 'pids', space).split()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        _ip('netns', 'delete', space)
