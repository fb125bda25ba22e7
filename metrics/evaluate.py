# SPDX-License-Identifier: Apache-2.0
"""Images or batches -> features -> numbers, over all ranks; one pass over the images for all metrics."""

import dataclasses

import torch

from dnnlib import UserError
from dnnlib.progress import Progress
from metrics import kernel, manifold, scores
from metrics.frechet import frechet_distance
from metrics.image_files import BadImages
from metrics.statistics import Moments, Statistics
from torch_utils import distributed

GATHER_ROWS = 4096  # rows of features that ranks exchange at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the numbers beside the images and the detector."""

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    pr_k: int = manifold.PR_K
    dc_k: int = manifold.DC_K
    splits: int = 10
    seed: int = 2020  # of KID's subsets and of the Inception score's splits; torch-fidelity's default


@dataclasses.dataclass(frozen=True)
class Collected:
    """What one set of images comes down to."""

    statistics: Statistics            # with features, on rank 0, where a metric needs them
    class_sums: torch.Tensor | None   # scores.split_sums of all images; None where not asked for, or where the detector has no logits


def evaluate_batches(batches, detector, reference, metrics=('fid',), settings=Settings(), total=None):
    """{published name: value} of images against reference Statistics, on every rank.

    batches, detector, total: as for collect(). metrics: names in METRICS. An error on one rank is raised on all."""
    found = collect(batches, detector, total, metrics, settings)
    return distributed.from_rank0(numbers, found, reference, metrics, settings, detector.device)


def collect(batches, detector, total=None, metrics=('fid',), settings=Settings(), keep_features=False):
    """What the metrics need to know of all ranks' images, a Collected on every rank.

    batches: an iterable of uint8 tensors or arrays [n,C,H,W]; rank r of R yields images r, r + R, r + 2R, ... in this order, so that
    the ranks do not change the order of all. total: images over all ranks, for the progress bar. keep_features: whatever the metrics.
    Raises UserError; an error on one rank is raised on all of them."""
    run, error = _Run(detector, settings, 'is' in metrics, keep_features or needs_features(metrics)), None
    try:
        with Progress(total, 'features', show=distributed.rank() == 0) as bar:
            for images in batches:
                run.add(torch.as_tensor(images))
                bar.update(len(images) * distributed.size())
    except UserError as err:
        error = err
    _raise_any(error)
    return run.result()


def _raise_any(error):
    """Raises on every rank what went wrong on any; images that cannot be used are told of together."""
    told = error and ((error.where, error.bad, error.total) if isinstance(error, BadImages) else error.message)
    found = [each for each in distributed.all_values(told) if each]
    lines, bad = ([each for each in found if isinstance(each, str) is kind] for kind in (True, False))
    if lines:
        raise UserError(lines[0])
    if bad:
        raise BadImages(bad[0][0], [item for _, items, _ in bad for item in items], sum(total for *_, total in bad))


class _Run:
    """What accumulates over the batches of this rank: moments, and features and logits where they are needed."""

    def __init__(self, detector, settings, keep_logits, keep_features):
        self.detector, self.settings, self.shape, self.moments = detector, settings, None, None
        self.logits = [] if keep_logits else None
        self.features = [] if keep_features else None

    def add(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(f'images must be uint8 [n,C,H,W], got {images.dtype} {list(images.shape)}')
        if self.moments is None:
            self._begin(tuple(images.shape[1:]))
        if self.shape != tuple(images.shape[1:]):
            raise UserError(f'images are {list(images.shape[1:])}, earlier ones {list(self.shape)} [C,H,W]')
        features, logits = self.detector(images)
        self.moments.add(features)
        if self.features is not None:
            self.features.append(features.float().cpu())
        if self.logits is not None and logits is not None:
            self.logits.append(logits.cpu())

    def _begin(self, shape):
        self.shape = shape
        self.moments = Moments(self.detector.dim(shape), self.detector.device)

    def result(self):
        # A rank without images learns from rank 0 what shapes to add its zeros in.
        classes = self.logits[0].shape[1] if self.logits else None
        shape, classes = distributed.broadcast((self.shape, classes))
        if shape is None:
            raise UserError('there are no images')
        if self.moments is None:
            self._begin(tuple(shape))
        own = self.moments.count
        self.moments.all_reduce()
        mine = range(distributed.rank(), self.moments.count, distributed.size())
        if not all(distributed.all_values(own == len(mine))):
            raise UserError(f'{self.moments.count} images are unevenly shared among {distributed.size()} ranks')
        sums = self._class_sums(mine, classes) if classes else None
        features = None if self.features is None else self._all_features(mine)
        facts = {'detector': self.detector.name, 'detector_sha256': self.detector.sha256, 'shape': tuple(shape)}
        return Collected(self.moments.statistics(**facts, features=features), sums)

    def _class_sums(self, mine, classes):
        try:
            where = scores.split_of(self.moments.count, self.settings.splits, self.settings.seed)
        except ValueError as err:
            raise UserError(f'--splits={self.settings.splits}: {err}') from None
        logits = torch.cat(self.logits) if self.logits else torch.zeros(0, classes)
        sums = scores.split_sums(logits, where[mine.start::mine.step], self.settings.splits)
        return distributed.all_sum(sums.to(distributed.device())).cpu()

    def _all_features(self, mine):
        """Every rank's rows in the order of the images, float32 [N,D] on rank 0; None on the others."""
        count, dim = self.moments.count, len(self.moments.mean)
        rows = torch.cat(self.features) if self.features else torch.zeros(0, dim)
        if distributed.size() == 1:
            return rows.numpy()
        whole = torch.empty(count, dim) if distributed.rank() == 0 else None
        for first in range(0, count, GATHER_ROWS):
            part = torch.zeros(min(GATHER_ROWS, count - first), dim)
            inside = [(place, i) for place, i in enumerate(mine) if first <= i < first + len(part)]
            if inside:
                place, index = torch.tensor(inside).T
                part[index - first] = rows[place]
            part = distributed.all_sum(part.to(distributed.device()))  # one rank has each row, the others add zeros
            if whole is not None:
                whole[first:first + len(part)] = part.cpu()
        return None if whole is None else whole.numpy()


def needs_features(metrics):
    """Whether any of the metrics compares images and not statistics."""
    return bool({'kid', 'pr', 'dc'} & set(metrics))


def check_shape(found, shape, name, other_shape=False):
    """Refuses a reference of images of another size or mode than [C,H,W], where that is known; name: the reference's.

    other_shape: whether the user knows and wants it."""
    if found is not None and tuple(found) != tuple(shape) and not other_shape:
        raise UserError(f'{name}: made from {list(found)} images, these are {list(shape)} [C,H,W]; pass a reference of such images, '
                        'or --other-shape to compare them all the same')


def check_reference(reference, detector, shape, name, metrics=('fid',), other_shape=False):
    """Refuses reference statistics that cannot be compared with images [C,H,W] seen through the detector; name: the file's.

    other_shape: whether images of another size or mode are compared; those of raw pixels never are."""
    if reference.detector not in (None, detector.name):
        raise UserError(f'{name}: made with detector "{reference.detector}", not "{detector.name}"; '
                        f'pass --detector={reference.detector} or other statistics')
    if None not in (reference.detector_sha256, detector.sha256) and reference.detector_sha256 != detector.sha256:
        raise UserError(f'{name}: made with detector weights {reference.detector_sha256[:8]}, not '
                        f'{detector.sha256[:8]}; pass the weights it was made with')
    if len(reference.mean) != (dim := detector.dim(shape)):
        raise UserError(f'{name}: has {len(reference.mean)} dimensions, these images have {dim} with detector '
                        f'"{detector.name}"; pass the --detector and image size it was made with')
    if detector.name == 'pixels' and reference.shape not in (None, tuple(shape)):
        raise UserError(f'{name}: made from {list(reference.shape)} images, these are {list(shape)} [C,H,W]')
    check_shape(reference.shape, shape, name, other_shape)
    if needs_features(metrics) and reference.features is None:
        raise UserError(f'{name}: --metrics={",".join(metrics)} compare images, and these statistics hold no features; '
                        'make them with "ref --keep-features", or pass the images with --ref-path')


def numbers(found, reference, metrics=('fid',), settings=Settings(), device=None):
    """{published name: value}: found, a Collected, against the reference Statistics; features are compared on `device`."""
    ours, values = found.statistics, {}
    try:
        if 'fid' in metrics:
            values['fid_score'] = frechet_distance(ours.mean, ours.cov, reference.mean, reference.cov)
        if 'kid' in metrics:
            values['kid'], values['kid_std'] = kernel.kernel_distance(
                ours.features, reference.features, settings.kid_subsets, settings.kid_subset_size, settings.seed, device)
        if 'is' in metrics:
            values |= _inception_scores(found.class_sums)
        if 'pr' in metrics or 'dc' in metrics:  # in one pass over the distances, which takes minutes at 50,000 images
            values |= manifold.manifold_metrics(reference.features, ours.features, settings.pr_k if 'pr' in metrics else None,
                                                settings.dc_k if 'dc' in metrics else None, device)
    except ValueError as err:
        hint = '; pass --kid-subset-size' if 'subsets of' in str(err) else ''
        raise UserError(f'--metrics={",".join(metrics)}: {err}{hint}') from None
    return values


def _inception_scores(class_sums):
    """All images in one split, as this program's ancestors print it, and mean and deviation over splits, as papers do."""
    if class_sums is None:  # the detector has no logits
        return {'inception_score': None}
    parts, whole = scores.scores(class_sums), scores.scores(class_sums.sum(0, keepdim=True))
    return {'inception_score': float(whole), 'inception_score_mean': float(parts.mean()),
            'inception_score_std': float(parts.std(unbiased=False))}


METRICS = ('fid', 'kid', 'is', 'pr', 'dc')
