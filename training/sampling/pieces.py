# SPDX-License-Identifier: Apache-2.0
"""How a network is sampled, as the options of a command line (options.py) or its own config.json say it: the pieces that they name.

Training, whose grids and metrics are told nothing, has default_pieces()."""

import contextlib
import functools
import json
import math

from dnnlib import UserError
from torch_utils import distributed, misc, registry
from training.checkpoints.load import load_network, show_recipe
from training.diffusion import schedules
from training.sampling import guidance, labels, steppers
from training.sampling.generate import noise_levels, with_time
from training.sampling.options import KEYS, SAMPLER, STEPS

CONFIG = 'network configuration: sampling'  # the key of config.json, in errors


class Networks:
    """The network of --network and the one of --gnet, loaded once for all that is made with them, and anew where --weights change.

    One set of weights is held at a time."""

    def __init__(self):
        self._held, self._guides, self._digests, self._labels, self._told = {}, {}, {}, None, set()

    def open(self, o):
        """(network, guiding network or None) on their device. Raises UserError."""
        load = functools.partial(open_network, device=distributed.pick_device(o.device), precision=o.precision, compile=o.compile)
        if o.weights not in self._held:
            self._held.clear()  # before the next ones take their memory
            self._digests = {key: value for key, value in self._digests.items() if key in self._guides}
            self._held[o.weights] = load(o.network, weights=o.weights)
        if o.gnet and o.gnet not in self._guides:
            self._guides[o.gnet] = load(o.gnet, weights=o.gnet_weights)
        return self._held[o.weights], self._guides[o.gnet] if o.gnet else None

    def labels(self, net, seeds, o):
        """The source of labels that the options name, and that all share."""
        self._labels = self._labels or (pick_labels(net, seeds, o.labels, o.class_idx),)
        return self._labels[0]

    def digest(self, net):
        """misc.state_digest of one of the networks that are held."""
        key = next((ref for ref, guide in self._guides.items() if guide is net), None)
        if key not in self._digests:
            self._digests[key] = misc.state_digest(net)
        return self._digests[key]

    def warn(self, text):
        """Prints a line, once."""
        if text not in self._told:
            self._told.add(text)
            distributed.print0(f'Warning: {text}')


def prepare(o, seeds, networks=None):
    """(network on its device, arguments for generate_images) from the options above, --network and --device; o: an EasyDict of them.

    networks: Networks, where several such calls share them. Raises UserError, in one line, for whatever they or the network refuse;
    nothing has been sampled then."""
    networks = networks or Networks()
    net, gnet = networks.open(o)
    guidance = pick_guidance(net, gnet, o.guidance, o.guidance_interval, networks.warn)
    keys = {key: o[key] for key in KEYS}
    pieces = sampler_pieces(net, o.steps, o.sampler, o.levels, o.stop_sigma, o.stop_variance, **keys)
    o.sampler, o.levels, o.steps = choose(net, o.sampler, o.levels, o.steps, o.rho)  # so that a record of the options tells what was done
    return net, {'labels': networks.labels(net, seeds, o), 'guidance': guidance, **pieces}


def open_network(ref, weights, device, precision, compile):
    """The network, as it is to run."""
    net = load_network(ref, device=device, weights=weights)
    show_recipe(ref)
    if precision:
        net.compute_dtype = misc.DTYPES[precision]
    if compile:
        # The U-Net alone: what is around it is in float32 and costs little, and some samplers ask for more than D.
        net.model.compile(dynamic=False)
    return net


def pick_guidance(net, gnet, weight, interval, warn):
    """The Guidance that the options ask for; refuses options that would do nothing. warn(text): tells of what means little."""
    if weight == 1 and (gnet is not None or interval):
        option = 'gnet' if gnet is not None else 'guidance-interval'
        raise UserError(f'--{option} does nothing without a --guidance other than 1; give --guidance=2, say')
    try:
        limits = guidance.interval(interval) if interval else (0.0, math.inf)
    except ValueError as err:
        raise UserError(f'--guidance-interval={interval}: {err}') from None
    found = guidance.Guidance(weight, limits, gnet)
    try:
        guidance.check(net, found)
    except ValueError as err:
        raise UserError(f'--guidance={weight:g}: {err}') from None
    if weight != 1 and gnet is None and not net.config.get('label_dropout'):
        warn('the network was trained without label dropout, so that what it makes of no label means little; '
             'train with --label-dropout, or give --gnet')
    return found


def pick_labels(net, seeds, spec, class_idx):
    """The source of labels that the options name."""
    try:
        return labels.pick(net, seeds, spec, class_idx)
    except ValueError as err:
        raise UserError(f'--class={class_idx}: {err}' if class_idx is not None else f'--labels={spec}: {err}') from None


def sampler_pieces(net, steps=None, sampler=None, levels=None, stop_sigma=None, stop_variance=None, sigma_min=None, sigma_max=None,
                   rho=None, **keys):
    """{schedule, num_steps, stepper} with their options bound; what they or the network refuse is found before any file is written."""
    if stop_sigma is not None and stop_variance is not None:
        raise UserError('--stop-sigma and --stop-variance are the same option, as a level and as its square; give one of them')
    keys['stop_sigma'] = stop_sigma if stop_variance is None else math.sqrt(stop_variance)
    by_config = own_sampling(net) and (steps, sampler, levels) == (None, None, None)
    sampler, levels, steps = choose(net, sampler, levels, steps, rho)
    with _said_by(CONFIG if by_config else None):
        schedule = combine('levels', levels, schedules.SCHEDULES, {'sigma_min': sigma_min, 'sigma_max': sigma_max, 'rho': rho})
        stepper = combine('sampler', sampler, steppers.STEPPERS, keys)
        if has_timesteps_for(net, sampler) and net.units is None:
            stepper = functools.partial(stepper, **{'clip': True, **stepper.keywords})  # as published
        try:
            sigmas = noise_levels(net, schedule, steps)
        except ValueError as err:
            raise UserError(f'--levels={levels} with its keys: {err}') from None
        try:
            stepper = with_time(net, schedule, stepper, sigmas)
            steppers.check(stepper, sigmas)
        except ValueError as err:
            raise UserError(f'--sampler={sampler} with its keys: {err}') from None
        if stepper.keywords.get('variance') == 'learned' and net.output_multiple < 2:
            raise UserError(f'--sampler={sampler}: the network gives no variance; choose variance=small or large')
    return {'schedule': schedule, 'num_steps': steps, 'stepper': stepper}


def default_pieces(net):
    """The same where a user says nothing: what grids and metrics during training, and plain commands, sample a network with."""
    return sampler_pieces(net)


def choose(net, sampler=None, levels=None, steps=None, rho=None):
    """(sampler, levels, steps) that are meant: what is given, else what the network's config.json says, else EDM's.

    The network's levels and steps are those of its sampler, and do not count where another is named; its keys go where any is named.
    rho asks for EDM's levels. steps: None where the levels are told one by one."""
    own = own_sampling(net)
    if sampler and own and registry.parse(sampler)[0] != registry.parse(own['sampler'])[0]:
        own = {}
    sampler = sampler or own.get('sampler', SAMPLER)
    levels = levels or (own.get('levels') if rho is None else None) or default_levels(net, sampler, rho)
    own_number = 'sigmas' in registry.parameters(schedules.SCHEDULES[registry.parse(levels)[0]])
    return sampler, levels, steps or (None if own_number else own.get('steps', STEPS))


def own_sampling(net):
    """{"sampler", and "levels", "steps" where they are told} of the network's config.json, checked; {} where that says nothing."""
    found = getattr(net, 'sampling', None)
    if found is None:
        return {}
    shown = f'{CONFIG}={json.dumps(found)}'
    if not isinstance(found, dict) or 'sampler' not in found or found.keys() - {'sampler', 'levels', 'steps'}:
        raise UserError(f'{shown}: expected such as {{"sampler": "ancestral", "steps": 50}}, and "levels" where need be')
    for key, pieces in (('sampler', steppers.STEPPERS), ('levels', schedules.SCHEDULES)):
        if key in found:
            registry.build(found[key], pieces, f'{CONFIG}: {key}')
    steps = found.get('steps', STEPS)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise UserError(f'{shown}: "steps" must be a whole number of 1 or more')
    return found


@contextlib.contextmanager
def _said_by(whose):
    """Errors inside say who asked, where that was not the command line."""
    try:
        yield
    except UserError as err:
        raise UserError(f'{whose}: {err.message}' if whose else err.message) from None


def has_timesteps_for(net, sampler):
    """Whether the network was trained on timesteps such as the sampler was made for, which is one that can clip D."""
    return bool(getattr(net, 'diffusion', None)) and 'clip' in registry.parameters(steppers.STEPPERS[registry.parse(sampler)[0]])


def default_levels(net, sampler, rho):
    """The --levels that are meant where none are given: the network's own timesteps for such samplers, EDM's otherwise."""
    own = rho is None and has_timesteps_for(net, sampler)
    return f'respaced:diffusion={net.diffusion.replace(",", "|")}' if own else 'edm'


def combine(slot, spec, pieces, keys):
    """The piece that --slot=SPEC names, with keys that have an option of their own; refuses what it does not take or was told twice."""
    name, told = registry.parse(spec)
    accepted = registry.parameters(pieces[name])
    keys = {key: value for key, value in keys.items() if value is not None}
    for key, value in keys.items():
        option = f'--{key.replace("_", "-")}={value}'
        if key not in accepted:
            raise UserError(f'{option} is no key of --{slot}={name}, which takes {", ".join(accepted)}')
        if key in told:
            raise UserError(f'{option} and --{slot}={spec}: "{key}" is given twice')
    for key, value in {**told, **keys}.items():
        if value != value:
            raise UserError(f'--{slot}={name}: "{key}" is nan; give a number')
    return functools.partial(registry.build(spec, pieces, f'--{slot}'), **keys)
