# SPDX-License-Identifier: Apache-2.0
"""Splits nested values into bytes that describe their structure, and the tensors in them."""

import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch


def pack(value: Any) -> tuple[bytes, list[torch.Tensor]]:
    """(bytes, tensors) of dicts, lists, tuples and picklable values; the tensors are in the order in which unpack() creates them."""
    tensors, places = [], {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, torch.Tensor):
                return None
            if id(obj) not in places:  # a tensor that occurs twice stays one tensor
                places[id(obj)] = len(tensors)
                tensors.append(obj.detach())
            return places[id(obj)], obj.dtype, list(obj.shape)

    file = io.BytesIO()
    Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue(), tensors


def unpack(data: bytes) -> tuple[Any, list[torch.Tensor]]:
    """(value, tensors): the value given to pack(), with new CPU tensors still to be filled; unpickles, so the sender must be trusted."""
    tensors = []

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid):
            place, dtype, shape = pid
            if place == len(tensors):
                tensors.append(torch.empty(shape, dtype=dtype))
            return tensors[place]

    return Unpickler(io.BytesIO(data)).load(), tensors


def pieces(tensor: torch.Tensor, nbytes: int) -> Iterator[torch.Tensor]:
    """The bytes of a contiguous CPU tensor as views of at most nbytes, uint8 [n]."""
    flat = tensor.reshape(-1)  # 0-dim tensors cannot be viewed as another type
    return flat.view(torch.uint8).split(nbytes) if flat.numel() else ()
