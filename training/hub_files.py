# SPDX-License-Identifier: Apache-2.0
"""What a user may hold of a network, read as (config, state dict): folder, training state, EDM's pickle, Hugging Face name, URL."""

import contextlib
import json
import os
import pickle
import re
import zipfile

import click
import safetensors
import safetensors.torch
import torch

from dnnlib import util
from torch_utils import checkpoint, distributed, legacy_pickle

CONFIG, WEIGHTS, OLD_WEIGHTS = 'config.json', 'model.safetensors', 'pytorch_model.bin'
READS = ("a snapshot folder (config.json + model.safetensors), a training-state .pt, EDM's .pkl, a URL of the latter two, "
         'or a Hugging Face name, owner/name[@revision]')
HUB_NAME = re.compile(r'(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?')
PRECONDS = {'EDMPrecond': 'edm', 'VPPrecond': 'vp', 'VEPrecond': 've', 'iDDPMPrecond': 'iddpm'}  # as published classes are called


def read(ref, weights='ema'):
    """(config, state dict) of a reference of any kind; `config` holds the arguments of preconditioning.build_network.

    weights: which of a training state's, as hub.load_network says; other kinds hold one set. Raises click.ClickException."""
    check_choice(weights)
    if util.is_url(ref):
        return _read_file(distributed.first_on_node(util.open_url, ref), weights)
    if os.path.isfile(ref):
        return _read_file(ref, weights)
    if weights != 'ema':
        raise click.ClickException(f'{ref}: only a training-state .pt holds other weights; leave --weights at ema')
    if os.path.isdir(ref):
        return _read_folder(ref)
    if name := HUB_NAME.fullmatch(ref):
        config, path = distributed.first_on_node(_fetch_hub, ref, name['repo'], name['revision'])
        return _read_config(config), _read_weights(path)
    raise click.ClickException(f'{ref}: no such file or folder; a network is {READS}')


def check_choice(weights):
    """Refuses what cannot name weights of a training state."""
    if not re.fullmatch(r'ema|raw|ema:\d*\.?\d+', weights):
        raise click.ClickException(f'--weights={weights}: choose ema, raw, or a stored power-function average by its width, as ema:0.05')


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
    raise click.ClickException(f'{path}: {kind}; a network is {READS}')


def _read_pickle(path, weights):
    """A network snapshot of EDM or ambient-laws, of which nothing is executed."""
    if weights != 'ema':
        raise click.ClickException(f'{path}: only a training-state .pt holds other weights; leave --weights at ema')
    name, arguments, state = legacy_pickle.read_network(path)
    if name not in PRECONDS:
        raise click.ClickException(f'{path}: holds a network of the class {ascii(name)}; those read are {", ".join(PRECONDS)}')
    return arguments | ({} if PRECONDS[name] == 'edm' else {'precond': PRECONDS[name]}), state


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
    state = checkpoint.load(path)
    try:
        config, raw, averages = state['options']['network'], state['net'], dict(state['ema'])
    except (KeyError, TypeError, ValueError):
        raise click.ClickException(f'{path}: this training state describes no network; a network is {READS}') from None
    sets = {_weights_name(key, first=not index): average for index, (key, average) in enumerate(averages.items())} | {'raw': {}}
    if weights.startswith('ema:'):
        weights = f'ema:{float(weights[4:]):.3f}'
    if weights not in sets:
        raise click.ClickException(f'{path}: holds no {weights} weights; give --weights={" or --weights=".join(sets)}')
    return config, {**raw, **sets[weights]}  # what is not averaged (buffers, say) is the network's own


def _weights_name(key, first):
    """What --weights calls an average of a state: the first is "ema", "power_0.050" is "ema:0.050"."""
    return 'ema' if first else f'ema:{key.removeprefix("power_")}'


def _read_old_weights(path):
    """The state dict in a pytorch_model.bin: tensors only, nothing executed."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as err:
        raise click.ClickException(f'{path}: cannot be read as plain tensors: {first_line(err)}') from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise click.ClickException(f'{path}: expected a state dict (name: tensor), got {type(state).__name__}')
    return state


def first_line(err):
    return (str(err).strip().splitlines() or [type(err).__name__])[0][:200]


def _fetch_hub(ref, repo, revision):
    """Paths of config and weights of a Hugging Face repository, by its client's own cache and offline mode."""
    import huggingface_hub  # slow to import, and needed for names of the Hub alone
    from huggingface_hub.utils import EntryNotFoundError

    def fetch(name):
        return huggingface_hub.hf_hub_download(repo, name, revision=revision)

    with hub_errors(ref, revision):
        config = fetch(CONFIG)
        try:
            return config, fetch(WEIGHTS)
        except EntryNotFoundError:
            return config, fetch(OLD_WEIGHTS)


@contextlib.contextmanager
def hub_errors(ref, revision, refusal='no such folder here, and the Hugging Face Hub says'):
    """What the Hub's client raises, as one line that says what to do; of its attempts it tells nothing.

    refusal: how to begin the line about what is none of the known errors."""
    from huggingface_hub import utils as hub
    level = hub.logging.get_verbosity()
    hub.logging.set_verbosity_error()
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
    except (OSError, ValueError, *hub.HfHubHTTPError.__bases__) as err:  # the last are errors of whichever HTTP library it uses
        raise click.ClickException(f'{ref}: {refusal}: {first_line(err)}') from None
    finally:
        hub.logging.set_verbosity(level)

