# SPDX-License-Identifier: Apache-2.0
"""A run small enough for tests: 64 images of 8x8 pixels, one block a level, five steps a tick; in this process or as a command."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import click
import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from dnnlib import EasyDict, UserError
from tests.support import ROOT, launch
from torch_utils import numerics
from training.run import presets, training_loop
from training.run.configure import configure
from training.run.folder import RunFolder

UNET = ['--cbase=16', '--cres=1,1', '--blocks=1', '--attn=4']
REST = ['--sigma=0.4', '--corruption-probability=0.7', '--batch=16', '--tick=0.08', '--dump=4', '--snap=4', '--samples=0', '--lr-rampup=0']
FLAGS = UNET + REST
STEP_20, STEP_40 = 'training-state-000000.320.pt', 'training-state-000000.640.pt'


def make_zip(path, count=64, seed=0):
    """A zip of grey PNG images, 8x8, in three classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), np.uint8)
    names = [f'00000/img{i:08d}.png' for i in range(count)]
    with zipfile.ZipFile(path, 'w') as archive:
        for name, image in zip(names, pixels):
            png = io.BytesIO()
            Image.fromarray(image).save(png, 'png')
            archive.writestr(name, png.getvalue())
        archive.writestr('dataset.json', json.dumps({'labels': [[name, i % 3] for i, name in enumerate(names)]}))
    return str(path)


def options(folder, *flags):
    """What train.py makes of the flags; the data are made in the folder where there are none."""
    data = os.path.join(folder, 'data.zip')
    if not os.path.exists(data):
        make_zip(data)
    own = any(flag.startswith('--arch=') and ':' in flag for flag in flags)  # has the keys of another network
    args = [f'--outdir={folder}', f'--data={data}', '--seed=5', *(REST if own else FLAGS), *flags]
    context = train.main.make_context('train', args)
    return configure(EasyDict(context.params, command=presets.given(context)))


def pretend_gpu(monkeypatch, capability, compiler=True):
    """Makes the command line see a GPU of this compute capability, with a compiler or without."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    monkeypatch.setattr(numerics, 'can_compile', lambda device: compiler)


def make_run(folder, *flags):
    """A Run in this process, which writes into the folder."""
    return training_loop.Run(options(folder, *flags), RunFolder(str(folder), fractional=True), torch.device('cpu'))


def recorded(run):
    """A list that gets (batch, {name: values}) of each micro-batch from here on: after augmentation, and before the terms are summed."""
    found, inner = [], run.objective.values

    def values(net, batch, randn, due):
        found.append((batch, inner(net, batch, randn, due)))
        return found[-1][1]

    run.objective.values = values
    return found


def start(args, log, ranks=1, script=ROOT / 'train.py', torchrun=False):
    """Starts a script as the leader of a process group of its own, its output in the file `log`. torchrun: by torchrun itself."""
    if not torchrun:
        return launch.start(script, args, log, ranks)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with open(log, 'w') as out:
        return subprocess.Popen(launch.command(script, args, ranks), stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def finish(args, log, ranks=1, script=ROOT / 'train.py'):
    """Runs a script to its end, which must be a good one; returns its output."""
    process = start(args, log, ranks, script)
    try:
        code = process.wait(timeout=300)
    finally:
        process.kill()
    output = Path(log).read_text()
    assert code == 0, output
    return output


def call(*args):
    """Runs train.py in this process and returns its exit code, None for a good end; what it refuses is a UserError."""
    try:
        return train.main([str(arg) for arg in args], standalone_mode=False)
    except click.ClickException as err:
        raise UserError(err.message) from None


def read_log(folder):
    """The lines of stats.jsonl, without what depends on the clock and the machine."""
    lines = (Path(folder) / 'stats.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(('Timing/', 'Resources/'))} for line in lines]


def read_state(path):
    return torch.load(path, weights_only=True)


def digest(value):
    """SHA-256 of tensors, dicts, lists and JSON values, nested in any way."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(f'{value.dtype} {list(value.shape)}'.encode() + value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            sha.update(f'[{len(value)}'.encode())
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(value)
    return sha.hexdigest()


def digests(folder, name=STEP_40):
    """{part: SHA-256} of a run's state, and of its loss log and options.json, all apart from times, memory and versions."""
    state = read_state(Path(folder) / name)
    state['progress'].pop('seconds')
    state['progress'].pop('log_bytes')  # counts the digits of times
    for name in ('versions', 'command'):  # of the last start
        state['options']['run'].pop(name)
    written = json.loads((Path(folder) / 'options.json').read_text())
    for name in ('versions', 'command'):
        written['run'].pop(name)
    return {**{key: digest(part) for key, part in state.items()}, 'log': digest(read_log(folder)), 'options.json': digest(written)}


def files_digest(folder):
    """SHA-256 over the names and contents of a folder's files; of weights, the order of the metadata is left out, which is random."""
    def content(path):
        if path.suffix != '.safetensors':
            return path.read_bytes().hex()
        with safetensors.safe_open(path, 'pt') as file:
            return [file.metadata(), load_file(path)]

    return digest({path.name: content(path) for path in sorted(Path(folder).rglob('*')) if path.is_file()})


def only_folder(outdir):
    """The one run's folder under outdir."""
    folders = [path for path in Path(outdir).iterdir() if path.is_dir()]
    assert len(folders) == 1, folders
    return folders[0]


def clear(outdir):
    shutil.rmtree(outdir, ignore_errors=True)
