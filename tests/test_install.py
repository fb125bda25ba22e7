# SPDX-License-Identifier: Apache-2.0
"""pip install . beside a checkout of another project with modules of the same names: both work."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip('setuptools', '77')  # the first that reads the license's SPDX name
NEIGHBOUR = ('training', 'dnnlib', 'torch_utils', 'metrics')


def run(*args, **options):
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """A folder such as site-packages, with the program installed into it from a clean copy."""
    folder = tmp_path_factory.mktemp('install')
    if not shutil.which('git'):
        pytest.skip('needs git')
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip('not a checkout')
    for name in files.stdout.splitlines():
        if not name.startswith('tests/') and (ROOT / name).exists():
            (folder / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / 'source' / name).write_bytes((ROOT / name).read_bytes())
    flags = ['--quiet', '--no-deps', '--no-build-isolation', '--no-index']
    run('-m', 'pip', 'install', *flags, f'--target={folder / "site"}', folder / 'source')
    return folder / 'site'


def test_only_one_name_is_taken(site):
    assert {path.name for path in site.iterdir() if not path.name.endswith('.dist-info')} == {'ambient_trainer', 'bin'}


def test_beside_another_checkout(site, tmp_path):
    """As a user of both would work: in the other checkout's folder, with the program installed."""
    for name in NEIGHBOUR:
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text('WHOSE = "the neighbour"\n')
    (tmp_path / 'train.py').write_text(f'import {", ".join(NEIGHBOUR)}\nprint(training.WHOSE, dnnlib.WHOSE)\n')
    environment = {**os.environ, 'PYTHONPATH': str(site)}
    assert run('train.py', cwd=tmp_path, env=environment).split('\n')[0] == 'the neighbour the neighbour'
    assert '--corruption-probability' in run('-m', 'ambient_trainer', 'train', '--help', cwd=tmp_path, env=environment)
    data = tmp_path / 'digits.zip'
    run('-m', 'ambient_trainer', 'dataset_tool', '--source=digits', f'--dest={data}', '--workers=1', cwd=tmp_path, env=environment)
    shown = run('-m', 'ambient_trainer', 'train', f'--data={data}', '--outdir=runs', '--preset=ambient-cifar10', '--batch=16', '-n',
                cwd=tmp_path, env=environment)
    assert 'SongUNet with' in shown and '"sigma": 0.2' in shown
    code = 'import ambient_trainer, training; print(training.WHOSE)'
    assert run('-c', code, cwd=tmp_path, env=environment) == 'the neighbour\n'


def test_an_unknown_script_is_one_line(site, tmp_path):
    done = subprocess.run([sys.executable, '-m', 'ambient_trainer', 'trian'], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': str(site)})
    assert done.returncode == 1 and done.stderr.startswith('Error: no script "trian"; choose from train, generate')
