# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its name, its files, and the lock that keeps it to one writer."""

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
from training.run.config import Config, to_json

OPTIONS, STATS, LOG = 'options.json', 'stats.jsonl', 'log.txt'
NUMBERED = re.compile(r'(\d{5})(?:-(.*))?')  # 00000-name, in --outdir
LOCK_WAIT_SEC = 5  # wait for the previous writer to end: a worker whose launcher has died ends after its step


class RunFolder:
    """stats.jsonl, options.json and file names of one run. Only rank 0 writes; a worker whose launcher has died does not."""

    def __init__(self, path: str | os.PathLike, fractional: bool) -> None:
        self.path, self.fractional = str(path), fractional
        self.log_bytes = 0  # size of stats.jsonl on the disk
        self._lines = []    # lines of stats.jsonl that could not be written yet

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def numbered(self, stem: str, kimg: float, ending: str = '') -> str:
        """"stem-000500.ending"; three decimals where the run's tick is fractional."""
        return self.file(f'{stem}-{kimg:010.3f}{ending}' if self.fractional else f'{stem}-{int(kimg):06d}{ending}')

    def write_options(self, config: Config) -> None:
        """options.json: the Config."""
        write_json(self.file(OPTIONS), to_json(config))

    def log(self, fields: dict) -> None:
        """Appends one line to stats.jsonl and syncs it to the disk. If that fails, the line is kept and written with the next one."""
        stop_if_orphan()
        self._lines.append(json.dumps(fields, allow_nan=False).encode() + b'\n')
        try:
            self.flush_log()
        except OSError as err:
            cannot_write(self.file(STATS), err, 'and these lines will be written with the next ones')

    def flush_log(self) -> None:
        """Writes the lines that failed attempts left, all or none. Raises OSError."""
        if not self._lines:
            return
        data = b''.join(self._lines)
        with open(self.file(STATS), 'ab', buffering=0) as f:  # a buffered file would write its rest when it is closed
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

    def rewind_log(self, log_bytes: int) -> None:
        """Drops the lines that were written after the state from which the run continues (0 bytes: all lines)."""
        path = self.file(STATS)
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, min(log_bytes, os.path.getsize(path)))  # a state may have been copied here without its log
        self.log_bytes = os.path.getsize(path) if os.path.exists(path) else 0


def cannot_write(path: str | os.PathLike, err: OSError, rest: str) -> None:
    """Warns that a file could not be written, and says what happens next; the training continues."""
    distributed.print0(f'Warning: {path} could not be written ({err.strerror or err}); the training continues, {rest}')


def stop_if_orphan() -> None:
    """Ends a worker whose launcher has died, before it writes anything into a folder that another run may own by now."""
    if distributed.is_orphan():
        raise SystemExit(f'{distributed.ORPHAN}: stopping without writing')


def note_end(folder: str, text: str, shown: bool = True) -> None:
    """Notes in log.txt why a run ended, from any rank and thread; shown: print it as well."""
    who = f'rank {distributed.rank()}: ' if distributed.rank() else ''
    if shown:
        print(f'{who}{text}', flush=True)
    path = os.path.join(folder, LOG)
    if distributed.rank() == 0 or os.path.exists(path):  # the folder of a refused run, with its log, may be removed already
        append_line(path, f'{who}{text.rstrip()}')


def create(outdir: str, name: str) -> str:
    """Creates the next numbered folder 00000-name under outdir; returns its path."""
    os.makedirs(outdir, exist_ok=True)
    taken = [int(path.name[:5]) for path in os.scandir(outdir) if NUMBERED.fullmatch(path.name)]
    number = max(taken, default=-1) + 1
    while True:  # another run may take the number in the meantime
        path = os.path.join(outdir, f'{number:05d}-{name}')
        try:
            os.mkdir(path)
            return path
        except FileExistsError:
            number += 1


def runs(outdir: str) -> list[str]:
    """Paths of the folders under outdir that may hold runs: itself, then the numbered ones, newest number first."""
    if not os.path.isdir(outdir):
        return []
    numbered = [os.path.join(outdir, name) for name in os.listdir(outdir) if NUMBERED.fullmatch(name)]
    return [outdir, *sorted(filter(os.path.isdir, numbered), reverse=True)]


def name_of(folder: str) -> str | None:
    """"name" of a folder 00000-name; None for other folders."""
    match = NUMBERED.fullmatch(os.path.basename(folder))
    return match and match[2]


def lock(folder: str) -> FolderLock:
    """Makes this process the only writer of a run's folder, and removes what killed writers left. Returns the FolderLock."""
    found = FolderLock(folder)
    owner = found.acquire(LOCK_WAIT_SEC)
    if owner:
        raise UserError(f'{folder} is in use by {owner}: wait for that run to end, stop it, or start a new run without --resume')
    if not found.known:
        print(f'Warning: the file system of {folder} does not support locks: make sure that no other process continues this run',
              flush=True)
    clear(folder)
    return found


def clear(folder: str) -> None:
    """Removes unfinished files and folders of killed writers; one that was about to be replaced gets its name back."""
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


def take_back(folder: str) -> None:
    """Removes the folder of a run that was refused before training began (when its data were read), so that it can be started again."""
    names = os.listdir(folder)
    if STATS in names or any(map(checkpoint.PATTERN.fullmatch, names)):
        return
    for name in names:
        if name in (OPTIONS, LOG) or name.startswith('events.out.tfevents'):
            os.unlink(os.path.join(folder, name))
    with contextlib.suppress(OSError):
        os.rmdir(folder)  # with --nosubdir it may hold other files
