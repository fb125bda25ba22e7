# SPDX-License-Identifier: Apache-2.0
"""One round's data: the noisy images of a run, restored by a network from sigma_n down to s_k, as a float set whose images carry s_k.

Parts of PART images are written as they are finished, and an interrupted round goes on behind the last complete one; the set itself
appears when it is complete. The draws of an image depend on the seed, the round and its index alone."""

import json
import os
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.files import replacing
from dnnlib.fingerprint import digest
from dnnlib.progress import Progress
from torch_utils import distributed, misc
from training.data import tables
from training.data.dataset import UNITS_8BIT, ImageDataset
from training.data.packed import EMPTY, new_packed
from training.refinement.noisy import NoisySet
from training.sampling.generate import network_device
from training.sampling.pixels import to_physical
from training.sampling.restore import restore

PART = 512  # images of a file of intermediate results


class RowDraws:
    """Standard normal noise whose row i comes from a generator of its own, keyed by (key, numbers[i])."""

    def __init__(self, key: Sequence, numbers: Sequence[int], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.generators = [misc.generator(*key, int(number), device=self.device) for number in numbers]

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Noise of x's shape and dtype."""
        return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype, device=self.device) for g in self.generators])


@torch.no_grad()
def restored(net: Callable, y: torch.Tensor, sigma_n: torch.Tensor, end: torch.Tensor, raw_idx: Sequence[int], *, stepper: Callable,
             num_steps: int, key: Sequence, labels: torch.Tensor | None = None, rows: int | None = None) -> torch.Tensor:
    """Images y [N,C,H,W] of level sigma_n [N], restored to level end [N], float64; those with sigma_n <= end stay as they are.

    stepper: a piece of STEPPERS with its keys bound. key: of the draws, together with raw_idx. labels, rows: as of restore()."""
    x, take = y.double().clone(), torch.nonzero(sigma_n > end).squeeze(1)
    for mine in (take[end[take] == 0], take[end[take] > 0]):  # restore() ends all its rows at 0, or none
        if len(mine):
            draws = RowDraws(key, [raw_idx[i] for i in mine.tolist()], y.device)
            x[mine] = restore(net, y[mine], sigma_n[mine], end[mine], stepper=stepper, num_steps=num_steps, randn_like=draws.randn_like,
                              labels=None if labels is None else labels[mine], rows=rows)
    return x


class Restoring:
    """The making of one round's set. net: the network, on its device. ends: float64 [N], s_k of all items. k: the round.

    sampler: the stepper with its keys bound; spec: how it was named. The set is written to dest, an .npz."""

    def __init__(self, noisy: NoisySet, net: torch.nn.Module, ends: np.ndarray, dest: str, *, k: int, sampler: Callable, spec: str,
                 steps: int, seed: int) -> None:
        self.noisy, self.net, self.ends, self.dest, self.k = noisy, net, np.minimum(ends, noisy.sigma_n), os.path.abspath(dest), k
        self.sampler, self.steps, self.key = sampler, steps, (seed, 'refinement', k)
        self.items = noisy.items[noisy.sigma_n[noisy.items] > self.ends[noisy.items]]
        told = json.dumps([noisy.facts(), spec, steps, seed, k, PART, misc.state_digest(net)], sort_keys=True).encode()
        folder, name = os.path.split(self.dest)
        self.parts = os.path.join(folder, f'.{name}-{digest(told, self.ends.tobytes())[:12]}')

    def run(self, batch: int) -> None:
        """Restores this rank's share, `batch` images at a time, and writes the set on rank 0. Every rank calls this."""
        distributed.from_rank0(os.makedirs, self.parts, 0o777, True)
        starts = range(0, len(self.items), PART)
        mine = list(enumerate(starts))[distributed.rank()::distributed.size()]
        size = lambda first: len(self.items[first:first + PART])
        done = sum(size(first) for number, first in mine if os.path.exists(self._part(number)))
        error = None
        with Progress(sum(size(first) for _, first in mine), f'round {self.k}: restoring', initial=done,
                      show=distributed.rank() == 0) as bar:
            bar.done = done
            try:
                for number, first in mine:
                    if not os.path.exists(self._part(number)):
                        self._write_part(number, self.items[first:first + PART], batch, bar)
            except (UserError, OSError, ValueError) as err:
                error = getattr(err, 'message', str(err))
        if errors := [text for text in distributed.all_values(error, what='restoring') if text]:
            raise UserError(errors[0])
        distributed.from_rank0(self._assemble, len(starts))

    def _part(self, number):
        return os.path.join(self.parts, f'{number:06d}.npy')

    def _write_part(self, number, items, batch, bar):
        found, device = [], network_device(self.net)
        rows = misc.rows_per_call(self.net, self.net.img_resolution, device, batch)
        batch = -(-batch // rows) * rows  # fewer take as long
        for first in range(0, len(items), batch):
            some = items[first:first + batch]
            level = lambda values: torch.from_numpy(values[some]).to(device)  # noqa: B023 (used here only)
            labels = self.noisy.labels(some)
            images = restored(self.net, self.noisy.images(some).to(device), level(self.noisy.sigma_n), level(self.ends),
                              self.noisy.dataset.raw_idx[some], stepper=self.sampler, num_steps=self.steps, key=self.key,
                              labels=None if labels is None else labels.to(device), rows=rows)
            bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if bad:
                name = self.noisy.dataset.image_name(self.noisy.dataset.raw_idx[some[bad[0]]])
                raise UserError(f'round {self.k}: {name} was restored to values that are not finite ({len(bad)} of {len(some)} images); '
                                'the weights are broken, or --sampler and --steps do not suit them')
            found.append(images.cpu())
            bar.update(len(some))
        with replacing(self._part(number)) as part, open(part, 'wb') as f:
            np.save(f, torch.cat(found).numpy(), allow_pickle=False)

    def _assemble(self, count):
        """Writes the set: restored images in their places, all others as they are stored."""
        dataset, contents = self.noisy.dataset, self.noisy.dataset.contents
        units = dataset.units or UNITS_8BIT
        with new_packed(self.dest, dataset.stored_shape, np.float32) as folder:
            images = folder.allocate(contents.count)
            restored_rows = np.zeros(contents.count, bool)
            for number in range(count):
                rows = dataset.raw_idx[self.items[number * PART:(number + 1) * PART]]
                images[rows] = to_physical(torch.from_numpy(np.load(self._part(number), allow_pickle=False)), units).float().numpy()
                restored_rows[rows] = True
            self._fill(images, np.flatnonzero(~restored_rows), units)
            columns, captions, told = tables_of(self.noisy, self.ends, units)
            folder.finish(columns, captions, units=units, **told)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _fill(self, images, rows, units):
        """Images that were not restored: clean ones as stored, noisy ones, which are at their end already, with their noise."""
        dataset = self.noisy.dataset
        added = dict(zip(dataset.raw_idx[self.noisy.items].tolist(), self.noisy.items.tolist()))
        for row in rows.tolist():
            item = added.get(row)
            if item is None:
                images[row] = dataset.decode(row)
            else:
                images[row] = to_physical(self.noisy.images(np.array([item])).double(), units)[0].float().numpy()


def tables_of(noisy: NoisySet, ends: np.ndarray, units: dict) -> tuple[dict, list | None, dict]:
    """(columns, captions, further keys of dataset.json) of the set whose items are at the levels ends [N]; images that the run did not
    keep stay what they were."""
    dataset, contents = noisy.dataset, noisy.dataset.contents
    whole, scale = ImageDataset(noisy.path), tables.level_scale(units)
    sigmas = np.array(whole.native_sigma)
    sigmas[dataset.raw_idx] = np.minimum(ends, noisy.sigma_n)
    columns = {'sigmas': sigmas * scale}
    columns |= {key: np.array(getattr(whole, key)) * scale for key in ('sigma_min', 'sigma_max') if contents.has(key)}
    if contents.has('labels'):
        columns['labels'] = tables.labels(contents.values('labels'))
    told = {key: getattr(contents, key) for key in ('latents', 'text') if getattr(contents, key) is not None}
    if contents.text is not None:
        columns[EMPTY] = contents.empty()[None]
        told['text'] = {key: value for key, value in contents.text.items() if key != 'empty'}
    return columns, contents.captions(), told
