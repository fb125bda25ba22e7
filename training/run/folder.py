# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: how it is named, found again, written to and continued."""

import contextlib
import json
import os
import re

from dnnlib import UserError
from dnnlib.files import write_json
from torch_utils import checkpoint, distributed
from training.run.config import from_json, to_json

# What a continued run may be told anew; whatever else differs is refused by name.
MAY_CHANGE = ('run.duration_kimg', 'run.tick_kimg', 'run.snapshot_ticks', 'run.state_ticks', 'run.batch_gpu', 'run.precision',
              'run.compile', 'run.bench', 'run.samples', 'run.gns', 'run.versions', 'run.ranks', 'run.desc', 'run.metrics', 'data.workers',
              'data.cache_gib', 'network.transfer', 'network.arguments.sampling')


class RunFolder:
    """stats.jsonl, options.json and file names of one run. Only rank 0 writes, and no worker whose launcher has died."""

    def __init__(self, path, fractional):
        self.path, self.fractional = path, fractional
        self.log_bytes = 0

    def file(self, name):
        return os.path.join(self.path, name)

    def numbered(self, stem, kimg, ending=''):
        """"stem-000500.ending"; three decimals where the run's tick is fractional."""
        return self.file(f'{stem}-{kimg:010.3f}{ending}' if self.fractional else f'{stem}-{int(kimg):06d}{ending}')

    def write_options(self, config):
        """options.json: the Config."""
        write_json(self.file('options.json'), to_json(config))

    def log(self, fields):
        """Appends one line to stats.jsonl, on the disk before this returns."""
        stop_if_orphan()
        with open(self.file('stats.jsonl'), 'ab') as f:
            f.write(json.dumps(fields, allow_nan=False).encode() + b'\n')
            f.flush()
            os.fsync(f.fileno())
            self.log_bytes = f.tell()

    def rewind_log(self, log_bytes):
        """Drops the lines that were written after the state which the run continues from (all, where there is none: 0 bytes)."""
        path = self.file('stats.jsonl')
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, min(log_bytes, os.path.getsize(path)))  # a state may have come here without its log
        self.log_bytes = log_bytes


def stop_if_orphan():
    """Ends a worker whose launcher has died, before it writes anything into a folder that another run may own by now."""
    if distributed.is_orphan():
        raise SystemExit('the launcher of this worker is gone: stopping without writing')


def create(outdir, name):
    """Makes the next numbered folder 00000-name under outdir; returns its path."""
    os.makedirs(outdir, exist_ok=True)
    taken = [int(match[1]) for entry in os.listdir(outdir) if (match := re.match(r'(\d{5})(-|$)', entry))]
    number = max(taken, default=-1) + 1
    while True:  # another run may take the number between the look and the making
        path = os.path.join(outdir, f'{number:05d}-{name}')
        try:
            os.mkdir(path)
            return path
        except FileExistsError:
            number += 1


def load_state(path, config, free=()):
    """(content of a state file, Config of its run); refused unless that equals `config` but for MAY_CHANGE and the keys in `free`."""
    state = checkpoint.load(path)
    try:
        told = from_json(state['options'])
    except UserError as err:
        raise UserError(f'{path}: its options are not those of a run of this program ({err})') from None
    found = checkpoint.differences(to_json(told), to_json(config), ignore=(*MAY_CHANGE, *free))
    if found:
        raise UserError(f'--resume={path}: the state was trained with other options ({"; ".join(found[:6])}); '
                        'give the same options, or start a new run from its weights with --transfer')
    return state, told


def latest_state(outdir, config, free=()):
    """(path, *load_state(path)) of the newest whole state under outdir with this Config, or (None, None, None)."""
    if not os.path.isdir(outdir):
        return None, None, None
    folders = [os.path.join(outdir, name) for name in os.listdir(outdir) if re.match(r'\d{5}(-|$)', name)]
    folders = [outdir, *sorted(filter(os.path.isdir, folders), reverse=True)]
    candidates = [path for folder in folders for path in checkpoint.states(folder)]
    for path in sorted(candidates, key=os.path.getmtime, reverse=True):
        try:
            return path, *load_state(path, config, free)
        except UserError as err:
            distributed.print0(f'--resume=latest passes over: {err.message}')
    return None, None, None
