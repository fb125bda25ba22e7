# SPDX-License-Identifier: Apache-2.0
"""What is printed at the end of a run: the last snapshot, the held-out loss, and the next command."""

import contextlib
import json
import os
import shlex
from pathlib import Path

from training.checkpoints.load import CONFIG
from training.run.config import Config
from training.run.folder import STATS
from training.run.regimes import next_steps

TAIL = 2 ** 20  # bytes at the end of the log that are searched for the last held-out loss


def closing_lines(run_dir: str | os.PathLike, duration: str, config: Config | None = None) -> list[str]:
    """Lines for the console. duration: of the whole run, as text. config: of the run; None: nothing is said of its regime."""
    snapshots = sorted(path for path in Path(run_dir).glob('network-snapshot-*') if path.is_dir())
    lines = [f'Done: {run_dir} (trained for {duration})']
    loss = last_held_out(os.path.join(run_dir, STATS))
    if loss is not None:
        lines.append(f'Held-out loss of the weight average: {loss}')
    if snapshots:
        network = shlex.quote(os.path.relpath(snapshots[-1]))
        prompt = ' --prompt="a caption"' if takes_captions(snapshots[-1]) else ''
        lines += [f'Last snapshot: {network}', 'To generate 64 images with it, and one picture of them:',
                  f'  python generate.py --network={network} --outdir=out --grid{prompt}']
        lines += next_steps(config, network) if config else []
    return lines


def takes_captions(snapshot: Path) -> bool:
    """Whether the labels of a snapshot's network are captions."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return bool(json.loads((snapshot / CONFIG).read_text(encoding='utf-8')).get('text'))
    return False


def last_held_out(path: str | os.PathLike) -> str | None:
    """"clean 0.123, noisy 0.456" of the last validation in stats.jsonl; None where there was none."""
    if not os.path.exists(path):
        return None
    with open(path, 'rb') as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL))
        lines = f.read().splitlines()
    for line in reversed(lines):
        if b'"Val/' in line:
            fields = json.loads(line)
            found = [(name, fields.get(f'Val/{name}')) for name in ('clean', 'noisy')]
            return ', '.join(f'{name} {value:.5g}' for name, value in found if value is not None) or None
    return None
