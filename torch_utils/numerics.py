# SPDX-License-Identifier: Apache-2.0
"""How a process computes: TF32, reduced sums, cuDNN's choice of algorithms; and what a device computes in natively."""

import contextlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator

import torch

AUTO = 'auto'  # a precision: the fastest that the device computes in natively
# Smallest compute capability with matrix units of a precision; (0, 0): any GPU, and the CPU.
CAPABILITY = {'fp32': (0, 0), 'tf32': (0, 0), 'bf16': (8, 0), 'fp16': (7, 0)}
FAST = 'bf16'  # what --precision=auto chooses where a device has it
COMPILERS = ('gcc', 'clang', 'cc')  # Triton compiles its launchers with one of them, or with $CC


def set_numerics(precision: str = 'fp32', bench: bool | None = None) -> None:
    """Sets the arithmetic of the whole process, which every script does before it runs a network.

    precision: "tf32" lets GPUs multiply float32 with 10 bits of mantissa, which PyTorch does in convolutions unless told otherwise; all
    others do not. Sums of half-precision products are float32. bench: whether cuDNN times its algorithms and takes the fastest, which may
    be another one in the next process; None: except in fp32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.benchmark = precision != 'fp32' if bench is None else bench
    cudnn.allow_tf32 = matmul.allow_tf32 = precision == 'tf32'
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    warnings.filterwarnings('ignore', 'TensorFloat32 tensor cores')  # the compiler advises TF32, which precision decides on


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Inside the context a GPU multiplies float32 in full precision, whatever the rest of the process does."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def is_native(precision: str, device: torch.device | str) -> bool:
    """Whether a device has matrix units for a precision; CPUs count as having fp32 alone."""
    device = torch.device(device)
    if CAPABILITY[precision] == (0, 0):
        return True
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= CAPABILITY[precision]


def for_sampling(asked: str | None, trained: str | None, device: torch.device | str) -> str:
    """The precision to sample in, of misc.DTYPES: what is asked for; for None or "auto" that of the training, if the device computes in it
    natively, else fp32."""
    if asked not in (None, AUTO):
        return asked
    return trained if trained in ('bf16', 'fp16') and is_native(trained, device) else 'fp32'


def can_compile(device: torch.device | str) -> bool:
    """Whether torch.compile is expected to work and to pay: on GPUs with Triton and a C compiler."""
    if torch.device(device).type != 'cuda' or importlib.util.find_spec('triton') is None:
        return False
    if not (os.environ.get('CC') or any(map(shutil.which, COMPILERS))):
        return False
    try:
        from torch.utils._triton import has_triton
    except ImportError:  # private, and may move
        return True
    return bool(has_triton())
