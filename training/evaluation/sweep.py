# SPDX-License-Identifier: Apache-2.0
"""Sweeps: every combination of guidance, steps, samplers and weights of a network is a cell, whose result is one JSON file.

The files are a sweep's only memory: it is resumed from those in its folder, and its table and picture are made of them."""

import dataclasses
import glob
import itertools
import os
import time

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
AXES = ('weights', 'sampler', 'guidance_interval', 'guidance', 'steps')  # the first are changed last


@dataclasses.dataclass
class Cell:
    """One combination. o: the options with which eval_fid.py --network makes the same; source: their images; path: of the result."""

    o: EasyDict
    source: NetworkImages
    path: str

    @property
    def name(self):
        return os.path.basename(self.path).removesuffix(results.SUFFIX)

    def facts(self):
        """What a result of this cell has of its images."""
        return {'num_images': self.source.count, 'generated': self.source.facts(), 'repeats': self.source.labels}

    def cost(self):
        """Network evaluations."""
        return self.source.facts()['evaluations'] * self.source.count * len(self.source.labels)


class Sweep:
    """The cells of the options; each of them is refused here or not at all.

    o: of eval_fid.py sweep; what is in AXES are lists. Attribute cells: in the order in which they are run."""

    def __init__(self, o):
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
                raise UserError(f'{words(options, o)} and {words(found[path].o, o)} have one name, {path}; leave one of them out')
        self.cells = [*found.values()]
        self.shape = self.cells[0].source.shape

    def unfinished(self, facts):
        """The cells without a result in the folder. facts: what a result has of reference, detector, metrics and machine.

        Raises UserError, which names the file, for whatever in the folder cannot stand in one table with the cells."""
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

    def run(self, todo, measure):
        """Evaluates cells and writes their results. measure(o, source) -> the result, on every rank.

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

    def write(self):
        """table.md, table.csv and plot.png of all results in the folder."""
        distributed.from_rank0(write_tables, self.outdir)


def combinations(o):
    """Yields the options of each cell, an EasyDict of single values. Where other weights guide, that of 1 has no option of guidance."""
    if o.steps is not None and min(o.steps) < 1:
        raise UserError(f'--steps={min(o.steps)}: must be 1 or more')
    several = {axis: list(dict.fromkeys(o[axis] or [None])) for axis in AXES}
    for chosen in itertools.product(*several.values()):
        cell = EasyDict(o, **dict(zip(AXES, chosen)), num=len(set(o.seeds)))
        if cell.guidance == 1 and set(o.guidance) != {1}:
            cell.update(guidance_interval=None, guidance_channels=None, gnet=None)
        yield cell


def words(cell, o):
    """The options of a cell that tell it from others: those with several values, or all that were given."""
    told = [axis for axis in AXES if len(set(o[axis] or ())) > 1] or [axis for axis in AXES if o[axis]]
    shown = lambda value: f'{value:g}' if isinstance(value, float) else value
    return ' '.join(f'--{axis.replace("_", "-")}={shown(cell[axis])}' for axis in told if cell[axis] is not None)


# ----------------------------------------------------------------------------------------------------
# What lies in the folder


def _files(folder):
    """The JSON files in a folder, as the shell finds them with *.json."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), '*.json')))


def check_folder(path, result, cells, facts):
    """Refuses a result that is of another network of this name, or whose figures do not compare with those of the cells."""
    differs = results.incomparable(result, {**facts, **cells[0].facts()})
    made = results.origin(result)
    here = {} if path in [cell.path for cell in cells] else {  # check_cell() tells more of those
        tuple(cell.source.facts()[key] for key in ('network', 'weights')): cell.source.facts()['sha256'] for cell in cells}
    now = here.get((made.get('network'), made.get('weights')))
    if now and made.get('sha256') != now:
        differs.append(f'of a network {made["network"]} that had other weights ({str(made.get("sha256"))[:8]}, now {now[:8]})')
    if differs:
        raise UserError(f'{path}: {", ".join(differs)}; a sweep holds what compares: choose another --outdir, or move this away')


def check_cell(cell, result, facts):
    """Refuses a result that lies in a cell's place and is of other images, or that other metrics of the same images cannot join."""
    now = {**facts, **cell.facts()}
    differs = record.differences(results.origin(result), now['generated'])
    before, seeds = ([each.get('seeds') for each in found.get('repeats') or () if isinstance(each, dict)] for found in (result, now))
    if before != seeds:
        differs.append(f'--seeds: {" and ".join(map(str, before))}, now {" and ".join(seeds)}')
    if not differs and _missing(result, facts) and not results.joinable(result, now):
        differs.append(f'without {_missing(result, facts)}, and computed with other versions or on another device')
    if differs:
        raise UserError(f'{cell.path}: made with other options ({"; ".join(differs)}); choose another --outdir, or move this away')


def _missing(result, facts):
    """The metrics that are wanted and that a result does not have, as --metrics takes them; '' for none."""
    has = results.measured(result)
    return ','.join(name for name in facts['metrics']['names'] if name not in has)


# ----------------------------------------------------------------------------------------------------
# What comes out


def _numbers(result):
    """The values of a result in one line; deviations are left to the table."""
    return ', '.join(f'{name} {number(value)}' for name, value in results.values(result).items() if None not in (value, table.better(name)))


def write_tables(outdir):
    """Table and picture of all results in a folder, as "eval_fid.py table OUTDIR/*.json" makes them; tells the best of each metric."""
    found = [results.read_result(path) for path in _files(outdir)]
    columns, rows = table.lay_out(found)
    for name, form in TABLES.items():
        with replacing(os.path.join(outdir, name)) as part, open(part, 'w', encoding='utf-8') as f:
            f.write(table.FORMATS[form](columns, rows))
    written = [*TABLES]
    try:
        curves.draw(found, os.path.join(outdir, PICTURE), 'plot.png')
        written.append(PICTURE)
    except UserError as err:  # the results are what counts: a package or a number that is missing does not spoil them
        print(f'no picture: {err.message}')
    for place, value in table.best(columns, rows).items():
        row = next(row for row in rows if row[place] == value)
        told = ', '.join(f'{name} {cell}' for name, cell in zip(columns, row) if name in ('weights', 'sampler', 'guidance', 'evaluations'))
        print(f'best {columns[place]}: {number(value)} ({told})')
    print(f'{len(found)} results in {outdir}: {", ".join(written)}', flush=True)
