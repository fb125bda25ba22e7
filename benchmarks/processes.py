# SPDX-License-Identifier: Apache-2.0
"""Commands of the program in a process of their own, for benchmarks that train and evaluate small networks."""

import json
import os
import subprocess
import sys
from pathlib import Path

from dnnlib import UserError

ROOT = Path(__file__).resolve().parent.parent
SMALL = 'benchmarks.small_detector.SmallClassifier'  # a detector of small photographs, which benchmarks/price.py trains
TOGETHER = f"""
import importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
for script, arguments in json.loads(sys.argv[1]):
    importlib.import_module(script).main(arguments, script, standalone_mode=False)
"""


def call(*commands: tuple[str, list[str]], device: str | None = None, show: bool = False) -> str:
    """Runs (script, arguments) one after another in a process of their own, on this GPU if one is named; returns what they printed.

    Relative paths are those of this process. show: whether they print to the console instead. Raises UserError with the last line of a
    command that fails."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **({'CUDA_VISIBLE_DEVICES': device} if device else {})}
    done = subprocess.run([sys.executable, '-c', TOGETHER, json.dumps(commands)], env=environment, capture_output=not show, text=True)
    if done.returncode:
        lines = ((done.stderr or '').strip() or (done.stdout or '').strip()).splitlines() or ['see above' if show else 'no message']
        names = ', '.join(f'{script}.py {" ".join(arguments)}' for script, arguments in commands)
        raise UserError(f'{names}: ended with code {done.returncode}: {lines[-1]}')
    return done.stdout or ''


def snapshot(folder: str | os.PathLike) -> str | None:
    """The last network snapshot of a run, which a finished run has."""
    return max(map(str, Path(folder).glob('network-snapshot-*')), default=None)
