# SPDX-License-Identifier: Apache-2.0
"""One set of numerics for all scripts: no TF32 and no reduced sums unless asked for; what a device computes in natively."""

import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.support import tiny
from tests.training.networks.test_preconditioning import small
from torch_utils import misc, numerics
from training.checkpoints.save import save_network
from training.networks.preconditioning import Precond


@pytest.fixture(autouse=True)
def as_pytorch_has_it():
    """PyTorch's own settings at the start of a process; those of other tests are put back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = [(cudnn, 'allow_tf32', True), (cudnn, 'benchmark', False), (matmul, 'allow_tf32', False),
             (matmul, 'allow_fp16_reduced_precision_reduction', True), (matmul, 'allow_bf16_reduced_precision_reduction', True)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in flags]
    for owner, name, value in flags:
        setattr(owner, name, value)
    yield
    for owner, name, value in before:
        setattr(owner, name, value)


def test_likelihoods_do_not_use_tf32(tmp_path, monkeypatch):
    """They mean float32, and convolutions of PyTorch round to TF32 on a GPU by default."""
    monkeypatch.chdir(tmp_path)
    tiny.make_zip('data.zip', count=2)
    save_network(small(img_channels=1), 'net')
    seen, forward = [], Precond.forward
    monkeypatch.setattr(Precond, 'forward', lambda *args, **kwargs: (seen.append(torch.backends.cudnn.allow_tf32),
                                                                     forward(*args, **kwargs))[1])
    result = CliRunner().invoke(importlib.import_module('eval_nll').main,
                                ['--network=net', '--data=data.zip', '--rtol=0.1', '--atol=0.1', '--sigma-max=5'])
    assert result.exit_code == 0, result.output
    assert seen and not any(seen)


class Reached(Exception):
    """The script has set its numerics."""


@pytest.mark.parametrize('command', [
    'eval_nll --network=net --data=data.zip', 'generate --network=net --outdir=out', 'eval_fid --gen-path=out --ref-stats=ref.npz',
    'eval_fid --network=net --ref-stats=ref.npz', 'eval_fid sweep --network=net --ref-stats=ref.npz --outdir=out',
    'eval_fid ref --data=data.zip --dest=ref.npz', 'eval_fid nearest --gen-path=out --train=data.zip',
    'denoise --network=net --data=data.zip --dest=out', 'refine --network=net --duration=1 --outdir=out',
    'refine restore --network=net --dest=set.npz', 'refine proximal --network=net', 'train --data=data.zip --outdir=out --tick=0.01',
    'dataset_tool encode --source=data.zip --vae=vae --dest=latents', 'dataset_tool captions --source=data.zip --text-encoder=text'])
def test_scripts_set_their_numerics_first(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.make_zip('data.zip', count=2)
    found = []

    def note(*args):
        found.append(args)
        raise Reached

    monkeypatch.setattr(numerics, 'set_numerics', note)
    script, *args = command.split()
    result = CliRunner().invoke(importlib.import_module(script).main, args)
    assert isinstance(result.exception, Reached), result.output
    assert found == [('fp32', True) if script == 'train' else ()]


@pytest.mark.parametrize('precision, tf32, timed', [('fp32', False, False), ('tf32', True, True), ('bf16', False, True)])
def test_settings(precision, tf32, timed):
    numerics.set_numerics(precision)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark) == (tf32, tf32, timed)
    assert not matmul.allow_fp16_reduced_precision_reduction and not matmul.allow_bf16_reduced_precision_reduction
    with numerics.full_float32():
        assert not cudnn.allow_tf32 and not matmul.allow_tf32
    assert (cudnn.allow_tf32, matmul.allow_tf32) == (tf32, tf32)
    numerics.set_numerics(precision, not timed)
    assert cudnn.benchmark is not timed


def test_the_compiler_does_not_advise_tf32():
    """Its warning, in the words that it has in PyTorch's source, is not shown; others are."""
    source = Path(torch.__file__).with_name('_inductor') / 'compile_fx.py'
    words = re.search(r'"(TensorFloat32 tensor cores[^"]*)"', source.read_text())
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter('always')
        numerics.set_numerics('fp32')
        for text in (words[1], 'another'):
            warnings.warn(text, stacklevel=1)
    assert [str(one.message) for one in shown] == ['another']


@pytest.mark.parametrize('capability, native', [
    ((9, 0), 'fp32 tf32 bf16 fp16'), ((8, 6), 'fp32 tf32 bf16 fp16'), ((7, 5), 'fp32 tf32 fp16'), ((6, 1), 'fp32 tf32'),
    (None, 'fp32 tf32')])
def test_what_a_device_computes_in(capability, native, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    device = 'cuda' if capability else 'cpu'
    assert [name for name in misc.PRECISIONS if numerics.is_native(name, device)] == native.split()
    assert not numerics.can_compile('cpu')
