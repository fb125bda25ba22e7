# SPDX-License-Identifier: Apache-2.0
"""Tables with columns of pictures and their labels and levels: parquet files, and the tables of Hugging Face's datasets."""

import bisect
import json
import os
import re

from dnnlib import UserError
from dnnlib.archive import MAX_MEMBER

LABELS = ('label', 'labels', 'class', 'cls', 'y', 'fine_label', 'target')  # columns, where no type tells
LEVELS = ('sigma', 'sigma_min', 'sigma_max')  # of an image
BATCH = 16  # rows that are decoded at a time


class Columns:
    """The annotations of the images of a table: count, image (the name of their column), labels, levels ({name in LEVELS: values})."""

    def __init__(self, schema, features, key, label_key):
        """schema: pyarrow's. features: what Hugging Face's datasets note of the columns, {name: {_type: ...}}. Raises ValueError."""
        self.image = _image_column(schema, features, key)
        self._label = _label_column(schema, features, label_key)
        self.wanted = [name for name in (self._label, *LEVELS) if name in schema.names]
        self.count, self.labels, self.levels = 0, None, {}

    def take(self, table):
        """Adds the rows of a pyarrow table of the wanted columns."""
        found = {name: table.column(name).to_pylist() for name in self.wanted}
        for name in LEVELS:
            if name in found:
                self.levels.setdefault(name, []).extend(found[name])
        if self._label:
            self.labels = (self.labels or []) + found[self._label]

    def finish(self, count):
        """Checks the columns after all `count` rows have been added."""
        self.count = count
        short = [len(values) for values in (self.labels, *self.levels.values()) if values is not None and len(values) != count]
        if short:
            raise ValueError(f'it claims {count} rows, but has {short[0]}')
        if self.labels is None:
            return self
        if all(label in (None, -1) for label in self.labels):
            self.labels = None  # as in data sets whose labels are secret
        elif None in self.labels:
            raise ValueError(f'row {self.labels.index(None)} has no {self._label}, as others have')
        return self

    @classmethod
    def of_files(cls, files, key, label_key):
        """The Columns of parquet files, one after the other."""
        import pyarrow.parquet
        count, columns = 0, None
        for file in files:
            with pyarrow.parquet.ParquetFile(file, memory_map=False, pre_buffer=False) as opened:
                if columns is None:
                    schema = opened.schema_arrow
                    columns = cls(schema, _features(schema.metadata), key, label_key)
                if columns.image not in opened.schema_arrow.names:
                    raise ValueError(f'{os.path.basename(file)} has no column "{columns.image}"')
                count += opened.metadata.num_rows
                if opened.metadata.num_rows > 8 * os.path.getsize(file):
                    raise ValueError(f'{os.path.basename(file)} claims {opened.metadata.num_rows} rows, more than it can hold')
                if columns.wanted:
                    columns.take(opened.read(columns.wanted, use_threads=False))
        return columns.finish(count)


class Rows:
    """The images of parquet files by the number of their row. Rows that follow each other are decoded once, a few at a time."""

    def __init__(self, files, column):
        import pyarrow.parquet
        self._open = lambda path: pyarrow.parquet.ParquetFile(path, memory_map=False, pre_buffer=False)
        self._column, self._groups, self._starts = column, [], [0]  # (path, row group), and the first row of each
        for path in files:
            with self._open(path) as file:
                for group in range(file.num_row_groups):
                    self._groups.append((path, group))
                    self._starts.append(self._starts[-1] + file.metadata.row_group(group).num_rows)
        self._path = self._file = self._group = None
        self._first, self._rows, self._batches = 0, [], iter(())

    def close(self):
        """Closes the file that is open."""
        if self._file is not None:
            self._file.close()

    def image(self, index):
        """The bytes of an image."""
        if not 0 <= index < self._starts[-1]:
            raise ValueError(f'no row {index}')
        group = bisect.bisect_right(self._starts, index) - 1
        if group != self._group or index < self._first:
            path, number = self._groups[group]
            if path != self._path:
                self.close()
                self._path, self._file = path, self._open(path)
            self._group, self._first, self._rows = group, self._starts[group], []
            self._batches = self._file.iter_batches(BATCH, [number], [self._column], use_threads=False)
        while index >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._rows = []
            batch = next(self._batches, None)
            if batch is None:
                self._group = None
                raise ValueError(f'row {index} is missing')
            self._rows = batch.column(0)
        return _bytes(self._rows[index - self._first].as_py())


class Hub:
    """The images of a data set that the package `datasets` opens: from the Hub, or as its save_to_disk left it."""

    def __init__(self, place, is_hub, split, config, key, label_key):
        import datasets
        datasets.disable_progress_bars()
        found = datasets.load_dataset(place, config) if is_hub else datasets.load_from_disk(place)
        if isinstance(found, dict):
            found = found[_one(found, split)]
        elif split not in (None, str(found.split)):
            raise ValueError(f'split={split}: it has {found.split or "none"}')
        features = {name: {'_type': type(kind).__name__} for name, kind in found.features.items()}
        table = found.data.table
        table.validate(full=True)
        self.columns = Columns(table.schema, features, key, label_key)
        noted = found.select_columns(self.columns.wanted).with_format('arrow')[:] if self.columns.wanted else None
        if noted is not None:
            self.columns.take(noted)
        self.columns.finish(len(found))
        column = self.columns.image
        found = found.select_columns([column])
        if features[column]['_type'] == 'Image':
            found = found.cast_column(column, datasets.Image(decode=False))
        self._found = found

    def image(self, index):
        """The bytes of an image."""
        return _bytes(self._found[index][self.columns.image])


def choose(path, split):
    """The parquet files of a split, or the one that the path is. Raises UserError and ValueError."""
    if not os.path.isdir(path):
        if split is not None:
            raise UserError(f'--source={path}: split={split} is for a folder; this is one file')
        return [path]
    splits = {}
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            if name.endswith('.parquet') and not name.startswith('.'):
                file = os.path.join(folder, name)
                splits.setdefault(_split_of(os.path.relpath(file, path)), []).append(file)
    return sorted(splits[_one(splits, split)])


def _split_of(name):
    """"data/train-00000-of-00002.parquet" and "plain/train/0000.parquet" are of the split train."""
    folder, base = os.path.split(name)
    match = re.match(r'(.+?)-\d+(-of-\d+)?(-[0-9a-f]+)?\.parquet$', base)
    if match:
        return match[1]
    above = os.path.basename(folder)
    if re.fullmatch(r'\d+\.parquet|part[-.].*', base):
        return above if above not in ('', 'data') else 'all'
    return base.removesuffix('.parquet')


def _one(splits, split):
    """The name of the split that is wanted."""
    if split is None and ('train' in splits or len(splits) == 1):
        return 'train' if 'train' in splits else next(iter(splits))
    if split not in splits:
        raise ValueError(f'{"it has" if split is None else f"split={split}: it has"} the splits {", ".join(map(str, splits)) or "none"}; '
                         'give split= one of them')
    return split


def _features(metadata):
    """What datasets noted in a parquet file."""
    try:
        found = json.loads((metadata or {}).get(b'huggingface', b'{}'))['info']['features']
        return {name: told for name, told in found.items() if isinstance(told, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _image_column(schema, features, key):
    import pyarrow
    if key is not None:
        if key not in schema.names:
            raise ValueError(f'no column "{key}"; it has {", ".join(schema.names)}')
        return key
    is_bytes = lambda kind: pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    has_bytes = lambda kind: pyarrow.types.is_struct(kind) and any(field.name == 'bytes' and is_bytes(field.type) for field in kind)
    ways = [[name for name in schema.names if features.get(name, {}).get('_type') == 'Image'],
            [field.name for field in schema if has_bytes(field.type)], [field.name for field in schema if is_bytes(field.type)]]
    found = next((way for way in ways if way), [])
    if len(found) != 1:
        told = f'several columns of images: {", ".join(found)}' if found else f'no column of images among {", ".join(schema.names)}'
        raise ValueError(f'{told}; give key= one of them')
    return found[0]


def _label_column(schema, features, key):
    import pyarrow
    if key is not None:
        if key not in schema.names:
            raise ValueError(f'no column "{key}"; it has {", ".join(schema.names)}')
        return key
    found = [name for name in schema.names if features.get(name, {}).get('_type') == 'ClassLabel']
    if len(found) > 1:
        raise ValueError(f'several columns of classes: {", ".join(found)}; give label_key= one of them')
    plain = lambda kind: pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind)
    found = found or [name for name in LABELS if name in schema.names and plain(schema.field(name).type)]
    return found[0] if found else None


def _bytes(value):
    """The bytes of an image as a column has them: themselves, or in a struct; a path to a file elsewhere is not followed."""
    if isinstance(value, dict):
        if value.get('bytes') is None and value.get('path') is not None:
            raise ValueError('the table has the path of a picture instead of the picture; make it again with embedded pictures')
        value = value.get('bytes')
    if not isinstance(value, bytes):
        raise ValueError('the table has no picture there')
    if len(value) > MAX_MEMBER:
        raise ValueError(f'it has {len(value)} bytes, more than the limit of {MAX_MEMBER}')
    return value
