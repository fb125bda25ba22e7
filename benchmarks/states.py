# SPDX-License-Identifier: Apache-2.0
"""How long training stops while a state is saved, compared with the copy to host memory and with the whole write.

python benchmarks/states.py [--cbase=128] [--folder=DIR]"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support import tiny  # noqa: E402 (the folder above had to be found first)
from torch_utils import checkpoint, distributed  # noqa: E402
from training.run.folder import RunFolder  # noqa: E402
from training.run.states import on_host  # noqa: E402
from training.run.training_loop import Run  # noqa: E402


def timed(function):
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--cbase', type=int, default=128, help='width of the ddpmpp network')
    parser.add_argument('--folder', help='folder for the states; default: the folder for temporary files')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        flags = [f'--cbase={args.cbase}', '--cres=2,2,2', '--blocks=4', '--batch=2']
        run = Run(tiny.options(place, *flags), RunFolder(place, fractional=True), distributed.device())
        for _ in range(3):
            run.step()
        run.save_state()
        run.finish_states()
        gib = Path(checkpoint.states(place)[0]).stat().st_size / 2 ** 30
        for _ in range(3):
            alone = [timed(run.step) for _ in range(8)]
            copy = timed(lambda: on_host(run.state()))
            start = time.perf_counter()
            stop = timed(run.save_state)
            beside = []
            while run.states.busy:
                beside.append(timed(run.step))
            run.finish_states()
            written = time.perf_counter() - start
            print(f'{gib:.2f} GiB: copy {copy:.3f} s, training stopped for {stop:.3f} s, written after {written:.3f} s; '
                  f'a step takes {statistics.median(alone):.3f} s, {statistics.median(beside):.3f} s beside the write')


if __name__ == '__main__':
    main()
