# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.py: parts that fail, hang or cannot run do not stop the others, and goals are read from figures."""

import json
import os
import subprocess
import time

import psutil
import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, gpu_parity
from tests.support import ROOT

CPU = torch.device('cpu')


@pytest.fixture
def perform(tmp_path):
    """perform(part, gpus, seconds left) -> its result."""
    def call(part, gpus=0, left=60.0):
        with open(tmp_path / 'log.txt', 'a') as log:
            return gpu.perform(part, gpus, tmp_path / part.name, time.monotonic() + left, log)
    return call


@pytest.mark.slow
def test_a_part_that_hangs_is_ended(perform, tmp_path):
    """With what it has started, too."""
    child = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    began = time.monotonic()
    found = perform(gpu.Part('a', 6, [['-c', child]]))
    assert found['state'] == 'failed' and 'out of time' in found['why'] and time.monotonic() - began < 30
    pid = int((tmp_path / 'log.txt').read_text().split()[-1])
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail('the child lives on')


def test_states_of_parts(perform):
    good, bad = ['-c', 'print(1)'], ['-c', 'raise SystemExit(3)']
    assert perform(gpu.Part('good', 30, [good]))['state'] == 'passed'
    found = perform(gpu.Part('bad', 30, [bad, good]))
    assert found['state'] == 'failed' and 'exit code 3' in found['why']
    assert perform(gpu.Part('two', 30, [bad], 2), gpus=1)['why'] == 'needs 2 GPUs, and there is 1'
    assert perform(gpu.Part('late', 30, [bad]), left=2)['why'] == 'no time is left'
    missed = gpu.Part('goal', 30, [good], goals=lambda folder: [('speed', '3', '2', False)])
    assert perform(missed)['state'] == 'failed'
    assert 'no figures' in perform(gpu.Part('none', 30, [good], goals=gpu.training_goals))['why']


def test_goals_are_read_from_the_figures(tmp_path):
    rows = [{'images_per_second': [3200.0, 3000.0, 3150.0], 'flops_per_image': 657.9e9}]
    for name in ('training', 'sampling', 'adm'):
        (tmp_path / f'{name}.json').write_text(json.dumps({'rows': rows, 'comparisons': [
            {'other': 'this program, published settings', 'per_image': 5.9}]}))
    speed, ratio = gpu.training_goals(tmp_path)
    assert speed[2:] == ('3,150', True) and ratio[2:] == ('5.90x', False) and gpu.sampling_goals(tmp_path)[0][3]
    rows[0]['images_per_second'] = [541.0]
    (tmp_path / 'adm.json').write_text(json.dumps({'rows': rows}))
    assert gpu.adm_goals(tmp_path)[0][2:] == ('45.1% (541 img/s)', True)
    (tmp_path / 'parity.json').write_text(json.dumps({'rows': [{'what': 'a', 'error': 0.1, 'bound': 0.05}]}))
    assert gpu.parity_goals(tmp_path)[0][3] is False


def test_it_runs_to_the_end_without_a_gpu(tmp_path):
    """The command itself, with the parts that a CPU has no time for left out."""
    done = subprocess.run(['bash', str(ROOT / 'benchmarks' / 'gpu.sh'), '--parts=tests,training,sampling,adm,nccl'], capture_output=True,
                          text=True, env={**os.environ, 'OUT': str(tmp_path / 'out'), 'PYTHON': gpu.sys.executable,
                                          'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    text = (tmp_path / 'out' / 'summary.md').read_text()
    assert text.count('needs 1 GPU, and there are 0') == 4 and text in done.stdout
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert [one['state'] for one in results['parts']] == ['skipped'] * 5 and len(list((tmp_path / 'out').iterdir())) == 3


@pytest.mark.slow
def test_commands_of_readme_run_without_a_gpu(tmp_path):
    found = CliRunner().invoke(gpu.main, [f'--out={tmp_path}', '--parts=commands', '--seconds=900'], catch_exceptions=False)
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['parts'][0]['state'] == 'passed', (found.output, (tmp_path / 'log.txt').read_text()[-3000:])


def test_limits_of_parts_leave_time_for_the_goals():
    for gpus in (0, 1, 2):
        names = [part.name for part in gpu.parts(gpus)]
        assert names[:6] == ['commands', 'tests', 'parity', 'training', 'sampling', 'adm']
    assert all(part.limit < 180 for part in gpu.parts(2)) and gpu.gpu_tests()


def test_parity_is_that_of_half_precision():
    """It sees bfloat16, which differs from float32 by more than rounding of float32 and less than its bound."""
    exact, half = (gpu_parity.gradient('ddpmpp', CPU, precision) for precision in ('fp32', 'bf16'))
    assert 1e-4 < gpu_parity.difference(half, exact) < gpu_parity.BOUNDS['bf16']
    assert gpu_parity.difference(gpu_parity.gradient('ddpmpp', CPU, layout='nhwc'), exact) < 1e-4
    assert gpu_parity.difference(torch.tensor([float('nan')]), torch.ones(1)) == float('inf')
