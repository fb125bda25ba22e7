# SPDX-License-Identifier: Apache-2.0
"""States of runs: which one a command line continues, and how new ones are written while the training goes on."""

import dataclasses
import os
import threading

import torch

from dnnlib import UserError
from dnnlib.files import read_json
from dnnlib.fingerprint import data_differences
from torch_utils import checkpoint, distributed
from training.run.config import from_json, to_json
from training.run.folder import OPTIONS, name_of, runs

# What a continued run may be told anew; whatever else differs is refused by name.
MAY_CHANGE = ('run.duration_kimg', 'run.tick_kimg', 'run.snapshot_ticks', 'run.state_ticks', 'run.state_minutes', 'run.keep_states',
              'run.max_hours', 'run.batch_gpu', 'run.precision', 'run.compile', 'run.bench', 'run.samples', 'run.gns', 'run.versions',
              'run.command', 'run.ranks', 'run.desc', 'run.metrics', 'data.workers', 'data.cache_gib', 'data.cache_dir', 'data.on',
              'network.transfer', 'network.arguments.sampling')
SAME = 'give the same options, or start a new run from its weights with --transfer'

# ----------------------------------------------------------------------------------------------------
# Which state


def changes(told, config, free=()):
    """What differs between the Config of a run and that of a command line, one string each; but for MAY_CHANGE and the keys in `free`.

    Data are compared by their fingerprints, wherever they lie; those of a run of version 0.2.0 or older, which had none, by their path."""
    old, new = to_json(told), to_json(config)
    data = [*_data_changes(old['data'], new['data'], '--data')]
    if old['data']['validation'] and new['data']['validation']:
        data += _data_changes(old['data']['validation'], new['data']['validation'], '--val')
    return data + checkpoint.differences(old, new, ignore=(*MAY_CHANGE, *free))


def _data_changes(old, new, option):
    """What differs between the data of two parts of configurations, whose keys for that are taken out."""
    (path, before), (here, now) = ((part.pop('path'), part.pop('fingerprint')) for part in (old, new))
    if before is None or now is None:
        same = (path and os.path.realpath(path)) == (here and os.path.realpath(here))
        return [] if same else [f'{option}: {path} -> {here}, and the older state does not tell whether their data are equal']
    return [f'{option}={here}: {phrase}' for phrase in data_differences(before, now)]


def told_by(path):
    """The Config that a state file was written with."""
    try:
        return from_json(checkpoint.peek(path)['options'])
    except UserError as err:
        if str(path) in err.message:
            raise
        raise UserError(f'{path}: its options are not those of a run of this program ({err})') from None


def check(path, config, free=()):
    """The Config of a state file; refused unless it equals `config` but for what may change."""
    told = told_by(path)
    found = changes(told, config, free)
    if found:
        raise UserError(f'--resume={path}: the state was trained with other options ({"; ".join(found[:6])}); {SAME}')
    return told


def find(outdir, config, name, free=()):
    """(folder, Config) of the run under outdir that has come farthest of those with this Config; None where there is none of that name.

    name: what a new run's folder would be called. Which runs have this Config is told by their options.json, without a look at
    states. Raises UserError where runs of that name exist, and none has this Config."""
    matching, others, blank = [], [], []
    for folder in runs(outdir):
        told = _told_in(folder)
        if told is None:
            if name_of(folder) == name and all(each.startswith('.') for each in os.listdir(folder)):
                blank.append(folder)
            continue
        found = changes(told, config, free)
        alike = told.run.expr_id == config.run.expr_id and (config.run.expr_id is not None or name_of(folder) in (name, None))
        if not found:
            matching.append((_progress(folder), folder, told))
        elif alike:
            others.append((folder, found))
    if matching:
        return max(matching, key=lambda each: each[:2])[1:]
    if others:
        folder, found = others[0]
        several = f' (and {len(others) - 1} more)' if len(others) > 1 else ''
        raise UserError(f'--resume=latest: {folder}{several} was trained with other options ({"; ".join(found[:6])}); give the same '
                        'options to continue it, another --expr-id for another run, or no --resume to start anew beside it')
    return (blank[0], config) if blank else None  # of a run that was killed as soon as it had a folder


def _told_in(folder):
    """The Config of the run in a folder: options.json, or where that is missing or broken, what the states say; None without either."""
    try:
        return from_json(read_json(os.path.join(folder, OPTIONS)))
    except UserError as err:
        reason = err
    for path in checkpoint.states(folder):
        try:
            return told_by(path)
        except UserError as err:
            reason = err
    if os.path.exists(os.path.join(folder, OPTIONS)):
        distributed.print0(f'--resume=latest passes over: {reason.message}')
    return None


def _progress(folder):
    """Images of the state in the folder that has come farthest, -1 where there is none."""
    return max((count for count, _ in by_progress(folder)), default=-1)


def by_progress(folder):
    """[(images, path)] of the states in a folder, farthest first, by what the files tell; -1 for those that tell nothing."""
    found = []
    for path in checkpoint.states(folder):
        try:
            found.append((checkpoint.nimg(path), path))
        except UserError:
            found.append((-1, path))
    return sorted(found, reverse=True)


def load_latest(folder, config, free=()):
    """(path, content) of the whole state in the folder that has come farthest; (None, None) where there are no states.

    Damaged ones are passed over, with a word. Raises UserError where all of them are."""
    reasons = []
    for _, path in sorted(by_progress(folder), key=lambda each: (each[0] >= 0, -each[0])):  # those that tell nothing first: to say so
        try:
            check(path, config, free)
            return path, checkpoint.load(path)
        except UserError as err:
            distributed.print0(f'--resume=latest passes over: {err.message}')
            reasons.append(err.message)
    if reasons:
        raise UserError(f'--resume=latest: no state in {folder} can be continued (the last: {reasons[-1]}); '
                        'move them away to start this run anew')
    return None, None


def adopt(config, told):
    """`config`, with what a continued run keeps of its first command line, which may have had other defaults: its seed, its network."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=told.run.seed),
                               network=dataclasses.replace(config.network, arguments=told.network.arguments))


# ----------------------------------------------------------------------------------------------------
# Writing


def on_host(value):
    """A nested structure with copies of its tensors in host memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    return type(value)(map(on_host, value)) if isinstance(value, (list, tuple)) else value


class StateWriter:
    """Writes states in a thread of its own, one at a time, and removes older ones when a new one is whole.

    keep: how many a folder keeps, farthest first; 0: all. What lies ahead of a new one, as of a run that was taken back to an earlier
    state, is left alone."""

    def __init__(self, keep=0):
        self.keep, self._thread, self._error = keep, None, None

    def write(self, path, state):
        """Starts to write a state that nobody changes any more; waits for the one before."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(path, state), name='state')
        self._thread.start()

    def failed(self, path, error):
        """Notes that a state could not be written."""
        self._error = path, error

    @property
    def busy(self):
        """Whether a state is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self):
        """Waits for the state that is being written; (path, OSError) where the last one failed, told once, or None."""
        self.wait()
        found, self._error = self._error, None
        return found

    def wait(self):
        """Waits for the state that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, path, state):
        try:
            checkpoint.save(path, state)
            self._error = None
            self._prune(path, state['progress']['nimg'])
        except Exception as err:  # whatever it is, the training goes on and says so
            self.failed(path, err if isinstance(err, OSError) else OSError(f'{type(err).__name__}: {err}'))

    def _prune(self, path, nimg):
        older = [each for count, each in by_progress(os.path.dirname(path)) if 0 <= count <= nimg and each != path]
        for each in older[self.keep - 1:] if self.keep else []:
            os.unlink(each)
