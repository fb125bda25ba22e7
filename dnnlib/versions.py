# SPDX-License-Identifier: Apache-2.0
"""Versions of the program, its commit, Python, torch and CUDA, found without importing torch, which takes seconds."""

import functools
import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path

VERSION = '0.2.0'


def versions() -> dict[str, str]:
    """{name: version} of the program and of what its results depend on."""
    torch, cuda = torch_versions()
    return dict(version=VERSION, commit=git_commit(), python=platform.python_version(), torch=torch, cuda=cuda or 'none')


@functools.cache
def torch_versions() -> tuple[str, str | None]:
    """(version of torch, version of CUDA that it was built for or None), from its file version.py."""
    spec = importlib.util.find_spec('torch')  # for a top-level package this imports nothing
    if spec is None:
        return 'none', None
    path = Path(spec.origin).with_name('version.py')
    if not path.exists():
        return importlib.metadata.version('torch'), None
    version = importlib.util.spec_from_file_location('torch_version', path)
    module = importlib.util.module_from_spec(version)
    version.loader.exec_module(module)
    return str(module.__version__), module.cuda


def git_commit() -> str:
    """The short commit of this checkout, with "+" where files differ from it, or "unknown" outside a checkout."""
    here = Path(__file__).resolve().parent.parent
    try:
        run = lambda *cmd: subprocess.run(cmd, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        if Path(run('git', 'rev-parse', '--show-toplevel')).resolve() != here:
            return 'unknown'
        dirty = run('git', 'status', '--porcelain', '--untracked-files=no')
        return run('git', 'rev-parse', '--short=12', 'HEAD') + ('+' if dirty else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
