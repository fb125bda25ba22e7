# SPDX-License-Identifier: Apache-2.0
"""Speed of the training step and of starting, beside the peers and the device's own limits, in one run.

python benchmarks/speed.py limits        (the device's matrix peak and bandwidth, and what they allow each network)
python benchmarks/speed.py training      (images and FLOP per second of a step: here, published settings, peers)
python benchmarks/speed.py start         (seconds from the start of a command to its first step, or image)
python benchmarks/speed.py cost          (hours and price of training each preset)
python benchmarks/speed.py all --out=speed   (all of it, and sampling and loading, in at most 8 minutes on a CPU)

Each command prints a table, and writes JSON with --json. The sampler is measured by benchmarks/sampling.py, the loader by data_loading.py
and large_data.py, metrics by evaluation.py, the bytes of a step by traffic.py."""

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402 (the folder above had to be found first)
from benchmarks import contestants, large_data, measure  # noqa: E402
from benchmarks.contestants import PUBLISHED, SHAPES, Trainer  # noqa: E402
from benchmarks.measure import Spent, markdown, spread  # noqa: E402
from dnnlib import EasyDict, UserError  # noqa: E402
from dnnlib.files import read_json  # noqa: E402
from torch_utils.command_line import Command, Group, version_option  # noqa: E402
from training.data.dataset import Form  # noqa: E402
from training.run import configure, presets  # noqa: E402

TRAIN_PASSES = 3  # FLOPs of a training image over those of an evaluation: backward passes count twice
EVALUATIONS = 35  # of an image in 18 Heun steps
TOLERANCE = 0.97  # what is measured twice differs by this much
KINDS = {'cuda': {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16},
         'cpu': {'fp32': torch.float32, 'bf16': torch.bfloat16}}
SELF = 'this program'


@click.group(cls=Group, context_settings={'help_option_names': ['-h', '--help']})
@version_option
def main():
    """Speed of this program beside its peers and the device's own limits."""


def words(text: str) -> list[str]:
    return text.split(',')


DEVICE = click.option('--device', metavar='DEVICE', help='cuda or cpu  [default: cuda, if there is one]')
THREADS = click.option('--threads', metavar='INT', type=click.IntRange(min=1), help='CPU threads  [default: PyTorch\'s]')
JSON = click.option('--json', 'path', metavar='FILE', help='Also write the numbers, with machine, versions and command')


def on(device: str | None, threads: int | None) -> torch.device:
    """The device, after setting the threads."""
    if threads:
        torch.set_num_threads(threads)
    return torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))


# ---- limits


def peaks(device: torch.device, kinds: list[str] | None = None, seconds: float = 1.0, size: int | None = None) -> dict[str, float]:
    """{precision: FLOP/s} of matrix products on this device."""
    found, before = {}, torch.backends.cuda.matmul.allow_tf32
    for kind in kinds or KINDS[device.type]:
        torch.backends.cuda.matmul.allow_tf32 = kind == 'tf32'
        found[kind] = measure.matrix_peak(device, KINDS[device.type].get(kind, torch.float32), size, seconds)
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


@main.command(cls=Command)
@DEVICE
@THREADS
@JSON
@click.option('--seconds', metavar='FLOAT', default=1.0, show_default=True, help='Time for each measurement')
@click.option('--size', metavar='INT', type=int, help='Rows of the matrices  [default: 8192 on a GPU, 2048 on a CPU]')
@click.option('--tflops', metavar='FLOAT', type=float, help='A peak to compute the limits from  [default: the highest measured one]')
def limits(device, threads, path, seconds, size, tflops):
    """The device's measured limits, and the images per second that they allow each network."""
    device = on(device, threads)
    found, bandwidth = peaks(device, None, seconds, size), measure.copy_bandwidth(device, size and size * size, seconds)
    print(f'{measure.machine(device)}\n')
    print(markdown(['matrix products', 'TFLOP/s'], [[kind, f'{value / 1e12:.4g}'] for kind, value in found.items()]))
    print(f'\ncopies: {bandwidth / 1e9:.4g} GB/s, read and written bytes together\n')
    peak = tflops * 1e12 if tflops else max(found.values())
    rows = []
    for name, shape in SHAPES.items():
        parameters, forward, training = contestants.count_network(contestants.network_config(shape))
        rows.append({'network': name, 'side': shape.side, 'arch': shape.arch, 'parameters': parameters, 'forward': forward,
                     'training': training, 'training_limit': peak / training, 'sampling_limit': peak / forward / EVALUATIONS})
    print(markdown(['network', '--arch', 'pixels', 'M parameters', 'GFLOP, evaluation', 'GFLOP, training', 'training img/s',
                    f'sampled img/s, {EVALUATIONS} evaluations'],
                   [[r['network'], f'`{r["arch"]}`', f'{r["side"]}x{r["side"]}', f'{r["parameters"] / 1e6:.1f}',
                     f'{r["forward"] / 1e9:.4g}', f'{r["training"] / 1e9:.4g}', f'{r["training_limit"]:,.1f}',
                     f'{r["sampling_limit"]:,.2f}'] for r in rows]))
    print(f'\nLimits at {peak / 1e12:.4g} TFLOP/s; a multiply-add counts 2.')
    measure.write(path, device, peak_flops=found, bandwidth=bandwidth, limits_at=peak, networks=rows)


# ---- training


def entrants(stack: contextlib.ExitStack, name: str, batch: int, device: torch.device, o: EasyDict) -> list[Trainer]:
    """Contestants of one network and batch size: this program with each combination of options, its published settings, the peers."""
    found, flags = [], {'precision': '--precision={}', 'compile': '--compile={}'}
    for precision, compile, layout in itertools.product(words(o.precision), words(o.compile), words(o.layout)):
        given = {'precision': precision, 'compile': compile}
        own = [flags[key].format(value) for key, value in given.items() if value != 'default']
        title = ', '.join([SELF, *(f'{key}={value}' for key, value in {**given, 'layout': layout}.items() if value != 'default')])
        found.append(stack.enter_context(contestants.our_trainer(title, SHAPES[name], batch, device, [*own, *o.options.split()],
                                                                 None if layout == 'default' else layout)))
    if o.published:
        title = f'{SELF}, published settings'
        found.append(stack.enter_context(contestants.our_trainer(title, SHAPES[name], batch, device, PUBLISHED, 'nchw')))
    if o.peers:
        for precision, compile in itertools.product(words(o.peer_precision), (False, True) if o.peer_compile else (False,)):
            for one in contestants.peer_trainers(SHAPES[name], batch, device, precision, compile):
                extra = f', {precision}' * (precision != 'fp32') + ', compiled' * compile
                found.append(one._replace(name=one.name + extra))
    return found


def row_of(one: Trainer, name: str, spent: list[Spent], steps: int, peak: dict[str, float]) -> dict:
    """The figures of a contestant; `spent` is of this many steps each."""
    images = one.batch * steps
    rates = [images / seconds.wall for seconds in spent]
    flops, cpu = ([one.flops * images / getattr(seconds, kind) for seconds in spent] for kind in ('wall', 'cpu'))
    return {'network': name, 'contestant': one.name, 'batch': one.batch, 'parameters': one.parameters, 'flops_per_image': one.flops,
            **one.facts, 'images_per_second': rates, 'flops_per_second': flops, 'flops_per_cpu_second': cpu,
            'share_of_peak': statistics.median(flops) / peak.get(one.facts['precision'], max(peak.values()))}


def comparisons(rows: list[dict]) -> list[dict]:
    """The first contestant of each network and batch against each other one."""
    groups = itertools.groupby(rows, lambda row: (row['network'], row['batch']))
    return [found for _, group in groups for found in measure.compare(list(group))]


def print_training(rows: list[dict], steps: int, device: torch.device, megabytes: float | None, bandwidth: float) -> None:
    """The tables of the training step."""
    on_cpu, moved = device.type == 'cpu', megabytes is not None
    head = ['network', 'contestant', 'batch', 'precision', 'compiled', 'layout', 'M parameters', 'GFLOP/img', 'img/s', 'GFLOP/s',
            *(['GFLOP/CPU s'] if on_cpu else []), 'of the matrix peak', *(['of the bandwidth'] if moved else [])]
    cells = []
    for r in rows:
        rate = statistics.median(r['images_per_second'])
        cells.append([r['network'], r['contestant'], r['batch'], r['precision'], 'yes' if r['compile'] else 'no', r['layout'],
                      f'{r["parameters"] / 1e6:.2f}', f'{r["flops_per_image"] / 1e9:.4g}', spread(r['images_per_second']),
                      f'{statistics.median(r["flops_per_second"]) / 1e9:.4g}',
                      *([f'{statistics.median(r["flops_per_cpu_second"]) / 1e9:.4g}'] if on_cpu else []), f'{r["share_of_peak"]:.1%}',
                      *([f'{rate * megabytes * 1e6 / bandwidth:.1%}' if r['contestant'].startswith(SELF) else ''] if moved else [])])
    print(markdown(head, cells) + f'\n\nmedian (least to most) of {len(rows[0]["images_per_second"])} rounds of {steps} steps, in turns')
    if found := comparisons(rows):
        print('\n' + markdown(['network', 'batch', '', 'per FLOP', 'per FLOP, CPU time', 'per image'],
                              [[c['network'], c['batch'], f'{c["first"]} / {c["other"]}',
                                *(f'{c[key]:.2f}' for key in ('per_flop', 'per_flop_cpu', 'per_image'))] for c in found]))


@main.command(cls=Command)
@DEVICE
@THREADS
@JSON
@click.option('--network', default='medium', show_default=True, metavar='LIST', help=f'Of {", ".join(SHAPES)}')
@click.option('--batch', default='8', show_default=True, metavar='LIST', help='Batch sizes')
@click.option('--precision', default='default', show_default=True, metavar='LIST', help='Of default, fp32, tf32, bf16, fp16, auto')
@click.option('--compile', default='default', show_default=True, metavar='LIST', help='Of default, 0, 1, auto')
@click.option('--layout', default='default', show_default=True, metavar='LIST', help='Of default, nchw, nhwc')
@click.option('--options', default='', metavar='TEXT', help='Further options of train.py, such as --batch-gpu=64')
@click.option('--published/--no-published', default=True, show_default=True, help='Also this program in the published settings')
@click.option('--peers/--no-peers', default=True, show_default=True, help='Also the peers that are installed')
@click.option('--peer-precision', default='fp32', show_default=True, metavar='LIST', help='Of fp32, bf16 (by autocast)')
@click.option('--peer-compile', is_flag=True, help='Also the peers\' networks by torch.compile')
@click.option('--steps', metavar='INT', type=int, help='Steps of a timed round  [default: 20 on a GPU, 1 on a CPU]')
@click.option('--warmup', metavar='INT', type=int, help='Untimed rounds  [default: 2 on a GPU, 1 on a CPU]')
@click.option('--repeats', default=5, show_default=True, metavar='INT', help='Timed rounds of each contestant')
@click.option('--traffic-mb', metavar='FLOAT', type=float, help='Megabytes that a training image moves, as traffic.py counts them')
def training(device, threads, path, **options):
    """The training step: this program, its published settings, diffusers, denoising-diffusion-pytorch; in turns."""
    device, o = on(device, threads), EasyDict(options)
    unknown = [name for name in words(o.network) if name not in SHAPES]
    if unknown:
        raise UserError(f'--network={unknown[0]}: choose from {", ".join(SHAPES)}')
    steps, warmup = o.steps or (20 if device.type == 'cuda' else 1), o.warmup or (2 if device.type == 'cuda' else 1)
    print(f'{measure.machine(device)}', *(contestants.missing() if o.peers else []), '', sep='\n')
    peak, bandwidth, rows = peaks(device), measure.copy_bandwidth(device), []
    for name, batch in itertools.product(words(o.network), map(int, words(o.batch))):
        with contextlib.ExitStack() as stack:
            with contextlib.redirect_stdout(sys.stderr):
                found = entrants(stack, name, batch, device, o)
            several = lambda one: (lambda: [one.step() for _ in range(steps)])
            spent = measure.in_turns({one.name: several(one) for one in found}, o.repeats, device, warmup)
            rows += [row_of(one, name, spent[one.name], steps, peak) for one in found]
    print_training(rows, steps, device, o.traffic_mb, bandwidth)
    told = ', '.join(f'{kind} {value / 1e12:.4g} TFLOP/s' for kind, value in peak.items())
    print(f'\nmatrix peak: {told}; copies {bandwidth / 1e9:.4g} GB/s')
    measure.write(path, device, peak_flops=peak, bandwidth=bandwidth, steps=steps, rows=rows, comparisons=comparisons(rows))


# ---- start


def first_step(folder: str, network: str, batch: int, flags: list[str]) -> list[str]:
    """The command that trains for one step, and writes the network at its end."""
    return ['train.py', f'--outdir={folder}/run', '--nosubdir', f'--data={folder}/data', f'--arch={SHAPES[network].arch}',
            f'--batch={batch}', f'--duration={batch / 1e6:.9f}', '--cond=0', '--seed=0', '--samples=0', '--dump=0', *flags]


def seconds_of(command: list[str]) -> float:
    """Seconds of a command of the program, from its start to its end."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'{" ".join(command)}: {((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]}')
    return time.perf_counter() - start


@main.command(cls=Command)
@JSON
@click.option('--network', default='cifar', show_default=True, type=click.Choice(list(SHAPES)), metavar='NAME', help='The network')
@click.option('--batch', default=1, show_default=True, metavar='INT', help='Batch size of the first step')
@click.option('--options', default='--compile=0', show_default=True, metavar='TEXT', help='Further options of train.py')
@click.option('--repeats', default=3, show_default=True, metavar='INT', help='Starts of each command')
def start(path, network, batch, options, repeats):
    """Seconds of whole commands that take one training step, or sample one image in one step; network and images are written, too."""
    device, shape = on(None, None), SHAPES[network]
    with tempfile.TemporaryDirectory() as folder:
        large_data.make(os.path.join(folder, 'data'), contestants.IMAGES, shape.side, shape.classes or 1)
        step = first_step(folder, network, batch, options.split())
        commands = {'train.py --help': ['train.py', '--help'], 'train.py, one step': step}
        found = {name: [] for name in (*commands, 'generate.py, one image in one step')}
        for repeat in range(repeats):
            for name, command in commands.items():
                found[name].append(seconds_of([part.replace('/run', f'/run{repeat}') for part in command]))
            snapshot = next(Path(folder, f'run{repeat}').glob('network-snapshot-*'))
            found['generate.py, one image in one step'].append(seconds_of([
                'generate.py', f'--network={snapshot}', f'--outdir={folder}/out{repeat}', '--seeds=0-0', '--steps=1']))
    print(f'{measure.machine(device)}\n\n' + markdown(['command', 'seconds'], [[name, spread(found[name], ".3g")] for name in found]))
    measure.write(path, device, network=network, batch=batch, options=options, seconds=found)


# ---- cost


def preset_network(name: str) -> tuple[dict, dict]:
    """(config.json of a preset's network, the preset)."""
    found = presets.read(name)
    options = [f'--{key}={value}' for key, value in found['options'].items()]
    context = train.main.make_context('train', ['--data=none', '--outdir=none', *options])
    o = EasyDict(context.params, command=presets.given(context))
    return configure.network_arguments(o, Form(tuple(found['image_shape']), found['classes'], None)), found


def costs(tflops: float, shares: list[float], dollars: float, names: list[str] | None = None) -> list[dict]:
    """{preset, parameters, forward, mimg, hours: {share: GPU hours}, dollars: {share: price}} of each preset with a published length."""
    rows = []
    for name in names or presets.names():
        config, found = preset_network(name)
        if found['mimg']:
            parameters, forward, _ = contestants.count_network({**config, 'use_fp16': False})
            work = TRAIN_PASSES * forward * found['mimg'] * 1e6
            hours = {f'{share:g}': work / (share * tflops * 1e12) / 3600 for share in shares}
            rows.append({'preset': name, 'parameters': parameters, 'forward': forward, 'mimg': found['mimg'], 'hours': hours,
                         'dollars': {share: value * dollars for share, value in hours.items()}})
    return rows


@main.command(cls=Command)
@JSON
@click.option('--tflops', metavar='FLOAT', default=790.0, show_default=True, help='Matrix peak of a GPU')
@click.option('--shares', metavar='LIST', default='0.35,0.5', show_default=True, help='Shares of the peak that are taken to be reached')
@click.option('--dollars', metavar='FLOAT', default=3.0, show_default=True, help='Price of a GPU hour')
def cost(path, tflops, shares, dollars):
    """GPU hours and price of training each preset, from counted operations: nothing is measured."""
    shares = [float(share) for share in words(shares)]
    rows = costs(tflops, shares, dollars)
    told = [f'hours at {share:.0%}' for share in shares] + [f'$ at {share:.0%}' for share in shares]
    print(markdown(['preset', 'M parameters', 'GFLOP, evaluation', 'million images', *told],
                   [[r['preset'], f'{r["parameters"] / 1e6:.1f}', f'{r["forward"] / 1e9:.4g}', f'{r["mimg"]:g}',
                     *(f'{value:,.0f}' for value in (*r['hours'].values(), *r['dollars'].values()))] for r in rows]))
    print(f'\nAssumed: {tflops:g} TFLOP/s, ${dollars:g} per GPU hour; {TRAIN_PASSES} times the FLOPs of an evaluation per training image.')
    measure.write(path, torch.device('cpu'), tflops=tflops, dollars_per_hour=dollars, presets=rows)


# ---- everything


def verdicts(out: Path) -> list[tuple[str, str, float, bool]]:
    """[(what, goal, measured, whether it holds)] from the JSON files of `all`."""
    found = []
    for name, what in (('training', 'training step'), ('sampling', 'sampler'), ('sampling-small', 'sampler')):
        compared = read_json(out / f'{name}.json')['comparisons']
        for c in (c for c in compared if c['other'].endswith('published settings') or c['other'] in contestants.PEERS):
            found.append((f'{what}, {c["network"]}, batch {c["batch"]}: {SELF} / {c["other"].removeprefix(SELF + ", ")}, per FLOP',
                          f'1, within {1 - TOLERANCE:.0%}', c['per_flop'], c['per_flop'] >= TOLERANCE))
    step = statistics.median(read_json(out / 'start.json')['seconds']['train.py, one step'])
    return [*found, ('start to first step, seconds', 'under 15', step, step < 15)]


@main.command('all', cls=Command)
@click.option('--out', metavar='DIR', required=True, help='Folder of the JSON files and logs')
@click.option('--quick', is_flag=True, help='Tiny networks and one repeat, to see that everything runs')
def everything(out, quick):
    """Limits, training, sampling, start, loader, one after the other, and which goals hold."""
    out = Path(os.path.abspath(out))
    out.mkdir(parents=True, exist_ok=True)
    few, tiny = ['--repeats=1'], ['--network=small', '--batch=2', '--repeats=1']
    parts = {'limits': ['speed.py', 'limits', *(['--seconds=0.1', '--size=256'] if quick else [])],
             'training': ['speed.py', 'training', *(tiny if quick else ['--network=small,medium', '--batch=16', '--repeats=7'])],
             'sampling': ['sampling.py', '--peers', *([*few, '--images=2', '--batch=2', '--steps=2'] if quick else
                                                      ['--arch=medium', '--images=16', '--batch=16', '--steps=4', '--repeats=5'])],
             'sampling-small': ['sampling.py', '--peers', *([*few, '--images=2', '--batch=2', '--steps=2'] if quick else
                                                            ['--images=64', '--batch=32', '--steps=4', '--repeats=9'])],
             'start': ['speed.py', 'start', *([*few, '--network=small'] if quick else [])],
             'loader': ['data_loading.py', *(['--images=64', '--seconds=0.1', '--batch=16'] if quick else
                                             ['--images=5000', '--seconds=1'])]}
    for name, command in parts.items():
        print(f'\n## {name}\n', flush=True)
        begun = time.perf_counter()
        with open(out / f'{name}.txt', 'w') as log:
            done = subprocess.run([sys.executable, str(ROOT / 'benchmarks' / command[0]), *command[1:], f'--json={out / name}.json'],
                                  stdout=log, stderr=subprocess.PIPE, text=True)
        print((out / f'{name}.txt').read_text(), end='')
        if done.returncode:
            raise UserError(f'{name}: {(done.stderr.strip().splitlines() or ["no message"])[-1]}')
        print(f'\n({" ".join(command)}: {time.perf_counter() - begun:.0f} s)', flush=True)
    print('\n## goals\n\n' + markdown(['', 'goal', 'measured', ''], [[what, goal, f'{value:.2f}', 'PASS' if holds else 'FAIL']
                                                                   for what, goal, value, holds in verdicts(out)]))


if __name__ == '__main__':
    main()
