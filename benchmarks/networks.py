# SPDX-License-Identifier: Apache-2.0
"""Architectures at equal training compute on CIFAR-10 photographs of 8x8 pixels: held-out loss by level, distance, speed, memory.

python benchmarks/networks.py --data=cifar10-train-jpeg.zip --out=runs/networks --jobs=2
python benchmarks/networks.py --memory

Every run is one train.py; what is there is not trained again. The learning rate of each architecture is the one of LRS with the lowest
held-out loss of the first seed after a quarter of the training."""

import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import contestants  # noqa: E402 (the folder above had to be found first)
from dnnlib.files import read_json  # noqa: E402
from torch_utils import misc, registry  # noqa: E402
from training.networks.interface import ARCHS  # noqa: E402
from training.networks.preconditioning import build_network  # noqa: E402

SIDE, FEW, SAMPLES, HELD_OUT = 8, 1000, 500, 500
ARMS = {'ddpmpp': 'ddpmpp:cbase=16,cres=1|2,blocks=1,attn=4,dropout=0',
        'edm2': 'edm2:cbase=16,cres=1|2,blocks=1,attn=4,channels_per_head=16',
        'dit': 'dit:patch=2,width=88,depth=3,heads=4', 'uvit': 'uvit:patch=2,width=80,depth=2,heads=4',
        'vit': 'vit:patch=2,width=72,depth=4,heads=4'}
OWN = {'edm2': ['--optimizer=adam:beta2=0.99', '--lr-schedule=inverse_sqrt:ref=400']}  # its paper's, with the decay at this length
LRS = {'ddpmpp': [2e-3, 4e-3, 8e-3], 'edm2': [1e-2, 2e-2, 4e-2], 'dit': [1e-3, 2e-3, 4e-3], 'uvit': [2e-3, 4e-3, 8e-3],
       'vit': [2e-3, 4e-3, 8e-3]}
TRAIN = ['--cond=1', '--augment=0', '--batch=64', '--lr-rampup=0.004', '--ema=0.008', '--snap=1000', '--dump=0', '--samples=0',
         '--threads=1']
PUBLISHED = ['ddpmpp', 'adm', 'edm2:size=XS', 'dit:size=S', 'uvit:size=S', 'vit:size=S']  # of which --memory counts activations


def call(script, *arguments):
    """Runs a command of the program in a process of its own, whose peak memory is then its own."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    if done.returncode:
        raise SystemExit(f'{script} {" ".join(map(str, arguments))}\n{done.stdout}\n{done.stderr}')


def make_data(path, data):
    """The training half of the photographs, its first thousand, 500 held-out ones, and the statistics of the other half."""
    convert = lambda name, *more: os.path.exists(path(name)) or call('dataset_tool.py', f'--source={data}', f'--dest={path(name)}',
                                                                     f'--resolution={SIDE}x{SIDE}', *more)
    convert('all.zip', '--part=0/2')
    convert('few.zip', '--part=0/2', f'--max-images={FEW}', '--sample=spread')
    convert('other.zip', '--part=1/2')
    convert('held-out.zip', '--part=1/2', f'--max-images={HELD_OUT}', '--sample=spread')
    if not os.path.exists(path('other.npz')):
        call('eval_fid.py', 'ref', f'--data={path("other.zip")}', f'--dest={path("other.npz")}', '--detector=pixels')


def train(path, arm, images, seed, lr, kimg):
    """Trains one network; returns its folder and its last held-out losses and memory."""
    run = path(f'{arm}-{images}-{seed}-{lr:g}-{kimg:g}')
    if not os.path.exists(os.path.join(run, 'done')):
        call('train.py', f'--outdir={run}', '--nosubdir', f'--data={path(f"{images}.zip")}', f'--val={path("held-out.zip")}', *TRAIN,
             *OWN.get(arm, []), f'--arch={ARMS[arm]}', f'--seed={seed}', f'--lr={lr}', f'--duration={kimg / 1e3}', f'--tick={kimg / 8}')
        Path(run, 'done').touch()
    lines = [json.loads(line) for line in Path(run, 'stats.jsonl').read_text().splitlines()]
    found = functools.reduce(lambda a, b: a | b, lines)
    return run, found


def distance(path, run):
    """Fréchet distance in pixels of samples to the other half."""
    result = os.path.join(run, 'distance.json')
    if not os.path.exists(result):
        network = next(entry.path for entry in os.scandir(run) if entry.name.startswith('network-snapshot'))
        call('eval_fid.py', f'--network={network}', f'--ref_stats={path("other.npz")}', '--detector=pixels', f'--num={SAMPLES}',
             f'--seeds=0-{SAMPLES - 1}', '--steps=9', '--batch-size=64', f'--out_path={result}')
    return read_json(result)['fid_score']


def config_of(arm):
    """config.json of an architecture on these photographs."""
    return registry.build(ARMS[arm], ARCHS, '--arch')() | {'img_resolution': SIDE, 'img_channels': 3, 'label_dim': 10}


def rate(arm, batch=64, rounds=12):
    """Images per second of forward and backward passes on one thread, the fastest of some rounds."""
    torch.set_num_threads(1)
    with misc.seeded('rate'):
        net = build_network(config_of(arm)).train()
    x = torch.randn(batch, 3, SIDE, SIDE, generator=misc.generator('rate'))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        net(x, torch.ones(batch), torch.zeros(batch, 10)).square().mean().backward()
        times.append(time.perf_counter() - start)
    return batch / min(times)


def multiply_adds(arm):
    """(millions of parameters, millions of multiply-accumulates of an evaluation)."""
    parameters, flops, _ = contestants.count_network(config_of(arm))
    return parameters / 1e6, flops / 2e6


def mean(values, digits=4):
    """"mean ± standard error"."""
    values = torch.tensor(values, dtype=torch.float64)
    return f'{values.mean():.{digits}g} ± {values.std() / len(values) ** 0.5:.2g}' if len(values) > 1 else f'{values.mean():.{digits}g}'


def print_table(images, runs, path, chosen):
    """An architecture a line; runs: {arm: [(folder, figures) of each seed]}."""
    levels = [name for name in next(iter(runs.values()))[0][1] if name.startswith('Val/clean/sigma=')]
    shown = levels[::max(1, (len(levels) - 1) // 3)]
    print(f'\n{images} images\n\n| arch | M parameters | M multiply-adds | --lr | held-out loss | ' +
          ' | '.join(f'at {name.rpartition("/")[2]}' for name in shown) + ' | distance | img/s | GiB |')
    print('| --- ' * (8 + len(shown)) + '|')
    for arm, found in runs.items():
        parameters, work = multiply_adds(arm)
        losses = [mean([figures[name] for _, figures in found]) for name in ('Val/clean', *shown)]
        distances = mean([distance(path, run) for run, _ in found])
        memory = max(figures['Resources/cpu_gib'] for _, figures in found)
        print(f'| `{arm}` | {parameters:.2f} | {work:.2f} | {chosen[arm]:g} | {" | ".join(losses)} | {distances} | {rate(arm):.0f} | '
              f'{memory:.2f} |', flush=True)


def print_memory(side=32):
    """Activations that are kept for the backward pass of an image, without and with --checkpoint=blocks, in float32."""
    print(f'| arch | MiB per image of {side}x{side} | with --checkpoint=blocks |\n| --- | --- | --- |')
    for spec in PUBLISHED:
        cells = []
        for checkpointing in (False, True):
            with misc.seeded('memory'):
                net = build_network(registry.build(spec, ARCHS, '--arch')() | {'img_resolution': side, 'img_channels': 3}).train()
            net.model.checkpointing = checkpointing
            kept, own = {}, {p.untyped_storage().data_ptr() for p in net.parameters()}

            def note(tensor, kept=kept):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                out = net(torch.zeros(2, 3, side, side), torch.ones(2))
            cells.append(sum(size for place, size in kept.items() if place not in own) / len(out) / 2 ** 20)
        print(f'| `{spec}` | {" | ".join(f"{cell:.0f}" for cell in cells)} |', flush=True)


@click.command()
@click.option('--memory', is_flag=True, help='Only count the activations of networks of published sizes')
@click.option('--data', help='CIFAR-10 photographs: what dataset_tool.py reads')
@click.option('--out', help='Folder of data and runs; what is there is not made again')
@click.option('--arms', default=','.join(ARMS), help='Which architectures')
@click.option('--images', default='all,few', help='all: 25,000 training images; few: 1,000')
@click.option('--seeds', default=3)
@click.option('--kimg', default=32.0, help='Training length')
@click.option('--jobs', default=1, help='Trainings at once, on one thread each')
def main(memory, data, out, arms, images, seeds, kimg, jobs):
    """Trains every architecture and prints the tables."""
    if memory:
        print_memory()
        return
    if not data or not out:
        raise click.UsageError('training needs --data and --out')
    os.makedirs(out, exist_ok=True)
    path, arms = functools.partial(os.path.join, out), arms.split(',')
    make_data(path, data)
    with ThreadPoolExecutor(jobs) as pool:
        start = functools.partial(pool.submit, train, path)
        tried = {arm: [(lr, start(arm, 'all', 0, lr, kimg / 4)) for lr in LRS[arm]] for arm in arms}
        chosen = {arm: min(found, key=lambda pair: pair[1].result()[1]['Val/clean'])[0] for arm, found in tried.items()}
        runs = {name: {arm: [start(arm, name, seed, chosen[arm], kimg) for seed in range(seeds)] for arm in arms}
                for name in images.split(',')}
        for futures in [one for found in runs.values() for one in found.values()]:
            list(pool.map(lambda future: distance(path, future.result()[0]), futures))
        for name, found in runs.items():
            print_table(name, {arm: [one.result() for one in futures] for arm, futures in found.items()}, path, chosen)


if __name__ == '__main__':
    main()
