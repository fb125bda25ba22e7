# SPDX-License-Identifier: Apache-2.0
"""Images or batches -> features -> numbers, over all ranks; one pass over the images for all metrics."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import torch

from dnnlib import UserError
from dnnlib.progress import Progress
from metrics import intervals, kernel, manifold, scores
from metrics.detectors import Detector
from metrics.frechet import frechet_distance
from metrics.image_files import BadImages
from metrics.statistics import Moments, Statistics
from torch_utils import distributed

GATHER_ROWS = 4096  # rows of features that ranks exchange at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that affect the results, besides the images and the detector."""

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    pr_k: int = manifold.PR_K
    dc_k: int = manifold.DC_K
    splits: int = 10
    seed: int = 2020  # for KID's subsets, the Inception score's splits and halves of images; torch-fidelity's default
    intervals: bool = False  # whether to compute confidence intervals, for the metrics that have them


@dataclasses.dataclass(frozen=True)
class Collected:
    """What the metrics need of one set of images."""

    statistics: Statistics            # including features on rank 0, and spatial statistics, if a metric needs them
    class_sums: torch.Tensor | None   # scores.split_sums of all images; None if not needed, or if the detector has no logits


def evaluate_batches(batches: Iterable, detector: Detector, reference: Statistics, metrics: Sequence[str] = ('fid',),
                     settings: Settings = Settings(), total: int | None = None) -> dict:
    """{published name: value} of images against reference Statistics, on every rank; with settings.intervals also
    'intervals': {published name: {'low', 'high', 'level', 'method'}}.

    batches, detector, total: as for collect(). metrics: names in METRICS. An error on one rank is raised on all."""
    found = collect(batches, detector, total, metrics, settings)
    return distributed.from_rank0(numbers, found, reference, metrics, settings, detector.device)


def collect(batches: Iterable, detector: Detector, total: int | None = None, metrics: Sequence[str] = ('fid',),
            settings: Settings = Settings(), keep_features: bool = False, keep_spatial: bool = False) -> Collected:
    """Features and statistics of all ranks' images, a Collected on every rank.

    batches: an iterable of uint8 tensors or arrays [n,C,H,W]; rank r of R yields images r, r + R, r + 2R, ... in this order, so that
    the overall order does not depend on R. total: images over all ranks, for the progress bar. keep_features: even if no metric needs
    them. keep_spatial: statistics of spatial features too, if the detector has them.
    Raises UserError; an error on one rank is raised on all of them."""
    keep_features = keep_features or any(metric.features for metric in _chosen(metrics)) or (
        settings.intervals and any(metric.interval for metric in _chosen(metrics)))
    keep_spatial = getattr(detector, 'spatial_dim', None) and (keep_spatial or any(metric.spatial for metric in _chosen(metrics)))
    run, error = _Run(detector, settings, any(metric.logits for metric in _chosen(metrics)), keep_features, keep_spatial), None
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
    """Raises on every rank the error of any; unusable images of all ranks are reported together."""
    told = error and ((error.where, error.bad, error.total) if isinstance(error, BadImages) else error.message)
    found = [each for each in distributed.all_values(told) if each]
    lines, bad = ([each for each in found if isinstance(each, str) is kind] for kind in (True, False))
    if lines:
        raise UserError(lines[0])
    if bad:
        raise BadImages(bad[0][0], [item for _, items, _ in bad for item in items], sum(total for *_, total in bad))


class _Run:
    """Accumulates over the batches of this rank: moments, and features and logits if they are needed."""

    def __init__(self, detector, settings, keep_logits, keep_features, keep_spatial=False):
        self.detector, self.settings, self.shape, self.moments = detector, settings, None, None
        self.logits = [] if keep_logits else None
        self.features = [] if keep_features else None
        self.spatial = Moments(detector.spatial_dim, detector.device) if keep_spatial else None

    def add(self, images):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(f'images must be uint8 [n,C,H,W], got {images.dtype} {list(images.shape)}')
        if self.moments is None:
            self._begin(tuple(images.shape[1:]))
        if self.shape != tuple(images.shape[1:]):
            raise UserError(f'images are {list(images.shape[1:])}, earlier ones {list(self.shape)} [C,H,W]')
        if self.spatial is None:
            features, logits = self.detector(images)
        else:
            features, logits, spatial = self.detector(images, spatial=True)
            self.spatial.add(spatial)
        self.moments.add(features)
        if self.features is not None:
            self.features.append(features.float().cpu())
        if self.logits is not None and logits is not None:
            self.logits.append(logits.cpu())

    def _begin(self, shape):
        self.shape = shape
        self.moments = Moments(self.detector.dim(shape), self.detector.device)

    def result(self):
        # A rank without images learns from rank 0 the shapes of its zeros.
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
        return Collected(self.moments.statistics(**facts, **self._spatial_statistics(), features=features), sums)

    def _spatial_statistics(self):
        if self.spatial is None:
            return {}
        self.spatial.all_reduce()
        found = self.spatial.statistics()
        return {'spatial_mean': found.mean, 'spatial_cov': found.cov}

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


def needs_features(metrics: Sequence[str]) -> bool:
    """Whether any of the metrics, or their intervals, needs features of single reference images, not only their statistics."""
    return any(metric.features == 'both' for metric in _chosen(metrics))


def _chosen(metrics):
    return [METRICS[name] for name in METRICS if name in metrics]


def check_detector(detector: Detector, metrics: Sequence[str]) -> None:
    """Refuses metrics that the detector does not support."""
    for name in metrics:
        kind = METRICS[name].detector
        if kind and detector.name.partition(':')[0] != kind:
            raise UserError(f'--metrics={",".join(metrics)}: {name} needs --detector={kind}, not --detector={detector.name}; '
                            f'leave {name} out, or evaluate it with --detector={kind}')


def check_shape(found: Sequence[int] | None, shape: Sequence[int], name: str, other_shape: bool = False) -> None:
    """Refuses a reference whose images have another size or mode than [C,H,W], if that is known; name: the reference's.

    other_shape: whether the user has allowed that."""
    if found is not None and tuple(found) != tuple(shape) and not other_shape:
        raise UserError(f'{name}: made from {list(found)} images, these are {list(shape)} [C,H,W]; pass a reference of such images, '
                        'or --other-shape to compare them all the same')


def check_reference(reference: Statistics, detector: Detector, shape: Sequence[int], name: str, metrics: Sequence[str] = ('fid',),
                    other_shape: bool = False) -> None:
    """Refuses reference statistics that cannot be compared with features of images [C,H,W] from the detector; name: the file's.

    other_shape: whether images of another size or mode are allowed; for raw pixels they never are."""
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
    check_detector(detector, metrics)
    if any(metric.spatial for metric in _chosen(metrics)) and reference.spatial_mean is None:
        raise UserError(f'{name}: --metrics={",".join(metrics)}: sfid compares spatial features, and these statistics have none '
                        '(mu_s, sigma_s); make them again with "ref", or pass the images with --ref-path')
    if needs_features(metrics) and reference.features is None:
        raise UserError(f'{name}: --metrics={",".join(metrics)} compare single images, and these statistics have no features; '
                        'make them with "ref --keep-features", or pass the images with --ref-path')


def numbers(found: Collected, reference: Statistics, metrics: Sequence[str] = ('fid',), settings: Settings = Settings(),
            device: torch.device | str | None = None) -> dict:
    """{published name: value} of found, a Collected, against the reference Statistics; features are compared on `device`."""
    task, values = Task(found, reference, tuple(metrics), settings, device), {}
    try:
        for compute in dict.fromkeys(metric.compute for metric in _chosen(metrics)):
            values |= compute(task)
    except ValueError as err:
        hint = '; pass --kid-subset-size' if 'subsets of' in str(err) else ''
        raise UserError(f'--metrics={",".join(metrics)}: {err}{hint}') from None
    return values | ({'intervals': task.intervals} if settings.intervals else {})


def distance_name(detector: str) -> str:
    """The name of the Fréchet distance in results. With other features than Inception's it is not an FID, and must not be quoted as one."""
    return {'dinov2': 'fd_dinov2', 'clip': 'fd_clip', 'vgg16': 'fd_vgg16'}.get((detector or '').partition(':')[0], 'fid_score')


@dataclasses.dataclass
class Task:
    """The input of the metrics for one set of images; intervals: {published name: interval}, to which they add."""

    found: Collected
    reference: Statistics
    metrics: tuple
    settings: Settings
    device: object
    intervals: dict = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> Statistics:
        return self.found.statistics

    @functools.cached_property
    def distance(self) -> float:
        return frechet_distance(self.ours.mean, self.ours.cov, self.reference.mean, self.reference.cov)

    @functools.cached_property
    def spread(self) -> tuple:
        return intervals.frechet_spread(self.ours.features, self.reference.mean, self.reference.cov, self.settings.seed, self.device)


def _distance(task):
    name = distance_name(task.ours.detector)
    if task.settings.intervals:
        task.intervals[name] = intervals.frechet_interval(task.distance, task.spread, *task.ours.features.shape)
    return {name: task.distance}


def _distance_at_infinity(task):
    name = distance_name(task.ours.detector).removesuffix('_score') + '_inf'
    if task.settings.intervals:
        task.intervals[name] = intervals.extrapolated_interval(task.distance, task.spread, *task.ours.features.shape)
    return {name: intervals.extrapolated(task.distance, task.spread)}


def _spatial_distance(task):
    ours, reference = task.ours, task.reference
    return {'sfid': frechet_distance(ours.spatial_mean, ours.spatial_cov, reference.spatial_mean, reference.spatial_cov)}


def _kernel_distance(task):
    sides, s = (task.ours.features, task.reference.features), task.settings
    mean, deviation = kernel.kernel_distance(*sides, s.kid_subsets, s.kid_subset_size, s.seed, task.device)
    if s.intervals:
        task.intervals['kid'] = intervals.kernel_interval(mean, deviation, s.kid_subsets, s.kid_subset_size, *sides, task.device)
    return {'kid': mean, 'kid_std': deviation}


def _gaussian_kernel_distance(task):
    return {'cmmd': kernel.gaussian_distance(task.ours.features, task.reference.features, device=task.device)}


def _manifold(task):
    """pr and dc in one pass over the distances, which takes minutes at 50,000 images."""
    k = lambda name, value: value if name in task.metrics else None
    return manifold.manifold_metrics(task.reference.features, task.ours.features, k('pr', task.settings.pr_k),
                                     k('dc', task.settings.dc_k), task.device)


def _inception_scores(task):
    """Over all images in one split, as EDM's evaluation code reports it, and mean and deviation over splits, as papers do."""
    class_sums = task.found.class_sums
    if class_sums is None:  # the detector has no logits
        return {'inception_score': None}
    parts, whole = scores.scores(class_sums), scores.scores(class_sums.sum(0, keepdim=True))
    return {'inception_score': float(whole), 'inception_score_mean': float(parts.mean()),
            'inception_score_std': float(parts.std(unbiased=False))}


@dataclasses.dataclass(frozen=True)
class Metric:
    """what: one sentence for --metrics=help. compute: Task -> {published name: value}, called once for all metrics that share it.
    features: which images' features it needs ('ours' or 'both'). logits, spatial: whether it needs those of our images. interval: whether
    it has one. detector: the only one that it is defined for."""

    what: str
    compute: Callable
    features: str | None = None
    logits: bool = False
    spatial: bool = False
    interval: bool = False
    detector: str | None = None


REFERENCE_TOO = '; needs the features of the reference'
METRICS = {
    'fid': Metric('Fréchet distance of features to the reference (Heusel et al. 2017): FID by inception, FD-DINOv2 by dinov2',
                  _distance, interval=True),
    'fid_inf': Metric('the same, extrapolated to infinitely many generated images (Chong & Forsyth 2020)',
                      _distance_at_infinity, features='ours', interval=True),
    'sfid': Metric('Fréchet distance of spatial features, --detector=inception only (Nash et al. 2021)', _spatial_distance,
                   spatial=True, detector='inception'),
    'kid': Metric(f'kernel distance, unbiased (Bińkowski et al. 2018){REFERENCE_TOO}', _kernel_distance, features='both', interval=True),
    'cmmd': Metric(f'maximum mean discrepancy of CLIP embeddings, --detector=clip only (Jayasumana et al. 2024){REFERENCE_TOO}',
                   _gaussian_kernel_distance, features='both', detector='clip'),
    'is': Metric('Inception score of the generated images, for detectors with logits (Salimans et al. 2016)', _inception_scores,
                 logits=True),
    'pr': Metric(f'precision and recall (Kynkäänniemi et al. 2019){REFERENCE_TOO}', _manifold, features='both'),
    'dc': Metric(f'density and coverage (Naeem et al. 2020){REFERENCE_TOO}', _manifold, features='both'),
}
