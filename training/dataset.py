# SPDX-License-Identifier: Apache-2.0
"""zip | folder -> images, labels and native noise levels; decoded once, made noisy once, then gathered in batches.

Network units: (stored - offset) / scale. 8-bit images have offset = scale = 127.5, which gives [-1, 1]; float images carry their
`units` {offset, scale} in dataset.json. The `sigmas` of dataset.json are in stored (physical) units for float images, and divided
by the scale on reading; for 8-bit images they are in network units. `sigma_max`, in the same units, is the highest level that an
image may be trained at (null: any), for images that are like those wanted in their details only."""

import io
import json
import os
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from torch_utils import distributed

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp', '.npy')
CHUNK = 64  # images that a thread works on before it reports


class Archive:
    """The members of a zip file or folder: `names` (relative, with slashes, sorted) and read(name) -> bytes.

    Safe in threads, in forked processes and in spawned ones."""

    def __init__(self, path):
        self.path, self._opened = str(path), (None, None)
        self._is_folder = os.path.isdir(self.path)
        if self._is_folder:
            root = Path(self.path)
            self.names = sorted(p.relative_to(root).as_posix() for p in root.rglob('*') if p.is_file())
        elif os.path.isfile(self.path):
            try:
                self.names = sorted(name for name in self._zip().namelist() if not name.endswith('/'))
            except (zipfile.BadZipFile, OSError) as err:
                raise click.ClickException(f'{self.path}: not a whole zip file ({err}); make it again') from None
        else:
            raise click.ClickException(f'{self.path}: no such zip file or folder')

    def __getstate__(self):
        return {**self.__dict__, '_opened': (None, None)}

    def _zip(self):
        """The open zip file, one for each process: a file position that two processes share would mix their reads."""
        if self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened[1]

    def read(self, name):
        """The bytes of a member."""
        return (Path(self.path) / name).read_bytes() if self._is_folder else self._zip().read(name)

    def read_json(self, name='dataset.json'):
        """The object in a JSON member, {} where there is none."""
        if name not in self.names:
            return {}
        try:
            found = json.loads(self.read(name))
        except (ValueError, zipfile.BadZipFile) as err:
            raise click.ClickException(f'{self.path}: {name} is not valid JSON ({err})') from None
        if not isinstance(found, dict):
            raise click.ClickException(f'{self.path}: {name} must hold an object with "labels", got a {type(found).__name__}')
        return found


def decode_image(name, data):
    """Bytes of a member -> array [C,H,W]: uint8, or whatever an .npy member holds ([H,W] counts as one channel)."""
    if name.lower().endswith('.npy'):
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return array[None] if array.ndim == 2 else array
    image = Image.open(io.BytesIO(data))
    if image.mode in ('P', '1'):  # palette indices and bits are no intensities
        image = image.convert('RGB' if image.mode == 'P' else 'L')
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


class ImageDataset:
    """What a zip or folder of images holds: which items there are, not yet their pixels.

    path: zip or folder of PNG, JPEG or .npy ([C,H,W]) members, dataset.json optional; members count in the order of their names.
    use_labels: read labels; they must be there. keep: share of the images, a fixed random subset; max_size: the same by count.
    xflip: every kept image a second time, mirrored. random_seed: of the subset.

    Attributes: path, name, image_shape (C,H,W), is_float, units ({offset, scale}, None for 8-bit), has_labels, label_dim (0
    without use_labels), raw_idx int64 [N] (place in the archive), flip bool [N], native_sigma float64 [N] (network units).
    Raises click.ClickException in one line for anything that is wrong with the files or the options."""

    def __init__(self, path, use_labels=False, keep=1.0, max_size=None, xflip=False, random_seed=0):
        if not 0 < keep <= 1:
            raise click.ClickException(f'--dataset-keep-percentage={keep}: must be more than 0 and at most 1 (which keeps all)')
        self._archive = Archive(path)
        self.path = self._archive.path
        self.name = Path(os.path.abspath(self.path)).stem
        self._names = [name for name in self._archive.names if name.lower().endswith(SUFFIXES)]
        if not self._names:
            raise click.ClickException(f'{self.path}: no images in it (looked for {", ".join(SUFFIXES)})')
        self._meta = self._archive.read_json()
        self.image_shape = self._dtype = None
        first = self.decode(0)
        self.image_shape, self._dtype = first.shape, first.dtype
        self.is_float = first.dtype == np.float32
        self.units = self._read_units() if self.is_float else None
        self._read_labels(use_labels)
        kept = self._subset(keep, max_size, random_seed)
        self.raw_idx = np.concatenate([kept, kept]) if xflip else kept
        self.flip = np.arange(len(self.raw_idx)) >= len(kept)
        self.native_sigma = self._read_sigmas()[self.raw_idx]
        self.sigma_max = self._read_sigma_max()[self.raw_idx]

    def __len__(self):
        return len(self.raw_idx)

    @property
    def resolution(self):
        """[H, W]."""
        return list(self.image_shape[1:])

    @property
    def classes(self):
        """The class of each item, int64 [N]; None where labels are not used, or are vectors."""
        return self._labels[self.raw_idx] if self.label_dim and self._labels.ndim == 1 else None

    def labels(self, indices):
        """float32 [n, label_dim] of items: one-hot classes, or the vectors of dataset.json; [n, 0] without use_labels."""
        raw = self.raw_idx[np.asarray(indices)]
        if self.label_dim == 0:
            return np.zeros([len(raw), 0], np.float32)
        if self._labels.ndim == 2:
            return self._labels[raw]
        return np.eye(self.label_dim, dtype=np.float32)[self._labels[raw]]

    def decode(self, raw_idx):
        """An image of the archive as it lies there, never flipped: [C,H,W], uint8 or float32. Safe in threads."""
        name = self._names[raw_idx]
        try:
            image = decode_image(name, self._archive.read(name))
        except (OSError, ValueError, SyntaxError, EOFError, zipfile.BadZipFile, Image.DecompressionBombError) as err:
            reason = 'not an image' if isinstance(err, UnidentifiedImageError) else str(err) or type(err).__name__
            raise click.ClickException(f'{self.path}: cannot read {name} ({reason})') from None
        if image.ndim != 3 or image.dtype not in (np.uint8, np.float32, np.float64):
            raise click.ClickException(f'{self.path}: {name} is {image.dtype} of shape {list(image.shape)}; expected 8-bit or '
                                       'float32 [C,H,W]: convert it with dataset_tool.py')
        image = image if image.dtype == np.uint8 else image.astype(np.float32)
        if self.image_shape is not None and (image.shape != self.image_shape or image.dtype != self._dtype):
            raise click.ClickException(
                f'{self.path}: {name} is {_describe(image.dtype, image.shape)}, but {self._names[0]} is '
                f'{_describe(self._dtype, self.image_shape)}; make them equal with dataset_tool.py --resolution')
        return image

    def to_network(self, images):
        """Stored images -> network units, float32."""
        images = torch.as_tensor(images).to(torch.float32, copy=True)
        if self.units is None:
            return images.div_(127.5).sub_(1)
        return images.sub_(self.units['offset']).div_(self.units['scale'])

    def _subset(self, keep, max_size, random_seed):
        """Sorted raw indices: the head of one permutation, so that a smaller share is part of a larger one (and as published)."""
        total = len(self._names)
        size = min(int(keep * total), total if max_size is None else int(max_size))
        if size < 1:
            raise click.ClickException(f'--dataset-keep-percentage={keep}: keeps none of the {total} images; '
                                       f'use at least {1 / total:.3g}, or --max-size of 1 or more')
        if size == total:
            return np.arange(total)
        return np.sort(np.random.RandomState(random_seed % 2 ** 31).permutation(total)[:size])

    def _read_units(self):
        try:
            units = {key: float(self._meta['units'][key]) for key in ('offset', 'scale')}
        except (KeyError, TypeError, ValueError):
            raise click.ClickException(
                f'{self.path}: float images need "units": {{"offset": ..., "scale": ...}} in dataset.json, with network = '
                '(stored - offset) / scale; convert with dataset_tool.py, or write 0 and 1 for values in network units') from None
        if not (np.isfinite(list(units.values())).all() and units['scale'] > 0):
            raise click.ClickException(f'{self.path}: dataset.json has units {units}; both must be finite, the scale above 0')
        return units

    def _by_file(self, key):
        """The values of dataset.json's `key` in the order of the images; None where it is absent or null."""
        table = self._meta.get(key)
        if not table:
            return None
        try:
            pairs = table.items() if isinstance(table, dict) else table
            table = {str(name).replace('\\', '/'): value for name, value in pairs}
        except (TypeError, ValueError):
            raise click.ClickException(f'{self.path}: "{key}" in dataset.json must be [file, value] pairs or an object') from None
        missing = [name for name in self._names if name not in table]
        if missing:
            raise click.ClickException(f'{self.path}: "{key}" in dataset.json misses {len(missing)} of {len(self._names)} files, '
                                       f'such as {missing[0]}; list every file')
        return [table[name] for name in self._names]

    def _read_labels(self, use_labels):
        self.has_labels, self.label_dim, self._labels = bool(self._meta.get('labels')), 0, None
        if not use_labels:
            return
        if not self.has_labels:
            raise click.ClickException(f'--cond=1 needs labels, and {self.path} has none in its dataset.json; '
                                       'make them with dataset_tool.py --labels, or use --cond=0')
        values = self._by_file('labels')
        try:
            labels = np.array(values)
            classes = labels.dtype.kind in 'iu' and labels.ndim == 1
            self._labels = labels.astype(np.int64) if classes else labels.astype(np.float32).reshape(len(values), -1)
            if not np.isfinite(self._labels).all() or (classes and labels.min() < 0):
                raise ValueError
        except (TypeError, ValueError):
            raise click.ClickException(f'{self.path}: labels in dataset.json must be classes 0, 1, ... or finite vectors of one '
                                       'length') from None
        # The number of classes is that of the whole archive: a subset must not change the network.
        self.label_dim = int(labels.max()) + 1 if classes else self._labels.shape[1]

    def _read_sigmas(self):
        """Native noise levels of every image of the archive, float64, network units."""
        values = self._by_file('sigmas')
        if values is None:
            return np.zeros(len(self._names))
        try:
            sigmas = np.array(values, np.float64).reshape(len(self._names))
        except (TypeError, ValueError):
            raise click.ClickException(f'{self.path}: "sigmas" in dataset.json must be one number a file') from None
        if not (np.isfinite(sigmas) & (sigmas >= 0)).all():
            bad = int(np.flatnonzero(~(np.isfinite(sigmas) & (sigmas >= 0)))[0])
            raise click.ClickException(f'{self.path}: "sigmas" in dataset.json gives {self._names[bad]} the level {sigmas[bad]}; '
                                       'levels must be 0 or more')
        return sigmas / self.units['scale'] if self.units else sigmas

    def _read_sigma_max(self):
        """The highest level that every image of the archive may be trained at, float64, network units; inf where there is no limit."""
        values = self._by_file('sigma_max')
        if values is None:
            return np.full(len(self._names), np.inf)
        try:
            limits = np.array([np.inf if value is None else value for value in values], np.float64).reshape(len(self._names))
        except (TypeError, ValueError):
            raise click.ClickException(f'{self.path}: "sigma_max" in dataset.json must be one number a file, or null') from None
        if not (limits > 0).all():
            bad = int(np.flatnonzero(~(limits > 0))[0])
            raise click.ClickException(f'{self.path}: "sigma_max" in dataset.json gives {self._names[bad]} the limit {limits[bad]}; '
                                       'limits must be above 0, or null for none')
        return limits / self.units['scale'] if self.units else limits


def _describe(dtype, shape):
    return f'{dtype} {"x".join(map(str, shape))}'


class ImageStore:
    """The pixels of a dataset: every image decoded once, every noisy one made once with its fixed noise, batches by index.

    dataset: ImageDataset. corruption: Corruption. sigma_n: float64 [N], the level of each item (Corruption.levels).
    cache_gib: bound on the memory of this node's processes together; what does not fit lies in one file that they all map.
    workers: decoding threads of this process; default: its share of the cores. cache_dir: where that file is; default: the
    system's folder for temporary files. It loses its name before anything is written to it, so that nothing is left behind.

    All ranks make their stores at the same point of the program. Attributes: nbytes, mapped, noisy_count (noisy copies)."""

    def __init__(self, dataset, corruption, sigma_n, cache_gib=8.0, workers=None, cache_dir=None):
        self._dataset, self._corruption, self._sigma_n = dataset, corruption, np.asarray(sigma_n, np.float64)
        images, slot = np.unique(dataset.raw_idx, return_inverse=True)  # slot [N]: an image and its flip share one
        noisy = np.flatnonzero(self._sigma_n > dataset.native_sigma)
        # The published protocol gives an image's flip a noisy copy of its own; otherwise the two share one.
        copy = slot if corruption.noise_follows_flip else slot + len(images) * dataset.flip
        _, first, noisy_slot = np.unique(copy[noisy], return_index=True, return_inverse=True)
        self._sources = noisy[first]  # the item that each noisy copy is made from
        self.noisy_count = len(self._sources)
        self._slot = torch.from_numpy(slot)
        self._noisy_slot = torch.full([len(dataset)], -1, dtype=torch.int64)
        self._noisy_slot[noisy] = torch.from_numpy(noisy_slot)
        self._flip = torch.from_numpy(dataset.flip)
        self._allocate(len(images), cache_gib, cache_dir)
        self._fill(images, workers or max(1, (os.cpu_count() or 1) // distributed.local_size()))

    def gather(self, indices):
        """Items in network units at level sigma_n: float32 [n,C,H,W]; flips come last, so that noise is mirrored as well."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        noisy_slot = self._noisy_slot[indices]
        is_noisy = noisy_slot >= 0
        if bool(is_noisy.all()):
            images = self._noisy.index_select(0, noisy_slot)
        else:
            images = self._dataset.to_network(self._clean.index_select(0, self._slot[indices]))
            rows = is_noisy.nonzero().squeeze(1)
            images.index_copy_(0, rows, self._noisy.index_select(0, noisy_slot[rows]))
        return self._mirrored(images, indices)

    def raw(self, indices):
        """Items as stored, without added noise: uint8 or float32 [n,C,H,W], flips applied."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return self._mirrored(self._clean.index_select(0, self._slot[indices]), indices)

    def _mirrored(self, images, indices):
        rows = self._flip[indices].nonzero().squeeze(1)
        if len(rows):
            images.index_copy_(0, rows, images.index_select(0, rows).flip(3))
        return images

    def _allocate(self, count, cache_gib, cache_dir):
        """Makes room for clean [count,C,H,W], as stored, and noisy [noisy_count,C,H,W], float32: in memory or a mapped file."""
        shape, dtype = self._dataset.image_shape, np.dtype(np.float32 if self._dataset.is_float else np.uint8)
        noisy_bytes = self.noisy_count * int(np.prod(shape)) * 4
        self.nbytes = noisy_bytes + count * int(np.prod(shape)) * dtype.itemsize
        self.mapped = self.nbytes > cache_gib * 2 ** 30 / distributed.local_size()
        buffer = _shared_buffer(self.nbytes, cache_dir) if self.mapped else np.empty(self.nbytes, np.uint8)
        # float32 first: both parts are aligned then
        self._noisy = torch.from_numpy(buffer[:noisy_bytes].view(np.float32).reshape(self.noisy_count, *shape))
        self._clean = torch.from_numpy(buffer[noisy_bytes:].view(dtype).reshape(count, *shape))

    def _fill(self, images, workers):
        """Decodes, then adds the noise. Ranks that share a file share the work; otherwise each does all of it."""
        self._run('Decoding', len(images), workers, lambda rows: self._decode(rows, images))
        self._run('Adding noise', self.noisy_count, workers, self._corrupt)

    def _decode(self, rows, images):
        clean = self._clean.numpy()
        for slot in range(*rows):
            clean[slot] = self._dataset.decode(images[slot])

    def _corrupt(self, rows):
        items, data = self._sources[slice(*rows)], self._dataset
        clean = data.to_network(self._clean[self._slot[items]]).numpy()
        self._noisy.numpy()[slice(*rows)] = self._corruption.apply(
            clean, data.raw_idx[items], data.native_sigma[items], self._sigma_n[items], data.flip[items])

    def _run(self, title, count, workers, work):
        """work((first, last)) on chunks of the rows below count, in threads (decoders and generators leave Python's lock)."""
        chunks = [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        ranks = distributed.local_size() if self.mapped else 1
        mine = chunks[distributed.local_rank()::ranks] if self.mapped else chunks
        bar = tqdm(total=count, desc=title, unit='img', unit_scale=True, disable=None if distributed.rank() == 0 else True)
        with bar, ThreadPoolExecutor(workers) as pool:
            for chunk, _ in zip(mine, pool.map(work, mine)):
                bar.update((chunk[1] - chunk[0]) * ranks)
        if self.mapped:
            distributed.barrier()


def _shared_buffer(nbytes, cache_dir):
    """uint8 [nbytes] in a file that the processes of this node map together, and that has no name any more when this returns."""
    leader, folder, path = distributed.local_rank() == 0, cache_dir or tempfile.gettempdir(), None
    try:
        if leader:
            handle, path = tempfile.mkstemp(prefix='.images-', dir=folder)
            os.truncate(handle, nbytes)
        # A node's ranks are consecutive, its local rank 0 the first of them.
        path = distributed.all_values(path)[distributed.rank() - distributed.local_rank()]
        buffer = np.memmap(path, np.uint8, 'r+', shape=(nbytes,))
        distributed.barrier()
        if leader:
            os.unlink(path)
            _reserve(handle, nbytes)
            os.close(handle)
    except OSError as err:
        if leader and path and os.path.exists(path):
            os.unlink(path)
        raise click.ClickException(f'{folder}: cannot hold the {nbytes / 2 ** 30:.1f} GiB of decoded images ({err.strerror}); '
                                   'raise --cache-gib, or point --cache-dir to a larger disk') from None
    distributed.barrier()
    return np.asarray(buffer)


def _reserve(handle, nbytes):
    """Claims the disk space now: running out of it later would kill the process without a word."""
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(handle, 0, nbytes)
