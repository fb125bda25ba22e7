# SPDX-License-Identifier: Apache-2.0
"""Published weights without a configuration: plain state dicts of a network F, which its class recognises by their names and shapes."""

from typing import Any

import torch

from dnnlib import UserError, one_line
from torch_utils import registry
from training.networks.interface import ARCHS, Network
from training.networks.preconditioning import published_levels

PREFIX = 'model.'  # of F in the state dict of a preconditioner
LATENTS, TEXT_LATENTS = 0.18215, 0.23010  # factors of latents of Stable Diffusion's autoencoder, the latter in U-ViT's text models
AUTOENCODER = {'ref': 'stabilityai/sd-vae-ft-mse', 'range': '-1..1'}  # DiT's; the decoders of that family fit the same latents
LABEL_DROPOUT = 0.1  # assumed of classes with a row for "no label", which the weights do not show; only training depends on it


def select(root: Any) -> Any:
    """What is read of a torch.save file: of a training checkpoint {"model", "ema", "opt", "args"}, as DiT's are, the weights alone."""
    if isinstance(root, dict) and {'model', 'ema'} <= root.keys():
        return {'model': root['model'], 'ema': root['ema']}
    return root


def network(found: Any, weights: str = 'ema') -> tuple[dict, dict]:
    """(config, state dict of F) of what select() leaves of a file.

    weights: ema or raw of a training checkpoint; other files hold one set, "ema". Raises UserError, which says what was found and what is
    read, for other weights and for those that no network's class recognises."""
    sets = {'ema': found}
    if isinstance(found, dict) and found.keys() == {'model', 'ema'}:
        sets = {'ema': found['ema'], 'raw': found['model']}
    if weights not in sets:
        raise UserError(f'holds no {weights} weights, but published ones; use --weights={" or --weights=".join(sets)}')
    state = sets[weights]
    if not _is_state_dict(state):
        raise UserError('not a training state (lacks options, net or ema), and no state dict of published weights (name: tensor)')
    if any(key.startswith(PREFIX) for key in state):
        raise UserError('not a training state (lacks options, net or ema), but weights without their config.json; give the snapshot folder '
                        'that holds both')
    for kind in _readers():
        try:
            config = kind.published(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as err:  # tensors of odd shapes
            raise UserError(f'weights like those of {kind.__name__}, but not the published ones: {one_line(err)}') from None
        if config is not None:
            return {'model_type': kind.__name__, **_assumed(kind, config), **config}, state
    names = ', '.join(f'{ascii(name[:60])[1:-1]} {list(tensor.shape)}' for name, tensor in list(state.items())[:3])
    raise UserError(f'not a training state (lacks options, net or ema), but {len(state)} tensors ({names}, ...); those read without a '
                    f'config.json are published weights of {", ".join(kind.__name__ for kind in _readers())}')


def complete(config: dict, state: dict) -> dict:
    """The state dict of a preconditioner, from that of its network F alone; another one is returned as it is."""
    if not state or any(key.startswith(PREFIX) for key in state):
        return state
    levels = {}
    if config.get('precond') == 'iddpm' and config.get('diffusion') is None:
        levels['u'] = published_levels(**{key: config[key] for key in ('M', 'C_1', 'C_2') if key in config}).float()
    return {**{PREFIX + key: value for key, value in state.items()}, **levels}


def _assumed(kind, config):
    """What neither weights nor their class tell: whether labels were dropped; of networks of four channels, which make latents, the units
    and the autoencoder, so that they are not taken for 8-bit images, and are decoded."""
    droppable = config.get('label_dim') and config.get('null_label', True) and 'label_dropout' in registry.parameters(kind)
    units = {'offset': 0.0, 'scale': 1 / (TEXT_LATENTS if config.get('clip_dim') else LATENTS)}
    return {**({'label_dropout': LABEL_DROPOUT} if droppable else {}),
            **({'units': units, 'autoencoder': AUTOENCODER} if config.get('img_channels') == 4 else {})}


def _is_state_dict(state):
    return isinstance(state, dict) and bool(state) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) and not value.is_complex() for key, value in state.items())


def _readers():
    """The network classes that recognise published weights."""
    kinds = dict.fromkeys(arch.network for arch in ARCHS.values())
    return [kind for kind in kinds if kind.published.__func__ is not Network.published.__func__]
