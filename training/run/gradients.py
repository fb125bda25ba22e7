# SPDX-License-Identifier: Apache-2.0
"""Between backward() and the optimizer: loss scaling, non-finite values, clipping, gradient noise. Only methods that say so wait for the
device."""

import torch

from training.data.batches import Batch

MAX_SKIPPED = 50        # updates skipped in a row before a run is stopped
ASK_EVERY = 10          # steps between reads of a GPU's counter; on the CPU reading it costs nothing
GROW_AFTER = 2000       # good updates after which a dynamic loss scale doubles
SMALLEST = 2.0 ** -14   # lower limit of a dynamic loss scale: endless halving would leave a state that no longer learns
ROWS = 8                # how many images are named when a loss is not finite


class LossScale:
    """Factor of the loss, by which gradients are divided again. dynamic: halved at each overflow, doubled after GROW_AFTER good updates.

    fp16 needs it, because small gradients would underflow to 0; other precisions keep a fixed factor."""

    def __init__(self, initial: float, dynamic: bool, device: torch.device) -> None:
        self.dynamic = dynamic
        self.value = torch.full([], float(initial), device=device)
        self._good = torch.zeros([], device=device)

    def update(self, bad: torch.Tensor) -> None:
        """bad: 1.0 where the last gradients were not finite, else 0.0 (a 0-dim tensor)."""
        if self.dynamic:
            self._good = (self._good + 1) * (1 - bad)
            grow = self._good >= GROW_AFTER
            self.value = torch.where(bad > 0, (self.value / 2).clamp(min=SMALLEST), torch.where(grow, self.value * 2, self.value))
            self._good = torch.where(grow, torch.zeros_like(self._good), self._good)

    def state(self) -> list[float]:
        """[value, good updates since it changed], for the state file; waits for the device."""
        return [float(self.value), float(self._good)]

    def restore(self, state: list[float]) -> None:
        """Restores what state() returned; a fixed factor stays that of this run, whatever the precision was before."""
        if self.dynamic:
            self.value.fill_(state[0])
            self._good.fill_(state[1])


def bad_rows(values: torch.Tensor, batch: Batch, step: torch.Tensor) -> torch.Tensor:
    """A table of up to ROWS rows of a term's values [N], those that are not finite first: is not finite, sigma, raw_idx, step; float64.

    step: 0-dim, float64."""
    flag, row = (~torch.isfinite(values.detach())).double().topk(min(ROWS, len(values)))
    return torch.stack([flag, batch.sigma.flatten()[row].double(), batch.raw_idx[row].double(), step.expand_as(flag)], dim=1)


class Guard:
    """Counts updates that are skipped because of non-finite gradients, and records where the last non-finite loss came from.

    Attribute in_row: how many updates in a row were skipped last (a 0-dim tensor)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.in_row = torch.zeros([], device=device)
        self._seen = {}  # term -> bad_rows()

    def note(self, name: str, found: torch.Tensor) -> None:
        """Records bad_rows() of a term of a micro-batch, if there are any."""
        before = self._seen.get(name)
        usable = before is not None and before.shape == found.shape
        self._seen[name] = torch.where(found[0, 0] > 0, found, before if usable else torch.zeros_like(found))

    def note_update(self, norm: torch.Tensor) -> torch.Tensor:
        """1.0 if the gradient norm is not finite, so that the update must be skipped, else 0.0: a 0-dim tensor for found_inf."""
        bad = (~torch.isfinite(norm)).float()
        self.in_row = (self.in_row + bad) * bad
        return bad

    def must_stop(self, step: int) -> bool:
        """True when MAX_SKIPPED updates in a row were skipped, or could have been before the next check. The same on every rank.

        Waits for the device every ASK_EVERY steps."""
        every = ASK_EVERY if self.device.type == 'cuda' else 1
        return step % every == 0 and int(self.in_row) > max(MAX_SKIPPED - every, 0)

    def culprits(self) -> dict[str, str]:
        """{term: one line} about this rank's last non-finite losses: step, noise levels, images. Waits for the device."""
        lines = {}
        for name, table in self._seen.items():
            rows = [row for row in table.tolist() if row[0]]
            if rows:
                images = ', '.join(f'{int(raw_idx)} at sigma {sigma:.4g}' for _, sigma, raw_idx, _ in rows)
                lines[name] = f'step {int(rows[0][3])}, images {images}'
        return lines


def clip(grads: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients in place so that their norm is at most `limit`."""
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1))


class NoiseScale:
    """Gradient noise scale tr(Sigma) / |G|^2 (McCandlish et al. 2018, appendix A.1) from the gradients of a part and of the whole batch.

    small, large: number of images in a part and in the whole batch. Both estimates are unbiased, and are averaged before they are
    divided. parts: squared norms of the gradients of the parts, each a mean over its images."""

    def __init__(self, small: int, large: int) -> None:
        self.small, self.large = small, large
        self.parts, self._local = [], 0

    def note_part(self, gradients: list[torch.Tensor], factor: float = 1.0) -> None:
        """Adds |factor g|^2 of the gradients of one part."""
        norms = torch._foreach_norm(gradients)
        self.parts.append((torch.stack(norms) * factor).square().sum())

    def estimates(self, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(|G|^2, tr(Sigma)) of this step, from the parts' mean and the norm of the whole gradient; forgets the parts."""
        part, whole = torch.stack(self.parts).mean(), norm.square()
        self.parts.clear()
        signal = (self.large * whole - self.small * part) / (self.large - self.small)
        spread = (part - whole) / (1 / self.small - 1 / self.large)
        return signal, spread

    def hook(self, group: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DistributedDataParallel's communication hook: measures this rank's own gradients, then averages them as usual."""
        self._local = self._local + bucket.buffer().square().sum()
        if bucket.is_last():
            self.parts.append(self._local)
            self._local = 0
        world = torch.distributed.get_world_size()
        reduced = torch.distributed.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
        return reduced.then(lambda done: done.value()[0])
