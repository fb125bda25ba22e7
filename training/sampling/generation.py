# SPDX-License-Identifier: Apache-2.0
"""The work of generate.py: writes the images of seeds to a folder with its record, and a picture of the first ones."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import check_writable, prepare_output
from dnnlib.progress import Progress
from torch_utils import distributed
from training.sampling import guidance
from training.sampling import pieces as sampling
from training.sampling.channels import Channels
from training.sampling.folder import RecordedFolder, record_path
from training.sampling.generate import Samples, check_finite, generate_images, network_device, resolution
from training.sampling.pixels import is_picture, pictures, to_network, to_physical, to_uint8
from training.sampling.writers import Files, Writers, read_image, write_grid

GRID_IMAGES = 64


def run(o: EasyDict) -> None:
    """Samples and writes this rank's share, then checks the count over all ranks. o: the options."""
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init()
    seeds = list(dict.fromkeys(o.seeds))  # a seed that was named twice is one image
    check_writable(o.outdir)
    prepare_output(record_path(o.outdir), '--outdir')
    grid = grid_path(o.grid, o.outdir)
    net, pieces = sampling.prepare(o, seeds)
    files = Files(o.outdir, pick_format(o.format, net), o.subdirs)
    folder = RecordedFolder(files, o, net, pieces)
    missing = distributed.from_rank0(folder.open, seeds, o.skip_existing)
    if distributed.rank() == 0:
        guided = f', {guidance.describe(pieces["guidance"])}' if o.guidance != 1 else ''
        print(f'Generating {len(missing)} images from {o.network} to {o.outdir}{guided}: {folder.facts["evaluations"]} network evaluations '
              'per image', flush=True)
    first_images = FirstImages(net, seeds[:GRID_IMAGES] if grid else [])
    if distributed.rank() == 0:
        first_images.read(files, set(seeds) - set(missing))
    batches = with_progress(net, missing, o.batch, pieces, folder.facts if distributed.rank() == 0 else None)
    channels = Channels(net, labels=o.labels, class_idx=o.class_idx, stop_sigma=o.stop_sigma, stop_variance=o.stop_variance)
    written = write_all(net, batches, len(missing[distributed.rank()::distributed.size()]), files, first_images, channels)
    if grid:
        write_first_images(grid, first_images.images, net)
    check_count(written, len(missing), files)
    distributed.from_rank0(folder.close, seeds)
    there = f': {len(missing)} written, {len(seeds) - len(missing)} existed already' if len(missing) < len(seeds) else ''
    distributed.print0(f'{len(seeds)} images ({files.format}) in {files.outdir}{there}')
    channels.report()


def with_progress(net: torch.nn.Module, seeds: list[int], batch: int, pieces: dict, facts: dict | None) -> Iterator[Samples]:
    """Yields what generate_images yields for this rank. Rank 0 shows progress, within a batch too, by counting network evaluations.

    facts: the record of the images, on rank 0 only."""
    share = len(seeds[distributed.rank()::distributed.size()])
    with Progress(share, 'rank 0' if distributed.size() > 1 else None, show=distributed.rank() == 0) as bar:
        if facts:
            calls = facts['evaluations'] - facts.get('guide_evaluations', 0)  # per image; a guided call includes that of the guide
            own = pieces['stepper']
            stepper = lambda denoise, *args: own(ReportingDenoiser(denoise, lambda rows: bar.advance(rows / calls)), *args)
            pieces = {**pieces, 'stepper': stepper}
        for part in generate_images(net, seeds, batch=batch, rank=distributed.rank(), world=distributed.size(), **pieces):
            yield part
            bar.update(len(part.seeds))


class ReportingDenoiser:
    """A denoiser that calls report(number of images) after each evaluation."""

    def __init__(self, denoise: Callable, report: Callable[[int], None]) -> None:
        self._denoise, self._report = denoise, report

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        found = self._denoise(x, sigma)
        self._report(len(x))
        return found

    def outputs(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ConditionedDenoiser.outputs."""
        found = self._denoise.outputs(x, sigma)
        self._report(len(x))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoise, name)


class FirstImages:
    """The images of the first few seeds, in network units, for the grid; those of other ranks are zeros."""

    def __init__(self, net: torch.nn.Module, seeds: Iterable[int]) -> None:
        self.row, self.units = {seed: i for i, seed in enumerate(seeds)}, net.units
        self.images = torch.zeros([len(seeds), net.img_channels, *resolution(net)], device=network_device(net))

    def read(self, files: Files, seeds: Iterable[int]) -> None:
        """Reads those of the seeds whose files existed already."""
        for seed in self.row.keys() & seeds:
            self.images[self.row[seed]] = to_network(read_image(files.path(seed)), self.units)

    def take(self, part: Samples) -> None:
        """Takes those that are in a batch of Samples."""
        for seed, image in zip(part.seeds, part.images):
            if seed in self.row:
                self.images[self.row[seed]] = image


def write_all(net: torch.nn.Module, batches: Iterable[Samples], share: int, files: Files, first_images: FirstImages,
              channels: Channels) -> int:
    """Samples and writes this rank's images; returns how many. Raises UserError, with that number, where a file cannot be written."""
    writers = Writers()
    try:
        with writers:
            for part in batches:
                check_finite(part)
                first_images.take(part)
                channels.take(part.images)
                submit(writers, part, net.units, files)
    except OSError as err:
        whose = f' of rank {distributed.rank()}' if distributed.size() > 1 else ''
        raise UserError(f'{err.filename}: {err.strerror}; {writers.written} of {share} images{whose} were written; '
                        'free disk space, and resume with --skip-existing') from None
    return writers.written


def submit(writers: Writers, part: Samples, units: dict | None, files: Files) -> None:
    """Hands one batch to the writer threads, already on the CPU."""
    arrays = to_uint8(part.images) if files.format == 'png' else to_physical(part.images, units).float()
    labels = [None] * len(part.seeds) if part.labels is None else part.labels.cpu().numpy()
    for seed, array, label in zip(part.seeds, arrays.cpu().numpy(), labels):
        writers.submit(files.write, seed, array, label)


def check_count(written: int, missing: int, files: Files) -> None:
    """Raises UserError where the number of images written, over all ranks, is not the number wanted."""
    distributed.wait_for_all('sampling')  # ranks may differ in speed
    written = int(distributed.all_sum(torch.tensor(written, device=distributed.device())))
    if written != missing:
        raise UserError(f'{written} of {missing} images were written to {files.outdir}')


def write_first_images(path: str, first_images: torch.Tensor, net: torch.nn.Module) -> None:
    """Writes the picture of the first images, each of which one rank has."""
    first_images = distributed.all_sum(first_images.to(distributed.device()))
    if distributed.rank() == 0:
        write_grid(path, pictures(first_images, net.units))
        print(f'The first {len(first_images)} images in one picture: {path}')


def grid_path(grid: str | None, outdir: str) -> str | None:
    """Where to write the grid: the given path, or beside `outdir`, so that `outdir` holds only the images."""
    if grid is None:
        return None
    path = os.path.abspath(outdir) + '-grid.png' if grid == 'beside outdir' else grid
    prepare_output(path, '--grid', '.png')
    return path


def pick_format(format: str | None, net: torch.nn.Module) -> str:
    """The format asked for, or the default for the data; refuses PNG for data that is not 8-bit grey or RGB."""
    picture = is_picture(net.img_channels, net.units)
    if format == 'png' and not picture:
        what = f'{net.img_channels} channels' if net.units is None else 'data that is not 8-bit'
        raise UserError(f'--format=png: the network makes {what}, and a PNG holds 8-bit grey or RGB; use npy or npz')
    return format or ('png' if picture else 'npy')
