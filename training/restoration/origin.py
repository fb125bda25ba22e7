# SPDX-License-Identifier: Apache-2.0
"""What the options of a network's run, options.json beside its snapshots, say about the levels that it was trained at."""

import os

from dnnlib import UserError
from dnnlib.files import read_json


def untrained_below(ref: str | os.PathLike) -> float | None:
    """The level below which a network was never trained: sigma_n of a run on images that all had noise of that level, without a loss
    below it, from random weights; None where its options say otherwise, or there are none."""
    folder = os.path.dirname(os.path.abspath(ref))
    try:
        options = read_json(os.path.join(folder, 'options.json'))
        corruption, terms = options['corruption'], options['objective']['terms']
        sigma, probability, transfer = float(corruption['sigma']), float(corruption['probability']), options['network']['transfer']
    except (UserError, KeyError, TypeError, ValueError):
        return None
    only_ambient = isinstance(terms, list) and all(str(term).partition(':')[0] == 'denoise' for term in terms)
    return sigma if sigma > 0 and probability == 1 and only_ambient and not transfer else None


def warning(ref: str | os.PathLike, least: float, samples: int) -> str | None:
    """One line about levels that are used and were not trained; least: the lowest level of an image, above 0."""
    floor = untrained_below(ref)
    told = f'the network was trained on noisy images alone, and never below sigma = {floor:g}' if floor else ''
    if floor and samples:
        return (f'{told}: posterior samples go below it, where its estimates are a guess; E[x_0 | y] of images at that level (without '
                '--samples) is trained')
    if floor and least < floor * (1 - 1e-6):
        return f'{told}; some images are at {least:g}'
    return None
