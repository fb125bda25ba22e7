# SPDX-License-Identifier: Apache-2.0
"""From a configuration to the objects of a run: network, objective, optimizer, averages, data. Equal configurations give equal objects."""

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import UserError
from torch_utils import distributed, misc, registry
from training.checkpoints.load import load_network
from training.data import cache
from training.data.batches import Feed
from training.data.corruption import Corruption, LabelCorruption
from training.data.dataset import ImageDataset
from training.data.device import on_device
from training.data.identity import check_same
from training.data.pairs import PAIRINGS, PairStream
from training.data.store import ImageStore
from training.diffusion.noise import NOISE, Levels, NoiseDistribution
from training.networks import conditioning
from training.networks.ema import HalfLifeEMA, PowerFunctionEMA
from training.networks.preconditioning import build_network
from training.networks.rows import RowLayer
from training.objective.distillation import DISTILLATIONS, Distillation
from training.objective.loss import Objective, build_terms
from training.objective.penalty import PENALTIES
from training.objective.timesteps import TIMESTEPS
from training.objective.weighting import WEIGHTS
from training.run import alarms, levels, validation
from training.run.config import Config, CorruptionConfig, LabelConfig, NetworkConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from training.run.optimizer import OPTIMIZERS
from training.run.unsharded import Unsharded, wanted
from training.sampling.labels import drawn

POSITIONS = ('pos_embed', 'relative_position_bias_table', 'relative_position_index')  # ends of names of tensors that belong to a grid


def build_net(config: NetworkConfig, device: torch.device | str = 'cpu', *, seed: int = 0, precision: str = 'fp32') -> torch.nn.Module:
    """The network of a NetworkConfig in training mode, with initial weights that depend on the seed."""
    with misc.seeded(seed, 'init'):
        net = build_network(config.arguments)
    net.compute_dtype, net.precision = misc.PRECISIONS[precision], None if precision == 'fp32' else precision
    if config.cep:
        if net.model.label_embedding is None:
            raise UserError(f'--cep={config.cep} perturbs the embedding of a class label, and {type(net.model).__name__} has none')
        net.model.label_embedding.perturb = build_cep(config.cep, net.label_dim)
    return net.to(device).train()


def build_cep(spec: str, label_dim: int) -> Callable:
    """The perturbation that --cep names; refused for unconditional networks."""
    if not label_dim:
        raise UserError(f'--cep={spec} perturbs the embedding of a class label; train with --cond=1')
    perturb = registry.build(spec, conditioning.CEP, '--cep')
    with misc.seeded('probe'):
        probe('--cep', spec, lambda: perturb(torch.zeros(1, 1), RowLayer()))
    return perturb


def build_objective(config: ObjectiveConfig, net: torch.nn.Module, batch: int, teacher: torch.nn.Module | None = None) -> tuple:
    """(noise distribution, Objective) of an ObjectiveConfig for this network. batch: images of a global batch. teacher: of a distillation;
    None: a copy of the network, to count parameters."""
    diffusion = net.own_diffusion() if config.noise is None else None
    noise = Levels(diffusion.levels.tolist()) if diffusion else registry.build(config.noise, NOISE, '--noise')
    weight = registry.build(config.weight, WEIGHTS, '--weight', sigma_data=net.sigma_data)
    penalty = registry.build(config.penalty, PENALTIES, '--penalty', sigma_data=net.sigma_data)
    one = torch.ones(1, 1, 1, 1)
    probe('--weight', config.weight, lambda: weight(one))
    probe('--penalty', config.penalty, lambda: penalty(one, one))
    timesteps = registry.build(config.timesteps, TIMESTEPS, '--timesteps')
    terms = build_terms(config.terms, noise=noise, weight=weight, penalty=penalty, batch=batch, diffusion=diffusion)
    if config.distill:
        return noise, build_distillation(config, net, terms, teacher or net)
    try:
        return noise, Objective(terms, timesteps.over(diffusion.levels) if diffusion else timesteps)
    except ValueError as err:
        raise UserError(f'--term={",".join(config.terms)}: {err}') from None


def build_distillation(config: ObjectiveConfig, net: torch.nn.Module, terms: list, teacher: torch.nn.Module) -> Distillation:
    """The Distillation that --distill names; its auxiliary denoiser is a copy of the network with the teacher's weights."""
    fake = copy.deepcopy(net)
    fake.load_state_dict(teacher.state_dict())
    buffer = registry.build(config.pairing, PAIRINGS, '--pairing').buffer
    return registry.build(config.distill, DISTILLATIONS, '--distill', terms=terms, networks=(teacher, fake), buffer=buffer)


def probe(slot: str, spec: str, call: Callable) -> None:
    """Calls a function once, early, because functions check their options when they are called; its ValueError becomes a UserError."""
    try:
        call()
    except ValueError as err:
        raise UserError(f'{slot}={spec}: {err}') from None


def build_optimizer(config: OptimizerConfig, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of an OptimizerConfig. It must be fused: such an optimizer skips an update on the device where found_inf is set."""
    try:
        made = registry.build(config.kind, OPTIMIZERS, '--optimizer')(params, config.lr)
    except ValueError as err:
        raise UserError(f'--optimizer={config.kind}: {err}') from None
    if not all(group.get('fused') for group in made.param_groups):
        raise UserError(f'--optimizer={config.kind}: it must be created with fused=True, so that updates with bad gradients can be skipped')
    return made


def build_sharding(run: RunConfig, net: torch.nn.Module, device: torch.device) -> Unsharded:
    """What --shard asks for; where weights are divided, the network, which is in host memory, is divided and moved to the device."""
    if not wanted(run):
        if run.shard:
            distributed.print0('--shard: one rank has nothing to divide')
        return Unsharded()
    from training.run.sharding import Sharding
    return Sharding(net, device)


def build_averages(config: OptimizerConfig, net: torch.nn.Module, copy: Callable = copy.deepcopy) -> dict:
    """{name: average} of the network's weights: "halflife", which snapshots hold, and one "power_..." for each length of --power-ema.

    copy: as in ema.Average."""
    lengths = {f'power_{sigma_rel:.3f}': PowerFunctionEMA(net, sigma_rel, copy) for sigma_rel in config.power_ema}
    return {'halflife': HalfLifeEMA(net, config.ema_halflife_kimg, config.ema_rampup_ratio, copy), **lengths}


def transfer_weights(ref: str, net: torch.nn.Module) -> None:
    """Copies every tensor of another network that has the same name, shape and meaning; prints which keep their initial values."""
    other, own = load_network(ref), net.state_dict()
    fitting = {name: tensor for name, tensor in other.state_dict().items() if name in own and own[name].shape == tensor.shape}
    told = _transfer_labels(fitting, other, net) | _transfer_positions(fitting, other, net)
    if not fitting:
        raise UserError(f'--transfer={ref}: none of its tensors fits this network; use the same architecture (see its config.json)')
    net.load_state_dict(fitting, strict=False)
    theirs, ours = (getattr(one, 'prediction', None) for one in (other, net))
    if None not in (theirs, ours) and theirs != ours:
        distributed.print0(f'Warning: {ref} predicts {theirs}, and this network has to learn another prediction; --prediction={theirs} '
                           'keeps it')
    left = sorted(set(own) - set(fitting) - set(told) - {name for name, _ in net.named_buffers()})
    lines = [f'Transferred {len(fitting)} of {len(own)} tensors from {ref}', *dict.fromkeys(told.values()),
             *([f'initialised at random: {", ".join(left[:8])}'] if left else [])]
    few = 'Warning: is this another architecture? ' if 2 * len(fitting) < len(own) else ''
    distributed.print0(few + '; '.join(lines))


def _transfer_labels(fitting, other, net):
    """{name: line about it} of class embeddings where the classes differ. They are taken out of the tensors that fit, except the row of a
    table for "no label", which means the same in both."""
    theirs, told = dict(other.named_modules()), {}
    for module, ours in net.named_modules():
        source, name = theirs.get(module), f'{module}.weight'
        if not isinstance(ours, conditioning.Conditioning) or type(source) is not type(ours) or other.label_dim == net.label_dim:
            continue
        fitting.pop(name, None)
        told[name] = (f'class embeddings are initialised at random: {other.label_dim} classes there, {net.label_dim} here' if net.label_dim
                      else f'class embeddings are left out: {other.label_dim} classes there, none here')
        if getattr(ours, 'null', False) and source.null and ours.weight.shape[1:] == source.weight.shape[1:]:
            fitting[name] = torch.cat([ours.weight.detach()[:-1], source.weight.detach()[-1:].to(ours.weight)])
            told[name] += ', and the one of "no label" is kept'
    return told


def _transfer_positions(fitting, other, net):
    """{name: line about it} of positions where the images differ in size; what belongs to a grid is taken out of the tensors that fit."""
    if not fitting or (there := misc.height_width(other.img_resolution)) == (here := misc.height_width(net.img_resolution)):
        return {}
    for name in [name for name in fitting if name.endswith(POSITIONS)]:
        del fitting[name]
    line = 'positions are initialised at random: images of {}x{} there, {}x{} here'.format(*there, *here)
    return {name: line for name, _ in net.named_parameters() if name.endswith(POSITIONS)}


def build_corruption(config: CorruptionConfig) -> Corruption:
    """The Corruption of a CorruptionConfig."""
    return Corruption(config.sigma, config.probability, config.seed, config.protocol, config.sigma_min_as)


class Data(NamedTuple):
    """What a run trains on."""

    stream: PairStream
    feed: Feed
    validation: validation.Validation | None
    line: str  # for people
    inspection: alarms.Inspection  # empty except on rank 0
    labels: Callable | None = None  # source of labels for samples during training (sampling/labels.py); None: the network's default


def load_data(config: Config, net: torch.nn.Module, noise: NoiseDistribution, rows: slice, device: torch.device | str) -> Data:
    """Opens, decodes and corrupts the data of a run (Config). rows: this rank's slice of the global batch."""
    data, run = config.data, config.run
    corruption = build_corruption(config.corruption)
    copy = distributed.from_node(cache.decode, data.path, data.cache_dir)
    dataset = check_same(f'--data={data.path}', data.fingerprint,
                         ImageDataset(data.path, use_labels=data.use_labels, keep=data.keep, xflip=data.xflip, copy=copy))
    if distributed.rank() == 0 and (told := levels.warning(dataset, run.seed)):
        print(told, flush=True)
    sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
    sigma_n, sigma_min = corruption.beyond_sigma_min(sigma_n, dataset.sigma_min, dataset.sigma_max)
    store = ImageStore(dataset, corruption, sigma_n, cache_gib=data.cache_gib, workers=data.workers)
    labels = torch.from_numpy(dataset.label_table) if net.label_dim else None
    train, held_out = validation.split(dataset.raw_idx, data.validation.share if data.validation else 0, run.seed)
    checker = validation.build(config, noise, store, dataset, held_out, sigma_n, sigma_min, labels) if data.validation else None
    if dataset.text:
        net.set_null_label(torch.from_numpy(dataset.empty))
    shown = drawn(labels[torch.from_numpy(train)]) if dataset.text else None
    if config.corruption.labels:
        labels = corrupt_labels(config.corruption.labels, dataset, labels, train)
    used = train if len(held_out) else slice(None)  # which copies nothing
    stream = PairStream(sigma_n[used], noise, config.objective.pairing, batch=run.batch, seed=run.seed, lower=sigma_min[used],
                        upper=dataset.sigma_max[used])
    check_timesteps(config.objective.timesteps, stream)
    found = alarms.Inspection()
    if distributed.rank() == 0 and run.samples and run.snapshot_ticks:
        found = alarms.inspect(store, dataset, sigma_n, train, checker, run.seed)
    store = on_device(store, data.on, device)
    feed = Feed(stream, store, train, sigma_n=sigma_n, raw_idx=dataset.raw_idx, labels=labels, rows=rows, device=device,
                workers=data.workers)
    return Data(stream, feed, checker, describe(config.objective, dataset, store, stream, sigma_n[train]), found, shown)


def describe(objective: Objective, dataset: ImageDataset, store: ImageStore, stream: PairStream, sigma_n: np.ndarray) -> str:
    """One line, or two, about the images that a run trains on."""
    noisy, count = int((sigma_n > 0).sum()), len(sigma_n)
    limited = f', {stream.limited} with a sigma_min or sigma_max' if stream.limited else ''
    line = (f'{count} training images of shape {"x".join(map(str, dataset.image_shape))}: {count - noisy} clean, '
            f'{noisy} noisy ({noisy / count:.2%}){limited}; {store.words()}; --pairing={objective.pairing} uses '
            f'{stream.acceptance():.1%} of the images that it draws')
    if noisy and registry.parse(objective.penalty)[0] != 'squared':
        line += (f'\nNote: the minimiser of --penalty={objective.penalty} lies between mean and median, and the ambient loss relies on '
                 'the mean; see docs/penalties.md')
    return line


def check_timesteps(spec: str, stream: PairStream) -> None:
    """Refuses timesteps that redraw the levels of clean images where these may not have every level, or where no image is clean."""
    if registry.parse(spec)[0] == 'uniform':
        return
    here, clean = f'--timesteps={spec} draws the levels of clean images', stream.levels == 0
    if not clean.any():
        raise UserError(f'{here}, and all images are noisy; use uniform')
    if not clean.all() and registry.parse(stream.spec)[0] == 'sigma_first':
        raise UserError(f'{here}, and --pairing={stream.spec} chooses images by their level; use skip or truncate, or uniform')
    if stream.limited:
        raise UserError(f'{here}, and some images have a sigma_min or sigma_max; use uniform')


def corrupt_labels(config: LabelConfig, dataset: ImageDataset, labels: torch.Tensor, train: np.ndarray) -> torch.Tensor:
    """Labels with wrong classes, or swapped captions, for the fraction of the training images that a LabelConfig says; held-out images
    keep theirs."""
    corruption, images = LabelCorruption(config.rate, config.seed, config.groups), dataset.raw_idx[train]
    if dataset.classes is None:
        partners = corruption.partners(labels.numpy()[train] if len(train) < len(labels) else labels.numpy(), images)
        wrong, new = images[partners] != images, labels[torch.from_numpy(train[partners])]
    else:
        classes = dataset.classes[train]
        relabelled = corruption.apply(classes, images)
        wrong, new = relabelled != classes, torch.from_numpy(relabelled).int()
    labels = labels.clone()
    labels[torch.from_numpy(train)] = new
    distributed.print0(f'{len(set(images[wrong]))} of {len(set(images))} images carry a wrong label')
    return labels
