# SPDX-License-Identifier: Apache-2.0
"""Distillation of noisy-only teachers against sampling them: the same teachers, the same count of samples, the same reference.

python benchmarks/distillation.py --grid=runs/price-digits --out=runs/distill-digits

--grid is a folder of benchmarks/price.py with its cells noisy-SIGMA-sSEED (teachers, and their distances by full and by truncated sampling)
and clean-sSEED. Each arm of each seed is one train.py in a folder of its own; a finished one is not trained again, and one that was
interrupted continues. The table is printed after each, and written to results.json (docs/distillation.md)."""

import os
import shutil
import statistics
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.processes import SMALL, call, snapshot  # noqa: E402 (the checkout need not be installed)
from dnnlib import UserError  # noqa: E402
from dnnlib.files import read_json, write_json  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402

TRAIN = '--batch=64 --optimizer=adam:beta1=0 --lr=1.5e-3 --lr-schedule=cosine --lr-rampup=0.002 --ema=0.004'


def network_of(folder: str | os.PathLike) -> str:
    """The last network snapshot of a run. Raises UserError where there is none."""
    found = snapshot(folder)
    if found is None:
        raise UserError(f'{folder}: holds no network snapshot')
    return found


def arm_name(spec: str) -> str:
    """The folder of an arm: its --distill without the teacher, in letters of file names."""
    return spec.replace(':', '-').replace(',', '-').replace('=', '')


def train(teacher: str, folder: str, spec: str, options: list[str], seed: int, kimg: float) -> None:
    """One distillation, with the data and the noise of the teacher's run; continues where it was interrupted."""
    if snapshot(folder):
        return
    made = read_json(os.path.join(teacher, 'options.json'))
    noise = made['corruption']
    spec = f'{spec}{"," if ":" in spec else ":"}teacher={network_of(teacher)}'
    call(('train', [f'--outdir={folder}', '--nosubdir', '--resume=latest', f'--data={made["data"]["path"]}', f'--sigma={noise["sigma"]}',
                    f'--corruption-probability={noise["probability"]}', f'--corruption-seed={noise["seed"]}', f'--distill={spec}',
                    f'--seed={seed}', f'--duration={kimg / 1e3:.9g}', f'--tick={kimg / 8:.9g}', '--snap=1000000', '--dump=4',
                    '--keep-states=1', '--samples=100', '--threads=1', *options]))


def measure(grid: str, folder: str, count: int) -> dict:
    """{detector: fid_score} of one-step samples, for the reference statistics that the grid has."""
    detectors = [name for name in ('pixels', 'small') if os.path.exists(os.path.join(grid, f'reference-{name}.npz'))]
    results = {name: os.path.join(folder, f'{name}.fid.json') for name in detectors}
    if not all(map(os.path.exists, results.values())):
        samples = os.path.join(folder, 'generated')
        shutil.rmtree(samples, ignore_errors=True)
        kinds = {'pixels': 'pixels', 'small': f'module:name={SMALL},weights={os.path.join(grid, "small.safetensors")}'}
        call(('generate', [f'--network={network_of(folder)}', f'--outdir={samples}', f'--seeds=0-{count - 1}', '--threads=1']),
             *(('eval_fid', [f'--gen-path={samples}', f'--ref-stats={os.path.join(grid, f"reference-{name}.npz")}', f'--num={count}',
                             '--metrics=fid', f'--detector={kinds[name]}', f'--out-path={path}']) for name, path in results.items()))
        shutil.rmtree(samples)
    return {name: read_json(path)['fid_score'] for name, path in results.items()}


def cell(grid: str, name: str) -> dict | None:
    """The contents of a finished cell of the grid."""
    path = os.path.join(grid, 'runs', name, 'cell.json')
    return read_json(path) if os.path.exists(path) else None


def paired(found: dict, detector: str, arm: str, base: str) -> tuple[float, float, int]:
    """(mean, standard error, pairs) of arm - base over the seeds that have both."""
    gaps = [row[arm][detector] - row[base][detector] for row in found.values() if arm in row and base in row]
    spread = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float('nan')
    return statistics.mean(gaps), spread, len(gaps)


def table(found: dict, arms: list[str]) -> str:
    """Markdown: distance of each arm and seed, its ratio to all clean, and its paired difference from sampling the teacher."""
    lines = []
    for detector in next(iter(found.values()))['full']:
        rows = ['clean', 'full', 'truncated', *arms]
        mean = {arm: statistics.mean(row[arm][detector] for row in found.values() if arm in row)
                for arm in rows if any(arm in row for row in found.values())}
        lines += [f'| {detector} | {" | ".join(f"seed {seed}" for seed in found)} | mean | / all clean | - full | - truncated |',
                  '|-|' + '-|' * (len(found) + 4)]
        for arm in mean:
            cells = [f'{row[arm][detector]:.3f}' if arm in row else '' for row in found.values()]
            ratio = f'{mean[arm] / mean["clean"]:.2f}' if 'clean' in mean else ''
            gaps = ['{:+.3f} +- {:.3f}'.format(*paired(found, detector, arm, base)) if arm in arms else ''
                    for base in ('full', 'truncated')]
            lines.append(f'| {arm} | {" | ".join(cells)} | {mean[arm]:.3f} | {ratio} | {" | ".join(gaps)} |')
        lines.append('')
    return '\n'.join(lines)


@click.command(cls=Command)
@click.option('--grid', metavar='DIR', required=True, help='Folder of benchmarks/price.py with finished noisy-only cells')
@click.option('--out', metavar='DIR', required=True, help='Folder of the distillations and of results.json')
@click.option('--sigma', metavar='FLOAT', default=0.4, show_default=True, help='Noise level of the teachers\' data')
@click.option('--seeds', metavar='INT', default=3, show_default=True, help='How many seeds, from 0')
@click.option('--arm', 'specs', metavar='NAME[:k=v]', multiple=True, default=['rsd:sigma_max=5'], show_default=True,
              help='A --distill without its teacher; may be repeated')
@click.option('--kimg', metavar='FLOAT', default=48.0, show_default=True, help='Length of each distillation in thousand images')
@click.option('--options', metavar='TEXT', default=TRAIN, show_default=True, help='Further options of train.py')
@click.option('--count', metavar='INT', default=2000, show_default=True, help='Samples of each, as in the grid')
@version_option
def main(grid: str, out: str, sigma: float, seeds: int, specs: tuple, kimg: float, options: str, count: int) -> None:
    """Distill noisy-only teachers of a grid, and compare one-step samples with those of the teachers and of models of clean data."""
    grid, out, found = os.path.abspath(grid), os.path.abspath(out), {}
    for seed in range(seeds):
        teacher = cell(grid, f'noisy-{sigma:g}-s{seed}')
        if teacher is None:
            raise UserError(f'--grid={grid}: the cell noisy-{sigma:g}-s{seed} is not finished; train it with benchmarks/price.py')
        found[seed] = {name: {key: value['fid_score'] for key, value in by.items()} for name, by in teacher['distances'].items()}
        if clean := cell(grid, f'clean-s{seed}'):
            found[seed]['clean'] = {key: value['fid_score'] for key, value in clean['distances']['full'].items()}
    for seed in range(seeds):
        for spec in specs:
            folder = os.path.join(out, arm_name(spec), f's{seed}')
            train(os.path.join(grid, 'runs', f'noisy-{sigma:g}-s{seed}'), folder, spec, options.split(), seed, kimg)
            found[seed][spec] = measure(grid, folder, count)
            write_json(os.path.join(out, 'results.json'), {'sigma': sigma, 'kimg': kimg, 'options': options, 'distances': found})
            print(f'seed {seed}, {spec}: {found[seed][spec]}', flush=True)
    print(table(found, list(specs)))


if __name__ == '__main__':
    main()
