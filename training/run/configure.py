# SPDX-License-Identifier: Apache-2.0
"""From the options of train.py to the Config that a run is built from; combinations that cannot work are refused here."""

import dataclasses
import os

import torch

from dnnlib import EasyDict, UserError
from torch_utils import distributed, misc, numerics, registry
from training.data.corruption import Corruption, LabelCorruption
from training.data.dataset import Form, ImageDataset, Levels
from training.data.identity import open_everywhere
from training.data.pairs import with_inverse_weight
from training.diffusion.discrete import build_diffusion
from training.networks.interface import ARCHS, network_class
from training.networks.preconditioning import PREDICTIONS
from training.objective.loss import TERMS
from training.objective.variational import terms_of
from training.run import config, distill, memory, published, regimes
from training.run.build import build_cep, build_corruption, build_optimizer, probe
from training.run.optimizer import LearningRate
from training.run.options import DIFFUSION, PREDICTION
from training.sampling.pixels import is_picture

# Sampler of networks with a discrete-time objective, in fewer steps where the schedule has fewer. With eps it has to be one that clips D.
SAMPLING = {name: {'sampler': 'dpmpp_2m', 'steps': 18} for name in PREDICTIONS} | {'eps': {'sampler': 'ancestral', 'steps': 50}}

FP16_SCALE = 2.0 ** 16  # first loss scale of fp16: at 1 most gradients of activations round to 0

# Noise distribution and weight that each preconditioning was published with.
PUBLISHED = {'edm': ('lognormal', 'edm'), 'iddpm': ('iddpm_levels', 'snr'), 've': ('loguniform', 'snr'), 'vp': ('vp_uniform', 'snr')}


def configure(o: EasyDict) -> config.Config:
    """The options of train.py, by their names -> the Config."""
    check_batch(o)
    if o.shard and o.gns:
        raise UserError('--gns=1 compares the gradients of whole ranks, which --shard=1 never has; leave one of them out')
    if o.power_ema and not o.snap:
        raise UserError('--power-ema stores averages at snapshots, and --snap=0 disables them; raise --snap')
    corruption = config.CorruptionConfig(o.sigma, o.corruption_probability, o.corruption_seed, o.corruption_protocol, label_corruption(o),
                                           o.sigma_min_as)
    corrupter = build_corruption(corruption)  # refuses values out of range
    check_corruption(o)
    o, teacher = distill.options_with(o)
    data, dataset = open_data(o, corrupter)
    o = of_latents(o, dataset)
    data = dataclasses.replace(data, augment=o.augment)
    regime = regimes.choose(o, dataset.levels)
    if dataset.text and corruption.labels and corruption.labels.groups is not None:
        raise UserError(f'--label-corruption-groups={corruption.labels.groups}: groups are of classes, and the labels of --data are '
                        'captions; leave it out')
    precision, compiled = choose_precision(o), choose_compile(o)
    found = config.Config(
        data=data,
        corruption=corruption,
        network=network(o, dataset, teacher, regime),
        objective=objective(o, dataset, teacher),
        optimizer=optimizer(o, precision),
        run=config.RunConfig(
            seed=distributed.broadcast(o.seed if o.seed is not None else misc.seed_of(os.urandom(8).hex()) % 2**31),
            batch=o.batch, batch_gpu=part_of(o), duration_kimg=o.duration * 1e3, tick_kimg=o.tick,
            snapshot_ticks=o.snap, state_ticks=o.dump, state_minutes=o.dump_minutes, keep_states=o.keep_states,
            max_hours=o.max_hours, samples=o.samples, metrics=metrics(o, dataset), gns=o.gns,
            precision=precision, bench=o.bench, compile=compiled, checkpointing=published.checkpoint(o) == 'blocks', shard=o.shard,
            expr_id=o.expr_id, desc=o.desc, regime=regime, ranks=distributed.size(), versions=misc.versions(),
            command=o.get('command') or {}))
    unknown = o.batch_gpu == 'auto', published.checkpoint(o) == 'auto'
    if any(unknown):
        found = memory.resolve(found, *unknown, distributed.device())
        check_batch(EasyDict(o, batch_gpu=found.run.batch_gpu))
    return found


def check_corruption(o: EasyDict) -> None:
    """Refuses one of --sigma and --corruption-probability without the other, which would silently train on clean images; an explicit 0 is
    accepted."""
    halves = [('sigma', 'how noisy the corrupted images are'), ('corruption_probability', 'which fraction of the images is corrupted')]
    for (one, _), (other, meaning) in (halves, halves[::-1]):
        if o[one] and not o[other] and other not in o.get('command', {}):
            raise UserError(f'--{one.replace("_", "-")}={o[one]:g} does nothing without --{other.replace("_", "-")}, {meaning}; '
                            f'add it (0: train on clean images)')


def check_batch(o: EasyDict) -> None:
    """Refuses batch sizes that cannot be divided evenly."""
    world = distributed.size()
    if o.batch < world:
        raise UserError(f'--batch={o.batch} is smaller than the {world} ranks; use at least --batch={world}, or fewer ranks')
    if o.batch % world:
        raise UserError(f'--batch={o.batch} is not divisible by the {world} ranks; try --batch={o.batch // world * world}')
    if o.batch_gpu == 'auto':
        return
    part = o.batch // world
    if o.gns and world == 1 and (o.batch_gpu or part) == part:
        raise UserError('--gns=1 compares the gradients of parts of a batch: use several ranks, or a --batch-gpu smaller than --batch')
    if o.batch_gpu and part % o.batch_gpu:
        good = max(n for n in range(1, min(o.batch_gpu, part) + 1) if part % n == 0)
        raise UserError(f'--batch={o.batch} is not divisible by {world} ranks x --batch-gpu={o.batch_gpu}; '
                        f'try --batch-gpu={good}')


def part_of(o: EasyDict) -> int:
    """Images per forward pass; of --batch-gpu=auto, the most that it may become."""
    return o.batch // distributed.size() if o.batch_gpu in (None, 'auto') else o.batch_gpu


def open_data(o: EasyDict, corruption: Corruption) -> tuple[config.DataConfig, Form]:
    """(DataConfig, Form) of --data and --val, after checking that they are the same on all ranks and fit the Corruption."""
    held_out = validation(o)

    def opened(path, **options):
        dataset = ImageDataset(path, cache_dir=o.cache_dir, **options)
        corruption.beyond_sigma_min(dataset.native_sigma, dataset.sigma_min, dataset.sigma_max)
        if corruption.sigma_min_as == 'noise' and path == o.data and not dataset.sigma_min.any():
            raise UserError(f'--sigma-min-as=noise: no image of --data={o.data} has a sigma_min; leave it out')
        if o.regime and path == o.data:
            dataset.levels = Levels.of(corruption.levels(dataset.raw_idx, dataset.native_sigma, dataset.image_shape))
        return dataset

    openers = {f'--data={o.data}': lambda: opened(o.data, use_labels=o.cond, keep=o.dataset_keep_percentage, xflip=o.xflip)}
    if held_out and held_out.path:
        openers[f'--val={held_out.path}'] = lambda: opened(held_out.path, use_labels=o.cond)
    if o.data_on == 'device' and not torch.cuda.is_available():
        raise UserError('--data-on=device needs a GPU, and none is available; use auto or host')
    (form, *_), (fingerprint, *own) = open_everywhere(openers)
    if own:
        held_out = dataclasses.replace(held_out, fingerprint=own[0])
    return config.DataConfig(path=o.data, use_labels=o.cond, keep=o.dataset_keep_percentage, xflip=o.xflip, augment=o.augment,
                             validation=held_out, cache_gib=o.cache_gib if o.cache else 0.0, cache_dir=o.cache_dir, on=o.data_on,
                             workers=o.workers, fingerprint=fingerprint), form


def of_latents(o: EasyDict, dataset: Form) -> EasyDict:
    """The options for this data: latents are not augmented, because a mirrored or turned latent is not that of such a picture. Says what
    noise means for them."""
    if dataset.latents is None:
        return o
    if o.augment and 'augment' in o.get('command', {}):
        raise UserError(f'--augment={o.augment:g}: --data={o.data} holds latents, and a turned or moved latent is not the latent of such a '
                        'picture; use --augment=0')
    distributed.print0(f'Latents {dataset.latents.words()}; they are not augmented')
    if o.sigma and o.corruption_probability:
        distributed.print0(f'--sigma={o.sigma:g} is noise of the latents in network units; white noise of pixels is not white in latents')
    return EasyDict(o, augment=0.0)


# ---- the objective


def objective(o: EasyDict, dataset: Form, teacher: distill.Teacher | None = None) -> config.ObjectiveConfig:
    """The ObjectiveConfig: the chosen pieces, and the loss terms that the options amount to."""
    noise, weight = PUBLISHED[o.precond]
    if o.objective:
        check_discrete(o, dataset)
    else:
        for name, value in [('diffusion', o.diffusion), ('timesteps', o.timesteps), ('prediction', o.prediction)]:
            if value is not None:
                raise UserError(f'--{name}={value} is for discrete-time objectives: add one, such as --objective=hybrid')
    inverse = o.ambient_weight == 'inverse'
    terms = terms_of(o.objective, inverse)
    if spec := published.consistency(o):
        registry.build(spec, TERMS, '--consistency', noise=None, weight=None, batch=o.batch)  # refuses what does not fit the batch
        terms.append(spec)
    return config.ObjectiveConfig(noise=None if o.objective else o.noise or noise, weight=o.weight or weight, penalty=o.penalty,
                                  pairing=with_inverse_weight(o.pairing) if inverse else o.pairing, terms=[*terms, *o.term],
                                  timesteps=o.timesteps or 'uniform', distill=teacher and teacher.spec,
                                  teacher_sha256=teacher and teacher.sha256)


def check_discrete(o: EasyDict, dataset: Form) -> None:
    """Refuses what does not go with --objective."""
    here, (name, _) = f'--objective={o.objective}', registry.parse(o.objective)
    if o.precond != 'iddpm':
        raise UserError(f'{here} has discrete timesteps, which --precond={o.precond} does not have; use --precond=iddpm')
    if o.noise:
        raise UserError(f'--noise={o.noise} cannot be combined with {here}, whose levels are those of --diffusion; leave it out')
    if name != 'simple' and dataset.units is not None:
        raise UserError(f'{here} bounds the likelihood of 8-bit images, and this data is not 8-bit; use --objective=simple')
    own = [('weight', o.weight, None), ('penalty', o.penalty, 'squared'), ('ambient-weight', o.ambient_weight, 'none')]
    for option, value, plain in own if name == 'vlb' else []:
        if value != plain:
            raise UserError(f'--{option}={value} cannot be combined with {here}: the bound alone defines the cost of an error; '
                            'use hybrid or simple, or leave it out')


# ---- the network


def network(o: EasyDict, dataset: Form, teacher: distill.Teacher | None, regime: str | None) -> config.NetworkConfig:
    """The NetworkConfig; with --distill the network is that of the teacher. regime: the name of that of --regime."""
    if teacher is None:
        found = network_arguments(o, dataset)
        if own := regimes.sampling(regime, dataset.levels, found.get('sampling')):
            found['sampling'] = own
        return config.NetworkConfig(found, cep=o.cep, transfer=o.transfer)
    given = [key for key in ('arch', 'cbase', 'cres', 'blocks', 'attn', 'dropout') if key in o.get('command', {})]
    return config.NetworkConfig(distill.arguments(teacher, dataset, o, architecture(o) if given else None), transfer=o.transfer,
                                teacher=teacher.ref)


def network_arguments(o: EasyDict, dataset: Form) -> dict:
    """config.json of the network: published constructor arguments."""
    (height, width), prediction = dataset.resolution, o.prediction or PREDICTION
    found = dict(img_resolution=height if height == width else [height, width], img_channels=dataset.image_shape[0],
                 label_dim=dataset.label_dim, use_fp16=o.fp16, **architecture(o))
    given = dict(sigma_data=o.sigma_data, augment_dim=9 if o.augment and takes(found, 'augment_dim') else None)
    found |= {key: value for key, value in given.items() if value is not None}
    if dataset.text:
        found |= text_arguments(dataset.text, found)
    if o.label_dropout:
        if not o.cond:
            raise UserError(f'--label-dropout={o.label_dropout:g} drops class labels; train with --cond=1')
        if not takes(found, 'label_dropout'):
            raise UserError(f'--label-dropout={o.label_dropout:g}: --arch={o.arch} has no label dropout; leave it out')
        found['label_dropout'] = o.label_dropout
    if o.cep:
        build_cep(o.cep, dataset.label_dim)
    if o.precond != 'edm':
        found['precond'] = o.precond
        if o.sigma_data is not None and not (o.objective and prediction == 'edm'):
            raise UserError(f'--sigma-data={o.sigma_data} is for --precond=edm; --precond={o.precond} has no such constant '
                            'except with --objective and --prediction=edm')
    if o.objective:
        found |= dict(diffusion=o.diffusion or DIFFUSION, prediction=prediction)
        own = SAMPLING[prediction]
        found['sampling'] = own | dict(steps=min(own['steps'], build_diffusion(found['diffusion']).steps))
        if registry.parse(o.objective)[0] == 'simple':
            found['learned_variance'] = False
    if dataset.units is not None:
        found['units'] = dataset.units
    if dataset.latents is not None:
        found['autoencoder'] = dataset.latents.autoencoder
    return found


def text_arguments(text: dict, found: dict) -> dict:
    """What config.json says about labels that were made of captions; `found`: the rest of it.

    A network that takes token sequences is told their shape, by the constructor arguments of U-ViT's text variant."""
    named = {'clip_dim': text['dim'], 'num_clip_token': text['tokens']} if text['tokens'] else {}
    return {'text': text, **{key: value for key, value in named.items() if takes(found, key)}}


def architecture(o: EasyDict) -> dict:
    """The network's part of config.json, from --arch and the published options that are keys of it."""
    return registry.build(published.architecture(o), ARCHS, '--arch')()


def takes(arguments: dict, name: str) -> bool:
    """Whether the network's class has such a constructor argument."""
    return name in registry.parameters(network_class(arguments['model_type']))


# ---- optimizer, averages, run


def optimizer(o: EasyDict, precision: str) -> config.OptimizerConfig:
    """The OptimizerConfig."""
    scale = (FP16_SCALE if precision == 'fp16' else 1.0) if o.ls == 'auto' else o.ls
    found = config.OptimizerConfig(kind=published.optimizer(o), lr=o.lr, schedule=lr_schedule(o), rampup_kimg=o.lr_rampup * 1e3,
                                   clip=o.clip, loss_scale=scale, ema_halflife_kimg=o.ema * 1e3, power_ema=o.power_ema)
    build_optimizer(found, [torch.nn.Parameter(torch.zeros(1))])  # refuses values out of range, as the next line does
    probe('--lr-schedule', o.lr_schedule, lambda: LearningRate(found)(0, o.batch))
    return found


def lr_schedule(o: EasyDict) -> str:
    """--lr-schedule; where its length is that of the run, it is written out, so that a longer continuation does not change it unnoticed."""
    name, given = registry.parse(o.lr_schedule)
    if name == 'cosine' and not given.get('kimg'):
        return registry.unparse(name, given | {'kimg': o.duration * 1e3})
    return o.lr_schedule


def label_corruption(o: EasyDict) -> config.LabelConfig | None:
    """The LabelConfig, or None."""
    if not o.label_corruption:
        if o.label_corruption_groups is not None:
            raise UserError('--label-corruption-groups needs a --label-corruption=RATE above 0')
        return None
    if not o.cond:
        raise UserError(f'--label-corruption={o.label_corruption:g} changes class labels; train with --cond=1')
    LabelCorruption(o.label_corruption, o.corruption_seed, o.label_corruption_groups)
    return config.LabelConfig(rate=o.label_corruption, seed=o.corruption_seed, groups=o.label_corruption_groups)


def choose_precision(o: EasyDict) -> str:
    """The precision. auto: bf16 where all ranks have GPUs that compute in it natively, fp32 elsewhere.

    fp16 needs a GPU, except to print the configuration."""
    if o.fp16 and o.precision not in ('auto', 'fp16'):
        raise UserError(f'--fp16=1 and --precision={o.precision} exclude each other; give one of them')
    precision = 'fp16' if o.fp16 else o.precision
    if precision == 'fp16' and not torch.cuda.is_available() and not o.dry_run:
        raise UserError('--precision=fp16 needs a GPU, and none is available; use fp32 or bf16')
    if precision != numerics.AUTO:
        return precision
    return numerics.FAST if all(distributed.all_values(numerics.is_native(numerics.FAST, distributed.device()))) else 'fp32'


def choose_compile(o: EasyDict) -> bool:
    """Whether to compile. auto: where all ranks can and it pays."""
    if o.compile_net != numerics.AUTO:
        return o.compile_net
    return all(distributed.all_values(numerics.can_compile(distributed.device())))


def validation(o: EasyDict) -> config.ValidationConfig | None:
    """The ValidationConfig, still without a fingerprint, or None."""
    if o.val is None:
        return None
    if not o.snap:
        raise UserError(f'--val={o.val} is evaluated at snapshots, and --snap=0 disables them; raise --snap')
    try:
        share = float(o.val)
    except ValueError:
        return config.ValidationConfig(path=o.val)
    if not 0 < share < 1:
        raise UserError(f'--val={o.val}: a fraction must lie between 0 and 1; or give the path of a data set')
    return config.ValidationConfig(share=share)


def metrics(o: EasyDict, dataset: Form) -> config.MetricsConfig | None:
    """The MetricsConfig, or None."""
    if not o.metrics_every:
        if o.metrics_ref is not None:
            raise UserError(f'--metrics-ref={o.metrics_ref} is for metrics during training; add --metrics-every=TICKS')
        return None
    here = f'--metrics-every={o.metrics_every}'
    if o.metrics_ref is None:
        raise UserError(f'{here} needs reference statistics: add --metrics-ref=NPZ, a file written by "eval_fid.py ref"')
    if dataset.latents is None and not is_picture(dataset.image_shape[0], dataset.units):
        raise UserError(f'{here} compares 8-bit grey or RGB images, and --data={o.data} has none; use --metrics-every=0')
    return config.MetricsConfig(every=o.metrics_every, num=o.metrics_num, ref=o.metrics_ref, names=list(o.metrics),
                                detector=o.metrics_detector)
