# SPDX-License-Identifier: Apache-2.0
"""Rank, world, device: one process by default, or the ranks started by torchrun or a Slurm script (nccl on GPUs, gloo on CPUs).

Tensors on GPUs go over nccl; objects, barriers and everything on the CPU over gloo, which does not wait for a device. For work of one
rank that may take any time (decoding, writing, downloading) the others wait in wait_for_all(); anything else that takes longer than
the timeout ends all ranks (monitor.py)."""

import atexit
import contextlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import packing, rendezvous
from torch_utils.monitor import DONE, FAILED, Judge, Monitor

TIMEOUT_SEC = 600       # limit for a collective operation, and for a rank without a heartbeat
PIECE_BYTES = 64 << 20  # size of the pieces in which a value is shared; the timeout is for one piece
# Messages of gloo and nccl errors for which PyTorch has no class.
LOST = re.compile(r'gloo|Connection closed by peer|Connection reset|Broken pipe|Socket closed|Timed out waiting|NCCL', re.IGNORECASE)

ORPHAN = 'the launcher of this worker is gone'

_launcher_pid = None
_group, _monitor, _waits, _words, _notes = None, None, None, None, []


def init(timeout: float | None = None, remedy: str = 'start the same command again') -> None:
    """Joins the other ranks, if there are any. Call it once, at the start of a script.

    timeout: seconds; None: TIMEOUT_SEC, without mentioning --timeout in messages. remedy: the end of messages about lost ranks."""
    global _launcher_pid, _group, _monitor, _waits, _words
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        _launcher_pid = os.getppid()
    if size() == 1 or torch.distributed.is_initialized():
        return
    _check_environment()
    gpu = device()
    if gpu.type == 'cuda':
        torch.cuda.set_device(gpu)
    threads = torch.get_num_threads()
    words = torch.cuda.get_device_name(gpu) if gpu.type == 'cuda' else f'{threads} thread{"s" * (threads > 1)}'
    _group, _waits = rendezvous.meet(rank(), size(), words, local_rank()), itertools.count()
    _check_order(_group.peers)
    _words = f' (--timeout={timeout / 60:g})' if timeout else '', remedy
    timeout = timeout or TIMEOUT_SEC
    _monitor = Monitor(_group, Judge(_group.peers, rank(), timeout, *_words), _tell)
    atexit.register(fail, 'it did not leave the others')  # after shutdown() this does nothing
    if 'GLOO_SOCKET_IFNAME' not in os.environ and (name := rendezvous.interface(_group, rank())):
        os.environ['GLOO_SOCKET_IFNAME'] = name
    cuda = gpu.type == 'cuda'
    torch.distributed.init_process_group(
        'cpu:gloo,cuda:nccl' if cuda else 'gloo', timeout=timedelta(seconds=timeout), device_id=gpu if cuda else None,
        store=_group.store, rank=rank(), world_size=size())


def _check_environment():
    missing = [name for name in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing:
        raise UserError(f'WORLD_SIZE={size()} is set, but not {" and ".join(missing)}; start the ranks with torchrun, or set all of '
                        'them for each rank (docs/multi-node.md)')
    if torch.cuda.is_available() and device().index >= torch.cuda.device_count():
        what = f'--nproc_per_node={local_size()}' if 'TORCHELASTIC_RUN_ID' in os.environ else f'LOCAL_RANK={local_rank()}'
        raise UserError(f'{what} asks for more ranks than this node has GPUs ({torch.cuda.device_count()}); ask for at most that')


def _check_order(peers):
    """Checks that ranks are numbered node by node, as by torchrun: those of a node share files, and the first downloads for all."""
    for number, peer in enumerate(peers):
        first = number - peer.local_rank
        if first < 0 or (peers[first].node, peers[first].local_rank) != (peer.node, 0):
            raise UserError(f'RANK={number} has LOCAL_RANK={peer.local_rank} on {peer.host}, but RANK={first} is not LOCAL_RANK=0 there; '
                            'number the ranks node by node (srun --distribution=block)')


def shutdown() -> None:
    """Leaves the process group in an orderly way; after fail() it is left as it is."""
    global _group, _monitor
    _notes.clear()
    if _monitor is not None and not has_failed():
        if _group.serves:  # the store ends with this process
            others = [f'beat/{other}' for other in range(1, size())]
            rendezvous.poll(lambda: all(beat == DONE or beat.startswith(FAILED) for beat in _group.store.multi_get(others)))
        _monitor.leave()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _group, _monitor = None, None


def fail(error: str) -> None:
    """Reports to the other ranks, in one line, that this one ends with an error; end() must follow."""
    if _monitor is not None:
        _monitor.leave(error.split('\n')[0][:500])


def has_failed() -> bool:
    """Whether fail() was called among several ranks."""
    return _monitor is not None and _monitor.failed


def end(code: int) -> None:
    """After fail(), ends the process at once: shutting down the process group could wait for ranks that no longer exist."""
    if has_failed():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_abort(note: Callable[[str], Any]) -> None:
    """Registers note(text), to be called with the reason before this process ends because other ranks are lost; it is called from
    another thread and must be quick."""
    _notes.append(note)


def _tell(text):
    while _notes:  # each is called once
        with contextlib.suppress(Exception):  # a failing one must not prevent the others
            _notes.pop(0)(text)


def explain(error: BaseException) -> str | None:
    """A one-line message for a failed collective operation, after calling the notes of on_abort(); None for any other error."""
    if _group is None or not isinstance(error, RuntimeError):
        return None
    if not (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
        return None
    reason = re.sub(r'^(\[[^]]*\]|\S*Error:|\s)*', '', rendezvous.first_line(error)).split('. ')[0]
    option, remedy = _words
    if is_orphan():  # once the launcher is dead its ranks lose each other one by one
        reason = f'{ORPHAN}; {reason}'
    late = option if 'timed out' in reason.lower() else ''
    text = f'rank {rank()} ({_group.peers[rank()]}) has lost the others ({reason}){late}: stopping; {remedy}'
    _tell(text)
    return text


def rank_map() -> str:
    """The ranks and their devices: "8 ranks on 2 nodes: a: 0-3 (NVIDIA H200), b: 4-7 (NVIDIA H200)"; '' for one rank."""
    if _group is None:
        return ''
    nodes = {}
    for number, peer in enumerate(_group.peers):
        nodes.setdefault(peer.node, []).append((number, peer))
    parts = []
    for members in nodes.values():
        numbers = f'{members[0][0]}-{members[-1][0]}' if len(members) > 1 else f'{members[0][0]}'
        parts.append(f'{members[0][1].host}: {numbers} ({" / ".join(dict.fromkeys(peer.device for _, peer in members))})')
    return f'{size()} ranks on {len(nodes)} node{"s" * (len(nodes) > 1)}: {", ".join(parts)}'


def num_option() -> str:
    """The name of --num to use in errors: torchrun takes --num for an abbreviation of its own --numa-binding."""
    return '--num-images' if 'TORCHELASTIC_RUN_ID' in os.environ else '--num'


def rank() -> int:
    """This process's number, 0 .. size() - 1."""
    return int(os.environ.get('RANK', 0))


def size() -> int:
    """The number of ranks on all nodes."""
    return int(os.environ.get('WORLD_SIZE', 1))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get('LOCAL_RANK', 0))


def local_size() -> int:
    """The number of ranks on this node."""
    if 'LOCAL_WORLD_SIZE' not in os.environ and _group is not None:  # only torchrun sets it
        return sum(peer.node == _group.peers[rank()].node for peer in _group.peers)
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device('cpu')
    # With srun --gpus-per-task=1 each rank sees only its own GPU.
    alone = torch.cuda.device_count() == 1 and 'TORCHELASTIC_RUN_ID' not in os.environ
    return torch.device('cuda', 0 if alone else local_rank())


def pick_device(name: str | None = None) -> torch.device:
    """The device for --device=name on this rank; without a name its GPU, or the CPU. Raises UserError."""
    try:
        chosen = torch.device(name) if name else device()
    except RuntimeError:
        raise UserError(f'--device={name}: no such device; choose cpu or cuda') from None
    if chosen.type == 'cuda' and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise UserError(f'--device={name}: this machine has {torch.cuda.device_count()} usable GPUs; try --device=cpu')
    if chosen.type not in ('cpu', 'cuda'):
        raise UserError(f'--device={name}: float64 is needed; choose cpu or cuda')
    return device() if name == 'cuda' else chosen


def print0(*args: Any, **kwargs: Any) -> None:
    """print() on rank 0 only, flushed at once."""
    if rank() == 0:
        print(*args, flush=True, **kwargs)


def wait_for_all(what: str) -> None:
    """Waits until every rank has called this, for hours if need be, as long as all of them live; prints once a minute which are missing.

    what: the work of the missing ranks, for that line. Collective operations that follow start on all ranks together."""
    if _group is None:
        return
    store, number = _group.store, next(_waits)
    store.set(f'at/{rank()}', str(number))  # for _report()
    store.add(f'wait/{number}', 1)
    rendezvous.poll(lambda: store.add(f'wait/{number}', 0) == size(), report=lambda seconds: _report(number, what))
    if rank() == 0:
        store.delete_key(f'wait/{number - 1}')  # which all ranks have passed


def _report(number, what):
    """Prints, on the lowest waiting rank, which ranks are missing; raises RuntimeError if one of them has ended."""
    store = _group.store
    missing = [other for other in range(size()) if not store.check([f'at/{other}']) or int(store.get(f'at/{other}')) < number]
    gone = [other for other in missing if store.get(f'beat/{other}') == DONE]
    if gone:
        raise RuntimeError(f'rank {gone[0]} has ended while rank {rank()} was waiting for it: {what}')
    if rank() == min(set(range(size())) - set(missing)):
        names = ', '.join(f'rank {other} ({_group.peers[other].host})' for other in missing[:4])
        print(f'waiting for {names}{f" and {len(missing) - 4} more" if len(missing) > 4 else ""}: {what}', flush=True)


def barrier(what: str = 'a barrier') -> None:
    """Waits for every rank, on the host only, not for devices."""
    wait_for_all(what)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over the ranks, in place; returns it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


class Agreement:
    """The pending result of agree()."""

    def __init__(self, values: torch.Tensor | list[int], work: Any = None):
        self._values, self._work = values, work

    def result(self) -> list[int]:
        """The element-wise maximum over all ranks, a list of ints. Waits for ranks that have not called agree() yet."""
        if self._work is not None:
            self._work.wait()
            self._work, self._values = None, self._values.tolist()
        return self._values


def agree(values: Sequence[int]) -> Agreement:
    """Starts an element-wise maximum of ints over all ranks and returns at once; see Agreement.result(). Does not wait for a device."""
    if not torch.distributed.is_initialized():
        return Agreement([int(value) for value in values])
    tensor = torch.tensor([int(value) for value in values], dtype=torch.int64)
    return Agreement(tensor, torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, async_op=True))


def share(value: Any, source: int = 0, what: str = 'a shared value') -> Any:
    """The value of rank `source` on every rank: JSON values, dicts, lists, tuples and tensors in any nesting.

    Tensors arrive one after the other in new CPU tensors; the source gets back its own value. The others wait for it as long as it
    takes (what: its work meanwhile, for messages). Every rank calls this."""
    if not torch.distributed.is_initialized():
        return value
    wait_for_all(what)
    mine = rank() == source
    data, tensors = packing.pack(value) if mine else (b'', [])
    length = torch.tensor([len(data)])
    torch.distributed.broadcast(length, source)
    structure = torch.frombuffer(bytearray(data), dtype=torch.uint8) if mine else torch.empty(int(length), dtype=torch.uint8)
    torch.distributed.broadcast(structure, source)
    if not mine:
        value, tensors = packing.unpack(structure.numpy().tobytes())
    for tensor in tensors:
        for piece in packing.pieces(tensor.cpu().contiguous() if mine else tensor, PIECE_BYTES):
            torch.distributed.broadcast(piece, source)
    return value


def broadcast(value: Any, source: int = 0) -> Any:
    """Any JSON-like object of rank `source`, on every rank."""
    return share(value, source)


def from_rank0(function: Callable, *args: Any) -> Any:
    """The result of function(*args) on rank 0, on every rank; its UserError or OSError is raised on all of them."""
    found, error = share(_tried(rank() == 0, function, args), what=_words_of(function))
    if error is not None:
        raise error
    return found


def from_node(function: Callable, *args: Any) -> Any:
    """The result of function(*args) on one rank of each node, on all ranks of that node; a UserError or OSError on one node is raised on
    all ranks. Every rank calls this."""
    if not torch.distributed.is_initialized():
        return function(*args)
    told = all_values(_tried(local_rank() == 0, function, args), what=_words_of(function))
    if errors := [error for _, error in told if error is not None]:
        raise errors[0]
    return told[rank() - local_rank()][0]


def _tried(here, function, args, kwargs=()):
    """(function(...), None) if `here` is true, or (None, error) for a UserError or OSError; otherwise (None, None)."""
    try:
        return (function(*args, **dict(kwargs)) if here else None), None
    except (UserError, OSError) as err:
        return None, err


def _words_of(function):
    """A description of a function, for the ranks that wait for it."""
    return getattr(function, '__name__', 'its work').strip('_<>').replace('_', ' ')


def first_on_node(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """function(...) on one rank of each node, then on the others, so that downloads happen once per node. Every rank calls this.

    A UserError or OSError on one node is raised on all ranks."""
    result, error = _tried(local_rank() == 0, function, args, kwargs)
    for found in all_values(error, what=_words_of(function)):
        if found is not None:
            raise found
    return result if local_rank() == 0 else function(*args, **kwargs)


def all_values(value: Any, what: str = 'the values of all ranks') -> list:
    """[value of rank 0, value of rank 1, ...]: one JSON-like object per rank, on every rank. what: the slower ranks' work, for messages."""
    if not torch.distributed.is_initialized():
        return [value]
    wait_for_all(what)
    found = [None] * size()
    torch.distributed.all_gather_object(found, value)  # on the CPU, where the group has a backend for it
    return found


def all_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates the tensors [n,...] of all ranks, equal in shape, in the order of the ranks; does not wait for the device."""
    if not torch.distributed.is_initialized():
        return tensor
    found = [torch.empty_like(tensor) for _ in range(size())]
    torch.distributed.all_gather(found, tensor)
    return torch.cat(found)


def is_orphan() -> bool:
    """True if torchrun, which launched this worker, has died: the worker must not write anything any more."""
    return _launcher_pid is not None and os.getppid() != _launcher_pid
