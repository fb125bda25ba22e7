# SPDX-License-Identifier: Apache-2.0
"""The work of `eval_fid.py nearest`: the training image nearest to each generated image."""

import math

import torch

from dnnlib import EasyDict, UserError
from dnnlib.files import beside, file_digest, prepare_output, write_json
from metrics import memorisation, references, report
from metrics.detectors import Detector
from metrics.image_files import ImageFiles
from torch_utils import distributed, numerics
from training.evaluation.comparison import common_facts, make_detector
from training.sampling.writers import write_grid


def find_nearest(o: EasyDict) -> None:
    """The `nearest` command."""
    distributed.init()
    numerics.set_numerics()
    out_path, picture = (given or beside(o.gen_path, f'.nearest.{suffix}')
                         for given, suffix in ((o.out_path, 'json'), (o.picture, 'png')))
    prepare_output(out_path, '--out-path')
    prepare_output(picture, '--picture')
    sources = {option: ImageFiles(path, option) for option, path in
               (('--gen-path', o.gen_path), ('--train', o.train), ('--held-out', o.held_out)) if path}
    shapes = {option: files.shape for option, files in sources.items()}
    if len(set(shapes.values())) > 1:
        raise UserError('all images must have the same size and mode, got ' +
                        ', '.join(f'{list(shape)} in {option}' for option, shape in shapes.items()))
    detector = make_detector(o)
    features = {option: references.statistics_of(files, detector, o.batch_size, True).features for option, files in sources.items()}
    if distributed.rank() == 0:
        write_nearest(o, sources, features, detector, out_path, picture)


def write_nearest(o: EasyDict, sources: dict[str, ImageFiles], features: dict[str, torch.Tensor], detector: Detector, out_path: str,
                  picture: str) -> None:
    """Computes the distances on one rank; writes picture and JSON, and prints the numbers."""
    try:
        found = memorisation.neighbours(features['--gen-path'], features['--train'], detector.device)
    except ValueError as err:
        raise UserError(f'--train={o.train}: {err}') from None
    unseen = memorisation.neighbours(features['--held-out'], features['--train'], detector.device) if o.held_out else None
    values = memorisation.report(found, unseen)
    pairs = list(zip(*memorisation.closest_pairs(found, o.pairs)))
    shown = [image for ours, theirs in pairs for image in (sources['--gen-path'][ours], sources['--train'][theirs])]
    write_grid(picture, shown, columns=2 * math.ceil(math.sqrt(len(pairs) / 2)))
    named = [{'generated': sources['--gen-path'].name(ours), 'train': sources['--train'].name(theirs), 'distance': found.first[ours],
              'ratio': found.ratio[ours]} for ours, theirs in pairs]
    used = {option.strip('-').replace('-', '_'): {'path': files.path, 'num_images': len(files), 'sha256': file_digest(files.path)}
            for option, files in sources.items()}
    result = {**values, **used, 'closest_pairs': named, **common_facts(o, detector)}
    write_json(out_path, result, null=True)
    report.print_columns([('measure', 'value'), *((name, report.number(value)) for name, value in values.items())])
    print(f'written to {out_path}; the {len(pairs)} closest pairs (generated left, training image right) to {picture}')
