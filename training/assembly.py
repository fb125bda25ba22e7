# SPDX-License-Identifier: Apache-2.0
"""Options -> the objects of a run: network, objective, averages, data. The same dict of JSON types makes the same objects."""

from typing import NamedTuple

import click
import numpy as np
import torch

from torch_utils import distributed, misc
from training import conditioning, discrete, hub, registry, validation
from training.consistency import CHAINS, ConsistencyTerm
from training.corruption import Corruption, LabelCorruption
from training.dataset import ImageDataset, ImageStore
from training.ema import HalfLifeEMA, PowerFunctionEMA
from training.feed import Feed
from training.hybrid import OBJECTIVES
from training.loss import AmbientLoss, Objective
from training.noise import NOISE, Levels
from training.pairs import PairStream
from training.penalty import PENALTIES
from training.preconditioning import build_network
from training.timesteps import TIMESTEPS
from training.weighting import WEIGHTS

PRECISIONS = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def build_net(options, device):
    """The network in training mode, with the weights that the seed or --transfer gives it."""
    with misc.seeded(options['seed'], 'init'):
        net = build_network(options['network'])
    net.compute_dtype = PRECISIONS[options['precision']]
    if options['cep']:
        net.model.map_label.perturb = build_cep(options['cep'], net.label_dim)
    return net.to(device).train()


def build_cep(spec, label_dim):
    """The perturbation that --cep names; refused where there is no condition to perturb."""
    if not label_dim:
        raise click.ClickException(f'--cep={spec} perturbs the embedding of a class label; train with --cond=1')
    perturb = registry.build(spec, conditioning.CEP, '--cep')
    with misc.seeded('probe'):
        probe('--cep', spec, lambda: perturb(torch.zeros(1, 1)))
    return perturb


def build_objective(options, net):
    """(noise distribution, Objective) from options['objective'] for this network."""
    o = options['objective']
    discrete_time = 'kind' in o
    diffusion = discrete.build_diffusion(options['network']['diffusion']) if discrete_time else None
    noise = Levels(diffusion.levels.tolist()) if discrete_time else registry.build(o['noise'], NOISE, '--noise')
    weight = registry.build(o['weight'], WEIGHTS, '--weight', sigma_data=net.sigma_data)
    penalty = registry.build(o['penalty'], PENALTIES, '--penalty', sigma_data=net.sigma_data)
    one = torch.ones(1, 1, 1, 1)
    probe('--weight', o['weight'], lambda: weight(one))
    probe('--penalty', o['penalty'], lambda: penalty(one, one))
    terms = {'denoise': AmbientLoss(weight, penalty, inverse=o['ambient_weight'] == 'inverse')}
    if discrete_time:
        make_terms = registry.build(o['kind'], OBJECTIVES, '--objective')
        probe('--objective', o['kind'], lambda: make_terms(None, diffusion))
        terms = make_terms(terms['denoise'], diffusion)
    if o['consistency']:
        plan = registry.build(o['consistency'], CHAINS, '--consistency')
        try:
            terms['consistency'] = ConsistencyTerm(plan, noise, weight, options['batch'])
        except ValueError as err:
            raise click.ClickException(f'--consistency={o["consistency"]}: {err}') from None
    timesteps = registry.build(o['timesteps'], TIMESTEPS, '--timesteps').over(diffusion.levels) if discrete_time else None
    return noise, Objective(terms, timesteps)


def probe(slot, spec, call):
    """Functions check their options when they are first called: calls one, before anything is made."""
    try:
        call()
    except ValueError as err:
        raise click.ClickException(f'{slot}={spec}: {err}') from None


def build_averages(options, net):
    """{name: average} of the network's weights: "halflife", which snapshots hold, and a "power_..." for each of --power-ema."""
    lengths = {f'power_{sigma_rel:.3f}': PowerFunctionEMA(net, sigma_rel) for sigma_rel in options['power_ema']}
    return {'halflife': HalfLifeEMA(net, **options['ema']), **lengths}


def transfer_weights(ref, net):
    """Copies every tensor of another network that has the same name and shape; says what was left as initialised."""
    other, own = hub.load_network(ref), net.state_dict()
    fitting = {name: tensor for name, tensor in other.state_dict().items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        raise click.ClickException(f'--transfer={ref}: none of its tensors fits this network; use its architecture (see its config.json)')
    net.load_state_dict(fitting, strict=False)
    theirs, ours = (getattr(one, 'prediction', None) for one in (other, net))
    if None not in (theirs, ours) and theirs != ours:
        distributed.print0(f'Warning: {ref} predicts {theirs}, which this network is to unlearn; --prediction={theirs} keeps it')
    left = sorted(set(own) - set(fitting))
    rest = f'; as initialised: {", ".join(left[:8])}' if left else ''
    few = 'Warning: another architecture? ' if 2 * len(fitting) < len(own) else ''
    distributed.print0(f'{few}Transferred {len(fitting)} of {len(own)} tensors from {ref}{rest}')


class Data(NamedTuple):
    """What a run trains on."""

    stream: PairStream
    feed: Feed
    validation: validation.Validation | None
    line: str  # for people


def load_data(options, net, noise, rows, device):
    """Opens, decodes and corrupts the data of a run. rows: slice of the global batch that is this rank's."""
    data = options['data']
    corruption = Corruption(**options['corruption'])
    dataset = ImageDataset(data['path'], use_labels=data['use_labels'], keep=data['keep'], xflip=data['xflip'])
    sigma_n = corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape)
    store = ImageStore(dataset, corruption, sigma_n, cache_gib=data['cache_gib'], workers=data['workers'] or None)
    labels = torch.from_numpy(dataset.labels(np.arange(len(dataset)))) if net.label_dim else None
    train, held_out = validation.split(dataset.raw_idx, options['val'].get('share', 0), options['seed'])
    checker = validation.build(options, noise, store, dataset, held_out, sigma_n, labels) if options['val'] else None
    if options['label_corruption']:
        labels = corrupt_labels(options['label_corruption'], dataset, labels, train)
    stream = PairStream(sigma_n[train], noise, options['objective']['pairing'], batch=options['batch'], seed=options['seed'],
                        upper=dataset.sigma_max[train])
    check_timesteps(options['objective'], stream)
    feed = Feed(stream, store, train, sigma_n=sigma_n, raw_idx=dataset.raw_idx, labels=labels, rows=rows, device=device,
                workers=data['workers'])
    noisy = int((sigma_n[train] > 0).sum())
    line = (f'{len(train)} training images of shape {"x".join(map(str, dataset.image_shape))}: {len(train) - noisy} clean, '
            f'{noisy} noisy ({noisy / len(train):.2%}); {store.nbytes / 2**30:.2f} GiB '
            f'{"mapped from disk" if store.mapped else "in memory"}; {stream.acceptance():.1%} of the images passed '
            f'are used by --pairing={options["objective"]["pairing"]}')
    if noisy and options['objective']['penalty'].partition(':')[0] != 'squared':
        line += (f'\nNote: --penalty={options["objective"]["penalty"]} aims between mean and median, where the ambient loss counts on the '
                 'mean; see docs/penalties.md')
    return Data(stream, feed, checker, line)


def check_timesteps(objective, stream):
    """Refuses to draw anew the levels of clean images where these are not free to have any level, or where there are none."""
    spec = objective.get('timesteps', 'uniform')
    if registry.parse(spec)[0] == 'uniform':
        return
    here, clean = f'--timesteps={spec} draws the levels of clean images', stream.bars == 0
    if not clean.any():
        raise click.ClickException(f'{here}, and all of these are noisy; use uniform')
    if not clean.all() and registry.parse(stream.spec)[0] == 'sigma_first':
        raise click.ClickException(f'{here}, and --pairing={stream.spec} chooses images by their level; use skip or truncate, or uniform')
    if stream.tops is not None:
        raise click.ClickException(f'{here}, and some of these have a sigma_max; use uniform')


def corrupt_labels(options, dataset, labels, train):
    """Wrong classes for the share of the training images that --label-corruption asks for; held-out images keep theirs."""
    if dataset.classes is None:
        raise click.ClickException('--label-corruption needs classes: train with --cond=1 on labels that are classes, not vectors')
    classes = dataset.classes[train]
    wrong = LabelCorruption(**options).apply(classes, dataset.raw_idx[train])
    labels = labels.clone()
    labels[torch.from_numpy(train)] = torch.eye(labels.shape[1])[torch.from_numpy(wrong)]
    images = dataset.raw_idx[train]
    distributed.print0(f'{len(set(images[wrong != classes]))} of {len(set(images))} images carry a wrong label')
    return labels
