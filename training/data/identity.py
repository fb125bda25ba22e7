# SPDX-License-Identifier: Apache-2.0
"""The same data on every rank, and the same data as before: known by their fingerprint, wherever they lie."""

import socket

from dnnlib import UserError
from dnnlib.fingerprint import data_differences
from torch_utils import distributed


def open_everywhere(openers):
    """([data set, ...], [fingerprint, ...]) of {what errors call it: function that opens it}; every rank calls this, once.

    Refused on all ranks alike, in one line, where one of them cannot open its data, or sees other data than rank 0."""
    opened, told = [], []
    try:
        for open_one in openers.values():
            opened.append(open_one())
            told.append(opened[-1].fingerprint())
        error = None
    except (UserError, OSError) as err:
        error = str(err)
    ranks = distributed.all_values((socket.gethostname(), told, error))
    errors = [(rank, host, text) for rank, (host, _, text) in enumerate(ranks) if text is not None]
    if errors:
        rank, host, text = errors[0]
        where = '' if len({text for *_, text in errors}) == 1 and len(errors) == len(ranks) else f' (rank {rank} on {host})'
        raise UserError(text + where)
    (first, base, _), *others = ranks
    for rank, (host, prints, _) in enumerate(others, 1):
        for name, old, new in zip(openers, base, prints):
            if found := data_differences(old, new):
                raise UserError(f'{name}: rank {rank} on {host} sees other data than rank 0 on {first}: {"; ".join(found)}')
    return opened, told


def check_same(name, fingerprint, dataset):
    """Refuses a data set that is not that of a fingerprint (None: any); name: what errors call it. Returns the data set."""
    if fingerprint is not None and (found := data_differences(fingerprint, dataset.fingerprint())):
        raise UserError(f'{name}: its data changed after the run was set up: {"; ".join(found)}')
    return dataset
