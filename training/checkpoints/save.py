# SPDX-License-Identifier: Apache-2.0
"""A network as a folder of config.json + model.safetensors + README.md."""

import json
import math
import os
import shutil
import uuid

import safetensors.torch
import torch

from training.checkpoints.card import model_card
from training.checkpoints.load import CONFIG, WEIGHTS

CARD = 'README.md'


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
        f.write(card or model_card(net.config))


def _portable(value):
    """A tensor of its own memory on the CPU, float32 where it is floating point."""
    value = value.detach().to('cpu', torch.float32 if value.is_floating_point() else value.dtype)
    return value.contiguous().clone()


def _finite(config):
    """The config without infinities and nan, which JSON does not have; a network's defaults stand in for them."""
    return {key: value for key, value in config.items() if not (isinstance(value, float) and not math.isfinite(value))}
