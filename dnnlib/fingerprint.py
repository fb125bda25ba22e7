# SPDX-License-Identifier: Apache-2.0
"""What a set of images is known by, wherever it lies: a few JSON values that say, of two sets, what differs."""

import hashlib

import numpy as np

KINDS = {'zip': 'a zip file', 'folder': 'a folder', 'npz': 'an .npz file', 'packed folder': 'a folder of arrays'}
# Of a kind, what other contents under the same names and sizes are called.
OTHER_TIMES = 'its files have other times of change: copy them with their times (cp -a, rsync -t)'
OTHER_CONTENT = {'folder': f'{OTHER_TIMES}, or make a zip of them', 'packed folder': OTHER_TIMES}


def fingerprint(kind, names, sizes, contents, labels):
    """{kind, images, names, content, labels}: how many, and digests of names and sizes, of contents, of the labels' file; no path.

    kind: what holds the images. names: sorted, without "\\0". sizes: bytes of each. contents: of each, a whole number that changes with
    what is in it and needs no reading of it, such as a checksum from a directory. labels: digest() of dataset.json; None: there is none."""
    text = '\0'.join(names).encode('utf-8', 'surrogatepass')
    numbers = np.fromiter(sizes, np.int64, len(names)).astype('<i8').tobytes()
    content = np.fromiter(contents, np.int64, len(names)).astype('<i8').tobytes()
    return {'kind': kind, 'images': len(names), 'names': digest(text, numbers), 'content': digest(content), 'labels': labels}


def digest(*parts):
    """The first 128 bits of the SHA-256 of bytes, hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, 'little'))
        found.update(part)
    return found.hexdigest()[:32]


def data_differences(old, new):
    """What differs between two fingerprints, as phrases for people, of the new data against the old; [] where they are of the same data."""
    get, found = (lambda one, key: one.get(key) if isinstance(one, dict) else None), []
    differs = lambda key: get(old, key) != get(new, key)
    kinds = [KINDS.get(kind, str(kind)) if isinstance(kind, str) else 'data of no kind' for kind in (get(old, 'kind'), get(new, 'kind'))]
    if differs('images'):
        found.append(f'{get(new, "images")} images instead of {get(old, "images")}')
    elif differs('names'):
        found.append('other names or sizes of the images')
    elif differs('kind'):
        found.append(f'{kinds[1]} instead of {kinds[0]}, whose contents cannot be compared')
    elif differs('content'):
        found.append(OTHER_CONTENT.get(get(new, 'kind'), 'other contents of the images, under the same names and sizes'))
    if differs('labels'):
        found.append('no dataset.json, where there was one' if get(new, 'labels') is None else
                     'a dataset.json (labels, sigmas), where there was none' if get(old, 'labels') is None else
                     'another dataset.json (labels, sigmas)')
    known = ('kind', 'images', 'names', 'content', 'labels')
    if not found and old != new:
        keys = sorted({*(old if isinstance(old, dict) else ()), *(new if isinstance(new, dict) else ())} - {*known}, key=str)
        found.append(f'fingerprints of another kind ({", ".join(map(str, keys)) or "not an object"})')
    return found
