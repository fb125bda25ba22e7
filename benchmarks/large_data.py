# SPDX-License-Identifier: Apache-2.0
"""What a data set of ImageNet's size costs: memory, disk space, time to the first batch, images per second.

python benchmarks/large_data.py [--images=1281167] [--size=64] [--classes=1000] [--ranks=2] [--dir=FOLDER]

Makes a packed data set of random pictures (15.7 GB by default), which is removed at the end, and loads it on several ranks as train.py
does, with 90 % of the images noisy."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402 (the time begins before the imports)
import torch  # noqa: E402

import train  # noqa: E402
from dnnlib import EasyDict  # noqa: E402
from torch_utils import distributed, misc, registry  # noqa: E402
from training.data.packed import new_packed  # noqa: E402
from training.diffusion.noise import NOISE  # noqa: E402
from training.run.build import load_data  # noqa: E402
from training.run.configure import configure  # noqa: E402

BATCH = 256  # per rank
NODE = 8     # ranks of the node for which the speed is extrapolated


def make(folder, count, size, classes):
    """Writes a packed data set of random pictures with labels."""
    rng = np.random.default_rng(0)
    with new_packed(folder, (3, size, size), np.uint8) as packed:
        for first in range(0, count, 1024):
            packed.append(rng.bytes(min(1024, count - first) * 3 * size * size), min(1024, count - first))
        packed.finish({'labels': rng.integers(0, classes, count)})


def forget(folder):
    """Removes the files from the page cache of the system, as before a first start."""
    for path in Path(folder).iterdir():
        with open(path, 'rb') as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def own_memory():
    """Private memory of this process in bytes, without mapped files and shared memory."""
    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('Anonymous'))


def work(folder, flags, seconds):
    """What each rank runs: prints its measurements as JSON."""
    imported, before = time.time(), own_memory()
    distributed.init()
    torch.set_num_threads(1)
    args = [f'--data={folder}', '--outdir=.', '--cond=1', '--sigma=0.2', '--corruption-probability=0.9', '--seed=0',
            f'--batch={BATCH * distributed.size()}', '--arch=adm', '--threads=1', *flags]
    config = configure(EasyDict(train.main.make_context('train', args).params))
    first = BATCH * distributed.rank()
    data = load_data(config, EasyDict(label_dim=1000), registry.build(config.objective.noise, NOISE), slice(first, first + BATCH),
                     torch.device('cpu'))
    misc.give_memory_back()
    data.feed.next()
    started, memory = time.time(), own_memory() - before
    done, cpu = 0, time.process_time()
    while time.time() < started + seconds:
        data.feed.next()
        done += BATCH
    found = dict(imports=imported - BEGAN, start=started - imported, memory=memory, rate=done / (time.time() - started),
                 per_core=done / (time.process_time() - cpu), line=data.line, grown=own_memory() - before)
    data.feed.close()
    os.write(1, f'{json.dumps(found)}{chr(10)}'.encode())
    distributed.shutdown()


def start(folder, ranks, flags, seconds=8):
    """Starts the ranks; returns the measurements of each."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    env = lambda rank: {**os.environ, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(ranks), 'LOCAL_WORLD_SIZE': str(ranks),
                        'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1'}
    runs = [subprocess.Popen([sys.executable, __file__, f'--work={folder}', f'--seconds={seconds}', *flags], env=env(rank),
                             stdout=subprocess.PIPE, text=True) for rank in range(ranks)]
    return [json.loads(run.communicate()[0].splitlines()[-1]) for run in runs]


def tell(title, found):
    """Prints one line for one start."""
    most = lambda key: max(one[key] for one in found)
    per_core = sum(one['per_core'] for one in found) / len(found)
    print(f'{title}: first batch after {most("start"):.1f} s, and {most("imports"):.1f} s of imports; memory per rank without the file '
          f'{most("memory") / 1e9:.3f} GB, after feeding {most("grown") / 1e9:.3f} GB; {sum(one["rate"] for one in found):,.0f} img/s by '
          f'{len(found)} ranks, {per_core:,.0f} per core: {NODE * per_core:,.0f} on a node with {NODE} ranks and cores', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (('images', 1281167), ('size', 64), ('classes', 1000), ('ranks', 2), ('seconds', 8)):
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--dir', help='Folder in which the data set is made  [default: the folder for temporary files]')
    parser.add_argument('--work', help=argparse.SUPPRESS)
    o, flags = parser.parse_known_args()
    if o.work:
        work(o.work, flags, o.seconds)
        return
    with tempfile.TemporaryDirectory(dir=o.dir) as folder:
        path, began = os.path.join(folder, 'packed'), time.time()
        make(path, o.images, o.size, o.classes)
        disk = sum(file.stat().st_size for file in Path(path).iterdir())
        print(f'{o.images} images of 3x{o.size}x{o.size}: {disk / 1e9:.2f} GB on disk, made in {time.time() - began:.0f} s; '
              f'{o.ranks} ranks, batches of {BATCH} per rank', flush=True)
        forget(path)
        first = start(path, o.ranks, flags, o.seconds)
        print(first[0]['line'])
        tell('first start', first)
        tell('second start', start(path, o.ranks, flags, o.seconds))
        small = o.images * 0.9 * 3 * o.size ** 2 * 4 / 2 ** 30
        print(f'(caching the noisy images would take {small:.1f} GiB on the node: --cache-gib)')


if __name__ == '__main__':
    main()
