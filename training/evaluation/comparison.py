# SPDX-License-Identifier: Apache-2.0
"""The work of eval_fid.py: compares images, or a sweep of sampler settings, with a reference, and writes results with their settings."""

import dataclasses
from collections.abc import Sequence

from dnnlib import EasyDict, UserError
from dnnlib.files import prepare_output, write_json
from metrics import references, report, results
from metrics.detectors import DETECTORS, Detector
from metrics.evaluate import Settings, check_detector, check_reference, check_shape, evaluate_batches, needs_features
from metrics.image_files import ImageFiles
from metrics.statistics import Statistics, save_statistics
from torch_utils import distributed, numerics, registry
from torch_utils.command_line import ranges
from training.evaluation.images import NetworkImages, RecordedImages
from training.evaluation.sweep import Sweep
from training.sampling import record


def evaluate(o: EasyDict) -> None:
    """The main command: reads or generates images, computes the metrics, prints them, and writes the JSON. o: the options."""
    distributed.init()
    numerics.set_numerics()
    if o.out_path:
        prepare_output(o.out_path, '--out-path')
    source = NetworkImages(o) if o.network else RecordedImages(o)
    out_path = o.out_path or source.default_path(results.SUFFIX)
    prepare_output(out_path, '--out-path')
    reference, detector, digest = open_comparison(o, source.shape)
    reference = make_ready(o, reference, detector, source.shape)
    values = measure(o, source, reference, detector)
    if distributed.rank() == 0:
        result = provenance(values, o, source, detector, reference, digest)
        told = write_json(out_path, result, null=True) if o.out_path else results.write_beside(out_path, result)
        report.print_table(values, result)
        print(f'written to {out_path}{"".join(f"; {line}" for line in told or ())}')


def open_comparison(o: EasyDict, shape: Sequence[int]) -> tuple[ImageFiles | Statistics, Detector, str | None]:
    """(reference images or statistics, detector, SHA-256 of the reference), checked for images of shape [C,H,W]."""
    reference, digest = references.open_reference(o.ref_stats, o.ref_path, o.detector, needs_features(o.metrics))
    check_shape(reference.shape, shape, reference_option(o), o.other_shape)
    detector = make_detector(o)
    detector.dim(shape)
    return reference, detector, digest


def make_ready(o: EasyDict, reference: ImageFiles | Statistics, detector: Detector, shape: Sequence[int]) -> Statistics:
    """The reference Statistics with which images of shape [C,H,W] are compared; computes them from reference images."""
    if isinstance(reference, ImageFiles):
        check_detector(detector, o.metrics)  # before the features of the images are computed
        reference = references.statistics_of(reference, detector, o.batch_size, needs_features(o.metrics))
        reference = dataclasses.replace(reference, split=o.split, source=o.ref_path)
    distributed.from_rank0(check_reference, reference, detector, shape, reference_option(o), o.metrics, o.other_shape)
    references.warn(reference, detector, shape, reference_option(o))
    return reference


def reference_option(o: EasyDict) -> str:
    """The option that names the reference, as errors name it."""
    return f'--ref-path={o.ref_path}' if o.ref_path else f'--ref-stats={o.ref_stats}'


def settings_of(o: EasyDict) -> Settings:
    """The Settings that the options ask for."""
    return Settings(o.kid_subsets, o.kid_subset_size, splits=o.splits, seed=o.metric_seed, intervals=o.intervals)


def measure(o: EasyDict, source: NetworkImages | RecordedImages, reference: Statistics, detector: Detector) -> list[dict]:
    """One {name: value} per repeat."""
    values = []
    for batches in source.repeats():
        values.append(evaluate_batches(batches, detector, reference, o.metrics, settings_of(o), source.count))
        source.check_unchanged()
    return values


def run_sweep(o: EasyDict) -> None:
    """The `sweep` command: all options are checked before the first cell. Features of reference images are computed only if a cell is
    unfinished."""
    distributed.init()
    numerics.set_numerics()
    cells = Sweep(o)
    reference, detector, digest = open_comparison(o, cells.shape)
    facts = {'metrics': metrics_facts(o), **common_facts(o, detector), 'reference': {
        'path': o.ref_path or o.ref_stats, 'sha256': digest, 'split': o.split if o.ref_path else reference.split,
        'num_images': len(reference) if o.ref_path else reference.num_images}}
    todo = cells.unfinished(facts)
    if todo:
        reference = make_ready(o, reference, detector, cells.shape)
    cells.run(todo, lambda o, source: provenance(measure(o, source, reference, detector), o, source, detector, reference, digest))
    cells.write()


def write_reference(o: EasyDict) -> None:
    """The `ref` command."""
    distributed.init()
    numerics.set_numerics()
    prepare_output(o.dest, '--dest')
    stats = references.statistics_of(ImageFiles(o.data, '--data'), make_detector(o), o.batch_size, o.keep_features)
    if distributed.rank() == 0:
        save_statistics(dataclasses.replace(stats, source=o.data, split=o.split), o.dest)
        print(f'{stats.num_images} images, {len(stats.mean)} features ({stats.detector}) -> {o.dest}')


def make_detector(o: EasyDict) -> Detector:
    """The detector on its device; one rank per node downloads its weights."""
    weights = {'weights': o.detector_weights} if o.detector_weights else {}
    name = registry.parse(o.detector)[0]
    if weights and 'weights' not in registry.parameters(DETECTORS[name]):
        raise UserError(f'--detector-weights={o.detector_weights}: --detector={name} has no weights; leave the option out')
    made = registry.build(o.detector, DETECTORS, '--detector', **weights)
    return distributed.first_on_node(made, device=distributed.pick_device(o.device))


def metrics_facts(o: EasyDict) -> dict:
    """The metrics that were computed, and their settings."""
    return {'names': list(o.metrics), **dataclasses.asdict(settings_of(o))}


def provenance(values: list[dict], o: EasyDict, source: NetworkImages | RecordedImages, detector: Detector, reference: Statistics,
               digest: str | None) -> dict:
    """The content of the JSON: the numbers under their published names (means over repeats), then everything on which they depend."""
    means = report.summary(values)
    repeats = {'repeats': [{**label, **found} for label, found in zip(source.labels, values)]} if o.network else {}
    return {
        **{name: found['mean'] for name, found in means.items()},
        **({'summary': means} if len(values) > 1 else {'intervals': values[0]['intervals']} if o.intervals else {}),
        **repeats,
        'metrics': metrics_facts(o),
        'num_images': source.count,
        'found_images': source.found,
        'image_shape': list(source.shape),
        'generated': source.facts(),
        'reference': references.facts(reference, o.ref_path or o.ref_stats, digest),
        **common_facts(o, detector),
    }


def common_facts(o: EasyDict, detector: Detector) -> dict:
    """What every result states: detector, machine, and the options that were given on the command line (o.given)."""
    told = {key: o[key] for key in o.given if o[key] is not None}
    return {
        'detector': {'name': detector.name, 'weights': detector.weights, 'sha256': detector.sha256, 'tf32': detector.tf32},
        **record.machine(detector.device),
        'options': {**told, **({'seeds': ranges(o.seeds)} if 'seeds' in told else {})},
    }
