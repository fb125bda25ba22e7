# SPDX-License-Identifier: Apache-2.0
"""Networks from and to where they are kept: folders of config.json + model.safetensors, training states, the Hugging Face Hub."""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import uuid
import zipfile

import click
import safetensors
import safetensors.torch
import torch

from dnnlib import util
from torch_utils import checkpoint, misc
from training import preconditioning

CONFIG, WEIGHTS, OLD_WEIGHTS, CARD = 'config.json', 'model.safetensors', 'pytorch_model.bin', 'README.md'
READS = 'a snapshot folder (config.json + model.safetensors), a training-state .pt, or a Hugging Face name, owner/name[@revision]'
HUB_NAME = re.compile(r'(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?')


def load_network(ref, device='cpu', weights='ema'):
    """The network that `ref` names, on `device`, in eval mode and without gradients.

    ref: a folder or file that exists wins over a Hugging Face name. What a file is, is decided by its content.
    weights: "ema" (a state's first average; what folders and repositories hold) or "raw" (a state's network as it was trained).
    Raises click.ClickException, in one line, for a reference that is none of these and weights that do not fit their config."""
    if weights not in ('ema', 'raw'):
        raise click.ClickException(f'--weights={weights}: choose ema or raw')
    config, state = _read(str(ref), weights)
    net = _build(config, ref)
    load_weights(net, state, ref)
    return net.to(device).eval().requires_grad_(False)


def _read(ref, weights):
    """(config, state dict) of a reference of any kind."""
    if util.is_url(ref):
        raise click.ClickException(f'{ref}: networks are not read from URLs; download it and give {READS}')
    if os.path.isfile(ref):
        return _read_state(ref, weights)
    if weights == 'raw':
        raise click.ClickException(f'{ref}: only a training-state .pt holds raw weights; leave --weights at ema')
    if os.path.isdir(ref):
        return _read_folder(ref)
    if name := HUB_NAME.fullmatch(ref):
        return _read_hub(ref, name['repo'], name['revision'])
    raise click.ClickException(f'{ref}: no such file or folder; a network is {READS}')


def _read_folder(folder):
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        inner = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, CONFIG)))
        hint = f'did you mean {os.path.join(folder, inner[-1])}?' if inner else f'a snapshot folder holds {CONFIG} and {WEIGHTS}'
        raise click.ClickException(f'{folder}: no {CONFIG} in this folder; {hint}')
    for name in (WEIGHTS, OLD_WEIGHTS):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return _read_config(os.path.join(folder, CONFIG)), _read_weights(path)
    raise click.ClickException(f'{folder}: {CONFIG} is there, but neither {WEIGHTS} nor {OLD_WEIGHTS}')


def _read_config(path):
    try:
        with open(path, encoding='utf-8') as f:
            config = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise click.ClickException(f'{path}: not a JSON file: {err}') from None
    if not isinstance(config, dict):
        raise click.ClickException(f'{path}: expected the arguments of a network as a JSON object, got {type(config).__name__}')
    return config


def _read_weights(path):
    """A state dict from a safetensors file, or from a weights-only PyTorch file."""
    if path.endswith('.bin'):
        return _read_old_weights(path)
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as err:
        raise click.ClickException(f'{path}: no whole safetensors file: {err}') from None


def _read_state(path, weights):
    """Config and weights of a training state: {"options": {"network": config}, "net": ..., "ema": {name: ...}}."""
    _refuse_pickles(path)
    state = checkpoint.load(path)
    try:
        config, raw, averages = state['options']['network'], state['net'], list(state['ema'].values())
    except (KeyError, TypeError, AttributeError):
        raise click.ClickException(f'{path}: this training state describes no network; a network is {READS}') from None
    if weights == 'raw':
        return config, raw
    if not averages:
        raise click.ClickException(f'{path}: holds no EMA; take the network as it was trained with --weights=raw')
    return config, {**raw, **averages[0]}  # what is not averaged (buffers, say) is the network's own


def _refuse_pickles(path):
    """One line for what is no PyTorch archive at all; EDM's own snapshots are such pickles."""
    if zipfile.is_zipfile(path):
        return
    with open(path, 'rb') as f:
        is_pickle = f.read(1) == b'\x80'
    kind = "a pickle (as EDM's .pkl snapshots are), which is not read" if is_pickle else 'no PyTorch file, or not a whole one'
    raise click.ClickException(f'{path}: {kind}; a network is {READS}')


def _read_old_weights(path):
    """The state dict in a pytorch_model.bin: tensors only, nothing executed."""
    _refuse_pickles(path)
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as err:
        raise click.ClickException(f'{path}: cannot be read as plain tensors: {_first_line(err)}') from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise click.ClickException(f'{path}: expected a state dict (name: tensor), got {type(state).__name__}')
    return state


def _first_line(err):
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]


def _read_hub(ref, repo, revision):
    """Config and weights of a Hugging Face repository, by its client's own cache and offline mode."""
    import huggingface_hub  # slow to import, and needed for names of the Hub alone
    from huggingface_hub.utils import EntryNotFoundError

    def fetch(name):
        return huggingface_hub.hf_hub_download(repo, name, revision=revision)

    with _hub_errors(ref, revision):
        config = _read_config(fetch(CONFIG))
        try:
            path = fetch(WEIGHTS)
        except EntryNotFoundError:
            path = fetch(OLD_WEIGHTS)
        return config, _read_weights(path)


@contextlib.contextmanager
def _hub_errors(ref, revision):
    """What the Hub's client raises, as one line that says what to do."""
    from huggingface_hub import utils as hub
    try:
        yield
    except hub.RepositoryNotFoundError:
        raise click.ClickException(f'{ref}: no such folder here, and no such repository on the Hugging Face Hub '
                                   '(a private one needs a login)') from None
    except hub.RevisionNotFoundError:
        raise click.ClickException(f'{ref}: the repository has no revision "{revision}" (a branch, a tag or a commit)') from None
    except hub.LocalEntryNotFoundError:
        raise click.ClickException(f'{ref}: no such folder here, not in the Hugging Face cache, and the Hub cannot be reached '
                                   '(HF_HUB_OFFLINE?)') from None
    except hub.EntryNotFoundError:
        raise click.ClickException(f'{ref}: the repository lacks {CONFIG}, or both {WEIGHTS} and {OLD_WEIGHTS}') from None
    except (OSError, hub.HFValidationError) as err:
        raise click.ClickException(f'{ref}: no such folder here, and the Hugging Face Hub says: {_first_line(err)}') from None


def _build(config, ref):
    """The network of a config, newly made; torch's random state is left as it was."""
    try:
        with misc.seeded('weights to be overwritten'):
            return preconditioning.build_network(config)
    except click.ClickException as err:
        raise click.ClickException(f'{ref}: {err.message}') from None


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
        _write_files(net, part, card)
        if os.path.exists(folder):
            os.rename(folder, old)
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_files(net, folder, card):
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


def model_card(options, kimg=None):
    """Markdown for a network's folder: what it makes, how it was trained, how to use it.

    options: a run's options, of which "network" is needed. kimg: thousands of images that it was trained on."""
    config = options['network']
    size = config['img_resolution']
    height, width = (size, size) if isinstance(size, int) else size
    rows = {'Images': f'{config["img_channels"]} x {height} x {width}',
            'Classes': config.get('label_dim') or 'none (unconditional)',
            'Architecture': config.get('model_type', 'that of its preconditioner'),
            'Preconditioning': config.get('precond', 'edm')}
    if kimg is not None:
        rows['Trained on'] = f'{kimg:g} thousand images'
    told = {key: options[key] for key in CARD_OPTIONS if key in options}
    training = f'Training options:\n\n```json\n{json.dumps(told, indent=2)}\n```\n' if told else ''
    return CARD_TEXT.format(table='\n'.join(f'| {name} | {value} |' for name, value in rows.items()), training=training)


CARD_OPTIONS = ('objective', 'corruption', 'augment', 'batch', 'optimizer', 'ema', 'precision', 'seed')  # no paths: it is public
CARD_TEXT = """---
tags:
- diffusion
- edm
---
# Diffusion model

A denoiser D(x; sigma) = E[x_0 | x_0 + sigma n = x], and with it a generator of images.

| | |
|-|-|
{table}

Images from it, with this folder or its Hugging Face name as NAME:

    python generate.py --network=NAME --outdir=out --seeds=0-63

In Python, with x a noisy batch [N,C,H,W] in network units and sigma its noise level:

    from training.hub import load_network
    net = load_network('NAME')
    denoised = net(x, sigma)

{training}"""
