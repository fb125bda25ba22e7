# SPDX-License-Identifier: Apache-2.0
"""The weights of the Inception golden, which follow from each tensor's name; and random images."""

import json
import zlib

import numpy as np
import torch

from tests.support import GOLDEN

KEYS = json.loads((GOLDEN / 'inception' / 'state_dict_keys.json').read_text())


def formula_tensor(name, shape):
    """One tensor."""
    if name.endswith('num_batches_tracked'):
        return torch.tensor(0)
    n = np.random.Generator(np.random.Philox(key=zlib.crc32(f'shared/{name}'.encode()))).standard_normal(shape)
    if name.endswith('running_var'):
        n = 0.5 + np.abs(n)
    elif name.endswith(('running_mean', 'bias')):
        n = 0.1 * n
    elif name.endswith('bn.weight'):
        n = 1 + 0.1 * n
    else:
        n = n * np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else n / np.sqrt(shape[-1])
    return torch.from_numpy(n.astype(np.float32))


def save_inception_weights(path):
    """Writes them as the published file has them; returns the path."""
    torch.save({name: formula_tensor(name, shape) for name, shape in KEYS.items()}, path)
    return str(path)


def batch_of(count, shape=(3, 4, 4), seed=0):
    """Random uint8 images [count,*shape]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
