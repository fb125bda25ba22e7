# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: how it is named, written to, and kept to one writer."""

import contextlib
import errno
import json
import os
import re
import shutil

from dnnlib import UserError
from dnnlib.files import write_json
from dnnlib.lock import FolderLock
from dnnlib.util import append_line
from torch_utils import checkpoint, distributed
from training.run.config import to_json

OPTIONS, STATS, LOG = 'options.json', 'stats.jsonl', 'log.txt'
NUMBERED = re.compile(r'(\d{5})(?:-(.*))?')  # 00000-name, in --outdir
LOCK_WAIT_SEC = 5  # for the last writer to end: a worker whose launcher has died does so after its step


class RunFolder:
    """stats.jsonl, options.json and file names of one run. Only rank 0 writes, and no worker whose launcher has died."""

    def __init__(self, path, fractional):
        self.path, self.fractional = str(path), fractional
        self.log_bytes = 0  # of stats.jsonl, on the disk
        self._lines = []    # of stats.jsonl, that could not be written yet

    def file(self, name):
        return os.path.join(self.path, name)

    def numbered(self, stem, kimg, ending=''):
        """"stem-000500.ending"; three decimals where the run's tick is fractional."""
        return self.file(f'{stem}-{kimg:010.3f}{ending}' if self.fractional else f'{stem}-{int(kimg):06d}{ending}')

    def write_options(self, config):
        """options.json: the Config."""
        write_json(self.file(OPTIONS), to_json(config))

    def log(self, fields):
        """Appends one line to stats.jsonl, on the disk before this returns. Where the disk takes none it is kept for the next time."""
        stop_if_orphan()
        self._lines.append(json.dumps(fields, allow_nan=False).encode() + b'\n')
        try:
            self.flush_log()
        except OSError as err:
            cannot_write(self.file(STATS), err, 'its lines are kept for the next time')

    def flush_log(self):
        """Writes the lines that are left of failed attempts; none of them in part. Raises OSError."""
        if not self._lines:
            return
        data = b''.join(self._lines)
        with open(self.file(STATS), 'ab', buffering=0) as f:  # a buffer would write what is left of it when it is closed
            try:
                if f.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(f.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    f.truncate(self.log_bytes)
                raise
        self.log_bytes += len(data)
        self._lines.clear()

    def rewind_log(self, log_bytes):
        """Drops the lines that were written after the state which the run continues from (all, where there is none: 0 bytes)."""
        path = self.file(STATS)
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, min(log_bytes, os.path.getsize(path)))  # a state may have come here without its log
        self.log_bytes = os.path.getsize(path) if os.path.exists(path) else 0


def cannot_write(path, err, rest):
    """Says that a file could not be written, and what comes of it; the training goes on."""
    distributed.print0(f'Warning: {path} could not be written ({err.strerror or err}); the training goes on, {rest}')


def stop_if_orphan():
    """Ends a worker whose launcher has died, before it writes anything into a folder that another run may own by now."""
    if distributed.is_orphan():
        raise SystemExit(f'{distributed.ORPHAN}: stopping without writing')


def note_end(folder, text, shown=True):
    """Why a run ended: a line of its log.txt, from any rank and thread; shown: on the console, too."""
    who = f'rank {distributed.rank()}: ' if distributed.rank() else ''
    if shown:
        print(f'{who}{text}', flush=True)
    path = os.path.join(folder, LOG)
    if distributed.rank() == 0 or os.path.exists(path):  # a run that was refused has no log, and no folder any more
        append_line(path, f'{who}{text.rstrip()}')


def create(outdir, name):
    """Makes the next numbered folder 00000-name under outdir; returns its path."""
    os.makedirs(outdir, exist_ok=True)
    taken = [int(path.name[:5]) for path in os.scandir(outdir) if NUMBERED.fullmatch(path.name)]
    number = max(taken, default=-1) + 1
    while True:  # another run may take the number between the look and the making
        path = os.path.join(outdir, f'{number:05d}-{name}')
        try:
            os.mkdir(path)
            return path
        except FileExistsError:
            number += 1


def runs(outdir):
    """Paths of the folders under outdir that may hold runs: itself, then the numbered ones, newest number first."""
    if not os.path.isdir(outdir):
        return []
    numbered = [os.path.join(outdir, name) for name in os.listdir(outdir) if NUMBERED.fullmatch(name)]
    return [outdir, *sorted(filter(os.path.isdir, numbered), reverse=True)]


def name_of(folder):
    """"name" of a folder 00000-name; None of others."""
    match = NUMBERED.fullmatch(os.path.basename(folder))
    return match and match[2]


def lock(folder):
    """Makes this process the one writer of a run's folder, and clears it of what killed writers left. Returns the FolderLock."""
    found = FolderLock(folder)
    owner = found.acquire(LOCK_WAIT_SEC)
    if owner:
        raise UserError(f'{folder} is being written by {owner}: wait for that run to end or stop it, or start another one '
                        'without --resume')
    if not found.known:
        print(f'Warning: the file system of {folder} has no locks: make sure that no other process continues this run', flush=True)
    clear(folder)
    return found


def clear(folder):
    """Removes unfinished files and folders of writers that were killed; one that was about to be replaced gets its name back."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if match := re.fullmatch(r'\.(.+)-(part|old)-[0-9a-f]{8}', name):
            whole = os.path.join(folder, match[1])
            if match[2] == 'old' and not os.path.lexists(whole):
                os.rename(path, whole)
            else:
                shutil.rmtree(path, ignore_errors=True)
        elif re.fullmatch(r'\..+\.\d+', name) and os.path.isfile(path):
            os.unlink(path)


def take_back(folder):
    """Removes the folder of a run that was refused before it began (its data are read only then), so that it can be started again."""
    names = os.listdir(folder)
    if STATS in names or any(map(checkpoint.PATTERN.fullmatch, names)):
        return
    for name in names:
        if name in (OPTIONS, LOG) or name.startswith('events.out.tfevents'):
            os.unlink(os.path.join(folder, name))
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # with --nosubdir other things may lie in it
