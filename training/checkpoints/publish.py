# SPDX-License-Identifier: Apache-2.0
"""A network as a folder for other people: in this program's layout with what its run tells of it, on the Hub, or in diffusers' layout."""

import os
import re
import shutil

from dnnlib import UserError, hub
from dnnlib.files import new_folder, read_json
from training.checkpoints import diffusers
from training.checkpoints.card import PUBLIC, model_card
from training.checkpoints.load import load_network
from training.checkpoints.save import write_files

SAMPLES = 'samples.png'


def export(ref, dest, weights='ema', format='folder'):
    """Writes the network that `ref` names as the new folder `dest`: "folder" (config.json + model.safetensors) or "diffusers"."""
    with new_folder(dest) as part:
        net = load_network(ref, weights=weights)
        if format == 'diffusers':
            diffusers.write_diffusers(net, part)
        else:
            fill(part, net, ref)


def fill(folder, net, ref, metrics=(), samples=None):
    """Fills an empty folder with a network, a model card and, where the run has one, a picture of samples.

    metrics: paths of results of eval_fid.py, samples: path of a PNG, both besides what lies by the network. Returns what was found."""
    found = beside(ref)
    metrics = [*dict.fromkeys(os.path.abspath(path) for path in (*found['metrics'], *metrics))]
    samples = samples or found['samples']
    card = model_card(net.config, found['options'], found['kimg'], [read_result(path) for path in metrics],
                      SAMPLES if samples else None)
    write_files(net, folder, card)
    if samples:
        shutil.copyfile(samples, os.path.join(folder, SAMPLES))
    return {**found, 'metrics': metrics, 'samples': samples}


def beside(ref):
    """What a run's folder tells of its snapshot or state `ref`: options, kimg, metrics (*.fid.json) and samples (samples-KIMG.png)."""
    found = {'options': {}, 'kimg': None, 'metrics': [], 'samples': None}
    if not os.path.exists(ref):
        return found
    folder, name = os.path.split(os.path.abspath(ref))
    number = re.fullmatch(r'(?:network-snapshot|training-state)-([\d.]+?)(?:\.pt)?', name)
    if not number:
        return found
    options = os.path.join(folder, 'options.json')
    found['options'] = read_options(options) if os.path.isfile(options) else {}
    found['kimg'] = float(number[1])
    found['metrics'] = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith('.fid.json'))
    samples = os.path.join(folder, f'samples-{number[1]}.png')
    found['samples'] = samples if os.path.isfile(samples) else None
    return found


def read_options(path):
    """What options.json of a run holds. Raises UserError where the parts that a card tells of are not objects."""
    found = read_json(path)
    for key, names in PUBLIC.items():
        if names is not None and not isinstance(found.get(key, {}), dict):
            raise UserError(f'{path}: not the options of a run: "{key}" must be an object, got {type(found[key]).__name__}')
    return found


def read_result(path):
    """What a JSON file of eval_fid.py holds. Raises UserError where what a card quotes is of another type."""
    found = read_json(path)
    parts = {'': (found, {'num_images': int})}
    for key, kinds in (('reference', {'num_images': int, 'split': str, 'sha256': str}), ('detector', {'name': str})):
        part = found.get(key)
        if part is not None and not isinstance(part, dict):
            raise UserError(f'{path}: not a result of eval_fid.py: "{key}" must be an object, got {type(part).__name__}')
        parts[f'{key}.'] = part or {}, kinds
    for where, (part, kinds) in parts.items():
        for key, kind in kinds.items():
            if part.get(key) is not None and (not isinstance(part[key], kind) or isinstance(part[key], bool)):
                raise UserError(f'{path}: not a result of eval_fid.py: "{where}{key}" must be {kind.__name__}, '
                                f'got {type(part[key]).__name__}')
    return found


def push(folder, name, private=False, revision=None):
    """Uploads a folder as the repository owner/name of the Hub, made where there is none; returns the address of the commit."""
    import huggingface_hub  # slow to import, and needed for the Hub alone

    if not hub.NAME.fullmatch(name) or '@' in name:
        raise UserError(f'{name}: a repository is called owner/name; its branch goes into --revision')
    api = huggingface_hub.HfApi()
    refusal = 'the Hugging Face Hub refuses (does the token of HF_TOKEN or "hf auth login" allow writing?)'
    with hub.hub_errors(name, revision, refusal):
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message='Upload network')
    return str(done.commit_url)
