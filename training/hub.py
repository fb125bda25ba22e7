# SPDX-License-Identifier: Apache-2.0
"""Networks, ready to use, from whatever names them (load_network), and as folders of config.json + model.safetensors (save_network)."""

import json
import math
import os
import re
import shutil
import uuid

import click
import safetensors.torch
import torch

from torch_utils import distributed, misc
from training import hub_files, preconditioning
from training.hub_files import CONFIG, WEIGHTS
from training.model_card import model_card

CARD = 'README.md'
RECIPE = re.compile(r'ambient_laws_(?P<data>.+?)_sigma_(?P<sigma>\d*\.?\d+)_corruption_(?P<corruption_probability>\d*\.?\d+)'
                    r'_keep_(?P<dataset_keep_percentage>\d*\.?\d+)')


def load_network(ref, device='cpu', weights='ema'):
    """The network that `ref` names, on `device`, in eval mode and without gradients.

    ref: a folder or file that exists, a URL (which may end in #sha256=DIGEST), or a Hugging Face name; a folder wins over a name. What a
    file is, is decided by its content: a training state, or a network snapshot of EDM, of which nothing is executed.
    weights: of a training state, "ema", "raw" (the network as it was trained) or "ema:0.05" (a stored average of that width,
    train.py --power-ema); all else holds one set of weights. Under torchrun every rank calls this, and one of each node fetches.
    Raises click.ClickException, in one line, for a reference that is none of these and weights that do not fit their config."""
    config, state = hub_files.read(str(ref), weights)
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
    except click.ClickException as err:
        raise click.ClickException(f'{ref}: {err.message}') from None
    except (RuntimeError, ArithmeticError, AttributeError, LookupError, AssertionError) as err:  # Python's words for strange numbers
        raise click.ClickException(f'{ref}: network configuration: {hub_files.first_line(err)}') from None
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
            raise click.ClickException(f'network configuration: {key} asks for a far larger network than that of the weights here')
    if isinstance(blocks, int) and isinstance(levels, list) and blocks * max(len(levels), 1) > max(len(state), 16):
        raise click.ClickException(f'network configuration: num_blocks={blocks} asks for more layers than {len(state)} tensors make')


def load_weights(net, state, ref):
    """Copies a state dict into a network. Raises click.ClickException with `ref` and the first few that differ."""
    own = net.state_dict()
    wrong = [f'{key} is missing' for key in own if key not in state]
    wrong += [f'{key} is unknown' for key in state if key not in own]
    wrong += [f'{key} is {list(state[key].shape)} in the weights and {list(own[key].shape)} in the config'
              for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        more = f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise click.ClickException(f'{ref}: the weights do not fit the config: {"; ".join(wrong[:3])}{more}')
    net.load_state_dict(state)


def save_network(net, folder, card=None):
    """Writes a folder ready for the Hub: config.json (net.config), model.safetensors (float32), README.md.

    card: Markdown to put in the model card in place of the default text. The folder appears whole, by renaming a temporary one;
    one that exists is replaced."""
    folder = os.path.abspath(folder)
    parent, name = os.path.split(folder)
    part, old = (os.path.join(parent, f'.{name}-{kind}-{uuid.uuid4().hex[:8]}') for kind in ('part', 'old'))
    os.makedirs(part)
    try:
        write_files(net, part, card)
        if os.path.exists(folder):
            os.rename(folder, old)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_files(net, folder, card=None):
    """Fills an empty folder with the three files of save_network."""
    state = {key: _portable(value) for key, value in net.state_dict().items()}
    with open(os.path.join(folder, WEIGHTS), 'wb') as f:
        f.write(safetensors.torch.save(state, metadata={'format': 'pt'}))
    with open(os.path.join(folder, CONFIG), 'w', encoding='utf-8') as f:
        json.dump(_finite(net.config), f, indent=2, allow_nan=False)
        f.write('\n')
    with open(os.path.join(folder, CARD), 'w', encoding='utf-8') as f:
        f.write(card or model_card({'network': net.config}))


def _portable(value):
    """A tensor of its own memory on the CPU, float32 where it is floating point."""
    value = value.detach().to('cpu', torch.float32 if value.is_floating_point() else value.dtype)
    return value.contiguous().clone()


def _finite(config):
    """The config without infinities and nan, which JSON does not have; a network's defaults stand in for them."""
    return {key: value for key, value in config.items() if not (isinstance(value, float) and not math.isfinite(value))}
