# SPDX-License-Identifier: Apache-2.0
"""Sweeps: each combination of guidance, steps, samplers and weights of a network is a cell, whose result is one JSON file.

A sweep has no other state: it is resumed from the files in its folder, and its table and plot are made from them."""

import dataclasses
import glob
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence

from dnnlib import EasyDict, UserError, replacing
from dnnlib.files import prepare_output
from dnnlib.util import format_time
from metrics import curves, results, table
from metrics.report import number
from torch_utils import distributed
from training.evaluation.images import NetworkImages
from training.sampling import pieces as sampling
from training.sampling import record

TABLES, PICTURE = {'table.md': 'markdown', 'table.csv': 'csv'}, 'plot.png'
AXES = ('weights', 'sampler', 'guidance_interval', 'guidance', 'steps')  # the first varies slowest


@dataclasses.dataclass
class Cell:
    """One combination. o: its options, as for eval_fid.py --network; source: its images; path: of its result."""

    o: EasyDict
    source: NetworkImages
    path: str

    @property
    def name(self) -> str:
        return os.path.basename(self.path).removesuffix(results.SUFFIX)

    def facts(self) -> dict:
        """The part of the result that describes the images."""
        return {'num_images': self.source.count, 'generated': self.source.facts(), 'repeats': self.source.labels}

    def cost(self) -> int:
        """Number of network evaluations."""
        return self.source.facts()['evaluations'] * self.source.count * len(self.source.labels)


class Sweep:
    """The cells of a sweep; impossible combinations are refused here, before any is run. Raises UserError.

    o: the options of eval_fid.py sweep; those in AXES are lists. Attribute cells: in the order in which they are run."""

    def __init__(self, o: EasyDict) -> None:
        distributed.from_rank0(prepare_output, os.path.join(o.outdir, 'table.md'), '--outdir')
        self.outdir, networks, found = o.outdir, sampling.Networks(), {}
        for options in combinations(o):
            try:
                source = NetworkImages(options, networks)
            except UserError as err:
                raise UserError(f'{err.message} (in the cell {words(options, o)})') from None
            path = os.path.join(o.outdir, os.path.basename(source.default_path(results.SUFFIX)))
            if path not in found:
                found[path] = Cell(options, source, path)
            elif found[path].source.facts() != source.facts():
                raise UserError(f'{words(options, o)} and {words(found[path].o, o)} have the same file name, {path}; leave one of them out')
        self.cells = [*found.values()]
        self.shape = self.cells[0].source.shape

    def unfinished(self, facts: dict) -> list[Cell]:
        """The cells without a result in the folder. facts: the part of the results that is the same for all cells.

        Raises UserError, which names the file, for a file in the folder that is not comparable with the cells."""
        done = distributed.from_rank0(self._finished, facts)
        return [cell for cell in self.cells if cell.path not in done]

    def _finished(self, facts):
        known = {path: results.read_result(path) for path in _files(self.outdir)}
        for path, result in known.items():
            check_folder(path, result, self.cells, facts)
        for cell in self.cells:
            if cell.path in known:
                check_cell(cell, known[cell.path], facts)
        return [cell.path for cell in self.cells if cell.path in known and not _missing(known[cell.path], facts)]

    def run(self, todo: Sequence[Cell], measure: Callable[[EasyDict, NetworkImages], dict]) -> None:
        """Evaluates cells and writes their results. measure(o, source) -> result is called on every rank.

        Raises UserError at the first cell that fails."""
        done, start, total = 0, time.monotonic(), sum(cell.cost() for cell in todo)
        before = len(self.cells) - len(todo)
        distributed.print0(f'{len(self.cells)} cells in {self.outdir}: {before} done, {len(todo)} to do')
        for place, cell in enumerate(todo, before + 1):
            began = time.monotonic()
            try:
                result = measure(cell.o, cell.source)
                told = distributed.from_rank0(results.write_beside, cell.path, result)
            except UserError as err:
                raise UserError(f'{err.message} (in the cell {cell.name}; {place - 1} of {len(self.cells)} are done)') from None
            done, now = done + cell.cost(), time.monotonic()
            left = f', ETA {format_time((now - start) * (total - done) / done)}' if done < total else ''
            if distributed.rank() == 0:
                print('\n'.join([f'cell {place} of {len(self.cells)}, {cell.name}: {_numbers(result)} ({format_time(now - began)}{left})',
                                 *told]), flush=True)

    def write(self) -> None:
        """Writes table.md, table.csv and plot.png of all results in the folder."""
        distributed.from_rank0(write_tables, self.outdir)


def combinations(o: EasyDict) -> Iterator[EasyDict]:
    """Yields the options of each cell, with single values. Unguided cells of a guided sweep have none of the options of guidance."""
    if o.steps is not None and min(o.steps) < 1:
        raise UserError(f'--steps={min(o.steps)}: must be 1 or more')
    several = {axis: list(dict.fromkeys(o[axis] or [None])) for axis in AXES}
    for chosen in itertools.product(*several.values()):
        cell = EasyDict(o, **dict(zip(AXES, chosen)), num=len(set(o.seeds)))
        if cell.guidance == 1 and set(o.guidance) != {1}:
            cell.update(guidance_interval=None, guidance_channels=None, gnet=None)
        yield cell


def words(cell: EasyDict, o: EasyDict) -> str:
    """The options that distinguish a cell: those with several values, or else all that were given."""
    told = [axis for axis in AXES if len(set(o[axis] or ())) > 1] or [axis for axis in AXES if o[axis]]
    shown = lambda value: f'{value:g}' if isinstance(value, float) else value
    return ' '.join(f'--{axis.replace("_", "-")}={shown(cell[axis])}' for axis in told if cell[axis] is not None)


# ----------------------------------------------------------------------------------------------------
# Files in the folder


def _files(folder):
    """The paths of the JSON files in a folder, sorted."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), '*.json')))


def check_folder(path: str, result: dict, cells: Sequence[Cell], facts: dict) -> None:
    """Raises UserError for a result that is not comparable with the cells, or whose network had other weights."""
    differs = results.incomparable(result, {**facts, **cells[0].facts()})
    made = results.origin(result)
    here = {} if path in [cell.path for cell in cells] else {  # check_cell() names the differences of those
        tuple(cell.source.facts()[key] for key in ('network', 'weights')): cell.source.facts()['sha256'] for cell in cells}
    now = here.get((made.get('network'), made.get('weights')))
    if now and made.get('sha256') != now:
        differs.append(f'of the network {made["network"]} with other weights ({str(made.get("sha256"))[:8]}, now {now[:8]})')
    if differs:
        raise UserError(f'{path}: {", ".join(differs)}; the results of a sweep must be comparable: choose another --outdir, or move this '
                        'file away')


def check_cell(cell: Cell, result: dict, facts: dict) -> None:
    """Raises UserError for a result under a cell's name that is of other images, or to which missing metrics cannot be added."""
    now = {**facts, **cell.facts()}
    differs = record.differences(results.origin(result), now['generated'])
    before, seeds = ([each.get('seeds') for each in found.get('repeats') or () if isinstance(each, dict)] for found in (result, now))
    if before != seeds:
        differs.append(f'--seeds: {" and ".join(map(str, before))}, now {" and ".join(seeds)}')
    if not differs and _missing(result, facts) and not results.joinable(result, now):
        differs.append(f'without {_missing(result, facts)}, and computed with other versions or on another device')
    if differs:
        raise UserError(f'{cell.path}: made with other options ({"; ".join(differs)}); choose another --outdir, or move this file away')


def _missing(result, facts):
    """The metrics that a result lacks, in the form of --metrics; '' if none."""
    has = results.measured(result)
    return ','.join(name for name in facts['metrics']['names'] if name not in has)


# ----------------------------------------------------------------------------------------------------
# Output


def _numbers(result):
    """The values of a result in one line, without standard deviations."""
    return ', '.join(f'{name} {number(value)}' for name, value in results.values(result).items() if None not in (value, table.better(name)))


def write_tables(outdir: str) -> None:
    """Writes table and plot of all results in a folder, like "eval_fid.py table OUTDIR/*.json"; prints the best value of each metric."""
    found = [results.read_result(path) for path in _files(outdir)]
    columns, rows = table.lay_out(found)
    for name, form in TABLES.items():
        with replacing(os.path.join(outdir, name)) as part, open(part, 'w', encoding='utf-8') as f:
            f.write(table.FORMATS[form](columns, rows))
    written = [*TABLES]
    try:
        curves.draw(found, os.path.join(outdir, PICTURE), 'plot.png')
        written.append(PICTURE)
    except UserError as err:  # the results are complete without it
        print(f'no plot: {err.message}')
    for place, value in table.best(columns, rows).items():
        row = next(row for row in rows if row[place] == value)
        told = ', '.join(f'{name} {cell}' for name, cell in zip(columns, row) if name in ('weights', 'sampler', 'guidance', 'evaluations'))
        print(f'best {columns[place]}: {number(value)} ({told})')
    print(f'{len(found)} results in {outdir}: {", ".join(written)}', flush=True)
