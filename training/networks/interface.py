# SPDX-License-Identifier: Apache-2.0
"""The interface of a network F to the rest of the program, and the registry of those that --arch selects.

A new network is a file in this folder (or elsewhere, if it is imported) with a class that derives from Network and a line
ARCHS['name'] = Arch(TheClass) at its end. Then --arch=name:key=value trains it, and config.json's model_type names the class."""

import contextlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dnnlib import UserError
from torch_utils.magnitude import at_least_float32

# Options of torch.compile for networks: results that depend on up to six tensors are computed where they are used, so that those of
# normalisation and SiLU do not reach memory in float32 (by default, up to four tensors and 30 operations).
COMPILE_OPTIONS = {'realize_reads_threshold': 6, 'realize_opcount_threshold': 100}


class Network(nn.Module):
    """F of a preconditioner: (x [N,C,H,W], noise_labels [N], class_labels, augment_labels) -> [N,out_channels,H,W] in x.dtype.

    Arithmetic: with float32_ends, x is float32 (float64); the first and the last layer, embeddings and statistics of norms are
    computed in it, and the layers between in inner_dtype(x). forward() then begins with enter(). Without, x comes in inner_dtype(), in
    which everything is computed.

    class_labels: [N or 1, label_dim], or None where label_dim is 0; an all-zero row means "no label". augment_labels:
    [N, augment_dim] or None, "not augmented". F does not depend on sigma, loss or sampler; parameters are float32, and cast where they
    are used.

    Constructor: the preconditioner gives img_resolution (int or [H, W]), in_channels, out_channels and label_dim; all other arguments
    have defaults and are keys of --arch and of config.json, of JSON types. It raises ValueError, in one line, for impossible values.
    Initial values come from torch's global random state, which misc.seeded sets; dropout and similar draws from rows.py. Parameters and
    buffers are the whole state: averages copy them, checkpoints store them by name. forward() calls its blocks by run(). Any module in it
    may have a method begin_step(), which is called without gradients at the beginning of each training step."""

    augment_dim = 0         # width of augment_labels; 0: it takes none
    label_embedding = None  # its conditioning.Conditioning, for --cep and --label-dropout; None: it has none
    short_names = {}        # constructor argument: key of --arch, where the published options use another name
    takes_times = False     # whether noise_labels are times from 0 to about 1000, to which the preconditioner then maps its c_noise
    takes_levels = False    # whether noise_labels are ln(sigma) / 4 under every preconditioner, in place of its c_noise
    checkpointing = False   # whether run() recomputes blocks in the backward pass (train.py --checkpointing); set from outside
    row_draws = None        # in a training run: see rows.attach_row_draws()
    compute_dtype = torch.float32  # of the layers between the ends; float16 on a GPU only. Precond.compute_dtype sets it
    float32_ends = False    # whether it takes float32 images whatever compute_dtype is; see above
    channels_last = False   # whether weights and images lie in memory as [N,H,W,C]; see set_channels_last()

    @classmethod
    def published(cls, state: dict[str, torch.Tensor]) -> dict | None:
        """config.json of published weights in this class's layout, found from names and shapes; None for others.

        state: a plain state dict of F, as its authors publish it. The result may hold everything that build_network() takes: "precond" and
        its options, "sampling" for the published sampler. Raises UserError for weights of this layout that this class cannot hold."""
        return None

    def inner_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The type of the layers between the ends, for images x: compute_dtype for float32 images, and that of images of any other."""
        if x.dtype != torch.float32:
            return x.dtype
        return torch.float32 if self.compute_dtype == torch.float16 and x.device.type != 'cuda' else self.compute_dtype

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
        """(images as the first layer takes them, inner_dtype)."""
        return x.to(at_least_float32(x.dtype)), self.inner_dtype(x)

    def set_channels_last(self, on: bool = True) -> None:
        """Lays weights of convolutions, and images within the network, out in memory as [N,H,W,C], which the fast convolutions of GPUs in
        half precision want; on=False: as [N,C,H,W] again.

        Values, shapes and names stay the same. It is for compiled networks: torch's own GroupNorm for GPUs copies such input to
        [N,C,H,W]. To be called before the optimizer is made, which takes the layout of its moments from the parameters."""
        self.channels_last = on
        layout = torch.channels_last if on else torch.contiguous_format
        for value in (*self.parameters(), *self.buffers()):
            if value.ndim == 4:
                value.data = value.data.contiguous(memory_format=layout)

    def inner_layers(self) -> Iterable[nn.Module]:
        """The layers with hold(dtype), as layers.Castable has, whose parameters are used in inner_dtype() alone; none by default."""
        return ()

    def hold_weights(self, dtype: torch.dtype | None) -> None:
        """Keeps a copy of the weights between the ends in this type, so that evaluation does not cast them in every call; None or float32:
        no copy.

        Results are the same bits. The state dict stays that of float32; training ignores the copies. For a network whose weights do not
        change any more, and after it was moved to its device."""
        for layer in self.inner_layers():
            layer.hold(None if dtype == torch.float32 else dtype)

    def run(self, block: Callable, *inputs: torch.Tensor) -> torch.Tensor:
        """block(*inputs); in training with `checkpointing` the block's activations are not kept, but computed again in the backward pass
        (Chen et al. 2016), with the same random draws."""
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        if torch.compiler.is_compiling():  # the compiler records the draws' key with the block's inputs
            return checkpoint(block, *inputs, use_reentrant=False)
        contexts = (contextlib.nullcontext(), self.row_draws.at(self.row_draws.key)) if self.row_draws is not None else None
        return checkpoint(block, *inputs, use_reentrant=False, **({'context_fn': lambda: contexts} if contexts else {}))


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives the moments of an optimizer the layout of their parameters in memory, which fused optimizers require.

    To be called after load_state_dict() where parameters lie channels-last: files hold all tensors row by row."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype, memory_format=torch.preserve_format).copy_(value)


class Arch:
    """A choice of --arch: a Network class, and the constructor arguments that differ from the defaults of the class.

    what: its sentence in --arch=help, by default the first of the class's docstring. Called with keys of --arch it returns the
    network's part of config.json, including model_type."""

    GIVEN = ('img_resolution', 'in_channels', 'out_channels', 'label_dim', 'augment_dim', 'label_dropout')  # by other options

    def __init__(self, network: type[Network], what: str | None = None, **preset: Any) -> None:
        self.network, self.what, self.preset = network, what, preset
        found = {p.name: p.default for p in inspect.signature(network).parameters.values()
                 if p.default is not p.empty and p.name not in self.GIVEN}
        self.arguments = {network.short_names.get(name, name): name for name in found}  # key -> constructor argument
        defaults = {key: preset.get(name, found[name]) for key, name in self.arguments.items()}
        self.__signature__ = inspect.Signature([inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default)
                                                for key, default in defaults.items()])

    def __call__(self, **keys) -> dict:
        """{"model_type": ..., constructor arguments}."""
        return {'model_type': self.network.__name__, **self.preset, **{self.arguments[key]: value for key, value in keys.items()}}


def network_class(model_type: str) -> type[Network]:
    """The class that config.json names. Raises UserError."""
    known = {arch.network.__name__: arch.network for arch in ARCHS.values()}
    if model_type not in known:
        raise UserError(f'network configuration: unknown model_type "{model_type}"; choose from {", ".join(sorted(known))}')
    return known[model_type]


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError, in one line, where value is not one of the choices."""
    if value not in choices:
        raise ValueError(f'{name}={value} is unknown; choose from {", ".join(choices)}')


ARCHS = {}  # each file of this package adds its own
