# SPDX-License-Identifier: Apache-2.0
"""The README.md of a network's folder: what it makes, how it was trained, how good it is, how to use it."""

import json

from torch_utils import misc


def model_card(config, options=None, kimg=None, metrics=(), samples=None):
    """Markdown for a network's folder: what it makes, how it was trained, how good it is, how to use it.

    config: of the network. options: a run's options.json, where it is known. kimg: thousands of images that it was trained on.
    metrics: results of eval_fid.py, as read from their JSON files. samples: name of a picture in the folder."""
    height, width = misc.height_width(config['img_resolution'])
    rows = {'Images': f'{config["img_channels"]} x {height} x {width}',
            'Classes': config.get('label_dim') or 'none (unconditional)',
            'Architecture': config.get('model_type', 'that of its preconditioner'),
            'Preconditioning': config.get('precond', 'edm')}
    if kimg is not None:
        rows['Trained on'] = f'{kimg:g} thousand images'
    told = public(options or {})
    training = f'Training options:\n\n```json\n{json.dumps(told, indent=2)}\n```\n' if any(told.values()) else ''
    picture = f'![Samples, one a seed, not chosen]({samples})\n\n' if samples else ''
    return CARD_TEXT.format(table='\n'.join(f'| {name} | {value} |' for name, value in rows.items()), training=training,
                            picture=picture, metrics=_metrics_table(metrics))


def public(options):
    """The part of a run's options that PUBLIC names."""
    return {key: options[key] if names is None else {name: options[key][name] for name in names if name in options[key]}
            for key, names in PUBLIC.items() if key in options}


def _metrics_table(metrics):
    """Each number with what it must be quoted with; of the reference its count, split and hash, and no path."""
    lines = []
    for result in metrics:
        reference, detector = result.get('reference') or {}, result.get('detector') or {}
        against = [f'{reference["num_images"]} images' if reference.get('num_images') else None,
                   f'split {reference["split"]}' if reference.get('split') else None,
                   f'sha256 {reference["sha256"][:12]}' if reference.get('sha256') else None]
        values = {key: value for key, value in result.items() if isinstance(value, float) and not isinstance(value, bool)}
        lines += [f'| {name} | {value:.4f} | {result.get("num_images")} | {detector.get("name")} | {", ".join(filter(None, against))} |'
                  for name, value in values.items()]
    head = '| metric | value | images | detector | reference |\n|-|-|-|-|-|\n'
    return head + '\n'.join(lines) + '\n\n' if lines else ''


# What a public card tells of a run, and no paths. The last line is of runs of version 0.1.0, whose options were flat.
PUBLIC = {'data': ('use_labels', 'keep', 'xflip', 'augment'), 'corruption': None, 'objective': None, 'optimizer': None,
          'run': ('batch', 'precision', 'seed'),
          'augment': None, 'batch': None, 'ema': None, 'precision': None, 'seed': None}
CARD_TEXT = """---
tags:
- diffusion
- edm
---
# Diffusion model

A denoiser D(x; sigma) = E[x_0 | x_0 + sigma n = x], and with it a generator of images.

{picture}| | |
|-|-|
{table}

{metrics}Images from it, with this folder or its Hugging Face name as NAME:

    python generate.py --network=NAME --outdir=out --seeds=0-63

In Python, with x a noisy batch [N,C,H,W] in network units and sigma its noise level:

    from training import load_network
    net = load_network('NAME')
    denoised = net(x, sigma)

{training}"""
