# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a set of images, independent of its path: a few JSON values that show how two sets differ."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

KINDS = {'zip': 'a zip file', 'folder': 'a folder', 'npz': 'an .npz file', 'packed folder': 'a folder of arrays'}
# How a difference in contents under the same names and sizes is described, by kind.
OTHER_TIMES = 'its files have other modification times: copy them with their times (cp -a, rsync -t)'
OTHER_CONTENT = {'folder': f'{OTHER_TIMES}, or make a zip of them', 'packed folder': OTHER_TIMES}


def fingerprint(kind: str, names: Sequence[str], sizes: Sequence[int], contents: Sequence[int], labels: str | None) -> dict:
    """{kind, images, names, content, labels}: the number of images, and digests of names and sizes, of contents, of the labels' file.

    kind: what holds the images. names: sorted, without "\\0". sizes: of each in bytes. contents: for each a whole number that changes
    with its content and is known without reading it, such as a checksum in a directory. labels: digest() of dataset.json, or None."""
    text = '\0'.join(names).encode('utf-8', 'surrogatepass')
    numbers = np.fromiter(sizes, np.int64, len(names)).astype('<i8').tobytes()
    content = np.fromiter(contents, np.int64, len(names)).astype('<i8').tobytes()
    return {'kind': kind, 'images': len(names), 'names': digest(text, numbers), 'content': digest(content), 'labels': labels}


def digest(*parts: bytes) -> str:
    """The first 128 bits of the SHA-256 of bytes, hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, 'little'))
        found.update(part)
    return found.hexdigest()[:32]


def data_differences(old: Any, new: Any) -> list[str]:
    """The differences of a new fingerprint from an old one, as readable phrases; [] if both are of the same data."""
    get, found = (lambda one, key: one.get(key) if isinstance(one, dict) else None), []
    differs = lambda key: get(old, key) != get(new, key)
    kinds = [KINDS.get(kind, str(kind)) if isinstance(kind, str) else 'data of an unknown kind'
             for kind in (get(old, 'kind'), get(new, 'kind'))]
    if differs('images'):
        found.append(f'{get(new, "images")} images instead of {get(old, "images")}')
    elif differs('names'):
        found.append('images with other names or sizes')
    elif differs('kind'):
        found.append(f'{kinds[1]} instead of {kinds[0]}, whose contents cannot be compared')
    elif differs('content'):
        found.append(OTHER_CONTENT.get(get(new, 'kind'), 'images of the same names and sizes with other contents'))
    if differs('labels'):
        found.append('no dataset.json, where there was one' if get(new, 'labels') is None else
                     'a dataset.json (labels, sigmas), where there was none' if get(old, 'labels') is None else
                     'another dataset.json (labels, sigmas)')
    known = ('kind', 'images', 'names', 'content', 'labels')
    if not found and old != new:
        keys = sorted({*(old if isinstance(old, dict) else ()), *(new if isinstance(new, dict) else ())} - {*known}, key=str)
        found.append(f'fingerprints of another kind ({", ".join(map(str, keys)) or "not an object"})')
    return found
