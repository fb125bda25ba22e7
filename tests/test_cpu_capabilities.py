# SPDX-License-Identifier: Apache-2.0
"""The tests of numbers once more, with the kernels of older CPUs: what the suite promises must hold on those as well."""

import importlib.util
import os
import platform
import subprocess
import sys

import pytest
import torch

from tests.support import ROOT

# Not about numbers: files and their formats, commands and what they refuse, runs that are killed.
LEFT_OUT = [f'tests/{name}' for name in (
    'dnnlib', 'torch_utils', 'training/checkpoints', 'metrics/test_image_files.py', 'training/sampling/test_writers.py',
    'training/run/test_folder.py', 'training/run/test_resume.py', 'test_checkpoint_tool.py', 'test_cpu_capabilities.py',
    'test_dataset_tool.py', 'test_extension.py', 'test_layers.py', 'test_plot_run.py', 'test_train.py')]
# PyTorch's own kernels, and the newest instructions that oneDNN may use for convolutions.
SETTINGS = {'avx2': 'AVX2', 'default': 'SSE41'}


def test_what_is_left_out_exists():
    assert all((ROOT / path).exists() for path in LEFT_OUT)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='the settings are those of x86 CPUs')
@pytest.mark.parametrize('capability', SETTINGS)
def test_numbers_with_the_kernels_of_older_cpus(capability, capsys):
    """MKL's matrix products still choose their kernels by the CPU itself."""
    if capability == 'avx2' and torch.backends.cpu.get_cpu_capability() == 'DEFAULT':
        pytest.skip('this CPU has no AVX2')
    env = {**os.environ, 'ATEN_CPU_CAPABILITY': capability, 'ONEDNN_MAX_CPU_ISA': SETTINGS[capability], 'OMP_NUM_THREADS': '1'}
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run('-c', 'import torch; print(torch.backends.cpu.get_cpu_capability())').stdout.strip() == capability.upper()
    processes = ['--numprocesses=auto', '--maxprocesses=8'] if importlib.util.find_spec('xdist') else []
    done = run('-m', 'pytest', '-p', 'no:cacheprovider', *processes, *(f'--ignore={path}' for path in LEFT_OUT))
    with capsys.disabled():
        print(f'\n{capability}: {done.stdout.strip().splitlines()[-1]}')
    assert done.returncode == 0, done.stdout
