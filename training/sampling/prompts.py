# SPDX-License-Identifier: Apache-2.0
"""Prompts: captions to sample by, embedded by the text encoder that a network was trained with."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dnnlib import UserError, one_line, text_record
from torch_utils import distributed
from training.data import text
from training.sampling.labels import cycled


def pick(net: Callable, prompt: str, encoder: str | None = None, device: torch.device | str = 'cpu') -> Callable:
    """The source of labels for --prompt: seed s has caption s modulo their number. Every rank calls this; rank 0 alone embeds them.

    prompt: a caption, or a .txt file of captions, one per line. encoder: where the text encoder is, by default as the network's
    config.json says; another encoder than the network was trained with is refused. Raises UserError."""
    here = f'--prompt={prompt}'
    record = getattr(net, 'text', None)
    if record is None:
        what = f'has {net.label_dim} classes; give --class or --labels' if net.label_dim else 'is unconditional; leave the option out'
        raise UserError(f'{here}: the network was not trained on captions, it {what}')
    prompts = distributed.from_rank0(read, prompt)
    table = distributed.from_rank0(embed, record, prompts, encoder or record['encoder'], device)
    source = cycled(torch.from_numpy(table), prompts)
    source.text = record
    return source


def read(prompt: str) -> list[str]:
    """The captions of --prompt: the text itself, or the lines of a .txt file, where an empty one is the empty caption. Raises UserError."""
    if not prompt.lower().endswith('.txt'):
        return [prompt]
    if not os.path.isfile(prompt):
        raise UserError(f'--prompt={prompt}: no such file; a caption does not end in .txt')
    try:
        lines = Path(prompt).read_text('utf-8-sig').splitlines()
    except (OSError, ValueError) as err:
        raise UserError(f'--prompt={prompt}: cannot be read as text: {one_line(err)}') from None
    if not lines:
        raise UserError(f'--prompt={prompt}: is empty; give one caption per line')
    return [line.strip() for line in lines]


def embed(record: dict, prompts: list[str], encoder: str, device: torch.device | str) -> np.ndarray:
    """The labels of captions, float32 [n, label_dim], by the text encoder of a record; zeros for the empty caption. Raises UserError."""
    if not any(prompts):  # the network has the label of the empty caption
        return torch.zeros([len(prompts), text_record.label_dim(record)]).numpy()
    try:
        captions = text.open_captions(encoder, record['tokens'], device)
    except UserError as err:
        raise UserError(f'{err.message}; --text-encoder=REF says where the text encoder of --prompt is') from None
    if told := text_record.difference(record, captions.record):
        raise UserError(f'--text-encoder={encoder}: is not the one that the network was trained with: {told}')
    labels = captions(prompts)
    labels[[i for i, caption in enumerate(prompts) if not caption]] = 0
    return labels
