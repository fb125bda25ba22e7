# SPDX-License-Identifier: Apache-2.0
"""Rank, world, device: one process by default, torchrun's ranks when it launched us (nccl on GPUs, gloo on CPUs)."""

import os

import torch

from dnnlib import UserError

_launcher_pid = None


def init():
    """Joins the process group if torchrun launched this process; otherwise does nothing. Safe to call once at the start of a script."""
    global _launcher_pid
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        _launcher_pid = os.getppid()
    if int(os.environ.get('WORLD_SIZE', 1)) == 1 or torch.distributed.is_initialized():
        return
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(f'--nproc_per_node={local_size()} asks for more ranks than this node has GPUs '
                            f'({torch.cuda.device_count()}); ask for at most that')
        torch.cuda.set_device(local_rank())
    torch.distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')


def shutdown():
    """Leaves the process group, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def num_option():
    """What --num is called in errors: torchrun takes it for an abbreviation of its own --numa-binding."""
    return '--num-images' if 'TORCHELASTIC_RUN_ID' in os.environ else '--num'


def rank():
    """This process's number, 0 .. size() - 1."""
    return int(os.environ.get('RANK', 0))


def size():
    """How many processes work together, over all nodes."""
    return int(os.environ.get('WORLD_SIZE', 1))


def local_rank():
    """This process's number on its node."""
    return int(os.environ.get('LOCAL_RANK', 0))


def local_size():
    """How many processes work together on this node."""
    return int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def device():
    """This rank's GPU, or the CPU."""
    return torch.device('cuda', local_rank()) if torch.cuda.is_available() else torch.device('cpu')


def pick_device(name=None):
    """The device that --device names, on this rank; without a name its GPU, or the CPU. Raises UserError."""
    try:
        chosen = torch.device(name) if name else device()
    except RuntimeError:
        raise UserError(f'--device={name}: no such device; choose cpu or cuda') from None
    if chosen.type == 'cuda' and (not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()):
        raise UserError(f'--device={name}: this machine has {torch.cuda.device_count()} usable GPUs; try --device=cpu')
    if chosen.type not in ('cpu', 'cuda'):
        raise UserError(f'--device={name}: float64 is needed; choose cpu or cuda')
    return device() if name == 'cuda' else chosen


def print0(*args, **kwargs):
    """print() on rank 0 only, flushed at once."""
    if rank() == 0:
        print(*args, flush=True, **kwargs)


def barrier():
    """Waits for every rank."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def all_sum(tensor):
    """Sums a tensor over the ranks, in place; returns it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast(value, source=0):
    """Any JSON-like object of rank `source`, on every rank."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=source, device=device())
    return box[0]


def from_rank0(function, *args):
    """function(*args) of rank 0, on every rank; what is the user's mistake or the file system's there is raised on all of them."""
    found, error = None, None
    if rank() == 0:
        try:
            found = function(*args)
        except (UserError, OSError) as err:
            error = err
    found, error = broadcast((found, error))
    if error is not None:
        raise error
    return found


def first_on_node(function, *args, **kwargs):
    """function(...) on one rank of each node, then on the others: what it downloads is fetched once. Every rank calls this."""
    if local_rank() == 0:
        result = function(*args, **kwargs)
        barrier()
        return result
    barrier()
    return function(*args, **kwargs)


def all_values(value):
    """[value of rank 0, value of rank 1, ...]: one JSON-like object of each rank, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    found = [None] * size()
    torch.distributed.all_gather_object(found, value)
    return found


def all_rows(tensor):
    """The rows of every rank's tensor [n,...] of one shape, in the order of the ranks; nothing waits for the device."""
    if not torch.distributed.is_initialized():
        return tensor
    found = [torch.empty_like(tensor) for _ in range(size())]
    torch.distributed.all_gather(found, tensor)
    return torch.cat(found)


def is_orphan():
    """True when torchrun, which launched this worker, has died: such a worker must write nothing more."""
    return _launcher_pid is not None and os.getppid() != _launcher_pid


class _Agreed:
    def __init__(self, values):
        self._table = torch.tensor(values)
        self._work = torch.distributed.all_reduce(self._table, torch.distributed.ReduceOp.MAX, async_op=True) if size() > 1 else None

    def result(self):
        if self._work is not None:
            self._work.wait()
        return self._table.tolist()


def agree(values):
    return _Agreed(values)


def share(value, source=0):
    return broadcast(value, source)
