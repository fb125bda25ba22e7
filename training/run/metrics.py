# SPDX-License-Identifier: Apache-2.0
"""Metrics of samples of the weight average during training, every --metrics-every ticks, against reference statistics."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from dnnlib import UserError
from metrics.detectors import DETECTORS
from metrics.evaluate import Settings, check_reference, evaluate_batches, needs_features
from metrics.manifold import DC_K, PR_K
from metrics.references import fetch
from metrics.statistics import load_statistics
from torch_utils import distributed, misc, registry
from training.evaluation.images import uint8_batches
from training.run.config import RunConfig
from training.sampling.outputs import Output, Plain, open_output

BATCH = 64  # batch size per rank; eval_fid.py's default
# Names in the log, where they are shorter than the published ones, or end in a digit that would run into the number of images.
NAMES = {'fid_score': 'fid', 'fd_dinov2': 'fd_dinov2_', 'fd_vgg16': 'fd_vgg16_'}
# Options of eval_fid.py that errors of the shared code name, and what train.py calls them.
RENAMED = {'--detector-weights=': '--metrics-detector=inception:weights=', '--detector=': '--metrics-detector=',
           'make them again with "ref", or pass the images with --ref-path': 'make them again with "eval_fid.py ref"',
           'pass the --detector ': 'pass the --metrics-detector ',
           ', or --other-shape to compare them all the same': '',
           'give images with --ref-path, or make statistics with "ref"': 'make statistics with "eval_fid.py ref"'}


def output_of(net: torch.nn.Module, run: RunConfig, device: torch.device | str) -> Output:
    """What the grids and metrics of a RunConfig make of a network's samples (sampling/outputs.py). Every rank calls this.

    Where an autoencoder cannot be opened, grids show latents, with a warning; metrics are refused (UserError)."""
    if run.metrics or run.samples and run.snapshot_ticks:
        try:
            return open_output(net, device=device)
        except UserError as err:
            if run.metrics:
                raise
            distributed.print0(f'Warning: grids of samples show latents, not pictures: {err.message}')
    return Plain(net)


class PeriodicMetrics:
    """Evaluates a network on the images of seeds 0 .. num - 1, rounded to 8 bits as in a PNG.

    num: images over all ranks. ref: .npz or URL of Statistics. names: of evaluate.METRICS. detector: a spec of DETECTORS.
    output: of sampling/outputs.py. Raises UserError, on all ranks, for everything that would fail later."""

    def __init__(self, num: int, ref: str, names: Iterable[str], detector: str, output: Output, device: torch.device) -> None:
        self.num, self.names, self.output, shape = num, tuple(names), output, tuple(output.shape)
        with _as_train_says():
            path = distributed.first_on_node(fetch, ref, '--metrics-ref')
            name = f'--metrics-ref={ref}'
            features = needs_features(names) and distributed.rank() == 0
            self.reference = load_statistics(path, name, features, registry.parse(detector)[0])
            self.detector = distributed.first_on_node(registry.build(detector, DETECTORS, '--detector'), device=device)
            distributed.from_rank0(self._check, name, shape)
        self.settings = self._settings()

    def _check(self, name, shape):
        """Refuses references, detectors and counts of images from which the metrics cannot be computed."""
        chosen, reference = f'--metrics={",".join(self.names)}', self.reference
        if needs_features(self.names) and reference.features is None:
            raise UserError(f'{name}: {chosen} compare images, and these statistics hold no features; '
                            'make them with "eval_fid.py ref --keep-features"')
        check_reference(reference, self.detector, shape, name, self.names)
        logits = self.detector(torch.zeros(1, *shape, dtype=torch.uint8))[1]
        if 'is' in self.names and logits is None:
            raise UserError(f'{chosen}: the Inception score needs logits, and --metrics-detector={self.detector.name} '
                            'has none; leave "is" out')
        neighbours = max([k for metric, k in (('pr', PR_K), ('dc', DC_K)) if metric in self.names], default=0)
        if neighbours and len(reference.features) <= neighbours:
            raise UserError(f'{name}: {chosen} need more than {neighbours} images, and it has {len(reference.features)}')
        if 'fid_inf' in self.names and self.num < 4:
            raise UserError(f'--metrics-num={self.num}: {chosen} need 4 images or more')
        if 'pr' in self.names and self.num <= PR_K:
            raise UserError(f'--metrics-num={self.num}: {chosen} need more than {PR_K} images')

    def _settings(self):
        """The published settings, limited by the number of images: KID is unbiased for subsets of any size."""
        rows = len(self.reference.features) if self.reference.features is not None else self.num
        plain = Settings()
        return Settings(kid_subset_size=min(plain.kid_subset_size, self.num, rows), splits=min(plain.splits, self.num))

    def __call__(self, net: torch.nn.Module, stop: Callable[[], bool] = lambda: False, **pieces) -> dict[str, float | None]:
        """{'Metrics/fid2k': value, ...} of a network in eval mode, on every rank; {} and a warning where they cannot be computed.

        stop(): whether this rank should stop early, which makes the result {}.
        pieces: schedule, stepper and num_steps of generate_images; by default EDM's sampler with 18 steps."""
        try:
            batches = until(stop, uint8_batches(net, range(self.num), BATCH, 'the weight average', self.output, **pieces))
            values = evaluate_batches(batches, self.detector, self.reference, self.names, self.settings, self.num)
        except UserError as err:  # such as non-finite images, from which training may recover
            distributed.print0(f'Warning: no metrics this time: {err.message}')
            return {}
        return {f'Metrics/{NAMES.get(name, name)}{short(self.num)}': misc.as_float(value)
                for name, value in values.items()}


def until(stop: Callable[[], bool], batches: Iterable) -> Iterator:
    """The batches; raises UserError, which the metrics pass on to every rank, as soon as stop() is true."""
    for batch in batches:
        if stop():
            raise UserError('the run was asked to end')
        yield batch


@contextlib.contextmanager
def _as_train_says():
    """Rewrites errors raised inside so that they name the options of train.py."""
    try:
        yield
    except UserError as err:
        message = err.message
        for theirs, ours in RENAMED.items():
            message = message.replace(theirs, ours)
        raise UserError(message) from None


def short(num: int) -> str:
    """Number of images in a metric's name: 2000 -> "2k", 512 -> "512"."""
    return f'{num // 1000}k' if num % 1000 == 0 else str(num)
