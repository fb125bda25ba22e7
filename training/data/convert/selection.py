# SPDX-License-Identifier: Apache-2.0
"""Selects the images of a source that are used."""

import collections
import sys
from collections.abc import Sequence


def select(source, options: dict) -> Sequence[int]:
    """Indices of the images to use, in the source's order."""
    first, step = options['part'] or (0, 1)
    # Tiles of an image stay together, so that different parts never share an image.
    images = getattr(source, 'origin', range(len(source.names)))
    indices = [index for index, image in enumerate(images) if image % step == first]
    limit = options['max_images']
    if not limit or limit >= len(indices):
        return indices
    classes = [_hashable(source.labels[i]) for i in indices] if source.labels else None
    if options['sample'] == 'spread':
        chosen = _spread(indices, classes, limit)
    else:
        chosen = indices[:limit]
    if classes:
        kept = len({_hashable(source.labels[i]) for i in chosen})
        if kept < len(set(classes)):
            print(f'Warning: --max-images={limit} keeps {kept} of {len(set(classes))} classes'
                       + ('; --sample=spread takes them over all classes' if options['sample'] == 'first' else ''), file=sys.stderr)
    return chosen


def _hashable(label):
    return tuple(label) if isinstance(label, list) else label


def _spread(indices, classes, limit):
    """The first of each class, then the second of each, and so on; without classes, at even distances."""
    if classes is None:
        return [indices[k * len(indices) // limit] for k in range(limit)]
    seen, turns = collections.Counter(), []
    for index, label in zip(indices, classes):
        turns.append((seen[label], index))
        seen[label] += 1
    return sorted(index for _, index in sorted(turns)[:limit])
