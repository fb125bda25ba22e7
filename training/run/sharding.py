# SPDX-License-Identifier: Apache-2.0
"""Training beyond the memory of one GPU (train.py --shard): parameters, gradients, moments and averages are divided among the ranks.

Each block of the network is gathered when it is used and given back after it, forward and backward (fully sharded data parallelism,
Zhao et al. 2023, in the form of PyTorch's FSDP2). With P parameters in float32 a rank holds 4 P / ranks bytes each of weights, gradients,
two moments and every average, and beside them one or two whole blocks and its activations; DistributedDataParallel holds all of P.

What each place holds besides:
- Start: every rank builds the initial network in host memory (4 P bytes), so that equal seeds give equal weights, and moves it to its
  device block by block, keeping its shard; nothing whole is ever on the device.
- Validation, metrics, snapshots: for as long as they take, the average is gathered to the device (4 P bytes), on all ranks for the first
  two and on rank 0 for the last. Snapshots of further averages are gathered to rank 0's host memory.
- States: gathered tensor by tensor to rank 0's host memory (12 P bytes, and 4 P for each average), and written from there by the same
  code, in the same format, as without --shard. So a state can be continued on any number of ranks, with or without --shard, is read by
  everything that reads states, appears whole or not at all, and needs no disk that other ranks can write to. A folder of shards by
  torch.distributed.checkpoint would spare rank 0 that memory; but its metadata are a pickle, which this program never reads, its form for
  safetensors holds no plain values, and both need all ranks to agree on when a folder is complete."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from dnnlib import UserError, one_line
from torch_utils import distributed, misc
from training.networks.interface import COMPILE_OPTIONS
from training.run.states import on_host
from training.run.unsharded import Unsharded

PART_BYTES = 256 << 20  # of tensors that are sent together; larger ones are sent alone
GRAPHS = 16  # upper limit of compiled graphs for a block: of its shapes of batches, with and without gradients


class Sharding(Unsharded):
    """Divides a network among the ranks, in place; afterwards it is called and trained as before, by all ranks equally often.

    net: a preconditioned network in host memory. The optimizer gets stand-ins: plain parameters that share the memory of this rank's
    shards. So its updates, clipping and averages are those of plain tensors; this is exact for optimizers that update each number by
    itself. Parameters without dimensions, and those of the objective, are whole on each rank, and their gradients are averaged here."""

    divides = True

    def __init__(self, net: torch.nn.Module, device: torch.device) -> None:
        super().__init__()
        self.device, self.mesh = device, init_device_mesh(device.type, (distributed.size(),))
        # No network changes another's output in place, which is what PyTorch warns of.
        warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view tensor')
        self.skeleton = skeleton(net)
        self.blocks = blocks_of(self.skeleton)
        self.pairs, self.whole_params = [], []  # (stand-in, parameter), and parameters that are whole on each rank
        self._divide(net)

    def _divide(self, net):
        whole = {p for p in net.parameters() if not p.ndim}  # FSDP2 takes none without dimensions
        for param in net.parameters():
            param.data = param.data.contiguous()  # FSDP2 takes no other layout
        for name in sorted(self.blocks, key=lambda name: -name.count('.')) + ['']:
            # The outermost module is resharded too: between steps nothing may hold weights from before an update.
            fully_shard(net.model.get_submodule(name), mesh=self.mesh, reshard_after_forward=True, ignored_params=whole)
        if not next(net.parameters()).is_meta:
            self._move_rest(net, whole)

    def _move_rest(self, net, whole):
        """Moves to the device what FSDP2 leaves where it is."""
        for param in whole:
            param.data = param.data.to(self.device)
        for module in net.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)

    def compile(self, net: torch.nn.Module) -> None:
        """Compiles in place the computation of each block, which begins when the block is gathered."""
        limits = torch._dynamo.config  # of the graphs of one function, here those of all blocks and shapes; beyond it nothing is compiled
        for name in ('recompile_limit', 'accumulated_recompile_limit'):
            setattr(limits, name, max(getattr(limits, name), GRAPHS * len(self.blocks)))
        for name in self.blocks:
            block = net.model.get_submodule(name)
            block.forward = torch.compile(block.forward, dynamic=False, options=COMPILE_OPTIONS)

    # ---- the step

    def groups(self, groups: list[dict]) -> list[dict]:
        """The optimizer's parameter groups, with stand-ins for this rank's shards; prints what a rank holds."""
        super().groups(groups)
        found = []
        for group in groups:
            own = []
            for param in group['params']:
                if isinstance(param, DTensor):
                    own.append(torch.nn.Parameter(param.detach().to_local()))
                    self.pairs.append((own[-1], param))
                else:
                    own.append(param)
                    self.whole_params.append(param)
            found.append({**group, 'params': own})
        own = sum(stand_in.numel() for stand_in, _ in self.pairs) + sum(p.numel() for p in self.whole_params)
        distributed.print0(f'--shard: {sum(p.numel() for p in self.params) / 1e6:.2f} M parameters in {len(self.blocks)} blocks and a rest '
                           f'are divided among {distributed.size()} ranks, {own / 1e6:.2f} M on rank 0')
        return found

    @torch.no_grad()
    def gradients(self, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Gradients of the optimizer's parameters: hands those of the shards to the stand-ins, and averages those of whole parameters over
        the ranks."""
        for stand_in, param in self.pairs:
            stand_in.data = param.to_local()  # FSDP2 may have given it other memory
            stand_in.grad = None if param.grad is None else param.grad.to_local()
            param.grad = None
        grads = [param.grad for param in self.whole_params if param.grad is not None]
        if grads:
            mean = distributed.all_sum(torch.cat([grad.flatten() for grad in grads])) / distributed.size()
            for grad, values in zip(grads, mean.split([grad.numel() for grad in grads])):
                grad.copy_(values.reshape(grad.shape))
        return super().gradients(params)

    @torch.no_grad()
    def norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """As Unsharded.norm, of the gradients that the parameters have now."""
        shards = [stand_in.grad for stand_in, _ in self.pairs if stand_in.grad is not None]
        total = distributed.all_sum(self._square(shards))
        return (total + self._square([param.grad for param in self.whole_params if param.grad is not None])).sqrt()

    def _square(self, grads):
        if not grads:
            return torch.zeros([], device=self.device)
        return torch.stack(torch._foreach_norm(grads)).square().sum()

    # ---- averages

    def copy(self, net: torch.nn.Module) -> torch.nn.Module:
        """A copy of the divided network, divided in the same way; for averages. No rank holds more than its shard."""
        found = copy.deepcopy(self.skeleton)
        self._divide(found)
        found.to_empty(device=self.device)
        with torch.no_grad():
            for own, value in zip(tensors(found), tensors(net), strict=True):
                misc.local(own).copy_(misc.local(value))
        return found

    def whole(self, average: Any) -> Any:
        """As Unsharded.whole: a copy on the device."""
        return self.gathered(average, self.device)

    @torch.no_grad()
    def gathered(self, average: Any, device: torch.device | None) -> Any:
        """A copy of an Average whose network is whole, and can be used by one rank alone, on `device`; None where device is None. Every
        rank calls this."""
        module = average.module
        found = None
        if device is not None:
            found = copy.deepcopy(self.skeleton).to_empty(device=device).train(module.training).requires_grad_(False)
            found.data_statistics = getattr(module, 'data_statistics', None)
        for own, value in zip(tensors(found) if found is not None else [None] * len(tensors(module)), tensors(module), strict=True):
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if own is not None:
                own.copy_(value)
        if found is None:
            return None
        result = copy.copy(average)
        result.module = found
        return result

    def for_snapshot(self, averages: dict) -> dict:
        """{name: Average} on rank 0, {} on the others: the first, which is sampled, on the device, and the others in host memory."""
        places = [self.device] + [torch.device('cpu')] * (len(averages) - 1)
        first = distributed.rank() == 0
        found = {name: self.gathered(average, place if first else None) for (name, average), place in zip(averages.items(), places)}
        return found if first else {}

    # ---- states

    def state(self, net: torch.nn.Module, averages: dict, optimizer: torch.optim.Optimizer) -> dict:
        """As Unsharded.state, gathered in rank 0's host memory."""
        found = super().state(net, averages, optimizer)
        moments = found['optimizer']['state']
        found['optimizer']['state'] = {index: {name: self._divided(value, self.params[index]) for name, value in entry.items()}
                                       for index, entry in moments.items()}
        return gather(found)

    def copied(self, state: dict) -> dict:
        """As Unsharded.copied; what state() gathered is a copy already."""
        return {**state, 'objective': on_host(state['objective'])}

    def _divided(self, value, param):
        """A moment as a divided tensor, which gather() makes whole."""
        if not (isinstance(param, DTensor) and torch.is_tensor(value) and value.ndim):
            return value
        return DTensor.from_local(value, self.mesh, [Shard(0)], run_check=False, shape=param.shape, stride=param.stride())

    def restore(self, found: dict, net: torch.nn.Module, averages: dict, optimizer: torch.optim.Optimizer, path: str) -> None:
        """As Unsharded.restore; a rank receives tensor by tensor, and keeps its shards."""
        self._load(net, found.pop('net', None))
        ema = found.pop('ema', None)
        for name, average in averages.items():
            self._load(average.module, ema and ema[name])
        moments = found.pop('optimizer', {}).get('state')
        large = lambda value: torch.is_tensor(value) and value.ndim > 0
        plan = moments and {index: {name: None if large(value) else value for name, value in entry.items()}
                            for index, entry in moments.items()}
        plan = distributed.share(plan, what='reading the state') or {}
        likes = {(index, name): self.params[index] for index, entry in plan.items() for name, value in entry.items() if value is None}
        full = moments and {(index, name): moments[index][name] for index, name in likes}
        for (index, name), value in self._shards(likes, full):
            plan[index][name] = value.clone()
        optimizer.load_state_dict({'state': plan, 'param_groups': optimizer.state_dict()['param_groups']})

    @torch.no_grad()
    def _load(self, module, state):
        own = module.state_dict()
        for name, value in self._shards(own, state):
            misc.local(own[name]).copy_(value)

    def _shards(self, likes, state):
        """Yields (key, this rank's part) of rank 0's tensors {key: tensor}, for {key: tensor that shows the shape and whether it is
        divided}."""
        for keys in parts(likes):
            values = distributed.share(state and [state[key] for key in keys], what='reading the state')
            for key, value in zip(keys, values):
                yield key, self._own(value) if isinstance(likes[key], DTensor) else value

    def _own(self, value):
        """This rank's rows of a whole tensor: ranks have equal numbers of rows, rounded up, until there are none left."""
        rows = -(-len(value) // distributed.size())
        return value[distributed.rank() * rows:][:rows]


def skeleton(net: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network whose parameters have shapes and no memory (meta device); its buffers are copied."""
    empty = {id(p): torch.nn.Parameter(torch.empty_like(p, device='meta', memory_format=torch.contiguous_format), p.requires_grad)
             for p in net.parameters()}
    return copy.deepcopy(net, empty)


def blocks_of(net: torch.nn.Module) -> list[str]:
    """Names, within net.model, of the modules that Network.run() is given: found by an evaluation without memory. Raises UserError where
    the network cannot be evaluated like that."""
    sketch, found = copy.deepcopy(net).to('meta').eval(), {}
    names = {module: name for name, module in sketch.model.named_modules()}
    sketch.compute_dtype = torch.float32

    def run(block, *inputs):
        if names.get(block):
            found[names[block]] = True
        return block(*inputs)

    sketch.model.run = run
    try:
        with torch.no_grad():
            sketch(torch.zeros([1, net.img_channels, *misc.height_width(net.img_resolution)], device='meta'), 1.0)
    except RuntimeError as err:  # such as reading a value
        raise UserError(f'--shard=1: {type(net.model).__name__} cannot be evaluated on the device "meta", which finds its blocks '
                        f'({one_line(err)}); leave --shard out, or make its forward() independent of values') from None
    return list(found)


def tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, then all buffers, also those that states do not hold."""
    return [*module.parameters(), *module.buffers()]


def parts(likes: dict) -> Iterator[list]:
    """Lists of the keys of {key: tensor}, in order, with at most PART_BYTES of float32 or one tensor each."""
    keys, size = [], 0
    for key, like in likes.items():
        nbytes = 4 * like.numel()
        if keys and size + nbytes > PART_BYTES:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += nbytes
    if keys:
        yield keys


def gather(value: Any) -> Any:
    """A nested structure with copies of its tensors, whole, in rank 0's host memory; None in place of tensors on the other ranks. Every
    rank calls this with the same structure."""
    if isinstance(value, torch.Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach().to('cpu', copy=not isinstance(value, DTensor)) if distributed.rank() == 0 else None
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    return type(value)(map(gather, value)) if isinstance(value, (list, tuple)) else value
