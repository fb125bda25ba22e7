# SPDX-License-Identifier: Apache-2.0
"""State files: plain tensors and JSON types, written whole or not at all, and checked and read without executing anything."""

import errno
import os
import re
from collections.abc import Collection
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.files import replacing
from torch_utils import tensor_file

KEYS = ('options', 'progress', 'net', 'ema', 'optimizer', 'objective')  # and "stats" in states saved within a tick
PATTERN = re.compile(r'training-state-(\d+(?:\.\d+)?)\.pt')
WRITTEN = 'give a training-state-*.pt that this program wrote'


def save(path: str | os.PathLike, state: dict) -> None:
    """Writes a state dict (keys as in KEYS) so that a crash at any moment leaves the old file or the new one, flushed to the disk.

    Raises OSError, for example if the disk is full."""
    with replacing(path) as part, open(part, 'wb') as f:
        try:
            torch.save(state, f)
        except RuntimeError as err:  # PyTorch's writer hides the error of the file system
            raise _cause(err) from None
        f.flush()
        os.fsync(f.fileno())
    _sync_folder(os.path.dirname(os.path.abspath(path)))


def _cause(err):
    """The OSError behind an error of PyTorch's writer."""
    found = err
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or OSError(errno.EIO, str(err).splitlines()[0])


def _sync_folder(path):
    """Flushes the new name to the disk as well (not every file system lets a folder be flushed)."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        pass
    finally:
        os.close(folder)


def read_tensors(path: str | os.PathLike, what: str, hint: str = '', option: str = '') -> Any:
    """The content of a torch.save file of tensors and plain values, on the CPU; nothing is executed.

    Uses PyTorch's own reader, for other programs' files in any of its formats. what, hint, option: for errors: what the file should be,
    what to do, and the option that names it, such as "--weights=". Raises UserError."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{option}{path}: no such file') from None
    except Exception as err:  # a damaged file may raise almost anything, with unhelpful messages
        reason = err.strerror if isinstance(err, OSError) and err.strerror else 'it holds more than tensors and plain values, or is damaged'
        raise UserError(f'{option}{path}: cannot be read as {what} ({reason}){hint}') from None


def load(path: str | os.PathLike, checksums: bool = True) -> dict:
    """The state dict of a file, its tensors mapped from the file: clone those that must outlive it.

    checksums: whether to verify the CRC-32 of the tensors; without that, almost nothing is read. Raises UserError if the file is not a
    complete state."""
    state = tensor_file.read(path, 'a training state', f'; {WRITTEN}', mapped=True, checksums=checksums)
    missing = [key for key in KEYS if not isinstance(state, dict) or not isinstance(state.get(key), dict)]
    if missing:
        raise UserError(f'{path}: not a training state (lacks {", ".join(missing)}); {WRITTEN}')
    return state


def peek(path: str | os.PathLike) -> dict:
    """load() without checksums, to look at small values such as state['progress']."""
    return load(path, checksums=False)


def states(folder: str | os.PathLike) -> list[str]:
    """Paths of the state files in a run's folder, largest number in the name first."""
    found = [(float(match[1]), name) for name in os.listdir(folder) if (match := PATTERN.fullmatch(name))]
    return [os.path.join(folder, name) for _, name in sorted(found, reverse=True)]


def nimg(path: str | os.PathLike) -> int:
    """The progress stored in a state file, in images. Raises UserError."""
    found = peek(path)['progress'].get('nimg')
    if not isinstance(found, int) or found < 0:
        raise UserError(f'{path}: not a training state (its progress has no number of images); {WRITTEN}')
    return found


def differences(old: dict, new: dict, ignore: Collection[str] = (), prefix: str = '') -> list[str]:
    """One "key: old -> new" string for each leaf in which two nested dicts of JSON types differ, except keys named in `ignore`."""
    found = []
    for key in sorted(set(old) | set(new)):
        name = f'{prefix}{key}'
        if name in ignore:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, ignore, f'{name}.')
        elif a != b:
            found.append(f'{name}: {a} -> {b}')
    return found
