# SPDX-License-Identifier: Apache-2.0
"""Means and standard deviations of what a run reports, gathered on the device and over the ranks without a synchronisation per step."""

import torch

from torch_utils import distributed


class Collector:
    """Accumulates named values until flush(). Every rank must report the same names."""

    def __init__(self, device='cpu'):
        self.device = torch.device(device)
        self._sums = {}  # name -> float64 [3]: how many, sum, sum of squares

    def report(self, name, values, mask=None):
        """Adds values (a tensor of any shape, or a number) under a name; where a mask of the same shape is given, only those it marks.

        Non-finite values are left out of the mean and counted under "<name>/nonfinite"."""
        x = torch.as_tensor(values, device=self.device).detach().flatten().double()
        chosen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.detach().flatten().to(self.device)
        finite = torch.isfinite(x)
        self._add(name, torch.where(finite, x, 0.0), chosen & finite)
        self._add(f'{name}/nonfinite', (~finite).double(), chosen)

    def _add(self, name, x, chosen):
        moments = torch.stack([chosen.double(), x * chosen, x * x * chosen]).sum(dim=1)
        self._sums[name] = self._sums[name] + moments if name in self._sums else moments

    def flush(self):
        """{name: {num, mean, std}} over all ranks since the last flush; names that got no value have num 0 and mean None.

        Counters of non-finite values appear only where they are not zero."""
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
