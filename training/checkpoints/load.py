# SPDX-License-Identifier: Apache-2.0
"""Loading networks from a folder, a training state, a pickle of EDM or EDM2, published weights, a Hugging Face name or a URL."""

import contextlib
import json
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
from torch_utils import distributed, legacy_pickle, misc, registry, tensor_file
from training.checkpoints import edm2, published
from training.estimation import stabilise
from training.networks import preconditioning
from training.networks.interface import network_class

CONFIG, WEIGHTS, OLD_WEIGHTS = 'config.json', 'model.safetensors', 'pytorch_model.bin'
STATISTICS = 'data_statistics'  # metadata of model.safetensors, see sampling/channels.py; an attribute of networks
READS = ('a snapshot folder (config.json + model.safetensors), a training-state .pt, a .pkl of EDM or EDM2, published weights of DiT, ViT '
         'or U-ViT, a URL of such a file, or a Hugging Face name, owner/name[@revision]')
PRECONDS = {'EDMPrecond': 'edm', 'VPPrecond': 'vp', 'VEPrecond': 've', 'iDDPMPrecond': 'iddpm'}  # by the names of the published classes
MAX_TEXT = 2 ** 24  # largest size in bytes of a configuration or a header: 100,000 tensors
MANY = 10 ** 6  # larger than any count in a network, or steps of a diffusion or sampler
RECIPE = re.compile(r'ambient_laws_(?P<data>.+?)_sigma_(?P<sigma>\d*\.?\d+)_corruption_(?P<corruption_probability>\d*\.?\d+)'
                    r'_keep_(?P<dataset_keep_percentage>\d*\.?\d+)')


def load_network(ref: str | os.PathLike, device: str | torch.device = 'cpu', weights: str = 'ema') -> preconditioning.Precond:
    """Loads the network that `ref` names, on `device`, in eval mode and without gradients.

    ref: an existing folder or file, a URL (which may end in #sha256=DIGEST), or a Hugging Face name; a folder takes precedence over a
    name. The content of a file decides what it is: a training state, a network snapshot of EDM or EDM2, from which no code is executed, or
    published weights without a configuration (see published.py).
    The weights are float32; scalars that are stored in float16, as EDM2's gains are, stay float16, which gives the published output.
    weights: of a training state, "ema", "raw" (the trained weights without averaging) or "ema:0.05" (a stored average of that width,
    train.py --power-ema); DiT's training checkpoints hold "ema" and "raw", and other files one set of weights. Under torchrun every
    rank calls this, and one per node downloads.
    Attribute data_statistics: what the weights' file says about the training data, a dict, or None.
    Raises UserError, in one line, for other references, weights that do not fit their config, and weights that are not finite."""
    config, state = read(str(ref), weights)
    statistics = config.pop(STATISTICS, None) if isinstance(config, dict) else None
    net = _build(config, state, ref)
    if bad := non_finite(net):
        raise UserError(f'{ref}: weights are not finite: {bad}; use an earlier snapshot or state')
    net.data_statistics = statistics
    return net.to(device).eval().requires_grad_(False)


def non_finite(module: torch.nn.Module) -> str | None:
    """Text about the tensors of a module that have non-finite values; None where all are finite."""
    state = module.state_dict()
    bad = {name: int((~value.isfinite()).sum()) for name, value in state.items() if not value.isfinite().all()}
    shown = ', '.join(f'{name} ({count} of {state[name].numel()} values)' for name, count in list(bad.items())[:3])
    return f'{len(bad)} of {len(state)} tensors: {shown}{", ..." if len(bad) > 3 else ""}' if bad else None


def recipe(ref: str | os.PathLike) -> dict | None:
    """How a network of Daras et al. 2025 was trained, from its name: {"data": "celeba", "sigma": 0.05, ...}; None for other names."""
    found = RECIPE.search(str(ref))
    return found and {key: value if key == 'data' else float(value) for key, value in found.groupdict().items()}


def check_denoiser(net: torch.nn.Module, where: str) -> None:
    """Refuses a generator of one step, as train.py --distill makes, where a denoiser of every level is needed. where: begins the error."""
    sampling = getattr(net, 'sampling', None)
    if isinstance(sampling, dict) and sampling.get('steps') == 1:
        raise UserError(f'{where} is a generator of one step itself; give the denoiser that it was made from')


def show_recipe(ref: str | os.PathLike) -> None:
    """Prints the recipe that a name holds, if any."""
    if found := recipe(ref):
        distributed.print0('According to its name trained on {data}: --sigma={sigma:g} --corruption_probability={corruption_probability:g} '
                           '--dataset_keep_percentage={dataset_keep_percentage:g}'.format(**found))


def _build(config, state, ref):
    """The network of a config with the weights of a state dict; built only after a copy without memory (meta device) has shown that they
    fit."""
    try:
        check_tensors(state)
        _check_plausible(config, state)
        state = published.complete(config, state)
        with torch.device('meta'), misc.seeded('a sketch'):
            sketch = preconditioning.build_network(config)
        check_weights(sketch, state)
        with misc.seeded('weights to be overwritten'):
            net = preconditioning.build_network(config)
        net.load_state_dict(state)
        _keep_half_scalars(net, state)
    except UserError as err:
        raise UserError(f'{ref}: {err.message}') from None
    except (RuntimeError, ArithmeticError, AttributeError, LookupError, AssertionError, TypeError, ValueError) as err:
        # errors of Python and PyTorch for impossible numbers
        raise UserError(f'{ref}: network configuration: {one_line(err)}') from None
    return net


def _keep_half_scalars(net, state):
    """Makes float16 of the 0-dim parameters that are float16 in the state dict: EDM2 divides its gains by sqrt(fan_in) in their own type,
    and its published files hold the gains in float16."""
    for name, parameter in net.named_parameters():
        if not parameter.ndim and state[name].dtype == torch.float16:
            parameter.data = parameter.data.half()


def check_tensors(state: dict) -> None:
    """Refuses what is not a state dict of real tensors."""
    if not isinstance(state, dict):
        raise UserError(f'expected a state dict (name: tensor), got {type(state).__name__}')
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.is_complex():
            raise UserError(f'expected a state dict (name: tensor), and "{key}" holds {_kind(value)}')


def _kind(value):
    return f'values of {value.dtype}'.replace('torch.', '') if isinstance(value, torch.Tensor) else type(value).__name__


def _check_plausible(config, state):
    """Refuses values of the wrong type, and numbers that are impossible for such weights: counts that exceed the size of every tensor, more
    blocks than tensors, tables of more than MANY entries."""
    if not isinstance(config, dict):
        raise UserError(f'network configuration: expected an object, got {type(config).__name__}')
    _check_kinds(config)
    largest = max((tensor.numel() for tensor in state.values()), default=0)
    blocks, levels = config.get('num_blocks', 1), config.get('channel_mult', [])
    for key, value in config.items():
        if key in ('autoencoder', 'text'):  # a digest is no size, and build_network() checks them
            continue
        numbers = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        texts = [int(digits[:20]) for text in _texts(value) for digits in re.findall(r'(?<![.\d])\d+', text)]  # no decimals
        if (len(numbers) > max(len(state), 16) or any(abs(number) > min(max(largest, 4096), MANY) for number in numbers)
                or max(texts, default=0) > MANY):
            raise UserError(f'network configuration: {key} asks for a far larger network than these weights are of')
    if isinstance(config.get('depth'), int) and config['depth'] > max(len(state), 16):
        raise UserError(f'network configuration: depth={config["depth"]} asks for more layers than {len(state)} tensors make')
    if isinstance(blocks, int) and isinstance(levels, list) and blocks * max(len(levels), 1) > max(len(state), 16):
        raise UserError(f'network configuration: num_blocks={blocks} asks for more layers than {len(state)} tensors make')


def _texts(value):
    """The strings and integers inside a JSON value, as text; plain numbers and lists of numbers are checked elsewhere."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in ([str(item)] if type(item) is int else _texts(item))]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def _check_kinds(config):
    """Refuses values of another type than the default that they replace; the network's own checks do the rest."""
    defaults = {'img_resolution': 1, 'img_channels': 1, 'label_dim': 0, 'use_fp16': False, 'model_type': '', 'precond': ''}
    kind = preconditioning.PRECONDS.get(config['precond'] if isinstance(config.get('precond'), str) else 'edm')
    model_type = config.get('model_type', kind and kind.model_type)
    if kind:
        defaults |= kind.options
    if isinstance(model_type, str):
        defaults |= registry.parameters(network_class(model_type))
    for key, default in defaults.items():
        value = config.get(key, default)
        if not (_fits(value, default) or key == 'img_resolution' and _fits(value, [1])):
            raise UserError(f'network configuration: "{key}" must be {_words(default)}, got {json.dumps(value)[:100]}')
    units = config.get('units')
    if units is not None and not (isinstance(units, dict) and units.keys() - {'stabilise'} == {'offset', 'scale'}
                                  and all(_fits(units[key], 1) or _fits(units[key], [1]) for key in ('offset', 'scale'))):
        raise UserError(f'network configuration: "units" must be {{"offset": ..., "scale": ...}}, each a number or one per channel, '
                        f'got {json.dumps(units)[:100]}')
    try:
        stabilise.of_units(units)
    except ValueError as err:
        raise UserError(f'network configuration: has {err}') from None


def _fits(value, default):
    """Whether a JSON value can replace a default; any can where the default is not a number, a list of numbers or text."""
    if isinstance(default, bool):
        return value in (False, True)
    if isinstance(default, (int, float)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (abs(value) < 2 ** 63 or abs(value) == math.inf)
    if isinstance(default, (list, tuple)) and all(_fits(item, 1) for item in default):
        return isinstance(value, (list, tuple)) and all(_fits(item, 1) and abs(item) != math.inf for item in value)
    return not isinstance(default, str) or isinstance(value, str)


def _words(default):
    if isinstance(default, bool):
        return 'true or false'
    return 'a number' if isinstance(default, (int, float)) else 'a list of numbers' if isinstance(default, (list, tuple)) else 'text'


def load_weights(net: torch.nn.Module, state: dict, ref: str | os.PathLike) -> None:
    """Copies a state dict into a network. Raises UserError with `ref` and the first differences, and leaves the network unchanged then."""
    try:
        check_tensors(state)
        check_weights(net, state)
    except UserError as err:
        raise UserError(f'{ref}: {err.message}') from None
    net.load_state_dict(state)


def check_weights(net: torch.nn.Module, state: dict) -> None:
    """Refuses a state dict whose names or shapes are not those of a module; the error lists the first differences."""
    own = net.state_dict()
    wrong = [f'{key} is missing' for key in own if key not in state]
    wrong += [f'{key[:200]} is unknown' for key in state if key not in own]
    wrong += [f'{key} is {list(state[key].shape)} in the weights and {list(own[key].shape)} in the config'
              for key in own if key in state and state[key].shape != own[key].shape]
    if wrong:
        more = f', and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise UserError(f'the weights do not fit the config: {"; ".join(wrong[:3])}{more}')


def read(ref: str, weights: str = 'ema') -> tuple[dict, dict]:
    """(config, state dict) of a reference of any kind; `config` holds the arguments of preconditioning.build_network.

    weights: which weights of a training state, see load_network; other kinds hold one set. Raises UserError."""
    check_choice(weights)
    if is_url(ref):
        return _read_file(distributed.first_on_node(open_url, ref), weights)
    if os.path.isfile(ref):
        return _read_file(ref, weights)
    if weights != 'ema':
        raise UserError(f'{ref}: only a training-state .pt holds several sets of weights; leave --weights at ema')
    if os.path.isdir(ref):
        return _read_folder(ref)
    if name := hub.NAME.fullmatch(ref):
        config, path = distributed.first_on_node(hub.fetch, ref, CONFIG, (WEIGHTS, OLD_WEIGHTS), **name.groupdict())
        config, weights = _read_config(config), _read_weights(path)
        return config | _read_statistics(path), weights
    raise UserError(f'{ref}: no such file or folder; a network is {READS}')


def check_choice(weights: str) -> None:
    """Refuses a --weights that cannot name weights of a training state."""
    if not re.fullmatch(r'ema|raw|ema:\d*\.?\d+', weights):
        raise UserError(f'--weights={weights}: choose ema, raw, or a stored power-function average by its width, such as ema:0.05')


def _read_file(path, weights):
    """(config, state dict) of a file, whose kind its first bytes decide."""
    with open(path, 'rb') as f:
        start = f.read(16)
    if start.startswith(tensor_file.LEGACY):
        return _read_state(path, weights)
    if start[:1] == b'\x80':
        return _read_pickle(path, weights)
    if start[8:9] == b'{':
        return _recognised(path, _read_weights(path), weights)
    with contextlib.suppress(zipfile.BadZipFile):
        if zipfile.is_zipfile(path):
            return _read_state(path, weights)
    kind = 'not a PyTorch file, or an incomplete one'
    if start[:1] in (b'<', b'{'):
        kind = 'a text file, not a network'
    raise UserError(f'{path}: {kind}; a network is {READS}')


def _read_pickle(path, weights):
    """A network snapshot of EDM, EDM2 or ambient-laws, of which nothing is executed."""
    if weights != 'ema':
        raise UserError(f'{path}: only a training-state .pt holds other weights; leave --weights at ema')
    snapshot = legacy_pickle.read_snapshot(path)
    name, arguments, state, _ = snapshot
    if name == edm2.PRECOND:
        try:
            return edm2.convert(snapshot)
        except UserError as err:
            raise UserError(f'{path}: {err.message}') from None
    if name not in PRECONDS:
        raise UserError(f'{path}: holds a network of the class {ascii(name)}; those read are {", ".join([*PRECONDS, edm2.PRECOND])}')
    return arguments | ({} if PRECONDS[name] == 'edm' else {'precond': PRECONDS[name]}), state


def _read_folder(folder):
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        inner = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, CONFIG)))
        hint = f'did you mean {os.path.join(folder, inner[-1])}?' if inner else f'a snapshot folder holds {CONFIG} and {WEIGHTS}'
        raise UserError(f'{folder}: no {CONFIG} in this folder; {hint}')
    for name in (WEIGHTS, OLD_WEIGHTS):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            config, weights = _read_config(os.path.join(folder, CONFIG)), _read_weights(path)
            return config | _read_statistics(path), weights
    raise UserError(f'{folder}: {CONFIG} is there, but neither {WEIGHTS} nor {OLD_WEIGHTS}')


def _read_config(path):
    if os.path.getsize(path) > MAX_TEXT:
        raise UserError(f'{path}: not a network configuration, with {os.path.getsize(path)} bytes')
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f'{path}: network configuration: expected an object, got {type(found).__name__}')
    return found


def _read_weights(path):
    """A state dict from a safetensors file, or from a weights-only PyTorch file."""
    if str(path).endswith('.bin'):
        return _read_old_weights(path)
    try:
        with open(path, 'rb') as f:
            header = int.from_bytes(f.read(8), 'little')
        if header > MAX_TEXT:
            raise UserError(f'{path}: damaged safetensors file: its header claims {header} bytes')
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as err:
        raise UserError(f'{path}: damaged safetensors file: {one_line(err)}') from None


def _read_statistics(path):
    """{STATISTICS: ...} where the metadata of an intact safetensors file has them as JSON, else {}, because no result depends on them."""
    if path.endswith('.bin'):
        return {}
    with safetensors.safe_open(path, 'pt') as f:
        text = (f.metadata() or {}).get(STATISTICS, '')
    with contextlib.suppress(ValueError, RecursionError):
        return {STATISTICS: json.loads(text)} if text else {}
    return {}


def _read_state(path, weights):
    """Config and weights of a training state, {"options": {"network": config}, "net": ..., "ema": {name: ...}}, or published ones."""
    state = tensor_file.read(path, 'a training state or published weights', f'; a network is {READS}', mapped=True,
                             select=published.select)
    if not isinstance(state, dict) or not {'options', 'net', 'ema'} <= state.keys():
        return _recognised(path, state, weights)
    try:
        config, raw, averages = state['options']['network'], state['net'], dict(state['ema'])
        precision = state['options'].get('run', state['options']).get('precision', 'fp32')
        config = config.get('arguments', config)  # version 0.1.0 had them in place of the network's part of a tree
        sets = {_weights_name(key, first=not index): dict(average) for index, (key, average) in enumerate(averages.items())}
        sets['raw'] = dict(raw)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f'{path}: this training state holds no network; a network is {READS}') from None
    if weights.startswith('ema:'):
        weights = f'ema:{float(weights[4:]):.3f}'
    if weights not in sets:
        raise UserError(f'{path}: holds no {weights} weights; use --weights={" or --weights=".join(sets)}')
    config = config if precision == 'fp32' else {**config, 'precision': precision}
    return config, {**sets['raw'], **sets[weights]}  # what is not averaged, such as buffers, is the network's own


def _recognised(path, found, weights):
    """Config and weights of published weights."""
    try:
        return published.network(found, weights)
    except UserError as err:
        raise UserError(f'{path}: {err.message}') from None


def _weights_name(key, first):
    """Name of an average of a state in --weights: the first is "ema", "power_0.050" is "ema:0.050"."""
    return 'ema' if first else f'ema:{str(key).removeprefix("power_")}'


def _read_old_weights(path):
    """The state dict in a pytorch_model.bin: tensors only, nothing executed."""
    state = tensor_file.read(path, 'plain tensors', mapped=True)
    if not isinstance(state, dict):
        raise UserError(f'{path}: expected a state dict (name: tensor), got {type(state).__name__}')
    return state
