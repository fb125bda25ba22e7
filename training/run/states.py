# SPDX-License-Identifier: Apache-2.0
"""Training states: finding the one to resume from, and writing new ones while the training continues."""

import dataclasses
import os
import threading
from collections.abc import Iterable

import torch

from dnnlib import UserError
from dnnlib.files import read_json
from dnnlib.fingerprint import data_differences
from torch_utils import checkpoint, distributed
from training.run.config import Config, from_json, to_json
from training.run.folder import OPTIONS, name_of, runs

# What may change when a run is continued; any other difference is refused by name.
MAY_CHANGE = ('run.duration_kimg', 'run.tick_kimg', 'run.snapshot_ticks', 'run.state_ticks', 'run.state_minutes', 'run.keep_states',
              'run.max_hours', 'run.batch_gpu', 'run.precision', 'run.compile', 'run.checkpointing', 'run.shard', 'run.bench',
              'run.samples', 'run.gns', 'run.versions', 'run.command', 'run.ranks', 'run.desc', 'run.regime', 'run.metrics', 'data.workers',
              'data.cache_gib', 'data.cache_dir', 'data.on', 'network.transfer', 'network.teacher', 'network.arguments.sampling')
SAME = 'give the same options, or start a new run from its weights with --transfer'

# ----------------------------------------------------------------------------------------------------
# Which state


def changes(stored: Config, config: Config, free: Iterable[str] = ()) -> list[str]:
    """Differences between the Config of a run and that of a command line, one string each, except MAY_CHANGE and the keys in `free`.

    Data are compared by their fingerprints, wherever they are; runs of version 0.2.0 or older have none, and are compared by path."""
    old, new = to_json(stored), to_json(config)
    data = [*_data_changes(old['data'], new['data'], '--data')]
    if old['data']['validation'] and new['data']['validation']:
        data += _data_changes(old['data']['validation'], new['data']['validation'], '--val')
    before, now = (part['objective'].pop('teacher_sha256') for part in (old, new))
    if before and now and before != now:
        data.append(f'--distill: the weights of teacher={config.network.teacher} are not those of the run\'s teacher, {before[:12]} -> '
                    f'{now[:12]}')
    return data + checkpoint.differences(old, new, ignore=(*MAY_CHANGE, *free))


def _data_changes(old, new, option):
    """Differences between the data of two parts of configurations; removes their keys "path" and "fingerprint"."""
    (path, before), (here, now) = ((part.pop('path'), part.pop('fingerprint')) for part in (old, new))
    if before is None or now is None:
        same = (path and os.path.realpath(path)) == (here and os.path.realpath(here))
        return [] if same else [f'{option}: {path} -> {here}, and the older state does not say whether their data are equal']
    return [f'{option}={here}: {phrase}' for phrase in data_differences(before, now)]


def told_by(path: str) -> Config:
    """The Config that a state file was written with."""
    try:
        return from_json(checkpoint.peek(path)['options'])
    except UserError as err:
        if str(path) in err.message:
            raise
        raise UserError(f'{path}: its options were not written by this program ({err})') from None


def check(path: str, config: Config, free: Iterable[str] = ()) -> Config:
    """The Config of a state file. Raises UserError unless it equals `config` except for what may change."""
    stored = told_by(path)
    found = changes(stored, config, free)
    if found:
        raise UserError(f'--resume={path}: the state was trained with other options ({"; ".join(found[:6])}); {SAME}')
    return stored


def find(outdir: str, config: Config, name: str, free: Iterable[str] = ()) -> tuple[str, Config] | None:
    """(folder, Config) of the run under outdir with this Config that has got farthest; None where no run has that name.

    name: what a new run's folder would be called. The runs' Configs are read from their options.json, without opening
    states. Raises UserError where runs of that name exist, and none has this Config."""
    matching, others, blank = [], [], []
    for folder in runs(outdir):
        stored = _stored_in(folder)
        if stored is None:
            if name_of(folder) == name and all(each.startswith('.') for each in os.listdir(folder)):
                blank.append(folder)
            continue
        found = changes(stored, config, free)
        alike = stored.run.expr_id == config.run.expr_id and (config.run.expr_id is not None or name_of(folder) in (name, None))
        if not found:
            matching.append((_progress(folder), folder, stored))
        elif alike:
            others.append((folder, found))
    if matching:
        return max(matching, key=lambda each: each[:2])[1:]
    if others:
        folder, found = others[0]
        several = f' (and {len(others) - 1} more)' if len(others) > 1 else ''
        raise UserError(f'--resume=latest: {folder}{several} was trained with other options ({"; ".join(found[:6])}); give the same '
                        'options to continue it, another --expr-id for another run, or no --resume to start a new run beside it')
    return (blank[0], config) if blank else None  # blank: of a run that was killed as soon as it had a folder


def _stored_in(folder):
    """The Config of the run in a folder: options.json, or the states where that is missing or broken; None without either."""
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
        distributed.print0(f'--resume=latest skips: {reason.message}')
    return None


def _progress(folder):
    """Number of images of the farthest state in the folder, -1 where there is none."""
    return max((count for count, _ in by_progress(folder)), default=-1)


def by_progress(folder: str) -> list[tuple[int, str]]:
    """[(images, path)] of the states in a folder, farthest first, as read from the files; -1 for those that cannot be read."""
    found = []
    for path in checkpoint.states(folder):
        try:
            found.append((checkpoint.nimg(path), path))
        except UserError:
            found.append((-1, path))
    return sorted(found, reverse=True)


def load_latest(folder: str, config: Config, free: Iterable[str] = ()) -> tuple[str | None, dict | None]:
    """(path, content) of the farthest complete state in the folder; (None, None) where there are no states.

    Damaged ones are skipped, with a message. Raises UserError where all of them are damaged."""
    reasons = []
    for _, path in sorted(by_progress(folder), key=lambda each: (each[0] >= 0, -each[0])):  # unreadable ones first, to report them
        try:
            check(path, config, free)
            return path, checkpoint.load(path)
        except UserError as err:
            distributed.print0(f'--resume=latest skips: {err.message}')
            reasons.append(err.message)
    if reasons:
        raise UserError(f'--resume=latest: no state in {folder} can be continued (the last: {reasons[-1]}); '
                        'move them away to start this run from the beginning')
    return None, None


def adopt(config: Config, stored: Config) -> Config:
    """`config`, with the seed and network of the stored Config: the run's first command line may have had other defaults."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=stored.run.seed),
                               network=dataclasses.replace(config.network, arguments=stored.network.arguments))


# ----------------------------------------------------------------------------------------------------
# Writing


def on_host(value: object) -> object:
    """A nested structure with copies of its tensors in host memory, row by row there whatever their layout was."""
    if isinstance(value, torch.Tensor):
        return value.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: on_host(item) for key, item in value.items()}
    return type(value)(map(on_host, value)) if isinstance(value, (list, tuple)) else value


class StateWriter:
    """Writes states in a separate thread, one at a time, and removes older ones when a new one is complete.

    keep: how many a folder keeps, farthest first; 0: all. States that are farther than the new one, as after resuming from an earlier
    state, are left alone."""

    def __init__(self, keep: int = 0) -> None:
        self.keep, self._thread, self._error = keep, None, None

    def write(self, path: str, state: dict) -> None:
        """Starts to write a state, which must not be changed any more; waits for the previous one."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(path, state), name='state')
        self._thread.start()

    def failed(self, path: str, error: OSError) -> None:
        """Notes that a state could not be written."""
        self._error = path, error

    @property
    def busy(self) -> bool:
        """Whether a state is being written."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> tuple[str, OSError] | None:
        """Waits for the state that is being written; (path, OSError) where the last one failed, reported once, else None."""
        self.wait()
        found, self._error = self._error, None
        return found

    def wait(self) -> None:
        """Waits for the state that is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, path, state):
        try:
            checkpoint.save(path, state)
            self._error = None
            self._prune(path, state['progress']['nimg'])
        except Exception as err:  # whatever it is, the training continues and reports it
            self.failed(path, err if isinstance(err, OSError) else OSError(f'{type(err).__name__}: {err}'))

    def _prune(self, path, nimg):
        older = [each for count, each in by_progress(os.path.dirname(path)) if 0 <= count <= nimg and each != path]
        for each in older[self.keep - 1:] if self.keep else []:
            os.unlink(each)
