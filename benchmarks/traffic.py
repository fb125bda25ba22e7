# SPDX-License-Identifier: Apache-2.0
"""Bytes that one training step reads and writes per image outside convolutions and matrix products, counted from its compiled graph.

python benchmarks/traffic.py [--arch=ddpmpp --size=32] [--eager] [--defaults] [--json=FILE]

The graph is that of the compiler (dynamo, AOTAutograd with inductor's decompositions and its choice of what is kept for the backward
pass) for a loss on a network in bfloat16 with dropout, traced on tensors without content; nothing is compiled to machine code, and no
GPU is needed. From it follow kernels and their traffic, under these assumptions about the compiler:

1. Elementwise operations are computed where they are used. A result reaches memory if a convolution, a matrix product, the backward pass
   or the caller needs it, or if it is used more than once and depends on too many tensors or operations: inductor's rule, with the
   numbers that the networks are compiled with (training.networks.interface.COMPILE_OPTIONS; --defaults takes inductor's own).
2. A reduction is one pass over what it reads; what uses its result at full size is another kernel, which reads the tensor again, unless
   each reduced row is at most 4,096 neighbouring values (as in LayerNorm). What computes the input of a reduction over pixels or images
   is not part of its kernel, although inductor manages that at times.
3. Operations over equally many values that share a tensor, and of which none waits for the other, are one kernel, as are a result and
   its elementwise use; a kernel reads each tensor once, and caches hold nothing from one kernel to the next.
4. Concatenations copy, whatever makes or uses them. Gradients of biases of convolutions are sums in a kernel of their own.
5. Draws of dropout masks write one byte per value, unless they are elementwise operations of the graph.

--eager counts the same step without compiler, each operation with all that it reads and writes, and convolutions as well."""

import argparse
import dataclasses
import math
import operator
import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.files import write_json  # noqa: E402 (the folder above had to be found first)
from torch_utils import misc, registry  # noqa: E402
from training.networks.interface import ARCHS, COMPILE_OPTIONS  # noqa: E402
from training.networks.preconditioning import build_network  # noqa: E402
from training.networks.rows import attach_row_draws  # noqa: E402

IMAGES = 37  # a prime that divides no other size, so that tensors of images are known by their number of values
BUDGET_MB = 290  # per image, of DDPM++ at 32x32
ROW = 4096  # of assumption 2
INDUCTOR = {'realize_reads_threshold': 4, 'realize_opcount_threshold': 30}
aten, prims = torch.ops.aten, torch.ops.prims
VIEWS = {operator.getitem, aten.view, aten._unsafe_view, aten.permute, aten.expand, aten.unsqueeze, aten.squeeze, aten.slice, aten.alias,
         aten.select, aten.unbind, aten.split, aten.split_with_sizes, aten.transpose, aten.t, aten.as_strided, aten.detach,
         aten.reshape, aten.lift_fresh_copy}
PRODUCTS = {aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm,
            aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward}
REDUCTIONS = {aten.sum, aten.mean, aten.var_mean, aten.var, aten.amax, aten.amin, aten.linalg_vector_norm}
ALONE = {aten.cat, aten.index_put, aten._unsafe_index_put, aten.scatter_add, aten._index_put_impl_}
# What a kernel is for, from the lines of the program that its operations come from.
KINDS = {'norm': r'_written_out|group_norm|layer_norm|normalize\(|in _size|fused\.', 'SiLU': r'silu\(|AffineSiLU|sigmoid', 'GELU': r'gelu',
         'dropout': r'in keep|kept|F\.dropout', 'resampling': r'in repeat_pixels|in _shrink|in _enlarge',
         'concatenation': r'torch\.cat|mp_cat', 'attention': r'in _attend', 'cast': r'\.to\(dtype\)'}


class Captured(Exception):
    """Ends the compilation, when the graphs are known."""


def capture(function: Callable, *inputs: Any) -> dict[str, fx.GraphModule]:
    """The graphs of a call and its backward pass as the compiler sees them: "joint", "forward", "backward". Nothing is computed."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    found = {}

    def partition(joint, args, **options):
        found['joint'] = joint
        found['forward'], found['backward'] = min_cut_rematerialization_partition(joint, args, **options)
        return found['forward'], found['backward']

    def stop(graph, args):
        raise Captured

    backend = aot_autograd(fw_compiler=stop, bw_compiler=stop, partition_fn=partition, decompositions=select_decomp_table())
    torch._dynamo.reset()
    try:
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*inputs)
    except Exception:
        if 'forward' not in found:
            raise
    finally:
        torch._dynamo.reset()
    return found


def kind_of(node: fx.Node) -> Any:
    """The operator of a node, whatever its overload is."""
    return getattr(node.target, 'overloadpacket', node.target)


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The tensor that a node stands for, without content."""
    value = node.meta.get('val')
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, torch.Tensor) else None


def size_of(value: torch.Tensor) -> int:
    """Bytes."""
    return value.numel() * value.element_size()


@dataclasses.dataclass(eq=False)
class Kernel:
    """What is computed together. values: how many it runs over; reads: {node in memory: bytes}; outputs: nodes it computes; reduced: the
    dimensions and shape of its reductions, None of elementwise kernels; after: kernels that have to be finished before, in bits."""

    number: int
    values: int
    counted: bool = True
    mergeable: bool = True
    reduced: tuple | None = None
    is_row: bool = False
    reads: dict = dataclasses.field(default_factory=dict)
    outputs: list = dataclasses.field(default_factory=list)
    nodes: list = dataclasses.field(default_factory=list)
    after: int = 0
    written: int = 0


class Plan:
    """The kernels of a graph, under the module's assumptions. options: of assumption 1."""

    def __init__(self, graph: fx.Graph, options: dict = COMPILE_OPTIONS) -> None:
        self.most_reads, self.most_operations = options['realize_reads_threshold'], options['realize_opcount_threshold']
        self.operations = {}  # {node: how many are computed where it is used}
        self.nodes = [node for node in graph.nodes if node.op != 'output']
        self.result = {base for node in graph.nodes if node.op == 'output' for base in map(self._base, node.all_input_nodes)}
        self.users = defaultdict(set)  # behind views
        for node in graph.nodes:
            if not self._is_view(node):
                for used in node.all_input_nodes:
                    self.users[self._base(used)].add(node)
        self.kernels, self.made_by, self.needs = [], {}, {}
        for node in self.nodes:
            self._place(node)
        for kernel in self.kernels:
            kernel.written = sum(self._written(node, kernel) for node in kernel.outputs)

    def _is_view(self, node):
        return node.op == 'call_function' and kind_of(node) in VIEWS

    def _base(self, node):
        while self._is_view(node):
            node = node.args[0]
        return node

    def _place(self, node):
        """Decides whether a node is in memory, and which kernel computes it. needs: {node in memory: bytes} of what it is computed from."""
        if node.op != 'call_function':
            self.needs[node] = {node: size_of(value_of(node))} if value_of(node) is not None else {}
            return
        inputs = Counter()
        for used in node.all_input_nodes:
            for base, size in self.needs.get(used, {}).items():
                inputs[base] = max(inputs[base], size)
        value = value_of(node)
        if self._is_view(node):
            limit = size_of(value) if value is not None else math.inf
            self.needs[node] = {base: min(size, limit) for base, size in inputs.items()}
            self.operations[node] = self.operations.get(node.args[0], 1)
            return
        if value is None:
            self.needs[node] = {}
            return
        operator_, inputs = kind_of(node), dict(inputs)
        if operator_ in PRODUCTS or 'draw' in str(operator_):
            self._new(node, inputs, counted='draw' in str(operator_), mergeable=False)
            if operator_ is aten.convolution_backward and node.args[-1][2]:
                gradient = node.args[0]
                self._reduce(node, self.needs[gradient], value_of(gradient), (0, 2, 3), extra=True)
        elif operator_ in REDUCTIONS:
            source = value_of(node.all_input_nodes[0])
            dims = node.args[1] if len(node.args) > 1 and node.args[1] else range(source.ndim)
            self._reduce(node, inputs, source, tuple(dim % source.ndim for dim in ([dims] if isinstance(dims, int) else dims)))
        elif operator_ in ALONE:
            self._new(node, inputs, mergeable=False)
        elif str(operator_) == '_inductor_test.realize' or self._in_memory(node, inputs):
            self._merge(node, inputs, value.numel(), None, False)
        else:
            self.needs[node] = inputs
            self.operations[node] = 1 + sum(self.operations.get(used, 1) for used in node.all_input_nodes)

    def _in_memory(self, node, inputs):
        users = self.users[node]
        operations = 1 + sum(self.operations.get(used, 1) for used in node.all_input_nodes)
        return (node in self.result or any(kind_of(user) in PRODUCTS for user in users)
                or len(users) > 1 and (len(inputs) > self.most_reads or operations > self.most_operations))

    def _reduce(self, node, inputs, source, dims, extra=False):
        step = 1
        for dim in sorted(dims, key=source.stride):
            fits = source.shape[dim] == 1 or source.stride(dim) == step
            step = step * source.shape[dim] if fits else math.inf
        self._merge(node, inputs, source.numel(), (tuple(source.shape), tuple(sorted(dims))), step <= ROW, extra)

    def _merge(self, node, inputs, values, reduced, is_row, extra=False):
        """Puts a node into a kernel that it fits, or a new one."""
        before = {self.made_by[base] for base in inputs if base in self.made_by}
        for kernel in reversed(self.kernels):
            if not kernel.mergeable or kernel.values != values or reduced and kernel.reduced and reduced != kernel.reduced:
                continue
            uses = kernel in before
            if reduced and not kernel.reduced or kernel.reduced and not reduced and not (uses and kernel.is_row):
                continue
            if any(other.after >> kernel.number & 1 for other in before if other is not kernel):
                continue
            if not uses and not any(base in kernel.reads and value_of(base).numel() * 2 >= values for base in inputs):
                continue
            if uses and kernel.reduced and not kernel.is_row:
                continue
            self._add(kernel, node, inputs, before, extra)
            return
        self._new(node, inputs, values=values, reduced=reduced, is_row=is_row, extra=extra)

    def _new(self, node, inputs, values=None, extra=False, **properties):
        kernel = Kernel(len(self.kernels), value_of(node).numel() if values is None else values, **properties)
        self.kernels.append(kernel)
        self._add(kernel, node, inputs, {self.made_by[base] for base in inputs if base in self.made_by}, extra)

    def _add(self, kernel, node, inputs, before, extra):
        for other in before - {kernel}:
            kernel.after |= other.after | 1 << other.number
        for later in self.kernels:
            if later.after >> kernel.number & 1:
                later.after |= kernel.after
        for base, size in inputs.items():
            if self.made_by.get(base) is not kernel:
                kernel.reads[base] = max(size, kernel.reads.get(base, 0))
        kernel.nodes.append(node)
        if not extra:
            kernel.outputs.append(node)
            self.made_by[node] = kernel
            self.needs[node] = {node: size_of(value_of(node))}

    def _written(self, node, kernel):
        """Bytes that a kernel writes of a node: none, where nothing outside uses it."""
        inside = node not in self.result and not any(
            kind_of(user) in PRODUCTS or any(node in other.reads for other in self.kernels if other is not kernel)
            for user in self.users[node])
        return 0 if inside else size_of(value_of(node))


def purpose(kernel: Kernel, plan: Plan) -> str:
    """What a kernel is for, in the words of KINDS."""
    first = kind_of(kernel.nodes[0])
    if 'draw' in str(first):
        return 'draws of dropout'
    if first is aten.convolution_backward:
        return 'gradients of biases'
    seen, left, found = set(), list(kernel.nodes), set()
    while left:
        node = left.pop()
        if node in seen or value_of(node) is None or value_of(node).numel() * 2 < kernel.values:  # only what is done at full size
            continue
        seen.add(node)
        lines = [line for line in (node.meta.get('stack_trace') or '').splitlines() if line.strip()][-6:]
        found |= {kind for kind, pattern in KINDS.items() if re.search(pattern, '\n'.join(lines))}
        left += [used for used in node.all_input_nodes if used not in plan.made_by and used.op == 'call_function']
    words = [kind for kind in KINDS if kind in found]
    return ' + '.join(words) + (' (sums)' if kernel.reduced else '') if words else 'sums' if kernel.reduced else 'add'


def tally(graphs: dict[str, fx.GraphModule], options: dict = COMPILE_OPTIONS) -> dict:
    """{"read", "written", "kinds": {what a kernel is for: {"read", "written", "kernels"}}} in bytes per image, "per_step" in bytes, and
    "kernels" of images."""
    found = {'read': 0.0, 'written': 0.0, 'per_step': 0, 'kernels': 0, 'products': 0, 'kinds': {}}
    of_images = lambda value: value.numel() % IMAGES == 0
    for name in ('forward', 'backward'):
        plan = Plan(graphs[name].graph, options)
        for kernel in plan.kernels:
            if not kernel.counted:
                found['products'] += 1
                continue
            read = sum(size for base, size in kernel.reads.items() if of_images(value_of(base)))
            written = kernel.written if any(of_images(value_of(node)) for node in kernel.outputs) else 0
            found['per_step'] += sum(kernel.reads.values()) - read + kernel.written - written
            if read + written:
                kind = found['kinds'].setdefault(f'{name}: {purpose(kernel, plan)}', {'read': 0.0, 'written': 0.0, 'kernels': 0})
                for target in (found, kind):
                    target['read'] += read / IMAGES
                    target['written'] += written / IMAGES
                    target['kernels'] += 1
    found['total'] = found['read'] + found['written']
    return found


class Dispatched(TorchDispatchMode):
    """Counts what each operation of an eager program reads and writes, in bytes: {what it is for: bytes}."""

    NAMES = {'norm': 'norm', 'SiLU, GELU': 'silu|gelu', 'dropout': 'dropout|bernoulli|rand', 'convolutions': 'convolution',
             'matrix products': r'\.mm|\.addmm|\.bmm|attention', 'cast': '_to_copy', 'resampling': 'upsample|avg_pool',
             'concatenation': 'cat', 'add': 'add|mul|sub', 'copy': 'clone|copy'}

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.kernels = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = lambda tree: [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        given, made = tensors((args, kwargs)), tensors(out)
        works = made and not func.is_view and kind_of_function(func) not in VIEWS and 'empty' not in str(func)
        if works and any(value.numel() % IMAGES == 0 for value in given + made):
            kind = next((kind for kind, pattern in self.NAMES.items() if re.search(pattern, str(func))), 'rest')
            self.bytes[kind] += sum(size_of(value) for value in {id(value): value for value in given + made}.values()
                                    if value.numel() % IMAGES == 0)
            self.kernels += 1
        return out


def kind_of_function(function: Any) -> Any:
    """The operator of an overload."""
    return getattr(function, 'overloadpacket', function)


def make_step(config: dict, channels_last: bool) -> tuple[Callable, tuple]:
    """(loss, its inputs) of a network in training in bfloat16: EDM's weighted squared error, summed."""
    with misc.seeded('network'):
        net = build_network(config).train()
    net.compute_dtype = torch.bfloat16
    if channels_last:
        net.model.set_channels_last()
    attach_row_draws(net)
    height, width = misc.height_width(config['img_resolution'])

    def loss(images, noise, sigma, labels, augment):
        sigma = sigma.reshape(-1, 1, 1, 1)
        weight = (sigma ** 2 + net.sigma_data ** 2) / (sigma * net.sigma_data) ** 2
        denoised = net(images + sigma * noise, sigma, labels, augment)
        return (weight * (denoised - images) ** 2).sum()

    images = torch.zeros(IMAGES, config['img_channels'], height, width)
    optional = [torch.zeros(IMAGES, width) if width else None for width in (net.label_dim, net.augment_dim)]
    return loss, (images, images.clone(), torch.ones(IMAGES), *optional)


def network_config(arch: str, size: int) -> dict:
    """A network of --arch for photographs, with its published arguments where the size has any."""
    config = {'img_resolution': size, 'img_channels': 3, **registry.build(arch, ARCHS)()}
    if arch == 'adm':
        return config | {'label_dim': 1000}
    config |= {'channel_mult': [1, 2, 2, 2], 'dropout': 0.05} if arch in ('ddpmpp', 'ncsnpp') and size == 64 else {}
    return config | ({'augment_dim': 9} if arch in ('ddpmpp', 'ncsnpp') else {})


def compiled_traffic(config: dict, channels_last: bool = True, options: dict = COMPILE_OPTIONS) -> dict:
    """tally() of a network's training step."""
    loss, inputs = make_step(config, channels_last)
    return tally(capture(loss, *inputs), options)


def eager_traffic(config: dict) -> dict:
    """{"kinds": {what for: bytes per image}, "total" without convolutions and matrix products, "kernels"} of the step without compiler."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        loss, inputs = make_step(config, channels_last=False)
        for module in loss.__closure__[0].cell_contents.modules():
            module.rows = None  # draws without a key, which need no content
        with Dispatched() as counted:
            loss(*inputs).backward()
    kinds = {kind: size / IMAGES for kind, size in counted.bytes.most_common()}
    outside = sum(size for kind, size in kinds.items() if kind not in ('convolutions', 'matrix products'))
    return {'kinds': kinds, 'total': outside, 'kernels': counted.kernels}


def show(found: dict) -> None:
    """Prints a table in MB per image."""
    print(f'{found["total"] / 1e6:.1f} MB per image outside convolutions and matrix products, {found["kernels"]} kernels')
    size = lambda value: sum(value[key] for key in ('read', 'written')) if isinstance(value, dict) else value
    for kind, value in sorted(found['kinds'].items(), key=lambda pair: -size(pair[1])):
        if size(value) > 5e4:
            print(f'{size(value) / 1e6:9.1f}  {kind}')
    if 'per_step' in found:
        print(f'{found["per_step"] / 1e6:.0f} MB per step that do not depend on the number of images (casts of weights and the like)')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--arch', default='ddpmpp', help='network, as train.py --arch takes it')
    parser.add_argument('--size', type=int, default=32, help='height and width of the images')
    parser.add_argument('--eager', action='store_true', help='count the operations of the program without compiler')
    parser.add_argument('--defaults', action='store_true', help="inductor's own options in place of those of the networks")
    parser.add_argument('--json', help='write the result into this file')
    args = parser.parse_args()
    config = network_config(args.arch, args.size)
    found = eager_traffic(config) if args.eager else compiled_traffic(config, options=INDUCTOR if args.defaults else COMPILE_OPTIONS)
    show(found)
    if args.json:
        write_json(args.json, {'network': config, 'torch': torch.__version__, 'python': platform.python_version(), **found})


if __name__ == '__main__':
    main()
