# SPDX-License-Identifier: Apache-2.0
"""Puts tables of one value per image into the dataset.json of a data set that exists; images and all other annotations stay as they are."""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence

import numpy as np

from dnnlib import UserError
from dnnlib.archive import Archive, damage
from dnnlib.files import new_folder, replacing, write_json
from training.data import packed, tables
from training.data.contents import Pictures

META = 'dataset.json'


def put_tables(path: str, columns: dict[str, Sequence], record: dict) -> None:
    """Writes columns {key of tables.CHECKS: one value per image, in the order of their names}, in the form of dataset.json, and the
    entries of `record`, in place: a zip, a folder, or a packed set of either kind. Readers see the old file or the new one. Raises
    UserError."""
    try:
        if packed.is_packed(path):
            _packed(path, columns, record)
            return
        names = [Pictures(path).name(index) for index in range(len(next(iter(columns.values()))))]
        meta = {**Archive(path).read_json(META), **{key: [list(pair) for pair in zip(names, values)] for key, values in columns.items()},
                **record}
        data = json.dumps(meta).encode()
        if os.path.isdir(path):
            with replacing(os.path.join(path, META)) as part, open(part, 'wb') as file:
                file.write(data)
        else:
            _zip(path, data)
    except OSError as err:
        raise UserError(f'{path}: cannot be written ({damage(err)})') from None


def _zip(path, data):
    with zipfile.ZipFile(path) as old, replacing(path) as part, zipfile.ZipFile(part, 'w') as new:
        for info in old.infolist():
            if info.filename != META:
                new.writestr(info, old.read(info))
        new.writestr(zipfile.ZipInfo(META, (1980, 1, 1, 0, 0, 0)), data)


def _packed(path, columns, record):
    """The new set shares the files of images with the old one where the file system allows it."""
    with contextlib.ExitStack() as stack:
        if os.path.isdir(path):
            part = stack.enter_context(new_folder(path, over='anything'))
            shutil.copytree(path, part, copy_function=_link, dirs_exist_ok=True)
        else:
            part = stack.enter_context(tempfile.TemporaryDirectory(prefix=f'.{os.path.basename(path)}-', dir=os.path.dirname(path) or '.'))
            with zipfile.ZipFile(path) as old:
                old.extractall(part, [name for name in old.namelist() if name in packed.FILES])
        for key, values in columns.items():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(part, f'{key}.npy'))  # a linked file must not be written to
            np.save(os.path.join(part, f'{key}.npy'), tables.CHECKS[key](values, range(len(values))), allow_pickle=False)
        with open(os.path.join(part, META), encoding='utf-8') as file:
            meta = json.load(file)
        os.unlink(os.path.join(part, META))
        # A decoded copy's fingerprint is that of its source, which does not have these tables.
        write_json(os.path.join(part, META), {**{key: value for key, value in meta.items() if key != 'source'}, **record})
        if not os.path.isdir(path):
            packed.zip_folder(part, path)


def _link(old, new):
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)
