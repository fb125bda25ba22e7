# SPDX-License-Identifier: Apache-2.0
"""The model card of a network's folder, its README.md."""

import json
import os
import re
from collections.abc import Iterable

from dnnlib import UserError
from metrics import table
from metrics.report import number
from metrics.results import origin, values
from torch_utils import misc

PROGRAM = 'ambient-trainer'
QUOTED = ('sampler', 'evaluations', 'guidance', 'weights', 'images', 'detector', 'reference')  # what stands beside each number
# Names that the Hub knows as licences; it takes others as "other" with a name.
LICENCES = ('afl-3.0', 'agpl-3.0', 'apache-2.0', 'artistic-2.0', 'bigscience-openrail-m', 'bsd-2-clause', 'bsd-3-clause', 'bsl-1.0', 'cc',
            'cc-by-2.0', 'cc-by-3.0', 'cc-by-4.0', 'cc-by-nc-2.0', 'cc-by-nc-3.0', 'cc-by-nc-4.0', 'cc-by-nc-nd-4.0', 'cc-by-nc-sa-4.0',
            'cc-by-nd-4.0', 'cc-by-sa-3.0', 'cc-by-sa-4.0', 'cc0-1.0', 'creativeml-openrail-m', 'gpl-2.0', 'gpl-3.0', 'lgpl-2.1',
            'lgpl-3.0', 'mit', 'mpl-2.0', 'openrail', 'unknown', 'unlicense', 'wtfpl', 'zlib')


def model_card(config: dict, options: dict | None = None, kimg: float | None = None, metrics: Iterable[dict] = (),
               samples: str | None = None, license: str = 'unknown', code: str | None = None) -> str:
    """Markdown for a network's folder: what the network generates, how it was trained, its metrics, and how to use it.

    config: of the network. options: a run's options.json, if known. kimg: thousands of images that it was trained on.
    metrics: results of eval_fid.py, as read from their JSON files. samples: name of a picture in the folder. license: of the weights, a
    name that the Hub knows or another one. code: URL of the program's code. Raises UserError for a licence that is not a name."""
    height, width = misc.height_width(config['img_resolution'])
    rows = {'Images': f'{config["img_channels"]} x {height} x {width}',
            **_conditions(config),
            'Architecture': config.get('model_type', 'default of its preconditioner'),
            'Preconditioning': config.get('precond', 'edm')}
    if autoencoder := config.get('autoencoder'):
        rows['Latents of'] = _autoencoder_words(autoencoder)
    if kimg is not None:
        rows['Trained on'] = f'{kimg:g} thousand images'
    shown = public(options or {})
    training = f'Training options:\n\n```json\n{json.dumps(shown, indent=2)}\n```\n' if any(shown.values()) else ''
    picture = f'![Samples, one per seed, not selected]({samples})\n\n' if samples else ''
    program = f'{PROGRAM} {misc.VERSION}'
    return CARD_TEXT.format(
        **_use(config),
        license=_license_tag(license), prompt=' --prompt="a caption"' if config.get('text') else '',
        program=f'[{program}]({code})' if code else program, metrics=_metrics_table(metrics),
        table='\n'.join(f'| {name} | {value} |' for name, value in rows.items()), training=training, picture=picture)


def _use(config):
    """{"what": a sentence about what the network computes, "call": how it is called in Python}: a denoiser, or a generator where
    config.json samples it in one step from a level of its own, as train.py --distill writes it."""
    sampling = config.get('sampling')
    own = isinstance(sampling, dict) and sampling.get('steps') == 1
    found = re.fullmatch(r'explicit:sigmas=([\d.e+-]+)', str(sampling.get('levels'))) if own else None
    return {key: text.format(level=found and found[1]) for key, text in (GENERATOR if found else DENOISER).items()}


def _conditions(config):
    """The row of the table that says what the network's labels are."""
    text = config.get('text')
    if text:
        return {'Captions': f'{os.path.basename(text["encoder"].rstrip("/"))} ({text["pooling"]}, {text["sha256"][:8]})'}
    return {'Classes': config.get('label_dim') or 'none (unconditional)'}


def public(options: dict) -> dict:
    """The part of a run's options that PUBLIC names."""
    return {key: options[key] if names is None else {name: options[key][name] for name in names if name in options[key]}
            for key, names in PUBLIC.items() if key in options}


def _autoencoder_words(told):
    """The name on the Hub, where it has one, and the digest of the autoencoder whose latents a network makes."""
    name = 'an autoencoder of one machine' if os.path.isabs(told['ref']) else table.escaped(told['ref'])
    return name + (f', sha256 {told["sha256"][:12]}' if 'sha256' in told else '')


def _license_tag(name):
    """The licence in the form that the Hub accepts: one of its own names, or "other" with a name."""
    if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9.+-]{0,63}', name):
        raise UserError(f'--license={name}: expected the name of a licence such as apache-2.0, of letters, digits, dots and hyphens')
    return f'license: {name.lower()}' if name.lower() in LICENCES else f'license: other\nlicense_name: {name.lower()}'


def _metrics_table(metrics):
    """A table of all numbers with what they have to be quoted with; of the reference count, split and hash, but no path."""
    lines = []
    for result in metrics:
        reference, gnet = result.get('reference') or {}, origin(result).get('gnet_sha256')
        against = [f'{reference["num_images"]} images' if reference.get('num_images') else None,
                   f'split {reference["split"]}' if reference.get('split') else None,
                   f'sha256 {reference["sha256"][:12]}' if reference.get('sha256') else None]
        facts = {**table.quoted(result), 'reference': ', '.join(filter(None, against)) or table.NONE,
                 'guidance': table.guidance_words(origin(result), gnet and f'a network of sha256 {gnet[:12]}') or table.NONE}
        cells = ' | '.join(table.escaped(facts[column]) for column in QUOTED)
        lines += [f'| {table.escaped(name)} | {number(value)} | {cells} |' for name, value in values(result).items() if value is not None]
    head = f'| metric | value | {" | ".join(QUOTED)} |\n|-|-|{"-|" * len(QUOTED)}\n'
    return head + '\n'.join(lines) + '\n\n' if lines else ''


# The options of a run that a public card shows: no paths. The last line is for runs of version 0.1.0, whose options were flat.
PUBLIC = {'data': ('use_labels', 'keep', 'xflip', 'augment'), 'corruption': None, 'objective': None, 'optimizer': None,
          'run': ('batch', 'precision', 'seed'),
          'augment': None, 'batch': None, 'ema': None, 'precision': None, 'seed': None}
DENOISER = {'what': 'A denoiser D(x; sigma) = E[x_0 | x_0 + sigma n = x], from which images can be sampled.',
            'call': """In Python, with a noisy batch x [N,C,H,W] in network units and its noise level sigma:

    from training import load_network
    net = load_network('NAME')
    denoised = net(x, sigma)"""}
GENERATOR = {'what': 'A generator of one step, distilled from a denoiser: the image of white noise z is G(z) = D({level} z; {level}).',
             'call': """In Python, with white noise z [N,C,H,W]:

    from training import load_network
    net = load_network('NAME')
    images = net({level} * z, {level})"""}
CARD_TEXT = """---
{license}
tags:
- diffusion
- edm
---
# Diffusion model

{what}

{picture}| | |
|-|-|
{table}

{metrics}To generate images, with this folder or its Hugging Face name as NAME:

    python generate.py --network=NAME --outdir=out --seeds=0-63{prompt}

{call}

Made with {program}.

{training}"""
