# SPDX-License-Identifier: Apache-2.0
"""References for comparing images with: image files, or statistics by path or URL, and the facts known about them."""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence

import dnnlib
from dnnlib import UserError
from dnnlib.files import file_digest
from metrics.detectors import Detector
from metrics.evaluate import collect
from metrics.image_files import ImageFiles
from metrics.statistics import Statistics, load_statistics
from torch_utils import distributed, misc, registry

DIGEST = re.compile('[0-9a-fA-F]{8,64}')  # SHA-256, or its first digits


def open_reference(stats: str | None, images: str | None, detector: str, features: bool) -> tuple[ImageFiles | Statistics, str]:
    """(reference, SHA-256 of its file or folder): ImageFiles of a path `images`, or the Statistics in `stats`.

    stats: path or URL, which may end in #sha256=DIGEST. detector: as given on the command line ("dinov2:model=DIR"). features: whether
    to read those too, on rank 0 only. Raises UserError on every rank."""
    if images:
        return ImageFiles(images, '--ref-path'), distributed.from_rank0(file_digest, images)
    path = distributed.first_on_node(fetch, stats)
    found = load_statistics(path, f'--ref-stats={stats}', features and distributed.rank() == 0, registry.parse(detector)[0])
    return found, file_digest(path)


def fetch(ref: str, option: str = '--ref-stats') -> str:
    """Local path of a file or URL, whose digest is checked if it ends in #sha256=DIGEST. Raises UserError."""
    place, mark, digest = ref.rpartition('#sha256=')
    if mark and not DIGEST.fullmatch(digest):
        raise UserError(f'{option}={ref}: "{digest}" after #sha256= is not a digest; expected 8 to 64 hexadecimal digits')
    try:
        return dnnlib.open_url(place, digest) if mark else dnnlib.open_url(ref)
    except UserError as err:
        raise UserError(f'{option}={err.message}' if err.message.startswith(place or ref) else f'{option}: {err.message}') from None


def statistics_of(files: ImageFiles, detector: Detector, batch_size: int, keep_features: bool) -> Statistics:
    """Statistics of all images of the ImageFiles, with the facts of how they were made, and the features if asked for."""
    detector.dim(files.shape)
    found = collect(files.batches(batch_size), detector, len(files), (), keep_features=keep_features, keep_spatial=True).statistics
    files.check_unchanged()
    return dataclasses.replace(found, **conditions(detector))


def conditions(detector: Detector) -> dict:
    """What the last digits of features depend on besides the weights: fields of Statistics."""
    return {'device': misc.device_name(detector.device), 'tf32': detector.tf32, 'versions': json.dumps(misc.versions())}


def warn(reference: Statistics, detector: Detector, shape: Sequence[int], name: str) -> None:
    """Warns of facts about statistics that do not prevent a comparison with images [C,H,W] but affect it; name: the reference's."""
    told, ours = [], conditions(detector)
    if reference.note:
        told.append(f'{reference.note}; it is compared because the dimensions agree')
    if reference.shape not in (None, tuple(shape)):
        told.append(f'made from {list(reference.shape)} images, compared with {list(shape)} [C,H,W]')
    if reference.device not in (None, ours['device']):
        told.append(f'made on {reference.device}, compared on {ours["device"]}: the features differ by rounding')
    if reference.tf32 not in (None, ours['tf32']):
        told.append(f'made {"with" if reference.tf32 else "without"} TF32, compared {"with" if ours["tf32"] else "without"}')
    for line in told:
        distributed.print0(f'Warning: {name}: {line}', file=sys.stderr)


def facts(reference: Statistics, ref: str, digest: str | None) -> dict:
    """What a result records about its reference, None for unknown facts. ref: as the user gave it; digest: of the file."""
    keys = ('num_images', 'split', 'source', 'detector', 'detector_sha256', 'note', 'shape', 'device', 'tf32')
    versions = reference.versions and json.loads(reference.versions)
    return {'path': ref, 'sha256': digest, **{key: getattr(reference, key) for key in keys}, 'versions': versions}
