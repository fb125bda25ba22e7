# SPDX-License-Identifier: Apache-2.0
"""A run gives the same losses, dropout and all, on any number of ranks and with any number of images a micro-batch."""

import pytest
import torch

from tests.support import tiny
from torch_utils import misc
from training.checkpoints.save import save_network

FLAGS = ['--cond=1', '--dropout=0.3', '--label-dropout=0.2', '--cep=gaussian', '--augment=0.5', '--lr=1e-4', '--threads=1', '--workers=0',
         '--consistency=euler:steps=2,batch_size=8', '--tick=0.016', '--snap=0', '--dump=0']
STEPS = 4


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """trained(ranks, *flags): {name: value} of each step of a short run: every loss, by kind and quartile too, and the gradient's norm.

    It starts from random weights in all layers: the usual start ends in one that is nearly 0, which would hide all masks."""
    folder = tmp_path_factory.mktemp('rows')
    net = tiny.make_run(folder, *FLAGS).net
    source = misc.generator('start')
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=source)
    save_network(net, str(folder / 'start'))
    args = [f'--data={folder / "data.zip"}', '--seed=5', *tiny.FLAGS, *FLAGS, f'--duration={STEPS * 16 / 1e6}',
            f'--transfer={folder / "start"}', '--nosubdir']

    def make(ranks, *flags):
        outdir = folder / f'{ranks}{"".join(flags)}'
        tiny.finish([*args, f'--outdir={outdir}', *flags], folder / 'log', ranks)
        return [{key: value for key, value in line.items() if key.startswith(('Loss/', 'Grad/norm'))} for line in tiny.read_log(outdir)]

    return make


@pytest.fixture(scope='module')
def whole(trained):
    found = trained(1)
    assert len({line['Loss/denoise'] for line in found}) == STEPS
    return found


@pytest.mark.parametrize('ranks, flags', [(1, ['--batch-gpu=4']), (2, ['--batch-gpu=4']),
                                          *(pytest.param(ranks, [], marks=pytest.mark.slow) for ranks in (2, 4))])
def test_cuts_do_not_change_the_losses(trained, whole, ranks, flags):
    """To 1e-5; some of the consistency values are differences that nearly cancel."""
    for found, expected in zip(trained(ranks, *flags), whole, strict=True):
        assert found == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in expected.items()}


@pytest.mark.parametrize('flag', ['--dropout=0', '--label-dropout=0', '--cep=gaussian:gamma=2'])
def test_the_losses_would_tell(trained, whole, flag):
    """What is drawn does change them, by much more than they may differ above."""
    change = [abs(found['Loss/denoise'] / expected['Loss/denoise'] - 1) for found, expected in zip(trained(1, flag), whole, strict=True)]
    assert min(change) > 5e-4
