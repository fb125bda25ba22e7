# SPDX-License-Identifier: Apache-2.0
"""Other annotations for a data set, in place or in a copy: images stay as they are, byte for byte, and so does everything else."""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from dnnlib import UserError
from dnnlib.archive import Archive
from dnnlib.files import new_folder, replacing, write_json
from training.data import packed

META = 'dataset.json'


def check_place(source: str, dest: str, option: str = '--source') -> None:
    """Refuses a destination of another kind than the source, and one that exists and is not the source itself."""
    if os.path.abspath(source) == os.path.abspath(dest):
        return
    kind = lambda name: os.path.splitext(name)[1].lower() if not os.path.isdir(name) else ''
    if kind(source) != kind(dest):
        raise UserError(f'--dest={dest}: must be of the same kind as {option}={source}, {kind(source) or "a folder"}')
    if os.path.exists(dest) and (os.path.isfile(dest) or os.listdir(dest)):
        raise UserError(f'--dest={dest}: exists; name another, or leave --dest out to change {option}')


def replace_levels(source: str, dest: str, columns: dict[str, list[float | None] | None], names: list[str],
                   record: dict | None = None) -> None:
    """Writes the data set `source` to `dest`, which may be the same, with these tables of numbers per image in place of its own.

    columns: {sigmas, sigma_min or sigma_max: values in the order of the images and in the units of dataset.json, None for no limit; or
    None, which removes the table}. names: the images of pictures, in order. record: further entries of dataset.json. Nothing is changed
    if it fails."""
    if packed.is_packed(source):
        with packed_copy(source, dest) as folder:
            for key, values in columns.items():
                path = os.path.join(folder, f'{key}.npy')
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)  # a linked file must not be written to
                if values is not None:
                    absent = np.inf if key == 'sigma_max' else 0.0
                    np.save(path, np.float64([absent if value is None else value for value in values]), allow_pickle=False)
            update_meta(folder, record or {})
        return
    meta = {**Archive(source).read_json(META), **(record or {})}
    for key, values in columns.items():
        meta.pop(key, None)
        if values is not None:
            meta[key] = [[name, value] for name, value in zip(names, values)]
    write_pictures(source, dest, json.dumps(meta, allow_nan=False).encode())


def write_pictures(source: str, dest: str, meta: bytes) -> None:
    """Writes a zip or folder of pictures to `dest` with this dataset.json."""
    if not os.path.isdir(source):
        archive = Archive(source)
        with zipfile.ZipFile(source) as old, replacing(dest) as part, zipfile.ZipFile(part, 'w') as new:
            for info in old.infolist():
                if info.filename != META:
                    new.writestr(info, archive.read(info.filename, None))
            new.writestr(zipfile.ZipInfo(META, (1980, 1, 1, 0, 0, 0)), meta)
    elif os.path.abspath(source) == os.path.abspath(dest):
        with replacing(os.path.join(source, META)) as part, open(part, 'wb') as file:
            file.write(meta)
    else:
        with new_folder(dest, over='empty') as part:
            shutil.copytree(source, part, dirs_exist_ok=True)  # with the times, by which a folder is identified
            with open(os.path.join(part, META), 'wb') as file:
                file.write(meta)


@contextlib.contextmanager
def packed_copy(source: str, dest: str) -> Iterator[str]:
    """A folder with the files of a packed data set, to be changed; it becomes `dest` when the block ends without an error.

    It shares the files of images with the source where the file system allows it: files are to be replaced, not written to."""
    if os.path.isdir(source):
        here = os.path.abspath(source) == os.path.abspath(dest)
        with new_folder(dest, over='anything' if here else 'empty') as part:
            shutil.copytree(source, part, copy_function=_link, dirs_exist_ok=True)
            yield part
        return
    folder, name = os.path.split(os.path.abspath(dest))
    with tempfile.TemporaryDirectory(prefix=f'.{name}-', dir=folder) as part:
        with zipfile.ZipFile(source) as old:
            old.extractall(part, [name for name in old.namelist() if name in packed.FILES])
        yield part
        packed.zip_folder(part, dest)


def update_meta(folder: str, record: dict[str, Any]) -> None:
    """Puts entries into the dataset.json of a packed_copy, and takes out the fingerprint of the data that it was decoded from, which do not
    have its annotations."""
    path = os.path.join(folder, META)
    with open(path, encoding='utf-8') as file:
        meta = json.load(file)
    os.unlink(path)  # a linked file must not be written to
    write_json(path, {**{key: value for key, value in meta.items() if key != 'source'}, **record})


def _link(old, new):
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)
