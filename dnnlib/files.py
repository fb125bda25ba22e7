# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all, and their digests."""

import contextlib
import hashlib
import os
import shutil
import uuid

from dnnlib.util import UserError


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`, which takes its place when the block ends well and is removed when it does not."""
    folder, name = os.path.split(os.path.abspath(path))
    part = os.path.join(folder, f'.{name}.{os.getpid()}')
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def file_digest(path):
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(dest):
    """A folder to fill, which becomes `dest` when the block ends well and is removed when it does not. Refuses a dest that exists."""
    dest = os.path.abspath(dest)
    if os.path.lexists(dest):
        raise UserError(f'{dest} exists; choose a new name')
    parent, name = os.path.split(dest)
    part = os.path.join(parent, f'.{name}-part-{uuid.uuid4().hex[:8]}')
    os.makedirs(part)
    try:
        yield part
        os.rename(part, dest)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
