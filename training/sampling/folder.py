# SPDX-License-Identifier: Apache-2.0
"""A folder of generated images and the record of what made them, OUTDIR.json beside it; it never mixes images of different options."""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence

import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import read_json, write_json
from dnnlib.lock import FolderLock
from torch_utils.command_line import ranges
from training.sampling import record
from training.sampling.generate import network_device
from training.sampling.outputs import Output
from training.sampling.writers import Files

KIND = 'generated images'  # "kind" of a record
NAME = re.compile(r'(?:\d{6,}/)?(\d{6,})\.(?:png|npy|npz)')  # of a generated image, as in Files.path
WAIT_SEC = 600  # for another job that is writing the record or removing images
MOST_SEEDS = 10 ** 8


def record_path(outdir: str | os.PathLike) -> str:
    """Path of the record of a folder of images."""
    return os.path.abspath(outdir) + '.json'


def read_record(outdir: str | os.PathLike) -> dict | None:
    """The record of a folder of images; None where there is none. Raises UserError for a file that is something else."""
    path = record_path(outdir)
    if not os.path.lexists(path):
        return None
    found = read_json(path)
    if found.get('kind') != KIND or not isinstance(found.get('subdirs'), bool) or not isinstance(found.get('format'), str):
        raise UserError(f'{path}: is not a record of generated images, which has to go there; move it, or choose another --outdir')
    numbers(found.get('seeds'), f'{path}: "seeds"')
    numbers(found.get('unfinished', ''), f'{path}: "unfinished"')
    return found


def numbers(text: object, name: str) -> set[int]:
    """The set of whole numbers that ranges() wrote as "0-2,5". Raises UserError that begins with `name`."""
    parts = re.findall(r'(\d{1,18})(?:-(\d{1,18}))?(?:,|$)', text) if isinstance(text, str) else []
    if not isinstance(text, str) or not re.fullmatch(r'(?:\d{1,18}(?:-\d{1,18})?(?:,(?=\d)|$))*', text):
        raise UserError(f'{name} must be ranges of whole numbers such as "0-2,5", got {str(text)[:40]!r}')
    spans = [range(int(first), int(last or first) + 1) for first, last in parts]
    if sum(map(len, spans)) > MOST_SEEDS:
        raise UserError(f'{name} names more than {MOST_SEEDS} images')
    return {number for span in spans for number in span}


def names_of(found: dict, seeds: Iterable[int] | None = None) -> set[str]:
    """The relative names, with slashes, of the images that a record lists, or of those with the given seeds."""
    files = Files('', found['format'], found['subdirs'])
    return {files.path(seed).replace(os.sep, '/') for seed in (numbers(found['seeds'], '"seeds"') if seeds is None else seeds)}


def record_of(outdir: str | os.PathLike, names: Iterable[str], shape: Sequence[int]) -> tuple[dict | None, str | None]:
    """(record, None) of a folder whose images are exactly those that its record lists, else (None, reason).

    names: relative names of the images that were found; shape: of each, (C, H, W)."""
    try:
        found = read_record(outdir)
    except UserError as err:
        return None, err.message
    if found is None:
        return None, f'there is no {os.path.basename(record_path(outdir))} beside the images'
    listed, there = names_of(found), set(names)
    for what, which in (('images are not listed in it', there - listed), ('images that it lists are missing', listed - there)):
        if which:
            return None, f'{record_path(outdir)} does not fit the folder: {len(which)} {what}, such as {min(which)}'
    if found.get('image_shape') != list(shape):
        return None, f'{record_path(outdir)} is of images of shape {found.get("image_shape")}, and these have {list(shape)}'
    return found, None


class RecordedFolder:
    """The images of one set of options, which several jobs may write at once, each with its own seeds. Only rank 0 calls this."""

    def __init__(self, files: Files, o: EasyDict, net: torch.nn.Module, pieces: dict, output: Output) -> None:
        self.files, self.net, self.path, self.shape = files, net, record_path(files.outdir), output.shape
        self._describe = lambda: record.describe(o, net, pieces, output)

    def open(self, seeds: list[int], skip_existing: bool) -> list[int]:
        """Writes the record before sampling; returns the seeds of the images to make. Removes what killed runs left of those, and the
        images of other options if these seeds replace all of them. Raises UserError where the folder would mix images of two sets of
        options."""
        self.facts = {**self._describe(), 'format': self.files.format, 'subdirs': self.files.subdirs}
        with self._lock():
            there = _images(self.files.outdir)
            old = read_record(self.files.outdir)
            changed = old and record.differences(old, self.facts)
            if there and (old is None or changed):
                self._clear(old, changed, there, seeds, skip_existing)
            if old is None or changed:
                old = {'seeds': '', 'made_by': []}
            known = numbers(old['seeds'], self.path)
            # A foreign file with the name of a seed that is recorded from now on would pass for its image if this run is killed.
            self._remove(there & names_of(self.facts, {*seeds} - known))
            missing = self._missing(seeds, known) if skip_existing else list(seeds)
            self.files.remove_leftovers(missing)
            self._write(known | {*seeds}, numbers(old.get('unfinished', ''), self.path) | {*missing}, old.get('made_by'))
        return missing

    def close(self, seeds: list[int]) -> None:
        """Writes the record after these images are written. Raises UserError where a run with other options replaced it meanwhile."""
        with self._lock():
            now = read_record(self.files.outdir)
            if now is None or record.differences(now, self.facts):
                raise UserError(f'{self.path}: was replaced by a run with other options during this one, so that '
                                f'{self.files.outdir} may hold images of both; empty it and generate again')
            self._write(numbers(now['seeds'], self.path), numbers(now.get('unfinished', ''), self.path) - {*seeds}, now.get('made_by'))

    def _missing(self, seeds, known):
        """Those of the seeds that are not in the record, or whose image is missing or damaged."""
        broken = {*self.files.missing([seed for seed in seeds if seed in known], self.shape)}
        return [seed for seed in seeds if seed not in known or seed in broken]

    def _clear(self, old, changed, there, seeds, skip_existing):
        """Removes images of other options, or without a record, if the new ones replace every one of them."""
        outdir = self.files.outdir
        why = f'made with other options ({"; ".join(changed)})' if changed else f'without a record {self.path}'
        if skip_existing:
            raise UserError(f'--skip-existing: {outdir} holds {len(there)} images {why}; '
                            f'{"give the options of the first run, " if changed else ""}leave --skip-existing out to generate all images '
                            'again, or choose another --outdir')
        ours = names_of(self.facts, seeds) | (names_of(old, numbers(old['seeds'], self.path) & {*seeds}) if old else set())
        if others := there - ours:
            raise UserError(f'--outdir={outdir}: holds {len(others)} images, such as {min(others)}, {why}, and --seeds does not replace '
                            'them; choose another --outdir, or empty this one')
        if old:  # if this run is killed before the new record is written, the old one must not claim to be complete
            write_json(self.path, {**old, 'unfinished': old['seeds'], 'num_images': 0, 'complete': False})
        self._remove(there)

    def _remove(self, names):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.files.outdir, name))

    def _write(self, seeds, unfinished, made_by):
        machine = record.machine(network_device(self.net))
        made_by = made_by if isinstance(made_by, list) else []
        write_json(self.path, {
            'kind': KIND, **self.facts, 'seeds': ranges(seeds), 'num_images': len(seeds) - len(unfinished), 'complete': not unfinished,
            **({'unfinished': ranges(unfinished)} if unfinished else {}), 'made_by': [*made_by, *([machine] * (machine not in made_by))]})

    @contextlib.contextmanager
    def _lock(self):
        lock = FolderLock(self.files.outdir)
        if owner := lock.acquire(WAIT_SEC):
            raise UserError(f'{self.files.outdir}: {owner} has locked its record for {WAIT_SEC} seconds; end it, or wait for it')
        try:
            yield
        finally:
            lock.release()


def _images(outdir):
    """The relative names of all files that are named like generated images, in the folder and in those of --subdirs."""
    found, folders = set(), ['']
    while folders:
        inside = folders.pop()
        with os.scandir(os.path.join(outdir, inside)) as entries:
            for entry in entries:
                if not inside and re.fullmatch(r'\d{6,}', entry.name) and entry.is_dir():
                    folders.append(f'{entry.name}/')
                elif NAME.fullmatch(inside + entry.name):
                    found.add(inside + entry.name)
    return found
