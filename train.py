# SPDX-License-Identifier: Apache-2.0
"""Trains a diffusion model on images of which each knows how noisy it already is.

python train.py --outdir=runs --data=cifar.zip --sigma=0.2 --corruption_probability=0.9
torchrun --standalone --nproc_per_node=8 train.py --outdir=runs --data=cifar.zip --sigma=0.2 --corruption_probability=0.9"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import threading
import time
import traceback
import uuid

import click
import numpy as np
import PIL.Image
import torch

from dnnlib import EasyDict, Logger, UserError
from dnnlib.files import read_json, write_json
from metrics.detectors import DETECTORS
from metrics.evaluate import METRICS
from torch_utils import checkpoint, distributed, misc, registry
from torch_utils.command_line import Command, Names, Number, Spec, groups, ints, version_option
from training.data.corruption import PROTOCOLS, SIGMA_MIN_AS
from training.data.device import PLACES
from training.data.pairs import PAIRINGS
from training.diffusion.discrete import DIFFUSIONS
from training.diffusion.noise import NOISE
from training.networks.conditioning import CEP
from training.networks.ema import exponent
from training.networks.interface import ARCHS
from training.networks.preconditioning import PRECONDS, PREDICTIONS, build_network
from training.objective.consistency import CHAINS
from training.objective.loss import TERMS
from training.objective.penalty import PENALTIES
from training.objective.timesteps import TIMESTEPS
from training.objective.variational import OBJECTIVES
from training.objective.weighting import WEIGHTS
from training.run import folder, states
from training.run.build import build_objective
from training.run.config import from_json, to_json
from training.run.mirrors import Mirrors
from training.run.optimizer import LR_SCHEDULES, OPTIMIZERS
from training.run.options import DIFFUSION, PREDICTION, configure
from training.run.stopping import STOPPED, Requests, Signals, Stop
from training.run.training_loop import training_loop


def lengths(ctx, param, value):
    """'0.05,0.10' -> [0.05, 0.1]; widths that a power-function average can have."""
    try:
        found = [float(item) for item in value.split(',')] if value else []
        for sigma_rel in found:
            exponent(sigma_rel)
            if round(sigma_rel, 3) != sigma_rel:
                raise ValueError(f'sigma_rel={sigma_rel} has more than the three decimals that its files are named by')
    except ValueError as err:
        raise click.BadParameter(f'"{value}": {err}') from None
    return sorted(set(found))


SHARE, POSITIVE, NOT_NEGATIVE, MINUTES = Number(least=0, most=1), Number(above=0), Number(least=0), Number(least=0.1, most=10080)
COUNT, WHOLE = click.IntRange(min=1), click.IntRange(min=0)


@click.command(cls=Command, context_settings={'max_content_width': 130})
# What every run needs.
@click.option('--outdir', metavar='DIR', required=True, help='Where runs go; this one gets the next numbered folder in it')
@click.option('--data', metavar='ZIP|DIR', required=True, help='Training images, as dataset_tool.py writes them')
@click.option('--cond', metavar='BOOL', type=bool, default=False, show_default=True, help='Class-conditional, by the labels of the data')
@click.option('--arch', type=Spec(ARCHS), default='ddpmpp', show_default=True, help='Network, with its keys: ddpmpp:cbase=128,cres=1|2|2')
@click.option('--precond', type=click.Choice(list(PRECONDS)), default='edm', show_default=True, help='Preconditioning')
# Imperfect data.
@click.option('--sigma', metavar='FLOAT', type=float, default=0.0, show_default=True,
              help='Noise std that corrupted images carry, in network units ([-1,1] for 8-bit data)')
@click.option('--corruption-probability', metavar='FLOAT', type=float, default=0.0, show_default=True,
              help='Share of the images that is corrupted; the count is exact')
@click.option('--dataset-keep-percentage', metavar='FLOAT', type=float, default=1.0, show_default=True,
              help='Share of the images that is used at all, from 0 to 1 (1 = all)')
@click.option('--corruption-seed', metavar='INT', type=WHOLE, default=0, show_default=True,
              help='Key of who is noisy, and with which noise')
@click.option('--corruption-protocol', type=click.Choice(PROTOCOLS), default='fixed', show_default=True,
              help='published: membership and noise of the ambient-laws code, image for image')
@click.option('--sigma-min-as', type=click.Choice(SIGMA_MIN_AS), default='limit', show_default=True,
              help='What is done with images that have a sigma_min in dataset.json: they are trained on above it as they are (limit), '
              'or noise is added up to it, fixed per image, as Ambient Omni does')
# The objective, one slot each.
@click.option('--objective', type=Spec(OBJECTIVES), help='Discrete-time objective of --precond=iddpm: hybrid and vlb learn the '
              'variance of a sampling step too  [default: none; --noise and --weight instead]')
@click.option('--diffusion', type=Spec(DIFFUSIONS), help=f'Its schedule, kept in config.json  [default: {DIFFUSION}]')
@click.option('--prediction', type=click.Choice(list(PREDICTIONS)), help='What its network predicts, kept in config.json: eps, '
              f'the noise, as published; v; edm, as EDM does, for data of std --sigma-data  [default: {PREDICTION}]')
@click.option('--timesteps', type=Spec(TIMESTEPS), help='How its timesteps are drawn for clean images; second_moment: by their losses, '
              'for vlb  [default: uniform]')
@click.option('--noise', type=Spec(NOISE), help='Noise-level distribution p(sigma)  [default: as published for --precond]')
@click.option('--weight', type=Spec(WEIGHTS), help='Loss weight w(sigma)  [default: as published for --precond]')
@click.option('--penalty', type=Spec(PENALTIES), default='squared', show_default=True, help='What an error costs')
@click.option('--pairing', type=Spec(PAIRINGS), default='skip', show_default=True, help='Which levels a noisy image is seen at')
@click.option('--ambient-weight', type=click.Choice(['none', 'inverse']), default='none', show_default=True,
              help='inverse: weigh noisy images by (1 - sigma_n^2/sigma^2)^-2, so that their x_0 error counts like that of clean ones; '
              'sets the buffer of --pairing to 2/sqrt(3) where it has none')
@click.option('--term', multiple=True, type=Spec(TERMS), help='One more loss term; may be given several times')
@click.option('--consistency', type=Spec(CHAINS), help='Consistency loss, which reaches below sigma_n  [default: none]')
@click.option('--consistency-coeff', metavar='FLOAT', type=NOT_NEGATIVE,
              help='As published: factor of the consistency loss with euler chains; 0 = off  [default: 0]')
@click.option('--consistency-batch-size', metavar='INT', type=COUNT, help='As published: its batch_size  [default: 32]')
@click.option('--num-consistency-steps', metavar='INT', type=click.IntRange(min=2),
              help='As published: noise levels of a chain, both ends counted, so steps + 1  [default: 6]')
@click.option('--num-primes', metavar='INT', type=COUNT, help='As published: its samples  [default: 6]')
@click.option('--with-weight', metavar='BOOL', type=bool, help='As published: its weighted  [default: False]')
@click.option('--with-grad', metavar='BOOL', type=bool, help='As published: its grad  [default: True]')
# Conditions.
@click.option('--label-dropout', metavar='FLOAT', type=SHARE, default=0.0, show_default=True,
              help='Share of the labels that is left out, for classifier-free guidance')
@click.option('--label-corruption', metavar='RATE', type=SHARE, default=0.0, show_default=True,
              help='Share of the images that gets a wrong class; the count is exact')
@click.option('--label-corruption-groups', metavar='GROUPS', callback=groups, help='Classes to confuse, such as 0,1/3,5,7  [default: all]')
@click.option('--cep', type=Spec(CEP), help='Condition-embedding perturbation  [default: none]')
# Hyperparameters.
@click.option('--duration', metavar='MIMG', type=POSITIVE, default=200, show_default=True,
              help='Training length in million images (pairs used)')
@click.option('--batch', metavar='INT', type=COUNT, default=512, show_default=True, help='Global batch size')
@click.option('--batch-gpu', metavar='INT', type=COUNT,
              help='Rows a rank works on at a time; smaller accumulates gradients  [default: all]')
@click.option('--cbase', metavar='INT', type=COUNT, help='Key of --arch: channels of the first level')
@click.option('--cres', metavar='LIST', callback=ints, help='Key of --arch: channels of each level, in multiples of --cbase')
@click.option('--blocks', metavar='INT', type=COUNT, help='Key of --arch: residual blocks a level')
@click.option('--attn', metavar='LIST', callback=ints, help='Key of --arch: heights of the levels that attend')
@click.option('--sigma-data', metavar='FLOAT', type=POSITIVE, help='Std of the data, for network and loss (--precond=edm or '
              '--prediction=edm)  [default: 0.5]')
@click.option('--optimizer', type=Spec(OPTIMIZERS), default='adam', show_default=True, help='Optimizer, with its keys')
@click.option('--lr', metavar='FLOAT', type=POSITIVE, default=1e-3, show_default=True, help='Learning rate')
@click.option('--lr-rampup', metavar='MIMG', type=NOT_NEGATIVE, default=10, show_default=True,
              help='Million images over which it rises from 0')
@click.option('--lr-schedule', type=Spec(LR_SCHEDULES), default='constant', show_default=True,
              help='How it falls; ref counts steps, kimg thousand images (those of --duration where it is 0)')
@click.option('--weight-decay', metavar='FLOAT', type=NOT_NEGATIVE, help='Key of --optimizer  [default: 0 for adam]')
@click.option('--ema', metavar='MIMG', type=NOT_NEGATIVE, default=0.5, show_default=True,
              help='Half-life of the weight average, in million images')
@click.option('--power-ema', metavar='LIST', callback=lengths, default='', help='Widths of power-function averages to store at each '
              'snapshot, such as 0.05,0.10; checkpoint_tool.py makes any other from two of them  [default: none]')
@click.option('--clip', metavar='FLOAT', type=NOT_NEGATIVE, default=0.0, show_default=True, help='Largest norm of the gradient; 0 = any')
@click.option('--gns', metavar='BOOL', type=bool, default=False, show_default=True,
              help='Report the gradient noise scale; needs several ranks, or --batch-gpu below --batch')
@click.option('--dropout', metavar='FLOAT', type=Number(least=0, most=0.99), help='Key of --arch: dropout probability  [default: 0.13]')
@click.option('--augment', metavar='FLOAT', type=SHARE, default=0.12, show_default=True,
              help='Augmentation probability; noisy images get exact symmetries only')
@click.option('--xflip', metavar='BOOL', type=bool, default=False, show_default=True,
              help='Each image a second time, mirrored with its noise')
@click.option('--seed', metavar='INT', type=WHOLE, help='Random seed  [default: a random one, printed]')
# Speed.
@click.option('--precision', type=click.Choice(list(misc.PRECISIONS)), help='Arithmetic of the network  [default: fp32]')
@click.option('--fp16', metavar='BOOL', type=bool, default=False, show_default=True,
              help='As published: --precision=fp16, kept in config.json')
@click.option('--ls', metavar='FLOAT', type=POSITIVE, default=1, show_default=True, help='Loss scaling, taken out of the gradients again')
@click.option('--bench', metavar='BOOL', type=bool, default=True, show_default=True, help='Let cuDNN choose its algorithms by timing them')
@click.option('--compile', 'compile_net', metavar='BOOL', type=bool, default=False, show_default=True, help='torch.compile the network')
@click.option('--cache', metavar='BOOL', type=bool, default=True, show_default=True,
              help='False: no noisy image is kept in memory, as --cache-gib=0')
@click.option('--cache-gib', metavar='FLOAT', type=NOT_NEGATIVE, default=8, show_default=True,
              help='Memory of a node to keep noisy images in; where they need more, they are made anew at each use')
@click.option('--cache-dir', metavar='DIR', type=click.Path(file_okay=False),
              help='Where the decoded copy of the data lies, which later runs use  [default: beside the data, else the user\'s cache]')
@click.option('--data-on', type=click.Choice(PLACES), default='auto', show_default=True,
              help='Where batches are put together: on the GPU where the images fit there, else on the host')
@click.option('--workers', metavar='INT', type=WHOLE, default=1, show_default=True,
              help='Threads that make noisy images; 0: one, and batches are not prepared ahead')
@click.option('--timeout', metavar='MINUTES', type=MINUTES, default=10, show_default=True,
              help='With several ranks: end them all when one has not answered for about this long (docs/multi-node.md)')
@click.option('--threads', metavar='INT', type=COUNT, help='CPU threads of each rank  [default: PyTorch\'s]')
# Input and output.
@click.option('--expr-id', metavar='STR', help='Name of the run\'s folder; --resume=latest continues runs of the same name')
@click.option('--desc', metavar='STR', help='Text to add to the folder\'s name where no --expr-id is given')
@click.option('--nosubdir', is_flag=True, help='Write into --outdir itself')
@click.option('--tick', metavar='KIMG', type=POSITIVE, default=50, show_default=True, help='Thousand images between lines of statistics')
@click.option('--snap', metavar='TICKS', type=WHOLE, default=50, show_default=True, help='Ticks between network snapshots; 0: none')
@click.option('--dump', metavar='TICKS', type=WHOLE, default=500, show_default=True, help='Ticks between training states; 0: none')
@click.option('--dump-minutes', metavar='MINUTES', type=NOT_NEGATIVE, default=30, show_default=True,
              help='Minutes between training states, besides those of --dump; 0: none')
@click.option('--keep-states', metavar='INT', type=WHOLE, default=3, show_default=True,
              help='How many training states the folder keeps, the newest; 0: all')
@click.option('--max-hours', metavar='HOURS', type=NOT_NEGATIVE, default=0, show_default=True,
              help=f'After so many hours write the state and end with exit code {STOPPED}, as after SIGTERM; 0: no limit')
@click.option('--samples', metavar='INT', type=WHOLE, default=64, show_default=True,
              help='Images in the grid drawn at each snapshot; 0: none')
@click.option('--val', metavar='DATA|SHARE', help='Held-out images: a data set, or a share of --data such as 0.05')
@click.option('--metrics-every', metavar='TICKS', type=WHOLE, default=0, show_default=True,
              help='Ticks between metrics of the weight average\'s images; 0: none')
@click.option('--metrics', metavar='NAMES', type=Names(METRICS), default='fid', show_default=True,
              help=f'Which, of {",".join(METRICS)}; they are logged as Metrics/fid2k')
@click.option('--metrics-num', metavar='INT', type=click.IntRange(min=2), default=2000, show_default=True,
              help='Images that they are of, seeds 0 and up, made as generate.py makes them where it is told no sampler')
@click.option('--metrics-ref', metavar='NPZ|URL', help='What they compare with, as eval_fid.py ref writes it; kid, pr and dc need its '
              '--keep-features')
@click.option('--metrics-detector', type=Spec(DETECTORS), default='inception', show_default=True, help='Where features come from')
@click.option('--transfer', metavar='REF', help='Start from the weights of a network: snapshot folder, .pt state, Hugging Face name')
@click.option('--resume', metavar='latest|PT', help='Continue exactly: the newest state of this run under --outdir, or this state file')
@click.option('--tensorboard', is_flag=True, help='Mirror statistics and samples to TensorBoard, in the run\'s folder')
@click.option('--wandb', metavar='PROJECT', help='Mirror statistics and samples to Weights & Biases')
@click.option('-n', '--dry-run', is_flag=True, help='Print the configuration, and write nothing')
@version_option
def main(**options):
    """Train a diffusion model on clean and noisy images.

    \b
    python train.py --outdir=runs --data=cifar.zip --sigma=0.2 --corruption_probability=0.9
    torchrun --standalone --nproc_per_node=8 train.py --outdir=runs --data=cifar.zip --cond=1 --arch=ddpmpp"""
    o = EasyDict(options, start=time.time())
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init(timeout=o.timeout * 60, remedy='continue with the same command and --resume=latest')
    check_mirrors(o)
    config = configure(o)
    config, place = find_run(config, o)
    print_config(config, o)
    if distributed.size() > 1:
        distributed.print0(distributed.rank_map())
    if not o.dry_run:
        launch(config, o, place)


def check_mirrors(o):
    """Refuses mirrors of the statistics whose packages are not there."""
    for package, wanted in [('tensorboard', o.tensorboard), ('wandb', o.wandb)]:
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f'--{package} needs the package {package}: pip install {package}')


def print_config(config, o):
    """What will be trained, on rank 0: the configuration, the size of the network, the network evaluations an image."""
    with torch.device('meta'):
        net = build_network(config.network.arguments)
    _, objective = build_objective(config.objective, net, config.run.batch)
    params = sum(p.numel() for p in (*net.parameters(), *objective.parameters()))
    if o.dry_run:
        distributed.print0(json.dumps(to_json(config), indent=2))
    distributed.print0(f'{type(net.model).__name__} with {params / 1e6:.2f} M parameters, {type(net).__name__}; '
                       f'{objective.evaluations:.3g} network evaluations an image and step; seed {config.run.seed}')


def find_run(config, o):
    """(Config, where the run goes on): ("file", its state), ("latest", its folder) or None for a fresh start; the same on every rank."""
    if o.resume is None:
        return config, None
    if o.transfer and o.resume != 'latest':
        raise UserError('--resume=FILE and --transfer exclude each other: one continues a run, the other starts a new one')

    def look():
        # A continued run keeps its seed, and what its network predicts: its first command may have had another default.
        if o.resume != 'latest':
            return ('file', o.resume), to_json(states.check(o.resume, config, o.free))
        found = states.find(o.outdir, config, folder_name(config, o), o.free)
        return (('latest', found[0]), to_json(found[1])) if found else (None, None)

    o.free = [key for key, given in (('run.seed', o.seed), ('network.arguments.prediction', o.prediction)) if given is None]
    place, told = distributed.from_rank0(look)
    return (states.adopt(config, from_json(told)), place) if told else (config, None)


def launch(config, o, place):
    """Makes or finds the run's folder, and trains in it. Only rank 0 reads the state, and holds the lock of the folder."""
    held = []  # on rank 0: lock, content of the state
    run_dir, state_path = distributed.from_rank0(open_folder, config, o, place, held)
    lock, state = held or (None, None)
    note = functools.partial(folder.note_end, run_dir)
    distributed.on_abort(functools.partial(note, shown=False))
    requests = Requests(Signals(note), config.run.max_hours, config.run.state_minutes, o.start)
    try:
        with requests.signals:
            train_in(run_dir, config, o, state, state_path, requests)
    except Stop as stop:
        if lock:
            folder.note_end(run_dir, f'Stopped: {stop.reason}; the state is written, and the same command with --resume=latest goes on')
        raise click.exceptions.Exit(STOPPED) from None
    except UserError as err:
        note(f'Error: {err.message}', shown=False)
        if lock:
            lock.release()
            folder.take_back(run_dir)
        raise
    except BaseException as err:
        if distributed.explain(err) is None:  # which notes what it has to say
            note(traceback.format_exc(), shown=False)
        raise
    finally:
        if lock:
            lock.release()


def train_in(run_dir, config, o, state, state_path, requests):
    """training_loop, with a log on rank 0."""
    if distributed.rank() != 0:
        training_loop(config, run_dir, distributed.device(), None, None, state_path, requests)
        return
    mirrors = open_mirrors(o, run_dir, config, state['progress']['nimg'] if state else 0)
    with Logger(os.path.join(run_dir, folder.LOG)), contextlib.closing(mirrors):
        training_loop(config, run_dir, distributed.device(), mirrors, state, state_path, requests)
        print(f'Done: {run_dir}', flush=True)


def open_folder(config, o, place, held):
    """(folder, path of the state or None): locked, the state read, both put into `held`."""
    kind, where = place or (None, None)
    if kind is None:
        run_dir = new_folder(config, o)
    else:
        run_dir = os.path.dirname(os.path.abspath(where)) if kind == 'file' else where
    lock, path, state = folder.lock(run_dir), None, None
    try:
        if kind == 'file':
            path, state = where, checkpoint.load(where)
        elif kind == 'latest':
            path, state = states.load_latest(run_dir, config, o.free)
        else:
            folder.RunFolder(run_dir, False).write_options(config)  # the same command finds it, should it end before its first state
    except BaseException:
        lock.release()
        raise
    held += [lock, state]
    return run_dir, path


def new_folder(config, o):
    """Makes the folder of a new run."""
    if not o.nosubdir:
        return folder.create(o.outdir, folder_name(config, o))
    os.makedirs(o.outdir, exist_ok=True)
    if os.path.exists(os.path.join(o.outdir, folder.OPTIONS)):
        raise UserError(f'--outdir={o.outdir} holds a run already; continue it with --resume=latest, or choose another folder')
    return o.outdir


def folder_name(config, o):
    """What the folder of a new run is called, behind its number."""
    kind = 'cond' if o.cond else 'uncond'
    stem = os.path.splitext(os.path.basename(os.path.normpath(o.data)))[0]
    parts = [stem, kind, registry.parse(o.arch)[0], o.precond, f'batch{o.batch}', config.run.precision, o.desc]
    return o.expr_id or '-'.join(filter(None, parts))


def open_mirrors(o, run_dir, config, nimg):
    """The Mirrors that the options ask for. nimg: where the run stands, 0 at its start. Nothing is opened before the first line."""
    mirrors = {}
    if o.tensorboard:
        mirrors['--tensorboard'] = TensorBoard(run_dir, nimg)
    if o.wandb:
        mirrors['--wandb'] = WeightsAndBiases(o.wandb, run_dir, config, nimg)
    return Mirrors(mirrors)


class TensorBoard:
    """Event files in the run's folder: one curve, however often the run was continued.

    nimg: where the run stands: what an earlier process wrote of later steps is dropped when the files are read."""

    def __init__(self, run_dir, nimg):
        self.run_dir, self.first, self._board = run_dir, nimg + 1, None

    def scalars(self, fields, nimg):
        self._write(nimg, lambda board: [board.add_scalar(name, value, nimg) for name, value in fields.items()])

    def picture(self, path, nimg):
        with PIL.Image.open(path) as picture:
            pixels = np.array(picture)
        self._write(nimg, lambda board: board.add_image('samples', pixels, nimg, dataformats='HW' if pixels.ndim == 2 else 'HWC'))

    def close(self):
        if self._board is not None:
            self._board.close()
            self._board = None

    def _write(self, nimg, write):
        """Writes and flushes; after an error a new file is begun the next time, because the old one may end in the middle of a record."""
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


def hush_tensorboard():
    """Its thread prints a traceback when it cannot write; the next call raises the same error, which is told in one line."""
    show = threading.excepthook
    if not getattr(show, 'is_hushed', False):
        def hushed(args):
            if not type(args.thread).__module__.startswith('tensorboard.'):
                show(args)
        hushed.is_hushed = True
        threading.excepthook = hushed


class WeightsAndBiases:
    """A run of this project, whose id is kept in the run's folder: a continued run continues it. The x axis is nimg.

    nimg: where the run stands. Lines up to where the server is already, of a process that came farther, are passed over: its steps can
    only grow, and those lines are the same."""

    ID = 'wandb.json'

    def __init__(self, project, run_dir, config, nimg):
        self.project, self.run_dir, self.config, self.nimg = project, run_dir, config, nimg
        self._run, self._tried = None, False

    def scalars(self, fields, nimg):
        self._log(fields, nimg)

    def picture(self, path, nimg):
        self._log({'samples': str(path)}, nimg, pictures=True)

    def close(self):
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
        """The run on the server; None where an earlier attempt failed: each may take minutes."""
        if self._tried:
            return self._run
        self._tried = True
        import wandb
        run = wandb.init(project=self.project, id=self._id(), resume='allow', name=os.path.basename(self.run_dir), dir=self.run_dir,
                         config=to_json(self.config), allow_val_change=True)
        run.define_metric('nimg')
        run.define_metric('*', step_metric='nimg')
        self._start = int(getattr(run, 'starting_step', 0) or 0)  # the first step that the server takes
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
