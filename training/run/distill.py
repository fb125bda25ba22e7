# SPDX-License-Identifier: Apache-2.0
"""The teacher of train.py --distill: opening it, what it decides about the run, and what does not go with it."""

from typing import NamedTuple

import torch

from dnnlib import EasyDict, UserError, text_record
from torch_utils import misc, registry
from training.checkpoints.load import check_denoiser, load_network
from training.data.dataset import Form
from training.networks.conditioning import Conditioning
from training.networks.rows import RowLayer
from training.objective.distillation import DISTILLATIONS
from training.run.config import Config

# Options that have no meaning here; why.
REFUSED = {
    'objective': 'it trains at discrete timesteps, and a distillation at any level', 'consistency': 'it is another objective',
    'consistency_coeff': 'it is another objective', 'term': 'it is another objective',
    'val': 'it is the loss of a denoiser on held-out images, and a generator is none; use --metrics-every',
    'gns': 'two networks take turns, and their gradients have no common noise', 'cep': 'a generator needs the labels themselves',
    'label_dropout': 'a generator needs the labels themselves', 'regime': 'it is for training a denoiser',
    'augment': 'no image of --data is seen', 'shard': 'its networks are used whole on each rank'}
# What config.json says beside the network's own arguments.
COMMON = ('img_resolution', 'img_channels', 'label_dim', 'use_fp16', 'sigma_data', 'augment_dim', 'label_dropout', 'precond', 'units',
          'sampling', 'autoencoder', 'text', 'sigma_min', 'sigma_max', 'clip_dim', 'num_clip_token')


class Teacher(NamedTuple):
    """A teacher, and the --distill without it."""

    ref: str
    net: torch.nn.Module
    sha256: str  # misc.state_digest
    spec: str
    level: float


def options_with(o: EasyDict) -> tuple[EasyDict, Teacher | None]:
    """(options, Teacher): where --distill is given, with the teacher's preconditioning and without augmentation. Raises UserError for what
    does not go with it."""
    if not o.distill:
        return o, None
    here = f'--distill={o.distill}'
    for option, why in REFUSED.items():
        if option in o.get('command', {}) and o[option]:
            value = ','.join(o[option]) if isinstance(o[option], (list, tuple)) else o[option]
            raise UserError(f'--{option.replace("_", "-")}={value} cannot be combined with {here}: {why}; leave it out')
    teacher = open_teacher(o.distill)
    for option, own in (('precond', teacher.net.config.get('precond', 'edm')), ('sigma_data', teacher.net.sigma_data)):
        if option in o.get('command', {}) and o[option] != own:
            raise UserError(f'--{option.replace("_", "-")}={o[option]}: teacher={teacher.ref} of --distill was trained with {own}; '
                            'leave it out')
    return EasyDict(o, precond=teacher.net.config.get('precond', 'edm'), augment=0.0), teacher


def open_teacher(spec: str) -> Teacher:
    """The Teacher that a --distill names. Raises UserError for networks that are no denoisers of every level."""
    name, keys = registry.parse(spec)
    ref = keys.pop('teacher', None)
    if not ref:
        raise UserError(f'--distill={spec} needs a teacher: {name}:teacher=REF, a denoiser trained on the same data')
    where, own = f'--distill: teacher={ref}', registry.parameters(DISTILLATIONS[name]) | keys
    try:
        net = load_network(ref)
    except UserError as err:
        raise UserError(f'--distill: teacher={err.message}' if err.message.startswith(str(ref)) else f'{where}: {err.message}') from None
    if net.config.get('precond') == 'iddpm':
        raise UserError(f'{where} has discrete timesteps; train one without --objective, with --precond=edm, vp or ve')
    check_denoiser(net, where)
    if not net.sigma_min <= own['level'] <= net.sigma_max:
        raise UserError(f'--distill={spec}: level={own["level"]:g} is outside the levels of the teacher, {net.sigma_min:g} to '
                        f'{net.sigma_max:g}')
    return Teacher(str(ref), net, misc.state_digest(net), registry.unparse(name, keys), own['level'])


def arguments(teacher: Teacher, dataset: Form, o: EasyDict, arch: dict | None) -> dict:
    """config.json of the generator: the teacher's, with sampling in one evaluation. arch: the network's part as the options say, None where
    they do not. Raises UserError where teacher and data, or teacher and options, differ."""
    net, where = teacher.net, f'--distill: teacher={teacher.ref}'
    shape = (net.img_channels, *misc.height_width(net.img_resolution))
    if shape != tuple(dataset.image_shape):
        words = ['x'.join(map(str, each)) for each in (shape, dataset.image_shape)]
        raise UserError(f'{where} makes images of {words[0]}, and --data={o.data} has {words[1]}')
    if net.label_dim != dataset.label_dim:
        remedy = ('add --cond=1' if not o.cond else 'leave --cond out' if not net.label_dim else 'use its data')
        raise UserError(f'{where} has {net.label_dim} classes, and this run {dataset.label_dim}; {remedy}')
    if told := text_record.difference(net.text, dataset.text):
        raise UserError(f'{where}: its captions differ from those of --data={o.data}: {told}')
    if net.units != dataset.units:
        raise UserError(f'{where} has the units {net.units or "of 8-bit images"}, and --data={o.data} {dataset.units or "8-bit images"}')
    codes = [(told or {}).get('sha256', bool(told)) for told in (net.autoencoder, dataset.latents and dataset.latents.autoencoder)]
    if codes[0] != codes[1]:
        raise UserError(f'{where} makes latents of another autoencoder than those of --data={o.data}, or only one of them has latents')
    own = {key: value for key, value in net.config.items() if key not in COMMON}
    if arch is not None and arch != own:
        key = next(key for key in {**own, **arch} if own.get(key) != arch.get(key))
        raise UserError(f'--arch={o.arch}: the network is that of {where.removeprefix("--distill: ")}, and {key} differs, '
                        f'{arch.get(key)} instead of {own.get(key)}; leave --arch and its keys out')
    levels = registry.unparse('explicit', {'sigmas': teacher.level})
    return {**net.config, 'use_fp16': o.fp16 or net.config.get('use_fp16', False),
            'sampling': {'sampler': 'euler', 'levels': levels, 'steps': 1}}


def open_for(config: Config, net: torch.nn.Module) -> torch.nn.Module | None:
    """The teacher of a run on the network's device, whose weights `net` gets; None where nothing is distilled. Turns off dropout in `net`
    (also of labels): generator and auxiliary denoiser are functions."""
    if not config.objective.distill:
        return None
    ref = config.network.teacher
    teacher = load_network(ref, device=next(net.parameters()).device)
    if misc.state_digest(teacher) != config.objective.teacher_sha256:
        raise UserError(f'--distill: teacher={ref} has changed since this run was set up; start again')
    net.load_state_dict(teacher.state_dict())
    for module in net.modules():
        if isinstance(module, (RowLayer, Conditioning, torch.nn.modules.dropout._DropoutNd)):
            module.eval()
    teacher.compute_dtype = net.compute_dtype
    return teacher
