# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: a tree of frozen dataclasses, one for each part of the program, to JSON and back.

options.json of a run and "options" of a training state hold what to_json() returns; the network's part is its config.json. from_json()
also reads those of version 0.1.0, which were one flat object."""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from dnnlib import UserError
from torch_utils import registry
from training.objective.variational import terms_of


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out images: a share of the training data, or a data set of their own."""

    share: float = 0.0
    path: str | None = None
    fingerprint: dict | None = None  # of that data set; None where version 0.2.0 or an older one wrote this


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are held and augmented."""

    path: str
    use_labels: bool = False
    keep: float = 1.0  # fraction of the images that are used at all
    xflip: bool = False
    augment: float = 0.0  # probability of augmentation
    validation: ValidationConfig | None = None
    cache_gib: float = 8.0  # memory per node for noisy images
    cache_dir: str | None = None  # folder of decoded copies
    on: str = 'auto'  # where batches are assembled: host, device, or auto: on the device if the images fit
    workers: int = 1
    fingerprint: dict | None = None  # identifies the data (dnnlib.fingerprint); None where version 0.2.0 or an older one wrote this


@dataclass(frozen=True)
class LabelConfig:
    """Which fraction of the images gets a wrong class, and which classes are confused with each other (None: all)."""

    rate: float
    seed: int = 0
    groups: list | None = None


@dataclass(frozen=True)
class CorruptionConfig:
    """Which images are noisy, at which level and with which noise, and which labels are wrong."""

    sigma: float = 0.0
    probability: float = 0.0
    seed: int = 0
    protocol: str = 'fixed'
    labels: LabelConfig | None = None
    sigma_min_as: str = 'limit'


@dataclass(frozen=True)
class NetworkConfig:
    """The network. arguments: its config.json, the published constructor arguments. cep: a piece of conditioning.CEP. teacher: the network
    that ObjectiveConfig.distill starts from."""

    arguments: dict
    cep: str | None = None
    transfer: str | None = None  # where its first weights come from
    teacher: str | None = None


@dataclass(frozen=True)
class ObjectiveConfig:
    """Pieces as the command line names them; noise None: the levels of the network's own timesteps. distill: without its teacher, which is
    known by the digest of its weights."""

    noise: str | None
    weight: str
    penalty: str = 'squared'
    pairing: str = 'skip'
    terms: list = field(default_factory=lambda: ['denoise'])
    timesteps: str = 'uniform'
    distill: str | None = None
    teacher_sha256: str | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate, gradient handling and weight averages."""

    kind: str = 'adam'
    lr: float = 1e-3
    schedule: str = 'constant'
    rampup_kimg: float = 10_000.0
    clip: float = 0.0
    loss_scale: float = 1.0
    ema_halflife_kimg: float = 500.0
    ema_rampup_ratio: float | None = 0.05
    power_ema: list = field(default_factory=list)


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics of samples of the weight average, every `every` ticks."""

    every: int
    num: int
    ref: str
    names: list
    detector: str


@dataclass(frozen=True)
class RunConfig:
    """Length, batch sizes, intervals and speed of the run, and the versions and command that started it."""

    seed: int
    batch: int
    batch_gpu: int
    duration_kimg: float
    tick_kimg: float = 50.0
    snapshot_ticks: int = 50
    state_ticks: int = 500
    state_minutes: float = 30.0
    keep_states: int = 3  # 0: all
    max_hours: float = 0.0  # 0: any
    samples: int = 64
    metrics: MetricsConfig | None = None
    gns: bool = False
    precision: str = 'fp32'
    bench: bool = True
    compile: bool = False
    checkpointing: bool = False
    shard: bool = False
    expr_id: str | None = None
    desc: str | None = None
    regime: str | None = None  # of regimes.REGIMES
    ranks: int = 1
    versions: dict = field(default_factory=dict)
    command: dict = field(default_factory=dict)  # the options that were given, for --config


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run; each builder takes its own part."""

    data: DataConfig
    corruption: CorruptionConfig
    network: NetworkConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    run: RunConfig


def to_json(config: Config) -> dict:
    """The tree as nested dicts of JSON types."""
    return dataclasses.asdict(config)


def from_json(values: object, kind: type = Config, where: str = '') -> Any:
    """The tree from the result of to_json(), of this version or of 0.1.0. Raises UserError for unknown or missing keys."""
    if not isinstance(values, dict):
        raise UserError(f'configuration: "{where.rstrip(".") or "it"}" must be an object, got {type(values).__name__}')
    if kind is Config and 'run' not in values and 'lr_rampup_kimg' in values:
        try:
            values = of_version_0_1(values)
        except KeyError as err:
            raise UserError(f'configuration: missing key {err} of version 0.1.0') from None
        except (AttributeError, TypeError, ValueError):
            raise UserError('configuration: it has the keys of version 0.1.0, but not their kinds of values') from None
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in set(values) - set(fields))
    missing = [name for name, f in fields.items()
               if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    for problem, names in (('unknown', unknown), ('missing', missing)):
        if names:
            raise UserError(f'configuration: {problem} key "{where}{names[0]}"; {where or "it"} holds {", ".join(fields)}')
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f'{where}{name}') for name, value in values.items()})


def _value(hint, value, where):
    """A value of the type that the field has: a subtree, or a plain JSON value."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    wanted = next(choice for choice in choices if choice is not type(None))
    if dataclasses.is_dataclass(wanted):
        return from_json(value, wanted, f'{where}.')
    plain = (int, float) if wanted is float else wanted
    if not isinstance(value, plain) or isinstance(value, bool) != (wanted is bool) or not _is_json(value):
        raise UserError(f'configuration: "{where}" must be {wanted.__name__}, got {value!r}'[:300])
    return value


def _is_json(value):
    """Whether a value is made of JSON types, with finite numbers below 2^64."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str) or isinstance(value, int | float) and abs(value) < 2 ** 64


# ---- options of version 0.1.0: one flat dict with a few dicts in it


def of_version_0_1(o: dict) -> dict:
    """The nested dict that this version would have written for a run of version 0.1.0."""
    optimizer, objective = dict(o['optimizer']), dict(o['objective'])
    take = lambda *names: {name: o[name] for name in names}
    decay = optimizer['weight_decay']
    arguments = dict(o['network'])
    if 'diffusion' in arguments:
        arguments.setdefault('prediction', 'eps')  # the only one in that version
    return dict(
        data=dict(o['data'], augment=o['augment'], validation=o['val'] or None),
        corruption=dict(o['corruption'], labels=o['label_corruption'] or None),
        network=dict(arguments=arguments, cep=o['cep'], transfer=o['transfer']),
        objective=dict(**{name: objective[name] for name in ('noise', 'weight', 'penalty', 'pairing')}, terms=_terms_0_1(objective),
                       timesteps=objective.get('timesteps', 'uniform')),
        optimizer=dict(kind=registry.unparse('adam', {'weight_decay': decay} if decay else {}), lr=optimizer['lr'],
                       rampup_kimg=o['lr_rampup_kimg'], **take('clip', 'loss_scale', 'power_ema'),
                       ema_halflife_kimg=o['ema']['halflife_kimg'], ema_rampup_ratio=o['ema']['rampup_ratio']),
        run=dict(**take('seed', 'batch', 'batch_gpu', 'duration_kimg', 'tick_kimg', 'snapshot_ticks', 'state_ticks', 'samples', 'gns',
                        'precision', 'bench', 'compile', 'expr_id', 'desc', 'ranks', 'versions'), metrics=o['metrics'] or None))


def _terms_0_1(objective):
    """The terms that an objective of version 0.1.0 was made of."""
    terms = terms_of(objective.get('kind'), inverse=objective['ambient_weight'] == 'inverse')
    return terms + ([objective['consistency']] if objective['consistency'] else [])
