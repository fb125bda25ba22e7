# SPDX-License-Identifier: Apache-2.0
"""Captions of a data set -> embeddings as its labels, in place or in a copy; images and all other annotations stay as they are."""

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from dnnlib import UserError, text_record
from dnnlib.archive import JSON_BASE, JSON_PER_MEMBER, Archive
from dnnlib.files import MAX_JSON, write_json
from dnnlib.progress import Progress
from torch_utils import numerics
from training.data import packed
from training.data.contents import Pictures
from training.data.convert.annotations import read_captions
from training.data.convert.rewrite import META, check_place, packed_copy, update_meta, write_pictures
from training.data.text import ROWS, Captions, open_captions

BYTES = 11  # of a number in JSON, about


def embed(options: dict) -> list[str]:
    """Writes the labels for the options of the command line, a dict; returns lines of text to print. Raises UserError."""
    numerics.set_numerics()
    path, dest = options['source'], options['dest'] or options['source']
    contents = packed.Packed(path) if packed.is_packed(path) else Pictures(path)
    names = [contents.name(index) for index in range(contents.count)]
    captions = read_captions(options['captions'], names) if options['captions'] else contents.captions()
    if captions is None:
        raise UserError(f'--source={path}: has no captions; give --captions=FILE, here or when converting the images')
    check_dest(path, dest, contents)
    text = open_captions(options['text_encoder'], options['tokens'], options['device'] or _device())
    if isinstance(contents, Pictures):
        _check_size(path, text, names)
    if packed.is_packed(path):
        with packed_copy(path, dest) as folder:
            _replace_tables(folder, text, captions, len(names))
    else:
        write_pictures(path, dest, _meta(path, text, captions, names))
    distinct, empty = len(set(captions)), sum(not caption for caption in captions)
    return [f'{distinct} different captions' + (f', and {empty} images without one' if empty else ''),
            f'{dest}: labels of {text_record.label_dim(text.record)} numbers for {len(names)} images, by {text.record["encoder"]} '
            f'({text.record["pooling"]}, {text.record["sha256"][:8]})']


def check_dest(path: str, dest: str, contents: Any) -> None:
    """As check_place(), and refuses labels of another kind that would be lost."""
    if os.path.abspath(path) == os.path.abspath(dest) and contents.has('labels') and contents.text is None:
        raise UserError(f'--source={path}: has labels, which those of the captions would replace; give --dest for a copy')
    check_place(path, dest)


def _device():
    import torch
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def _check_size(path, text, names):
    limit, width = min(MAX_JSON, JSON_BASE + JSON_PER_MEMBER * len(names)), len(text.empty)
    if BYTES * width * len(names) > limit:
        raise UserError(f'--source={path}: {len(names)} labels of {width} numbers are too large for its {META}; '
                        f'pack it first: dataset_tool.py --source={path} --dest=PACKED.npz')


def labels_of(text: Captions, captions: Sequence[str], out: np.ndarray) -> np.ndarray:
    """Fills out [N, label_dim] with the labels of captions, and returns it: each different caption is embedded once, in their order."""
    places = {}
    for index, caption in enumerate(captions):
        places.setdefault(caption, []).append(index)
    different = list(places)
    with Progress(len(different), 'Embedding') as bar:
        for first in range(0, len(different), ROWS):
            part = different[first:first + ROWS]
            for caption, label in zip(part, text(part)):
                out[places[caption]] = label
            bar.update(len(part))
    return out


def _numbers(row):
    """A float32 row as the shortest numbers that JSON can hold it with."""
    short = [float(str(value)) for value in row]
    return short if (np.float32(short) == row).all() else row.astype(np.float64).tolist()


def _meta(path, text, captions, names):
    """The new content of dataset.json of pictures, as bytes."""
    labels = labels_of(text, captions, np.empty([len(names), len(text.empty)], np.float32))
    found = {**Archive(path).read_json(META), 'labels': [[name, _numbers(label)] for name, label in zip(names, labels)],
             'captions': [[name, caption] for name, caption in zip(names, captions)],
             'text': {**text.record, 'empty': _numbers(text.empty)}}
    return json.dumps(found).encode()


def _replace_tables(folder, text, captions, count):
    place = lambda name: os.path.join(folder, name)
    for name in ('labels.npy', f'{packed.EMPTY}.npy', packed.CAPTIONS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place(name))  # a linked file must not be written to
    out = np.lib.format.open_memmap(place('labels.npy'), 'w+', np.float32, (count, len(text.empty)))
    labels_of(text, captions, out).flush()
    np.save(place(f'{packed.EMPTY}.npy'), text.empty[None], allow_pickle=False)
    write_json(place(packed.CAPTIONS), captions)
    update_meta(folder, {'text': text.record})
