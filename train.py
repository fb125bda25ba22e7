# SPDX-License-Identifier: Apache-2.0
"""Trains a diffusion model on images with a known noise level per image.

python train.py --outdir=runs --data=cifar.zip --sigma=0.2 --corruption_probability=0.9
torchrun --standalone --nproc_per_node=8 train.py --outdir=runs --data=cifar.zip --sigma=0.2 --corruption_probability=0.9"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import threading
import time
import uuid
from typing import Any

import click

from dnnlib import EasyDict, UserError
from dnnlib.files import read_json, write_json
from torch_utils.command_line import Command, version_option
from training.run import presets
from training.run.options import options


@click.command(cls=Command)
@options
@version_option
@click.pass_context
def main(ctx: click.Context, **given) -> None:
    """Train a diffusion model on clean and noisy images, each with its known noise level.

    \b
    python train.py --outdir=runs --data=cifar.zip --sigma=0.2 --corruption_probability=0.9
    torchrun --standalone --nproc_per_node=8 train.py --outdir=runs --data=cifar.zip --preset=edm-cifar10-cond"""
    o = EasyDict(given, start=time.time(), command=presets.given(ctx), recipe=presets.told(ctx))
    check_mirrors(o)
    from training.run import launch  # here, so that --help need not wait for torch
    launch.run(o, open_mirrors)


def check_mirrors(o: EasyDict) -> None:
    """Refuses --tensorboard and --wandb where their packages are not installed."""
    for package, wanted in [('tensorboard', o.tensorboard), ('wandb', o.wandb)]:
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f'--{package} needs the package {package}: pip install {package}')


def open_mirrors(o: EasyDict, run_dir: str, config: dict, nimg: int) -> Any:
    """The Mirrors that the options ask for. nimg: progress of the run, 0 at its start. Nothing is opened before something is logged."""
    from training.run.mirrors import Mirrors
    mirrors = {}
    if o.tensorboard:
        mirrors['--tensorboard'] = TensorBoard(run_dir, nimg)
    if o.wandb:
        mirrors['--wandb'] = WeightsAndBiases(o.wandb, run_dir, config, nimg)
    return Mirrors(mirrors)


class TensorBoard:
    """Event files in the run's folder: one curve, however often the run was continued.

    nimg: progress of the run; readers of the files drop what an earlier process wrote about later steps."""

    def __init__(self, run_dir: str, nimg: int) -> None:
        self.run_dir, self.first, self._board = run_dir, nimg + 1, None

    def scalars(self, fields: dict, nimg: int) -> None:
        self._write(nimg, lambda board: [board.add_scalar(name, value, nimg) for name, value in fields.items()])

    def picture(self, path: str | os.PathLike, nimg: int) -> None:
        import numpy as np
        import PIL.Image
        with PIL.Image.open(path) as picture:
            pixels = np.array(picture)
        self._write(nimg, lambda board: board.add_image('samples', pixels, nimg, dataformats='HW' if pixels.ndim == 2 else 'HWC'))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write(self, nimg, write):
        """Writes and flushes. After an error the next call begins a new file, because the old one may end in the middle of a record."""
        try:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter
                hush_tensorboard()
                self._board = SummaryWriter(self.run_dir, purge_step=self.first)
            write(self._board)
            self._board.flush()
            self.first = nimg + 1
        except Exception:
            with contextlib.suppress(Exception):
                self.close()
            self._board = None
            raise


def hush_tensorboard() -> None:
    """Silences TensorBoard's writer thread, which prints a traceback when it cannot write: the next call raises the same error anyway."""
    show = threading.excepthook
    if not getattr(show, 'is_hushed', False):
        def hushed(args):
            if not type(args.thread).__module__.startswith('tensorboard.'):
                show(args)
        hushed.is_hushed = True
        threading.excepthook = hushed


class WeightsAndBiases:
    """A run of a Weights & Biases project, whose id is kept in the run's folder so that a continued run continues it. The x axis is nimg.

    nimg: progress of the run. Where an earlier process got farther, lines up to the server's last step are skipped: its steps can only
    grow, and those lines are the same."""

    ID = 'wandb.json'

    def __init__(self, project: str, run_dir: str, config: dict, nimg: int) -> None:
        self.project, self.run_dir, self.config, self.nimg = project, run_dir, config, nimg
        self._run, self._tried = None, False

    def scalars(self, fields: dict, nimg: int) -> None:
        self._log(fields, nimg)

    def picture(self, path: str | os.PathLike, nimg: int) -> None:
        self._log({'samples': str(path)}, nimg, pictures=True)

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()

    def _log(self, fields, nimg, pictures=False):
        run = self._open()
        if run is None or self.nimg < nimg < self._start:
            return
        if pictures:
            import wandb
            fields = {name: wandb.Image(path) for name, path in fields.items()}
        run.log({**fields, 'nimg': nimg}, step=max(nimg, self._start))

    def _open(self):
        """The run on the server; None where an earlier attempt failed, because each attempt may take minutes."""
        if self._tried:
            return self._run
        self._tried = True
        import wandb
        run = wandb.init(project=self.project, id=self._id(), resume='allow', name=os.path.basename(self.run_dir), dir=self.run_dir,
                         config=dataclasses.asdict(self.config), allow_val_change=True)
        run.define_metric('nimg')
        run.define_metric('*', step_metric='nimg')
        self._start = int(getattr(run, 'starting_step', 0) or 0)  # the first step that the server accepts
        self._run = run
        return run

    def _id(self):
        path = os.path.join(self.run_dir, self.ID)
        if os.path.exists(path):
            found = read_json(path).get('id')
            if not isinstance(found, str) or not re.fullmatch(r'[\w-]{1,64}', found):
                raise UserError(f'{path}: holds no id of a run; remove it to begin a new one')
            return found
        found = uuid.uuid4().hex
        write_json(path, {'id': found})
        return found


if __name__ == '__main__':
    main()
