# SPDX-License-Identifier: Apache-2.0
"""Publishing networks: as a folder with a model card, in this program's or in diffusers' layout, and on the Hugging Face Hub."""

import os
import re
import shutil
from collections.abc import Iterable

import torch

from dnnlib import UserError, hub
from dnnlib.files import new_folder, read_json
from metrics.results import network_digest, origin, read_result
from torch_utils import misc
from training.checkpoints import diffusers
from training.checkpoints.card import PUBLIC, model_card
from training.checkpoints.load import load_network
from training.checkpoints.save import write_files

SAMPLES = 'samples.png'


def export(ref: str | os.PathLike, dest: str | os.PathLike, weights: str = 'ema', format: str = 'folder') -> dict | None:
    """Writes the network that `ref` names as the new folder `dest`: "folder" (config.json + model.safetensors) or "diffusers".

    Returns the result of fill(); None for diffusers."""
    with new_folder(dest) as part:
        net = load_network(ref, weights=weights)
        if format == 'diffusers':
            diffusers.write_diffusers(net, part)
            return None
        return fill(part, net, ref)


def fill(folder: str | os.PathLike, net: torch.nn.Module, ref: str | os.PathLike, metrics: Iterable[str] = (), samples: str | None = None,
         license: str = 'unknown', code: str | None = None) -> dict:
    """Fills an empty folder with a network, a model card and, where the run has one, a picture of samples.

    metrics: paths of results of eval_fid.py, samples: path of a PNG, both in addition to what is found beside the network; license, code:
    see model_card. Only results of this very network are quoted. Returns what was found, with "left_out": a line for each result beside
    the network that belongs to another one. Raises UserError where one of `metrics` does."""
    found, digest = beside(ref), misc.state_digest(net)
    given, left_out, quoted = {os.path.abspath(path): path for path in metrics}, [], {}
    for path in dict.fromkeys([*found['metrics'], *given]):
        result = read_result(path)
        if why := _not_of(result, digest):
            if path in given:
                raise UserError(f'--metrics={given[path]}: {why}, and a model card quotes only results of its own network; leave it out')
            left_out.append(f'{path}: {why}')
        else:
            quoted[path] = result
    samples = samples or found['samples']
    card = model_card(net.config, found['options'], found['kimg'], quoted.values(), SAMPLES if samples else None, license, code)
    write_files(net, folder, card)
    if samples:
        shutil.copyfile(samples, os.path.join(folder, SAMPLES))
    return {**found, 'metrics': [*quoted], 'left_out': left_out, 'samples': samples}


def _not_of(result, digest):
    """Why a result does not belong to the network with this digest; None where it does."""
    recorded = network_digest(result)
    if recorded is None:
        return 'does not say which network generated its images'
    if recorded == digest:
        return None
    return f'is of another network, {origin(result).get("network")} (sha256 {recorded[:12]}, here {digest[:12]})'


def beside(ref: str | os.PathLike) -> dict:
    """What a run's folder holds about its snapshot or state `ref`: options, kimg, metrics (*.fid.json) and samples (samples-KIMG.png)."""
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


def read_options(path: str | os.PathLike) -> dict:
    """The content of a run's options.json. Raises UserError where a part that a model card shows is not an object."""
    found = read_json(path)
    for key, names in PUBLIC.items():
        if names is not None and not isinstance(found.get(key, {}), dict):
            raise UserError(f'{path}: not the options of a run: "{key}" must be an object, got {type(found[key]).__name__}')
    return found


def push(folder: str | os.PathLike, name: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads a folder as the repository owner/name of the Hub, which is created if necessary; returns the URL of the commit."""
    import huggingface_hub  # slow to import, and needed for the Hub alone

    if not hub.NAME.fullmatch(name) or '@' in name:
        raise UserError(f'{name}: a repository is named owner/name; give a branch with --revision')
    api = huggingface_hub.HfApi()
    refusal = 'the Hugging Face Hub refuses the upload (does the token of HF_TOKEN or "hf auth login" allow writing?)'
    with hub.hub_errors(name, revision, refusal):
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, revision=revision, commit_message='Upload network')
    return str(done.commit_url)
