# SPDX-License-Identifier: Apache-2.0
"""Images per second that data loading supplies on one core: first pass, clean batches, noisy batches.

python benchmarks/data_loading.py [--images=20000] [--size=32] [--batch=512] [--json=FILE]"""

import argparse
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure  # noqa: E402 (the folder above had to be found first)
from training.data.cache import decode  # noqa: E402
from training.data.convert.writers import encode_png  # noqa: E402
from training.data.corruption import Corruption  # noqa: E402
from training.data.dataset import ImageDataset  # noqa: E402
from training.data.store import ImageStore  # noqa: E402


def make_archive(path, images, size):
    """A zip of smooth random 8-bit pictures with three channels, as dataset_tool.py writes it."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for i in range(images):
            steps = rng.integers(-8, 9, (3, size, size)).cumsum(1).cumsum(2)
            archive.writestr(f'{i:08}.png', encode_png(np.clip(steps + 128, 0, 255).astype(np.uint8)))


def rate(store, count, batch, seconds):
    """Images per (second, CPU second) of gather() over shuffled batches, after a warm-up of one pass."""
    order = torch.from_numpy(np.random.default_rng(1).permutation(count))
    batches = [order[i:i + batch] for i in range(0, count - batch + 1, batch)]
    for indices in batches:
        store.gather(indices)
    done, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        for indices in batches:
            store.gather(indices)
        done += batch * len(batches)
    return done / (time.perf_counter() - start), done / (time.process_time() - cpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=20000)
    parser.add_argument('--size', type=int, default=32)
    parser.add_argument('--batch', type=int, default=512)
    parser.add_argument('--seconds', type=float, default=3.0, help='time for each kind of item')
    parser.add_argument('--json', help='also write the numbers to this file')
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'images.zip')
        make_archive(path, args.images, args.size)
        start = time.perf_counter()
        copy = decode(path, folder)
        decoded = args.images / (time.perf_counter() - start)
        print(f'decoding into {"a packed folder" if copy else "memory, when the store is made"}: {decoded:,.0f} images per second')
        dataset = ImageDataset(path, cache_dir=folder)
        print(f'{args.images} images of 3x{args.size}x{args.size}, batches of {args.batch}, one core, images per second:')
        cases = (('clean', 0.0, 8), ('90 % noisy, cached', 0.9, 8), ('all noisy, cached', 1.0, 8), ('all noisy, made at each use', 1.0, 0))
        found = {}
        for title, probability, gib in cases:
            corruption = Corruption(0.2, probability)
            sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
            start = time.perf_counter()
            store = ImageStore(dataset, corruption, sigma_n, cache_gib=gib)
            for indices in torch.arange(args.images).split(args.batch):
                store.gather(indices)
            first = args.images / (time.perf_counter() - start)
            wall, cpu = rate(store, args.images, args.batch, args.seconds)
            found[title] = {'first_pass': first, 'per_second': wall, 'per_cpu_second': cpu}
            print(f'  {title:24} first pass {first:8,.0f}   then {wall:9,.0f}   ({cpu:9,.0f} per CPU second)')
        measure.write(args.json, torch.device('cpu'), options=vars(args), decoding=decoded, images_per_second=found)


if __name__ == '__main__':
    main()
