# SPDX-License-Identifier: Apache-2.0
"""The Inception-v3 of 2015-12-05 whose pooled features define the FID: published weights, TensorFlow 1's resize, uint8 input."""

import os

import torch

from dnnlib import UserError
from dnnlib.download import published_file
from torch_utils import checkpoint

URL = 'https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth'
SHA256 = '6726825d'  # its first digits
SIDE = 299           # the network's input resolution
POOL_DIM = 2048
SPATIAL_CHANNELS, SPATIAL_DIM = 7, 7 * 17 * 17  # of the features that sFID compares
CPU_CHUNK = 8        # images per batch on the CPU: smaller activations, which take less time to allocate


class Inception(torch.nn.Module):
    """uint8 images [N,3,H,W], or grey [N,1,H,W], -> (pooled features [N,2048], logits [N,1008] without the last bias), float32.

    With spatial=True it also returns the spatial features [N,2023] of sFID (Nash et al. 2021), as in ADM's evaluator: the first
    7 channels of the tensor `mixed_6/conv` of the graph of 2015, here the 1x1 branch of Mixed_6d after its ReLU, [17,17] in size,
    flattened as rows, columns, channels.
    weights: path or URL of a state dict with the published names, or None for the published file, downloaded once and checked.
    The attribute compute_dtype is the dtype of the convolutions; published numbers need the default, torch.float32.
    Raises UserError if the file is missing, cannot be downloaded, or holds something else."""

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        with torch.device('meta'):  # takes no memory and no random numbers; the state dict's tensors become the parameters
            for name, *conv in STEM:
                self.add_module(name, Conv(*conv))
            for name, (in_channels, pool, branches) in MIXED.items():
                self.add_module(name, Mixed(in_channels, pool, branches))
            self.fc = torch.nn.Linear(POOL_DIM, 1008)
        self.load_state_dict(read_weights(weights, self.state_dict()), assign=True)
        self.eval().requires_grad_(False)
        self.compute_dtype = torch.float32

    def forward(self, images: torch.Tensor, spatial: bool = False) -> tuple[torch.Tensor, ...]:
        chunks = images.split(CPU_CHUNK) if images.device.type == 'cpu' and len(images) else [images]
        found = tuple(torch.cat(parts) for parts in zip(*map(self._look, chunks)))
        return found if spatial else found[:2]

    def _look(self, images):
        x = (resize(images.float(), SIDE) - 128) / 128
        x = x.expand(-1, 3, -1, -1)
        with (torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
              torch.autocast(x.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)):
            x, spatial = self.trunk(x)
        features = x.float().mean(dim=(2, 3))
        spatial = spatial[:, :SPATIAL_CHANNELS].float().permute(0, 2, 3, 1).flatten(1)
        return features, features @ self.fc.weight.T, spatial

    def trunk(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [N,3,299,299] in [-1,1] -> maps of features [N,2048,8,8], and those of the 1x1 branch of Mixed_6d [N,192,17,17]."""
        for name, *_ in STEM:
            x = getattr(self, name)(x)
            if name in STEM_POOLED:
                x = _halve(x)
        for name in MIXED:
            if name == 'Mixed_6d':  # computed a second time: less than 1 % of the network's cost
                spatial = self.Mixed_6d.branch1x1(x)
            x = getattr(self, name)(x)
        return x, spatial


class Conv(torch.nn.Module):
    """Convolution without bias, batch norm with TensorFlow's epsilon, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = torch.nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = torch.nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu_()


class Mixed(torch.nn.Module):
    """Parallel branches whose outputs are stacked: chains of convolutions, the last with pooling.

    branches: one chain per line, of steps "name:channels:kernel" (kernel 7 is 7x7; 1x7 is one high and seven wide; "/2" halves the
    resolution and does not pad). A step "a|b" stacks two convolutions of the same input. The chain `branch_pool` follows the
    pooling; pool is a key of POOLS."""

    def __init__(self, in_channels: int, pool: str, branches: str):
        super().__init__()
        self.pool = POOLS[pool]
        self.chains, self.pooled = [], []  # each chain: a list of lists of names
        for line in branches.split('\n'):
            width, chain = in_channels, []
            for step in line.split():
                heads = [self._add(width, *head.split(':')) for head in step.split('|')]
                chain.append([name for name, _ in heads])
                width = sum(channels for _, channels in heads)
            if line.startswith('branch_pool'):
                self.pooled = chain
            else:
                self.chains.append(chain)

    def _add(self, in_channels, name, out_channels, kernel):
        size, halved, _ = kernel.partition('/')
        sides = [int(side) for side in size.split('x')] * (1 if 'x' in size else 2)
        padding = 0 if halved else [side // 2 for side in sides]
        self.add_module(name, Conv(in_channels, int(out_channels), sides, 2 if halved else 1, padding))
        return name, int(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [self._run(chain, x) for chain in self.chains]
        return torch.cat([*outputs, self._run(self.pooled, self.pool(x))], dim=1)

    def _run(self, chain, x):
        for names in chain:
            heads = [getattr(self, name)(x) for name in names]
            x = heads[0] if len(heads) == 1 else torch.cat(heads, dim=1)
        return x


def resize(x: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear resize [N,C,H,W] -> [N,C,side,side] as TensorFlow 1 does it: pixel i comes from i * in / out, without half-pixel
    centres and without antialiasing; beyond the last pixel the last pixel is repeated."""
    for dim in (3, 2):
        size = x.shape[dim]
        where = torch.arange(side, dtype=torch.float32, device=x.device) * (torch.tensor(size, dtype=torch.float32) / side).item()
        low = where.floor().long().clamp(max=size - 1)
        share = (where - low).reshape(-1, *[1] * (3 - dim))
        below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=size - 1))
        x = below + (above - below) * share
    return x


def weights_file(weights: str | os.PathLike | None = None) -> str:
    """Local path of the weights: the published file, downloaded once and checked, or the given path or URL."""
    return published_file(URL, SHA256, weights, '--detector-weights=PATH')


def read_weights(weights: str | os.PathLike, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict in the file, after a check of its names and shapes against those expected."""
    path = weights_file(weights)
    state = checkpoint.read_tensors(path, 'weights', option='--detector-weights=')
    fits = isinstance(state, dict) and state.keys() == expected.keys()
    wrong = next((k for k in expected if not fits or state[k].shape != expected[k].shape), None)
    if wrong:
        raise UserError(f'--detector-weights={path}: not the FID network: "{wrong}" is missing or has the wrong shape')
    return {key: tensor.to(expected[key].dtype) for key, tensor in state.items()}


def _average(x):
    """3x3 mean over the pixels inside the picture, as the graph of 2015 has it."""
    return torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x):
    return torch.nn.functional.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x):
    """3x3 maximum with stride 2. Over rows and then columns the result is the same, in a quarter of the time of the CPU's kernel
    for this memory format."""
    if x.device.type != 'cpu' or not x.is_contiguous():
        return torch.nn.functional.max_pool2d(x, 3, stride=2)
    rows = x[:, :, 1:-1:2].maximum(x[:, :, :-2:2]).maximum(x[:, :, 2::2])
    return rows[..., 1:-1:2].maximum(rows[..., :-2:2]).maximum(rows[..., 2::2])


def _block35(pool_channels):
    return '\n'.join([
        'branch1x1:64:1', 'branch5x5_1:48:1 branch5x5_2:64:5', 'branch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3',
        f'branch_pool:{pool_channels}:1'])


def _block17(width):
    return '\n'.join([
        'branch1x1:192:1', f'branch7x7_1:{width}:1 branch7x7_2:{width}:1x7 branch7x7_3:192:7x1',
        f'branch7x7dbl_1:{width}:1 branch7x7dbl_2:{width}:7x1 branch7x7dbl_3:{width}:1x7 branch7x7dbl_4:{width}:7x1 '
        'branch7x7dbl_5:192:1x7',
        'branch_pool:192:1'])


BLOCK8 = '\n'.join([
    'branch1x1:320:1', 'branch3x3_1:384:1 branch3x3_2a:384:1x3|branch3x3_2b:384:3x1',
    'branch3x3dbl_1:448:1 branch3x3dbl_2:384:3 branch3x3dbl_3a:384:1x3|branch3x3dbl_3b:384:3x1', 'branch_pool:192:1'])

POOLS = {'average': _average, 'maximum': _maximum, 'halve': _halve}

# Name, then the arguments of Conv.
STEM = [('Conv2d_1a_3x3', 3, 32, 3, 2), ('Conv2d_2a_3x3', 32, 32, 3), ('Conv2d_2b_3x3', 32, 64, 3, 1, 1),
        ('Conv2d_3b_1x1', 64, 80, 1), ('Conv2d_4a_3x3', 80, 192, 3)]
STEM_POOLED = ('Conv2d_2b_3x3', 'Conv2d_4a_3x3')

# Name: input channels, pooling, branches. The last block uses maximum pooling where the one before it uses the mean: a peculiarity
# of the graph that every published FID contains.
MIXED = {
    'Mixed_5b': (192, 'average', _block35(32)),
    'Mixed_5c': (256, 'average', _block35(64)),
    'Mixed_5d': (288, 'average', _block35(64)),
    'Mixed_6a': (288, 'halve', 'branch3x3:384:3/2\nbranch3x3dbl_1:64:1 branch3x3dbl_2:96:3 branch3x3dbl_3:96:3/2'),
    'Mixed_6b': (768, 'average', _block17(128)),
    'Mixed_6c': (768, 'average', _block17(160)),
    'Mixed_6d': (768, 'average', _block17(160)),
    'Mixed_6e': (768, 'average', _block17(192)),
    'Mixed_7a': (768, 'halve', 'branch3x3_1:192:1 branch3x3_2:320:3/2\n'
                               'branch7x7x3_1:192:1 branch7x7x3_2:192:1x7 branch7x7x3_3:192:7x1 branch7x7x3_4:192:3/2'),
    'Mixed_7b': (1280, 'average', BLOCK8),
    'Mixed_7c': (2048, 'maximum', BLOCK8),
}
