# SPDX-License-Identifier: Apache-2.0
"""Pictures packed by other programs: LMDB, WebDataset's tar files, and the parquet files and folders of Hugging Face's datasets.

Their members are PNG, JPEG, WebP, TIFF or other pictures, or .npy files, recognised by their content."""

import collections
import glob
import itertools
import json
import os
import re
import tarfile
from array import array
from pathlib import Path

import numpy as np

from dnnlib import UserError
from dnnlib.archive import IMAGES, MAX_MEMBER, RARER_IMAGES
from training.data.convert.readers import parquet
from training.data.convert.readers.btree import Tree
from training.data.convert.readers.formats import Bytes, Opened, decode, encoded_kind, first_files, guarded, head, holds, needs
from training.data.convert.readers.parquet import LEVELS
from training.data.convert.readers.source import Kind, Source

NOTES = re.compile(rb'_*(num[-_ ]?(samples|images)|length|len|keys|classes|meta|metadata|dataset\.json|map_size)_*')  # no images
NO_LEVELS = {}  # of many samples; not to be changed
MAX_TEXT = 2 ** 20  # bytes of a sample's .cls or .json


class EncodedSource(Source):
    """Pictures as bytes: a subclass has data(index)."""

    def data(self, index: int) -> bytes:
        """The bytes of a picture or .npy file. Raises errors of DAMAGE."""
        raise NotImplementedError

    def kind(self, index: int) -> Kind:
        """The Kind of an image, from its header."""
        return encoded_kind(self.data(index))

    def read(self, index: int) -> np.ndarray:
        """The image, [C,H,W], as decode_image gives it."""
        return decode(self.data(index))

    def tell(self, levels: dict[str, list]) -> None:
        """Sets {name in LEVELS: one value per image}; a level that no image has is left out. Raises ValueError if only some have it."""
        for key, values in levels.items():
            lacking = next((i for i, value in enumerate(values) if value is None), None)
            if lacking is not None and all(value is None for value in values):
                continue
            if lacking is not None and key == 'sigma':
                raise ValueError(f'{self.names[lacking]} has no {key}, as others have')
            setattr(self, 'sigmas' if key == 'sigma' else key, values)


class LmdbSource(EncodedSource):
    """A folder with data.mdb, or such a file: encoded pictures in the order of their keys. key: a named database within it.

    Notes such as "num-samples" are left out. No labels: LSUN has a database for each category."""

    what = 'LMDB'

    def __init__(self, path: str, key: str | None = None):
        file = os.path.join(path, 'data.mdb') if os.path.isdir(path) else path
        self._file = Opened(Bytes, file)
        tree = Tree(self._file(), None if key is None else str(key))
        kept = [i for i, own in enumerate(tree.keys) if not NOTES.fullmatch(own.lower())]
        if not kept:
            inside = ', '.join(name.decode(errors='replace') for name in tree.databases)
            raise ValueError('no images in it' + (f'; it has databases with names, give key= one of {inside}' if inside else ''))
        self._offsets, self._sizes = (array('q', (values[i] for i in kept)) for values in (tree.offsets, tree.sizes))
        self.names = [self._name(tree.keys[i], tree.integer_keys) for i in kept]
        if len(set(self.names)) < len(self.names):
            raise ValueError('some of its keys are the same')

    @staticmethod
    def matches(path: str) -> bool:
        """A folder with data.mdb in it, or a file called .lmdb or .mdb."""
        if os.path.isdir(path):
            return os.path.isfile(os.path.join(path, 'data.mdb'))
        return os.path.isfile(path) and path.lower().endswith(('.lmdb', '.mdb'))

    @staticmethod
    def _name(key, is_integer):
        if is_integer:
            return str(int.from_bytes(key, 'little'))
        text = key.decode(errors='replace')
        return text if text.isprintable() and '\ufffd' not in text else key.hex()

    def data(self, index: int) -> bytes:
        """The value of a key."""
        offset, size = self._offsets[index], self._sizes[index]
        if size > MAX_MEMBER:
            raise ValueError(f'it has {size} bytes, more than the limit of {MAX_MEMBER}')
        return self._file().read(offset, size)


# ----------------------------------------------------------------------------------------------------
# WebDataset


class WebDatasetSource(EncodedSource):
    """Tar files of samples, whose members are called alike up to the first dot: 0001.jpg, 0001.cls, 0001.json.

    path: a tar file, a folder of them, or a pattern such as "train-{000..146}.tar" or "train-*.tar". key: the ending of the image, where a
    sample has several. label_key: the key of the label in .json, by default "label" or "cls", if there is no .cls; "sigma", "sigma_min" and
    "sigma_max" in .json are levels. Captions are those of .txt, or "caption" in .json."""

    what = 'WebDataset .tar'

    def __init__(self, path: str, key: str | None = None, label_key: str | None = None):
        shards = _shards(path)
        missing = next((shard for shard in shards if not os.path.isfile(shard)), None)
        if missing or not shards:
            raise UserError(f'--source={path}: ' + (f'{missing} is not there' if missing else 'there are no files of this pattern'))
        self._files = [Opened(Bytes, shard) for shard in shards]
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(shard)) for shard in shards])
        titles = [os.path.relpath(os.path.abspath(shard), folder) for shard in shards]
        self.names, self._places, facts = [], [], []
        for number, (shard, title) in enumerate(zip(shards, titles)):
            for name, members in _samples(shard):
                image = _image_member(members, key)
                if image is None:
                    continue
                self.names.append(f'{title}/{name}' if len(shards) > 1 else name)
                self._places.append((number, *members[image]))
                facts.append(self._facts(number, members, label_key))
        if not self.names:
            raise ValueError(f'no sample in it has an image ({key or ", ".join(ending[1:] for ending in (*IMAGES, *RARER_IMAGES))})')
        self._keep(facts)

    @staticmethod
    def matches(path: str) -> bool:
        """A pattern that ends in .tar, a folder of tar files alone, or a tar file whose first file is called like part of a sample."""
        if os.path.isdir(path):
            return holds(path, lambda name: name.endswith('.tar') and _is_sample(_first(name)))
        if not path.lower().endswith(('.tar', '.tar.gz', '.tgz')):
            return False
        return _is_pattern(path) or os.path.isfile(path) and _is_sample(_first(path))

    def data(self, index: int) -> bytes:
        """The bytes of a sample's image."""
        number, offset, size = self._places[index]
        return self._files[number]().read(offset, size)

    def _facts(self, number, members, label_key):
        """(class, {level: value}, caption) of a sample."""
        note, label = {}, None
        if 'json' in members:
            note = json.loads(self._text(number, members['json']))
            if not isinstance(note, dict):
                raise ValueError('the .json of a sample holds no object')
        if 'cls' in members and label_key is None:
            label = _whole(self._text(number, members['cls']))
        else:
            label = next((note[key] for key in ([label_key] if label_key else ['label', 'cls']) if key in note), None)
        caption = self._text(number, members['txt'], 'replace') if 'txt' in members else note.get('caption')
        caption = ' '.join(caption.split()) if isinstance(caption, str) else None
        return label, {key: note[key] for key in LEVELS if key in note} or NO_LEVELS, caption

    def _text(self, number, place, errors='strict'):
        offset, size = place
        if size > MAX_TEXT:
            raise ValueError(f'a .cls, .json or .txt of {size} bytes')
        return self._files[number]().read(offset, size).decode(errors=errors)

    def _keep(self, facts):
        labels, levels, captions = zip(*facts)
        lacking = next((name for name, label in zip(self.names, labels) if label is None), None)
        if any(label is not None for label in labels):
            if lacking is not None:
                raise ValueError(f'{lacking} has no label, as others have')
            self.labels = list(labels)
        if any(captions):
            self.captions = [caption or '' for caption in captions]
        self.tell({key: [one.get(key) for one in levels] for key in LEVELS})


def _is_pattern(path):
    return not os.path.exists(path) and bool(re.search(r'[*?\[]|\{.*\}', path))


def _shards(path):
    """The tar files that a path names."""
    if os.path.isdir(path):
        return sorted(str(p) for p in Path(path).glob('*.tar'))
    if not _is_pattern(path):
        return [path]
    return [shard for one in _braces(path) for shard in (sorted(glob.glob(one)) if re.search(r'[*?\[]', one) else [one])]


def _braces(text):
    """"a{00..02}b" -> a00b, a01b, a02b; "{x,y}" -> x, y."""
    match = re.search(r'\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}', text)
    if not match:
        return [text]
    first, last, words = match.groups()
    if words is None and int(last) - int(first) > 10 ** 6:
        raise UserError(f'--source={text}: more than a million tar files')
    items = words.split(',') if words is not None else [f'{k:0{len(first)}}' for k in range(int(first), int(last) + 1)]
    return [rest for item in items for rest in _braces(text[:match.start()] + item + text[match.end():])]


def _first(path):
    """The first file of a tar file, or None."""
    try:
        with tarfile.open(path) as archive:
            return next((member for member in itertools.islice(archive, 100) if member.isfile()), None)
    except Exception:  # errors are reported when it is read
        return None


def _is_sample(member):
    """Whether a member is called like part of a sample, and not like CIFAR's, whose files have no endings."""
    if member is None or 'cifar' in member.name.lower():
        return False
    base, dot, ending = os.path.basename(member.name).partition('.')
    return bool(dot and not base.startswith('data_batch') and ending.lower() not in ('html', 'md', 'py', 'meta'))


def _samples(shard):
    """[(name, {ending: (offset, size)})] of a tar file, in order."""
    if head(shard, 2) == b'\x1f\x8b':
        raise ValueError(f'{os.path.basename(shard)} is compressed, so that its images cannot be read in any order; decompress it (gunzip)')
    found = collections.OrderedDict()
    with guarded(), tarfile.open(shard, 'r:') as archive:
        for member in archive:
            if not member.isreg() or member.issparse():
                continue
            folder, base = os.path.split(member.name)
            name, _, ending = base.partition('.')
            if not name:
                continue  # metadata of other programs
            sample = found.setdefault(os.path.join(folder, name), {})
            if ending.lower() in sample:
                raise ValueError(f'{member.name} occurs twice in {os.path.basename(shard)}')
            sample[ending.lower()] = member.offset_data, member.size
            archive.members = []  # tarfile would keep all of them in memory
    return list(found.items())


def _image_member(members, key):
    """The ending of a sample's image, or None. key: the ending, where it is told."""
    if key is not None:
        return str(key).lower() if str(key).lower() in members else None
    found = [ending for ending in members if f'.{ending}'.endswith((*IMAGES, *RARER_IMAGES))]
    found = [ending for ending in found if '.' not in ending] or found
    if len(found) > 1:
        raise ValueError(f'its samples have several images: {", ".join(found)}; give key= one of them')
    return found[0] if found else None


def _whole(text):
    """The class in a .cls file: a whole number, or a name."""
    text = text.strip()
    return int(text) if re.fullmatch(r'[+-]?\d{1,18}', text) else text


# ----------------------------------------------------------------------------------------------------
# Hugging Face


class TableSource(EncodedSource):
    """Rows of a table with a column of pictures: base class for sources that are described by Columns."""

    def hold(self, columns, table):
        """columns: a parquet.Columns. table: an Opened whose value has image(index) -> bytes."""
        self._table, self.names = table, [str(i) for i in range(columns.count)]
        if not self.names:
            raise ValueError('it has no rows')
        self.labels = columns.labels
        self.tell(columns.levels)

    def data(self, index: int) -> bytes:
        """The bytes in the image column."""
        with guarded():
            return self._table().image(index)


class ParquetSource(TableSource):
    """A .parquet file, or a folder of them, as Hugging Face's datasets are published.

    split: which files of a folder, by their names: train-00000-of-00002.parquet, or train/...; by default train, or the only one.
    key, label_key: the columns of images and labels, by default those whose type says so."""

    what = 'parquet'

    def __init__(self, path: str, split: str | None = None, key: str | None = None, label_key: str | None = None):
        needs('pyarrow.parquet', path)
        files = parquet.choose(path, split)
        with guarded():
            columns = parquet.Columns.of_files(files, key, label_key)
        self.hold(columns, Opened(parquet.Rows, files, columns.image))

    @staticmethod
    def matches(path: str) -> bool:
        """A file called .parquet, or a folder in which such are found."""
        if os.path.isdir(path):
            return any(file.endswith('.parquet') for file in first_files(path))
        return os.path.isfile(path) and (path.lower().endswith('.parquet') or head(path, 4) == b'PAR1')


class HuggingFaceSource(TableSource):
    """A folder of datasets' save_to_disk, or hf:OWNER/NAME on the Hub, in datasets' own cache. No code of a data set is run.

    split: by default train, or the only one. config: of a data set on the Hub that has several. key, label_key: columns."""

    what = 'hf:OWNER/NAME'

    def __init__(self, path: str, split: str | None = None, config: str | None = None, key: str | None = None,
                 label_key: str | None = None):
        needs('datasets', path)
        place = path[3:] if path.startswith('hf:') else os.path.abspath(path)
        table = Opened(parquet.Hub, place, path.startswith('hf:'), split, config, key, label_key)
        try:
            with guarded():
                self.hold(table().columns, table)
        except FileNotFoundError as err:
            raise UserError(f'--source={path}: {err}') from None

    @staticmethod
    def matches(path: str) -> bool:
        """hf:..., or a folder as save_to_disk leaves it."""
        notes = ('dataset_dict.json', 'state.json')
        return path.startswith('hf:') or any(os.path.isfile(os.path.join(path, note)) for note in notes)
