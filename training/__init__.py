# SPDX-License-Identifier: Apache-2.0
"""What notebooks want first: from training import load_network, save_network, generate_images."""

import importlib

EXPORTS = {'load_network': 'training.checkpoints.load', 'save_network': 'training.checkpoints.save',
           'generate_images': 'training.sampling.generate'}
__all__ = list(EXPORTS)


def __getattr__(name):
    """The function of that name, whose module is loaded when it is first asked for (PEP 562)."""
    if name not in EXPORTS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(EXPORTS[name]), name)


def __dir__():
    return [*globals(), *EXPORTS]
