# SPDX-License-Identifier: Apache-2.0
"""The work of generate.py: writes the images of seeds to a folder with its record, and a picture of the first ones."""

import os
from collections.abc import Iterable

import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import check_writable, prepare_output
from dnnlib.progress import Progress
from torch_utils import distributed, numerics
from training.sampling import guidance
from training.sampling import pieces as sampling
from training.sampling.channels import Channels
from training.sampling.folder import RecordedFolder, record_path
from training.sampling.generate import Samples, check_finite, generate_images, network_device
from training.sampling.outputs import Output, open_output
from training.sampling.writers import Files, Writers, read_image, write_grid

GRID_IMAGES = 64


def run(o: EasyDict) -> None:
    """Samples and writes this rank's share, then checks the count over all ranks. o: the options."""
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init()
    numerics.set_numerics()
    seeds = list(dict.fromkeys(o.seeds))  # a seed that was named twice is one image
    check_writable(o.outdir)
    prepare_output(record_path(o.outdir), '--outdir')
    grid = grid_path(o.grid, o.outdir)
    net, pieces = sampling.prepare(o, seeds)
    output = open_output(net, o.decode, distributed.pick_device(o.device))
    files = Files(o.outdir, pick_format(o.format, output), o.subdirs)
    folder = RecordedFolder(files, o, net, pieces, output)
    missing = distributed.from_rank0(folder.open, seeds, o.skip_existing)
    share, report = len(missing[distributed.rank()::distributed.size()]), None
    bar = Progress(share, 'rank 0' if distributed.size() > 1 else None, show=distributed.rank() == 0)
    if distributed.rank() == 0:
        guided, all_calls = f', {guidance.describe(pieces["guidance"])}' if o.guidance != 1 else '', folder.facts['evaluations']
        print(f'Generating {len(missing)} images from {o.network} to {o.outdir}{guided}: {all_calls} network evaluations per image',
              flush=True)
        calls = all_calls - folder.facts.get('guide_evaluations', 0)
        report = lambda count: bar.advance(count / calls)
    first_images = FirstImages(output, seeds[:GRID_IMAGES] if grid else [], network_device(net))
    if distributed.rank() == 0:
        first_images.read(files, set(seeds) - set(missing))
    batches = generate_images(net, missing, batch=o.batch, rank=distributed.rank(), world=distributed.size(), report=report, **pieces)
    channels = Channels(net, labels=o.labels, class_idx=o.class_idx, stop_sigma=o.stop_sigma, stop_variance=o.stop_variance)
    written = write_all(output, batches, bar, files, first_images, channels)
    if grid:
        write_first_images(grid, first_images.images, output)
    check_count(written, len(missing), files)
    distributed.from_rank0(folder.close, seeds)
    there = f': {len(missing)} written, {len(seeds) - len(missing)} existed already' if len(missing) < len(seeds) else ''
    distributed.print0(f'{len(seeds)} images ({files.format}) in {files.outdir}{there}')
    channels.report()


class FirstImages:
    """The images of the first few seeds, as an Output makes them, for the grid; those of other ranks are zeros."""

    def __init__(self, output: Output, seeds: Iterable[int], device: torch.device | str) -> None:
        self.row, self.output = {seed: i for i, seed in enumerate(seeds)}, output
        self.images = torch.zeros([len(seeds), *output.shape], device=device)

    def read(self, files: Files, seeds: Iterable[int]) -> None:
        """Reads those of the seeds whose files existed already."""
        for seed in self.row.keys() & seeds:
            self.images[self.row[seed]] = self.output.read(read_image(files.path(seed)))

    def take(self, seeds: list[int], images: torch.Tensor) -> None:
        """Takes those that are in a batch of seeds and their images."""
        for seed, image in zip(seeds, images):
            if seed in self.row:
                self.images[self.row[seed]] = image


def write_all(output: Output, batches: Iterable[Samples], bar: Progress, files: Files, first_images: FirstImages,
              channels: Channels) -> int:
    """Samples and writes this rank's images; returns how many. Raises UserError, with that number, where a file cannot be written."""
    writers = Writers()
    try:
        with writers, bar:
            for part in batches:
                check_finite(part)
                channels.take(part.images)
                images = output(part.images)
                first_images.take(part.seeds, images)
                submit(writers, part, images, output, files)
                bar.update(len(part.seeds))
    except OSError as err:
        whose = f' of rank {distributed.rank()}' if distributed.size() > 1 else ''
        raise UserError(f'{err.filename}: {err.strerror}; {writers.written} of {bar.total} images{whose} were written; '
                        'free disk space, and resume with --skip-existing') from None
    return writers.written


def submit(writers: Writers, part: Samples, images: torch.Tensor, output: Output, files: Files) -> None:
    """Hands one batch of Samples, whose images the output has made, to the writer threads, already on the CPU."""
    arrays = output.uint8(images) if files.format == 'png' else output.numbers(images)
    labels = [None] * len(part.seeds) if part.labels is None else part.labels.cpu().numpy()
    for seed, array, label in zip(part.seeds, arrays.cpu().numpy(), labels):
        writers.submit(files.write, seed, array, label)


def check_count(written: int, missing: int, files: Files) -> None:
    """Raises UserError where the number of images written, over all ranks, is not the number wanted."""
    distributed.wait_for_all('sampling')  # ranks may differ in speed
    written = int(distributed.all_sum(torch.tensor(written, device=distributed.device())))
    if written != missing:
        raise UserError(f'{written} of {missing} images were written to {files.outdir}')


def write_first_images(path: str, first_images: torch.Tensor, output: Output) -> None:
    """Writes the picture of the first images, each of which one rank has."""
    first_images = distributed.all_sum(first_images.to(distributed.device()))
    if distributed.rank() == 0:
        write_grid(path, output.pictures(first_images))
        print(f'The first {len(first_images)} images in one picture: {path}')


def grid_path(grid: str | None, outdir: str) -> str | None:
    """Where to write the grid: the given path, or beside `outdir`, so that `outdir` holds only the images."""
    if grid is None:
        return None
    path = os.path.abspath(outdir) + '-grid.png' if grid == 'beside outdir' else grid
    prepare_output(path, '--grid', '.png')
    return path


def pick_format(format: str | None, output: Output) -> str:
    """The format asked for, or the default for the data; refuses PNG for data that is not 8-bit grey or RGB."""
    if format == 'png' and not output.is_picture:
        what = f'{output.shape[0]} channels' if output.units is None else 'data that is not 8-bit'
        raise UserError(f'--format=png: the network makes {what}, and a PNG holds 8-bit grey or RGB; use npy or npz')
    return format or ('png' if output.is_picture else 'npy')
