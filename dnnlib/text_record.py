# SPDX-License-Identifier: Apache-2.0
"""The record of how captions became labels: `text` in dataset.json and in a network's config.json, an object of JSON types.

encoder: reference of the text encoder. sha256: digest of its files. pooling: how one vector is made of a caption, or "tokens".
normalised: whether rows have norm 1. dim: width of a vector. length: tokens that a caption is cut or padded to. tokens: how many vectors
a label consists of, one per token; null for one pooled vector."""

import re
from typing import Any

KINDS = {'encoder': (str,), 'sha256': (str,), 'pooling': (str,), 'normalised': (bool,), 'dim': (int,), 'length': (int,),
         'tokens': (int, type(None))}
EXAMPLE = 'as dataset_tool.py captions writes it'


def checked(found: Any) -> dict:
    """The record with its own keys alone. Raises ValueError, without a subject, for anything else."""
    if not isinstance(found, dict):
        raise ValueError(f'must be an object, {EXAMPLE}')
    for key, kinds in KINDS.items():
        value = found.get(key)
        if key not in found and key != 'tokens' or type(value) not in kinds or isinstance(value, int) and not 0 <= value < 2 ** 31:
            raise ValueError(f'lacks "{key}", or has an impossible one, {EXAMPLE}')
    if not re.fullmatch('[0-9a-f]{64}', found['sha256']) or found['dim'] < 1 or found.get('tokens') == 0:
        raise ValueError(f'has an impossible "sha256", "dim" or "tokens", {EXAMPLE}')
    return {key: found.get(key) for key in KINDS}


def label_dim(record: dict) -> int:
    """The width of the labels that a record describes."""
    return record['dim'] * (record['tokens'] or 1)


def difference(one: dict | None, other: dict | None) -> str | None:
    """What keeps labels of two records from meaning the same, as text; None where they do. None for labels that are no captions."""
    if one is None or other is None:
        return None if one is other else 'captions on one side, and labels of another kind on the other'
    words = {'sha256': 'text encoder', 'pooling': 'pooling', 'normalised': 'normalisation', 'dim': 'width', 'length': 'length',
             'tokens': 'number of tokens'}
    key = next((key for key in words if one[key] != other[key]), None)
    shown = lambda record: f'{record["encoder"]} ({record["sha256"][:8]})' if key == 'sha256' else str(record[key]).lower()
    return key and f'another {words[key]}: {shown(one)}, and {shown(other)}'
