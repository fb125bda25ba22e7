# SPDX-License-Identifier: Apache-2.0
"""Real U-Nets, small enough for seconds, and generate.py at work on them: what the tests of sampling share."""

import json
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import generate
from tests.support import GOLDEN, ROOT, launch
from torch_utils import misc
from training.checkpoints.load import load_weights
from training.networks import preconditioning
from training.sampling.generate import generate_images

DATA = GOLDEN


def golden_network(case, precond='edm'):
    config = json.loads((DATA / 'networks' / case / 'case.json').read_text())['config']
    net = preconditioning.build_network({**config, 'precond': precond})
    load_weights(net, load_file(DATA / 'networks' / case / 'model.safetensors'), case)
    return net.eval().requires_grad_(False)


def tiny(channels=1, label_dim=0, size=8, key='tiny', **config):
    """A U-Net with random weights, drawn by the key."""
    net = preconditioning.build_network(dict(
        img_resolution=size, img_channels=channels, label_dim=label_dim, model_type='SongUNet', model_channels=16,
        channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], **config))
    source = misc.generator(key)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=source) * 0.05
    return net.eval()


def all_images(net, seeds, **options):
    options = {'num_steps': 3, **options}
    return torch.cat([part.images for part in generate_images(net, seeds, **options)])


def run(folder, outdir, *options):
    return CliRunner().invoke(generate.main, [f'--network={folder}', f'--outdir={outdir}', '--steps=2', *options])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob('*')) if path.is_file()}


def launched(ranks, *args):
    """generate.py as a process of its own, on this number of ranks."""
    return launch.run(ROOT / 'generate.py', args, ranks)


def refused(result):
    """The one line with which a command refused to work."""
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    errors = [line for line in result.output.splitlines() if line.startswith('Error:')]
    assert len(errors) == 1, result.output
    return errors[0]
