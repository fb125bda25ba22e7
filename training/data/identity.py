# SPDX-License-Identifier: Apache-2.0
"""Checks by fingerprint that all ranks see the same data, and the same data as before, whatever their path."""

import socket
from collections.abc import Callable

from dnnlib import UserError
from dnnlib.fingerprint import data_differences
from torch_utils import distributed
from training.data.dataset import ImageDataset


def open_everywhere(openers: dict[str, Callable]) -> tuple[list, list[dict]]:
    """([Form, ...], [fingerprint, ...]) of {name in errors: function that opens a data set}; every rank calls this, once.

    One rank of each node opens the data and informs the others. Raises UserError on all ranks, in one line, if one of them cannot open
    its data, or sees other data than rank 0."""
    told, error = [], None
    if distributed.local_rank() == 0:
        try:
            for open_one in openers.values():
                dataset = open_one()
                told.append((dataset.form, dataset.fingerprint()))
        except (UserError, OSError) as err:
            error = str(err)
    ranks = distributed.all_values((distributed.local_rank(), socket.gethostname(), told, error), what='opening the data')
    nodes = [(rank, *found) for rank, (local, *found) in enumerate(ranks) if local == 0]
    errors = [(rank, host, text) for rank, host, _, text in nodes if text is not None]
    if errors:
        rank, host, text = errors[0]
        where = '' if len({text for *_, text in errors}) == 1 and len(errors) == len(nodes) else f' (rank {rank} on {host})'
        raise UserError(text + where)
    (_, first, base, _), *others = nodes
    for rank, host, found, _ in others:
        for name, (_, old), (_, new) in zip(openers, base, found):
            if differences := data_differences(old, new):
                raise UserError(f'{name}: rank {rank} on {host} sees different data from rank 0 on {first}: {"; ".join(differences)}')
    return [form for form, _ in base], [fingerprint for _, fingerprint in base]


def check_same(name: str, fingerprint: dict | None, dataset: ImageDataset) -> ImageDataset:
    """Refuses a data set with another fingerprint (None: any); name: its name in errors. Returns the data set."""
    if fingerprint is not None and (found := data_differences(fingerprint, dataset.fingerprint())):
        raise UserError(f'{name}: its data changed after the run was set up: {"; ".join(found)}')
    return dataset
