# SPDX-License-Identifier: Apache-2.0
"""The tests of numbers once more, with the kernels of older CPUs: what the suite promises must hold on those as well."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# Not about numbers: files and their formats, commands and what they refuse, runs that are killed.
LEFT_OUT = {f'test_{name}.py' for name in (
    'checkpoint_tool', 'cpu_capabilities', 'dataset_tool', 'hub', 'hub_remote', 'image_files', 'layers', 'legacy_pickle', 'output',
    'plot_run', 'registry', 'resume', 'run_folder', 'train_cli')}
# PyTorch's own kernels, and the newest instructions that oneDNN may use for convolutions.
SETTINGS = {'avx2': 'AVX2', 'default': 'SSE41'}


def files():
    return sorted(path.name for path in TESTS.glob('test_*.py') if path.name not in LEFT_OUT)


def test_what_is_left_out_exists():
    assert {path.name for path in TESTS.glob('test_*.py')} >= LEFT_OUT and 'test_generation.py' in files()


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ('x86_64', 'AMD64'), reason='the settings are those of x86 CPUs')
@pytest.mark.parametrize('capability', SETTINGS)
def test_numbers_with_the_kernels_of_older_cpus(capability, capsys):
    """MKL's matrix products still choose their kernels by the CPU itself."""
    if capability == 'avx2' and torch.backends.cpu.get_cpu_capability() == 'DEFAULT':
        pytest.skip('this CPU has no AVX2')
    env = {**os.environ, 'ATEN_CPU_CAPABILITY': capability, 'ONEDNN_MAX_CPU_ISA': SETTINGS[capability], 'OMP_NUM_THREADS': '1'}
    run = lambda *args: subprocess.run([sys.executable, *args], cwd=TESTS.parent, env=env, capture_output=True, text=True)
    assert run('-c', 'import torch; print(torch.backends.cpu.get_cpu_capability())').stdout.strip() == capability.upper()
    processes = ['--numprocesses=auto', '--maxprocesses=8'] if importlib.util.find_spec('xdist') else []
    done = run('-m', 'pytest', '-p', 'no:cacheprovider', *processes, *(f'tests/{name}' for name in files()))
    with capsys.disabled():
        print(f'\n{capability}: {done.stdout.strip().splitlines()[-1]}')
    assert done.returncode == 0, done.stdout
