# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are pure functions of a key, and small tensor helpers."""

import contextlib
import ctypes
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from dnnlib.files import finite
from dnnlib.versions import VERSION, versions  # noqa: F401 (used as misc.VERSION and misc.versions())

PRECISIONS = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
DTYPES = {name: dtype for name, dtype in PRECISIONS.items() if name != 'tf32'}  # tf32 is no dtype, but a way to multiply float32

CPU_WORK, CPU_ROWS = 10 ** 10, (8, 64)  # of a network call: parameters times pixels, about its multiplications; fewest and most rows
BLOCK_ROWS = 16  # rows of the global batch that are drawn together; a rank draws only the blocks that hold its rows


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that is a pure function of the key (numbers and strings)."""
    text = '/'.join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little') >> 1


def generator(*key: int | str, device: torch.device | str = 'cpu') -> torch.Generator:
    """A torch.Generator seeded by the key; the global random state is not touched."""
    return torch.Generator(device).manual_seed(seed_of(*key))


WORD = 63  # bits of a seed in one number of a key


class Draws:
    """randn(name, shape): this rank's rows of the global batch's standard normal draw with key (seed, step, name).

    first_row: global index of this rank's first row. The draw does not depend on how the rows are divided among ranks: the global batch is
    drawn in blocks of BLOCK_ROWS rows, each from its own generator, so that a rank draws only what it needs.
    Attribute key: int64 [4] on the CPU (seed in two words, step, first row), which compiled code takes as an input; a graph that read the
    numbers themselves would be compiled again in every step."""

    def __init__(self, seed: int, step: int, first_row: int = 0, device: torch.device | str = 'cpu'):
        self.seed, self.step, self.first_row, self.device = seed, step, first_row, torch.device(device)
        self.key = torch.tensor([seed % 2 ** WORD, seed >> WORD, step, first_row], device='cpu')
        # Filled there, because a copy would wait for the device; [1], because the compiler takes 0-dim inputs on the CPU for numbers.
        self._now = torch.full([1], step, dtype=torch.float64, device=self.device)

    @property
    def now(self) -> torch.Tensor:
        """The step as a 0-dim float64 tensor on the device, for formulas."""
        return self._now.squeeze(0)

    def __call__(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """float32 tensor of the shape; shape[0] counts this rank's rows."""
        if torch.compiler.is_compiling():
            return draw_operator(self.key, name, list(shape), self.device)
        first, last = self.first_row, self.first_row + shape[0]
        blocks = [self._block(name, b, shape[1:]) for b in range(first // BLOCK_ROWS, -(-last // BLOCK_ROWS))]
        skip = first % BLOCK_ROWS
        return torch.cat(blocks)[skip:skip + shape[0]]

    def _block(self, name, index, shape):
        source = generator(self.seed, self.step, name, index, device=self.device)
        return torch.randn([BLOCK_ROWS, *shape], generator=source, device=self.device)


def draw(key: torch.Tensor, name: str, shape: list[int], device: torch.device) -> torch.Tensor:
    """The draw of Draws with this key, as a function of its arguments alone."""
    low, high, step, first_row = key.tolist()
    return Draws((high << WORD) + low, step, first_row, device)(name, shape).clone()  # of its own memory, as compiled code expects it


# A custom operator, which hides the draw from the compiler.
draw_operator = torch.library.custom_op('ambient::draw_normal', draw, mutates_args=())
draw_operator.register_fake(lambda key, name, shape, device: torch.empty(shape, device=device))


@contextlib.contextmanager
def seeded(*key: int | str, device: torch.device | str = 'cpu') -> Iterator[None]:
    """Inside the context torch's own random state is a function of the key (for initialisers and dropout); afterwards it is restored."""
    source = torch.default_generator
    if torch.device(device).type == 'cuda':
        torch.cuda.init()
        source = torch.cuda.default_generators[torch.device(device).index or 0]
    before = source.get_state()
    source.manual_seed(seed_of(*key))
    try:
        yield
    finally:
        source.set_state(before)


def device_name(device: torch.device | str) -> str:
    """The name of a device in results: the GPU's model, or "cpu"."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def require(holds: bool, text: str) -> None:
    """Raises ValueError with the text if a condition does not hold."""
    if not holds:
        raise ValueError(text)


def height_width(img_resolution: int | Sequence[int]) -> list[int]:
    """[H, W] of a network's img_resolution, which is one int for squares."""
    return [img_resolution] * 2 if isinstance(img_resolution, int) else list(img_resolution)


def rows_per_call(net: Callable, img_resolution: int | Sequence[int], device: torch.device | str, batch: int) -> int:
    """How many images of this size (one int or [H, W]) a network is called on at a time: `batch`; but on the CPU, where PyTorch's results
    depend on the number of rows, one that follows from network and size alone: 8, doubled up to 64 while a call costs at most CPU_WORK.

    The less a row costs, the more rows it takes for the overhead of a call not to matter."""
    if torch.device(device).type != 'cpu':
        return batch
    parameters = sum(p.numel() for p in net.parameters()) if hasattr(net, 'parameters') else 0
    work, (rows, most) = parameters * math.prod(height_width(img_resolution)), CPU_ROWS
    while 2 * rows <= most and 2 * rows * work <= CPU_WORK:
        rows *= 2
    return rows


def chunks(count: int, device: torch.device | str, size: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields (indices [size], number of valid ones) over `count` rows in chunks of equal size; the last one is padded with the last row."""
    for first in range(0, count, size):
        yield torch.arange(first, first + size, device=device).clamp(max=count - 1), min(size, count - first)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that is divided among the ranks (a DTensor), sharing its memory; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def batched(values: torch.Tensor) -> torch.Tensor:
    """A tensor of shape [], [N] or [N,1,1,1] as [N,1,1,1] (or [1,1,1,1])."""
    return values.reshape(-1, 1, 1, 1)


def as_float(value: float | torch.Tensor) -> float | None:
    """A number for JSON: None in place of nan and infinity, which JSON cannot represent."""
    return finite(float(value))


def state_digest(net: torch.nn.Module) -> str:
    """SHA-256 over names, types and values of a network's tensors: equal for equal weights, whichever file they come from."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        value = value.detach().cpu().contiguous()
        sha.update(f'{name} {value.dtype} {list(value.shape)}'.encode() + value.numpy().tobytes())
    return sha.hexdigest()


def give_memory_back() -> None:
    """Returns freed memory to the system: glibc keeps freed arrays of up to 32 MiB, a third of what setting up a large data set takes."""
    with contextlib.suppress(OSError, AttributeError):  # systems without glibc
        ctypes.CDLL('libc.so.6').malloc_trim(0)
