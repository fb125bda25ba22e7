# SPDX-License-Identifier: Apache-2.0
"""Captions of a data set -> embeddings as its labels, in place or in a copy; images and all other annotations stay as they are."""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from dnnlib import UserError, text_record
from dnnlib.archive import JSON_BASE, JSON_PER_MEMBER, Archive
from dnnlib.files import MAX_JSON, new_folder, replacing, write_json
from dnnlib.progress import Progress
from torch_utils import numerics
from training.data import packed
from training.data.contents import Pictures
from training.data.convert.annotations import read_captions
from training.data.text import ROWS, Captions, open_captions

META = 'dataset.json'
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
    write = _write_packed if packed.is_packed(path) else _write_folder if os.path.isdir(path) else _write_zip
    write(path, dest, text, captions, names)
    distinct, empty = len(set(captions)), sum(not caption for caption in captions)
    return [f'{distinct} different captions' + (f', and {empty} images without one' if empty else ''),
            f'{dest}: labels of {text_record.label_dim(text.record)} numbers for {len(names)} images, by {text.record["encoder"]} '
            f'({text.record["pooling"]}, {text.record["sha256"][:8]})']


def check_dest(path: str, dest: str, contents: Any) -> None:
    """Refuses a destination of another kind than the source, one that exists, and labels of another kind that would be lost."""
    if os.path.abspath(path) == os.path.abspath(dest):
        if contents.has('labels') and contents.text is None:
            raise UserError(f'--source={path}: has labels, which those of the captions would replace; give --dest for a copy')
        return
    kind = lambda name: os.path.splitext(name)[1].lower() if not os.path.isdir(name) else ''
    if kind(path) != kind(dest):
        raise UserError(f'--dest={dest}: must be of the same kind as --source={path}, {kind(path) or "a folder"}')
    if os.path.exists(dest) and (os.path.isfile(dest) or os.listdir(dest)):
        raise UserError(f'--dest={dest}: exists; name another, or leave --dest out to change the source')


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


def _write_zip(path, dest, text, captions, names):
    meta, archive = _meta(path, text, captions, names), Archive(path)
    with zipfile.ZipFile(path) as old, replacing(dest) as part, zipfile.ZipFile(part, 'w') as new:
        for info in old.infolist():
            if info.filename != META:
                new.writestr(info, archive.read(info.filename, None))
        new.writestr(zipfile.ZipInfo(META, (1980, 1, 1, 0, 0, 0)), meta)


def _write_folder(path, dest, text, captions, names):
    meta = _meta(path, text, captions, names)
    if os.path.abspath(path) == os.path.abspath(dest):
        with replacing(os.path.join(path, META)) as part, open(part, 'wb') as file:
            file.write(meta)
        return
    with new_folder(dest, over='empty') as part:
        shutil.copytree(path, part, dirs_exist_ok=True)  # with the times, by which a folder is identified
        with open(os.path.join(part, META), 'wb') as file:
            file.write(meta)


def _write_packed(path, dest, text, captions, names):
    """Packed data: the new folder shares the files of images with the old one where the file system allows it."""
    as_folder, here = os.path.isdir(path), os.path.abspath(path) == os.path.abspath(dest)
    with contextlib.ExitStack() as stack:
        if as_folder:
            part = stack.enter_context(new_folder(dest, over='anything' if here else 'empty'))
            shutil.copytree(path, part, copy_function=_link, dirs_exist_ok=True)
        else:
            part = stack.enter_context(tempfile.TemporaryDirectory(prefix=f'.{os.path.basename(dest)}-', dir=os.path.dirname(dest) or '.'))
            with zipfile.ZipFile(path) as old:
                old.extractall(part, [name for name in old.namelist() if name in packed.FILES])
        _replace_tables(part, text, captions, len(names))
        if not as_folder:
            packed.zip_folder(part, dest)


def _replace_tables(folder, text, captions, count):
    place = lambda name: os.path.join(folder, name)
    for name in ('labels.npy', f'{packed.EMPTY}.npy', packed.CAPTIONS):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place(name))  # a linked file must not be written to
    out = np.lib.format.open_memmap(place('labels.npy'), 'w+', np.float32, (count, len(text.empty)))
    labels_of(text, captions, out).flush()
    np.save(place(f'{packed.EMPTY}.npy'), text.empty[None], allow_pickle=False)
    write_json(place(packed.CAPTIONS), captions)
    with open(place(META), encoding='utf-8') as file:
        meta = json.load(file)
    write_json(place(META), {**{key: value for key, value in meta.items() if key != 'source'}, 'text': text.record})


def _link(old, new):
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)
