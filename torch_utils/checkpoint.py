# SPDX-License-Identifier: Apache-2.0
"""State files: plain tensors and JSON types, written whole or not at all, opened without executing anything."""

import os
import re

import torch

from dnnlib import UserError
from dnnlib.files import replacing

KEYS = ('options', 'progress', 'net', 'ema', 'optimizer', 'objective')
PATTERN = re.compile(r'training-state-(\d+(?:\.\d+)?)\.pt')


def save(path, state):
    """Writes a state dict (keys as in KEYS) so that a crash at any moment leaves the old file or the new one."""
    with replacing(path) as part, open(part, 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())


def read_tensors(path, what, hint='', option=''):
    """What a file of torch.save holds, on the CPU, if that is tensors and plain values; nothing is executed.

    what, hint, option: for errors: what the file should be, what to do, and who named it, such as "--weights=". Raises UserError."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'{option}{path}: no such file') from None
    except Exception as err:  # a damaged file may raise almost anything, and what PyTorch says of it does not help
        reason = err.strerror if isinstance(err, OSError) and err.strerror else 'it holds more than tensors and plain values, or is damaged'
        raise UserError(f'{option}{path}: cannot be read as {what} ({reason}){hint}') from None


def load(path):
    """The state dict of a file, on the CPU. Raises UserError when it is none."""
    state = read_tensors(path, 'a training state', '; give a training-state-*.pt that this program wrote')
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f'{path}: not a training state (lacks {", ".join(missing)}); '
                        'give a training-state-*.pt that this program wrote')
    return state


def states(folder):
    """Paths of the state files in a run's folder, newest progress first."""
    found = [(float(match[1]), name) for name in os.listdir(folder) if (match := PATTERN.fullmatch(name))]
    return [os.path.join(folder, name) for _, name in sorted(found, reverse=True)]


def differences(old, new, ignore=(), prefix=''):
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
