# SPDX-License-Identifier: Apache-2.0
"""What the command line says -> the nested dict of JSON types that a run is made from; what cannot work is refused here."""

import os

import click
import torch

from torch_utils import distributed, misc
from training.assembly import build_cep
from training.consistency import CHAINS, published_spec
from training.corruption import Corruption, LabelCorruption
from training.dataset import ImageDataset
from training.discrete import build_diffusion
from training.images import is_picture
from training.networks import ARCHS
from training.pairs import with_inverse_weight
from training.preconditioning import PREDICTIONS
from training.registry import build, parse

DIFFUSION = 'cosine:steps=4000'  # the schedule of a discrete-time objective that is told none
PREDICTION = 'v'  # and what its network predicts, see docs/improved_ddpm.md
# And what its samples are made with, in fewer steps where it has fewer. What predicts eps needs a sampler that clips D.
SAMPLING = {name: {'sampler': 'dpmpp_2m', 'steps': 18} for name in PREDICTIONS} | {'eps': {'sampler': 'ancestral', 'steps': 50}}

# Noise distribution and weight that each preconditioning was published with.
PUBLISHED = {'edm': ('lognormal', 'edm'), 'iddpm': ('iddpm_levels', 'snr'), 've': ('loguniform', 'snr'), 'vp': ('vp_uniform', 'snr')}


def configure(o):
    """The options of train.py, by their names -> the nested dict that options.json holds."""
    check_batch(o)
    if o.power_ema and not o.snap:
        raise click.ClickException('--power-ema stores averages at snapshots, and --snap=0 makes none; raise --snap')
    Corruption(o.sigma, o.corruption_probability, o.corruption_seed, o.corruption_protocol)  # refuses values out of range
    dataset = ImageDataset(o.data, use_labels=o.cond, keep=o.dataset_keep_percentage, xflip=o.xflip)
    noise, weight = PUBLISHED[o.precond]
    return dict(
        expr_id=o.expr_id,
        seed=distributed.broadcast(o.seed if o.seed is not None else misc.seed_of(os.urandom(8).hex()) % 2**31),
        data=dict(path=o.data, use_labels=o.cond, keep=o.dataset_keep_percentage, xflip=o.xflip,
                  cache_gib=o.cache_gib if o.cache else 0.0, workers=o.workers),
        corruption=dict(sigma=o.sigma, probability=o.corruption_probability, seed=o.corruption_seed, protocol=o.corruption_protocol),
        val=validation_options(o), metrics=metrics_options(o, dataset),
        network=network_config(o, dataset),
        objective=dict(noise=None if o.objective else o.noise or noise, weight=o.weight or weight, penalty=o.penalty,
                       pairing=with_inverse_weight(o.pairing) if o.ambient_weight == 'inverse' else o.pairing,
                       ambient_weight=o.ambient_weight,
                       consistency=consistency_spec(o), **discrete_objective(o, dataset)),
        label_corruption=label_corruption(o), cep=o.cep,
        augment=o.augment,
        optimizer=dict(lr=o.lr, betas=[0.9, 0.999], eps=1e-8, weight_decay=o.weight_decay),
        lr_rampup_kimg=o.lr_rampup * 1e3,
        ema=dict(halflife_kimg=o.ema * 1e3, rampup_ratio=0.05), power_ema=o.power_ema, clip=o.clip, gns=o.gns,
        batch=o.batch, batch_gpu=o.batch_gpu or o.batch // distributed.size(), loss_scale=o.ls,
        precision=choose_precision(o), bench=o.bench, compile=o.compile_net,
        duration_kimg=o.duration * 1e3, tick_kimg=o.tick, snapshot_ticks=o.snap, state_ticks=o.dump, samples=o.samples,
        transfer=o.transfer, desc=o.desc, ranks=distributed.size(), versions=misc.versions())


def check_batch(o):
    """Refuses batch sizes that do not go into equal whole parts."""
    world = distributed.size()
    if o.batch < world:
        raise click.ClickException(f'--batch={o.batch} is smaller than the {world} ranks; use at least --batch={world}, or fewer ranks')
    if o.batch % world:
        raise click.ClickException(f'--batch={o.batch} is not divisible by the {world} ranks; try --batch={o.batch // world * world}')
    part = o.batch // world
    if o.gns and world == 1 and (o.batch_gpu or part) == part:
        raise click.ClickException('--gns=1 compares the gradients of parts of a batch: use several ranks, or a --batch-gpu below --batch')
    if o.batch_gpu and part % o.batch_gpu:
        good = max(n for n in range(1, min(o.batch_gpu, part) + 1) if part % n == 0)
        raise click.ClickException(f'--batch={o.batch} is not divisible by {world} ranks x --batch-gpu={o.batch_gpu}; '
                                   f'try --batch-gpu={good}')


def discrete_objective(o, dataset):
    """{}, or what --objective and --timesteps add to the options of an objective. Refuses what does not go with them."""
    if o.objective is None:
        for name, value in [('diffusion', o.diffusion), ('timesteps', o.timesteps), ('prediction', o.prediction)]:
            if value is not None:
                raise click.ClickException(f'--{name}={value} is for discrete-time objectives: add --objective=hybrid, say')
        return {}
    here, (name, _) = f'--objective={o.objective}', parse(o.objective)
    if o.precond != 'iddpm':
        raise click.ClickException(f'{here} has discrete timesteps, which --precond={o.precond} does not know; use --precond=iddpm')
    if o.noise:
        raise click.ClickException(f'--noise={o.noise} does not go with {here}, whose levels are those of --diffusion; leave it out')
    if name != 'simple' and dataset.units is not None:
        raise click.ClickException(f'{here} is about the probability of grey levels, and this data is not 8-bit; use --objective=simple')
    own = [('weight', o.weight, None), ('penalty', o.penalty, 'squared'), ('ambient-weight', o.ambient_weight, 'none')]
    for option, value, plain in own if name == 'vlb' else []:
        if value != plain:
            raise click.ClickException(f'--{option}={value} does not go with {here}: the bound says what an error costs; '
                                       'use hybrid or simple, or leave it out')
    return dict(kind=o.objective, timesteps=o.timesteps or 'uniform')


def consistency_spec(o):
    """--consistency, or the published options in its form; None where the term is off."""
    published = dict(coeff=o.consistency_coeff, batch_size=o.consistency_batch_size, samples=o.num_primes, weighted=o.with_weight,
                     grad=o.with_grad, steps=o.num_consistency_steps and o.num_consistency_steps - 1)
    given = {key: value for key, value in published.items() if value is not None}
    if o.consistency and given:
        raise click.ClickException(f'--consistency={o.consistency} and the published options (--consistency-coeff and companions) '
                                   'exclude each other; give one form')
    if not given.get('coeff'):
        return o.consistency
    if (size := given.get('batch_size', 32)) > o.batch:
        raise click.ClickException(f'--consistency-batch-size={size} is larger than --batch={o.batch}; use at most that')
    return published_spec(**given)


def label_corruption(o):
    """{} or the arguments of LabelCorruption."""
    if not o.label_corruption:
        if o.label_corruption_groups is not None:
            raise click.ClickException('--label-corruption-groups needs a --label-corruption=RATE above 0')
        return {}
    if not o.cond:
        raise click.ClickException(f'--label-corruption={o.label_corruption:g} changes class labels; train with --cond=1')
    found = dict(rate=o.label_corruption, seed=o.corruption_seed, groups=o.label_corruption_groups)
    LabelCorruption(**found)
    return found


def choose_precision(o):
    """fp32 unless told otherwise; fp16 is for GPUs."""
    if o.fp16 and o.precision not in (None, 'fp16'):
        raise click.ClickException(f'--fp16=1 and --precision={o.precision} exclude each other; give one of them')
    precision = 'fp16' if o.fp16 else o.precision or 'fp32'
    if precision == 'fp16' and not torch.cuda.is_available():
        raise click.ClickException('--precision=fp16 needs a GPU, and there is none here; use fp32 or bf16')
    return precision


def validation_options(o):
    """{}, {"share": 0.05} or {"path": ...}."""
    if o.val is None:
        return {}
    if not o.snap:
        raise click.ClickException(f'--val={o.val} is evaluated at snapshots, and --snap=0 makes none; raise --snap')
    try:
        share = float(o.val)
    except ValueError:
        return dict(path=ImageDataset(o.val, use_labels=o.cond).path)
    if not 0 < share < 1:
        raise click.ClickException(f'--val={o.val}: a share must lie between 0 and 1; or give a data set')
    return dict(share=share)


def metrics_options(o, dataset):
    """{} or what PeriodicMetrics is made from, and `every`, in ticks."""
    if not o.metrics_every:
        if o.metrics_ref is not None:
            raise click.ClickException(f'--metrics-ref={o.metrics_ref} is for metrics during training; add --metrics-every=TICKS')
        return {}
    here = f'--metrics-every={o.metrics_every}'
    if o.metrics_ref is None:
        raise click.ClickException(f'{here} compares with reference statistics: add --metrics-ref=NPZ, as "eval_fid.py ref" writes it')
    if not is_picture(dataset.image_shape[0], dataset.units):
        raise click.ClickException(f'{here} compares 8-bit grey or RGB images, and --data={o.data} has none; use --metrics-every=0')
    return dict(every=o.metrics_every, num=o.metrics_num, ref=o.metrics_ref, names=list(o.metrics), detector=o.metrics_detector)


def network_config(o, dataset):
    """config.json of the network: published constructor arguments."""
    (height, width), prediction = dataset.resolution, o.prediction or PREDICTION
    config = dict(img_resolution=height if height == width else [height, width], img_channels=dataset.image_shape[0],
                  label_dim=dataset.label_dim, use_fp16=o.fp16, **ARCHS[o.arch], dropout=o.dropout)
    given = dict(model_channels=o.cbase, channel_mult=o.cres, num_blocks=o.blocks, attn_resolutions=o.attn, sigma_data=o.sigma_data,
                 augment_dim=9 if o.augment else None)
    config |= {key: value for key, value in given.items() if value is not None}
    if o.label_dropout:
        if not o.cond:
            raise click.ClickException(f'--label-dropout={o.label_dropout:g} leaves out labels; train with --cond=1')
        config['label_dropout'] = o.label_dropout
    if o.cep:
        build_cep(o.cep, dataset.label_dim)
    if o.precond != 'edm':
        config['precond'] = o.precond
        if o.sigma_data is not None and not (o.objective and prediction == 'edm'):
            raise click.ClickException(f'--sigma-data={o.sigma_data} goes with --precond=edm; --precond={o.precond} has no such constant '
                                       'but under --objective with --prediction=edm')
    if o.objective:
        config |= dict(diffusion=o.diffusion or DIFFUSION, prediction=prediction)
        own = SAMPLING[prediction]
        config['sampling'] = own | dict(steps=min(own['steps'], build_diffusion(config['diffusion']).steps))
        if parse(o.objective)[0] == 'simple':
            config['learned_variance'] = False
    if dataset.units is not None:
        config['units'] = dataset.units
    return config


def evaluations_per_image(config):
    """Network evaluations (forward passes of one image) that a training pair costs on average."""
    spec = config['objective']['consistency']
    return 1 if spec is None else 1 + build(spec, CHAINS, '--consistency').evaluations(config['batch'])
