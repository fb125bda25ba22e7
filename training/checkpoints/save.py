# SPDX-License-Identifier: Apache-2.0
"""A network as a folder of config.json + model.safetensors + README.md."""

import json
import os

import safetensors.torch
import torch

from dnnlib.files import new_folder, write_json
from training.checkpoints.card import model_card
from training.checkpoints.load import CONFIG, STATISTICS, WEIGHTS

CARD = 'README.md'


def save_network(net, folder, card=None):
    """Writes a folder ready for the Hub: config.json (net.config), model.safetensors (float32), README.md.

    card: Markdown to put in the model card in place of the default text. The folder appears whole; one that exists is replaced."""
    with new_folder(folder, over='anything') as part:
        write_files(net, part, card)


def write_files(net, folder, card=None):
    """Fills an empty folder with the three files of save_network.

    Statistics of the training data, net.data_statistics, are metadata of the weights: config.json has arguments of a constructor only."""
    state = {key: _portable(value) for key, value in net.state_dict().items()}
    statistics = getattr(net, 'data_statistics', None)
    metadata = {'format': 'pt'} | ({STATISTICS: json.dumps(statistics, allow_nan=False)} if statistics else {})
    with open(os.path.join(folder, WEIGHTS), 'wb') as f:
        f.write(safetensors.torch.save(state, metadata=metadata))
    write_json(os.path.join(folder, CONFIG), net.config)
    with open(os.path.join(folder, CARD), 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(card or model_card(net.config))


def _portable(value):
    """A tensor of its own memory on the CPU, float32 where it is floating point."""
    value = value.detach().to('cpu', torch.float32 if value.is_floating_point() else value.dtype)
    return value.contiguous().clone()
