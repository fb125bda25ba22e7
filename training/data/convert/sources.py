# SPDX-License-Identifier: Apache-2.0
"""The formats that dataset_tool.py can read, by name: an entry of SOURCES is a class with the interface of source.Source.

--source=PATH[:key=value,...] names a path, or a word such as "digits". The first entry whose matches(path) is true opens it, so that
specific formats come before those that accept any folder; `kind=NAME` selects the entry by its name instead. The keys in TOLD apply
to the images of any source. The other keys are the keyword arguments of its constructor, Source(path, **options), in the types of
their defaults; unknown keys are refused. Several sources are joined to one."""

import inspect
import lzma
import os
import re
import tarfile

from dnnlib import UserError
from dnnlib.archive import DAMAGE, damage
from torch_utils import registry
from training.data.convert.annotations import tell
from training.data.convert.joined import Joined
from training.data.convert.readers.arrays import DigitsSource, NumpySource
from training.data.convert.readers.cifar import CifarSource
from training.data.convert.readers.containers import HuggingFaceSource, LmdbSource, ParquetSource, WebDatasetSource
from training.data.convert.readers.files import FileSource
from training.data.convert.readers.hdf5 import Hdf5Source
from training.data.convert.readers.mnist import MnistSource
from training.data.convert.readers.packed import PackedSource
from training.data.convert.readers.scientific import DicomSource, FitsSource, NiftiSource
from training.data.convert.readers.tiff import TiffSource
from training.data.convert.stabilising import record_of

TOLD = ('label', 'sigma', 'sigma_min', 'sigma_max')  # the keys for annotations.tell()
MISSING = 'no such file or folder (nor is it the word "digits")'


def parse_source(spec: str) -> tuple[str, dict[str, str]]:
    """"PATH:key=value,key=value" -> (path, {key: text}); text after the last colon that is not key=value belongs to the path."""
    path, _, rest = spec.rpartition(':')
    if not path or os.path.exists(spec) or not re.match(r'[a-z_]+=', rest):
        return spec, {}
    return path, registry.split(rest, f'--source={spec}: expected key=value after "{path}:"')


def open_source(spec, **defaults):
    """The Source that a spec names. defaults: options for sources that accept them, unless the spec sets them; None: not given.

    Raises UserError."""
    path, options = parse_source(spec)
    name = find(path, options.pop('kind', None))
    piece, where = SOURCES[name], f'--source={spec}'
    told = {key: options.pop(key) for key in TOLD if key in options}
    accepted = registry.parameters(piece)
    options = {key: value for key, value in defaults.items() if value is not None and key in accepted} | options
    options = registry.check_options(name, piece, options, where)
    source = _open(piece, path, options)
    if not source.names:
        raise UserError(f'{where}: no images in it')
    tell(source, told, where)
    source.stabilise = record_of(source, where)
    return source


def open_sources(specs, keep_labels=True, keep_units=True, each=None, **defaults):
    """One Source for all the specs, in their order; the other arguments as for Joined and open_source(). each(source, where): called with
    every one of them before they are joined.

    A default that none of the sources accepts is refused. Raises UserError."""
    specs = [specs] if isinstance(specs, str) else specs
    found = [(parse_source(spec)[0], open_source(spec, **defaults)) for spec in specs]
    for spec, (_, source) in zip(specs, found) if each else ():
        each(source, f'--source={spec}')
    for key, value in defaults.items():
        if value is not None and not any(key in registry.parameters(type(source)) for _, source in found):
            takes = [name for name, piece in SOURCES.items() if key in registry.parameters(piece)]
            raise UserError(f'--{key}={value}: is for sources of the kinds {", ".join(takes)}; --source={specs[0]} is of another kind')
    return found[0][1] if len(found) == 1 else Joined(found, keep_labels, keep_units)


def _open(piece, path, options):
    try:
        return piece(path, **options)
    except FileNotFoundError:
        raise UserError(f'--source={path}: {MISSING}') from None
    except (*DAMAGE, tarfile.TarError, lzma.LZMAError) as err:
        raise UserError(f'--source={path}: cannot be read ({damage(err)})') from None


def find(path: str, kind: str | None = None) -> str:
    """The name in SOURCES of the class that opens a path. Raises UserError."""
    if kind is not None:
        if kind not in SOURCES:
            raise UserError(f'--source={path}: unknown kind "{kind}"; choose from {", ".join(SOURCES)}')
        return kind
    found = next((name for name, piece in SOURCES.items() if piece.matches(path)), None)
    if not found and not os.path.exists(path):
        raise UserError(f'--source={path}: {MISSING}')
    if not found:
        raise UserError(f'--source={path}: not {what_is_read("or")}')
    return found


def what_is_read(word: str = 'and') -> str:
    """All kinds of sources in one line of text."""
    *first, last = (piece.what for piece in reversed(SOURCES.values()) if piece.what)
    return f'{", ".join(first)} {word} {last}'


def describe_sources() -> list[str]:
    """Lines that describe the formats that are read, and the keys of each kind of source."""
    lines = ['--source=PATH or --source=PATH:key=value,key=value. Keys of every kind: kind, and label, sigma, sigma_min, sigma_max',
             'of all its images. The kind is recognised by the name or the contents.', '']
    for name, piece in SOURCES.items():
        text = piece.what or (inspect.getdoc(piece) or '').splitlines()[0]
        keys = registry.parameters(piece)
        lines.append(f'  {name:<12}{text}' + (f'; keys: {", ".join(keys)}' if keys else ''))
    return lines


SOURCES = {'digits': DigitsSource, 'hf': HuggingFaceSource, 'webdataset': WebDatasetSource, 'cifar': CifarSource, 'mnist': MnistSource,
           'packed': PackedSource, 'numpy': NumpySource, 'parquet': ParquetSource, 'lmdb': LmdbSource, 'hdf5': Hdf5Source,
           'tiff': TiffSource, 'fits': FitsSource, 'dicom': DicomSource, 'nifti': NiftiSource, 'files': FileSource}
