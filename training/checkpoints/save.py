# SPDX-License-Identifier: Apache-2.0
"""Saving a network as a folder of config.json + model.safetensors + README.md."""

import json
import os

import safetensors.torch
import torch

from dnnlib.files import new_folder, write_json
from training.checkpoints.card import model_card
from training.checkpoints.load import CONFIG, STATISTICS, WEIGHTS

CARD = 'README.md'


def save_network(net: torch.nn.Module, folder: str | os.PathLike, card: str | None = None) -> None:
    """Writes a folder ready for the Hub: config.json (net.config), model.safetensors (float32, but float16 scalars as they are), README.md.

    card: Markdown of the model card, in place of the default text. The folder appears complete or not at all; an existing one is
    replaced."""
    with new_folder(folder, over='anything') as part:
        write_files(net, part, card)


def write_files(net: torch.nn.Module, folder: str | os.PathLike, card: str | None = None) -> None:
    """Fills an empty folder with the three files of save_network.

    config.json holds constructor arguments, and the precision of the training, net.precision, if that was not fp32. Statistics of the
    training data, net.data_statistics, become metadata of the weights."""
    state = {key: _portable(value) for key, value in net.state_dict().items()}
    statistics = getattr(net, 'data_statistics', None)
    metadata = {'format': 'pt'} | ({STATISTICS: json.dumps(statistics, allow_nan=False)} if statistics else {})
    with open(os.path.join(folder, WEIGHTS), 'wb') as f:
        f.write(safetensors.torch.save(state, metadata=metadata))
    precision = getattr(net, 'precision', None)
    write_json(os.path.join(folder, CONFIG), net.config | ({'precision': precision} if precision else {}))
    with open(os.path.join(folder, CARD), 'w', encoding='utf-8', errors='backslashreplace') as f:
        f.write(card or model_card(net.config))


def _portable(value):
    """A copy of a tensor on the CPU, in float32 if it is floating point and no scalar in float16 (see load_network)."""
    kept = not value.is_floating_point() or value.dtype == torch.float16 and not value.ndim
    value = value.detach().to('cpu', value.dtype if kept else torch.float32)
    return value.contiguous().clone()
