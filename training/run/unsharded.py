# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a run are: whole on every rank, or divided among the ranks by --shard (sharding.py, which is imported only then,
because PyTorch's part of it takes seconds to import)."""

import copy
from typing import Any

import torch

from torch_utils import distributed
from training.checkpoints.load import load_weights
from training.run.config import RunConfig
from training.run.states import on_host


class Unsharded:
    """Every rank holds everything.

    Attribute params: the network's and the objective's trained parameters, in the order of the optimizer."""

    divides = False
    copy = staticmethod(copy.deepcopy)  # of a network, for averages

    def __init__(self) -> None:
        self.params = []

    def groups(self, groups: list[dict]) -> list[dict]:
        """The optimizer's parameter groups from Objective.groups(); called once."""
        self.params = [param for group in groups for param in group['params']]
        return groups

    def gradients(self, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        """Gradients of the optimizer's parameters after the backward passes of a step."""
        return [param.grad for param in params if param.grad is not None]

    def norm(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """Norm of the whole gradient, 0-dim, the same on all ranks. Does not wait for the device."""
        return torch.nn.utils.get_total_norm(grads)

    def whole(self, average: Any) -> Any:
        """An Average whose network this rank can use alone, for a while. Every rank calls this."""
        return average

    def for_snapshot(self, averages: dict) -> dict:
        """{name: Average} as whole(), at least on rank 0. Every rank calls this."""
        return averages

    def state(self, net: torch.nn.Module, averages: dict, optimizer: torch.optim.Optimizer) -> dict:
        """"net", "ema" and "optimizer" of a state, on rank 0; on the others {} or parts of them. Every rank calls this."""
        return dict(net=net.state_dict(), ema={name: average.state_dict() for name, average in averages.items()},
                    optimizer=optimizer.state_dict())

    def copied(self, state: dict) -> dict:
        """Run.state(), with copies of its tensors in host memory, which may be written while the training continues."""
        return on_host(state)

    def restore(self, found: dict, net: torch.nn.Module, averages: dict, optimizer: torch.optim.Optimizer, path: str) -> None:
        """Loads "net", "ema" and "optimizer" of a state that rank 0 has in `found` and has checked; takes them out of it. Every rank
        calls this. path: of the state, for errors."""
        part = lambda name: distributed.share(found.pop(name, None), what='reading the state')
        load_weights(net, part('net'), path)
        stored = part('ema')
        for name, average in averages.items():
            load_weights(average.module, stored[name], path)
        del stored
        optimizer.load_state_dict(on_host(part('optimizer')))  # a copy, because the optimizer keeps the tensors it is given


def wanted(run: RunConfig) -> bool:
    """Whether the run's weights are divided: with --shard on several ranks."""
    return run.shard and distributed.size() > 1


def channels_last(run: RunConfig, device: torch.device) -> bool:
    """Whether the network lies channels-last in memory: compiled on a GPU, and whole, because FSDP2 takes no other layout than torch's."""
    return run.compile and device.type == 'cuda' and not wanted(run)
