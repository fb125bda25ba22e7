# SPDX-License-Identifier: Apache-2.0
"""The work of denoise.py: every rank denoises its share of the images, then the first writes them in their own formats, with a report."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import prepare_output
from dnnlib.fingerprint import digest
from dnnlib.progress import Progress
from torch_utils import distributed, misc, numerics
from training.checkpoints.load import check_denoiser
from training.data import tables
from training.data.convert import sheet
from training.estimation.stabilise import of_units
from training.restoration import destination, origin
from training.restoration.formats import Forms
from training.restoration.images import ImageSet, data_state, labels_of
from training.restoration.posterior import Method, Noisy, estimates, rows_of
from training.restoration.report import Report
from training.restoration.work import Work
from training.sampling.generate import resolution
from training.sampling.pieces import open_network
from training.sampling.record import precision

OVERLAP = 2  # the default overlap of tiles is the network's smaller side over this


def run(o: EasyDict) -> None:
    """Denoises the images of --data into --dest. o: the options of denoise.py. Raises UserError."""
    if o.threads:
        torch.set_num_threads(o.threads)
    distributed.init()
    numerics.set_numerics()
    check_options(o)
    device = distributed.pick_device(o.device)
    net = open_network(o.network, o.weights, device, o.precision, o.compile)
    o.precision = precision(net)
    check_denoiser(net, f'--network={o.network}')
    if net.autoencoder:
        raise UserError(f'--network={o.network}: makes latents of an autoencoder, and noise of pictures is not white in latents; denoise '
                        'with a network that was trained on pictures')
    images, reference = ImageSet('--data', o.data, net, o.units), None
    method = Method(o.samples, o.steps, o.seed, overlap_of(net, o.overlap), o.batch, o.keep_samples)
    tiled = distributed.from_rank0(images.check_shapes, net, method.overlap)
    sigmas = images.sigmas(o.sigma)
    check_levels(sigmas, net, o)
    labels = labels_of(images, net, o.class_idx, o.text_encoder, device)
    if o.reference:
        reference = Reference(o.reference, net, o.units, images)
    distributed.from_rank0(check_dest, o, images)
    todo = [index for index in range(len(images)) if sigmas[index] > 0]
    work = Work(o.dest, facts_of(o, net, images, method, sigmas, labels))
    missing = distributed.from_rank0(work.open, todo, o.skip_existing)
    if distributed.rank() == 0:
        announce(o, images, method, todo, missing, sigmas, tiled, net)
    denoise(net, images, missing, sigmas, labels, method, work)
    distributed.wait_for_all('denoising')
    told = distributed.from_rank0(finish, o, net, images, reference, method, sigmas, work)
    distributed.print0('\n'.join(told))


def check_options(o: EasyDict) -> None:
    """Refuses options that would have no effect, and places of results that cannot be written."""
    if o.keep_samples and not o.samples:
        raise UserError('--keep-samples: needs --samples=K')
    if o.keep_samples and destination.ending_of(o.dest) in destination.STACKS:
        raise UserError(f'--keep-samples: a TIFF stack has no place for samples (--dest={o.dest}); name a folder, a .zip or a .npy')
    ending = destination.ending_of(o.dest)
    inputs = [os.path.realpath(path) for path in (o.data, o.data.rpartition(':')[0], o.reference, o.network) if path]
    for path in destination.places(o.dest, o.samples, o.keep_samples):
        if os.path.realpath(path) in inputs:
            raise UserError(f'--dest={o.dest}: {path} is read by this command; name another')
        if os.path.isdir(path) and (os.path.splitext(path)[1] or os.listdir(path)):
            raise UserError(f'--dest={o.dest}: {path} is a folder that is not empty; remove it or name another')
        if ending and os.path.dirname(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
    if o.report:
        prepare_output(o.report, '--report')
        if not o.report.lower().endswith(('.json', '.csv')):
            raise UserError(f'--report={o.report}: must end in .json or .csv')


def check_dest(o: EasyDict, images: ImageSet) -> None:
    """Refuses a --dest that the images do not fit, before the work."""
    destination.open_dest(o.dest, images, Forms(images.source, images.path, bool(images.counts)))
    sheet.place(o.sheet, o.dest)


def check_levels(sigmas: np.ndarray, net: torch.nn.Module, o: EasyDict) -> None:
    """Refuses sets without noise and levels above the network's, and warns of levels that it was not trained at."""
    if not sigmas.any():
        raise UserError(f'--data={o.data}: all {len(sigmas)} images are of level 0, that is clean; give their level with --sigma')
    if sigmas.max() > net.sigma_max:
        raise UserError(f'--data={o.data}: has images of level {sigmas.max():g} in network units, and the network goes up to '
                        f'{net.sigma_max:g}')
    if told := origin.warning(o.network, sigmas[sigmas > 0].min(), o.samples):
        distributed.print0(f'Warning: {told}')


def overlap_of(net: torch.nn.Module, told: int | None) -> int:
    """The overlap of tiles in pixels. Raises UserError."""
    side = min(resolution(net))
    if told is not None and told >= side:
        raise UserError(f'--overlap={told}: must be less than the sides of the network\'s images, {side}')
    return side // OVERLAP if told is None else told


class Reference(ImageSet):
    """The clean images of --reference, by the index of the noisy ones; their names, without the endings, must be the same."""

    def __init__(self, spec: str, net: torch.nn.Module, told: dict | None, images: ImageSet) -> None:
        super().__init__('--reference', spec, net, told)
        if told and self.is_8bit != images.is_8bit:  # the option is about --data
            self.units = self._units(net, None)
            self.counts = None if self.source.stabilise else of_units(self.units)
        stem = lambda name: os.path.splitext(name)[0]
        places = {name: place for known in (stem, str) for place, name in enumerate(map(known, self.names))}
        found = [places.get(name, places.get(stem(name))) for name in images.names]
        lacking = [name for name, place in zip(images.names, found) if place is None]
        if lacking:
            raise UserError(f'--reference={spec}: misses {len(lacking)} of {len(found)} images, such as {lacking[0]}; names must be those '
                            'of --data, endings may differ')
        self._images, self._places = images, found

    def of(self, index: int) -> np.ndarray:
        """The clean image of a noisy one, network units, float64 [C,H,W]. Raises UserError where its size differs."""
        place = self._places[index]
        found, kind = self.scaled(self.read(place), clean=True), self._images.kind(index)
        if found.shape != kind[:3]:
            raise UserError(f'--reference={self.spec}: {self.names[place]} is {self.kind(place)}, and the image of --data {kind}')
        return found


def facts_of(o: EasyDict, net: torch.nn.Module, images: ImageSet, method: Method, sigmas: np.ndarray,
             labels: torch.Tensor | None) -> dict:
    """What decides the estimates, for the record of unfinished work."""
    names = '\n'.join(images.names).encode()
    return {'network': misc.state_digest(net), 'data': os.path.abspath(o.data), 'state': data_state(images.path), 'names': digest(names),
            'units': images.units, 'sigmas': digest(np.float64(sigmas).tobytes()),
            'labels': None if labels is None else digest(labels.numpy().tobytes()), 'precision': o.precision,
            **{key: value for key, value in method._asdict().items() if key != 'batch'}}


def announce(o: EasyDict, images: ImageSet, method: Method, todo: list[int], missing: list[int], sigmas: np.ndarray, tiled: int,
             net: torch.nn.Module) -> None:
    """Prints what is about to be done."""
    noisy, clean = sigmas[todo], len(images) - len(todo)
    levels = f'{noisy.min():g}' if noisy.min() == noisy.max() else f'{noisy.min():g} to {noisy.max():g}'
    scale = tables.common_scale(images.units)
    if images.counts:
        levels += f' (counts, {images.counts.words()})'
    elif scale not in (None, 1) and not images.is_8bit:
        physical = f'{noisy.min() * scale:g}' if noisy.min() == noisy.max() else f'{noisy.min() * scale:g} to {noisy.max() * scale:g}'
        levels += f' ({physical} in the units of the values)'
    how = (f'{method.samples} posterior samples of {method.steps} steps' if method.samples else 'E[x_0 | y] in one evaluation')
    print(f'Denoising {len(missing)} images at level {levels}: {how}', flush=True)
    if len(missing) < len(todo):
        print(f'{len(todo) - len(missing)} images were done already')
    if clean:
        print(f'{clean} of {len(images)} images are of level 0 and stay as they are')
    if tiled:
        height, width = resolution(net)
        print(f'{tiled} of {len(images)} images are larger than {width}x{height} and are denoised in tiles with an overlap of '
              f'{method.overlap} pixels', flush=True)


def denoise(net: torch.nn.Module, images: ImageSet, indices: Sequence[int], sigmas: np.ndarray, labels: torch.Tensor | None,
            method: Method, work: Work) -> None:
    """Denoises this rank's share of the images. Raises UserError that names an image whose estimate is not finite."""
    mine = indices[distributed.rank()::distributed.size()]
    bar = Progress(len(mine), 'Denoising' + f' (rank {distributed.rank()})' * (distributed.size() > 1), show=distributed.rank() == 0)
    with bar:
        for part in groups(net, images, mine, sigmas, labels, method.batch):
            for found in estimates(net, part, method, bar.advance):
                values = [array for array in (found.mean, found.std, found.samples) if array is not None]
                if not all(np.isfinite(array).all() for array in values):
                    raise UserError(f'--network: its estimate of {images.names[found.index]} is not finite; the weights are broken, or '
                                    'overflow in --precision=fp16')
                work.write(found)
                bar.update()


def groups(net: torch.nn.Module, images: ImageSet, indices: Iterable[int], sigmas: np.ndarray, labels: torch.Tensor | None,
           batch: int) -> Iterator[list[Noisy]]:
    """Yields the images in lists of one shape, at most as many as are held at a time."""
    part = []
    for index in indices:
        image = torch.from_numpy(images.network(index))
        if part and (part[0].image.shape != image.shape or len(part) >= rows_of(net, image.shape, batch)):
            yield part
            part = []
        part.append(Noisy(index, image, float(sigmas[index]), None if labels is None else labels[index]))
    if part:
        yield part


def finish(o: EasyDict, net: torch.nn.Module, images: ImageSet, reference: Reference | None, method: Method, sigmas: np.ndarray,
           work: Work) -> list[str]:
    """Writes the images, the report and the picture from the finished work, which is removed; returns lines to print."""
    forms = Forms(images.source, images.path, bool(images.counts))
    report = Report(images, reference, method, sigmas)
    main = destination.open_dest(o.dest, images, forms)
    spread = destination.open_spread(o.dest, images, forms) if method.samples > 1 else None
    kept = destination.open_samples(o.dest, images, forms, method.samples) if method.keep else None
    others = [writer for writer in (spread, kept) if writer]
    with contextlib.ExitStack() as stack:
        for writer in (main, *others):
            stack.enter_context(writer)
        for index in Progress(len(images), 'Writing').over(range(len(images))):
            if not sigmas[index] > 0:
                for writer in (main, *others):
                    writer.keep(index)
                continue
            found = work.read(index)
            report.add(found, main.write(index, images.stored(found.mean, found.std)))
            if spread:
                spread.write(index, images.spread(found.std, found.mean))
            if kept:
                kept.write(index, images.stored(found.samples))
    work.remove()
    told = report.lines(main.clipped)
    picture = sheet.place(o.sheet, o.dest)
    if picture:
        report.draw(picture, o.dest)
        told.append(f'{picture}: before, after{", uncertainty" * (method.samples > 1)}{" and reference" * bool(reference)}')
    if o.report:
        report.write(o.report, o, net, main.clipped)
        told.append(f'{o.report}: the report')
    told += [f'{path}: {what}' for path, what in zip(destination.places(o.dest, method.samples, False)[1:], ['standard deviations'])]
    if kept:
        told.append(f'{destination.places(o.dest, 0, True)[-1]}: {method.samples} samples of each image')
    if forms.renamed:
        what = 'files of whole counts have become float32 .npy' if forms.floats else 'JPEG or WebP files have become PNG'
        told.append(f'{len(forms.renamed)} {what}, such as {next(iter(forms.renamed.values()))}')
    return [*told, f'{o.dest}: {len(images)} images']
