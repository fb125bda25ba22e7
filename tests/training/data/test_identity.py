# SPDX-License-Identifier: Apache-2.0
"""All nodes see the same data, or all of them are told in one line that they do not."""

import os
import socket

import pytest
import torch

from dnnlib import UserError
from tests.support import launch, tiny
from training.data.dataset import ImageDataset
from training.data.identity import check_same, open_everywhere
from training.run import training_loop
from training.run.folder import RunFolder

RANKS = '''
import os, sys
sys.path.insert(0, sys.argv[1])
os.chdir(os.path.join(sys.argv[2], os.environ['RANK']))  # one path, another file on each rank
os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')  # as if each were a node of its own
from dnnlib import EasyDict, UserError
from tests.support import tiny
from torch_utils import distributed
import train
from training.run.configure import configure
distributed.init()
try:
    config = configure(EasyDict(train.main.make_context('train', ['--outdir=.', '--data=data.zip', *tiny.FLAGS, *sys.argv[3:]]).params))
    told = f'same {config.data.fingerprint["images"]} {config.data.validation.fingerprint["images"]}'
except UserError as err:
    told = err.message
os.write(1, f'{told}{chr(10)}'.encode())
distributed.shutdown()
'''


def told(tmp_path, *flags):
    """What each of two ranks says, whose folders are `0` and `1`."""
    (tmp_path / 'ranks.py').write_text(RANKS)
    done = launch.run(tmp_path / 'ranks.py', [tiny.ROOT, tmp_path, *flags], ranks=2, timeout=60)
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 2, done.stdout + done.stderr
    return lines


@pytest.mark.parametrize('count, seed, own, words', [
    (64, 0, None, 'same 64 32'),
    (65, 0, None, '--data=data.zip: rank 1 on {host} sees different data from rank 0 on {host}: 65 images instead of 64'),
    (64, 1, None, 'images of the same names and sizes with other contents'),
    (64, 0, 33, '--val=val.zip: rank 1 on {host} sees different data from rank 0'),
    (None, 0, None, 'data.zip: no such zip file or folder (rank 1 on {host})')])
def test_ranks_that_see_other_data_are_told_together(tmp_path, count, seed, own, words):
    for rank, images, key in ((0, 64, 0), (1, count, seed)):
        (tmp_path / str(rank)).mkdir()
        if images:
            tiny.make_zip(tmp_path / str(rank) / 'data.zip', images, key)
        tiny.make_zip(tmp_path / str(rank) / 'val.zip', own if own and rank else 32)
    first, second = told(tmp_path, '--val=val.zip')
    words = words.format(host=socket.gethostname())
    assert first == second and words in first


def test_one_rank_alone(tmp_path):
    path = tiny.make_zip(tmp_path / 'a.zip')
    dataset = ImageDataset(path)
    [form], [fingerprint] = open_everywhere({'--data=a.zip': lambda: dataset})
    assert form == dataset.form and form.resolution == [8, 8] and fingerprint == dataset.fingerprint()
    assert check_same('--data', fingerprint, dataset) is dataset
    with pytest.raises(UserError, match='none.zip: no such zip file or folder$'):
        open_everywhere({'--data=none.zip': lambda: ImageDataset(str(tmp_path / 'none.zip'))})


def test_data_that_change_before_they_are_trained_on(tmp_path):
    config = tiny.options(tmp_path, '--val=0.2')
    os.replace(tiny.make_zip(tmp_path / 'other.zip', 65), tmp_path / 'data.zip')
    with pytest.raises(UserError, match='^--data=.*data.zip: its data changed after the run was set up: 65 images instead of 64; another'):
        training_loop.Run(config, RunFolder(str(tmp_path), fractional=True), torch.device('cpu'))
    assert check_same('--data', None, ImageDataset(config.data.path))  # a configuration of an older version


def test_held_out_data_have_a_fingerprint_of_their_own(tmp_path):
    own = tiny.make_zip(tmp_path / 'own.zip', 10)
    data = tiny.options(tmp_path, f'--val={own}').data
    assert data.validation.fingerprint['images'] == 10 and data.fingerprint['images'] == 64
    assert tiny.options(tmp_path, '--val=0.2').data.validation.fingerprint is None
