# SPDX-License-Identifier: Apache-2.0
"""Networks, ready to use, from whatever names them: folder, training state, EDM's pickle, Hugging Face name, URL."""

import math
import os
import re
import zipfile

import safetensors
import safetensors.torch
import torch

from dnnlib import UserError, hub, one_line
from dnnlib.download import is_url, open_url
from dnnlib.files import read_json
from torch_utils import checkpoint, distributed, legacy_pickle, misc
from training.networks import preconditioning

CONFIG, WEIGHTS, OLD_WEIGHTS = 'config.json', 'model.safetensors', 'pytorch_model.bin'
READS = ("a snapshot folder (config.json + model.safetensors), a training-state .pt, EDM's .pkl, a URL of the latter two, "
         'or a Hugging Face name, owner/name[@revision]')
PRECONDS = {'EDMPrecond': 'edm', 'VPPrecond': 'vp', 'VEPrecond': 've', 'iDDPMPrecond': 'iddpm'}  # as published classes are called
RECIPE = re.compile(r'ambient_laws_(?P<data>.+?)_sigma_(?P<sigma>\d*\.?\d+)_corruption_(?P<corruption_probability>\d*\.?\d+)'
                    r'_keep_(?P<dataset_keep_percentage>\d*\.?\d+)')


def load_network(ref, device='cpu', weights='ema'):
    """The network that `ref` names, on `device`, in eval mode and without gradients.

    ref: a folder or file that exists, a URL (which may end in #sha256=DIGEST), or a Hugging Face name; a folder wins over a name. What a
    file is, is decided by its content: a training state, or a network snapshot of EDM, of which nothing is executed.
    weights: of a training state, "ema", "raw" (the network as it was trained) or "ema:0.05" (a stored average of that width,
    train.py --power-ema); all else holds one set of weights. Under torchrun every rank calls this, and one of each node fetches.
    Raises UserError, in one line, for a reference that is none of these and weights that do not fit their config."""
    config, state = read(str(ref), weights)
    return _build(config, state, ref).to(device).eval().requires_grad_(False)


def recipe(ref):
    """How the networks of Daras et al. 2025 were trained, which their names tell: {"data": "celeba", "sigma": 0.05, ...}, else None."""
    found = RECIPE.search(str(ref))
    return found and {key: value if key == 'data' else float(value) for key, value in found.groupdict().items()}


def show_recipe(ref):
    """Prints the recipe that a name tells, if it tells one."""
    if found := recipe(ref):
        distributed.print0('Trained, as its name tells, on {data}: --sigma={sigma:g} --corruption_probability={corruption_probability:g} '
                           '--dataset_keep_percentage={dataset_keep_percentage:g}'.format(**found))


def _build(config, state, ref):
    """The network of a config with the weights of a state dict, made at no greater cost than these weights warrant."""
    try:
        _check_plausible(config, state)
        with misc.seeded('weights to be overwritten'), Allowance(2 * sum(tensor.numel() for tensor in state.values())):
            net = preconditioning.build_network(config)
    except UserError as err:
        raise UserError(f'{ref}: {err.message}') from None
    except (RuntimeError, ArithmeticError, AttributeError, LookupError, AssertionError) as err:  # Python's words for strange numbers
        raise UserError(f'{ref}: network configuration: {one_line(err)}') from None
    load_weights(net, state, ref)
    return net


class Allowance(torch.overrides.TorchFunctionMode):
    """In its context ValueError is raised before torch makes more than so many new values, and some for small constants."""

    FACTORIES = (torch.empty, torch.ones, torch.rand, torch.randn, torch.zeros)

    def __init__(self, values):
        super().__init__()
        self.left = values + 2 ** 20

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.FACTORIES:
            shape = args[0] if args and not isinstance(args[0], int) else args
            self.left -= math.prod(max(side, 1) for side in shape)
            if self.left < 0:
                raise ValueError('it asks for a far larger network than that of the weights here')
        return func(*args, **(kwargs or {}))


def _check_plausible(config, state):
    """Refuses numbers that no network with such weights has: counts that exceed every tensor, more blocks than there are tensors."""
    largest = max((tensor.numel() for tensor in state.values()), default=0)
    blocks, levels = config.get('num_blocks', 1), config.get('channel_mult', [])
    for key, value in config.items():
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if len(numbers) > max(len(state), 16) or any(abs(number) > max(largest, 4096) for number in numbers):
            raise UserError(f'network configuration: {key} asks for a far larger network than that of the weights here')
    if isinstance(blocks, int) and isinstance(levels, list) and blocks * max(len(levels), 1) > max(len(state), 16):
        raise UserError(f'network configuration: num_blocks={blocks} asks for more layers than {len(state)} tensors make')


def load_weights(net, state, ref):
    """Copies a state dict into a network. Raises UserError with `ref` and the first few that differ."""
    own = net.state_dict()
    wrong = [f'{key} is missing' for key in own if key not in state]
    wrong += [f'{key} is unknown' for key in state if key not in own]
    wrong += [f'{key} is {list(state[key].shape)} in the weights and {list(own[key].shape)} in the config'
              for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        more = f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise UserError(f'{ref}: the weights do not fit the config: {"; ".join(wrong[:3])}{more}')
    net.load_state_dict(state)


def read(ref, weights='ema'):
    """(config, state dict) of a reference of any kind; `config` holds the arguments of preconditioning.build_network.

    weights: which of a training state's, as load_network says; other kinds hold one set. Raises UserError."""
    check_choice(weights)
    if is_url(ref):
        return _read_file(distributed.first_on_node(open_url, ref), weights)
    if os.path.isfile(ref):
        return _read_file(ref, weights)
    if weights != 'ema':
        raise UserError(f'{ref}: only a training-state .pt holds other weights; leave --weights at ema')
    if os.path.isdir(ref):
        return _read_folder(ref)
    if name := hub.NAME.fullmatch(ref):
        config, path = distributed.first_on_node(hub.fetch, ref, CONFIG, (WEIGHTS, OLD_WEIGHTS), **name.groupdict())
        return read_json(config), _read_weights(path)
    raise UserError(f'{ref}: no such file or folder; a network is {READS}')


def check_choice(weights):
    """Refuses what cannot name weights of a training state."""
    if not re.fullmatch(r'ema|raw|ema:\d*\.?\d+', weights):
        raise UserError(f'--weights={weights}: choose ema, raw, or a stored power-function average by its width, as ema:0.05')


def _read_file(path, weights):
    """A file, by its first bytes."""
    with open(path, 'rb') as f:
        start = f.read(16)
    if start[:1] == b'\x80':
        return _read_pickle(path, weights)
    if zipfile.is_zipfile(path):
        return _read_state(path, weights)
    kind = 'no PyTorch file, or not a whole one'
    if start[8:9] == b'{':
        kind = f'a safetensors file, which holds weights without their {CONFIG}'
    elif start[:1] in (b'<', b'{'):
        kind = 'a page of text, and no network'
    raise UserError(f'{path}: {kind}; a network is {READS}')


def _read_pickle(path, weights):
    """A network snapshot of EDM or ambient-laws, of which nothing is executed."""
    if weights != 'ema':
        raise UserError(f'{path}: only a training-state .pt holds other weights; leave --weights at ema')
    name, arguments, state = legacy_pickle.read_network(path)
    if name not in PRECONDS:
        raise UserError(f'{path}: holds a network of the class {ascii(name)}; those read are {", ".join(PRECONDS)}')
    return arguments | ({} if PRECONDS[name] == 'edm' else {'precond': PRECONDS[name]}), state


def _read_folder(folder):
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        inner = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, CONFIG)))
        hint = f'did you mean {os.path.join(folder, inner[-1])}?' if inner else f'a snapshot folder holds {CONFIG} and {WEIGHTS}'
        raise UserError(f'{folder}: no {CONFIG} in this folder; {hint}')
    for name in (WEIGHTS, OLD_WEIGHTS):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return read_json(os.path.join(folder, CONFIG)), _read_weights(path)
    raise UserError(f'{folder}: {CONFIG} is there, but neither {WEIGHTS} nor {OLD_WEIGHTS}')


def _read_weights(path):
    """A state dict from a safetensors file, or from a weights-only PyTorch file."""
    if path.endswith('.bin'):
        return _read_old_weights(path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as err:
        raise UserError(f'{path}: no whole safetensors file: {err}') from None


def _read_state(path, weights):
    """Config and weights of a training state: {"options": {"network": config}, "net": ..., "ema": {name: ...}}."""
    state = checkpoint.load(path)
    try:
        config, raw, averages = state['options']['network'], state['net'], dict(state['ema'])
        config = config.get('arguments', config)  # version 0.1.0 had them in place of the network's part of a tree
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f'{path}: this training state describes no network; a network is {READS}') from None
    sets = {_weights_name(key, first=not index): average for index, (key, average) in enumerate(averages.items())} | {'raw': {}}
    if weights.startswith('ema:'):
        weights = f'ema:{float(weights[4:]):.3f}'
    if weights not in sets:
        raise UserError(f'{path}: holds no {weights} weights; give --weights={" or --weights=".join(sets)}')
    return config, {**raw, **sets[weights]}  # what is not averaged (buffers, say) is the network's own


def _weights_name(key, first):
    """What --weights calls an average of a state: the first is "ema", "power_0.050" is "ema:0.050"."""
    return 'ema' if first else f'ema:{key.removeprefix("power_")}'


def _read_old_weights(path):
    """The state dict in a pytorch_model.bin: tensors only, nothing executed."""
    state = checkpoint.read_tensors(path, 'plain tensors')
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f'{path}: expected a state dict (name: tensor), got {type(state).__name__}')
    return state
