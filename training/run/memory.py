# SPDX-License-Identifier: Apache-2.0
"""How much memory a training step takes, counted on tensors without content; the largest micro-batch that fits; running out of memory.

Counted is what PyTorch allocates for one forward and backward pass of the eager network, tensor by tensor, in the order of the program.
Not counted: workspaces and kernels of the libraries, and fragmentation, for which a margin is left (SHARE). A compiled network keeps
less than that."""

import contextlib
import copy
import dataclasses
import gc
import math
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dnnlib import UserError
from torch_utils import distributed, misc
from training.data.batches import Batch
from training.networks.rows import RowLayer
from training.run.build import build_averages, build_net, build_objective, build_optimizer
from training.run.config import Config
from training.run.schema import example

SHARE = {'cuda': 0.9, 'cpu': 0.8}  # of the free memory that a run may take: the rest is for what is not counted, and for the data
ENOUGH = 8  # images in a forward pass, below which --checkpoint=auto rather recomputes blocks
LATER = 10 ** 9  # a step at which warm-ups are over
GIB = 2 ** 30
# Texts of errors of the CPU's allocators, for which PyTorch has no class.
CPU_TEXTS = "can't allocate memory", 'not enough memory', 'Cannot allocate memory'


class Peak(NamedTuple):
    """Bytes on one device; their sum is needed at the same time."""

    weights: int  # parameters and buffers, with those of the objective
    state: int  # moments of the optimizer, and the averages
    step: int  # activations, gradients and temporary tensors, at the largest
    gradients: int  # kept from earlier micro-batches, or in DistributedDataParallel's buckets

    @property
    def total(self) -> int:
        return sum(self)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the context and still exist: `live` now, and `peak` at the largest.

    Storages are counted once, however many tensors view them, and no longer when the last of these is gone."""

    def __init__(self, existing: Iterator[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._kept = [tensor.untyped_storage() for tensor in existing]  # views of them are not new
        self._known = {storage._cdata for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._note, found)
        return found

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        key, count = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += count
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, count)

    def _forget(self, key, count):
        self._known.discard(key)
        self.live -= count


class _Key:
    """Stands for the key of the draws of a network's layers (rows.RowDraws), whose values do not matter."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def tolist(self) -> list[int]:
        return [0, 0, 0, self.rows]


class _Zeros:
    """Stands for misc.Draws."""

    def __init__(self, step: int) -> None:
        self.seed, self.step, self.first_row = 0, step, 0

    def __call__(self, name: str, shape: list[int]) -> torch.Tensor:
        return torch.zeros(shape)


def blank_batch(net: torch.nn.Module, rows: int, device: torch.device | str = 'cpu') -> Batch:
    """A Batch without content for a network."""
    images = torch.zeros([rows, net.img_channels, *misc.height_width(net.img_resolution)], device=device)
    level = lambda value: torch.full([rows, 1, 1, 1], value, device=device)
    labels = lambda width: torch.zeros([rows, width], device=device) if width else None
    return Batch(images, level(0.0), level(1.0), torch.zeros_like(images), labels(net.label_dim), labels(net.augment_dim),
                 torch.arange(rows, device=device))


def count(config: Config, rows: int, checkpointing: bool, device: str = 'cpu') -> Peak:
    """The Peak of a rank that trains `rows` images in each forward pass. device: the type of the device, on which the masks of dropout
    depend.

    Raises UserError for networks whose program depends on the content of tensors."""
    run = config.run
    with torch.device('meta'):
        net = build_net(config.network, 'meta', precision='bf16' if run.precision == 'fp16' else run.precision)  # float16 needs a GPU
    net.model.checkpointing = checkpointing
    teacher = copy.deepcopy(net).eval().requires_grad_(False)
    _, objective = build_objective(config.objective, net, run.batch)
    every = math.prod(term.every for term in getattr(objective, 'terms', {}).values())
    if device == 'cpu':  # which draws and keeps masks of dropout in a way of its own
        for layer in (module for module in net.modules() if isinstance(module, RowLayer)):
            layer.rows = types.SimpleNamespace(key=_Key(rows))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in (net, teacher, objective):
            without_content(module)
        objective.set_teacher(teacher)
        batch = blank_batch(net, rows)
        existing = [*net.parameters(), *net.buffers(), *objective.parameters(), *objective.buffers()]
        trained = [p for group in objective.groups(net) for p in group['params']]
        with LiveBytes([tensor for tensor in existing if fake.is_our_fake(tensor)]) as live:
            try:
                sum(term.sum() for term in objective(net, batch, _Zeros(every * LATER)).values()).backward()
            except (RuntimeError, NotImplementedError, TypeError) as err:
                raise UserError('--batch-gpu=auto and --checkpoint=auto: the memory of this network cannot be counted '
                                f'({str(err).splitlines()[0][:150]}); give --batch-gpu=INT and --checkpoint') from None
    size = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    gradients, averages = size(trained), 1 + len(config.optimizer.power_ema)
    held = rows < run.batch // distributed.size() or distributed.size() > 1
    return Peak(size(existing), round(moments(config) * gradients) + averages * size([*net.parameters(), *net.buffers()]), live.peak,
                gradients if held else 0)


def without_content(module: torch.nn.Module) -> None:
    """Makes the tensors of a module that are on the meta device such of the CPU, in the FakeTensorMode that is active."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and value.is_meta:
                part._parameters[name] = torch.nn.Parameter(torch.empty_like(value, device='cpu'), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and value.is_meta:
                part._buffers[name] = torch.empty_like(value, device='cpu')


def moments(config: Config) -> float:
    """How many numbers the optimizer keeps for each parameter."""
    kept, param = example(config.optimizer)
    return sum(value.numel() for value in kept.values() if torch.is_tensor(value) and value.ndim) / param.numel()


def available(device: torch.device) -> int:
    """Bytes that this rank may take: of the free memory of its GPU, or its share of the node's."""
    if device.type == 'cuda':
        return round(SHARE['cuda'] * torch.cuda.mem_get_info(device)[0])
    return round(SHARE['cpu'] * psutil.virtual_memory().available / distributed.local_size())


def largest(wanted: int, limit: int, counted: Callable[[int], int]) -> int | None:
    """The largest divisor of `wanted` images that fits in `limit` bytes; None where a single one does not. counted(rows): bytes.

    Bytes are a convex function of the rows (the maximum of several moments, each linear), so that a line between two counts is not
    below it."""
    if (whole := counted(wanted)) <= limit:
        return wanted
    one = counted(1)
    if wanted == 1 or one > limit:
        return None if one > limit else 1
    between = 1 + int((limit - one) * (wanted - 1) / (whole - one))
    return max(rows for rows in range(1, between + 1) if wanted % rows == 0)


def resolve(config: Config, auto_batch: bool, auto_checkpoint: bool, device: torch.device) -> Config:
    """The Config with a batch_gpu and checkpointing that fit, the same on all ranks; prints them with the peak that is predicted.

    config: holds what was given for the one of them that is not `auto`. Raises UserError where nothing fits."""
    limit = min(distributed.all_values(available(device), what='counting memory'))
    run, found = distributed.from_rank0(_choose, config, auto_batch, auto_checkpoint, limit, device.type)
    config = dataclasses.replace(config, run=run)
    if device.type == 'cuda' and not run.shard:  # a trial has the whole network on one device
        config = verified(config, auto_batch, lambda tried: trial(tried, device))
    cut = '' if config.run.batch_gpu == run.batch_gpu else f', after {run.batch_gpu} did not fit in a trial'
    how = ', blocks computed again in the backward pass' if run.checkpointing else ''
    distributed.print0(f'Memory: {config.run.batch_gpu} images per forward pass and rank{cut}{how}; predicted peak '
                       f'{found.total / GIB:.2f} GiB ({found.weights / GIB:.2f} weights, {found.state / GIB:.2f} optimizer and averages, '
                       f'{(found.step + found.gradients) / GIB:.2f} step) of {limit / GIB:.2f} GiB')
    return config


def _choose(config, auto_batch, auto_checkpoint, limit, kind):
    """(RunConfig, Peak) on one rank."""
    run, known = config.run, {}

    def counted(rows, checkpointing):
        if (rows, checkpointing) not in known:
            peak = count(config, rows, checkpointing, kind)
            # The step's whole gradients stand for the blocks that --shard gathers.
            part = distributed.size() if run.shard else 1
            known[rows, checkpointing] = peak._replace(weights=peak.weights // part, state=peak.state // part)
        return known[rows, checkpointing]

    for checkpointing in (False, True) if auto_checkpoint else (run.checkpointing,):
        total = lambda rows, blocks=checkpointing: counted(rows, blocks).total
        rows = largest(run.batch_gpu, limit, total) if auto_batch else run.batch_gpu if total(run.batch_gpu) <= limit else None
        if rows and rows >= min(ENOUGH, run.batch_gpu):
            break
    if rows is None and not auto_batch:
        raise UserError(f'--checkpoint=auto: --batch-gpu={run.batch_gpu} takes {counted(run.batch_gpu, True).total / GIB:.1f} GiB even if '
                        f'blocks are computed again, and {limit / GIB:.1f} GiB may be used; use --batch-gpu=auto or a smaller one')
    if rows is None:
        raise UserError(f'--batch-gpu=auto: one image takes {counted(1, checkpointing).total / GIB:.1f} GiB, and {limit / GIB:.1f} GiB '
                        f'may be used{"" if checkpointing else "; add --checkpoint=blocks"}')
    return dataclasses.replace(run, batch_gpu=rows, checkpointing=checkpointing), counted(rows, checkpointing)


def verified(config: Config, may_shrink: bool, fits: Callable[[Config], bool]) -> Config:
    """The Config, with half the micro-batch (or the next divisor below) until fits(config) holds on all ranks."""
    while not all(distributed.all_values(fits(config), what='a trial step')):
        rows = config.run.batch_gpu
        smaller = [n for n in range(1, rows // 2 + 1) if rows % n == 0]
        if not may_shrink or not smaller:
            raise UserError(out_of_memory(config))
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, batch_gpu=smaller[-1]))
    return config


def trial(config: Config, device: torch.device) -> bool:
    """Whether a step of training with blank images fits in the memory of a device; everything is freed again."""
    try:
        _step(config, device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if device.type == 'cuda':
            torch.cuda.empty_cache()


def _step(config, device):
    """Two micro-batches and an update, as a run does them."""
    run = config.run
    net = build_net(config.network, device, seed=run.seed, precision=run.precision)
    net.model.checkpointing = run.checkpointing
    _, objective = build_objective(config.objective, net, run.batch)
    objective.to(device)
    groups = objective.groups(net)
    optimizer, averages = build_optimizer(config.optimizer, groups), build_averages(config.optimizer, net)
    objective.set_teacher(averages['halflife'].module)
    for _ in range(2):
        terms = objective(net, blank_batch(net, run.batch_gpu, device), misc.Draws(run.seed, 0, device=device))
        sum(term.sum() for term in terms.values()).backward()
        if run.batch_gpu == run.batch // distributed.size():
            break
    optimizer.step()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def out_of_memory(config: Config) -> str:
    """What to do when the memory does not suffice, in one line."""
    run = config.run
    blocks = '' if run.checkpointing else ', or --checkpoint=blocks'
    fewer = f'a --batch-gpu below {run.batch_gpu} ("auto" finds one)' if run.batch_gpu > 1 else 'a smaller network'
    return (f'out of memory with --batch-gpu={run.batch_gpu} and --checkpoint={"blocks" if run.checkpointing else "none"}; use {fewer}'
            f'{blocks}')


@contextlib.contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turns errors about a lack of memory into a UserError of one line."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as err:
        raise UserError(out_of_memory(config)) from err
    except RuntimeError as err:
        if not any(text in str(err) for text in CPU_TEXTS):
            raise
        raise UserError(out_of_memory(config)) from err
