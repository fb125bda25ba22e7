# SPDX-License-Identifier: Apache-2.0
"""Training steps on tensors without values, of a device that is not the CPU, under a mode that refuses what waits for the device.

A process of its own, because the device that it makes is there for the whole process. Prints {case: None, or what waits} as JSON:
python -m tests.support.no_values FOLDER CASE CASE ..."""

import contextlib
import json
import sys
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import tiny
from torch_utils import misc, training_stats
from training.objective.loss import AmbientLoss
from training.run import gradients
from training.run.build import build_optimizer

DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
SMALL = ['--cbase=4', '--cres=1', '--blocks=1', '--attn=0']
CASES = {
    'small': [*SMALL, '--augment=0.5', '--dropout=0.2', '--gns=1', '--clip=1', '--batch-gpu=8'],
    'plain': ['--augment=0.5', '--dropout=0.2', '--clip=1', '--power-ema=0.1', '--ls=8'],
    'accumulation': ['--batch-gpu=4', '--gns=1', '--weight=learned'],
    'consistency': ['--consistency=bridge:batch_size=8,steps=1,samples=3,rampup=0.05,teacher=ema', '--noise=levels:sigmas=0.5|1|2|4'],
    'hybrid': ['--precond=iddpm', '--objective=hybrid', '--timesteps=second_moment:history=1', '--corruption-probability=0.3'],
    'labels': ['--cond=1', '--label-dropout=0.2', '--cep=gaussian', '--augment=0.1', '--precision=bf16'],
    'edm2': ['--arch=edm2:cbase=8,cres=1|1,blocks=1,attn=4,channels_per_head=8', '--weight=edm2', '--penalty=pseudo_huber',
             '--optimizer=adamw']}


# What a step does with the values of a term, each of which waits.
PLANTED = {
    'item': lambda x: x * x.sum().item(), 'bool': lambda x: x if x.sum() > 0 else -x, 'mask': lambda x: x[x > 0].sum() + x,
    'nonzero': lambda x: x + x.nonzero().shape[0], 'to the host': lambda x: x.cpu().to(x.device, non_blocking=True),
    'from the host': lambda x: x + torch.ones([], device='cpu').to(x.device), 'list': lambda x: x + len(x.tolist())}


class Waits(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises Waits where the host would wait for the device: where it needs a value of a tensor there, and for copies that block."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(tensor.device.type == GPU.type for tensor in tensors)
        if on_gpu and DEPENDS_ON_VALUES & set(func.tags) and not self._by_number(func, args):
            raise Waits(str(func))
        out = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            blocking = not (kwargs.get('non_blocking') or len(args) > 2 and args[2])
            if blocking and source.device.type != out.device.type:
                raise Waits(f'{func} from {source.device} to {out.device}')
        return out

    @staticmethod
    def _by_number(func, args):
        """Whether this is indexing by numbers: only masks give shapes that depend on values."""
        if func.overloadpacket not in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            return False
        return all(index is None or index.dtype in (torch.int32, torch.int64) for index in args[1])


def without_values(run, mode):
    """Puts a Run of the CPU on tensors of a GPU that have no values."""
    known = {}

    def fake(tensor):
        if id(tensor) not in known:
            other = FakeTensor(mode, tensor.detach().to('meta'), GPU)
            known[id(tensor)] = torch.nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else other
        return known[id(tensor)]

    for module in (run.train_step, *(average.module for average in run.averages.values())):
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                table.update({name: fake(tensor) for name, tensor in table.items() if tensor is not None})
    for piece in (run.noise, *(getattr(term, 'diffusion', None) for term in run.objective.terms.values())):
        tables = {} if piece is None else vars(piece)
        tables.update({name: mode.from_tensor(value) for name, value in tables.items() if torch.is_tensor(value)})
    hosts = [run.data.feed.next() for _ in range(3)]
    hosts = [host._replace(**{name: mode.from_tensor(value) for name, value in host._asdict().items() if torch.is_tensor(value)})
             for host in hosts]
    run.data.feed.next = lambda: hosts.pop(0)
    run.device = GPU
    groups = run.objective.groups(run.net)
    run.params = [p for group in groups for p in group['params']]
    run.optimizer = build_optimizer(run.config.optimizer, groups)
    run.stats = training_stats.Collector(GPU)
    with mode:
        run.guard = gradients.Guard(GPU)
        run.scale = gradients.LossScale(run.config.optimizer.loss_scale, True, GPU)


def three_steps(folder, flags):
    """Three steps, of which the last one must not wait; in the others tables are copied to the device, once for all steps."""
    run = tiny.make_run(folder, *flags)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    without_values(run, mode)
    # torch has no generator of this device: draws are operators, which have no values here either.
    with mode, mock.patch.object(misc, 'seeded', lambda *key, device: contextlib.nullcontext()), \
            mock.patch.object(torch.compiler, 'is_compiling', lambda: True):
        run.step()
        run.step()
        with NoWaiting():
            run.step()
    assert all(p.grad.device == GPU for p in run.params if p.grad is not None) and run.progress.step == 3


def planted(plant):
    """A context in which the values of the denoising term go through a function, from the third evaluation on."""
    forward, calls = AmbientLoss.forward, []

    def spoilt(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        calls.append(0)
        return found if len(calls) < 3 else {term: plant(values) for term, values in found.items()}

    return mock.patch.object(AmbientLoss, 'forward', spoilt)


def result(folder, flags):
    try:
        return three_steps(folder, flags)
    except Waits as err:
        return str(err)


if __name__ == '__main__':
    backend_registration._setup_privateuseone_for_python_backend('gpu')
    GPU = torch.device('gpu', 0)
    folder, *names = sys.argv[1:]
    found = {}
    for name in names:
        with planted(PLANTED[name]) if name in PLANTED else contextlib.nullcontext():
            found[name] = result(folder, CASES.get(name, SMALL))
    print(json.dumps(found))
