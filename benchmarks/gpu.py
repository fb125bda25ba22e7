# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/gpu.sh runs: README's commands, tests, parity, ranks and goals of speed on a GPU, each part with a time limit.

python benchmarks/gpu.py --out=out/gpu [--seconds=580] [--parts=commands,tests,parity,training,sampling,adm,nccl]

A part that fails does not stop the others; without a GPU those that need one are skipped, and said to be. Nothing is downloaded or
installed. OUT gets three files: log.txt (what the parts print), results.json (their figures), summary.md (goals and measured values)."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dnnlib.files import write_json  # noqa: E402 (the folder above had to be found first)
from dnnlib.versions import versions  # noqa: E402
from torch_utils.command_line import Command, version_option  # noqa: E402

LEAST = 5  # seconds that a part must have left to be started
GOALS = {'training': 3100, 'published': 6, 'sampling': 300, 'adm': 0.45}
ADM_LIMIT = 790e12  # FLOP/s of one H200 in bf16, of which ADM-64 shall reach its share


@dataclasses.dataclass
class Part:
    """One part. commands: run one after the other in its folder, {work} and {out} of which are replaced; limit: seconds for all of them.
    gpus: how many it needs. goals(folder) -> [(what, goal, measured, whether it holds)] from the files that the commands left there."""

    name: str
    limit: float
    commands: list[list[str]]
    gpus: int = 0
    goals: Callable = lambda folder: []


def benchmark(name: str, *args: str) -> list[str]:
    return [str(ROOT / 'benchmarks' / name), *args]


def commands_of_readme(gpus: int) -> list[list[str]]:
    """The commands of README's steps, from pictures to likelihoods, at a small size; on several GPUs also by torchrun."""
    script = lambda name, *args: [str(ROOT / name), *args]
    net, quick = '{network}', ['--steps=4']
    several = [['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={gpus}', *script('generate.py', f'--network={net}',
                '--outdir=ranks', '--seeds=0-63', *quick)]] if gpus > 1 else []
    train = script('train.py', '--outdir=runs', '--data=photos.zip', '--cbase=32', '--cres=1,2', '--blocks=1', '--batch=64', '--sigma=0.2',
                   '--corruption_probability=0.9', '--lr-rampup=0.001', '--ema=0.001', '--tick=0.5', '--snap=1', '--seed=0',
                   '--expr-id=mix', '--samples=16', '--compile=0')
    return [
        [str(ROOT / 'benchmarks' / 'gpu.py'), '--pictures=photos'],
        script('dataset_tool.py', '--source=photos', '--dest=photos.zip', '--transform=center-crop', '--resolution=16x16'),
        script('dataset_tool.py', 'check', 'photos.zip'),
        [*train, '--duration=0.001'],
        [*train, '--duration=0.0015', '--resume=latest'],
        script('plot_run.py', 'runs/00000-mix'),
        script('generate.py', f'--network={net}', '--outdir=samples', '--seeds=0-63', '--grid=samples.png', *quick),
        script('denoise.py', f'--network={net}', '--data=photos.zip', '--sigma=0.2', '--dest=denoised', *quick),
        script('eval_fid.py', 'ref', '--data=photos.zip', '--dest=photos-ref.npz', '--detector=pixels'),
        script('eval_fid.py', '--gen_path=samples', '--ref_stats=photos-ref.npz', '--detector=pixels', '--num=64'),
        script('eval_nll.py', f'--network={net}', '--data=photos.zip', '--num=4', '--rtol=0.1', '--atol=0.1'), *several]


def gpu_tests() -> list[str]:
    """The files that hold tests marked gpu, so that the others need not be collected."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'tests').rglob('test_*.py') if 'mark.gpu' in path.read_text())


def figures(folder: Path, name: str) -> dict:
    return json.loads((folder / f'{name}.json').read_text())


def training_goals(folder: Path) -> list[tuple]:
    found = figures(folder, 'training')
    rate = statistics.median(found['rows'][0]['images_per_second'])
    ratio = next((c['per_image'] for c in found['comparisons'] if 'published' in c['other']), None)
    return [('DDPM++ 32x32, training img/s', f'{GOALS["training"]:,}', f'{rate:,.0f}', rate >= GOALS['training']),
            ('... over the published settings', f'{GOALS["published"]}x', 'not measured' if ratio is None else f'{ratio:.2f}x',
             ratio is not None and ratio >= GOALS['published'])]


def sampling_goals(folder: Path) -> list[tuple]:
    rate = statistics.median(figures(folder, 'sampling')['rows'][0]['images_per_second'])
    return [('DDPM++ 32x32, sampled img/s, 35 evaluations', f'{GOALS["sampling"]}', f'{rate:,.0f}', rate >= GOALS['sampling'])]


def adm_goals(folder: Path) -> list[tuple]:
    row = figures(folder, 'adm')['rows'][0]
    rate = statistics.median(row['images_per_second'])
    share = rate * row['flops_per_image'] / ADM_LIMIT
    return [('ADM-64, share of 790 TFLOP/s in training', f'{GOALS["adm"]:.0%}', f'{share:.1%} ({rate:,.0f} img/s)', share >= GOALS['adm'])]


def parity_goals(folder: Path) -> list[tuple]:
    return [(f'parity: {row["what"]}', f'at most {row["bound"]:g}', f'{row["error"]:.2g}', row['error'] <= row['bound'])
            for row in figures(folder, 'parity')['rows']]


def ranks_goals(folder: Path) -> list[tuple]:
    losses = [[json.loads(line)['Loss/denoise'] for line in (folder / name / 'stats.jsonl').read_text().splitlines()
               if 'Loss/denoise' in line] for name in ('one', 'two')]
    worst = max(abs(a / b - 1) for a, b in zip(*losses))
    return [('2 processes by NCCL: losses beside those of 1', 'at most 1e-3', f'{worst:.1e}', worst <= 1e-3)]


def parts(gpus: int) -> list[Part]:
    """All parts, the most important first."""
    ranks = ['--data=data', '--nosubdir', '--cbase=32', '--cres=1,2', '--blocks=1', '--batch=64', '--precision=fp32', '--compile=0',
             '--duration=0.00128', '--tick=0.64', '--seed=0', '--samples=0', '--dump=0']
    train = lambda processes, name: ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                                     str(ROOT / 'train.py'), f'--outdir={name}', *ranks]
    step = ['--steps=4', '--warmup=1', '--repeats=3', '--device=cuda']
    return [
        Part('commands', 150 if gpus else 500, commands_of_readme(gpus)),
        Part('tests', 60, [['-m', 'pytest', '-m', 'gpu', '-q', '-rs', '-p', 'no:cacheprovider', f'--rootdir={ROOT}', '-c',
                            str(ROOT / 'pyproject.toml'), *(str(ROOT / path) for path in gpu_tests())]], 1),
        Part('parity', 90, [benchmark('gpu_parity.py', '--json=parity.json')], 0, parity_goals),
        Part('training', 170, [benchmark('speed.py', 'training', '--network=cifar', '--batch=512', '--json=training.json', *step)], 1,
             training_goals),
        Part('sampling', 110, [benchmark('sampling.py', '--device=cuda', '--arch=cifar', '--images=1024', '--batch=512', '--repeats=2',
                                         '--precision=bf16', '--compile', '--layout=nhwc', '--json=sampling.json')], 1, sampling_goals),
        Part('adm', 150, [benchmark('speed.py', 'training', '--network=imagenet', '--batch=512', '--no-published', '--no-peers',
                                    '--options=--batch-gpu=auto --checkpoint=auto', '--json=adm.json', *step)], 1, adm_goals),
        Part('nccl', 60, [[str(ROOT / 'benchmarks' / 'gpu.py'), '--pictures=data'], train(1, 'one'), train(2, 'two')], 2, ranks_goals),
        Part('traffic', 60, [benchmark('traffic.py', '--json=traffic.json')])]


def write_pictures(folder: str, count: int = 256, size: int = 16) -> None:
    """A folder of smooth random pictures, in the current folder."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    Path(folder).mkdir()
    for i in range(count):
        steps = rng.integers(-8, 9, (size, size, 3)).cumsum(0).cumsum(1)
        Image.fromarray(np.clip(steps + 128, 0, 255).astype(np.uint8)).save(Path(folder, f'{i:04d}.png'))


def run(command: list[str], folder: Path, seconds: float, log) -> int:
    """The exit code of a command of Python; 124 where it was ended, with all that it started, after this many seconds."""
    newest = max(folder.glob('runs/*/network-snapshot-*'), default='none')
    command = [sys.executable, *(part.replace('{network}', str(newest)) for part in command)]
    log.write(f'\n$ {" ".join(command)}\n')
    log.flush()
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': places}
    started = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        return started.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        return 124


def perform(part: Part, gpus: int, folder: Path, end: float, log) -> dict:
    """{"part", "state": passed | failed | skipped, "why", "seconds", "goals"}."""
    began = time.monotonic()
    found = lambda state, why='', goals=(): {'part': part.name, 'state': state, 'why': why, 'seconds': time.monotonic() - began,
                                             'goals': [list(goal) for goal in goals]}
    if gpus < part.gpus:
        return found('skipped', f'needs {part.gpus} GPU{"s" * (part.gpus > 1)}, and there {"is" if gpus == 1 else "are"} {gpus}')
    if part.name == 'tests' and importlib.util.find_spec('pytest') is None:
        return found('skipped', 'pytest is not installed')
    until = min(began + part.limit, end)
    if until - began < LEAST:
        return found('skipped', 'no time is left')
    folder.mkdir(parents=True)
    for command in part.commands:
        code = run(command, folder, until - time.monotonic(), log)
        name = next((Path(word).name for word in command if word.endswith('.py')), ' '.join(command[:2]))
        if code:
            return found('failed', f'{name}: ' + ('out of time' if code == 124 else f'exit code {code}, see log.txt'))
    try:
        goals = part.goals(folder)
    except (OSError, ValueError, KeyError, IndexError) as err:
        return found('failed', f'no figures: {type(err).__name__} {err}')
    return found('passed' if all(goal[3] for goal in goals) else 'failed', '' if all(goal[3] for goal in goals) else 'goals missed', goals)


def summary(results: list[dict], machine: str) -> str:
    """The tables of parts and of goals."""
    from benchmarks.measure import markdown
    words = {'passed': 'PASS', 'failed': 'FAIL', 'skipped': 'skipped'}
    goals = [[what, goal, measured, 'PASS' if holds else 'FAIL'] for one in results for what, goal, measured, holds in one['goals']]
    text = f'{machine}\n\n' + markdown(['part', '', 'seconds', ''], [[one['part'], words[one['state']], f'{one["seconds"]:.0f}', one['why']]
                                                                 for one in results])
    return text + ('\n\n' + markdown(['goal', 'wanted', 'measured', ''], goals) if goals else '') + '\n'


@click.command(cls=Command)
@click.option('--out', metavar='DIR', default='out/gpu', show_default=True, help='Folder of log.txt, results.json and summary.md')
@click.option('--seconds', metavar='FLOAT', default=580.0, show_default=True, help='Time for everything')
@click.option('--parts', 'wanted', metavar='LIST', help='Only these parts  [default: all]')
@click.option('--pictures', metavar='DIR', help='Only write a folder of pictures to work on')
@version_option
def main(out, seconds, wanted, pictures):
    """Run all parts, and say which goals hold."""
    if pictures:
        write_pictures(pictures)
        return
    import torch

    from benchmarks.measure import machine
    end, gpus = time.monotonic() + seconds, torch.cuda.device_count()
    about = machine(torch.device('cuda' if gpus else 'cpu'))
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    print(f'{about}; {gpus} GPUs', flush=True)
    results, collected = [], {}
    with tempfile.TemporaryDirectory() as work, open(out / 'log.txt', 'w') as log:
        for part in parts(gpus):
            if wanted and part.name not in wanted.split(','):
                continue
            log.write(f'\n==== {part.name}\n')
            results.append(perform(part, gpus, Path(work, part.name), end, log))
            print('{part:<10} {state:<8} {seconds:5.0f} s  {why}'.format(**results[-1]), flush=True)
            collected |= {path.stem: json.loads(path.read_text()) for path in Path(work, part.name).glob('*.json')
                          if not path.name.endswith('.fid.json')}
            write_json(out / 'results.json', {'machine': about, 'gpus': gpus, 'versions': versions(), 'parts': results,
                                              'figures': collected})
            (out / 'summary.md').write_text(summary(results, about))
            shutil.rmtree(Path(work, part.name), ignore_errors=True)
    print('\n' + (out / 'summary.md').read_text())


if __name__ == '__main__':
    main()
