# SPDX-License-Identifier: Apache-2.0
"""A network, a loss term, an optimizer and a learning-rate schedule from outside the program, by its own command line."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.support import ROOT, tiny

NETWORK = '''
import torch
from training.networks.interface import ARCHS, Arch, Network
from training.networks.layers import Conv2d, Linear
from training.networks.rows import Dropout

class Pointwise(Network):
    """Two 1x1 convolutions with the noise level as a bias between them."""

    short_names = {'channels': 'cbase'}

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0, channels=8, scales=(1, 2)):
        super().__init__()
        self.scales = scales
        self.first, self.last = Conv2d(in_channels, channels, 1), Conv2d(channels, out_channels, 1)
        self.level, self.dropout = Linear(1, channels), Dropout(0.01)

    def forward(self, x, noise_labels, class_labels, augment_labels=None):
        bias = self.level(noise_labels[:, None].to(x.dtype))[:, :, None, None]
        return self.last(self.dropout(sum((scale * (self.first(x) + bias)).tanh() for scale in self.scales)))

ARCHS['pointwise'] = Arch(Pointwise, channels=4)
'''
TERM = '''
import torch
from training.objective.loss import TERMS, Term

class Drift(Term):
    """Distance of D to that of the averaged network, times a learned factor; every other step."""

    name = 'drift'
    needs_teacher = True

    def __init__(self, noise, coeff=0.1, every=1):
        super().__init__()
        if coeff < 0:
            raise ValueError(f'coeff={coeff} must be 0 or more')
        self.coeff, self.every = coeff, every
        self.top = float(noise.icdf(torch.tensor([0.9])))
        self.factor = torch.nn.Parameter(torch.ones([]))

    def forward(self, net, batch, randn, seen):
        (teacher,) = self.teacher
        with torch.no_grad():
            calm = teacher(seen.x, batch.sigma, batch.class_labels, batch.augment_labels)
        apart = (seen.D - calm) * (batch.sigma < self.top) + 1
        return {'drift': self.coeff * self.factor * apart.square().flatten(1).sum(1)}

TERMS['drift'] = Drift
'''
STEPPING = '''
import torch
from training.run.optimizer import LR_SCHEDULES, OPTIMIZERS

def stairs(nimg, batch, kimg=0.064):
    """Halves the learning rate every `kimg` thousand images."""
    return 0.5 ** int(nimg / (kimg * 1e3))

def momentum(params, lr, beta=0.9):
    return torch.optim.SGD(params, lr=lr, momentum=beta, fused=True)

LR_SCHEDULES['stairs'] = stairs
OPTIMIZERS['momentum'] = momentum
'''
MAIN = '''
import sys
sys.path.insert(0, {root!r})
{pieces}
import {script}

if __name__ == '__main__':
    {script}.main()
'''
FLAGS = ['--sigma=0.4', '--corruption-probability=0.7', '--batch=16', '--tick=0.032', '--snap=2', '--dump=1', '--samples=4',
         '--lr-rampup=0', '--lr=0.01', '--augment=0.1', '--threads=1', '--nosubdir', '--arch=pointwise:scales=1|3', '--cbase=6',
         '--term=drift:coeff=0.5,every=2', '--optimizer=momentum:beta=0.5', '--lr-schedule=stairs:kimg=0.048']


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    """A folder with the user's own files: each piece in one, and the commands that know of them."""
    folder = tmp_path_factory.mktemp('own')
    for name, text in (('own_network', NETWORK), ('own_term', TERM), ('own_stepping', STEPPING)):
        (folder / f'{name}.py').write_text(text)
    for script, pieces in (('train', ('own_network', 'own_term', 'own_stepping')), ('generate', ('own_network',))):
        lines = '\n'.join(f'import {name}' for name in pieces)
        (folder / f'my_{script}.py').write_text(MAIN.format(root=str(ROOT), pieces=lines, script=script))
    tiny.make_zip(folder / 'data.zip')
    return folder


def run(here, script, *args, ok=True):
    done = subprocess.run([sys.executable, str(script), *args], cwd=here, capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def trained(here):
    """The folder of a run of two ticks of two steps, the second tick continued from the state of the first."""
    for duration in ('0.000032', '0.000064'):
        run(here, 'my_train.py', '--outdir=run', '--data=data.zip', '--seed=3', f'--duration={duration}', '--resume=latest', *FLAGS)
    return here / 'run'


def test_a_network_of_ones_own(trained, here):
    """It trains, averages, is written, loaded again and sampled; without its file the refusal says what is known."""
    snapshot = trained / 'network-snapshot-000000.064'
    written = json.loads((snapshot / 'config.json').read_text())
    assert written['model_type'] == 'Pointwise' and written['channels'] == 6 and written['scales'] == [1, 3]
    assert 'augment_dim' not in written  # it takes no such labels
    assert '4 images (png)' in run(here, 'my_generate.py', f'--network={snapshot}', '--outdir=out', '--seeds=0-3', '--steps=3')
    line = run(here, ROOT / 'generate.py', f'--network={snapshot}', '--outdir=out2', '--seeds=0-3', ok=False).splitlines()
    assert len(line) == 1 and 'unknown model_type "Pointwise"; choose from DhariwalUNet, ' in line[0]


def test_a_term_of_ones_own(trained):
    """It is logged by its name, its parameter trains and is stored; it is looked at in every other step and its teacher is the average."""
    lines = [json.loads(line) for line in (trained / 'stats.jsonl').read_text().splitlines()]
    assert all(line['Loss/drift'] > 0 for line in lines if 'Loss/denoise' in line)
    state = torch.load(trained / 'training-state-000000.064.pt', weights_only=True)
    assert state['options']['objective']['terms'] == ['denoise', 'drift:coeff=0.5,every=2']
    assert list(state['objective']) == ['terms.drift.factor'] and 0 < float(state['objective']['terms.drift.factor']) < 1


def test_a_schedule_and_an_optimizer_of_ones_own(trained):
    lines = [json.loads(line) for line in (trained / 'stats.jsonl').read_text().splitlines() if 'Optimizer/lr' in line]
    assert [line['Optimizer/lr'] for line in lines] == [0.01, 0.005]  # of the steps that began at 16 and at 48 images
    state = torch.load(trained / 'training-state-000000.064.pt', weights_only=True)
    assert set(state['optimizer']['state'][0]) == {'momentum_buffer'} and state['optimizer']['param_groups'][0]['momentum'] == 0.5


@pytest.mark.parametrize('change, told', [
    ('--arch=pointwise:depth=3', '"pointwise" has no key "depth"; it takes cbase=4, scales=1|2'),
    ('--blocks=2', '"pointwise" has no key "blocks"'),
    ('--term=drift:coeff=-1', '--term=drift:coeff=-1: coeff=-1 must be 0 or more'),
    ('--term=drift:coeff=1', 'two of the terms denoise, drift, drift have the same name'),
    ('--cep=gaussian', '--cep=gaussian perturbs the embedding of a class label'),
    ('--lr-schedule=ladder', 'choose from constant, cosine, inverse_sqrt, stairs')])
def test_mistakes_are_one_line(here, change, told):
    flags = [flag for flag in FLAGS if flag.partition('=')[0] != change.partition('=')[0] or flag.startswith('--term')]
    flags = [flag for flag in flags if not (change.startswith('--arch') and flag == '--cbase=6')]
    lines = run(here, 'my_train.py', '--outdir=bad', '--data=data.zip', '--duration=0.000032', *flags, change, ok=False).splitlines()
    assert len(lines) == 1 and told in lines[0]
