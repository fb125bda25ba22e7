# SPDX-License-Identifier: Apache-2.0
"""Records of how images were generated: everything that their pixels depend on, to be saved, compared and quoted.

A record is a dict of JSON values that holds only what applies: no key of the sampler that has its default, no guidance interval
without guidance, no labels for unconditional networks."""

import hashlib
import math
from collections.abc import Callable

import torch

from dnnlib import EasyDict
from dnnlib.files import finite
from torch_utils import distributed, misc, registry
from training.diffusion import schedules
from training.sampling import steppers
from training.sampling.generate import ConditionedDenoiser, noise_levels
from training.sampling.guidance import Guidance, Guided
from training.sampling.labels import DATASET
from training.sampling.outputs import Output

# The keys that are compared between two records, because pixels depend on them, each with the option that sets it. Levels are compared as
# numbers, "sigmas", and labels without their path; device, threads, ranks, batch size and seeds are not compared.
DECIDES = {'sha256': '--network', 'gnet_sha256': '--gnet', 'sampler': '--sampler', 'steps': '--steps', 'sigmas': '--levels',
           'stop_sigma': '--stop-sigma', 'guidance': '--guidance', 'guidance_interval': '--guidance-interval',
           'guidance_channels': '--guidance-channels', 'labels': '--labels', 'precision': '--precision', 'compile': '--compile',
           'image_shape': '--network', 'units': '--network', 'autoencoder': '--decode', 'decoded': '--decode', 'format': '--format',
           'subdirs': '--subdirs'}


def describe(o: EasyDict, net: torch.nn.Module, pieces: dict, output: Output, digest: Callable = misc.state_digest) -> dict:
    """How a network is sampled: network, sha256, weights, gnet..., sampler, levels, steps, sigmas, evaluations, stop_sigma, guidance...,
    labels, precision, compile, image_shape, units, autoencoder, decoded.

    o: the options of training.sampling.options, with the network; net, pieces: what pieces.prepare() made of them; output: of outputs.py.
    digest(net): the digest of a network."""
    stepper, guidance = pieces['stepper'], pieces['guidance']
    sigmas = noise_levels(net, pieces['schedule'], pieces['num_steps'])
    total, of_guide = count_evaluations(net, stepper, sigmas, guidance)
    stop_sigma = stepper.keywords.get('stop_sigma') or 0.0
    led = guidance.weight != 1
    limited = led and guidance.interval != (0.0, math.inf)
    found = {
        'network': str(o.network), 'sha256': digest(net), 'weights': o.weights,
        **({'gnet': str(o.gnet), 'gnet_sha256': digest(guidance.net), 'gnet_weights': o.gnet_weights} if guidance.net else {}),
        'sampler': spec_of(o.sampler, stepper, steppers.STEPPERS), 'levels': spec_of(o.levels, pieces['schedule'], schedules.SCHEDULES),
        'steps': len(sigmas) - 1, 'sigmas': sigmas.tolist(), 'evaluations': total,
        **({'stop_sigma': stop_sigma} if stop_sigma > 0 else {}),
        'guidance': guidance.weight,
        **({'guide_evaluations': of_guide} if led else {}),
        **({'guidance_interval': list(guidance.interval)} if limited else {}),
        **({'guidance_channels': guidance.channels} if led and guidance.channels is not None else {}),
        **({'labels': describe_labels(o, pieces['labels'])} if net.label_dim else {}),
        'precision': precision(net), 'compile': bool(o.compile),
        **output.facts()}
    return finite(found)


def precision(net: torch.nn.Module) -> str:
    """Name of the dtype in which a network computes."""
    dtype = getattr(net, 'compute_dtype', torch.float32)
    return next((name for name, known in misc.DTYPES.items() if known == dtype), str(dtype).removeprefix('torch.'))


def spec_of(spec: str, piece: Callable, pieces: dict) -> str:
    """"name:key=value" of a piece with bound options, without defaults: the same text however the keys were given.

    stop_sigma, which all steppers have, is recorded separately."""
    name, defaults = registry.parse(spec)[0], registry.parameters(pieces[registry.parse(spec)[0]])
    keys = {key: _plain(value) for key, value in piece.keywords.items() if key != 'stop_sigma' and key in defaults}
    other = {key: keys[key] for key in defaults if key in keys and keys[key] != _plain(defaults[key])}
    return registry.unparse(name, other)


def _plain(value):
    """A key's value in a uniform notation: whole floats as integers, true and false, curves sigma(t) by name."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return next((name for name, kind in schedules.TIMES.items() if type(value) is kind), value)


def describe_prompts(prompt: str, source: Callable) -> dict:
    """Which captions, identified by the digest of their texts, and the digest of the text encoder.

    Not the digest of their embeddings, whose last bits differ between machines."""
    sha256 = hashlib.sha256('\n'.join(source.prompts).encode()).hexdigest()
    where = {'path': prompt} if prompt.lower().endswith('.txt') else {'prompt': prompt}
    return {'source': 'prompt', **where, 'prompts': len(source.prompts), 'sha256': sha256, 'encoder': source.text['encoder'],
            'encoder_sha256': source.text['sha256']}


def describe_labels(o: EasyDict, source: Callable | None) -> dict:
    """Where the labels come from; a table is identified by its digest."""
    if o.class_idx is not None:
        return {'source': 'class', 'class': o.class_idx}
    if o.get('prompt') is not None:
        return describe_prompts(o.prompt, source)
    table = getattr(source, 'table', None)
    if table is None:
        return {'source': 'uniform'}
    sha256 = hashlib.sha256(f'{table.dtype} {list(table.shape)}'.encode() + table.numpy().tobytes()).hexdigest()
    of_dataset = o.labels.startswith(DATASET)
    return {'source': 'dataset' if of_dataset else 'file', 'path': o.labels.removeprefix(DATASET), 'sha256': sha256}


class _Counter:
    """A denoiser that returns zeros and counts its calls."""

    gives_variance = True

    def __init__(self, round_sigma):
        self.calls, self.round_sigma = 0, round_sigma

    def __call__(self, x, sigma):
        self.calls += 1
        return torch.zeros_like(x)

    def outputs(self, x, sigma):
        return self(x, sigma), torch.zeros_like(x)


def count_evaluations(net: torch.nn.Module, stepper: Callable, sigmas: torch.Tensor, guidance: Guidance) -> tuple[int, int]:
    """(network evaluations per image, how many of them are D_0's), counted by sampling with a denoiser that returns zeros."""
    denoise, guide = (_Counter(ConditionedDenoiser(net).round_sigma) for _ in range(2))
    led = Guided(denoise, guide, guidance.weight, guidance.interval)
    with torch.no_grad():
        stepper(led, torch.zeros([1, 1, 1, 1], dtype=torch.float64), sigmas, torch.zeros_like)
    return denoise.calls + guide.calls, guide.calls


def machine(device: torch.device | str) -> dict:
    """What something was computed on: device, GPU and its TF32 settings, CPU threads, ranks, versions."""
    device = torch.device(device)
    on_gpu = {}
    if device.type == 'cuda':
        on_gpu = {'gpu': torch.cuda.get_device_name(device),
                  'tf32': {'matmul': torch.backends.cuda.matmul.allow_tf32, 'convolutions': torch.backends.cudnn.allow_tf32}}
    return {'device': device.type, **on_gpu, 'threads': torch.get_num_threads(),
            'ranks': distributed.size(), 'versions': misc.versions()}


def differences(old: dict, new: dict) -> list[str]:
    """["--steps: 18, now 6", ...]: differences between two records that affect pixels; [] where the images belong together."""
    changed = [key for key in DECIDES if not _same(key, old.get(key), new.get(key))]
    if {'sha256', 'sampler', 'steps'} & {*changed} and old.get('levels') == new.get('levels'):
        changed = [key for key in changed if key != 'sigmas']  # which follow from those
    if 'sha256' in changed:
        changed = [key for key in changed if key == 'sha256' or DECIDES[key] != DECIDES['sha256']]
    return [f'{DECIDES[key]}: {_shown(old, key)}, now {_shown(new, key)}' for key in changed]


def _same(key, old, new):
    """Whether two values of a key mean the same; levels may differ by rounding, which varies between machines."""
    if key == 'labels' and isinstance(old, dict) and isinstance(new, dict):
        names = dict.fromkeys(('path', 'prompt', 'encoder'))  # their digests are compared
        return {**old, **names} == {**new, **names}
    if key == 'autoencoder' and isinstance(old, dict) and isinstance(new, dict):
        return {**old, 'ref': None} == {**new, 'ref': None}
    if key == 'sigmas' and isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(isinstance(a, (int, float)) and abs(a - b) <= 1e-9 * b for a, b in zip(old, new))
    return old == new


def _shown(record, key):
    """A value as text for messages."""
    value = record.get(key)
    if value is None:
        return 'none'
    if key == 'labels' and isinstance(value, dict):
        words = ':'.join(str(value[part]) for part in ('source', 'class', 'path', 'prompt') if part in value)
        return f'{words} ({str(value["sha256"])[:8]})' if 'sha256' in value else words
    if key in ('sha256', 'gnet_sha256'):
        prefix = 'gnet_' if key == 'gnet_sha256' else ''
        return f'{record.get("gnet" if prefix else "network")} ({record.get(f"{prefix}weights")}, {str(value)[:8]})'
    if key == 'sigmas':
        return f'{record.get("levels")} from {value[0]:g} to {value[-2]:g}' if _is_levels(value) else 'none'
    return str(value)


def _is_levels(value):
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, (int, float)) for item in value)
