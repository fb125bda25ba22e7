# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of speed share: clocks, turns, the device's own limits, counted operations, tables and JSON files."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from dnnlib.files import write_json
from dnnlib.versions import versions
from torch_utils import misc

MATRIX, COPY = {'cuda': 8192, 'cpu': 2048}, {'cuda': 2 ** 30, 'cpu': 2 ** 28}  # rows of the measured matrices; bytes of the copied tensor


class Spent(NamedTuple):
    """Seconds that a call took: elapsed, and of the process on all its cores. Programs beside it lengthen the first far more."""

    wall: float
    cpu: float


def timed(function: Callable[[], object], device: torch.device) -> Spent:
    """Spent by one call, with the work that it leaves to the device: by events on a GPU, and synchronised before and after."""
    if device.type != 'cuda':
        start, cpu = time.perf_counter(), time.process_time()
        function()
        return Spent(time.perf_counter() - start, time.process_time() - cpu)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize(device)
    cpu = time.process_time()
    events[0].record(torch.cuda.current_stream(device))
    function()
    events[1].record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return Spent(events[0].elapsed_time(events[1]) / 1e3, time.process_time() - cpu)


def in_turns(arms: dict[str, Callable[[], object]], repeats: int, device: torch.device, warmup: int = 1) -> dict[str, list[Spent]]:
    """{arm: Spent of each repeat}. The arms alternate, so that a slow moment of the machine affects all. warmup: untimed calls of each."""
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    found = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            found[name].append(timed(arm, device))
    return found


def best(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest time of a call, in seconds, of those that about this many seconds allow, after one that is not counted."""
    function()
    found, end = [], time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        found.append(timed(function, device).wall)
    return min(found)


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 1.0) -> float:
    """Floating-point operations per second of the product of two square matrices, 2 n^3 operations; the best of some."""
    size = size or MATRIX[device.type]
    source = misc.generator('matrices', device=device)
    a, b = (torch.randn(size, size, generator=source, device=device).to(dtype) for _ in range(2))
    return 2 * size ** 3 / best(lambda: a @ b, device, seconds)


def copy_bandwidth(device: torch.device, size: int | None = None, seconds: float = 1.0) -> float:
    """Bytes per second of copying a tensor within the device's memory, read and written bytes together; the best of some."""
    size = size or COPY[device.type]
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / best(lambda: b.copy_(a), device, seconds)


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of a call (and of its backward pass, where it has
    one); a multiply-add counts 2. On tensors of the device "meta" nothing is computed."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    gpu, cpu = f'{torch.cuda.get_device_name(device)}, ' if device.type == 'cuda' else '', names[0] if names else platform.machine()
    return f'{gpu}{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}'


def write(path: str | None, device: torch.device, **facts: object) -> None:
    """Writes facts, machine, versions and the command as JSON, where a path is given."""
    if path:
        write_json(path, {'command': [Path(sys.argv[0]).name, *sys.argv[1:]], 'machine': machine(device), 'versions': versions(), **facts})


def ratio(first: dict, other: dict, key: str) -> float:
    """Median over the rounds of the first contestant's rate over the other's."""
    return statistics.median(a / b for a, b in zip(first[key], other[key]))


def compare(rows: list[dict]) -> list[dict]:
    """The first of some rows against each other one: by FLOP, by FLOP and CPU time, and by image.

    A row: {"network", "contestant", "batch", and of each round "images_per_second", "flops_per_second", "flops_per_cpu_second"}."""
    first, *others = rows
    keys = {'per_flop': 'flops_per_second', 'per_flop_cpu': 'flops_per_cpu_second', 'per_image': 'images_per_second'}
    return [{'network': first['network'], 'batch': first['batch'], 'first': first['contestant'], 'other': other['contestant'],
             **{name: ratio(first, other, key) for name, key in keys.items()}} for other in others]


def spread(values: Sequence[float], digits: str = '.4g') -> str:
    """"median (least to most)"."""
    middle = f'{statistics.median(values):{digits}}'
    return f'{middle} ({min(values):{digits}} to {max(values):{digits}})' if len(values) > 1 else middle


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    line = lambda cells: '| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in cells) + ' |'
    return '\n'.join([line(head), line(['---'] * len(head)), *map(line, rows)])
