# SPDX-License-Identifier: Apache-2.0
"""Images or batches -> features -> numbers: the detectors, the readers of image files, and what is computed from both."""

import collections
import concurrent.futures
import dataclasses
import io
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch
from tqdm import tqdm

from dnnlib.util import file_digest
from metrics import inception
from metrics.frechet import frechet_distance
from metrics.statistics import Moments, Statistics
from torch_utils import distributed

PIXELS_MAX_DIM = 4096  # above this the covariance of raw pixels is larger than that of Inception's features, and says less
CLAMP = 1e-6           # floor of the probabilities under the logarithms of the Inception score, as published
LOSSY = ('.jpg', '.jpeg', '.webp')
PICTURES = ('.png', '.bmp', *LOSSY)
ARRAYS = ('.npy', '.npz')


class InceptionDetector:
    """The FID network: uint8 [n,1|3,H,W] -> (features [n,2048], logits [n,1008])."""

    name = 'inception'

    def __init__(self, weights=None, device='cpu'):
        self.device = torch.device(device)
        path = inception.weights_file(weights)
        self.weights, self.sha256 = weights or inception.URL, file_digest(path)
        self.net = inception.Inception(path).to(self.device)
        if not self.sha256.startswith(inception.SHA256):
            warn(f'{self.weights} is not the published Inception file: its numbers cannot be compared with published ones')

    def dim(self, shape):
        """Number of features of images [C,H,W]; raises click.ClickException for images it cannot take."""
        if shape[0] not in (1, 3):
            raise click.ClickException(f'--detector=inception: takes 1 or 3 channels, got {shape[0]}; use --detector=pixels')
        return inception.POOL_DIM

    @torch.no_grad()
    def __call__(self, images):
        return self.net(images.to(self.device))


class PixelDetector:
    """No network: uint8 [n,C,H,W] / 127.5 - 1, flattened; for small images, offline. It has no logits."""

    name, weights, sha256 = 'pixels', None, None

    def __init__(self, weights=None, device='cpu'):
        if weights is not None:
            raise click.ClickException(f'--detector-weights={weights}: --detector=pixels has no weights; leave the option out')
        self.device = torch.device(device)

    def dim(self, shape):
        """Number of features of images [C,H,W]; raises click.ClickException for large images."""
        dim = int(np.prod(shape))
        if dim > PIXELS_MAX_DIM:
            raise click.ClickException(f'--detector=pixels: images {list(shape)} have {dim} numbers each, allowed are '
                                       f'{PIXELS_MAX_DIM}; use --detector=inception')
        return dim

    def __call__(self, images):
        return images.to(self.device).flatten(1).double() / 127.5 - 1, None


@dataclasses.dataclass(frozen=True)
class Collected:
    """What one set of images comes down to."""

    statistics: Statistics
    inception_score: float | None  # None where the detector has no logits


def collect(batches, detector, total=None):
    """Statistics and Inception score of all ranks' images, on every rank.

    batches: this rank's share, an iterable of uint8 tensors or arrays [n,C,H,W]; rank 0 has at least one image.
    total: images over all ranks, for the progress bar. An error on one rank is raised on all of them."""
    run, error = _Run(detector), None
    try:
        with tqdm(total=total, unit='img', desc='features', disable=None if distributed.rank() == 0 else True) as bar:
            for images in batches:
                run.add(torch.as_tensor(images))
                bar.update(len(images) * distributed.size())
    except click.ClickException as err:
        error = err.message
    errors = [message for message in distributed.all_values(error) if message]
    if errors:
        raise click.ClickException(errors[0])
    return run.result()


class _Run:
    """The sums behind a Collected: moments of the features, and for the Inception score of p(y|x) and of p log p."""

    def __init__(self, detector):
        self.detector, self.shape, self.moments = detector, None, None
        self.classes = None  # float64 [K+1]: sum of p(y|x), then the sum over classes and images of p log p

    def add(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise click.ClickException(f'images must be uint8 [n,C,H,W], got {images.dtype} {list(images.shape)}')
        if self.moments is None:
            self._begin(tuple(images.shape[1:]))
        if self.shape != tuple(images.shape[1:]):
            raise click.ClickException(f'images are {list(images.shape[1:])}, earlier ones {list(self.shape)} [C,H,W]')
        features, logits = self.detector(images)
        self.moments.add(features)
        if logits is not None:
            p = logits.double().softmax(dim=1)
            sums = torch.cat([p.sum(0), (p * p.clamp(min=CLAMP).log()).sum().reshape(1)])
            self.classes = sums if self.classes is None else self.classes + sums

    def _begin(self, shape):
        self.shape = shape
        self.moments = Moments(self.detector.dim(shape), self.detector.device)

    def result(self):
        # A rank without images learns from rank 0 what shapes to add its zeros in.
        shape, num_classes = distributed.broadcast((self.shape, None if self.classes is None else len(self.classes)))
        if shape is None:
            raise click.ClickException('there are no images')
        if self.moments is None:
            self._begin(tuple(shape))
        self.moments.all_reduce()
        score = None
        if num_classes:
            sums = torch.zeros(num_classes, dtype=torch.float64) if self.classes is None else self.classes
            score = _inception_score(distributed.all_sum(sums.to(distributed.device())), self.moments.count)
        facts = {'detector': self.detector.name, 'detector_sha256': self.detector.sha256, 'shape': tuple(shape)}
        return Collected(self.moments.statistics(**facts), score)


def _inception_score(sums, count):
    """exp(E KL(p(y|x) || p(y))), one split: E sum p log p(y|x) - sum p(y) log p(y). Salimans et al. 2016, section 4."""
    marginal, negative_entropy = sums[:-1] / count, sums[-1] / count
    return float((negative_entropy - (marginal * marginal.clamp(min=CLAMP).log()).sum()).exp())


def check_reference(reference, detector, shape, name):
    """Refuses reference statistics that cannot be compared with images [C,H,W] seen through the detector; name: the file's."""
    if reference.detector not in (None, detector.name):
        raise click.ClickException(f'{name}: made with detector "{reference.detector}", not "{detector.name}"; '
                                   f'pass --detector={reference.detector} or other statistics')
    if None not in (reference.detector_sha256, detector.sha256) and reference.detector_sha256 != detector.sha256:
        raise click.ClickException(f'{name}: made with detector weights {reference.detector_sha256[:8]}, not '
                                   f'{detector.sha256[:8]}; pass the --detector-weights it was made with')
    if len(reference.mean) != (dim := detector.dim(shape)):
        raise click.ClickException(f'{name}: has {len(reference.mean)} dimensions, these images have {dim} with detector '
                                   f'"{detector.name}"; pass the --detector and image size it was made with')
    if detector.name == 'pixels' and reference.shape not in (None, tuple(shape)):
        raise click.ClickException(f'{name}: made from {list(reference.shape)} images, these are {list(shape)} [C,H,W]')


def numbers(found, reference):
    """{published name: value}: found, a Collected, against the reference Statistics."""
    try:
        distance = frechet_distance(found.statistics.mean, found.statistics.cov, reference.mean, reference.cov)
    except ValueError as err:
        raise click.ClickException(f'Fréchet distance: {err}') from None
    return {'fid_score': distance, 'inception_score': found.inception_score}


class ImageFiles:
    """The images of a folder (with sub-folders), a zip, an .npz or an .npy, in sorted order, all uint8 and of one shape.

    len() is their number, `shape` (C, H, W). option: what errors call the source, such as "--gen-path"."""

    def __init__(self, path, option):
        self.path, self._where = str(path), f'{option}={path}'
        self._names, self._load = _open_source(self.path, self._where)
        if not len(self._names):
            raise click.ClickException(f'{self._where}: holds no images ({", ".join(PICTURES)} or uint8 .npy)')
        lossy = sum(str(name).lower().endswith(LOSSY) for name in self._names)
        if lossy:
            warn(f'{self._where}: {lossy} of {len(self)} files are JPEG or WebP, whose compression changes the distance; use PNG')
        self.shape = self._read(0).shape

    def __len__(self):
        return len(self._names)

    def batches(self, batch_size, count=None):
        """uint8 tensors [n,C,H,W]: this rank's share of the first `count` images, decoded by threads a batch ahead."""
        mine = range(distributed.rank(), len(self) if count is None else count, distributed.size())
        ahead = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            try:
                for start in range(0, len(mine), batch_size):
                    ahead.append([pool.submit(self._checked, i) for i in mine[start:start + batch_size]])
                    if len(ahead) > 1:
                        yield _stack(ahead.popleft())
                while ahead:
                    yield _stack(ahead.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, index):
        """Image [C,H,W] uint8; a file that cannot be decoded is named."""
        try:
            return self._load(self._names[index])
        except DAMAGE as err:
            reason = (str(err) or type(err).__name__).splitlines()[0]
            raise click.ClickException(f'{self._where}: {self._names[index]} cannot be read as an image ({reason})') from None

    def _checked(self, index):
        image = self._read(index)
        if image.shape != self.shape:
            raise click.ClickException(f'{self._where}: {self._names[index]} is {list(image.shape)}, {self._names[0]} is '
                                       f'{list(self.shape)} [C,H,W]; all images must be of one size and mode')
        return image


def _stack(futures):
    return torch.from_numpy(np.stack([future.result() for future in futures]))


def _open_source(path, where):
    """(names, function from a name to its image) for a folder, zip or array file."""
    suffix = Path(path).suffix.lower()
    if os.path.isdir(path):
        files = (p.relative_to(path).as_posix() for p in Path(path).rglob('*') if p.is_file())
        return _image_names(files), lambda name: _decode(Path(path, name).read_bytes(), name)
    if not os.path.isfile(path):
        raise click.ClickException(f'{where}: no such folder or file')
    try:
        if suffix == '.zip':
            archive = zipfile.ZipFile(path)
            return _image_names(archive.namelist()), lambda name: _decode(archive.read(name), name)
        if suffix in ARRAYS:
            array, channel_axis = _image_array(path)
            return range(len(array)), lambda i: np.ascontiguousarray(np.moveaxis(array[i], channel_axis, 0))
    except DAMAGE as err:
        reason = (str(err) or type(err).__name__).splitlines()[0]
        raise click.ClickException(f'{where}: cannot be read ({reason})') from None
    raise click.ClickException(f'{where}: not a folder, .zip, .npz or .npy of images')


def _image_names(files):
    """Sorted; names that begin with a dot are other programs' notes."""
    kinds = (*PICTURES, '.npy')
    return sorted(name for name in files if name.lower().endswith(kinds) and not os.path.basename(name).startswith('.'))


def _image_array(path):
    """(uint8 array of four axes, the channel axis of one image) in an .npy or .npz, whose other arrays are let be."""
    data = np.load(path, mmap_mode='r', allow_pickle=False)
    if isinstance(data, np.ndarray):
        arrays = [data]
    else:
        with data:
            arrays = [data[key] for key in data.files]
    images = [a[..., None] if a.ndim == 3 else a for a in arrays if a.dtype == np.uint8 and a.ndim in (3, 4)]
    if len(images) != 1:
        raise ValueError(f'expected one uint8 array [N,H,W], [N,H,W,C] or [N,C,H,W], found {len(images)}')
    channels_last, channels_first = (images[0].shape[axis] in (1, 3) for axis in (3, 1))
    if not channels_last and not channels_first:
        raise ValueError(f'neither the last nor the second axis of {list(images[0].shape)} is 1 or 3 channels')
    return images[0], 2 if channels_last else 0


def _decode(data, name):
    """File contents -> uint8 [C,H,W]: grey stays one channel, palettes become RGB."""
    if name.lower().endswith('.npy'):
        image = np.load(io.BytesIO(data), allow_pickle=False)
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f'{image.dtype} {list(image.shape)}, expected uint8 [C,H,W]')
        return image
    with PIL.Image.open(io.BytesIO(data)) as picture:
        if picture.mode not in ('L', 'RGB', 'P', '1'):
            raise ValueError(f'mode {picture.mode}, expected 8-bit grey or RGB; convert it with dataset_tool.py')
        picture = picture.convert({'P': 'RGB', '1': 'L'}.get(picture.mode, picture.mode))
        image = np.array(picture)
    return image[None] if image.ndim == 2 else np.ascontiguousarray(image.transpose(2, 0, 1))


def warn(text):
    """One line on rank 0's error stream."""
    distributed.print0(f'Warning: {text}', file=sys.stderr)


# What Pillow, numpy and zipfile raise for files that are damaged or are something else.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError,
          PIL.Image.DecompressionBombError)

DETECTORS = {'inception': InceptionDetector, 'pixels': PixelDetector}
