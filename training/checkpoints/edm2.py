# SPDX-License-Identifier: Apache-2.0
"""EDM2's published networks (edm2-*.pkl), as their pickles describe them, in this program's terms."""

from dnnlib import UserError
from torch_utils.legacy_pickle import Snapshot
from torch_utils.pickle_machine import MAX_NAME

PRECOND = 'Precond'  # the published class of the whole network
SAMPLING = {'sampler': 'heun', 'steps': 32}  # as in all published results
ENCODERS = ('StabilityVAEEncoder', 'StandardRGBEncoder')
SMALL = 1e-30  # constants of an encoder lie between this and its inverse


def convert(snapshot: Snapshot) -> tuple[dict, dict]:
    """(config, state dict) of a snapshot of the class PRECOND. u(sigma), which only the loss uses, is left out.

    A network on latents has the encoder's constants as "units", (z - offset) / scale of the autoencoder's own latents z, and names the
    autoencoder. Raises UserError."""
    arguments = {key: value for key, value in snapshot.arguments.items() if key != 'logvar_channels'}
    config = {'use_fp16': True, **arguments, 'model_type': 'EDM2UNet', 'sampling': SAMPLING}
    if config.get('clip_act', 0) is None:
        config['clip_act'] = 0  # off
    found = latents(snapshot.encoder)
    if found and len(found['units']['scale']) == config.get('img_channels'):
        config |= found
    state = {key.replace('unet.', 'model.', 1) if key.startswith('unet.') else key: value for key, value in snapshot.state.items()
             if not key.startswith('logvar_')}
    return config, state


def latents(encoder: dict | None) -> dict | None:
    """{"units": {"offset", "scale"} per channel, "autoencoder": {"ref", "range"}} of an encoder; None for pixels in [-1, 1].

    The network sees z * scale + bias of the encoder, in float32. Raises UserError for encoders of other classes, and damaged ones."""
    if encoder is None or encoder['class_name'] == ENCODERS[1]:
        return None
    if encoder['class_name'] != ENCODERS[0]:
        raise UserError(f'holds an encoder of the class {ascii(encoder["class_name"])}; those read are {", ".join(ENCODERS)}')
    scale, bias, ref = (encoder.get(key) for key in ('scale', 'bias', 'vae_name'))
    if not (_numbers(scale) and _numbers(bias) and len(scale) == len(bias) and all(abs(value) > SMALL for value in scale)):
        raise UserError(f'holds a {ENCODERS[0]} whose scale and bias are not numbers, one for each channel')
    if not (isinstance(ref, str) and ref.isprintable() and 0 < len(ref) <= MAX_NAME):
        raise UserError(f'holds a {ENCODERS[0]} without the name of its autoencoder')
    digits = lambda value: float(f'{value:.7g}')  # all that float32 holds: 8.34, not 8.340000023
    units = {'offset': [digits(-b / s) for s, b in zip(scale, bias)], 'scale': [digits(1 / s) for s in scale]}
    return {'units': units, 'autoencoder': {'ref': ref, 'range': '0..1'}}


def _numbers(values):
    return isinstance(values, list) and len(values) > 0 and all(type(value) in (int, float) and abs(value) < 1 / SMALL for value in values)
