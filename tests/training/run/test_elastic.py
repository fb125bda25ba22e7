# SPDX-License-Identifier: Apache-2.0
"""A run goes on with another number of ranks: the same images, levels and noise, and the same losses to rounding."""

import pytest

from tests.support import tiny
from torch_utils import checkpoint

EVERYTHING = ['--augment=0.5', '--dropout=0.3', '--xflip=1', '--cond=1', '--label-dropout=0.2', '--cep=gaussian', '--val=0.2',
              '--consistency=bridge:batch_size=8,steps=2', '--threads=1', '--seed=5', '--expr-id=x', '--tick=0.064', '--snap=1', '--dump=0',
              '--resume=latest']

# train.py, which prints what each row of each step is trained on.
TELLING = """
import hashlib, os, train
from torch_utils import distributed
from training.run.step import TrainStep
forward = TrainStep.forward
def told(self, batch, randn, *rest):
    sha = lambda row: hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16]
    for i in range(len(batch.images)):
        row = randn.first_row + i
        line = f'row {randn.step} {row} {int(batch.raw_idx[i])} {float(batch.sigma[i]).hex()} {sha(batch.noise[i])}\\n'
        os.write(1, line.encode())  # whole, whatever other ranks write
    return forward(self, batch, randn, *rest)
TrainStep.forward = told
train.main()
"""


def rows(output):
    """{(step, row of the global batch): (image, sigma, digest of the noise)}."""
    found = [line.split()[1:] for line in output.splitlines() if line.startswith('row ')]
    return {(int(step), int(row)): rest for step, row, *rest in found}


def losses(folder):
    """[{name: value}] of the ticks and of the held-out losses."""
    names = ('Loss/', 'Val/', 'Grad/norm')
    return [{name: value for name, value in line.items() if name.startswith(names)} for line in tiny.read_log(folder)]


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    """(data, rows, losses) of 14 steps on one rank."""
    folder = tmp_path_factory.mktemp('straight')
    data, script = tiny.make_zip(folder / 'data.zip'), folder / 'telling.py'
    script.write_text(TELLING)
    args = [f'--outdir={folder / "runs"}', f'--data={data}', *tiny.FLAGS, *EVERYTHING, '--duration=0.000224']
    output = tiny.finish(args, folder / 'log', script=script)
    return folder, rows(output), losses(tiny.only_folder(folder / 'runs'))


@pytest.mark.parametrize('ranks', [pytest.param((2, 1, 4), marks=pytest.mark.slow), (1, 2)])
def test_another_number_of_ranks_goes_on_alike(tmp_path, straight, ranks):
    """Stopped in the middle of ticks, whose sums are carried on."""
    folder, expected_rows, expected = straight
    ends, seen = [5, 10, 14][-len(ranks):], {}
    for count, end in zip(ranks, ends):
        args = [f'--outdir={tmp_path / "runs"}', f'--data={folder / "data.zip"}', *tiny.FLAGS, *EVERYTHING]
        # A state at each step; the run is taken for dead after the last one that is wanted.
        output = tiny.finish([*args, f'--duration={end * 16 / 1e6}', '--dump-minutes=1e-9', '--keep-states=0'], tmp_path / 'log', count,
                             folder / 'telling.py')
        seen |= rows(output)
        run = tiny.only_folder(tmp_path / 'runs')
        if end < 14:
            for path in checkpoint.states(run):
                if checkpoint.nimg(path) != (end - 1) * 16:
                    tiny.Path(path).unlink()
    assert seen == expected_rows and len(seen) == 14 * 16
    found = losses(run)
    assert [sorted(line) for line in found] == [sorted(line) for line in expected] and len(found) == 8
    for mine, theirs in zip(found, expected):
        for name, value in mine.items():
            assert value == (theirs[name] if value is None else pytest.approx(theirs[name], rel=1e-5, abs=1e-6)), name
