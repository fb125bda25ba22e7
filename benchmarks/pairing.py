# SPDX-License-Identifier: Apache-2.0
"""How many network evaluations --pairing=skip needs to reach the held-out loss that --pairing=clamp reaches.

python benchmarks/pairing.py --out=runs/pairing

clamp evaluates the network on every pair (image, sigma), also where sigma <= sigma_n and the gradient is exactly zero. Its batch is larger
here, so that as many of its pairs have a gradient as of the batch of skip, on average; learning rate, ramp-up and weight average are then
the same functions of the optimizer's steps. A third arm is skip with the batch of clamp. Every run is one train.py on scikit-learn's
digits; a finished one is not trained again."""

import json
import math
import os
import statistics
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.price import SCALES  # noqa: E402 (the folder above had to be found first)
from benchmarks.processes import call  # noqa: E402
from dnnlib.files import write_json  # noqa: E402
from dnnlib.versions import versions  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402

SCALE, BATCH, RAMPUP, EMA = SCALES['digits'], 64, 0.004, 0.008  # the last two in million images, with this batch
NOISE = statistics.NormalDist(-1.2, 1.2)  # of ln(sigma), as EDM trains
POINTS, HELD_OUT = 10, 300  # held-out losses of a run; images that they are of
PARTS = (0.3, 0.6, 1.0)  # the losses to reach are those of clamp after these parts of its training
ARMS = ('clamp', 'skip', 'skip, larger batch')


def useful(sigma: float, probability: float) -> float:
    """Share of the pairs that have a gradient: those of clean images, and of noisy ones with a level above sigma."""
    return 1 - probability * NOISE.cdf(math.log(sigma))


def batch_of(arm: str, sigma: float, probability: float) -> int:
    """Pairs of a batch: BATCH that have a gradient, on average."""
    return BATCH if arm == 'skip' else round(BATCH / useful(sigma, probability))


def make_data(out: Path) -> None:
    """Writes the training half of the digits and the held-out half."""
    for name, part in (('train', SCALE.train), ('held-out', f'--part=1/2 --max-images={HELD_OUT} --sample=spread')):
        if not (out / f'{name}.zip').exists():
            call(('dataset_tool', ['--source=digits', f'--dest={out / name}.zip', '--sheet=none', *part.split()]))


def train(out: Path, arm: str, seed: int, sigma: float, probability: float, kimg: float) -> list[tuple[int, float, float]]:
    """[(network evaluations, held-out loss of clean images, of noisy ones)] along one run. kimg: thousand evaluations of each run."""
    batch, folder = batch_of(arm, sigma, probability), out / 'runs' / f'{arm.replace(", ", "-").replace(" ", "-")}-{sigma:g}-s{seed}'
    if not (folder / 'done').exists():
        call(('train', [f'--data={out / "train.zip"}', f'--val={out / "held-out.zip"}', f'--outdir={folder}', '--nosubdir',
                        *SCALE.network.split(), f'--pairing={arm.split(",")[0]}', f'--sigma={sigma}',
                        f'--corruption-probability={probability}', f'--corruption-seed={seed}', f'--seed={seed}', f'--batch={batch}',
                        f'--lr-rampup={RAMPUP * batch / BATCH:.9g}', f'--ema={EMA * batch / BATCH:.9g}', f'--duration={kimg / 1e3:.9g}',
                        f'--tick={kimg / POINTS:.9g}', '--snap=1', '--dump=0', '--samples=0', '--threads=1']))
        (folder / 'done').touch()
    lines = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
    return [(line['nimg'], line['Val/clean'], line['Val/noisy']) for line in lines if 'Val/clean' in line]


def reached(curve: list[tuple[float, float]], loss: float) -> float:
    """Evaluations after which a curve [(evaluations, loss)] is first at or below this loss; nan where it never is. Between two points the
    loss is taken to fall evenly in the logarithm of the evaluations, and before the first one nothing is known."""
    for (before, high), (after, low) in zip([(1, math.inf), *curve], curve):
        if low <= loss:
            return after if math.isinf(high) else before * (after / before) ** ((high - loss) / (high - low))
    return math.nan


def ratios(clamp: list[tuple], other: list[tuple], part: float) -> list[float]:
    """Evaluations of the other run over those of clamp, to the losses of clean and of noisy images that clamp first reaches after this
    part of its training."""
    found = []
    for column in (1, 2):
        curve, theirs = ([(row[0], row[column]) for row in rows] for rows in (clamp, other))
        loss = min(value for count, value in curve if count <= part * curve[-1][0] * 1.0001)
        found.append(reached(theirs, loss) / reached(curve, loss))
    return found


def table(runs: dict[str, list[list[tuple]]], sigma: float, probability: float) -> list[str]:
    """Lines of Markdown: mean and range over the seeds. runs: {arm: the curve of each seed}."""
    lines = ['| arm | batch | clean, ' + ' | clean, '.join(f'{part:.0%}' for part in PARTS) + ' | noisy, ' +
             ' | noisy, '.join(f'{part:.0%}' for part in PARTS) + ' |', '| --- ' * (2 + 2 * len(PARTS)) + '|']
    for arm in ARMS[1:]:
        pairs = [list(zip(*(ratios(clamp, other, part) for clamp, other in zip(runs['clamp'], runs[arm])))) for part in PARTS]
        cells = [told(pair[column]) for column in (0, 1) for pair in pairs]
        lines.append(f'| {arm} | {batch_of(arm, sigma, probability)} | {" | ".join(cells)} |')
    return lines


def told(values: tuple[float, ...]) -> str:
    """Mean and range; in how many cases the loss was not reached."""
    found = [value for value in values if not math.isnan(value)]
    if len(found) < len(values):
        return f'not reached by {len(values) - len(found)} of {len(values)}'
    return f'{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})'


@click.command(cls=Command)
@click.option('--out', metavar='DIR', required=True, help='Folder of data, runs and results.json; what is there is not made again')
@click.option('--sigma', metavar='FLOAT', type=float, default=0.2, show_default=True, help='Noise level of the noisy images')
@click.option('--probability', metavar='FLOAT', type=float, default=0.9, show_default=True, help='Share of noisy images')
@click.option('--seeds', metavar='INT', type=int, default=3, show_default=True, help='How many seeds, from 0')
@click.option('--kimg', metavar='FLOAT', type=float, default=40.0, show_default=True, help='Thousand network evaluations of each run')
@version_option
def main(out: str, sigma: float, probability: float, seeds: int, kimg: float) -> None:
    """Train all arms, and print how many evaluations they need, as a share of those of clamp."""
    out = Path(os.path.abspath(out))
    out.mkdir(parents=True, exist_ok=True)
    make_data(out)
    runs = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            runs[arm].append(train(out, arm, seed, sigma, probability, kimg))
            print(f'seed {seed}, {arm}: ' + ', '.join(f'{value:.5g}' for value in runs[arm][-1][-1]), flush=True)
    print(f'\nsigma {sigma:g}, {probability:.0%} noisy: {useful(sigma, probability):.1%} of the pairs of clamp have a gradient; batch '
          f'{batch_of("clamp", sigma, probability)}, {kimg:g} thousand evaluations. Evaluations to the held-out loss of clamp after a part '
          'of them, as a share of those of clamp:\n')
    print('\n'.join(table(runs, sigma, probability)))
    write_json(out / 'results.json', {'sigma': sigma, 'probability': probability, 'kimg': kimg, 'useful': useful(sigma, probability),
                                      'curves': runs, 'versions': versions(), 'command': sys.argv[1:]})


if __name__ == '__main__':
    main()
