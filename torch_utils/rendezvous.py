# SPDX-License-Identifier: Apache-2.0
"""Connects the ranks: the store that they share, a description of each rank, and a unique name for this start of the program."""

import json
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import psutil
from torch.distributed import PrefixStore, TCPStore

from dnnlib import UserError

JOIN_SEC = 600    # time for all ranks to start; nodes of a cluster may come up minutes apart
STORE_SEC = 60    # timeout of the store's operations, which include name look-ups that may be slow
PROBE_SEC = 5     # timeout for a first connection
REPORT_SEC = 60   # time between lines about a wait
PAUSES_SEC = 0.001, 0.1  # time between polls of the store: at first, and after a while


class Peer(NamedTuple):
    """The description of a rank."""

    host: str
    pid: int
    node: str         # equal exactly on the ranks of one node
    local_rank: int
    device: str       # 'NVIDIA H200', '4 threads'
    address: str      # its own, in the network that leads to the store
    nonce: str        # unique to this process

    def __str__(self):
        return f'host {self.host}, pid {self.pid}'


class Group(NamedTuple):
    """The ranks of one start."""

    store: PrefixStore    # with keys of this start only, since the server may outlive it
    watch: PrefixStore    # the same, over a separate connection for another thread
    place: tuple          # (host, port) of the server
    prefixes: tuple       # of the keys, for further connections
    peers: list           # [Peer of rank 0, ...]
    serves: bool          # whether the server lives in this process

    def connect(self) -> PrefixStore:
        """Another connection to the store. Raises OSError or RuntimeError."""
        return _prefixed(connect(*self.place), self.prefixes)


def meet(rank: int, size: int, device: str, local_rank: int) -> Group:
    """Waits for all ranks to start; returns their Group. device: the name of this rank's device. Raises UserError."""
    place = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    serves = rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
    plain = serve(*place) if serves else reach(*place)
    watch = reach(*place)  # now: connecting may take long, and the timeout starts once the others know this rank
    host = socket.gethostname()
    node = os.environ.get('GROUP_RANK') or f'{host} {_boot()}'
    peer = Peer(host, os.getpid(), node, local_rank, device, own_address(place[0]), os.urandom(8).hex())
    name = peer.nonce if rank == 0 else _ask(plain, rank, peer)
    prefixes = 'ranks', name
    store = _prefixed(plain, prefixes)
    store.set(f'beat/{rank}', '0')
    store.set(f'peer/{rank}', json.dumps(peer))
    if rank == 0:
        _invite(plain, store, size, name)
        store.set('peers', json.dumps([json.loads(store.get(f'peer/{other}')) for other in range(size)]))
    elif not poll(lambda: store.check(['peers']), JOIN_SEC):
        raise UserError(f'the {size} ranks did not all join within {JOIN_SEC:g} s; rank 0 prints which are missing')
    peers = [Peer(*fields) for fields in json.loads(store.get('peers'))]
    if peers[rank].nonce != peer.nonce:
        raise given_twice(rank, peer)
    return Group(store, _prefixed(watch, prefixes), place, prefixes, peers, serves)


def given_twice(rank: int, peer: Peer) -> UserError:
    """The error for two processes with the same rank."""
    return UserError(f'RANK={rank} was given twice: to this process ({peer}) and to another; each rank needs a number of its own')


def serve(host: str, port: int) -> TCPStore:
    """Starts the server of the store in this process. Raises UserError."""
    try:
        return TCPStore(host, port, None, True, timedelta(seconds=STORE_SEC), wait_for_workers=False)
    except RuntimeError as err:
        raise UserError(f'MASTER_ADDR={host} MASTER_PORT={port}: rank 0 cannot listen there ({first_line(err)}); '
                        'name the node of rank 0, and a port that is free on it') from None


def reach(host: str, port: int) -> TCPStore:
    """Waits for the server of the store, which runs in rank 0 or its launcher, and connects to it. Raises UserError."""
    found = []

    def there():
        try:
            found.append(connect(host, port))
        except (OSError, RuntimeError) as err:
            there.error = err
        return bool(found)

    waiting = lambda seconds: print(f'waiting for rank 0 to answer at {host}:{port}: {first_line(there.error)}', flush=True)
    if not poll(there, JOIN_SEC, waiting, slow=1):
        raise UserError(f'MASTER_ADDR={host} MASTER_PORT={port}: no answer within {JOIN_SEC:g} s ({first_line(there.error)}); '
                        'start rank 0 there, and set its address on all nodes')
    return found[0]


def connect(host: str, port: int) -> TCPStore:
    """A client of the store. Raises OSError or RuntimeError."""
    # TCPStore prints pages of errors if it cannot connect: hence a plain connection is tried first. Not to be done often: the server
    # looks up the name of every address that connects, and answers nobody meanwhile.
    socket.create_connection((host.strip('[]'), port), PROBE_SEC).close()
    return TCPStore(host, port, None, False, timedelta(seconds=STORE_SEC), wait_for_workers=False)


def poll(ready: Callable[[], bool], seconds: float = float('inf'), report: Callable[[float], Any] | None = None,
         slow: float = PAUSES_SEC[1]) -> bool:
    """Waits until ready() is true; returns False after the given time. report: callable(seconds waited), called once a minute."""
    start, told, pause = time.monotonic(), 0, PAUSES_SEC[0]
    while not ready():
        waited = time.monotonic() - start
        if waited >= seconds:
            return False
        if report is not None and waited // REPORT_SEC > told:
            told = waited // REPORT_SEC
            report(waited)
        time.sleep(pause)
        pause = min(1.5 * pause, slow)
    return True


def own_address(host: str) -> str:
    """This node's own address in the network that leads to `host`; '' if there is no route."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip('[]'), 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return ''


def interface(group: Group, rank: int) -> str | None:
    """The network interface that leads from the rank's node to the other nodes; None on one node, or if none is found.

    By default Gloo takes the interface of the host's name, which is the loopback if /etc/hosts says 127.0.1.1."""
    others = [peer.address for peer in group.peers if peer.node != group.peers[rank].node]
    if not others:
        return None
    outside = [address for address in others if not address.startswith('127.') and address not in ('', '::1')]
    own = own_address((outside or [group.place[0]])[0])
    names = [name for name, addresses in psutil.net_if_addrs().items() if own in [each.address.split('%')[0] for each in addresses]]
    return names[0] if own and names else None


def first_line(error: BaseException) -> str:
    """The message of a PyTorch error, without the trace that follows it."""
    return str(error).strip().split('\n')[0].strip() or type(error).__name__


def _prefixed(store, prefixes):
    for prefix in prefixes:
        store = PrefixStore(prefix, store)
    return store


def _boot():
    """A text that differs between machines with the same name, such as containers."""
    try:
        with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
            return file.read().strip()
    except OSError:
        return ''


def _ask(plain, rank, peer):
    """Asks rank 0 for the name of this start. Requests of an earlier start may still be in the store: hence the nonce."""
    base = PrefixStore('ranks', plain)
    base.set(f'asks/{rank}', peer.nonce)

    def answered():
        if base.get(f'asks/{rank}').decode() != peer.nonce:
            raise given_twice(rank, peer)
        return base.check([f'name/{peer.nonce}'])

    if not poll(answered, JOIN_SEC):
        raise UserError(f'rank 0 did not join within {JOIN_SEC:g} s; rank {rank} ({peer}) was waiting for it')
    return base.get(f'name/{peer.nonce}').decode()


def _invite(plain, store, size, name):
    """On rank 0: gives the name to every rank that asks, until each has stored its description under it."""
    base, answered, missing = PrefixStore('ranks', plain), {}, []

    def complete():
        for rank in range(1, size):
            if base.check([f'asks/{rank}']) and answered.get(rank) != (asker := base.get(f'asks/{rank}').decode()):
                base.set(f'name/{asker}', name)  # never read if the request belongs to an earlier start
                answered[rank] = asker
        missing[:] = [rank for rank in range(1, size) if not store.check([f'peer/{rank}'])]
        return not missing

    some = lambda: f'{", ".join(map(str, missing[:8]))}{" and more" if len(missing) > 8 else ""} of {size} ranks'
    if not poll(complete, JOIN_SEC, lambda seconds: print(f'waiting for the start of {some()}', flush=True)):
        raise UserError(f'{some()} did not join within {JOIN_SEC:g} s: start all of them, with the same MASTER_ADDR and MASTER_PORT')
