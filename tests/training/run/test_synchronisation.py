# SPDX-License-Identifier: Apache-2.0
"""No step waits for the device: steps on tensors without values, see tests/support/no_values.py."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils import backend_registration

from tests.support import ROOT, tiny
from tests.support.no_values import CASES, PLANTED
from training.run import training_loop
from training.run.folder import RunFolder


def waits(folder, *names):
    """{case: None, or what waits}."""
    if not hasattr(backend_registration, '_setup_privateuseone_for_python_backend'):
        pytest.skip('this PyTorch has no devices made in Python')
    done = subprocess.run([sys.executable, '-m', 'tests.support.no_values', folder, *names], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_does_not_wait_and_a_planted_item_is_found(tmp_path):
    found = waits(tmp_path, 'small', 'item')
    assert found['small'] is None and found['item'] == 'aten._local_scalar_dense.default'


@pytest.mark.slow
def test_no_step_waits_for_the_device(tmp_path):
    assert waits(tmp_path, *CASES) == dict.fromkeys(CASES)


@pytest.mark.slow
def test_what_waits_is_found(tmp_path):
    assert all(waits(tmp_path, *PLANTED).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('flags', [[], ['--compile=1']])
def test_no_step_waits_for_a_gpu(tmp_path, flags):
    config, folder = tiny.options(tmp_path, *CASES['plain'], *flags), RunFolder(str(tmp_path), fractional=True)
    run = training_loop.Run(config, folder, torch.device('cuda:0'))
    for _ in range(2):
        run.step()
    torch.cuda.set_sync_debug_mode('error')
    try:
        run.step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
