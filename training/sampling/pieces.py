# SPDX-License-Identifier: Apache-2.0
"""How a network is sampled: the pieces that the options of a command line (options.py) or its own config.json name.

Grids and metrics during training use default_pieces()."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dnnlib import EasyDict, UserError
from torch_utils import distributed, misc, numerics, registry
from training.checkpoints.load import load_network, show_recipe
from training.diffusion import schedules
from training.networks.interface import COMPILE_OPTIONS
from training.sampling import guidance, labels, prompts, steppers
from training.sampling.generate import noise_levels, resolution, with_time
from training.sampling.options import KEYS, SAMPLER, STEPS
from training.sampling.outputs import Output, open_output

CONFIG = 'network configuration: sampling'  # the key of config.json, in errors
SMALL_BATCH = 2 ** 18  # pixels of a batch up to which a GPU waits for kernels to be launched, unless they are replayed as one graph


class Networks:
    """The networks of --network and --gnet, loaded once for everything that uses them, and again where --weights change.

    One set of weights is in memory at a time."""

    def __init__(self):
        self._held, self._guides, self._digests, self._labels, self._printed, self._outputs = {}, {}, {}, None, set(), {}

    def open(self, o: EasyDict) -> tuple[torch.nn.Module, torch.nn.Module | None]:
        """(network, guiding network or None) on their device. Raises UserError."""
        load = functools.partial(open_network, device=distributed.pick_device(o.device), precision=o.precision, compile=o.compile,
                                 batch=o.get('batch', o.get('batch_size')))
        if o.weights not in self._held:
            self._held.clear()  # before the next ones take their memory
            self._digests = {key: value for key, value in self._digests.items() if key in self._guides}
            self._held[o.weights] = load(o.network, weights=o.weights)
        if o.gnet and o.gnet not in self._guides:
            self._guides[o.gnet] = load(o.gnet, weights=o.gnet_weights)
        return self._held[o.weights], self._guides[o.gnet] if o.gnet else None

    def labels(self, net: torch.nn.Module, seeds: Iterable[int], o: EasyDict) -> Callable | None:
        """The source of labels that the options name; all cells share it."""
        if o.get('text_encoder') is not None and o.get('prompt') is None:
            raise UserError(f'--text-encoder={o.text_encoder}: reads the captions of --prompt; add one, or leave it out')
        if not self._labels:
            self._labels = (pick_labels(net, seeds, o.labels, o.class_idx) if o.get('prompt') is None else pick_prompts(net, o),)
        return self._labels[0]

    def output(self, net: torch.nn.Module, o: EasyDict) -> Output:
        """The output (outputs.py) of the network's images; an autoencoder is loaded once."""
        key = json.dumps([net.config, o.decode])
        if key not in self._outputs:
            self._outputs[key] = open_output(net, o.decode, distributed.pick_device(o.device))
        return self._outputs[key]

    def digest(self, net: torch.nn.Module) -> str:
        """misc.state_digest of one of the networks in memory."""
        key = next((ref for ref, guide in self._guides.items() if guide is net), None)
        if key not in self._digests:
            self._digests[key] = misc.state_digest(net)
        return self._digests[key]

    def warn(self, text: str) -> None:
        """Prints a line, once."""
        if text not in self._printed:
            self._printed.add(text)
            distributed.print0(f'Warning: {text}')


def prepare(o: EasyDict, seeds: Iterable[int], networks: Networks | None = None) -> tuple:
    """(network on its device, arguments for generate_images) from those options, --network and --device; o: an EasyDict of them.

    networks: Networks, where several such calls share them. Raises UserError, in one line, for whatever they or the network refuse,
    before anything is sampled."""
    networks = networks or Networks()
    net, gnet = networks.open(o)
    guidance = pick_guidance(net, gnet, o.guidance, o.guidance_interval, networks.warn, o.guidance_channels)
    keys = {key: o[key] for key in KEYS}
    pieces = sampler_pieces(net, o.steps, o.sampler, o.levels, o.stop_sigma, o.stop_variance, **keys)
    keys['stop_sigma'] = o.stop_variance if o.stop_sigma is None else o.stop_sigma
    o.sampler, o.levels, o.steps = choose(net, o.sampler, o.levels, o.steps, **keys)  # so that records of the options hold what was used
    return net, {'labels': networks.labels(net, seeds, o), 'guidance': guidance, **pieces}


def open_network(ref: str, weights: str, device: torch.device | str, precision: str | None, compile: bool,
                 batch: int | None = None) -> torch.nn.Module:
    """Loads a network to be evaluated. precision: None or "auto": that of its training, where the device has it. batch: of its calls, where
    they are all of this size."""
    net = load_network(ref, device=device, weights=weights)
    show_recipe(ref)
    trained = net.precision or ('fp16' if net.compute_dtype == torch.float16 else None)
    return prepare_network(net, torch.device(device), numerics.for_sampling(precision, trained, device), compile, batch)


def prepare_network(net: torch.nn.Module, device: torch.device, precision: str, compile: bool, batch: int | None = None) -> torch.nn.Module:
    """Makes a network ready for many evaluations: numerics, precision, compilation. Changes and returns it."""
    numerics.set_numerics(precision)
    net.compute_dtype = misc.DTYPES[precision]
    if compile:
        if device.type == 'cuda':
            net.model.set_channels_last()
        # Only the network: the preconditioning around it is cheap and in float32, and some samplers call outputs().
        net.replays = device.type == 'cuda' and batch is not None and batch * math.prod(resolution(net)) <= SMALL_BATCH
        net.model.compile(dynamic=False, options=COMPILE_OPTIONS | ({'triton.cudagraphs': True} if net.replays else {}))
    net.model.hold_weights(net.model.inner_dtype(next(net.model.parameters())))
    return net


def pick_guidance(net: torch.nn.Module, gnet: torch.nn.Module | None, weight: float, interval: str | None, warn: Callable,
                  channels: int | None = None) -> guidance.Guidance:
    """The Guidance that the options ask for; refuses options that would do nothing. warn(text) prints a warning."""
    given = {'gnet': gnet is not None, 'guidance-interval': interval, 'guidance-channels': channels}
    if weight == 1 and any(given.values()):
        option = next(option for option, value in given.items() if value)
        raise UserError(f'--{option} has no effect without a --guidance other than 1, such as --guidance=2')
    try:
        limits = guidance.interval(interval) if interval else (0.0, math.inf)
    except ValueError as err:
        raise UserError(f'--guidance-interval={interval}: {err}') from None
    found = guidance.Guidance(weight, limits, gnet, None if channels == net.img_channels else channels)
    try:
        guidance.check(net, found)
    except ValueError as err:
        raise UserError(f'--guidance={weight:g}: {err}') from None
    if weight != 1 and gnet is None and not net.config.get('label_dropout'):
        warn('the network was trained without label dropout, so its unconditional prediction is not meaningful; '
             'train with --label-dropout, or use --gnet')
    return found


def pick_labels(net: torch.nn.Module, seeds: Iterable[int], spec: str | None, class_idx: int | None) -> Callable | None:
    """The source of labels that the options name."""
    try:
        return labels.pick(net, seeds, spec, class_idx)
    except ValueError as err:
        given = f'--class={class_idx}: ' if class_idx is not None else '' if spec is None else f'--labels={spec}: '
        raise UserError(f'{given}{err}') from None


def pick_prompts(net: Callable, o: EasyDict) -> Callable:
    """The source of labels that --prompt names."""
    given = next((f'--{name}' for name, value in (('class', o.class_idx), ('labels', o.labels)) if value is not None), None)
    if given:
        raise UserError(f'--prompt and {given} exclude each other: both say what the images are of; give one of them')
    return prompts.pick(net, o.prompt, o.get('text_encoder'), distributed.pick_device(o.device))


def sampler_pieces(net: torch.nn.Module, steps: int | None = None, sampler: str | None = None, levels: str | None = None,
                   stop_sigma: float | None = None, stop_variance: float | None = None, sigma_min: float | None = None,
                   sigma_max: float | None = None, rho: float | None = None, **keys: Any) -> dict:
    """{schedule, num_steps, stepper} with their options bound. Raises UserError for what they or the network refuse."""
    if stop_sigma is not None and stop_variance is not None:
        raise UserError('--stop-sigma and --stop-variance are the same option, given as a level or as its square; give one of them')
    keys['stop_sigma'] = stop_sigma if stop_variance is None else math.sqrt(stop_variance)
    by_config = own_sampling(net) and (steps, sampler, levels) == (None, None, None)
    sampler, levels, steps = choose(net, sampler, levels, steps, rho, **keys)
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
            raise UserError(f'--sampler={sampler}: the network does not predict a variance; choose variance=small or large')
    return {'schedule': schedule, 'num_steps': steps, 'stepper': stepper}


def default_pieces(net: torch.nn.Module) -> dict:
    """sampler_pieces() without any option, as for grids and metrics during training."""
    return sampler_pieces(net)


def choose(net: torch.nn.Module, sampler: str | None = None, levels: str | None = None, steps: int | None = None,
           rho: float | None = None, **keys: Any) -> tuple[str, str, int | None]:
    """(sampler, levels, steps): what is given, else what the network's config.json says, else EDM's.

    The levels and steps of config.json belong to its sampler and do not apply to another one; the keys of its sampler are dropped where
    --sampler is given, and those among `keys` where they are not None. rho selects EDM's levels. steps: None where the levels are listed
    one by one."""
    own = own_sampling(net)
    if sampler and own and registry.parse(sampler)[0] != registry.parse(own['sampler'])[0]:
        own = {}
    sampler = sampler or without_keys(own.get('sampler', SAMPLER), keys)
    levels = levels or (own.get('levels') if rho is None else None) or default_levels(net, sampler, rho)
    own_number = 'sigmas' in registry.parameters(schedules.SCHEDULES[registry.parse(levels)[0]])
    return sampler, levels, steps or (None if own_number else own.get('steps', STEPS))


def without_keys(spec: str, keys: dict) -> str:
    """A spec without those of its keys that have a value in `keys`."""
    name, own = registry.parse(spec)
    return registry.unparse(name, {key: value for key, value in own.items() if keys.get(key) is None})


def own_sampling(net: torch.nn.Module) -> dict:
    """The checked "sampling" of the network's config.json, {"sampler": ...} with optional "levels" and "steps"; {} where there is none."""
    found = getattr(net, 'sampling', None)
    if found is None:
        return {}
    shown = f'{CONFIG}={json.dumps(found)}'
    if not isinstance(found, dict) or 'sampler' not in found or found.keys() - {'sampler', 'levels', 'steps'}:
        raise UserError(f'{shown}: expected an object such as {{"sampler": "ancestral", "steps": 50}}, optionally with "levels"')
    for key, pieces in (('sampler', steppers.STEPPERS), ('levels', schedules.SCHEDULES)):
        if key in found:
            registry.build(found[key], pieces, f'{CONFIG}: {key}')
    steps = found.get('steps', STEPS)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise UserError(f'{shown}: "steps" must be a whole number of 1 or more')
    return found


@contextlib.contextmanager
def _said_by(whose):
    """Puts `whose` before errors raised inside, where it is not None: the sampler was not chosen on the command line."""
    try:
        yield
    except UserError as err:
        raise UserError(f'{whose}: {err.message}' if whose else err.message) from None


def has_timesteps_for(net: torch.nn.Module, sampler: str) -> bool:
    """Whether the network was trained on discrete timesteps, and the sampler is made for them (those are the samplers that can clip D)."""
    return bool(getattr(net, 'diffusion', None)) and 'clip' in registry.parameters(steppers.STEPPERS[registry.parse(sampler)[0]])


def default_levels(net: torch.nn.Module, sampler: str, rho: float | None) -> str:
    """The default of --levels: the network's own timesteps for samplers of discrete timesteps, EDM's levels otherwise."""
    own = rho is None and has_timesteps_for(net, sampler)
    return f'respaced:diffusion={net.diffusion.replace(",", "|")}' if own else 'edm'


def combine(slot: str, spec: str, pieces: dict, keys: dict) -> Callable:
    """The piece that --slot=SPEC names, with keys that have their own options; refuses keys that are unknown or given twice."""
    name, given = registry.parse(spec)
    accepted = registry.parameters(pieces[name])
    keys = {key: value for key, value in keys.items() if value is not None}
    for key, value in keys.items():
        option = f'--{key.replace("_", "-")}={value}'
        if key not in accepted:
            raise UserError(f'{option} is not a key of --{slot}={name}, which takes {", ".join(accepted)}')
        if key in given:
            raise UserError(f'{option} and --{slot}={spec}: "{key}" is given twice')
    for key, value in {**given, **keys}.items():
        if value != value:
            raise UserError(f'--{slot}={name}: "{key}" is nan; give a number')
    return functools.partial(registry.build(spec, pieces, f'--{slot}'), **keys)
