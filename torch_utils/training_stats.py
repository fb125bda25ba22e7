# SPDX-License-Identifier: Apache-2.0
"""Means and standard deviations of reported values, accumulated on the device and over the ranks without a synchronisation per step."""

from collections.abc import Sequence

import torch

from torch_utils import distributed


def moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What Collector.add_groups() needs of values [N]: (is finite, x, x^2) of each, float64 [N,3], and how many there are, the sum and the
    sum of squares of the flags of those that are not finite, float64 [3]. Non-finite values count as 0 in the first."""
    x = values.detach().flatten().double()
    finite = torch.isfinite(x)
    x = torch.where(finite, x, 0.0)
    return torch.stack([finite.double(), x, x * x], dim=1), _sums((~finite).double(), torch.ones_like(finite))


def _sums(x, chosen):
    return torch.stack([chosen.double(), x * chosen, x * x * chosen]).sum(dim=1)


class Collector:
    """Accumulates named values until flush(). Every rank must report the same names."""

    def __init__(self, device: torch.device | str = 'cpu'):
        self.device = torch.device(device)
        self._sums = {}  # name -> float64 [3]: how many, sum, sum of squares
        self._tables = {}  # name -> (labels, float64 [len(labels), 3])

    def report(self, name: str, values: torch.Tensor | float, mask: torch.Tensor | None = None) -> None:
        """Adds values (a tensor of any shape, or a number) under a name; with a mask of the same shape, only those it selects.

        Non-finite values are left out of the mean and counted under "<name>/nonfinite"."""
        x = torch.as_tensor(values, device=self.device).detach().flatten().double()
        chosen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.detach().flatten().to(self.device)
        finite = torch.isfinite(x)
        self._add(name, torch.where(finite, x, 0.0), chosen & finite)
        self._add(f'{name}/nonfinite', (~finite).double(), chosen)

    def report_groups(self, name: str, values: torch.Tensor, group: torch.Tensor, labels: Sequence[str]) -> None:
        """Adds values under `name` and under "name/label", label = labels[group]; the label "a/b" counts under "a" too.

        values: [N]; group: int64 [N], below len(labels). One pass over the values, whatever the number of groups."""
        self.add_groups(name, moments(torch.as_tensor(values, device=self.device)), group, labels)

    def add_groups(self, name: str, found: tuple[torch.Tensor, torch.Tensor], group: torch.Tensor, labels: Sequence[str]) -> None:
        """As report_groups(), for values of which moments() are `found`."""
        if name not in self._tables:
            self._tables[name] = labels, torch.zeros([len(labels), 3], dtype=torch.float64, device=self.device)
        self._tables[name][1].index_add_(0, group, found[0])
        self._accumulate(f'{name}/nonfinite', found[1])

    def _unfold(self):
        """Adds each group of the tables to all names that it counts under."""
        for name, (labels, table) in self._tables.items():
            for label, moments in zip(labels, table):
                parts = label.split('/')
                for depth in range(len(parts) + 1):
                    self._accumulate('/'.join([name, *parts[:depth]]), moments)
        self._tables.clear()

    def _accumulate(self, name, moments):
        self._sums[name] = self._sums[name] + moments if name in self._sums else moments

    def _add(self, name, x, chosen):
        self._accumulate(name, _sums(x, chosen))

    def state(self) -> dict:
        """The sums of this rank since the last flush, copied to host memory."""
        sums = {name: moments.cpu().clone() for name, moments in self._sums.items()}
        return dict(sums=sums, tables={name: [list(labels), table.cpu().clone()] for name, (labels, table) in self._tables.items()})

    def restore(self, states: list[dict]) -> None:
        """Restores the state() of every rank, a list; if the number of ranks has changed, rank 0 takes the sums of all of them."""
        if len(states) == distributed.size():
            states = states[distributed.rank():][:1]
        elif distributed.rank() != 0:
            states = []
        for state in states:
            for name, moments in state['sums'].items():
                self._accumulate(name, moments.to(self.device))
            for name, (labels, table) in state['tables'].items():
                held = self._tables[name][1] if name in self._tables else 0
                self._tables[name] = labels, table.to(self.device) + held

    def flush(self) -> dict[str, dict]:
        """{name: {num, mean, std}} over all ranks since the last flush; names without values have num 0 and mean None.

        Counters of non-finite values appear only where they are not zero."""
        self._unfold()
        names = sorted(self._sums)
        if not names:
            return {}
        table = distributed.all_sum(torch.stack([self._sums[name] for name in names])).cpu().tolist()
        self._sums.clear()
        found = {}
        for name, (num, total, squares) in zip(names, table):
            if name.endswith('/nonfinite'):
                if total:
                    found[name] = dict(num=int(num), mean=total / num, std=0.0)
                continue
            mean = total / num if num else None
            spread = max(squares / num - mean * mean, 0.0) ** 0.5 if num else None
            found[name] = dict(num=int(num), mean=mean, std=spread)
        return found
