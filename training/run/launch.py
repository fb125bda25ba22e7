# SPDX-License-Identifier: Apache-2.0
"""From the options of train.py to a finished run: configuration, folder, lock, training, and what is left when it ends."""

import contextlib
import functools
import json
import os
import traceback
from collections.abc import Callable

import click
import torch

from dnnlib import EasyDict, Logger, UserError, format_time
from torch_utils import checkpoint, distributed, registry
from training.networks.preconditioning import build_network
from training.run import folder, memory, states, unsharded
from training.run.build import build_objective
from training.run.config import Config, from_json, to_json
from training.run.configure import configure
from training.run.stopping import STOPPED, Requests, Signals, Stop
from training.run.summary import closing_lines
from training.run.training_loop import training_loop


def run(o: EasyDict, open_mirrors: Callable) -> None:
    """Trains as the options `o` say. open_mirrors(o, folder, config, nimg) -> Mirrors of the statistics."""
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init(timeout=o.timeout * 60, remedy='continue with the same command and --resume=latest')
    if o.recipe:
        distributed.print0(o.recipe)
    config = configure(o)
    config, place = find_run(config, o)
    print_config(config, o)
    if distributed.size() > 1:
        distributed.print0(distributed.rank_map())
    if not o.dry_run:
        launch(config, o, place, open_mirrors)


def print_config(config: Config, o: EasyDict) -> None:
    """Prints, on rank 0, what will be trained: the configuration, the size of the network, and the network evaluations per image."""
    with torch.device('meta'):
        net = build_network(config.network.arguments)
    _, objective = build_objective(config.objective, net, config.run.batch)
    params = sum(p.numel() for p in (*net.parameters(), *objective.parameters()))
    if o.dry_run:
        distributed.print0(json.dumps(to_json(config), indent=2))
    distributed.print0(arithmetic(config, o))
    distributed.print0(f'{type(net.model).__name__} with {params / 1e6:.2f} M parameters, {type(net).__name__}; '
                       f'{objective.evaluations:.3g} network evaluations per image and step; seed {config.run.seed}')


def arithmetic(config: Config, o: EasyDict) -> str:
    """One line: how the network is computed, and which options chose that."""
    run = config.run
    layout = unsharded.channels_last(run, distributed.device())
    words = [f'Precision {run.precision}', 'compiled' if run.compile else '', 'channels-last' if layout else '',
             'blocks computed again' if run.checkpointing else '']
    by = [option for option, value in (('--precision=auto', '' if o.fp16 else o.precision), ('--compile=auto', o.compile_net))
          if value == 'auto']
    exact = '' if (run.precision, run.compile) == ('fp32', False) else '--precision=fp32 --compile=0 gives the exact published arithmetic'
    note = '; '.join(filter(None, [by and f'chosen by {" and ".join(by)}', exact]))
    return ', '.join(filter(None, words)) + (f' ({note})' if note else '')


def find_run(config: Config, o: EasyDict) -> tuple[Config, tuple[str, str] | None]:
    """(Config, where to resume): ("file", state), ("latest", folder) or None for a fresh start; the same on every rank."""
    if o.resume is None:
        return config, None
    if o.transfer and o.resume != 'latest':
        raise UserError('--resume=FILE and --transfer exclude each other: one continues a run, the other starts a new one')

    def look():
        # A continued run keeps its seed and its prediction, whose defaults may have been different for its first command.
        if o.resume != 'latest':
            return ('file', o.resume), to_json(states.check(o.resume, config, o.free))
        found = states.find(o.outdir, config, folder_name(config, o), o.free)
        return (('latest', found[0]), to_json(found[1])) if found else (None, None)

    o.free = [key for key, given in (('run.seed', o.seed), ('network.arguments.prediction', o.prediction),
                                     ('optimizer.loss_scale', None if o.ls == 'auto' else o.ls)) if given is None]
    place, stored = distributed.from_rank0(look)
    return (states.adopt(config, from_json(stored)), place) if stored else (config, None)


def launch(config: Config, o: EasyDict, place: tuple[str, str] | None, open_mirrors: Callable) -> None:
    """Creates or finds the run's folder, and trains in it. Only rank 0 reads the state and holds the lock of the folder."""
    held = []  # on rank 0: lock, content of the state
    run_dir, state_path = distributed.from_rank0(open_folder, config, o, place, held)
    lock, state = held or (None, None)
    note = functools.partial(folder.note_end, run_dir)
    distributed.on_abort(functools.partial(note, shown=False))
    requests = Requests(Signals(note), config.run.max_hours, config.run.state_minutes, o.start)
    try:
        with requests.signals, memory.explained(config):
            train_in(run_dir, config, o, state, state_path, requests, open_mirrors)
    except Stop as stop:
        if lock:
            folder.note_end(run_dir, f'Stopped: {stop.reason}; the state is saved, and the same command with --resume=latest continues it')
        raise click.exceptions.Exit(STOPPED) from None
    except UserError as err:
        note(f'Error: {err.message}', shown=False)
        if lock:
            lock.release()
            folder.take_back(run_dir)
        raise
    except BaseException as err:
        if distributed.explain(err) is None:  # otherwise on_abort notes the explanation
            note(traceback.format_exc(), shown=False)
        raise
    finally:
        if lock:
            lock.release()


def train_in(run_dir: str, config: Config, o: EasyDict, state: dict | None, state_path: str | None, requests: Requests,
             open_mirrors: Callable) -> None:
    """training_loop, with a log on rank 0."""
    if distributed.rank() != 0:
        training_loop(config, run_dir, distributed.device(), None, None, state_path, requests)
        return
    mirrors = open_mirrors(o, run_dir, config, state['progress']['nimg'] if state else 0)
    with Logger(os.path.join(run_dir, folder.LOG)), contextlib.closing(mirrors):
        run = training_loop(config, run_dir, distributed.device(), mirrors, state, state_path, requests)
        print('\n'.join(closing_lines(run_dir, format_time(run.seconds()), config)), flush=True)


def open_folder(config: Config, o: EasyDict, place: tuple[str, str] | None, held: list) -> tuple[str, str | None]:
    """(folder, path of the state or None). Locks the folder and reads the state, and appends lock and state to `held`."""
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
            folder.RunFolder(run_dir, False).write_options(config)  # so that --resume=latest finds it, should it end before its first state
    except BaseException:
        lock.release()
        raise
    held += [lock, state]
    return run_dir, path


def new_folder(config: Config, o: EasyDict) -> str:
    """Creates the folder of a new run."""
    if not o.nosubdir:
        return folder.create(o.outdir, folder_name(config, o))
    os.makedirs(o.outdir, exist_ok=True)
    if os.path.exists(os.path.join(o.outdir, folder.OPTIONS)):
        raise UserError(f'--outdir={o.outdir} already holds a run; continue it with --resume=latest, or choose another folder')
    return o.outdir


def folder_name(config: Config, o: EasyDict) -> str:
    """Name of a new run's folder, after its number."""
    kind = 'cond' if o.cond else 'uncond'
    stem = os.path.splitext(os.path.basename(os.path.normpath(o.data)))[0]
    network = [registry.parse(o.distill)[0]] if o.distill else [registry.parse(o.arch)[0], o.precond]
    parts = [stem, kind, *network, f'batch{o.batch}', config.run.precision, o.desc]
    return o.expr_id or '-'.join(filter(None, parts))
