# SPDX-License-Identifier: Apache-2.0
"""The README.md of a network's folder: what it makes, how it was trained, how good it is, how to use it."""

import json


def model_card(options, kimg=None):
    """Markdown for a network's folder: what it makes, how it was trained, how to use it.

    options: a run's options, of which "network" is needed. kimg: thousands of images that it was trained on."""
    config = options['network']
    size = config['img_resolution']
    height, width = (size, size) if isinstance(size, int) else size
    rows = {'Images': f'{config["img_channels"]} x {height} x {width}',
            'Classes': config.get('label_dim') or 'none (unconditional)',
            'Architecture': config.get('model_type', 'that of its preconditioner'),
            'Preconditioning': config.get('precond', 'edm')}
    if kimg is not None:
        rows['Trained on'] = f'{kimg:g} thousand images'
    told = {key: options[key] for key in CARD_OPTIONS if key in options}
    training = f'Training options:\n\n```json\n{json.dumps(told, indent=2)}\n```\n' if told else ''
    return CARD_TEXT.format(table='\n'.join(f'| {name} | {value} |' for name, value in rows.items()), training=training)


CARD_OPTIONS = ('objective', 'corruption', 'augment', 'batch', 'optimizer', 'ema', 'precision', 'seed')  # no paths: it is public
CARD_TEXT = """---
tags:
- diffusion
- edm
---
# Diffusion model

A denoiser D(x; sigma) = E[x_0 | x_0 + sigma n = x], and with it a generator of images.

| | |
|-|-|
{table}

Images from it, with this folder or its Hugging Face name as NAME:

    python generate.py --network=NAME --outdir=out --seeds=0-63

In Python, with x a noisy batch [N,C,H,W] in network units and sigma its noise level:

    from training.hub import load_network
    net = load_network('NAME')
    denoised = net(x, sigma)

{training}"""
