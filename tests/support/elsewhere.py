# SPDX-License-Identifier: Apache-2.0
"""A device other than the CPU, without one: computing on PyTorch's meta device shows whether the program waits for its device.

Inside Elsewhere() whatever would make the host wait for a GPU, or copies from ordinary (pageable) memory to it, raises Waits. Tensors on
the CPU work as always, and single numbers there may be mixed in."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default, aten.equal.default, aten.masked_select.default,
         aten._unique2.default, aten.unique_consecutive.default, aten.bincount.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
DEVICE = torch.device('meta')


class Waits(Exception):
    """The host would wait for the device."""


class Factories(TorchFunctionMode):
    """Sees tensors that are made of Python's numbers, which are filled on the host and copied."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and not isinstance((*args, kwargs.get('data'))[0], torch.Tensor)
        if made and kwargs.get('device') is not None and torch.device(kwargs['device']) == DEVICE:
            raise Waits(f'{func.__name__}: copies numbers to the device')
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """The context. copies_allowed: copies between host and device are only counted, in `copies`; what comes from the device is 0."""

    def __init__(self, copies_allowed=False):
        super().__init__()
        self.copies, self.copies_allowed, self.factories = 0, copies_allowed, Factories()

    def __enter__(self):
        self.factories.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.factories.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there, target = [tensor.is_meta for tensor in tensors], kwargs.get('device')
        if any(there) and func in READS:
            raise Waits(f'{func}: reads a value from the device')
        if func is aten.index.Tensor and any(index is not None and index.is_meta and index.dtype == torch.bool for index in args[1]):
            raise Waits(f'{func}: how many rows a mask has is known to the device only')
        if func in COPIES and self._crosses(func, there, target):
            self.copies += 1
            if not self.copies_allowed:
                raise Waits(f'{func}: copies between ordinary memory and the device')
            if there[0] and func is aten._to_copy.default:
                return torch.zeros(tensors[0].shape, dtype=kwargs.get('dtype') or tensors[0].dtype)
        return func(*args, **kwargs)

    def _crosses(self, func, there, target):
        if func is aten._to_copy.default:
            return target is not None and (torch.device(target) == DEVICE) != there[0]
        return there[0] != there[1]
