# SPDX-License-Identifier: Apache-2.0
"""Network snapshots as EDM and EDM2 pickle them, source text that would leave a marker included; and snapshots that nobody should open."""

import collections
import copy
import copyreg
import io
import pickle
import struct
import sys
import types

import numpy as np
import torch

from dnnlib import EasyDict  # under the name of EDM2's

KINDS = {'EDMPrecond', 'VPPrecond', 'VEPrecond', 'iDDPMPrecond', 'Precond'}
VAE_SCALE = np.float32(0.5) / np.array([4.17, 4.62, 3.71, 3.28], np.float32)
VAE = {'vae_name': 'stabilityai/sd-vae-ft-mse', 'scale': VAE_SCALE, 'batch_size': 8, '_vae': None,
       'bias': -np.array([5.81, 3.25, 0.12, -2.15], np.float32) * VAE_SCALE}


def rebuild(meta):
    """What a trusting loader does with an object: it runs the source that came with it."""
    module = types.ModuleType('from_the_pickle')
    exec(meta['module_src'], module.__dict__)
    return module


def source(marker):
    return f"import pathlib\npathlib.Path({str(marker)!r}).write_text('ran')\nclass EDMPrecond: pass\n"


class Persistent:
    """An object of a class that torch_utils.persistence knows, and that is no module."""

    def __init__(self, class_name, /, **state):
        self.class_name, self.state = class_name, state


class Pickler(pickle.Pickler):
    """Pickles modules as calls of _reconstruct_persistent_obj, like torch_utils.persistence does; ModuleDicts are left as they are."""

    def __init__(self, file, protocol, text, old_torch):
        super().__init__(file, protocol)
        self.text, self.old_torch = text, old_torch

    def reducer_override(self, obj):
        if isinstance(obj, torch.nn.ModuleDict):
            return copyreg.__newobj__, (torch.nn.ModuleDict,), self.state(obj)
        if isinstance(obj, torch.nn.Module):
            return self.meta(type(obj).__name__, self.state(obj))
        if isinstance(obj, Persistent):
            return self.meta(obj.class_name, {'_init_args': (), '_init_kwargs': {}, **obj.state})
        return NotImplemented

    def meta(self, class_name, state):
        meta = {'type': 'class', 'version': 6, 'module_src': self.text, 'class_name': class_name, 'state': state}
        return sys.modules['torch_utils.persistence']._reconstruct_persistent_obj, (meta,)

    def state(self, module):
        kind = collections.OrderedDict if self.old_torch else dict
        transient = module._non_persistent_buffers_set
        buffers = {name: value for name, value in module._buffers.items() if not self.old_torch or name not in transient}
        found = {'training': False, '_parameters': kind(module._parameters), '_buffers': kind(buffers),
                 '_non_persistent_buffers_set': set(transient), '_backward_hooks': collections.OrderedDict(),
                 '_modules': kind(module._modules)}
        if self.old_torch:
            found.pop('_non_persistent_buffers_set')  # which Python would write as builtins.set in protocol 3
        if type(module).__name__ in KINDS:
            found.update(_init_args=(), _init_kwargs=module.config, sigma_data=0.5, sigma_max=float('inf'),
                         _hub_mixin_config=dict(module.config))
        elif not isinstance(module, torch.nn.ModuleDict):
            found.update(skip_scale=np.float64(0.5) ** 0.5, _init_args=(), _init_kwargs={'gain': np.float64(0.2)})
        return found


def snapshot(net, marker, protocol=4, old_torch=False, **changes):
    """The bytes of network-snapshot-*.pkl for a network of this program, whose names and layout are EDM's.

    changes: what else the dict holds, or what it holds in place of EDM's own."""
    dataset = {'class_name': 'training.dataset.ImageFolderDataset', 'path': 'x.zip', 'use_labels': False, 'max_size': 10 ** 12}
    return dumped({'ema': net, 'loss_fn': None, 'augment_pipe': None, 'dataset_kwargs': dataset, **changes}, marker, protocol, old_torch)


def edm2_snapshot(unet, arguments, marker, encoder=VAE, old_torch=False, whole=None):
    """The bytes of EDM2's edm2-*.pkl, in float16: a dict of the class EasyDict, whose network is a Precond around `unet`.

    arguments: of Precond's constructor. encoder: attributes of a StabilityVAEEncoder; None for pixels. whole: what else the dict holds, or
    what it holds in place of EDM2's own."""
    made = Persistent('StandardRGBEncoder') if encoder is None else Persistent('StabilityVAEEncoder', **encoder)
    data = EasyDict(encoder=made, dataset_kwargs=EasyDict(class_name='training.dataset.ImageFolderDataset', path='x.zip', use_labels=True),
                    loss_fn=Persistent('EDM2Loss', P_mean=-0.4, P_std=1.0, sigma_data=0.5), ema=Precond(unet, arguments).half())
    return dumped(EasyDict({**data, **(whole or {})}), marker, 4, old_torch)


def dumped(value, marker, protocol=4, old_torch=False):
    """A pickle of the value by Pickler."""
    persistence = types.ModuleType('torch_utils.persistence')
    persistence._reconstruct_persistent_obj = rebuild
    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = persistence.__name__, *['_reconstruct_persistent_obj'] * 2
    sys.modules['torch_utils.persistence'] = persistence
    try:
        file = io.BytesIO()
        Pickler(file, protocol, source(marker), old_torch).dump(value)
        return file.getvalue()
    finally:
        del sys.modules['torch_utils.persistence']


def trusting_load(data):
    """What pickle.load makes of such bytes where EDM's torch_utils is installed; only to show that the payload is live."""
    persistence = types.ModuleType('torch_utils.persistence')
    persistence._reconstruct_persistent_obj = rebuild
    sys.modules['torch_utils.persistence'] = persistence
    try:
        return pickle.loads(data)
    finally:
        del sys.modules['torch_utils.persistence']


class Linear(torch.nn.Module):
    """A module of 16 weights and one buffer, under a ModuleDict."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(16.0).reshape(4, 4))
        self.register_buffer('freqs', torch.ones(2))


class EDMPrecond(torch.nn.Module):
    """The smallest network that has everything a snapshot has; no network of this program fits it."""

    def __init__(self):
        super().__init__()
        self.config = {'img_resolution': 8, 'img_channels': 1, 'model_type': 'SongUNet', 'channel_mult': [1, 2], 'sigma_max': float('inf')}
        self.model = torch.nn.ModuleDict({'a': Linear()})


class Precond(torch.nn.Module):
    """EDM2's network of the whole, with the layers of u(sigma) beside a copy of the U-Net."""

    def __init__(self, unet, arguments):
        super().__init__()
        self.config = arguments
        self.unet = copy.deepcopy(unet)
        self.logvar_fourier, self.logvar_linear = torch.nn.Module(), torch.nn.Linear(8, 1, bias=False)
        self.logvar_fourier.register_buffer('freqs', torch.ones(8))


class UNet(torch.nn.Module):
    """The smallest U-Net that has everything EDM2's have, a gain without dimensions included; no network of this program fits it."""

    def __init__(self):
        super().__init__()
        self.out_gain = torch.nn.Parameter(torch.tensor(0.7))
        self.enc = torch.nn.ModuleDict({'8x8_conv': Linear()})
        self.skip = None


def op(code, *parts):
    return code + b''.join(parts)


def text(value):
    return op(pickle.BINUNICODE, struct.pack('<I', len(value)), value)


def ask_for(module, name, protocol=4):
    """A pickle that calls module.name('touch ...') in the way of the protocol."""
    start = op(pickle.PROTO, bytes([protocol]))
    if protocol < 4:
        found = op(pickle.GLOBAL, module.encode(), b'\n', name.encode(), b'\n')
    else:
        found = text(module.encode()) + text(name.encode()) + pickle.STACK_GLOBAL
    return start + found + text(b'touch marker') + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def bombs():
    """{name: bytes} of small files that would take much time or memory of a reader that believes them."""
    start = op(pickle.PROTO, b'\x04')
    nest = lambda code, count: start + pickle.EMPTY_TUPLE + code * count + pickle.STOP
    laugh = pickle.EMPTY_TUPLE + pickle.MEMOIZE + b''.join(
        op(pickle.BINGET, bytes([i])) * 2 + pickle.TUPLE2 + pickle.MEMOIZE for i in range(200))
    key = text(b'x' * 100)
    return {
        'bytes': start + op(pickle.BINBYTES, b'\xff\xff\xff\xff', b'abc'),
        'bytes8': start + op(pickle.BINBYTES8, b'\xff' * 7 + b'\x7f', b'abc'),
        'text': start + op(pickle.BINUNICODE, b'\xff\xff\xff\xff', b'abc'),
        'long4': start + op(pickle.LONG4, b'\xff\xff\xff\x7f', b'abc'),
        'long': start + op(pickle.LONG, b'9' * 1_000_000, b'\n'),
        'frame': start + op(pickle.FRAME, b'\xff' * 7 + b'\x7f') + pickle.STOP,
        'memo': start + pickle.NONE + op(pickle.LONG_BINPUT, b'\xff' * 4) + pickle.STOP,
        'nested tuples': nest(pickle.TUPLE1, 1_200_000),
        'nested tuples that end': nest(pickle.TUPLE1, 400_000),
        'sets': start + pickle.EMPTY_SET * 1_200_000,
        'marks': start + pickle.MARK * 1_200_000,
        'dup': start + pickle.EMPTY_LIST + pickle.DUP * 100 + pickle.STOP,
        'laughs': start + laugh + pickle.STOP,
        'laughs as a key': start + pickle.EMPTY_DICT + laugh + pickle.NONE + pickle.SETITEM + pickle.STOP,
        'a list in itself': start + pickle.EMPTY_LIST + pickle.MEMOIZE + op(pickle.BINGET, b'\0') + pickle.APPEND + pickle.STOP,
        'texts': start + (key + pickle.POP) * 300_000,
    }
