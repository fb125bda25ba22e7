# SPDX-License-Identifier: Apache-2.0
"""Files and folders written whole or not at all, JSON, digests, and where results go."""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

from dnnlib.util import UserError, one_line

# ----------------------------------------------------------------------------------------------------
# Whole or not at all: unfinished files and folders have names that begin with a dot


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """A temporary path beside `path`, renamed to it when the block ends without an error, and removed otherwise."""
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f'.{name}.{os.getpid()}')
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


@contextlib.contextmanager
def new_folder(dest: str | os.PathLike, over: str = 'nothing') -> Iterator[str]:
    """A temporary folder beside `dest`, renamed to it when the block ends without an error, and removed otherwise.

    over: what may exist at `dest`: "nothing", "empty" (nothing, or a folder without files) or "anything", which is then replaced."""
    dest = os.path.abspath(dest)
    if over == 'nothing' and os.path.lexists(dest):
        raise UserError(f'{dest} exists; choose a new name')
    parent, name = os.path.split(dest)
    part, old = (os.path.join(parent, f'.{name}-{kind}-{uuid.uuid4().hex[:8]}') for kind in ('part', 'old'))
    os.makedirs(part)
    try:
        yield part
        if over == 'anything' and os.path.lexists(dest):
            os.rename(dest, old)
        os.rename(part, dest)  # also in place of an empty folder
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if os.path.lexists(old):
            os.rename(old, dest)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------
# JSON

MAX_JSON = 2 ** 31  # bytes; classes, levels and limits of 15 million images take 1.6e9
TOO_LARGE = f'{{}}: larger than the limit of {MAX_JSON} bytes for JSON'



def write_json(path: str | os.PathLike, value: Any, null: bool = False) -> None:
    """Writes a JSON file. null: whether nan and infinity become null; otherwise they raise ValueError."""
    with replacing(path) as part, open(part, 'w', encoding='utf-8') as f:
        json.dump(finite(value) if null else value, f, indent=2, allow_nan=False)
        f.write('\n')


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file. Raises UserError, in one line, where it holds anything else."""
    return _object(read_value(path), path)


def read_value(path: str | os.PathLike, name: str | None = None) -> Any:
    """The value in a JSON file, of any type; `name`: its name in errors. Raises UserError."""
    name = name or path
    try:
        with open(path, 'rb') as f:
            if os.fstat(f.fileno()).st_size > MAX_JSON:
                raise UserError(TOO_LARGE.format(name))
            return json_value(f.read(), name)
    except OSError as err:
        raise UserError(f'{name}: {err.strerror or err}') from None


def json_object(data: str | bytes, name: str | os.PathLike) -> dict:
    """The object in JSON text or bytes; `name`: their name in errors."""
    return _object(json_value(data, name), name)


def json_value(data: str | bytes, name: str | os.PathLike) -> Any:
    """The value in JSON text or bytes from any source. Raises UserError, in one line."""
    if len(data) > MAX_JSON:
        raise UserError(TOO_LARGE.format(name))
    try:
        return json.loads(data)
    except RecursionError:
        raise UserError(f'{name}: cannot be read as JSON: its lists or objects are nested too deeply') from None
    except MemoryError:
        raise UserError(f'{name}: its {len(data)} bytes of JSON need more memory than is available') from None
    except ValueError as err:
        raise UserError(f'{name}: not a JSON file: {one_line(err)}') from None


def _object(value, name):
    if not isinstance(value, dict):
        raise UserError(f'{name}: expected a JSON object, got {type(value).__name__}')
    return value


def finite(value: Any) -> Any:
    """A value of JSON types with None in place of nan and infinity, which JSON cannot represent."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ----------------------------------------------------------------------------------------------------
# Where results go, and digests of files


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256, hexadecimal, of a file, or of all files of a folder: of their sorted names, each followed by a zero byte and the
    32 bytes of its own SHA-256. Hidden files, such as unfinished ones, and __MACOSX do not count; neither do times or the path."""
    if not os.path.isdir(path):
        return _hashed(path).hexdigest()
    names, digest = _visible_files(path), hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(lambda name: _hashed(os.path.join(path, name)), names)):
            digest.update(os.fsencode(name) + b'\0' + found.digest())
    return digest.hexdigest()


def _hashed(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest


def _visible_files(folder):
    """Relative names of the files in a folder and its sub-folders, sorted, without hidden files and those in hidden folders."""
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith('.') and name != '__MACOSX']
        inside = os.path.relpath(parent, folder)
        names += [name if inside == '.' else f'{inside}/{name}' for name in files if not name.startswith('.')]
    return sorted(names)


def beside(ref: str | os.PathLike, suffix: str) -> str:
    """A path for output that belongs to `ref`: beside a local file or folder; in the working folder for a name of the Hub."""
    return (os.path.abspath(ref) if os.path.exists(ref) else ref.replace('/', '--')) + suffix


def check_writable(folder: str | os.PathLike) -> None:
    """Creates the folder; raises OSError if no file can be created in it."""
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def prepare_output(path: str | os.PathLike, option: str, suffix: str = '') -> None:
    """Creates the folder of an output file, and refuses a path that cannot be written, before hours of work are spent on it."""
    if os.path.isdir(path) or not path.endswith(suffix):
        found, ending = 'is a folder, ' if os.path.isdir(path) else '', suffix and f' that ends in {suffix}'
        raise UserError(f'{option}={path}: {found}expected the name of a file{ending}')
    folder = os.path.dirname(os.path.abspath(path))
    try:
        check_writable(folder)
    except OSError as err:
        raise UserError(f'{option}={path}: the folder {folder} is not writable ({err.strerror})') from None
