# SPDX-License-Identifier: Apache-2.0
"""What a noisy image is worth: {all clean, some clean + the rest noisy, some clean alone, noisy only} x sigma x share x seed.

python benchmarks/price.py --scale=digits --out=runs/price-digits --jobs=2
python benchmarks/price.py --scale=cifar8 --data=cifar10-train-jpeg.zip --out=runs/price-cifar8 --jobs=2

Every cell is one train.py in a folder of its own: a finished one is not trained again, and one that was interrupted continues. Then the
tables, fits and figures of benchmarks/price_report.py are made of all cells that are there (docs/price.md)."""

import collections
import dataclasses
import fnmatch
import json
import os
import queue
import shutil
import sys
import threading
import zipfile
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import price_report  # noqa: E402 (the folder above had to be found first)
from benchmarks.processes import SMALL, call, snapshot  # noqa: E402
from dnnlib import UserError  # noqa: E402
from dnnlib.files import read_json, replacing, write_json  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402
from training.data.corruption import Corruption  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Scale:
    """One size of the experiment.

    train, reference, labelled: options of dataset_tool.py for the training images, the images that distances are measured to, and
    those that the small detector is trained on (all of `train` unless given), and `classify` those of its training.
    network, kimg: options and length of every training. detectors: which features are compared.
    sigmas; mixed, alone: shares of clean images in mixtures and without the rest. samples, sampling: generated images of a cell, and
    how they are generated."""

    train: str
    reference: str
    network: str
    kimg: float
    labelled: str = ''
    classify: str = '--kimg=300 --mirror'
    source: str | None = None
    detectors: tuple[str, ...] = ('pixels', 'small')
    sigmas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    first: tuple[float, ...] = (0.4, 0.2)  # sigmas whose noisy-only cells come first, since other experiments start from them
    mixed: tuple[float, ...] = (0.1,)
    alone: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    seeds: int = 3
    samples: int = 2000
    sampling: str = '--steps=12 --sigma-min=0.02 --sigma-max=20'  # 9 steps of 80 to 0.002 are too few: distances are 1.4 times as large


TINY = '--arch=ddpmpp:cbase=16,cres=1|2,blocks=1,attn=4,dropout=0 --batch=64 --lr=4e-3 --lr-rampup=0.004 --ema=0.008 --augment=0'
SCALES = {
    'digits': Scale('--part=0/2 --max-images=898', '--part=1/2 --max-images=898', f'{TINY} --sigma-data=0.75', 64, classify='--kimg=60',
                    source='digits', mixed=(0.1, 0.3)),
    'cifar8': Scale('--resolution=8x8 --part=0/2 --max-images=2000 --sample=spread', '--resolution=8x8 --part=1/2', TINY, 64,
                    '--resolution=8x8 --part=0/2'),
    'cifar8-50k': Scale('--resolution=8x8 --part=0/2', '--resolution=8x8 --part=1/2', TINY, 400, '--resolution=8x8 --part=0/2',
                        alone=(0.01, 0.03, 0.1, 0.3), samples=10_000),
    'cifar16': Scale('--resolution=16x16 --part=0/2 --max-images=5000 --sample=spread', '--resolution=16x16 --part=1/2',
                     '--arch=ddpmpp:cbase=32,cres=1|2|2,blocks=1,attn=8,dropout=0 --batch=128 --lr=2e-3 --lr-rampup=0.02 --ema=0.02 '
                     '--augment=0', 400, '--resolution=16x16 --part=0/2', samples=5000),
    'cifar32': Scale('--split=train', '--split=train', '--preset=edm-cifar10-uncond', 200_000, detectors=('inception',),
                     alone=(0.02, 0.05, 0.1, 0.2, 0.5), samples=50_000, sampling='--steps=18'),
}
# What of a Scale may be changed, or grow, between two calls with the same folder.
FREE = ('sigmas', 'first', 'mixed', 'alone', 'seeds')


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training: kind is clean (all images clean), mix, alone or noisy; share of clean images; noise level of the others."""

    kind: str
    seed: int
    sigma: float = 0.0
    share: float = 1.0

    @property
    def name(self) -> str:
        """The name of its folder, such as mix-0.2-0.1-s0: kind, sigma if any, share of clean images if neither 0 nor 1, seed."""
        numbers = [f'{self.sigma:g}'] * (self.sigma > 0) + [f'{self.share:g}'] * (0 < self.share < 1)
        return '-'.join([self.kind, *numbers, f's{self.seed}'])

    @property
    def probability(self) -> str:
        """--corruption-probability of the cell, or of the cells that the images of an `alone` cell are the clean ones of."""
        return f'{1 - self.share:.6g}'


def cells_of(scale: Scale) -> list[Cell]:
    """All cells, in the order in which they are trained: those that others start from, then what the ratios need, then the curves."""
    seeds = range(scale.seeds)
    first = [sigma for sigma in scale.first if sigma in scale.sigmas]
    later = [sigma for sigma in scale.sigmas if sigma not in first]
    order = [*first, *later]
    groups = [[Cell('clean', seed) for seed in seeds] + [Cell('noisy', seed, sigma, 0.0) for sigma in first for seed in seeds]]
    for k, share in enumerate(scale.mixed):
        groups.append([Cell('alone', seed, share=share) for seed in seeds])
        groups.append([Cell('mix', seed, sigma, share) for sigma in order for seed in seeds])
        if k == 0:
            groups.append([Cell('alone', seed, share=other) for other in scale.alone for seed in seeds])
            groups.append([Cell('noisy', seed, sigma, 0.0) for sigma in later for seed in seeds])
    return list(dict.fromkeys(cell for group in groups for cell in group))


class Grid:
    """The folder of an experiment: data, reference statistics, and a folder for each cell.

    out: the folder. data: what dataset_tool.py reads. call: runs commands of the program, as processes.call does."""

    def __init__(self, out: str | os.PathLike, scale: Scale, data: str | None = None, call=call):
        self.out, self.scale, self.call = os.path.abspath(out), scale, call
        self.source = scale.source or data
        if not self.source:
            raise UserError('--data: this scale needs the photographs, such as cifar10-train-jpeg.zip or cifar-10-python.tar.gz')
        if not scale.source and not os.path.exists(self.source):
            raise UserError(f'--data={self.source}: no such file or folder')
        self.source = self.source if scale.source else os.path.abspath(self.source)
        self._lock = threading.Lock()

    def path(self, *names: str) -> str:
        return os.path.join(self.out, *names)

    def prepare(self) -> None:
        """Data sets, the small detector and reference statistics, where they are not there; refuses a folder of other settings."""
        os.makedirs(self.out, exist_ok=True)
        self._check_settings()
        for name, options in [('train', self.scale.train), ('reference', self.scale.reference), ('labelled', self.scale.labelled)]:
            if options and not os.path.exists(self.path(f'{name}.zip')):
                self.call(('dataset_tool', [f'--source={self.source}', f'--dest={self.path(name)}.zip', '--sheet=none', *options.split()]))
        weights = self.path('small.safetensors')
        if 'small' in self.scale.detectors and not os.path.exists(weights):
            labelled = self.path('labelled.zip' if self.scale.labelled else 'train.zip')
            print(self.call(('benchmarks.small_detector', [f'--data={labelled}', f'--val={self.path("reference.zip")}', f'--dest={weights}',
                                                           *self.scale.classify.split()])), flush=True)
        for name in self.scale.detectors:
            if not os.path.exists(self.path(f'reference-{name}.npz')):
                self.call(('eval_fid', ['ref', f'--data={self.path("reference.zip")}', f'--dest={self.path(f"reference-{name}.npz")}',
                                        self.detector(name)]))
            if not os.path.exists(self.path(f'train-{name}.fid.json')):  # a model that has learnt its images by heart
                count = len(ImageDataset(self.path('train.zip')))
                self.call(('eval_fid', [f'--gen-path={self.path("train.zip")}', f'--ref-stats={self.path(f"reference-{name}.npz")}',
                                        f'--num={count}', *self.metrics(name, self.path(f'train-{name}.fid.json'))]))

    def _check_settings(self):
        fixed = {key: value for key, value in json.loads(json.dumps(dataclasses.asdict(self.scale))).items() if key not in FREE}
        fixed['source'] = os.path.basename(self.source)
        path = self.path('settings.json')
        if not os.path.exists(path):
            write_json(path, fixed)
        found = read_json(path)
        other = [key for key in fixed if found.get(key) != fixed[key]]
        if other:
            raise UserError(f'--out={self.out}: was made with {other[0]}={found.get(other[0])}, and now it is {fixed[other[0]]}; '
                            'use another folder')

    def detector(self, name: str) -> str:
        """The --detector option."""
        return f'--detector=module:name={SMALL},weights={self.path("small.safetensors")}' if name == 'small' else f'--detector={name}'

    def metrics(self, name: str, path: str) -> list[str]:
        """The options for what is measured, by which detector, and where the result goes."""
        return ['--metrics=fid,fid_inf', self.detector(name), f'--out-path={path}']

    def is_clean(self, cell: Cell) -> np.ndarray:
        """Which training images are clean in a mixture of the cell's share and seed, bool [N]: train.py's own choice."""
        dataset = ImageDataset(self.path('train.zip'))
        if cell.kind == 'clean':
            return np.ones(len(dataset), bool)
        corruption = Corruption(1.0, float(cell.probability), seed=cell.seed)
        return corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape) == 0

    def subset(self, cell: Cell) -> str:
        """The data set of an `alone` cell: exactly those images that are clean in the mixtures of its share and seed."""
        path = self.path(f'clean-{cell.share:g}-s{cell.seed}.zip')
        with self._lock:
            if not os.path.exists(path):
                write_subset(self.path('train.zip'), path, np.flatnonzero(self.is_clean(cell)))
        return path

    # ---- one cell

    def run(self, cell: Cell, device: str | None = None) -> dict:
        """Trains and evaluates a cell, or returns what is there: the contents of its cell.json."""
        folder, result = self.path('runs', cell.name), self.path('runs', cell.name, 'cell.json')
        if os.path.exists(result):
            return read_json(result)
        data = self.subset(cell) if cell.kind == 'alone' else self.path('train.zip')
        noise = [f'--sigma={cell.sigma:g}', f'--corruption-probability={cell.probability}', f'--corruption-seed={cell.seed}']
        kimg = self.scale.kimg
        if snapshot(folder) is None:
            self.call(('train', [f'--outdir={folder}', '--nosubdir', '--resume=latest', f'--data={data}', *(noise if cell.sigma else []),
                                 *self.scale.network.split(), f'--seed={cell.seed}', f'--duration={kimg / 1e3:.9g}',
                                 f'--tick={kimg / 8:.9g}', '--snap=1000000', '--dump=2', '--keep-states=1', '--samples=0',
                                 *([] if device else ['--threads=1'])]), device=device)
        found = {name: self.evaluate(folder, name, stop, device) for name, stop in samplings(cell).items()}
        clean = int(self.is_clean(cell).sum()) if cell.share else 0
        total = clean if cell.kind == 'alone' else len(ImageDataset(self.path('train.zip')))
        write_json(result, {**dataclasses.asdict(cell), 'clean': clean, 'noisy': total - clean, 'distances': found})
        return read_json(result)

    def evaluate(self, folder: str, name: str, stop: float, device: str | None) -> dict:
        """{detector: {fid_score, fid_inf}} of samples of the cell's last snapshot; stop: level at which sampling is truncated, or 0."""
        count, samples = self.scale.samples, os.path.join(folder, f'samples-{name}')
        shutil.rmtree(samples, ignore_errors=True)
        results = {detector: os.path.join(folder, f'{name}-{detector}.fid.json') for detector in self.scale.detectors}
        self.call(('generate', [f'--network={snapshot(folder)}', f'--outdir={samples}', f'--seeds=0-{count - 1}', '--grid',
                                *self.scale.sampling.split(), *([f'--stop-sigma={stop:g}'] if stop else []),
                                *([] if device else ['--threads=1'])]),
                  *(('eval_fid', [f'--gen-path={samples}', f'--ref-stats={self.path(f"reference-{detector}.npz")}', f'--num={count}',
                                  *self.metrics(detector, path)])
                    for detector, path in results.items()), device=device)
        shutil.rmtree(samples)
        return {detector: {key: read_json(path)[key] for key in ('fid_score', 'fid_inf')} for detector, path in results.items()}


def samplings(cell: Cell) -> dict[str, float]:
    """{name: --stop-sigma} of the ways a cell is sampled: noisy-only cells also truncated at sigma_n, as the paper samples them."""
    return {'full': 0.0, 'truncated': cell.sigma} if cell.kind == 'noisy' else {'full': 0.0}


def write_subset(source: str | os.PathLike, dest: str | os.PathLike, rows: np.ndarray) -> None:
    """Copies these images (by their order) and their labels from one zip that dataset_tool.py wrote into another."""
    with zipfile.ZipFile(source) as archive, replacing(dest) as part, zipfile.ZipFile(part, 'w') as copy:
        table = json.loads(archive.read('dataset.json'))
        names = [name for name in sorted(archive.namelist()) if name != 'dataset.json']
        kept = {names[row] for row in rows}
        for name in sorted(kept):
            copy.writestr(zipfile.ZipInfo(name), archive.read(name))
        labels = table.get('labels')
        copy.writestr(zipfile.ZipInfo('dataset.json'), json.dumps({'labels': labels and [pair for pair in labels if pair[0] in kept]}))


# ---- the whole grid


def run_all(grid: Grid, cells: list[Cell], jobs: int, devices: list[str]) -> list[dict]:
    """The results of the cells, `jobs` at a time, or one on each GPU; the first error ends the others after their cell."""
    free = queue.SimpleQueue()
    for k in range(jobs):
        free.put(devices[k % len(devices)] if devices else None)
    done = collections.Counter()

    def work(cell):
        device = free.get()
        try:
            found = grid.run(cell, device)
        finally:
            free.put(device)
        done['cells'] += 1
        shown = ', '.join(f'{name} {value["fid_score"]:.4g}' for name, value in found['distances']['full'].items())
        print(f'{done["cells"]}/{len(cells)}  {cell.name:<20} {shown}', flush=True)
        return found

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, cell) for cell in cells]
        _, left = wait(futures, return_when=FIRST_EXCEPTION)
        for future in left:
            future.cancel()
    return [future.result() for future in futures if not future.cancelled()]


def numbers(text: str | None, kind=float) -> tuple | None:
    """"0.1,0.2" -> (0.1, 0.2)."""
    return None if text is None else tuple(kind(part) for part in text.split(','))


@click.command(cls=Command)
@click.option('--scale', type=click.Choice(list(SCALES)), default='digits', show_default=True, help='Size of the experiment')
@click.option('--data', metavar='PATH', help='CIFAR-10 photographs: what dataset_tool.py reads')
@click.option('--out', required=True, metavar='DIR', help='Folder of data, trainings and results; what is there is not made again')
@click.option('--sigmas', metavar='LIST', help='Noise levels of the noisy images [of --scale]')
@click.option('--mixed', metavar='LIST', help='Shares of clean images in the mixtures [of --scale]')
@click.option('--alone', metavar='LIST', help='Shares of clean images that are trained on without the rest [of --scale]')
@click.option('--seeds', type=int, help='Number of seeds, counted from 0 [of --scale]')
@click.option('--kimg', type=float, help='Length of each training in thousand images [of --scale]')
@click.option('--samples', type=int, help='Generated images of each cell [of --scale]')
@click.option('--cells', default='*', metavar='PATTERNS', help='Train only these cells, such as clean-*,mix-0.2-*')
@click.option('--jobs', type=int, help='Trainings at a time [one per GPU; without a GPU: 1]')
@click.option('--report-only', is_flag=True, help='Train nothing; make tables and figures of the cells that are there')
@version_option
def main(scale, data, out, sigmas, mixed, alone, seeds, kimg, samples, cells, jobs, report_only):
    """Train the grid, and write results.json, table.md and figures of all cells that are finished."""
    given = {'sigmas': numbers(sigmas), 'mixed': numbers(mixed), 'alone': numbers(alone), 'seeds': seeds, 'kimg': kimg, 'samples': samples}
    chosen = dataclasses.replace(SCALES[scale], **{key: value for key, value in given.items() if value is not None})
    if not report_only:
        import torch
        devices = [str(k) for k in range(torch.cuda.device_count())]
        grid = Grid(out, chosen, data)
        grid.prepare()
        wanted = [cell for cell in cells_of(chosen) if any(fnmatch.fnmatch(cell.name, pattern) for pattern in cells.split(','))]
        if not wanted:
            raise UserError(f'--cells={cells}: none of {", ".join(cell.name for cell in cells_of(chosen))}')
        run_all(grid, wanted, jobs or max(len(devices), 1), devices)
    price_report.write(out)


if __name__ == '__main__':
    main()
